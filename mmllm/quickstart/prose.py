"""Text only: the prose that Python's own help shows (`pydoc_data.topics`)."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

TEST_CHARACTERS = 160
"""Least length of a piece; a test document is one piece."""
TRAIN_CHARACTERS = 1500
"""Training documents are consecutive pieces of one topic, as many as fit."""


def _short_paragraphs(text: str) -> list[str]:
    """The paragraphs of a topic; those longer than `TRAIN_CHARACTERS` are cut between lines."""
    paragraphs: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines: list[str] = []
        for line in paragraph.strip("\n").splitlines():
            if lines and sum(map(len, lines)) + len(lines) + len(line) > TRAIN_CHARACTERS:
                paragraphs.append("\n".join(lines))
                lines = []
            lines.append(line)
        paragraphs.append("\n".join(lines))
    return paragraphs


def _pieces() -> list[tuple[str, str]]:
    """(topic, text): runs of paragraphs, each paragraph once, in the library's order."""
    from pydoc_data.topics import topics

    seen: set[str] = set()
    pieces: list[tuple[str, str]] = []
    for topic in sorted(topics):
        run: list[str] = []
        for paragraph in _short_paragraphs(topics[topic]):
            squeezed = " ".join(paragraph.split())
            if not squeezed or squeezed in seen:
                continue
            seen.add(squeezed)
            run.append(paragraph)
            if sum(map(len, run)) >= TEST_CHARACTERS:
                pieces.append((topic, "\n\n".join(run)))
                run = []
        if run and sum(map(len, run)) >= TEST_CHARACTERS // 4:
            pieces.append((topic, "\n\n".join(run)))
    return pieces


def make_prose(out_dir: Path | str, seed: int, num_test: int = 500) -> dict[str, Path]:
    """Writes `train.jsonl` and `test.jsonl` of documents from the help of the running Python.

    Several topics repeat whole passages of others; each paragraph is kept once, before rows are split, so that no test
    paragraph was trained on. The text depends on the version of Python.

    Args:
        out_dir: Folder to write to; made where it is missing.
        seed: Chooses the test rows.
        num_test: Test rows, of a paragraph or a few; the rest is for training.

    Returns:
        The manifests' paths under "train" and "test".
    """
    pieces = _pieces()
    if not 0 <= num_test < len(pieces):
        raise ValueError(f"num_test is {num_test}; Python's help has {len(pieces)} pieces, and training needs some")
    is_test = set(random.Random(f"prose {seed}").sample(range(len(pieces)), num_test))
    rows: dict[str, list[dict[str, str]]] = {"train": [], "test": []}
    previous = -2
    for i, (topic, text) in enumerate(pieces):
        if i in is_test:
            rows["test"].append({"id": f"prose_test_{len(rows['test']):05d}", "text": text, "topic": topic})
            continue
        last = rows["train"][-1] if rows["train"] else None
        if last and previous == i - 1 and last["topic"] == topic and len(last["text"]) + len(text) < TRAIN_CHARACTERS:
            last["text"] += "\n\n" + text
        else:
            rows["train"].append({"id": f"prose_train_{len(rows['train']):05d}", "text": text, "topic": topic})
        previous = i
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    manifests = {split: out_dir / f"{split}.jsonl" for split in rows}
    for split, path in manifests.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[split]), encoding="utf-8")
    return manifests
