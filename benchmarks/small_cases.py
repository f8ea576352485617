"""What `small.py` runs: by name, the runs of quickstart, the rows that each holds out, and the measures that count.

Every name but `demo` takes its rows from the folder that $MMLLM_DATA names. What is held out is never trained on, and
is cut as tests/test_proofs.py cuts it: a speaker, one photo in eight, a skin tone for each drawing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIVEN_SPEAKERS = ("george", "jackson", "lucas", "nicolas")
"""Of fsdd: those that the folder for development holds."""
OTHER_SPEAKERS = ("theo", "yweweler")
"""Those that judge: never trained on, and held out only where the folder has them."""
QUICK_SPEAKER = "nicolas"
SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
FIRST_MEL_ERROR = 6.855
"""dB: of the codec that the demo had until 2026-11-29, on the demo's test rows."""
MEAN = f"mean of {len(GIVEN_SPEAKERS)}"


@dataclass(frozen=True)
class Measure:
    """A number of report.json.

    Attributes:
        key: where it stands there: "caption.exact_match".
        name: in the rows; "": the key.
        is_error: less is better.
        scale: by which it is multiplied.
        offset: to which that is added: 1 and a scale of -1 make an accuracy of an error rate.
    """

    key: str
    name: str = ""
    is_error: bool = False
    scale: float = 1.0
    offset: float = 0.0

    @property
    def label(self) -> str:
        """What the rows call it."""
        return self.name or self.key

    def read(self, report: Mapping[str, Any]) -> tuple[float, list[float] | None] | None:
        """The score and its interval, or None where the report has no such number."""
        part, _, key = self.key.partition(".")
        scores = report.get(part, {})
        if scores.get(key) is None:
            return None
        interval = scores.get(f"{key}_ci")
        ends = None if interval is None else sorted(self.offset + self.scale * end for end in interval)
        return self.offset + self.scale * scores[key], ends


EXACT = Measure("caption.exact_match")
WORDS = Measure("transcribe.wer", "word_accuracy", scale=-1.0, offset=1.0)
ROUND_TRIP = Measure("speak.round_trip_wer", is_error=True)
BITS = Measure("text.bits_per_byte", is_error=True)
DEMO_MEASURES = (
    Measure("train.seconds", "minutes", True, 1 / 60),
    Measure("train.peak_rss_bytes", "peak_gb", True, 1e-9),
    EXACT,
    Measure("caption.attribute_accuracy"),
    Measure("caption.order_accuracy_2"),
    Measure("caption.order_accuracy_3"),
    Measure("caption.heldout_pairs_accuracy"),
    Measure("transcribe.wer", is_error=True),
    Measure("transcribe.heldout_voices_wer", is_error=True),
    ROUND_TRIP,
    Measure("speak.length_correlation"),
    Measure("speak.at_bound", is_error=True),
    Measure("speak.judge_wer", is_error=True),
    Measure("speak.judge_resynthesis_wer", is_error=True),
    Measure("speak.level_db"),
    Measure("speak.mel_error", "speak.mel_error_ratio", is_error=True, scale=1 / FIRST_MEL_ERROR),
    Measure("interleaved.answer_accuracy"),
    Measure("interleaved.ordinal_accuracy"),
    BITS,
)
MEASURES = {measure.label: measure for measure in (*DEMO_MEASURES, WORDS)}


@dataclass(frozen=True)
class Case:
    """One run of quickstart, which is done once a seed.

    Attributes:
        name: as `--only` names it.
        part: which of the name's runs; "" where there is one.
        minutes: of `--minutes`; None: without it.
        measures: that its report is read for.
        rows: writes what it trains and tests on to a folder and gives quickstart's options for it.
    """

    name: str
    part: str
    minutes: float | None
    measures: tuple[Measure, ...]
    rows: Callable[[Path], list[str]]

    @property
    def slug(self) -> str:
        """For names of folders."""
        return "-".join(word for word in (self.name, self.part) if word)

    def label(self, measure: str) -> str:
        """What the rows of `--json` call a measure of this run."""
        return f"{self.part}: {measure}" if self.part else measure


def data_folder() -> Path:
    """The folder of the real sets.

    Raises:
        SystemExit: $MMLLM_DATA names none.
    """
    named = os.environ.get("MMLLM_DATA")
    if not named or not Path(named).is_dir():
        raise SystemExit(
            f"MMLLM_DATA is {named!r}; set it to the folder of fsdd/, cifar10/, emoji/ and shakespeare/, or give "
            f"--only demo, which makes its own rows"
        )
    return Path(named).resolve()


def cases(name: str) -> tuple[list[Case], list[str]]:
    """The runs of a name, and what of it can't be run here and why.

    Raises:
        SystemExit: the rows that it needs are not there.
    """
    match name:
        case "demo":
            return [Case("demo", "", None, DEMO_MEASURES, lambda folder: [])], []
        case "fsdd":
            there = {row["speaker"] for row in _rows("fsdd")}
            speakers = [speaker for speaker in (*GIVEN_SPEAKERS, *OTHER_SPEAKERS) if speaker in there]
            absent = [speaker for speaker in (*GIVEN_SPEAKERS, *OTHER_SPEAKERS) if speaker not in there]
            left_out = [f"fsdd: no rows of {speaker} in MMLLM_DATA, so that fold is left out" for speaker in absent]
            return [_digits("fsdd", speaker, speaker, 10.0) for speaker in speakers], left_out
        case "cifar10":
            return [Case("cifar10", "", 10.0, (EXACT,), _photos)], []
        case "emoji":
            return [Case("emoji", "", 10.0, (EXACT,), _drawings)], []
        case "shakespeare":
            return [Case("shakespeare", "", 10.0, (BITS,), _plays)], []
        case _:
            return [
                _digits("quick", "fsdd", QUICK_SPEAKER, 3.0),
                Case("quick", "cifar10", 3.0, (EXACT,), _photos),
                Case("quick", "emoji", 3.0, (EXACT,), _drawings),
                Case("quick", "shakespeare", 3.0, (BITS,), _plays),
            ], []


NAMES = ("demo", "fsdd", "cifar10", "emoji", "shakespeare", "quick")


# ------------------------------------------------------------------------------------------------- rows and their parts
def _rows(name: str) -> list[dict[str, Any]]:
    """Of a set's manifest, with paths that hold anywhere."""
    manifest = data_folder() / name / "manifest.jsonl"
    if not manifest.is_file():
        raise SystemExit(f"{manifest} is not there; MMLLM_DATA must name the folder that holds {name}/")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        for kind in ("image", "audio"):
            if kind in row:
                row[kind] = str(manifest.parent / row[kind])
    return rows


def _digits(name: str, part: str, speaker: str, minutes: float) -> Case:
    """A speaker is held out; those that judge are never trained on."""

    def rows(folder: Path) -> list[str]:
        found = _rows("fsdd")
        train = [row for row in found if row["speaker"] in GIVEN_SPEAKERS and row["speaker"] != speaker]
        return _written(folder, train, [row for row in found if row["speaker"] == speaker])

    return Case(name, part, minutes, (WORDS, ROUND_TRIP), rows)


def _photos(folder: Path) -> list[str]:
    def is_test(row: Mapping[str, Any]) -> bool:
        return int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 8 == 0

    return _parted(folder, _rows("cifar10"), is_test)


def _drawings(folder: Path) -> list[str]:
    def is_test(row: Mapping[str, Any]) -> bool:
        parts = row["id"].split("_")
        tones = [part for part in parts if part in SKIN_TONES]
        base = "_".join(part for part in parts if part not in SKIN_TONES)
        return len(tones) == 1 and SKIN_TONES.index(tones[0]) == sum(base.encode()) % len(SKIN_TONES)

    return _parted(folder, _rows("emoji"), is_test)


def _plays(folder: Path) -> list[str]:
    """Whole: `data split` holds some out by the run's seed."""
    return ["--train", str(data_folder() / "shakespeare" / "manifest.jsonl")]


def _parted(folder: Path, rows: Sequence[dict[str, Any]], is_test: Callable[[dict[str, Any]], bool]) -> list[str]:
    return _written(folder, [row for row in rows if not is_test(row)], [row for row in rows if is_test(row)])


def _written(folder: Path, train: Sequence[dict[str, Any]], test: Sequence[dict[str, Any]]) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return ["--train", str(folder / "train.jsonl"), "--test", str(folder / "test.jsonl")]
