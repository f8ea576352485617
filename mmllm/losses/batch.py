"""Losses of a packed batch: from the model's hidden states to sums and counts.

Shapes: M targets, D width, V vocabulary, C clips, S slots a clip, L layers with experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.batch import IGNORE, PackedBatch, count_in_document
from mmllm.losses.cross_entropy import CrossEntropyBackend
from mmllm.losses.ctc import alignable, ctc_losses
from mmllm.losses.tokens import HeadLayout, TokenLosses, TokenTargets, TokenWeights, token_losses
from mmllm.model.embedding import Rows
from mmllm.model.multimodal import ModelConfig, ModelOutput, MultimodalModel
from mmllm.model.routing_stats import RoutingStats
from mmllm_tokenizers.vocab import ANSWER, SPECIAL_TOKENS

TASKS = ("text", "units")
"""The losses whose targets are counted together."""


@dataclass
class BatchLosses:
    """Sums and counts, not means, so that ranks and accumulated batches can be added."""

    objective: Tensor
    """Differentiable: text, units and the advance of pointers with all their weights, in nats; to be divided by
    `counts["task"]`, the number of text and unit targets."""
    ctc_sum: Tensor
    """Differentiable: of clips that can be aligned, each divided by its length; to be divided by `counts["ctc"]`."""
    sums: dict[str, Tensor]
    """Detached, to be reported: "text" and "units" (nats, without the config's weights), "task" (the objective), "ctc",
    "advance" (nats, where the model has a pointer), "head_z" (logsumexp² of the head, where it has a weight) and those
    of a mixture of depths. Routers' losses need the counts of all ranks: `mmllm.losses.routing`."""
    counts: dict[str, Tensor]
    """What each sum is divided by. "units": a frame counts 1 when all K codes are targets."""
    source_sums: Tensor
    """[num_sources] text and units together, detached."""
    source_counts: Tensor
    """[num_sources]."""
    num_correct: Tensor
    """Text targets whose logit is the largest."""
    num_ctc_left_out: Tensor
    """Clips whose transcript has no room in their slots."""
    routing: RoutingStats = field(repr=False)


class LossFunction:
    """The losses of one model's batches.

    Args:
        config: of the model.
        source_names: of the recipe's sources, in its order.
        num_sources: how many to tell apart where they have no names.
        text_weights: factors of the losses of text ids, see `word_weights`.
        answer_id: of `<|answer|>`, behind which answers stand.

    Raises:
        ValueError: a weight names a source or a codebook that there is not.
    """

    def __init__(
        self,
        config: ModelConfig,
        source_names: Sequence[str] = (),
        num_sources: int = 1,
        text_weights: Mapping[int, float] | None = None,
        answer_id: int = SPECIAL_TOKENS.index(ANSWER),
    ):
        self.num_sources = len(source_names) or num_sources
        self._answers, self._answer_id = config.loss.answers, answer_id
        audio, loss = config.audio, config.loss
        self._layout = HeadLayout(config.num_text)
        if audio is not None:
            self._layout = HeadLayout(config.num_text, audio.num_codebooks, audio.codebook_size, audio.audio_end_id)
        self._backend: CrossEntropyBackend = loss.cross_entropy
        self._weights = TokenWeights.of(loss, self._layout, source_names, self.num_sources, text_weights)

    def __call__(self, model: MultimodalModel, output: ModelOutput, batch: PackedBatch) -> BatchLosses:
        """Losses of a batch.

        Args:
            model: gives the heads.
            output: what it made of the batch.
            batch: gives the targets.
        """
        tokens = self._of_tokens(model, output, batch)
        advance, advance_sum, advance_count = self._of_pointers(model, output, batch)
        objective = tokens.objective + advance
        ctc_sum, num_clips, num_left_out = _ctc(model, output, batch)
        sums = {
            "text": tokens.text_sum,
            "units": tokens.units_sum,
            "task": objective.detach(),
            "ctc": ctc_sum.detach(),
        }
        counts = {"text": tokens.text_count, "units": tokens.units_count, "ctc": num_clips}
        counts["task"] = counts["text"] + counts["units"]
        if model.pointer is not None:
            sums["advance"], counts["advance"] = advance_sum, advance_count
        if self._weights.head_z_loss_coef:
            sums["head_z"], counts["head_z"] = tokens.z_sum, tokens.z_count
        depth = output.routing.depth
        if depth is not None:
            num_tokens = tokens.text_count.new_full((), depth.num_tokens)
            sums["depth"], counts["depth"] = depth.loss(1).detach(), num_tokens
            shares = {"depth_right": depth.num_right_L, "depth_passed": depth.num_passed_L}
            for name, num_L in shares.items():
                sums[name], counts[name] = num_L.to(num_tokens.dtype).mean(), num_tokens
        return BatchLosses(
            objective=objective + output.zero,
            ctc_sum=ctc_sum,
            sums=sums,
            counts=counts,
            source_sums=tokens.source_sums_S,
            source_counts=tokens.source_counts_S,
            num_correct=tokens.num_correct,
            num_ctc_left_out=num_left_out,
            routing=output.routing,
        )

    def targets(self, output: ModelOutput, batch: PackedBatch) -> tuple[TokenTargets, HeadLayout, Tensor]:
        """What a batch's text and units are predicted to be, how the head's ids lie, and the codebooks' weights [K]."""
        metadata = output.metadata
        positions_M = metadata.sequences.tokens_Q[metadata.targets_M]
        code_labels_BTK = batch.audio_labels_BTK
        if code_labels_BTK.shape[-1] == 0:  # a batch without a document knows no codebooks
            code_labels_BTK = code_labels_BTK.new_full((*batch.labels_BT.shape, self._layout.num_codebooks), IGNORE)
        targets = TokenTargets.of(
            batch.labels_BT, code_labels_BTK, batch.source_BT, positions_M, metadata.unit_targets_U
        )
        if self._weights.sources_S.device != output.hidden_QD.device:
            self._weights = self._weights.to(output.hidden_QD.device)
        return targets, self._layout, self._weights.codebooks_K

    def _of_tokens(self, model: MultimodalModel, output: ModelOutput, batch: PackedBatch) -> TokenLosses:
        metadata = output.metadata
        targets, _, _ = self.targets(output, batch)
        if self._answers != 1:
            positions_M = metadata.sequences.tokens_Q[metadata.targets_M]
            is_answer_M = answer_targets(batch, self._answer_id).flatten()[positions_M]
            targets = targets._replace(factor_M=torch.where(is_answer_M, self._answers, 1.0))
        hidden_MD = output.hidden_QD.index_select(0, metadata.targets_M)

        def reduce(hidden_MD: Tensor, weight_VD: Rows) -> TokenLosses:
            return token_losses(hidden_MD, weight_VD, targets, self._layout, self._weights, backend=self._backend)

        return model.decoder.lm_head(hidden_MD, reduce)

    def _of_pointers(
        self, model: MultimodalModel, output: ModelOutput, batch: PackedBatch
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the advances add to the objective; their sum in nats without weights, detached, and their number."""
        advances_A, sequences = output.metadata.advances_A, output.metadata.sequences
        zero = output.hidden_QD.new_zeros((), dtype=torch.promote_types(output.hidden_QD.dtype, torch.float32))
        if model.pointer is None or not len(advances_A):
            return zero, zero, zero
        positions_A = sequences.tokens_Q[advances_A]
        logits_AJ = model.pointer.advance_head(output.hidden_QD.index_select(0, advances_A)).to(zero.dtype)
        losses_A = F.cross_entropy(logits_AJ, batch.advance_labels_BT.flatten()[positions_A], reduction="none")
        weights_A = self._weights.sources_S[batch.source_BT.flatten()[positions_A].clamp(min=0)].to(zero.dtype)
        weighted = model.config.loss.advance * (losses_A * weights_A).sum()
        return weighted, losses_A.detach().sum(), zero + len(advances_A)


def answer_targets(batch: PackedBatch, answer_id: int) -> Tensor:
    """Which positions have a target of an answer: those from `<|answer|>` to their document's end, bool [B, T]."""
    is_answer_BT = (batch.token_ids_BT == answer_id) & (batch.document_ids_BT >= 0)
    return (count_in_document(is_answer_BT, batch.positions_BT) > 0) & (batch.document_ids_BT >= 0)


def _ctc(model: MultimodalModel, output: ModelOutput, batch: PackedBatch) -> tuple[Tensor, Tensor, Tensor]:
    """The sum over clips that can be aligned, their number, and how many can't: the host knows which these are."""
    media = output.metadata.media
    wide = torch.promote_types(output.hidden_QD.dtype, torch.float32)
    zero = output.hidden_QD.new_zeros((), dtype=wide)
    if model.ctc_head is None:
        return zero, zero, zero
    if output.clips_CSD is None:
        return _through(model.ctc_head, output.hidden_QD, zero), zero, zero
    rows, left_out = alignable(zip(media.clip_slots, media.clip_targets, media.clip_repeats, strict=True))
    num_left_out = zero + left_out
    if not rows:
        return _through(model.ctc_head, output.hidden_QD, zero), zero, num_left_out
    slots, targets = ([each[row] for row in rows] for each in (media.clip_slots, media.clip_targets))
    rows_R = torch.tensor(rows).to(zero.device, non_blocking=True)
    log_probs_RSV = model.ctc_head(output.clips_CSD.index_select(0, rows_R)).to(wide).log_softmax(dim=-1)
    targets_RL = batch.clip_targets_CL.index_select(0, rows_R)
    assert model.config.audio is not None
    pad_id = model.config.audio.pad_id
    losses_R = ctc_losses(log_probs_RSV, targets_RL, slots, targets, blank=pad_id)
    shares_R = torch.tensor([1 / each for each in targets], dtype=wide).to(zero.device, non_blocking=True)
    return (losses_R * shares_R).sum(), zero + len(rows), num_left_out


def _through(ctc_head: nn.Module, hidden_QD: Tensor, zero: Tensor) -> Tensor:
    """0 by way of the head: where it is sharded, ranks that have clips gather its weights with those that have none.

    Its input has a gradient as clips have: else its own gradients were reduced later than on ranks with clips.
    """
    nothing_11D = hidden_QD.new_zeros(1, 1, hidden_QD.shape[1]) + hidden_QD.sum() * 0.0
    return zero + ctc_head(nothing_11D).sum().to(zero) * 0.0
