"""Runs triton_cases.py in a process of its own: under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CASES = Path(__file__).with_name("triton_cases.py")


@pytest.mark.timeout(900)
def test_triton_kernels():
    run_cases("not proof")


@pytest.mark.proof
@pytest.mark.timeout(3600)
def test_triton_kernels_on_what_takes_longer():
    run_cases("proof")


def run_cases(marked: str) -> None:
    """Runs the cases that have or have not the marker `proof`."""
    pytest.importorskip("triton")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"  # read when triton is imported, and binding for the whole process
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marked, str(CASES)]
    result = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
