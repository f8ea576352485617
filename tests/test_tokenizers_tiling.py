"""How pictures are cut: grids against a search by fractions, and the tokenizer folder that says so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
from fractions import Fraction

import pytest

from mmllm.cli.main import main
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.tiling import TileGrid, Tiling, choose_grid

TEXT = TextTokenizer.train(["a red circle above two blue squares"] * 3, vocab_size=300)


def _sizes(count: int) -> list[tuple[int, int]]:
    rng = random.Random(0)
    sizes = [(round(2 ** rng.uniform(0, 13)), round(2 ** rng.uniform(0, 13))) for _ in range(count)]
    return [*sizes, (1, 1), (64, 64), (64, 128), (1, 20000), (20000, 1), (7999, 8000)]


def _worth(width: int, height: int, side: int, grid: tuple[int, int]) -> Fraction:
    """Kept pixels times the share of the tiles that they fill."""
    rows, columns = grid
    scale = min(Fraction(columns * side, width), Fraction(rows * side, height), Fraction(1))
    kept = math.floor(width * height * scale**2)
    return kept * Fraction(kept, rows * columns * side**2)


@pytest.mark.parametrize(("side", "limit"), [(64, 6), (336, 12), (16, 2)])
def test_the_grid_is_the_best_of_all_that_are_allowed(side, limit):
    grids = [(rows, columns) for rows in range(1, limit + 1) for columns in range(1, limit // rows + 1)]
    for width, height in _sizes(400):
        chosen = choose_grid(width, height, side, limit)
        assert chosen in grids
        worths = {grid: _worth(width, height, side, grid) for grid in grids}
        equals = [grid for grid in grids if worths[grid] == max(worths.values())]
        assert chosen == min(equals, key=lambda grid: (grid[0] * grid[1], grid[0]))
        if width != height:
            assert choose_grid(height, width, side, limit) == chosen[::-1]
        if width <= side and height <= side:
            assert chosen == (1, 1)
    for rows, columns in grids:
        assert choose_grid(columns * side, rows * side, side, limit) == (rows, columns)


def test_grids_of_known_pictures():
    for size, limit, grid in [
        ((336, 336), 6, (1, 1)), ((672, 336), 6, (1, 2)), ((336, 672), 6, (2, 1)), ((340, 340), 6, (1, 1)),
        ((672, 672), 6, (2, 2)), ((470, 470), 6, (1, 1)), ((480, 480), 6, (2, 2)), ((4000, 3000), 6, (2, 3)),
        ((10000, 300), 6, (1, 6)), ((2000, 60), 6, (1, 6)), ((200, 6), 6, (1, 1)),
        ((4000, 4000), 9, (3, 3)), ((4000, 4000), 8, (2, 2)),
    ]:  # fmt: skip
        assert choose_grid(*size, 336, limit) == grid, size


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize("max_tokens", [None, 30, 52, 71])
def test_tiles_and_slots_keep_to_their_bounds(thumbnail, max_tokens):
    tiling = Tiling(6, thumbnail, max_tokens)
    folder = TokenizerFolder(TEXT, None, TokenizerConfig(image_tokens=10, image_size=64, tiling=tiling))
    most = 0
    for width, height in _sizes(300):
        grid = folder.tile_grid(width, height)
        num_cells = grid.rows * grid.columns
        assert num_cells <= 6 and grid.is_cut == (num_cells > 1)
        assert grid.thumbnail == (thumbnail and grid.is_cut)
        cells = [(row, column) for row in range(1, grid.rows + 1) for column in range(1, grid.columns + 1)]
        wanted = [(0, 0)] * grid.thumbnail + cells if grid.is_cut else [(0, 0)]
        assert list(grid.places) == wanted and grid.num_tiles == len(wanted)
        slots = folder.num_image_slots(width, height)
        assert slots == 10 * len(wanted) and (max_tokens is None or slots <= max_tokens)
        most = max(most, slots)
    assert most == {None: 60 + 10 * thumbnail, 30: 30, 52: 50, 71: 60 + 10 * thumbnail}[max_tokens]


def test_a_folder_without_tiling_is_what_it_was(tmp_path):
    folder = TokenizerFolder(TEXT, None, TokenizerConfig(image_tokens=9, image_size=32))
    assert folder.tile_grid(4000, 100) == TileGrid() and folder.num_image_slots(4000, 100) == 9
    names = ("image_tokens", "image_size", "audio_pool", "pattern", "num_codebooks", "codebook_size", "frame_rate",
             "sample_rate", "codec")  # fmt: skip
    config = {name: getattr(folder.config, name) for name in names}
    earlier = {"text": TEXT.hash, "templates": folder.templates, "config": config, "audio": None}
    assert folder.hash == hashlib.sha256(json.dumps(earlier, sort_keys=True).encode()).hexdigest()
    folder.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {"format_version": 1, **config}
    assert TokenizerFolder.load(tmp_path).hash == folder.hash


def test_tiling_comes_back_and_is_part_of_the_hash(tmp_path):
    config = TokenizerConfig(image_tokens=9, image_size=32)
    tilings = [None, Tiling(4), Tiling(5), Tiling(4, thumbnail=False), Tiling(4, max_tokens=40)]
    folders = [TokenizerFolder(TEXT, None, dataclasses.replace(config, tiling=tiling)) for tiling in tilings]
    assert len({folder.hash for folder in folders}) == len(tilings)
    for number, folder in enumerate(folders):
        folder.save(tmp_path / str(number))
        loaded = TokenizerFolder.load(tmp_path / str(number))
        assert loaded.config == folder.config and loaded.hash == folder.hash


def test_impossible_tilings_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"tiling.max_tiles is 1; give 2 or more, or leave tiling out"):
        Tiling(1)
    with pytest.raises(ValueError, match=r"tiling.max_tokens is 47, but two tiles and a thumbnail .* take 48"):
        TokenizerConfig(image_tokens=16, tiling=Tiling(4, max_tokens=47))
    with pytest.raises(ValueError, match=r"but two tiles of image_tokens 16 take 32; give at least 32"):
        TokenizerConfig(image_tokens=16, tiling=Tiling(4, thumbnail=False, max_tokens=31))
    folder = TokenizerFolder(TEXT, None, TokenizerConfig(tiling=Tiling(4)))
    folder.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    values = json.loads(path.read_text())
    for tiling, name in [({**values["tiling"], "rows": 3}, "tiling.rows"), ({"max_tiles": 3}, "tiling.thumbnail"),
                         ([3], "tiling")]:  # fmt: skip
        path.write_text(json.dumps({**values, "tiling": tiling}))
        with pytest.raises(ValueError, match=rf"unknown or missing keys: .*{name}"):
            TokenizerFolder.load(tmp_path)


def test_the_command_line_says_how_pictures_are_cut(tmp_path, capsys):
    TEXT.save(tmp_path / "tokenizer.json")
    assemble = ["tokenizer", "assemble", "--text", str(tmp_path / "tokenizer.json"), "--out", str(tmp_path / "out")]
    assert main([*assemble, "--max_tiles", "6", "--max_image_tokens", "64", "--no_thumbnail"]) == 0
    assert TokenizerFolder.load(tmp_path / "out").config.tiling == Tiling(6, thumbnail=False, max_tokens=64)
    assert main([*assemble, "--image_tokens", "9"]) == 0
    assert TokenizerFolder.load(tmp_path / "out").config.tiling is None
    capsys.readouterr()
    assert main([*assemble, "--max_image_tokens", "64"]) != 0
    assert "give --max_tiles as well" in capsys.readouterr().err
    assert main([*assemble, "--max_tiles", "0"]) != 0
