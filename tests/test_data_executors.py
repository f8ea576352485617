"""Builds through datatrove's executors: here, and on a Slurm whose commands are scripts of this file."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import pickletools
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.executors.launching import jobs_of, launch
from mmllm.data.executors.stages import Executor, Stage, TaskError, UnfinishedError, parse_options
from mmllm.data.executors.task import ERRORS, FUNCTIONS, Task, Work, function_named, item_lines
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.cleaning import CleaningConfig, measure_rows
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Embedded
from mmllm.data.rows.rows import Row
from mmllm.data.rows.table import RowTable
from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import ImageEncoder
from mmllm.data.shards.encode import KeyedRow, ShardsConfig
from mmllm.data.shards.write import STAGING, _WriteGroups, group_rows, group_writer
from mmllm_tokenizers.folder import TokenizerFolder
from tests.data_fixtures import make_folder, mixed_manifest, write_manifest, write_picture

datatrove = pytest.mark.skipif(importlib.util.find_spec("datatrove") is None, reason="datatrove isn't installed")

SBATCH = """#!{python}
import json, os, sys
text = open(sys.argv[-1]).read()
if os.path.exists(os.environ["FAKE_SLURM"] + "/full"):
    sys.exit("QOSMaxSubmitJobPerUserLimit")
with open(os.environ["FAKE_SLURM"] + "/submitted.jsonl", "a") as stream:
    stream.write(json.dumps([sys.argv[1:], text]) + "\\n")
print("Submitted batch job", sum(1 for _ in open(os.environ["FAKE_SLURM"] + "/submitted.jsonl")))
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
"""
SQUEUE = """#!/bin/bash
cat $FAKE_SLURM/queue
[ -e $FAKE_SLURM/deaf ] && echo "Unable to contact slurm controller" >&2 && exit 1
exit 0
"""


class FakeSlurm:
    """`sbatch`, which notes jobs and starts none, `srun`, `scontrol` and `squeue`; `run` does what is noted."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.queue = folder, folder / "queue"
        folder.mkdir()
        self.queue.write_text("")
        scripts = {
            "sbatch": SBATCH.format(python=sys.executable),
            "srun": SRUN,
            "scontrol": "#!/bin/bash\necho here\n",
            "squeue": SQUEUE,
        }
        for name, text in scripts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(folder))
        monkeypatch.setenv("SLURM_NODELIST", "here")

    def jobs(self) -> list[str]:
        """Scripts submitted."""
        lines = (self.folder / "submitted.jsonl").read_text().splitlines()
        return [text for _, text in map(json.loads, lines)]

    def run(self, script: str, numbers: list[int]) -> None:
        """Runs some of a job's array."""
        for number in numbers:
            environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "RUN_OFFSET": "0"}
            subprocess.run(["bash"], input=script, text=True, env=environment, check=False, capture_output=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    make_folder(folder / "tok")
    manifest = mixed_manifest(folder / "m", num=12)
    broken = [{"id": "gone", "image": "broken.png", "text": "broken"}]
    (folder / "m" / "broken.png").write_bytes(b"no picture")
    return folder, [manifest, write_manifest(folder / "m", broken, "broken.jsonl")]


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def is_pickle(data: bytes) -> bool:
    try:
        return bool(list(pickletools.genops(data)))
    except Exception:
        return data.startswith(b"\x80")  # of a newer protocol, or cut short


@pytest.fixture
def left(monkeypatch) -> dict[Path, bytes]:
    """Takes all that lies in work folders when a build is done, just before items and results are removed.

    By path from the work folder's own name on.
    """
    found: dict[Path, bytes] = {}
    forget = Stage.forget

    def look_and_forget(stage: Stage) -> None:
        work = stage._folder.parent
        files = [path for path in work.rglob("*") if path.is_file()]
        found.update({path.relative_to(work.parent): path.read_bytes() for path in files})
        forget(stage)

    monkeypatch.setattr(Stage, "forget", look_and_forget)
    return found


def check_all_is_data(left: dict[Path, bytes], stages: tuple[str, ...]) -> None:
    """No file is a pickle; tasks, items and results are JSON."""
    assert all(is_pickle(pickle.dumps({"a": [1]}, protocol)) for protocol in range(6))
    assert [path for path, data in left.items() if is_pickle(data)] == []
    for stage in stages:
        mine = {path: data for path, data in left.items() if path.parts[1] == stage}
        tasks = [json.loads(data) for path, data in mine.items() if path.name == "task.json"]
        assert tasks and {task["function"] for task in tasks} < set(FUNCTIONS)
        items = [line for path, data in mine.items() if path.suffix == ".jsonl" for line in data.splitlines()]
        assert items and all(map(json.loads, items))
        assert [json.loads(data) for path, data in mine.items() if path.parent.name == stage and path.suffix == ".json"]


SETTINGS = {"samples_per_shard": 5, "perturb": 1, "max_bad_fraction": 0.5}


@datatrove
def test_datatrove_writes_the_same_shards(rows, tmp_path, left):
    folder, manifests = rows
    commands.build(manifests, tmp_path / "here", folder / "tok", **SETTINGS)
    work = tmp_path / "two-work"
    mine = work / "annotations" / "coco-2017.json"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    told: list[tuple[int, int]] = []
    for name, tasks in (("two", 2), ("five", 5)):
        executor = Executor("datatrove", 2, tasks, tmp_path / f"{name}-work")
        progress = lambda *counts: told.append(counts)  # noqa: E731
        built = commands.build(
            manifests, tmp_path / name, folder / "tok", executor=executor, progress=progress, **SETTINGS
        )
        assert contents(tmp_path / name) == contents(tmp_path / "here")
        assert built["num_bad"] == 1 and "broken.png" in built["bad"][0]
        assert told[-1] == (49, 49) and sorted(told) == told
        told.clear()
    with pytest.raises(ValueError, match=r"five-work: is where .*five is built"):
        commands.build(manifests, tmp_path / "other", executor=executor)
    check_all_is_data(left, ("write",))
    for work in (tmp_path / "two-work", tmp_path / "five-work"):
        assert not [path for path in work.glob("w*/*") if path.is_file()] and mine.read_text() == "mine"


@datatrove
def test_slurm_goes_on_from_what_is_done(rows, tmp_path, monkeypatch, capsys, left):
    folder, manifests = rows
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    command = [
        "data", "build", *map(str, manifests), "--out", str(tmp_path / "s"), "--tokenizer", str(folder / "tok"),
        "--samples_per_shard", "5", "--dedup", "exact", "--max_bad_fraction", "0.5", "--executor", "slurm",
        "--tasks", "2", "--workers", "1", "--executor_option", "time=01:00:00", "--executor_option", "partition=cpu",
        "--executor_option", "cpus_per_task=4", "--executor_option", 'sbatch_args={"account": "lab"}',
    ]  # fmt: skip
    (slurm.folder / "full").write_text("")
    assert main(command) == 2 and "Slurm took no job" in capsys.readouterr().err
    (slurm.folder / "full").unlink()
    assert main(command) == os.EX_TEMPFAIL
    said = capsys.readouterr().err
    assert "submitted job 1;" in said and "'measure' lacks 1 of 1 results" in said and "error" not in said
    (script,) = slurm.jobs()
    for option in ("array=0-0%1", "partition=cpu", "time=01:00:00", "cpus-per-task=4", "account=lab"):
        assert f"#SBATCH --{option}\n" in script
    assert "qos" not in script and f'export PATH={Path(sys.executable).parent}:"$PATH"' in script
    slurm.queue.write_text("1 cpu mmllm-me root R 0:01 1 here\n")
    assert main(command) == os.EX_TEMPFAIL and "job 1 is still in the queue" in capsys.readouterr().err
    (slurm.folder / "deaf").write_text("")
    assert main(command) == os.EX_TEMPFAIL and "Unable to contact slurm" in capsys.readouterr().err
    (slurm.folder / "deaf").unlink()
    slurm.queue.write_text("")
    slurm.run(script, [0])
    assert main(command) == os.EX_TEMPFAIL and "'write' lacks 12 of 12 results" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*.tar")) and (tmp_path / "s" / STAGING).is_dir()
    slurm.queue.write_text("2 cpu mmllm-wr root R 0:01 1 here\n")
    assert main(command) == os.EX_TEMPFAIL and "job 2 is still in the queue" in capsys.readouterr().err
    slurm.queue.write_text("")
    slurm.run(slurm.jobs()[1], [1])
    assert main([*command, "--tasks", "9"]) == os.EX_TEMPFAIL and "lacks 6 of 12" in capsys.readouterr().err
    assert "array=0-5%1" in slurm.jobs()[2]  # those that aren't done, now in more tasks
    slurm.run(slurm.jobs()[2], [0, 1, 2, 3, 4, 5])
    staged = next((tmp_path / "s" / STAGING).glob("*/000000.tar"))
    staged.unlink()  # as a build leaves it that is killed while it moves its shards
    assert main(command) == os.EX_TEMPFAIL and "lacks 1 of 12" in capsys.readouterr().err
    slurm.run(slurm.jobs()[3], [0])
    assert main(command) == 0 and len(slurm.jobs()) == 4
    told = commands.build(
        manifests, tmp_path / "here", folder / "tok", samples_per_shard=5, max_bad_fraction=0.5,
        cleaning=CleaningConfig("exact"),
    )  # fmt: skip
    check_all_is_data(left, ("measure", "write"))
    assert contents(tmp_path / "s") == contents(tmp_path / "here")
    assert told["left_out"] == json.loads(capsys.readouterr().out)["left_out"]


@datatrove
def test_results_are_of_the_very_items(tmp_path):
    texts = [{"id": str(n), "text": f"text {n} of {'many words ' * n}"} for n in range(600)]
    rows = read_rows(write_manifest(tmp_path, texts))
    config = CleaningConfig("minhash", quality="words > 1")
    executor = Executor("datatrove", 1, None, tmp_path / "w")
    wanted = json.loads(json.dumps(measure_rows(rows, config, Executor())))
    assert measure_rows(rows, config, executor) == wanted
    results = sorted((tmp_path / "w" / "measure").glob("*.json"))
    times = [path.stat().st_mtime_ns for path in results]
    assert len(results) == 3
    assert measure_rows(rows, CleaningConfig("minhash", 0.5, "words > 9"), executor) == wanted
    assert [path.stat().st_mtime_ns for path in results] == times  # none is made twice
    assert "facts" not in measure_rows(rows, CleaningConfig("minhash"), executor)[0]
    texts[0]["text"] = "new"
    changed = measure_rows(read_rows(write_manifest(tmp_path, texts)), config, executor)
    assert changed[0]["facts"]["words"] == 1 and changed[1:] == wanted[1:]
    assert [path.stat().st_mtime_ns for path in results] == times


@datatrove
def test_a_mended_row_is_read_again_and_nothing_else(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"id": str(n), "image": f"{n}.png", "text": "a"} for n in range(4)]
    for row in rows:
        write_picture(tmp_path / row["image"], rng)
    good = (tmp_path / "2.png").read_bytes()
    (tmp_path / "2.png").write_bytes(b"no picture")
    manifest = write_manifest(tmp_path, rows)
    settings = {
        "samples_per_shard": 2,
        "max_bad_fraction": 0.0,
        "executor": Executor("datatrove", 1, None, tmp_path / "w"),
    }
    with pytest.raises(ManifestError, match="rows can't be used"):
        commands.build(manifest, tmp_path / "s", **settings)
    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "w" / "write").glob("*.json")}
    (tmp_path / "2.png").write_bytes(good)
    with pytest.raises(ManifestError, match="rows can't be used"):  # with another size: other work, in the same folders
        (tmp_path / "1.png").rename(tmp_path / "one.png")
        (tmp_path / "1.png").write_bytes(b"no picture")
        commands.build(manifest, tmp_path / "s", max_image_side=8, **settings)
    (tmp_path / "one.png").rename(tmp_path / "1.png")
    assert sum(path.exists() and path.stat().st_mtime_ns == time for path, time in results.items()) == 2
    commands.build(manifest, tmp_path / "s", **settings)
    commands.build(manifest, tmp_path / "here", samples_per_shard=2)
    assert contents(tmp_path / "s") == contents(tmp_path / "here")  # also without anything else in the folder


def test_twins_write_one_group_between_them(tmp_path):
    table, config = RowTable(tmp_path / "kept"), ShardsConfig()
    table.read(write_manifest(tmp_path, [{"id": str(n), "text": f"text {n}"} for n in range(4)]), BadRows(0.0))
    (group,) = group_rows(table, config)
    write = _WriteGroups(str(tmp_path / "s"), config, None, None)
    (tmp_path / "s").mkdir()
    told = write(group, "k")
    before = contents(tmp_path / "s" / "k")
    (tmp_path / "s" / "k" / "mark").write_text("of the first")
    assert write(group, "k") == told
    assert contents(tmp_path / "s" / "k") == {**before, "mark": b"of the first"}
    assert [path.name for path in (tmp_path / "s").iterdir()] == ["k"]


@datatrove
def test_tasks_that_fail_or_are_killed_say_so(tmp_path, monkeypatch):
    monkeypatch.setenv("STARTED_BY", str(tmp_path))
    good = tmp_path / "good.png"
    write_picture(good, np.random.default_rng(0))

    def ranks() -> list[psutil.Process]:
        return [process for process in psutil.process_iter() if is_rank(process, str(tmp_path))]

    def kill_the_other(done: int, num_all: int) -> None:
        for process in ranks() if done == 1 else []:
            process.kill()

    for name, said in (("gone", "FileNotFoundError: .*No such file"), ("pipe", "killed by signal 9")):
        path = tmp_path / f"{name}.png"
        if name == "pipe":
            os.mkfifo(path)  # whoever reads it waits for ever
        items = [[Row(file.stem, "caption", "m:1", "a", file)] for file in (good, path)]
        work = Work("mmllm.data.rows.cleaning:row_measurer", {"facts": False, "signature": False})
        stage, given = Stage(name, Executor("datatrove", 2, 2, tmp_path), {}), (["a" * 32, "b" * 32], [1, 1])
        with pytest.raises(TaskError, match=said) as error:
            stage.run(work, items, *given, kill_the_other if name == "pipe" else None)
        assert "lacks 1 of 2 results" in str(error.value)
        assert not ranks()
        path.unlink(missing_ok=True)
        path.write_bytes(good.read_bytes())
        first, second = stage.run(work, items, *given)
        assert first == second and first[0]["files"]


def is_rank(process: psutil.Process, mark: str) -> bool:
    """Whether a process, or what it left, is of this test: others of other tests come and go meanwhile."""
    try:
        return process.environ().get("STARTED_BY") == mark and "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def test_tasks_call_nothing_but_what_is_named(tmp_path):
    for name in FUNCTIONS:
        function = function_named(name)
        assert name == f"{function.__module__}:{function.__name__}"
    for name in ("os:system", "mmllm.data.commands:build", "mmllm.data.shards.write:shutil.rmtree", "", "__main__:x"):
        with pytest.raises(ValueError, match=r"but tasks call only mmllm\.data\.rows\.cleaning:row_measurer"):
            Task.describe(tmp_path, tmp_path, Work(name, {}), [["a" * 32]])
    (tmp_path / ERRORS).mkdir()
    Task.describe(tmp_path, tmp_path, Work(FUNCTIONS[0], {}), [["a" * 32]])
    task = json.loads((tmp_path / "task.json").read_text())
    (tmp_path / "task.json").write_text(json.dumps({**task, "function": "os:system", "settings": "touch bad"}))
    with pytest.raises(ValueError, match="names the function 'os:system'"):
        Task(str(tmp_path))(None, 0)
    assert "os:system" in (tmp_path / ERRORS / "00000.txt").read_text()
    settings = {"staging": str(tmp_path), "config": {}, "tokenizer": None}
    with pytest.raises(ValueError, match="names the function 'os:system'"):
        group_writer({**settings, "encoder": {"function": "os:system", "settings": {"command": "touch bad"}}})


def test_tasks_refuse_a_tokenizer_that_has_changed(tmp_path):
    make_folder(tmp_path / "tok")
    folder = TokenizerFolder.load(tmp_path / "tok")
    work = _WriteGroups(str(tmp_path), ShardsConfig(), folder, None).work
    assert json.loads(json.dumps(work.settings)) == work.settings
    group_writer(work.settings)
    work.settings["tokenizer"]["hash"] = "0" * 64
    with pytest.raises(ValueError, match=f"tok is {folder.hash[:12]} here, but was 000000000000 when the build began"):
        group_writer(work.settings)
    with pytest.raises(ValueError, match="is in memory alone"):
        _ = _WriteGroups(str(tmp_path), ShardsConfig(), TokenizerFolder(folder.text), None).work
    encoder = ImageEncoder(ImageTransform(16), "hash", lambda images: images)
    with pytest.raises(ValueError, match="can't make this image encoder"):
        _ = _WriteGroups(str(tmp_path), ShardsConfig(), None, encoder).work


def test_rows_come_back_from_json():
    odd = Path(os.fsdecode(b"/a/\xff \xe2\x80\xa8.png"))
    metadata = {"a": 0.1, "b": [1, None, {"c": "\u2028\n"}], "d": float("inf"), "e": 2**70, "question": "ä"}
    segments = ({"image": odd, "role": "user"}, {"audio": Path("b.wav")}, {"text": "image\x85", "role": "assistant"})
    for row in (
        Row("1", "text", "m:1", "a\u2028b\r\nc"),
        Row("2", "caption", "m:2", "t", image=odd, metadata=metadata),
        Row("3", "audio", "m:3", "t", audio=odd),
        Row("4", "interleaved", "m:4", segments=segments, metadata=metadata),
        Row("5", "caption", "m:5", "t", image=Embedded(odd, (3, 99), ("images", "0/1"), 7)),
        Row("6", "interleaved", "m:6", segments=({"audio": Embedded(Path("x.parquet"), 12, ("audio", "bytes"), 8)},)),
    ):
        keyed = KeyedRow(row, ("a", "b"))
        first, second = map(json.loads, item_lines([keyed, keyed]).splitlines())
        assert KeyedRow.from_json(first) == KeyedRow.from_json(second) == keyed


@datatrove
def test_slurm_takes_more_ranks_than_a_job_may_have(tmp_path, monkeypatch):
    slurm = FakeSlurm(tmp_path / "slurm", monkeypatch)
    options = {
        "partition": "cpu", "time": "1:00:00", "max_array_size": 2, "tasks_per_job": 2, "venv_path": "v/bin/activate",
        "srun_args": {"mem": "4G"}, "depends_job_id": "77",
    }  # fmt: skip
    run = tmp_path / "a run"
    run.mkdir()
    launch("slurm", run, 7, "job", 3, options, lambda: None)
    first, second = (json.loads(line) for line in (slurm.folder / "submitted.jsonl").read_text().splitlines())
    assert first[0] == ["--export=ALL,RUN_OFFSET=0", "--dependency=afterok:77", str(run / "launch_script.slurm")]
    assert second[0][:2] == ["--export=ALL,RUN_OFFSET=1", "--dependency=afterok:77,afterany:1"]
    assert jobs_of(run) == ["1", "2"] and json.loads((run / "ranks_to_run.json").read_text()) == list(range(7))
    command = f"srun --mem=4G -l -n 1 python -m mmllm.data.executors.launching '{run}'\n"
    assert "#SBATCH --array=0-1%3\n" in first[1] and command in first[1] and "source v/bin/activate\n" in first[1]
    with pytest.raises(ValueError, match="options of executor slurm must be JSON"):
        launch("slurm", run, 7, "job", 3, {**options, "sbatch_args": {"account": Path("x")}}, lambda: None)


def test_without_datatrove_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    rows = read_rows(write_manifest(tmp_path, [{"text": "x"}]))
    with pytest.raises(ModuleNotFoundError, match=r"mmllm\[datatrove\]"):
        measure_rows(rows, CleaningConfig("exact"), Executor("datatrove", 1, None, tmp_path / "w"))


@datatrove
def test_wrong_executors_are_named(tmp_path):
    for wrong, said in (
        ({"name": "cloud"}, "executor is 'cloud'"), ({"name": "ray"}, "needs a work folder"),
        ({"name": "slurm", "work": tmp_path}, "partition=NAME"), ({"tasks": 2}, "are for the executors datatrove"),
        ({"work": tmp_path}, "not for local"), ({"workers": -1}, "workers is -1"),
        ({"name": "ray", "work": tmp_path, "tasks": 0}, "tasks 0"),
        ({"name": "ray", "work": tmp_path, "options": {"tasks": 3}}, "option 'tasks' is not to be set"),
        ({"name": "datatrove", "work": tmp_path, "options": {"local_tasks": 2}}, "'local_tasks' is not to be set"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Executor(**wrong)
    rows = read_rows(write_manifest(tmp_path, [{"text": "x"}]))
    with pytest.raises(ValueError, match=r"no option 'cpus'; it has randomize_start_duration"):
        measure_rows(rows, CleaningConfig("exact"), Executor("datatrove", 1, None, tmp_path / "w", {"cpus": 4}))
    options = parse_options(["a=4", "b=04:00:00", 'c={"d": 1}', "e=x=y"])
    assert options == {"a": 4, "b": "04:00:00", "c": {"d": 1}, "e": "x=y"}
    for wrong in ("a", "=4"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_options([wrong])


def test_unfinished_work_has_an_exit_code_of_its_own(monkeypatch, capsys, tmp_path):
    def unfinished(*_: object, **__: object) -> None:
        raise UnfinishedError("submitted job 7")

    monkeypatch.setattr(commands, "build", unfinished)
    assert main(["data", "build", str(tmp_path), "--out", str(tmp_path)]) == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "mmllm: submitted job 7\n"
