"""Prompts with pictures that are cut into tiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.sample import Segment
from mmllm.evaluation.asking import AskedModel
from mmllm.inference.api import Model
from mmllm.inference.inputs import parse_parts
from mmllm.inference.prompts import join, pad_left
from mmllm_tokenizers.tiling import Tiling
from tests.inference_fixtures import IMAGE_SIZE, make_model, make_tokenizer

SIZES = [(16, 16), (33, 16), (30, 33), (16, 70)]


def picture(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> Model:
    tokenizer = make_tokenizer(tiling=Tiling(4))
    made = make_model(tokenizer)
    return Model(made, tokenizer, generation=GenerationConfig(max_new_tokens=6, max_seconds=0.2))


def slots(model: Model, size: tuple[int, int]) -> int:
    return model.tokenizer.num_image_slots(*size)


def test_a_prompt_has_as_many_slots_as_its_pictures(model):
    assert [slots(model, size) // 4 for size in SIZES] == [1, 3, 5, 5]
    parts = ["see ", picture(SIZES[1]), picture(SIZES[2]), " and ", picture(SIZES[0]), " ", picture(SIZES[3])]
    prompt = model.continuation_prompt(parse_parts(parts))
    image = model.tokenizer.id("<|image|>")
    runs = [len(run) for run in "".join("i" if t == image else " " for t in prompt.token_ids_T).split()]
    assert runs == [8 * 4, 4, 5 * 4]  # the first two follow each other
    assert [p.is_first for p in prompt.images] == [True, *[False] * 2, True, *[False] * 4, True, True, *[False] * 4]
    batch = pad_left([prompt])
    assert batch.images_NCHW.shape == (14, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert batch.image_tiles_N3[:, 0].tolist() == [0] * 3 + [1] * 5 + [2] + [3] * 5
    assert batch.image_tiles_N3[3:8, 1:].tolist() == [[0, 0], [1, 1], [1, 2], [2, 1], [2, 2]]
    filled = model.continuation_prompt(
        parse_parts("see <|image|> and <|image|>", [picture(SIZES[1]), picture(SIZES[0])])
    )
    assert (filled.token_ids_T == image).sum() == 4 * 4


def test_rows_of_unlike_tiles_are_what_each_is_alone(model):
    weights = model.model.double()
    prompts = [
        model.continuation_prompt(parse_parts(["a ", *(picture(size, row) for size in SIZES[row:])]))
        for row in range(4)
    ]
    hidden_BTD = weights.hidden(pad_left(prompts))
    for row, prompt in enumerate(prompts):
        alone_1TD = weights.hidden(pad_left([prompt]))
        torch.testing.assert_close(hidden_BTD[row, -prompt.num_tokens :], alone_1TD[0], rtol=1e-9, atol=1e-10)
    joined = join(prompts[:2])
    assert [p.tile for p in joined.images] == [p.tile for prompt in prompts[:2] for p in prompt.images]
    weights.float()


def test_answers_of_a_batch_are_those_of_each_picture(model):
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES)]
    together = model.caption(pictures, temperature=0)
    assert together == [model.caption(each, temperature=0) for each in pictures]
    assert AskedModel(model).caption(pictures, 6, 64, blind=True) != []
    segments = [Segment(image=pictures[1]), Segment(text="?"), Segment(image=pictures[2])]
    assert isinstance(model.chat([{"role": "user", "content": segments}], temperature=0), str)


def test_a_model_folder_keeps_its_tiles(model, tmp_path):
    torch.nn.init.normal_(model.model.get_parameter("image_projector.tile_row_embedding"))
    folder = save_model(tmp_path / "m", model.model, model.tokenizer)
    loaded = load_model(folder)
    assert loaded.tokenizer.config.tiling == Tiling(4)
    assert loaded.model.config.image_projector.max_tiles == 4
    again = Model(loaded.model, loaded.tokenizer, loaded.image_transform, model.generation)
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES)]
    assert again.caption(pictures, temperature=0) == model.caption(pictures, temperature=0)

    whole = make_tokenizer()
    with pytest.raises(ValueError, match=r"image_projector.max_tiles is 4 but the tokenizer's tiling makes it 1"):
        save_model(tmp_path / "other", model.model, whole)
    config = json.loads((folder / "config.json").read_text())
    config["model"]["image_projector"]["max_tiles"] = 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"unexpected image_projector.tile_column_embedding"):
        load_model(folder)
