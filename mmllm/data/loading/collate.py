"""Documents to a `PackedBatch`.

Shapes: B sequences, T positions, K codebooks, N images, S slots, C clips, F frames, L target tokens a clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from mmllm.batch import IGNORE, PackedBatch
from mmllm.data.samples.document import Clip, Document, Picture, tile_places
from mmllm.data.samples.pointers import Pointer


@dataclass(frozen=True)
class Gap:
    """The place of a document that failed: padding of its length."""

    num_tokens: int


def pack_documents(
    sequences: Sequence[Sequence[Document | Gap]],
    sequence_length: int,
    sources: Sequence[Sequence[int]] | None = None,
    state: dict[str, Any] | None = None,
    token_multiple: int = 1,
) -> PackedBatch:
    """Lays each sequence's documents one after the other, and shifts their labels.

    At a frame of units, `labels_BT` holds codebook 0's id, also where that is the delay's filler (so that the
    end of a sound can be predicted); `audio_labels_BTK` ignores fillers.

    Args:
        sequences: B lists of documents.
        sequence_length: T.
        sources: Each document's source, in the same shape; by default 0.
        state: The plan's state after this batch.
        token_multiple: The tokens that the model sees are rounded up to it; see `SequenceMetadata.of`.

    Raises:
        ValueError: A sequence's documents don't fit, or they disagree in codebooks, image size or slots.
    """
    arrays = _Arrays(len(sequences), sequence_length, _num_codebooks(sequences))
    for row, documents in enumerate(sequences):
        used = sum(document.num_tokens for document in documents)
        if used > sequence_length:
            raise ValueError(f"sequence {row} has {used} tokens; sequence_length is {sequence_length}")
        start = 0
        for number, document in enumerate(documents):
            if isinstance(document, Document):
                arrays.add(row, start, number, document, sources[row][number] if sources else 0)
            start += document.num_tokens
    return arrays.batch(state or {}).with_metadata(token_multiple)


def _num_codebooks(sequences: Sequence[Sequence[Document | Gap]]) -> int:
    counts = {item.codes_TK.shape[1] for items in sequences for item in items if isinstance(item, Document)}
    if len(counts) > 1:
        raise ValueError(f"documents have {sorted(counts)} codebooks; build them with one tokenizer")
    return counts.pop() if counts else 0


class _Arrays:
    """The batch while it is filled."""

    def __init__(self, num_sequences: int, length: int, num_codebooks: int) -> None:
        shape = (num_sequences, length)
        self._length = length
        self._ids_BT = np.zeros(shape, dtype=np.int64)
        self._labels_BT = np.full(shape, IGNORE, dtype=np.int64)
        self._positions_BT = np.zeros(shape, dtype=np.int64)
        self._documents_BT = np.full(shape, -1, dtype=np.int64)
        self._modality_BT = np.zeros(shape, dtype=np.int64)
        self._sources_BT = np.full(shape, -1, dtype=np.int64)
        self._codes_BTK = np.full((*shape, num_codebooks), -1, dtype=np.int64)
        self._audio_labels_BTK = np.full((*shape, num_codebooks), IGNORE, dtype=np.int64)
        self._pictures: list[Picture] = []
        self._images: list[np.ndarray] = []
        self._features: list[np.ndarray] = []
        self._image_slots: list[np.ndarray] = []
        self._clips: list[Clip] = []
        self._clip_starts: list[int] = []
        self._pointers: list[tuple[int, int, Pointer]] = []

    def add(self, row: int, start: int, number: int, document: Document, source: int) -> None:
        num_tokens = document.num_tokens
        here = (row, slice(start, start + num_tokens))
        before = (row, slice(start, start + num_tokens - 1))
        self._ids_BT[here] = document.token_ids_T
        self._labels_BT[before] = np.where(document.targets_T[1:], document.token_ids_T[1:], IGNORE)
        self._positions_BT[here] = np.arange(num_tokens)
        self._documents_BT[here] = number
        self._modality_BT[here] = document.modality_T
        self._sources_BT[here] = source
        if document.has_units:
            codes_TK = document.codes_TK
            self._codes_BTK[here] = codes_TK
            is_label_TK = document.targets_T[1:, None] & (codes_TK[1:] >= 0) & (codes_TK[1:] < document.filler)
            self._audio_labels_BTK[before] = np.where(is_label_TK, codes_TK[1:], IGNORE)
        if document.pointer is not None:
            self._pointers.append((row, start, document.pointer))
        flat = row * self._length + start
        self._pictures += document.images
        for picture in document.images:
            if picture.features_SC is None:
                self._images.append(picture.pixels_3HW)
            else:
                self._features.append(picture.features_SC)
            self._image_slots.append(flat + picture.start + np.arange(picture.num_slots))
        for clip in document.clips:
            self._clips.append(clip)
            self._clip_starts.append(flat + clip.start)

    def batch(self, state: dict[str, Any]) -> PackedBatch:
        codes_CFK, slots_CS, targets_CL = self._padded_clips()
        if self._images and self._features:
            raise ValueError(
                f"{len(self._images)} pictures are pixels and {len(self._features)} stored features; read all alike"
            )
        batch = PackedBatch(
            token_ids_BT=torch.from_numpy(self._ids_BT),
            labels_BT=torch.from_numpy(self._labels_BT),
            positions_BT=torch.from_numpy(self._positions_BT),
            document_ids_BT=torch.from_numpy(self._documents_BT),
            modality_BT=torch.from_numpy(self._modality_BT),
            source_BT=torch.from_numpy(self._sources_BT),
            audio_codes_BTK=torch.from_numpy(self._codes_BTK),
            audio_labels_BTK=torch.from_numpy(self._audio_labels_BTK),
            images_NCHW=torch.from_numpy(_stacked(self._images, (0, 3, 0, 0), np.uint8, "image size")),
            image_slots_NS=torch.from_numpy(_stacked(self._image_slots, (0, 0), np.int64, "slots an image")),
            clip_codes_CFK=torch.from_numpy(codes_CFK),
            clip_slots_CS=torch.from_numpy(slots_CS),
            clip_targets_CL=torch.from_numpy(targets_CL),
            image_features_NPC=torch.from_numpy(_stacked(self._features, (0, 0, 0), np.float16, "features")),
            image_tiles_N3=torch.from_numpy(tile_places(self._pictures)),
            state=state,
        )
        return with_pointers(batch, self._pointers)

    def _padded_clips(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        clips = self._clips
        num_frames = max((len(clip.codes_FK) for clip in clips), default=0)
        num_slots = max((clip.num_slots for clip in clips), default=0)
        num_targets = max((len(clip.target_ids) for clip in clips), default=0)
        num_codebooks = clips[0].codes_FK.shape[1] if clips else self._codes_BTK.shape[2]
        codes_CFK = np.full((len(clips), num_frames, num_codebooks), -1, dtype=np.int64)
        slots_CS = np.full((len(clips), num_slots), -1, dtype=np.int64)
        targets_CL = np.full((len(clips), num_targets), -1, dtype=np.int64)
        for number, (clip, start) in enumerate(zip(clips, self._clip_starts, strict=True)):
            codes_CFK[number, : len(clip.codes_FK)] = clip.codes_FK
            slots_CS[number, : clip.num_slots] = start + np.arange(clip.num_slots)
            targets_CL[number, : len(clip.target_ids)] = clip.target_ids
        return codes_CFK, slots_CS, targets_CL


def with_pointers(batch: PackedBatch, pointers: Sequence[tuple[int, int, Pointer]]) -> PackedBatch:
    """The batch, saying where in their texts its documents are.

    Args:
        batch: without.
        pointers: of documents: in which row, from which position on, and what.
    """
    if not pointers:
        return batch
    joined = Pointer.join([pointer for _, _, pointer in pointers])
    shape = tuple(batch.token_ids_BT.shape)
    columns = {
        "pointer_BT": (np.full(shape, -1, dtype=np.int64), joined.places_T),
        "pointer_age_BT": (np.zeros(shape, dtype=np.int64), joined.ages_T),
        "advance_labels_BT": (np.full(shape, IGNORE, dtype=np.int64), joined.advances_T),
    }
    for array_BT, values_T in columns.values():
        used = 0
        for row, start, pointer in pointers:
            num_tokens = len(pointer.places_T)
            array_BT[row, start : start + num_tokens] = values_T[used : used + num_tokens]
            used += num_tokens
    fields = {name: torch.from_numpy(array_BT) for name, (array_BT, _) in columns.items()}
    return replace(batch, letters_L=torch.from_numpy(joined.letters_L), **fields)


def _stacked(items: list[np.ndarray], empty: tuple[int, ...], dtype: type, what: str) -> np.ndarray:
    if not items:
        return np.zeros(empty, dtype=dtype)
    shapes = {item.shape for item in items}
    if len(shapes) > 1:
        raise ValueError(f"pictures differ in {what}: {sorted(shapes)}; use one transform and one tokenizer")
    return np.stack(items)
