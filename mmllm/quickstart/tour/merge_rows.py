"""The rows of stage `merge`: two things that the tour's model doesn't know, with rows to learn, choose and test by.

With `MMLLM_DATA`: drawings of people (emoji) whose skin tone is asked for, of each person one tone held out, and photos
(cifar10) that are asked about. Else scenes of other kinds: captions that list shapes, and questions for the colours.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.quickstart.tour.stage import Tour

PARTS = ("train", "val", "test")
NUM_SCENES = {"train": 4000, "val": 200, "test": 400}
QUESTION = "what is in the photo?"
TONE = "which skin tone is drawn?"
_TONE_END = " skin tone"
COLOURS = "which colours are there?"
_SKIN_TONES = ("1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff")
_SETS = ("emoji", "cifar10")

Rows = dict[str, list[dict[str, Any]]]
"""By part."""


@dataclass(frozen=True)
class Skill:
    """What a specialist learns.

    Attributes:
        name: of the specialist.
        kind: of its rows, as recipes have it.
        task: by which it is scored, and the measure.
    """

    name: str
    kind: str
    task: str
    measure: str


CAPTIONS = ("caption", "caption", "exact_match")
QUESTIONS = ("interleaved", "interleaved", "answer_accuracy")


def make_skills(tour: Tour) -> dict[Skill, Rows]:
    """The two skills, and their rows with paths relative to `OUT/data`."""
    has_sets = tour.media is not None and all((tour.media / name / "manifest.jsonl").is_file() for name in _SETS)
    if not has_sets:
        return {Skill("list", *CAPTIONS): _lists(tour), Skill("colours", *QUESTIONS): _colours(tour)}
    return {Skill("emoji", *QUESTIONS): _drawings(tour), Skill("photos", *QUESTIONS): _photos(tour)}


def _drawings(tour: Tour) -> Rows:
    """Questions for the tone of people who are drawn in five: one of each is held out to test, the next to choose by.

    Their names would be no skill for so few minutes: 130 of them, and three drawings each to learn from. Drawings of
    nobody, or of several people, are left out.
    """
    parts: Rows = {part: [] for part in PARTS}
    for row in _read(tour, _manifest(tour, "emoji")):
        words = row["id"].split("_")
        tones = [word for word in words if word in _SKIN_TONES]
        if len(tones) != 1 or not row["text"].endswith(_TONE_END):
            continue
        base = "_".join(word for word in words if word not in _SKIN_TONES)
        place = (_SKIN_TONES.index(tones[0]) - sum(base.encode())) % len(_SKIN_TONES)
        parts[{0: "test", 1: "val"}.get(place, "train")].append(
            {"id": row["id"], "segments": [{"image": row["image"]}], "question": TONE,
             "answer": row["text"].removesuffix(_TONE_END).rpartition(" with ")[2]}
        )  # fmt: skip
    return parts


def _photos(tour: Tour) -> Rows:
    """Questions for what a photo shows: one in eight to test, another to choose by."""
    parts: Rows = {part: [] for part in PARTS}
    for row in _read(tour, _manifest(tour, "cifar10")):
        place = int(hashlib.sha256(row["id"].encode()).hexdigest(), 16) % 8
        parts[{0: "test", 1: "val"}.get(place, "train")].append(
            {"id": row["id"], "segments": [{"image": row["image"]}], "question": QUESTION,
             "answer": row["text"].removeprefix("a photo of ")}
        )  # fmt: skip
    return parts


def _lists(tour: Tour) -> Rows:
    """Scenes whose captions list colours and shapes from the first to the last."""
    return {
        part: [
            {"id": f"{row['id']}_list", "image": row["image"],
             "text": f"{len(row['objects'])}: " + ", ".join(f"{o['colour']} {o['shape']}" for o in row["objects"])}
            for row in rows
        ]
        for part, rows in _scenes(tour).items()
    }  # fmt: skip


def _colours(tour: Tour) -> Rows:
    """Scenes whose colours are asked for, in the order of the alphabet."""
    return {
        part: [
            {"id": f"{row['id']}_colours", "segments": [{"image": row["image"]}], "question": COLOURS,
             "answer": " and ".join(sorted({each["colour"] for each in row["objects"]}))}
            for row in rows
        ]
        for part, rows in _scenes(tour).items()
    }  # fmt: skip


def _scenes(tour: Tour) -> Rows:
    train = _read(tour, tour.data / "manifests" / "train-caption.jsonl")
    held = _read(tour, tour.test_manifest)
    wanted = {"train": [row for row in train if row.get("plain") is not False], "val": held, "test": held[::-1]}
    scenes = {
        part: [row for row in rows if "objects" in row and not row.get("heldout_pairs")]
        for part, rows in wanted.items()
    }
    most = {**NUM_SCENES, "test": min(NUM_SCENES["test"], 4 * len(scenes["test"]) // 5)}  # a smaller demo has fewer
    found = {part: rows[: most[part]] for part, rows in scenes.items()}
    test = {row["id"] for row in found["test"]}
    found["val"] = [row for row in found["val"] if row["id"] not in test]
    return found


def _manifest(tour: Tour, name: str) -> Path:
    assert tour.media is not None
    return tour.media / name / "manifest.jsonl"


def _read(tour: Tour, manifest: Path) -> list[dict[str, Any]]:
    """A manifest's rows; paths of pictures are relative to where the tour writes rows."""
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines()]
    return [_moved(row, manifest.parent.resolve(), (tour.out / "data").resolve()) for row in rows]


def _moved(row: Mapping[str, Any], before: Path, now: Path) -> dict[str, Any]:
    moved = dict(row)
    if "image" in moved:
        moved["image"] = os.path.relpath(before / moved["image"], now)
    return moved
