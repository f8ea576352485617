"""Sound decoded piece by piece while its codes are being made: together the pieces are what `decode` gives.

The sound of a frame depends on a few frames before and behind it. A piece is decoded with so many around it, whose own
sound is dropped; what reaches further (an LSTM's state, a pulse train's phase, a place in the noise) is carried from
piece to piece. Pieces then differ from the whole by the last bits of float32, and need no cross-fade.

Shapes: K codebooks, F frames, D latent width, C channels, T samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from encodec.modules import SConv1d, SConvTranspose1d, SEANetDecoder
from torch import Tensor, nn

from mmllm_tokenizers.source_filter import PieceStart, SourceFilterDecoder

Latents = Callable[[Tensor], Tensor]
"""Latents [1, D, F] of codes [K, F]."""


class DecoderStream(ABC):
    """A sound's codes, of which more and more are known, and how far it is decoded.

    Attributes:
        is_streamable: False: nothing is decoded before the last code is known.
        lookahead: frames behind a piece that must be known, unless the sound ends before.
        min_frames: so many frames must be known before anything is decoded, unless the sound is shorter.
    """

    is_streamable = True

    def __init__(self, lookahead: int, min_frames: int = 0):
        self.lookahead, self.min_frames = lookahead, min_frames
        self.num_decoded = 0
        self._codes_KF: Tensor | None = None

    @property
    def num_frames(self) -> int:
        """Frames that are known."""
        return 0 if self._codes_KF is None else self._codes_KF.shape[1]

    def push(self, codes_KF: Tensor) -> None:
        """More codes."""
        known = [] if self._codes_KF is None else [self._codes_KF]
        self._codes_KF = torch.cat([*known, codes_KF.long()], dim=1)

    def is_ready(self, stop: int) -> bool:
        """Whether enough codes are known to decode up to a frame of a sound that goes on."""
        return self.is_streamable and self.num_frames >= max(stop + self.lookahead, self.min_frames)

    @torch.inference_mode()
    def decode_to(self, stop: int) -> Tensor:
        """The sound float32 [T], or [channels, T], of the frames from the last piece's end up to one.

        Codes further behind it than `lookahead` are not looked at: what a piece sounds like does not depend on how
        many were known.

        Args:
            stop: a frame for which `is_ready`, or, when no code will come any more, `num_frames` at most.
        """
        assert self.num_decoded <= stop <= self.num_frames, (self.num_decoded, stop, self.num_frames)
        if stop == self.num_decoded or self._codes_KF is None:
            return torch.zeros(0)
        wave = self._decode(self._codes_KF[:, : max(stop + self.lookahead, self.min_frames)], stop)
        self.num_decoded = stop
        return wave.clone()

    @abstractmethod
    def _decode(self, codes_KF: Tensor, stop: int) -> Tensor:
        """Of the frames from `num_decoded` up to one, by these codes."""


class WholeDecoderStream(DecoderStream):
    """Of a decoder that must see all.

    Args:
        decode: the sound of all codes.
    """

    is_streamable = False

    def __init__(self, decode: Callable[[Tensor], Tensor]):
        super().__init__(0)
        self._decode_whole = decode

    def _decode(self, codes_KF: Tensor, stop: int) -> Tensor:
        assert stop == self.num_frames and not self.num_decoded, "it is decoded at once"
        return self._decode_whole(codes_KF)


class SourceFilterStream(DecoderStream):
    """Of pulses and noise through filters.

    Args:
        decoder: in evaluation mode.
        latents: of codes.
    """

    def __init__(self, decoder: SourceFilterDecoder, latents: Latents):
        self._before, self._after = decoder.filter_reach
        super().__init__(decoder.network_reach + self._after)
        self._decoder, self._latents = decoder, latents
        self._cycles = 0.0

    def _decode(self, codes_KF: Tensor, stop: int) -> Tensor:
        hop = self._decoder.hop_samples
        first = max(0, self.num_decoded - self._before)
        seen = max(0, first - self._decoder.network_reach)
        begin, end = ((frame - first) * hop for frame in (self.num_decoded, stop))
        start, inner = PieceStart(first * hop, begin, self._cycles), slice(first - seen, stop + self._after - seen)
        wave_1T, hz_1T = self._decoder.piece(self._latents(codes_KF[:, seen:]).float(), start, inner)
        cycles = (hz_1T[0, begin:end].double() / self._decoder.sample_rate).sum()
        self._cycles = (self._cycles + float(cycles)) % 1.0
        return wave_1T[0, begin:end]


class SEANetStream(DecoderStream):
    """Of EnCodec's convolutions.

    A convolution over frames comes first, then, in some, an LSTM, whose state is carried, then those that make samples.

    Args:
        decoder: in evaluation mode, without normalization over time.
        latents: of codes.
        has_lstm: whether there is one.
    """

    def __init__(self, decoder: SEANetDecoder, latents: Latents, has_lstm: bool):
        layers = list(decoder.model)
        self._stem: Any = layers[0]
        self._lstm: Any = layers[1] if has_lstm else None
        self._rest = nn.Sequential(*layers[1 + has_lstm :])
        self._latents, self._hop = latents, math.prod(decoder.ratios)
        self._stem_before, stem_after = _reach(self._stem, 1)
        self._rest_before, self._rest_after = _reach(self._rest, self._hop)
        # Where its edge is padded by reflection, the first frame mirrors frames behind it.
        is_mirrored = self._stem.pad_mode == "reflect"
        super().__init__(stem_after + self._rest_after, self._stem_before + 1 if is_mirrored else 0)
        self._hidden_1CF: Tensor | None = None
        """What the LSTM gave, of the frames from `num_decoded - before` on."""
        self._num_hidden = 0
        self._state: tuple[Tensor, Tensor] | None = None

    def _decode(self, codes_KF: Tensor, stop: int) -> Tensor:
        self._hide(codes_KF, min(stop + self._rest_after, codes_KF.shape[1]))
        assert self._hidden_1CF is not None
        first = max(0, self.num_decoded - self._rest_before)
        self._hidden_1CF = self._hidden_1CF[:, :, self._hidden_1CF.shape[2] - (self._num_hidden - first) :]
        wave_1CT = self._rest(self._hidden_1CF)
        return wave_1CT[0, 0, (self.num_decoded - first) * self._hop : (stop - first) * self._hop]

    def _hide(self, codes_KF: Tensor, stop: int) -> None:
        """The layers before those that make samples, up to a frame."""
        if stop == self._num_hidden:
            return
        first = max(0, self._num_hidden - self._stem_before)
        hidden_1CF = self._stem(self._latents(codes_KF[:, first:]))[:, :, self._num_hidden - first : stop - first]
        if self._lstm is not None:
            x_F1C = hidden_1CF.permute(2, 0, 1)
            y_F1C, self._state = self._lstm.lstm(x_F1C, self._state)
            hidden_1CF = (y_F1C + x_F1C if self._lstm.skip else y_F1C).permute(1, 2, 0)
        known = [] if self._hidden_1CF is None else [self._hidden_1CF]
        self._hidden_1CF = torch.cat([*known, hidden_1CF], dim=2)
        self._num_hidden = stop


def _reach(module: nn.Module, num_samples: int) -> tuple[int, int]:
    """Inputs before and after one that its `num_samples` outputs depend on."""
    convolutions = [part for part in module.modules() if isinstance(part, SConv1d | SConvTranspose1d)]
    low, high = 0, num_samples - 1
    for convolution in reversed(convolutions):
        conv: Any
        if isinstance(convolution, SConv1d):
            conv = convolution.conv.conv
            reach = (conv.kernel_size[0] - 1) * conv.dilation[0]
            left = reach if convolution.causal else reach - reach // 2
            low, high = low - left, high - left + reach
        else:
            conv = convolution.convtr.convtr
            kernel, stride = conv.kernel_size[0], conv.stride[0]
            cut = kernel - stride
            left = cut - (math.ceil(cut * convolution.trim_right_ratio) if convolution.causal else cut // 2)
            low, high = math.ceil((low + left - kernel + 1) / stride), (high + left) // stride
    return -low, high
