"""Captions of scenes against what the scenes hold: whole scenes, and attribute by attribute."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from mmllm.evaluation.metrics import exact_match, text_meaning
from mmllm.evaluation.scenes import COLORS, SHAPES, SIZES, ParsedScene, names_pair, parse_caption

Ours = TypeVar("Ours", bound=Hashable)
Theirs = TypeVar("Theirs", bound=Hashable)


def reference_scene(metadata: Mapping[str, Any]) -> ParsedScene | None:
    """The scene that a row's `objects` and `relations` describe; None where they are none of the grammar's."""
    if not metadata.get("objects"):
        return None
    try:
        scene = ParsedScene.from_row({"relations": [], **metadata})
        known = all(o.size in SIZES and o.colour in COLORS and o.shape in SHAPES for o in scene.objects)
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return scene if known else None


def caption_matches(prediction: str, reference: str, scene: ParsedScene | None) -> bool:
    """Exact match: the caption says the same scene, whatever its wording; without a scene, the same text."""
    return exact_match(prediction, reference) if scene is None else parse_caption(prediction) == scene


def caption_meaning(text: str) -> Hashable:
    """What a caption says, whatever its wording; of one that the grammar does not parse, its words."""
    scene = parse_caption(text)
    return text_meaning(text) if scene is None else scene


def count_attributes(prediction: str, scene: ParsedScene) -> tuple[int, int]:
    """How many of a scene's attributes a caption has right, of how many.

    The attributes are each object's size, colour and shape, and each relation (or the position of a single object).
    Predicted objects are matched to the scene's as favourably as possible; a relation is right where the matched
    objects stand in it. Each object too many counts as three wrong attributes, so naming more than there is gains
    nothing. A caption that the grammar does not parse has none right.

    Returns:
        (right, all).
    """
    predicted = parse_caption(prediction)
    said = predicted.objects if predicted is not None else ()
    total = 3 * max(len(said), len(scene.objects)) + len(scene.relations)
    if predicted is None:
        return 0, total
    best = 0
    for matched in matchings(scene.objects, said):
        right = sum((a.size == b.size) + (a.colour == b.colour) + (a.shape == b.shape) for a, b in matched.items())
        for first, relation, second in scene.relations:
            said_second = second if isinstance(second, str) else matched.get(second)
            right += (matched.get(first), relation, said_second) in predicted.relations
        best = max(best, right)
    return best, total


def matchings(ours: Sequence[Ours], theirs: Sequence[Theirs]) -> Iterator[dict[Ours, Theirs]]:
    """Every way to match things, each of them different, with as many as possible of others (a scene has three)."""
    if len(ours) <= len(theirs):
        for order in itertools.permutations(theirs, len(ours)):
            yield dict(zip(ours, order, strict=True))
    else:
        for order in itertools.permutations(ours, len(theirs)):
            yield dict(zip(order, theirs, strict=True))


def order_is_right(prediction: str, scene: ParsedScene) -> bool | None:
    """Whether a caption that names all objects of a scene, and no other, has their relations right too.

    Returns:
        None where it does not name exactly these objects: then it says nothing of their order.
    """
    predicted = parse_caption(prediction)
    if predicted is None or predicted.objects != scene.objects:
        return None
    return predicted.relations == scene.relations


def names_heldout_pairs(prediction: str, pairs: list[list[str]]) -> bool:
    """Whether each held-out (shape, colour) pair is on one object of the caption, both right."""
    predicted = parse_caption(prediction)
    return all(names_pair(predicted, shape, colour) for shape, colour in pairs)
