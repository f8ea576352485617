"""What a batch's device would otherwise have to ask the host for: where documents, targets and frames are.

Made on the host, where the batch is put together, and carried with it: between forward and the optimizer's step nothing
waits for the device. Imports torch and NumPy only.

Shapes: B sequences, T positions, N real tokens of the whole batch in order, Q with filler behind them, S documents, P
rows of the padded blocks, M targets, U of them with unit targets, F frames of units, C clips, R clip slots, W positions
with a pointer, A of them that predict how far it advances.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

MIN_BLOCK = 32
"""Documents up to this length share a block, whatever their lengths."""


@dataclass(frozen=True)
class SequenceMetadata:
    """Documents of a packed batch, padding removed. Tensors may be on a device; the other fields are the host's.

    Attention over blocks runs on [documents, length] with a plain causal mask: documents of like length share a block,
    right-padded to its longest. A real query never looks right, so the padding needs no mask, no document can see
    another, and short documents never pay for a T x T product.
    """

    num_tokens: int
    """N."""
    lengths: tuple[int, ...]
    """Tokens of each document; filler, if any, is the last one."""
    tokens_Q: Tensor
    """int64 flat indices into B·T of the positions that are not padding; behind them, as filler, some that are."""
    cu_seqlens: Tensor
    """int32 [S + 1]: where each document begins in the Q tokens, and Q."""
    gather_P: Tensor
    """int64, for each row of the blocks the token in [0, Q) that it holds (any token in padding)."""
    scatter_Q: Tensor
    """int64, the row of the blocks where each token lies."""
    blocks: tuple[tuple[int, int], ...]
    """(number of documents, their padded length) of each block, in the order of the rows."""
    num_prompt: tuple[int, ...] | None = None
    """Of each document the tokens before the position that predicts its first target, which is at most its last; None:
    the targets aren't known here."""

    @property
    def max_seqlen(self) -> int:
        """Tokens of the longest document."""
        return max(self.lengths, default=0)

    @property
    def size(self) -> int:
        """Q."""
        return self.tokens_Q.shape[0]

    @classmethod
    def of(cls, document_ids_BT: Tensor, multiple: int = 1) -> SequenceMetadata:
        """Finds the documents; they must be contiguous, with padding marked -1.

        Args:
            document_ids_BT: on the host; on a device it is copied from there, which waits for it.
            multiple: Q is rounded up to it by filler, as far as there is padding: few different shapes, for compilers.
                Filler is a document of its own; it is in no count.
        """
        device = document_ids_BT.device
        ids_BT = document_ids_BT.cpu()
        num_sequences, num_positions = ids_BT.shape
        row_B1 = torch.arange(num_sequences)[:, None]
        is_token = (ids_BT >= 0).flatten()
        tokens_N = is_token.nonzero().squeeze(1)
        keys_N = (ids_BT + row_B1 * (num_positions + 1)).flatten()[tokens_N]
        _, lengths_S = keys_N.unique_consecutive(return_counts=True)
        num_filler = min(-len(tokens_N) % multiple, len(is_token) - len(tokens_N))
        if num_filler:
            filler = (~is_token).nonzero().squeeze(1)[:num_filler]
            tokens_N = torch.cat([tokens_N, filler])
            lengths_S = torch.cat([lengths_S, lengths_S.new_tensor([num_filler])])
        cu_seqlens = torch.zeros(len(lengths_S) + 1, dtype=torch.int32)
        cu_seqlens[1:] = lengths_S.cumsum(0)
        gather_P, scatter_Q, blocks = _laid_out(tuple(lengths_S.tolist()))
        made = cls(
            num_tokens=len(tokens_N) - num_filler,
            lengths=tuple(lengths_S.tolist()),
            tokens_Q=tokens_N,
            cu_seqlens=cu_seqlens,
            gather_P=gather_P,
            scatter_Q=scatter_Q,
            blocks=blocks,
        )
        return made if device.type == "cpu" else made.map(lambda tensor: tensor.to(device))

    @classmethod
    def of_lengths(cls, lengths: tuple[int, ...], tokens_Q: Tensor) -> SequenceMetadata:
        """Documents of known lengths, without filler.

        Args:
            lengths: of each document, all above 0.
            tokens_Q: where their tokens are, one document after the other; the tensors go to its device.
        """
        gather_P, scatter_Q, blocks = _laid_out(lengths)
        cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        device = tokens_Q.device
        moved = (tensor.to(device, non_blocking=True) for tensor in (cu_seqlens, gather_P, scatter_Q))
        return cls(sum(lengths), lengths, tokens_Q, *moved, blocks)  # pyright: ignore[reportCallIssue]

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With `function` of each tensor."""
        return _mapped(self, function)


@dataclass(frozen=True)
class MediaMetadata:
    """Where a batch's frames of units and clips are."""

    frames_F: Tensor
    """int64 flat indices into B·T of frames of units."""
    clip_slots_R: Tensor
    """int64, indices into the C·S clip slots of those that are slots, not padding."""
    clip_frames: tuple[int, ...]
    """Frames of each clip that is heard."""
    clip_slots: tuple[int, ...]
    """Slots of each."""
    clip_targets: tuple[int, ...]
    """Tokens that are said in each; 0 where that isn't known."""
    clip_repeats: tuple[int, ...]
    """How many of them equal the one before: CTC needs a slot more for each."""
    pointers_W: Tensor
    """int64 flat indices into B·T of positions with a pointer into what is said."""

    @classmethod
    def of(
        cls,
        is_frame_BT: Tensor,
        clip_slots_CS: Tensor,
        clip_codes_CFK: Tensor,
        clip_targets_CL: Tensor,
        has_pointer_BT: Tensor,
    ) -> MediaMetadata:
        """Looks at tensors of a `PackedBatch`; those on a device are waited for.

        Args:
            is_frame_BT: bool, which positions are frames of units.
            clip_slots_CS: -1 pads.
            clip_codes_CFK: -1 pads.
            clip_targets_CL: -1 pads.
            has_pointer_BT: bool; [0, 0]: nowhere.
        """
        is_slot_CS, is_target_CL = clip_slots_CS >= 0, clip_targets_CL >= 0
        repeats_CL = (clip_targets_CL[:, 1:] == clip_targets_CL[:, :-1]) & is_target_CL[:, 1:]
        return cls(
            frames_F=is_frame_BT.flatten().nonzero().squeeze(1),
            clip_slots_R=is_slot_CS.flatten().nonzero().squeeze(1),
            clip_frames=clip_frames(clip_codes_CFK),
            clip_slots=tuple(is_slot_CS.sum(dim=1).tolist()),
            clip_targets=tuple(is_target_CL.sum(dim=1).tolist()),
            clip_repeats=tuple(repeats_CL.sum(dim=1).tolist()),
            pointers_W=has_pointer_BT.flatten().nonzero().squeeze(1),
        )

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With `function` of each tensor."""
        return _mapped(self, function)


@dataclass(frozen=True)
class BatchMetadata:
    """A batch's documents, targets, frames of units and clips."""

    sequences: SequenceMetadata
    media: MediaMetadata
    targets_M: Tensor
    """int64, indices into the N tokens of those that predict something: a label, or a code of a unit's frame."""
    unit_targets_U: Tensor
    """int64, indices into the M targets of those that predict codes of codebooks above the first."""
    advances_A: Tensor
    """int64, indices into the N tokens of those that predict how far a pointer advances."""

    @classmethod
    def of(
        cls,
        sequences: SequenceMetadata,
        media: MediaMetadata,
        is_label_BT: Tensor,
        is_code_label_BTK: Tensor,
        is_advance_BT: Tensor,
    ) -> BatchMetadata:
        """Finds the targets; all tensors are on the host.

        Args:
            sequences: the documents.
            media: frames and clips.
            is_label_BT: bool, where `labels_BT` has a target.
            is_code_label_BTK: bool, where `audio_labels_BTK` has one.
            is_advance_BT: bool, where `advance_labels_BT` has one; [0, 0]: nowhere.
        """
        tokens_N = sequences.tokens_Q[: sequences.num_tokens]
        has_codes_NK = is_code_label_BTK.flatten(0, 1)[tokens_N]
        targets_M = (is_label_BT.flatten()[tokens_N] | has_codes_NK.any(dim=-1)).nonzero().squeeze(1)
        unit_targets_U = has_codes_NK[targets_M, 1:].any(dim=-1).nonzero().squeeze(1)
        sequences = replace(sequences, num_prompt=_num_prompt(sequences.lengths, targets_M.numpy()))
        advances_A = torch.zeros(0, dtype=torch.int64)
        if is_advance_BT.numel():
            advances_A = is_advance_BT.flatten()[tokens_N].nonzero().squeeze(1)
        return cls(sequences, media, targets_M, unit_targets_U, advances_A)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """With `function` of each tensor."""
        mapped = _mapped(self, function)
        return replace(mapped, sequences=self.sequences.map(function), media=self.media.map(function))


def _num_prompt(lengths: Sequence[int], targets_M: np.ndarray) -> tuple[int, ...]:
    """Of each document the tokens before its first target's position, or before its last one where it has none."""
    ends_S = np.cumsum(lengths, dtype=np.int64)
    starts_S = ends_S - np.asarray(lengths, dtype=np.int64)
    padded = np.append(targets_M, ends_S[-1:])
    firsts_S = padded[np.searchsorted(targets_M, starts_S)] if len(ends_S) else starts_S
    return tuple((np.minimum(firsts_S, ends_S - 1) - starts_S).tolist())


def clip_frames(clip_codes_CFK: Tensor) -> tuple[int, ...]:
    """Frames of each clip; codes on a device are waited for."""
    if not clip_codes_CFK.shape[-1]:
        return (0,) * len(clip_codes_CFK)
    return tuple((clip_codes_CFK[..., 0] >= 0).sum(dim=1).tolist())


def _laid_out(lengths: Sequence[int]) -> tuple[Tensor, Tensor, tuple[tuple[int, int], ...]]:
    """`gather_P`, `scatter_Q` and `blocks` of documents one after the other. In NumPy: nothing here is on a device."""
    lengths_S = np.array(lengths, dtype=np.int64)
    starts_S = lengths_S.cumsum() - lengths_S
    order_S = lengths_S.argsort(kind="stable")
    blocks = _blocks(lengths_S[order_S].tolist())
    padded_S = np.array([length for count, length in blocks for _ in range(count)], dtype=np.int64)
    row_starts_S = padded_S.cumsum() - padded_S
    document_P = np.repeat(np.arange(len(padded_S)), padded_S)
    offset_P = np.arange(len(document_P)) - row_starts_S[document_P]
    gather_P = starts_S[order_S][document_P] + np.minimum(offset_P, lengths_S[order_S][document_P] - 1)
    first_row_S = np.empty_like(starts_S)
    first_row_S[order_S] = row_starts_S
    document_Q = np.repeat(np.arange(len(lengths_S)), lengths_S)
    scatter_Q = first_row_S[document_Q] + np.arange(len(document_Q)) - starts_S[document_Q]
    return torch.from_numpy(gather_P), torch.from_numpy(scatter_Q), blocks


def _blocks(sorted_lengths: list[int]) -> tuple[tuple[int, int], ...]:
    """Documents whose lengths round up to one power of two share a block."""
    blocks: list[tuple[int, int]] = []
    previous = 0
    for length in sorted_lengths:
        size = max(MIN_BLOCK, 1 << (length - 1).bit_length())
        count = blocks.pop()[0] if size == previous else 0
        blocks.append((count + 1, length))
        previous = size
    return tuple(blocks)


def _mapped(metadata, function: Callable[[Tensor], Tensor]):
    values = {field.name: getattr(metadata, field.name) for field in fields(metadata)}
    return replace(metadata, **{name: function(v) for name, v in values.items() if isinstance(v, Tensor)})
