"""Of `mmllm fit --print_estimate`: how large batches of answers may be, and what drawing them takes.

How long answers and prompts are isn't known before they are there, so each is taken to be as long as it may be.
"""

from __future__ import annotations

from pathlib import Path

from mmllm import paths
from mmllm.data.loading.preferences import PreferenceDataModule
from mmllm.data.loading.prompts import PromptDataModule
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import Work
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.estimate_memory import Load
from mmllm.training.layout import Layout
from mmllm.training.posttraining.rollout_module import RolloutModule

PROMPT_TOKENS = 128
"""Of a prompt's text, where `--sequence_length` doesn't say."""


def preference_load(data: PreferenceDataModule, model: MultimodalModel, sequence_length: int | None = None) -> Load:
    """A batch of preferences at its largest: a sequence for each answer, with a picture if the model sees."""
    length = sequence_length or data.sequence_length
    return _full(data.num_answers + _replayed(*data.replayed, length), length, model)


def rollout_load(
    module: DecoderModule, data: PromptDataModule, model: MultimodalModel, sequence_length: int | None = None
) -> Load:
    """A batch of answers at its largest: a sequence for each that is drawn, and those that are replayed.

    Raises:
        ValueError: the module draws no answers.
    """
    rollout = _rollout_module(module).rollout
    slots = model.num_image_tokens + 2 if model.num_image_tokens else 0  # a picture has its marks
    length = sequence_length or slots + PROMPT_TOKENS + rollout.max_new_tokens
    return _full(data.batch_size * rollout.num_answers + _replayed(*data.replayed, length), length, model)


def _replayed(recipe: str | Path | Recipe | None, num_sequences: int, length: int) -> int:
    """How many sequences of a length the replayed ones are, which have that of their recipe."""
    if recipe is None:
        return 0
    if not isinstance(recipe, Recipe):
        name = Path(recipe).as_posix()
        is_shipped = not Path(recipe).is_file() and name in paths.list_configs()
        recipe = load_recipe(paths.config_path(name) if is_shipped else recipe)
    return -(-num_sequences * recipe.sequence_length // length)


def _full(num_sequences: int, length: int, model: MultimodalModel) -> Load:
    slots = model.num_image_tokens
    num_images = 1 if slots and slots + 2 <= length else 0
    work = Work((length,), length - num_images * slots, num_images=num_images)
    return Load(num_sequences, length, num_images, work, num_sequences=1, is_planned=False)


def drawing_bytes(
    module: DecoderModule, data: PromptDataModule, decoder: DecoderConfig, layout: Layout, load: Load
) -> int:
    """Keys and values of the answers that a device draws at once; they stay while it trains."""
    num_rows = -(-data.batch_size // layout.num_batch_ranks) * _rollout_module(module).rollout.num_answers
    width = 2 * (decoder.num_hidden_layers - decoder.encoder_layers) * decoder.kv_heads * decoder.head_channels
    stored = 4 if layout.autocast is not None else layout.dtype.itemsize
    return num_rows * load.sequence_length * width * stored


def _rollout_module(module: DecoderModule) -> RolloutModule:
    if not isinstance(module, RolloutModule):
        raise ValueError(
            f"PromptDataModule gives prompts, and {type(module).__name__} draws no answers to them; use RolloutModule"
        )
    return module
