"""Two processes train as one does, in every layout, and go on from one another's checkpoints."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from mmllm.model.router import MoEConfig

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # its files import each other, as scripts do

from parallel_side import LAYOUTS, Training, run, train

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

STEPS = Training(num_steps=3)
OWN = "Lightning's own"
"""Its ModelParallelStrategy, which earlier configs have."""


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def alone(work: Path) -> dict[str, Any]:
    """One process's training; its checkpoint of step 2 lies in `alone.ckpt`."""
    ((result,),) = run([dataclasses.replace(STEPS, save=str(work / "alone.ckpt"))], work / "alone")
    return result


def on_two(layout: str, **changes: Any) -> Training:
    return dataclasses.replace(STEPS, num_processes=2, layout=layout, **changes)


@pytest.fixture(scope="module")
def together(work: Path) -> dict[str, list[dict[str, Any]]]:
    """Two processes' trainings, by layout; checkpoints of step 2 lie in `LAYOUT.ckpt`: files and folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(LAYOUTS, OWN, {2: ModelParallelStrategy(data_parallel_size=1, tensor_parallel_size=2)})
        trainings = [
            on_two("DDP", save=str(work / "DDP.ckpt")),
            on_two("FSDP2", save=str(work / "FSDP2.ckpt")),
            on_two("FSDP2+EP", save=str(work / "FSDP2+EP.ckpt"), decoder={"gradient_checkpointing": "selective"}),
            on_two("FSDP2+TP", save=str(work / "FSDP2+TP.ckpt"), strategy={"save_distributed_checkpoint": False}),
            on_two(OWN),
        ]
        results = run(trainings, work / "together")
    return {str(training.layout): ranks for training, ranks in zip(trainings, results, strict=True)}


def assert_same(found: dict[str, Any], wanted: dict[str, Any], last: int | None = None) -> None:
    """Losses (of the last batches) and weights of two float64 trainings."""
    losses = wanted["losses"][-last:] if last else wanted["losses"]
    assert found["losses"] == pytest.approx(losses, abs=1e-12)
    assert found["weights"].keys() == wanted["weights"].keys()
    for name, weight in wanted["weights"].items():
        assert torch.allclose(found["weights"][name], weight, atol=1e-12), name


@pytest.mark.parametrize("layout", [*LAYOUTS, OWN])
def test_two_processes_train_as_one(
    alone: dict[str, Any], together: dict[str, list[dict[str, Any]]], layout: str
) -> None:
    assert len(alone["losses"]) == 6 and len(set(alone["losses"])) == 6
    for rank in together[layout]:
        assert_same(rank, alone)


def test_a_tied_head_and_shared_experts_train_as_in_one_process(work: Path) -> None:
    moe = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12, n_shared_experts=1)
    changes: dict[str, Any] = {"num_steps": 2, "decoder": {"tie_word_embeddings": True, "moe": moe}}
    ((tied,),) = run([dataclasses.replace(STEPS, **changes)], work / "tied")
    layouts = ("FSDP2", "FSDP2+EP", "FSDP2+TP")
    for ranks in run([on_two(layout, **changes) for layout in layouts], work / "tied together"):
        for rank in ranks:
            assert_same(rank, tied)


def test_partial_rotary_layers_without_positions_and_biases_train_as_in_one_process(work: Path) -> None:
    changes: dict[str, Any] = {"num_steps": 2, "decoder": {"partial_rotary_factor": 0.5, "no_rope_layers": (1, 0, 1)}}
    with_bias: dict[str, Any] = {"num_steps": 2, "decoder": {"mlp_bias": True, "moe": None}}
    for name, values, layouts in (("rotary", changes, ("FSDP2", "FSDP2+TP")), ("bias", with_bias, ("FSDP2",))):
        ((one,),) = run([dataclasses.replace(STEPS, **values)], work / name)
        for ranks in run([on_two(layout, **values) for layout in layouts], work / f"{name} together"):
            for rank in ranks:
                assert_same(rank, one)


def test_a_run_goes_on_in_another_layout(
    work: Path, alone: dict[str, Any], together: dict[str, list[dict[str, Any]]]
) -> None:
    assert (work / "FSDP2+EP.ckpt").is_dir() and (work / "FSDP2+TP.ckpt").is_file()
    ((from_folder,),) = run([dataclasses.replace(STEPS, checkpoint=str(work / "FSDP2+EP.ckpt"))], work / "folder")
    assert_same(from_folder, alone, last=2)
    moves = {"alone": "FSDP2+TP", "FSDP2+TP": "FSDP2", "FSDP2": "FSDP2+EP"}
    trainings = [on_two(layout, checkpoint=str(work / f"{name}.ckpt")) for name, layout in moves.items()]
    for ranks in run(trainings, work / "moved"):
        for rank in ranks:
            assert_same(rank, alone, last=2)


class Looks(pl.Callback):
    """What the sharded model is made of, and in what precision it computes."""

    def __init__(self) -> None:
        self.dtypes: dict[str, str] = {}
        self.found: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        model = pl_module.model
        self.found["units"] = [name for name, module in model.named_modules() if isinstance(module, FSDPModule)]
        self.found["plain"] = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
        self.found["dtypes"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
        layers = model.decoder.layers
        for name in ("self_attn.q_proj", "mlp.gate", "mlp.experts", "input_layernorm"):
            layers[1].get_submodule(name).register_forward_pre_hook(self._notes(name))  # its weights are gathered

    def _notes(self, name: str) -> Callable[..., None]:
        def note(module: Any, args: Any) -> None:
            weight = next(iter(module.parameters()))
            self.dtypes[name] = str(weight.dtype)
            self.dtypes[f"{name} input"] = str(args[0].dtype)

        return note


def looked_at(training: Training, rank: int, port: int) -> dict[str, Any]:
    looks = Looks()
    result = train(dataclasses.replace(training, callbacks=(looks,)), rank, port)
    return {"losses": result["losses"], "dtypes": looks.dtypes, **{f"found {k}": v for k, v in looks.found.items()}}


def test_units_and_their_precision(work: Path) -> None:
    half = dataclasses.replace(STEPS, num_steps=2, precision="bfloat16")
    wanted = train(dataclasses.replace(half, precision="float32"))["losses"]
    trainings = [dataclasses.replace(half, num_processes=2, layout=layout) for layout in ("FSDP2", "FSDP2+EP")]
    (sharded, _), (spread, _) = run(trainings, work / "half", looked_at)
    layers = [f"decoder.layers.{layer}" for layer in range(3)]
    routers, experts = ([f"{layer}.mlp.{part}" for layer in layers[1:]] for part in ("gate", "experts"))
    blocks = [f"vision.visual.transformer.resblocks.{block}" for block in range(2)]
    rest = ["", "decoder.embed_tokens", "decoder.lm_head", "vision"]
    assert set(sharded["found units"]) == {*layers, *routers, *blocks, *rest}
    assert set(spread["found units"]) == {*sharded["found units"], *experts}
    for result in (sharded, spread):
        assert result["found plain"] == [] and result["found dtypes"] == ["torch.float32"]
        assert result["losses"] == pytest.approx(wanted, rel=5e-3)
        dtypes = result["dtypes"]
        assert {dtypes.pop("mlp.gate")} == {"torch.float32"}
        assert set(dtypes.values()) == {"torch.bfloat16"}, dtypes


def spread_over(training: Training, rank: int, port: int) -> dict[str, Any]:
    """Where the weights of one layer lie, and how large this rank's parts are."""
    kept: dict[str, Any] = {}

    class Places(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            for name, parameter in pl_module.model.named_parameters():
                places = [place.dim if isinstance(place, Shard) else -1 for place in parameter.placements]
                kept[name] = {
                    "places": places,
                    "part": list(parameter.to_local().shape),
                    "whole": list(parameter.shape),
                }

    train(dataclasses.replace(training, num_steps=1, callbacks=(Places(),)), rank, port)
    return kept


def test_weights_lie_where_their_axis_says(work: Path) -> None:
    (spread, _), (split, _) = run([on_two("FSDP2+EP"), on_two("FSDP2+TP")], work / "places", spread_over)
    layer = "decoder.layers.1."
    assert spread[f"{layer}mlp.experts.gate_up_proj"] == {"places": [1, 0], "part": [2, 24, 16], "whole": [4, 24, 16]}
    assert spread[f"{layer}self_attn.q_proj.weight"] == {"places": [0], "part": [16, 16], "whole": [32, 16]}
    for name, part in (
        (f"{layer}self_attn.q_proj.weight", [16, 16]),
        (f"{layer}self_attn.k_proj.weight", [8, 16]),
        (f"{layer}self_attn.o_proj.weight", [16, 16]),
        (f"{layer}mlp.experts.down_proj", [2, 16, 12]),
        (f"{layer}mlp.gate.weight", [4, 16]),
        ("decoder.layers.0.mlp.up_proj.weight", [12, 16]),
        ("decoder.layers.0.mlp.down_proj.weight", [16, 12]),
        ("decoder.embed_tokens.weight", [28, 16]),
        ("decoder.lm_head.weight", [28, 16]),
    ):
        assert split[name]["part"] == part, name
