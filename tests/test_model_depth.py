"""Mixture of depths against one document, one block and the tokens that pass at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.model.attend import PackedContext
from mmllm.model.decoder import Block, Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.depth import DepthLayout, num_passing, passes_by_position
from mmllm.model.rope import rotary
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.sequences import SequenceMetadata
from tests.cached_decoding import CachedRows

CONFIG = DecoderConfig(
    50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
    qk_norm=True, mod_layers=(0, 2), mod_capacity=0.3,
)  # fmt: skip
LENGTHS = [[11, 1, 7], [19], [0]]
"""Documents of three packed sequences of 20 positions; the last holds nothing."""


def _decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes)).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for block in decoder.layers:
        if block.depth is not None and block.depth.predictor is not None:  # about half of the tokens pass
            torch.nn.init.normal_(block.depth.predictor[0].weight)
            torch.nn.init.zeros_(block.depth.predictor[2].bias)
    return decoder


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    positions_BT, documents_BT = torch.zeros(3, 20, dtype=torch.int64), torch.full((3, 20), -1)
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for d, length in enumerate(lengths):
            positions_BT[b, start : start + length] = torch.arange(length)
            documents_BT[b, start : start + length] = d
            start += length
    x_BTD = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x_BTD, positions_BT, documents_BT


def _documents() -> list[tuple[int, slice]]:
    places = []
    for b, lengths in enumerate(LENGTHS):
        stops = torch.tensor(lengths).cumsum(0).tolist()
        places += [(b, slice(stop - length, stop)) for stop, length in zip(stops, lengths, strict=True) if length]
    return places


def _alone(decoder: Decoder, block: Block, x_ND: Tensor, positions_N: Tensor) -> Tensor:
    """The block's own computation for some tokens of one document."""
    documents_BT = torch.zeros(1, len(x_ND), dtype=torch.int64)
    context = PackedContext(SequenceMetadata.of(documents_BT), "dense")
    context.prepare(block.self_attn.settings.rule)
    cos, sin = rotary(positions_N, 4, decoder.config.rope_theta, x_ND.dtype)
    return block._forward(x_ND, cos, sin, context, TokenInfo())[0]


def _slow(decoder: Decoder, x_ND: Tensor, is_training: bool) -> tuple[Tensor, Tensor, list[list[int]]]:
    """One document: hidden states, the predictors' losses summed, and who passed each mixture of depths."""
    positions_N, loss, passed = torch.arange(len(x_ND)), torch.zeros((), dtype=torch.float64), []
    for block in decoder.layers:
        if block.depth is None:
            x_ND = _alone(decoder, block, x_ND, positions_N)
            continue
        weights = [block.depth.router.weight[0] @ x_D for x_D in x_ND]
        normed_ND = x_ND.detach() / (x_ND.detach().square().mean(-1, keepdim=True) + torch.finfo(x_ND.dtype).eps).sqrt()
        logits_N = block.depth.predictor(normed_ND)[:, 0]
        best = sorted(range(len(x_ND)), key=lambda n: -weights[n].item())[: math.ceil(0.3 * len(x_ND))]
        for n, logit in enumerate(logits_N):
            loss = loss - (F.logsigmoid(logit) if n in best else F.logsigmoid(-logit))
        passes = sorted(best) if is_training else [n for n in range(len(x_ND)) if logits_N[n] > 0]
        passed.append(passes)
        rows = list(x_ND)
        if passes:
            new_PD = _alone(decoder, block, x_ND[passes], positions_N[passes])
            for place, n in enumerate(passes):
                rows[n] = x_ND[n] + weights[n] * (new_PD[place] - x_ND[n])
        x_ND = torch.stack(rows)
    return decoder.norm(x_ND), loss, passed


@pytest.mark.parametrize(
    ("backend", "is_training"),  # FlexAttention has no backward pass on a CPU
    [("buckets", True), ("buckets", False), ("dense", True), ("dense", False), ("flex", False)],
)
@pytest.mark.parametrize("multiple", [1, 16])
def test_tokens_pass_as_they_would_in_each_document_alone(backend: str, is_training: bool, multiple: int) -> None:
    decoder = _decoder(attention_backend=backend).train(is_training)
    x_BTD, positions_BT, documents_BT = _batch()
    x_BTD.requires_grad_(backend != "flex")
    sequences = SequenceMetadata.of(documents_BT, multiple)
    with torch.set_grad_enabled(backend != "flex"):
        hidden_QD, stats = decoder.packed(x_BTD, positions_BT, sequences)
    hidden_ND = hidden_QD[: sequences.num_tokens]
    slow = [_slow(decoder, x_BTD[b, place], is_training) for b, place in _documents()]
    expected_ND, losses = torch.cat([hidden for hidden, _, _ in slow]), sum(loss for _, loss, _ in slow)
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-10, atol=1e-10)
    assert stats.depth is not None and stats.depth.layers == (0, 2)
    torch.testing.assert_close(stats.depth.loss(38), losses / 2 / 38, rtol=1e-10, atol=1e-12)  # pyright: ignore
    assert stats.depth.num_passed_L.tolist() == [sum(len(passed[i]) for _, _, passed in slow) for i in (0, 1)]
    if backend == "flex":
        return
    weight_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {name: p for name, p in decoder.named_parameters() if name.startswith("layers")} | {"x": x_BTD}
    grads = torch.autograd.grad((hidden_ND * weight_ND).sum() + stats.depth.loss(1), list(named.values()))
    wanted = torch.autograd.grad((expected_ND * weight_ND).sum() + losses / 2, list(named.values()))
    for name, grad, each in zip(named, grads, wanted, strict=True):
        torch.testing.assert_close(grad, each, rtol=1e-8, atol=1e-9, msg=name)


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("multiple", [1, 16])
def test_a_random_choice_is_that_of_the_draws_or_of_the_positions(is_training: bool, multiple: int) -> None:
    decoder = _decoder(mod_router="random").train(is_training)
    x_BTD, positions_BT, documents_BT = _batch()
    x_BTD.requires_grad_()
    sequences = SequenceMetadata.of(documents_BT, multiple)
    torch.manual_seed(5)
    hidden_QD, stats = decoder.packed(x_BTD, positions_BT, sequences)
    torch.manual_seed(5)
    draws_LQ = [torch.rand(sequences.size, dtype=torch.float64).tolist() for _ in range(2)]
    assert stats.depth is None
    expected, first = [], 0
    for b, place in _documents():
        x_ND, mixture = x_BTD[b, place], 0
        positions_N = torch.arange(len(x_ND))
        for layer, block in enumerate(decoder.layers):
            if block.depth is None:
                x_ND = _alone(decoder, block, x_ND, positions_N)
                continue
            draws = draws_LQ[mixture][first : first + len(x_ND)]
            mixture += 1
            passes = sorted(sorted(range(len(x_ND)), key=lambda n: -draws[n])[: math.ceil(0.3 * len(x_ND))])
            if not is_training:
                passes = passes_by_position(positions_N, layer, 0.3).nonzero()[:, 0].tolist()
            rows = list(x_ND)
            if passes:
                new_PD = _alone(decoder, block, x_ND[passes], positions_N[passes])
                for each, n in enumerate(passes):
                    rows[n] = x_ND[n] + (block.depth.router.weight[0] @ x_ND[n]) * (new_PD[each] - x_ND[n])
            x_ND = torch.stack(rows)
        expected.append(decoder.norm(x_ND))
        first += len(x_ND)
    expected_ND = torch.cat(expected)
    torch.testing.assert_close(hidden_QD[: len(expected_ND)], expected_ND, rtol=1e-10, atol=1e-10)
    weights = [x_BTD, *decoder.layers.parameters()]
    grads = torch.autograd.grad(hidden_QD[: len(expected_ND)].square().sum(), weights)
    wanted = torch.autograd.grad(expected_ND.square().sum(), weights)
    torch.testing.assert_close(grads, wanted, rtol=1e-8, atol=1e-9)


def test_a_random_choice_is_drawn_at_every_step_and_by_the_seed() -> None:
    decoder = _decoder(mod_router="random").train()
    batch = _batch()
    torch.manual_seed(6)
    steps = [decoder(*batch)[0] for _ in range(2)]
    torch.manual_seed(6)
    again = [decoder(*batch)[0] for _ in range(2)]
    assert torch.equal(torch.stack(steps), torch.stack(again)) and not torch.equal(*steps)
    decoder.eval()
    assert torch.equal(decoder(*batch)[0], decoder(*batch)[0])


def test_positions_pass_without_order_and_others_in_every_layer() -> None:
    positions = torch.arange(20_000)
    for capacity in (0.125, 0.5):
        passes = [passes_by_position(positions, layer, capacity).double() for layer in range(4)]
        assert all(abs(each.mean() - capacity) < 0.01 for each in passes)
        pairs = [(passes[0], passes[1]), (passes[1], passes[3]), (passes[2][1:], passes[2][:-1])]
        pairs += [(passes[2][8:], passes[2][:-8])]
        assert all(abs((one * other).mean() - capacity**2) < 0.01 for one, other in pairs)
    assert passes_by_position(positions, 0, 1.0).all()


def test_the_predictor_decides_causally_and_the_training_choice_does_not() -> None:
    decoder = _decoder()
    x_BTD, positions_BT, documents_BT = _batch()
    changed_BTD = x_BTD.clone()
    changed_BTD[1, 15:] += 3.0
    for is_training in (True, False):
        decoder.train(is_training)
        before, after = (decoder(x, positions_BT, documents_BT)[0] for x in (x_BTD, changed_BTD))
        assert torch.equal(before[1, :15], after[1, :15]) != is_training
        torch.testing.assert_close(before[0], after[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("prefix", "router"), [("none", "learned"), ("media", "learned"), ("none", "random")])
def test_a_cache_hides_what_skipped_a_block(prefix: Any, router: Any) -> None:
    decoder = _decoder(prefix=prefix, mod_router=router, mod_capacity=0.4).eval()
    x_BTD = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    documents_BT = torch.zeros(2, 12, dtype=torch.int64)
    documents_BT[1, :3] = -1  # padded on the left
    positions_BT = (torch.arange(12) - torch.tensor([[0], [3]])).clamp(min=0)
    spans_BT = torch.full((2, 12), -1)
    spans_BT[:, 4:7] = 0  # in the first piece
    spans = None if prefix == "none" else spans_BT
    whole_BTD, _ = decoder(x_BTD, positions_BT, documents_BT, spans_BT=spans)
    cached = CachedRows(decoder, 2, 12)
    pieces = []
    for piece in (slice(0, 7), slice(7, 8), slice(8, 11), slice(11, 12)):
        some = None if spans is None else spans[:, piece]
        pieces.append(cached(x_BTD[:, piece], documents_BT[:, piece], spans_BT=some))
    cached_BTD = torch.cat(pieces, dim=1)
    is_real = documents_BT >= 0
    torch.testing.assert_close(cached_BTD[is_real], whole_BTD[is_real], rtol=1e-10, atol=1e-10)
    (slab,) = cached.cache.slabs
    assert slab.keys_by_layer.keys() == {0, 2}
    places = torch.cat([torch.arange(row.start, row.start + row.length) for row in cached.rows])
    shares = [keys_S[places].double().mean() for keys_S in slab.keys_by_layer.values()]
    assert all(0.1 < share < 0.9 for share in shares), "some pass and some don't, or nothing was tested"


def test_spans_and_filler_in_training() -> None:
    """Spans are those of the tokens that pass; filler passes among itself and counts nowhere."""
    decoder = _decoder(prefix="media").train()
    x_BTD, positions_BT, documents_BT = _batch()
    spans_BT = torch.where((positions_BT < 6) & (documents_BT >= 0), documents_BT, -1)
    plain, _ = decoder.packed(x_BTD, positions_BT, SequenceMetadata.of(documents_BT), None, spans_BT)
    dense = _decoder(prefix="media", attention_backend="dense").train()
    other, _ = dense.packed(x_BTD, positions_BT, SequenceMetadata.of(documents_BT, 16), None, spans_BT)
    torch.testing.assert_close(plain, other[: len(plain)], rtol=1e-10, atol=1e-10)
    none, _ = decoder.packed(
        x_BTD, positions_BT, SequenceMetadata.of(documents_BT), None, torch.full_like(spans_BT, -1)
    )
    assert not torch.allclose(plain, none)


def test_which_tokens_pass() -> None:
    lengths, weights = (5, 1, 4), torch.tensor([0.1, 0.9, 0.9, -1.0, 0.3, -5.0, 2.0, 2.0, 2.0, 3.0])
    documents_Q = torch.tensor([0] * 5 + [1] + [2] * 4)
    sequences = SequenceMetadata.of_lengths(lengths, torch.arange(10))
    layout = DepthLayout.of(sequences, documents_Q, 0.5)
    assert layout.sequences.lengths == (3, 1, 2)
    assert layout.chosen(weights).tolist() == [1, 2, 4, 5, 6, 9], "of equal weights the first"
    assert [num_passing(length, 0.1) for length in (1, 10, 11, 30)] == [1, 1, 2, 3]
    assert DepthLayout.of(sequences, documents_Q, 1.0).chosen(weights).tolist() == list(range(10))


@pytest.mark.parametrize("router", ["learned", "random"])
def test_autocast_and_checkpointed_blocks_choose_the_same_tokens(router: Any) -> None:
    x_BTD, positions_BT, documents_BT = _batch()
    results = []
    for mode in ("none", "full", "selective"):
        decoder = _decoder(gradient_checkpointing=mode, dropout=0.2, mod_router=router).float().train()
        torch.manual_seed(4)
        inputs = x_BTD.float().requires_grad_()
        hidden_BTD, stats = decoder(inputs, positions_BT, documents_BT)
        (hidden_BTD.square().sum() + (stats.depth.loss(1) if router == "learned" else 0.0)).backward()
        results.append((hidden_BTD.detach(), inputs.grad, [p.grad for p in decoder.layers.parameters()]))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])
    weights = []
    for is_on in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            weights.append(decoder.layers[0].depth.weights(x_BTD.float()[0]))  # pyright: ignore
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mod_layers": [3]}, "mod_layers names layer 3; layers are 0 to 2"),
        ({"mod_capacity": 0.0}, "mod_capacity is 0.0; it must be above 0 and at most 1"),
        ({"mod_router": "gaussian"}, "mod_router is 'gaussian'; choose learned or random"),
        ({"mod_predictor_coef": -1.0}, "mod_predictor_coef is -1.0"),
        ({"moe": MoEConfig(4, 2, 8)}, "mod_layers names layer 0, which has experts"),
        ({"sliding_window": 4}, "mod_layers names layer 0, which is sliding"),
    ],
)
def test_blocks_that_cannot_skip_tokens_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
    mixed = dataclasses.replace(CONFIG, moe=MoEConfig(4, 2, 8), moe_layers=(1,), mod_layers=[0, 2])
    assert mixed.skips_tokens(2) and not mixed.skips_tokens(1)
