"""Pictures in tiles: every pixel is in one, an index knows their slots, and a batch of them is its documents alone."""

from __future__ import annotations

import dataclasses
import io
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mmllm.batch import PackedBatch
from mmllm.data import commands
from mmllm.data.index.index import load_index
from mmllm.data.index.make import index_shard
from mmllm.data.loading.collate import pack_documents
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.loading.loader import StepDataset
from mmllm.data.plan.plan import Plan, open_plan
from mmllm.data.plan.recipe import Recipe, recipe_from_dict
from mmllm.data.samples.decode import ImageTransform, decode_image, picture_size
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.sample import Sample, Segment
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.decoder_module import DecoderModule
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.tiling import TileGrid, Tiling
from tests.data_fixtures import make_folder, words, write_manifest, write_tar
from tests.training_fixtures import CLIP_CONFIG

SIDE, SLOTS = 16, 4
SIZES = [(16, 16), (40, 17), (16, 50), (70, 70), (100, 30), (9, 64), (33, 48), (20, 20)]
"""Widths and heights of pictures: whole ones, and rows, columns and squares of tiles."""


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


# --- cutting ------------------------------------------------------------------------------------------------------


def _joined(tiles_M3HW: np.ndarray, grid: TileGrid) -> np.ndarray:
    """The tiles side by side again, [3, H, W]."""
    cells = iter(tiles_M3HW[grid.thumbnail :])
    return np.concatenate(
        [np.concatenate([next(cells) for _ in range(grid.columns)], axis=2) for _ in range(grid.rows)], axis=1
    )


@pytest.mark.parametrize("mode", ["squash", "pad", "crop"])
@pytest.mark.parametrize("grid", [TileGrid(1, 2, True), TileGrid(3, 2), TileGrid(1, 5, True)])
def test_a_picture_as_large_as_its_tiles_is_cut_and_nothing_else(mode, grid):
    pixels = picture((grid.columns * SIDE, grid.rows * SIDE))
    transform = ImageTransform(SIDE, mode=mode)
    tiles = transform(pixels, "image", grid)
    assert tiles.shape == (grid.num_tiles, 3, SIDE, SIDE) and tiles.dtype == np.uint8 and tiles.flags.c_contiguous
    assert np.array_equal(_joined(tiles, grid), pixels.transpose(2, 0, 1))
    if grid.thumbnail:
        assert np.array_equal(tiles[0], transform(pixels))


@pytest.mark.parametrize("mode", ["squash", "pad"])
def test_every_part_of_a_picture_is_in_a_tile(mode):
    rng = random.Random(1)
    transform = ImageTransform(SIDE, mode=mode)
    for _ in range(40):
        width, height = (round(2 ** rng.uniform(2, 8.5)) for _ in range(2))
        grid = TileGrid(rng.randint(1, 3), rng.randint(1, 3), rng.random() < 0.5)
        pixels = np.full((height, width, 3), 90, dtype=np.uint8)
        # a patch of about a pixel of the tiles, in a corner or anywhere
        scale = max(width / (grid.columns * SIDE), height / (grid.rows * SIDE), 1)
        side = math.ceil(1.5 * scale)
        left = rng.choice([0, max(0, width - side), rng.randrange(width)])
        top = rng.choice([0, max(0, height - side), rng.randrange(height)])
        marked = pixels.copy()
        marked[top : top + side, left : left + side] = 255
        before, after = (_joined(transform(each, "image", grid), grid) for each in (pixels, marked))
        moved_HW = np.abs(after.astype(float) - before).sum(axis=0)
        assert moved_HW.any(), (width, height, grid, left, top)
        if mode == "squash":  # and where it belongs
            middle, (right, bottom) = (
                np.argwhere(moved_HW > moved_HW.max() / 2).mean(axis=0) + 0.5,
                (min(left + side, width), min(top + side, height)),
            )
            assert abs(middle[0] - (top + bottom) / 2 * grid.rows * SIDE / height) <= 1.5
            assert abs(middle[1] - (left + right) / 2 * grid.columns * SIDE / width) <= 1.5


def test_tiles_keep_proportions_where_they_are_padded():
    grid = TileGrid(1, 2)
    tiles = ImageTransform(SIDE, mode="pad")(np.zeros((50, 50, 3), dtype=np.uint8), "image", grid)
    black = (_joined(tiles, grid) == 0).all(axis=0)
    assert black.sum() == SIDE * SIDE and black[:, 8:24].all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_those_of_upright_pictures(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "WEBP"):
        stream = io.BytesIO()
        Image.fromarray(picture((20, 13))).save(stream, form, exif=exif)
        (tmp_path / "picture").write_bytes(stream.getvalue())
        upright = decode_image(stream.getvalue()).size
        assert upright == ((13, 20) if orientation > 4 else (20, 13))
        for source in (stream.getvalue(), tmp_path / "picture", Image.open(stream), decode_image(stream.getvalue())):
            assert picture_size(source) == upright


def test_sizes_of_other_pictures():
    assert picture_size(picture((20, 13))) == picture_size(torch.from_numpy(picture((20, 13)))) == (20, 13)
    with pytest.raises(ValueError, match="one: not a picture that can be read"):
        picture_size(b"nothing", "one")
    with pytest.raises(FileNotFoundError, match=r"none.png: no such picture"):
        picture_size("none.png")


# --- from shards to batches ---------------------------------------------------------------------------------------


def png(size: tuple[int, int], seed: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture(size, seed)).save(stream, "PNG")
    return stream.getvalue()


def _manifest(root: Path) -> Path:
    """Captions, interleaved rows of two pictures, questions and conversations, with pictures of many sizes."""
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number, size in enumerate(SIZES):
        root.mkdir(parents=True, exist_ok=True)
        (root / f"{number}.png").write_bytes(png(size, number))
        other = f"{(number + 3) % len(SIZES)}.png"
        rows.append({"id": f"c{number}", "text": words(rng), "image": f"{number}.png"})
        segments: list[dict[str, Any]] = [{"image": f"{number}.png"}, {"image": other}, {"text": words(rng)}]
        rows.append({"id": f"i{number}", "segments": segments})
        rows.append({"id": f"q{number}", "segments": segments, "question": "which?", "answer": words(rng)})
        turns = [{"image": other, "role": "user"}, {"text": "what?", "role": "user"},
                 {"text": words(rng), "role": "assistant"}]  # fmt: skip
        rows.append({"id": f"t{number}", "segments": turns})
    return write_manifest(root, rows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards and two tokenizer folders, with tiling and without; the shards are indexed by the first."""
    root = tmp_path_factory.mktemp("tiling")
    make_folder(root / "tok", tiling=Tiling(4, max_tokens=4 * SLOTS))
    make_folder(root / "whole")
    commands.build(_manifest(root / "m"), root / "shards")
    commands.index(root / "shards", root / "tok")
    return root


def recipe(root: Path, **packing: Any) -> Recipe:
    kinds = (("caption", ["caption"]), ("interleaved", ["interleaved", "question", "chat"]))
    return recipe_from_dict({
        "tokenizer": str(root / "tok"), "sequence_length": 128, "seed": 3,
        "sources": [
            {"name": kind, "kind": kind, "shards": str(root / "shards" / f"{kind}-*.tar"), "tasks": tasks}
            for kind, tasks in kinds
        ],
        "packing": {"window": 8, **packing},
    })  # fmt: skip


def plan_of(root: Path, **packing: Any) -> tuple[Plan, TokenizerFolder]:
    folder = TokenizerFolder.load(root / "tok")
    return open_plan(recipe(root, **packing), 2, folder), folder


def test_an_index_knows_how_many_slots_and_tiles_there_are(made):
    folder = TokenizerFolder.load(made / "tok")
    for kind in ("caption", "interleaved"):
        index = load_index(made / "shards" / f"{kind}-000000.tar", folder.hash)
        assert index.has_tiles
        sizes = iter(index.picture_sizes_P2.tolist())
        for row, (num_images, num_tiles) in enumerate(zip(index.num_images_N, index.num_tiles_N, strict=True)):
            grids = [folder.tile_grid(*next(sizes)) for _ in range(num_images)]
            assert num_tiles == sum(grid.num_tiles for grid in grids)
            place = index.place(row)
            assert (place.num_images, place.num_tiles) == (num_images, num_tiles)
    assert len({folder.tile_grid(*size) for size in SIZES}) >= 4
    assert max(folder.tile_grid(*size).num_tiles for size in SIZES) == 4  # the budget: three tiles and the thumbnail
    checked = commands.verify(
        made / "shards", made / "tok"
    )  # builds every document (a question twice), compares lengths
    assert checked == {"documents": 5 * len(SIZES), "broken": 0, "errors": []}


def test_without_tiling_an_index_is_what_it_was(made, tmp_path):
    commands.build(made / "m" / "manifest.jsonl", tmp_path / "s")
    folder = TokenizerFolder.load(made / "whole")
    index = index_shard(tmp_path / "s" / "caption-000000.tar", folder)
    assert not index.has_tiles and "image.tiles" not in index.arrays.places
    assert index.place(0).num_tiles == index.place(0).num_images == 1
    assert np.array_equal(index.num_tiles_N, index.num_images_N)


def test_a_rows_word_for_its_pictures_size_is_not_taken(tmp_path):
    """Nor is a file's own width, where it lies on its side."""
    folder = make_folder(tmp_path / "tok", tiling=Tiling(4))
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(picture((64, 16))).save(stream, "JPEG", exif=exif)
    files = {
        "a.png": png((32, 16), 0), "a.json": b'{"width": 4000, "height": 4000}', "a.txt": b"red",
        "b.jpg": stream.getvalue(), "b.txt": b"blue",
    }  # fmt: skip
    write_tar(tmp_path / "caption-0.tar", files)
    index = index_shard(tmp_path / "caption-0.tar", folder)
    assert index.picture_sizes_P2.tolist() == [[32, 16], [16, 64]]
    assert index.num_tiles_N.tolist() == [3, 5]
    assert commands.verify(tmp_path / "caption-0.tar", tmp_path / "tok")["broken"] == 0


def batches(plan: Plan, folder: TokenizerFolder, count: int) -> list[tuple[PackedBatch, list[list[Document]]]]:
    """Batches, and their documents built one by one, their pictures decoded at once."""
    transform, found = ImageTransform(SIDE), []
    dataset = StepDataset(plan, folder, transform)
    for _, step in zip(range(count), plan.steps(), strict=False):
        documents = [
            [build_document(dataset._read(item), item.task, folder, transform) for item in items]
            for items in step.sequences
        ]
        found.append((dataset[step], documents))
    return found


def test_batches_hold_the_tiles_of_their_documents(made):
    plan, folder = plan_of(made)
    seen = set()
    for batch, documents in batches(plan, folder, 4):
        assert "errors" not in batch.state
        expected = pack_documents(documents, 128, [[0] * len(row) for row in documents])
        for name in ("token_ids_BT", "images_NCHW", "image_slots_NS", "image_tiles_N3", "modality_BT", "labels_BT"):
            assert torch.equal(getattr(batch, name), getattr(expected, name)), name
        assert batch.image_slots_NS.shape == (batch.num_images, SLOTS) and batch.images_NCHW.dtype == torch.uint8
        numbers_N, places_N2 = batch.image_tiles_N3[:, 0], batch.image_tiles_N3[:, 1:]
        assert numbers_N.diff().unique().tolist() == [0, 1]
        for number in numbers_N.unique().tolist():
            of_picture = numbers_N == number
            places = [tuple(place) for place in places_N2[of_picture].tolist()]
            grid = TileGrid(*max(places[-1:] or [(1, 1)]), thumbnail=len(places) > 1) if len(places) > 1 else TileGrid()
            assert places == list(grid.places)
            slots = batch.image_slots_NS[of_picture].flatten()
            assert slots.diff().unique().tolist() == [1]  # a picture's slots follow each other
            seen.add(len(places))
        is_slot = (batch.token_ids_BT == folder.id("<|image|>")).flatten()
        assert is_slot.sum() == batch.image_slots_NS.numel() and is_slot[batch.image_slots_NS].all()
    assert seen == {1, 3, 4}


def test_budgets_count_tiles(made):
    plan, folder = plan_of(made, max_images=7)
    for batch, _ in batches(plan, folder, 4):
        per_row = torch.div(batch.image_slots_NS[:, 0], 128, rounding_mode="floor").bincount(minlength=2)
        assert per_row.max() <= 7
    for source in plan.sources:  # documents with more than that by themselves are left out
        (index,) = source.indices
        over_N = index.num_tiles_N > 7
        assert source.num_over_budget == sum(int((over_N & (n > 0)).sum()) for n in index.lengths.values())
    assert sum(source.num_over_budget for source in plan.sources) > 0
    unbounded, folder = plan_of(made)
    rows = [torch.div(b.image_slots_NS[:, 0], 128, rounding_mode="floor").bincount() for b, _ in
            batches(unbounded, folder, 4)]  # fmt: skip
    assert max(int(row.max()) for row in rows) > 7


# --- the model ----------------------------------------------------------------------------------------------------


def model_for(folder: TokenizerFolder, kind: str = "mlp", prefix: Any = "none", **more: Any) -> MultimodalModel:
    torch.manual_seed(0)
    vocabulary = folder.vocabulary
    decoder = DecoderConfig(
        vocab_size=vocabulary.size, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16), moe_layers=(1,), prefix=prefix,
    )  # fmt: skip
    num_tokens = None if kind == "mlp" else SLOTS
    model = MultimodalModel(
        ModelConfig(
            decoder,
            VisionConfig(CLIP_CONFIG),
            ImageProjectorConfig(kind, num_tokens, max_tiles=more.get("max_tiles", 4)),  # pyright: ignore
            AudioConfig(vocabulary.num_codebooks, vocabulary.codebook_size, 8),
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25)
    return model.double().eval()


@pytest.mark.parametrize(("kind", "prefix"), [("mlp", "none"), ("mlp", "media"), ("c_abstractor", "none")])
def test_a_batch_of_tiles_equals_its_documents_alone(made, kind, prefix):
    plan, folder = plan_of(made)
    model = model_for(folder, kind, prefix)
    for batch, documents in batches(plan, folder, 2):
        hidden_BTD = model.hidden(batch)
        for row, sequence in enumerate(documents):
            start = 0
            for document in sequence:
                alone_1TD = model.hidden(pack_documents([[document]], document.num_tokens))
                stop = start + document.num_tokens
                torch.testing.assert_close(hidden_BTD[row, start:stop], alone_1TD[0], rtol=1e-9, atol=1e-11)
                start = stop


def document_of(folder: TokenizerFolder, *sizes: tuple[int, int]) -> Document:
    segments = [Segment(image=picture(size, number)) for number, size in enumerate(sizes)]
    return build_document(Sample("s", segments=(*segments, Segment(text="red"))), "interleaved", folder)


def test_all_tiles_of_a_picture_see_each_other_and_no_other_picture(made):
    """Under `prefix: media`."""
    folder = TokenizerFolder.load(made / "tok")
    model = model_for(folder, prefix="media")
    document = document_of(folder, (16, 16), (33, 48), (40, 17))
    batch = pack_documents([[document]], document.num_tokens)
    assert batch.image_tiles_N3[:, 0].bincount().tolist() == [1, 3, 4]
    spans_T = model.spans(batch)[0]
    slots_NS = batch.image_slots_NS
    assert [len(spans_T[slots_NS[batch.image_tiles_N3[:, 0] == n]].unique()) for n in range(3)] == [1, 1, 1]
    assert len(spans_T[slots_NS].unique()) == 3
    changed = dataclasses.replace(batch, images_NCHW=batch.images_NCHW.clone())
    changed.images_NCHW[3] = 255 - changed.images_NCHW[3]  # the last tile of the second picture
    moved_T = (model.hidden(changed) != model.hidden(batch)).any(dim=-1)[0]
    first = int(slots_NS[1, 0])
    assert not moved_T[:first].any() and moved_T[first:].all()


def test_where_a_tile_is_matters(made):
    folder = TokenizerFolder.load(made / "tok")
    model = model_for(folder)
    document = document_of(folder, (33, 48))
    batch = pack_documents([[document]], document.num_tokens)
    moved = dataclasses.replace(batch, image_tiles_N3=batch.image_tiles_N3[[0, 2, 1]])
    assert not torch.allclose(model.hidden(moved), model.hidden(batch), atol=1e-3)


def test_tiles_train_every_parameter_and_ask_the_host_nothing(made):
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from host_syncs import HostSyncs

    plan, folder = plan_of(made)
    ((batch, _),) = batches(plan, folder, 1)
    model = model_for(folder, prefix="media").float().train()
    model(batch)
    with HostSyncs() as syncs:
        output = model(batch)
        (output.hidden_QD.square().sum() + output.zero).backward()
    asked = [place for _, place in syncs.asked if "routing_stats" not in place]  # one_hot, which asks on CPUs alone
    assert not asked
    seeing = {name: p for name, p in model.named_parameters() if name.startswith(("vision", "image_projector"))}
    assert not [name for name, p in seeing.items() if p.grad is None or not p.grad.abs().max() > 0]


# --- what does not fit --------------------------------------------------------------------------------------------


def test_a_model_that_sees_whole_pictures_refuses_tiles(made):
    folder = TokenizerFolder.load(made / "tok")
    document = document_of(folder, (33, 48))
    batch = pack_documents([[document]], document.num_tokens)
    with pytest.raises(ValueError, match=r"image_projector.max_tiles is 1; set it to tiling.max_tiles"):
        model_for(folder, max_tiles=1).hidden(batch)


def module_for(root: Path, name: str, max_tiles: int) -> DecoderModule:
    return DecoderModule(
        decoder=DecoderConfig(vocab_size=0, hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        vision=VisionConfig(CLIP_CONFIG),
        image_projector=ImageProjectorConfig(max_tiles=max_tiles),
        tokenizer=str(root / name),
    )


def test_the_models_tiles_are_the_tokenizers(made):
    assert module_for(made, "tok", 1).resolved_config().image_projector.max_tiles == 4
    assert module_for(made, "tok", 4).resolved_config().image_projector.max_tiles == 4
    assert module_for(made, "whole", 1).resolved_config().image_projector.max_tiles == 1
    for name, got, wanted in (("tok", 3, 4), ("whole", 4, 1)):
        message = rf"image_projector.max_tiles is {got} but the tokenizer folder's tiling makes it {wanted}"
        with pytest.raises(ValueError, match=message):
            module_for(made, name, got).resolved_config()


def test_features_of_whole_pictures_and_altered_tiles_are_refused(made):
    data = PackedDataModule(recipe(made), batch_size=2, image_features=True)
    with pytest.raises(
        ValueError, match=r"image_features is on, .* tiling.max_tiles is 4; set image_features to false"
    ):
        data.train_dataloader()
    for settings in ({"flip": True}, {"min_scale": 0.5}):
        data = PackedDataModule(recipe(made), batch_size=2, **settings)
        with pytest.raises(ValueError, match=r"min_scale is .* tiling.max_tiles is 4; set min_scale to 1 and flip to"):
            data.train_dataloader()
    folder = TokenizerFolder.load(made / "tok")
    sample = Sample("key", "red", image=png((40, 20), 0), features_SC=np.zeros((4, 16), dtype=np.float16))
    with pytest.raises(ValueError, match=r"key: stored image features are of whole pictures"):
        build_document(sample, "caption", folder)
