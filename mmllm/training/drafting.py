"""`mmllm draft`: a smaller model that guesses what a large one writes, for speculative decoding.

It has some of the large model's layers and all else of it, frozen: embeddings, head, image tower and projectors, so
that what a prompt's positions hold is the same for both and is computed once. Its layers learn the large model's
distributions of the next id (Hinton et al. 2015, arXiv:1503.02531; of drafts: Zhou et al. 2023, arXiv:2310.08461) on
the documents of a recipe, or on texts that the large model writes itself.

Shapes: B sequences, T positions, D width, M text targets of a batch, V ids of text.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import IGNORE, Modality, PackedBatch
from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.files import check_replaceable
from mmllm.checkpoints.folder import LoadedModel, load_model, save_model
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.data.plan.recipe import Recipe, load_recipe
from mmllm.inference.drafts import save_ngrams
from mmllm.inference.engine.ngrams import NGrams
from mmllm.model.decoder import unpacked
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.draft_ngrams import count_ngrams
from mmllm.training.draft_speed import Speed, held_back_prompts, measure
from mmllm.training.draft_texts import written_batches

log = logging.getLogger(__name__)

_TRAINED_SHARE = 0.8
"""Of the time; the rest is for the measurement and the files."""
_TAUGHT_SHARE = 0.5
"""Of the training's time, in which the large model is asked; in the rest its answers are learned again."""
_WARM_UP_SHARE = 0.05
_MOST_LESSONS = 48
"""Of the large model's answers so many batches are kept."""
_HELD_BACK = 8
"""Batches at most, whose prompts the draft model is measured by; nothing of them is learned."""
_SEQUENCES = 4
"""Of a recipe's batch."""


@dataclass(frozen=True)
class DraftConfig:
    """How a draft model is made.

    Attributes:
        kind: "model": a smaller model. "ngram": a table of what the large model mostly writes behind each few ids; its
            guesses cost nothing, but know nothing of pictures and sounds.
        minutes: that all of it takes, the measurement included.
        layers: that the draft model has; they begin as some of the large model's.
        recipe: of the data that the large model's distributions are learned on; None: on texts that it writes itself.
        learning_rate: the highest.
        seed: of what is drawn. How many steps there are is a matter of time, so that two runs aren't alike.
    """

    kind: Literal["model", "ngram"] = "model"
    minutes: float = 3.0
    layers: int = 1
    recipe: str | Path | Recipe | None = None
    learning_rate: float = 2e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("model", "ngram"):
            raise ValueError(f"kind is {self.kind!r}; choose model or ngram")
        for name in ("minutes", "layers", "learning_rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be positive")


@dataclass(frozen=True)
class Distilled:
    """What came of it."""

    draft: MultimodalModel | NGrams
    num_steps: int
    """Of the training; of a table the texts that were written."""
    num_ids: int
    """Of which the large model's distributions were learned, each counted once; of a table those that were written."""
    speeds: list[Speed]


@dataclass(frozen=True)
class _Lesson:
    """What the large model says of a batch."""

    x_BTD: Tensor
    batch: PackedBatch
    is_target_BT: Tensor
    log_MV: Tensor
    """In bfloat16."""


def make_draft(
    directory: str | Path, out: str | Path, config: DraftConfig, tell: Callable[[str], None] = log.info
) -> Distilled:
    """Distils a draft model of a model folder, measures it, and writes it as a folder of its own.

    Args:
        directory: of the large model.
        out: where to.
        config: how.
        tell: is given a line now and then.

    Raises:
        ValueError: the model has no more layers than are asked for; the recipe has another tokenizer folder.
    """
    start = time.monotonic()
    check_replaceable(Path(out))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(directory, device)
    distilled = distil(loaded, config, start, tell)
    parent = Path(directory).resolve().name
    how = "texts that it wrote itself" if config.recipe is None else "the documents of a recipe"
    kind = "A draft model" if config.kind == "model" else "A table of n-grams as a draft"
    info = ModelInfo(
        name=f"draft of {parent}",
        scores={speed.what: speed.scores for speed in distilled.speeds},
        notes=f"{kind} of `{parent}` for speculative decoding, distilled by `mmllm draft` on {how}: "
        f'`mmllm.load("{parent}", draft="this folder")`.',
    )
    if isinstance(distilled.draft, NGrams):
        save_ngrams(out, distilled.draft, info)
    else:
        save_model(out, distilled.draft, loaded.tokenizer, info, loaded.image_transform, loaded.generation)
    return distilled


def distil(loaded: LoadedModel, config: DraftConfig, start: float, tell: Callable[[str], None] = log.info) -> Distilled:
    """As `make_draft`, without files.

    Args:
        loaded: the large model.
        config: how.
        start: when the minutes begin, by `time.monotonic`.
        tell: is given a line now and then.
    """
    large = loaded.model
    torch.manual_seed(config.seed)
    batches = recipe_batches(loaded, config) if config.recipe is not None else written_batches(loaded, config.seed)
    held_back = held_back_prompts((next(batches) for _ in range(_HELD_BACK)), loaded.tokenizer)
    end = start + 60 * _TRAINED_SHARE * config.minutes
    draft: MultimodalModel | NGrams
    if config.kind == "ngram":
        draft, num_steps, num_ids = count_ngrams(loaded, batches, config.seed, end, tell)
    else:
        draft = begin_draft(large, config.layers)
        num_steps, num_ids = _train(large, draft, batches, config, end, tell)
    speeds = measure(loaded, draft, held_back, start + 60 * config.minutes)
    return Distilled(draft, num_steps, num_ids, speeds)


def begin_draft(large: MultimodalModel, num_layers: int) -> MultimodalModel:
    """A copy of a model with fewer layers, on its device, of which all but the layers and the norm is frozen.

    Raises:
        ValueError: the model has no more layers.
    """
    decoder = large.config.decoder
    if decoder.encoder_layers:
        raise ValueError(
            f"decoder.encoder_layers is {decoder.encoder_layers}: a copy with some of its layers is no decoder; draft "
            f"by lookup or an n-gram table, which need no model"
        )
    if num_layers >= decoder.num_hidden_layers:
        raise ValueError(
            f"layers is {num_layers} and the model has {decoder.num_hidden_layers}; a draft model needs fewer"
        )
    kept = np.linspace(0, decoder.num_hidden_layers - 1, num_layers).round().astype(int).tolist()
    config = dataclasses.replace(large.config, decoder=_with_layers(decoder, kept))
    with torch.random.fork_rng(devices=[]):
        draft = MultimodalModel(config)
    source = large.state_dict()
    state = {}
    for name in draft.state_dict():
        place, _, rest = name.removeprefix("decoder.layers.").partition(".")
        is_layer = name.startswith("decoder.layers.")
        state[name] = source[f"decoder.layers.{kept[int(place)]}.{rest}" if is_layer else name]
    draft.load_state_dict(state)
    if large.vision is not None and draft.vision is not None:
        draft.vision.mean, draft.vision.std = large.vision.mean, large.vision.std
    draft.to(large.decoder.embed_tokens.weight.device).requires_grad_(False)
    for part in (draft.decoder.layers, draft.decoder.norm):
        part.requires_grad_(True)
    return draft.eval()


def _with_layers(config: DecoderConfig, kept: list[int]) -> DecoderConfig:
    moe_layers, no_rope, types = config.moe_layers, config.no_rope_layers, config.layer_types
    return dataclasses.replace(
        config,
        num_hidden_layers=len(kept),
        moe_layers=moe_layers if isinstance(moe_layers, str) else _places(kept, moe_layers),
        mod_layers=(),  # all tokens pass all layers
        no_rope_layers=no_rope if no_rope is None or isinstance(no_rope, str) else _places(kept, no_rope),
        layer_types=types if types is None or isinstance(types, str) else tuple(types[layer] for layer in kept),
        dropout=0.0,
    )


def _places(kept: list[int], layers: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(place for place, layer in enumerate(kept) if layer in layers)


def recipe_batches(loaded: LoadedModel, config: DraftConfig) -> Iterator[PackedBatch]:
    """Batches of the recipe's documents that have text to predict, again and again; of each source as many tokens.

    Raises:
        ValueError: the recipe has no such document, or another tokenizer folder.
    """
    recipe = config.recipe if isinstance(config.recipe, Recipe) else load_recipe(config.recipe)  # pyright: ignore
    written = [source for source in recipe.sources if set(source.task_names) != {"speak"}]
    if not written:
        raise ValueError("all of the recipe's sources are spoken; a draft model guesses text: give others")
    sources = [dataclasses.replace(each, weight=1.0, weight_schedule=None) for each in written]
    recipe = dataclasses.replace(recipe, sources=sources, curriculum=None, seed=config.seed)
    data = PackedDataModule(recipe, _SEQUENCES)
    if data.folder.hash != loaded.tokenizer.hash:
        raise ValueError(
            f"the recipe's tokenizer folder is {data.folder.hash[:12]} but the model's is "
            f"{loaded.tokenizer.hash[:12]}; give a recipe that the model could be trained with"
        )
    if loaded.image_transform is not None:
        data.take_transform(loaded.image_transform)
    while True:
        yield from data.train_dataloader()


def _train(
    large: MultimodalModel,
    draft: MultimodalModel,
    batches: Iterator[PackedBatch],
    config: DraftConfig,
    end: float,
    tell: Callable[[str], None],
) -> tuple[int, int]:
    """Trains until it is time; steps, and targets of the large model."""
    parameters = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    rng = np.random.default_rng(config.seed)
    begun, taught, told = time.monotonic(), 0.0, time.monotonic()
    lessons: list[_Lesson] = []
    num_steps = num_targets = 0
    while num_steps == 0 or time.monotonic() < end:
        now = time.monotonic()
        if not lessons or taught < _TAUGHT_SHARE * (now - begun):
            lesson = _lesson(large, next(batches))
            taught += time.monotonic() - now
            num_targets += len(lesson.log_MV)
            if not len(lesson.log_MV):
                continue
            lessons = [*lessons[-(_MOST_LESSONS - 1) :], lesson]
        else:
            lesson = lessons[rng.integers(len(lessons))]
        share = min(1.0, (now - begun) / max(1e-9, end - begun))
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min((share + 1e-3) / _WARM_UP_SHARE, 1.0) * (1 - share)
        loss = divergence(draft, lesson)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        num_steps += 1
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell(f"step {num_steps}, {num_targets:,} ids: {loss.item():.3f} nats from the large model")
    return num_steps, num_targets


@torch.no_grad()
def _lesson(large: MultimodalModel, batch: PackedBatch) -> _Lesson:
    batch = batch.to(large.decoder.embed_tokens.weight.device).with_metadata()
    is_text_BT = (batch.labels_BT != IGNORE) & (batch.labels_BT < large.config.num_text)
    if batch.audio_labels_BTK.shape[-1]:  # codebook 0's units are ids too, and an end of sound is no text
        is_text_BT &= (batch.audio_labels_BTK[..., 0] == IGNORE) & (batch.modality_BT != Modality.UNITS)
    x_BTD = large.splice(batch)
    logits_MV = _logits(large, x_BTD, batch, is_text_BT)
    log_MV = logits_MV.float().log_softmax(dim=-1).to(torch.bfloat16)
    return _Lesson(x_BTD, batch, is_text_BT, log_MV)


def divergence(draft: MultimodalModel, lesson: _Lesson) -> Tensor:
    """How far the draft model's distributions are from the large model's: their KL divergence, in nats an id."""
    log_MV = _logits(draft, lesson.x_BTD, lesson.batch, lesson.is_target_BT).float().log_softmax(dim=-1)
    return F.kl_div(log_MV, lesson.log_MV.float(), reduction="batchmean", log_target=True)


def _logits(model: MultimodalModel, x_BTD: Tensor, batch: PackedBatch, is_target_BT: Tensor) -> Tensor:
    assert batch.metadata is not None
    sequences = batch.metadata.sequences
    hidden_QD, _ = model.decoder.packed(x_BTD, batch.positions_BT, sequences, batch.modality_BT, model.spans(batch))
    hidden_MD = unpacked(hidden_QD, sequences, x_BTD.shape[:2])[is_target_BT]
    return F.linear(hidden_MD, model.decoder.head_weight_VD[: model.config.num_text])
