"""Kernels behind one face: each function picks a backend; `reference` defines what is correct.

Shapes: T tokens, D model width, E experts, N expert inner width, V codes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from mmllm_kernels import reference, sorted_tokens
from mmllm_kernels.reference import MoEOutput

Backend = Literal["auto", "reference", "cpu"]


def moe(
    x_TD: Tensor,
    router_logits_TE: Tensor,
    w_gate_up_E2ND: Tensor,
    w_down_EDN: Tensor,
    top_k: int,
    renormalise: bool = True,
    backend: Backend = "auto",
) -> MoEOutput:
    """Dropless mixture of SwiGLU experts; see `mmllm_kernels.reference.moe` for the arguments.

    Under autocast the tokens and the weights are cast as a matrix product's would be.
    """
    if torch.is_autocast_enabled(x_TD.device.type):
        dtype = torch.get_autocast_dtype(x_TD.device.type)
        x_TD, w_gate_up_E2ND, w_down_EDN = x_TD.to(dtype), w_gate_up_E2ND.to(dtype), w_down_EDN.to(dtype)
    match backend:
        case "auto" | "cpu":
            return sorted_tokens.moe(x_TD, router_logits_TE, w_gate_up_E2ND, w_down_EDN, top_k, renormalise)
        case "reference":
            return reference.moe(x_TD, router_logits_TE, w_gate_up_E2ND, w_down_EDN, top_k, renormalise)
    raise ValueError(f"backend is {backend!r}; choose auto, reference or cpu")


def nearest_code(x_TD: Tensor, codebook_VD: Tensor, backend: Backend = "auto") -> Tensor:
    """Index of the nearest row of the codebook for each row of x, int64 [T]."""
    match backend:
        case "auto" | "cpu":
            return sorted_tokens.nearest_code(x_TD, codebook_VD)
        case "reference":
            return reference.nearest_code(x_TD, codebook_VD)
    raise ValueError(f"backend is {backend!r}; choose auto, reference or cpu")
