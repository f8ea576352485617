"""Layers whose weights are 8 or 4 bits, for inference on a CPU.

Weights alone are quantized. A product takes its input in bfloat16, accumulates in float32 and gives bfloat16, which is
scaled in float32: what is lost to bfloat16 is less than half of what is lost to 8 bits. Each row's result is the same
whatever rows are beside it. One row is six to nine times as fast as in float32 where the memory is the bound.

Shapes: M rows, K inputs of a matrix, N outputs, E matrices of one shape, G groups of a row; T tokens, D width, I inner
width, J experts a token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.embedding import Rows, joined

Result = TypeVar("Result")
WeightKind = Literal["int8", "int4"]
_INPUTS_MULTIPLE = 32
"""PyTorch's 8-bit product reads 16 inputs at once and doesn't look where they end: rows are filled up with zeros."""
_OUTPUTS_MULTIPLE = 16
"""Of the 4-bit product."""
_PACKED_OUTPUTS = 64
"""Outputs whose codes lie together in its order, at most."""
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Of a group's range, of which that one is taken that loses least: what lies beyond is clipped."""


class Matrices(nn.Module, ABC):
    """Quantized matrices [E, N, K]; a product with one of them at a time.

    Attributes:
        num_inputs: K.
        num_outputs: N.
    """

    num_inputs: int
    num_outputs: int

    @abstractmethod
    def product(self, x_MK: Tensor, index: int = 0) -> Tensor:
        """The product x · wᵀ with one matrix, float32 [M, N].

        Args:
            x_MK: bfloat16.
            index: which matrix.
        """

    @abstractmethod
    def dequantized(self) -> Tensor:
        """The matrices that products are taken with, float32 [E, N, K]."""

    @abstractmethod
    def outputs(self, begin: int, end: int) -> Matrices:
        """Those of some outputs alone; the codes' memory is shared."""


class Int8Matrices(Matrices):
    """Integers from -127 to 127, and a scale an output.

    Args:
        codes_ENK: int8; zeros may follow the inputs.
        scales_EN: float32.
        num_inputs: K.
    """

    codes: Tensor
    scales: Tensor

    def __init__(self, codes_ENK: Tensor, scales_EN: Tensor, num_inputs: int):
        super().__init__()
        self.num_inputs, self.num_outputs = num_inputs, codes_ENK.shape[1]
        self._num_filled = codes_ENK.shape[2] - num_inputs
        self.register_buffer("codes", codes_ENK)
        self.register_buffer("scales", scales_EN)
        self.register_buffer("ones", torch.ones(self.num_outputs, dtype=torch.bfloat16), persistent=False)

    @staticmethod
    def of(weights_ENK: Tensor) -> Int8Matrices:
        """Weights of any floating dtype, quantized."""
        num_inputs = weights_ENK.shape[-1]
        codes_ENK, scales_EN = int8_codes(weights_ENK)
        filled_ENK = F.pad(codes_ENK, (0, -num_inputs % _INPUTS_MULTIPLE)).contiguous()
        return Int8Matrices(filled_ENK, scales_EN, num_inputs)

    def outputs(self, begin: int, end: int) -> Int8Matrices:
        """See `Matrices`."""
        return Int8Matrices(self.codes[:, begin:end], self.scales[:, begin:end], self.num_inputs)

    def product(self, x_MK: Tensor, index: int = 0) -> Tensor:
        """See `Matrices`."""
        if self._num_filled:
            x_MK = F.pad(x_MK, (0, self._num_filled))
        # Scales would be rounded to bfloat16 there.
        return torch._weight_int8pack_mm(x_MK, self.codes[index], self.get_buffer("ones")) * self.scales[index]

    def dequantized(self) -> Tensor:
        """See `Matrices`."""
        return self.codes[..., : self.num_inputs] * self.scales[..., None]


class Int4Matrices(Matrices):
    """Integers from 0 to 15, and a scale and a zero point a group of inputs.

    Args:
        packed_ENB: the codes, in the processor's own order; outputs may be filled up.
        scales_EGN2: bfloat16, as `int4_codes` gives them.
        num_outputs: N.
    """

    packed: Tensor
    scales: Tensor

    def __init__(self, packed_ENB: Tensor, scales_EGN2: Tensor, num_outputs: int):
        super().__init__()
        self.num_inputs, self.num_outputs = 2 * packed_ENB.shape[2], num_outputs
        self.group_size = self.num_inputs // scales_EGN2.shape[1]
        self.register_buffer("packed", packed_ENB)
        self.register_buffer("scales", scales_EGN2)

    @staticmethod
    def of(weights_ENK: Tensor, group_size: int) -> Int4Matrices:
        """Weights of any floating dtype, quantized; K is a multiple of the group's size."""
        num_outputs = weights_ENK.shape[1]
        filled_ENK = F.pad(weights_ENK.float(), (0, 0, 0, -num_outputs % _OUTPUTS_MULTIPLE))
        codes_ENK, scales_EGN2 = int4_codes(filled_ENK, group_size)
        pack = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return Int4Matrices(torch.stack([pack(codes_NK, 1) for codes_NK in codes_ENK]), scales_EGN2, num_outputs)

    def outputs(self, begin: int, end: int) -> Int4Matrices:
        """See `Matrices`; both are multiples of 64, by which outputs are packed."""
        assert begin % _PACKED_OUTPUTS == end % _PACKED_OUTPUTS == 0, (begin, end)
        return Int4Matrices(self.packed[:, begin:end], self.scales[:, :, begin:end].contiguous(), end - begin)

    def product(self, x_MK: Tensor, index: int = 0) -> Tensor:
        """See `Matrices`."""
        multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
        y_MN = multiply(x_MK, self.packed[index], self.group_size, self.scales[index])
        return y_MN[:, : self.num_outputs].float()

    def dequantized(self) -> Tensor:
        """See `Matrices`. The processor's own order of the bits is undone by multiplying, without any rounding."""
        ones_KK = torch.eye(self.num_inputs, dtype=torch.bfloat16)
        multiply, plain = torch.ops.aten._weight_int4pack_mm_for_cpu, torch.zeros_like(self.scales[0])
        plain[..., 0] = 1.0  # codes less 8 come out
        codes_ENK = torch.stack([multiply(ones_KK, each, self.group_size, plain).T for each in self.packed]).float()
        scales_EGN, zeros_EGN = self.scales.float().unbind(-1)
        grouped_ENGJ = codes_ENK.unflatten(-1, (-1, self.group_size))
        weights_ENK = (grouped_ENGJ * scales_EGN.mT[..., None] + zeros_EGN.mT[..., None]).flatten(-2)
        return weights_ENK[:, : self.num_outputs]


def int8_codes(weights_ENK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [E, N, K] and scales float32 [E, N]: their product is the nearest to the weights."""
    weights_ENK = weights_ENK.float()
    scales_EN = weights_ENK.abs().amax(dim=-1) / 127
    codes_ENK = weights_ENK / scales_EN.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
    return codes_ENK.round().clamp(-127, 127).to(torch.int8), scales_EN


def int4_codes(weights_ENK: Tensor, group_size: int) -> tuple[Tensor, Tensor]:
    """Codes int32 [E, N, K], and scales and zero points, bfloat16 [E, G, N, 2].

    A weight is (code - 8) · scale + zero.
    """
    groups_ENGJ = weights_ENK.float().unflatten(-1, (-1, group_size))
    low_ENG1, high_ENG1 = groups_ENGJ.amin(-1, keepdim=True), groups_ENGJ.amax(-1, keepdim=True)
    best_error = torch.full_like(low_ENG1, torch.inf)
    codes, scales, zeros = torch.zeros_like(groups_ENGJ), torch.zeros_like(low_ENG1), torch.zeros_like(low_ENG1)
    for shrink in _SHRINKS:
        scale = ((high_ENG1 - low_ENG1) * (shrink / 15)).bfloat16().float()
        zero = ((high_ENG1 + low_ENG1) / 2 + scale / 2).bfloat16().float()
        code = (((groups_ENGJ - zero) / scale.clamp(min=torch.finfo(torch.bfloat16).tiny)).round() + 8).clamp(0, 15)
        error = ((code - 8) * scale + zero - groups_ENGJ).square().sum(-1, keepdim=True)
        is_better = error < best_error
        best_error = torch.where(is_better, error, best_error)
        codes, scales, zeros = (
            torch.where(is_better, new, old) for new, old in ((code, codes), (scale, scales), (zero, zeros))
        )
    scales_EGN2 = torch.cat([scales, zeros], dim=-1).transpose(1, 2).bfloat16().contiguous()
    return codes.flatten(-2).to(torch.int32), scales_EGN2


def pack(weights_ENK: Tensor, kind: WeightKind, group_size: int) -> Matrices:
    """Quantized matrices; in 8 bits where 4 bits' groups don't divide the inputs."""
    if kind == "int4" and weights_ENK.shape[-1] % group_size == 0:
        return Int4Matrices.of(weights_ENK, group_size)
    return Int8Matrices.of(weights_ENK)


class QuantizedLinear(nn.Module):
    """In place of `nn.Linear`.

    Args:
        matrices: one.
        bias: of the outputs.
    """

    bias: Tensor | None

    def __init__(self, matrices: Matrices, bias: Tensor | None = None):
        super().__init__()
        self.matrices = matrices
        self.in_features, self.out_features = matrices.num_inputs, matrices.num_outputs
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._whole: tuple[QuantizedLinear, int] | None = None
        """What this is a part of (`split`), not registered a second time, and its first output there."""

    def split(self, sizes: Sequence[int]) -> list[QuantizedLinear]:
        """Layers of so many outputs each, whose codes' memory is this one's."""
        layers, begin = [], 0
        for size in sizes:
            bias = None if self.bias is None else self.bias[begin : begin + size]
            layers.append(QuantizedLinear(self.matrices.outputs(begin, begin + size), bias))
            layers[-1]._whole = (self, begin)
            begin += size
        assert begin == self.out_features, (sizes, self.out_features)
        return layers

    @staticmethod
    def joined(layers: Sequence[nn.Module]) -> QuantizedLinear | None:
        """The layer that these were split from, all of them in order; None: they weren't."""
        whole, end = None, 0
        for layer in layers:
            if type(layer) is not QuantizedLinear or layer._whole is None or layer._whole[1] != end:
                return None
            if whole is not None and layer._whole[0] is not whole:
                return None
            whole, end = layer._whole[0], end + layer.out_features
        return whole if whole is not None and end == whole.out_features else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] in the dtype of the input [..., K]."""
        x_MK = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        y = self.matrices.product(x_MK.to(dtype=torch.bfloat16))
        if self.bias is not None:
            y += self.bias
        if x.dim() != 2:
            y = y.view(*x.shape[:-1], self.out_features)
        return y if x.dtype == torch.float32 else y.to(x.dtype)


class QuantizedHead(nn.Module):
    """In place of `mmllm.model.embedding.Head`, in 8 bits.

    Args:
        matrices: the rows.
        rows: the embedding's own, where these are the head's: they stay, and are what `rows` gives. None: `rows` are
            made of the quantized ones each time that they are asked for.
    """

    def __init__(self, matrices: Int8Matrices, rows: Rows | None):
        super().__init__()
        self.matrices = matrices
        self._rows = (rows,)
        """Not registered a second time."""

    @property
    def rows(self) -> Rows:
        """In id order, not quantized."""
        (rows,) = self._rows
        return self.matrices.dequantized()[0] if rows is None else rows

    @property
    def weight_VD(self) -> Tensor:
        """The rows in one matrix."""
        return joined(self.rows)

    def part(self, begin: int, end: int) -> Callable[[Tensor], Tensor]:
        """See `Head.part`."""
        return QuantizedLinear(self.matrices.outputs(begin, end))

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Rows], Result] | None = None) -> Tensor | Result:
        """Logits [..., V], or what `reduce` makes of the hidden states and rows that are not quantized."""
        if reduce is not None:
            return reduce(hidden, self.rows)
        return self.part(0, self.matrices.num_outputs)(hidden)


class QuantizedExperts(nn.Module):
    """In place of `mmllm.model.experts.Experts`.

    Args:
        gate_up: [E, 2I, D].
        down: [E, D, I].
    """

    def __init__(self, gate_up: Matrices, down: Matrices, num_experts: int):
        super().__init__()
        self.gate_up, self.down, self.num_experts = gate_up, down, num_experts

    def forward(
        self, x_TD: Tensor, gates_TJ: Tensor, experts_TJ: Tensor, shared: QuantizedExperts | None = None
    ) -> Tensor:
        """Weighted sums of the chosen experts' outputs, and of the shared experts' where they are given, [T, D]."""
        half_TD, out_TD = x_TD.to(torch.bfloat16), torch.zeros_like(x_TD, dtype=torch.float32)
        if len(x_TD) == 1:  # the same sums, in the same order
            chosen = sorted(zip(experts_TJ.tolist()[0], gates_TJ[0].float().unbind(), strict=True), key=_expert)
            for expert, gate in chosen:
                if expert >= 0:
                    out_TD += gate * self.of_one(half_TD, expert)
        else:
            for expert in range(self.num_experts):
                tokens_P, places_P = (experts_TJ == expert).nonzero(as_tuple=True)
                if len(tokens_P):
                    gates_P1 = gates_TJ[tokens_P, places_P].float()[:, None]
                    out_TD.index_add_(0, tokens_P, gates_P1 * self.of_one(half_TD[tokens_P], expert))
        if shared is not None:
            out_TD += shared.of_every_token(x_TD)
        return out_TD.to(x_TD.dtype)

    def of_every_token(self, x_TD: Tensor) -> Tensor:
        """The sum of all experts' outputs, each with gate 1."""
        half_TD, out_TD = x_TD.to(torch.bfloat16), torch.zeros_like(x_TD, dtype=torch.float32)
        for expert in range(self.num_experts):
            out_TD += self.of_one(half_TD, expert)
        return out_TD.to(x_TD.dtype)

    def of_one(self, x_TD: Tensor, expert: int) -> Tensor:
        """One expert's output, float32 [T, D], of tokens in bfloat16."""
        gate_TI, up_TI = self.gate_up.product(x_TD, expert).chunk(2, dim=-1)
        return self.down.product(F.silu(gate_TI).mul_(up_TI).to(torch.bfloat16), expert)


def _expert(chosen: tuple[int, Tensor]) -> int:
    return chosen[0]
