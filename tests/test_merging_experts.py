"""Experts in one order before they are merged: a model whose experts are permuted merges with itself to itself."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.interop.merging.experts import assignment, squared_distances
from mmllm.interop.merging.parents import Parent
from mmllm.model.router import MoEConfig
from tests.inference_fixtures import images
from tests.merging_fixtures import merge, models, save, weights
from tests.test_adapters import text_logits

pytest.importorskip("scipy")
torch.set_num_threads(1)
ORDER = [2, 0, 3, 1]
STACKS = ("experts.gate_up_proj", "experts.down_proj", "gate.weight")


def permuted(source: Path, folder: Path, noise: float = 0.0) -> Path:
    """A model folder that computes the same, its experts in another order; with `noise` nearly the same."""
    loaded = load_model(source)
    state, generator = loaded.model.state_dict(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in STACKS:
            tensor = state[f"decoder.layers.1.mlp.{leaf}"]
            tensor.copy_(tensor[torch.tensor(ORDER)].clone())
        for name, tensor in state.items():
            if noise and name.startswith("decoder.") and tensor.is_floating_point():
                tensor += noise * torch.randn(tensor.shape, generator=generator)
    return save_model(folder, loaded.model, loaded.tokenizer)


def manifest(folder: Path) -> Path:
    rows = []
    for number, pixels in enumerate(images(3)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
        rows.append({"id": f"c{number}", "image": f"{number}.png", "text": "a red circle"})
    rows += [{"id": f"t{number}", "text": "two blue squares, he said"} for number in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("by", ["weight", "activation"])
def test_a_model_and_its_permutation_merge_to_itself(
    by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save(tmp_path / "one", 1)
    other = permuted(one, tmp_path / "other")
    torch.testing.assert_close(text_logits(load_model(other).model), text_logits(load_model(one).model))
    how: Any = {"by": by, "manifest": str(manifest(tmp_path)), "limit": 3} if by == "activation" else by
    values = {"merge_method": "linear", "models": models(one, other, weight=[1, 1])}
    said = merge(capsys, tmp_path / "aligned", {**values, "align_experts": how})
    assert "experts that changed their place: 4 in layer 1" in said
    merge(capsys, tmp_path / "plain", values)
    aligned, plain, own = (weights(tmp_path / name) for name in ("aligned", "plain", "one"))
    assert all(torch.equal(aligned[name], tensor) for name, tensor in own.items())
    assert any(not torch.allclose(plain[name], tensor) for name, tensor in own.items())


def test_specialists_are_aligned_with_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = save(tmp_path / "base", 0)
    moved, other = save(tmp_path / "moved", 1), tmp_path / "other"
    permuted(moved, other, noise=0.0)
    values = {"merge_method": "task_arithmetic", "base_model": str(base), "align_experts": "weight"}
    merge(capsys, tmp_path / "out", {**values, "models": models(other, weight=[1])})
    out, wanted = weights(tmp_path / "out"), weights(moved)
    for name, tensor in wanted.items():
        torch.testing.assert_close(out[name], tensor, msg=name)


def test_the_assignment_is_the_best_of_all(tmp_path: Path) -> None:
    distance_EE = torch.rand(5, 5, generator=torch.Generator().manual_seed(1))
    found = assignment(distance_EE, MoEConfig(num_experts=5))
    best = min(itertools.permutations(range(5)), key=lambda p: sum(float(distance_EE[i, j]) for i, j in enumerate(p)))
    assert found == list(best)
    a, b = torch.randn(3, 4, 2), torch.randn(3, 4, 2)
    slow = torch.tensor([[float(((x - y) ** 2).sum()) for y in b] for x in a])
    torch.testing.assert_close(squared_distances(a, b), slow, rtol=1e-4, atol=1e-4)


def test_experts_stay_in_their_group_and_pool() -> None:
    distance_EE = (torch.arange(4)[:, None] - torch.tensor([3, 2, 1, 0])).abs().float()  # 0 is like 3, 1 like 2
    assert assignment(distance_EE, MoEConfig(num_experts=4)) == [3, 2, 1, 0]
    grouped = MoEConfig(num_experts=4, n_group=2, topk_group=1, num_experts_per_tok=1)
    assert sorted(assignment(distance_EE, grouped)[:2]) == [0, 1]
    pools = MoEConfig(num_experts=4, modality_experts={"text": (0, 1), "image": (2, 3), "audio": (2, 3)})
    assert sorted(assignment(distance_EE, pools)[:2]) == [0, 1]


def test_a_parents_experts_are_read_in_their_order(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", 1)
    parent = Parent(str(folder))
    before = {leaf: parent.read(f"decoder.layers.1.mlp.{leaf}") for leaf in STACKS}
    parent.order[1] = ORDER
    for leaf, tensor in before.items():
        assert torch.equal(parent.read(f"decoder.layers.1.mlp.{leaf}"), tensor[ORDER])
    assert parent.read("decoder.layers.1.self_attn.q_proj.weight").shape == (32, 32)


def test_what_cant_be_aligned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = save(tmp_path / "one", 1), save(tmp_path / "two", 2)
    values = {"merge_method": "linear", "models": models(one, two, weight=[1, 1])}
    (tmp_path / "none.jsonl").write_text("")
    how = {"by": "activation", "manifest": str(tmp_path / "none.jsonl")}
    said = merge(capsys, tmp_path / "out", {**values, "align_experts": how}, code=2)
    assert "none.jsonl" in said
    dense = load_model(one)
    config = dataclasses.replace(dense.model.config.decoder, moe=None, moe_layers="all")
    for name in ("d1", "d2"):
        model = type(dense.model)(dataclasses.replace(dense.model.config, decoder=config))
        save_model(tmp_path / name, model, dense.tokenizer)
    values["models"] = models(tmp_path / "d1", tmp_path / "d2", weight=[1, 1])
    said = merge(capsys, tmp_path / "out", {**values, "align_experts": "weight"}, code=2)
    assert "has no experts; leave it out" in said
