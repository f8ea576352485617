"""Prompts that are computed: found in the cache as far as they are there, embedded, and in pieces where they are long.

Shapes: N positions of a step, T of one prompt, D width, M convolutions, B boundaries, J tokens kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.inference.engine.fast_prompts import continue_prompts
from mmllm.inference.engine.prefixes import Block, PrefixCache, put_blocks, take_block
from mmllm.inference.engine.prepared import Prepared
from mmllm.inference.engine.prompts import embed_prompts, with_prompt_embeddings
from mmllm.inference.engine.requests import EngineConfig, TextRequest
from mmllm.inference.engine.rows import Row
from mmllm.model.row_cache import Chunk, PromptStep, RowCache

Refuse = Callable[[Row, Exception], None]
_EMBED_FACTOR = 4
"""Prompts that are embedded together have at most so many times the positions that a step computes."""


class Prefilling:
    """Computes prompts.

    Args:
        prepared: the model.
        cache: where rows are.
        prefixes: what prompts have in common.
        config: the engine's.
    """

    def __init__(self, prepared: Prepared, cache: RowCache, prefixes: PrefixCache, config: EngineConfig) -> None:
        self.prepared = prepared
        self.cache = cache
        self.prefixes = prefixes
        self.config = config
        decoder = prepared.model.config.decoder
        self._has_encoder = decoder.encoder_layers > 0
        self._may_cut = not config.deterministic and decoder.prefix == "none" and not self._has_encoder
        self._keeps_states = decoder.conv_size > 0
        self._backend = decoder.attention_backend

    def place(self, row: Row, num_positions: int) -> None:
        """Gives a row its place in the cache, and what the cache holds of its prompt."""
        row.cached = self.cache.allocate(num_positions)
        row.num_found, num_virtual = 0, self.prepared.num_virtual
        blocks = self._found(row)
        if blocks:
            put_blocks(row.cached, blocks)
            row.num_found = row.cached.length - num_virtual
            row.num_cached = row.num_found
            row.hidden_D = blocks[-1].hidden_D
            return
        virtual = self.prepared.virtual
        if virtual is not None and virtual.kind == "prefix_tuning":
            keys_values_LV2GC = virtual.keys_values_L2VGC.to(self.cache.dtype).transpose(1, 2)
            places_V = row.cached.start + torch.arange(num_virtual, device=self.prepared.device)
            row.cached.slab.write(slice(None), places_V, keys_values_LV2GC.flatten(2))
            row.cached.length = num_virtual

    def _found(self, row: Row) -> list[Block]:
        if row.keys is None or row.since_prompt:
            return []
        blocks = self.prefixes.find(row.keys)
        num_found = sum(block.kv_LPF.shape[1] for block in blocks)
        is_whole = num_found == row.request.prompt.num_tokens + self.prepared.num_virtual
        if blocks and is_whole and blocks[-1].hidden_D is None:
            return blocks[:-1]  # its last position must be computed, for what follows it
        return blocks

    def embed(self, rows: Sequence[Row], refuse: Refuse) -> None:
        """The inputs of prompts, those of like length together.

        Args:
            rows: that are placed.
            refuse: is told of prompts of which nothing can be made.
        """
        rows = sorted(rows, key=lambda row: -row.request.prompt.num_tokens)
        while rows:
            most = max(1, _EMBED_FACTOR * self.config.prefill_tokens // rows[0].request.prompt.num_tokens)
            batch, rows = rows[:most], rows[most:]
            try:
                self._embed(batch)
            except Exception as error:
                if len(batch) == 1:
                    refuse(batch[0], error)
                else:  # which of them it is must be found out
                    for row in batch:
                        self.embed([row], refuse)

    def _embed(self, rows: Sequence[Row]) -> None:
        model, prompts = self.prepared.model, [row.request.prompt for row in rows]
        for row, own in zip(rows, embed_prompts(model, prompts, [row.num_found for row in rows]), strict=True):
            if self.config.speculation == "draft" and not row.num_found:
                row.whole_inputs = own
            inputs = own if row.num_found else with_prompt_embeddings(model, own)
            row.inputs = inputs.followed_by(row.since_prompt, row.modality) if row.since_prompt else inputs

    def compute(self, rows: Sequence[Row]) -> list[Row]:
        """Computes prompts, so many positions at most; those that are whole now."""
        ready = [row for row in rows if row.hidden_D is not None]
        budget, chosen = self.config.prefill_tokens, []
        for row in rows:
            if row.inputs is None or budget <= 0:
                continue
            count = len(row.inputs.x_TD)
            if count > budget and self._may_cut:
                count = budget
            elif count > budget and chosen:
                continue
            budget -= count
            chosen.append((row, count))
        if chosen:
            # rows that begin come first
            chosen.sort(key=lambda each: each[0].cached.length != 0)  # pyright: ignore[reportOptionalMemberAccess]
            ready += self._compute(chosen)
        return ready

    def _compute(self, chosen: Sequence[tuple[Row, int]]) -> list[Row]:
        chunks, parts, positions = [], [], []
        for row, count in chosen:
            assert row.inputs is not None and row.cached is not None
            chunks.append(Chunk(row.cached, count, self._boundaries(row, count)))
            parts.append(row.inputs.part(0, count))
            positions.append(torch.arange(row.cached.length, row.cached.length + count, device=self.prepared.device))
        spans = [part.spans_T for part in parts if part.spans_T is not None]
        step = PromptStep(chunks, torch.cat(spans) if spans else None, self._backend)
        decoder, fast = self.prepared.model.decoder, self.prepared.fast
        x_ND, modality_N = (torch.cat(each) for each in zip(*((p.x_TD, p.modality_T) for p in parts), strict=True))
        if fast is None or self._has_encoder:
            hidden_ND = decoder.continue_rows(x_ND, torch.cat(positions), modality_N, step)
        else:
            hidden_ND = continue_prompts(decoder, fast, x_ND, torch.cat(positions), modality_N, step)
        states = step.boundary_states_MBJD
        num_states = [len(chunk.boundaries) for chunk in chunks]
        states_by_chunk = [None] * len(chunks) if states is None else states.split(num_states, dim=1)
        ready = []
        for (row, count), chunk, own_TD, own_states in zip(
            chosen, chunks, hidden_ND.split([count for _, count in chosen]), states_by_chunk, strict=True
        ):
            inputs = row.inputs
            assert inputs is not None
            if isinstance(row.request, TextRequest) and row.request.prompt_logprobs and not row.since_prompt:
                self._score(row, own_TD)
            row.inputs = None
            if count == len(inputs.x_TD):
                row.hidden_D = own_TD[-1].clone()
                ready.append(row)
            else:
                row.inputs = inputs.part(count, None)
            self._keep_blocks(row, chunk, own_states)
        return ready

    def _boundaries(self, row: Row, count: int) -> tuple[int, ...]:
        """Behind which of a chunk's tokens the convolutions' states are kept."""
        if not self._keeps_states or row.keys is None or row.since_prompt:
            return ()
        assert row.cached is not None
        length = row.cached.length
        return tuple(end - length for end in self._block_ends(row, length, length + count))

    def _block_ends(self, row: Row, start: int, stop: int) -> list[int]:
        """Cached lengths in (start, stop] at which blocks end, or the prompt does."""
        before, size = self.prepared.num_virtual, self.config.block_size
        whole = before + row.request.prompt.num_tokens
        ends = {end + before for end in range(size, stop - before + 1, size)} | {whole}
        return sorted(end for end in ends if start < end <= stop)

    def _keep_blocks(self, row: Row, chunk: Chunk, states_MBJD: Tensor | None) -> None:
        """Gives what a chunk has computed to the prefix cache."""
        keys, cached = row.keys, row.cached
        if keys is None or row.since_prompt:
            return
        assert cached is not None
        before, size = self.prepared.num_virtual, self.config.block_size
        num_tokens = row.request.prompt.num_tokens
        ends = self._block_ends(row, cached.length - chunk.num_tokens, cached.length)
        for number, end in enumerate(ends):
            state_MJD = None if states_MBJD is None else states_MBJD[:, number].clone()
            place = end - before
            if place % size == 0 and keys.blocks[place // size - 1] not in self.prefixes:
                first = end - size if place > size else 0  # learned tokens are in the first block
                self.prefixes.add(keys.blocks[place // size - 1], take_block(cached, first, end, state_MJD, None))
            if place == num_tokens:
                rest = num_tokens // size * size
                first = rest + before if rest else 0
                self.prefixes.add(keys.whole, take_block(cached, first, end, state_MJD, row.hidden_D))

    def _score(self, row: Row, hidden_TD: Tensor) -> None:
        """Log-probabilities of the prompt's own text, of the positions that a chunk predicts."""
        written, prompt = row.written or row.searched, row.request.prompt
        assert written is not None and row.cached is not None
        first = row.cached.length - len(hidden_TD) - self.prepared.num_virtual + 1
        num_encoded = 0  # positions of an encoder predict nothing
        if self._has_encoder and row.inputs is not None and row.inputs.spans_T is not None:
            num_encoded = int((row.inputs.spans_T >= 0).sum())
        targets = [
            target
            for target in range(max(1, first, num_encoded + 1), min(first + len(hidden_TD), prompt.num_tokens))
            if prompt.modality_T[target] == Modality.TEXT
        ]
        if not targets:
            return
        logits_MV = self.prepared.text_logits(hidden_TD[[target - first for target in targets]]).float()
        ids_M1 = torch.from_numpy(prompt.token_ids_T[targets])[:, None].to(logits_MV.device)
        nats = logits_MV.log_softmax(dim=-1).gather(1, ids_M1)[:, 0].tolist()
        for target, value in zip(targets, nats, strict=True):
            written.prompt_logprobs[target] = value


def shares_prefixes(config: EngineConfig, prepared: Prepared) -> bool:
    """Whether what is computed of a prompt's beginning is the same whatever follows it, and may be kept."""
    decoder = prepared.model.config.decoder
    return not (config.deterministic or decoder.mod_layers or decoder.prefix != "none" or decoder.encoder_layers)
