"""Products with matrices that don't change, by what is quickest for the number of rows.

On a CPU in float32 large products are oneDNN's, which wants the matrix in an order of its own, a copy, and then takes
half of MKL's time on AMD's processors. Where the copy is not worth its memory, one row's product is shared out among
the threads, which PyTorch leaves to one. Everything else is `F.linear`.

Shapes: N rows, D width, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.inference.quantized_layers import QuantizedLinear
from mmllm_kernels.matvec import matvec

log = logging.getLogger(__name__)

SMALL_ELEMENTS = 1 << 20
"""Weights up to which a copy of a matrix, joined with others or reordered, is always worth its memory."""
_SHARED_ELEMENTS = 1 << 18
"""Weights from which one row's product is worth more than one thread."""
_PACKED_WORK = 1 << 19
"""Rows times weights from which oneDNN is quicker: a call takes it 10 µs, MKL 2."""


class Product:
    """The product with one matrix, and a bias added.

    Args:
        weight_FD: is kept, but for large ones that are copied.
        bias_F: None: none.
        copied_elements: weights up to which there is a copy in oneDNN's order.
    """

    def __init__(self, weight_FD: Tensor, bias_F: Tensor | None = None, copied_elements: int = SMALL_ELEMENTS):
        weight_FD, self._size = weight_FD.detach(), weight_FD.numel()
        self._bias_F = None if bias_F is None else bias_F.detach()
        is_plain = weight_FD.is_cpu and weight_FD.dtype == torch.float32
        self._is_shared = is_plain and self._size >= _SHARED_ELEMENTS
        self._packed = packed(weight_FD) if is_plain and self._size <= copied_elements else None
        self._weight_FD = self._weight_DF = None
        if self._packed is None or self._size < _PACKED_WORK:
            self._weight_FD, self._weight_DF = weight_FD, weight_FD.t()

    @property
    def is_packed(self) -> bool:
        """Whether there is a copy in oneDNN's order."""
        return self._packed is not None

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, F]; memory of its own, in which a caller may write."""
        if self._weight_FD is None or (self._packed is not None and len(x_ND) * self._size >= _PACKED_WORK):
            return torch.ops.mkldnn._linear_pointwise(x_ND, self._packed, self._bias_F, "none", [], "")
        if self._is_shared and len(x_ND) == 1 and torch.get_num_threads() > 1:
            out_1F = matvec(self._weight_FD, x_ND[0]).unsqueeze(0)
            return out_1F if self._bias_F is None else out_1F.add_(self._bias_F)
        return F.linear(x_ND, self._weight_FD, self._bias_F)

    def add_to(self, residual_NF: Tensor, x_ND: Tensor) -> Tensor:
        """The product and the residual stream."""
        if self._weight_DF is None or self._bias_F is not None or len(x_ND) * self._size >= _SHARED_ELEMENTS:
            return residual_NF + self(x_ND)
        return torch.addmm(residual_NF, x_ND, self._weight_DF)


def packed(weight_FD: Tensor) -> Tensor | None:
    """In oneDNN's order, for any number of rows; None: this build of PyTorch can't.

    The operators are those of `torch.compile`'s frozen graphs, not PyTorch's public API: they are tried once.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    try:
        packed_FD = torch.ops.mkldnn._reorder_linear_weight(weight_FD.contiguous(), 32)
        out_1F = torch.ops.mkldnn._linear_pointwise(weight_FD[:1].contiguous(), packed_FD, None, "none", [], "")
    except (AttributeError, RuntimeError) as error:
        log.debug("no products by oneDNN: %s", error)
        return None
    return packed_FD if out_1F.shape == (1, len(weight_FD)) else None


class FastLinear:
    """A linear layer, or several of one input whose outputs lie side by side.

    Weights are read once. What isn't a plain layer (an adapter around it, quantized weights, hooks) is called as it is.

    Args:
        modules: the layers.
        copied_elements: weights up to which matrices are copied, to join and to reorder them.
    """

    def __init__(self, *modules: nn.Linear, copied_elements: int = SMALL_ELEMENTS):
        self._modules: tuple[nn.Module, ...] = modules
        self._parts: tuple[FastLinear, ...] = ()
        self._product: Product | None = None
        is_plain = all(map(_is_plain, modules))
        if is_plain and (len(modules) == 1 or sum(module.weight.numel() for module in modules) <= copied_elements):
            biases = [module.bias for module in modules if module.bias is not None]
            weight_FD = _joined([module.weight for module in modules])
            self._product = Product(weight_FD, _joined(biases) if biases else None, copied_elements)
        elif (whole := QuantizedLinear.joined(modules)) is not None:
            self._modules = (whole,)
        elif len(modules) > 1:
            self._parts = tuple(FastLinear(module, copied_elements=copied_elements) for module in modules)

    def __call__(self, x_ND: Tensor) -> Tensor:
        """[N, F]; memory of its own, in which a caller may write."""
        if self._product is not None:
            return self._product(x_ND)
        if self._parts:
            return torch.cat([part(x_ND) for part in self._parts], dim=-1)
        return self._modules[0](x_ND)

    def add_to(self, residual_NF: Tensor, x_ND: Tensor) -> Tensor:
        """The output and the residual stream."""
        return residual_NF + self(x_ND) if self._product is None else self._product.add_to(residual_NF, x_ND)


def _is_plain(module: nn.Linear) -> bool:
    """Whether a layer is a product with its weight and no more; adapters and quantization come as other types."""
    has_hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and not has_hooks


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].detach() if len(tensors) == 1 else torch.cat([tensor.detach() for tensor in tensors])
