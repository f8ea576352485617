"""What `fit --print_estimate` says of trainings on answers: their largest batches, and what drawing keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.data.loading.prompts import PromptDataModule
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.vision import VisionConfig
from mmllm.training.estimate_answers import PROMPT_TOKENS, drawing_bytes, preference_load, rollout_load
from mmllm.training.layout import Layout
from mmllm.training.posttraining.rollout_module import RolloutModule
from mmllm.training.posttraining.rollouts import RolloutConfig
from tests.training_fixtures import tiny_module

DECODER = DecoderConfig(40, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
TOWER: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 8, "head_width": 4, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}


def model(sees: bool) -> MultimodalModel:
    vision = VisionConfig(open_clip=TOWER) if sees else None
    with torch.device("meta"):
        return MultimodalModel(ModelConfig(DECODER, vision, ImageProjectorConfig(kind="mlp"), None))


def recipe(folder: Path, length: int) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(f"tokenizer: t\nsequence_length: {length}\nsources: [{{name: a, kind: text, shards: x}}]\n")
    return path


def drawer(**rollout: Any) -> RolloutModule:
    return RolloutModule("somewhere", [{"name": "words"}], RolloutConfig(**rollout), decoder=DECODER)


def test_pairs_are_two_answers_and_what_is_replayed_counts_by_its_length(tmp_path: Path) -> None:
    data = PreferenceDataModule("pairs.jsonl", "tokenizer", batch_size=3, sequence_length=100)
    told = preference_load(data, model(sees=False))
    assert (told.batch_size, told.sequence_length, told.max_images) == (6, 100, 0)
    data = PreferenceDataModule(
        "pairs.jsonl", "tokenizer", form="answers", batch_size=3, sequence_length=100,
        replay_recipe=recipe(tmp_path, 250), replay_sequences=2,
    )  # fmt: skip
    told = preference_load(data, model(sees=True))
    assert (told.batch_size, told.max_images) == (3 + 5, 1)
    assert preference_load(data, model(sees=True), sequence_length=50).batch_size == 3 + 10


def test_answers_that_are_drawn_are_as_long_as_they_may_be(tmp_path: Path) -> None:
    data = PromptDataModule(
        "rows.jsonl", "question", batch_size=2, replay_recipe=recipe(tmp_path, 300), replay_sequences=4
    )
    seeing, module = model(sees=True), drawer(group_size=4, max_new_tokens=20)
    told = rollout_load(module, data, seeing)
    length = seeing.num_image_tokens + 2 + PROMPT_TOKENS + 20
    assert told.sequence_length == length and told.batch_size == 2 * 4 + -(-4 * 300 // length)
    kept = 2 * 4 * length * DECODER.num_hidden_layers * 2 * 2 * 4 * 4  # keys and values, heads, channels, float32
    assert drawing_bytes(module, data, DECODER, Layout(), told) == kept
    assert drawing_bytes(module, data, DECODER, Layout(num_batch_ranks=2), told) == kept // 2
    assert drawing_bytes(module, data, DECODER, Layout(precision="bf16-true"), told) == kept // 2
    with pytest.raises(ValueError, match="DecoderModule draws no answers"):
        rollout_load(tiny_module(), data, seeing)
