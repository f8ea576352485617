"""Points of scaling laws: rows of a JSONL file, one training each, as `mmllm scaling sweep` writes them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ONE_EPOCH = 1.05
"""Documents that come again teach less than new ones: points of more epochs are no part of a fit."""


@dataclass(frozen=True)
class Points:
    """Trainings.

    Attributes:
        parameters_P: N.
        tokens_P: D.
        loss_P: in nats a token.
    """

    parameters_P: np.ndarray
    tokens_P: np.ndarray
    loss_P: np.ndarray

    def __len__(self) -> int:
        return len(self.loss_P)

    def rows(self) -> list[tuple[float, float, float]]:
        """N, D and L of each."""
        return list(zip(self.parameters_P.tolist(), self.tokens_P.tolist(), self.loss_P.tolist(), strict=True))

    def pick(self, places: np.ndarray) -> Points:
        """Some of them."""
        return Points(self.parameters_P[places], self.tokens_P[places], self.loss_P[places])


def read_rows(path: str | Path, only: Mapping[str, str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a JSONL file, each with its place for messages.

    Args:
        path: of the file.
        only: keys and values; rows that have others are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is no JSON object, or its `epochs` are no number; the line is named.
    """
    path = Path(path)
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where} is {line[:40]!r}; wanted an object with parameters, tokens and loss")
        epochs = row.get("epochs", 1)
        if isinstance(epochs, bool) or not isinstance(epochs, int | float) or not epochs >= 0:
            raise ValueError(f"{where} has epochs {epochs!r}; it must be a number, or be left out")
        if all(str(row.get(key)) == value for key, value in (only or {}).items()):
            yield where, row


def read_points(
    path: str | Path,
    size: str = "parameters",
    loss: str = "loss",
    only: Mapping[str, str] | None = None,
    fits: Callable[[Mapping[str, Any]], bool] | None = None,
    is_needed: bool = True,
) -> Points:
    """Points from a JSONL file.

    Args:
        path: rows with parameters, tokens and a loss.
        size: key of N, such as `total_parameters`.
        loss: key of L; of what lies deeper, keys with dots between them: `loss_by_source.caption`.
        only: keys and values; rows that have others are left out.
        fits: says which rows are read; None: all.
        is_needed: no points are an error.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row lacks a key, or has no positive number there; the line is named.
    """
    found = []
    for where, row in read_rows(path, only):
        if fits is None or fits(row):
            found.append([number_in(row, key, where) for key in (size, "tokens", loss)])
    if not found and is_needed:
        rest = "" if not only else f" where {', '.join(f'{key} is {value}' for key, value in only.items())}"
        raise ValueError(f"{path} has no points{rest}")
    parameters_P, tokens_P, loss_P = np.array(found).reshape(-1, 3).T
    return Points(parameters_P, tokens_P, loss_P)


def number_in(row: Mapping[str, Any], key: str, where: str) -> float:
    """The positive number under a key; of what lies deeper, keys with dots between them.

    Raises:
        ValueError: there is none.
    """
    value: Any = row
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        raise ValueError(f"{where} has {key} {_short(value)}; it must be a positive number")
    return float(value)


def _short(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > sys.float_info.max:
        return "too large a whole number"
    return repr(value)
