"""Prompts as a batch that can be continued: padded on the left, so that every row ends where it goes on.

Shapes: B rows, T positions, K codebooks, N images, S slots, C clips, F frames, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import IGNORE, PackedBatch
from mmllm.data.loading.collate import with_pointers
from mmllm.data.samples.document import Document, tile_places
from mmllm.data.samples.pointers import Pointer


def pad_left(documents: Sequence[Document]) -> PackedBatch:
    """One document a row, each ending at the last position. What in it was a target in training is labelled as there.

    (No loss is taken of it, but where a prompt ends, for `decoder.prefix`, is where its first target is.)
    """
    num_rows, num_positions = len(documents), max(document.num_tokens for document in documents)
    num_codebooks = documents[0].codes_TK.shape[1]
    token_ids_BT = np.zeros((num_rows, num_positions), dtype=np.int64)
    labels_BT = np.full((num_rows, num_positions), IGNORE, dtype=np.int64)
    document_ids_BT = np.full((num_rows, num_positions), -1, dtype=np.int64)
    positions_BT = np.zeros_like(token_ids_BT)
    modality_BT = np.zeros_like(token_ids_BT)
    codes_BTK = np.full((num_rows, num_positions, num_codebooks), -1, dtype=np.int64)
    pixels, image_slots, clips, clip_slots = [], [], [], []
    for row, document in enumerate(documents):
        start = num_positions - document.num_tokens
        token_ids_BT[row, start:] = document.token_ids_T
        labels_BT[row, start:-1] = np.where(document.targets_T[1:], document.token_ids_T[1:], IGNORE)
        document_ids_BT[row, start:] = 0
        positions_BT[row, start:] = np.arange(document.num_tokens)
        modality_BT[row, start:] = document.modality_T
        codes_BTK[row, start:] = document.codes_TK
        first = row * num_positions + start
        for picture in document.images:
            pixels.append(torch.from_numpy(np.ascontiguousarray(picture.pixels_3HW)))
            image_slots.append(first + picture.start + torch.arange(picture.num_slots))
        for clip in document.clips:
            clips.append(torch.from_numpy(np.ascontiguousarray(clip.codes_FK)))
            clip_slots.append(first + clip.start + torch.arange(clip.num_slots))
    batch = PackedBatch(
        token_ids_BT=torch.from_numpy(token_ids_BT),
        labels_BT=torch.from_numpy(labels_BT),
        positions_BT=torch.from_numpy(positions_BT),
        document_ids_BT=torch.from_numpy(document_ids_BT),
        modality_BT=torch.from_numpy(modality_BT),
        source_BT=torch.from_numpy(document_ids_BT),
        audio_codes_BTK=torch.from_numpy(codes_BTK),
        audio_labels_BTK=torch.full(codes_BTK.shape, IGNORE),
        images_NCHW=torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1, dtype=torch.uint8),
        image_slots_NS=torch.stack(image_slots) if image_slots else torch.zeros(0, 1, dtype=torch.int64),
        clip_codes_CFK=_stack(clips) if clips else torch.zeros(0, 1, num_codebooks, dtype=torch.int64),
        clip_slots_CS=_stack(clip_slots) if clip_slots else torch.zeros(0, 1, dtype=torch.int64),
        clip_targets_CL=torch.full((len(clips), 1), -1),
        image_tiles_N3=torch.from_numpy(tile_places(picture for each in documents for picture in each.images)),
    )
    pointers = [
        (row, num_positions - document.num_tokens, document.pointer)
        for row, document in enumerate(documents)
        if document.pointer is not None
    ]
    return with_pointers(batch, pointers)


def join(documents: Sequence[Document]) -> Document:
    """Documents one after the other, as one."""
    starts = np.cumsum([0, *(document.num_tokens for document in documents)])[:-1].tolist()
    return Document(
        token_ids_T=np.concatenate([document.token_ids_T for document in documents]),
        targets_T=np.concatenate([document.targets_T for document in documents]),
        modality_T=np.concatenate([document.modality_T for document in documents]),
        codes_TK=np.concatenate([document.codes_TK for document in documents]),
        images=tuple(
            dataclasses.replace(picture, start=picture.start + start)
            for document, start in zip(documents, starts, strict=True)
            for picture in document.images
        ),
        clips=tuple(
            dataclasses.replace(clip, start=clip.start + start)
            for document, start in zip(documents, starts, strict=True)
            for clip in document.clips
        ),
        filler=documents[0].filler,
        has_units=any(document.has_units for document in documents),
        pointer=_joined_pointer(documents),
    )


def behind_shots(
    lengths: Sequence[int], joined: Callable[[Sequence[int]], Document], room: int, max_length: int | None
) -> tuple[Document, tuple[int, ...]]:
    """A prompt behind as many shots as there is room for, the longest being left out first, and which these are.

    Args:
        lengths: tokens of each shot by itself.
        joined: the prompt behind shots of these numbers.
        room: tokens that come behind the prompt.
        max_length: positions of a prompt and what comes behind it; None: any number.
    """
    kept = list(range(len(lengths)))
    while True:
        prompt = joined(kept)
        if max_length is None or not kept or prompt.num_tokens + room <= max_length:
            return prompt, tuple(kept)
        kept.remove(max(kept, key=lengths.__getitem__))


def _joined_pointer(documents: Sequence[Document]) -> Pointer | None:
    if all(document.pointer is None for document in documents):
        return None
    return Pointer.join([document.pointer or Pointer.none(document.num_tokens) for document in documents])


def _stack(rows: list[Tensor]) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
