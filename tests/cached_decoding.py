"""A decoder's cache of rows behind the arguments that its packed forward pass has: to compare the two.

Shapes: B rows, T positions, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mmllm.model.decoder import Decoder
from mmllm.model.row_cache import CachedRow, Chunk, PromptStep, RunningStep


class CachedRows:
    """Rows of one document each, which may be padded anywhere, computed piece by piece."""

    def __init__(self, decoder: Decoder, num_rows: int, max_length: int) -> None:
        self.decoder = decoder
        self.cache = decoder.make_row_cache()
        virtual = decoder._virtual
        self.num_virtual = 0 if virtual is None else virtual.num_tokens
        self.rows: list[CachedRow] = [self.cache.allocate(max_length + self.num_virtual) for _ in range(num_rows)]
        for row in self.rows:
            if virtual is not None and virtual.kind == "prefix_tuning":
                keys_values_LVF = virtual.keys_values_L2VGC.transpose(1, 2).flatten(2)
                row.slab.write(slice(None), row.start + torch.arange(virtual.num_tokens), keys_values_LVF.detach())
                row.length = virtual.num_tokens
            self.cache.start(row)

    def keep(self, places: list[int]) -> None:
        """Drops all other rows."""
        kept = [self.rows[place] for place in places]
        for row in self.rows:
            if row not in kept:
                self.cache.free(row)
        self.rows = kept

    @torch.no_grad()
    def __call__(
        self, x_BTD: Tensor, document_ids_BT: Tensor, modality_BT: Tensor | None = None, spans_BT: Tensor | None = None
    ) -> Tensor:
        """Hidden states of more positions, [B, T, D], zeros at padding (-1)."""
        is_real_BT = document_ids_BT >= 0
        modality_BT = torch.zeros_like(document_ids_BT) if modality_BT is None else modality_BT
        counts = is_real_BT.sum(dim=1).tolist()
        hidden_BTD = torch.zeros_like(x_BTD)
        if counts == [1] * len(self.rows) and all(row.length for row in self.rows):
            slab = self.rows[0].slab
            step = RunningStep(slab)
            order = [self.rows.index(row) for row in slab.rows]
            x_ND = torch.stack([x_BTD[row, is_real_BT[row]][0] for row in order])
            modality_N = torch.stack([modality_BT[row, is_real_BT[row]][0] for row in order])
            hidden_ND = self.decoder.continue_rows(x_ND, step.lengths_N, modality_N, step)
            for row, own_D in zip(order, hidden_ND, strict=True):
                hidden_BTD[row, is_real_BT[row]] = own_D
            return hidden_BTD
        order = sorted([row for row, count in enumerate(counts) if count], key=lambda row: self.rows[row].length != 0)
        parts, chunks, num_before = [], [], []
        for row in order:
            here, virtual = is_real_BT[row], self.decoder._virtual
            x_TD, modality_T = x_BTD[row, here], modality_BT[row, here]
            begins_prompt = virtual is not None and virtual.kind == "prompt_tuning" and not self.rows[row].length
            num_before.append(self.num_virtual if begins_prompt else 0)
            if begins_prompt:
                assert virtual is not None
                x_TD = torch.cat([virtual.prompt_embeddings.to(x_TD.dtype), x_TD])
                modality_T = torch.cat([modality_T.new_zeros(self.num_virtual), modality_T])
            positions_T = self.rows[row].length + torch.arange(len(x_TD))
            spans_T = None if spans_BT is None else spans_BT[row, here]
            parts.append((x_TD, positions_T, modality_T, spans_T))
            chunks.append(Chunk(self.rows[row], len(x_TD)))
        x, positions, modality, spans = zip(*parts, strict=True)
        step = PromptStep(chunks, None if spans_BT is None else torch.cat(spans), "auto")
        hidden_ND = self.decoder.continue_rows(torch.cat(x), torch.cat(positions), torch.cat(modality), step)
        sizes = [len(each) for each in x]
        for row, before, own_TD in zip(order, num_before, hidden_ND.split(sizes), strict=True):
            hidden_BTD[row, is_real_BT[row]] = own_TD[before:]
        return hidden_BTD
