"""Reading configs that others wrote: what they are is checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmllm.checkpoints import files


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, or no object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist; give the folder of a whole checkpoint")
    return files.read_json(path, "copy the checkpoint again")


def read_json_if_there(path: Path) -> dict[str, Any]:
    """As `read_json`; empty where there is no such file."""
    return read_json(path) if path.is_file() else {}


def refuse_custom_code(path: Path, values: Mapping[str, Any]) -> None:
    """Refuses checkpoints that bring their own code, or whose weights are quantized.

    Raises:
        ValueError: this one does, or its are.
    """
    if values.get("auto_map"):
        raise ValueError(
            f"{path}: auto_map is {values['auto_map']!r}: the checkpoint comes with code of its own, which is never "
            f"run; give one that transformers computes by itself"
        )
    if values.get("quantization_config"):
        method = values["quantization_config"].get("quant_method", "unknown")
        raise ValueError(
            f"{path}: quantization_config is of method {method!r}; give the checkpoint with its weights as they were "
            f"before (float32, float16 or bfloat16)"
        )
