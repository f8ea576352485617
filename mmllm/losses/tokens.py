"""Losses of a multimodal batch's text and unit targets: a sum to train on, and sums and counts to report.

Nothing here asks the host: kinds of targets are masks, and which positions have targets comes from the collator.

Shapes: B sequences, T positions, D width, V vocabulary, K codebooks, M targets of the whole batch, U of them with
targets of codebooks beyond the first, J = K − 1 such codebooks, S sources.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmllm.batch import IGNORE
from mmllm.losses.cross_entropy import CodeTargets, CrossEntropyBackend, product_dtype, weighted_cross_entropy
from mmllm.model.embedding import Rows
from mmllm.model.multimodal import LossConfig


@dataclass(frozen=True)
class HeadLayout:
    """How the head's ids are laid out: text, then K blocks of units, each with a filler behind its units.

    Attributes:
        num_text: ids of special and text tokens.
        num_codebooks: K; 0: the model does not speak.
        codebook_size: units a codebook, without the filler.
        audio_end_id: of `<|audio_end|>`, which counts as units.
    """

    num_text: int
    num_codebooks: int = 0
    codebook_size: int = 0
    audio_end_id: int = -1

    @property
    def block(self) -> int:
        """Ids of one codebook."""
        return self.codebook_size + 1

    @property
    def second_codebook(self) -> int:
        """The first id of codebook 1, the first that has a softmax of its own."""
        return self.num_text + self.block


@dataclass(frozen=True)
class TokenWeights:
    """Weights of a `LossConfig` as tensors on the device: made once and kept, since copying at each step would wait."""

    text: float
    units: float
    head_z_loss_coef: float
    codebooks_K: Tensor
    """float32, of sum 1, so that a frame weighs as much as a text token."""
    sources_S: Tensor
    """float32. They change what is trained on, not what the reported losses are divided by; so do the next."""
    text_V: Tensor | None = None
    """float32, of each text id; None: all alike."""

    def to(self, device: torch.device | str) -> TokenWeights:
        """The same on a device."""
        codebooks_K, sources_S = (x.to(device, non_blocking=True) for x in (self.codebooks_K, self.sources_S))
        text_V = None if self.text_V is None else self.text_V.to(device, non_blocking=True)
        return replace(self, codebooks_K=codebooks_K, sources_S=sources_S, text_V=text_V)

    @staticmethod
    def of(
        config: LossConfig,
        layout: HeadLayout,
        source_names: Sequence[str],
        num_sources: int,
        text_weights: Mapping[int, float] | None = None,
    ) -> TokenWeights:
        """Checks the config against the vocabulary and the recipe.

        Args:
            config: of the losses.
            layout: of the vocabulary.
            source_names: of the recipe's sources, in its order; may be empty.
            num_sources: how many sources are told apart.
            text_weights: of text ids; 1 for the others. The config's `word_weights` as a tokenizer has them.

        Raises:
            ValueError: it has weights of codebooks or sources that there are not.
        """
        weights = config.codebook_weights
        if weights is not None and len(weights) != layout.num_codebooks:
            raise ValueError(
                f"loss.codebook_weights has {len(weights)} weights but the vocabulary has {layout.num_codebooks} "
                f"codebooks; give one for each, or null for equal ones"
            )
        weights = weights or (1.0,) * layout.num_codebooks
        sources = [1.0] * num_sources
        for name, weight in (config.source_weights or {}).items():
            if name not in source_names:
                raise ValueError(
                    f"loss.source_weights names {name!r}, which is no source of the recipe; it has "
                    f"{', '.join(source_names) or 'none that is named'}"
                )
            sources[source_names.index(name)] = weight
        text_V = None
        if text_weights:
            text_V = torch.ones(layout.num_text)
            for token_id, weight in text_weights.items():
                text_V[token_id] = weight
        return TokenWeights(
            text=config.text,
            units=config.units,
            head_z_loss_coef=config.head_z_loss_coef,
            codebooks_K=torch.tensor([weight / sum(weights) for weight in weights]),
            sources_S=torch.tensor(sources),
            text_V=text_V,
        )


class TokenTargets(NamedTuple):
    """What is predicted at the positions that have targets."""

    labels_M: Tensor
    """int64 ids of text or codebook 0; `IGNORE` where none."""
    source_M: Tensor
    """int64."""
    frames_U: Tensor
    """int64: which of the M have targets of codebooks beyond the first."""
    codes_UJ: Tensor
    """int64 of codebooks 1 … K − 1; `IGNORE` where none."""
    factor_M: Tensor | None = None
    """Of the losses of text, beside the config's weights of ids and sources; None: 1."""

    @staticmethod
    def of(
        labels_BT: Tensor, audio_labels_BTK: Tensor, source_BT: Tensor, targets_M: Tensor, frames_U: Tensor
    ) -> TokenTargets:
        """Takes a batch's targets together.

        Args:
            labels_BT: as `PackedBatch`'s; so are the next two.
            audio_labels_BTK: column 0 is not read: `labels_BT` has it.
            source_BT: -1 in padding.
            targets_M: flat indices into B·T of the positions that have any target; -1 pads.
            frames_U: indices into `targets_M` of those with targets of codebooks beyond the first; -1 pads.
        """
        position_M = targets_M.clamp(min=0)
        labels_M = torch.where(targets_M >= 0, labels_BT.flatten()[position_M], IGNORE)
        target_U = frames_U.clamp(min=0)
        codes_UJ = audio_labels_BTK.flatten(0, 1)[position_M[target_U]][:, 1:]
        codes_UJ = torch.where((frames_U >= 0)[:, None], codes_UJ, IGNORE)
        return TokenTargets(labels_M, source_BT.flatten()[position_M].clamp(min=0), target_U, codes_UJ)


class TokenLosses(NamedTuple):
    """Sums and counts, so that ranks and accumulated batches can be added. All but the objective are detached."""

    objective: Tensor
    """Differentiable: Σ weight · (loss + head_z_loss_coef · logsumexp²) over targets, with all weights of the config.
    What a rank divides by the number of targets of all ranks."""
    text_sum: Tensor
    """Nats, without the config's weights of kinds and sources."""
    text_count: Tensor
    units_sum: Tensor
    """Nats; a frame's are those of its codebooks, weighted."""
    units_count: Tensor
    """A frame counts 1 when all K codes are targets; the end of sound counts 1."""
    source_sums_S: Tensor
    """Text and units together, without the config's weights of kinds and sources."""
    source_counts_S: Tensor
    num_correct: Tensor
    """Text targets whose logit is the largest."""
    z_sum: Tensor
    """Σ logsumexp² of the whole softmax, counted as `text_count` and `units_count` count its targets."""
    z_count: Tensor


def token_losses(
    hidden_MD: Tensor,
    weight_VD: Rows,
    targets: TokenTargets,
    layout: HeadLayout,
    weights: TokenWeights,
    *,
    softcap: float | None = None,
    backend: CrossEntropyBackend = "auto",
    chunk_bytes: int | None = None,
) -> TokenLosses:
    """Losses of text and units.

    Text and codebook 0 go through the softmax over the whole vocabulary (so that speech can end), codebook k > 0
    through the one over its own block of the head; a frame's loss is the weighted mean over its K codes.

    Args:
        hidden_MD: hidden states where there are targets.
        weight_VD: of the head, in one block or two.
        targets: what is predicted there.
        layout: of the vocabulary.
        weights: of kinds, codebooks and sources.
        softcap: of the head's logits.
        backend: of the cross-entropy.
        chunk_bytes: bound of a chunk's logits.
    """
    labels_M, source_M, frames_U, codes_UJ, text_factor_M = targets
    has_label_M, has_code_UJ = labels_M != IGNORE, codes_UJ != IGNORE
    is_code_M = labels_M >= layout.num_text
    is_units_M = is_code_M | (labels_M == layout.audio_end_id) | ~has_label_M
    weight = weight_VD if isinstance(weight_VD, Tensor) else weight_VD[0]
    wide = torch.promote_types(product_dtype(hidden_MD, weight), torch.float32)
    codebooks_K, sources_S = weights.codebooks_K.to(wide), weights.sources_S.to(wide)

    share_M = has_label_M.to(wide)
    share_UJ = has_code_UJ.to(wide)
    codes = None
    if layout.num_codebooks:
        share_M = torch.where(is_code_M, codebooks_K[0], 1.0) * share_M
        share_UJ = share_UJ * codebooks_K[1:]
    factor_M = torch.where(is_units_M, weights.units, weights.text) * sources_S[source_M]
    is_text_M = has_label_M & ~is_units_M
    if text_factor_M is not None:
        factor_M = factor_M * torch.where(is_text_M, text_factor_M.to(wide), 1.0)
    if weights.text_V is not None:
        factor_M = factor_M * torch.where(is_text_M, weights.text_V.to(wide)[labels_M * is_text_M], 1.0)
    if layout.num_codebooks > 1:
        factor_U1 = factor_M[frames_U][:, None]
        codes = CodeTargets(frames_U, codes_UJ, share_UJ * factor_U1, layout.second_codebook, layout.block)
    result = weighted_cross_entropy(
        *(hidden_MD, weight_VD, labels_M, share_M * factor_M, codes),
        z_loss_coef=weights.head_z_loss_coef,
        softcap=softcap,
        backend=backend,
        chunk_bytes=chunk_bytes,
    )

    losses_M, counts_M = share_M * result.losses_M, share_M
    if codes is not None:
        losses_M = losses_M.index_add(0, frames_U, (share_UJ * result.code_losses_UJ).sum(dim=1))
        counts_M = counts_M.index_add(0, frames_U, share_UJ.sum(dim=1))
    zeros_S = losses_M.new_zeros(sources_S.shape)
    return TokenLosses(
        objective=result.total,
        text_sum=torch.where(is_units_M, 0, losses_M).sum(),
        text_count=torch.where(is_units_M, 0, counts_M).sum(),
        units_sum=torch.where(is_units_M, losses_M, 0).sum(),
        units_count=torch.where(is_units_M, counts_M, 0).sum(),
        source_sums_S=zeros_S.index_add(0, source_M, losses_M),
        source_counts_S=zeros_S.index_add(0, source_M, counts_M),
        num_correct=(result.is_best_M & ~is_units_M).sum(),
        z_sum=(share_M * result.logsumexp_M.square()).sum(),
        z_count=share_M.sum(),
    )
