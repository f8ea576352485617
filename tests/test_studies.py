"""Studies: their keys, their arms' settings, lengths under a budget."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.studies.lengths import check_training
from mmllm.studies.report import factor_lines, said_commit, uneven_notes
from mmllm.studies.run import _begun
from mmllm.studies.settings import Base, Settings, put, resolved
from mmllm.studies.statistics import holm
from mmllm.studies.study import Arm, Study, study_of

MEASURE: dict[str, Any] = {
    "name": "captions", "task": "caption", "manifest": "{data}/test.jsonl", "key": "exact_match"
}  # fmt: skip
VALUES: dict[str, Any] = {
    "title": "Experts", "question": "Do they pay?", "expected": "yes", "data": {"folder": "data"},
    "config": "{data}/config.yaml", "recipe": "{data}/recipe.yaml",
    "measures": [MEASURE],
    "budget": {"samples": 1000},
    "factors": {
        "experts": {"baseline": "sparse", "levels": {"sparse": {"shares": [0.1, 1.0]}, "dense": {
            "config": {"model.init_args.decoder.moe": None}, "recipe": {"sources.caption.weight": 0.5}}}},
    },
}  # fmt: skip


def changed(**keys: Any) -> dict[str, Any]:
    values = copy.deepcopy(VALUES)
    for dotted, value in keys.items():
        put(values, dotted.replace("__", "."), value)
    return values


def test_one_seed_of_every_arm_comes_first():
    names = [arm.name for arm in study_of(VALUES).arms()]
    assert names[:2] == ["experts-sparse-seed0", "experts-dense-seed0"]
    assert names[2:6] == [f"experts-{level}-seed{seed}" for seed in (1, 2) for level in ("sparse", "dense")]
    assert names[6:] == [f"experts-sparse-0.1-seed{seed}" for seed in (0, 1, 2)]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"budget": {}}, "exactly one of seconds, flops and samples"),
        ({"budget": {"samples": 5, "flops": 1.0}}, "samples and flops|flops and samples"),
        ({"budget": {"samples": -5}}, "budget.samples is -5"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"measures": []}, "measures is empty"),
        ({"factors__experts__baseline": "other"}, "baseline is 'other'"),
        ({"factors__experts__levels__dense__confg": {}}, "factors.experts.levels.dense has the unknown key 'confg'"),
        ({"factors__experts__levels__dense__shares": [0.5]}, "with 1 among them"),
        ({"factors__experts__levels__dense__steps": [{"fit": {}, "share": 0.5}]}, "together they must be the budget"),
        ({"factors__experts__levels__dense__steps": [{"command": "upcycle"}]}, "have no training"),
        ({"factors__experts__levels__dense__steps": [{}]}, "either `fit`"),
        ({"factors__experts__levels__dense__steps": [{"fit": {}, "out": "/model"}]}, "a step writes '/model'"),
        (
            {"factors__experts__levels__dense__steps": [{"fit": {}, "out": "a/../../model"}]},
            "a name in the run's folder",
        ),
        ({"factors__experts__levels__dense__steps": [{"command": "merge", "files": {"../a": {}}}]}, "writes '../a'"),
        ({"factors__experts__levels__dense__steps": [{"command": "fit -c a.yaml"}]}, "outside of the budget"),
        ({"tite": "x"}, "unknown key 'tite'"),
        ({"measures": [{**MEASURE, "shots": {"manifest": "f", "number": 0}}]}, "have the number 0"),
        ({"measures": [{**MEASURE, "shots": {"manifest": "f"}}]}, r"measures\[0\].shots lacks the key 'number'"),
        ({"measures": [{**MEASURE, "shots": {"manifest": "f", "number": 1, "filter": "a ="}}]}, "filter"),
        ({"measures": [{**MEASURE, "anchor": " "}]}, "captions has an empty anchor"),
        ({"measures": [{**MEASURE, "task": "text", "anchor": "a"}]}, "captions has anchor, and the task text has none"),
        ({"factors__experts__levels__dense__measures": {"x": {"anchor": "a"}}}, "levels.dense.measures has 'x'"),
        ({"factors__experts__levels__dense__measures": {"captions": {"anchor": ""}}}, "levels.dense.measures: measure"),
        ({"set": {"trainer.max_steps": 5}}, "set has trainer.max_steps: 5, but budget says how long a run is"),
        ({"factors__experts__levels__dense__config": {"trainer.max_epochs": 9}}, "levels.dense.config has trainer"),
        ({"factors__experts__levels__dense__recipe": {"seed": 9}}, "recipe has seed: 9, but every run has its own"),
        ({"factors__experts__levels__dense__steps": [{"fit": {"trainer.max_steps": 9}}]}, r"steps\[0\].fit has"),
        (
            {"factors__experts__levels": {"sparse": {"shares": [0.1, 1.0]}, "sparse-0.1": {}}},
            "two runs would have the folder experts-sparse-0.1-seed0",
        ),
    ],
)
def test_bad_studies_are_named(keys: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        study_of(changed(**keys))


def base_of(tmp_path: Path, **keys: Any) -> Base:
    config = {
        "trainer": {"callbacks": [{"class_path": "a.b.EMA"}, {"class_path": "c.Samples"}], "max_steps": 3},
        "model": {"init_args": {"decoder": {"moe": {"num_experts": 8}}, "out": "x"}},
        "data": {"init_args": {"recipe": "r"}},
    }
    recipe = {"sources": [{"name": "caption", "shards": "{data}/*.tar", "weight": 1.0}, {"name": "text"}]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Base.read(study_of(changed(**keys)), tmp_path)


def test_a_share_is_of_the_data_that_the_study_takes(tmp_path: Path):
    base = base_of(tmp_path, curve_sources=["caption"], set_recipe={"sources.caption.share": 0.5})
    step = base.study.level(Arm("experts", "sparse", 3)).parts[0]
    shares = [base.settings(Arm("experts", "sparse", 3, share), step, tmp_path / "run").recipe["sources"][0]["share"]
              for share in (1.0, 0.1)]  # fmt: skip
    assert shares == [0.5, 0.05]


def test_a_level_changes_its_keys_alone(tmp_path: Path):
    base = base_of(tmp_path, curve_sources=["caption"])
    step = base.study.level(Arm("experts", "dense", 3)).parts[0]
    dense = base.settings(Arm("experts", "dense", 3), step, tmp_path / "run")
    sparse = base.settings(Arm("experts", "sparse", 3, 0.1), step, tmp_path / "run")
    assert "moe" not in dense.config["model"]["init_args"]["decoder"]
    assert sparse.config["model"]["init_args"]["decoder"] == {"moe": {"num_experts": 8}}
    assert dense.recipe["sources"][0] == {"name": "caption", "shards": f"{tmp_path}/*.tar", "weight": 0.5}
    assert sparse.recipe["sources"][0]["share"] == 0.1 and "share" not in sparse.recipe["sources"][1]
    assert dense.recipe["seed"] == dense.config["seed_everything"] == 3
    assert dense.config["model"]["init_args"]["out"] == str(tmp_path / "run" / "model")
    assert [each["class_path"] for each in dense.config["trainer"]["callbacks"]] == ["a.b.EMA"]
    assert base.config["model"]["init_args"]["decoder"]["moe"]  # the base is left as it is


def test_a_measure_asks_as_it_says_and_as_a_level_says():
    shots, few = {"manifest": "{data}/train.jsonl", "number": 8}, {"manifest": "t", "number": 2, "max_length": 99,
                                                                   "filter": "plain"}  # fmt: skip
    measures = [{**MEASURE, "shots": shots, "anchor": "see:"}, {**MEASURE, "name": "plain"}]
    levels = {"captions": {"anchor": "-a b"}, "plain": {"shots": few}}
    study = study_of(changed(measures=measures, factors__experts__levels__dense__measures=levels))
    sparse, dense = (study.factors["experts"].levels[name] for name in ("sparse", "dense"))
    captions, plain = study.measures
    said = ["--shots={data}/train.jsonl", "--num_shots=8"]
    assert captions.of(sparse.measures) == captions and captions.prompt_options == [*said, "--anchor=see:"]
    assert captions.of(dense.measures).prompt_options == [*said, "--anchor=-a b"]
    assert plain.of(sparse.measures).prompt_options == []
    assert plain.of(dense.measures).prompt_options == [
        "--shots=t",
        "--num_shots=2",
        "--max_length=99",
        "--shots_filter=plain",
    ]


def test_unknown_sources_and_keys_without_keys_are_named(tmp_path: Path):
    wrong = {"factors__experts__levels__dense__recipe": {"sources.captions.weight": 1}}
    base = base_of(tmp_path, **wrong)
    arm = Arm("experts", "dense", 0)
    with pytest.raises(ValueError, match=r"levels.dense.recipe: sources.captions.weight names 'captions'.*caption"):
        base.settings(arm, base.study.level(arm).parts[0], tmp_path)
    with pytest.raises(ValueError, match="a is 3, which has no key 'b'"):
        put({"a": 3}, "a.b", 1)


def test_schedules_are_shares_of_the_steps():
    values = {"steps": {"share_of_steps": 0.5}, "points": [[{"share_of_steps": 0.001}, 1.0], [{"share_of_steps": 0}]]}
    assert resolved(values, 300) == {"steps": 150, "points": [[1, 1.0], [0]]}
    settings = Settings({}, values)
    assert settings.with_steps(10).recipe["steps"] == 5 and settings.with_steps(10).config["trainer"]["max_steps"] == 10
    with pytest.raises(ValueError, match="budget is in seconds"):
        settings.with_seconds(5.0)
    assert Settings({}, {}).with_seconds(5.0).config["model"]["init_args"]["max_seconds"] == 5.0


def test_steps_may_lie_in_lists_that_anchors_name():
    one, other, last = {"fit": {}, "share": 0.4}, {"command": "x"}, {"fit": {}, "share": 0.6}
    nested, flat = (
        study_of(changed(factors__experts__levels__dense__steps=steps))
        for steps in ([one, [[other], [], [last]]], [one, other, last])
    )
    assert nested == flat and len(flat.factors["experts"].levels["dense"].steps) == 3
    with pytest.raises(ValueError, match=r"levels.dense.steps\[1\] must be a mapping"):
        study_of(changed(factors__experts__levels__dense__steps=[one, ["x"]]))


def test_callbacks_are_put_in_and_out_by_name():
    config = {"callbacks": [{"class_path": "mmllm.training.ema.EMA", "init_args": {"decay": 0.9}}]}
    put(config, "callbacks.EMA.init_args.decay", 0.5)
    assert config["callbacks"][0]["init_args"]["decay"] == 0.5
    put(config, "callbacks.EMA", None)
    assert config["callbacks"] == []
    put(config, "callbacks.EMA", {"class_path": "mmllm.training.ema.EMA"})
    assert len(config["callbacks"]) == 1


def test_a_folder_is_gone_on_with_by_the_same_base_alone(tmp_path: Path):
    def begin(keys: dict[str, Any], out: str = "out") -> Study:
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(changed(**keys)))
        study, folder, values = _begun(str(tmp_path / "study.yaml"), tmp_path / out)
        folder.mkdir(exist_ok=True)
        (folder / "study.json").write_text(json.dumps(values))  # as a run does
        return study

    def has_run(out: str) -> None:
        run = tmp_path / out / "runs" / "a"
        run.mkdir(parents=True)
        (run / "result.json").write_text("{}")

    begin({"budget": {"samples": 9}})  # it was only asked what it would cost
    begin({})
    has_run("out")
    assert len(begin({"seeds": [0, 1, 2, 3]}).seeds) == 4
    for keys, said in (
        ({"set_recipe": {"curriculum": None}}, r"another base \(set_recipe\)"),  # a key that wasn't there
        ({"budget": {"samples": 9}}, r"another base \(budget\)"),
        ({"factors__experts__levels__dense__config": {"model.init_args.decoder.moe": 1}}, r"another levels"),
    ):
        with pytest.raises(ValueError, match=said):
            begin(keys)
    begin({"set": {"trainer.devices": 1}}, "other")
    has_run("other")
    with pytest.raises(ValueError, match=r"another base \(set\)"):  # and one that is gone
        begin({}, "other")
    level = {"factors__experts__levels__third": {"config": {"model.init_args.decoder.moe": None}}}
    begin(level, "third")
    has_run("third")
    for keys, said in (({}, "experts.third"), ({**level, "seeds": [0, 1]}, "seed 2")):
        with pytest.raises(ValueError, match=f"{said} too, which its report would lose"):
            begin(keys, "third")


def test_arms_without_a_common_seed_have_no_difference():
    study = study_of(VALUES)
    runs = {"scores": {"captions": {"score": 0.5, "rows": {"a": [1.0, 0.0], "b": [0.0, 0.0]}}}, "flops": 1.0,
            "minutes": 1.0, "steps": 1, "tokens": 1, "documents": 7, "joules": None}  # fmt: skip
    results = {Arm("experts", "sparse", 0): runs, Arm("experts", "dense", 1): runs}
    sparse, dense = factor_lines(study, "experts", study.measures[0], results)
    assert (sparse.verdict, sparse.difference) == ("baseline", 0.0)
    assert (dense.verdict, dense.difference, dense.p) == ("unproved", None, None)
    assert "NaN" not in json.dumps(dense.__dict__)


def test_keys_are_checked_where_the_model_to_start_from_is_yet_to_be_made(tmp_path: Path):
    config = {
        "trainer": {"accelerator": "cpu"},
        "model": {"class_path": "mmllm.training.decoder_module.DecoderModule",
                  "init_args": {"init_from": str(tmp_path / "yet")}},
        "data": {"class_path": "mmllm.data.loading.datamodules.PackedDataModule", "init_args": {}},
    }  # fmt: skip
    recipe = {"tokenizer": "t", "sequence_length": 64, "sources": [{"name": "a", "kind": "text", "shards": "a"}]}
    check_training(Settings(config, recipe), "samples", tmp_path, "model")
    put(config, "model.init_args.optimizer.lrr", 1)
    with pytest.raises(ValueError, match="lrr"):
        check_training(Settings(config, recipe), "seconds", tmp_path, "model")


def write_report(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    values = {"title": name, "question": "?", "expected": "!", "budget": {"flops": 1e12}, "rows": rows, "runs": 2,
              "runs_left_out": [], "commit": "abc", "machine": {"processor": "cpu", "cores": 2}}  # fmt: skip
    (folder / f"{name}.json").write_text(json.dumps(values))


def test_efficiency_is_made_of_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from mmllm.cli.main import main

    (tmp_path / "studies").mkdir()
    row = {"factor": "f", "level": "a", "measure": "m", "score": 0.5, "interval": [0.4, 0.6], "difference": 0.1,
           "interval_over": "seeds and rows", "p": 0.01, "p_holm": 0.02, "seeds": 3, "pairs": 3,
           "samples_for_equal_score": 1234.0, "samples_is_bound": False, "flops": 1e12, "minutes": 2.0,
           "lower_is_better": False, "verdict": "better"}  # fmt: skip
    base = {**row, "level": "b", "p": None, "p_holm": None, "verdict": "baseline"}
    write_report(tmp_path / "studies", "experts", [
        row, base,
        {**row, "level": "c", "p": 0.03, "p_holm": 0.03}, {**row, "measure": "n", "p_holm": 0.01},
        *({**base, "measure": name} for name in ("n", "few")),
        {**row, "measure": "few", "samples_is_bound": True, "interval_over": "seeds", "p": 0.2, "p_holm": 0.2,
         "verdict": "unproved"},
    ])  # fmt: skip
    fit = {"E": 1.7, "A": 400, "B": 2000, "alpha": 0.3, "beta": 0.3, "intervals": {"E": [1.6, 1.8]}, "warnings": ["w"],
           "points": 9, "error": 0.015, "check": [
               {"parameters": 5e6, "tokens": 6e5, "predicted": 0.9, "measured": 1.0, "error": -0.1}]}  # fmt: skip
    (tmp_path / "fit.json").write_text(json.dumps(fit))
    out = tmp_path / "EFFICIENCY.md"
    command = [
        "study",
        "efficiency",
        str(tmp_path / "studies"),
        "--out",
        str(out),
        "--scaling",
        str(tmp_path / "fit.json"),
    ]
    assert main(command) == 0
    text = out.read_text()
    assert (
        "| f | a | m | 0.5000 | 0.4000 – 0.6000 | +0.1000 | 0.010 | 0.020 | 3 | 1,234 | 1e+12 | 2.0 | better |" in text
    )
    assert "| f | b | m | 0.5000 | 0.4000 – 0.6000 | – | – | – |" in text
    assert (
        "+0.1000 | 0.030 | 0.030 |" in text
        and "| f | a | n | 0.5000 | 0.4000 – 0.6000 | +0.1000 | 0.010 | 0.010 |" in text
    )
    assert "| 0.4000 – 0.6000 (seeds) | +0.1000 | 0.200 | 0.200 | 3 | ≤ 1,234 |" in text
    assert "Here are 4 tests, of which 0.2 " in text and "FLOPs are not" not in text
    assert "| E | 1.7 | 1.6 – 1.8 |" in text and "Warning: w" in text
    assert "L nats a token; 9 trainings, root mean squared error of log L 1.5%." in text
    assert "5e+06 parameters, 6e+05 tokens: 0.9000 predicted, 1.0000 measured (-10.0%)" in text
    assert f"studies --scaling {tmp_path / 'fit.json'} --out" in text
    assert main(["study", "efficiency", str(tmp_path / "studies"), "--out", str(out), "--scaling", str(out)]) != 0
    for changed, said in (
        ({"score": "0.5"}, "believed.json: row 1 has score '0.5', which no report has"),
        ({"interval": None}, "row 1 has interval None"),
        ({"seeds": True}, "row 1 has seeds True"),
    ):
        write_report(tmp_path / "studies", "believed", [base, {**row, **changed}])
        assert main(command) != 0
        err = capsys.readouterr().err
        assert said in err and "a fault in mmllm" not in err
    for text, said in (("[1]", "holds list"), ("{", "is no JSON"), ('{"rows": [], "title": 3}', "has title 3")):
        (tmp_path / "studies" / "believed.json").write_text(text)
        assert main(command) != 0
        err = capsys.readouterr().err
        assert said in err and "a fault in mmllm" not in err
    write_report(tmp_path / "studies", "believed", [base, {**row, "difference": -1e-6, "p": 0.9, "p_holm": 0.9,
                                                           "verdict": "unproved"}])  # fmt: skip
    assert main(command) == 0 and "| +0.0000 | 0.900 |" in out.read_text()
    capsys.readouterr()
    write_report(tmp_path / "studies", "believed", [{**row, "p": 0.06, "p_holm": 0.06}])
    assert main(command) != 0
    assert "f has not one baseline in m" in capsys.readouterr().err
    write_report(tmp_path / "studies", "believed", [base, {**row, "p": 0.06, "p_holm": 0.06}])
    assert main(command) != 0
    assert "f: a is called better in m, and its numbers say unproved" in capsys.readouterr().err
    write_report(tmp_path / "studies", "believed", [base, {**row, "p": 0.06, "p_holm": 0.01}])
    assert main(command) != 0
    assert "f: a has p_holm 0.01 in m, and by the others' p it is 0.06" in capsys.readouterr().err
    del row["p_holm"]
    write_report(tmp_path / "studies", "believed", [row])
    assert main(command) != 0
    assert "believed.json was made by an earlier mmllm" in capsys.readouterr().err


def test_unequal_flops_under_an_equal_number_of_samples_are_told():
    rows = [{"factor": "order", "level": level, "flops": flops} for level, flops in (("a", 1.0), ("b", 1.04))]
    assert uneven_notes({"budget": {"samples": 9}, "rows": rows}) == []
    rows += [{"factor": "order", "level": "c", "flops": 1.1}, {"factor": "other", "level": "a", "flops": 5.0}]
    (note,) = uneven_notes({"budget": {"samples": 9}, "rows": rows})
    assert note == "order: samples are equal, and FLOPs are not: c has 1.1, a 1"
    assert uneven_notes({"budget": {"flops": 1e12}, "rows": rows}) == []


def test_a_commit_with_changes_is_told_as_such():
    assert said_commit("0123456789abcdef") == "0123456789"
    assert said_commit(["0123456789abcdef-dirty", "f" * 40]) == "0123456789-dirty, ffffffffff"


def test_p_is_adjusted_for_the_other_levels_under_the_measure():
    values = copy.deepcopy(VALUES)
    factor = next(iter(values["factors"]))
    values["factors"] = {factor: {"baseline": "a", "levels": {name: {} for name in "abcd"}}}
    study = study_of(values)
    measure = study.measures[0]
    scores = {"a": (0.1, 0.2, 0.3), "b": (0.2, 0.31, 0.42), "c": (0.5, 0.7, 0.75), "d": (0.2, 0.1, 0.4)}
    results = {
        Arm(factor, level, seed): {"scores": {measure.name: {"score": score, "rows": {}}}, "flops": 1.0, "minutes": 1.0,
                                   "steps": 1, "tokens": 1, "documents": 7, "joules": None}
        for level, each in scores.items() for seed, score in enumerate(each)
    }  # fmt: skip
    lines = factor_lines(study, factor, measure, results)
    assert lines[0].p_holm is None
    told = [line.p for line in lines[1:]]
    assert [line.p_holm for line in lines[1:]] == holm(told) != told
