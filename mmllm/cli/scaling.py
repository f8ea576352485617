"""`mmllm scaling`: sweeps of sizes and lengths, the laws that they follow, and what these tell of larger ones."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from mmllm.cli.command import add_command, add_group, as_json, check_there


def add_scaling(commands: Any) -> None:
    """Adds `mmllm scaling sweep`, `fit`, `plan`, `rates` and `emergence`."""
    actions = add_group(commands, "scaling", "how loss falls with size, tokens and compute: sweeps, laws, plans")
    _add_sweep(actions)
    _add_fit(actions)
    _add_plan(actions)
    _add_rates(actions)
    _add_emergence(actions)


def _add_sweep(actions: Any) -> None:
    parser = add_command(actions, "sweep", "train a grid of sizes and lengths; goes on where it stopped", _sweep)
    parser.add_argument("plan", metavar="PLAN.yaml", help="or a shipped one by name: scaling/code.yaml")
    parser.add_argument("--out", required=True, metavar="DIR", help="where runs and points.jsonl go")
    parser.add_argument("--data", metavar="DIR", help="a run's folder that is there, instead of making the sweep's own")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--threads", type=int, default=1, help="of each training")
    parser.add_argument("--keep_models", action="store_true", help="models stay when they are scored")
    parser.add_argument("--dry_run", action="store_true", help="say what it costs, and check every config, alone")


def _sweep(args: argparse.Namespace) -> Iterable[str]:
    check_there("data", args.data)
    for name in ("threads", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    from mmllm.studies.scaling_sweep import run_sweep

    return run_sweep(args.plan, args.out, args.threads, args.keep_models, args.dry_run, args.workers, args.data)


def _add_fit(actions: Any) -> None:
    parser = add_command(actions, "fit", "fit L = E + A/N^alpha + B/D^beta, and the best size of each budget", _fit)
    parser.add_argument("points", metavar="POINTS.jsonl", help="rows with parameters, tokens, loss")
    parser.add_argument("--json", metavar="FILE", help="where the fit goes, for `mmllm scaling plan`")
    parser.add_argument("--size", default="parameters", metavar="KEY", help="that is N, such as total_parameters")
    parser.add_argument(
        "--loss", default="loss", metavar="KEY", help="that is L, such as loss_text, loss_by_source.text"
    )
    _add_only(parser)
    parser.add_argument("--resamples", type=int, default=200, help="of the bootstrap; 0: no intervals")
    parser.add_argument("--delta", type=float, default=1e-3, help="of the Huber loss of log loss")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap")


def _add_only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", default=[], metavar="KEY=VALUE", help="rows that have it alone")


def _only(args: argparse.Namespace) -> dict[str, str]:
    only = {}
    for given in args.only:
        key, equals, value = given.partition("=")
        if not equals:
            raise ValueError(f"--only is {given!r}; give KEY=VALUE")
        only[key] = value
    return only


def _fit(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of points", args.points)
    only = _only(args)
    from mmllm.studies.scaling import FitConfig
    from mmllm.studies.scaling_report import fit_lines, fit_points, write_json

    config = FitConfig(args.resamples, args.seed, args.delta)
    values = fit_points(args.points, config, args.size, args.loss, only)
    if args.json is not None:
        write_json(values, args.json)
    return fit_lines(values)


def _add_plan(actions: Any) -> None:
    parser = add_command(actions, "plan", "the best size and number of tokens that a budget pays for", _plan)
    parser.add_argument("fit", metavar="FIT.json", help="of `mmllm scaling fit --json`")
    parser.add_argument("--flops", type=float, required=True, metavar="C", help="for training: 6·N·D; and inference")
    parser.add_argument(
        "--inference_tokens", type=float, default=0.0, metavar="T", help="that C pays for too: 2·N·T, N active"
    )
    parser.add_argument("--json", metavar="FILE", help="where the plan goes")


def _plan(args: argparse.Namespace) -> Iterable[str]:
    check_there("fit", args.fit)
    from mmllm.studies.scaling_optimum import plan
    from mmllm.studies.scaling_report import write_json

    best = plan(args.fit, args.flops, args.inference_tokens)
    if args.json is not None:
        write_json(best.to_dict(), args.json)
    lines = [f"parameters {best.parameters:,.4g}, tokens {best.tokens:,.4g}, loss {best.loss:.4f}"]
    return lines + [f"warning: {warning}" for warning in best.warnings]


def _add_rates(actions: Any) -> None:
    parser = add_command(actions, "rates", "the best learning rate of small trainings, and of a larger one", _rates)
    parser.add_argument("points", metavar="POINTS.jsonl", help="of a sweep of rates, or batch_sizes")
    parser.add_argument("--key", choices=("lr", "batch_size"), default="lr", help="what is sought")
    parser.add_argument("--parameters", type=float, metavar="N", help="a size whose rate is told")
    _add_only(parser)
    parser.add_argument("--json", metavar="FILE")


def _rates(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of points", args.points)
    from mmllm.studies.scaling_rates import fit_rates
    from mmllm.studies.scaling_report import write_json

    values = fit_rates(args.points, args.key, args.parameters, _only(args))
    if args.json is not None:
        write_json(values, args.json)
    return as_json(values)


def _add_emergence(actions: Any) -> None:
    parser = add_command(
        actions, "emergence", "a sweep under an exact and a continuous score, side by side", _emergence
    )
    parser.add_argument("points", metavar="POINTS.jsonl", help="of a sweep with measures")
    parser.add_argument("--exact", default="exact_match", metavar="KEY", help="score of whole answers")
    parser.add_argument("--continuous", default="attribute_accuracy", metavar="KEY", help="score of parts, or loss")
    _add_only(parser)
    parser.add_argument("--json", metavar="FILE")


def _emergence(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of points", args.points)
    from mmllm.studies.scaling_emergence import emergence, emergence_lines
    from mmllm.studies.scaling_report import write_json

    values = emergence(args.points, args.exact, args.continuous, _only(args))
    if args.json is not None:
        write_json(values, args.json)
    return emergence_lines(values)
