"""A decoder that speaks as a voice does: pulses and noise, filtered by the spectrum that the codes hold.

Shapes: N clips, C channels, F frames, M mel bands, W bins of a spectrum, B blocks (`BLOCKS_A_FRAME` a frame),
T samples, H hidden width, S samples of a window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm_tokenizers.codec_config import CodecConfig
from mmllm_tokenizers.frame_features import FrameFeatures, FrameLoudness
from mmllm_tokenizers.spectrum import FrameSpectrum

BLOCKS_A_FRAME = 4
"""Filters a frame: they change every 5 ms of a frame of 20."""
_RAYLEIGH = math.sqrt(math.pi) / 2
"""Mean magnitude of noise's spectrum over its root mean square."""
_VOICING_SLOPE = 6.0
"""Of the odds of pulses against noise: full voicing is 95% pulses."""
_MAX_PITCH_CHANGE = 0.5
"""Octaves that the network may move the pitch which the codes hold."""
_MAX_GAIN = 2.0
"""Logarithm of the most by which a frame is made louder or quieter in the end."""
_SMOOTHING = (1.0, 2.0, 3.0, 2.0, 1.0)
"""Over frames, of the pitch: its quantization error changes from frame to frame, a voice hardly does."""
_NOISE_SAMPLES = 1 << 16
_PIECE_BLOCKS = 4096
"""Blocks that are filtered at once: the memory of 20 seconds of frames of 20 ms."""


@dataclass(frozen=True)
class PieceStart:
    """Where a piece of a longer sound begins: pulses and noise go on from there.

    Attributes:
        num_before: samples before the piece.
        anchor: the sample of the piece that `cycles` is told of. What goes before it is context.
        cycles: of the pulses, up to there.
    """

    num_before: int = 0
    anchor: int = 0
    cycles: float = 0.0


class SourceFilterDecoder(nn.Module):
    """Latents of `FrameFeatures` (quantized) to a wave.

    A pulse train of the codes' pitch and white noise, always the same, pass through filters of minimum phase whose
    magnitudes are the codes' bands; voicing says how much of each; at last every frame is brought to the codes'
    loudness. All of that works untrained. A small network of convolutions over the frames adds what the bands do not
    say: how the spectrum goes within a frame, what of it is noise, where the pitch was quantized wrongly. Its last
    layer begins at zero.

    Sources: the source-filter model (Fant 1960); neural source-filter models (https://arxiv.org/abs/1904.12088) and
    DDSP (https://arxiv.org/abs/2001.04643), which differ in that there networks learn the whole filter; ConvNeXt
    blocks as in Vocos (https://arxiv.org/abs/2306.00814).

    The wave of a frame depends on a few frames before and after it: those of the convolutions, the
    interpolations, the filters and the last gain. Beyond that, only the pulses' phase does, and the noise's place.

    Args:
        config: of the codec; `decoder` is "source_filter".
    """

    def __init__(self, config: CodecConfig):
        super().__init__()
        self.sample_rate, self.hop_samples = config.sample_rate, config.hop_samples
        self.num_mels, width = config.num_bands, config.decoder_hidden_size
        self.step = config.hop_samples // BLOCKS_A_FRAME
        spectrum = FrameSpectrum(config.sample_rate, config.hop_samples, config.num_bands)
        self.num_fft, filters_MW = spectrum.num_fft, spectrum.get_buffer("filters_MW")
        self.loudness = FrameLoudness(config.hop_samples)
        area_M = filters_MW.sum(dim=1)
        window_energy = 0.375 * len(spectrum.get_buffer("hann"))  # of a periodic Hann window
        buffers = {
            "log_area_M1": area_M.log()[:, None],
            "bins_WM": _interpolation(filters_MW),
            "window_S": torch.hann_window(config.hop_samples),
            "noise_T": torch.randn(_NOISE_SAMPLES, generator=torch.Generator().manual_seed(0)),
            "smoothing": torch.tensor(_SMOOTHING)[None, None] / sum(_SMOOTHING),
        }
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer, persistent=False)
        self.noise_gain = -math.log(_RAYLEIGH * math.sqrt(window_energy))
        self.stem = nn.Conv1d(config.dimension, width, 5, padding=2)
        self.layers = nn.ModuleList(FrameBlock(width) for _ in range(config.decoder_num_layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 2 * self.num_mels * BLOCKS_A_FRAME + 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    @property
    def network_reach(self) -> int:
        """Frames before and after one that the network takes into account, and the smoothing of its pitch."""
        convolutions = self.stem.kernel_size[0] // 2 + len(self.layers) * (FrameBlock.KERNEL // 2)
        return max(convolutions, len(_SMOOTHING) // 2)

    @property
    def filter_reach(self) -> tuple[int, int]:
        """Frames before and after one whose pulses, noise and filters its wave depends on.

        The last gain takes the wave of a frame and a half more, either way; that takes blocks whose impulse responses
        reach into it, and pitch and bands are interpolated between the frames around these.
        """
        return 2 + math.ceil(self.num_fft / self.hop_samples), 3

    def forward(self, latents_NCF: Tensor) -> tuple[Tensor, Tensor]:
        """The wave [N, F * hop], and the pitch that it has, log2 Hz [N, F]."""
        wave_NT, pitch_NF, _ = self._spoken(latents_NCF, PieceStart(), slice(None))
        return wave_NT, pitch_NF

    def piece(self, latents_NCF: Tensor, start: PieceStart, inner: slice) -> tuple[Tensor, Tensor]:
        """Of a longer sound the wave of some frames, [N, frames * hop], and its frequency in Hz at each sample.

        Args:
            latents_NCF: of these frames, and of others around them that the network takes into account.
            start: of these frames' wave.
            inner: which these frames are.
        """
        wave_NT, _, hz_NT = self._spoken(latents_NCF, start, inner)
        return wave_NT, hz_NT

    def _spoken(self, latents_NCF: Tensor, start: PieceStart, inner: slice) -> tuple[Tensor, Tensor, Tensor]:
        frames_NFC = self._network(latents_NCF)
        pitch_NF = self._pitch(latents_NCF, frames_NFC[..., -2])[:, inner]
        latents_NCF, frames_NFC = latents_NCF[..., inner], frames_NFC[:, inner]
        voicing_NF = latents_NCF[:, self.num_mels + 1]
        odds_N1B = _finer((_VOICING_SLOPE * (voicing_NF - 0.5) + frames_NFC[..., -1])[:, None], BLOCKS_A_FRAME)
        changes = frames_NFC[..., :-2].unflatten(-1, (2, BLOCKS_A_FRAME, self.num_mels))
        changes_2NMB = changes.permute(2, 0, 4, 1, 3).flatten(-2)
        # A band is its filter's area times the mean magnitude of the bins below it.
        log_mel_NMF = latents_NCF[:, : self.num_mels] * FrameSpectrum.STD + FrameSpectrum.MEAN
        magnitude_NMB = _finer(log_mel_NMF - self.get_buffer("log_area_M1"), BLOCKS_A_FRAME)
        # Pitch is learnt from its own loss: the gradient of a spectrum by a sine's frequency points anywhere.
        hz_NT = 2 ** _finer(pitch_NF.detach()[:, None], self.hop_samples)[:, 0]
        hz_N1B = hz_NT[:, None, self.step // 2 :: self.step]
        # A cosine of amplitude A every f Hz has, in any window, a mean magnitude of A * rate / 2 / f.
        pulse_gain_N1B = (2 * hz_N1B / self.sample_rate).log() + 0.5 * F.logsigmoid(odds_N1B)
        noise_gain_N1B = self.noise_gain + 0.5 * F.logsigmoid(-odds_N1B)
        with torch.no_grad():
            pulses_NT = pulse_train(hz_NT, self.sample_rate, start.anchor, start.cycles)
            noise_NT = self._noise(hz_NT, start.num_before)
        wave_NT = self._filtered(
            (pulses_NT, noise_NT),
            (magnitude_NMB + changes_2NMB[0] + pulse_gain_N1B, magnitude_NMB + changes_2NMB[1] + noise_gain_N1B),
        )
        return self._with_loudness(wave_NT, latents_NCF[:, self.num_mels + 2]), pitch_NF, hz_NT

    def _network(self, latents_NCF: Tensor) -> Tensor:
        """[N, F, 2 * blocks * M + 2]: changes of the pulses' and the noise's bands, of pitch and of voicing."""
        x_NHF = self.stem(latents_NCF)
        for layer in self.layers:
            x_NHF = layer(x_NHF)
        return self.head(self.norm(x_NHF.transpose(1, 2)))

    def _pitch(self, latents_NCF: Tensor, change_NF: Tensor) -> Tensor:
        """Log2 Hz: the mean over neighbouring frames, weighted by their voicing squared."""
        product_N1F, voicing_N1F = latents_NCF[:, self.num_mels : self.num_mels + 2].split(1, dim=1)
        voicing_N1F = voicing_N1F.clamp(min=0.02)
        both_N2F = torch.cat([voicing_N1F * product_N1F, voicing_N1F.square()], dim=1)
        side = len(_SMOOTHING) // 2
        padded_NF = F.pad(both_N2F, (side, side), mode="replicate").flatten(0, 1)[:, None]
        sums_NF, weights_NF = F.conv1d(padded_NF, self.get_buffer("smoothing"))[:, 0].unflatten(0, (-1, 2)).unbind(1)
        pitch_NF = FrameFeatures.PITCH_MEAN + sums_NF / weights_NF / FrameFeatures.PITCH_SCALE
        lowest, highest = math.log2(50.0), math.log2(min(600.0, self.sample_rate / 4))
        return pitch_NF.clamp(lowest, highest) + _MAX_PITCH_CHANGE * change_NF.tanh()

    def _noise(self, like_NT: Tensor, num_before: int) -> Tensor:
        noise_T = self.get_buffer("noise_T")
        begin = num_before % len(noise_T)
        end = begin + like_NT.shape[1]
        return noise_T.repeat(-(-end // len(noise_T)))[begin:end].expand_as(like_NT)

    def _filtered(self, sources: tuple[Tensor, Tensor], log_bands: tuple[Tensor, Tensor]) -> Tensor:
        """The sum [N, T] of sources [N, T], each through filters that change from block to block.

        Every block's window of a source is filtered and added to the result at its place; windows overlap by three
        quarters and sum to 2. An impulse response may be as long as what the transform is longer than the window.
        """
        window_S = self.get_buffer("window_S")
        num_clips, num_samples = sources[0].shape
        num_blocks, side = num_samples // self.step, (len(window_S) - self.step) // 2
        padded = [F.pad(x_NT, (side, len(window_S) - self.step - side)) for x_NT in sources]
        wave_NT = sources[0].new_zeros(num_clips, (num_blocks - 1) * self.step + self.num_fft)
        for start in range(0, num_blocks, _PIECE_BLOCKS):
            stop = min(start + _PIECE_BLOCKS, num_blocks)
            spectrum = torch.zeros((), device=wave_NT.device)
            for padded_NT, log_bands_NMB in zip(padded, log_bands, strict=True):
                part_NT = padded_NT[:, start * self.step : (stop - 1) * self.step + len(window_S)]
                windows_NBS = part_NT.unfold(1, len(window_S), self.step) * window_S
                log_bins_NBW = log_bands_NMB[:, :, start:stop].transpose(1, 2) @ self.get_buffer("bins_WM").T
                filters_NBW = minimum_phase(log_bins_NBW, self.num_fft)
                spectrum = spectrum + torch.fft.rfft(windows_NBS, self.num_fft) * filters_NBW
            blocks_NSB = torch.fft.irfft(spectrum, self.num_fft).transpose(1, 2)
            length = (stop - start - 1) * self.step + self.num_fft
            added_NT = F.fold(blocks_NSB, (1, length), (1, self.num_fft), stride=(1, self.step))[:, 0, 0]
            begin = start * self.step
            wave_NT = wave_NT + F.pad(added_NT, (begin, wave_NT.shape[1] - begin - length))
        return wave_NT[:, side : side + num_samples] / 2

    def _with_loudness(self, wave_NT: Tensor, scaled_NF: Tensor) -> Tensor:
        """Each frame at the loudness that its code holds: what the filters miss of the level is made good."""
        wanted_NF = scaled_NF / FrameFeatures.LOUDNESS_SCALE + FrameFeatures.LOUDNESS_MEAN
        gain_NF = (wanted_NF - self.loudness(wave_NT)).clamp(-_MAX_GAIN, _MAX_GAIN)
        return wave_NT * _finer(gain_NF[:, None], self.hop_samples)[:, 0].exp()


class FrameBlock(nn.Module):
    """Residual: a convolution a channel over frames, LayerNorm, MLP (ConvNeXt, https://arxiv.org/abs/2201.03545)."""

    KERNEL = 7

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv1d(width, width, self.KERNEL, padding=self.KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.scale = nn.Parameter(torch.full((width,), 0.3))

    def forward(self, x_NHF: Tensor) -> Tensor:
        """[N, H, F]."""
        return x_NHF + (self.scale * self.mlp(self.norm(self.conv(x_NHF).transpose(1, 2)))).transpose(1, 2)


def pulse_train(hz_NT: Tensor, sample_rate: int, anchor: int = 0, cycles: float = 0.0) -> Tensor:
    """The sum of cosines of all multiples of a frequency below half the sample rate, each of amplitude 1: [N, T].

    In closed form (Dirichlet's kernel), so that the number of harmonics costs nothing.

    Args:
        hz_NT: the frequency at each sample.
        sample_rate: samples a second.
        anchor: up to this sample there were so many cycles.
        cycles: as `anchor` says.
    """
    cycles_NT = torch.cumsum(hz_NT.double() / sample_rate, dim=1)  # float32 would drift within a minute
    if anchor:
        cycles_NT = cycles_NT - cycles_NT[:, anchor - 1 : anchor]
    cycles_NT = cycles_NT + cycles
    half_NT = (cycles_NT % 1.0).float() * math.pi
    num_NT = (sample_rate / 2 / hz_NT - 1e-3).floor().clamp(min=1)
    sine_NT = half_NT.sin()
    is_top_NT = sine_NT.abs() < 1e-4
    ratio_NT = ((2 * num_NT + 1) * half_NT).sin() / sine_NT.masked_fill(is_top_NT, 1.0)
    return (torch.where(is_top_NT, 2 * num_NT + 1, ratio_NT) - 1) / 2


def minimum_phase(log_magnitude_NBW: Tensor, num_fft: int) -> Tensor:
    """The complex spectrum [N, B, W] of these magnitudes whose impulse response has its energy as early as can be.

    By folding the cepstrum (Oppenheim and Schafer, "Discrete-Time Signal Processing", 3rd ed., section 13.5.4).
    """
    cepstrum_NBS = torch.fft.irfft(log_magnitude_NBW, num_fft)
    fold_S = torch.zeros(num_fft, device=cepstrum_NBS.device)
    fold_S[0] = fold_S[num_fft // 2] = 1.0
    fold_S[1 : num_fft // 2] = 2.0
    return torch.fft.rfft(cepstrum_NBS * fold_S).exp()


def _finer(x_NCF: Tensor, factor: int) -> Tensor:
    """Linear between the frames' centres; the first and last hold beyond them."""
    return F.interpolate(x_NCF, scale_factor=factor, mode="linear", align_corners=False)


def _interpolation(filters_MW: Tensor) -> Tensor:
    """[W, M]: a spectrum's bins from its bands, linear between the bands' centres."""
    num_bands, num_bins = filters_MW.shape
    centres_M = (filters_MW * torch.arange(num_bins)).sum(dim=1) / filters_MW.sum(dim=1)
    bins_W = torch.arange(num_bins, dtype=centres_M.dtype)
    upper_W = torch.searchsorted(centres_M, bins_W).clamp(1, num_bands - 1)
    low_W, high_W = centres_M[upper_W - 1], centres_M[upper_W]
    share_W1 = ((bins_W - low_W) / (high_W - low_W).clamp(min=1e-6)).clamp(0, 1)[:, None]
    one_hot = F.one_hot(torch.stack([upper_W - 1, upper_W]), num_bands).to(filters_MW)
    return (1 - share_W1) * one_hot[0] + share_W1 * one_hot[1]
