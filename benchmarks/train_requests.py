"""Requests and answers of a process that `benchmarks/train.py` asks for rounds: lines of JSON on stdin and stdout."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

_answers = sys.stdout


def open_answers() -> None:
    """Keeps stdout for answers: what libraries print from now on goes to stderr."""
    global _answers
    _answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)


def receive() -> dict[str, Any]:
    """The next request; ends the process where there will be none, since training has no end of its own."""
    line = sys.stdin.readline()
    if not line:
        os._exit(0)
    return json.loads(line)


def answer(values: dict[str, Any]) -> None:
    """Writes the answer to the last request."""
    _answers.write(json.dumps(values) + "\n")
    _answers.flush()


def serve(handlers: dict[str, Callable[..., dict[str, Any]]]) -> None:
    """Answers `{"do": name, …}` by the handler of this name."""
    while True:
        request = receive()
        answer(handlers[request.pop("do")](**request))


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
