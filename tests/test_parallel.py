"""Parts of parallel training that need no second process: sizes, meta-device weights, recomputation, plans, scripts."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mmllm import paths
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import ModelConfig
from mmllm.model.recompute import Recompute
from mmllm.model.router import MoEConfig
from mmllm.parallel.deferred import DeferredInit, materialize
from mmllm.parallel.experts import _positions
from mmllm.parallel.mesh import ParallelConfig
from mmllm.parallel.norms import scale_to_norm_, total_norm
from mmllm.parallel.plan import Hardware, Sizes, plan
from mmllm.parallel.shard import ShardConfig, compiles_in_one_graph
from mmllm.training.lightning_cli import SUBCOMMANDS

DECODER = DecoderConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=24,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, use_expert_bias=True),
    moe_layers=(1, 2),
    qk_norm=True,
    tie_word_embeddings=False,
)

# --- sizes --------------------------------------------------------------------------------------------------------


def test_the_mesh_fills_in_what_is_left() -> None:
    assert ParallelConfig().resolved(4) == ParallelConfig(fsdp=4)
    assert ParallelConfig(data=2, tensor=2).resolved(8) == ParallelConfig(2, 2, 1, 2)
    assert ParallelConfig(expert=2).resolved(4).expert == 2


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 0}, "strategy.data is 0; it must be 1 or more"),
        ({"fsdp": -2}, "strategy.fsdp is -2; it must be 1 or more, or -1 for all that the others leave"),
        ({"context": 2}, "strategy.context is 2, but a sequence can't be spread.*packed documents.*leave context at 1"),
        ({"expert": 2, "tensor": 2}, "strategy.expert is 2 and strategy.tensor 2.*set one of them to 1"),
        ({"fsdp": 4, "expert": 3}, "strategy.expert is 3, which does not divide strategy.fsdp, 4.*a divisor of 4"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ParallelConfig(**sizes)


@pytest.mark.parametrize("sizes", [{"fsdp": 3}, {"tensor": 3}, {"data": 8, "fsdp": 1}, {"data": 8}])
def test_a_mesh_that_does_not_divide_the_processes_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"4 processes can't fill: data x fsdp x tensor must be 4; change one"):
        ParallelConfig(**sizes).resolved(4)
    with pytest.raises(ValueError, match=r"strategy.expert is 3, which does not divide strategy.fsdp, 4"):
        ParallelConfig(expert=3).resolved(4)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ({"tensor": 8}, {}, "decoder.num_attention_heads is 4, which strategy.tensor, 8, does not divide; choose 4"),
        ({"tensor": 4}, {}, "decoder.num_key_value_heads is 2, which strategy.tensor, 4, does not divide; choose 2"),
        ({"tensor": 2}, {"vocab_size": 61}, "decoder.vocab_size is 61, which strategy.tensor, 2.*leave it at 1"),
        ({"tensor": 2}, {"intermediate_size": 25}, "decoder.intermediate_size is 25"),
        ({"tensor": 2, "fsdp": 3}, {}, "decoder.hidden_size is 16, which strategy.fsdp, 3"),
        ({"tensor": 2}, {"qk_norm": "width"}, "decoder.qk_norm is 'width'.*set tensor to 1, or qk_norm to 'head'"),
        (
            {"tensor": 2},
            {"attention_bias": "qkv"},
            "attention_bias is 'qkv'.*set tensor to 1, or attention_bias",
        ),
        ({"tensor": 2}, {"mlp_bias": True}, "decoder.mlp_bias is True.*set tensor to 1, or mlp_bias to false"),
        ({"fsdp": 3, "expert": 3}, {}, "decoder.moe.num_experts is 4, which strategy.expert, 3.*choose 2"),
        ({"fsdp": 2, "expert": 2}, {"moe": None, "moe_layers": ()}, "the model has no experts; set decoder.moe"),
        ({"fsdp": 10, "expert": 2}, {}, "decoder.hidden_size is 16, which strategy.fsdp / expert, 5"),
    ],
)
def test_a_model_that_the_axes_do_not_divide_is_refused(
    mesh: dict[str, int], changes: dict[str, Any], message: str
) -> None:
    config = ParallelConfig(**{"fsdp": 1, **mesh})
    with pytest.raises(ValueError, match=message):
        config.check_model(ModelConfig(dataclasses.replace(DECODER, **changes)))


@pytest.mark.parametrize(
    ("axes", "dtype", "recompute", "wanted"),
    [
        ({"fsdp": 2}, None, "selective", True),
        ({"fsdp": 2}, torch.bfloat16, "full", False),
        ({"fsdp": 2}, torch.bfloat16, "selective", "gradient_checkpointing is 'selective'"),
        ({"fsdp": 2, "expert": 2}, None, "none", "strategy.expert is 2, whose exchanges"),
        ({"fsdp": 2, "tensor": 2}, None, "none", "strategy.tensor is 2, whose exchanges"),
    ],
)
def test_what_of_a_sharded_layer_is_compiled(axes: Any, dtype: Any, recompute: Any, wanted: Any) -> None:
    decoder = dataclasses.replace(DECODER, moe=MoEConfig(4, 2, 8), gradient_checkpointing=recompute)
    args = ModelConfig(decoder), ParallelConfig(**axes), ShardConfig(dtype)
    if isinstance(wanted, bool):
        assert compiles_in_one_graph(*args) is wanted
    else:
        with pytest.raises(ValueError, match=wanted):
            compiles_in_one_graph(*args)


def test_a_model_that_the_axes_divide_is_taken() -> None:
    for config in (ParallelConfig(fsdp=4, expert=2), ParallelConfig(fsdp=2, tensor=2), ParallelConfig(fsdp=7)):
        config.check_model(ModelConfig(DECODER))


# --- weights ------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """Parameters that are made by several operators, and one that shares the generator after them."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Parameter(torch.empty(5, 3))
        nn.init.xavier_uniform_(self.spread)
        self.scaled = nn.Parameter(torch.empty(7))
        nn.init.uniform_(self.scaled)
        with torch.no_grad():
            self.scaled.mul_(3).add_(1)
        self.linear = nn.Linear(3, 4)


@pytest.mark.parametrize("build", [lambda: Decoder(DECODER), Odd], ids=["decoder", "odd"])
def test_a_model_built_without_memory_has_the_weights_of_one_built_with_it(build: Any) -> None:
    torch.manual_seed(3)
    wanted, after = build(), torch.rand(3)
    torch.manual_seed(3)
    deferred = DeferredInit()
    with deferred:
        model = build()
    assert torch.equal(torch.rand(3), after), "what is built next draws the same numbers"
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    initializers = deferred.initializers(model)
    before = torch.get_rng_state()
    materialize(model, initializers, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.state_dict().keys() == wanted.state_dict().keys()
    for name, value in wanted.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_weights_that_nothing_fills_in_place_are_named() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(4))
            nn.init.normal_(self.weight[:2])

    for build in (Filled, Half):
        deferred = DeferredInit()
        with deferred:
            model = build()
        with pytest.raises(NotImplementedError, match="weight isn't initialized by operators"):
            deferred.initializers(model)
    with DeferredInit(), pytest.raises(NotImplementedError, match="make it empty and fill it in place"):
        torch.randn(3)


# --- norms --------------------------------------------------------------------------------------------------------


def test_the_norm_of_whole_gradients_is_torch_s() -> None:
    generator = torch.Generator().manual_seed(0)
    for max_norm in (0.1, 1e3):
        parameters = [nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 4), (5,), (0,), (2, 2))]
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        ours = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        norm = total_norm(ours)
        scale_to_norm_(ours, norm, max_norm)
        wanted = nn.utils.clip_grad_norm_(parameters, max_norm)
        assert torch.allclose(norm, wanted, rtol=1e-6)
        for gradient, parameter in zip(ours, parameters, strict=True):
            assert parameter.grad is not None and torch.allclose(gradient, parameter.grad, rtol=1e-6)
    assert total_norm([]) == 0


# --- recomputation ------------------------------------------------------------------------------------------------


class Products(TorchDispatchMode):
    """Counts matrix products and attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.number += name in ("aten::mm", "mmllm_kernels::experts") or "scaled_dot_product" in name
        return func(*args, **(kwargs or {}))


def _pass(mode: bool | Recompute) -> tuple[int, list[torch.Tensor]]:
    """Products of the backward pass, and the output with all gradients."""
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(DECODER, dropout=0.2, gradient_checkpointing=mode)).train()
    x_BTD = torch.randn(2, 20, 16, requires_grad=True)
    positions_BT = torch.arange(20).repeat(2, 1)
    hidden_BTD, stats = decoder(x_BTD, positions_BT, torch.zeros_like(positions_BT))
    loss = hidden_BTD.square().sum() + stats.z_sums_L.sum()
    with Products() as products:
        loss.backward()
    gradients = [p.grad for p in (x_BTD, *decoder.parameters()) if p.grad is not None]
    return products.number, [hidden_BTD.detach(), *gradients]


def test_what_is_recomputed_changes_no_bit() -> None:
    numbers, results = zip(*(_pass(mode) for mode in ("none", False, "selective", "full", True)), strict=True)
    for values in results[1:]:
        assert len(values) == len(results[0])
        assert all(torch.equal(value, wanted) for value, wanted in zip(values, results[0], strict=True))
    none, off, selective, full, on = numbers
    assert none == off == selective < full == on, "a selective checkpoint computes no product again"


def test_a_mode_of_recomputation_that_there_is_not_is_named() -> None:
    with pytest.raises(ValueError, match=r"decoder.gradient_checkpointing is 'some'; choose none, selective, full"):
        dataclasses.replace(DECODER, gradient_checkpointing="some")  # pyright: ignore


def test_positions_of_true_are_those_of_nonzero() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 7, 40):
        for share in (0.0, 0.4, 1.0):
            mask = torch.rand(size, generator=generator) < share
            assert torch.equal(_positions(mask, int(mask.sum())), mask.nonzero().squeeze(1))


# --- plans --------------------------------------------------------------------------------------------------------


def test_a_plan_counts_what_the_model_has() -> None:
    sizes, decoder = Sizes.of(DECODER), Decoder(DECODER)
    assert sizes.total == sum(parameter.numel() for parameter in decoder.parameters())
    assert sizes.vocabulary == 2 * 60 * 16 and sizes.experts == 2 * 4 * (24 * 16 + 12 * 16) // 3


def test_a_plan_s_bytes_and_memory_are_those_of_its_mesh() -> None:
    config = dataclasses.replace(DECODER, hidden_size=512, num_hidden_layers=8, moe_layers="all")
    sizes = Sizes.of(config)
    weights = sizes.layer * 8 + sizes.experts * 8 + sizes.vocabulary
    alone, sharded = (plan(config, ParallelConfig(fsdp=fsdp), 4096, 1) for fsdp in (1, 64))
    assert alone.fsdp_bytes == alone.waiting_seconds == 0 and alone.efficiency == 1
    assert sharded.fsdp_bytes == pytest.approx((2 * 2 + 4) * weights * 63 / 64, rel=1e-6)
    spread = plan(config, ParallelConfig(fsdp=64, expert=2), 4096, 1)
    # Of 4 experts with 2 choices, the other rank has one with probability 1 - (2/4)(1/3).
    assert spread.expert_bytes == pytest.approx(8 * 4 * 4096 * 512 * 2 * (1 - 1 / 6), rel=1e-6)
    split = plan(config, ParallelConfig(fsdp=32, tensor=2), 4096, 2)
    assert split.tensor_bytes == pytest.approx((2 * 8 * 2 + 2) * 2 * 4096 * 512 * 2 * 2 / 2, rel=1e-6)
    assert split.compute_seconds == pytest.approx(sharded.compute_seconds)
    assert not plan(config, ParallelConfig(fsdp=1), 4096, 1, hardware=Hardware(memory_bytes=1e6)).fits


def test_the_plan_s_script_says_where_it_stops_scaling() -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "plan_parallel.py"
    printed = subprocess.run([sys.executable, str(script)], check=True, capture_output=True, text=True).stdout
    rows = [line for line in printed.splitlines() if line.startswith("| ") and "fsdp" in line]
    assert len(rows) >= 20 and any(row.startswith("| 1,024 |") for row in rows)
    assert printed.count("stops scaling") == 2


# --- starting many processes --------------------------------------------------------------------------------------

LAUNCH = sorted((paths.configs_dir() / "launch").iterdir())


@pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.name)
def test_a_launch_file_parses_and_names_what_exists(path: Path, tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True)
    text = path.read_text()
    modules = set(re.findall(r"-m ([\w.]+)", text))
    assert "mmllm.cli" in modules and all(importlib.util.find_spec(name) is not None for name in modules)
    (command,) = re.findall(r"-m mmllm.cli (\w+) -c", text)
    assert command in SUBCOMMANDS
    options = set(re.findall(r"--trainer\.(\w+)", text))
    assert options == {"devices", "num_nodes"}
    copied = paths.copy_config(f"launch/{path.name}", tmp_path)
    assert copied.read_text() == text and copied.stat().st_mode & 0o100
    missing = subprocess.run(["bash", str(path)], capture_output=True, text=True)
    assert missing.returncode != 0 and "give the YAML of the run" in missing.stderr


def test_launch_files_are_for_torchrun_and_slurm() -> None:
    assert [path.name for path in LAUNCH] == ["slurm.sbatch", "torchrun.sh"]
