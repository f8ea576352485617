"""Questions about captioned pictures, from what rows say is in them: a new task for a model that captions them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.data.expressions import compile_filter
from mmllm.data.rows.filtered import drawn_rows, kept_rows
from mmllm.data.rows.rows import Row
from mmllm.data.rows.split import write_manifest

OBJECTS = "objects"
"""Key of a row: a list of what its picture shows, each with words for `colour` and `shape`."""
COLUMN = "asks"
"""Key of a question's row: what it asks for."""

_Things = Sequence[Mapping[str, Any]]


def _words(key: str) -> Callable[[_Things], str]:
    return lambda things: " and ".join(sorted({str(thing[key]) for thing in things}))


QUESTIONS: dict[str, tuple[str, Callable[[_Things], str]]] = {
    "colour": ("which colours are there?", _words("colour")),
    "shape": ("which shapes are there?", _words("shape")),
    "number": ("how many shapes are there?", lambda things: str(len(things))),
}
"""By what is asked for: the question, and its answer; words in the order of the alphabet, each once."""


@dataclass(frozen=True)
class Asking:
    """What is asked.

    Attributes:
        about: keys of `QUESTIONS`; each row is asked for one of them, in turn.
        limit: at most so many rows, drawn by the seed; None: all.
        filter: which rows are read; the others are left out.
        seed: of the draws.
    """

    about: tuple[str, ...] = tuple(QUESTIONS)
    limit: int | None = None
    filter: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [each for each in self.about if each not in QUESTIONS]
        if unknown or not self.about:
            raise ValueError(
                f"about is {', '.join(self.about) or 'empty'}; give one or more of {', '.join(QUESTIONS)}, with commas "
                f"between them"
            )
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit is {self.limit}; give at least 1, or leave it out")
        if self.filter is not None:
            compile_filter(self.filter)


def ask_rows(rows: Sequence[Row], asking: Asking) -> list[Row]:
    """A question about each row's picture; of so many rows as are asked for, in their order.

    Raises:
        ValueError: a row has no picture, or doesn't say what is in it.
    """
    kept = drawn_rows(rows, asking.limit, asking.seed)
    return [_asked(row, asking.about[number % len(asking.about)]) for number, row in enumerate(kept)]


def ask(manifest: str | Path, out: Path, asking: Asking) -> list[str]:
    """Writes a manifest of questions about another's pictures; gives lines to print.

    Raises:
        FileNotFoundError, ValueError: there is no such manifest, no row of it passes the filter, or a row can't be
            asked about.
    """
    rows = kept_rows(manifest, asking.filter)
    asked = ask_rows(rows, asking)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_manifest(asked, out)
    answers = len({row.metadata["answer"] for row in asked})
    return [f"{out}: {len(asked)} questions for {', '.join(asking.about)}, with {answers} different answers"]


def _asked(row: Row, about: str) -> Row:
    things = row.metadata.get(OBJECTS)
    if row.image is None:
        raise ValueError(f"{row.where} has no picture; ask about captions' pictures")
    if not isinstance(things, list) or not things:
        raise ValueError(f"{row.where} has no {OBJECTS}, a list of what its picture shows, of which answers are made")
    question, answer_of = QUESTIONS[about]
    try:
        answer = answer_of(things)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{row.where}: {OBJECTS} is {things!r}; each needs a word for {about!r}") from error
    metadata = {"question": question, "answer": answer, COLUMN: about}
    return Row(f"{row.id}_{about}", "interleaved", row.where, segments=({"image": row.image},), metadata=metadata)
