"""What a task does, told in JSON: a function's name, its settings, and which items are the task's.

The work folder is shared with tasks of other machines. What lies in it is read as data: nothing is unpickled, and a
task calls no function but those named here.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

FUNCTIONS = (
    "mmllm.data.rows.cleaning:row_measurer",
    "mmllm.data.shards.write:group_writer",
    "mmllm.studies.runs:make_runner",
    "mmllm.training.image_encoder:load_image_encoder",
)
"""All that a work folder may name, each as `module:function`."""
ERRORS = "errors"
"""Folder of a run: what its tasks failed of."""
_TASK = "task.json"


class Part(Protocol):
    """One line of an item."""

    def to_json(self) -> Any:
        """As a JSON value."""
        ...


@dataclass(frozen=True)
class Work:
    """What is to be done with items, so that any process can make the function that does it."""

    function: str
    """One of `FUNCTIONS`. It takes the settings, and returns what takes an item (its lines, JSON values) and its key,
    and returns a JSON value."""
    settings: dict[str, Any]
    """JSON."""


def function_named(name: str) -> Callable[..., Any]:
    """One of `FUNCTIONS`.

    Raises:
        ValueError: The name is another.
    """
    if name not in FUNCTIONS:
        raise ValueError(
            f"a task names the function {name!r}, but tasks call only {', '.join(FUNCTIONS)}; "
            f"submit and run tasks with the same version of mmllm, or look who else writes to the work folder"
        )
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that others see whole or not at all."""
    unfinished = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}")
    try:
        unfinished.write_bytes(data)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def item_lines(item: Sequence[Part]) -> bytes:
    """An item as its file holds it: a line of JSON for each part."""
    return "".join(f"{json.dumps(part.to_json())}\n" for part in item).encode()


def item_path(folder: Path, key: str) -> Path:
    """Where an item lies."""
    return folder / f"{key}.jsonl"


def result_path(folder: Path, key: str) -> Path:
    """Where what became of an item lies, as JSON."""
    return folder / f"{key}.json"


class Task:
    """The one step of datatrove's pipeline: each rank does its share of the items.

    Args:
        run: The run's folder, which has the description that `describe` wrote, and takes errors.
    """

    def __init__(self, run: str) -> None:
        self._run = Path(run)

    @staticmethod
    def describe(run: Path, folder: Path, work: Work, shares: Sequence[Sequence[str]]) -> None:
        """Writes down what the ranks of a run are to do.

        Args:
            run: Its folder.
            folder: Of items and results.
            work: What is done with an item.
            shares: Each rank's keys.
        """
        function_named(work.function)
        told = {"function": work.function, "settings": work.settings, "folder": str(folder), "shares": shares}
        write_whole(run / _TASK, json.dumps(told).encode())

    def __call__(self, data: Any, rank: int = 0, world_size: int = 1) -> None:
        """What datatrove calls; `data` is what a step before this one would give."""
        try:
            self._do(rank)
        except BaseException as error:
            write_whole(self._run / ERRORS / f"{rank:05d}.txt", _named(error))
            raise

    def _do(self, rank: int) -> None:
        torch.set_num_threads(1)  # tasks share a machine
        told = json.loads((self._run / _TASK).read_bytes())
        folder, keys = Path(told["folder"]), told["shares"][rank]
        function = function_named(told["function"])(told["settings"])
        for key in keys:
            if not result_path(folder, key).is_file():
                lines = item_path(folder, key).read_bytes().splitlines()
                result = function([json.loads(line) for line in lines], key)
                write_whole(result_path(folder, key), json.dumps(result).encode())


def _named(error: BaseException) -> bytes:
    return f"{type(error).__name__}: {error}".encode("utf-8", "backslashreplace")
