"""Where the real data sets lie, for the tests that use them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def folder_of(environment: dict[str, str] | os._Environ[str] = os.environ) -> Path | None:
    """The folder with `fsdd/`, `cifar10/`, `emoji/` and `shakespeare/` that `MMLLM_DATA` names; None: it names none.

    Resolved here, once: tests write its paths into manifests elsewhere, and go to other folders.
    """
    named = environment.get("MMLLM_DATA")
    return Path(named).resolve() if named else None


FOLDER = folder_of()
needs_real_data = pytest.mark.skipif(
    FOLDER is None, reason="MMLLM_DATA is not set: it names the folder with fsdd/, cifar10/, emoji/ and shakespeare/"
)


def real_set(name: str) -> Path:
    """The manifest of one of the sets."""
    assert FOLDER is not None, "mark the test with needs_real_data"
    return FOLDER / name / "manifest.jsonl"
