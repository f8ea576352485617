"""Which backend does the work, and what is said when it is not the one asked for."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "reference", "cpu", "triton"]
_BACKENDS = get_args(Backend)

MAX_TRITON_GROUPS = 1024
"""Routing holds one row of logits in a program's registers."""
_TRITON_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(backend: str) -> None:
    """Raises ValueError unless `backend` is one of `Backend`."""
    if backend not in _BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose {', '.join(_BACKENDS)}")


def use_triton(backend: str, x: Tensor, others: tuple[Tensor, ...], num_groups: int = 1) -> bool:
    """True if the Triton kernels take these inputs; says why, once a reason, if they were wanted and cannot.

    `auto` wants them for tensors on a GPU and is silent on a CPU.
    """
    if backend == "cpu" or (backend == "auto" and not x.is_cuda):
        return False
    reason = _why_not_triton(x, others, num_groups)
    if reason is not None:
        _warn_once(f"the Triton kernels {reason}; the sorted-token path of plain PyTorch is used instead")
    return reason is None


def interpreted() -> bool:
    """True where Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1, set before the import)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _why_not_triton(x: Tensor, others: tuple[Tensor, ...], num_groups: int) -> str | None:
    if not _triton_installed():
        return "need the package triton (pip install 'mmllm[kernels]'), which is not installed"
    if x.device.type != "cuda" and not interpreted():
        return f"need a GPU (or TRITON_INTERPRET=1), but the tensors are on {x.device.type}"
    for tensor in (x, *others):
        if tensor.dtype not in _TRITON_DTYPES:
            return f"take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    if x.device.type == "cuda" and _capability(x.device) < (8, 0):
        return "need compute capability 8.0"
    if num_groups > MAX_TRITON_GROUPS:
        return f"take up to {MAX_TRITON_GROUPS} experts, not {num_groups}"
    return None


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(f"mmllm_kernels: {message}", RuntimeWarning, stacklevel=2)
