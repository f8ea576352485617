"""Trains a CLIP model from nothing: `class_path: mmllm.training.clip_module.ClipModule`.

Shapes: N pairs of this rank, M pairs of all ranks, L text tokens, C channels of the shared space, H and W pixels.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from open_clip.loss import gather_features
from torch import Tensor

from mmllm.batch import CaptionBatch
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.vision import VisionConfig, pixel_statistics
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.staged import StagedModule
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.tensor_file import save_tensors
from mmllm_tokenizers.vocab import END, PAD

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
MAX_LOGIT_SCALE = math.log(100.0)
_NEVER = -1e4
"""A logit that has no share in a softmax; finite, since targets of 0 are multiplied with its logarithm."""
_VALIDATION = ("val/loss", "val/image_to_text_accuracy", "val/text_to_image_accuracy")


class ClipModule(StagedModule):
    """Images and captions into one space, with open_clip's model.

    The text tower reads this project's own text tokens: `text_cfg` gets the tokenizer's vocabulary size, and pools
    at `<|end|>`.
    """

    def __init__(
        self,
        clip: VisionConfig,
        tokenizer: str,
        optimizer: OptimizerConfig | None = None,
        max_seconds: float | None = None,
        out: str | None = None,
    ) -> None:
        """Keeps the settings; `configure_model` builds.

        Args:
            clip: the open_clip model by name or as a config; `layer` and `trainable` don't matter here.
            tokenizer: tokenizer folder.
            optimizer: rates and decay.
            max_seconds: training ends after this long; None: `trainer.max_steps` alone ends it.
            out: folder for `model.safetensors` and `config.json`, which `DecoderModule(clip=…)` reads.
        """
        super().__init__(optimizer, max_seconds)
        if clip.pretrained or clip.checkpoint:
            raise ValueError(
                f"clip names the weights {clip.pretrained or clip.checkpoint!r}, but both towers are trained from "
                f"nothing here, the text tower on this tokenizer; give a pretrained tower to DecoderModule as `vision`"
            )
        self.clip_config = clip
        self.tokenizer = tokenizer
        self.out = out
        self.clip: Any = None

    @property
    def export_dir(self) -> str | None:
        """Where the model goes when training ends."""
        return self.out

    def configure_model(self) -> None:
        """Builds the model once the tokenizer is there."""
        if self.clip is not None:
            return
        text = TokenizerFolder.load(self.tokenizer).text
        self.clip_config = with_text_tokens(self.clip_config, text.vocab_size, text.id(END), text.id(PAD))
        self.clip = build_clip(self.clip_config)
        for name, statistics in zip(("mean", "std"), pixel_statistics(self.clip_config), strict=True):
            values = torch.tensor(statistics).view(3, 1, 1) * 255
            self.register_buffer(f"pixel_{name}", values.to(self.clip.logit_scale.device), persistent=False)

    def export(self, directory: Path) -> None:
        """Writes weights and config."""
        save_clip(directory, self.clip, self.clip_config)

    def training_step(self, batch: CaptionBatch | tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One batch, or uint8 images [N, 3, H, W] and token ids [N, L]; the loss of all ranks' pairs together."""
        batch = _captions(batch)
        image_NC, text_NC, scale = self._features(batch)
        tokens_NL, is_pair_N = batch.token_ids_NL, batch.is_pair_N
        all_image_MC, all_text_MC, all_tokens_ML, is_pair_M = image_NC, text_NC, tokens_NL, is_pair_N
        rank, world_size = self.trainer.global_rank, self.trainer.world_size
        if world_size > 1:
            all_image_MC, all_text_MC = gather_features(image_NC, text_NC, True, True, rank, world_size)
            all_tokens_ML, is_pair_M = (self._of_all_ranks(values) for values in (tokens_NL, is_pair_N))
        same_NM = (tokens_NL[:, None] == all_tokens_ML[None]).all(dim=-1)
        loss = contrastive_loss(
            image_NC, text_NC, all_image_MC, all_text_MC, scale, same_NM, is_pair_N, is_pair_M
        )  # fmt: skip
        self.window.add({"loss": loss, "logit_scale": scale})
        self.log("loss", loss, prog_bar=True, logger=False)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Keeps the temperature from collapsing, as open_clip's own training does, before a checkpoint is written."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.clip.logit_scale.clamp_(0.0, MAX_LOGIT_SCALE)

    def validation_step(self, batch: CaptionBatch | tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Retrieval within the batch: is the most similar caption the image's own (or one with the same words)?"""
        batch = _captions(batch)
        image_NC, text_NC, scale = self._features(batch)
        image_NC, text_NC, tokens_NL = (values[batch.is_pair_N] for values in (image_NC, text_NC, batch.token_ids_NL))
        if not len(tokens_NL):
            self._log_nothing()
            return
        logits_NN = scale * image_NC @ text_NC.T
        own_N = torch.arange(len(tokens_NL), device=tokens_NL.device)
        loss = (F.cross_entropy(logits_NN, own_N) + F.cross_entropy(logits_NN.T, own_N)) / 2
        to_text_N = (tokens_NL[logits_NN.argmax(dim=1)] == tokens_NL).all(dim=1)
        to_image_N = (tokens_NL[logits_NN.argmax(dim=0)] == tokens_NL).all(dim=1)
        values = (loss, to_text_N.float().mean(), to_image_N.float().mean())
        self.log_dict(dict(zip(_VALIDATION, values, strict=True)), batch_size=len(tokens_NL), sync_dist=True)

    def _log_nothing(self) -> None:
        """Ranks must log alike, also one all of whose rows failed; in the means it has no weight."""
        self.log_dict({name: torch.zeros((), device=self.device) for name in _VALIDATION}, batch_size=0, sync_dist=True)

    def _features(self, batch: CaptionBatch | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        batch = _captions(batch)
        pixels = (batch.images_N3HW - self.get_buffer("pixel_mean")) / self.get_buffer("pixel_std")
        image_NC = self.clip.encode_image(pixels, normalize=True)
        text_NC = self.clip.encode_text(batch.token_ids_NL, normalize=True)
        return image_NC, text_NC, self.clip.logit_scale.exp()

    def _of_all_ranks(self, values: Tensor) -> Tensor:
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


def _captions(batch: CaptionBatch | tuple[Tensor, Tensor]) -> CaptionBatch:
    if isinstance(batch, CaptionBatch):
        return batch
    images_N3HW, tokens_NL = batch
    return CaptionBatch(images_N3HW, tokens_NL, torch.ones(len(tokens_NL), dtype=torch.bool, device=tokens_NL.device))


def contrastive_loss(
    image_NC: Tensor,
    text_NC: Tensor,
    all_image_MC: Tensor,
    all_text_MC: Tensor,
    scale: Tensor,
    same_NM: Tensor,
    is_pair_N: Tensor | None = None,
    is_pair_M: Tensor | None = None,
) -> Tensor:
    """CLIP's loss of N pairs among M, in which every caption of the same words is right (UniCL, arXiv 2204.03610).

    With captions that all differ it is open_clip's `ClipLoss`. Where classes are captions ("a photo of a cat"), other
    pictures of the same class are no wrong answers. It is 0 where all right answers are equally likely and certain.

    Args:
        image_NC: this rank's images, normalized.
        text_NC: their captions, normalized.
        all_image_MC: those of all ranks.
        all_text_MC: those of all ranks.
        scale: what cosines are multiplied by.
        same_NM: bool, which of all captions have the words of this rank's.
        is_pair_N: bool, which of this rank's rows are pairs; others are neither asked nor answers. By default all are.
        is_pair_M: those of all ranks.

    Returns:
        The sum of this rank's losses over the mean number of pairs of a rank: the ranks' mean is the mean of all pairs.
    """
    is_pair_N = torch.ones_like(same_NM[:, 0]) if is_pair_N is None else is_pair_N
    is_pair_M = torch.ones_like(same_NM[0]) if is_pair_M is None else is_pair_M
    targets_NM = (same_NM & is_pair_M).to(image_NC.dtype)
    targets_NM = targets_NM / targets_NM.sum(dim=1, keepdim=True).clamp(min=1)
    logits = (scale * image_NC @ all_text_MC.T, scale * text_NC @ all_image_MC.T)
    to_text_N, to_image_N = (
        F.cross_entropy(values_NM.masked_fill(~is_pair_M, _NEVER), targets_NM, reduction="none") for values_NM in logits
    )
    losses_N = (to_text_N + to_image_N) / 2 - torch.special.entr(targets_NM).sum(dim=1)
    num_pairs = is_pair_M.sum().clamp(min=1) * (len(is_pair_N) / len(is_pair_M))
    return torch.where(is_pair_N, losses_N, 0.0).sum() / num_pairs


def with_text_tokens(config: VisionConfig, vocab_size: int, end_id: int, pad_id: int) -> VisionConfig:
    """The config with a text tower for this tokenizer.

    Raises:
        ValueError: open_clip has no model of that name, or its text tower isn't open_clip's own.
    """
    values = config.open_clip
    if isinstance(values, str):
        found = open_clip.get_model_config(values)
        if found is None:
            raise ValueError(f"clip.open_clip is {values!r}, which open_clip doesn't know; see open_clip.list_models()")
        values = found
    if values is None:
        given = "transformers" if config.transformers is not None else "whitened"
        raise ValueError(f"clip.{given} is given, which has no text tower to train with here; name clip.open_clip")
    values = copy.deepcopy(values)
    text_cfg = dict(values["text_cfg"])
    if "hf_model_name" in text_cfg:
        raise ValueError(
            f"the text tower of clip.open_clip is {text_cfg['hf_model_name']!r} from Hugging Face, which has a "
            f"tokenizer of its own; choose a model with open_clip's text transformer"
        )
    text_cfg |= {"vocab_size": vocab_size, "pool_type": "eos", "eos_id": end_id, "pad_id": pad_id}
    values["text_cfg"] = text_cfg
    return dataclasses.replace(config, open_clip=values)


def save_clip(directory: str | Path, clip: torch.nn.Module, config: VisionConfig) -> None:
    """Writes an open_clip model as safetensors beside its config; `load_clip_config` finds both again."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in clip.state_dict().items()}
    save_tensors(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    values = {"open_clip": config.open_clip, "norm": config.norm, "mean": config.mean, "std": config.std}
    (directory / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_clip_config(directory: str | Path, config: VisionConfig | None) -> VisionConfig:
    """The config of a tower whose weights lie in the folder that `save_clip` wrote.

    Args:
        directory: the folder.
        config: its `layer` and `trainable` are kept.

    Raises:
        FileNotFoundError: the folder lacks its files.
    """
    directory = Path(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"{directory} lacks {name}; give the `out` folder of a finished ClipModule run")
    values = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    base = config or VisionConfig(open_clip=values["open_clip"])
    weights = str(directory / WEIGHTS)
    mean, std = (tuple(values[key]) if values.get(key) else None for key in ("mean", "std"))
    return dataclasses.replace(
        base,
        open_clip=values["open_clip"],
        norm=values["norm"],
        pretrained=None,
        checkpoint=weights,
        mean=mean,
        std=std,
    )
