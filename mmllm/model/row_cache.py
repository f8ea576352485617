"""Keys and values of rows that enter and leave at any step, each of its own length.

Rows of like capacity lie in one slab, the running ones in its first slots, so that attention reads them in place: on a
CPU, gathering pages before each layer costs more than a small model's layer does. A row that leaves is replaced by the
last one. What several rows have in common is kept elsewhere, block by block, and copied in (`mmllm.inference.engine`).

Shapes: L layers, M short convolutions of all layers, S slots · capacity, F = 2 · G · C: keys of G heads of C channels,
then values, N new tokens, R rows, T new tokens of one of them, H query heads, J tokens kept for convolutions, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.model.attend import PackedContext, attend
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.masks import MaskRule, visible
from mmllm.sequences import SequenceMetadata

SMALLEST_CAPACITY = 256
CAPACITY_STEP = 4
"""Rows of one slab are attended to at once, so that few of them, if large ones, are quicker than many that fit well."""
_FIRST_SLOTS = 4
_KEPT_BYTES = 64 * 2**20
_PLACES = ("attention", "mlp")


class CachedRow:
    """A row's place: changed by the cache alone."""

    def __init__(self, slab: Slab, slot: int):
        self.slab = slab
        self.slot = slot
        self.length = 0
        """Positions that are cached."""
        self.is_running = False

    @property
    def start(self) -> int:
        """Where its positions begin in the slab."""
        return self.slot * self.slab.capacity


class Slab:
    """Rows of one capacity: running ones in the first slots, those whose prompts are computed in any others.

    Attributes:
        kv_LSF: keys, rotated, and values; in the decoder's dtype, or kept in fewer bits.
        scales_LSH: of int8 keys and values, one for each head's (H = 2 · G); None: they are no int8.
        conv_state_MSJD: the last J inputs of each convolution, oldest first, by slot; zeros before the document's
            beginning. M is twice the layer, plus 1 for that of the feed-forward layer.
        keys_by_layer: bool [S], for layers that some tokens skip: True where a token has keys.
    """

    def __init__(
        self, config: DecoderConfig, capacity: int, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype
    ):
        self.capacity = capacity
        self.dtype = dtype
        self.heads = (config.kv_heads, config.head_channels)
        self.num_rows = 0
        self.slots: list[CachedRow | None] = [None] * _FIRST_SLOTS
        width = 2 * config.kv_heads * config.head_channels
        num_layers = config.num_hidden_layers - config.encoder_layers
        num_places = _FIRST_SLOTS * capacity
        self.kv_LSF = torch.zeros(num_layers, num_places, width, device=device, dtype=kv_dtype)
        self.scales_LSH: Tensor | None = None
        if kv_dtype == torch.int8:
            self.scales_LSH = torch.zeros(num_layers, num_places, 2 * config.kv_heads, device=device)
        self.conv_state_MSJD: Tensor | None = None
        if config.conv_size:
            shape = (2 * num_layers, _FIRST_SLOTS, config.conv_size - 1, config.hidden_size)
            self.conv_state_MSJD = torch.zeros(shape, device=device, dtype=dtype)
        self.keys_by_layer: dict[int, Tensor] = {
            layer: torch.ones(_FIRST_SLOTS * capacity, dtype=torch.bool, device=device) for layer in config.mod_layers
        }

    @property
    def rows(self) -> list[CachedRow]:
        """Those that run, in order."""
        return self.slots[: self.num_rows]  # pyright: ignore[reportReturnType]

    @property
    def lengths(self) -> list[int]:
        """Positions that are cached of each row that runs."""
        return [row.length for row in self.rows]

    @property
    def lengths_N(self) -> Tensor:
        """The same on the device, int64."""
        return torch.tensor(self.lengths, device=self.kv_LSF.device)

    @property
    def max_length(self) -> int:
        """The largest of them."""
        return max(self.lengths)

    @property
    def num_used(self) -> int:
        """Slots with a row."""
        return sum(row is not None for row in self.slots)

    @property
    def is_plain(self) -> bool:
        """Whether keys and values are kept as they were computed."""
        return self.kv_LSF.dtype == self.dtype

    def write(self, layer: int | slice, places_N: Tensor, kv: Tensor) -> None:
        """Puts keys and values in.

        Args:
            layer: one, of keys and values [N, F]; or all, of [L, N, F].
            places_N: where, in the slab.
            kv: in the decoder's dtype.
        """
        dim = 1 if isinstance(layer, slice) else 0
        if self.scales_LSH is not None:
            codes, scales = _int8(kv.unflatten(-1, (2 * self.heads[0], -1)))
            self.scales_LSH[layer].index_copy_(dim, places_N, scales)
            kv = codes.flatten(-2)
        self.kv_LSF[layer].index_copy_(dim, places_N, kv.to(self.kv_LSF.dtype))

    def rounded(self, x_NGC: Tensor) -> Tensor:
        """Keys or values as they will be read."""
        if self.is_plain:
            return x_NGC
        if self.scales_LSH is None:
            return x_NGC.to(self.kv_LSF.dtype).to(x_NGC.dtype)
        codes, scales = _int8(x_NGC)
        return (codes * scales[..., None]).to(x_NGC.dtype)

    def keys_values(self, layer: int, num_rows: int, num_positions: int) -> tuple[Tensor, Tensor]:
        """The first rows' first positions, [R, G, positions, C]: views, if they are kept as they were computed."""
        here = slice(num_rows), slice(num_positions)
        kv_RPF = self.kv_LSF[layer].unflatten(0, (-1, self.capacity))[here]
        scales = None if self.scales_LSH is None else self.scales_LSH[layer].unflatten(0, (-1, self.capacity))[here]
        return self._read(kv_RPF, scales)

    def row_keys_values(self, layer: int, row: CachedRow, stop: int) -> tuple[Tensor, Tensor]:
        """One row's first positions, [1, G, stop, C], likewise."""
        here = slice(row.start, row.start + stop)
        scales = None if self.scales_LSH is None else self.scales_LSH[layer, here][None]
        return self._read(self.kv_LSF[layer, here][None], scales)

    def _read(self, kv_RPF: Tensor, scales_RPH: Tensor | None) -> tuple[Tensor, Tensor]:
        kv_RPHC = kv_RPF.unflatten(-1, (2 * self.heads[0], -1)).to(self.dtype)
        if scales_RPH is not None:
            kv_RPHC = kv_RPHC * scales_RPH[..., None].to(self.dtype)
        keys, values = kv_RPHC.transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def take_slot(self) -> int:
        """The first free slot behind the rows that run, where the next one will run; more slots are made if none is."""
        for slot in range(self.num_rows, len(self.slots)):
            if self.slots[slot] is None:
                return slot
        num_more = len(self.slots)
        self.slots += [None] * num_more
        self.kv_LSF = F.pad(self.kv_LSF, (0, 0, 0, num_more * self.capacity))
        if self.scales_LSH is not None:
            self.scales_LSH = F.pad(self.scales_LSH, (0, 0, 0, num_more * self.capacity))
        if self.conv_state_MSJD is not None:
            self.conv_state_MSJD = F.pad(self.conv_state_MSJD, (0, 0, 0, 0, 0, num_more))
        for layer, keys_S in self.keys_by_layer.items():
            self.keys_by_layer[layer] = F.pad(keys_S, (0, num_more * self.capacity), value=True)
        return len(self.slots) - num_more

    def move(self, row: CachedRow, slot: int) -> None:
        """Puts a row into another slot of this slab, which is free."""
        if row.slot != slot:
            self.slots[row.slot] = None
            self.copy(row, slot)
            row.slot = slot
        self.slots[slot] = row

    def swap(self, row: CachedRow, other: CachedRow) -> None:
        """Exchanges two rows of this slab."""
        if row.length < other.length:
            row, other = other, row
        slot, other_slot, longest = row.slot, other.slot, row.length
        start, other_start = row.start, other.start
        for each_LSF in (self.kv_LSF, self.scales_LSH):
            if each_LSF is not None:
                kept = each_LSF[:, other_start : other_start + longest].clone()
                each_LSF[:, other_start : other_start + longest] = each_LSF[:, start : start + longest]
                each_LSF[:, start : start + longest] = kept
        for keys_S in self.keys_by_layer.values():
            kept = keys_S[other_start : other_start + longest].clone()
            keys_S[other_start : other_start + longest] = keys_S[start : start + longest]
            keys_S[start : start + longest] = kept
        if self.conv_state_MSJD is not None:
            kept = self.conv_state_MSJD[:, other_slot].clone()
            self.conv_state_MSJD[:, other_slot] = self.conv_state_MSJD[:, slot]
            self.conv_state_MSJD[:, slot] = kept
        row.slot, other.slot = other_slot, slot
        self.slots[slot], self.slots[other_slot] = other, row

    def copy(self, row: CachedRow, slot: int) -> None:
        """Copies what is cached of a row, of any slab, to a slot."""
        start, here = slot * self.capacity, slice(row.start, row.start + row.length)
        source = row.slab
        self.kv_LSF[:, start : start + row.length] = source.kv_LSF[:, here]
        if self.scales_LSH is not None and source.scales_LSH is not None:
            self.scales_LSH[:, start : start + row.length] = source.scales_LSH[:, here]
        if self.conv_state_MSJD is not None and source.conv_state_MSJD is not None:
            self.conv_state_MSJD[:, slot] = source.conv_state_MSJD[:, row.slot]
        for layer, keys_S in self.keys_by_layer.items():
            keys_S[start : start + row.length] = source.keys_by_layer[layer][here]


def _int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers up to ±127 [..., C], and what each head's are multiplied with."""
    scales = x.float().abs().amax(dim=-1).clamp(min=1e-12) / 127
    return (x.float() / scales[..., None]).round(), scales


class RowCache:
    """Rows of any lengths.

    Args:
        config: of the decoder.
        device: of the keys and values.
        dtype: in which they are computed.
        kv_dtype: in which they are kept: int8, with a scale for each head of each position, or another; None: `dtype`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        kv_dtype: torch.dtype | None = None,
    ):
        self.config = config
        self.device = torch.device(device)
        self.dtype = dtype
        self.kv_dtype = kv_dtype or dtype
        self._slabs: dict[int, Slab] = {}

    @property
    def slabs(self) -> list[Slab]:
        """Those in which rows run."""
        return [slab for _, slab in sorted(self._slabs.items()) if slab.num_rows]

    @property
    def num_positions(self) -> int:
        """Positions that rows have room for, used or not."""
        return sum(slab.num_used * slab.capacity for slab in self._slabs.values())

    def allocate(self, num_positions: int) -> CachedRow:
        """A place for a row whose prompt is to be computed, with room for so many positions."""
        slab = self._slab(capacity_of(num_positions))
        row = CachedRow(slab, slab.take_slot())
        slab.slots[row.slot] = row
        if slab.conv_state_MSJD is not None:
            slab.conv_state_MSJD[:, row.slot] = 0
        return row

    def start(self, row: CachedRow) -> None:
        """Lets a row run: from now on it is among the slab's first."""
        assert not row.is_running
        slab, target = row.slab, row.slab.num_rows
        other = slab.slots[target]
        if other is not None and other is not row:
            slab.swap(row, other)
        else:
            slab.move(row, target)
        row.is_running = True
        slab.num_rows += 1

    def free(self, row: CachedRow) -> None:
        """Takes a row out; the last one that runs takes its slot."""
        slab = row.slab
        slab.slots[row.slot] = None
        if row.is_running:
            slab.num_rows -= 1
            last = slab.slots[slab.num_rows]
            if last is not None:
                slab.move(last, row.slot)
            row.is_running = False
        if not slab.num_used and slab.kv_LSF.nbytes > _KEPT_BYTES:  # what one large request needed isn't kept for ever
            self._slabs.pop(slab.capacity, None)

    def make_room(self, row: CachedRow, num_positions: int = 1) -> None:
        """Moves a row to a larger slab where its own has no room for more positions."""
        needed = row.length + num_positions
        if needed <= row.slab.capacity:
            return
        slab = self._slab(capacity_of(needed))
        slot = slab.take_slot()
        slab.copy(row, slot)
        was_running = row.is_running
        old = CachedRow(row.slab, row.slot)
        old.is_running, old.length = was_running, row.length
        row.slab.slots[row.slot] = old
        self.free(old)
        row.slab, row.slot, row.is_running = slab, slot, False
        slab.slots[slot] = row
        if was_running:
            self.start(row)

    def _slab(self, capacity: int) -> Slab:
        if capacity not in self._slabs:
            self._slabs[capacity] = Slab(self.config, capacity, self.device, self.dtype, self.kv_dtype)
        return self._slabs[capacity]


def capacity_of(num_positions: int) -> int:
    """Of the slab in which a row of so many positions lies."""
    capacity = SMALLEST_CAPACITY
    while capacity < num_positions:
        capacity *= CAPACITY_STEP
    return capacity


class LayerOfStep:
    """One layer of a step: a layer need not know its number, which compilers would take for a constant."""

    def __init__(self, step: RunningStep | PromptStep, layer: int):
        self._step, self._layer = step, layer

    def hide(self, passes_N: Tensor) -> None:
        """Says, before `attend`, which new positions have no keys here: they are seen by themselves alone."""
        self._step.hide(self._layer, passes_N)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Tensor:
        """Stores the new keys and values and attends to all of the row's: [N, H, C] or [N, G, C] to [N, H·C]."""
        return self._step.attend(self._layer, q, k, v, rule)

    def before(self, x_ND: Tensor, count: int, place: str) -> list[Tensor]:
        """See `mmllm.model.short_conv.Neighbors`; the last tokens are kept for the next step."""
        return self._step.before(x_ND, count, 2 * self._layer + _PLACES.index(place))


class RunningStep:
    """One new position of each row that runs in a slab."""

    def __init__(self, slab: Slab):
        self.slab = slab
        device = slab.kv_LSF.device
        self.lengths_N = torch.tensor(slab.lengths, device=device)
        self.stop = max(slab.lengths) + 1
        self._is_even = min(slab.lengths) == self.stop - 1
        self._places_N = torch.arange(slab.num_rows, device=device) * slab.capacity + self.lengths_N
        self._masks: dict[MaskRule, Tensor | None] = {}

    def layer(self, layer: int) -> LayerOfStep:
        """One layer's."""
        return LayerOfStep(self, layer)

    def hide(self, layer: int, passes_N: Tensor) -> None:
        """See `LayerOfStep.hide`."""
        self.slab.keys_by_layer[layer].index_copy_(0, self._places_N, passes_N)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Tensor:
        """See `LayerOfStep.attend`."""
        slab, num_rows = self.slab, self.slab.num_rows
        slab.write(layer, self._places_N, torch.cat([k.flatten(1), v.flatten(1)], dim=1))
        keys, values = slab.keys_values(layer, num_rows, self.stop)
        mask = self._mask(rule)
        if layer in slab.keys_by_layer:
            mask = self._with_keys(mask, slab.keys_by_layer[layer])
        shares = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=mask, enable_gqa=shares)
        return out.flatten(1)

    def _mask(self, rule: MaskRule) -> Tensor | None:
        """Bool [N, 1, 1, S]; None: all is seen."""
        if rule not in self._masks:
            sees_all = self._is_even and (rule.window is None or rule.window >= self.stop)
            at_S = torch.arange(self.stop, device=self.lengths_N.device)
            seen_NS = visible(rule, self.lengths_N[:, None], at_S)
            self._masks[rule] = None if sees_all else seen_NS[:, None, None]
        return self._masks[rule]

    def _with_keys(self, mask: Tensor | None, keys_S: Tensor) -> Tensor:
        at_S = torch.arange(self.stop, device=keys_S.device)
        is_key_NS = keys_S.view(-1, self.slab.capacity)[: self.slab.num_rows, : self.stop]
        is_key_NS = is_key_NS | (at_S == self.lengths_N[:, None])
        return is_key_NS[:, None, None] if mask is None else mask & is_key_NS[:, None, None]

    def before(self, x_ND: Tensor, count: int, place: int) -> list[Tensor]:
        """See `LayerOfStep.before`."""
        assert self.slab.conv_state_MSJD is not None
        state_NJD = self.slab.conv_state_MSJD[place, : self.slab.num_rows]
        num_kept = state_NJD.shape[1]
        all_NED = torch.cat([state_NJD, x_ND[:, None]], dim=1)
        state_NJD.copy_(all_NED[:, 1:])
        return [all_NED[:, num_kept - back] for back in range(1, count + 1)]

    def end(self) -> None:
        """Counts the new positions as cached."""
        for row in self.slab.rows:
            row.length += 1


@dataclass(frozen=True)
class Chunk:
    """New positions of one row's prompt.

    Attributes:
        row: whose.
        num_tokens: T.
        boundaries: of the convolutions' states, those behind so many of the chunk's tokens are wanted.
    """

    row: CachedRow
    num_tokens: int
    boundaries: tuple[int, ...] = field(default=())


class PromptStep:
    """New positions of prompts. Those that begin come first: they are packed as in training, the others one by one.

    Args:
        chunks: in the order of their tokens.
        spans_N: bidirectional spans of tokens that begin their rows, -1 none.
        backend: of packed attention.
    """

    def __init__(self, chunks: Sequence[Chunk], spans_N: Tensor | None = None, backend: str = "auto"):
        self.chunks = list(chunks)
        is_fresh = [chunk.row.length == 0 for chunk in self.chunks]
        assert is_fresh == sorted(is_fresh, reverse=True), "prompts that begin come before those that go on"
        self.num_fresh = sum(is_fresh)
        slab = self.chunks[0].row.slab
        self._device = device = slab.kv_LSF.device
        self.starts = np.cumsum([0, *(chunk.num_tokens for chunk in self.chunks)]).tolist()
        self._num_packed = self.starts[self.num_fresh]
        self._backend = backend
        self._writes = [(each, *self._places(each)) for each in {id(c.row.slab): c.row.slab for c in chunks}.values()]
        self._packed: PackedContext | None = None
        if self.num_fresh:
            lengths = tuple(chunk.num_tokens for chunk in self.chunks[: self.num_fresh])
            sequences = SequenceMetadata.of_lengths(lengths, torch.arange(self._num_packed, device=device))
            spans = None if spans_N is None else spans_N[: self._num_packed]
            self._packed = PackedContext(sequences, backend, spans, slab.dtype)  # pyright: ignore
        self.spans_N = spans_N
        self._hidden_keys: dict[int, Tensor] = {}
        self._states: list[Tensor] = []
        self.boundary_states_MBJD: Tensor | None = None
        """After the step: the convolutions' states that chunks asked for, in order."""

    def _places(self, slab: Slab) -> tuple[Tensor, Tensor | None]:
        """Where in a slab the tokens go that belong there, and which they are; None: all."""
        places, tokens = [], []
        for chunk, start in zip(self.chunks, self.starts, strict=False):
            if chunk.row.slab is slab:
                first = chunk.row.start + chunk.row.length
                places.append(np.arange(first, first + chunk.num_tokens))
                tokens.append(np.arange(start, start + chunk.num_tokens))
        chosen = torch.from_numpy(np.concatenate(tokens)).to(self._device)
        is_all = len(chosen) == self.starts[-1]
        return torch.from_numpy(np.concatenate(places)).to(self._device), None if is_all else chosen

    def layer(self, layer: int) -> LayerOfStep:
        """One layer's."""
        return LayerOfStep(self, layer)

    def hide(self, layer: int, passes_N: Tensor) -> None:
        """See `LayerOfStep.hide`."""
        self._hidden_keys[layer] = passes_N
        for slab, places_T, tokens_T in self._writes:
            chosen_T = passes_N if tokens_T is None else passes_N[tokens_T]
            slab.keys_by_layer[layer].index_copy_(0, places_T, chosen_T)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule) -> Tensor:
        """See `LayerOfStep.attend`."""
        kv_NF = torch.cat([k.flatten(1), v.flatten(1)], dim=1)
        for slab, places_T, tokens_T in self._writes:
            slab.write(layer, places_T, kv_NF if tokens_T is None else kv_NF[tokens_T])
        outputs = []
        if self._packed is not None:
            stop, context = self._num_packed, self._packed
            if layer in self._hidden_keys:
                context = context.with_keys(self._hidden_keys[layer][:stop])
            context.prepare(rule)
            outputs.append(attend(q[:stop], *self._as_kept(k[:stop], v[:stop]), context, rule))
        for chunk, start in zip(self.chunks[self.num_fresh :], self.starts[self.num_fresh :], strict=False):
            outputs.append(self._attend_behind(layer, q[start : start + chunk.num_tokens], chunk, rule))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _as_kept(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as later positions will see them: a prompt is the same in pieces."""
        return self.chunks[0].row.slab.rounded(k), self.chunks[0].row.slab.rounded(v)

    def _attend_behind(self, layer: int, q_THC: Tensor, chunk: Chunk, rule: MaskRule) -> Tensor:
        row, num_tokens = chunk.row, chunk.num_tokens
        stop = row.length + num_tokens
        keys, values = row.slab.row_keys_values(layer, row, stop)
        at_S = torch.arange(stop, device=self._device)
        seen_TS = visible(rule, at_S[row.length :, None], at_S)
        if layer in row.slab.keys_by_layer:
            is_key_S = row.slab.keys_by_layer[layer][row.start : row.start + stop]
            seen_TS = seen_TS & (is_key_S | (at_S[row.length :, None] == at_S))
        q = q_THC.transpose(0, 1)[None]
        shares = q.shape[1] != keys.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen_TS, enable_gqa=shares)
        return out[0].transpose(0, 1).flatten(1)

    def before(self, x_ND: Tensor, count: int, place: int) -> list[Tensor]:
        """See `LayerOfStep.before`."""
        reads = self._reads
        kept = [x_ND.new_zeros(1, x_ND.shape[1])]
        for chunk in self.chunks:
            assert chunk.row.slab.conv_state_MSJD is not None
            kept.append(chunk.row.slab.conv_state_MSJD[place, chunk.row.slot])
        pool_PD = torch.cat([*kept, x_ND])
        for chunk, state_J in zip(self.chunks, reads.states_RJ, strict=True):
            chunk.row.slab.conv_state_MSJD[place, chunk.row.slot] = pool_PD.index_select(0, state_J)  # pyright: ignore
        if reads.boundaries_BJ.numel():
            self._states.append(pool_PD[reads.boundaries_BJ])
        if len(self.chunks) == 1:  # its tokens lie behind those that were kept of it
            first = len(pool_PD) - len(x_ND)
            return [pool_PD[first - back : first - back + len(x_ND)] for back in range(1, count + 1)]
        return [pool_PD.index_select(0, earlier_N) for earlier_N in reads.earlier_JN[:count]]

    @functools.cached_property
    def _reads(self) -> _Reads:
        conv_state = self.chunks[0].row.slab.conv_state_MSJD
        assert conv_state is not None
        return _Reads.of(self.chunks, conv_state.shape[2], self._device)

    def end(self) -> None:
        """Counts the new positions as cached."""
        for chunk in self.chunks:
            chunk.row.length += chunk.num_tokens
        if self._states:
            self.boundary_states_MBJD = torch.stack(self._states)


@dataclass(frozen=True)
class _Reads:
    """Where convolutions read: in a pool of a row of zeros, J kept tokens of each chunk's row, and the new tokens."""

    earlier_JN: Tensor
    states_RJ: Tensor
    boundaries_BJ: Tensor

    @staticmethod
    def of(chunks: Sequence[Chunk], num_kept: int, device: torch.device) -> _Reads:
        """For the chunks of a step."""
        first_new = 1 + num_kept * len(chunks)
        earlier, states, boundaries = [], [], []
        for number, chunk in enumerate(chunks):
            # the row's kept tokens, then its new ones, by their places in the pool; kept ones that the document doesn't
            # have are zeros already
            own = np.concatenate([
                1 + number * num_kept + np.arange(num_kept), first_new + np.arange(chunk.num_tokens)
            ])  # fmt: skip
            at_T = num_kept + np.arange(chunk.num_tokens)
            earlier.append(np.stack([own[at_T - back] for back in range(1, num_kept + 1)]))
            states.append(own[len(own) - num_kept :])
            boundaries += [own[count : count + num_kept] for count in chunk.boundaries]
            first_new += chunk.num_tokens
        empty = np.zeros((0, num_kept), dtype=np.int64)
        arrays = np.concatenate(earlier, axis=1), np.stack(states), np.stack(boundaries) if boundaries else empty
        return _Reads(*(torch.from_numpy(array).to(device) for array in arrays))
