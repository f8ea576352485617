"""Weights and model folders have the permissions of any other new file."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mmllm.checkpoints.files import replaced_folder
from mmllm_tokenizers.tensor_file import save_tensors


@pytest.fixture(params=[0o022, 0o002, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_weights_follow_the_umask(tmp_path: Path, umask: int):
    (tmp_path / "plain").write_text("")
    (tmp_path / "old.safetensors").touch(0o600)
    for name in ("new.safetensors", "old.safetensors"):
        save_tensors({"a": torch.arange(3)}, tmp_path / name, {"format": "pt"})
        assert mode(tmp_path / name) == mode(tmp_path / "plain") == 0o666 & ~umask
        with safe_open(tmp_path / name, "pt") as stored:
            assert stored.metadata() == {"format": "pt"} and stored.get_tensor("a").tolist() == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 3, "nothing else is left"


def test_model_folders_follow_the_umask(tmp_path: Path, umask: int):
    with replaced_folder(tmp_path / "model") as partial:
        (partial / "config.json").write_text("{}")
    assert mode(tmp_path / "model") == 0o777 & ~umask
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "other"):
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
