from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.cli.command import check_there
from mmllm.cli.evaluation import TASKS
from mmllm.cli.main import main
from mmllm.paths import config_path, copy_config, list_configs
from mmllm.training.lightning_cli import one_line

DECODER = str(config_path("quickstart/decoder"))


def _error(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2, arguments
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("mmllm: error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--model.init_args.decoder.moe.num_expert", "3"], "num_expert"),
        (["--model.init_args.decoder.widht", "3"], "decoder.widht"),
        (["--trainer.max_step", "3"], "trainer.max_step"),
        (["--model.init_args.decoder.hidden_size", "wide"], "decoder.hidden_size"),
        (["--model.init_args.optimizer.lr", "-1"], "optimizer.lr is -1.0"),
        (["--model.init_args.decoder.moe.num_experts_per_tok", "99"], "moe.num_experts_per_tok is 99"),
        (["--data.init_args.batch", "4"], "batch"),
        (["--model.class_path", "mmllm.training.Nothing"], "mmllm.training.Nothing"),
        (["--modle", "4"], "modle"),
    ],
)
def test_a_wrong_key_or_value_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], key: str
) -> None:
    message = _error(capsys, "fit", "-c", DECODER, *options)
    assert key in message
    assert "Union" not in message and "NoneType" not in message


def test_a_wrong_key_in_yaml_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(Path(DECODER).read_text().replace("num_experts: 8", "num_expert: 8"))
    assert "num_expert" in _error(capsys, "fit", "-c", str(path))


def test_abbreviations_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--trainer.max_st" in _error(capsys, "fit", "-c", DECODER, "--trainer.max_st", "3")
    assert "--toke" in _error(capsys, "data", "index", "shards", "--tokenizer", "folder", "--toke", "x")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "-c", "nowhere.yaml"], "nowhere.yaml"),
        (["fit"], "-c FILE"),
        (["walk"], "walk"),
        (["predict", "-c", DECODER], "caption, transcribe, speak"),
        (["data"], "ACTION"),
        (["data", "build", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
        (["tokenizer", "train-text", "nowhere.jsonl", "--out", "x"], "nowhere.jsonl"),
        (["tokenizer", "assemble", "--text", "nowhere", "--out", "x"], "nowhere"),
        (["caption", "a.png", "--model", "nowhere"], "nowhere"),
        (["eval", "--model", "nowhere", "--task", "caption", "--manifest", "m.jsonl"], "nowhere"),
        (["eval", "--model", "nowhere", "--task", "sing", "--manifest", "m.jsonl"], "sing"),
        (["export", "--model", "nowhere", "--out", "x"], "nowhere"),
        (["import", "nowhere", "--out", "x"], "nowhere"),
        (["configs", "cp", "nothing"], "nothing"),
        (["quickstart"], "--out"),
    ],
)
def test_what_the_user_can_mend_exits_with_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in _error(capsys, *arguments)


def test_debug_shows_the_stack(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["fit", "--debug", "-c", str(tmp_path / "nowhere.yaml")])


def test_a_fault_of_ours_exits_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("mmllm.paths.list_configs", lambda: 1 / 0)
    assert main(["configs", "ls"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def _interrupted_by_lightning(*_: Any) -> None:
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def _terminated(*_: Any) -> None:
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    raise SIGTERMException


@pytest.mark.parametrize(("run", "code"), [(_interrupted_by_lightning, 130), (_terminated, 143)])
def test_a_stopped_run_is_no_success(monkeypatch: pytest.MonkeyPatch, run: Any, code: int) -> None:
    monkeypatch.setattr("mmllm.training.lightning_cli.run_lightning", run)
    assert main(["fit", "-c", DECODER]) == code


def test_configs_are_listed_and_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "ls"]) == 0
    assert capsys.readouterr().out.split() == list_configs()
    assert copy_config("quickstart/codec", tmp_path).read_text() == config_path("quickstart/codec.yaml").read_text()
    with pytest.raises(FileExistsError, match="exists"):
        copy_config("quickstart/codec", tmp_path)


@pytest.mark.parametrize("command", ["fit", "data", "tokenizer", "caption", "speak", "eval", "quickstart", "export"])
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, "--help"]) == 0
    assert command in capsys.readouterr().out
    assert len(TASKS) == 6


@pytest.mark.parametrize(("command", "prog"), [(["configs", "cp", "x"], "mmllm configs cp"), ([], "mmllm")])
def test_an_unknown_option_points_to_its_command(
    capsys: pytest.CaptureFixture[str], command: list[str], prog: str
) -> None:
    assert main([*command, "--bogus"]) == 2
    assert f"unrecognized arguments: --bogus; see `{prog} --help`" in capsys.readouterr().err


def test_a_failed_fit_leaves_the_process_as_it_was(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the demo may have been run in the checkout

    def state() -> tuple[Any, ...]:
        names = sorted(name for name in os.environ if name.startswith("PL_"))
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return names, handlers, logging.getLogger("lightning.pytorch").level, torch.is_grad_enabled()

    before = state()
    for _ in range(2):
        assert main(["fit", "-c", DECODER, "--trainer.logger", "false", "--trainer.callbacks", "null"]) == 2
        assert "runs/demo" in capsys.readouterr().err, "the demo's files aren't here"
        assert state() == before


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys; from mmllm.cli.main import main; main(['--help']); "
        "print(sorted({'torch', 'lightning'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


MISSPELT = [
    "data build absent.jsonl --out x",
    "data build there.jsonl --out x --tokenizer absent",
    "data split there.jsonl --test absent.jsonl --out x",
    "data index absent --tokenizer there",
    "data verify there --tokenizer absent",
    "data stats --recipe absent.yaml",
    "data show --recipe absent.yaml",
    "tokenizer train-text absent.jsonl --out x",
    "tokenizer assemble --text there --codec absent --out x",
    "tokenizer encodec encodec_24khz --weights absent --out x",
    "tokenizer kmeans absent.jsonl --out x",
    "fit -c absent.yaml",
    "fit -c there.jsonl --ckpt_path absent.ckpt",
    "caption absent.png --model there",
    "transcribe absent.wav --model there",
    "speak hello --out x.wav --model absent",
    "generate hello --image absent.png --model there",
    "chat hello --model absent",
    "eval --model there --task caption --manifest absent.jsonl",
    "export --model absent --out x",
    "import absent --out x",
    "report --out absent",
    "quickstart --train absent.jsonl --out x",
]


def test_a_misspelt_path_is_named_before_anything_is_imported(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there.jsonl").write_text("{}")
    code = (
        "import sys; from mmllm.cli.main import main; print([main(line.split()) for line in sys.argv[1:]]); "
        "print(sorted({'torch', 'lightning', 'numpy'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, *MISSPELT]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([2] * len(MISSPELT)), "[]"]
    for line, said in zip(MISSPELT, done.stderr.splitlines(), strict=True):
        assert said.startswith("mmllm: error: ") and "absent" in said, line
    assert not (tmp_path / "x").exists()


def test_patterns_and_addresses_are_left_to_what_reads_them(tmp_path: Path) -> None:
    check_there("shard", None, "", "s3://bucket/a.tar", "a-*.tar", "a-{000..009}.tar", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"a\.tar: no such shard; build it"):
        check_there("shard", str(tmp_path), "a.tar", hint="build it")


def test_one_line_keeps_the_keys_and_what_is_wrong() -> None:
    message = """Parser key "model":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'A'>, <class 'NoneType'>]
  Errors:
    - decoder.moe: Does not validate against any of the Union subtypes
      Errors:
        - Option 'num_expert' is not accepted
        - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>"""
    assert one_line(message) == "model: decoder.moe: Option 'num_expert' is not accepted"
