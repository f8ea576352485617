"""`mmllm reason`: what ways to reason reach and cost on questions about pictures and sounds."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_input_options, check_model, check_there, column_names

METHODS = ("direct", "vote", "adaptive", "difficulty", "tree", "cot", "few_shot")


def add_reasoning(commands: Any) -> None:
    """Adds `mmllm reason`."""
    parser = add_command(
        commands, "reason", "accuracy and cost of votes, trees, thoughts and shots on questions of a manifest", _reason
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--manifest", required=True, metavar="FILE", help="rows with segments, question and answer")
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=["direct", "vote"], metavar="NAME",
        help=f"one or several of {', '.join(METHODS)}; gains and losses are told beside the first",
    )  # fmt: skip
    add_input_options(parser)
    parser.add_argument("--json", metavar="OUT", help="where scores and answers go")
    parser.add_argument("--limit", type=int, help="at most so many rows, drawn at random")
    parser.add_argument("--votes", type=int, default=8, metavar="N", help="answers that are drawn at most")
    parser.add_argument("--temperature", type=float, default=0.5, metavar="T", help="of votes")
    parser.add_argument("--confidence", type=float, default=0.95, metavar="P", help="at which adaptive ends a vote")
    parser.add_argument(
        "--validation", metavar="FILE", help="of difficulty: rows to choose the threshold on, none of them tested"
    )
    parser.add_argument("--threshold", type=float, metavar="P", help="of difficulty, in the place of --validation")
    parser.add_argument("--first_tokens", type=int, default=4, metavar="N", help="of difficulty: that are looked at")
    parser.add_argument(
        "--certainty", choices=("least", "mean"), default="least", help="of difficulty: of their probabilities"
    )
    parser.add_argument("--budget", type=int, default=48, metavar="N", help="of tree: tokens a question at most")
    parser.add_argument("--branches", type=int, default=4, metavar="N", help="of tree: continuations of a text")
    parser.add_argument("--step_tokens", type=int, default=4, metavar="N", help="of tree: tokens of a continuation")
    parser.add_argument("--beam", type=int, metavar="N", help="of tree: texts of a depth; without it best first")
    parser.add_argument("--thought_tokens", type=int, default=32, metavar="N", help="of cot: of a thought at most")
    parser.add_argument("--shots", metavar="FILE", help="of few_shot: rows that are shown with their answers")
    parser.add_argument("--num_shots", type=int, default=2, metavar="N", help="of few_shot")
    parser.add_argument("--max_length", type=int, help="of few_shot and cot: positions of a prompt and its answer")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def _reason(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("manifest", args.manifest, args.validation, args.shots)
    _check_needs(args)
    from mmllm.evaluation import reasoning_task as task
    from mmllm.inference.api import load
    from mmllm.inference.reasoning import SureConfig, ThinkConfig, TreeConfig

    sure = SureConfig(
        SureConfig.threshold if args.threshold is None else args.threshold, args.certainty, args.first_tokens
    )
    config = task.ReasoningConfig(
        args.votes, args.temperature, args.confidence, sure,
        TreeConfig(args.budget, args.branches, args.step_tokens, beam=args.beam),
        think=ThinkConfig(max_thought_tokens=args.thought_tokens), max_length=args.max_length, seed=args.seed,
    )  # fmt: skip
    model = load(args.model, args.device)

    def read(path: str, limit: int | None = None) -> Any:
        return task.read_questions(
            path, model, limit, args.seed, args.max_bad_fraction, args.format, column_names(args)
        )

    questions = read(args.manifest, args.limit)
    shots = read(args.shots).shots(args.num_shots, args.seed) if "few_shot" in args.method else ()
    validation = None
    if "difficulty" in args.method and args.validation is not None:
        validation = read(args.validation)
    result = task.score_methods(model, questions, args.method, config, validation, shots, _note)
    if args.json is not None:
        result.save(args.json)
    return task.score_table(result)


def _check_needs(args: argparse.Namespace) -> None:
    """Refuses methods without what they need, and options of methods that aren't run."""
    if "difficulty" in args.method and (args.validation is None) == (args.threshold is None):
        raise ValueError("difficulty needs a threshold: give --validation FILE to choose it on, or --threshold P")
    if "few_shot" in args.method and args.shots is None:
        raise ValueError("few_shot needs rows to show: give --shots FILE, of rows that aren't tested")
    if args.validation is not None and args.validation == args.manifest:
        raise ValueError("--validation is the manifest that is tested; a threshold chosen on it flatters: give another")


def _note(text: str) -> None:
    sys.stderr.write(f"mmllm: {text}\n")
    sys.stderr.flush()
