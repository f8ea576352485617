"""What every audio tokenizer is: sound to codes [K, F] and back, whatever the sound's rate, channels and length.

Shapes: N clips, C channels, T samples, K codebooks, F frames, V codes a codebook, D code width.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmllm_tokenizers import earlier_names
from mmllm_tokenizers.decoder_streams import DecoderStream, WholeDecoderStream
from mmllm_tokenizers.sound import resample, resampled_length, to_channels
from mmllm_tokenizers.tensor_file import save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
FORMAT_VERSION = 1

NO_SPEECH = (
    "de-duplicated units have lost their durations, so they can be heard but not spoken; to speak, take a tokenizer "
    "folder with a codec"
)
"""What is wrong with speaking by a tokenizer that doesn't keep durations."""

_BATCH_SECONDS = 60.0
"""Sound encoded at once: enough to fill a CPU's vector units, small enough for its memory."""
_PIECE_SECONDS = 60.0
"""Longer sounds are encoded in pieces of this length, so that ten minutes fit into memory."""


class AudioTokenizer(ABC):
    """Turns sound into codes and, where it can, codes into sound.

    A clip's codes depend on this clip alone: `encode_batch` batches only clips of equal length (in
    frames), so nothing is padded by its neighbours. Sounds above a minute are encoded in pieces of a
    minute, each as if it were alone.

    Args:
        sample_rate: samples a second of the waves it works on.
        hop_samples: samples a frame.
        num_codebooks: K, how many codes a frame `encode` gives.
        codebook_size: V.
        num_channels: channels of the waves it works on.
    """

    keeps_durations: bool = True
    """Whether each code lasts one frame, so that how long a sound lasts says how many codes it has, and codes say how
    long it lasts. Where they don't, there is no speech."""

    def __init__(
        self, sample_rate: int, hop_samples: int, num_codebooks: int, codebook_size: int, num_channels: int = 1
    ) -> None:
        self.sample_rate = sample_rate
        self.hop_samples = hop_samples
        self.num_codebooks = num_codebooks
        self.codebook_size = codebook_size
        self.num_channels = num_channels
        self._hash: str | None = None

    @property
    def frame_rate(self) -> float:
        """Frames a second."""
        return self.sample_rate / self.hop_samples

    @property
    def codebooks_KVD(self) -> Tensor:
        """The codebooks in use: what an audio embedding is initialized from."""
        return self._all_codebooks_KVD()[: self.num_codebooks]

    @property
    def spoken_codebooks(self) -> int:
        """Of the K codebooks that are heard, how many are meant to be spoken: the first so many."""
        return self.num_codebooks

    @property
    def hash(self) -> str:
        """SHA-256 of weights and configuration; the same wherever the folder lies."""
        if self._hash is None:
            self._hash = content_hash(self._config(), self._weights())
        return self._hash

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of `num_samples` at the tokenizer's own rate: the quotient by the hop, rounded up."""
        return -(-num_samples // self.hop_samples)

    def num_frames_of(self, num_samples: int, sample_rate: int) -> int:
        """Frames that `encode` gives of a sound of `num_samples` at any rate."""
        return self.num_frames(resampled_length(num_samples, sample_rate, self.sample_rate))

    def use_codebooks(self, num_codebooks: int) -> None:
        """Gives only the first `num_codebooks` codes of a frame from now on.

        Raises:
            ValueError: there are not so many.
        """
        available = self._all_codebooks_KVD().shape[0]
        if not 1 <= num_codebooks <= available:
            raise ValueError(f"num_codebooks is {num_codebooks}; this audio tokenizer has {available}")
        self.num_codebooks = num_codebooks

    def encode(self, wave: Tensor, sample_rate: int) -> Tensor:
        """Codes of one sound.

        Args:
            wave: [C, T] or [T], at least one sample.
            sample_rate: its rate, samples a second.

        Returns:
            int64 [K, F].

        Raises:
            ValueError: the wave is empty or has an odd shape.
        """
        return self.encode_batch([self.prepare(wave, sample_rate)])[0]

    def prepare(self, wave: Tensor, sample_rate: int) -> Tensor:
        """The sound at the tokenizer's own rate and channels: [T], or [C, T] where it hears more than one."""
        wave_CT = wave[None] if wave.dim() == 1 else wave
        if wave_CT.dim() != 2 or wave_CT.shape[1] < 1 or wave_CT.shape[0] < 1:
            raise ValueError(
                f"wave has shape {list(wave.shape)}; it must be [samples] or [channels, samples], not empty"
            )
        wave_CT = resample(to_channels(wave_CT.float(), self.num_channels), sample_rate, self.sample_rate)
        return wave_CT[0] if self.num_channels == 1 else wave_CT

    def encode_batch(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Codes of many sounds that are already at the tokenizer's own rate (see `prepare`).

        Args:
            waves: each [T] (or [C, T] where the tokenizer hears C channels), at least one sample.

        Returns:
            int64 [K, F] for each, in the order given.
        """
        pieces: list[Tensor] = []
        num_pieces: list[int] = []
        for index, wave in enumerate(waves):
            wave_CT = wave[None].expand(self.num_channels, -1) if wave.dim() == 1 else wave
            if wave_CT.dim() != 2 or wave_CT.shape[0] != self.num_channels or wave_CT.shape[1] < 1:
                raise ValueError(
                    f"wave {index} has shape {list(wave.shape)}; it must be [{self.num_channels}, samples] or "
                    f"[samples] with at least 1 sample; `prepare` makes it so"
                )
            parts = self._pieces(wave_CT)
            pieces += parts
            num_pieces.append(len(parts))
        codes = iter(self._encode_pieces(pieces))
        return [torch.cat([next(codes) for _ in range(count)], dim=1) for count in num_pieces]

    def encode_timed(self, waves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """As `encode_batch`, and beside the codes [K, F] of each sound how many frames each lasts: int64 [F]."""
        return [(codes_KF, torch.ones_like(codes_KF[0])) for codes_KF in self.encode_batch(waves)]

    def _pieces(self, wave_CT: Tensor) -> tuple[Tensor, ...]:
        """A wave in parts that are encoded each as if it were alone; all but the last are whole frames."""
        return wave_CT.split(int(_PIECE_SECONDS * self.frame_rate) * self.hop_samples, dim=1)

    def _encode_pieces(self, pieces_CT: list[Tensor]) -> list[Tensor]:
        """Groups pieces by length and encodes each group in batches."""
        groups: dict[int, list[int]] = defaultdict(list)
        for index, piece_CT in enumerate(pieces_CT):
            groups[self._group_samples(piece_CT.shape[1])].append(index)
        codes: dict[int, Tensor] = {}
        for length, members in sorted(groups.items()):
            batch_size = max(1, int(_BATCH_SECONDS * self.sample_rate / length))
            for start in range(0, len(members), batch_size):
                chosen = members[start : start + batch_size]
                waves_NCT = pieces_CT[0].new_zeros(len(chosen), self.num_channels, length)
                for row, index in enumerate(chosen):
                    waves_NCT[row, :, : pieces_CT[index].shape[1]] = pieces_CT[index]
                with torch.inference_mode():
                    codes_NKF = self._encode_equal(waves_NCT)
                codes.update(zip(chosen, codes_NKF.unbind(0), strict=True))
        return [codes[index].clone() for index in range(len(pieces_CT))]  # plain tensors, not inference-mode ones

    def _group_samples(self, num_samples: int) -> int:
        """The length to which a clip is padded with zeros; clips of one such length form a batch."""
        return self.num_frames(num_samples) * self.hop_samples

    @abstractmethod
    def _encode_equal(self, waves_NCT: Tensor) -> Tensor:
        """int64 [N, K, F] of clips of one length."""

    @abstractmethod
    def decode(self, codes_KF: Tensor) -> Tensor:
        """Sound float32 [T] of codes [K, F], at the tokenizer's own rate; [C, T] where it has more than one channel.

        Raises:
            ValueError: codes of a wrong shape or out of range, or a tokenizer that cannot speak.
        """

    def decoder_stream(self) -> DecoderStream:
        """Decodes a sound piece by piece: together the pieces are what `decode` gives, to the last bits of float32."""
        return WholeDecoderStream(self.decode)

    @abstractmethod
    def _all_codebooks_KVD(self) -> Tensor: ...

    @abstractmethod
    def _config(self) -> dict[str, Any]:
        """JSON that, with `_weights`, is the whole tokenizer; "kind" names its class."""

    @abstractmethod
    def _weights(self) -> Mapping[str, Tensor]: ...

    def save(self, folder: str | Path) -> None:
        """Writes `config.json` and `model.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"format_version": FORMAT_VERSION, **self._config()}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        weights = {name: tensor.contiguous().cpu() for name, tensor in self._weights().items()}
        save_tensors(weights, folder / WEIGHTS_FILE)


def content_hash(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a JSON configuration and named tensors."""
    config, weights = earlier_names.first(config, weights)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def read_tokenizer_folder(folder: str | Path, kind: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights that `AudioTokenizer.save` wrote.

    Args:
        folder: the folder.
        kind: the kind it must be of, if any.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the folder is of another kind, of a newer format, or damaged.
    """
    folder = Path(folder)
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; an audio tokenizer is a folder with it")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        version = config.pop("format_version")
        found = config.pop("kind")
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} is no audio tokenizer's configuration: {error!r}") from error
    if version != FORMAT_VERSION:
        raise ValueError(f"{folder} has format version {version}; this release reads {FORMAT_VERSION}: upgrade mmllm")
    if kind is not None and found != kind:
        raise ValueError(f"{folder} holds an audio tokenizer of kind {found!r}, not {kind!r}; use load_audio_tokenizer")
    try:
        weights = load_file(folder / WEIGHTS_FILE)
    except Exception as error:  # safetensors raises its own error type, which derives from Exception alone
        raise ValueError(f"{folder / WEIGHTS_FILE} cannot be read: {error}; it is truncated or foreign") from error
    config, weights = earlier_names.current(config, weights)
    return {"kind": found, **config}, weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Loads weights, all of them and no others.

    Raises:
        ValueError: names or shapes differ; says which.
    """
    expected = module.state_dict()
    missing, foreign = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    wrong = [name for name in expected if name in weights and expected[name].shape != weights[name].shape]
    for problem, names in (("lacks", missing), ("has the unknown", foreign), ("has the wrong shape for", wrong)):
        if names:
            raise ValueError(
                f"{source} {problem} weights {', '.join(names[:3])} ({len(names)} in all); "
                f"its weights belong to another configuration"
            )
    module.load_state_dict(dict(weights))


def check_codes(codes_KF: Tensor, num_codebooks: int, codebook_size: int) -> None:
    """Refuses codes that no decoder can take.

    Raises:
        ValueError: the shape is not [1 to num_codebooks, F], or a code is out of range.
    """
    if codes_KF.dim() != 2 or not 1 <= codes_KF.shape[0] <= num_codebooks:
        raise ValueError(
            f"codes have shape {list(codes_KF.shape)}; they must be [1 to {num_codebooks} codebooks, frames]"
        )
    if codes_KF.numel() and not 0 <= int(codes_KF.min()) <= int(codes_KF.max()) < codebook_size:
        raise ValueError(
            f"codes lie in [{int(codes_KF.min())}, {int(codes_KF.max())}]; they must lie in [0, {codebook_size - 1}]: "
            f"remove fillers and pattern first (invert_pattern)"
        )
