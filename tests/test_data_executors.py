"""Builds through datatrove's executors: here, and on a Slurm whose commands are scripts of this file."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.executors.stages import Executor, Stage, TaskError, UnfinishedError, parse_options
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.cleaning import CleaningConfig, measure_rows
from mmllm.data.rows.forms import read_rows
from mmllm.data.shards.encode import ShardsConfig
from mmllm.data.shards.write import STAGING, _WriteGroups, group_rows
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


SETTINGS = {"samples_per_shard": 5, "perturb": 1, "max_bad_fraction": 0.5}


@datatrove
def test_datatrove_writes_the_same_shards(rows, tmp_path):
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
    for work in (tmp_path / "two-work", tmp_path / "five-work"):
        assert not [path for path in work.glob("w*/*") if path.is_file()] and mine.read_text() == "mine"


@datatrove
def test_slurm_goes_on_from_what_is_done(rows, tmp_path, monkeypatch, capsys):
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
    rows = read_rows(write_manifest(tmp_path, [{"id": str(n), "text": f"text {n}"} for n in range(4)]))
    config = ShardsConfig()
    (group,) = group_rows(rows, config)
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
    for function, said in ((_divide, "ZeroDivisionError: division by zero"), (_die, "killed by signal 9")):
        stage = Stage(function.__name__, Executor("datatrove", 2, 2, tmp_path), {})
        with pytest.raises(TaskError, match=said) as error:
            stage.run(function, [1, 0], ["a" * 32, "b" * 32], [1, 1])
        assert "lacks 1 of 2 results" in str(error.value)
        assert not [process for process in psutil.process_iter() if is_rank(process, str(tmp_path))]
        assert stage.run(function, [1, 2], ["a" * 32, "b" * 32], [1, 1])[0] == 1.0


def is_rank(process: psutil.Process, mark: str) -> bool:
    """Whether a process, or what it left, is of this test: others of other tests come and go meanwhile."""
    try:
        return process.environ().get("STARTED_BY") == mark and "spawn_main" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def _divide(item: int, key: str) -> float:
    return 1 / item


def _die(item: int, key: str) -> float:
    if not item:
        os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


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
    assert main(["data", "build", "x", "--out", str(tmp_path)]) == os.EX_TEMPFAIL
    assert capsys.readouterr().err == "mmllm: submitted job 7\n"
