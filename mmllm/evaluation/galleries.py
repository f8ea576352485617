"""The report's galleries: which rows are shown, and how."""

from __future__ import annotations

import difflib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmllm.evaluation.charts import MODALITY_COLORS
from mmllm.evaluation.media import EmbeddedImage, EmbeddedSound, MediaBudget
from mmllm.evaluation.metrics import normalize_text
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scene_marks import marked_scenes

NUM_PICTURES = 24
NUM_SOUNDS = 6
NUM_STORIES = 6
NUM_TEXTS = 6
TASK_NAMES = {
    "caption": "Captions",
    "transcribe": "Transcripts",
    "speak": "Speech",
    "interleaved": "Interleaved",
    "chat": "Conversations",
    "text": "Text",
}


@dataclass(frozen=True)
class Item:
    """A row as the template shows it."""

    id: str
    predicted: list[tuple[str, str]]
    expected: list[tuple[str, str]]
    same: bool
    correct: bool
    mark: str
    reference: str
    prediction: str
    blind: str | None
    question: str | None
    image: EmbeddedImage | None = None
    audio: EmbeddedSound | None = None
    written: EmbeddedSound | None = None
    parts: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Gallery:
    """Rows under one title; the first gallery of a task has the task's heading."""

    kind: str
    title: str
    entries: list[Item]
    heading: str = ""
    lead: str = ""
    anchor: str = ""
    notes: tuple[str, ...] = ()


def build_galleries(results: Mapping[str, TaskResult], budget: MediaBudget) -> list[Gallery]:
    """The galleries of each task: the worst rows first, then rows drawn at random.

    Args:
        results: by task, in the order to show.
        budget: how much the page may take; it is used up.
    """
    galleries: list[Gallery] = []
    waiting = [task for task, result in results.items() if any(_has_sound(p) for p in result.predictions)]
    kept_sound_bytes, budget.sound_bytes = budget.sound_bytes, 0
    for task, result in results.items():
        if task in waiting:  # an even share of what is left, so that the first task doesn't take it all
            budget.sound_bytes = kept_sound_bytes // len(waiting)
            kept_sound_bytes -= budget.sound_bytes
            waiting.remove(task)
        chosen = _chosen(task, result.predictions)
        lead, notes = _lead(task), _blind_notes(task, result.predictions)
        for number, (title, predictions) in enumerate(chosen):
            entries = [_item(task, prediction, budget) for prediction in predictions]
            heading = TASK_NAMES[task] if number == 0 else ""
            kind = "picture" if task == "caption" else task
            galleries.append(Gallery(kind, title, entries, heading, lead, task, notes))
        kept_sound_bytes, budget.sound_bytes = kept_sound_bytes + budget.sound_bytes, 0
    return galleries


def _has_sound(prediction: Prediction) -> bool:
    return bool(prediction.audio or prediction.written or any("audio" in part for part in prediction.segments))


def _chosen(task: str, predictions: Sequence[Prediction]) -> list[tuple[str, list[Prediction]]]:
    """(title, rows) of a task's galleries: the worst ones first, then rows drawn at random, then the sets apart."""
    limit = {"caption": NUM_PICTURES, "interleaved": NUM_STORIES, "chat": NUM_STORIES, "text": NUM_TEXTS}.get(
        task, NUM_SOUNDS
    )
    rng = random.Random(0)
    if task == "text":
        return [("Continuations", [p for p in predictions if p.question][:limit])] if predictions else []
    galleries = []
    for group, name in (("test", ""), ("heldout_pairs", "pairs never trained on"), ("heldout_voices", "new voices")):
        rows = [p for p in predictions if p.group == group]
        wrong = sorted((p for p in rows if not p.correct), key=lambda p: (p.score, p.id))
        apart = f", {name}" if name else ""
        size = limit if group == "test" else max(limit // 2, 3)
        if wrong:
            galleries.append((f"The worst{apart}: {len(wrong):,} of {len(rows):,} have a mistake", wrong[:size]))
        if rows:
            galleries.append((f"Drawn at random{apart}", rng.sample(rows, min(size, len(rows)))))
    return galleries


def _lead(task: str) -> str:
    match task:
        case "caption":
            return (
                "Pictures never seen in training. Marked words are wrong, or missing from what was said; another "
                "wording of the same scene is right, and so are its parts in a caption with a mistake elsewhere."
            )
        case "transcribe":
            return "Sounds never heard in training. Marked words are wrong, underlined ones were missed."
        case "speak":
            return "Sentences never spoken in training, said by the model and transcribed back by the same model."
        case "interleaved":
            return "Documents of pictures, sounds and text, each with a question about them."
        case "chat":
            return "Conversations never trained on, whose last answer the model gives."
    return "Held-out documents; the model goes on from the beginning it is given."


def _blind_notes(task: str, predictions: Sequence[Prediction]) -> tuple[str, ...]:
    """What the model says of a grey picture or of silence: mostly one thing, so it is said once."""
    blind = Counter(p.blind for p in predictions if p.blind is not None)
    if task not in ("caption", "transcribe") or not blind:
        return ()
    text, count = blind.most_common(1)[0]
    given = "a grey picture" if task == "caption" else "silence"
    often = "always" if count == blind.total() else f"{100 * count / blind.total():.0f}% of the time"
    return (f"Given {given} in the place of each row's own, the model says {often}: “{text}”",)


def _item(task: str, prediction: Prediction, budget: MediaBudget) -> Item:
    scenes = marked_scenes(prediction.prediction, prediction.reference) if task == "caption" else None
    predicted, expected = scenes or marked_words(prediction.prediction, prediction.reference)
    if prediction.correct:  # another wording of the same thing is no mistake
        predicted, expected = [(word, "") for word, _ in predicted], [(word, "") for word, _ in expected]
    return Item(
        id=prediction.id,
        predicted=predicted,
        expected=expected,
        same=normalize_text(prediction.prediction) == normalize_text(prediction.reference),
        correct=prediction.correct,
        mark=_mark(task, prediction),
        reference=prediction.reference,
        prediction=prediction.prediction,
        blind=prediction.blind,
        question=prediction.question,
        image=budget.image(prediction.image),
        written=budget.sound(prediction.written, MODALITY_COLORS["units"]),
        audio=budget.sound(prediction.audio, MODALITY_COLORS["audio"]),
        parts=[_part(segment, budget) for segment in prediction.segments],
    )


def _mark(task: str, prediction: Prediction) -> str:
    if task == "text":
        return f"{-prediction.score:.2f} bits a byte"
    if prediction.correct:
        return "right"
    if task in ("transcribe", "speak"):
        return f"WER {100 * (1 - prediction.score):.0f}%"
    return f"{100 * prediction.score:.0f}% right" if 0 < prediction.score < 1 else "wrong"


def _part(segment: Mapping[str, str], budget: MediaBudget) -> dict[str, Any]:
    if "image" in segment:
        return {"image": budget.image(segment["image"]), "text": "(a picture)"}
    if "audio" in segment:
        return {"sound": budget.sound(segment["audio"], MODALITY_COLORS["audio"]), "text": "(a sound)"}
    return {"text": segment["text"]}


def marked_words(prediction: str, reference: str) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The words of both texts with what differs: predicted words marked "wrong", reference words "missing"."""
    said, wanted = prediction.split(), reference.split()
    matcher = difflib.SequenceMatcher(
        None, [normalize_text(word) for word in said], [normalize_text(word) for word in wanted], autojunk=False
    )
    marks_said, marks_wanted = ["wrong"] * len(said), ["missing"] * len(wanted)
    for block in matcher.get_matching_blocks():
        marks_said[block.a : block.a + block.size] = [""] * block.size
        marks_wanted[block.b : block.b + block.size] = [""] * block.size
    return list(zip(said, marks_said, strict=True)), list(zip(wanted, marks_wanted, strict=True))
