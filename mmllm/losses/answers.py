"""Log-probabilities of answers: of each target by itself, as the engine that draws answers has them.

A policy that is trained on what it drew must be the policy that drew it. So text is a softmax over the ids of text
alone, a unit one over its own codebook's units, and what is forced (a filler, the end of a speech whose pointer says
when it is over) has probability 1.

Shapes: B sequences, T positions, D width, V vocabulary, M targets, R of them in a chunk, K codebooks, C ids of a
codebook, A answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from mmllm.batch import IGNORE, AnswerBatch, Modality
from mmllm.losses.chunked import chunks
from mmllm.losses.cross_entropy import CHUNK_BYTES, GPU_CHUNK_BYTES
from mmllm.model.embedding import Rows, joined
from mmllm.model.multimodal import ModelOutput, MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import AUDIO_END


@dataclass(frozen=True)
class UnitLayout:
    """How units follow each other, which the model's config doesn't say.

    Attributes:
        end_id: what codebook 0 draws where a speech ends, if no pointer says so: `<|audio_end|>`, or under the delay
            pattern its filler.
        num_turns: codebooks that take turns in one stream ("flatten"); else 1.
    """

    end_id: int
    num_turns: int = 1

    @staticmethod
    def of(folder: TokenizerFolder) -> UnitLayout | None:
        """Of a tokenizer folder; None: it has no units."""
        vocabulary = folder.vocabulary
        if not vocabulary.num_codebooks:
            return None
        is_delayed = folder.pattern == "delay" and vocabulary.num_codebooks > 1
        end_id = vocabulary.codebook_start(0) + vocabulary.filler if is_delayed else folder.id(AUDIO_END)
        return UnitLayout(end_id, folder.num_codebooks if folder.pattern == "flatten" else 1)


class TargetLogprobs(NamedTuple):
    """Of each target of a batch, in the order of their positions."""

    logprobs_M: Tensor
    """Nats, float32 or wider, differentiable; of a frame of units the sum over its codebooks."""
    answer_M: Tensor
    """int64: the answer it belongs to; -1: none."""
    places_M: Tensor
    """int64 flat index into B·T of the position that predicts it."""
    entropy_M: Tensor | None = None
    """Nats, detached, of the same distributions; None: not asked for."""


def target_logprobs(
    model: MultimodalModel,
    output: ModelOutput,
    batch: AnswerBatch,
    *,
    layout: UnitLayout | None = None,
    forbidden_V: Tensor | None = None,
    temperature: float = 1.0,
    with_entropy: bool = False,
    chunk_bytes: int | None = None,
) -> TargetLogprobs:
    """Log-probabilities of a batch's targets, differentiable; the logits of all targets never exist together.

    Parameters that the batch didn't use get no gradient from here: add `output.zero` to the loss. How far a pointer
    advances is no part of it: the engine doesn't draw that from the model's distribution, but moves when a letter has
    lasted long enough.

    Args:
        model: gives the head.
        output: what it made of `batch.packed`.
        batch: gives the targets.
        layout: of the units; may be left out where the batch has none.
        forbidden_V: bool, ids of text that are never drawn (`TextRules.mask_V` is -inf there); a target among them has
            a log-probability of -inf. None: all may be.
        temperature: the logits are divided by it.
        with_entropy: also of the distributions.
        chunk_bytes: bound of a chunk's logits; None: by the device.

    Raises:
        ValueError: the batch has units and `layout` is None, `temperature` is not positive, or the head is split over
            ranks.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; log-probabilities need a positive one")
    packed, metadata = batch.packed, output.metadata
    has_units = len(metadata.media.frames_F) > 0
    if has_units and layout is None:
        raise ValueError("the batch has units; give target_logprobs the `UnitLayout.of` their tokenizer folder")
    places_M = metadata.sequences.tokens_Q[metadata.targets_M]
    labels_M = packed.labels_BT.flatten()[places_M]
    codes_MK = packed.audio_labels_BTK.flatten(0, 1)[places_M]
    inputs_M, modality_M = packed.token_ids_BT.flatten()[places_M], packed.modality_BT.flatten()[places_M]
    kinds = _Kinds(model, layout if has_units else None, forbidden_V, temperature, with_entropy)
    if chunk_bytes is None:
        chunk_bytes = CHUNK_BYTES.get(labels_M.device.type, GPU_CHUNK_BYTES)

    def reduce(hidden_MD: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        weight_VD = joined(rows)
        if isinstance(weight_VD, DTensor):
            raise ValueError(
                "log-probabilities of answers need the head's weight in one piece, but strategy.tensor splits it; set "
                "strategy.tensor to 1 (fsdp shards it all the same)"
            )
        targets = (labels_M, codes_MK, inputs_M, modality_M)
        return _by_chunks(kinds, chunk_bytes, hidden_MD, weight_VD, *targets)

    hidden_MD = output.hidden_QD.index_select(0, metadata.targets_M)
    logprobs_M, entropy_M = model.decoder.lm_head(hidden_MD, reduce)
    answer_M = batch.answer_BT.flatten()[places_M]
    return TargetLogprobs(logprobs_M, answer_M, places_M, entropy_M.detach() if with_entropy else None)


def sum_by_answer(values_M: Tensor, answer_M: Tensor, num_answers: int) -> Tensor:
    """[A]: the sum of each answer's values; those that belong to none are left out."""
    sums_A1 = values_M.new_zeros(num_answers + 1)
    return sums_A1.index_add(0, torch.where(answer_M >= 0, answer_M, num_answers), values_M)[:num_answers]


def _by_chunks(
    kinds: _Kinds, chunk_bytes: int, hidden_MD: Tensor, weight_VD: Tensor, *targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Chunk by chunk, each computed again when its gradient is wanted."""
    row_bytes = max(kinds.num_text, kinds.num_units) * 4
    parts = list(chunks(len(hidden_MD), row_bytes, chunk_bytes)) or [slice(0, 0)]
    results = []
    for part in parts:
        args = (hidden_MD[part], weight_VD, *(target[part] for target in targets))
        if len(parts) > 1 and torch.is_grad_enabled():
            results.append(checkpoint(kinds, *args, use_reentrant=False, preserve_rng_state=False))
        else:
            results.append(kinds(*args))
    logprobs, entropies = zip(*results, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


class _Kinds:
    """Log-probabilities and entropies of targets of all kinds."""

    def __init__(
        self,
        model: MultimodalModel,
        layout: UnitLayout | None,
        forbidden_V: Tensor | None,
        temperature: float,
        with_entropy: bool,
    ) -> None:
        config = model.config
        self.num_text, self.num_units = config.num_text, 0
        self._layout, self._temperature, self._with_entropy = layout, temperature, with_entropy
        self._has_pointer = model.pointer is not None
        self._mask_V = None
        if forbidden_V is not None:
            self._mask_V = torch.zeros(self.num_text, device=forbidden_V.device).masked_fill(forbidden_V, -torch.inf)
        if config.audio is not None and layout is not None:
            self.num_units, self._audio_end_id = config.audio.codebook_size, config.audio.audio_end_id

    def __call__(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        codes_RK: Tensor,
        inputs_R: Tensor,
        modality_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        is_unit_R = (labels_R >= self.num_text) | (labels_R == IGNORE)
        if self._layout is not None:  # the end of a speech follows its units
            is_unit_R = is_unit_R | ((labels_R == self._audio_end_id) & (modality_R == Modality.UNITS))

        def mask_text(logits_RV: Tensor) -> Tensor:
            return logits_RV if self._mask_V is None else logits_RV + self._mask_V.to(logits_RV)

        text_ids_R = torch.where(is_unit_R, IGNORE, labels_R)
        logprobs_R, entropy_R = self._of(hidden_RD, weight_VD[: self.num_text], text_ids_R, mask_text)
        if self._layout is None:
            return logprobs_R, entropy_R
        of_first = self._of_first(hidden_RD, weight_VD, labels_R, is_unit_R, inputs_R, modality_R)
        logprobs_R, entropy_R = logprobs_R + of_first[0], entropy_R + of_first[1]
        block = self.num_units + 1
        for codebook in range(1, codes_RK.shape[1]):
            start = self.num_text + codebook * block
            rows_CD = weight_VD[start : start + self.num_units]
            more = self._of(hidden_RD, rows_CD, codes_RK[:, codebook])
            logprobs_R, entropy_R = logprobs_R + more[0], entropy_R + more[1]
        return logprobs_R, entropy_R

    def _of_first(
        self,
        hidden_RD: Tensor,
        weight_VD: Tensor,
        labels_R: Tensor,
        is_unit_R: Tensor,
        inputs_R: Tensor,
        modality_R: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Of codebook 0, whose last column here is the speech's end; when flat, of the codebook whose turn it is."""
        assert self._layout is not None
        end_id, size = self._layout.end_id, self.num_units // self._layout.num_turns
        filler_id = self.num_text + self.num_units
        code_R = labels_R - self.num_text
        is_code_R = is_unit_R & (code_R >= 0) & (code_R < self.num_units)
        # Behind a filler only fillers and the end follow: they are forced, as all ends are where there is a pointer.
        is_end_R = is_unit_R & (labels_R == end_id) & (inputs_R != filler_id)
        if self._has_pointer:
            is_end_R = torch.zeros_like(is_end_R)
        index_R = torch.where(is_code_R, code_R, torch.where(is_end_R, self.num_units, IGNORE))
        turn_R = torch.where(is_code_R, code_R // size, 0)
        may_end_R = (modality_R == Modality.UNITS) & (turn_R == 0) & (not self._has_pointer)

        def mask(logits_RC: Tensor) -> Tensor:
            turns_C = torch.arange(self.num_units, device=logits_RC.device) // size
            may_draw_RC = torch.cat([turns_C == turn_R[:, None], may_end_R[:, None]], dim=1)
            return logits_RC.masked_fill(~may_draw_RC, -torch.inf)

        units_CD = weight_VD[self.num_text : filler_id]
        return self._of(hidden_RD, torch.cat([units_CD, weight_VD[end_id : end_id + 1]]), index_R, mask)

    def _of(
        self,
        hidden_RD: Tensor,
        rows_CD: Tensor,
        index_R: Tensor,
        mask: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Of one softmax over some rows of the head; 0 where the index is `IGNORE`."""
        logits_RC = F.linear(hidden_RD, rows_CD)
        logits_RC = logits_RC.to(torch.promote_types(logits_RC.dtype, torch.float32))
        if mask is not None:
            logits_RC = mask(logits_RC)
        if self._temperature != 1:
            logits_RC = logits_RC / self._temperature
        log_RC = logits_RC.log_softmax(dim=-1)
        has_index_R = index_R != IGNORE
        chosen_R = log_RC.gather(1, torch.where(has_index_R, index_R, 0)[:, None]).squeeze(1)
        # Id 0 may be forbidden: -inf is replaced before it could be multiplied by a gradient of 0.
        logprobs_R = torch.where(has_index_R, chosen_R, 0)
        entropy_R = torch.zeros_like(logprobs_R)
        if self._with_entropy:
            log_RC = log_RC.detach()
            terms_RC = torch.where(log_RC == -torch.inf, 0, log_RC.exp() * log_RC)
            entropy_R = torch.where(has_index_R, -terms_RC.sum(dim=1), 0)
        return logprobs_R, entropy_R
