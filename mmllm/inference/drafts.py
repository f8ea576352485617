"""Folders of drafts: a smaller model's, as any model's; or a table of n-grams and its card."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from mmllm.checkpoints.card import ModelInfo
from mmllm.checkpoints.files import CARD, CONFIG, replaced_folder, write_json
from mmllm.checkpoints.folder import load_model
from mmllm.inference.engine.ngrams import NGRAMS, NGrams
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder


def load_draft(
    directory: str | os.PathLike[str],
    tokenizer: TokenizerFolder,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> MultimodalModel | NGrams:
    """What `mmllm draft` wrote.

    Args:
        directory: the folder.
        tokenizer: of the large model.
        device: of a model.
        dtype: likewise.

    Raises:
        FileNotFoundError, ValueError: as `mmllm.checkpoints.folder.load_model`; or it is of another tokenizer.
    """
    directory = Path(directory)
    if (directory / NGRAMS).exists():
        ngrams = NGrams.load(directory / NGRAMS)
        found, made = ngrams.tokenizer_hash, ngrams
    else:
        loaded = load_model(directory, device, dtype)
        found, made = loaded.tokenizer.hash, loaded.model
    if found != tokenizer.hash:
        raise ValueError(
            f"the draft in {directory} is of tokenizer {found[:12]}, the model of {tokenizer.hash[:12]}; give what "
            f"`mmllm draft` made of this model"
        )
    return made


def save_ngrams(directory: str | os.PathLike[str], ngrams: NGrams, info: ModelInfo) -> None:
    """Writes a table's folder, whole or not at all."""
    scores = [f"- {what} {name}: {value:.4g}" for what, own in info.scores.items() for name, value in own.items()]
    lines = [f"# {info.name}", "", info.notes, "", f"{len(ngrams.following):,} contexts.", "", *scores]
    with replaced_folder(Path(directory)) as partial:
        ngrams.save(partial / NGRAMS)
        write_json(partial / CONFIG, {"format": "mmllm", "draft": "ngram"})
        (partial / CARD).write_text("\n".join(lines) + "\n", encoding="utf-8")
