"""`mmllm adapter` and `mmllm upcycle`: what is made of a model folder without training it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_group, check_model, check_there


def add_adapters(commands: Any) -> None:
    """Adds `mmllm adapter ls`, `add`, `merge` and `export`."""
    actions = add_group(commands, "adapter", "adapters of a model folder: list, add, merge, export")
    parser = add_command(actions, "ls", "adapters that a model folder has", _ls)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")

    parser = add_command(actions, "add", "put an adapter that PEFT saved into a model folder", _add)
    parser.add_argument("source", help="folder with adapter_config.json and adapter_model.safetensors")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--name", required=True, help="what it is called there")

    parser = add_command(actions, "merge", "a model folder with an adapter in its weights", _merge)
    _add_adapter(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="model folder to write")

    parser = add_command(actions, "export", "an adapter as vLLM's multi-LoRA loads it beside the model", _export)
    _add_adapter(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="where the adapter goes")


def add_upcycle(commands: Any) -> None:
    """Adds `mmllm upcycle`."""
    parser = add_command(commands, "upcycle", "a dense model as one of experts that computes the same", _upcycle)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="model folder to write")
    parser.add_argument("--experts", type=int, default=8, help="copies of each MLP")
    parser.add_argument("--top_k", type=int, default=2, help="copies that a token passes")
    parser.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="cut each copy into G experts; G times as many are chosen",
    )
    parser.add_argument(
        "--noise", type=float, default=0.0, metavar="S", help="noise on the experts, S of their deviation"
    )
    parser.add_argument("--seed", type=int, default=0, help="of routers and noise")


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", required=True, metavar="NAME", help="of its adapters")


def _ls(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.interop import adapters

    return adapters.listed(args.model)


def _add(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("adapter", args.source)
    from mmllm.interop import adapters

    return [adapters.add(args.model, args.source, args.name)]


def _merge(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.interop import adapters

    return [adapters.merge(args.model, args.adapter, args.out)]


def _export(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.interop import adapters

    return [adapters.export(args.model, args.adapter, args.out)]


def _upcycle(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    from mmllm.interop.upcycle import Upcycling, upcycle

    how = Upcycling(args.experts, args.top_k, args.granularity, args.noise, args.seed)
    return upcycle(args.model, args.out, how)
