"""Rotary positions of some channels and some layers, and biases of dense layers: beside the plain definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.model import cpu
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops
from mmllm.model.multimodal import ModelConfig
from mmllm.model.rope import RopeScaling, inverse_frequencies, rotary
from tests.cached_decoding import CachedRows

pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")


def decoder_of(**changes: Any) -> Decoder:
    values: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "intermediate_size": 24, "rope_theta": 100.0,
    }  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**values | changes)).double().eval()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return decoder


def turned(x_NHC: Tensor, positions_N: Tensor, num_turned: int, theta: float) -> Tensor:
    """Channel by channel, as it is defined."""
    out_NHC = x_NHC.clone()
    half = num_turned // 2
    for pair in range(half):
        angles_N1 = (positions_N.float() * (1.0 / theta ** torch.tensor(2 * pair / num_turned)))[:, None].to(x_NHC)
        first, second = x_NHC[..., pair], x_NHC[..., pair + half]
        out_NHC[..., pair] = first * angles_N1.cos() - second * angles_N1.sin()
        out_NHC[..., pair + half] = second * angles_N1.cos() + first * angles_N1.sin()
    return out_NHC


@pytest.mark.parametrize("num_turned", [0, 2, 6, 12])
@pytest.mark.parametrize("function", [cpu.rotate, torch.compile(cpu.rotate, backend="eager")], ids=["by hand", "plain"])
def test_the_first_channels_are_turned_and_the_others_stay(num_turned: int, function: Callable[..., Tensor]) -> None:
    positions_N = torch.arange(9) * 3
    x_NHC = torch.randn(9, 4, 12, dtype=torch.float64, requires_grad=True)
    cos, sin = rotary(positions_N, num_turned, 50.0, torch.float64)
    assert cos.shape == (9, 1, num_turned // 2)
    ours, slow = function(x_NHC, cos, sin), turned(x_NHC, positions_N, num_turned, 50.0)
    torch.testing.assert_close(ours, slow, rtol=1e-6, atol=1e-6)
    weight_NHC = torch.randn_like(x_NHC)
    got, wanted = (torch.autograd.grad((out * weight_NHC).sum(), x_NHC)[0] for out in (ours, slow))
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


SWITCHES: dict[str, dict[str, Any]] = {
    "partial": {"partial_rotary_factor": 0.5},
    "partial and scaled": {"partial_rotary_factor": 0.67, "rope_scaling": RopeScaling("yarn", 4.0, 16)},
    "some layers without positions": {"no_rope_layers": (1, 0, 1)},
    "all": {
        "partial_rotary_factor": 0.5, "no_rope_layers": [0, 1, 1], "mlp_bias": True, "attention_bias": True,
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "sliding_window": 4,
        "sliding_rope_theta": 10.0,
    },
    "skipped tokens": {"no_rope_layers": (1, 0, 0), "mod_layers": (1,), "mod_capacity": 0.5},
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_cache_and_packing_compute_the_same(name: str) -> None:
    decoder = decoder_of(**SWITCHES[name])
    lengths = (11, 6)
    documents_BT = torch.tensor([[0] * 11 + [1] * 6 + [-1] * 2])
    positions_BT = torch.cat([torch.arange(11), torch.arange(6), torch.zeros(2, dtype=torch.int64)])[None]
    x_BTD = torch.randn(1, 19, 16, dtype=torch.float64)
    whole = decoder(x_BTD, positions_BT, documents_BT)[0]
    start = 0
    for length in lengths:
        place = slice(start, start + length)
        cached, parts = CachedRows(decoder, 1, length), []
        for piece in (slice(0, 3), *(slice(at, at + 1) for at in range(3, length))):
            parts.append(cached(x_BTD[:, place][:, piece], documents_BT[:, place][:, piece]))
        torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, place], rtol=1e-9, atol=1e-9)
        start += length


def test_layers_without_positions_know_the_order_only_by_what_they_see() -> None:
    decoder = decoder_of(num_hidden_layers=1, no_rope_layers=(0,))
    x_BTD, documents_BT = torch.randn(1, 7, 16, dtype=torch.float64), torch.zeros(1, 7, dtype=torch.int64)
    some = decoder(x_BTD, torch.arange(7)[None], documents_BT)[0]
    others = decoder(x_BTD, torch.arange(7)[None] * 5 + 3, documents_BT)[0]
    shuffled = decoder(x_BTD[:, [3, 1, 0, 2, 5, 4, 6]], torch.arange(7)[None], documents_BT)[0]
    assert torch.equal(some, others)
    torch.testing.assert_close(some[:, 6], shuffled[:, 6], rtol=1e-9, atol=1e-9)
    with_positions = decoder_of(num_hidden_layers=1)(x_BTD, torch.arange(7)[None], documents_BT)[0]
    assert not torch.allclose(some[:, 1:], with_positions[:, 1:], atol=1e-3)


def test_biases_of_dense_layers_are_added() -> None:
    decoder = decoder_of(mlp_bias=True)
    mlp: Any = decoder.layers[0].mlp
    x_ND = torch.randn(5, 16, dtype=torch.float64)
    gate, up = (x_ND @ each.weight.T + each.bias for each in (mlp.gate_proj, mlp.up_proj))
    wanted = (gate * gate.sigmoid() * up) @ mlp.down_proj.weight.T + mlp.down_proj.bias
    torch.testing.assert_close(mlp(x_ND), wanted)
    fresh = Decoder(decoder.config)
    assert all(not bias.any() for name, bias in fresh.named_parameters() if name.endswith("bias"))
    flops = [ModelFlops.of(ModelConfig(each.config)).per_token for each in (decoder, decoder_of())]
    assert flops[0] == flops[1], "products alone count"


def test_short_contexts_of_yarn_are_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    for length, truncate in ((2, True), (2, False), (40, False), (100, True)):
        values = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "truncate": truncate}
        config = LlamaConfig(
            head_dim=32, max_position_embeddings=4 * length,
            rope_parameters=values | {"original_max_position_embeddings": length},
        )  # fmt: skip
        theirs_C, factor = ROPE_INIT_FUNCTIONS["yarn"](config)
        ours_C, our_factor = inverse_frequencies(32, 500.0, RopeScaling("yarn", 4.0, length, truncate=truncate))
        torch.testing.assert_close(ours_C, theirs_C, rtol=1e-6, atol=0)
        assert our_factor == pytest.approx(factor)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partial_rotary_factor": 0.0}, "partial_rotary_factor is 0.0; it must be above 0"),
        ({"partial_rotary_factor": 0.25}, "which turns 3 of 12 channels; wanted an even number"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5"),
        ({"partial_rotary_factor": float("nan")}, "partial_rotary_factor is nan"),
        ({"partial_rotary_factor": float("inf")}, "partial_rotary_factor is inf"),
        (
            {"no_rope_layers": (1, 0)},
            r"no_rope_layers is \[1, 0\]; give 1 \(positions\) or 0 \(none\) for each of the 3",
        ),
        ({"no_rope_layers": (1, 0, 2)}, "no_rope_layers"),
    ],
)
def test_switches_of_positions_that_cannot_be_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_of(**changes)
