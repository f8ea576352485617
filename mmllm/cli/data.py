"""`mmllm data`: manifests to shards, indices, and what a recipe draws from them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, add_group, add_input_options, as_json, check_there, column_names
from mmllm.ticker import end_line, ticker


def add_data(commands: Any) -> None:
    """Adds `mmllm data`."""
    actions = add_group(commands, "data", "manifests to shards, indices, and what a recipe draws from them")
    _add_build(actions)
    _add_split(actions)
    _add_topics(actions)
    _add_align(actions)
    _add_index(actions)
    _add_verify(actions)
    _add_stats(actions)
    _add_show(actions)


def _add_build(actions: Any) -> None:
    parser = add_command(actions, "build", "manifests to shards", _build)
    parser.add_argument("manifest", nargs="+", help="JSONL manifests, or data of other forms; kinds may be mixed")
    parser.add_argument("--out", required=True, help="folder of the shards")
    add_input_options(parser)
    parser.add_argument("--dedup", choices=("none", "exact", "minhash"), default="none", help="leave out repeated rows")
    parser.add_argument("--threshold", type=float, default=0.8, help="similarity from which minhash leaves one out")
    parser.add_argument(
        "--dedup_shingles", default="words:5", metavar="UNIT:N", help="what minhash compares texts by: words:5, of "
        "12 words or more; chars:5 for captions and other short texts",
    )  # fmt: skip
    parser.add_argument("--quality", metavar="FILTER", help="which rows are kept, e.g. 'words >= 5 and symbols < 0.3'")
    parser.add_argument(
        "--executor", choices=("local", "datatrove", "slurm", "ray"), default="local",
        help="where rows are measured and shards written; local: here, without datatrove",
    )  # fmt: skip
    parser.add_argument("--executor_option", action="append", default=[], metavar="KEY=VALUE", help="of datatrove's")
    parser.add_argument("--tasks", type=int, help="datatrove's tasks; by default as many as workers")
    parser.add_argument("--work", metavar="DIR", help="folder of datatrove's tasks and logs; by default OUT-work")
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--tokenizer", help="tokenizer folder; stores each sound's codes with it")
    parser.add_argument(
        "--image_features", metavar="TOWER", help="stores each picture's features with it: a model folder, a CLIP "
        "run's out folder, a vision model's of transformers or open_clip, or open_clip's NAME:TAG or NAME:FILE",
    )  # fmt: skip
    parser.add_argument(
        "--image_layer", help="of the tower, as vision.layer of the decoder's config; several: -9,-2 (by default the "
        "model folder's, else -1)",
    )  # fmt: skip
    parser.add_argument(
        "--image_mode", choices=("squash", "pad", "crop"), help="as the data's image_mode in training (by default as "
        "the tower's pictures were made, where that is known, else squash)",
    )  # fmt: skip
    parser.add_argument("--perturb", type=int, default=0, help="altered copies of each sound row")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows that are held out: KEY=VALUE or a fraction")
    parser.add_argument("--part", choices=("train", "heldout"), default="train", help="which of them to write")
    parser.add_argument("--samples_per_shard", type=int, default=10_000)
    parser.add_argument("--max_seconds", type=float, default=60.0, help="longer sounds are skipped and named")
    parser.add_argument("--max_image_side", type=int, default=1024, help="larger pictures are scaled down")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0, help="processes that read and encode; 0: this one alone")


def _build(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest", *args.manifest)
    check_there("folder", args.media)
    check_there("tokenizer folder", args.tokenizer, hint="`mmllm tokenizer` makes one")
    from mmllm.data import commands
    from mmllm.data.executors.stages import Executor, parse_options
    from mmllm.data.rows.cleaning import CleaningConfig

    cleaning = CleaningConfig(args.dedup, args.threshold, args.quality, args.dedup_shingles)
    work = args.work if args.executor == "local" or args.work else f"{args.out.rstrip('/')}-work"
    work = Path(work) if work else None
    executor = Executor(args.executor, args.workers, args.tasks, work, parse_options(args.executor_option))
    encoder = None
    if args.image_features:
        from mmllm.training.image_encoder import load_image_encoder

        encoder = load_image_encoder(args.image_features, args.image_layer, args.image_mode)
    written = commands.build(
        args.manifest, args.out, args.tokenizer, args.perturb, args.holdout, args.part, args.samples_per_shard,
        args.max_seconds, args.max_image_side, args.max_bad_fraction, args.seed, args.workers, ticker("rows"),
        args.format, args.media, cleaning, executor, encoder, column_names(args),
    )  # fmt: skip
    end_line()
    return as_json(written)


def _add_split(actions: Any) -> None:
    parser = add_command(actions, "split", "manifests for training, looking and testing", _split)
    parser.add_argument("manifest", nargs="+", help="manifests, or data of other forms, to train on")
    parser.add_argument("--out", required=True, help="folder of the new manifests")
    add_input_options(parser)
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--test", action="append", default=[], help="manifest of held-out rows; may be repeated")
    parser.add_argument("--holdout", metavar="KEY=VALUE", help="rows to hold out: KEY=VALUE or a fraction")
    parser.add_argument("--hold_tasks", nargs="+", default=[], metavar="TYPE", help="task types that are only tested")
    parser.add_argument("--task_column", default="task", metavar="KEY", help="what says a row's task type")
    parser.add_argument("--num_val", type=int, default=16, help="rows of each kind to look at, at most a fiftieth")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0)


def _split(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest", *args.manifest, *args.test)
    from mmllm.data.rows.split import split

    told = split(
        args.manifest, args.out, args.test, args.holdout, args.num_val, args.max_bad_fraction, args.seed, args.format,
        args.media, column_names(args), args.hold_tasks, args.task_column,
    )  # fmt: skip
    return as_json(told)


def _add_topics(actions: Any) -> None:
    parser = add_command(actions, "topics", "a manifest whose rows have topics, by clusters of their texts", _topics)
    parser.add_argument("manifest", nargs="+", help="manifests, or data of other forms; kinds may be mixed")
    parser.add_argument("--out", required=True, metavar="FILE.jsonl", help="the new manifest")
    add_input_options(parser)
    parser.add_argument("--topics", type=int, default=16, metavar="K", help="how many")
    parser.add_argument("--column", default="topic", metavar="KEY", help="that the rows get")
    parser.add_argument(
        "--target", action="append", default=[], metavar="MANIFEST", help="rows like those that are wanted: each row "
        "then also gets KEY_target, the share of them that is of its topic; may be repeated",
    )  # fmt: skip
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _topics(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest", *args.manifest, *args.target)
    check_there("folder", args.media)
    from mmllm.data.rows.topics import TopicsConfig, topics_lines, write_topics

    told = write_topics(
        args.manifest, args.out, TopicsConfig(args.topics, args.seed), args.target, args.column,
        args.max_bad_fraction, args.format, args.media, column_names(args),
    )  # fmt: skip
    return as_json(told) if args.json else topics_lines(told)


def _add_align(actions: Any) -> None:
    parser = add_command(actions, "align", "when each word of speech is said", _align)
    parser.add_argument("manifest", nargs="+", help="manifests, or data of other forms, of speech with its texts")
    parser.add_argument("--out", required=True, help="folder of the new manifests and of the aligner")
    add_input_options(parser)
    parser.add_argument("--media", metavar="DIR", help="what paths are relative to; by default each input's folder")
    parser.add_argument("--aligner", metavar="DIR", help="a trained aligner; without it one is trained on the rows")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=90.0, help="of training, by the clock")
    length.add_argument("--steps", type=int, help="of training, in place of seconds: the same aligner each time")
    parser.add_argument("--min_confidence", type=float, default=0.0, help="rows below it stay without words, named")
    parser.add_argument("--max_seconds", type=float, default=60.0, help="longer sounds are left out, named")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unreadable rows are an error")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def _align(args: argparse.Namespace) -> Iterable[str]:
    check_there("manifest", *args.manifest)
    check_there("aligner", args.aligner, hint="`mmllm data align` without --aligner trains one")
    from mmllm.training import align_commands
    from mmllm.training.aligner_training import AlignerTraining

    training = AlignerTraining(seconds=args.seconds, steps=args.steps, seed=args.seed)
    told = align_commands.align(
        args.manifest, args.out, args.aligner, training, args.min_confidence, args.max_bad_fraction, args.format,
        args.media, column_names(args), ticker, args.max_seconds,
    )  # fmt: skip
    end_line()
    return as_json(told) if args.json else align_commands.align_lines(told)


def _add_index(actions: Any) -> None:
    parser = add_command(actions, "index", "write the index beside each shard", _index)
    parser.add_argument("shards", nargs="+", help="paths, globs, brace ranges or folders")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder whose tokens are counted")
    parser.add_argument("--workers", type=int, default=0, help="processes that share the shards; 0: this one alone")
    parser.add_argument(
        "--text_key", metavar="KEY", help="key of a sample's json that holds its text where it has no txt, e.g. caption"
    )
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")


def _index(args: argparse.Namespace) -> Iterable[str]:
    _check_shards(args)
    from mmllm.data import commands

    found = commands.index(
        args.shards, args.tokenizer, ticker("shards"), args.workers, args.text_key, args.max_bad_fraction
    )
    end_line()
    return as_json(found)


def _check_shards(args: argparse.Namespace) -> None:
    check_there("shard", *args.shards, hint="`mmllm data build` writes them")
    check_there("tokenizer folder", args.tokenizer, hint="`mmllm tokenizer` makes one")


def _add_verify(actions: Any) -> None:
    parser = add_command(actions, "verify", "read, decode and tokenize every sample", _verify)
    parser.add_argument("shards", nargs="+", help="paths, globs, brace ranges or folders")
    parser.add_argument("--tokenizer", required=True, help="tokenizer folder")
    parser.add_argument("--workers", type=int, default=0, help="processes that read; 0: this one alone")
    parser.add_argument(
        "--max_named", type=int, default=20, metavar="N", help="broken samples that are named, one a line"
    )


def _verify(args: argparse.Namespace) -> Iterable[str]:
    _check_shards(args)
    from mmllm.data import commands

    tick = ticker("documents")
    found = commands.verify(args.shards, args.tokenizer, args.max_named, args.workers, tick)
    end_line()
    if not found["broken"]:
        yield from as_json(found)
        return
    yield from found["errors"]
    left = found["broken"] - len(found["errors"])
    more = f" and {left} more (--max_named {found['broken']} names all)" if left else ""
    raise ValueError(
        f"{found['broken']} samples or shards are broken, of {found['documents']} samples that were looked at; "
        f"{len(found['errors'])} are named above{more}"
    )


def _add_stats(actions: Any) -> None:
    parser = add_command(actions, "stats", "the realized mixture of a recipe's first steps", _stats)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--html", metavar="FILE", help="also write them as plots")


def _stats(args: argparse.Namespace) -> Iterable[str]:
    check_there("recipe", args.recipe)
    from mmllm.data import commands
    from mmllm.data.looking.tables import stats_lines

    told = commands.stats(args.recipe, args.steps, args.batch_size, args.html)
    return as_json(told) if args.json else stats_lines(told)


def _add_show(actions: Any) -> None:
    parser = add_command(actions, "show", "exactly what a step holds", _show)
    parser.add_argument("--recipe", required=True, metavar="FILE", help="YAML")
    parser.add_argument("--step", type=int, default=0, help="from 0")
    parser.add_argument("--batch_size", type=int, default=8, help="sequences a step")
    parser.add_argument("--text", action="store_true", help="also the text of each sequence")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines to read")
    parser.add_argument("--html", metavar="FILE", help="also write a page with texts, pictures and sounds")
    parser.add_argument("--world_size", type=int, default=1, help="read through so many ranks' loaders")
    parser.add_argument("--num_workers", type=int, default=0, help="workers of each loader")


def _show(args: argparse.Namespace) -> Iterable[str]:
    check_there("recipe", args.recipe)
    from mmllm.data import commands
    from mmllm.data.looking.tables import show_lines

    ways = args.text, args.world_size, args.num_workers, args.html
    told = commands.show(args.recipe, args.step, args.batch_size, *ways, starts=not args.json)
    return as_json(told) if args.json else show_lines(told)
