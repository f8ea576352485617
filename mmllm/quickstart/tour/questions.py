"""Questions of types that the demo's training never asks: count, compare, yes or no with a reason, several turns.

They are asked in conversations about the demo's own pictures and sounds, those of its training scenes for training and
those of its test scenes for testing, and each has one right answer, which the scene determines. What is asked is drawn
answer first, so that answers to one wording are equally frequent: `chance` of a row is how often the best guess that
sees nothing would be right.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmllm.evaluation.scenes import COLORS, ITS_FORMS, OPPOSITE, SHAPES, SIZES

KINDS = ("count", "compare", "reason", "turns")
NUM_TRAIN = 3000
NUM_TEST = 640
MAX_DRAWS = 4000
"""Pictures that are looked at for one question, at most."""
NUMBER_WORDS = ("none", "one", "two", "three")
ACCEPTED = {"none": ("zero", "0", "no"), "one": ("1",), "two": ("2",), "three": ("3",)}
"""Other answers that mean the same."""
ENDS = {"left of": ("left", "right"), "above": ("top", "bottom")}
"""Where the first and the last of objects in a relation are."""
FURTHER = {"left of": ("further left", "further right"), "above": ("higher", "lower")}


@dataclass(frozen=True)
class Thing:
    """An object of a picture."""

    shape: str
    colour: str
    size: str


@dataclass(frozen=True)
class Picture:
    """A picture and what it shows, from left to right or from top to bottom."""

    path: Path
    things: tuple[Thing, ...]
    relation: str
    """"left of" or "above"; of a single object "at"."""

    def count(self, word: str) -> int:
        """How many of its objects have a shape, a colour or a size."""
        return sum(word in (thing.shape, thing.colour, thing.size) for thing in self.things)

    @property
    def named(self) -> list[int]:
        """Places of the objects that their shapes tell apart."""
        return [place for place, thing in enumerate(self.things) if self.count(thing.shape) == 1]


@dataclass(frozen=True)
class Pool:
    """What can be asked about."""

    pictures: Mapping[int, Sequence[Picture]]
    """By how many objects they show."""
    sounds: Mapping[str, Sequence[Path]]
    """Recordings that name one shape, by the shape."""


@dataclass(frozen=True)
class Question:
    """What is shown and asked, and the right answers."""

    asks: str
    media: tuple[tuple[str, Path], ...]
    """("image" or "audio", file) in order, before the first question."""
    turns: tuple[tuple[str, str], ...]
    """Each question with its answer; the last one is scored."""
    chance: float


_Maker = Callable[[random.Random, Pool], Question]


def read_pool(data: Path, split: str) -> Pool:
    """Pictures of the demo, and its sounds that name one shape.

    Args:
        data: `data/` of the demo's run.
        split: "train" or "test".

    Raises:
        FileNotFoundError: the demo's data aren't there.
    """
    pictures: dict[int, list[Picture]] = {1: [], 2: [], 3: []}
    for row in _rows(data / "scenes" / f"{split}.jsonl"):
        if row.get("plain"):  # the same picture, worded otherwise
            continue
        things = tuple(Thing(o["shape"], o["colour"], o["size"]) for o in row["objects"])
        pictures[len(things)].append(Picture(data / "scenes" / row["image"], things, row["relations"][0][1]))
    sounds: dict[str, list[Path]] = {}
    for row in _rows(data / "speech" / f"{split}.jsonl"):
        named = [shape for shape in SHAPES if shape in row["text"].split()]
        if len(named) == 1 and not row.get("joined") and not row.get("spoken_only"):
            sounds.setdefault(named[0], []).append(data / "speech" / row["audio"])
    return Pool(pictures, sounds)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: not there; the questions are about the pictures and sounds that "
                                f"`mmllm quickstart` without --train has made: give such a run as --data")  # fmt: skip
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def make_questions(data: Path, split: str, num_rows: int, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Rows of conversations: the kinds in turn, so that the first N of them are balanced too.

    Args:
        data: `data/` of the demo's run.
        split: "train" or "test".
        num_rows: how many.
        seed: chooses everything.
        folder: of the file that they will be written to; paths are relative to it.

    Returns:
        Rows with `id`, `kind` (one of `KINDS`), `asks` (what of its kind), `chance`, `segments` with their roles, and
        `accept`, other answers that mean the same, where there are.

    Raises:
        ValueError: the demo has too few pictures or sounds for a question.
    """
    pool = read_pool(data, split)
    rows, seen = [], set()
    for number in range(num_rows):
        kind = KINDS[number % len(KINDS)]
        makers = _MAKERS[kind]
        rng = random.Random(f"questions {seed} {split} {number}")
        for _ in range(MAX_DRAWS):
            question = makers[number // len(KINDS) % len(makers)](rng, pool)
            if (question.media, question.turns) not in seen:
                break
        else:
            raise ValueError(f"{data} has too few pictures for {num_rows} different questions; make more of its data")
        seen.add((question.media, question.turns))
        rows.append(_row(question, f"{kind}_{split}_{number:05d}", kind, folder))
    return rows


def _row(question: Question, name: str, kind: str, folder: Path) -> dict[str, Any]:
    segments: list[dict[str, Any]] = [
        {medium: os.path.relpath(path, folder), "role": "user"} for medium, path in question.media
    ]
    for asked, answer in question.turns:
        segments += [{"text": asked, "role": "user"}, {"text": answer, "role": "assistant"}]
    row = {"id": name, "kind": kind, "asks": question.asks, "chance": round(question.chance, 4), "segments": segments}
    accepted = ACCEPTED.get(question.turns[-1][1])
    return row if accepted is None else {**row, "accept": list(accepted)}


# -------------------------------------------------------------------------------------------------------- drawing
def _draw(rng: random.Random, pictures: Sequence[Picture], fits: Callable[[Picture], bool], wanted: str) -> Picture:
    """A picture that fits, by chance.

    Raises:
        ValueError: none was found.
    """
    if pictures:
        for _ in range(MAX_DRAWS):
            picture = rng.choice(pictures)
            if fits(picture):
                return picture
    raise ValueError(f"no picture with {wanted} among {len(pictures)}; the demo's data are too few for the questions")


def _several(pool: Pool) -> list[Picture]:
    return [*pool.pictures[2], *pool.pictures[3]]


def _two_named(rng: random.Random, pool: Pool, fits: Callable[[Thing, Thing], bool] | None = None,
               relation: str | None = None) -> tuple[Picture, int, int]:  # fmt: skip
    """A picture and the places of two of its objects, first and second, that their shapes tell apart."""

    def has_two(picture: Picture) -> bool:
        return bool(_pairs(picture, fits)) and relation in (None, picture.relation)

    picture = _draw(rng, _several(pool), has_two, "two shapes to tell apart")
    return picture, *rng.choice(_pairs(picture, fits))


def _pairs(picture: Picture, fits: Callable[[Thing, Thing], bool] | None) -> list[tuple[int, int]]:
    places = picture.named
    return [(i, j) for i in places for j in places
            if i < j and (fits is None or fits(picture.things[i], picture.things[j]))]  # fmt: skip


def _image(picture: Picture) -> tuple[tuple[str, Path], ...]:
    return (("image", picture.path),)


# --------------------------------------------------------------------------------------------------------- kinds
def _count_all(rng: random.Random, pool: Pool) -> Question:
    number = rng.choice((1, 2, 3))
    picture = rng.choice(pool.pictures[number])
    return Question("all", _image(picture), (("how many shapes are in the picture?", NUMBER_WORDS[number]),), 1 / 3)


def _count_of(words: Sequence[str], asks: str) -> _Maker:
    """How many have a colour or a size: none, one or two of them."""

    def make(rng: random.Random, pool: Pool) -> Question:
        number, word = rng.choice((0, 1, 2)), rng.choice(words)
        picture = _draw(rng, _several(pool), lambda one: one.count(word) == number, f"{number} {word}")
        return Question(asks, _image(picture), ((f"how many shapes are {word}?", NUMBER_WORDS[number]),), 1 / 3)

    return make


def _which_larger(rng: random.Random, pool: Pool) -> Question:
    picture, i, j = _two_named(rng, pool, lambda a, b: a.size != b.size)
    wanted = rng.choice(SIZES)
    answer = next(picture.things[k].shape for k in (i, j) if picture.things[k].size == wanted)
    first, second = rng.sample([picture.things[i].shape, picture.things[j].shape], 2)
    word = {"large": "larger", "small": "smaller"}[wanted]
    asked = f"which is {word}, the {first} or the {second}?"
    return Question("size", _image(picture), ((asked, f"the {answer}"),), 0.5)


def _which_further(rng: random.Random, pool: Pool) -> Question:
    relation = rng.choice(tuple(FURTHER))
    picture, i, j = _two_named(rng, pool, relation=relation)
    end = rng.randrange(2)
    answer = picture.things[(i, j)[end]].shape
    first, second = rng.sample([picture.things[i].shape, picture.things[j].shape], 2)
    asked = f"which is {FURTHER[relation][end]}, the {first} or the {second}?"
    return Question("place", _image(picture), ((asked, f"the {answer}"),), 0.5)


def _which_more(rng: random.Random, pool: Pool) -> Question:
    few, many = sorted(rng.sample(range(1, 4), 2))
    numbers = rng.sample([few, many], 2)
    pictures = [rng.choice(pool.pictures[number]) for number in numbers]
    wanted, word = rng.choice(((many, "more"), (few, "fewer")))
    answer = "the first" if numbers[0] == wanted else "the second"
    media = tuple(("image", picture.path) for picture in pictures)
    return Question("two pictures", media, ((f"which picture shows {word} shapes?", answer),), 0.5)


def _both_same(rng: random.Random, pool: Pool) -> Question:
    of, is_same = rng.choice(("shape", "colour")), rng.random() < 0.5
    first = rng.choice(pool.pictures[1])
    value = getattr(first.things[0], of)
    second = _draw(
        rng, pool.pictures[1],
        lambda one: one != first and (getattr(one.things[0], of) == value) == is_same, f"the {of} {value}",
    )  # fmt: skip
    media = (("image", first.path), ("image", second.path))
    asked = f"do both pictures show the same {of}?"
    return Question("two pictures", media, ((asked, "yes" if is_same else "no"),), 0.5)


def _sound_names(rng: random.Random, pool: Pool) -> Question:
    is_named = rng.random() < 0.5
    picture = rng.choice(_several(pool))
    words = [word for word in SHAPES if (picture.count(word) > 0) == is_named and word in pool.sounds]
    if not words:
        raise ValueError("no recording names a shape; the demo's data are too few for the questions")
    sound = rng.choice(pool.sounds[rng.choice(words)])
    media = rng.sample([("image", picture.path), ("audio", sound)], 2)
    asked = "is the shape that the sound names in the picture?"
    return Question("picture and sound", tuple(media), ((asked, "yes" if is_named else "no"),), 0.5)


def _reason_place(rng: random.Random, pool: Pool) -> Question:
    picture, i, j = _two_named(rng, pool)
    relation, is_right = picture.relation, rng.random() < 0.5
    if rng.random() < 0.5:
        i, j, relation = j, i, OPPOSITE[relation]
    a, b = picture.things[i].shape, picture.things[j].shape
    asked = relation if is_right else OPPOSITE[relation]
    answer = f"{'yes' if is_right else 'no'}, it is {relation} it"
    return Question("place", _image(picture), ((f"is the {a} {asked} the {b}?", answer),), 0.5)


def _reason_of(of: str, values: Sequence[str]) -> _Maker:
    """Whether a shape has a colour or a size, and which it has."""

    def make(rng: random.Random, pool: Pool) -> Question:
        picture = _draw(rng, _several(pool), lambda one: bool(one.named), "a shape to tell")
        thing = picture.things[rng.choice(picture.named)]
        value, is_right = getattr(thing, of), rng.random() < 0.5
        asked = value if is_right else rng.choice([other for other in values if other != value])
        answer = f"{'yes' if is_right else 'no'}, it is {value}"
        return Question(of, _image(picture), ((f"is the {thing.shape} {asked}?", answer),), 0.5)

    return make


def _reason_there(rng: random.Random, pool: Pool) -> Question:
    shape, is_there = rng.choice(SHAPES), rng.random() < 0.5
    picture = _draw(rng, _several(pool), lambda one: one.count(shape) == is_there, f"{int(is_there)} {shape}")
    thing = next((thing for thing in picture.things if thing.shape == shape), None)
    answer = "no, there is none" if thing is None else f"yes, it is {thing.colour}"
    return Question("there", _image(picture), ((f"is there a {shape} in the picture?", answer),), 0.5)


def _turns_end(rng: random.Random, pool: Pool) -> Question:
    """The shape at one end, then its colour or its size."""
    picture = _draw(rng, _several(pool), lambda one: 0 in one.named and len(one.things) - 1 in one.named, "named ends")
    end = rng.randrange(2)
    thing = picture.things[-end]
    of, asked = rng.choice((("colour", "what colour is it?"), ("size", "is it large or small?")))
    turns = ((_asks_end(picture.relation, end), f"the {thing.shape}"), (asked, getattr(thing, of)))
    return Question("it", _image(picture), turns, 1 / 8 if of == "colour" else 1 / 2)


def _turns_and(rng: random.Random, pool: Pool) -> Question:
    """Something of one shape, then "and the other?"."""
    of = rng.choice(("colour", "size"))
    picture, i, j = _two_named(rng, pool)
    a, b = (picture.things[k] for k in rng.sample((i, j), 2))
    first = f"what colour is the {a.shape}?" if of == "colour" else f"is the {a.shape} large or small?"
    turns = ((first, getattr(a, of)), (f"and the {b.shape}?", getattr(b, of)))
    return Question("and", _image(picture), turns, 1 / 8 if of == "colour" else 1 / 2)


def _turns_next(rng: random.Random, pool: Pool) -> Question:
    """The shape at one end, the one beside it, and the colour of that."""
    picture = _draw(rng, pool.pictures[2], lambda one: len(one.named) == 2, "two different shapes")
    order, beside = (picture.things, OPPOSITE[picture.relation])
    end = rng.randrange(2)
    if end:
        order, beside = order[::-1], picture.relation
    turns = (
        (_asks_end(picture.relation, end), f"the {order[0].shape}"),
        (f"what is {ITS_FORMS[beside][0]}?", f"the {order[1].shape}"),
        ("and what colour is that?", order[1].colour),
    )
    return Question("next", _image(picture), turns, 1 / 8)


def _asks_end(relation: str, end: int) -> str:
    return f"which shape is {'at the' if relation == 'above' else 'on the'} {ENDS[relation][end]}?"


_MAKERS: dict[str, tuple[_Maker, ...]] = {
    "count": (_count_all, _count_of(COLORS, "colour"), _count_of(SIZES, "size")),
    "compare": (_which_larger, _which_further, _which_more, _both_same, _sound_names),
    "reason": (_reason_place, _reason_of("colour", COLORS), _reason_of("size", SIZES), _reason_there),
    "turns": (_turns_end, _turns_and, _turns_next),
}
