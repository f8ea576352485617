"""The losses that a config asks of its routers, against their definitions, and ranks' parts against the whole."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.losses.routing import RoutingTotals, router_losses
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.router import MoEConfig
from mmllm.model.routing_stats import RoutingStats

LENGTHS = [9, 17, 0, 17, 1]
"""Tokens of five sequences, the third of which is padding alone."""
CONFIG = MoEConfig(6, 2, 8, local_entropy_loss_coef=0.1, global_entropy_loss_coef=0.1, expert_dropout=0.0)


def _decoder(config: MoEConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(40, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, moe=config, moe_layers=(0, 2))
    ).double()
    for moe in decoder.expert_layers().values():
        torch.nn.init.normal_(moe.gate.weight, std=0.7)
    return decoder


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LENGTHS), max(LENGTHS))
    documents_BT = torch.where(torch.arange(shape[1]) < torch.tensor(LENGTHS)[:, None], 0, -1)
    modality_BT = torch.randint(0, 3, shape, generator=generator)  # no units
    x_BTD = torch.randn(*shape, 16, generator=generator, dtype=torch.float64)
    return x_BTD, torch.arange(shape[1]).expand(shape), documents_BT, modality_BT


def _stats(decoder: Decoder, rows: slice = slice(None)) -> RoutingStats:
    x_BTD, positions_BT, documents_BT, modality_BT = (part[rows] for part in _batch())
    return decoder(x_BTD, positions_BT, documents_BT, modality_BT=modality_BT)[1]


def _slow(decoder: Decoder, scope: str, min_experts: float) -> dict[str, Tensor]:
    """The definitions, from each token's probabilities."""
    kept: dict[int, Tensor] = {}
    for layer, moe in decoder.expert_layers().items():
        moe.gate.register_forward_hook(lambda _, __, routing, layer=layer: kept.update({layer: routing.logits_NE}))
    _stats(decoder)
    _, _, documents_BT, modality_BT = _batch()
    is_real = documents_BT.flatten() >= 0
    modality_N = modality_BT.flatten()[is_real]
    sequence_N = torch.arange(len(LENGTHS)).repeat_interleave(max(LENGTHS))[is_real]
    probs = [logits_NE.softmax(dim=-1) for logits_NE in kept.values()]
    chosen = [torch.zeros_like(p).scatter(1, p.topk(2).indices, 1.0).detach() for p in probs]

    def balance(chosen_NE: Tensor, probs_NE: Tensor) -> Tensor:
        return 6 * (chosen_NE.sum(0) / chosen_NE.sum() * probs_NE.mean(0)).sum()

    if scope == "layer":
        loss = sum(balance(c, p) for c, p in zip(chosen, probs, strict=True)) / 2
    elif scope == "global":
        loss = balance(torch.cat(chosen), torch.cat(probs))
    else:
        rows = [sequence_N == b for b, length in enumerate(LENGTHS) if length]
        loss = sum(balance(c[row], p[row]) for c, p in zip(chosen, probs, strict=True) for row in rows) / 2 / len(rows)
    local, spread = [], []
    for p in probs:
        local.append(torch.special.entr(p[modality_N == Modality.TEXT]).sum(dim=-1).mean())
        for modality in (Modality.TEXT, Modality.IMAGE, Modality.AUDIO):
            entropy = torch.special.entr(p[modality_N == modality].mean(dim=0)).sum()
            spread.append((math.log(min_experts) - entropy).clamp(min=0) if min_experts else -entropy)
    return {
        "balance": loss + torch.zeros(()),
        "z": sum(logits.logsumexp(-1).square().mean() for logits in kept.values()) / 2 + torch.zeros(()),
        "local_entropy": torch.stack(local).mean(),
        "global_entropy": torch.stack(spread).sum() / 2,
    }


def _gradient(decoder: Decoder, losses: dict[str, Tensor]) -> Tensor:
    weights = [moe.gate.weight for moe in decoder.expert_layers().values()]
    total = sum(factor * losses[key] for factor, key in enumerate(sorted(losses), start=1))
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(total, weights)])  # pyright: ignore


@pytest.mark.parametrize("min_experts", [0.0, 4.5])
@pytest.mark.parametrize("scope", ["layer", "global", "sequence"])
def test_router_losses_are_their_definitions_also_over_ranks(scope: str, min_experts: float) -> None:
    config = dataclasses.replace(CONFIG, aux_loss_scope=scope, global_entropy_min_experts=min_experts)
    decoder = _decoder(config)
    stats = _stats(decoder)
    losses = router_losses(config, stats, RoutingTotals.of(stats))
    wanted = _slow(decoder, scope, min_experts)
    assert losses.keys() == wanted.keys()
    for key, value in losses.items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-10, atol=1e-12, check_dtype=False, msg=key)
    grads = _gradient(decoder, losses)
    torch.testing.assert_close(grads, _gradient(decoder, wanted), rtol=1e-9, atol=1e-12)
    ranks = [_stats(decoder, slice(0, 2)), _stats(decoder, slice(2, 3)), _stats(decoder, slice(3, 5))]
    flat = torch.stack([RoutingTotals.of(stats).flat() for stats in ranks]).sum(dim=0)
    parts = [router_losses(config, stats, RoutingTotals.of(stats).with_flat(flat)) for stats in ranks]
    for key in losses:
        together = sum(part[key] for part in parts)
        torch.testing.assert_close(together, losses[key], rtol=1e-10, atol=1e-12, check_dtype=False, msg=key)
    together = {key: sum((part[key] for part in parts), start=torch.zeros(())) for key in losses}
    torch.testing.assert_close(_gradient(decoder, together), grads, rtol=1e-9, atol=1e-12)


def test_a_decoder_without_experts_has_no_router_losses() -> None:
    decoder = Decoder(DecoderConfig(40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).double()
    stats = _stats(decoder)
    assert router_losses(CONFIG, stats, RoutingTotals.of(stats)) == {}
