"""Several new positions of each running row at once, of which some may be taken back: what speculation verifies.

Shapes: N rows, T new positions of each, D width, V ids, M convolutions, J inputs that each keeps of a row, H query
heads, C channels a head, S cached positions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mmllm.inference.engine.fast_layers import FastNorm, LayerRows
from mmllm.inference.engine.fast_step import FastStep
from mmllm.model.decoder import Decoder
from mmllm.model.row_cache import Chunk, PromptStep, Slab


class Pieces:
    """One step of T positions a row; afterwards `keep` says how many of each row stay.

    Args:
        decoder: the model's.
        fast: its quick steps; None: its own code is used.
        slab: whose running rows they are.
        num_new: T; all rows have room for so many.
    """

    def __init__(self, decoder: Decoder, fast: FastStep | None, slab: Slab, num_new: int) -> None:
        assert slab.max_length + num_new <= slab.capacity, "a row has no room for its new positions"
        self._decoder, self._fast, self._slab, self._num_new = decoder, fast, slab, num_new
        self._lengths = slab.lengths
        blocks = decoder.layers[decoder.config.encoder_layers :]
        convs = [conv for block in blocks for conv in (block.attention_conv, block.mlp_conv)]  # pyright: ignore
        self._convs: list[Tensor] = [conv.weight for conv in convs if conv is not None]  # pyright: ignore
        self._states_MNED: Tensor | None = None
        """What convolutions kept of each row, and their inputs at its new positions."""

    def step(self, x_ND: Tensor, modality_N: Tensor) -> Tensor:
        """Hidden states after the final norm, [N·T, D].

        Args:
            x_ND: embeddings [N·T, D], row by row.
            modality_N: of each.
        """
        lengths_N1 = self._slab.lengths_N[:, None]
        positions_N = (lengths_N1 + torch.arange(self._num_new, device=x_ND.device)).flatten()
        if self._fast is not None:
            return self._step_fast(self._fast, x_ND, positions_N, modality_N)
        num_new = self._num_new
        cuts = tuple(range(1, num_new + 1)) if self._slab.conv_state_MSJD is not None else ()
        step = PromptStep([Chunk(row, num_new, cuts) for row in self._slab.rows])
        before = None if self._slab.conv_state_MSJD is None else self._slab.conv_state_MSJD[:, : self._slab.num_rows]
        before = None if before is None else before.clone()
        hidden_ND = self._decoder.continue_rows(x_ND, positions_N, modality_N, step)
        if before is not None and step.boundary_states_MBJD is not None:
            states_MNTJD = step.boundary_states_MBJD.unflatten(1, (len(self._lengths), num_new))
            self._states_MNED = torch.cat([before, states_MNTJD[:, :, :, -1]], dim=2)
        return hidden_ND

    def keep(self, counts: Sequence[int]) -> None:
        """Counts so many of each row's new positions as cached, and takes the others back."""
        for row, length, count in zip(self._slab.rows, self._lengths, counts, strict=True):
            row.length = length + count
        if self._states_MNED is None:
            return
        state_MSJD = self._slab.conv_state_MSJD
        assert state_MSJD is not None
        device, num_kept = state_MSJD.device, state_MSJD.shape[2]
        places_NJ = torch.tensor(counts, device=device)[:, None] + torch.arange(num_kept, device=device)
        rows_N1 = torch.arange(len(counts), device=device)[:, None]
        state_MSJD[:, : len(counts)] = self._states_MNED[:, rows_N1, places_NJ]

    def _step_fast(self, fast: FastStep, x_ND: Tensor, positions_N: Tensor, modality_N: Tensor) -> Tensor:
        rows = _Rows(self._slab, self._num_new)
        angles = {rope: tables.angles(positions_N, x_ND.dtype) for rope, tables in fast.rope_tables.items()}
        states: list[Tensor] = []
        for number, layer in enumerate(fast.layers):
            y_ND = self._normed(layer.attention_norm, x_ND, states)
            angle = None if layer.rope is None else angles[layer.rope]
            x_ND = layer.attention.add_to(x_ND, y_ND, angle, rows.layer(number, layer.window))
            y_ND = self._normed(layer.mlp_norm, x_ND, states)
            x_ND = layer.feed_forward.add_to(x_ND, y_ND, modality_N)
        if states:
            self._states_MNED = torch.stack(states)
        return fast.norm(x_ND)

    def _normed(self, norm: FastNorm, x_ND: Tensor, states: list[Tensor]) -> Tensor:
        """Behind the norm and its convolution, if there are any; its inputs go to `states`."""
        state_MSJD = self._slab.conv_state_MSJD
        if state_MSJD is None:
            return norm(x_ND)
        num_kept, num_rows, num_new = state_MSJD.shape[2], self._slab.num_rows, self._num_new
        own_NTD = norm(x_ND).view(num_rows, num_new, -1)
        all_NED = torch.cat([state_MSJD[len(states), :num_rows], own_NTD], dim=1)
        weights_KD = self._convs[len(states)]
        states.append(all_NED)
        out_NTD = own_NTD * (1 + weights_KD[0])
        for back in range(1, num_kept + 1):
            out_NTD.addcmul_(all_NED[:, num_kept - back : num_kept - back + num_new], weights_KD[back])
        return out_NTD.flatten(0, 1)


class _Rows:
    """The caches of a step's rows, by layer."""

    def __init__(self, slab: Slab, num_new: int) -> None:
        self._slab, self._num_new = slab, num_new
        self._stop = slab.max_length + num_new
        lengths_N1 = slab.lengths_N[:, None]
        device = lengths_N1.device
        starts_N1 = torch.arange(slab.num_rows, device=device)[:, None] * slab.capacity
        self._at_NT = lengths_N1 + torch.arange(num_new, device=device)
        self._places_N = (starts_N1 + self._at_NT).flatten()
        self._masks: dict[int | None, Tensor] = {}

    def layer(self, number: int, window: int | None) -> LayerRows:
        """One layer's."""
        slab = self._slab
        keys_NGSC, values_NGSC = slab.keys_values(number, slab.num_rows, self._stop)
        if window not in self._masks:
            self._masks[window] = self._mask(window)
        return LayerRows(
            slab.kv_LSF[number], self._places_N, keys_NGSC, values_NGSC, self._masks[window], self._num_new
        )

    def _mask(self, window: int | None) -> Tensor:
        """[N, 1, T, S], -inf where a position isn't seen."""
        at_S = torch.arange(self._stop, device=self._at_NT.device)
        is_hidden_NTS = at_S > self._at_NT[..., None]
        if window is not None:
            is_hidden_NTS = is_hidden_NTS | (at_S <= self._at_NT[..., None] - window)
        mask_NTS = torch.zeros(is_hidden_NTS.shape, dtype=self._slab.kv_LSF.dtype, device=at_S.device)
        return mask_NTS.masked_fill_(is_hidden_NTS, -torch.inf)[:, None]
