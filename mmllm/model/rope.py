"""Rotary positions (arXiv 2104.09864), and how they are stretched to contexts longer than those of training.

Shapes: N tokens, C channels a head.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RopeScaling:
    """A change of the rotary frequencies; keys and formulas are those of transformers' `rope_parameters`.

    Attributes:
        rope_type: "linear" divides positions by `factor` (arXiv 2306.15595); "llama3" divides low frequencies alone,
            with a smooth passage (Llama 3.1); "yarn" interpolates by frequency and sharpens attention
            (arXiv 2309.00071).
        factor: how many times longer than `original_max_position_embeddings`.
        original_max_position_embeddings: the context of training; of llama3 and yarn.
        low_freq_factor: llama3: wavelengths above the original context divided by this are divided by `factor`.
        high_freq_factor: llama3: wavelengths below the original context divided by this stay.
        beta_fast: yarn: rotations over the original context from which frequencies stay.
        beta_slow: yarn: rotations below which they are divided by `factor`.
        attention_factor: yarn: by which cosines and sines are multiplied; None: 0.1 ln(factor) + 1.
        truncate: yarn: the channels between which frequencies pass over are rounded to whole ones.
    """

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling.rope_type is {self.rope_type!r}; choose linear, llama3 or yarn")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if self.attention_factor is not None and not 0 < self.attention_factor < math.inf:
            raise ValueError(
                f"rope_scaling.attention_factor is {self.attention_factor}; it must be positive, or left out"
            )
        if self.rope_type != "linear" and not (self.original_max_position_embeddings or 0) > 0:
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings is {self.original_max_position_embeddings}; rope_type "
                f"{self.rope_type!r} needs the context that the model was trained with"
            )
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0:
            raise ValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                f"the second must be larger, both above 0"
            )
        if self.rope_type == "yarn" and not self.beta_fast > self.beta_slow > 0:
            raise ValueError(
                f"rope_scaling.beta_fast is {self.beta_fast} and beta_slow {self.beta_slow}; the first must be larger, "
                f"both above 0"
            )


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """Angle a position of each pair of channels, float32 [C/2], and the factor of cosines and sines.

    Args:
        head_dim: C, or how many of its first channels are turned.
        theta: base of the angles.
        scaling: None: θ^(−2i/C) as they are.
        device: where they go.
    """
    if not head_dim:
        return torch.empty(0, device=device), 1.0
    exponents_C = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    frequencies_C = 1.0 / theta**exponents_C
    if scaling is None:
        return frequencies_C, 1.0
    match scaling.rope_type:
        case "linear":
            return frequencies_C / scaling.factor, 1.0
        case "llama3":
            return _llama3(frequencies_C, scaling), 1.0
        case "yarn":
            attention_factor = scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1.0
            return _yarn(frequencies_C, head_dim, theta, scaling), attention_factor


def rotary(
    positions_N: Tensor, head_dim: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [N, 1, C/2] of the rotary angles, computed in float32.

    Args:
        positions_N: of each token in its document.
        head_dim: C, or how many of its first channels are turned; 0: none, and the result is empty.
        theta: base of the angles.
        dtype: of the result.
        scaling: of the frequencies.
    """
    frequencies_C, factor = inverse_frequencies(head_dim, theta, scaling, positions_N.device)
    angles_NC = positions_N[:, None].float() * frequencies_C
    cos_NC, sin_NC = angles_NC.cos(), angles_NC.sin()
    if factor != 1.0:
        cos_NC, sin_NC = cos_NC * factor, sin_NC * factor
    return cos_NC.to(dtype)[:, None], sin_NC.to(dtype)[:, None]


def _llama3(frequencies_C: Tensor, scaling: RopeScaling) -> Tensor:
    assert scaling.original_max_position_embeddings is not None
    rotations_C = scaling.original_max_position_embeddings * frequencies_C / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_C = ((rotations_C - low) / (high - low)).clamp(0, 1)
    return frequencies_C * kept_C + frequencies_C / scaling.factor * (1 - kept_C)


def _yarn(frequencies_C: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    assert scaling.original_max_position_embeddings is not None

    def channel(num_rotations: float) -> float:
        """The pair of channels that turns so often over the original context."""
        wavelength = scaling.original_max_position_embeddings / (num_rotations * 2 * math.pi)  # pyright: ignore
        return head_dim * math.log(wavelength) / (2 * math.log(theta))

    first, last = channel(scaling.beta_fast), channel(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    places_C = torch.arange(len(frequencies_C), device=frequencies_C.device, dtype=torch.float32)
    divided_C = ((places_C - first) / ((last - first) or 0.001)).clamp(0, 1)  # below 0 where contexts are tiny
    return frequencies_C / scaling.factor * divided_C + frequencies_C * (1 - divided_C)
