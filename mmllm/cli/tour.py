"""`mmllm posttrain-tour`: what can be done with a trained model, stage by stage."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, check_model, check_there


def add_tour(commands: Any) -> None:
    """Adds `mmllm posttrain-tour`."""
    parser = add_command(
        commands,
        "posttrain-tour",
        "after pre-training: instruct, adapt, prefer and merge the demo's model, each stage as the plain commands that "
        "it is, and a report of what was gained and lost",
        _tour,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="the model to begin with: it sees and hears")
    parser.add_argument("--data", required=True, metavar="DIR", help="the folder of the `mmllm quickstart` run")
    parser.add_argument("--out", required=True, metavar="DIR", help="where everything goes; run again, it goes on")
    parser.add_argument(
        "--stages", default="sft,lora,dpo,grpo,trap", metavar="NAME,…",
        help="also speech, merge, ppo, kto, rm, incremental; by default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=float, default=5.0, metavar="N",
        help="of a usual training, to which the others are in proportion; fewer to try the way out",
    )  # fmt: skip
    parser.add_argument("--limit", type=int, metavar="N", help="rows of each evaluation at most; by default all")
    parser.add_argument("--media", metavar="DIR", help="data sets for stages that use them; by default $MMLLM_DATA")
    parser.add_argument("--seed", type=int, default=0, metavar="S")


def _tour(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("run", args.data, hint="give the folder that `mmllm quickstart --out DIR` made")
    media = args.media or os.environ.get("MMLLM_DATA") or None
    check_there("folder", media)
    from mmllm.quickstart.tour.run import posttrain_tour

    stages = [name.strip() for name in args.stages.split(",") if name.strip()]
    posttrain_tour(
        Path(args.model), Path(args.data), Path(args.out), stages, args.seed, args.minutes,
        None if media is None else Path(media), args.limit,
    )  # fmt: skip
    return []
