"""The scenes' words and their grammar: what a caption says, whatever its wording.

A caption is parsed in two steps. A lexer turns the text into symbols: an object (`O`), a relation (`R`, "left of"),
a relation to the object named first (`I`, "to its left"), a position (`P`), a reading direction (`S`, "from left to
right") and the word "with" (`W`). What the sentence means then follows from its string of symbols, its *skeleton*:
`ORO` is "a … left of a …". Relations are kept in one direction only ("left of" and "above").
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SIZES = ("small", "large")
POSITIONS = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
"""Where the only object of a picture is, row by row of a 3x3 grid."""
AT = "at"
"""The relation between the only object of a picture and its position."""
CANONICAL = {"left of": ("left of", False), "right of": ("left of", True), "above": ("above", False),
             "below": ("above", True)}  # fmt: skip
"""Each relation's canonical name, and whether its two objects change places."""


@dataclass(frozen=True, order=True)
class SceneObject:
    """One object of a scene."""

    size: str
    colour: str
    shape: str


Relation = tuple[SceneObject, str, SceneObject | str]
"""(object, "left of" or "above", object), or (object, "at", position)."""


@dataclass(frozen=True)
class ParsedScene:
    """What a caption says. Two captions say the same exactly when their `ParsedScene`s are equal."""

    objects: tuple[SceneObject, ...]
    """Sorted; one entry for each mention."""
    relations: frozenset[Relation]

    @staticmethod
    def of(objects: list[SceneObject], relations: list[tuple[int, str, int | str]]) -> ParsedScene:
        """The scene of objects and of relations between their indices, in any order and direction."""
        normal: set[Relation] = set()
        for first, relation, second in relations:
            if isinstance(second, str):
                normal.add((objects[first], relation, second))
                continue
            name, swapped = CANONICAL[relation]
            pair = (second, first) if swapped else (first, second)
            normal.add((objects[pair[0]], name, objects[pair[1]]))
        return ParsedScene(tuple(sorted(objects)), frozenset(normal))

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> ParsedScene:
        """The scene that a manifest row's `objects` and `relations` describe."""
        objects = [SceneObject(o["size"], o["colour"], o["shape"]) for o in row["objects"]]
        return ParsedScene.of(objects, [(first, relation, second) for first, relation, second in row["relations"]])


def names_pair(predicted: ParsedScene | None, shape: str, colour: str) -> bool:
    """Whether some object of the predicted caption has both this shape and this colour."""
    return predicted is not None and any(o.shape == shape and o.colour == colour for o in predicted.objects)


# ---------------------------------------------------------------------------------------------------------- wording
OBJECT_FORMS = {
    "a {size} {colour} {shape}": 6,
    "a {colour} {shape} that is {size}": 1,
    "a {size} {shape} in {colour}": 1,
    "a {shape} that is {size} and {colour}": 1,
}
"""Wordings of an object, with how often each is used."""
RELATION_FORMS = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
ITS_FORMS = {
    "left of": ("to its left", "on its left"),
    "right of": ("to its right", "on its right"),
    "above": ("above it", "over it"),
    "below": ("below it", "under it"),
}
SEQUENCE_FORMS = {
    "left of": "from left to right",
    "right of": "from right to left",
    "above": "from top to bottom",
    "below": "from bottom to top",
}
"""`A`, `B` and `C` in this direction: A is … B, and B is … C."""
POSITION_FORMS = {
    position: ("in the centre", "in the middle") if position == "centre"
    else (f"in the {position} corner", f"at the {position}") if " " in position
    else (f"at the {position}", f"at the {position} edge") if position in ("top", "bottom")
    else (f"on the {position}", f"at the {position} edge")
    for position in POSITIONS
}  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def render_object(thing: SceneObject, rng: random.Random) -> str:
    """One wording of an object: "a small red circle", "a circle that is small and red"."""
    form = rng.choices(tuple(OBJECT_FORMS), tuple(OBJECT_FORMS.values()))[0]
    form = form.format(size=thing.size, colour=thing.colour, shape=thing.shape)
    return f"an{form[1:]}" if form[2] in "aeiou" else form


def render_caption(objects: list[SceneObject], relation: str, rng: random.Random) -> str:
    """One wording of a scene.

    Args:
        objects: One object, or two or three in the order of `relation`.
        relation: The position of a single object; else "left of" or "above": objects[0] is … objects[1], and so on.
        rng: Chooses the wording and the order in which the objects are named.

    Raises:
        ValueError: No such number of objects, or no such position or relation.
    """
    names = [render_object(thing, rng) for thing in objects]
    if len(objects) == 1 and relation in POSITION_FORMS:
        where = rng.choice(POSITION_FORMS[relation])
        return rng.choice((f"{names[0]} {where}", f"{where} there is {names[0]}", f"there is {names[0]} {where}"))
    if len(objects) not in (2, 3) or relation not in RELATION_FORMS:
        raise ValueError(f"got {len(objects)} objects and {relation!r}; expected one object with a position "
                         f"of {POSITIONS}, or two or three with a relation of {tuple(RELATION_FORMS)}")  # fmt: skip
    backwards = OPPOSITE[relation]
    if len(objects) == 2:
        first, second = names
        if rng.random() < 0.5:
            first, second, relation, backwards = second, first, backwards, relation
        link, its_back = rng.choice(RELATION_FORMS[relation]), rng.choice(ITS_FORMS[backwards])
        return rng.choice((
            f"{first} {link} {second}",
            f"{first} {link} {second}",
            f"{link} {second} there is {first}",
            f"{first} with {second} {its_back}",
            f"there is {first}, and {its_back} {second}",
        ))  # fmt: skip
    its = rng.choice(ITS_FORMS[relation]), rng.choice(ITS_FORMS[backwards])
    if rng.random() < 0.5:
        names, relation, its = names[::-1], backwards, its[::-1]
    first, second, third = names
    links = [rng.choice(RELATION_FORMS[relation]) for _ in range(2)]
    return rng.choice((
        f"{first} {links[0]} {second}, which is {links[1]} {third}",
        f"{first}, {second} and {third} {SEQUENCE_FORMS[relation]}",
        f"{SEQUENCE_FORMS[relation]}: {first}, {second} and {third}",
        f"{second} with {first} {its[0]} and {third} {its[1]}",
    ))  # fmt: skip


def plain_caption(objects: list[SceneObject], relation: str, rng: random.Random) -> str:
    """The plainest wording of a scene: each object as "a small red circle", and the relation between neighbours.

    Args:
        objects: as `render_caption`'s.
        relation: likewise.
        rng: chooses the end at which it begins.
    """
    names = [
        f"{'an' if thing.size[0] in 'aeiou' else 'a'} {thing.size} {thing.colour} {thing.shape}" for thing in objects
    ]
    if len(objects) == 1:
        return f"{names[0]} {POSITION_FORMS[relation][0]}"
    if rng.random() < 0.5:
        names, relation = names[::-1], OPPOSITE[relation]
    return f" {relation} ".join(names)


def short_caption(objects: list[SceneObject], relation: str) -> str:
    """The wording of a scene that has the fewest words: "small red circle over large blue star".

    Args:
        objects: as `render_caption`'s.
        relation: likewise.
    """
    names = [f"{thing.size} {thing.colour} {thing.shape}" for thing in objects]
    if len(objects) == 1:
        return f"{names[0]} {relation}"
    if relation == "left of" and len(objects) == 3:
        return f"{', '.join(names)} {_bare(SEQUENCE_FORMS[relation])}"
    return f" {min(RELATION_FORMS[relation], key=lambda form: len(form.split()))} ".join(names)


def _bare(direction: str) -> str:
    return direction.removeprefix("from ")


# ---------------------------------------------------------------------------------------------------------- parsing
def _any(*words: str) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


_SIZE, _COLOR, _SHAPE = _any(*SIZES), _any(*COLORS), _any(*SHAPES)
_OBJECT = (
    rf"(?:(?:an?|the) )?(?:{_SIZE} {_COLOR} {_SHAPE}|{_COLOR} {_SHAPE} that is {_SIZE}|{_SIZE} {_SHAPE} in {_COLOR}"
    rf"|{_SHAPE} that is (?:{_SIZE} and {_COLOR}|{_COLOR} and {_SIZE}))"
)
_WORDINGS = {
    kind: {form: name for name, forms in table.items() for form in ((forms,) if isinstance(forms, str) else forms)}
    for kind, table in (("S", SEQUENCE_FORMS), ("I", ITS_FORMS), ("R", RELATION_FORMS), ("P", POSITION_FORMS))
}
_WORDINGS["S"] |= {_bare(form): name for form, name in list(_WORDINGS["S"].items())}
_WORDINGS["P"] |= {form: position for position in POSITIONS for form in (position, f"at {position}")}
_FILLER = _any("there is", "which is", "it is", "and", "then")
_LEXER = re.compile(
    "|".join([f"(?P<O>{_OBJECT})", *(f"(?P<{kind}>{_any(*forms)})" for kind, forms in _WORDINGS.items()),
              "(?P<W>with)", f"(?P<_>{_FILLER})"])
)  # fmt: skip

_SKELETONS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "ORO": ((0, 0, 1),), "ROO": ((1, 0, 0),), "OWOI": ((1, 0, 0),), "OIO": ((1, 0, 0),), "OOS": ((0, 0, 1),),
    "SOO": ((0, 0, 1),), "ORORO": ((0, 0, 1), (1, 1, 2)), "OOOS": ((0, 0, 1), (1, 0, 2)),
    "SOOO": ((0, 0, 1), (1, 0, 2)), "OWOIOI": ((1, 0, 0), (2, 1, 0)),
}  # fmt: skip
"""For each skeleton: (object, which of the relations met, object), numbered in the order of mention."""


@dataclass(frozen=True)
class Symbol:
    """A piece of a caption that means something.

    Attributes:
        kind: a letter of its skeleton.
        words: as the lexer reads them, without capitals and punctuation.
        start: number of its first word in the caption.
        name: of the relation or position; "" of others.
        thing: of an object.
    """

    kind: str
    words: tuple[str, ...]
    start: int
    name: str = ""
    thing: SceneObject | None = None

    @property
    def stop(self) -> int:
        """Number of the word behind it."""
        return self.start + len(self.words)

    @staticmethod
    def is_attribute(word: str) -> bool:
        """Whether it is a size, a colour or a shape."""
        return word in SIZES or word in COLORS or word in SHAPES


def read_symbols(text: str) -> list[Symbol] | None:
    """The pieces of a caption in order, words without meaning of their own ("_") too; None where there are others.

    Capitals and punctuation don't matter.
    """
    text = " ".join(re.sub(r"[^a-z ]", " ", text.lower()).split())
    symbols: list[Symbol] = []
    start = num_words = 0
    while start < len(text):
        match = _LEXER.match(text, start)
        if match is None or (match.end() < len(text) and text[match.end()] != " "):
            return None
        start = match.end() + 1
        kind, words = match.lastgroup or "", tuple(match.group().split())
        name, thing = _WORDINGS[kind][match.group()] if kind in _WORDINGS else "", None
        if kind == "O":
            size, colour, shape = (next(w for w in options if w in words) for options in (SIZES, COLORS, SHAPES))
            thing = SceneObject(size, colour, shape)
        symbols.append(Symbol(kind, words, num_words, name, thing))
        num_words += len(words)
    return symbols or None


def caption_relations(symbols: list[Symbol]) -> list[tuple[int, Symbol, int | str]] | None:
    """What is said between objects, by their numbers: (object, relation as it is said, object or position).

    Returns:
        None where the symbols make no sentence of the grammar.
    """
    skeleton = "".join(symbol.kind for symbol in symbols if symbol.kind != "_")
    named = [symbol for symbol in symbols if symbol.name]
    if skeleton in ("OP", "PO"):
        return [(0, replace(named[0], name=AT), named[0].name)]
    if skeleton not in _SKELETONS:
        return None
    return [(first, named[place], second) for first, place, second in _SKELETONS[skeleton]]


def parse_caption(text: str) -> ParsedScene | None:
    """What a caption says, or None where it is no caption of the grammar.

    Capitals and punctuation don't matter. Contradictions ("a … left of b, which is right of …") are parsed as they
    stand, and then equal no scene.
    """
    symbols = read_symbols(text)
    relations = caption_relations(symbols) if symbols is not None else None
    if symbols is None or relations is None:
        return None
    objects = [symbol.thing for symbol in symbols if symbol.thing is not None]
    return ParsedScene.of(objects, [(first, symbol.name, second) for first, symbol, second in relations])
