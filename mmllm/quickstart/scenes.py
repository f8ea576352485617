"""Scenes: drawn pictures of one, two or three objects, with captions in varied wording.

A picture determines its caption's meaning: sizes are clearly small or large, colours clearly apart, objects stand
along one clearly dominant axis, and no object occurs twice. Lengths are in 64ths of the picture's side.

Shapes: H, W pixels of a picture; S side of a mask in pixels.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import random
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mmllm.evaluation.scenes import AT, COLORS, POSITIONS, SHAPES, SIZES, SceneObject, plain_caption, render_caption

RGB = {
    "red": (222, 30, 38), "orange": (250, 138, 16), "yellow": (246, 224, 40), "green": (34, 150, 52),
    "cyan": (58, 212, 228), "blue": (40, 66, 214), "purple": (128, 40, 168), "pink": (252, 142, 200),
}  # fmt: skip
DIAMETERS = {"small": (11.5, 13.5), "large": (19.0, 22.0)}
CROWDED_DIAMETERS = {"small": (11.5, 13.5), "large": (19.0, 20.0)}
"""Of the objects in a picture of three."""
GRID = 64.0
OVERSAMPLING = 4

Pair = tuple[str, str]
Placed = tuple[SceneObject, float, float, float]
"""(object, centre x, centre y, diameter)."""


def heldout_pairs() -> tuple[Pair, ...]:
    """The twelve (shape, colour) pairs that training never shows; no shape and no colour is in more than two."""
    return tuple(
        (SHAPES[i], COLORS[(3 * i + shift) % len(COLORS)])
        for shift, count in ((1, 8), (6, 4))
        for i in range(count)
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- masks
def _regular(num: int, inner: float = 1.0) -> list[tuple[float, float]]:
    """Corners of a regular polygon of `num` corners, first one up; every second one at radius `inner`."""
    return [
        ((1.0 if i % 2 == 0 else inner) * math.sin(2 * math.pi * i / num),
         -(1.0 if i % 2 == 0 else inner) * math.cos(2 * math.pi * i / num))
        for i in range(num)
    ]  # fmt: skip


def _circle(radius: float, x: float = 0.0, y: float = 0.0) -> list[tuple[float, float]]:
    return [(x + radius * px, y + radius * py) for px, py in _regular(48)]


def _outlines(shape: str) -> list[tuple[list[tuple[float, float]], int]]:
    """A shape as polygons to fill with 255 or 0, within the square from -1 to 1."""
    match shape:
        case "circle":
            return [(_circle(1.0), 255)]
        case "square":
            return [([(-0.93, -0.93), (0.93, -0.93), (0.93, 0.93), (-0.93, 0.93)], 255)]
        case "triangle":
            return [([(0.0, -1.0), (1.0, 0.9), (-1.0, 0.9)], 255)]
        case "star":
            return [([(1.12 * x, 1.12 * y + 0.08) for x, y in _regular(10, inner=0.4)], 255)]
        case "heart":
            angles = [2 * math.pi * i / 64 for i in range(64)]
            return [(
                [(math.sin(t) ** 3,
                  -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 15 - 0.12)
                 for t in angles], 255)]  # fmt: skip
        case "cross":
            a = 0.33
            return [([(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a),
                      (-a, -a)], 255)]  # fmt: skip
        case "ring":
            return [(_circle(1.0), 255), (_circle(0.52), 0)]
        case "crescent":
            return [(_circle(1.05, x=0.1), 255), (_circle(0.9, x=0.62), 0)]
        case _:
            raise ValueError(f"shape is {shape!r}; expected one of {SHAPES}")


@functools.cache
def shape_mask(shape: str, diameter_halves: int, degrees: int, x_halves: int, y_halves: int) -> NDArray[np.float32]:
    """A shape's coverage of each pixel, [S, S, 1] in 0 to 1, drawn large and averaged down.

    Args:
        shape: One of `SHAPES`.
        diameter_halves: Diameter in half pixels.
        degrees: Rotation.
        x_halves: The centre's offset to the right of the mask's middle, in half pixels.
        y_halves: The same, downwards.
    """
    radius = diameter_halves * OVERSAMPLING / 4
    side = (math.ceil(1.25 * diameter_halves / 2) + 2) * OVERSAMPLING
    x0 = side / 2 + x_halves * OVERSAMPLING / 2
    y0 = side / 2 + y_halves * OVERSAMPLING / 2
    sin, cos = math.sin(math.radians(degrees)), math.cos(math.radians(degrees))
    image = Image.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for points, value in _outlines(shape):
        draw.polygon([(x0 + radius * (cos * x - sin * y), y0 + radius * (sin * x + cos * y)) for x, y in points], value)
    return (np.asarray(image.reduce(OVERSAMPLING))[:, :, None] / 255).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------- drawing
@functools.cache
def textures(side: int) -> NDArray[np.float32]:
    """A fixed set of patterns with values in -1 to 1, [num, side, side]: flat, slopes, stripes, checks, dots, noise."""
    rng = np.random.default_rng(64)
    y, x = np.mgrid[0:side, 0:side] * (GRID / side)
    fields = [np.zeros((side, side))]
    for degrees in range(0, 360, 45):
        ramp = x * math.cos(math.radians(degrees)) + y * math.sin(math.radians(degrees))
        fields.append((ramp - ramp.mean()) / 32)
        fields.append(np.sin(ramp * (2 * math.pi / (5 + degrees / 45))))
    for period in (6, 9, 13):
        fields.append(np.where((x // period + y // period) % 2 == 0, 0.7, -0.7))
        fields.append(np.cos(2 * math.pi * x / period) * np.cos(2 * math.pi * y / period))
    for cells in (6, 10, 16, 32):
        coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
        fields.append(np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)))
    return np.clip(np.stack(fields), -1, 1).astype(np.float32)


def draw_scene(placed: list[Placed], rng: random.Random, image_size: int) -> NDArray[np.uint8]:
    """A picture of placed objects on a textured background, uint8 [H, W, 3]."""
    patterns = textures(image_size)
    light = rng.uniform(35, 215)
    base = np.array([light + rng.uniform(-14, 14) for _ in range(3)], dtype=np.float32)
    depth = np.float32(rng.choice((0.0, rng.uniform(4, 14), rng.uniform(8, 22))))
    canvas_HW3 = patterns[rng.randrange(len(patterns))][:, :, None] * depth + base
    scale = image_size / GRID
    for thing, x, y, diameter in placed:
        x, y = round(2 * x * scale), round(2 * y * scale)
        mask = shape_mask(thing.shape, round(2 * diameter * scale), rng.choice((-8, -4, 0, 4, 8)), x % 2, y % 2)
        half = len(mask) // 2
        top, left = y // 2 - half, x // 2 - half
        rows = slice(max(top, 0), min(top + len(mask), image_size))
        columns = slice(max(left, 0), min(left + len(mask), image_size))
        mask = mask[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left]
        colour = np.array([c + rng.uniform(-13, 13) for c in RGB[thing.colour]], dtype=np.float32)
        pattern = patterns[rng.randrange(len(patterns))][rows, columns, None]
        ink = colour * (1 + np.float32(rng.uniform(0, 0.1)) * pattern)
        patch = canvas_HW3[rows, columns]
        patch += mask * (ink - patch)
    return np.clip(canvas_HW3, 0, 255).astype(np.uint8)


def write_png(path: Path, image_HW3: NDArray[np.uint8]) -> None:
    """Writes an RGB picture as PNG: what PIL does too, in half the time for pictures this small.

    https://www.w3.org/TR/png-3/: each row is stored as its difference from the row above (filter type 2).
    """
    height, width, _ = image_HW3.shape
    lines = np.empty((height, 1 + 3 * width), dtype=np.uint8)
    lines[:, 0] = 2
    pixels = image_HW3.reshape(height, 3 * width)
    lines[0, 1:] = pixels[0]
    np.subtract(pixels[1:], pixels[:-1], out=lines[1:, 1:])
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines.tobytes(), 1)),
        (b"IEND", b""),
    )
    blob = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + blob)


# ---------------------------------------------------------------------------------------------------------- layout
def _within(low: float, high: float, value: float) -> float:
    return min(max(value, low), high)


def _place(things: list[SceneObject], relation: str, rng: random.Random) -> list[Placed]:
    """Puts one object at a position, or two or three "left of" or "above" each other, without overlap."""
    if relation in POSITIONS:
        low, high = DIAMETERS[things[0].size]
        diameter = rng.uniform(low, high)
        row, column = divmod(POSITIONS.index(relation), 3)
        x, y = (
            _within(diameter / 2 + 1, GRID - 1 - diameter / 2, 12.5 + 19.5 * cell + rng.uniform(-3, 3))
            for cell in (column, row)
        )
        return [(things[0], x, y, diameter)]
    bounds = CROWDED_DIAMETERS if len(things) == 3 else DIAMETERS
    diameters = [rng.uniform(*bounds[thing.size]) for thing in things]
    least = 20.0 if len(things) == 2 else 15.0
    steps = [max(least, (a + b) / 2 + 1) for a, b in itertools.pairwise(diameters)]
    used = diameters[0] / 2 + sum(steps) + diameters[-1] / 2
    cuts = sorted(rng.uniform(0, GRID - 1 - used) for _ in things)
    along = 0.5 + diameters[0] / 2 + cuts[0]
    across = rng.uniform(diameters[0] / 2 + 1, GRID - 1 - diameters[0] / 2)
    placed = []
    for i, (thing, diameter) in enumerate(zip(things, diameters, strict=True)):
        if i:
            step = steps[i - 1] + cuts[i] - cuts[i - 1]
            along += step
            slant = 0.4 * rng.uniform(-step, step)
            across = _within(diameter / 2 + 1, GRID - 1 - diameter / 2, across + slant)
        x, y = (along, across) if relation == "left of" else (across, along)
        placed.append((thing, x, y, diameter))
    return placed


def sample_scene(rng: random.Random, num_objects: int, pairs: list[Pair], first_pairs: list[Pair]) -> list[SceneObject]:
    """Different objects in random order; one has a (shape, colour) of `first_pairs`, the others of `pairs`."""
    things: list[SceneObject] = []
    while len(things) < num_objects:
        shape, colour = rng.choice(pairs if things else first_pairs)
        thing = SceneObject(rng.choice(SIZES), colour, shape)
        if thing not in things:
            things.append(thing)
    rng.shuffle(things)
    return things


TEST_SHARE = 6
"""One scene in so many is kept for testing: whatever it is drawn and called like, training shows none such."""


def is_test_scene(things: list[SceneObject], relation: str) -> bool:
    """Whether a scene, told by its objects and how they lie, is one of those that training never shows."""
    meaning = f"{relation}: {', '.join(f'{o.size} {o.colour} {o.shape}' for o in things)}"
    return hashlib.blake2b(meaning.encode(), digest_size=8).digest()[0] % TEST_SHARE == 0


def draw_row(
    rng: random.Random,
    pairs: list[Pair],
    first_pairs: list[Pair],
    num_objects: int,
    image_size: int,
    is_test: bool | None = None,
) -> tuple[NDArray[np.uint8], dict[str, Any]]:
    """A picture, uint8 [H, W, 3], and its `text`, `objects` and `relations`: of a test scene or not; None: any."""
    while True:
        things = sample_scene(rng, num_objects, pairs, first_pairs)
        relation = rng.choice(POSITIONS if num_objects == 1 else ("left of", "above"))
        if is_test is None or is_test_scene(things, relation) == is_test:
            break
    image_HW3 = draw_scene(_place(things, relation, rng), rng, image_size)
    objects = [{"shape": o.shape, "colour": o.colour, "size": o.size} for o in things]
    relations = [[0, AT, relation]] if num_objects == 1 else [[i, relation, i + 1] for i in range(num_objects - 1)]
    row = {"text": render_caption(things, relation, rng), "objects": objects, "relations": relations}
    return image_HW3, row


@functools.cache
def split_pairs() -> tuple[list[Pair], list[Pair]]:
    """(shape, colour) pairs of training, and those held out."""
    heldout = list(heldout_pairs())
    return [(s, c) for s in SHAPES for c in COLORS if (s, c) not in heldout], heldout


def make_scenes(
    out_dir: Path | str, num_train: int, num_test: int, num_heldout: int, seed: int, image_size: int = 64
) -> dict[str, Path]:
    """Draws scenes and writes `train.jsonl`, `test.jsonl` and `heldout.jsonl` with their pictures as PNG.

    A third of the rows has one object, a third two, a third three. Each row of `heldout.jsonl` shows exactly one
    (shape, colour) pair that no other file shows, and lists it in `heldout_pairs`. Each picture of training has a
    second row, marked `plain`, whose caption is in the plainest wording. No scene of `test.jsonl` is in
    `train.jsonl`, drawn or worded otherwise. Equal arguments give equal bytes.

    Args:
        out_dir: Folder to write to; made where it is missing.
        num_train: Rows to train on.
        num_test: Rows of scenes that training never shows, whose (shape, colour) pairs it does show.
        num_heldout: Rows of new scenes with a held-out pair.
        seed: Chooses everything.
        image_size: Side of the pictures in pixels.

    Returns:
        The manifests' paths under "train", "test" and "heldout".
    """
    if image_size < 32:
        raise ValueError(f"image_size is {image_size}; small objects can't be told apart below 32 pixels")
    out_dir = Path(out_dir)
    pairs, heldout = split_pairs()
    manifests = {}
    for split, num_rows in (("train", num_train), ("test", num_test), ("heldout", num_heldout)):
        folder = out_dir / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for i in range(num_rows):
            rng = random.Random(f"scenes {seed} {split} {i}")
            first_pairs = heldout if split == "heldout" else pairs
            is_test = None if split == "heldout" else split == "test"
            image_HW3, row = draw_row(rng, pairs, first_pairs, 1 + i % 3, image_size, is_test)
            name = f"{split}_{i:06d}"
            write_png(folder / f"{name}.png", image_HW3)
            row = {"id": f"scene_{name}", "image": f"images/{split}/{name}.png", **row}
            if split == "train":
                things = [SceneObject(o["size"], o["colour"], o["shape"]) for o in row["objects"]]
                relation = row["relations"][0][2 if len(things) == 1 else 1]
                plain = plain_caption(things, relation, random.Random(f"plain {seed} {i}"))
                lines.append(json.dumps({**row, "id": f"{row['id']}_plain", "text": plain, "plain": True}) + "\n")
                row["plain"] = False
            else:
                shown = [[o["shape"], o["colour"]] for o in row["objects"]]
                row["heldout_pairs"] = [pair for pair in shown if tuple(pair) in heldout]
            lines.append(json.dumps(row) + "\n")
        manifests[split] = out_dir / f"{split}.jsonl"
        manifests[split].write_text("".join(lines))
    return manifests
