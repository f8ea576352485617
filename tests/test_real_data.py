from __future__ import annotations

from pathlib import Path

import pytest

from tests import real_data


def test_a_relative_folder_holds_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert real_data.folder_of({"MMLLM_DATA": "../data"}) == tmp_path.parent / "data"
    assert real_data.folder_of({"MMLLM_DATA": ""}) is None
    assert real_data.folder_of({}) is None


@real_data.needs_real_data
def test_the_folder_holds_the_sets() -> None:
    for name in ("fsdd", "cifar10", "emoji", "shakespeare"):
        assert real_data.real_set(name).is_absolute() and real_data.real_set(name).is_file()
