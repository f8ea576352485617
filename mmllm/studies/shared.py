"""Steps that several arms of a study begin with alike: run once, and counted for each.

Arms that differ in their last training only, such as adapters of one captioner, would train that captioner again for
each. What the steps up to there leave is kept under `shared`, by a digest of all that they are told, and copied into
the folder of each run. The operations, minutes and joules of a run are those that it would have had alone.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmllm.studies.commands import LOG
from mmllm.studies.lengths import Length
from mmllm.studies.settings import Base, filled
from mmllm.studies.study import Arm, Step

FOLDER = "shared"
"""In a study's folder, as deep as its runs: relative paths in manifests hold in both."""
_RECORD = "cost.json"


@dataclass(frozen=True)
class Cost:
    """What steps took.

    Attributes:
        length: steps, samples, tokens and operations of trainings.
        documents: of the largest training.
        minutes: of the clock.
        joules: of the machine; None: not measured.
    """

    length: Length = field(default_factory=Length)
    documents: int = 0
    minutes: float = 0.0
    joules: float | None = 0.0

    def __add__(self, other: Cost) -> Cost:
        joules = None if self.joules is None or other.joules is None else self.joules + other.joules
        return Cost(self.length + other.length, max(self.documents, other.documents), self.minutes + other.minutes,
                    joules)  # fmt: skip

    @staticmethod
    def of(values: Mapping[str, Any]) -> Cost:
        """From JSON."""
        return Cost(**{**values, "length": Length(**values["length"])})


Run = Callable[[Sequence[Step], Path], Cost]
"""Runs steps in a folder."""


def shared_keys(base: Base) -> dict[Arm, list[str]]:
    """Digests of each arm's first steps, each of all steps up to it; of those that another arm of the study has too."""
    # Without the last step, which makes the model that is scored.
    keys = {arm: list(_keys(base, arm))[:-1] for arm in base.study.arms()}
    counts = Counter(key for each in keys.values() for key in set(each))
    return {arm: [key for key in each if counts[key] > 1] for arm, each in keys.items()}


def would_wait(arm: Arm, running: Sequence[Arm], keys: Mapping[Arm, Sequence[str]], study: Path) -> bool:
    """Whether an arm's next shared step is one that a running arm is to make."""
    missing = next((key for key in keys[arm] if not (study / FOLDER / key / _RECORD).is_file()), None)
    return any(missing in keys[each] for each in running)


def key_of(base: Base, arm: Arm) -> str:
    """Digest of all that an arm's steps are told."""
    return list(_keys(base, arm))[-1]


def _keys(base: Base, arm: Arm) -> Iterator[str]:
    """Of each step, a digest of all that it and those before it are told."""
    run, key = Path("/run"), ""
    places = {"data": str(base.data), "run": str(run), "seed": str(arm.seed)}
    for step in base.study.level(arm).parts:
        if step.command is not None:
            told: dict[str, Any] = {"command": filled(step.command, places), "files": filled(step.files, places)}
        else:
            told = {**asdict(base.settings(arm, step, run)), "out": step.out, "share": step.share,
                    "budget": asdict(base.study.budget)}  # fmt: skip
        key = hashlib.sha256(json.dumps([key, told], sort_keys=True, default=str).encode()).hexdigest()[:16]
        yield key


def bring(keys: list[str], steps: Sequence[Step], study: Path, folder: Path, run: Run) -> Cost:
    """Puts into a run's folder what its first steps leave, which are run where no arm did so yet; gives their cost.

    Args:
        keys: of the steps.
        steps: as many.
        study: the study's folder.
        folder: the run's.
        run: runs one.
    """
    if not keys:
        return Cost()
    place = study / FOLDER / keys[-1]
    place.parent.mkdir(parents=True, exist_ok=True)
    with _locked(place.with_suffix(".lock")):
        if not (place / _RECORD).is_file():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            cost = bring(keys[:-1], steps[:-1], study, place, run) + run(steps[-1:], place)
            (place / _RECORD).write_text(json.dumps(asdict(cost)) + "\n", encoding="utf-8")
    cost = Cost.of(json.loads((place / _RECORD).read_text(encoding="utf-8")))
    for path in place.iterdir():
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        elif path.name not in (_RECORD, LOG):
            shutil.copy2(path, folder / path.name)
    with (folder / LOG).open("a", encoding="utf-8") as log:
        log.write(f"{len(keys)} steps that other arms have too: {place / LOG} has what they said\n")
    return cost


def forget(study: Path) -> None:
    """Removes what runs shared, when none is left to run."""
    shutil.rmtree(study / FOLDER, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Others wait, in this process and in others; a process that is killed holds nothing."""
    with path.open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
