"""What prompts have in common: keys and values of blocks, by what the prompt holds up to their ends.

A block is found by the content of all positions up to its end: ids of tokens, digests of pictures and sounds, codes
and letters of speech. Behind the last whole block lies the prompt's rest, which only the very same prompt finds; the
hidden state is kept with it, so that such a prompt begins to be answered at once.

Shapes: T positions, L layers, P positions of a block, F features of a position's keys and values, M convolutions, J
tokens kept for them, D width.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmllm.data.samples.document import Document
from mmllm.model.row_cache import CachedRow

_DIGEST_BYTES = 16


@dataclass(frozen=True)
class PrefixKeys:
    """By what a prompt's blocks are found."""

    blocks: tuple[bytes, ...]
    """Of each whole block."""
    whole: bytes
    """Of all of the prompt."""


@dataclass(frozen=True)
class Block:
    """What is computed of a block.

    Attributes:
        kv_LPF: keys and values.
        state_MJD: of the convolutions, behind its last position; None: the decoder has none.
        scales_LPH: of int8 keys and values; None: they are no int8.
        hidden_D: behind its last position; None: not kept, or a prompt goes on behind it.
    """

    kv_LPF: Tensor
    state_MJD: Tensor | None
    scales_LPH: Tensor | None = None
    hidden_D: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """That it holds."""
        return sum(each.nbytes for each in vars(self).values() if each is not None)


def prefix_keys(prompt: Document, block_size: int) -> PrefixKeys:
    """What decides over keys and values of a prompt, as digests of its blocks.

    Args:
        prompt: as the engine is given it.
        block_size: P.
    """
    content_TN = _content(prompt)
    digest = b""
    blocks = []
    num_whole = len(content_TN) // block_size
    for number in range(num_whole):
        block = content_TN[number * block_size : (number + 1) * block_size].tobytes()
        digest = hashlib.blake2b(digest + block, digest_size=_DIGEST_BYTES).digest()
        blocks.append(digest)
    rest = content_TN[num_whole * block_size :].tobytes()
    whole = hashlib.blake2b(b"whole" + digest + rest, digest_size=_DIGEST_BYTES).digest()
    return PrefixKeys(tuple(blocks), whole)


def _content(prompt: Document) -> np.ndarray:
    """int64 [T, N]: equal rows, up to a position, are equal inputs up to there."""
    media_T = np.zeros(prompt.num_tokens, dtype=np.int64)
    for picture in prompt.images:
        pixels = picture.pixels_3HW if picture.features_SC is None else picture.features_SC
        kind = repr(("picture", picture.tile, picture.is_first)).encode()
        media_T[picture.start : picture.start + picture.num_slots] = _number(pixels, kind)
    for clip in prompt.clips:
        media_T[clip.start : clip.start + clip.num_slots] = _number(clip.codes_FK, b"clip")
    columns = [prompt.token_ids_T, prompt.modality_T, media_T, *prompt.codes_TK.T]
    if prompt.pointer is not None:
        letters = np.where(prompt.pointer.places_T >= 0, _number(prompt.pointer.letters_L, b"letters"), 0)
        columns += [prompt.pointer.places_T, prompt.pointer.ages_T, letters]
    return np.ascontiguousarray(np.stack(columns, axis=1).astype(np.int64))


def _number(array: np.ndarray, kind: bytes) -> int:
    """A digest of an array and its shape that fits int64."""
    digest = hashlib.blake2b(kind + repr((array.shape, array.dtype.str)).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(array).data)
    return int.from_bytes(digest.digest(), "little", signed=True)


class PrefixCache:
    """Blocks of prompts that were computed, those used last kept within a bound.

    Args:
        max_bytes: of all blocks; 0: nothing is kept.
        block_size: P.
    """

    def __init__(self, max_bytes: int, block_size: int):
        self.max_bytes = max_bytes
        self.block_size = block_size
        self.num_bytes = 0
        self._blocks: OrderedDict[bytes, Block] = OrderedDict()

    def __len__(self) -> int:
        """Blocks that are kept."""
        return len(self._blocks)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is kept."""
        return key in self._blocks

    def clear(self) -> None:
        """Forgets all."""
        self._blocks.clear()
        self.num_bytes = 0

    def find(self, keys: PrefixKeys) -> list[Block]:
        """The blocks with which a prompt begins, as many as are kept; with its rest, if that is kept, behind them."""
        found = []
        for key in keys.blocks:
            block = self._use(key)
            if block is None:
                return found
            found.append(block)
        rest = self._use(keys.whole)
        return [*found, rest] if rest is not None else found

    def add(self, key: bytes, block: Block) -> None:
        """Keeps a block; those that were not used for longest make room."""
        if key in self._blocks or block.num_bytes > self.max_bytes:
            return
        self._blocks[key] = block
        self.num_bytes += block.num_bytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._blocks.popitem(last=False)
            self.num_bytes -= oldest.num_bytes

    def _use(self, key: bytes) -> Block | None:
        block = self._blocks.get(key)
        if block is not None:
            self._blocks.move_to_end(key)
        return block


def put_blocks(row: CachedRow, blocks: Sequence[Block]) -> None:
    """Copies blocks to an empty row's beginning."""
    slab = row.slab
    for block in blocks:
        count = block.kv_LPF.shape[1]
        start = row.start + row.length
        if count:
            slab.kv_LSF[:, start : start + count] = block.kv_LPF
            if slab.scales_LSH is not None and block.scales_LPH is not None:
                slab.scales_LSH[:, start : start + count] = block.scales_LPH
        row.length += count
    state_MJD = blocks[-1].state_MJD
    if slab.conv_state_MSJD is not None and state_MJD is not None:
        slab.conv_state_MSJD[:, row.slot] = state_MJD


def take_block(row: CachedRow, start: int, stop: int, state_MJD: Tensor | None, hidden_D: Tensor | None) -> Block:
    """A copy of a row's positions from `start` to `stop`."""
    here = slice(row.start + start, row.start + stop)
    scales_LSH = row.slab.scales_LSH
    scales_LPH = None if scales_LSH is None else scales_LSH[:, here].clone()
    return Block(row.slab.kv_LSF[:, here].clone(), state_MJD, scales_LPH, hidden_D)
