"""Weights of 8 and 4 bits: near the given ones, products as of the dequantized ones, less memory, errors by name."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, set_adapter
from mmllm.inference.api import Model
from mmllm.inference.quantize import quantize
from mmllm.inference.quantized_layers import (
    Int4Matrices,
    Int8Matrices,
    Matrices,
    QuantizedExperts,
    QuantizedHead,
    QuantizedLinear,
    int4_codes,
    int8_codes,
    pack,
)
from mmllm.model.experts import Experts
from mmllm.model.multimodal import MultimodalModel
from tests.inference_fixtures import images, make, make_model, make_tokenizer, sounds

BF16 = 2.0**-8
"""Of a number's size at most is lost by rounding it to bfloat16."""


def weights(*shape: int, seed: int = 0) -> Tensor:
    """As wide as trained ones: some outputs and inputs are much larger than others."""
    generator = torch.Generator().manual_seed(seed)
    scale_N1 = torch.rand(*shape[:-1], 1, generator=generator) + 0.02
    return 0.05 * scale_N1 * torch.randn(*shape, generator=generator)


def rows(num_rows: int, width: int) -> Tensor:
    return torch.randn(num_rows, width, generator=torch.Generator().manual_seed(1))


# -------------------------------------------------------------------------------------------------------------- weights
def test_8_bits_are_the_nearest():
    weights_ENK = weights(2, 7, 40)
    codes_ENK, scales_EN = int8_codes(weights_ENK)
    assert codes_ENK.dtype == torch.int8 and scales_EN.dtype == torch.float32
    error_ENK = codes_ENK * scales_EN[..., None] - weights_ENK
    assert (error_ENK.abs() <= scales_EN[..., None] * 0.5001).all()
    torch.testing.assert_close(scales_EN * 127, weights_ENK.abs().amax(dim=-1))
    codes_ENK, scales_EN = int8_codes(torch.zeros(1, 2, 3))
    assert not codes_ENK.any() and not scales_EN.any()


@pytest.mark.parametrize("group_size", [32, 64])
def test_4_bits_lose_no_more_than_half_a_step_unless_clipping_loses_less(group_size):
    weights_ENK = weights(2, 6, 128) + 0.03
    codes_ENK, scales_EGN2 = int4_codes(weights_ENK, group_size)
    assert codes_ENK.dtype == torch.int32 and codes_ENK.min() >= 0 and codes_ENK.max() == 15
    scales, zeros = scales_EGN2.float().transpose(1, 2)[..., None].unbind(-2)
    groups = weights_ENK.unflatten(-1, (-1, group_size))
    found = (codes_ENK.unflatten(-1, (-1, group_size)) - 8) * scales + zeros
    plain_step = (groups.amax(-1) - groups.amin(-1)) / 15
    plain = plain_step[..., None] * ((groups - groups.amin(-1, keepdim=True)) / plain_step[..., None]).round()
    plain += groups.amin(-1, keepdim=True)
    squares, plain_squares = ((each - groups).square().sum(-1) for each in (found, plain))
    assert (squares <= 1.1 * plain_squares).all() and squares.sum() < 0.97 * plain_squares.sum()
    for constant in (0.0, 0.3, -2.0):
        codes_ENK, scales_EGN2 = int4_codes(torch.full((1, 2, 64), constant), 32)
        matrices = Int4Matrices.of(torch.full((1, 2, 64), constant), 32)
        torch.testing.assert_close(matrices.dequantized(), torch.full((1, 2, 64), constant), rtol=BF16, atol=0)


SHAPES = [(1, 1, 1), (1, 5, 24), (3, 17, 64), (1, 2052, 192), (2, 48, 96)]


def all_matrices(shape: tuple[int, int, int]) -> list[Matrices]:
    weights_ENK = weights(*shape)
    made: list[Matrices] = [Int8Matrices.of(weights_ENK)]
    return made + [Int4Matrices.of(weights_ENK, size) for size in (32, 64) if shape[2] % size == 0]


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_dequantized_weights(shape):
    """Inputs that bfloat16 holds: its output alone is rounded."""
    num_matrices, num_outputs, width = shape
    weights_ENK = weights(*shape)
    for matrices in all_matrices(shape):
        dequantized_ENK = matrices.dequantized()
        assert dequantized_ENK.shape == shape and dequantized_ENK.dtype == torch.float32
        bound = 0.02 if isinstance(matrices, Int8Matrices) else 0.15
        assert (dequantized_ENK - weights_ENK).norm() < bound * weights_ENK.norm()
        for num_rows in (0, 1, 2, 5, 33):
            x_MK = rows(num_rows, width).bfloat16()
            for index in range(num_matrices):
                found_MN = matrices.product(x_MK, index)
                wanted_MN = x_MK.double() @ dequantized_ENK[index].double().T
                size_MN = x_MK.double().abs() @ dequantized_ENK[index].double().abs().T
                assert found_MN.shape == (num_rows, num_outputs) and found_MN.dtype == torch.float32
                assert ((found_MN - wanted_MN).abs() <= BF16 * wanted_MN.abs() + 1e-5 * size_MN + 1e-9).all()


def test_a_rows_product_is_the_same_beside_any_others():
    for matrices in all_matrices((1, 384, 192)):
        x_MK = rows(40, 192).bfloat16()
        one_by_one = torch.cat([matrices.product(x_MK[row : row + 1]) for row in range(40)])
        for num_rows in (2, 3, 8, 31, 40):
            assert torch.equal(matrices.product(x_MK[:num_rows]), one_by_one[:num_rows])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_memory_is_what_was_asked_for(kind):
    matrices = pack(weights(2, 64, 128), kind, 32)
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in matrices.state_dict().values())
    num_weights = 2 * 64 * 128
    if kind == "int8":
        assert num_bytes == num_weights + 2 * 64 * 4
    else:
        assert num_bytes == num_weights // 2 + num_weights // 32 * 4
    odd = pack(weights(1, 5, 24), kind, 32)
    assert isinstance(odd, Int8Matrices), "groups of 32 don't divide 24 inputs"


# --------------------------------------------------------------------------------------------------------------- layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_linear_layer(kind, dtype):
    linear = nn.Linear(64, 33).to(dtype)
    layer = QuantizedLinear(pack(linear.weight.detach()[None], kind, 32), linear.bias)
    assert (layer.in_features, layer.out_features) == (64, 33) and not list(layer.parameters())
    x = rows(6, 64).view(2, 3, 64).to(dtype)
    wanted = F.linear(x.float(), layer.matrices.dequantized()[0], linear.bias.detach().float())
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 3, 33)
    torch.testing.assert_close(found.float(), wanted, rtol=0.02, atol=0.02)
    assert (found.float() - wanted).norm() < 0.005 * wanted.norm()


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_layers_of_one_input_are_parts_of_one(kind, has_bias):
    sizes = (128, 64, 192) if kind == "int4" else (5, 64, 1)
    weights_ENK = weights(1, sum(sizes), 96)
    whole = QuantizedLinear(pack(weights_ENK, kind, 32), rows(1, sum(sizes))[0] if has_bias else None)
    parts = whole.split(sizes)
    alone = [pack(weights_NK[None], kind, 32) for weights_NK in weights_ENK[0].split(sizes)]
    x = rows(3, 96)
    for part, matrices in zip(parts, alone, strict=True):
        assert torch.equal(part.matrices.dequantized(), matrices.dequantized())
    assert torch.equal(torch.cat([part(x) for part in parts], dim=1), whole(x))
    assert QuantizedLinear.joined(parts) is whole and QuantizedLinear.joined(copy.deepcopy(parts)) is not None
    others = whole.split(sizes)
    assert all(part.matrices.state_dict()[name].data_ptr() in whole_memory(whole, name)
               for part in parts for name in part.matrices.state_dict() if name != "scales")  # fmt: skip
    for layers in (parts[:2], [*parts[:2], alone[2]], [nn.Linear(2, 2)], parts[:1], [], parts[::-1], parts[1:]):
        assert QuantizedLinear.joined(layers) is None
    assert QuantizedLinear.joined([*parts[:2], others[2]]) is whole, "another part, but the same memory"


def whole_memory(layer: QuantizedLinear, name: str) -> range:
    tensor = layer.matrices.state_dict()[name]
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.element_size())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
def test_experts(kind, num_tokens):
    """Beside the reference with the dequantized weights; an expert that is left out, and one that is named twice."""
    experts, shared = (Experts(64, number, 32, "reference") for number in (5, 2))
    for each in (experts, shared):
        each.gate_up_proj.data, each.down_proj.data = weights(*each.gate_up_proj.shape), weights(*each.down_proj.shape)
    made = []
    for each in (experts, shared):
        gate_up, down = (pack(weight.detach(), kind, 32) for weight in (each.gate_up_proj, each.down_proj))
        made.append(QuantizedExperts(gate_up, down, len(each.gate_up_proj)))
        each.gate_up_proj.data, each.down_proj.data = gate_up.dequantized(), down.dequantized()
    x_TD, gates_TJ = 3 * rows(num_tokens, 64), rows(num_tokens, 3).softmax(dim=-1)
    experts_TJ = torch.tensor([[4, 0, 0], [1, -1, 2], [0, 1, 4]]).repeat(3, 1)[:num_tokens]
    for beside in (None, (made[1], shared)):
        found_TD = made[0](x_TD, gates_TJ, experts_TJ, *(() if beside is None else beside[:1]))
        with torch.no_grad():
            wanted_TD = experts(x_TD, gates_TJ, experts_TJ, *(() if beside is None else beside[1:]))
        assert found_TD.shape == (num_tokens, 64) and found_TD.dtype == torch.float32
        assert (found_TD - wanted_TD).norm() <= 0.01 * wanted_TD.norm()
        if num_tokens > 1:
            one_by_one = [
                made[0](x_TD[t : t + 1], gates_TJ[t : t + 1], experts_TJ[t : t + 1], *(beside or ())[:1])
                for t in range(num_tokens)
            ]
            assert torch.equal(torch.cat(one_by_one), found_TD), "in the same order"


# ---------------------------------------------------------------------------------------------------------------- model
def reference_of(model: MultimodalModel) -> MultimodalModel:
    """The quantized model with plain layers of the dequantized weights, which compute in float32."""
    reference = copy.deepcopy(model)
    for name, module in list(reference.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            plain.weight.data = module.matrices.dequantized()[0]
            if module.bias is not None:
                plain.bias.data = module.bias
        elif isinstance(module, QuantizedExperts):
            plain = Experts(module.gate_up.num_inputs, module.num_experts, module.down.num_inputs, "reference")
            plain.gate_up_proj.data, plain.down_proj.data = module.gate_up.dequantized(), module.down.dequantized()
        else:
            continue
        owner, _, leaf = name.rpartition(".")
        setattr(reference.get_submodule(owner), leaf, plain)
    return reference


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("is_tied", [True, False])
def test_a_models_hidden_states_are_those_of_its_dequantized_weights(kind, is_tied):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, tie_word_embeddings=is_tied)
    plain = copy.deepcopy(model)
    done = quantize(model, kind, towers=True)
    reference, decoder = reference_of(model), model.decoder
    x_BTD, positions_BT = rows(22, 32).view(2, 11, 32), torch.arange(11).expand(2, -1)
    with torch.no_grad():
        found, wanted, first = (
            each.decoder(x_BTD, positions_BT, torch.zeros_like(positions_BT))[0] for each in (model, reference, plain)
        )
        # One token may be near to another expert.
        assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).quantile(0.9) < 0.02
        lost = (found - first).norm() / first.norm()
        assert lost < (0.05 if kind == "int8" else 0.5) and (found != first).any()
        logits = decoder.head(found)
        head = decoder.lm_head
        assert isinstance(head, QuantizedHead)
        rows_VD = head.matrices.dequantized()[0]
        torch.testing.assert_close(logits, found @ rows_VD.T, rtol=0.02, atol=0.05)
        torch.testing.assert_close(decoder.lm_head.part(7, 20)(found), logits[..., 7:20], rtol=0, atol=0)
        torch.testing.assert_close(plain.decoder.lm_head.part(7, 20)(found), plain.decoder.head(found)[..., 7:20])
    assert decoder.lm_head(found, lambda hidden, rows: rows) is decoder.embed_tokens.weight or not is_tied
    torch.testing.assert_close(decoder.head_weight_VD, plain.decoder.head_weight_VD, rtol=0, atol=0.02)
    assert done.bytes_before == num_bytes(plain) and done.bytes_after == num_bytes(model) < done.bytes_before
    assert "decoder.lm_head" in done.names and "decoder.layers.1.mlp.experts" in done.names
    assert "image_projector.project.0" in done.names and "decoder.layers.0.self_attn.q_proj" in done.names
    assert bool(done.in_8_bits) == (kind == "int4")


def num_bytes(model: nn.Module) -> int:
    return sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_model_answers(kind, dtype):
    whole = make("delay")
    model = Model(copy.deepcopy(whole.model).to(dtype), whole.tokenizer, generation=whole.generation)
    quantize(model.model, kind, towers=True)
    pictures, heard = images(3), sounds(3)
    captions = [str(caption) for caption in model.caption(pictures, temperature=0.0)]
    assert captions == [str(model.caption(picture, temperature=0.0)) for picture in pictures]
    assert len(model.transcribe(heard)) == 3
    assert model.speak("one two", temperature=0.0).samples.size


@pytest.mark.parametrize(
    ("adapter", "kept"),
    [
        (AdapterConfig(r=4), []),
        (AdapterConfig(r=4, parts=("experts",)), ["decoder.layers.1.mlp.experts.base_layer.base_layer"]),
        (AdapterConfig(r=4, use_dora=True), [f"decoder.layers.0.self_attn.{x}_proj.base_layer" for x in "qkvo"]),
    ],
)
def test_adapters_stay_around_what_is_quantized(adapter, kept):
    pytest.importorskip("peft")
    model = make_model(make_tokenizer())
    add_adapter(model.decoder, adapter, "mine")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(model)
    done = quantize(model, "int8")
    x_BTD, positions_BT = rows(22, 32).view(2, 11, 32), torch.arange(11).expand(2, -1)
    with torch.no_grad():
        for name in ("mine", None):
            for each in (model, plain):
                set_adapter(each.decoder, name)
            found, wanted = (each.decoder(x_BTD, positions_BT, 0 * positions_BT)[0] for each in (model, plain))
            assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.04
    assert not {name for name in done.names if "lora_" in name} and not set(kept) & set(done.names)
    assert set(kept) <= {name for name, _ in model.named_modules()}


def test_what_can_not_be_quantized_is_named():
    model = make_model(make_tokenizer())
    with pytest.raises(ValueError, match="quantize is 'int2'; it must be one of int8, int4"):
        quantize(model, "int2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="group_size is 48; it must be one of 32, 64, 128"):
        quantize(model, "int4", group_size=48)
    with pytest.raises(ValueError, match=r"decoder\..* is torch.float16; weights of torch.float32 or torch.bfloat16"):
        quantize(copy.deepcopy(model).half(), "int8")
    with pytest.raises(ValueError, match=r" is on meta; weights of 8 and 4 bits are for the CPU: load the model there"):
        quantize(copy.deepcopy(model).to("meta"), "int8")
    compiled = copy.deepcopy(model)
    compiled.decoder.layers[0].compiled = print  # type: ignore[assignment]
    with pytest.raises(ValueError, match="the decoder's layers are compiled"):
        quantize(compiled, "int8")
    quantize(model, "int8")
    assert isinstance(model.decoder.lm_head, QuantizedHead)
    with pytest.raises(ValueError, match=r"is quantized already; load the model again"):
        quantize(model, "int4")


def test_random_weights_lose_as_much_as_their_bits_say():
    """The rounding of a group of Gaussian numbers: about 0.8% in 8 bits, 8% in 4."""
    weights_ENK = torch.from_numpy(np.random.default_rng(0).normal(0, 0.02, (1, 512, 768)).astype(np.float32))
    kinds = [Int8Matrices.of(weights_ENK), *(Int4Matrices.of(weights_ENK, size) for size in (32, 64, 128))]
    lost = [float((each.dequantized() - weights_ENK).norm() / weights_ENK.norm()) for each in kinds]
    assert lost == sorted(lost) and lost[0] < 0.009 and 0.06 < lost[1] < 0.08 and lost[3] < 0.11
