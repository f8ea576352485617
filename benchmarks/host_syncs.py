"""Counts where code waits for the device, without having one: by what it asks of tensors on the CPU.

On a GPU the host runs ahead of the device. `x.item()`, `x.nonzero()`, `x[mask]`, `x.tolist()` make it wait until the
device has come so far, and so does a copy from ordinary memory (`torch.tensor(values, device=…)`). Which calls these
are is known from PyTorch's sources, and the same calls are seen on a CPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

ASKING = frozenset(
    {
        "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive",
        "unique_dim_consecutive", "equal", "is_nonzero", "bincount", "histc", "multinomial", "_ctc_loss.Tensor",
        "tensor_split.tensor_indices_or_sections",
    }
)  # fmt: skip
"""Operators of ATen that read a value of the device, or whose result has a size that depends on values."""
READING = {
    "tolist": "tolist", "numpy": "numpy", "cpu": "cpu", "__array__": "__array__", "to": "to('cpu')",
    "new_tensor": "new_tensor (a copy from ordinary memory)",
}  # fmt: skip
"""Methods of tensors that read them, or copy from ordinary memory, without an operator of which that can be told."""
MAKING = {
    "tensor": "tensor(…, device) (a copy from ordinary memory)",
    "as_tensor": "as_tensor(…, device) (a copy from ordinary memory)",
}
"""Functions that copy from ordinary memory, if they are told a device."""
_INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
_TORCH = str(Path(torch.__file__).parent)


class HostSyncs:
    """Counts what would make the host wait for a GPU while it is active, in forward and backward of its thread.

    Tensors on the CPU are all taken for the device's: what is meant to stay on the host has to be plain numbers and
    lists. Inside operators registered in Python (`torch.library.custom_op`) only methods (`tolist`) are seen, so calls
    of those of the namespaces `apart` are counted apart as such.

        with HostSyncs() as syncs:
            loss(batch).backward()
        assert not syncs.asked, syncs

    Args:
        apart: packages, and namespaces of operators, that have a path of their own for GPUs which does not ask; what
            the path for CPUs asks is counted in `asked_apart`.
    """

    def __init__(self, apart: Sequence[str] = ("mmllm_kernels",)) -> None:
        self.asked: Counter[tuple[str, str]] = Counter()
        """How often, by operator and by the place in the code that called it."""
        self.asked_apart: Counter[tuple[str, str]] = Counter()
        self.apart = tuple(apart)
        self._parts = (_Operators(self), _Functions(self))

    @property
    def count(self) -> int:
        """In all, without those apart."""
        return sum(self.asked.values())

    def note(self, what: str, is_apart: bool = False) -> None:
        """Counts one, at the innermost place outside PyTorch."""
        path, line = _caller()
        is_apart = is_apart or any(f"/{package}/" in path for package in self.apart)
        place = "/".join(path.split("/")[-3:])
        (self.asked_apart if is_apart else self.asked)[what, f"{place}:{line}"] += 1

    def __enter__(self) -> HostSyncs:
        for part in self._parts:
            part.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in reversed(self._parts):
            part.__exit__(kind, error, trace)

    def __str__(self) -> str:
        """A line for each place."""
        return "\n".join(f"{count} x {what} in {place}" for (what, place), count in self.asked.most_common())


class _Operators(TorchDispatchMode):
    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace in self.syncs.apart:
            self.syncs.note(func.name(), is_apart=True)
        elif func.namespace == "aten" and _asks(func, args, kwargs):
            self.syncs.note(func.__name__.removesuffix(".default"))
        return func(*args, **kwargs)


def _asks(func: Any, args: Any, kwargs: Any) -> bool:
    name, _, overload = func.__name__.partition(".")
    if name in ASKING or f"{name}.{overload}" in ASKING:
        return True
    if name == "repeat_interleave" and overload == "Tensor":
        return kwargs.get("output_size") is None
    if name not in _INDEXING:
        return False
    masks = [index for index in args[1] if index is not None and index.dtype in (torch.bool, torch.uint8)]
    accumulates = kwargs.get("accumulate", len(args) > 3 and args[3])
    if name != "index" and args[2].ndim == 0 and not accumulates:  # x[mask] = number is masked_fill
        return False
    return bool(masks)


class _Functions:
    """Counting wrappers of what never reaches an operator on a CPU; unlike a function mode they work in backward."""

    def __init__(self, syncs: HostSyncs) -> None:
        self.syncs = syncs
        self._before: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        for owner, names in ((Tensor, READING), (torch, MAKING)):
            for name, what in names.items():
                self._before.append((owner, name, vars(owner).get(name)))
                setattr(owner, name, self._counting(getattr(owner, name), name, what))

    def __exit__(self, *error: Any) -> None:
        for owner, name, before in self._before:
            if before is None:  # it was a base class's
                delattr(owner, name)
            else:
                setattr(owner, name, before)
        self._before = []

    def _counting(self, function: Any, name: str, what: str) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            if name in MAKING:
                asks = kwargs.get("device") is not None and not isinstance(args[0], Tensor)
            else:
                asks = name != "to" or "cpu" in args[1:] or kwargs.get("device") == "cpu"
            if asks:
                self.syncs.note(what)
            return function(*args, **kwargs)

        return counting


def _caller() -> tuple[str, int]:
    """File and line of the innermost frame that is neither PyTorch's nor this file's."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_TORCH, __file__, "<")):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno
