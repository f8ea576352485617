"""`mmllm serve`: models as a server that OpenAI's clients can ask."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there

_CONVERSATIONS = {"auto": None, "yes": True, "no": False}
_MIB = 2**20


def add_serving(commands: Any) -> None:
    """Adds `mmllm serve`."""
    parser = add_command(commands, "serve", "a server that OpenAI's clients can ask", _serve)
    parser.add_argument(
        "--model", action="append", required=True, metavar="[NAME=]DIR",
        help="model folder, and by what name clients ask for it, by default the folder's; may be repeated",
    )  # fmt: skip
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters, which answers in its place")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights")
    parser.add_argument("--draft", metavar="DIR", help="a smaller model that `mmllm draft` made, which speeds this up")
    parser.add_argument(
        "--speculation", choices=("lookup",), help="guess what a prompt or its text has had before: quicker where it "
        "repeats itself",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: of any network")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api_key_file", metavar="FILE", help="keys, one a line, of which each request must have one")
    parser.add_argument("--cors", nargs="+", default=[], metavar="ORIGIN", help="web pages that may ask, * for any")
    parser.add_argument(
        "--allow_remote", nargs="+", default=[], metavar="HOST", help="hosts from which pictures may be fetched"
    )
    parser.add_argument(
        "--conversations", choices=tuple(_CONVERSATIONS), default="auto",
        help="whether the model was trained on conversations; auto: if it has a chat template",
    )  # fmt: skip
    _add_bounds(parser)


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--max_rows", type=int, default=64, metavar="N", help="requests that are answered at once")
    parser.add_argument("--max_queue", type=int, default=64, metavar="N", help="that wait beside them; others get 429")
    parser.add_argument(
        "--max_speaking", type=int, metavar="N",
        help="sounds that are streamed at once; others get 429; by default as many as are made in time, found out at "
        "the start",
    )  # fmt: skip
    parser.add_argument("--max_cached_tokens", type=int, metavar="N", help="of all requests that are answered")
    parser.add_argument(
        "--prefix_cache_mb", type=float, default=64, metavar="MB", help="kept of prompts, for those that begin alike"
    )
    parser.add_argument("--max_context", type=int, default=16_384, metavar="N", help="tokens of prompt and answer")
    parser.add_argument("--max_new_tokens", type=int, default=4096, metavar="N", help="that a client may ask for")
    parser.add_argument("--max_body_mb", type=float, default=32, metavar="MB", help="of a request")
    parser.add_argument("--max_pixels", type=int, default=50_000_000, metavar="N", help="of a request's pictures")
    parser.add_argument("--max_sounds_seconds", type=float, default=900, metavar="S", help="of a request's sounds")
    parser.add_argument("--media_threads", type=int, default=2, metavar="N", help="that decode pictures and sounds")
    parser.add_argument(
        "--drain_seconds", type=float, default=30, metavar="S", help="that running requests may take after SIGTERM"
    )


def _serve(args: argparse.Namespace) -> Iterable[str]:
    folders = _folders(args.model)
    for folder in folders.values():
        check_model(folder)
    check_there("file of keys", args.api_key_file)
    if args.adapter is not None and len(folders) > 1:
        raise ValueError("--adapter is given, and several models; serve one model, or start a server for each")
    check_there("draft model", args.draft, hint="give the folder that `mmllm draft` wrote")
    if args.draft is not None and (len(folders) > 1 or args.speculation is not None):
        raise ValueError("--draft is of one model, and its only speculation; give one --model and no --speculation")
    if not 0 <= args.port <= 65_535:
        raise ValueError(f"--port is {args.port}; give 0 to 65535")
    keys = () if args.api_key_file is None else _keys(Path(args.api_key_file))
    config = _config(args, keys)

    for package in ("fastapi", "uvicorn", "prometheus_client", "python_multipart"):
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"`mmllm serve` needs {package}: pip install 'mmllm[serve]'")
    from mmllm.inference.api import load
    from mmllm.inference.engine.requests import EngineConfig
    from mmllm.serving.run import serve
    from mmllm.serving.served import ServedModel

    speculation = "draft" if args.draft is not None else args.speculation or "none"
    engine = EngineConfig(
        args.max_rows, args.max_cached_tokens, prefix_cache_bytes=int(args.prefix_cache_mb * 2**20),
        speculation=speculation,
    )  # fmt: skip
    models = {}
    for name, folder in folders.items():
        called = name if args.adapter is None else f"{name}:{args.adapter}"
        loaded = load(folder, args.device, args.dtype, args.adapter, draft=args.draft, engine=engine)
        models[called] = ServedModel(called, loaded, config)
    return serve(models, config, args.host, args.port)


def _folders(given: list[str]) -> dict[str, str]:
    """Folders by the names that clients ask for."""
    folders: dict[str, str] = {}
    for each in given:
        name, equals, folder = each.partition("=")
        if not equals or Path(each).exists():
            name, folder = Path(each).resolve().name, each
        if not name or name in folders:
            raise ValueError(f"--model {each}: its name is {name!r}, which is taken; give it one: NAME={folder}")
        folders[name] = folder
    return folders


def _keys(path: Path) -> tuple[str, ...]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"{path} has no keys; write one a line")
    return keys


def _config(args: argparse.Namespace, keys: tuple[str, ...]) -> Any:
    from mmllm.serving.config import ServeConfig

    return ServeConfig(
        api_keys=keys,
        cors_origins=tuple(args.cors),
        conversations=_CONVERSATIONS[args.conversations],
        max_queue=args.max_queue,
        max_speaking=args.max_speaking,
        max_body_bytes=round(args.max_body_mb * _MIB),
        max_pixels=args.max_pixels,
        max_sounds_seconds=args.max_sounds_seconds,
        max_context=args.max_context,
        max_new_tokens=args.max_new_tokens,
        media_threads=args.media_threads,
        allow_remote=tuple(args.allow_remote),
        drain_seconds=args.drain_seconds,
    )
