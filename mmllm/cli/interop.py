"""`mmllm export` and `mmllm import`: checkpoints of transformers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, check_model


def add_interop(commands: Any) -> None:
    """Adds `mmllm export` and `mmllm import`."""
    parser = add_command(commands, "export", "a model's decoder as a transformers checkpoint", _export)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the checkpoint goes")

    parser = add_command(commands, "import", "a transformers checkpoint as a decoder to train from", _import)
    parser.add_argument("source", help="folder of a Mixtral or Qwen3-MoE checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="for DecoderModule's `init_from`")


def _export(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.training import interop_commands

    return [interop_commands.export(args.model, args.out)]


def _import(args: argparse.Namespace) -> Iterable[str]:
    if not Path(args.source).is_dir():
        raise FileNotFoundError(f"{args.source} is no folder; give the folder of a Mixtral or Qwen3-MoE checkpoint")
    from mmllm.training import interop_commands

    return [interop_commands.import_decoder(args.source, args.out)]
