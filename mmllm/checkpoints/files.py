"""The files of a model folder: which there are, how they are read and replaced, and what errors call them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from mmllm.checkpoints.weights import INDEX, WEIGHTS
from mmllm_tokenizers.folder import CHAT_FILE

CONFIG = "config.json"
GENERATION = "generation_config.json"
CARD = "README.md"
TOKENIZER_FILES = ("tokenizer.json", "templates.json", "tokenizer_config.json")
CODEC = "codec"
SOURCE = "source"
"""What a checkpoint that was imported had beside its weights: it goes out with it."""
ADAPTERS = "adapters"

_REQUIRED = (CONFIG, GENERATION, *TOKENIZER_FILES)
_OPTIONAL = (WEIGHTS, INDEX, CARD, CODEC, SOURCE, ADAPTERS, CHAT_FILE)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WELCOME_SUFFIXES = (".md", ".txt")
_NUM_SHOWN = 5

_Given = TypeVar("_Given")
_Parsed = TypeVar("_Parsed")


@contextlib.contextmanager
def replaced_folder(directory: Path) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `directory` when all is written, or goes.

    Raises:
        ValueError: as `check_replaceable`.
    """
    check_replaceable(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        yield partial
        partial.chmod(0o755)
        replaced = partial.with_name(partial.name + ".old")
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(directory: Path) -> None:
    """Makes sure that `save_model` would replace no more than an older model.

    Raises:
        ValueError: `directory` is a file, or a folder with something else in it.
    """
    if directory.is_file():
        raise ValueError(f"cannot save a model to {directory}: it is a file; give a folder")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / CONFIG).is_file():
        raise ValueError(
            f"cannot save a model to {directory}: it holds other files and no {CONFIG}; "
            f"give a new or empty folder, or one with an older model"
        )


def check_files(directory: Path) -> None:
    """Makes sure that a model folder has all of its files and no others.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it lacks a file, or has a foreign one.
    """
    if not directory.exists():
        raise FileNotFoundError(f"no model folder at {directory}; give the folder that training or `save_model` wrote")
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; a model is a folder with {CONFIG} and {WEIGHTS}")
    present = {entry.name for entry in directory.iterdir()}
    missing = [name for name in _REQUIRED if name not in present]
    if not present & {WEIGHTS, INDEX}:
        missing.append(WEIGHTS)
    if missing:
        wanted = listed([CONFIG, WEIGHTS, *_REQUIRED[1:]], 9)
        raise ValueError(
            f"model folder {directory} lacks {listed(missing)}; wanted {wanted}; copy the whole folder or export the "
            f"model again"
        )
    foreign = sorted(
        name
        for name in present - {*_REQUIRED, *_OPTIONAL}
        if not (name.startswith((".", "LICENSE")) or name.endswith(_WELCOME_SUFFIXES) or _SHARD.fullmatch(name))
    )
    if foreign:
        raise ValueError(
            f"model folder {directory} holds {listed(foreign)}, which is no part of a model; "
            f"wanted {listed([*_REQUIRED, *_OPTIONAL], 99)} alone; move it elsewhere"
        )


def parsed(path: Path, parse: Callable[[_Given], _Parsed], value: _Given) -> _Parsed:
    """`parse(value)`; whatever it dislikes becomes a ValueError that names the file."""
    try:
        return parse(value)
    except (ValueError, TypeError, KeyError, OSError, AttributeError) as error:
        said = f"{type(error).__name__} {error}" if isinstance(error, (KeyError, AttributeError)) else str(error)
        raise ValueError(f"{path} is not usable: {said}; restore it or export the model again") from error


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; ValueError if it holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not JSON: {error}; copy or export the model again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted an object; copy or export the model again")
    return values


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Writes an object, its keys in order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(names: list[str], num_shown: int = _NUM_SHOWN) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
