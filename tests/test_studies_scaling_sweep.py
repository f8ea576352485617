"""`mmllm scaling sweep`: grids, what they cost, one small sweep run whole, and what is refused before it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mmllm.batch import PackedBatch
from mmllm.cli.main import main
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.studies.scaling_grid import Run, Sweep, load_sweep, sweep_of
from mmllm.studies.scaling_heldout import heldout_loss
from mmllm.studies.scaling_sweep import POINTS, Sweeper, _check_folder, run_sweep
from mmllm.studies.settings import put
from tests.data_fixtures import make_folder, mixed_manifest, recipe_dict

SIZE = "model.init_args.decoder.hidden_size"
VALUES: dict[str, Any] = {
    "title": "trial", "data": {"folder": "data"}, "config": "{data}/config.yaml", "recipe": "{data}/recipe.yaml",
    "heldout": "{data}/recipe.yaml", "sizes": {"s": {SIZE: 16}, "m": {SIZE: 32}, "l": {SIZE: 64}},
    "tokens": [400, "1e3", 1600],
}  # fmt: skip


def changed(**keys: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    for dotted, value in keys.items():
        put(values, dotted.replace("__", "."), value)
    return values


def test_a_grid_is_all_of_its_levels_the_shortest_first() -> None:
    sweep = sweep_of(changed(variants={"dense": {}, "experts": {}}, rates=[0.5, 1], seeds=[0, 1]))
    runs = sweep.runs()
    assert len(runs) == len({run.name for run in runs}) == 3 * 3 * 2 * 2 * 2
    assert [run.amount for run in runs] == sorted(run.amount for run in runs)
    assert runs[0].name == "dense-s-t400-rate0.5-seed0"
    assert {run.amount for run in runs} == {400, 1000, 1600}, "1e3 is a number"
    check = sweep_of(changed(check={"sizes": {"xl": {SIZE: 128}}, "tokens": [5000]})).runs()
    assert check[-1] == Run("base", "xl", 5000, is_check=True) and sum(run.is_check for run in check) == 1


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokens": []}, "tokens and flops, or neither"),
        ({"flops": [1e9]}, "tokens and flops, or neither"),
        ({"sizes": {}}, "sizes is empty"),
        ({"tokens": [5, 5]}, "give each value once"),
        ({"tokens": [-5]}, "all must be positive"),
        ({"shares": [2.0]}, "shares is"),
        ({"rate": {"at": 0}}, "rate.at is 0"),
        ({"tokns": [1]}, "unknown key 'tokns'"),
        ({"tokens": [123456, 123457]}, "two runs would have the folder base-s-t1.235e05-seed0"),
        ({"check": {"sizes": {"s": {SIZE: 128}}, "tokens": [400]}}, "two runs would have the folder base-s-t400-seed0"),
        ({"sizes": {"s": {"trainer.max_steps": 3}}}, r"sizes\.s has trainer\.max_steps: 3, but the grid says"),
        ({"variants": {"a": {"confg": {}}}}, "variants.a has the unknown key 'confg'"),
    ],
)
def test_bad_sweeps_are_named(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        sweep_of(changed(**keys))


def test_larger_models_learn_at_the_rule_s_rates() -> None:
    rule = sweep_of(changed(rate={"at": 1e6, "exponent": -0.5})).rate
    assert rule.factor(1e6) == 1 and rule.factor(4e6) == pytest.approx(0.5)


# ---- with data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text shards, a config of a tiny decoder, and a plan."""
    folder = tmp_path_factory.mktemp("sweep")
    make_folder(folder / "tokenizer")
    manifest = mixed_manifest(folder / "rows", 30)
    rows = [line for line in manifest.read_text().splitlines() if json.loads(line)["id"].startswith("t")]
    manifest.write_text("\n".join(rows) + "\n")
    tokenizer = str(folder / "tokenizer")
    assert main(["data", "build", str(manifest), "--out", str(folder / "shards"), "--tokenizer", tokenizer]) == 0
    assert main(["data", "index", str(folder / "shards"), "--tokenizer", tokenizer]) == 0
    recipe = recipe_dict(folder / "shards", folder / "tokenizer", mixture={"on_exhausted": "repeat"})
    recipe["sources"] = [source for source in recipe["sources"] if source["kind"] == "text"]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    decoder = {"vocab_size": 0, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
               "num_key_value_heads": 1, "intermediate_size": 32}  # fmt: skip
    model = {"tokenizer": tokenizer, "out": "x", "decoder": decoder, "optimizer": {"lr": 0.01, "warmup": 0.1}}
    config = {
        "seed_everything": 0,
        "trainer": {"accelerator": "cpu", "max_steps": 5, "callbacks": []},
        "model": {"class_path": "mmllm.training.decoder_module.DecoderModule", "init_args": model},
        "data": {"class_path": "mmllm.data.loading.datamodules.PackedDataModule",
                 "init_args": {"recipe": "x", "batch_size": 1, "num_workers": 0}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def plan_of(data: Path, out: Path, **keys: Any) -> Path:
    path = out / "plan.yaml"
    path.write_text(yaml.safe_dump(changed(data={"folder": str(data)}, **keys), sort_keys=False))
    return path


def test_costs_are_told_and_grids_that_tell_nothing_are_refused(data: Path, tmp_path: Path) -> None:
    lines = list(run_sweep(plan_of(data, tmp_path), tmp_path / "out", is_dry=True))
    assert len(lines) == 10 and "9 runs, 0 done; the rest need" in lines[-1]
    assert not (tmp_path / "out").exists(), "nothing is left"
    with pytest.raises(FileNotFoundError, match="the sweep's data isn't there"):
        list(run_sweep(plan_of(data, tmp_path), tmp_path / "out", is_dry=True, data=str(tmp_path / "nowhere")))
    assert not list(tmp_path.glob("nowhere*"))
    assert "base-s-t400-seed0" in lines[0] and "steps" in lines[0] and "rate 0.01" in lines[0]
    with pytest.raises(ValueError, match=r"variant base: 3 points can't tell a law.*is_law: false"):
        list(run_sweep(plan_of(data, tmp_path, tokens=[500]), tmp_path / "few", is_dry=True))
    with pytest.raises(ValueError, match="hidden_siz"):
        bad = {"s": {"model.init_args.decoder.hidden_siz": 8}}
        list(run_sweep(plan_of(data, tmp_path, sizes=bad), tmp_path / "bad", is_dry=True))
    with pytest.raises(FileNotFoundError, match=r"heldout is none\.yaml"):
        list(run_sweep(plan_of(data, tmp_path, heldout="none.yaml"), tmp_path / "none", is_dry=True))


def test_a_grid_of_repeated_documents_is_refused_at_once(data: Path, tmp_path: Path) -> None:
    """Fits leave out what goes through the documents again; there are 1,663 tokens of them."""
    with pytest.raises(ValueError, match=r"variant base: all 9 runs go through the documents up to 6(\.\d)? times"):
        list(run_sweep(plan_of(data, tmp_path, tokens=[3000, 5000, 1e4]), tmp_path / "all", is_dry=True))
    with pytest.raises(ValueError, match=r"2 different numbers of tokens.*\(3 of 9 runs repeat documents"):
        list(run_sweep(plan_of(data, tmp_path, tokens=[400, 800, 5000]), tmp_path / "some", is_dry=True))
    lines = list(run_sweep(plan_of(data, tmp_path, tokens=[3000, 5000], is_law=False), tmp_path / "none", is_dry=True))
    assert "6 runs, 0 done" in lines[-1]


def test_a_share_is_of_what_the_recipe_takes(data: Path, tmp_path: Path) -> None:
    """A source that has a share of its own keeps it."""
    path = plan_of(data, tmp_path, shares=[0.5, 1.0], set_recipe={"sources.text.share": 0.4})
    sweeper = Sweeper(load_sweep(path)[0], tmp_path / "out")
    found = {
        run.share: sweeper.settings(run, tmp_path / run.name).recipe["sources"][0]["share"]
        for run in sweeper.sweep.runs()
    }
    assert found == {0.5: pytest.approx(0.2), 1.0: 0.4}


def test_another_check_is_another_sweep(data: Path, tmp_path: Path) -> None:
    """More sizes and lengths of a check only add runs; other keys of one that is there don't."""
    out = tmp_path / "out"

    def claim(width: int, **more: Any) -> None:
        check = {"sizes": {"xl": {SIZE: width}, **more}, "tokens": [5000]}
        values = changed(data={"folder": str(data)}, check=check)
        _check_folder(out, sweep_of(values), values)
        out.mkdir(exist_ok=True)
        (out / "sweep.json").write_text(json.dumps(values))  # as a run does

    claim(128)
    (out / "runs" / "base-s-t400-seed0").mkdir(parents=True)
    (out / "runs" / "base-s-t400-seed0" / "result.json").write_text("{}")
    claim(128, xxl={SIZE: 256})
    with pytest.raises(ValueError, match=r"with another check\.sizes\.xl; they can't be put on one curve"):
        claim(64)
    values = changed(data={"folder": str(data)})
    _check_folder(out, sweep_of(values), values)  # the check had no run
    (out / "runs" / "base-s-t300-seed0").mkdir()
    (out / "runs" / "base-s-t300-seed0" / "result.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds 1 runs that this sweep doesn't have \(base-s-t300-seed0\)"):
        claim(128)


def test_what_is_held_out_is_made_once(data: Path, tmp_path: Path) -> None:
    """By commands of the sweep, into its own folder, with a recipe that the sweep holds; on data given by option."""
    recipe = yaml.safe_load((data / "recipe.yaml").read_text())
    [source] = recipe["sources"]
    source["shards"] = "{prepared}/*.tar"
    prepare = [
        "data build {data}/rows/manifest.jsonl --tokenizer {data}/tokenizer --out {prepared}",
        "data index {prepared} --tokenizer {data}/tokenizer",
    ]
    keys = {"sizes": {"s": {SIZE: 16}}, "tokens": [300, 700], "is_law": False, "heldout": recipe, "prepare": prepare}
    path, out = plan_of(data, tmp_path, **keys), tmp_path / "out"
    path.write_text(path.read_text().replace(str(data), "nowhere", 1))
    lines = list(run_sweep(path, out, num_at_once=2, data=str(data)))
    assert [line for line in lines if line.startswith("$")] == [
        f"$ mmllm {command.replace('{data}', str(data)).replace('{prepared}', str(out / 'prepared'))}"
        for command in prepare
    ]
    assert lines[-1].endswith("2 points") and (out / "prepared").is_dir()
    assert yaml.safe_load((out / "heldout.yaml").read_text())["sources"][0]["shards"] == f"{out}/prepared/*.tar"
    assert not any(line.startswith("$") for line in run_sweep(path, out, data=str(data)))


def test_budgets_of_compute_give_each_size_its_tokens(data: Path, tmp_path: Path) -> None:
    path = plan_of(data, tmp_path, tokens=[], flops=[5e8], rate={"at": 1e4, "exponent": -0.5})
    sweeper = Sweeper(load_sweep(path)[0], tmp_path / "out")
    counted = [sweeper.count(run, tmp_path / run.name) for run in sweeper.sweep.runs()]
    for one in counted:
        assert 6 * one.parameters * one.length.tokens == pytest.approx(5e8, rel=0.25), "to the nearest step"
        assert one.lr["model.init_args.optimizer.lr"] == pytest.approx(0.01 * (one.parameters / 1e4) ** -0.5, rel=1e-4)
    assert [one.parameters for one in counted] == sorted(one.parameters for one in counted)


def test_a_sweep_goes_on_where_it_was_killed(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, the second of which is killed in its middle: it alone is run again; the points are those of all."""
    keys = {"sizes": {"s": {SIZE: 16}}, "tokens": [300, 700], "is_law": False, "shares": [1.0]}
    path, out = plan_of(data, tmp_path, **keys), tmp_path / "out"
    called: list[str] = []
    real = Sweeper._call

    def killed(self: Sweeper, command: Any, folder: Path, run: Run) -> None:
        called.append(run.name)
        if len(called) == 2:
            raise KeyboardInterrupt
        real(self, command, folder, run)

    monkeypatch.setattr(Sweeper, "_call", killed)
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(path, out))
    assert len((out / POINTS).read_text().splitlines()) == 1
    lines = list(run_sweep(path, out))
    assert called == ["base-s-t300-seed0", "base-s-t700-seed0", "base-s-t700-seed0"]
    assert lines[-1].endswith("2 points") and any("minutes at the speed so far" in line for line in lines)
    first, second = (json.loads(line) for line in (out / POINTS).read_text().splitlines())
    assert second["tokens"] > first["tokens"] and second["parameters"] == first["parameters"]
    assert first["loss"] == pytest.approx(first["loss_text"]) == pytest.approx(first["loss_by_source"]["text"])
    assert 0 < second["loss"] < 8 and not (out / "runs" / "base-s-t700-seed0" / "model").exists()
    with pytest.raises(ValueError, match=r"with another set, sizes\.s; they can't be put on one curve"):
        list(run_sweep(plan_of(data, tmp_path, **{**keys, "sizes": {"s": {SIZE: 32}}, "set": {"a": 1}}), out))


def test_the_heldout_loss_is_that_of_a_plain_loop(data: Path, tmp_path: Path) -> None:
    """Beside cross-entropy of the whole logits, batch by batch."""
    from mmllm.checkpoints.folder import save_model
    from mmllm.model.decoder_config import DecoderConfig
    from mmllm.model.multimodal import LossConfig, ModelConfig, MultimodalModel
    from mmllm_tokenizers.folder import TokenizerFolder

    tokenizer = TokenizerFolder.load(data / "tokenizer")
    torch.manual_seed(3)
    decoder = DecoderConfig(tokenizer.vocabulary.size, 16, 1, 2, 1, intermediate_size=32)
    model = MultimodalModel(ModelConfig(decoder, loss=LossConfig(answers=3.0))).eval()
    save_model(tmp_path / "model", model, tokenizer)
    found = heldout_loss(tmp_path / "model", data / "recipe.yaml", 3, batch_size=2)
    module = PackedDataModule(
        recipe=data / "recipe.yaml", val_recipe=data / "recipe.yaml", batch_size=2, num_val_sequences=3, num_workers=0
    )
    module.setup("validate")
    total, count = 0.0, 0
    for batch in module.val_dataloader():
        assert isinstance(batch, PackedBatch)
        output = model(batch)
        metadata = output.metadata
        labels_M = batch.labels_BT.flatten()[metadata.sequences.tokens_Q[metadata.targets_M]]
        logits_MV = model.decoder.lm_head(output.hidden_QD[metadata.targets_M])
        total += float(torch.nn.functional.cross_entropy(logits_MV.detach(), labels_M, reduction="sum"))
        count += len(labels_M)
    assert found.num_targets == count and found.loss == pytest.approx(total / count, rel=1e-5)


def test_bad_plans_are_named_by_the_command_line(tmp_path: Path, capsys: Any) -> None:
    assert main(["scaling", "sweep", str(tmp_path / "none.yaml"), "--out", str(tmp_path)]) == 2
    (tmp_path / "plan.yaml").write_text("title: x\n")
    assert main(["scaling", "sweep", str(tmp_path / "plan.yaml"), "--out", str(tmp_path)]) == 2
    assert "lacks the key 'data'" in capsys.readouterr().err
    assert isinstance(sweep_of(VALUES), Sweep)
