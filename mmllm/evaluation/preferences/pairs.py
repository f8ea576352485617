"""Labelled candidates as preference data in TRL's conversational form: pairs, or single answers with a label (KTO).

TRL's forms: https://huggingface.co/docs/trl/dataset_formats. One more key is ours: `task`.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmllm.evaluation.preferences.candidates import Candidate, CandidateRow, moved_prompt
from mmllm.evaluation.preferences.labels import Comparison, Label, RewardLabel

Form = Literal["pairs", "kto"]


@dataclass(frozen=True)
class ExportConfig:
    """How labels become preference data.

    Attributes:
        form: `pairs` (prompt, chosen, rejected) or `kto` (prompt, completion, label).
        margin: of rewards: by more than this the chosen one is better than the rejected one; of KTO, than the mean of
            the row's answers.
        max_pairs_per_row: those of the largest margin; None: all.
        length_balanced: as many pairs whose chosen side is the longer one as the shorter one, of like differences.
        by: whose labels: a labeller's name, or a part of it that no other has; None: there is one labeller.
        keeps_cut: answers that ran into their bound before their end are used too.
    """

    form: Form = "pairs"
    margin: float = 0.0
    max_pairs_per_row: int | None = None
    length_balanced: bool = False
    by: str | None = None
    keeps_cut: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("pairs", "kto"):
            raise ValueError(f"form is {self.form!r}; choose pairs or kto")
        if not 0 <= self.margin < float("inf"):
            raise ValueError(f"margin is {self.margin}; it must be 0 or more")
        if self.max_pairs_per_row is not None and self.max_pairs_per_row < 1:
            raise ValueError(f"max_pairs_per_row is {self.max_pairs_per_row}; it must be at least 1")
        of_pairs = [name for name in ("max_pairs_per_row", "length_balanced") if getattr(self, name)]
        if self.form == "kto" and of_pairs:
            raise ValueError(f"{of_pairs[0]} is of pairs, and form is kto; leave it out")


@dataclass(frozen=True)
class _Pair:
    row: CandidateRow
    chosen: int
    rejected: int
    margin: float

    @property
    def longer(self) -> int:
        """By so many tokens the chosen side is longer."""
        candidates = self.row.candidates
        return candidates[self.chosen].num_tokens - candidates[self.rejected].num_tokens


@dataclass(frozen=True)
class Exported:
    """What was written, and what was left out, by reason."""

    num_written: int
    num_rows: int
    """Of candidates that something was written of."""
    longer: float
    """By how many tokens the chosen side is longer, on average; of KTO, an answer that is liked."""
    left_out: Counter[str]

    def lines(self, out: str | Path) -> list[str]:
        """To print."""
        lines = [
            f"{out}: {self.num_written:,} written, of {self.num_rows:,} rows",
            f"the preferred side is longer by {self.longer:+.2f} tokens on average",
        ]
        return lines + [f"left out, {reason}: {count:,}" for reason, count in sorted(self.left_out.items()) if count]


def export(
    rows: Sequence[CandidateRow], folder: Path, labels: Sequence[Label], out: str | Path, config: ExportConfig
) -> Exported:
    """Writes preference data.

    Args:
        rows: with candidates.
        folder: in which their file lies.
        labels: of them.
        out: the JSONL file to write; its paths are relative to it.
        config: what is written.

    Raises:
        ValueError: there are no labels, those of several labellers, or nothing is left to write.
    """
    labels = _of_one(labels, config)
    left_out: Counter[str] = Counter()
    by_row: dict[int, list[Label]] = defaultdict(list)
    for label in labels:
        by_row[label.place].append(label)
    labelled = [(row, by_row[row.place]) for row in rows if row.place in by_row]
    if config.form == "kto":
        lines, places, longer = _kto(labelled, folder, Path(out), config, left_out)
    else:
        pairs = [pair for row, own in labelled for pair in _pairs_of(row, own, config, left_out)]
        if config.length_balanced:
            pairs = _balanced(pairs, left_out)
        lines = [_pair_line(pair, folder, Path(out)) for pair in pairs]
        places = [pair.row.place for pair in pairs]
        longer = sum(pair.longer for pair in pairs) / max(len(pairs), 1)
    if not lines:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in sorted(left_out.items()) if count)
        reasons = reasons or "no label is a choice"
        raise ValueError(f"nothing is left to write ({reasons}); lower the margin, or draw and label more")
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return Exported(len(lines), len(set(places)), longer, left_out)


def _of_one(labels: Sequence[Label], config: ExportConfig) -> list[Label]:
    """The labels of one labeller."""
    names = sorted({label.by for label in labels})
    if not names:
        raise ValueError("there are no labels; make some: mmllm prefer label FILE --reward NAME")
    if config.by is None and len(names) > 1:
        raise ValueError(f"there are labels of several: {', '.join(names)}; choose one with --by")
    meant = [name for name in names if config.by in (None, name)] or [name for name in names if str(config.by) in name]
    if len(meant) != 1:
        count = "no labels" if not meant else "labels of several"
        raise ValueError(f"there are {count} by {config.by!r}; there are those by {', '.join(names)}")
    chosen = [label for label in labels if label.by == meant[0]]
    if config.margin and any(isinstance(label, Comparison) for label in chosen):
        raise ValueError(f"margin is {config.margin}, but these labels are comparisons, which have none; leave it out")
    return chosen


def _usable(row: CandidateRow, config: ExportConfig) -> set[int]:
    """Numbers of the candidates that may be written: whole ones that say something."""
    return {
        number
        for number, one in enumerate(row.candidates)
        if (one.is_whole or config.keeps_cut) and one.text and one.num_tokens
    }


def _pairs_of(row: CandidateRow, labels: Sequence[Label], config: ExportConfig, left_out: Counter[str]) -> list[_Pair]:
    usable = _usable(row, config)
    rewards = {label.candidate: label.reward for label in labels if isinstance(label, RewardLabel)}
    found: list[_Pair] = []
    for label in labels:
        if isinstance(label, Comparison) and label.choice in ("first", "second"):
            better, worse = label.first, label.second
            better, worse = (better, worse) if label.choice == "first" else (worse, better)
            found.append(_Pair(row, better, worse, 0.0))
        elif isinstance(label, Comparison):
            left_out["compared without a choice"] += 1
    for better, reward in sorted(rewards.items()):
        for worse, other in sorted(rewards.items()):
            if reward - other > config.margin:
                found.append(_Pair(row, better, worse, reward - other))
            elif better < worse and abs(reward - other) <= config.margin:
                left_out["no further apart than the margin"] += 1
    kept = [pair for pair in found if {pair.chosen, pair.rejected} <= usable]
    left_out["an answer is empty or ran into its bound"] += len(found) - len(kept)
    kept.sort(key=lambda pair: -pair.margin)  # stable: among equals the first drawn
    most = len(kept) if config.max_pairs_per_row is None else config.max_pairs_per_row
    left_out["more pairs of a row than asked for"] += max(0, len(kept) - most)
    return kept[:most]


def _balanced(pairs: Sequence[_Pair], left_out: Counter[str]) -> list[_Pair]:
    """As many pairs whose chosen side is longer as shorter; to each of the fewer the one of likest difference.

    Pairs of equal length stay. A preference learnt from the others tells nothing of length.
    """
    longer = [number for number, pair in enumerate(pairs) if pair.longer > 0]
    shorter = [number for number, pair in enumerate(pairs) if pair.longer < 0]
    fewer, more = sorted((longer, shorter), key=len)
    kept = {number for number, pair in enumerate(pairs) if pair.longer == 0} | set(fewer)
    free = sorted(more, key=lambda number: abs(pairs[number].longer))
    sizes = [abs(pairs[number].longer) for number in free]
    for size in sorted((abs(pairs[number].longer) for number in fewer), reverse=True):
        place = bisect_left(sizes, size)
        if place == len(sizes) or (place and size - sizes[place - 1] <= sizes[place] - size):
            place = bisect_left(sizes, sizes[place - 1])  # the first drawn of those as near
        sizes.pop(place)
        kept.add(free.pop(place))
    left_out["to balance lengths"] += len(pairs) - len(kept)
    return [pairs[number] for number in sorted(kept)]


def _pair_line(pair: _Pair, folder: Path, out: Path) -> dict[str, Any]:
    row = pair.row
    line = {
        "id": f"{row.id}-{pair.chosen}-{pair.rejected}",
        "task": row.task,
        "prompt": moved_prompt(row.prompt, lambda path: _relative(path, folder, out)),
        "chosen": _answer(row.candidates[pair.chosen], folder, out),
        "rejected": _answer(row.candidates[pair.rejected], folder, out),
    }
    return line if not pair.margin else {**line, "margin": pair.margin}


def _kto(
    labelled: Sequence[tuple[CandidateRow, list[Label]]],
    folder: Path,
    out: Path,
    config: ExportConfig,
    left_out: Counter[str],
) -> tuple[list[dict[str, Any]], list[int], float]:
    lines, places = [], []
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for row, labels in labelled:
        usable = _usable(row, config)
        for number, value in sorted(_liking(labels).items()):
            candidate = row.candidates[number]
            if number not in usable:
                left_out["an answer is empty or ran into its bound"] += 1
            elif abs(value) <= config.margin:
                left_out["no further from the row's mean than the margin"] += 1
            else:
                lines.append({
                    "id": f"{row.id}-{number}",
                    "task": row.task,
                    "prompt": moved_prompt(row.prompt, lambda path: _relative(path, folder, out)),
                    "completion": _answer(candidate, folder, out),
                    "label": value > 0,
                })  # fmt: skip
                places.append(row.place)
                lengths[value > 0].append(candidate.num_tokens)
    means = {label: sum(values) / len(values) for label, values in lengths.items() if values}
    if lines and len(means) < 2:
        only = "liked" if True in means else "disliked"
        raise ValueError(f"all {len(lines)} answers are {only}; KTO needs both: lower the margin, or draw more")
    return lines, places, means[True] - means[False] if lines else 0.0


def _liking(labels: Sequence[Label]) -> dict[int, float]:
    """Of each candidate, how much it is liked: its reward over the row's mean, or how much oftener it won than lost."""
    rewards = {label.candidate: label.reward for label in labels if isinstance(label, RewardLabel)}
    if rewards:
        mean = sum(rewards.values()) / len(rewards)
        return {number: reward - mean for number, reward in rewards.items()}
    won: Counter[int] = Counter()
    for label in labels:
        if isinstance(label, Comparison) and label.choice in ("first", "second"):
            sign = 1 if label.choice == "first" else -1
            won[label.first] += sign
            won[label.second] -= sign
    return dict(won)


def _answer(candidate: Candidate, folder: Path, out: Path) -> list[dict[str, Any]]:
    if candidate.codes is None:
        return [{"role": "assistant", "content": candidate.text}]
    path = _relative(candidate.codes, folder, out)
    return [{"role": "assistant", "content": [{"type": "audio", "audio": path}]}]


def _relative(path: str, folder: Path, out: Path) -> str:
    return os.path.relpath((folder / path).absolute(), out.absolute().parent)
