"""`mmllm eval`: scores of a model folder on held-out rows."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_input_options, check_model, check_there, column_names
from mmllm.ticker import end_line, ticker

TASKS = ("caption", "transcribe", "speak", "text", "interleaved", "chat")


def add_evaluation(commands: Any) -> None:
    """Adds `mmllm eval`."""
    parser = add_command(
        commands,
        "eval",
        "scores on held-out rows, with intervals and controls: a grey picture, silence, other rows",
        _eval,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters; without it the model alone")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--manifest", required=True, metavar="FILE", help="held-out rows, of any form")
    add_input_options(parser)
    parser.add_argument("--json", metavar="OUT", help="where scores and predictions go")
    parser.add_argument("--limit", type=int, help="at most so many rows, drawn at random")
    parser.add_argument("--sequence_length", type=int, default=512, help="of text: the length of training's sequences")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--media", metavar="DIR", help="folder for what is spoken")
    parser.add_argument(
        "--judge", metavar="DIR", help="of speak: an aligner of `mmllm data align`, which transcribes too"
    )
    parser.add_argument(
        "--votes", type=int, metavar="N", help="of caption, interleaved: draw N answers a row too; score their majority"
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="of the votes; 0.5 unless told")
    parser.add_argument(
        "--shots", metavar="FILE", help="of caption, transcribe, interleaved: rows to show with their answers"
    )
    parser.add_argument("--num_shots", type=int, metavar="K", help="of --shots: so many in front of each row")
    parser.add_argument(
        "--max_length", type=int, metavar="N",
        help="of --shots: positions of a prompt and its answer; as training's sequences unless told",
    )  # fmt: skip
    parser.add_argument("--shots_filter", metavar="EXPR", help="of --shots: which rows, such as 'plain'")
    parser.add_argument(
        "--anchor", metavar="TEXT", help="text in front of each prompt: the recipe's anchor_prompt; not of speak, text"
    )
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def _eval(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("manifest", args.manifest)
    check_there("judge", args.judge)
    check_there("shots", args.shots)
    voting, shots = _voting(args), _shots(args)
    from mmllm.evaluation import commands

    result = commands.run_eval(
        args.model, args.task, args.manifest, args.json, args.limit, args.batch_size, args.seed, args.media,
        args.sequence_length, args.device, args.max_bad_fraction, ticker(f"prompts of {args.task}"),
        args.format, column_names(args), args.adapter, args.judge, voting, shots, args.anchor,
    )  # fmt: skip
    end_line()
    return commands.score_lines(result)


def _voting(args: argparse.Namespace) -> Any:
    """What `--votes` and `--temperature` say; None: nobody votes."""
    if args.votes is None:
        if args.temperature is not None:
            raise ValueError("--temperature is that of votes, but there are none; give --votes N too, or leave it out")
        return None
    from mmllm.checkpoints.settings import Sampling
    from mmllm.inference.voting import VotingConfig

    default = VotingConfig().sampling
    temperature = default.temperature if args.temperature is None else args.temperature
    return VotingConfig(args.votes, Sampling(temperature=temperature, seed=args.seed))


def _shots(args: argparse.Namespace) -> Any:
    """What `--shots` and `--num_shots` say; None: nothing is shown."""
    if args.shots is None:
        given = [name for name in ("num_shots", "max_length", "shots_filter") if getattr(args, name) is not None]
        if given:
            raise ValueError(
                f"--{given[0]} is that of shots, but there are none; give --shots FILE too, or leave it out"
            )
        return None
    if args.num_shots is None:
        raise ValueError("--shots says what is shown, but not how many rows of it; give --num_shots K too")
    from mmllm.evaluation.shots import ShotsConfig

    return ShotsConfig(args.shots, args.num_shots, args.max_length, args.shots_filter)
