"""`mmllm study code`: whole files are held out, and nothing of them is trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mmllm.cli.main import main
from mmllm.studies.source_code import MAX_CHARACTERS, documents_of, is_heldout, write_source_code


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_files_are_cut_before_definitions_and_nothing_is_lost():
    text = "import os\n\n\ndef f():\n    a = 1\n\n    return a\n\n\ndef g():\n    return 2\n"
    assert documents_of(text) == ["import os\n\ndef f():\n    a = 1\n\n    return a\n\ndef g():\n    return 2"]
    assert documents_of(text, 40) == ["import os", "def f():\n    a = 1\n\n    return a", "def g():\n    return 2"]
    long = "def h():\n" + "".join(f"    x{i} = {i}\n" for i in range(900))
    pieces = documents_of(long)
    assert len(pieces) > 1 and max(map(len, pieces)) <= MAX_CHARACTERS
    assert [line for piece in pieces for line in piece.splitlines()] == long.splitlines()
    assert documents_of("\n\n") == [] and documents_of("x" * 5000) == ["x" * MAX_CHARACTERS], "a line is cut"


def test_whole_files_are_held_out_and_equal_documents_kept_once(tmp_path: Path):
    library = tmp_path / "lib"
    (library / "pack" / "tests").mkdir(parents=True)
    names = [f"pack/m{i}.py" for i in range(60)]
    for number, name in enumerate(names):
        (library / name).write_text(f"value = {number}\n\n\n{'# as everywhere' * 133}\n")
    (library / "pack" / "tests" / "test_m.py").write_text("assert 'never'\n")
    lines = write_source_code(tmp_path / "out", library)
    train, test = (read(tmp_path / "out" / f"{split}.jsonl") for split in ("train", "test"))
    assert {row["file"] for row in test} == {name for name in names if is_heldout(name)}
    assert not {row["file"] for row in train} & {row["file"] for row in test}
    texts = [row["text"] for row in (*train, *test)]
    assert len(set(texts)) == len(texts) == 61, "60 values, and what stands in all of them once, held out"
    assert sum("everywhere" in row["text"] for row in test) == 1 and "never" not in "".join(texts)
    assert f"{len(test):,} documents" in lines[1] and f"of {len({row['file'] for row in train})} files" in lines[0]
    before = (tmp_path / "out" / "train.jsonl").read_bytes()
    write_source_code(tmp_path / "out", library)
    assert (tmp_path / "out" / "train.jsonl").read_bytes() == before


def test_the_library_of_this_python_is_enough_for_a_sweep(tmp_path: Path):
    assert main(["study", "code", "--out", str(tmp_path)]) == 0
    train, test = (read(tmp_path / f"{split}.jsonl") for split in ("train", "test"))
    assert sum(len(row["text"]) for row in train) > 4e6 and sum(len(row["text"]) for row in test) > 1e5
    assert max(len(row["text"]) for row in train) <= MAX_CHARACTERS


def test_a_library_without_sources_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python311.zip"))
    assert main(["study", "code", "--out", str(tmp_path / "out")]) != 0
    assert "python311.zip has too few sources to hold some out (0 files)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
