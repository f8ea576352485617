"""What an engine makes of a model's weights, once for all steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mmllm.inference.engine.fast_step import FastStep
from mmllm.inference.engine.products import Product
from mmllm.inference.engine.sampling import TextRules
from mmllm.inference.engine.unit_rows import UnitRules
from mmllm.model.decoder import Decoder
from mmllm.model.embedding import Head
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.virtual_tokens import VirtualTokens
from mmllm_tokenizers.folder import TokenizerFolder

_HEAD_COPIED = 1 << 26
"""Weights of a head up to which a copy in the order of quick products is worth its memory."""


@dataclass(frozen=True)
class Prepared:
    """A model that rows are computed by.

    Attributes:
        model: in eval mode while it is used.
        head_VD: the head's rows.
        text_logits: logits of text from hidden states, [N, D] to [N, V].
        rules: of text.
        unit_rules: of units; None: the model doesn't speak.
        fast: steps of running rows; None: the decoder's own code is used.
        virtual: the learned tokens that it runs with.
    """

    model: MultimodalModel
    head_VD: Tensor
    text_logits: Callable[[Tensor], Tensor]
    rules: TextRules
    unit_rules: UnitRules | None
    fast: FastStep | None
    virtual: VirtualTokens | None

    @staticmethod
    def of(model: MultimodalModel, tokenizer: TokenizerFolder, has_plain_cache: bool = True) -> Prepared:
        """For a model as it is now.

        Args:
            model: in any mode.
            tokenizer: of it.
            has_plain_cache: keys and values are kept as they are computed, as quick steps want them.
        """
        decoder = model.decoder
        head_VD = decoder.head_weight_VD.detach()
        rules = TextRules.of(tokenizer, head_VD.device)
        speaks = tokenizer.vocabulary.num_codebooks > 0 and model.config.audio is not None
        active = decoder.active_virtual
        with eval_mode(trained_modules(decoder)), torch.inference_mode():
            fast = FastStep(decoder) if has_plain_cache and FastStep.supports(decoder) is None else None
        return Prepared(
            model,
            head_VD,
            _text_logits(decoder, head_VD[: rules.num_text]),
            rules,
            UnitRules(tokenizer, model.pointer is not None) if speaks else None,
            fast,
            None if active is None else decoder.virtual_tokens[active],  # pyright: ignore[reportArgumentType]
        )

    @property
    def device(self) -> torch.device:
        """The decoder's."""
        return self.head_VD.device

    @property
    def num_virtual(self) -> int:
        """Learned tokens before each prompt."""
        return 0 if self.virtual is None else self.virtual.num_tokens


def trained_modules(module: nn.Module) -> list[nn.Module]:
    """Those of its modules that are in training mode."""
    return [each for each in module.modules() if each.training]


@contextmanager
def eval_mode(trained: Sequence[nn.Module]) -> Iterator[None]:
    """Eval mode of modules that are in training mode; afterwards they are again."""
    for each in trained:
        each.training = False
    try:
        yield
    finally:
        for each in trained:
            each.training = True


def _text_logits(decoder: Decoder, rows_VD: Tensor) -> Callable[[Tensor], Tensor]:
    if isinstance(decoder.lm_head, Head):
        return Product(rows_VD, copied_elements=_HEAD_COPIED)
    return decoder.lm_head.part(0, len(rows_VD))  # quantized


def weights_of(model: MultimodalModel) -> tuple[object, ...]:
    """What tells whether a model computes as before: its weights, and which adapter it runs with.

    Asked before each request that finds nothing running, so modules are walked by hand: their own generators take three
    times as long.
    """
    found: list[object] = [model.decoder.active_virtual]
    modules: list[nn.Module] = [model]
    while modules:
        module = modules.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                found.append((parameter.data_ptr(), parameter._version))
        if "lora_A" in module._modules:
            found.append(
                repr((module.active_adapters, module.disable_adapters, module.scaling, module.merged_adapters))
            )
        modules += [child for child in module._modules.values() if child is not None]
    return tuple(found)
