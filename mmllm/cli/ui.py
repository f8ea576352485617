"""`mmllm ui`: a page in the browser for a model."""

from __future__ import annotations

import argparse
import importlib.util
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, check_model

_MIB = 2**20


def add_ui(commands: Any) -> None:
    """Adds `mmllm ui`."""
    parser = add_command(commands, "ui", "a page in the browser that captions, transcribes, speaks and answers", _ui)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="NAME",
        help="of the model's adapters; one is compared with the model alone, two with each other",
    )  # fmt: skip
    parser.add_argument("--compare", metavar="DIR", help="another model folder, to be compared with")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: of any network")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free")
    parser.add_argument("--max_upload_mb", type=float, default=32, metavar="MB", help="of a picture or a sound")
    parser.add_argument("--max_waiting", type=int, default=16, metavar="N", help="questions that wait for others")


def _ui(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    if args.compare is not None:
        check_model(args.compare)
    if len(args.adapter) > 2 or (len(args.adapter) > 1 and args.compare is not None):
        raise ValueError("more than two are to be compared; give --adapter twice, or --adapter and --compare once each")
    if not 0 <= args.port <= 65_535:
        raise ValueError(f"--port is {args.port}; give 0 to 65535")
    if importlib.util.find_spec("gradio") is None:
        raise ModuleNotFoundError("`mmllm ui` needs gradio: pip install 'mmllm[ui]'")
    from mmllm.serving.page import PageConfig
    from mmllm.serving.page_routes import PageLimits
    from mmllm.serving.page_run import serve_page

    config = PageConfig(args.max_waiting, PageLimits(upload_bytes=round(args.max_upload_mb * _MIB)))
    return serve_page(_askers(args), args.host, args.port, config)


def _askers(args: argparse.Namespace) -> list[Any]:
    from mmllm.inference.api import load
    from mmllm.serving.page_answers import Asker, SharedModel

    name = _name(args.model)
    shared = SharedModel(
        load(args.model, args.device, args.dtype, args.adapter or None), next(iter(args.adapter), None)
    )
    askers = [Asker(f"{name} · {adapter}", shared, adapter) for adapter in args.adapter] or [Asker(name, shared)]
    if args.compare is not None:
        other = SharedModel(load(args.compare, args.device, args.dtype))
        askers.append(Asker(_name(args.compare), other))
    elif len(args.adapter) == 1:
        askers.append(Asker(f"{name} alone", shared))
    return askers


def _name(folder: str) -> str:
    """A model's folder and the one around it: many are called `model`."""
    return "/".join(Path(os.path.abspath(folder)).parts[-2:])
