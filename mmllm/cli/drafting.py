"""`mmllm draft`: a smaller model that guesses what a large one writes."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there


def add_drafting(commands: Any) -> None:
    """Adds `mmllm draft`."""
    parser = add_command(
        commands, "draft", "distil a smaller model that drafts what a large one verifies, which speeds that up", _draft
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the draft model, for --draft")
    parser.add_argument(
        "--kind", choices=("model", "ngram"), default="model", help="ngram: a table of what follows what, which costs "
        "no step but sees and hears nothing; for small models",
    )  # fmt: skip
    parser.add_argument("--minutes", type=float, default=3.0, help="that all of it takes")
    parser.add_argument(
        "--recipe", metavar="FILE", help="data recipe to learn on; without it texts that the model writes itself, "
        "about pictures and sounds of noise: worse",
    )  # fmt: skip
    parser.add_argument("--layers", type=int, default=1, help="that the draft model has")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="the highest")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")


def _draft(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("recipe", args.recipe)
    from mmllm.training.drafting import DraftConfig, make_draft

    config = DraftConfig(args.kind, args.minutes, args.layers, args.recipe, args.learning_rate, args.seed)
    distilled = make_draft(args.model, args.out, config, _note)
    what = "steps on" if args.kind == "model" else "texts with"
    yield f"{args.out}: {distilled.num_steps:,} {what} {distilled.num_ids:,} ids of {args.model}"
    yield from map(str, distilled.speeds)
    if not distilled.speeds:
        yield "not measured: none of the held-back documents has text or a picture to begin with"


def _note(text: str) -> None:
    """A line on stderr."""
    sys.stderr.write(f"mmllm: {text}\n")
    sys.stderr.flush()
