"""`mmllm import` and `mmllm export`: checkpoints of transformers as model folders, and model folders as checkpoints."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, as_json, check_model, check_there


def add_interop(commands: Any) -> None:
    """Adds `mmllm import` and `mmllm export`."""
    _add_import(commands)
    _add_export(commands)


def _add_import(commands: Any) -> None:
    parser = add_command(commands, "import", "a pretrained checkpoint as a model folder, with eyes and ears", _import)
    parser.add_argument("source", help="folder of a language model or of LLaVA, as transformers saves it")
    parser.add_argument("--out", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument(
        "--vision",
        metavar="TOWER",
        help="image tower: a folder of CLIP, SigLIP or SigLIP2 (transformers), of open_clip, or a CLIP run's out "
        "folder; or NAME, NAME:TAG or NAME:FILE of open_clip",
    )
    parser.add_argument("--codec", metavar="DIR", help="folder of an audio tokenizer; without it there is no sound")
    parser.add_argument(
        "--parts",
        metavar="YAML",
        help="what joins them: keys vision_layer, image_projector, audio_projector, loss, audio_pool, pattern, "
        "num_codebooks",
    )
    parser.add_argument("--json", action="store_true", help="print what came, what is new and what stayed as an object")


def _import(args: argparse.Namespace) -> Iterable[str]:
    if not Path(args.source).is_dir():
        raise FileNotFoundError(f"{args.source} is no folder; give the folder of a checkpoint that transformers saved")
    check_there("audio tokenizer", args.codec)
    check_there("file of parts", args.parts)
    from mmllm.interop.importing import import_model, read_options

    report = import_model(args.source, args.out, args.vision, args.codec, read_options(args.parts))
    return as_json(dataclasses.asdict(report)) if args.json else list(report.lines())


def _add_export(commands: Any) -> None:
    parser = add_command(commands, "export", "a model as a checkpoint that transformers and vLLM load", _export)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="where the checkpoint goes")
    parser.add_argument(
        "--format",
        choices=("auto", "decoder", "llava"),
        default="auto",
        help="the decoder in its family's form, or with pictures as LLaVA; auto: LLaVA where it can be",
    )
    parser.add_argument(
        "--keep_added", action="store_true", help="also the ids that were added here: special tokens and audio units"
    )
    parser.add_argument("--json", action="store_true", help="print what went out and what stayed as an object")


def _export(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.interop.exporting import export_model

    report = export_model(args.model, args.out, args.format, args.keep_added)
    return as_json(dataclasses.asdict(report)) if args.json else list(report.lines())
