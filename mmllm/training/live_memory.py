"""What a training step holds in memory, and when it holds most: followed tensor by tensor, without computing any.

The step runs on tensors that have shapes and no storage (`FakeTensorMode`), so that a model of any size is followed in
seconds. What operators of this project hold while they run, which is seen from nowhere else, is told by formulas here.

Shapes: M targets, D width, V vocabulary, R rows of a chunk, T tokens, J experts a token (shared ones too), P = T·J
pairs, N inner width of an expert, G experts.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mmllm.losses.cross_entropy import GPU_CHUNK_BYTES

Part = Literal["weights", "gradients", "optimizer", "activations", "logits", "pictures"]
CPU_BLOCK_ELEMENTS = 1 << 19
"""Pre-activations that the kernel for CPUs works on at once, if no expert has more."""


class LiveMemory(TorchDispatchMode):
    """Follows the storages that are alive inside of a `with` block, each as part of something.

    Args:
        scales: what a byte of a part counts in the total: below 1 where ranks share it. Parts that are left out: 1.
        is_gpu: how this project's operators are to be taken: as on a GPU, or on a CPU.
    """

    def __init__(self, scales: Mapping[str, float] | None = None, is_gpu: bool = False) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.most: Counter[str] = Counter()
        """Of each part, when that was the most."""
        self.peak_bytes = 0.0
        """Of all together, scaled, when they were the most."""
        self._scales, self._is_gpu = scales or {}, is_gpu
        self._part: str = "activations"
        self._parts: dict[int, tuple[str, int, Any]] = {}
        """By a storage's number: its part, its bytes, and what tells of its end."""

    @contextlib.contextmanager
    def allocating(self, part: Part) -> Iterator[None]:
        """New storages are part of this."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def mark(self, tensor: Tensor, part: Part) -> None:
        """Says what a tensor's storage is part of."""
        self._follow(tensor, part)
        key = tensor.untyped_storage()._cdata
        if key in self._parts:
            before, size, reference = self._parts[key]
            self.live[before] -= size
            self.live[part] += size
            self._parts[key] = (part, size, reference)

    def restart(self) -> None:
        """Forgets the peaks; what is alive stays counted."""
        self.most, self.peak_bytes = Counter(), 0.0
        self._compare({})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator, and follows what it gives."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._follow(leaf, self._part)
        inner = _INSIDE.get(func.name().partition(".")[0])
        if inner is not None:
            self._compare(inner(args, self._is_gpu))
        return result

    def _follow(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._parts or not size:
            return
        self._parts[key] = (part, size, weakref.ref(storage, lambda _, key=key: self._forget(key)))
        self.live[part] += size
        self._compare({})

    def _forget(self, key: int) -> None:
        part, size, _ = self._parts.pop(key)
        self.live[part] -= size

    def _compare(self, inside: Mapping[str, int]) -> None:
        """Keeps what is alive, with what an operator holds besides, where it is the most so far."""
        total = 0.0
        for part in {*self.live, *inside}:
            size = self.live[part] + inside.get(part, 0)
            self.most[part] = max(self.most[part], size)
            total += self._scales.get(part, 1.0) * size
        self.peak_bytes = max(self.peak_bytes, total)


# --- what operators hold while they run -------------------------------------------------------------------------------


def _inside_cross_entropy(args: Any, is_gpu: bool) -> dict[str, int]:
    """`mmllm.losses.chunked.weighted`: a chunk's logits and probabilities, and casts of what it is given."""
    hidden_MD, weight_VD, added_AD, *_, dtype, chunk_bytes, hidden_grad, weight_grad, added_grad = args
    chunk_bytes = GPU_CHUNK_BYTES if is_gpu else chunk_bytes
    num_targets, num_rows, width = len(hidden_MD), len(weight_VD) + len(added_AD), weight_VD.shape[1]
    wide = torch.promote_types(dtype, torch.float32).itemsize
    narrow = dtype.itemsize
    chunk_rows = -(-num_targets // max(1, -(-num_targets // max(1, chunk_bytes // max(1, num_rows * wide)))))
    sizes = chunk_rows * num_rows * (narrow + wide)
    if narrow < wide:
        sizes += chunk_rows * num_rows * wide  # softmax casts what it is given
    if weight_VD.dtype != dtype:
        sizes += num_rows * width * narrow
    if hidden_MD.dtype != dtype:
        sizes += num_targets * width * narrow
    if hidden_grad and hidden_MD.dtype.itemsize != wide:
        sizes += num_targets * width * wide
    if weight_VD.dtype.itemsize != wide:
        trained_rows = len(weight_VD) * weight_grad + len(added_AD) * added_grad
        sizes += trained_rows * width * wide
    return {"logits": sizes}


def _expert_shapes(x_TD: Tensor, gates_TK: Tensor, w_gate_up: Tensor, shared: Tensor) -> tuple[int, int, int, int]:
    """P, D, N, and the rows that the kernel for CPUs works on at once."""
    num_groups = len(w_gate_up) + len(shared)
    num_pairs = len(x_TD) * (gates_TK.shape[1] + len(shared))
    inner = w_gate_up.shape[1] // 2
    block_rows = min(num_pairs, max(CPU_BLOCK_ELEMENTS // (2 * inner), -(-num_pairs // num_groups)))
    return num_pairs, x_TD.shape[1], inner, block_rows


def _inside_experts(args: Any, is_gpu: bool) -> dict[str, int]:
    """`mmllm_kernels.experts`: each pair's output, and its activations."""
    x_TD, gates_TK, _, w_gate_up, _, shared, _, save_h, _ = args
    num_pairs, width, inner, rows = _expert_shapes(x_TD, gates_TK, w_gate_up, shared)
    size = x_TD.dtype.itemsize
    if is_gpu:
        return {"activations": num_pairs * (width + inner) * size}
    inside = num_pairs * width * size
    if size < 4:
        inside += num_pairs * width * 4
    return {"activations": inside + rows * (width + inner * (2 if save_h else 4)) * size}


def _inside_experts_backward(args: Any, is_gpu: bool) -> dict[str, int]:
    """`mmllm_kernels.experts_backward`: the gradients of each pair."""
    _, x_TD, gates_TK, w_gate_up, _, shared, *_, h_P2N, _, _ = args
    num_pairs, width, inner, rows = _expert_shapes(x_TD, gates_TK, w_gate_up, shared)
    size = x_TD.dtype.itemsize
    if is_gpu:
        again = 0 if len(h_P2N) else 2 * inner
        return {"activations": num_pairs * (width + 3 * inner + again) * size}
    inside = num_pairs * width * size
    if size < 4:
        inside += num_pairs * width * 4
    return {"activations": inside + rows * (2 * width + 6 * inner) * size}


_INSIDE = {
    "mmllm::weighted_cross_entropy": _inside_cross_entropy,
    "mmllm_kernels::experts": _inside_experts,
    "mmllm_kernels::experts_backward": _inside_experts_backward,
}
