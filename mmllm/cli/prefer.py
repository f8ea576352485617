"""`mmllm prefer`: candidates drawn from a model, labelled, and written as preference data."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mmllm.cli.command import add_command, add_group, add_input_options, check_model, check_there, column_names
from mmllm.ticker import end_line, ticker

_TASKS = ("caption", "chat", "question", "transcribe", "speak")
_OWNERS = {
    "judge_model": ("judge",), "key_env": ("judge",), "criterion": ("judge",), "settings": ("reward",),
    "model": ("reward",), "device": ("reward",), "port": ("by_hand",), "pairs_per_row": ("by_hand", "judge"),
    "seed": ("by_hand", "judge"),
}  # fmt: skip
"""Options of `label`, and the ways to label that have them."""


def add_prefer(commands: Any) -> None:
    """Adds `mmllm prefer`."""
    actions = add_group(commands, "prefer", "draw candidates, label them, write pairs for preference training")
    _add_sample(actions)
    _add_label(actions)
    _add_export(actions)


def _add_sample(actions: Any) -> None:
    parser = add_command(actions, "sample", "draw several answers to each row of a manifest; goes on where it stopped",
                         _sample)  # fmt: skip
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder")
    parser.add_argument("--adapter", metavar="NAME", help="of the model's adapters; without it the model alone")
    parser.add_argument("--task", required=True, choices=_TASKS)
    parser.add_argument("--manifest", required=True, metavar="FILE", help="rows, of any form")
    add_input_options(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="of candidates, .jsonl; sounds go beside it")
    parser.add_argument("--n", type=int, default=8, help="answers a row; equal ones are kept once, and counted")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T")
    parser.add_argument("--top_p", type=float, metavar="P", help="draw among the fewest of this probability together")
    parser.add_argument("--max_new_tokens", type=int, metavar="N", help="of a text at most")
    parser.add_argument("--max_seconds", type=float, metavar="S", help="of speech at most")
    parser.add_argument("--variation", type=float, metavar="V", help="of speech: chance in letters' times, 0 to 1")
    parser.add_argument("--limit", type=int, metavar="N", help="the first so many rows")
    parser.add_argument("--batch_size", type=int, default=64, help="answers drawn at once")
    parser.add_argument("--deterministic", action="store_true", help="each by itself: slower, the same bits anywhere")
    parser.add_argument("--max_bad_fraction", type=float, default=0.05, help="more unusable rows are an error")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)


def _sample(args: argparse.Namespace) -> Iterable[str]:
    check_model(args.model)
    check_there("manifest", args.manifest)
    from mmllm.evaluation.preferences.sampling import SamplingConfig, sample_candidates, weights_digest
    from mmllm.inference.api import load

    config = SamplingConfig(
        args.task, args.n, args.temperature, args.top_p, args.seed, args.max_new_tokens, args.max_seconds,
        args.variation, args.limit, args.batch_size, args.deterministic, args.max_bad_fraction,
    )  # fmt: skip
    model = load(args.model, args.device, adapter=args.adapter)
    source = weights_digest(args.model, args.adapter)
    drawn = sample_candidates(
        model, args.manifest, args.out, config, source, args.format, column_names(args), ticker("rows")
    )
    end_line()
    return drawn.lines(args.out)


def _add_label(actions: Any) -> None:
    parser = add_command(
        actions, "label", "label candidates by a reward, by hand on a page, or by a judge; goes on where it stopped",
        _label,
    )  # fmt: skip
    parser.add_argument("file", metavar="FILE", help="candidates that `mmllm prefer sample` drew")
    who = parser.add_mutually_exclusive_group(required=True)
    who.add_argument("--reward", metavar="NAME", help="a reward by its name, or a function as package.module:function")
    who.add_argument("--by_hand", action="store_true", help="on a page in the browser of this machine")
    who.add_argument("--judge", metavar="URL", help="of a model behind OpenAI's routes, up to /v1")
    parser.add_argument("--labels", metavar="FILE", help="where labels go; FILE.labels.jsonl beside the candidates")
    parser.add_argument("--settings", metavar="JSON", help="of the reward, such as '{\"weight\": 2}', or a JSON file")
    parser.add_argument("--model", metavar="DIR", help="of the reward own_wer: the model that hears itself")
    parser.add_argument("--device", help="of the reward's model; by default the best there is")
    parser.add_argument("--port", type=int, help="of the page, 7870 by default; 0: any that is free")
    parser.add_argument(
        "--pairs_per_row", type=int, metavar="K", help="by hand and by a judge: of each row; 1 by default"
    )
    parser.add_argument("--judge_model", metavar="NAME", help="of the judge")
    parser.add_argument("--key_env", metavar="NAME", help="the environment variable that holds the judge's key")
    parser.add_argument("--criterion", metavar="TEXT", help="what the judge is told to prefer; verdicts are [[A]], "
                        "[[B]], [[C]]")  # fmt: skip
    parser.add_argument("--seed", type=int, help="of which pairs, and which side is shown first; 0 by default")


def _label(args: argparse.Namespace) -> Iterable[str]:
    _check_label(args)
    check_there("file of candidates", args.file)
    if args.model is not None:
        check_model(args.model)
    from mmllm.evaluation.preferences.candidates import read_candidates
    from mmllm.evaluation.preferences.labels import labels_path, questions

    rows = read_candidates(args.file)
    folder, out = Path(args.file).parent, Path(args.labels or labels_path(args.file))
    if args.reward is not None:
        return _by_reward(args, rows, folder, out)
    asked = questions(rows, 1 if args.pairs_per_row is None else args.pairs_per_row, args.seed or 0)
    if args.by_hand:
        from mmllm.serving.prefer_page import Labelling, serve_prefer_page

        return serve_prefer_page(Labelling(asked, folder, out), 7870 if args.port is None else args.port)
    return _by_judge(args, asked, folder, out)


def _check_label(args: argparse.Namespace) -> None:
    """Options of one way to label that are given beside another."""
    way = "reward" if args.reward is not None else "judge" if args.judge is not None else "by_hand"
    for name, owners in _OWNERS.items():
        if getattr(args, name) is not None and way not in owners:
            raise ValueError(f"--{name} goes with --{' and --'.join(owners)}, not with --{way}; leave it out")
    if args.judge is not None and args.judge_model is None:
        raise ValueError("--judge needs the model's name there; give --judge_model NAME")
    if args.port is not None and not 0 <= args.port <= 65_535:
        raise ValueError(f"--port is {args.port}; give 0 to 65535")
    if args.by_hand and importlib.util.find_spec("fastapi") is None:
        raise ModuleNotFoundError("labelling by hand needs fastapi and uvicorn: pip install 'mmllm[serve]'")


def _by_reward(args: argparse.Namespace, rows: Any, folder: Path, out: Path) -> Iterator[str]:
    from mmllm.evaluation.preferences.rewarding import label_by_reward
    from mmllm.evaluation.rewards import load_reward
    from mmllm.inference.api import load

    settings = _settings(args.settings)
    name = args.reward + (f" {json.dumps(settings, sort_keys=True)}" if settings else "")
    device = args.device or "auto"
    get_model = None if args.model is None else functools.cache(lambda: load(args.model, device))
    reward = load_reward(args.reward, settings, get_model, "cpu" if device == "auto" else device)
    num_new = label_by_reward(rows, folder, reward, name, out, ticker("rows"))
    end_line()
    yield f"{out}: {num_new:,} new labels by the reward {name}"


def _settings(given: str | None) -> dict[str, Any]:
    if given is None:
        return {}
    text = Path(given).read_text(encoding="utf-8") if given.endswith(".json") else given
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--settings is no JSON ({error}): {text[:80]!r}") from None
    if not isinstance(value, dict):
        raise ValueError(f"--settings is {text[:80]!r}; give a JSON object, such as '{{\"weight\": 2}}'")
    return value


def _by_judge(args: argparse.Namespace, asked: Any, folder: Path, out: Path) -> Iterator[str]:
    from mmllm.evaluation.preferences.judging import Judge, JudgeConfig, label_by_judge

    config = JudgeConfig(args.judge, args.judge_model, args.key_env, args.criterion)
    verdicts = label_by_judge(asked, folder, Judge(config), args.judge_model, out, ticker("pairs"))
    end_line()
    yield f"{out}: labels by the judge {args.judge_model}"
    yield from verdicts.lines()


def _add_export(actions: Any) -> None:
    parser = add_command(actions, "export", "write labelled candidates as preference data in TRL's form", _export)
    parser.add_argument("file", metavar="FILE", help="candidates that `mmllm prefer sample` drew")
    parser.add_argument("--out", required=True, metavar="FILE", help="the JSONL file to write")
    parser.add_argument("--labels", metavar="FILE", help="where labels are; FILE.labels.jsonl beside the candidates")
    parser.add_argument("--by", metavar="NAME", help="whose labels, where there are several's: hand, 'reward NAME'")
    parser.add_argument("--form", choices=("pairs", "kto"), default="pairs", help="kto: single answers, liked or not")
    parser.add_argument(
        "--margin", type=float, default=0.0, metavar="M", help="of rewards: more than this lies between the sides; of "
        "kto: between an answer and its row's mean",
    )  # fmt: skip
    parser.add_argument("--max_pairs_per_row", type=int, metavar="K", help="those of the largest margin")
    parser.add_argument("--length_balanced", action="store_true", help="the chosen side is as often longer as shorter")
    parser.add_argument("--keep_cut", action="store_true", help="answers too that ran into their bound")


def _export(args: argparse.Namespace) -> Iterable[str]:
    check_there("file of candidates", args.file)
    from mmllm.evaluation.preferences.candidates import read_candidates
    from mmllm.evaluation.preferences.labels import labels_path, read_labels
    from mmllm.evaluation.preferences.pairs import ExportConfig, export

    config = ExportConfig(args.form, args.margin, args.max_pairs_per_row, args.length_balanced, args.by, args.keep_cut)
    rows = read_candidates(args.file)
    path = Path(args.labels or labels_path(args.file))
    check_there("file of labels", str(path), hint=f"make one: mmllm prefer label {args.file} --reward NAME")
    if Path(args.out).resolve() in (Path(args.file).resolve(), path.resolve()):
        raise ValueError(f"--out {args.out} is a file that is read, and would be written over; name another one")
    return export(rows, Path(args.file).parent, read_labels(path, rows), args.out, config).lines(args.out)
