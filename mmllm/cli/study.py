"""`mmllm study`: whether a method is worth its cost on one's own data, by trainings that have one budget alike."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, add_group, as_json, check_model, check_there

_EXECUTORS = ("local", "datatrove", "slurm", "ray")
_TRACKS = ("scenes", "speech", "fsdd", "shakespeare")


def add_study(commands: Any, check_command: Callable[[Sequence[str]], None]) -> None:
    """Adds `mmllm study run`, `report`, `plant`, `ask`, `date`, `rank`, `code`, `efficiency`, `score` and `compare`.

    Args:
        commands: subparsers of `mmllm`.
        check_command: raises ValueError where a command has an unknown word or option; runs of studies are commands.
    """
    actions = add_group(commands, "study", "what a method is worth: runs of one budget, tests, samples for equal score")
    parser = add_command(actions, "run", "run what of a study is not done yet, and report it", _run)
    parser.add_argument("study", help="its YAML, or a shipped one by name: studies/experts.yaml")
    parser.add_argument("--out", required=True, metavar="DIR", help="where runs and the report go")
    parser.add_argument("--data", metavar="DIR", help="a run's folder that is there, instead of making the study's own")
    parser.add_argument(
        "--minutes", type=float, metavar="N",
        help="bound of the whole study, but for making its data: one seed of every arm comes first",
    )  # fmt: skip
    parser.add_argument("--executor", choices=_EXECUTORS, default="local", help="where runs are")
    parser.add_argument("--workers", type=int, default=1, help="runs at once")
    parser.add_argument("--tasks", type=int, help="into how many tasks the runs are cut; not for local")
    parser.add_argument("--work", metavar="DIR", help="of the executor: items, results and logs")
    parser.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the executor's own")
    parser.add_argument("--threads", type=int, default=1, help="of each run's processes")
    parser.add_argument("--dry_run", action="store_true", help="say what it costs, and check every config, alone")
    parser.set_defaults(check_command=check_command)
    parser = add_command(actions, "report", "report.json and report.html of a study's folder", _report)
    parser.add_argument("folder", metavar="DIR")
    parser = add_command(
        actions, "plant", "copies, wrong texts and rows of another topic in a manifest, for cleaning to find", _plant
    )
    parser.add_argument("manifest")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--copies", type=float, default=0.0, help="so many for each row, all of a hundredth of the rows"
    )
    parser.add_argument(
        "--near_copies", type=float, default=0.0, help="likewise, each with light edits of its text and picture"
    )
    parser.add_argument(
        "--off_topic", type=float, default=0.0, help="so many for each row, of --noise, with pictures of noise"
    )
    parser.add_argument("--noise", metavar="MANIFEST", help="whose texts --off_topic takes")
    parser.add_argument("--wrong", type=float, default=0.0, help="share of the rows that get another row's text")
    parser.add_argument("--garbled", type=float, default=0.0, help="share of the rows whose text becomes symbols")
    parser.add_argument("--limit", type=int, help="at most so many rows are read, drawn by the seed")
    parser.add_argument("--filter", help="which rows are read, such as 'plain'")
    parser.add_argument("--seed", type=int, default=0)
    parser = add_command(actions, "ask", "questions about captioned pictures, as a new task with few rows", _ask)
    parser.add_argument("manifest", help="of captions whose rows say in `objects` what is there")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    parser.add_argument(
        "--about",
        default="colour,shape,number",
        metavar="A,B,…",
        help="of colour, shape, number; each in turn",
    )
    parser.add_argument("--limit", type=int, help="at most so many questions, of rows drawn by the seed")
    parser.add_argument("--filter", help="which rows are read, such as 'plain'")
    parser.add_argument("--seed", type=int, default=0)
    parser = add_command(
        actions, "date", "a manifest with planted dates, by which texts drift, for a chronological order", _date
    )
    parser.add_argument("manifest", help="of rows with texts")
    parser.add_argument(
        "--words", required=True, metavar="A,B,…", help="in the order in which they come into use, such as square,star"
    )
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    parser.add_argument("--filter", help="which rows are read, such as 'plain'")
    parser.add_argument("--seed", type=int, default=0)
    parser = add_command(
        actions, "rank", "a manifest with each row's loss by a model, for a curriculum to order by", _rank
    )
    parser.add_argument("manifest", help="of captions and recordings")
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl")
    parser.add_argument("--filter", help="which rows are read, such as 'plain'")
    parser = add_command(
        actions, "code", "the source code of Python's standard library as text, some files held out", _code
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="of train.jsonl and test.jsonl")
    parser = add_command(actions, "efficiency", "one page of many studies' reports", _efficiency)
    parser.add_argument("folder", metavar="DIR", help="of report.json files, each under its study's name")
    parser.add_argument("--scaling", action="append", default=[], metavar="FIT", help="of `mmllm scaling fit`")
    parser.add_argument("--out", required=True, metavar="FILE.md")
    _add_score(actions)
    _add_compare(actions)


def _add_score(actions: Any) -> None:
    parser = add_command(actions, "score", "one run of a track of the scoreboard: fixed rows, ten minutes", _score)
    parser.add_argument("track", choices=_TRACKS, metavar="TRACK", help=", ".join(_TRACKS))
    parser.add_argument("--out", required=True, metavar="DIR", help="where rows, run and score.json go; one a score")
    parser.add_argument(
        "--model", metavar="DIR", help="score this, trained on the track's rows; without it the baseline is trained"
    )
    parser.add_argument("--seed", type=int, metavar="S", help="of the training; the baseline's is 0 unless told")
    parser.add_argument("--minutes", type=float, metavar="N", help="of the training; the baseline's are 10 unless told")
    parser.add_argument("--judge", metavar="DIR", help="of speech: an aligner that is there; without it one is trained")
    parser.add_argument("--max_steps", type=int, metavar="N", help="a try-out: the baseline with so many steps")
    parser.add_argument("--rows_only", action="store_true", help="write the track's rows, and end")


def _add_compare(actions: Any) -> None:
    parser = add_command(actions, "compare", "scores of a track against others: better, worse or unproved", _compare)
    parser.add_argument("scores", nargs="+", metavar="SCORE.json", help="of one method, a seed each")
    parser.add_argument("--with", required=True, nargs="+", dest="others", metavar="SCORE.json", help="of the other")
    parser.add_argument("--json", metavar="OUT", help="where the comparison goes")


def _run(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.data.executors.stages import Executor, parse_options
    from mmllm.studies.commands import RunFailed
    from mmllm.studies.run import plan_study, run_study

    check_there("data", args.data)
    for name in ("threads", "workers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.dry_run:
        yield from plan_study(args.study, args.out, args.workers, args.data, args.check_command)
        return
    work = None if args.work is None else Path(args.work)
    executor = Executor(args.executor, args.workers, args.tasks, work, parse_options(args.option))
    try:
        yield from run_study(args.study, args.out, args.minutes, executor, args.threads, args.data, args.check_command)
    except RunFailed:
        with contextlib.suppress(ValueError):  # none was done
            yield from _lines(args.out)
        raise
    yield from _lines(args.out)


def _report(args: argparse.Namespace) -> Iterable[str]:
    return _lines(args.folder)


def _lines(folder: str) -> Iterable[str]:
    from mmllm.studies.report import PAGE, report, report_lines

    values = report(Path(folder))
    yield from report_lines(values)
    yield f"{Path(folder) / PAGE}"


def _check_manifests(args: argparse.Namespace, *more: str | None) -> None:
    """Raises where a manifest that is read isn't there, or would be written over."""
    check_there("manifest", args.manifest, *more)
    if Path(args.out).resolve() in {Path(each).resolve() for each in (args.manifest, *more) if each is not None}:
        raise ValueError(f"--out is {args.out}, which is read; give another file")


def _plant(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.planting import Planting, plant

    _check_manifests(args, args.noise)
    planting = Planting(
        copies=args.copies, wrong=args.wrong, garbled=args.garbled, near_copies=args.near_copies,
        off_topic=args.off_topic, limit=args.limit, filter=args.filter, seed=args.seed,
    )  # fmt: skip
    return plant(args.manifest, Path(args.out), planting, args.noise)


def _ask(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.asking import Asking, ask

    _check_manifests(args)
    about = tuple(word.strip() for word in args.about.split(",") if word.strip())
    return ask(args.manifest, Path(args.out), Asking(about, args.limit, args.filter, args.seed))


def _date(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.dating import Drift, date

    _check_manifests(args)
    words = tuple(word.strip() for word in args.words.split(",") if word.strip())
    return date(args.manifest, Path(args.out), Drift(words, args.filter, args.seed))


def _rank(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.ranking import rank

    _check_manifests(args)
    return rank(args.model, args.manifest, Path(args.out), args.filter)


def _code(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.source_code import write_source_code

    return write_source_code(Path(args.out))


def _efficiency(args: argparse.Namespace) -> Iterable[str]:
    check_there("folder", args.folder)
    check_there("fit", *args.scaling)
    from mmllm.studies.efficiency import write_efficiency

    return write_efficiency(Path(args.folder), Path(args.out), [Path(fit) for fit in args.scaling])


def _score(args: argparse.Namespace) -> Iterable[str]:
    given = [name for name in ("model", "judge", "max_steps", "seed", "minutes") if getattr(args, name) is not None]
    if args.rows_only and given:
        raise ValueError(f"--rows_only writes a track's rows alone, but --{given[0]} is given; leave one out")
    if args.model is not None:
        check_model(args.model)
    check_there("judge", args.judge, hint="give an aligner's folder, such as the other score's DIR/judge/aligner")
    from mmllm.studies.tracks import track_of, write_rows
    from mmllm.studies.tracks_score import rows_line, score_track
    from mmllm.ticker import end_line, ticker

    if args.rows_only:
        yield rows_line(write_rows(track_of(args.track), Path(args.out)), Path(args.out))
        return
    for line in score_track(
        args.track, args.out, args.model, args.seed, args.minutes, args.judge, args.max_steps,
        progress=ticker(f"prompts of {args.track}"),
    ):  # fmt: skip
        end_line()
        yield line


def _compare(args: argparse.Namespace) -> Iterable[str]:
    from mmllm.studies.tracks_compare import compare_files, comparison_lines

    found = compare_files(args.scores, args.others)
    if args.json is not None:
        Path(args.json).parent.mkdir(parents=True, exist_ok=True)
        Path(args.json).write_text("\n".join(as_json(found.to_dict())) + "\n", encoding="utf-8")
    yield from comparison_lines(found)
