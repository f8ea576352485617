"""Which words of a scene's caption are wrong, by what they mean: another wording of the same scene has none.

Of a caption that the grammar parses, objects and relations are compared, not words: "to the left of" for "left of", or
the other object named first, is no mistake.
"""

from __future__ import annotations

from dataclasses import dataclass

from mmllm.evaluation.captions import matchings
from mmllm.evaluation.scenes import CANONICAL, SceneObject, Symbol, caption_relations, read_symbols

Marked = list[tuple[str, str]]
"""Words as they stand, each with "" or the name of its mark."""


@dataclass(frozen=True)
class _Caption:
    """A caption with the places of what it says."""

    words: list[str]
    symbols: list[Symbol]
    objects: list[Symbol]
    relations: list[tuple[int, str, int | str, Symbol]]
    """(object, "left of", "above" or "at", object or position, the symbol that says it), canonical."""

    def relation_set(self) -> set[tuple[int, str, int | str]]:
        return {relation[:3] for relation in self.relations}


def marked_scenes(prediction: str, reference: str) -> tuple[Marked, Marked] | None:
    """The words of both captions, predicted ones that are wrong marked "wrong", reference ones not met "missing".

    Returns:
        None where one of the two is no caption of the grammar.
    """
    said, wanted = _read(prediction), _read(reference)
    if said is None or wanted is None:
        return None
    pairs = _best_matching(said, wanted)
    back = {there: here for here, there in pairs.items()}
    return _marked(said, wanted, pairs, "wrong"), _marked(wanted, said, back, "missing")


def _read(text: str) -> _Caption | None:
    words = text.split()
    symbols = read_symbols(text)
    if symbols is None or symbols[-1].stop != len(words):  # a word of two, "red-blue", has no place of its own
        return None
    stated = caption_relations(symbols)
    if stated is None:
        return None
    objects = [symbol for symbol in symbols if symbol.thing is not None]
    relations: list[tuple[int, str, int | str, Symbol]] = []
    for first, symbol, second in stated:
        name, swapped = CANONICAL.get(symbol.name, (symbol.name, False))
        if isinstance(second, str):
            relations.append((first, name, second, symbol))
        else:
            relations.append((second, name, first, symbol) if swapped else (first, name, second, symbol))
    return _Caption(words, symbols, objects, relations)


def _things(caption: _Caption) -> list[SceneObject]:
    return [symbol.thing for symbol in caption.objects if symbol.thing is not None]


def _best_matching(said: _Caption, wanted: _Caption) -> dict[int, int]:
    """Which object that is wanted each that is said stands for: as `captions.count_attributes` matches them."""
    ours, theirs = _things(said), _things(wanted)
    best: tuple[int, dict[int, int]] = (-1, {})
    for matched in matchings(range(len(ours)), range(len(theirs))):
        right = sum(_num_right(ours[here], theirs[there]) for here, there in matched.items())
        right += sum(_moved(relation[:3], matched) in wanted.relation_set() for relation in said.relations)
        best = max(best, (right, matched), key=lambda found: found[0])
    return best[1]


def _num_right(a: SceneObject, b: SceneObject) -> int:
    return (a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape)


def _moved(relation: tuple[int, str, int | str], matched: dict[int, int]) -> tuple[int | None, str, int | str | None]:
    """A relation between the objects that those it is between are matched to."""
    first, name, second = relation
    return matched.get(first), name, second if isinstance(second, str) else matched.get(second)


def _marked(caption: _Caption, other: _Caption, matched: dict[int, int], mark: str) -> Marked:
    marks = [""] * len(caption.words)
    for number, symbol in enumerate(caption.objects):
        counterpart = _things(other)[matched[number]] if number in matched else None
        for place in range(symbol.start, symbol.stop):
            word = symbol.words[place - symbol.start]
            if symbol.is_attribute(word) and (counterpart is None or word not in vars(counterpart).values()):
                marks[place] = mark
    there = other.relation_set()
    for relation in caption.relations:
        if _moved(relation[:3], matched) not in there:
            symbol = relation[3]
            marks[symbol.start : symbol.stop] = [mark] * (symbol.stop - symbol.start)
    return list(zip(caption.words, marks, strict=True))
