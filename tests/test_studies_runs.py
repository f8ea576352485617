"""A study from its YAML to its report: costs, going on after a kill, a bound of minutes. Runs are stood in for."""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mmllm.cli.main import main
from mmllm.data.executors.stages import Executor
from mmllm.evaluation.results import TaskResult, save_result
from mmllm.studies.at_once import run_at_once
from mmllm.studies.commands import RunFailed
from mmllm.studies.lengths import Length
from mmllm.studies.run import run_study, study_in
from mmllm.studies.runs import Runner
from mmllm.studies.settings import Base
from mmllm.studies.shared import Cost, shared_keys
from mmllm.studies.study import Arm, Budget, Step
from mmllm.training.lightning_cli import unbuilt
from tests.test_studies_scaling_sweep import data as data  # a fixture: text shards, and a config of a tiny decoder

pytest.importorskip("scipy", reason="a study's tests need scipy: pip install 'mmllm[studies]'")
WIDTH = "model.init_args.decoder.hidden_size"


def study_file(data: Path, folder: Path, **changes: Any) -> str:
    values = {
        "title": "Width", "question": "Does it pay?", "expected": "yes", "data": {"folder": str(data)},
        "config": "{data}/config.yaml", "recipe": "{data}/recipe.yaml", "budget": {"samples": 40}, "seeds": [0, 1],
        "measures": [{"name": "bits", "task": "text", "manifest": "{data}/rows/manifest.jsonl", "key": "bits_per_byte",
                      "lower_is_better": True}],
        "factors": {"width": {"baseline": "narrow", "levels": {
            "narrow": {"shares": [0.5, 1.0]}, "wide": {"config": {WIDTH: 32}, "shares": [0.5, 1.0]}}}},
    }  # fmt: skip
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({**values, **changes}))
    return str(path)


class Calls:
    """Stands for the commands of runs: wide models are better, and fewer rows worse."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.fits: list[str] = []
        self.evals: list[tuple[str, list[str]]] = []
        self.killed_at = killed_at

    def __call__(self, runner: Runner, command: Sequence[str], folder: Path, arm: Arm) -> None:
        if command[0] == "fit":
            if len(self.fits) == self.killed_at:
                raise KeyboardInterrupt
            self.fits.append(arm.name)
            (folder / "model").mkdir()
        elif command[0] == "eval":
            self.evals.append((arm.level, list(command)))
            score = {"narrow": 2.0, "wide": 1.5}[arm.level] + (1 - arm.share) + 0.1 * arm.seed
            save_result(TaskResult("text", {"bits_per_byte": score, "n": 1}), command[command.index("--json") + 1])


def stand_in(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> Calls:
    calls = Calls(**settings)
    monkeypatch.setattr(Runner, "_call", lambda self, *given: calls(self, *given))
    return calls


def test_a_study_goes_on_after_a_kill_and_reports(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = study_file(data, tmp_path), tmp_path / "out"
    assert main(["study", "run", path, "--out", str(out), "--dry_run"]) == 0
    told = capsys.readouterr().out
    assert "40 samples" in told and "8 runs, 0 done" in told and "2 seeds: nothing can be claimed of so few" in told
    calls = stand_in(monkeypatch, killed_at=3)
    with pytest.raises(KeyboardInterrupt):
        list(run_study(path, str(out)))
    order = [f"width-{level}-seed{seed}" for seed in (0, 1) for level in ("narrow", "wide")]
    assert calls.fits == order[:3]
    calls = stand_in(monkeypatch)
    assert main(["study", "run", path, "--out", str(out)]) == 0
    less = [f"width-{level}-0.5-seed{seed}" for seed in (0, 1) for level in ("narrow", "wide")]
    assert calls.fits == [order[3], *less]  # what was done isn't done again
    values = json.loads((out / "report.json").read_text())
    narrow, wide = values["rows"]
    assert (narrow["verdict"], wide["verdict"], wide["seeds"]) == ("baseline", "unproved", 2)
    assert wide["score"] == pytest.approx(1.55) and wide["difference"] == pytest.approx(-0.5) and wide["flops"] > 0
    assert wide["p"] is None  # the differences of both seeds are equal
    few, many = (point[0] for point in wide["curve"])
    assert few < many and wide["samples_for_equal_score"] == few  # with half of the rows it is as good already
    assert values["runs_left_out"] == [] and values["runs"] == 8
    assert "<polyline" in (out / "report.html").read_text()


def test_minutes_bound_the_whole(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out, now = study_file(data, tmp_path), tmp_path / "out", [0.0]
    calls = stand_in(monkeypatch)
    monkeypatch.setattr("mmllm.studies.run.time.monotonic", lambda: now[0])
    scored = Runner.run

    def slow(self: Runner, arm: Arm) -> dict[str, Any]:
        now[0] += 60.0
        return scored(self, arm)

    monkeypatch.setattr(Runner, "run", slow)
    assert main(["study", "run", path, "--out", str(out), "--minutes", "3.5"]) == 0
    assert calls.fits == ["width-narrow-seed0", "width-wide-seed0", "width-narrow-seed1"]
    assert "5 runs are left out (width-wide-seed1, " in capsys.readouterr().out
    assert len(json.loads((out / "report.json").read_text())["runs_left_out"]) == 5
    for wrong in (["--minutes", "0"], ["--minutes", "nan"], ["--workers", "0"], ["--threads", "-1"]):
        assert main(["study", "run", path, "--out", str(out), *wrong]) == 2


def test_what_cant_be_is_said_before_anything_runs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch)
    levels: dict[str, Any] = {"narrow": {}, "wide": {"config": {"model.init_args.decoder.hidden_sise": 32}}}
    command = "upcycle --model {run}/dense --out {run}/experts"
    last = {"share": 0.5, "fit": {"model.init_args.init_from": "{run}/experts"}}
    dense = {"fit": {}, "out": "dense", "share": 0.5}
    init, unknown = "model.init_args.init_from", {"model.init_args.optimiser": {}}

    def wide(*steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
        levels_now = {"narrow": {}, "wide": {"steps": list(steps), **keys}}
        return {"factors": {"width": {"baseline": "narrow", "levels": levels_now}}}

    def measure(**keys: Any) -> dict[str, Any]:
        bits = {"name": "bits", "task": "text", "manifest": "{data}/rows/manifest.jsonl", "key": "bits_per_byte"}
        return {"measures": [{**bits, **keys}]}

    for number, (changed, said) in enumerate((
        ({"factors": {"width": {"baseline": "narrow", "levels": levels}}}, "levels.wide"),
        (wide(dense, {"command": command}, {**last, "fit": {**last["fit"], **unknown}}), "optimiser"),
        (wide(dense, {"command": command.replace("--model", "--modle")}, last), "--modle"),
        (wide(dense, {"command": "upcycel"}, last), "upcycel"),
        (wide(dense, {"command": command.replace("{run}", "{rnu}")}, last), "{rnu}; a command may have {data}, {run}"),
        (wide(dense, {"command": "study"}, last), "required: ACTION"),
        (wide(dense, {"share": 0.5, "fit": {init: "{run}/experts"}}), "no step makes"),
        (wide({"fit": {}}, config={"trainer.limit_train_batches": 3}), "trainer.limit_train_batches: 3, which ends"),
        ({"set": {"trainer.fast_dev_run": True}}, "trainer.fast_dev_run: True, which ends"),
        ({"curve_sources": ["porse"]}, "none of the curve_sources porse"),
        ({**wide({"fit": {}}), "curve_sources": ["porse"]}, "curve_sources has 'porse'; the recipes' sources are"),
        (measure(manifest="{data}/none.jsonl"), "measure bits: no manifest"),
        (measure(task="txt"), "measure bits has the task 'txt'"),
        (measure(limit=0), "measure bits has the limit 0"),
        (measure(options=["--nonsense", "3"]), "measure bits: unrecognized arguments: --nonsense"),
        (wide({"fit": {}}, options=["--nonsense"]), "levels.wide: measure bits: unrecognized arguments: --nonsense"),
        (wide({"command": "data index --help"}, {"fit": {}}), "prints help or a version"),
        (wide({"command": "study score scenes --out {run}/s"}, {"fit": {}}), "outside of the budget"),
        ({"budget": {"samples": 1}}, "a whole number of steps comes no nearer to 1 samples than"),
    )):  # fmt: skip
        path = study_file(data, tmp_path, **changed)
        assert main(["study", "run", path, "--out", str(tmp_path / f"out{number}")]) == 2, said
        assert said in capsys.readouterr().err
    assert not calls.fits
    path = study_file(data, tmp_path, **wide(dense, {"command": command}, last))
    assert main(["study", "run", path, "--out", str(tmp_path / "dry"), "--dry_run"]) == 0
    assert not (tmp_path / "dry").exists(), "nothing is left"


def test_a_run_that_fails_leaves_the_others_and_the_report(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fails, begun = {"width-wide-seed0"}, list[str]()

    def call(_self: Runner, command: Sequence[str], folder: Path, arm: Arm) -> None:
        if command[0] == "fit":
            begun.append(arm.name)
            if arm.name in fails:
                raise RunFailed(f"run {arm.name}: `mmllm fit` failed")
            (folder / "model").mkdir()
        else:
            save_result(TaskResult("text", {"bits_per_byte": 1.0, "n": 1}), command[command.index("--json") + 1])

    monkeypatch.setattr(Runner, "_call", call)
    factors = {"width": {"baseline": "narrow", "levels": {"narrow": {}, "wide": {"config": {WIDTH: 32}}}}}
    path, out = study_file(data, tmp_path, factors=factors, seeds=[0, 1, 2]), tmp_path / "out"
    assert main(["study", "run", path, "--out", str(out)]) == 2
    assert len(begun) == 6, "others go on"
    assert "run width-wide-seed0: `mmllm fit` failed" in capsys.readouterr().err
    assert json.loads((out / "report.json").read_text())["runs_left_out"] == ["width-wide-seed0"]
    fails.clear()
    assert main(["study", "run", path, "--out", str(out)]) == 0
    assert begun[6:] == ["width-wide-seed0"]
    begun.clear()
    fails.update(arm.name for arm in study_in(out).arms())
    assert main(["study", "run", path, "--out", str(tmp_path / "all")]) == 2
    assert len(begun) == 3, "where the first three fail, others would"
    assert "3 runs failed, the first: run width-narrow-seed0" in capsys.readouterr().err


def test_a_training_that_ends_before_its_budget_is_no_result(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stand_in(monkeypatch)

    def stopped_early(runner: Runner, command: Sequence[str], folder: Path, arm: Arm) -> None:
        calls(runner, command, folder, arm)
        if command[0] == "fit":
            (folder / "model.logs").mkdir()
            (folder / "model.logs" / "metrics.csv").write_text("step,loss\n1,0.5\n3,0.4\n")

    monkeypatch.setattr(Runner, "_call", stopped_early)
    assert main(["study", "run", study_file(data, tmp_path, seeds=[0]), "--out", str(tmp_path / "out")]) == 2
    assert "its training ended after 3 of 18 steps" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/runs/*/result.json")) and not calls.evals


def test_what_is_trained_is_scored_again_without_a_training(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A misspelt key is found out when a run is scored; with another one, its model is still there."""
    calls, out = stand_in(monkeypatch), tmp_path / "out"
    factors = {"width": {"baseline": "narrow", "levels": {"narrow": {}, "wide": {"config": {WIDTH: 32}}}}}
    measure = {"name": "bits", "task": "text", "manifest": "{data}/rows/manifest.jsonl", "lower_is_better": True}

    def run(key: str, **changes: Any) -> int:
        path = study_file(data, tmp_path, factors=factors, seeds=[0], measures=[{**measure, "key": key}], **changes)
        return main(["study", "run", path, "--out", str(out)])

    assert run("bits") == 2 and len(calls.fits) == 2
    assert "has the key 'bits', and the task text scores bits_per_byte, n" in capsys.readouterr().err
    assert run("bits", budget={"samples": 30}) == 2 and len(calls.fits) == 4, "of another budget, other trainings"
    assert run("bits_per_byte", budget={"samples": 30}) == 0 and len(calls.fits) == 4
    results = [json.loads(path.read_text()) for path in out.glob("runs/*/result.json")]
    assert len(results) == 2 and all(25 < each["samples"] < 35 and each["flops"] > 0 for each in results)


def test_threads_that_read_configs_leave_the_working_directory(data: Path, tmp_path: Path):
    """jsonargparse reads a config in the config's folder; of two at once, one would end in the other's."""
    configs = []
    for number in range(4):
        configs.append(tmp_path / f"{number}" / "config.yaml")
        configs[-1].parent.mkdir()
        configs[-1].write_text((data / "config.yaml").read_text())
    before = os.getcwd()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda path: unbuilt(["-c", str(path)]), 3 * configs))
    after = os.getcwd()
    os.chdir(before)
    assert after == before


def test_a_folder_is_of_one_process_and_of_its_own_results(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stand_in(monkeypatch)
    factors = {"width": {"baseline": "narrow", "levels": {"narrow": {}, "wide": {"config": {WIDTH: 32}}}}}
    path, out = study_file(data, tmp_path, factors=factors), tmp_path / "out"
    first = run_study(path, str(out))
    next(first)
    assert main(["study", "run", path, "--out", str(out)]) == 2
    assert "another `mmllm study run` is at it" in capsys.readouterr().err
    list(first)
    kept = (out / "study.json").read_text()
    other = study_file(data, tmp_path, factors=factors, title="Other")
    assert main(["study", "run", other, "--out", str(out), "--dry_run"]) == 0
    assert (out / "study.json").read_text() == kept, "what is only asked changes nothing"
    runs = out / "runs"
    result = runs / "width-wide-seed0" / "result.json"
    values = json.loads(result.read_text())
    assert values["machine"]["cores"] > 0
    result.write_text(json.dumps({**values, "machine": {"processor": "Elsewhere", "cores": 64}}))
    assert main(["study", "report", str(out)]) == 0
    machines = json.loads((out / "report.json").read_text())["machine"]
    assert [each["processor"] == "Elsewhere" for each in machines] in ([False, True], [True, False])
    assert "Elsewhere, 64 cores" in (out / "report.html").read_text(), "where a run was measured, not the report made"
    (runs / "width-wide-seed0" / "result.json").write_text((runs / "width-wide-seed1" / "result.json").read_text())
    capsys.readouterr()
    assert main(["study", "report", str(out)]) == 2
    assert "is the result of another run (factor width, level wide, seed 1" in capsys.readouterr().err


def test_measures_with_shots_and_anchors_are_evaluations_of_their_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bits = {"name": "bits", "task": "text", "manifest": "{data}/rows/manifest.jsonl", "key": "bits_per_byte"}
    captions = {**bits, "task": "caption", "key": "exact_match"}
    shots = {"manifest": "{data}/rows/manifest.jsonl", "number": 8}
    measures = [bits, {**captions, "name": "zero"}, {**captions, "name": "eight", "shots": shots},
                {**captions, "name": "again", "shots": shots, "key": "cider"}]  # fmt: skip
    levels = {"narrow": {}, "wide": {"options": ["--seed", "1"], "measures": {"zero": {"anchor": "see: {x}"}}}}
    changes = {"factors": {"width": {"baseline": "narrow", "levels": levels}}, "seeds": [0]}
    calls = stand_in(monkeypatch)

    monkeypatch.setattr("mmllm.studies.runs._score", lambda measure, path: {"score": 0.5, "rows": {}})
    wrong = [*measures[:2], {**measures[2], "shots": {**shots, "manifest": "{data}/none.jsonl"}}]
    path = study_file(data, tmp_path, **changes, measures=wrong)
    assert main(["study", "run", path, "--out", str(tmp_path / "wrong")]) == 2
    assert f"measure eight: no manifest {data / 'none.jsonl'}" in capsys.readouterr().err and not calls.fits
    path = study_file(data, tmp_path, **changes, measures=measures)
    assert main(["study", "run", path, "--out", str(tmp_path / "out")]) == 0
    manifest = str(data / "rows" / "manifest.jsonl")
    shown = [f"--shots={manifest}", "--num_shots=8"]

    def evaluated(level: str) -> list[list[str]]:
        commands = [command for one, command in calls.evals if one == level]
        return [command[command.index("--json") + 2 :] for command in commands]

    assert evaluated("narrow") == [[], [], shown], "`again` is of the same evaluation as `eight`"
    assert evaluated("wide") == [[*more, "--seed", "1"] for more in ([], ["--anchor=see: {x}"], shown)]


def test_what_arms_begin_with_alike_is_run_once_a_seed_and_counted_for_each(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beside the same study run arm by arm: the same costs and files, from fewer trainings."""
    begin = {"fit": {}, "out": "first", "share": 0.5}
    last = {"fit": {}, "share": 0.5}
    command = {"command": "study rank {run}/first --out {run}/ranked.jsonl"}
    levels = {
        "plain": {"steps": [begin, command, last]},
        "slow": {"steps": [begin, command, {**last, "fit": {"model.init_args.optimizer.lr": 0.001}}]},
        "wide": {"steps": [begin, command, last], "config": {WIDTH: 32}},
    }
    factors = {"way": {"baseline": "plain", "levels": levels}}
    calls: list[tuple[str, str]] = []

    def call(_self: Runner, command: Sequence[str], folder: Path, arm: Arm) -> None:
        if command[0] == "fit":
            made = Path(command[2]).with_suffix("")
            assert made.parent == folder
            if made.name == "model":
                assert (folder / "first" / "weights").read_text() == f"{arm.seed} {arm.level == 'wide'}"
                assert (folder / "ranked.jsonl").is_file()
            made.mkdir()
            (made / "weights").write_text(f"{arm.seed} {arm.level == 'wide'}")
            calls.append((made.name, arm.level))
        elif command[0] == "study":
            Path(command[-1]).write_text("")
            calls.append(("rank", arm.level))
        else:
            save_result(TaskResult("text", {"bits_per_byte": 1.0, "n": 1}), command[command.index("--json") + 1])

    monkeypatch.setattr(Runner, "_call", call)
    path, out = study_file(data, tmp_path, factors=factors), tmp_path / "out"
    list(run_study(path, str(out), executor=Executor(workers=2)))
    names = [name for name, _ in calls]
    assert names.count("model") == 6 and names.count("first") == names.count("rank") == 4, "two seeds, two widths"
    assert not (out / "shared").exists() and not list(out.glob("runs/*/first")), "what another was made of goes"
    alone = tmp_path / "alone"
    with monkeypatch.context() as patch:
        patch.setattr("mmllm.studies.runs.shared_keys", lambda _: defaultdict(list))
        list(run_study(path, str(alone)))
    base, other = (Base.read(replace(study_in(out), budget=Budget(samples=n)), data) for n in (40, 30))
    of_others = shared_keys(other)
    for arm, keys in shared_keys(base).items():
        assert not set(keys) & set(of_others[arm]), "of another budget, other trainings"
        assert len(keys) == len(set(keys)) == (0 if arm.level == "wide" else 2)
    results = [{json.loads(file.read_text())["level"] + file.parent.name[-1]: json.loads(file.read_text())
                for file in folder.glob("runs/*/result.json")} for folder in (out, alone)]  # fmt: skip
    assert len(results[0]) == 6
    for name, result in results[0].items():
        for key in ("steps", "samples", "tokens", "flops", "documents"):
            assert result[key] == results[1][name][key] > 0
        assert result["joules"] is None and result["minutes"] > 0


def test_costs_add_up():
    one = Cost(Length(1, 2, 3, 4.0), 5, 6.0, 7.0)
    assert Cost() + one + one == Cost(Length(2, 4, 6, 8.0), 5, 12.0, 14.0)
    assert (one + Cost(joules=None)).joules is None, "what is measured in part is not measured"


def test_what_waits_for_shared_steps_begins_nothing_after_an_interrupt(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin, last = {"fit": {}, "out": "first", "share": 0.5}, {"fit": {}, "share": 0.5}
    levels = {"one": {"steps": [begin, last]}, "two": {"steps": [begin, last], "options": ["--seed", "1"]}}
    factors = {"way": {"baseline": "one", "levels": levels}}
    begun: list[str] = []

    def interrupted(_processes: object, command: Sequence[str], *_: Any) -> None:
        begun.append(command[0])
        time.sleep(3)  # the other arm waits by then
        raise KeyboardInterrupt

    monkeypatch.setattr("mmllm.studies.runs.call", interrupted)
    with pytest.raises(KeyboardInterrupt):
        path = study_file(data, tmp_path, factors=factors, seeds=[0])
        list(run_study(path, str(tmp_path / "out"), executor=Executor(workers=2)))
    assert begun == ["fit"]


def test_an_arm_whose_first_steps_another_is_at_lets_others_begin(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    begin, last = {"fit": {}, "out": "first", "share": 0.5}, {"fit": {}, "share": 0.5}
    levels = {name: {"steps": [begin, {**last, "fit": {WIDTH: 16 * n}}]} for n, name in enumerate(("one", "two"), 1)}
    factors = {"way": {"baseline": "one", "levels": levels}}

    def order(name: str, minutes: float | None = None) -> list[tuple[str, int]]:
        begun: list[tuple[str, int]] = []

        def run(_self: Runner, arm: Arm, steps: Sequence[Step], folder: Path) -> Cost:
            begun.append((folder.parent.name, arm.seed))
            time.sleep(0.5)
            return Cost()

        monkeypatch.setattr(Runner, "_run_steps", run)
        monkeypatch.setattr(Runner, "_scores", lambda *_: {"bits": {"score": 1.0, "rows": {}}})
        path, executor = study_file(data, tmp_path, factors=factors, seeds=[0, 1]), Executor(workers=2)
        list(run_study(path, str(tmp_path / name), minutes=minutes, executor=executor))
        return begun

    assert sorted(order("free")[:2]) == [("shared", 0), ("shared", 1)], "the other seed's, and no worker that waits"
    assert order("bounded", minutes=60)[:2] == [("shared", 0), ("runs", 0)], "one seed of every arm first"


def test_what_would_wait_for_all_begins_nevertheless():
    class One:
        def run(self, item: str) -> dict[str, Any]:
            begun.append(item)
            return {}

        def stop(self) -> None: ...

    begun: list[str] = []
    items = ["a1", "a2", "b1"]
    done = dict(run_at_once(items, One, 1, would_wait=lambda item, now: any(each[0] == item[0] for each in now)))
    assert begun == items == list(done), "one at a time: nothing runs beside it"
    begun.clear()
    list(run_at_once(["a1", "a2"], One, 2, would_wait=lambda _item, now: bool(now)))
    assert sorted(begun) == ["a1", "a2"]
