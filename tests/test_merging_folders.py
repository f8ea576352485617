"""`mmllm merge` of model folders: what is written, gradients and filters, mergekit's process, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import mmllm.checkpoints.weights as weights_module
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.inference.api import load
from mmllm.interop.merging.folder import generator_for
from mmllm.interop.merging.formulas import METHODS, Numbers, merged
from mmllm.interop.merging.parsing import parse_config
from tests.inference_fixtures import images, make_model, make_tokenizer
from tests.merging_fixtures import merge, models, moved, save, weights
from tests.test_training_adapters import make_base

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and three specialists."""
    folder = tmp_path_factory.mktemp("parents")
    return [save(folder / name, seed) for seed, name in enumerate(("base", "one", "two", "three"))]


def config_of(method: str, parents: list[Path]) -> dict[str, Any]:
    rule, (base, *others) = METHODS[method], parents
    others = others[:1] if method == "slerp" else others[:2]
    own = {key: [0.6, 0.3] if key == "weight" else [0.5, 0.4] for key in rule.of_models if key != "epsilon"}
    values: dict[str, Any] = {"merge_method": method, "models": models(*others, **own), "seed": 5}
    if rule.needs_base:
        values["base_model"] = str(base)
    if method == "slerp":
        values["parameters"] = {"t": 0.25}
    return values


@pytest.mark.parametrize("method", METHODS)
def test_a_merged_folder_has_the_formulas_tensors(
    method: str, parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = config_of(method, parents)
    said = merge(capsys, tmp_path / "out", values)
    assert f"{method} of" in said
    stored, rule = weights(tmp_path / "out"), METHODS[method]
    before = [weights(parents[0])] if rule.needs_base else []
    before += [weights(Path(each["model"])) for each in values["models"]]
    shared = {{"lambda": "scale"}.get(key, key): value for key, value in rule.shared.items() if value is not None}
    numbers = Numbers(weights=(0.6, 0.3), densities=(0.5, 0.4), epsilons=(0.15, 0.15), **{"t": 0.25, **shared})
    assert set(stored) == set(before[0])
    for name, tensor in stored.items():
        given = [each[name] for each in before]
        if all(torch.equal(given[0], other) for other in given[1:]):
            assert torch.equal(tensor, given[0]), name
            continue
        base, others = (given[0], given[1:]) if rule.needs_base else (None, given)
        wanted = merged(method, base, others, numbers, lambda place, name=name: generator_for(5, name, place))
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-7)


def test_the_folder_loads_answers_and_has_a_card(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(capsys, tmp_path / "out", config_of("ties", parents))
    model = load(tmp_path / "out", "cpu")
    assert isinstance(model.caption(images(1)[0], max_new_tokens=4), str)
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("# ties of 3 models", "- base: weights `", "- one: weights `", "merge_method: ties", "recipe hash"):
        assert part in card, part
    assert model.generation == load(parents[0], "cpu").generation


def test_draws_are_those_of_the_seed(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)
        merge(capsys, tmp_path / str(number), {**config_of("dare_linear", parents), "seed": seed})
        made.append(weights(tmp_path / str(number))["decoder.layers.0.self_attn.q_proj.weight"])
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_models_that_are_equal_stay_as_they_are(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(parents[1], tmp_path / "copy")
    merge(capsys, tmp_path / "out", {"merge_method": "linear", "models": models(parents[1], tmp_path / "copy",
                                                                               weight=[0.3, 0.4])})  # fmt: skip
    stored = weights(tmp_path / "out")
    assert all(torch.equal(stored[name], tensor) for name, tensor in weights(parents[1]).items())


def test_bfloat16_stays_and_other_types_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [save(tmp_path / str(seed), seed, torch.bfloat16) for seed in (1, 2)]
    values = {"merge_method": "linear", "models": models(*folders, weight=[1, 1])}
    merge(capsys, tmp_path / "same", values)
    merge(capsys, tmp_path / "wide", {**values, "out_dtype": "float32"})
    same, wide, one, two = (weights(folder) for folder in (tmp_path / "same", tmp_path / "wide", *folders))
    for name, tensor in same.items():
        if not tensor.is_floating_point():
            continue
        assert tensor.dtype == one[name].dtype
        mean = (one[name].float() + two[name].float()) / 2
        assert torch.equal(wide[name], mean) and torch.equal(tensor, mean.to(tensor.dtype)), name
    load(tmp_path / "same", "cpu")


def test_filters_and_gradients(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight = [{"filter": "self_attn", "value": [0.0, 1.0]}, {"filter": "mlp", "value": 0.5}, {"value": "1e-1"}]
    merge(
        capsys, tmp_path / "out",
        {"merge_method": "task_arithmetic", "base_model": str(parents[0]), "models": models(parents[1],
                                                                                           weight=[weight])},
    )  # fmt: skip
    stored, base, one = (weights(folder) for folder in (tmp_path / "out", *parents[:2]))
    for name, tensor in stored.items():
        if torch.equal(base[name], one[name]):
            continue
        share = 0.5 if "mlp" in name else 0.1
        if "self_attn" in name:
            share = 0.0 if ".0." in name else 1.0
        torch.testing.assert_close(tensor, base[name] + share * (one[name] - base[name]), msg=name)


def test_slices_have_parameters_of_their_own(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def part(first: int, t: float) -> dict[str, Any]:
        sources = [{"model": str(folder), "layer_range": [first, first + 1]} for folder in parents[:2]]
        return {"sources": sources, "parameters": {"t": t}}

    values = {"merge_method": "slerp", "base_model": str(parents[0]), "slices": [part(0, 0.0), part(1, 1.0)]}
    merge(capsys, tmp_path / "out", values)
    stored, base, one = (weights(folder) for folder in (tmp_path / "out", *parents[:2]))
    for name, tensor in stored.items():
        is_second = ".layers.1." in name or name.startswith(("decoder.norm", "decoder.lm_head"))
        torch.testing.assert_close(tensor, (one if is_second else base)[name], msg=name)
    values["slices"] = [part(1, 0.0), part(0, 1.0)]
    said = merge(capsys, tmp_path / "moved", values, code=2)
    assert "slices have the layers 1 to 2, 0 to 1, the decoder 0 to 2" in said


def test_an_adapter_in_a_parents_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from mmllm.interop.adapters import merge as merge_into
    from tests.test_merging_adapters import trained

    base = trained(tmp_path / "base", names=("a",))
    values = {"merge_method": "task_arithmetic", "base_model": str(base),
              "models": models(f"{base}+a", weight=[1.0])}  # type: ignore[arg-type]  # fmt: skip
    merge(capsys, tmp_path / "out", values)
    merge_into(base, "a", tmp_path / "wanted")
    stored, wanted = weights(tmp_path / "out"), weights(tmp_path / "wanted")
    before = weights(base)
    for name, tensor in wanted.items():
        torch.testing.assert_close(stored[name], tensor, rtol=1e-5, atol=1e-6)
    assert not torch.equal(stored["decoder.layers.1.mlp.experts.down_proj"],
                           before["decoder.layers.1.mlp.experts.down_proj"])  # fmt: skip


def test_shards_are_merged_tensor_by_tensor(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    values = config_of("ties", parents)
    merge(capsys, tmp_path / "whole", values)
    monkeypatch.setattr(weights_module.write_weights, "__defaults__", (20_000,))
    for number in range(3):
        loaded = load_model(parents[number])
        save_model(tmp_path / str(number), loaded.model, loaded.tokenizer)
    folders = [tmp_path / str(number) for number in range(3)]
    merge(capsys, tmp_path / "out", config_of("ties", folders))
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    ours, whole = load_model(tmp_path / "out").model, load_model(tmp_path / "whole").model
    others = whole.state_dict()
    assert all(torch.equal(tensor, others[name]) for name, tensor in ours.state_dict().items())


def test_check_writes_nothing(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = merge(capsys, tmp_path / "out", config_of("ties", parents), "--check")
    assert "nothing was written" in said and "tensors merged" in said and not (tmp_path / "out").exists()


def test_mergekits_process_gives_the_same(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mergekit")
    values = config_of("ties", parents)
    values["models"][0]["parameters"]["weight"] = [{"filter": "mask_embedding", "value": 0.1}, {"value": [0.1, 0.9]}]
    merge(capsys, tmp_path / "ours", values)
    merge(capsys, tmp_path / "theirs", {**values, "engine": "mergekit"})
    ours, theirs = weights(tmp_path / "ours"), weights(tmp_path / "theirs")
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6, msg=name)


def test_mergekit_is_named_where_it_is_missing(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **kwargs: None)
    said = merge(capsys, tmp_path / "out", {**config_of("ties", parents), "engine": "mergekit"}, code=2)
    assert "pip install 'mmllm[mergekit]'" in said and not (tmp_path / "out").exists()


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"merge_method": "tie"}, "merge_method is 'tie' (did you mean ties?)"),
        ({"merge_method": None}, "merge_method is None"),
        ({"modells": []}, "has the key 'modells' (did you mean models?)"),
        ({"base_model": None}, "base_model is missing; ties needs"),
        ({"tokenizer_source": "union"}, "tokenizer_source is given, which mmllm doesn't do"),
        ({"modules": {}}, "modules is given, which mmllm doesn't do"),
        ({"parameters": {"densty": 1}}, "parameters has the key 'densty' (did you mean density?)"),
        ({"parameters": {"density": 1.5}}, "density is 1.5; it must be between 0 and 1"),
        ({"merge_method": "della", "parameters": {"epsilon": -0.1}}, "epsilon is -0.1; it must be between 0 and 1"),
        ({"parameters": {"weight": "heavy"}}, "weight is 'heavy'; give a number"),
        ({"parameters": {"normalize": 1}}, "normalize is 1; give true or false"),
        ({"parameters": {"weight": [{"filter": "attn"}]}}, "weight is None; give a number"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"seed": -1}, "seed is -1"),
        ({"engine": "evolve"}, "engine is 'evolve'"),
        ({"align_experts": "by name"}, "align_experts is 'by name'"),
        ({"align_experts": "activation"}, "activations need rows"),
        ({"models": []}, "models is []; wanted a list"),
        ({"experts_per_token": 2}, "only branch_train_mix has it"),
    ],
)
def test_a_config_that_cant_be(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], wanted: str
) -> None:
    said = merge(capsys, tmp_path / "out", {**config_of("ties", parents), **changes}, code=2)
    assert wanted in said and str(tmp_path / "out.yaml") in said
    assert not (tmp_path / "out").exists()


def test_models_that_cant_be(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(values: dict[str, Any]) -> str:
        return merge(capsys, tmp_path / "out", values, code=2)

    linear = {"merge_method": "linear", "models": models(*parents[1:3], weight=[1, -1])}
    assert "sum to 0, by which they would be divided" in refused(linear)
    assert "sum to 0 and normalize is false" in refused({**linear, "parameters": {"normalize": False}})
    assert "models names 1; linear wants at least 2" in refused({**linear, "models": models(parents[1], weight=[1])})
    assert "but linear has no base" in refused({**linear, "base_model": str(parents[0])})
    assert "twice" in refused({**linear, "models": models(parents[1], parents[1], weight=[1, 1])})
    slerp = {**config_of("slerp", parents), "models": models(*parents[1:3])}
    assert "models names 2 beside base_model; slerp wants exactly 1" in refused(slerp)
    ties = config_of("ties", parents)
    missing = {**ties, "models": [{"model": str(parents[1]), "parameters": {"density": 0.5}}]}
    assert "weight is missing for" in refused(missing)
    filtered = {**ties, "parameters": {"lambda": [{"filter": "attn_norm", "value": 2}, {"value": 1}]}}
    assert "'attn_norm', which is part of no tensor's name" in refused(filtered)
    own = {**ties, "models": [*ties["models"], {"model": str(parents[0]), "parameters": {"weight": 1}}]}
    assert "is base_model" in refused(own)
    della = {**config_of("della", parents), "parameters": {"epsilon": 0.6}}
    assert "density is 0.5 and epsilon 0.6" in refused(della)
    absent = {**linear, "models": models(parents[1], tmp_path / "nowhere", weight=[1, 1])}
    assert f"no model folder at {tmp_path / 'nowhere'}" in refused(absent)
    assert "no such file of a merge" in _unread(capsys, tmp_path)


def _unread(capsys: pytest.CaptureFixture[str], folder: Path) -> str:
    from mmllm.cli.main import main

    assert main(["merge", str(folder / "none.yaml"), "--out", str(folder / "out")]) == 2
    return capsys.readouterr().err


def test_parents_that_differ(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(other: Path) -> str:
        values = {"merge_method": "linear", "models": models(parents[1], other, weight=[1, 1])}
        return merge(capsys, tmp_path / "out", values, code=2)

    def saved(name: str, model: Any, tokenizer: Any = None) -> Path:
        return save_model(tmp_path / name, model, tokenizer or make_tokenizer())

    config = moved(0).config
    wider = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, intermediate_size=40))
    said = refused(saved("wider", type(moved(0))(wider)))
    assert "tensor decoder.layers.0.mlp.down_proj.weight is [32, 48] in" in said and "[32, 40] in" in said
    assert str(parents[1]) in said and str(tmp_path / "wider") in said
    base = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, rope_theta=5e5))
    assert "model.decoder.rope_theta is 10000.0 in" in refused(saved("rope", type(moved(0))(base)))
    top = dataclasses.replace(config.decoder.moe, num_experts_per_tok=1)  # type: ignore[arg-type]
    routed = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, moe=top))
    assert "model.decoder.moe.num_experts_per_tok is 2 in" in refused(saved("routed", type(moved(0))(routed)))
    untied = make_model(make_tokenizer(), tie_word_embeddings=False)
    assert "has no tensor decoder.lm_head.weight" in refused(saved("untied", untied))
    other = make_tokenizer("parallel")
    assert "differ in their tokenizer_config.json: pattern" in refused(saved("pattern", make_model(other), other))
    silent = make_tokenizer(sound=False)
    assert "units: only one has a codec/" in refused(saved("silent", make_model(silent), silent))
    config_file = json.loads((parents[2] / "config.json").read_text())
    shutil.copytree(parents[2], tmp_path / "pixels")
    config_file["image_transform"]["mean"] = [0.0, 0.0, 0.0]
    (tmp_path / "pixels" / "config.json").write_text(json.dumps(config_file))
    assert "their towers see other pixels" in refused(tmp_path / "pixels")
    # what only training reads may differ
    free = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, dropout=0.1))
    values = {"merge_method": "linear",
              "models": models(parents[1], saved("free", type(moved(0))(free)), weight=[1, 1])}  # fmt: skip
    merge(capsys, tmp_path / "good", values)


def test_out_isnt_overwritten(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "which isn't empty" in merge(capsys, tmp_path / "out", config_of("ties", parents), code=2)
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"


def test_a_yaml_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmllm.cli.main import main

    for text in ("- a", "{"):
        (tmp_path / "bad.yaml").write_text(text)
        assert main(["merge", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "out")]) == 2
        assert "bad.yaml" in capsys.readouterr().err


# --- dense specialists as experts -------------------------------------------------------------------------------------


def dense(folder: Path, seed: int) -> Path:
    make_base(folder, moe=None, moe_layers="all")
    loaded = load_model(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in loaded.model.named_parameters():
            if seed and name.startswith("decoder."):
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return save_model(folder, loaded.model, loaded.tokenizer)


def test_branch_train_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    from tests.test_adapters import text_logits

    folders = [dense(tmp_path / name, seed) for seed, name in enumerate(("zero", "one", "two"))]
    values = {"merge_method": "branch_train_mix", "experts_per_token": 2, "models": models(*folders)}
    merge(capsys, tmp_path / "mixed", values)
    mixed, parents = weights(tmp_path / "mixed"), [weights(folder) for folder in folders]
    for layer in (0, 1):
        path = f"decoder.layers.{layer}.mlp"
        for expert, parent in enumerate(parents):
            gate, up, down = (parent[f"{path}.{name}_proj.weight"] for name in ("gate", "up", "down"))
            assert torch.equal(mixed[f"{path}.experts.gate_up_proj"][expert], torch.cat([gate, up]))
            assert torch.equal(mixed[f"{path}.experts.down_proj"][expert], down)
        assert mixed[f"{path}.gate.weight"].shape == (3, 32)
    name = "decoder.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(mixed[name], sum(parent[name] for parent in parents) / 3)
    loaded = load_model(tmp_path / "mixed")
    assert loaded.model.config.decoder.moe is not None and loaded.model.config.decoder.moe.num_experts == 3
    assert "new: train it on" in (tmp_path / "mixed" / "README.md").read_text()
    # copies of one model compute what it computes, whatever the new routers choose
    shutil.copytree(folders[1], tmp_path / "copy")
    merge(capsys, tmp_path / "same", {**values, "models": models(folders[1], tmp_path / "copy")})
    torch.testing.assert_close(
        text_logits(load_model(tmp_path / "same").model), text_logits(load_model(folders[1]).model), rtol=0, atol=1e-5
    )


def test_branches_that_cant_be_mixed(parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = {"merge_method": "branch_train_mix", "models": models(*parents[:2])}
    assert "have experts already" in merge(capsys, tmp_path / "out", values, code=2)
    assert "between 1 and 2" in merge(capsys, tmp_path / "out", {**values, "experts_per_token": 3}, code=2)
    assert "have experts already" in merge(capsys, tmp_path / "out", values, "--check", code=2)
    folders = [dense(tmp_path / name, seed) for seed, name in enumerate(("zero", "one"))]
    half = [{"sources": [{"model": str(folder), "layer_range": [0, 1]} for folder in folders]}]
    uncovered = {"merge_method": "branch_train_mix", "slices": half}
    assert "cover each once and in order" in merge(capsys, tmp_path / "out", uncovered, code=2)
    unmatched = {**values, "models": models(*folders), "parameters": {"weight": [{"filter": "attnn", "value": 1}]}}
    unmatched["parameters"]["weight"].append({"value": 1})
    assert "part of no tensor's name" in merge(capsys, tmp_path / "out", unmatched, code=2)


def test_a_config_can_be_parsed_without_a_file() -> None:
    config = parse_config({"merge_method": "linear", "models": [{"model": "a"}, {"model": "b/"}],
                           "parameters": {"weight": 1}})  # fmt: skip
    assert config.parents == ("a", "b") and config.numbers("decoder.norm.weight", 2).weights == (1.0, 1.0)


def test_few_tensors_are_held_at_once(
    parents: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    read, most = weights_module.Checkpoint.read, [0]

    def watched(self: weights_module.Checkpoint, name: str) -> torch.Tensor:
        tensor = read(self, name)
        alive.append(weakref.ref(tensor))
        most[0] = max(most[0], sum(each() is not None for each in alive))
        return tensor

    monkeypatch.setattr(weights_module.Checkpoint, "read", watched)
    merge(capsys, tmp_path / "out", config_of("ties", parents))
    assert len(alive) > 90 and most[0] <= 2 * 3
