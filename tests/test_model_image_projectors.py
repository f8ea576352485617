"""Image projectors, each against a slow one."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import Tensor, nn

from mmllm.model.config import config_from_dict, config_to_dict
from mmllm.model.image_projectors import (
    ConvAbstractor,
    ImageProjector,
    ImageProjectorConfig,
    PerceiverResampler,
    PixelShuffle,
    RegBlock,
)
from mmllm.model.roles import parameter_roles

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
KINDS = [
    (ImageProjectorConfig("linear"), 12),
    (ImageProjectorConfig("mlp", hidden_size=7), 12),
    (ImageProjectorConfig("average", num_tokens=6), 6),
    (ImageProjectorConfig("attention", num_tokens=5), 5),
    (ImageProjectorConfig("perceiver", num_tokens=5, num_hidden_layers=2), 5),
    (ImageProjectorConfig("c_abstractor", num_tokens=6, num_hidden_layers=2), 6),
]


def _same_gradients(fast: Tensor, slow: Tensor, of: list[Tensor]) -> None:
    weights = torch.randn_like(slow)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weights).sum(), of),
        torch.autograd.grad((slow * weights).sum(), of),
        strict=True,
    ):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize(("config", "num_tokens"), KINDS)
def test_image_projectors_see_content_and_place(config, num_tokens):
    torch.manual_seed(0)
    projector = ImageProjector(config, grid=(3, 4), feature_width=16, width=10)
    features_NSC = torch.randn(2, 12, 16)
    out_NOD = projector(features_NSC)
    assert out_NOD.shape == (2, num_tokens, 10)
    assert projector.num_tokens == num_tokens
    torch.testing.assert_close(projector(features_NSC[1:]), out_NOD[1:])
    assert not torch.allclose(projector(features_NSC.flip(1)).flip(1), out_NOD, atol=1e-3)  # places are told apart
    assert projector(features_NSC[:0]).shape == (0, num_tokens, 10)


@pytest.mark.parametrize(("config", "num_tokens"), [*KINDS, (ImageProjectorConfig("pixel_shuffle", max_tiles=3), 3)])
def test_every_parameter_of_a_projector_learns_and_has_a_role(config, num_tokens):
    torch.manual_seed(0)
    grid = (2, 6) if config.kind == "pixel_shuffle" else (3, 4)
    projector = ImageProjector(config, grid, feature_width=16, width=10)
    out_NOD = projector(torch.randn(3, 12, 16), torch.tensor([[0, 0], [1, 1], [1, 2]]))
    assert out_NOD.shape[1] == num_tokens
    (out_NOD * torch.randn_like(out_NOD)).sum().backward()
    still = [name for name, p in projector.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert not still
    roles = parameter_roles(projector)
    added = {name for name in roles if name.endswith("embedding") or name == "queries"}
    assert all(roles[name] == "embedding" for name in added)
    assert {role for name, role in roles.items() if name not in added} <= {"hidden", "vector", "filters"}


def test_average_pooling_is_over_the_grid():
    projector = ImageProjector(ImageProjectorConfig("average", num_tokens=4), grid=(4, 4), feature_width=8, width=6)
    features_NSC = torch.randn(1, 16, 8)
    changed = features_NSC.clone()
    changed[0, 0] += torch.randn(8)  # the feature of the top left corner
    moved = (projector(changed) != projector(features_NSC)).any(dim=-1)
    assert moved.tolist() == [[True, False, False, False]]


@pytest.mark.parametrize(("grid", "scale"), [((4, 6), 2), ((3, 9), 3), ((5, 3), 1)])
def test_pixel_shuffle_equals_a_loop(grid, scale):
    rows, columns = grid
    x_NSC = torch.randn(2, rows * columns, 5)
    x_NHWC = x_NSC.view(2, rows, columns, 5)
    slots = []
    for row in range(0, rows, scale):
        for column in range(0, columns, scale):
            square = [x_NHWC[:, row + i, column + j] for i in range(scale) for j in range(scale)]
            slots.append(torch.cat(square, dim=-1))
    assert torch.equal(PixelShuffle(grid, scale)(x_NSC), torch.stack(slots, dim=1))


def _slow_perceiver(pool: PerceiverResampler, queries_OC: Tensor, x_SC: Tensor, num_heads: int) -> Tensor:
    """One picture, one head and one query at a time."""
    for layer in pool.layers:
        normed_OC, seen_XC = layer.query_norm(queries_OC), layer.feature_norm(x_SC)
        seen_XC = torch.cat([seen_XC, normed_OC])
        heads = []
        for q_WC, k_WC, v_WC in zip(
            layer.q_proj.weight.chunk(num_heads), layer.k_proj.weight.chunk(num_heads),
            layer.v_proj.weight.chunk(num_heads), strict=True,
        ):  # fmt: skip
            rows = []
            for query_C in normed_OC:
                scores_X = (seen_XC @ k_WC.T) @ (q_WC @ query_C) / len(q_WC) ** 0.5
                weights_X = scores_X.exp() / scores_X.exp().sum()
                rows.append(weights_X @ (seen_XC @ v_WC.T))
            heads.append(torch.stack(rows))
        queries_OC = queries_OC + torch.cat(heads, dim=-1) @ layer.o_proj.weight.T
        norm, up, _, down = layer.mlp
        queries_OC = queries_OC + F.gelu(norm(queries_OC) @ up.weight.T) @ down.weight.T
    return pool.norm(queries_OC)


@pytest.mark.parametrize(("num_heads", "depth"), [(1, 1), (3, 2)])
def test_the_perceiver_equals_a_slow_attention(num_heads, depth):
    torch.manual_seed(0)
    config = ImageProjectorConfig(
        "perceiver", num_tokens=5, num_attention_heads=num_heads, num_hidden_layers=depth, hidden_size=7
    )
    pool = PerceiverResampler(config, 12).double()
    for parameter in pool.parameters():  # norms' gains and biases included
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    queries_OC = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    x_NSC = torch.randn(2, 11, 12, dtype=torch.float64, requires_grad=True)
    fast = pool(queries_OC.expand(2, -1, -1), x_NSC)
    slow = torch.stack([_slow_perceiver(pool, queries_OC, x_SC, num_heads) for x_SC in x_NSC])
    torch.testing.assert_close(fast, slow, **EXACT)
    _same_gradients(fast, slow, [queries_OC, x_NSC, *pool.parameters()])


def _timm_names(name: str) -> str:
    for ours, theirs in (
        ("expand_norm", "conv1.bn"), ("expand", "conv1.conv"), ("conv_norm", "conv2.bn"), ("conv.", "conv2.conv."),
        ("squeeze", "se.fc1"), ("excite", "se.fc2"), ("contract_norm", "conv3.bn"), ("contract", "conv3.conv"),
        ("shortcut.0", "downsample.conv"), ("shortcut.1", "downsample.bn"),
    ):  # fmt: skip
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise AssertionError(name)


def _timm_stage(blocks: nn.Sequential, width_in: int, width: int) -> RegStage:
    """timm's blocks with the same weights: what Honeybee is made of."""
    stage = RegStage(
        len(blocks), width_in, width, stride=1, dilation=1, act_layer=nn.SiLU, norm_layer=LayerNorm2d
    ).double()
    wanted = stage.state_dict()
    named = {f"b{i + 1}.{_timm_names(n)}": w for i, block in enumerate(blocks) for n, w in block.state_dict().items()}
    stage.load_state_dict({name: weight.view(wanted[name].shape) for name, weight in named.items()})
    for module in stage.modules():
        if isinstance(module, LayerNorm2d):
            module.eps = 1e-5
    return stage


def test_the_c_abstractor_equals_timms_blocks_around_an_average():
    torch.manual_seed(0)
    pool = ConvAbstractor(2, (6, 5), (3, 2), width_in=12, width=8).double()
    for parameter in pool.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    before, after = _timm_stage(pool.before, 12, 8), _timm_stage(pool.after, 8, 8)
    x_NSC = torch.randn(2, 30, 12, dtype=torch.float64, requires_grad=True)
    x_NCHW = F.adaptive_avg_pool2d(before(x_NSC.transpose(1, 2).unflatten(2, (6, 5))), (3, 2))
    slow = after(x_NCHW).flatten(2).transpose(1, 2)
    fast = pool(x_NSC)
    torch.testing.assert_close(fast, slow, **EXACT)
    _same_gradients(fast, slow, [x_NSC])


@pytest.mark.parametrize("widths", [(8, 8), (12, 8)])
def test_a_block_equals_modules_composed_by_hand(widths):
    torch.manual_seed(0)
    width_in, width = widths
    block = RegBlock(width_in, width).double()
    x_NHWC = torch.randn(2, 3, 4, width_in, dtype=torch.float64, requires_grad=True)
    y = F.silu(F.layer_norm(x_NHWC @ block.expand.weight.T, (width,)))
    padded = F.pad(y, (0, 0, 1, 1, 1, 1))
    convolved = torch.zeros_like(y)
    for i in range(3):
        for j in range(3):
            convolved = convolved + padded[:, i : i + 3, j : j + 4] * block.conv.weight[:, 0, i, j]
    y = F.silu(F.layer_norm(convolved, (width,)))
    means_NI = y.flatten(1, 2).mean(dim=1)
    squeezed = F.silu(means_NI @ block.squeeze.weight.T + block.squeeze.bias)
    gates_NI = torch.sigmoid(squeezed @ block.excite.weight.T + block.excite.bias)
    y = F.layer_norm((y * gates_NI[:, None, None]) @ block.contract.weight.T, (width,))
    shortcut = x_NHWC
    if block.shortcut is not None:
        shortcut = F.layer_norm(x_NHWC @ block.shortcut[0].weight.T, (width,))
    slow = F.silu(y + shortcut)
    fast = block(x_NHWC)
    torch.testing.assert_close(fast, slow, **EXACT)
    weights = [p for name, p in block.named_parameters() if "norm" not in name and "shortcut.1" not in name]
    _same_gradients(fast, slow, [x_NHWC, *weights])


def _earlier(projector: ImageProjector, features_NSC: Tensor) -> Tensor:
    """What an image projector was before there was a table."""
    config, weights = projector.config, dict(projector.named_parameters())
    x_NSC = F.layer_norm(features_NSC, (16,), weights["norm.weight"], weights["norm.bias"])
    x_NSC = x_NSC + (weights["row_embedding"] + weights["column_embedding"]).flatten(0, 1)
    if config.kind == "average":
        x_NSC = F.adaptive_avg_pool2d(x_NSC.transpose(1, 2).unflatten(2, (3, 4)), (2, 3)).flatten(2).transpose(1, 2)
    if config.kind == "attention":
        pool = nn.MultiheadAttention(16, config.num_attention_heads, batch_first=True)
        own = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
        pool.load_state_dict({name: weights[f"pool.{name}"] for name in own})
        queries = weights["queries"].expand(len(x_NSC), -1, -1)
        x_NSC = queries + pool(queries, x_NSC, x_NSC)[0]
    if config.kind == "linear":
        return x_NSC @ weights["project.weight"].T + weights["project.bias"]
    hidden = F.gelu(x_NSC @ weights["project.0.weight"].T + weights["project.0.bias"])
    return hidden @ weights["project.2.weight"].T + weights["project.2.bias"]


@pytest.mark.parametrize(("config", "num_tokens"), KINDS[:4])
def test_earlier_kinds_have_the_same_weights_and_outputs(config, num_tokens):
    torch.manual_seed(0)
    projector = ImageProjector(config, (3, 4), 16, 10).eval()
    own = {"linear": set(), "mlp": set(), "average": set(), "attention": {"queries"}}[config.kind]
    names = {name.split(".")[0] for name in projector.state_dict()} - {"pool"}
    assert names == {"norm", "row_embedding", "column_embedding", "project"} | own
    features_NSC = torch.randn(2, 12, 16)
    torch.testing.assert_close(projector(features_NSC), _earlier(projector, features_NSC), rtol=1e-5, atol=1e-6)


def test_configs_come_back_and_earlier_ones_are_read():
    config = ImageProjectorConfig("perceiver", num_tokens=8, num_hidden_layers=6)
    assert config_from_dict(ImageProjectorConfig, json.loads(json.dumps(config_to_dict(config)))) == config
    earlier = {"kind": "attention", "num_tokens": 9, "hidden_size": None, "num_attention_heads": 2, "dropout": 0.0}
    assert config_from_dict(ImageProjectorConfig, earlier) == ImageProjectorConfig(
        "attention", num_tokens=9, num_attention_heads=2
    )


@pytest.mark.parametrize("kind", ["mlp", "average"])
def test_slots_are_told_their_tile(kind):
    torch.manual_seed(0)
    num_tokens = None if kind == "mlp" else 4
    whole = ImageProjector(ImageProjectorConfig(kind, num_tokens), (2, 2), 16, 10)
    projector = ImageProjector(ImageProjectorConfig(kind, num_tokens, max_tiles=4), (2, 2), 16, 10)
    projector.load_state_dict(whole.state_dict(), strict=False)
    features_NSC, tiles_N2 = torch.randn(3, 4, 16), torch.tensor([[0, 0], [1, 1], [2, 4]])
    assert torch.equal(projector(features_NSC, tiles_N2), whole(features_NSC))  # until it has learnt
    rows, columns = projector.tile_row_embedding, projector.tile_column_embedding
    assert rows is not None and columns is not None
    nn.init.normal_(rows)
    nn.init.normal_(columns)
    slots_NOD, plain_NOD = projector(features_NSC, tiles_N2), whole(features_NSC)
    for number, (row, column) in enumerate(tiles_N2.tolist()):
        torch.testing.assert_close(slots_NOD[number], plain_NOD[number] + rows[row] + columns[column])
    assert torch.equal(projector(features_NSC), projector(features_NSC, torch.zeros(3, 2, dtype=torch.int64)))


def test_impossible_image_projectors_are_named():
    with pytest.raises(ValueError, match=r"needs image_projector.num_tokens"):
        ImageProjectorConfig("average")
    with pytest.raises(ValueError, match="num_tokens is 5 but the tower gives 12 features"):
        ImageProjector(ImageProjectorConfig("mlp", num_tokens=5), (3, 4), 16, 10)
    with pytest.raises(ValueError, match="no such grid fits into 3 x 4"):
        ImageProjector(ImageProjectorConfig("average", num_tokens=7), (3, 4), 16, 10)
    with pytest.raises(ValueError, match="no such grid fits into 3 x 4"):
        ImageProjector(ImageProjectorConfig("c_abstractor", num_tokens=7), (3, 4), 16, 10)
    with pytest.raises(ValueError, match=r"image_projector.scale_factor is 2, which doesn't divide .* 3 x 4 features"):
        ImageProjector(ImageProjectorConfig("pixel_shuffle"), (3, 4), 16, 10)
    with pytest.raises(ValueError, match=r"num_tokens is 7 but .* 16 features, of which scale_factor 2 makes 4 slots"):
        ImageProjector(ImageProjectorConfig("pixel_shuffle", num_tokens=7), (4, 4), 16, 10)
    with pytest.raises(ValueError, match=r"num_attention_heads is 3, which doesn't divide the tower's 16 channels"):
        ImageProjector(ImageProjectorConfig("perceiver", num_tokens=4, num_attention_heads=3), (3, 4), 16, 10)
    for values, message in [
        ({"scale_factor": 0}, "image_projector.scale_factor is 0"),
        ({"num_hidden_layers": 0}, "image_projector.num_hidden_layers is 0"),
        ({"num_tokens": 0}, "image_projector.num_tokens is 0"),
        ({"dropout": 1.0}, "image_projector.dropout is 1.0"),
        ({"max_tiles": 0}, "image_projector.max_tiles is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            ImageProjectorConfig(**values)


def test_places_begin_as_strong_as_told() -> None:
    for config, std in ((ImageProjectorConfig(), 0.2), (ImageProjectorConfig(position_std=0.05), 0.05)):
        torch.manual_seed(0)
        projector = ImageProjector(config, grid=(16, 16), feature_width=64, width=8)
        for embedding in (projector.row_embedding, projector.column_embedding):
            assert embedding is not None and embedding.std().item() == pytest.approx(std, rel=0.1)
    assert config_from_dict(ImageProjectorConfig, {"kind": "mlp"}).position_std == 0.2, "as in earlier model folders"
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=r"image_projector.position_std is (-0.1|nan); give a finite number"):
            ImageProjectorConfig(position_std=value)
