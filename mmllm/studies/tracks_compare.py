"""`mmllm study compare`: scores of a track against others', paired by seed, under the rule for a claim.

Better or worse is claimed with p < 0.05 by Student's paired t-test over three seeds or more, of runs that kept to the
track's minutes. Everything else is unproved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmllm.studies.statistics import CLAIM_P, MIN_SEEDS, paired_p, student_interval
from mmllm.studies.tracks_score import MINUTES, SCORE

OVER_MINUTES = 0.5
"""What a run may take longer than a track's minutes: the last step, export and report."""
_ALIKE = {
    "track": "scores of different tracks can't be compared",
    "measure": "scores under different measures can't be compared",
    "rows_sha256": "their rows differ: they were made by another version, or changed",
    "judge_sha256": "they were judged by different aligners: score one of them again with --judge and the other's",
}
"""What all files must have alike, and what is wrong where they have not."""
_NEEDED = (
    "track", "measure", "score", "lower_is_better", "also", "seed", "minutes", "rows_sha256", "model_sha256",
    "judge_sha256", "max_steps", "machine",
)  # fmt: skip
Score = Mapping[str, Any]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


_TYPES = {
    "score": _is_number,
    "lower_is_better": lambda value: isinstance(value, bool),
    "seed": lambda value: value is None or (isinstance(value, int) and not isinstance(value, bool)),
    "minutes": lambda value: value is None or (_is_number(value) and value > 0),
    "machine": lambda value: isinstance(value, dict),
    "also": lambda value: (
        isinstance(value, list) and all("measure" in each and _is_number(each.get("score")) for each in value)
    ),
}
"""What a comparison relies on."""


@dataclass(frozen=True)
class MeasureDifference:
    """One measure of two sides, over the seeds that both have.

    Attributes:
        measure: its name.
        score: mean of the first side.
        other: mean of the second.
        difference: the first less the second.
        interval: 95%, of the difference, over seeds (Student's).
        p: two-sided, of no difference; None with one seed, or differences without spread.
    """

    measure: str
    score: float
    other: float
    difference: float
    interval: tuple[float, float]
    p: float | None


@dataclass(frozen=True)
class TrackComparison:
    """What scores of a track say against others.

    Attributes:
        track: its name.
        seeds: that both sides have.
        verdict: of the first side by the measure that ranks: "better", "worse" or "unproved".
        differences: the measure that ranks, then the others.
        reasons: why nothing can be claimed, where it can't.
        notes: what else should be known.
    """

    track: str
    seeds: tuple[int, ...]
    verdict: str
    differences: tuple[MeasureDifference, ...]
    reasons: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def compare_files(first: Sequence[str | Path], second: Sequence[str | Path]) -> TrackComparison:
    """Compares `score.json` files, a run each.

    Args:
        first: of one method, a seed each.
        second: of the other.

    Raises:
        FileNotFoundError: a file isn't there.
        ValueError: a file is no score, a seed is unknown or there twice, two are of one model, no seed is on both
            sides, or they are of different tracks, rows or judges.
    """
    read = [[(str(file), _read(Path(file))) for file in files] for files in (first, second)]
    _check_alike([*read[0], *read[1]])
    sides = [_by_seed(scores) for scores in read]
    seeds = tuple(sorted(sides[0].keys() & sides[1].keys()))
    if not seeds:
        told = " and ".join(", ".join(map(str, sorted(side))) for side in sides)
        raise ValueError(f"the seeds are {told}: none is on both sides; score both methods with the same seeds")
    differences = tuple(_differences(sides, seeds))
    reasons = _reasons([side[seed] for side in sides for seed in seeds], differences[0], len(seeds))
    improved = (differences[0].difference < 0) == sides[0][seeds[0]]["lower_is_better"]
    verdict = "unproved" if reasons else "better" if improved else "worse"
    track = sides[0][seeds[0]]["track"]
    return TrackComparison(track, seeds, verdict, differences, tuple(reasons), tuple(_notes(sides, seeds)))


def comparison_lines(found: TrackComparison) -> Iterator[str]:
    """Lines to print."""
    seeds = ", ".join(map(str, found.seeds))
    yield f"{found.track}, seed{'s' * (len(found.seeds) > 1)} {seeds}"
    for each in found.differences:
        p = "–" if each.p is None else f"{each.p:.4f}"
        low, high = each.interval
        yield (
            f"  {each.measure:<28}{each.score:>9.4f} against {each.other:.4f}: {each.difference:+.4f} "
            f"[{low:+.4f}, {high:+.4f}]  p {p}"
        )
    because = f": {'; '.join(found.reasons)}" if found.reasons else ""
    yield f"{found.verdict} by {found.differences[0].measure}{because}"
    yield from (f"note: {note}" for note in found.notes)


# -------------------------------------------------------------------------------------------------------------- checks
def _read(path: Path) -> Score:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such score; `mmllm study score TRACK --out DIR` writes DIR/{SCORE}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        missing = [key for key in _NEEDED if key not in values]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no score of `mmllm study score` ({error}); give its {SCORE}") from error
    if missing or not isinstance(values, dict):
        told = f"it has no {missing[0]}" if missing else "it is no object"
        raise ValueError(f"{path} is no score of `mmllm study score` ({told}); give its {SCORE}")
    wrong = [key for key, is_right in _TYPES.items() if not is_right(values[key])]
    if wrong:
        raise ValueError(f"{path} has {wrong[0]} {values[wrong[0]]!r}, which no score has; score its model again")
    if values["seed"] is None:
        raise ValueError(f"{path} has no seed, so it can't be paired; score it again with --seed, that of its training")
    return values


def _check_alike(scores: Sequence[tuple[str, Score]]) -> None:
    (first, wanted), *others = scores
    for name, values in others:
        for key, wrong in _ALIKE.items():
            if values[key] != wanted[key]:
                told = [str(each)[:12] for each in (wanted[key], values[key])]
                raise ValueError(f"{first} and {name}: {wrong} ({key} is {told[0]} and {told[1]})")


def _by_seed(scores: Sequence[tuple[str, Score]]) -> dict[int, Score]:
    """One side by seed; each must be a run of its own."""
    found: dict[int, Score] = {}
    models: dict[str, str] = {}
    for name, values in scores:
        seed = values["seed"]
        if seed in found:
            raise ValueError(f"{name}: the seed {seed} is on this side twice; give one file a seed")
        if (before := models.setdefault(values["model_sha256"], name)) != name:
            raise ValueError(f"{before} and {name} are of the same weights; give a training of its own for each seed")
        found[seed] = values
    return found


# ------------------------------------------------------------------------------------------------------------- verdict
def _differences(sides: Sequence[Mapping[int, Score]], seeds: Sequence[int]) -> Iterator[MeasureDifference]:
    """Of the measure that ranks, and of the others that all have."""
    tables = [
        {each["measure"]: each["score"] for each in (side[seed], *side[seed]["also"])}
        for side in sides
        for seed in seeds
    ]
    names = [name for name in tables[0] if all(name in table for table in tables)]
    for name in names:
        scores, others = ({seed: _score_of(side[seed], name) for seed in seeds} for side in sides)
        changes = [scores[seed] - others[seed] for seed in seeds]
        yield MeasureDifference(
            name, float(np.mean(list(scores.values()))), float(np.mean(list(others.values()))), float(np.mean(changes)),
            student_interval(changes), paired_p(scores, others),
        )  # fmt: skip


def _score_of(values: Score, name: str) -> float:
    return next(each["score"] for each in (values, *values["also"]) if each["measure"] == name)


def _reasons(scores: Sequence[Score], ranked: MeasureDifference, num_seeds: int) -> list[str]:
    """Why nothing can be claimed."""
    found = []
    if num_seeds < MIN_SEEDS:
        found.append(f"{num_seeds} seed{'s' * (num_seeds > 1)} on both sides, and a claim needs {MIN_SEEDS}")
    if any(each["max_steps"] is not None for each in scores):
        found.append("a score is of a try-out (--max_steps)")
    if any(each["minutes"] is None for each in scores):
        found.append("it is not told how long a model was trained (--minutes)")
    longest = max((each["minutes"] for each in scores if each["minutes"] is not None), default=0.0)
    if longest > MINUTES + OVER_MINUTES:
        found.append(f"a run took {longest:g} minutes, and a track has {MINUTES:g}")
    if num_seeds >= MIN_SEEDS and ranked.p is None:
        found.append("the differences have no spread over seeds, which no t-test can judge")
    elif ranked.p is not None and not ranked.p < CLAIM_P:
        found.append(f"p is {ranked.p:.3f}, and a claim needs less than {CLAIM_P:g}")
    return found


def _notes(sides: Sequence[Mapping[int, Score]], seeds: Sequence[int]) -> Iterator[str]:
    for place, side in zip(("first", "second"), sides, strict=True):
        if left_out := sorted(side.keys() - set(seeds)):
            yield f"seeds of the {place} side alone are left out: {', '.join(map(str, left_out))}"
    processors = sorted({str(side[seed]["machine"].get("processor")) for side in sides for seed in seeds})
    if len(processors) > 1:
        yield f"scored on different machines ({', '.join(processors)}): their minutes may not be alike"
