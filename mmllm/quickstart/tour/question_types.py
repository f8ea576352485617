"""Single questions about pictures of one to three objects, a task each: what stage `incremental` learns one by one.

Rows have `segments`, `question` and `answer`, so that they can be asked behind others as examples too (`mmllm reason`).
The demo asks of pictures with one object alone. Answers of one wording are equally frequent, as far as pictures allow.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmllm.evaluation.scenes import COLORS, SHAPES, SIZES
from mmllm.quickstart.tour.questions import ENDS, NUMBER_WORDS, Picture, Pool, Thing, read_pool

MAX_DRAWS = 4000
"""Pictures that are looked at for one question, at most."""
LEAD = "look at this:"
"""Before a picture, as in the demo's documents."""

Asked = tuple[Picture, str, str]
"""Picture, question, answer."""


def make_questions(data: Path, asks: str, split: str, num_rows: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of one type of question, no question twice about one picture.

    Args:
        data: `data/` of the demo's run.
        asks: one of `TYPES`.
        split: "train" or "test": of the pictures.
        num_rows: how many.
        seed: chooses everything.
        folder: of the file that they will be written to; paths are relative to it.

    Raises:
        ValueError: the demo has too few pictures.
    """
    pool, rows, seen = read_pool(data, split), [], set[tuple[Path, str]]()
    for number in range(num_rows):
        rng = random.Random(f"{asks} {seed} {split} {number}")
        for _ in range(MAX_DRAWS):
            picture, question, answer = TYPES[asks](rng, pool)
            if (picture.path, question) not in seen:
                break
        else:
            raise ValueError(f"{data} has too few pictures for {num_rows} questions of type {asks}; make more of them")
        seen.add((picture.path, question))
        segments = [{"text": LEAD}, {"image": os.path.relpath(picture.path, folder)}]
        rows.append(
            {"id": f"{asks}_{split}_{number:05d}", "segments": segments, "question": question, "answer": answer,
             "asks": asks}
        )  # fmt: skip
    return rows


def _draw(rng: random.Random, pool: Pool, fits: Callable[[Picture], bool]) -> Picture:
    """A picture of two or three objects that fits, by chance."""
    pictures = [*pool.pictures[2], *pool.pictures[3]]
    for _ in range(MAX_DRAWS if pictures else 0):
        picture = rng.choice(pictures)
        if fits(picture):
            return picture
    raise ValueError(f"no picture fits a question among {len(pictures)}; make more of the demo's data")


def _one(picture: Picture, fits: Callable[[Thing], bool]) -> Thing | None:
    """The only object that fits."""
    found = [thing for thing in picture.things if fits(thing)]
    return found[0] if len(found) == 1 else None


def _count(rng: random.Random, pool: Pool) -> Asked:
    number = rng.choice((1, 2, 3))
    return rng.choice(pool.pictures[number]), "how many shapes are in the picture?", NUMBER_WORDS[number]


def _there(rng: random.Random, pool: Pool) -> Asked:
    word, is_there = rng.choice((*SHAPES, *COLORS)), rng.random() < 0.5
    picture = _draw(rng, pool, lambda one: (one.count(word) > 0) == is_there)
    what = f"a {word}" if word in SHAPES else f"anything {word}"
    return picture, f"is there {what} in the picture?", "yes" if is_there else "no"


def _of_shape(attribute: str, values: tuple[str, ...], ask: str) -> Callable[[random.Random, Pool], Asked]:
    """What colour or size the only object of a shape has."""

    def make(rng: random.Random, pool: Pool) -> Asked:
        wanted = rng.choice(values)
        picture = _draw(rng, pool, lambda one: any(getattr(one.things[n], attribute) == wanted for n in one.named))
        named = [picture.things[n] for n in picture.named if getattr(picture.things[n], attribute) == wanted]
        return picture, ask.format(rng.choice(named).shape), wanted

    return make


def _shape_of(rng: random.Random, pool: Pool) -> Asked:
    """Which shape the only object of a colour has."""
    shape = rng.choice(SHAPES)

    def fits(picture: Picture) -> list[Thing]:
        return [thing for thing in picture.things if thing.shape == shape and picture.count(thing.colour) == 1]

    picture = _draw(rng, pool, lambda one: bool(fits(one)))
    return picture, f"which shape is {rng.choice(fits(picture)).colour}?", shape


def _end(rng: random.Random, pool: Pool) -> Asked:
    """Which shape is the first or the last."""
    shape, end = rng.choice(SHAPES), rng.randrange(2)
    picture = _draw(rng, pool, lambda one: one.things[(0, -1)[end]].shape == shape)
    side = ENDS[picture.relation][end]
    where = f"furthest to the {side}" if picture.relation == "left of" else f"nearest to the {side}"
    return picture, f"which shape is {where}?", shape


def _beside(rng: random.Random, pool: Pool) -> Asked:
    """Which colour the neighbour of the only object of a shape has."""
    colour, step = rng.choice(COLORS), rng.choice((-1, 1))

    def neighbours(picture: Picture) -> list[int]:
        return [n for n in picture.named
                if 0 <= n + step < len(picture.things) and picture.things[n + step].colour == colour]  # fmt: skip

    picture = _draw(rng, pool, lambda one: bool(neighbours(one)))
    shape = picture.things[rng.choice(neighbours(picture))].shape
    side = {"left of": ("left of", "right of"), "above": ("above", "below")}[picture.relation][step > 0]
    return picture, f"which colour is the shape {side} the {shape}?", colour


TYPES: dict[str, Callable[[random.Random, Pool], Asked]] = {
    "count": _count,
    "there": _there,
    "colour": _of_shape("colour", COLORS, "which colour is the {}?"),
    "size": _of_shape("size", SIZES, "is the {} small or large?"),
    "shape": _shape_of,
    "end": _end,
    "beside": _beside,
}
"""Each type of question by its name."""
