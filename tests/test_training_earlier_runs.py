"""What `fit` finds from an earlier run, and the checkpoints that it and its siblings are given."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.utils.tensorboard import SummaryWriter

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.earlier_runs import _has_events
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.data_fixtures import write_manifest

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")  # finished runs are copied

CONFIG: dict[str, Any] = {
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "log_every_n_steps": 1,
        "enable_progress_bar": False,
        "logger": [
            {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": "out", "name": "log", "version": ""},
            },
            {
                "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
                "init_args": {"save_dir": "out", "name": "log", "version": "tensorboard"},
            },
        ],
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                "init_args": {"dirpath": "out/checkpoints", "save_last": True, "save_top_k": 0},
            },
            {"class_path": "mmllm.training.callbacks.RoutingLog", "init_args": {"directory": "out/routing"}},
        ],
    },
    "model": {
        "class_path": "mmllm.training.decoder_module.DecoderModule",
        "init_args": {
            "tokenizer": "tokenizer",
            "decoder": {
                "vocab_size": 0,
                "hidden_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "intermediate_size": 16,
                "moe_layers": [0],
                "moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16},
            },
            "out": "out/model",
        },
    },
    "data": {
        "class_path": "mmllm.data.loading.datamodules.PackedDataModule",
        "init_args": {"recipe": "recipe.yaml", "batch_size": 2, "steps_per_epoch": 1},
    },
}
FIT = ["fit", "-c", "config.yaml"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and a config, all of whose paths are relative to it."""
    folder = tmp_path_factory.mktemp("made")
    rows = [{"id": f"t{number}", "text": f"Row {number} says {number}."} for number in range(20)]
    text = TextTokenizer.train([row["text"] for row in rows], vocab_size=280)
    TokenizerFolder(text, None, TokenizerConfig()).save(folder / "tokenizer")
    commands.build(write_manifest(folder, rows), folder / "shards")
    commands.index(folder / "shards", folder / "tokenizer")
    source = {"name": "texts", "kind": "text", "shards": "shards/text-*.tar"}
    recipe = {"tokenizer": "tokenizer", "sequence_length": 32, "sources": [source]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


@pytest.fixture(scope="module")
def fitted(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same after a fit."""
    folder = tmp_path_factory.mktemp("fitted") / "run"
    shutil.copytree(made, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(FIT) == 0
    return folder


@pytest.fixture
def fresh(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the data and the config, to run in."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "run"))
    return Path()


@pytest.fixture
def done(fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of all with a finished run, to run in."""
    monkeypatch.chdir(shutil.copytree(fitted, tmp_path / "run"))
    return Path()


def written(folder: Path) -> dict[str, bytes]:
    """Everything under `out`."""
    paths = sorted(path for path in folder.joinpath("out").rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in paths}


def trained_steps() -> list[int]:
    """The steps whose loss is in metrics.csv."""
    with Path("out/log/metrics.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss/text"]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What the command says when it ends with 2."""
    capsys.readouterr()
    assert main(list(arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("mmllm: error: ")
    return said


def test_a_fit_does_not_write_over_a_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(done)
    said = refused(capsys, *FIT)
    for named in ("model out/model,", "log out/log/metrics.csv and 3 more", "out/checkpoints/last.ckpt", "--overwrite"):
        assert named in said
    assert written(done) == before


LEFT = ["model", "log/metrics.csv", "log/tensorboard", "checkpoints", "routing/routing.csv", "routing/routing.json"]


@pytest.mark.parametrize("left", LEFT)
def test_each_thing_that_a_run_leaves_is_enough(done: Path, capsys: pytest.CaptureFixture[str], left: str) -> None:
    Path("out").rename("earlier")
    Path("out", left).parent.mkdir(parents=True)
    Path("earlier", left).rename(Path("out", left))
    assert f"out/{left}" in refused(capsys, *FIT)


def test_what_lies_elsewhere_or_is_no_run_is_not_in_the_way(done: Path) -> None:
    Path("out").rename("earlier")
    for folder in ("model", "checkpoints", "log/tensorboard"):
        Path("out", folder).mkdir(parents=True)
    Path("out/checkpoints/notes.txt").write_text("none yet")
    assert main(FIT) == 0


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_a_folder_that_cannot_take_the_model_is_named_before_training(
    done: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """`--overwrite` replaces a model, but not the logs, or whatever else lies in its folder."""
    monkeypatch.setattr(DecoderModule, "training_step", lambda *_: pytest.fail("it trains"))
    before = written(done)
    said = refused(capsys, *FIT, *options, "--model.init_args.out", "out/log")
    assert ("out/log: it holds other files and no config.json" if options else "fit would write over") in said
    after = written(done)
    assert all(after[path] == content for path, content in before.items() if not path.endswith("log/config.yaml"))


def test_overwrite_leaves_one_run(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("out/checkpoints/step=1.ckpt")
    shutil.copy("out/checkpoints/last.ckpt", kept)
    before = written(done)
    assert main([*FIT, "--overwrite", "--trainer.max_steps", "3"]) == 0, capsys.readouterr().err
    after = written(done)
    (events,) = Path("out/log/tensorboard").glob("events*")
    assert str(events) not in before and _has_events(events)
    assert trained_steps() == [1, 2, 3], "none of the run before"
    assert sorted(path.name for path in Path("out/checkpoints").iterdir()) == ["last.ckpt", "step=1.ckpt"]
    assert after["out/checkpoints/last.ckpt"] != before["out/checkpoints/last.ckpt"]
    assert after["out/model/model.safetensors"] != before["out/model/model.safetensors"]


def test_overwrite_is_asked_for_each_time(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no key of the config that is saved beside the logs."""
    assert main([*FIT, "--overwrite"]) == 0
    assert "overwrite" in refused(capsys, "fit", "-c", "out/log/config.yaml")
    assert "overwrite" not in yaml.safe_load(Path("out/log/config.yaml").read_text())
    assert "--overwrite" in refused(capsys, "validate", "-c", "config.yaml", "--overwrite")


@pytest.mark.parametrize("checkpoint", ["last", "out/checkpoints/last.ckpt"])
def test_going_on_is_not_writing_over(done: Path, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    assert trained_steps() == [1, 2]
    assert main([*FIT, "--ckpt_path", checkpoint, "--trainer.max_steps", "4"]) == 0, capsys.readouterr().err
    assert trained_steps() == [1, 2, 3, 4]


@pytest.mark.parametrize("command", ["fit", "validate", "test"])
@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [
        ("last", "run/out/checkpoints; "),
        ("nowhere.ckpt", "nowhere.ckpt: no such checkpoint"),
        ("nowhere", "--ckpt_path is nowhere,"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named(
    fresh: Path, capsys: pytest.CaptureFixture[str], command: str, checkpoint: str, said: str
) -> None:
    assert said in refused(capsys, command, "-c", "config.yaml", "--ckpt_path", checkpoint)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--trainer.max_steps", "2"], "at step 2 and trainer.max_steps is 2"),
        (["--trainer.max_steps", "1"], "at step 2 and trainer.max_steps is 1"),
        (["--trainer.max_steps", "9", "--trainer.max_epochs", "1"], "at epoch 1 and trainer.max_epochs is 1"),
    ],
)
def test_a_run_that_is_over_does_not_go_on(
    done: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    before = written(done)
    assert said in refused(capsys, *FIT, "--ckpt_path", "last", *options)
    after = written(done)
    for kept in ("out/log/metrics.csv", "out/checkpoints/last.ckpt", "out/model/model.safetensors"):
        assert after[kept] == before[kept], kept


def test_a_refused_resume_keeps_the_metrics(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lightning's logger deletes them before the checkpoint is looked into."""
    before = written(done)
    recipe = yaml.safe_load(Path("recipe.yaml").read_text())
    Path("recipe.yaml").write_text(yaml.safe_dump({**recipe, "seed": 99}))
    refused(capsys, *FIT, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert written(done)["out/log/metrics.csv"] == before["out/log/metrics.csv"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_nothing_to_score_is_an_error(done: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    scores = [command, "-c", "config.yaml", "--ckpt_path", "last"]
    assert f"{command} has nothing to score: PackedDataModule gives no validation data" in refused(capsys, *scores)
    assert main([*scores, "--data.init_args.val_recipe", "recipe.yaml"]) == 0
    assert "loss" in capsys.readouterr().out


def test_nothing_to_train_on_is_an_error(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = written(done)
    assert "nothing was trained" in refused(capsys, *FIT, "--overwrite", "--trainer.limit_train_batches", "0")
    after = written(done)
    assert all(after[f"out/{kept}"] == before[f"out/{kept}"] for kept in ("log/metrics.csv", "checkpoints/last.ckpt"))


def test_an_attempt_that_failed_is_no_run(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("the first step fails")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderModule, "training_step", fails)
        assert "the first step fails" in refused(capsys, *FIT)
    assert list(Path("out/log/tensorboard").glob("events*")), "Lightning has begun a log file"
    assert main(FIT) == 0, capsys.readouterr().err


def test_a_tensorboard_file_with_its_version_alone_is_no_log(tmp_path: Path) -> None:
    writer = SummaryWriter(str(tmp_path))
    writer.flush()
    (path,) = tmp_path.iterdir()
    assert path.stat().st_size > 0 and not _has_events(path)
    writer.add_scalar("loss", 1.0, 1)
    writer.close()
    assert _has_events(path)
    path.write_bytes(b"cut")
    assert _has_events(path)
    path.write_bytes(b"")
    assert not _has_events(path)


def test_without_a_logger_no_config_is_written_over(fresh: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("config.yaml").read_bytes()
    assert main([*FIT, "--trainer.logger", "false"]) == 0, capsys.readouterr().err
    assert Path("config.yaml").read_bytes() == before


def test_two_ranks_refuse_before_the_second_is_started(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert "--overwrite" in refused(capsys, *FIT, *ranks)


@pytest.mark.proof
def test_two_ranks_overwrite_together(done: Path) -> None:
    """Lightning starts the second with the command line of the first."""
    ranks = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--trainer.max_steps", "3"]
    command = [sys.executable, "-m", "mmllm.cli", *FIT, *ranks, "--overwrite"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in Path("out/checkpoints").iterdir()] == ["last.ckpt"]
    assert trained_steps() == [1, 2, 3]


def test_a_run_that_ended_by_epochs_writes_its_model_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its checkpoint is from before the end of the last epoch: what is left is to end it."""
    epochs = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "3"]
    assert main([*FIT, "--overwrite", *epochs]) == 0
    Path("out/model").rename("model")
    assert main([*FIT, "--ckpt_path", "last", *epochs]) == 0, capsys.readouterr().err
    weights = (Path(folder, "model.safetensors").read_bytes() for folder in ("model", "out/model"))
    assert next(weights) == next(weights)
    assert trained_steps() == [1, 2, 3]
