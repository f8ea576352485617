"""Builds through datatrove's executors: here, and on a Slurm whose commands are scripts of this file."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from mmllm.cli import main
from mmllm.data import commands
from mmllm.data.cleaning import CleaningConfig, measure_rows
from mmllm.data.executors import Executor, UnfinishedError, parse_options, run_tasks
from mmllm.data.manifest import ManifestError, read_manifest
from mmllm.data.shards import STAGING
from tests.data_fixtures import make_folder, mixed_manifest, write_manifest

datatrove = pytest.mark.skipif(
    pytest.importorskip("importlib.util").find_spec("datatrove") is None, reason="datatrove isn't installed"
)
pytestmark = pytest.mark.filterwarnings("ignore")

SBATCH = """#!{python}
import json, os, sys
text = open(sys.argv[-1]).read()
with open(os.environ["FAKE_SLURM"] + "/submitted.jsonl", "a") as stream:
    stream.write(json.dumps([sys.argv[1:], text]) + "\\n")
print("Submitted batch job", sum(1 for _ in open(os.environ["FAKE_SLURM"] + "/submitted.jsonl")))
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -n ]] && shift; shift; done
exec "$@"
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
            "squeue": f"#!/bin/bash\ncat {self.queue}\n",
        }
        for name, text in scripts.items():
            (folder / name).write_text(text)
            (folder / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        monkeypatch.setenv("FAKE_SLURM", str(folder))
        monkeypatch.setenv("SLURM_NODELIST", "here")

    def jobs(self) -> list[str]:
        """Scripts submitted, those that gather datatrove's statistics apart."""
        lines = (self.folder / "submitted.jsonl").read_text().splitlines()
        return [text for _, text in map(json.loads, lines) if "merge_stats" not in text]

    def run(self, script: str, numbers: list[int]) -> None:
        """Runs some of a job's array."""
        for number in numbers:
            environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number), "RUN_OFFSET": "0"}
            subprocess.run(["bash"], input=script, text=True, env=environment, check=True, capture_output=True)


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
    for name, tasks in (("two", 2), ("many", 1000)):
        executor = Executor("datatrove", 2, tasks, tmp_path / f"{name}-work")
        told = commands.build(manifests, tmp_path / name, folder / "tok", executor=executor, **SETTINGS)
        assert contents(tmp_path / name) == contents(tmp_path / "here")
        assert told["num_bad"] == 1 and "broken.png" in told["bad"][0]
        assert not list(tmp_path.glob(f"{name}-work/*/*put-*"))  # what is done isn't taken for the next build's


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
    assert main(command) == 2 and "2 of 2 tasks of the stage 'measure' aren't done" in capsys.readouterr().err
    (script,) = slurm.jobs()
    for option in ("array=0-1%1", "partition=cpu", "time=01:00:00", "cpus-per-task=4", "account=lab"):
        assert f"#SBATCH --{option}\n" in script
    slurm.queue.write_text("1 cpu data_pro root R 0:01 1 here\n")
    assert main(command) == 2 and "job 1 is still in the queue" in capsys.readouterr().err
    slurm.queue.write_text("")
    slurm.run(script, [1])
    assert main(command) == 2 and "1 of 2 tasks" in capsys.readouterr().err
    assert "array=0-0" in slurm.jobs()[1]  # the one that isn't done
    slurm.run(slurm.jobs()[1], [0])
    assert main(command) == 2 and "'write' aren't done" in capsys.readouterr().err
    assert not list((tmp_path / "s").glob("*.tar")) and (tmp_path / "s" / STAGING).is_dir()
    slurm.run(slurm.jobs()[2], [0, 1])
    assert main(command) == 0 and len(slurm.jobs()) == 3
    told = commands.build(
        manifests, tmp_path / "here", folder / "tok", samples_per_shard=5, max_bad_fraction=0.5,
        cleaning=CleaningConfig("exact"),
    )  # fmt: skip
    assert contents(tmp_path / "s") == contents(tmp_path / "here")
    assert told["left_out"] == json.loads(capsys.readouterr().out)["left_out"]


@datatrove
def test_work_of_other_rows_or_settings_is_refused(tmp_path):
    rows = read_manifest(write_manifest(tmp_path, [{"id": str(n), "text": f"text {n}"} for n in range(7)]))
    config = CleaningConfig("minhash", quality="words > 1")
    executor = Executor("datatrove", 2, None, tmp_path / "w")
    wanted = json.loads(json.dumps(measure_rows(rows, config, Executor())))
    assert measure_rows(rows, config, executor) == wanted
    done = tmp_path / "w" / "measure" / "output-00001.json"
    done.write_text(done.read_text().replace("digest", "other"))
    assert measure_rows(rows, config, executor) != wanted  # what is done is not done again
    done.unlink()
    assert measure_rows(rows, config, executor) == wanted
    for others, changed, tasks in (
        (rows[1:], config, None), (rows, CleaningConfig("exact"), None), (rows, config, 3),
        ([*rows[:-1], read_manifest(write_manifest(tmp_path, [{"id": "6", "text": "new"}]))[0]], config, None),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="work of other rows, settings or tasks"):
            measure_rows(others, changed, Executor("datatrove", 2, tasks, tmp_path / "w"))


@datatrove
def test_too_many_bad_rows_do_not_undo_the_work(rows, tmp_path):
    folder, manifests = rows
    executor = Executor("datatrove", 2, None, tmp_path / "w")
    settings = {"tokenizer": folder / "tok", "executor": executor, "samples_per_shard": 5}
    with pytest.raises(ManifestError, match="rows can't be used"):
        commands.build(manifests[1], tmp_path / "s", max_bad_fraction=0.0, **settings)
    output = tmp_path / "w" / "write" / "output-00000.json"
    assert output.is_file() and not list((tmp_path / "s").glob("*" + ".tar"))
    written = output.stat().st_mtime_ns
    with pytest.raises(ManifestError):
        commands.build(manifests[1], tmp_path / "s", max_bad_fraction=0.1, **settings)
    assert output.stat().st_mtime_ns == written


@datatrove
def test_a_task_that_fails_says_why(tmp_path):
    with pytest.raises(ZeroDivisionError):
        run_tasks("fail", _fail, [1, 0], Executor("datatrove", 1, 2, tmp_path), {})
    assert len(list(tmp_path.glob("fail/output-*"))) == 1
    with pytest.raises(ZeroDivisionError):
        run_tasks("fail", _fail, [1, 0], Executor("datatrove", 1, 2, tmp_path), {})


def _fail(items: list[int]) -> list[float]:
    return [1 / item for item in items]


def test_without_datatrove_it_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datatrove", None)
    rows = read_manifest(write_manifest(tmp_path, [{"text": "x"}]))
    with pytest.raises(ModuleNotFoundError, match=r"mmllm\[datatrove\]"):
        measure_rows(rows, CleaningConfig("exact"), Executor("datatrove", 1, None, tmp_path / "w"))


def test_wrong_executors_are_named(tmp_path, capsys):
    for wrong, said in (
        ({"name": "cloud"}, "executor is 'cloud'"), ({"name": "ray"}, "needs a work folder"),
        ({"name": "slurm", "work": tmp_path}, "partition=NAME"), ({"tasks": 2}, "are for the executors datatrove"),
        ({"workers": -1}, "workers is -1"), ({"name": "ray", "work": tmp_path, "tasks": 0}, "tasks 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Executor(**wrong)
    assert parse_options(["a=4", "b=04:00:00", 'c={"d": 1}', "e=x=y"]) == {
        "a": 4,
        "b": "04:00:00",
        "c": {"d": 1},
        "e": "x=y",
    }
    for wrong in ("a", "=4"):
        with pytest.raises(ValueError, match="KEY=VALUE"):
            parse_options([wrong])
    assert issubclass(UnfinishedError, ValueError)
