"""Tracks of the scoreboard: fixed rows to train on and to be tested on, what is measured, and their digest.

Rows are made from a fixed seed, or are a fixed part of a set that the environment's `MMLLM_DATA` names. Two scores are
of the same rows where their digests are equal; a digest is of what rows say and of their pictures' and sounds' bytes,
wherever these lie. See docs/SCOREBOARD.md.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.quickstart.machine import MAX_WORKERS, num_cores
from mmllm.quickstart.scenes import make_scenes
from mmllm.quickstart.speech import make_speech

DATA_VARIABLE = "MMLLM_DATA"
ROWS_SEED = 7919
"""Of the rows that are made; not a seed of the demo's, whose rows are others."""
SPLITS = ("train", "test")
ROWS = "rows"
"""In a score's folder: where its rows lie."""
ABOUT_ROWS = "rows.json"
FSDD_FOLD = "george"
FSDD_SPEAKERS = ("george", "jackson", "lucas", "nicolas")
"""Of whom one is tested on; other speakers, where a folder has them, are left out."""
TEXT_TEST_SHARE = 10
"""The last tenth of a text is tested on, as nanoGPT (https://github.com/karpathy/nanoGPT) cuts its Shakespeare."""
VOICES = ("en-us+john", "en-gb-x-rp+f1", "en-gb-scotland+Andy", "en-us+Andrea")
"""Of espeak-ng: those that the track `speech` asks for."""


@dataclass(frozen=True)
class TrackMeasure:
    """A number that `mmllm eval` gives.

    Attributes:
        key: its name there.
        lower_is_better: it is an error.
    """

    key: str
    lower_is_better: bool = False


@dataclass(frozen=True)
class TrackSizes:
    """How much of what is made there is. Only tests have others than these, and other rows give another digest."""

    pictures: int = 8000
    """Of `scenes`; each has two captions, so twice as many rows."""
    words: int = 500
    phrases: int = 500
    sentences: int = 1000
    """To hear, in many voices."""
    spoken: int = 3000
    """In the four voices that are asked for."""
    test_pictures: int = 504
    test_sentences: int = 252
    judge_steps: int = 1000


@dataclass(frozen=True)
class Track:
    """What is trained on, and how it is scored.

    Attributes:
        name: of the track.
        about: in a line.
        task: of `mmllm eval`.
        measures: the first ranks; the others are told beside it.
        sense: what a model's config must have: "vision", "audio"; "": it needs none.
        write: writes `train.jsonl` and `test.jsonl` into a folder.
        is_judged: what is spoken is written down by an aligner too, which has learnt on the track's training rows.
    """

    name: str
    about: str
    task: str
    measures: tuple[TrackMeasure, ...]
    sense: str
    write: Callable[[Path, TrackSizes], None]
    is_judged: bool = False


def track_of(name: str) -> Track:
    """A track by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in TRACKS:
        raise ValueError(f"track is {name!r}; choose one of {', '.join(TRACKS)}")
    return TRACKS[name]


# ---------------------------------------------------------------------------------------------------------------- rows
def write_rows(track: Track, out: Path, sizes: TrackSizes | None = None) -> dict[str, Any]:
    """Writes a track's rows to `out/rows`, unless they are there; gives what `rows.json` holds.

    Args:
        track: whose.
        out: the score's folder.
        sizes: of what is made.

    Returns:
        `track`, `train` and `test` (numbers of rows), `rows_sha256`.

    Raises:
        ValueError: the rows aren't to be had, or those that are there are another track's or have changed.
    """
    folder = out / ROWS
    if folder.exists():
        return _checked(track, folder)
    unfinished = folder.with_name(f"{ROWS}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    track.write(unfinished, sizes or TrackSizes())
    about = {"track": track.name, **_counted(unfinished), "rows_sha256": rows_digest(unfinished)}
    (unfinished / ABOUT_ROWS).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder)
    return about


def rows_digest(folder: Path) -> str:
    """The digest of a folder's `train.jsonl` and `test.jsonl`: rows in their order, media by their bytes.

    Raises:
        ValueError: a manifest, or a picture or sound of it, can't be read.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split}\n".encode())
        for row in _read(folder / f"{split}.jsonl"):
            for kind in ("image", "audio"):
                if kind in row:
                    row[kind] = _media_digest(folder / row[kind])
            digest.update(json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _media_digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ValueError(f"{path} can't be read ({error.strerror}); the track's rows need it") from error


def _checked(track: Track, folder: Path) -> dict[str, Any]:
    """What the rows that are there say of themselves, if it holds."""
    file = folder / ABOUT_ROWS
    if not file.is_file():
        raise ValueError(f"{folder} is there, but has no {ABOUT_ROWS}: it is no track's; give another --out")
    about = json.loads(file.read_text(encoding="utf-8"))
    if about["track"] != track.name:
        raise ValueError(f"{folder} holds the rows of the track {about['track']}, not {track.name}; give another --out")
    if rows_digest(folder) != about["rows_sha256"]:
        raise ValueError(f"the rows in {folder} have changed since they were written; remove it, or give another --out")
    return about


def _counted(folder: Path) -> dict[str, int]:
    counts = {split: len(_read(folder / f"{split}.jsonl")) for split in SPLITS}
    assert all(counts.values()), counts
    return counts


def _read(manifest: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError as error:
        raise ValueError(f"{manifest} is not there; remove {manifest.parent}, and it is written again") from error


# -------------------------------------------------------------------------------------------------------------- tracks
def _scenes(folder: Path, sizes: TrackSizes) -> None:
    manifests = make_scenes(folder, sizes.pictures, sizes.test_pictures, 0, ROWS_SEED)
    manifests["heldout"].unlink()


def _speech(folder: Path, sizes: TrackSizes) -> None:
    manifests = make_speech(
        folder, sizes.words, sizes.phrases, sizes.sentences, sizes.test_sentences, 0, ROWS_SEED,
        num_processes=min(num_cores(), MAX_WORKERS), num_spoken=sizes.spoken, spoken_voices=VOICES, test_voices=VOICES,
    )  # fmt: skip
    manifests["heldout"].unlink()


def _digits(folder: Path, sizes: TrackSizes) -> None:
    """A speaker who is never trained on."""
    rows = [row for row in _rows_of_set("fsdd") if row.get("speaker") in FSDD_SPEAKERS]
    test = [row for row in rows if row["speaker"] == FSDD_FOLD]
    _write_parts(folder, "fsdd", [row for row in rows if row["speaker"] != FSDD_FOLD], test)


def _plays(folder: Path, sizes: TrackSizes) -> None:
    """The plays' end."""
    rows = _rows_of_set("shakespeare")
    place = len(rows) - len(rows) // TEXT_TEST_SHARE
    _write_parts(folder, "shakespeare", rows[:place], rows[place:])


def _rows_of_set(name: str) -> list[dict[str, Any]]:
    """Of a set that is given, with paths that hold anywhere."""
    named = os.environ.get(DATA_VARIABLE)
    if not named or not Path(named).is_dir():
        made = ", ".join(track.name for track in TRACKS.values() if track.write in (_scenes, _speech))
        raise ValueError(
            f"{DATA_VARIABLE} is {named!r}; the track {name} takes its rows from the folder that it names: set it to "
            f"the one that holds {name}/, or choose a track that makes its rows ({made})"
        )
    manifest = Path(named).resolve() / name / "manifest.jsonl"
    if not manifest.is_file():
        raise ValueError(f"{manifest} is not there; {DATA_VARIABLE} must name the folder that holds {name}/")
    rows = _read(manifest)
    for row in rows:
        if "audio" in row:
            row["audio"] = str(manifest.parent / row["audio"])
    return rows


def _write_parts(folder: Path, name: str, *parts: Sequence[dict[str, Any]]) -> None:
    for split, rows in zip(SPLITS, parts, strict=True):
        if not rows:
            raise ValueError(f"{DATA_VARIABLE} has too few rows of {name}: none to {split} on; give the whole set")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


TRACKS = {
    track.name: track
    for track in (
        Track(
            "scenes", "captions of drawn scenes that training never shows", "caption",
            (TrackMeasure("exact_match"), TrackMeasure("attribute_accuracy")), "vision", _scenes,
        ),
        Track(
            "speech", "speech out: sentences that training never says, written down again", "speak",
            (TrackMeasure("judge_wer", True), TrackMeasure("round_trip_wer", True)), "audio", _speech, is_judged=True,
        ),
        Track(
            "fsdd", f"spoken digits of a speaker never heard ({FSDD_FOLD})", "transcribe",
            (TrackMeasure("wer", True),), "audio", _digits,
        ),
        Track(
            "shakespeare", "the last tenth of the plays", "text", (TrackMeasure("bits_per_byte", True),), "", _plays,
        ),
    )
}  # fmt: skip
