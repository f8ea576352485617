"""Interleaved documents: pictures and sounds between text that refers to them, most with a question at the end.

A question asks for one attribute of one picture, for the picture that shows something, or for what is said. The text
around may describe the other pictures, and the asked one by attributes that don't tell the answer, so the answer needs
the right picture or sound.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmllm.evaluation.scenes import POSITION_FORMS
from mmllm.quickstart.scenes import Pair, draw_row, split_pairs, write_png
from mmllm.quickstart.speech import CONTENT_WORDS, Utterance, sample_phrase, sample_utterance, say_utterances
from mmllm.quickstart.synthesis import Espeak, voices

ORDINALS = ("first", "second", "third")
LEADS = {
    "p": ("look at this:", "here is a picture:", "the next picture:"),
    "s": ("listen:", "here is a sound:", "the next sound:"),
}
"""Text before a picture or a sound."""
QUESTION_SHARE = 0.75
"""Of the training documents; test documents all end in a question."""
LATE_SHARE = 0.6
"""Of the training documents, in which what is said of pictures and sounds stands behind all of them, in any order. Said
right behind a picture, "the second" is just the last one; said later, it has to be found."""
LATE_REMARKS = 0.7
"""Of the pictures and sounds of such a document with a question, share of which something is said."""


@dataclass
class Document:
    """What a document shows and asks, before its files are written."""

    pictures: list[dict[str, Any]] = field(default_factory=list)
    """Rows of single-object scenes with their `image` path."""
    sounds: list[dict[str, Any]] = field(default_factory=list)
    """`audio` path, `text` and `kind`, "word" or "phrase"."""
    order: str = ""
    """One letter an item: "p" the next picture, "s" the next sound."""
    question: str = ""
    answer: str = ""
    kind: str = ""
    """What the question asks for: "colour", "shape", "place", "which", "sound"."""
    asked: int = -1
    """Index of the picture that the question is about."""


def _question(document: Document, rng: random.Random) -> None:
    """Sets the question. Which picture shows a shape is asked only of three with different shapes."""
    kinds = ["colour", "colour", "shape", "shape", "place"] if document.pictures else []
    shapes = [picture["objects"][0]["shape"] for picture in document.pictures]
    if len(set(shapes)) == 3:
        kinds.append("which")
    kinds += ["sound"] * (3 if document.sounds else 0)
    document.kind = rng.choice(kinds)
    if document.kind == "sound":
        i = rng.randrange(len(document.sounds))
        sound = document.sounds[i]
        one = len(document.sounds) == 1
        if sound["kind"] == "word":
            document.question = "which word is said?" if one else f"which word is said {ORDINALS[i]}?"
        else:
            document.question = "what is said?" if one else f"what is said in the {ORDINALS[i]} sound?"
        document.answer = sound["text"]
        return
    i = document.asked = rng.randrange(len(document.pictures))
    thing = document.pictures[i]["objects"][0]
    where = "the picture" if len(document.pictures) == 1 else f"the {ORDINALS[i]} picture"
    match document.kind:
        case "colour":
            document.question, document.answer = f"which colour is the shape in {where}?", thing["colour"]
        case "shape":
            document.question, document.answer = f"which shape is in {where}?", thing["shape"]
        case "place":
            document.question = f"where is the shape in {where}?"
            document.answer = POSITION_FORMS[document.pictures[i]["relations"][0][2]][0]
        case _:
            shape = thing["shape"]
            document.question, document.answer = f"which picture shows a {shape}?", f"the {ORDINALS[i]}"


def _remark(document: Document, i: int, rng: random.Random) -> str:
    """Text that refers to picture i; it never tells the question's answer."""
    name = "the picture" if len(document.pictures) == 1 else f"the {ORDINALS[i]} picture"
    picture = document.pictures[i]
    thing = picture["objects"][0]
    place = POSITION_FORMS[picture["relations"][0][2]][0]
    if document.kind == "which":
        return rng.choice((f"{name} shows something {thing['colour']}.", f"{name} has something {thing['size']}."))
    if i == document.asked:
        told = {"colour": f"a {thing['size']} {thing['shape']}",
                "shape": f"something {thing['size']} and {thing['colour']}",
                "place": f"a {thing['colour']} {thing['shape']}"}[document.kind]  # fmt: skip
        return f"{name} shows {told.replace('a orange', 'an orange')}."
    told = f"a {thing['size']} {thing['colour']} {thing['shape']}"
    return rng.choice((f"{name} shows {told}.", f"{name} shows {told} {place}.", f"what {name} shows is {place}."))


def _late_remarks(document: Document, rng: random.Random) -> list[str]:
    """Text that refers to pictures and sounds when all are past; it never tells the question's answer."""
    share = LATE_REMARKS if document.kind else 1.0
    remarks = [_remark(document, i, rng) for i in range(len(document.pictures)) if rng.random() < share]
    for i, sound in enumerate(document.sounds):
        if document.kind != "sound" and rng.random() < share:
            remarks.append(f"the {ORDINALS[i]} sound says {sound['text']}.")
    rng.shuffle(remarks)
    return remarks


def _segments(document: Document, rng: random.Random, is_late: bool) -> list[dict[str, str]]:
    """The document's items in order, with text before each and remarks after some, or after all."""
    segments: list[dict[str, str]] = []
    remarks: list[str] = []
    picture = sound = 0
    for letter in document.order:
        lead = rng.choice(LEADS[letter])
        words = [*remarks, lead]
        remarks = []
        segments.append({"text": " ".join(words)})
        if letter == "p":
            segments.append({"image": document.pictures[picture]["image"]})
            if not is_late and (not document.kind or rng.random() < 0.4):
                remarks.append(_remark(document, picture, rng))
            picture += 1
        else:
            item = document.sounds[sound]
            segments.append({"audio": item["audio"]})
            if not is_late and not document.kind:
                remarks.append(f"the {ORDINALS[sound]} sound says {item['text']}.")
            sound += 1
    if is_late:
        remarks = _late_remarks(document, rng)
    if remarks:
        segments.append({"text": " ".join(remarks)})
    return segments


def _orders(with_speech: bool) -> tuple[str, ...]:
    return ("pp", "ppp", "ppp", "ss", "sss", "ps", "sp", "psp") if with_speech else ("pp", "ppp", "ppp")


def _make_document(
    out_dir: Path, split: str, i: int, rng: random.Random, pairs: list[Pair], with_speech: bool
) -> tuple[dict[str, Any], list[Utterance]]:
    """A row, with its pictures written and its sounds planned."""
    document = Document(order=rng.choice(_orders(with_speech)))
    utterances: list[Utterance] = []
    speaker = rng.choice(voices(heldout=False))
    for number, letter in enumerate(document.order):
        path = f"{'images' if letter == 'p' else 'audio'}/{split}/{split}_{i:06d}_{number}"
        if letter == "p":
            image_HW3, row = draw_row(rng, pairs, pairs, 1, 64, is_test=split == "test")
            write_png(out_dir / f"{path}.png", image_HW3)
            document.pictures.append({**row, "image": f"{path}.png"})
        else:
            kind = rng.choice(("word", "word", "word", "phrase"))
            text = rng.choice(CONTENT_WORDS) if kind == "word" else sample_phrase(rng)
            document.sounds.append({"audio": f"{path}.wav", "text": text, "kind": kind})
            utterances.append(sample_utterance(out_dir / f"{path}.wav", text, speaker, rng))
    if split == "test" or rng.random() < QUESTION_SHARE:
        _question(document, rng)
    is_late = split != "test" and rng.random() < LATE_SHARE
    row = {"id": f"interleaved_{split}_{i:06d}", "segments": _segments(document, rng, is_late)}
    if document.kind:
        row |= {"question": document.question, "answer": document.answer, "asks": document.kind}
    return row, utterances


def make_interleaved(
    out_dir: Path | str,
    num_train: int,
    num_test: int,
    seed: int,
    with_speech: bool,
    sample_rate: int = 8000,
    num_processes: int = 1,
) -> dict[str, Path]:
    """Writes `train.jsonl` and `test.jsonl` of documents of two or three pictures and sounds, with their files.

    Pictures are single-object scenes of training's (shape, colour) pairs, those of testing scenes that no training
    picture shows; sounds are words and phrases by voices of
    training. Every test row has `question` and `answer`; `asks` says what it asks for. Equal arguments, but for
    `num_processes`, give equal bytes.

    Args:
        out_dir: Folder to write to; made where it is missing.
        num_train: Rows to train on.
        num_test: Rows with new pictures and sounds.
        seed: Chooses everything.
        with_speech: Whether there are sounds.
        sample_rate: Of the sounds, in samples a second.
        num_processes: Processes that synthesize; above one they are spawned.

    Returns:
        The manifests' paths under "train" and "test".

    Raises:
        ModuleNotFoundError: `with_speech` and the `espeakng-loader` wheel is not installed.
    """
    out_dir = Path(out_dir)
    if with_speech:
        Espeak().close()
    pairs, _ = split_pairs()
    manifests = {}
    for split, num_rows in (("train", num_train), ("test", num_test)):
        for folder in ("images", "audio") if with_speech else ("images",):
            (out_dir / folder / split).mkdir(parents=True, exist_ok=True)
        utterances: list[Utterance] = []
        manifests[split] = out_dir / f"{split}.jsonl"
        with manifests[split].open("w") as file:
            for i in range(num_rows):
                rng = random.Random(f"interleaved {seed} {split} {i}")
                row, spoken = _make_document(out_dir, split, i, rng, pairs, with_speech)
                file.write(json.dumps(row) + "\n")
                utterances += spoken
        say_utterances(utterances, sample_rate, num_processes)
    return manifests
