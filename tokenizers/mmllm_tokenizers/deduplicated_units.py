"""K-means units without repetitions, and BPE over them: shorter sequences to hear.

Source: de-duplication and BPE of discrete speech units, https://arxiv.org/abs/2309.15800.

Shapes: F frames, U units after de-duplication, P tokens after BPE, V tokens of the vocabulary, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm_tokenizers.audio_tokenizer import NO_SPEECH, AudioTokenizer, check_codes, read_tokenizer_folder
from mmllm_tokenizers.unit_bpe import UnitBPE
from mmllm_tokenizers.units import KMeansUnits, deduplicate

_KIND = "deduplicated_kmeans"
_MERGES = "bpe.merges"


@dataclass(frozen=True)
class Shortening:
    """By how much the sounds became shorter from which a tokenizer was made."""

    num_frames: int
    num_units: int
    """After de-duplication."""
    num_codes: int
    """In the end."""

    def to_dict(self) -> dict[str, Any]:
        """How many frames, and how many units and codes there are for each of them."""
        units, codes = (round(count / self.num_frames, 4) for count in (self.num_units, self.num_codes))
        return {"frames": self.num_frames, "units_per_frame": units, "codes_per_frame": codes}


class DeduplicatedUnits(AudioTokenizer):
    """A sound is its k-means units, each run of one unit as that unit once, and pairs merged by BPE where there is one.

    How many codes a sound has can't be told from how long it lasts, and stored codes don't tell how long each of them
    lasts: that is known only where the sound is at hand (`encode_timed`). So they are heard, never spoken. `frame_rate`
    is that of the frames: a second has at most so many codes.

    Args:
        units: of frames.
        bpe: of the units; None: they are de-duplicated alone.

    Raises:
        ValueError: the BPE is of another number of units.
    """

    keeps_durations = False

    def __init__(self, units: KMeansUnits, bpe: UnitBPE | None = None) -> None:
        if bpe is not None and bpe.num_units != units.codebook_size:
            raise ValueError(f"the BPE is of {bpe.num_units} units, and there are {units.codebook_size}; train it anew")
        size = units.codebook_size if bpe is None else bpe.vocab_size
        super().__init__(units.sample_rate, units.hop_samples, 1, size)
        self.units, self.bpe = units, bpe
        self._lengths_V = None if bpe is None else bpe.lengths_V

    @classmethod
    def fit(
        cls, units: KMeansUnits, waves: Sequence[Tensor], vocab_size: int | None = None
    ) -> tuple[DeduplicatedUnits, Shortening]:
        """De-duplicates units, and learns BPE from sounds.

        Args:
            units: of frames.
            waves: each [T], at the units' rate.
            vocab_size: tokens of the BPE, the units included; None: there is none.

        Returns:
            The tokenizer, and by how much these sounds became shorter.

        Raises:
            ValueError: the vocabulary can't have this size, or needs more sound.
        """
        codes = [codes_KF[0] for codes_KF in units.encode_batch(waves)]
        short = [deduplicate(codes_F)[0] for codes_F in codes]
        bpe = None if vocab_size is None else UnitBPE.train(short, units.codebook_size, vocab_size)
        final = short if bpe is None else [bpe.encode(units_U) for units_U in short]
        lengths = [sum(map(len, sequences)) for sequences in (codes, short, final)]
        return cls(units, bpe), Shortening(*lengths)

    @classmethod
    def load(cls, folder: str | Path) -> DeduplicatedUnits:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError, ValueError: as of every audio tokenizer.
        """
        config, weights = read_tokenizer_folder(folder, _KIND)
        merges_M2 = weights.pop(_MERGES, None)
        units = KMeansUnits.from_parts(config, weights, str(folder))
        if bool(config.get("bpe")) != (merges_M2 is not None):
            raise ValueError(f"{folder} says bpe {config.get('bpe')}, but {_MERGES} says otherwise; it is damaged")
        try:
            return cls(units, None if merges_M2 is None else UnitBPE(units.codebook_size, merges_M2))
        except ValueError as error:
            raise ValueError(f"{folder} is no folder of de-duplicated units: {error}") from error

    def encode_batch(self, waves: Sequence[Tensor]) -> list[Tensor]:
        """Codes int64 [1, U] or [1, P] of each sound; see `AudioTokenizer.encode_batch`."""
        return [codes_KP for codes_KP, _ in self.encode_timed(waves)]

    def encode_timed(self, waves: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The codes of `encode_batch`, and of each how many frames it lasts, int64 [U] or [P]."""
        # Only whole sounds are made shorter: a run goes on across the pieces in which long sounds are encoded.
        return [self._shortened(codes_KF[0]) for codes_KF in self.units.encode_batch(waves)]

    def _shortened(self, codes_F: Tensor) -> tuple[Tensor, Tensor]:
        units_U, durations_U = deduplicate(codes_F)
        if self.bpe is None or self._lengths_V is None:
            return units_U[None], durations_U
        tokens_P = self.bpe.encode(units_U)
        ends_P = self._lengths_V[tokens_P].cumsum(0)
        durations_P = durations_U.cumsum(0)[ends_P - 1].diff(prepend=torch.zeros(1, dtype=torch.int64))
        return tokens_P[None], durations_P

    def num_frames(self, num_samples: int) -> int:
        """Not known.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            f"how many de-duplicated units a sound of {num_samples} samples has isn't known from its length; encode it"
        )

    def decode(self, codes_KF: Tensor) -> Tensor:
        """None can be made.

        Raises:
            ValueError: always.
        """
        check_codes(codes_KF, 1, self.codebook_size)
        raise ValueError(NO_SPEECH)

    def _encode_equal(self, waves_NCT: Tensor) -> Tensor:
        raise AssertionError("whole sounds are encoded by the k-means units")

    def _all_codebooks_KVD(self) -> Tensor:
        """A merged token starts as the mean of its units."""
        centroids_VD = self.units.centroids_VD
        if self.bpe is None:
            return centroids_VD[None]
        return torch.stack([centroids_VD[list(units)].mean(dim=0) for units in self.bpe.tokens])[None]

    def _config(self) -> dict[str, Any]:
        return {**self.units._config(), "kind": _KIND, "bpe": self.bpe is not None}

    def _weights(self) -> Mapping[str, Tensor]:
        merges = {} if self.bpe is None else {_MERGES: self.bpe.merges_M2}
        return {**self.units._weights(), **merges}
