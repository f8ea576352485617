"""A small recognizer of letters in sound: it finds when each word of a text is said, and writes down what it hears.

It hears log-mel spectra and shares nothing with a codec or a decoder, so that it can also judge what those make. Its
letters come from a network trained with CTC (Graves et al. 2006, https://doi.org/10.1145/1143844.1143891) by
`mmllm.training.aligner_training`; word times come from the likeliest path through a text's letters.

Shapes: N sounds, T samples, M mel bands, S steps of a spectrum (100 a second), F frames of the network (50 a second,
two steps each), D width, K frames of a convolution, L labels (0 blank, 1 space, then characters).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from mmllm_tokenizers.alignment import WordTime, text_words
from mmllm_tokenizers.audio_tokenizer import CONFIG_FILE, WEIGHTS_FILE, load_weights
from mmllm_tokenizers.letter_paths import (
    Peak,
    letter_times,
    path_peaks,
    silent_frames,
    spelled,
    text_labels,
    word_bounds,
)
from mmllm_tokenizers.lexicon import LexiconDecoder, greedy_labels
from mmllm_tokenizers.sound import resample, to_mono
from mmllm_tokenizers.spectrum import mel_filters
from mmllm_tokenizers.tensor_file import save_tensors

STEP_RATE = 100
"""Steps of a spectrum a second; a frame is two of them."""
FLOOR_DB = -100.0
"""Of a digital silence."""
RANGE_DB = 45.0
"""What lies further below a sound's loudest band is not heard."""
_BATCH_STEPS = 8000
_FORMAT_VERSION, _KIND = 1, "aligner"


@dataclass(frozen=True)
class AlignerConfig:
    """What an aligner is made of.

    Attributes:
        characters: that it tells apart, casefolded.
        sample_rate: samples a second of what it hears; other sounds are resampled.
        num_mels: bands.
        width: channels of the network.
        depth: blocks.
        kernel_frames: frames that a block's convolution sees, next to each other or, in every second block, each other
            one.
        lag_seconds: by how much the network tells letters too late: measured after training, taken off.
        words: that its training heard, a lexicon for `transcribe`; empty where they were too many to be one.
    """

    characters: str
    sample_rate: int = 16000
    num_mels: int = 40
    width: int = 128
    depth: int = 4
    kernel_frames: int = 5
    lag_seconds: float = 0.0
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.characters or len(set(self.characters)) != len(self.characters):
            raise ValueError(f"aligner.characters is {self.characters!r}; give each character once, at least one")
        if self.sample_rate < 4000 or self.sample_rate % STEP_RATE:
            raise ValueError(f"aligner.sample_rate is {self.sample_rate}; give a multiple of {STEP_RATE}, from 4000 on")
        if self.kernel_frames % 2 != 1:
            raise ValueError(f"aligner.kernel_frames is {self.kernel_frames}; it must be odd")


class Block(nn.Module):
    """A convolution over frames as one matrix product, and its residual."""

    def __init__(self, width: int, kernel_frames: int, dilation: int) -> None:
        super().__init__()
        self.kernel_frames, self.dilation = kernel_frames, dilation
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Linear(kernel_frames * width, width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_NFD: Tensor, mask_NF1: Tensor) -> Tensor:
        """[N, F, D]; frames that the mask leaves out are heard as zeros."""
        neighbours = _neighbours(self.norm(x_NFD) * mask_NF1, self.kernel_frames, self.dilation)
        return x_NFD + self.out(F.gelu(self.conv(neighbours)))


def _neighbours(x_NFD: Tensor, kernel_frames: int, dilation: int) -> Tensor:
    """[N, F, K * D]: what lies around each frame, zeros beyond the ends."""
    side, num_frames = kernel_frames // 2 * dilation, x_NFD.shape[1]
    padded = F.pad(x_NFD, (0, 0, side, side))
    return torch.cat([padded[:, k * dilation : k * dilation + num_frames] for k in range(kernel_frames)], dim=-1)


class AlignerNetwork(nn.Module):
    """Log-mel spectra to log-probabilities of labels."""

    def __init__(self, config: AlignerConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = nn.Linear(3 * 2 * config.num_mels, config.width)
        self.blocks = nn.ModuleList(
            Block(config.width, config.kernel_frames, 1 + number % 2) for number in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, len(config.characters) + 2)
        nn.init.zeros_(self.head.weight)

    def forward(self, mel_NSM: Tensor, num_steps_N: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of each frame.

        Args:
            mel_NSM: decibels, at any level; an even number of steps.
            num_steps_N: of each sound; what stands behind them changes nothing.

        Returns:
            (log-probabilities [N, F, L], frames of each sound [N]).
        """
        num_frames_N = (num_steps_N + 1) // 2
        is_sound_NS1 = (torch.arange(mel_NSM.shape[1]) < num_steps_N[:, None])[..., None]
        loudest_N11 = mel_NSM.masked_fill(~is_sound_NS1, -math.inf).amax((1, 2), keepdim=True)
        heard_NSM = (mel_NSM - loudest_N11).clamp(min=-RANGE_DB) * (2 / RANGE_DB) + 1
        heard_NSM = heard_NSM.masked_fill(~is_sound_NS1, -1.0)
        pairs_NFM = heard_NSM.reshape(len(mel_NSM), -1, 2 * mel_NSM.shape[2])
        mask_NF1 = (torch.arange(pairs_NFM.shape[1]) < num_frames_N[:, None])[..., None].to(pairs_NFM.dtype)
        x_NFD = F.gelu(self.stem(_neighbours(pairs_NFM + 1, 3, 1)))
        for block in self.blocks:
            x_NFD = block(x_NFD, mask_NF1)
        return self.head(self.norm(x_NFD)).log_softmax(dim=-1), num_frames_N


class Aligner:
    """Finds when words are said, and transcribes.

    Args:
        network: trained; it is put in evaluation mode.
    """

    def __init__(self, network: AlignerNetwork) -> None:
        self.config = network.config
        self.network = network.eval().requires_grad_(False)
        self._window = self.config.sample_rate // 40
        self._num_fft = 1 << (self._window - 1).bit_length()
        self._filters_MW = mel_filters(self.config.sample_rate, self._num_fft, self.config.num_mels)
        self._hann = torch.hann_window(self._window)

    @classmethod
    def load(cls, folder: str | Path) -> Aligner:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the folder holds something else, or is damaged.
        """
        folder = Path(folder)
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{folder / name} does not exist; `mmllm data align` writes an aligner's folder"
                )
        try:
            values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            kind, version = values.pop("kind"), values.pop("format_version")
            if (kind, version) != (_KIND, _FORMAT_VERSION):
                raise ValueError(f"it is of kind {kind!r}, version {version}; expected {_KIND!r}, {_FORMAT_VERSION}")
            config = AlignerConfig(**{**values, "words": tuple(values.get("words", ()))})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{folder / CONFIG_FILE} is no aligner's configuration: {error}") from error
        network = AlignerNetwork(config)
        try:
            weights = load_file(folder / WEIGHTS_FILE)
        except Exception as error:  # safetensors raises its own error type, which derives from Exception alone
            raise ValueError(f"{folder / WEIGHTS_FILE} cannot be read: {error}; it is truncated or foreign") from error
        load_weights(network, weights, str(folder))
        return cls(network)

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        values = {"kind": _KIND, "format_version": _FORMAT_VERSION, **asdict(self.config)}
        text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        save_tensors({name: x.contiguous() for name, x in self.network.state_dict().items()}, folder / WEIGHTS_FILE)

    @torch.no_grad()
    def mel(self, wave: Tensor, sample_rate: int) -> Tensor:
        """What is heard of a sound: decibels [S, M], an even number of steps.

        Args:
            wave: [T] or [C, T].
            sample_rate: samples a second.
        """
        wave_T = to_mono(wave.float())
        wave_T = resample(wave_T, sample_rate, self.config.sample_rate) if len(wave_T) else wave_T
        hop = self.config.sample_rate // STEP_RATE
        missing, side = -max(len(wave_T), 1) % (2 * hop), (self._num_fft - hop) // 2
        missing += not len(wave_T)  # nothing at all is heard as a frame of silence
        padded_1T = F.pad(wave_T, (side, missing + self._num_fft - hop - side))[None]
        spectrum_WS = torch.stft(
            padded_1T, self._num_fft, hop, self._window, self._hann, center=False, return_complex=True
        )[0]
        return (10 * (self._filters_MW @ spectrum_WS.abs().square() + 10 ** (FLOOR_DB / 10)).log10()).T

    @torch.no_grad()
    def log_probs(self, mels_SM: Sequence[Tensor]) -> list[Tensor]:
        """Log-probabilities of labels [F, L] of each sound, of what `mel` gives."""
        found: dict[int, Tensor] = {}
        batch: list[int] = []
        order = sorted(range(len(mels_SM)), key=lambda i: len(mels_SM[i]))
        for place, i in enumerate(order):
            batch.append(i)
            if place + 1 == len(order) or (len(batch) + 1) * len(mels_SM[order[place + 1]]) > _BATCH_STEPS:
                rows_NFL, num_frames_N = self.network(*padded([mels_SM[i].float() for i in batch]))
                found |= {i: row[:num] for i, row, num in zip(batch, rows_NFL, num_frames_N.tolist(), strict=True)}
                batch = []
        return [found[i] for i in range(len(mels_SM))]

    def align(self, mels_SM: Sequence[Tensor], texts: Sequence[str]) -> list[list[WordTime] | ValueError]:
        """When each word (`text_words`) of each text is said; an error, not raised, where that can't be told.

        Args:
            mels_SM: what `mel` gives of each sound.
            texts: what is said in it.
        """
        found: list[list[WordTime] | ValueError] = []
        for mel_SM, log_probs_FL, text in zip(mels_SM, self.log_probs(mels_SM), texts, strict=True):
            try:
                found.append(self._word_times(mel_SM, log_probs_FL, text))
            except ValueError as error:
                found.append(error)
        return found

    def _word_times(self, mel_SM: Tensor, log_probs_FL: Tensor, text: str) -> list[WordTime]:
        labels = text_labels(text, self.config.characters)
        peaks = path_peaks(log_probs_FL, labels)
        silent_F, words, number = silent_frames(mel_SM), text_words(text), 0
        spans: list[tuple[list[tuple[int, int]], list[Peak]]] = []
        for word in words:
            places = spelled(word, self.config.characters)
            spans.append((places, peaks[number : number + len(places)]))
            number += len(places) + 1
        bounds = word_bounds([span for _, span in spans], silent_F, self.config.lag_seconds)
        return [
            WordTime(
                word, start, end, letter_times(word, places, span, start, end, self.config.lag_seconds),
                sum(peak.probability for peak in span) / len(span),
            )
            for word, (places, span), (start, end) in zip(words, spans, bounds, strict=True)
        ]  # fmt: skip

    def transcribe(self, waves: Sequence[Tensor], sample_rate: int, lexicon: Sequence[str] | None = None) -> list[str]:
        """What is said, word by word.

        Args:
            waves: each [T] or [C, T].
            sample_rate: of all of them.
            lexicon: the words that can be said: the likeliest sequence of them is found. None: the likeliest label of
                each frame, which spells words that don't exist.

        Raises:
            ValueError: a word of the lexicon can't be spelled with the aligner's characters.
        """
        rows = self.log_probs([self.mel(wave, sample_rate) for wave in waves])
        if lexicon is None:
            spelling = ["", " ", *self.config.characters]
            return [" ".join("".join(spelling[label] for label in greedy_labels(row.numpy())).split()) for row in rows]
        by_labels: dict[tuple[int, ...], str] = {}
        for word in sorted(set(lexicon)):
            if len(text_words(word)) != 1 or word.split() != [word]:
                raise ValueError(f"the lexicon has {word!r}, which is not one word; give each word alone")
            by_labels.setdefault(tuple(text_labels(word, self.config.characters)), word)
        decoder = LexiconDecoder(by_labels)
        return [" ".join(decoder.decode(row.numpy())) for row in rows]


def padded(mels_SM: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Spectra as one batch: ([N, S, M], steps of each [N])."""
    num_steps_N = torch.tensor([len(mel_SM) for mel_SM in mels_SM])
    longest = int(num_steps_N.max()) + int(num_steps_N.max()) % 2
    return torch.stack([F.pad(mel, (0, 0, 0, longest - len(mel)), value=FLOOR_DB) for mel in mels_SM]), num_steps_N
