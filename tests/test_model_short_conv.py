"""Short causal convolutions against loops over documents, packed and with a cache."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mmllm.model.attend import PackedContext
from mmllm.model.decoder import Block, Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.roles import parameter_roles
from mmllm.model.rope import rotary
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.model.short_conv import PackedNeighbors, ShortConv
from mmllm.model.virtual_tokens import VirtualTokens
from mmllm.sequences import SequenceMetadata
from tests.cached_decoding import CachedRows

LENGTHS = [[9, 1, 2, 4], [3, 7]]
"""Documents of two packed sequences of 20 positions; both end in padding."""
CONFIG = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
    qk_norm=True,
    conv_size=4,
)
SPARSE = dataclasses.replace(CONFIG, moe=MoEConfig(4, 2, 24), moe_layers=(1, 2))


def _documents() -> tuple[Tensor, Tensor]:
    ids_BT, positions_BT = torch.full((2, 20), -1), torch.zeros(2, 20, dtype=torch.int64)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            ids_BT[row, start : start + length] = number
            positions_BT[row, start : start + length] = torch.arange(length)
            start += length
    return ids_BT, positions_BT


def _slow(x_ND: Tensor, lengths: list[int], weight_KD: Tensor) -> Tensor:
    rows, start = [], 0
    for length in lengths:
        document = x_ND[start : start + length]
        for t in range(length):
            row = document[t]
            for j in range(len(weight_KD)):
                if t - j >= 0:
                    row = row + weight_KD[j] * document[t - j]
            rows.append(row)
        start += length
    return torch.stack(rows)


def _decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config).double()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


@pytest.mark.parametrize("size", [2, 4, 6])
def test_packed_is_what_is_written_out_with_its_gradients(size: int) -> None:
    torch.manual_seed(0)
    ids_BT, _ = _documents()
    conv = ShortConv(5, size, "attention").double()
    x_ND = torch.randn(26, 5, dtype=torch.float64, requires_grad=True)
    neighbors = PackedNeighbors(SequenceMetadata.of(ids_BT), size)
    want_ND = _slow(x_ND, [*LENGTHS[0], *LENGTHS[1]], conv.weight)
    got_ND = conv(x_ND, neighbors)
    torch.testing.assert_close(got_ND, want_ND, rtol=1e-12, atol=1e-12)
    upstream_ND = torch.randn_like(want_ND)
    for got, want in zip(
        torch.autograd.grad(got_ND, [x_ND, conv.weight], upstream_ND),
        torch.autograd.grad(want_ND, [x_ND, conv.weight], upstream_ND),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_filler_and_an_empty_batch() -> None:
    ids_BT, _ = _documents()
    sequences = SequenceMetadata.of(ids_BT, multiple=16)
    assert sequences.size == 32
    conv, x_QD = ShortConv(5, 4, "mlp"), torch.randn(32, 5)
    want_QD = _slow(x_QD, list(sequences.lengths), conv.weight)
    torch.testing.assert_close(conv(x_QD, PackedNeighbors(sequences, 4)), want_QD)
    empty = SequenceMetadata.of(torch.full((1, 4), -1))
    assert conv(torch.zeros(0, 5), PackedNeighbors(empty, 4)).shape == (0, 5)


@pytest.mark.parametrize("config", [CONFIG, SPARSE])
def test_documents_do_not_see_each_other_nor_what_follows(config: DecoderConfig) -> None:
    decoder = _decoder(config)
    ids_BT, positions_BT = _documents()
    x_BTD = torch.randn(2, 20, 32, dtype=torch.float64, requires_grad=True)
    hidden_BTD, _ = decoder(x_BTD, positions_BT, ids_BT)
    for row, at, start in [(0, 9, 9), (0, 11, 10), (0, 4, 0), (1, 5, 3)]:
        (grad_BTD,) = torch.autograd.grad(hidden_BTD[row, at].pow(3).sum(), x_BTD, retain_graph=True)
        seen_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
        seen_BT[row, start : at + 1] = True
        assert grad_BTD[~seen_BT].abs().max() == 0
        assert (grad_BTD[seen_BT].abs().sum(dim=-1) > 0).all()


@pytest.mark.parametrize("config", [CONFIG, SPARSE])
@pytest.mark.parametrize("padding", ["left", "anywhere"])
def test_cached_in_pieces_equals_packed(config: DecoderConfig, padding: str) -> None:
    decoder = _decoder(config)
    total = 18
    ids_BT = torch.zeros(3, total, dtype=torch.int64)
    ids_BT[1, :7] = -1
    if padding == "anywhere":
        ids_BT[0, 3:5] = ids_BT[2, [1, 8, 9, 10, 12]] = ids_BT[1, 16] = -1
    is_real_BT = ids_BT >= 0
    positions_BT = (is_real_BT.cumsum(dim=1) - 1).clamp(min=0)
    x_BTD = torch.randn(3, total, 32, dtype=torch.float64)
    whole_BTD, _ = decoder(x_BTD, positions_BT, ids_BT)
    cached = CachedRows(decoder, 3, total)
    pieces = [slice(0, 9), slice(9, 11), *(slice(t, t + 1) for t in range(11, 14))]
    got = [cached(x_BTD[:, s], ids_BT[:, s]) for s in pieces]
    torch.testing.assert_close(
        torch.cat(got, dim=1)[is_real_BT[:, :14]], whole_BTD[:, :14][is_real_BT[:, :14]], rtol=1e-10, atol=1e-10
    )
    cached.keep([2, 0])
    for t in range(14, total):
        at = [[2, 0], slice(t, t + 1)]
        got_BTD = cached(x_BTD[at[0], at[1]], ids_BT[at[0], at[1]])
        torch.testing.assert_close(got_BTD, whole_BTD[at[0], at[1]], rtol=1e-10, atol=1e-10)


def test_a_block_does_not_leave_its_convolutions_out() -> None:
    ids_BT, positions_BT = torch.zeros(1, 4, dtype=torch.int64), torch.arange(4)[None]
    decoder, sequences = Decoder(CONFIG), SequenceMetadata.of(ids_BT)
    context, block = PackedContext(sequences, "dense"), decoder.layers[0]
    assert isinstance(block, Block)
    context.prepare(CONFIG.rule(0))
    cos, sin = rotary(positions_BT[0], 8, CONFIG.rope_theta, torch.float32)
    with pytest.raises(AssertionError, match="short convolutions needs neighbors"):
        block(torch.randn(4, 32), cos, sin, context, TokenInfo())
    block(torch.randn(4, 32), cos, sin, context, TokenInfo(), neighbors=PackedNeighbors(sequences, 4))


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_learned_tokens_before_a_document_cache_and_pack_alike(kind) -> None:
    decoder = _decoder(CONFIG)
    learned = VirtualTokens(kind, 3, CONFIG).double()
    learned.prompt_embeddings.data.normal_()
    decoder.virtual_tokens["a"] = learned
    decoder.active_virtual = "a"
    ids_BT, positions_BT = torch.zeros(2, 8, dtype=torch.int64), torch.arange(8).expand(2, 8)
    x_BTD = torch.randn(2, 8, 32, dtype=torch.float64)
    whole_BTD, _ = decoder(x_BTD, positions_BT, ids_BT)
    cached = CachedRows(decoder, 2, 8)
    got = [cached(x_BTD[:, s], ids_BT[:, s]) for s in (slice(0, 5), slice(5, 8))]
    torch.testing.assert_close(torch.cat(got, dim=1), whole_BTD, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputed_blocks_have_the_same_gradients(recompute) -> None:
    ids_BT, positions_BT = _documents()
    x_BTD = torch.randn(2, 20, 32, dtype=torch.float64)
    gradients = []
    for mode in ("none", recompute):
        decoder = _decoder(dataclasses.replace(CONFIG, gradient_checkpointing=mode)).train()
        loss = decoder(x_BTD, positions_BT, ids_BT)[0].pow(3).sum()
        gradients.append(torch.autograd.grad(loss, list(decoder.layers.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_have_no_break_and_the_same_gradients() -> None:
    torch._dynamo.reset()
    ids_BT, positions_BT = _documents()
    x_BTD = torch.randn(2, 20, 32, dtype=torch.float64)
    gradients = []
    for is_compiled in (False, True):
        decoder = _decoder(CONFIG)
        if is_compiled:
            decoder.compile_layers(backend="eager")
        loss = decoder(x_BTD, positions_BT, ids_BT)[0].pow(3).sum()
        gradients.append(torch.autograd.grad(loss, list(decoder.layers.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_weights_begin_small_and_do_not_decay() -> None:
    decoder = Decoder(CONFIG)
    roles = parameter_roles(decoder)
    names = [name for name in roles if "_conv." in name]
    assert len(names) == 6 and {roles[name] for name in names} == {"vector"}
    weights = torch.stack([decoder.get_parameter(name) for name in names])
    assert 0.2 < weights.abs().max() <= 0.3 and abs(weights.std().item() - 0.3 / 3**0.5) < 0.02
    assert not [name for name in Decoder(dataclasses.replace(CONFIG, conv_size=0)).state_dict() if "conv" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_size": 1}, "decoder.conv_size is 1; give the number of tokens"),
        ({"conv_size": -4}, "decoder.conv_size is -4"),
        ({"mod_layers": (1,)}, r"decoder.conv_size is 4 and mod_layers \[1\]"),
    ],
)
def test_bad_configs_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
