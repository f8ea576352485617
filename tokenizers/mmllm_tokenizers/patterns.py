"""Codebook patterns: how the K codes of a frame are laid over the positions of a stream.

Pure functions with exact inverses. Shapes: K codebooks, F frames, P positions.

    parallel   P = F           position t holds every codebook's code of frame t
    delay      P = F + K - 1   codebook k is shifted right by k; a filler code stands where there is no frame
    flatten    P = F * K       one stream; code c of codebook k becomes c + k * codebook_size

Source: MusicGen (https://arxiv.org/abs/2306.05284), section 2.2. Here position 0 already holds a code: the
model's `<|audio_start|>` plays the part of their extra first step.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Pattern = Literal["parallel", "delay", "flatten"]
PATTERNS: tuple[str, ...] = get_args(Pattern)


def num_positions(num_frames: int, num_codebooks: int, pattern: str) -> int:
    """How many positions a sound of `num_frames` frames takes.

    Raises:
        ValueError: the pattern is unknown.
    """
    match pattern:
        case "parallel":
            return num_frames
        case "delay":
            return num_frames + num_codebooks - 1 if num_frames else 0
        case "flatten":
            return num_frames * num_codebooks
    raise ValueError(f"pattern is {pattern!r}; it must be one of {', '.join(PATTERNS)}")


def apply_pattern(codes_KF: Tensor, pattern: str, filler: int) -> Tensor:
    """Lays codes over positions.

    Args:
        codes_KF: integer codes, each in `[0, codebook_size)`.
        pattern: "parallel", "delay" or "flatten".
        filler: the first code that is no unit: the codebook size, of flatten K times the codebook size
            (`Vocabulary.filler` of the vocabulary that `TokenizerFolder` makes, in all cases).

    Returns:
        [K, P] for parallel and delay, [1, P] for flatten; same dtype and device.

    Raises:
        ValueError: the codes have the wrong shape or range, or the pattern is unknown.
    """
    if codes_KF.dim() != 2:
        raise ValueError(f"codes have shape {list(codes_KF.shape)}; they must be [codebooks, frames]")
    num_codebooks, num_frames = codes_KF.shape
    size = _codebook_size(pattern, filler, num_codebooks)
    if codes_KF.numel() and not 0 <= int(codes_KF.min()) <= int(codes_KF.max()) < size:
        raise ValueError(
            f"codes lie in [{int(codes_KF.min())}, {int(codes_KF.max())}]; with pattern {pattern!r} and filler "
            f"{filler} they must lie in [0, {size - 1}]"
        )
    length = num_positions(num_frames, num_codebooks, pattern)
    if pattern == "parallel":
        return codes_KF.clone()
    if pattern == "flatten":
        offsets_K1 = torch.arange(num_codebooks, device=codes_KF.device, dtype=codes_KF.dtype)[:, None] * size
        return (codes_KF + offsets_K1).T.reshape(1, length)
    patterned_KP = codes_KF.new_full((num_codebooks, length), filler)
    if num_frames:
        for codebook in range(num_codebooks):
            patterned_KP[codebook, codebook : codebook + num_frames] = codes_KF[codebook]
    return patterned_KP


def invert_pattern(patterned_KP: Tensor, pattern: str, filler: int, num_codebooks: int) -> Tensor:
    """The codes that `apply_pattern` laid out; its exact inverse.

    A stream that was cut off (generation that ended early) loses its incomplete last frames. Codes
    that stand in a wrong place (a filler within a delayed sound, a unit of another codebook in a flat
    stream) are an error, since no sound has them: generation must be constrained.

    Args:
        patterned_KP: [K, P], or [1, P] for flatten.
        pattern: "parallel", "delay" or "flatten".
        filler: as given to `apply_pattern`.
        num_codebooks: K.

    Returns:
        Codes [K, F].

    Raises:
        ValueError: wrong shape, unknown pattern, or a code in a place where it cannot stand.
    """
    num_rows = 1 if pattern == "flatten" else num_codebooks
    if patterned_KP.dim() != 2 or patterned_KP.shape[0] != num_rows:
        raise ValueError(
            f"patterned codes have shape {list(patterned_KP.shape)}; pattern {pattern!r} with {num_codebooks} "
            f"codebooks needs [{num_rows}, positions]"
        )
    size = _codebook_size(pattern, filler, num_codebooks)
    length = patterned_KP.shape[1]
    if pattern == "parallel":
        codes_KF = patterned_KP.clone()
    elif pattern == "flatten":
        num_frames = length // num_codebooks
        codes_KF = patterned_KP[0, : num_frames * num_codebooks].reshape(num_frames, num_codebooks).T
        codes_KF = codes_KF - torch.arange(num_codebooks, device=codes_KF.device, dtype=codes_KF.dtype)[:, None] * size
    else:
        num_frames = max(0, length - num_codebooks + 1)
        codes_KF = torch.stack([patterned_KP[k, k : k + num_frames] for k in range(num_codebooks)])
    bad_KF = (codes_KF < 0) | (codes_KF >= size)
    if bool(bad_KF.any()):
        codebook, frame = bad_KF.nonzero()[0].tolist()
        raise ValueError(
            f"frame {frame} of codebook {codebook} holds no unit of this codebook (of {size} units); with pattern "
            f"{pattern!r} generation must allow only each codebook's own units there"
        )
    return codes_KF.contiguous()


def _codebook_size(pattern: str, filler: int, num_codebooks: int) -> int:
    """Units in one codebook, from the filler that stands after the last unit."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}; it must be one of {', '.join(PATTERNS)}")
    if num_codebooks < 1:
        raise ValueError(f"num_codebooks is {num_codebooks}; a sound has at least one codebook")
    if pattern != "flatten":
        return filler
    if filler % num_codebooks:
        raise ValueError(
            f"filler is {filler} with {num_codebooks} codebooks; of a flat stream it must be "
            f"codebooks x codebook size, a multiple of {num_codebooks}"
        )
    return filler // num_codebooks
