"""Adapters merged by PEFT's methods: equal to `add_weighted_adapter`, and of stacks of experts expert by expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, base_facts, save_adapter, saved_adapters
from mmllm.checkpoints.folder import load_model
from mmllm.checkpoints.weights import Checkpoint
from mmllm.inference.api import load
from mmllm.interop.merging.parsing import ADAPTER_METHODS
from tests.inference_fixtures import images
from tests.merging_fixtures import merge
from tests.test_training_adapters import make_base

pytest.importorskip("peft")
torch.set_num_threads(1)
BOTH = ("attention", "experts")


def trained(folder: Path, names: tuple[str, ...] = ("a", "b"), ranks: tuple[int, ...] = (2, 2), **config: Any) -> Path:
    """A model folder with adapters of random numbers."""
    make_base(folder, num_hidden_layers=2)
    for number, (name, rank) in enumerate(zip(names, ranks, strict=False)):
        decoder = load_model(folder).model.decoder
        add_adapter(decoder, AdapterConfig(r=rank, lora_alpha=3, parts=config.get("parts", BOTH)), name)
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for key, parameter in decoder.named_parameters():
                if ".lora_" in key:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        facts = base_facts(Checkpoint.open(folder), decoder.config)
        save_adapter(folder / "adapters" / name, decoder, name, facts)
    return folder


def config_of(base: Path, method: str, weights: tuple[float, ...] = (0.7, -0.4), **parameters: Any) -> dict[str, Any]:
    if method not in ("svd", "linear", "cat"):
        parameters.setdefault("density", 0.6)
    return {
        "merge_method": method, "base_model": str(base), "adapter": "new", "seed": 3,
        "models": [{"model": f"{base}+{name}", "parameters": {"weight": weight}}
                   for name, weight in zip("ab", weights, strict=True)],
        "parameters": parameters,
    }  # fmt: skip


def change(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight."""
    plain, adapted = load_model(folder).model, load_model(folder, adapter=name).model
    from mmllm.checkpoints.adapters import merge_adapter

    merge_adapter(adapted.decoder, name)
    before, after = plain.state_dict(), adapted.state_dict()
    return {key: after[key] - before[key] for key in before if not torch.equal(after[key], before[key])}


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_what_it_adds_is_the_weighted_sum(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`cat` exactly; `svd` where the rank is enough. Also of stacks of experts."""
    base = trained(tmp_path / "base", ranks=(2, 3))
    values = config_of(base, method)
    values["parameters"] |= {"svd_rank": 5} if method == "svd" else {}
    said = merge(capsys, tmp_path / "out", values)
    assert f"{method} of {base}, {base}+a" in said or f"{method} of {base}+a" in said
    one, two, new = (change(folder, name) for folder, name in ((base, "a"), (base, "b"), (tmp_path / "out", "new")))
    assert set(new) == set(one) and any("experts.gate_up_proj" in key for key in new)
    for key, tensor in new.items():
        torch.testing.assert_close(tensor, 0.7 * one[key] - 0.4 * two[key], rtol=1e-4, atol=2e-5, msg=key)


class Toy(nn.Module):
    """Two linear layers, on which PEFT's own method runs."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj = nn.Linear(32, 32, bias=False), nn.Linear(32, 16, bias=False)


@pytest.mark.parametrize("method", [name for name in ADAPTER_METHODS if not name.startswith("dare")])
def test_it_equals_peft(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from peft import LoraConfig, LoraModel, set_peft_model_state_dict

    base = trained(tmp_path / "base", parts=("attention",))
    merge(capsys, tmp_path / "out", config_of(base, method))
    ours = Checkpoint.open_file(tmp_path / "out" / "adapters" / "new" / "adapter_model.safetensors")
    toy = Toy()
    lora = {name: LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"]) for name in "ab"}
    tuner = LoraModel(toy, lora["a"], "a")
    tuner.peft_config["b"] = lora["b"]
    tuner.inject_adapter(toy, "b")
    prefix = "base_model.model.model.layers.1.self_attn."
    for name in "ab":
        stored = Checkpoint.open_file(base / "adapters" / name / "adapter_model.safetensors")
        state = {key.removeprefix(prefix): stored.read(key) for key in stored.specs if key.startswith(prefix)}
        state = {key: tensor for key, tensor in state.items() if key.startswith(("q_proj", "v_proj"))}
        set_peft_model_state_dict(toy, state, adapter_name=name)
    density: dict[str, Any] = {} if method in ("svd", "linear", "cat") else {"density": 0.6}
    combination: Any = method
    tuner.add_weighted_adapter(["a", "b"], [0.7, -0.4], "new", combination_type=combination, **density)
    for layer in ("q_proj", "v_proj"):
        module = getattr(toy, layer)
        theirs = {side: getattr(module, f"lora_{side}")["new"].weight for side in "AB"}
        mine = {side: ours.read(f"{prefix}{layer}.lora_{side}.weight") for side in "AB"}
        assert mine["A"].shape == theirs["A"].shape
        if not method.endswith("svd"):
            for side in "AB":
                torch.testing.assert_close(mine[side], theirs[side].detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(
            mine["B"] @ mine["A"], (theirs["B"] @ theirs["A"]).detach() * module.scaling["new"], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties_svd"])
def test_draws_are_those_of_the_seed(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = trained(tmp_path / "base")
    made = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        before = torch.random.get_rng_state()
        merge(capsys, tmp_path / str(number), {**config_of(base, method), "seed": seed})
        assert torch.equal(before, torch.random.get_rng_state())
        made.append(change(tmp_path / str(number), "new"))
    key = "decoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(made[0][key], made[1][key]) and not torch.equal(made[0][key], made[2][key])


def test_the_folder_is_the_bases_with_one_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = trained(tmp_path / "base")
    merge(capsys, tmp_path / "out", config_of(base, "linear"))
    assert saved_adapters(tmp_path / "out") == ["a", "b", "new"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert "## Adapter new" in (tmp_path / "out" / "README.md").read_text()
    model = load(tmp_path / "out", "cpu", adapter=["new", "a"])
    assert isinstance(model.caption(images(1)[0], max_new_tokens=3), str)
    config = json.loads((tmp_path / "out" / "adapters" / "new" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 2)


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = trained(tmp_path / "base", names=("a", "b"), ranks=(2, 3))

    def refused(values: dict[str, Any]) -> str:
        return merge(capsys, tmp_path / "out", values, code=2)

    assert "ranks 2, 3; linear wants equal ones" in refused(config_of(base, "linear"))
    plain = config_of(base, "cat")
    assert "svd, linear, cat" in refused({**plain, "merge_method": "slerp"})
    assert "adapter is 'a', which" in refused({**plain, "adapter": "a"})
    assert "letters, digits" in refused({**plain, "adapter": "x/y"})
    assert "has a, b" in refused({**plain, "models": [*plain["models"], {"model": f"{base}+c"}]})
    unnamed = [*plain["models"][1:], {"model": str(tmp_path / "other")}]
    other = trained(tmp_path / "other")
    assert "names no adapter" in refused({**plain, "models": unnamed})
    assert "a folder with an adapter" in refused({**plain, "base_model": f"{base}+a", "models": unnamed})
    decoder = load_model(other).model
    with torch.no_grad():
        decoder.decoder.norm.weight.add_(1)
    from mmllm.checkpoints.folder import save_model

    save_model(tmp_path / "changed", decoder, load_model(other).tokenizer)
    moved = {**plain, "base_model": str(tmp_path / "changed")}
    assert "is another in" in refused(moved)
    density = {**config_of(base, "ties_svd"), "parameters": {}}
    assert "density is missing" in refused(density)
    assert "density is 0" in refused(config_of(base, "dare_linear_svd", density=0))  # PEFT would divide by it
    assert "svd_rank is 2.5" in refused(config_of(base, "svd", svd_rank=2.5))
    assert "out_dtype is 'bfloat16', which merges of adapters don't have" in refused({**plain, "out_dtype": "bfloat16"})
    sources = [{**model, "layer_range": [0, 1]} for model in plain["models"]]
    sliced = {key: value for key, value in plain.items() if key != "models"} | {"slices": [{"sources": sources}]}
    assert "slices is" in refused(sliced)
    dora = json.loads((base / "adapters" / "a" / "adapter_config.json").read_text())
    (base / "adapters" / "a" / "adapter_config.json").write_text(json.dumps({**dora, "use_dora": True}))
    assert "use_dora" in refused(plain)
