"""The typed contracts in which data, model, training and inference meet.

Shapes: B sequences, T positions, K codebooks, N images or tiles of them, S slots an image or a clip, P features an
image, C clips (of features: channels), F frames a clip, L target tokens a clip, or letters of all texts that
are spoken, H and W pixels. Of a `CaptionBatch` N pairs, L text tokens; of a `SoundBatch` N rows, T samples; of an
`AnswerBatch` A answers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any, Self

import torch
from torch import Tensor

from mmllm.sequences import BatchMetadata, MediaMetadata, SequenceMetadata

IGNORE = -100
"""Label of a position that is no target (`torch.nn.functional.cross_entropy`'s default)."""


LETTER_GAP = 8
"""How many places behind a text's letters hold none, so that none sees another's: as far as a window may reach."""


class Modality(IntEnum):
    """What a position holds; also the key under which losses and expert load are reported."""

    TEXT = 0
    IMAGE = 1
    AUDIO = 2
    """An input-only `<|audio|>` slot: several pooled frames of a clip that is heard."""
    UNITS = 3
    """A frame of units that is (or was) predicted: speech that is spoken."""


class Batch:
    """What batches have in common: a dataclass of tensors, and a state that is no tensor."""

    state: dict[str, Any]
    """The plan's state *after* this batch: what resuming needs. Small and JSON-serializable. Its `errors` name the
    documents that failed, if any."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The batch with every tensor on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The batch in pinned memory; `torch.utils.data.DataLoader` calls this by name."""
        return self.map(lambda tensor: tensor.pin_memory())

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The batch with `function` of every tensor."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}  # pyright: ignore
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = function(value)
            elif isinstance(value, BatchMetadata | Batch):
                values[name] = value.map(function)
        return type(self)(**values)


@dataclass
class PackedBatch(Batch):
    """B packed sequences of T positions, with the images and sounds that they hold.

    Every document's positions are contiguous, attend only to each other, and restart at zero.
    Nothing here is padded to a dense T x T mask: boundaries travel as `document_ids_BT`.
    """

    token_ids_BT: Tensor
    """int64. At a frame of units: the id of codebook 0's unit. At slots: `<|image|>`, `<|audio|>`."""
    labels_BT: Tensor
    """int64, already shifted: `labels[b, t]` is the target of `logits[b, t]`; `IGNORE` where none."""
    positions_BT: Tensor
    """int64, restarts at 0 with each document; 0 in padding."""
    document_ids_BT: Tensor
    """int64, ascending from 0 within a sequence; -1 for padding."""
    modality_BT: Tensor
    """int64, a `Modality`."""
    source_BT: Tensor
    """int64, index of the recipe's source; -1 for padding."""
    audio_codes_BTK: Tensor
    """int64, the frame's codes after the codebook pattern (filler = codebook size); -1: no sound here."""
    audio_labels_BTK: Tensor
    """int64, already shifted like `labels_BT`: targets of all K codebooks (column 0 repeats, as a
    code, what `labels_BT` holds as a token id); `IGNORE` where none and at fillers."""
    images_NCHW: Tensor
    """uint8 [N, 3, H, W], transformed to the tower's input size: pictures, or one after the other all tiles of those
    that are cut; N may be 0, and is where features stand in."""
    image_slots_NS: Tensor
    """int64 flat indices into B·T of each image's (or tile's) S slots."""
    clip_codes_CFK: Tensor
    """int64 codes of the sounds that are heard, unpatterned; -1 pads short clips; C may be 0."""
    clip_slots_CS: Tensor
    """int64 flat indices into B·T of each clip's slots, S = ceil(F / pool); -1 pads."""
    clip_targets_CL: Tensor
    """int64 token ids spoken in the clip, for the auxiliary CTC loss; -1 pads; all -1: unknown."""
    image_features_NPC: Tensor = field(default_factory=lambda: torch.zeros(0, 0, 0, dtype=torch.float16))
    """float16: what a frozen tower gives for each image, before the projector, as it was stored with the sample. It
    stands in for `images_NCHW`; [0, 0, 0] otherwise."""
    image_tiles_N3: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int64))
    """int64: of each of `images_NCHW` the number of its picture (ascending), and its row and column in it from 1; those
    of a whole picture are 0. [0, 3]: no picture is cut."""
    letters_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    """int64 bytes of all texts that are spoken, with `LETTER_GAP` times -1 behind each."""
    pointer_BT: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """int64: the letter, as an index into `letters_L`, that is said by the frame which is predicted here; -1: none.
    [0, 0]: no speech has a pointer; so are the next two."""
    pointer_age_BT: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """int64: frames before that one which said the same letter."""
    advance_labels_BT: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    """int64: how many letters further the frame behind that one is (the end is one behind the last); `IGNORE`: none."""
    state: dict[str, Any] = field(default_factory=dict)
    metadata: BatchMetadata | None = None
    """What the device would ask the host for; None: whoever needs it makes it, and on a device waits for that."""

    @property
    def num_documents(self) -> int:
        """Those that are whole: where an id begins."""
        ids_BT = self.document_ids_BT
        begins_BT = ids_BT[:, 1:] != ids_BT[:, :-1]
        return int((ids_BT[:, :1] >= 0).sum() + (begins_BT & (ids_BT[:, 1:] >= 0)).sum())

    def media_metadata(self) -> MediaMetadata:
        """Where frames of units and clips are."""
        if self.metadata is not None:
            return self.metadata.media
        is_frame_BT = self.modality_BT == Modality.UNITS
        return MediaMetadata.of(
            is_frame_BT, self.clip_slots_CS, self.clip_codes_CFK, self.clip_targets_CL, self.pointer_BT >= 0
        )

    def with_metadata(self, multiple: int = 1) -> PackedBatch:
        """Itself, if it has its metadata, or a copy that has.

        Args:
            multiple: tokens are rounded up to it; see `SequenceMetadata.of`.
        """
        if self.metadata is not None:
            return self
        device = self.document_ids_BT.device
        host = self if device.type == "cpu" else self.to("cpu")
        metadata = BatchMetadata.of(
            SequenceMetadata.of(host.document_ids_BT, multiple),
            host.media_metadata(),
            host.labels_BT != IGNORE,
            host.audio_labels_BTK != IGNORE,
            host.advance_labels_BT != IGNORE,
        )
        return replace(self, metadata=metadata.map(lambda tensor: tensor.to(device)))

    @property
    def num_images(self) -> int:
        """N: pictures, or tiles of them."""
        return len(self.images_NCHW) + len(self.image_features_NPC)


def count_in_document(is_marked_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """How many positions are marked from a document's beginning up to each of its positions, itself included, [B, T].

    Args:
        is_marked_BT: bool.
        positions_BT: as in `PackedBatch`: 0 where a document begins.
    """
    count_BT = is_marked_BT.long().cumsum(dim=1)
    before_BT = torch.where(positions_BT == 0, count_BT - is_marked_BT.long(), 0).cummax(dim=1).values
    return count_BT - before_BT


@dataclass
class AnswerBatch(Batch):
    """Packed answers that are compared or rewarded."""

    packed: PackedBatch
    """Each answer with its prompt is a document; the answers' own tokens alone are targets."""
    answer_BT: Tensor
    """int64, shifted like `labels_BT`: which answer the target here belongs to; -1: none."""
    last_A: Tensor
    """int64 flat index into B·T of each answer's last own token (its end): where a reward head reads."""
    group_A: Tensor
    """int64: the pair or the prompt that the answer belongs to."""
    is_chosen_A: Tensor
    """bool: the side that is preferred, or liked."""
    reference_A: Tensor
    """float32: each answer's log-probability by the reference, in nats, where it was stored; else [0]."""
    margin_A: Tensor
    """float32: of a pair, by how much the chosen side is better, as its row says; else 0."""
    replay: PackedBatch | None = None
    """Documents of the usual data, whose usual loss is added."""
    mismatched: AnswerBatch | None = None
    """Of KTO: answers behind prompts that aren't theirs."""
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def num_answers(self) -> int:
        """A."""
        return len(self.last_A)

    @property
    def num_documents(self) -> int:
        """Answers, and documents of the replay."""
        return self.packed.num_documents + (0 if self.replay is None else self.replay.num_documents)


@dataclass
class CaptionBatch(Batch):
    """N pictures with their captions, for CLIP."""

    images_N3HW: Tensor
    """uint8; black where there is no pair."""
    token_ids_NL: Tensor
    """int64: the caption's tokens, `<|end|>`, padding."""
    is_pair_N: Tensor
    """bool. False: the row's sample failed, or there was none left for it; it counts in no loss and no score."""
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def num_documents(self) -> int:
        """Pairs that are there."""
        return int(self.is_pair_N.sum())


@dataclass
class SoundBatch(Batch):
    """N rows of sound, for the codec. A row of which a clip failed is left out: N may be less than planned, or 0."""

    waves_N1T: Tensor
    """float32 in [-1, 1]."""
    texts: list[str] | None
    """What is said in each row, "" where it isn't known whole; None: nobody asked."""
    num_documents: int
    """Clips that were read for it, also for rows that were left out."""
    state: dict[str, Any] = field(default_factory=dict)
