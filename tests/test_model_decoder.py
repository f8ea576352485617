from __future__ import annotations

import dataclasses

import pytest
import torch

from mmllm.losses.router import balance_loss, z_loss
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.model.routing_stats import RoutingStats
from mmllm.sequences import SequenceMetadata
from tests.cached_decoding import CachedRows

LENGTHS = [[40, 3, 1, 20], [7, 33, 5], [64], [64]]
"""Documents of four packed sequences of 64 positions; the second ends in padding."""
DENSE = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    qk_norm=True,
)
SPARSE = DecoderConfig(
    vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, moe=MoEConfig(4, 2, 24),
    moe_layers=(1, 2),
)  # fmt: skip


def _balance(stats: RoutingStats, whole: RoutingStats | None = None) -> torch.Tensor:
    whole = stats if whole is None else whole
    return balance_loss(whole.counts_LE, stats.probability_sums_LE, whole.num_tokens, stats.top_k)


def _z(stats: RoutingStats, whole: RoutingStats | None = None) -> torch.Tensor:
    return z_loss(stats.z_sums_L, (stats if whole is None else whole).num_tokens)


def _decoder(config: DecoderConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).to(dtype)
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def _packed(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    positions_BT = torch.zeros(4, 64, dtype=torch.int64)
    documents_BT = torch.full((4, 64), -1)
    for b, lengths in enumerate(LENGTHS):
        for d, (start, length) in enumerate(
            zip(torch.tensor([0, *lengths[:-1]]).cumsum(0).tolist(), lengths, strict=True)
        ):
            positions_BT[b, start : start + length] = torch.arange(length)
            documents_BT[b, start : start + length] = d
    x_BTD = torch.randn(4, 64, 32, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x_BTD, positions_BT, documents_BT


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_packed_equals_unpacked(config):
    decoder = _decoder(config)
    x_BTD, positions_BT, documents_BT = _packed()
    hidden_BTD, stats = decoder(x_BTD, positions_BT, documents_BT)
    probability_sums, counts = 0, 0
    for b in range(4):
        for d in range(len(LENGTHS[b])):
            mask = documents_BT[b] == d
            alone, alone_stats = decoder(x_BTD[b, mask][None], positions_BT[b, mask][None], torch.zeros(1, mask.sum()))
            torch.testing.assert_close(hidden_BTD[b, mask], alone[0], rtol=1e-10, atol=1e-10)
            probability_sums = probability_sums + alone_stats.probability_sums_LE
            counts = counts + alone_stats.counts_LE
    assert hidden_BTD[documents_BT < 0].abs().max() == 0
    if config.moe is not None:
        torch.testing.assert_close(stats.probability_sums_LE, probability_sums, rtol=1e-10, atol=1e-10)
        assert torch.equal(stats.counts_LE, counts)
        assert stats.counts_LE.sum(dim=1).tolist() == [2 * (documents_BT >= 0).sum()] * 2


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_no_gradient_flows_between_documents(config):
    decoder = _decoder(config, torch.float32)
    x_BTD, positions_BT, documents_BT = _packed(torch.float32)
    x_BTD.requires_grad_()
    hidden_BTD, _ = decoder(x_BTD, positions_BT, documents_BT)
    for b, d in [(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 0)]:
        (grad,) = torch.autograd.grad(hidden_BTD[b][documents_BT[b] == d].square().sum(), x_BTD, retain_graph=True)
        inside = torch.zeros_like(documents_BT, dtype=torch.bool)
        inside[b] = documents_BT[b] == d
        assert grad[~inside].abs().max() == 0
        assert (grad[inside].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_checkpointed_blocks_give_the_same_loss_and_gradients_from_less_memory(config):
    x_BTD, positions_BT, documents_BT = _packed()
    losses, gradients, num_kept = [], [], []
    for is_checkpointed in (False, True):
        decoder = _decoder(dataclasses.replace(config, dropout=0.2, gradient_checkpointing=is_checkpointed)).train()
        kept: list[int] = []

        def keep(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.numel())
            return tensor

        torch.manual_seed(3)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            hidden_BTD, stats = decoder(x_BTD.requires_grad_(), positions_BT, documents_BT)
            loss = hidden_BTD.pow(3).sum() + _balance(stats) + _z(stats)
        gradients.append(torch.autograd.grad(loss, [x_BTD, *decoder.layers.parameters()]))
        losses.append(loss.detach())
        num_kept.append(sum(kept))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)
    assert num_kept[1] < num_kept[0] / 3


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_what_was_computed_in_eval_mode_is_computed_again_so(config, mode):
    """Policies are scored without dropout, in modules that are back in training mode before the backward pass."""
    x_BTD, positions_BT, documents_BT = _packed()
    gradients = []
    for recompute in ("none", mode):
        decoder = _decoder(dataclasses.replace(config, dropout=0.2, gradient_checkpointing=recompute)).eval()
        hidden_BTD, _ = decoder(x_BTD.requires_grad_(), positions_BT, documents_BT)
        decoder.train()
        gradients.append(
            torch.autograd.grad(hidden_BTD.pow(3).sum(), [x_BTD, decoder.layers[0].self_attn.q_proj.weight])
        )
        assert all(module.training for module in decoder.modules())
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("config", "tolerance"), [(DENSE, 0.0), (SPARSE, 1e-6)])
def test_changing_one_document_leaves_the_others(config, tolerance):
    decoder = _decoder(config, torch.float32)
    x_BTD, positions_BT, documents_BT = _packed(torch.float32)
    changed_BTD = x_BTD.clone()
    changed = torch.zeros_like(documents_BT, dtype=torch.bool)
    changed[0] = documents_BT[0] == 0
    changed_BTD[changed] = torch.randn_like(changed_BTD[changed])
    before = decoder.head(decoder(x_BTD, positions_BT, documents_BT)[0])
    after = decoder.head(decoder(changed_BTD, positions_BT, documents_BT)[0])
    assert (before[changed] - after[changed]).abs().max() > 0.01
    scale = before[~changed].abs().max()
    assert (before[~changed] - after[~changed]).abs().max() <= tolerance * scale


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_attention_is_causal(config):
    decoder = _decoder(config)
    x_BTD, positions_BT, documents_BT = _packed()
    x_BTD.requires_grad_()
    hidden_BTD, _ = decoder(x_BTD, positions_BT, documents_BT)
    (grad,) = torch.autograd.grad(hidden_BTD[2, 30].sum(), x_BTD)
    assert grad[2, 31:].abs().max() == 0
    assert (grad[2, :31].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("config", [DENSE, SPARSE])
def test_cached_equals_uncached_with_left_padding(config):
    decoder = _decoder(config)
    lengths, total, prompt = [20, 13, 20], 20, 11
    x_BTD = torch.randn(3, total, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    documents_BT = torch.zeros(3, total, dtype=torch.int64)
    documents_BT[1, : total - lengths[1]] = -1
    positions_BT = (torch.arange(total) - torch.tensor(lengths)[:, None].neg() - total).clamp(min=0)
    whole, _ = decoder(x_BTD, positions_BT, documents_BT)
    rows = CachedRows(decoder, 3, total)
    pieces = [slice(0, prompt), slice(prompt, prompt + 3)] + [slice(t, t + 1) for t in range(prompt + 3, total)]
    cached = torch.cat([rows(x_BTD[:, s], documents_BT[:, s]) for s in pieces], dim=1)
    real = documents_BT >= 0
    torch.testing.assert_close(cached[real], whole[real], rtol=1e-10, atol=1e-10)
    assert [row.length for row in rows.rows] == lengths


def test_layout_finds_every_token_once():
    _, _, documents_BT = _packed()
    layout = SequenceMetadata.of(documents_BT)
    assert torch.equal(layout.gather_P[layout.scatter_Q], torch.arange(layout.tokens_Q.numel()))
    assert layout.scatter_Q.unique().numel() == layout.tokens_Q.numel() == int((documents_BT >= 0).sum())
    assert sum(count * length for count, length in layout.blocks) == layout.gather_P.numel()
    assert len(layout.blocks) == 2  # up to 32 positions, and up to 64


def test_a_batch_of_padding_alone_is_zeros():
    decoder = _decoder(SPARSE)
    x_BTD, positions_BT, documents_BT = _packed()
    hidden_BTD, stats = decoder(x_BTD.requires_grad_(), positions_BT, torch.full_like(documents_BT, -1))
    assert hidden_BTD.abs().max() == 0
    (hidden_BTD.sum() + _balance(stats) + _z(stats)).backward()
    assert stats.num_tokens == 0


def test_auxiliary_losses_by_hand_and_padding_left_out():
    decoder = _decoder(SPARSE)
    x_BTD, positions_BT, documents_BT = _packed()
    _, stats = decoder(x_BTD, positions_BT, documents_BT)
    changed = x_BTD.clone()
    changed[documents_BT < 0] = 1e3
    _, again = decoder(changed, positions_BT, documents_BT, modality_BT=torch.full_like(documents_BT, 2))
    assert _balance(stats) == _balance(again)
    assert _z(stats) == _z(again)
    assert again.counts_LME is not None
    assert torch.equal(again.counts_LME[:, 2], again.counts_LE)
    shares = stats.counts_LE / stats.counts_LE.sum(dim=1, keepdim=True)
    expected = (4 * shares * stats.probability_sums_LE / stats.num_tokens).sum(dim=1).mean()
    torch.testing.assert_close(_balance(stats), expected.to(torch.float64), rtol=1e-6, atol=0)


def test_balance_loss_is_one_when_balanced_and_ranks_add_up():
    decoder = _decoder(SPARSE)
    for block in (decoder.layers[1], decoder.layers[2]):
        block.mlp.gate.weight.data.zero_()
    x_BTD, positions_BT, documents_BT = _packed()
    assert abs(_balance(decoder(x_BTD, positions_BT, documents_BT)[1]).item() - 1) < 1e-9
    decoder = _decoder(SPARSE)
    whole = decoder(x_BTD, positions_BT, documents_BT)[1]
    parts = [decoder(x_BTD[b, None], positions_BT[b, None], documents_BT[b, None])[1] for b in range(4)]
    sums = sum(_balance(part, whole) for part in parts)
    torch.testing.assert_close(sums, _balance(whole), rtol=1e-12, atol=0)
    sums = sum(_z(part, whole) for part in parts)
    torch.testing.assert_close(sums, _z(whole), rtol=1e-12, atol=0)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_router_is_exact_in_bf16(autocast):
    decoder = _decoder(SPARSE, torch.float32)
    moe = decoder.layers[1].mlp.to(torch.float32 if autocast else torch.bfloat16)
    x_ND = torch.randn(50, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out_ND, _ = moe(x_ND, TokenInfo())
        routed = moe.gate(x_ND)
    exact_NE = x_ND.float() @ moe.gate.weight.float().T
    assert (out_ND.dtype, routed.logits_NE.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(routed.logits_NE, exact_NE, rtol=1e-5, atol=1e-6)
    assert torch.equal(routed.experts_NK, exact_NE.topk(2).indices)


def test_initial_weights_and_meta_device():
    torch.manual_seed(0)
    decoder = Decoder(SPARSE)
    assert abs(decoder.embed_tokens.weight.std().item() - 0.02) < 1e-3
    assert abs(decoder.layers[1].mlp.experts.down_proj.std().item() - 0.02 / 6**0.5) < 1e-3
    assert abs(decoder.layers[0].self_attn.o_proj.weight.std().item() - 0.02 / 6**0.5) < 1e-3
    with torch.device("meta"):
        large = Decoder(DecoderConfig(vocab_size=50000, hidden_size=2048, num_hidden_layers=16,
                      num_attention_heads=16, num_key_value_heads=4,
                                      moe=MoEConfig(64, 8, 512)))  # fmt: skip
    assert all(parameter.is_meta for parameter in large.parameters())
    assert 3e9 < sum(parameter.numel() for parameter in large.parameters()) < 4e9


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size is 30, which 4 heads do not divide"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_key_value_heads": 3}, "num_key_value_heads, 3, does not divide"),
        ({"moe_layers": (0, 3)}, "names layer 3; layers are 0 to 2"),
    ],
)
def test_bad_configs_are_named(changes, message):
    values = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4} | changes
    with pytest.raises(ValueError, match=message):
        DecoderConfig(**values)
    with pytest.raises(ValueError, match="num_experts_per_tok is 5"):
        MoEConfig(num_experts=4, num_experts_per_tok=5)
