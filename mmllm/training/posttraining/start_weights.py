"""The weights that a training started with, kept beside those that it moves.

There is no second model: of what is trained one copy is kept, and `in_place` exchanges the two for a moment. With an
adapter that copy is the adapter's alone, as it was before its first step: the base itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmllm.checkpoints.adapters import is_adapters
from mmllm.model.multimodal import MultimodalModel
from mmllm.parallel.shard import free_gathered
from mmllm.training.matrix_exchange import local

_BIAS = "e_score_correction_bias"
"""Ends the names of what moves beside the parameters: the biases that balance experts."""


class StartWeights:
    """A copy of what a training moves, as it is now. Sharded weights are kept in shards.

    Args:
        model: whose trainable parameters are kept.
    """

    def __init__(self, model: MultimodalModel) -> None:
        self._model = model
        self._kept = {name: tensor.detach().clone() for name, tensor in self._moving().items()}
        self._is_in_place = False

    @property
    def names(self) -> list[str]:
        """Of the parameters that are kept."""
        return [*self._kept]

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Of each name the weight as it is now and as it was, on one device."""
        assert not self._is_in_place, "the start is in the place of the weights"
        moving = self._moving()
        if self._kept.keys() != moving.keys():
            changed = sorted(self._kept.keys() ^ moving.keys())
            raise ValueError(
                f"{changed[0]} is trained now but wasn't when training started, or the other way round; what is "
                f"trained can't change while the start is kept (keep, wise_ft, TaskScores)"
            )
        for name, weight in moving.items():  # a strategy may have moved the model since
            if local(self._kept[name]).device != local(weight).device:
                self._kept[name] = self._kept[name].to(weight.device)
        return {name: (weight, self._kept[name]) for name, weight in moving.items()}

    @contextmanager
    def in_place(self) -> Iterator[MultimodalModel]:
        """The model with the weights that it started with, without dropout or masks; afterwards all is as it was.

        Virtual tokens are switched off in it: they start at random, and the base has none.
        """
        was_training, virtual = self._model.training, self._model.decoder.active_virtual
        kind = self._model.decoder.embed_tokens.weight.device.type
        self._exchange()
        self._is_in_place = True
        self._model.eval()
        self._model.decoder.active_virtual = None
        try:
            # Autocast keeps what it made of the weights before they were exchanged: nothing of that may be used here.
            dtype, is_on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
            with torch.autocast(kind, dtype, is_on, cache_enabled=False):
                yield self._model
        finally:
            self._is_in_place = False
            self._exchange()
            self._model.train(was_training)
            self._model.decoder.active_virtual = virtual

    @contextmanager
    def interpolated(self, share: float) -> Iterator[None]:
        """The model with the weights start + share · (now - start) (WiSE-FT, arXiv 2109.01903); then as it was.

        Of LoRA only B is scaled, since its weights are the product of A and B: this is what the merged weights give.
        """
        held = {name: local(weight).detach().clone() for name, (weight, _) in self.pairs().items()}
        with torch.no_grad():
            for name, (weight, start) in self.pairs().items():
                part, before = local(weight), local(start)
                if ".lora_A" not in name:
                    part.copy_(part.mul(share) if is_adapters(name) else torch.lerp(before, part, share))
            free_gathered(self._model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, (weight, _) in self.pairs().items():
                    local(weight).copy_(held[name])
                free_gathered(self._model)

    @torch.no_grad()
    def _exchange(self) -> None:
        """By storage, so that what autograd keeps of the weights is whole again afterwards."""
        free_gathered(self._model)
        for weight, kept in self.pairs().values():
            now, before = local(weight).data, local(kept).data
            held = now.clone()
            now.copy_(before)
            before.copy_(held)
        free_gathered(self._model)

    def _moving(self) -> dict[str, Tensor]:
        moving: dict[str, Tensor] = {n: p for n, p in self._model.named_parameters() if p.requires_grad}
        return moving | {name: buffer for name, buffer in self._model.named_buffers() if name.endswith(_BIAS)}
