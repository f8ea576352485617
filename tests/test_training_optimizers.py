from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn

from mmllm.model.vision import VisionConfig
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import (
    SGDW,
    MuonAdamW,
    OptimizerConfig,
    build_optimizer,
    learning_rate_factor,
    orthogonalize,
    parameter_groups,
)
from tests.training_fixtures import CLIP_CONFIG, TinyData, quiet_trainer, run_two_ranks, tiny_module

RESNET = {**CLIP_CONFIG, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}}


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 8, 5), (2, 5, 8), (1, 1, 7)])
def test_orthogonalize_pulls_singular_values_to_one_and_keeps_directions(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    out = orthogonalize(matrices, 5)
    assert out.shape == shape
    values = torch.linalg.svdvals(out)
    assert (values > 0.4).all() and (values < 1.3).all()
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    turned = left.mT @ out @ right.mT
    assert (turned - torch.diag_embed(turned.diagonal(dim1=-2, dim2=-1))).abs().max() < 1e-3


@pytest.mark.parametrize(("given", "inside"), [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32")])
def test_orthogonalize_keeps_the_precision_of_its_input_or_fp32(given: str, inside: str) -> None:
    matrix = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = matrix.to(getattr(torch, given))
    x = matrix[0].T.double() / matrix.double().norm()
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * x @ x.T + 2.0315 * x @ x.T @ x @ x.T) @ x
    out = orthogonalize(matrix, 5)
    assert out.dtype == getattr(torch, inside)
    torch.testing.assert_close(out[0].double(), x.T, rtol=0, atol=1e-13 if inside == "float64" else 1e-5)


def test_orthogonalize_of_zero_is_zero() -> None:
    assert orthogonalize(torch.zeros(2, 3, 4)).abs().max() == 0


def test_a_stack_moves_like_its_matrices() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.1, muon=True)
    stack = nn.Parameter(torch.randn(3, 6, 4))
    singles = [nn.Parameter(matrix.clone()) for matrix in stack.data]
    together = MuonAdamW([{"params": [stack], "use_muon": True}], config)
    apart = MuonAdamW([{"params": singles, "use_muon": True}], config)
    for _ in range(3):
        grad = torch.randn(3, 6, 4)
        stack.grad = grad
        for parameter, part in zip(singles, grad, strict=True):
            parameter.grad = part.clone()
        together.step()
        apart.step()
    assert torch.allclose(stack.data, torch.stack([p.data for p in singles]), atol=1e-5)


def test_filters_move_like_matrices_with_a_row_an_output() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.1, muon=True)
    filters = nn.Parameter(torch.randn(6, 2, 3, 3).to(memory_format=torch.channels_last))
    matrix = nn.Parameter(filters.data.reshape(6, 18).clone())
    optimizers = [MuonAdamW([{"params": [p], "use_muon": True}], config) for p in (filters, matrix)]
    for _ in range(3):
        filters.grad = torch.randn(6, 2, 3, 3)
        matrix.grad = filters.grad.reshape(6, 18).clone()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.allclose(filters.data.reshape(6, 18), matrix.data, atol=1e-5)


MATRICES = ((5, 6, 4), (4, 4), (6, 4), (8, 2, 3, 3), (3, 7), (2, 9))
"""Shapes of which two ranks get uneven shares: six and five matrices of one shape, and single ones."""


def _three_muon_steps(num_replicas: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape)) for shape in MATRICES]
    optimizer = MuonAdamW([{"params": parameters, "use_muon": True}], OptimizerConfig(lr=0.1, muon=True), num_replicas)
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return {str(number): parameter.data for number, parameter in enumerate(parameters)}


def _muon_rank(rank: int, port: int, out: str) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.save(_three_muon_steps(num_replicas=2), f"{out}/rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_replicas_share_the_work_and_move_alike(tmp_path: Path) -> None:
    alone = _three_muon_steps(num_replicas=1)
    for weights in run_two_ranks(_muon_rank, tmp_path):
        for name, weight in alone.items():
            assert torch.allclose(weights[name], weight, atol=1e-6), name


def test_muon_follows_torch_where_both_apply() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.arange(24.0).view(6, 4) / 24) for _ in range(2))
    config = OptimizerConfig(lr=0.05, weight_decay=0.1, muon=True)
    mine = MuonAdamW([{"params": [ours], "use_muon": True}], config)
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        ours.grad = torch.randn(6, 4)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    assert torch.allclose(ours.data, theirs.data, atol=5e-3), "theirs iterates in bf16"


def test_the_adamw_half_is_adamw() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    twin = copy.deepcopy(model)
    config = OptimizerConfig(lr=0.02, weight_decay=0.1, betas=(0.8, 0.9), muon=True)
    mine = MuonAdamW([{"params": list(model.parameters()), "use_muon": False}], config)
    reference = torch.optim.AdamW(twin.parameters(), lr=0.02, weight_decay=0.1, betas=(0.8, 0.9))
    for _ in range(4):
        x = torch.randn(5, 4)
        for net, optimizer in ((model, mine), (twin, reference)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_sgd_is_the_heavy_ball_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, sgd=True, sgd_momentum=0.8)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    groups = parameter_groups(model, config)
    assert [group["name"] for group in groups] == ["decoder/sgd/decay", "decoder/sgd/no_decay"]
    optimizer = build_optimizer(groups, config)
    assert isinstance(optimizer, SGDW)
    weights = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    velocities = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for step in range(4):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        model(torch.randn(5, 4)).square().sum().backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            velocities[name] = 0.8 * velocities[name] + parameter.grad.double()
            decay = 0.3 if name == "0.weight" else 0.0
            weights[name] = weights[name] * (1 - group["lr"] * decay) - group["lr"] * velocities[name]
        optimizer.step()
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), weights[name], rtol=1e-5, atol=1e-6)
    restored = build_optimizer(parameter_groups(model, config), config)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    buffers = [optimizer.state[p]["momentum_buffer"] for p in model.parameters()]
    assert all(
        torch.equal(restored.state[p]["momentum_buffer"], b) for p, b in zip(model.parameters(), buffers, strict=True)
    )


def test_state_survives_a_state_dict() -> None:
    torch.manual_seed(0)
    config = OptimizerConfig(lr=0.1, muon=True)

    def build() -> tuple[nn.Linear, MuonAdamW]:
        torch.manual_seed(1)
        model = nn.Linear(4, 4)
        groups = [{"params": [model.weight], "use_muon": True}, {"params": [model.bias], "use_muon": False}]
        return model, MuonAdamW(groups, config)

    def step(model: nn.Linear, optimizer: MuonAdamW, seed: int) -> None:
        optimizer.zero_grad()
        model(torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    step(model, optimizer, 0)
    twin, restored = build()
    twin.load_state_dict(model.state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(model, optimizer, 1)
    step(twin, restored, 1)
    assert torch.equal(model.weight, twin.weight) and torch.equal(model.bias, twin.bias)


@pytest.mark.parametrize("muon", [False, True])
def test_groups_hold_every_parameter_once_with_the_right_rate_and_decay(muon: bool) -> None:
    config = OptimizerConfig(lr=1.0, tower_lr=0.1, projector_lr=0.5, weight_decay=0.3, muon=muon)
    module = tiny_module(optimizer=config)
    module.configure_model()
    groups = parameter_groups(module, config, module.tower_of)
    names = {id(p): name for name, p in module.named_parameters()}
    placed = {names[id(p)]: group for group in groups for p in group["params"]}
    assert sorted(placed) == sorted(names.values())
    assert placed["model.decoder.embed_tokens.weight"]["weight_decay"] == 0
    assert placed["model.decoder.norm.weight"]["weight_decay"] == 0
    experts = placed["model.decoder.layers.1.mlp.experts.gate_up_proj"]
    assert (experts["lr"], experts["weight_decay"], experts["use_muon"]) == (1.0, 0.3, muon)
    assert not placed["model.decoder.layers.1.mlp.gate.weight"]["use_muon"]
    rates = {name.split(".")[1]: group["lr"] for name, group in placed.items()}
    assert rates["vision"] == 0.1 and rates["clip_projector"] == 0.5 and rates["decoder"] == 1.0
    for group in groups:
        group.pop("peak_lr")
    assert isinstance(build_optimizer(groups, config), MuonAdamW if muon else torch.optim.AdamW)


class _KeepRates(pl.Callback):
    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_first_step_has_its_part_of_the_warm_up_and_the_last_the_floor() -> None:
    kept, config = _KeepRates(), OptimizerConfig(lr=0.1, warmup=0.4, min_lr_ratio=0.2)
    with quiet_lightning():
        quiet_trainer(kept, max_steps=10).fit(tiny_module(optimizer=config), datamodule=TinyData())
    assert kept.rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1 * learning_rate_factor(0.5, config)])
    assert kept.rates[-1] == pytest.approx(0.02)


def test_a_training_by_seconds_alone_begins_with_a_rate_above_zero() -> None:
    kept, config = _KeepRates(), OptimizerConfig(lr=0.1, warmup=0.5)
    module = tiny_module(optimizer=config, max_seconds=1000.0)
    with quiet_lightning():
        quiet_trainer(kept, _StopsAtOnce()).fit(module, datamodule=TinyData())
    assert kept.rates == pytest.approx([0.001])


class _StopsAtOnce(pl.Callback):
    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = True


def test_the_schedule_warms_up_and_falls_to_its_floor() -> None:
    config = OptimizerConfig(warmup=0.1, min_lr_ratio=0.2)
    assert learning_rate_factor(0.0, config) == 0.0
    assert learning_rate_factor(0.05, config) == pytest.approx(0.5)
    assert learning_rate_factor(0.1, config) == 1.0
    assert learning_rate_factor(0.55, config) == pytest.approx(0.6)
    assert learning_rate_factor(1.0, config) == learning_rate_factor(7.0, config) == pytest.approx(0.2)
    assert not math.isnan(learning_rate_factor(0.0, OptimizerConfig(warmup=0.0)))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"lr": 0.0}, "lr"),
        ({"tower_lr": -1.0}, "tower_lr"),
        ({"warmup": 1.0}, "warmup"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"sgd_momentum": 1.0}, "sgd_momentum is 1.0"),
        ({"sgd": True, "muon": True}, "sgd and optimizer.muon are both true"),
    ],
)
def test_bad_settings_are_named(values: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        OptimizerConfig(**values)


def test_muon_moves_hidden_matrices_alone() -> None:
    config = OptimizerConfig(muon=True)
    module = tiny_module(optimizer=config, vision=VisionConfig(RESNET, layer="layer3", norm="group"))
    module.decoder = dataclasses.replace(module.decoder, tie_word_embeddings=False)
    module.configure_model()
    groups = parameter_groups(module, config, module.tower_of)
    names = {id(p): name.removeprefix("model.") for name, p in module.named_parameters()}
    by_muon = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
    undecayed = {names[id(p)] for group in groups if not group["weight_decay"] for p in group["params"]}
    assert {"decoder.layers.1.mlp.experts.gate_up_proj", "decoder.layers.0.self_attn.o_proj.weight"} < by_muon
    assert "vision.visual.layer2.0.conv2.weight" in by_muon
    others = {"decoder.lm_head.weight", "decoder.embed_tokens.weight", "decoder.layers.1.mlp.gate.weight"}
    others |= {"image_projector.row_embedding", "image_projector.column_embedding", "ctc_head.1.weight"}
    assert not others & by_muon
    assert {
        "image_projector.row_embedding",
        "image_projector.column_embedding",
        "decoder.embed_tokens.weight",
    } < undecayed
