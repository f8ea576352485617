from __future__ import annotations

import collections
import itertools
import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmllm.evaluation.scenes import (
    AT,
    COLORS,
    POSITIONS,
    SHAPES,
    SIZES,
    ParsedScene,
    SceneObject,
    names_pair,
    parse_caption,
    render_caption,
    short_caption,
)
from mmllm.quickstart.scenes import _place, heldout_pairs, make_scenes, shape_mask, split_pairs

objects = st.builds(SceneObject, st.sampled_from(SIZES), st.sampled_from(COLORS), st.sampled_from(SHAPES))


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"), 600, 60, 60, seed=3)


def test_no_test_scene_is_trained_on(scenes):
    """However it is drawn and worded: a scene is its objects and how they lie."""
    meanings = {split: {ParsedScene.from_row(row) for row in rows_of(scenes[split])} for split in ("train", "test")}
    assert not meanings["train"] & meanings["test"]
    assert {len(scene.objects) for scene in meanings["test"]} == {1, 2, 3}


@settings(max_examples=300, deadline=None)
@given(st.lists(objects, min_size=1, max_size=3, unique=True), st.integers(0, 2**32), st.data())
def test_every_wording_of_a_scene_is_parsed_to_that_scene(things, seed, data):
    relations = POSITIONS if len(things) == 1 else ("left of", "above", "right of", "below")
    relation = data.draw(st.sampled_from(relations))
    caption = render_caption(things, relation, random.Random(seed))
    triples = [(0, AT, relation)] if len(things) == 1 else [(i, relation, i + 1) for i in range(len(things) - 1)]
    assert parse_caption(caption) == ParsedScene.of(things, triples), caption
    assert len(caption.split()) <= 30


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a small red circle left of a large blue square", "A large blue square, to the right of a small red circle."),
        ("below a large green star there is a small pink ring", "a large green star with a pink ring that is small "
         "under it"),
        ("a small red ring, a small cyan star and a large red heart from top to bottom",
         "a small cyan star with a large red heart below it and a small ring in red above it"),
        ("an orange heart that is large in the middle", "in the centre there is a heart that is large and orange"),
        ("a small red circle in the top left corner", "small red circle top left"),
        ("a large blue star on the left", "large blue star, left"),
        ("a small red circle left of a large blue square", "small red circle left of large blue square"),
        ("a small red ring, a small cyan star and a large red heart from left to right",
         "small red ring, small cyan star, large red heart left to right"),
    ],
)  # fmt: skip
def test_the_wording_does_not_matter(one, other):
    assert parse_caption(one) == parse_caption(other) is not None


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("a small red circle left of a large blue square", "a large blue square left of a small red circle"),
        ("a small red circle above a large blue square", "a small red circle left of a large blue square"),
        ("a small red circle at the top", "a small red circle at the top left"),
        ("a small red circle at the top", "a large red circle at the top"),
        ("a small red ring, a small red star and a small red cross from left to right",
         "a small red star, a small red ring and a small red cross from left to right"),
    ],
)  # fmt: skip
def test_another_scene_is_not_equal(one, other):
    assert parse_caption(one) != parse_caption(other)


@pytest.mark.parametrize(
    "text",
    ["", "a", "red", "a small red circle", "a small red dog at the top", "a small red circle left of", "at the top",
     "a small red circle at the topmost", "a small red circle at the top at the left", "<|end|>",
     "a small red circles at the top"],
)  # fmt: skip
def test_what_is_no_caption_is_none(text):
    assert parse_caption(text) is None


def test_the_shortest_wording_says_the_same():
    rng = random.Random(0)
    for number in range(300):
        things = [SceneObject(rng.choice(SIZES), rng.choice(COLORS), rng.choice(SHAPES)) for _ in range(1 + number % 3)]
        relation = rng.choice(POSITIONS if len(things) == 1 else ("left of", "above"))
        short, long = short_caption(things, relation), render_caption(things, relation, rng)
        assert parse_caption(short) == parse_caption(long) is not None
        assert len(short.split()) < len(long.split())


def test_a_pair_is_named_when_one_object_has_both():
    reference = parse_caption("a small red circle left of a large blue square")
    assert names_pair(reference, "square", "blue") and not names_pair(reference, "square", "red")
    assert not names_pair(None, "square", "blue")


def test_rows_describe_their_pictures(scenes):
    for split, num_rows in (("train", 1200), ("test", 60), ("heldout", 60)):
        rows = rows_of(scenes[split])
        if split == "train":  # each picture is described twice, in plain words too
            plain, other = ([row for row in rows if row["plain"] == value] for value in (True, False))
            assert [row["image"] for row in plain] == [row["image"] for row in other]
            assert all(row["text"].count(" ") < 6 * len(row["objects"]) + 3 for row in plain)
        assert len(rows) == len({row["id"] for row in rows}) == num_rows
        counts = collections.Counter(len(row["objects"]) for row in rows)
        assert counts == {1: num_rows / 3, 2: num_rows / 3, 3: num_rows / 3}
        for row in rows:
            assert parse_caption(row["text"]) == ParsedScene.from_row(row)
            assert len({tuple(sorted(o.items())) for o in row["objects"]}) == len(row["objects"])
    with Image.open(scenes["train"].parent / rows_of(scenes["train"])[0]["image"]) as image:
        image.load()
        assert (image.size, image.mode) == ((64, 64), "RGB")


def test_heldout_pairs_never_occur_in_training(scenes):
    heldout = set(heldout_pairs())
    assert len(heldout) >= 12
    for axis in (0, 1):
        assert max(collections.Counter(pair[axis] for pair in heldout).values()) <= 2
    shown = {s: {(o["shape"], o["colour"]) for r in rows_of(scenes[s]) for o in r["objects"]} for s in scenes}
    assert not shown["train"] & heldout and not shown["test"] & heldout
    assert shown["train"] == set(split_pairs()[0]), "training shows every other pair"
    for row in rows_of(scenes["heldout"]):
        pairs = [[o["shape"], o["colour"]] for o in row["objects"]]
        assert row["heldout_pairs"] == [pair for pair in pairs if tuple(pair) in heldout]
        assert len(row["heldout_pairs"]) == 1


def test_equal_arguments_give_equal_bytes(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        make_scenes(tmp_path / name, 6, 3, 3, seed=seed)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert files_of(tmp_path / "a") != files_of(tmp_path / "c")


def test_more_rows_keep_the_first_ones(tmp_path):
    small, large = (make_scenes(tmp_path / str(n), n, 1, 1, seed=1) for n in (4, 8))
    assert rows_of(small["train"]) == rows_of(large["train"])[:8]


def test_objects_stand_clearly_along_their_axis_without_overlap():
    rng = random.Random(0)
    for i in range(2000):
        things = [SceneObject(rng.choice(SIZES), "red", "circle") for _ in range(2 + i % 2)]
        relation = rng.choice(("left of", "above"))
        placed = _place(things, relation, rng)
        for (_, x0, y0, d0), (_, x1, y1, d1) in itertools.pairwise(placed):
            along, across = (x1 - x0, y1 - y0) if relation == "left of" else (y1 - y0, x1 - x0)
            assert along > 2 * abs(across) and along >= (d0 + d1) / 2 + 1
        for _, x, y, d in placed:
            assert d / 2 <= min(x, y) and max(x, y) <= 64 - d / 2


def test_shapes_differ_from_each_other_where_they_are_smallest():
    masks = {shape: shape_mask(shape, 23, 0, 0, 0)[:, :, 0] for shape in SHAPES}
    for one in SHAPES:
        assert 30 < masks[one].sum() < 170
        for other in SHAPES:
            assert one == other or np.abs(masks[one] - masks[other]).sum() > 15


def test_a_picture_of_another_size_can_be_drawn(tmp_path):
    manifests = make_scenes(tmp_path, 3, 0, 0, seed=1, image_size=96)
    with Image.open(tmp_path / rows_of(manifests["train"])[0]["image"]) as image:
        assert image.size == (96, 96)
    with pytest.raises(ValueError, match="image_size is 8"):
        make_scenes(tmp_path, 1, 0, 0, seed=1, image_size=8)
