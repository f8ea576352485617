"""Prompts by the quick layers of `mmllm.inference.engine.fast_step`: products of weights in the order that suits them.

Shapes: N positions of all prompts, D width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mmllm.inference.engine.fast_layers import FastNorm
from mmllm.inference.engine.fast_step import FastStep
from mmllm.model.decoder import Decoder
from mmllm.model.row_cache import LayerOfStep, PromptStep
from mmllm.model.short_conv import ShortConv


@torch.inference_mode()
def continue_prompts(
    decoder: Decoder, fast: FastStep, x_ND: Tensor, positions_N: Tensor, modality_N: Tensor, step: PromptStep
) -> Tensor:
    """As `Decoder.continue_rows`: hidden states after the final norm, [N, D]."""
    angles = {rope: tables.angles(positions_N, x_ND.dtype) for rope, tables in fast.rope_tables.items()}
    for number, (layer, block) in enumerate(zip(fast.layers, decoder.layers, strict=True)):
        here = step.layer(number)
        attend = functools.partial(here.attend, rule=decoder.config.rule(number))
        y_ND = _normed(layer.attention_norm, x_ND, block.attention_conv, here)  # pyright: ignore
        angle = None if layer.rope is None else angles[layer.rope]
        x_ND = layer.attention.add_prompt(x_ND, y_ND, angle, attend)
        y_ND = _normed(layer.mlp_norm, x_ND, block.mlp_conv, here)  # pyright: ignore
        x_ND = layer.feed_forward.add_to(x_ND, y_ND, modality_N)
    step.end()
    return fast.norm(x_ND)


def _normed(norm: FastNorm, x_ND: Tensor, conv: ShortConv | None, here: LayerOfStep) -> Tensor:
    """Behind the norm and its convolution, if there is one."""
    y_ND = norm(x_ND)
    if conv is None:
        return y_ND
    own_D, *others = conv.weight.detach().to(y_ND.dtype).unbind()
    out_ND = y_ND * (1 + own_D)
    for earlier_ND, weight_D in zip(here.before(y_ND, len(others), conv.place), others, strict=True):
        out_ND.addcmul_(earlier_ND, weight_D)
    return out_ND
