"""Small models that are merged in tests: a base, and specialists whose weights moved a little."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from mmllm.checkpoints.folder import save_model
from mmllm.cli.main import main
from mmllm.model.multimodal import MultimodalModel
from tests.inference_fixtures import make_model, make_tokenizer


def moved(seed: int, std: float = 0.02) -> MultimodalModel:
    """The base (seed 0), or a specialist whose decoder moved away from it."""
    model = make_model(make_tokenizer())
    if seed:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.decoder.parameters():
                parameter += std * torch.randn(parameter.shape, generator=generator)
    return model


def save(folder: Path, seed: int, dtype: torch.dtype = torch.float32) -> Path:
    return save_model(folder, moved(seed).to(dtype), make_tokenizer())


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def write(path: Path, values: Mapping[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")
    return path


def models(*folders: Path, **parameters: list[Any]) -> list[dict[str, Any]]:
    """Entries of `models`: of each parameter a value a folder."""
    return [
        {"model": str(folder), "parameters": {key: values[place] for key, values in parameters.items()}}
        if parameters
        else {"model": str(folder)}
        for place, folder in enumerate(folders)
    ]


def merge(capsys: pytest.CaptureFixture[str], out: Path, values: Mapping[str, Any], *flags: str, code: int = 0) -> str:
    """Runs `mmllm merge` and gives what it prints, or what it complains of."""
    config = write(out.with_suffix(".yaml"), values)
    got = main(["merge", str(config), "--out", str(out), *flags])
    said = capsys.readouterr()
    assert got == code, said.err
    return said.out if code == 0 else said.err
