"""What of a caption is marked wrong: by its meaning, whatever its wording."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest

from mmllm.evaluation.scene_marks import marked_scenes
from mmllm.evaluation.scenes import COLORS, POSITIONS, SHAPES, SIZES, SceneObject, parse_caption, render_caption


def shown(words: list[tuple[str, str]], mark: str) -> str:
    assert {kind for _, kind in words} <= {"", mark}
    return " ".join(f"[{word}]" if kind else word for word, kind in words)


def marked(prediction: str, reference: str) -> tuple[str, str]:
    both = marked_scenes(prediction, reference)
    assert both is not None
    return shown(both[0], "wrong"), shown(both[1], "missing")


def scene(rng: random.Random) -> tuple[list[SceneObject], str]:
    """Objects that differ in every attribute, so that it is plain which stands for which."""
    count = rng.choice((1, 2, 3))
    shapes, colours = rng.sample(SHAPES, count), rng.sample(COLORS, count)
    things = [SceneObject(rng.choice(SIZES), *pair) for pair in zip(colours, shapes, strict=True)]
    return things, rng.choice(POSITIONS if count == 1 else ("left of", "above"))


@pytest.mark.parametrize("seed", range(60))
def test_another_wording_has_no_mistake_and_another_attribute_is_one(seed: int):
    rng = random.Random(seed)
    things, relation = scene(rng)
    reference = render_caption(things, relation, rng)
    said = render_caption(things, relation, rng)
    assert parse_caption(said) == parse_caption(reference)
    assert marked(said, reference) == (said, reference)
    number = rng.randrange(len(things))
    other = next(colour for colour in COLORS if colour not in {thing.colour for thing in things})
    changed = [replace(thing, colour=other) if i == number else thing for i, thing in enumerate(things)]
    said = render_caption(changed, relation, rng).replace("an orange", "a orange")
    wrong, missing = marked(said, reference)
    assert re.sub("[,:]", "", wrong) == re.sub("[,:]", "", said).replace(other, f"[{other}]")
    assert re.findall(r"\[([a-z]+)", missing) == [things[number].colour]


@pytest.mark.parametrize(
    ("prediction", "reference", "wrong", "missing"),
    [
        ("a small red circle right of a large blue star", "a large blue star, no caption", None, None),
        ("A small red circle right of a large blue star.", "a small red circle left of a large blue star",
         "A small red circle [right] [of] a large blue star.", "a small red circle [left] [of] a large blue star"),
        ("in the middle there is a small red circle", "a small red circle at the top",
         "[in] [the] [middle] there is a small red circle", "a small red circle [at] [the] [top]"),
        ("a small red circle at the top", "a small red circle left of a large blue star",
         "a small red circle [at] [the] [top]", "a small red circle [left] [of] a [large] [blue] [star]"),
        ("a small red circle, a large blue star and a small pink ring from left to right",
         "a small red circle left of a large blue star",
         "a small red circle, a large blue star and a [small] [pink] [ring] [from] [left] [to] [right]",
         "a small red circle left of a large blue star"),
        ("red-blue circle", "a small red circle at the top", None, None),
        ("", "a small red circle at the top", None, None),
    ],
)  # fmt: skip
def test_marks_by_hand(prediction: str, reference: str, wrong: str | None, missing: str | None):
    if wrong is None:
        assert marked_scenes(prediction, reference) is None
    else:
        assert marked(prediction, reference) == (wrong, missing)
