"""The files of a model folder: which there are, how they are read and replaced, and what errors call them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

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
REWARD_HEAD, REWARD_CONFIG = "reward_head.safetensors", "reward_config.json"
"""Of a reward model: what its decoder's last hidden state is scored by."""

_REQUIRED = (CONFIG, GENERATION, *TOKENIZER_FILES)
_OPTIONAL = (WEIGHTS, INDEX, CARD, CODEC, SOURCE, ADAPTERS, CHAT_FILE, REWARD_HEAD, REWARD_CONFIG)
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_WELCOME_SUFFIXES = (".md", ".txt")
_NUM_SHOWN = 5

Kind = Literal["model", "checkpoint"]
_Given = TypeVar("_Given")
_Parsed = TypeVar("_Parsed")


@contextlib.contextmanager
def replaced_folder(directory: Path, kind: Kind = "model", sources: Sequence[Path] = ()) -> Iterator[Path]:
    """A new folder to write into, which takes the place of `directory` when all is written, or goes.

    Args:
        directory: of a link, what it links to.
        kind: what may be there already, and is replaced.
        sources: folders that are read for it.

    Raises:
        ValueError: as `check_replaceable`; or a source would be replaced with it.
    """
    directory = directory.resolve()
    check_replaceable(directory, kind)
    for source in sources:
        if directory == source.resolve() or directory in source.resolve().parents:
            raise ValueError(f"{directory} is where {source} lies, which would be replaced; give another folder")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = directory.parent / f".{directory.name}.{uuid.uuid4().hex[:12]}"
    partial.mkdir()  # with the permissions of any new folder; `tempfile` makes its own for the owner alone
    try:
        yield partial
        replaced = partial.with_name(partial.name + ".old")
        if directory.exists():
            directory.rename(replaced)
        partial.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_replaceable(directory: Path, kind: Kind = "model") -> None:
    """Makes sure that no more would be replaced than an older folder of the same kind.

    Args:
        directory: what would be replaced.
        kind: a model folder of this project, or a checkpoint of transformers.

    Raises:
        ValueError: `directory` is a file, or a folder with something else in it.
    """
    if directory.is_file():
        raise ValueError(f"cannot save a model to {directory}: it is a file; give a folder")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    if not (directory / CONFIG).is_file():
        raise ValueError(
            f"cannot save a model to {directory}: it holds other files and no {CONFIG}; "
            f"give a new or empty folder, or one with an older model"
        )
    found = "model" if read_json(directory / CONFIG).get("format") == "mmllm" else "checkpoint"
    if found != kind:
        names = {"model": "a model folder of mmllm", "checkpoint": "a checkpoint of transformers"}
        raise ValueError(
            f"cannot write {names[kind]} to {directory}: {names[found]} is there, by its {CONFIG}, and would be "
            f"replaced; give another folder, or remove it"
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
    if missing and CONFIG in present and "model_type" in read_json(directory / CONFIG):
        raise ValueError(
            f"{directory} is a checkpoint of transformers, not a model folder; make one of it with "
            f"`mmllm import {directory} --out DIR`"
        )
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


def read_json(path: Path, hint: str = "copy or export the model again") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        path: of the file.
        hint: what is to be done where it is none.

    Raises:
        ValueError: it can't be read, or is no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; {hint}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; wanted an object; {hint}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes an object, its keys in order."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def listed(names: list[str], num_shown: int = _NUM_SHOWN) -> str:
    """The first of some names, and how many more there are."""
    shown = ", ".join(names[:num_shown])
    return shown if len(names) <= num_shown else f"{shown} and {len(names) - num_shown} more"
