"""Feed-forward layers for one new position a row, dense ones and mixtures of experts, by few operator calls.

Shapes: N rows, D width, E experts (the shared ones behind them, where they are taken together), K experts a token,
P pairs of a row and an expert, S shared experts, I inner width.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor

import mmllm_kernels
from mmllm.inference.engine.products import FastLinear, Product
from mmllm.model.experts import MLP, Experts, MoE
from mmllm.model.router import Router

_FEW_ROWS = 2
"""Rows up to which each one's two experts are computed alone."""
_MANY_ROWS = 48
"""Rows beyond which experts have rows enough of their own."""
_MANY_PAIRS = 32
"""Rows an expert from which its products by oneDNN are quicker than by MKL."""
_MAX_WASTE = 4
"""All experts are computed where they are at most so many times those that a row chooses: about what oneDNN gains."""


class FastMLP:
    """A dense feed-forward layer."""

    def __init__(self, mlp: MLP, copied_elements: int):
        self._gate_up = FastLinear(mlp.gate_proj, mlp.up_proj, copied_elements=copied_elements)
        self._down = FastLinear(mlp.down_proj, copied_elements=copied_elements)

    def add_to(self, residual_ND: Tensor, x_ND: Tensor, modality_N: Tensor | None) -> Tensor:
        """The residual stream and the output."""
        gate_NI, up_NI = self._gate_up(x_ND).chunk(2, dim=-1)
        return self._down.add_to(residual_ND, F.silu(gate_NI).mul_(up_NI))


class FastMoE:
    """A mixture of experts.

    On a CPU in float32 few rows' experts are two products a row, with a strided view of the weights; more rows take all
    experts in two products of oneDNN, whose gates are 0 where they were not chosen, if the experts are few and small;
    else each expert has its rows.
    """

    def __init__(self, moe: MoE, copied_elements: int):
        self._moe, self._config = moe, moe.config
        config, router = moe.config, moe.gate
        self._router_ED = None
        if (
            type(router) is Router
            and config.scoring_func == "softmax"
            and config.n_group == 1
            and router.e_score_correction_bias is None
            and router.allowed_ME is None
        ):
            self._router_ED = router.weight.detach().float()
        self._all: _AllExperts | None = None
        self._is_by_hand = _is_by_hand(moe)
        if self._is_by_hand:
            gate_up_E2ID, down_EDI = moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach()
            self._gate_up_ED2I, self._down_EID = gate_up_E2ID.transpose(1, 2), down_EDI.transpose(1, 2)
            self._gate_ups, self._downs = self._gate_up_ED2I.unbind(), self._down_EID.unbind()
            self._products = _expert_products(moe, copied_elements)
            if config.num_experts <= _MAX_WASTE * config.num_experts_per_tok and _num_elements(moe) <= copied_elements:
                every = _AllExperts(moe, copied_elements)
                self._all = every if every.is_quick else None

    def add_to(self, residual_ND: Tensor, x_ND: Tensor, modality_N: Tensor | None) -> Tensor:
        """The residual stream and the output."""
        gates_NK, experts_NK = self._route(x_ND, modality_N)
        shared, (num_rows, top_k) = self._moe.shared_experts, experts_NK.shape
        if self._all is not None and _FEW_ROWS < num_rows <= _MANY_ROWS:
            return self._all.add_to(residual_ND, x_ND, gates_NK, experts_NK)
        if self._is_by_hand and top_k == 2 and num_rows <= _FEW_ROWS:
            out_ND = self._pairs(residual_ND, x_ND, gates_NK, experts_NK)
        elif self._is_by_hand and num_rows > 1:
            out_ND = self._grouped(residual_ND, x_ND, gates_NK, experts_NK)
        else:
            return residual_ND + self._moe.experts(x_ND, gates_NK, experts_NK, shared)
        if shared is not None:
            gate_up_SD2I, down_SID = (w.transpose(1, 2) for w in (shared.gate_up_proj, shared.down_proj))
            out_ND += _swiglu(x_ND.expand(len(down_SID), -1, -1), gate_up_SD2I, down_SID).sum(dim=0)
        return out_ND

    def _route(self, x_ND: Tensor, modality_N: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gates and experts [N, K]."""
        if self._router_ED is None:
            routing = self._moe.gate(x_ND, modality_N)
            return routing.gates_NK, routing.experts_NK
        config = self._config
        logits_NE = F.linear(x_ND.to(self._router_ED.dtype), self._router_ED)
        if not logits_NE.is_cpu:
            gates_NK, experts_NK = mmllm_kernels.route(
                logits_NE, config.num_experts_per_tok, config.norm_topk_prob, config.backend
            )
        else:  # stable: of equal ones the lowest index first, as the router has it
            sorted_NE, order_NE = logits_NE.sort(dim=-1, descending=True, stable=True)
            experts_NK = order_NE[:, : config.num_experts_per_tok]
            if config.norm_topk_prob:
                gates_NK = sorted_NE[:, : config.num_experts_per_tok].softmax(dim=-1)
            else:
                gates_NK = logits_NE.softmax(dim=-1).gather(1, experts_NK)
        return gates_NK if config.routed_scaling_factor == 1 else gates_NK * config.routed_scaling_factor, experts_NK

    def _pairs(self, residual_ND: Tensor, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """Each row's two experts: any two matrices of a stack are a strided view of it."""
        outs = []
        for row, (first, second) in enumerate(experts_NK.tolist()):
            here = slice(row, row + 1)
            gates_12 = gates_NK[here]
            if first > second:
                first, second, gates_12 = second, first, gates_12.flip(1)
            both = slice(first, second + 1, second - first)
            y_21D = _swiglu(x_ND[here].expand(2, 1, -1), self._gate_up_ED2I[both], self._down_EID[both])
            outs.append(torch.addmm(residual_ND[here], gates_12, y_21D.squeeze(1)))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _grouped(self, residual_ND: Tensor, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """Each expert's rows at once. Sorting so few numbers is quickest where they need no operator."""
        num_rows, top_k = experts_NK.shape
        pairs_of: dict[int, list[int]] = {}
        for pair, expert in enumerate(chain.from_iterable(experts_NK.tolist())):
            pairs_of.setdefault(expert, []).append(pair)
        counts = [len(pairs) for pairs in pairs_of.values()]
        order = list(chain.from_iterable(pairs_of.values()))
        places = [0] * len(order)
        for place, pair in enumerate(order):
            places[pair] = place
        rows_P, places_P = torch.tensor([pair // top_k for pair in order]), torch.tensor(places)
        x_PD = x_ND.index_select(0, rows_P)
        if self._products and len(order) >= _MANY_PAIRS * len(counts):
            parts = [_one(x, *self._products[expert]) for expert, x in zip(pairs_of, x_PD.split(counts), strict=True)]
            y_NKD = torch.cat(parts).index_select(0, places_P).view(num_rows, top_k, -1)
            return torch.baddbmm(residual_ND.unsqueeze(1), gates_NK.unsqueeze(1), y_NKD).squeeze(1)
        h_P2I, y_PD = x_ND.new_empty(len(order), self._gate_up_ED2I.shape[2]), torch.empty_like(x_PD)
        for expert, x, h in zip(pairs_of, x_PD.split(counts), h_P2I.split(counts), strict=True):
            torch.mm(x, self._gate_ups[expert], out=h)
        gate_PI, up_PI = h_P2I.chunk(2, dim=-1)
        a_PI = F.silu(gate_PI).mul_(up_PI)
        for expert, a, y in zip(pairs_of, a_PI.split(counts), y_PD.split(counts), strict=True):
            torch.mm(a, self._downs[expert], out=y)
        y_NKD = y_PD.index_select(0, places_P).view(num_rows, top_k, -1)
        return torch.baddbmm(residual_ND.unsqueeze(1), gates_NK.unsqueeze(1), y_NKD).squeeze(1)


def _swiglu(x_EPD: Tensor, gate_up_ED2I: Tensor, down_EID: Tensor) -> Tensor:
    """Each expert's output for its rows, [E, P, D]."""
    gate_EPI, up_EPI = torch.bmm(x_EPD, gate_up_ED2I).chunk(2, dim=-1)
    return torch.bmm(F.silu(gate_EPI).mul_(up_EPI), down_EID)


def _one(x_PD: Tensor, gate_up: Product, down: Product) -> Tensor:
    """One expert's output for its rows."""
    gate_PI, up_PI = gate_up(x_PD).chunk(2, dim=-1)
    return down(F.silu(gate_PI).mul_(up_PI))


def _expert_products(moe: MoE, copied_elements: int) -> list[tuple[Product, Product]]:
    """Each expert's two products by oneDNN, for prompts; empty: there is none, or copies are not worth their memory."""
    if _num_elements(moe) > copied_elements:
        return []
    weights = zip(moe.experts.gate_up_proj.detach(), moe.experts.down_proj.detach(), strict=True)
    products = [tuple(Product(each, copied_elements=each.numel()) for each in pair) for pair in weights]
    is_quick = all(product.is_packed for pair in products for product in pair)
    return products if is_quick else []  # pyright: ignore[reportReturnType]


class _AllExperts:
    """All experts of all rows, those that were not chosen with the gate 0, and shared ones with 1."""

    def __init__(self, moe: MoE, copied_elements: int):
        gate_ups, downs = [moe.experts.gate_up_proj.detach()], [moe.experts.down_proj.detach()]
        if moe.shared_experts is not None:
            gate_ups.append(moe.shared_experts.gate_up_proj.detach())
            downs.append(moe.shared_experts.down_proj.detach())
        self._num_routed, self._num_all = len(downs[0]), sum(map(len, downs))
        self._gate_up = Product(torch.cat(gate_ups).flatten(0, 1), copied_elements=copied_elements)
        self._down = Product(torch.cat(downs).movedim(0, 1).flatten(1), copied_elements=copied_elements)

    @property
    def is_quick(self) -> bool:
        """Whether oneDNN computes them."""
        return self._gate_up.is_packed and self._down.is_packed

    def add_to(self, residual_ND: Tensor, x_ND: Tensor, gates_NK: Tensor, experts_NK: Tensor) -> Tensor:
        """The residual stream and the output."""
        num_rows = len(x_ND)
        gates_NE = x_ND.new_zeros(num_rows, self._num_all)
        if self._num_routed < self._num_all:
            gates_NE[:, self._num_routed :] = 1
        gates_NE.scatter_(1, experts_NK, gates_NK)
        gate_NEI, up_NEI = self._gate_up(x_ND).view(num_rows, self._num_all, 2, -1).unbind(2)
        a_NEI = F.silu(gate_NEI).mul_(up_NEI).mul_(gates_NE.unsqueeze(2))
        return self._down.add_to(residual_ND, a_NEI.view(num_rows, -1))


def _is_by_hand(moe: MoE) -> bool:
    """Whether its weights are plain ones on a CPU in float32: adapters come as another type."""
    if type(moe.experts) is not Experts or type(moe.shared_experts) not in (Experts, type(None)):
        return False
    down_EDI = moe.experts.down_proj
    return down_EDI.is_cpu and down_EDI.dtype == torch.float32 and moe.config.backend != "reference"


def _num_elements(moe: MoE) -> int:
    """Of the larger of the experts' two matrices, the shared ones with the others."""
    shared = moe.shared_experts
    return moe.experts.gate_up_proj.numel() + (0 if shared is None else shared.gate_up_proj.numel())
