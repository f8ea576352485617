"""Shape of the small audio codec, and how its codebooks learn."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mmllm_tokenizers.frame_features import NUM_VOICE_CHANNELS


@dataclass(frozen=True)
class CodecConfig:
    """Shape of a codec, and how its codebooks learn.

    A cheap codec has its large ratios last: the encoder strides by the last ratio first, and the layers
    before that stride run at the full sample rate.
    """

    sample_rate: int = 8000
    """Samples a second."""
    num_filters: int = 16
    """Channels at the full rate; each ratio doubles them."""
    ratios: tuple[int, ...] = (2, 4, 4, 5)
    """The decoder's upsampling; the product is the hop, in samples a frame."""
    dimension: int = 64
    """D, the width of latents and codebooks."""
    num_bands: int = 0
    """So many of the latents' channels, the first, are the frame's log-mel spectrum; the encoder learns the others.
    Codes then say what was heard in a form that a few sounds suffice to learn from, and an encoder that has seen
    few voices does not decide what is kept of a new one. 0: the encoder learns all, as EnCodec's does."""
    decoder: Literal["seanet", "source_filter"] = "seanet"
    """"seanet": EnCodec's convolutions, learnt; any sound, if training is long. "source_filter": pulses and noise,
    filtered by the bands (`SourceFilterDecoder`); speech after half a minute of training. All its latents are
    computed: the bands, then pitch, voicing and loudness; there is no encoder, `dimension` is `num_bands` + 3."""
    decoder_hidden_size: int = 96
    """Width of the source-filter decoder's network."""
    decoder_num_layers: int = 2
    """Convolution blocks of the source-filter decoder's network."""
    search_width: int = 1
    """Sums of codes that the encoder keeps from codebook to codebook while it looks for the nearest. 1: only the best
    so far, as EnCodec does; 4 leaves an eighth less error, at four times the cost of a small step."""
    num_codebooks: int = 4
    """K."""
    spoken_codebooks: int = 0
    """The first so many are meant to be spoken, all K to be heard: the search takes the nearest sum of these before it
    goes on to the others, so that they are what a codec of these alone would give, and the decoder learns from them.
    A tokenizer folder takes both numbers from here. 0: all K are spoken."""
    codebook_size: int = 512
    """V."""
    num_residual_layers: int = 1
    lstm_layers: int = 0
    causal: bool = False
    norm: str = "weight_norm"
    """"weight_norm", or "none" (a trained codec whose weights were fused for inference)."""
    decay: float = 0.99
    """Of the moving averages that are the codebooks."""
    dead_code_batches: int = 20
    """A code that so many training batches left unused is replaced by a vector of the batch."""
    warmup_batches: int = 50
    """Training batches that pass unquantized, before k-means sets up the codebooks. Where latents are computed, nothing
    else is learnt meanwhile, and the codebooks are made of all these batches."""
    quantizer_dropout: float = 0.5
    """Share of training clips that are decoded from a random number of codebooks."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratios", tuple(int(ratio) for ratio in self.ratios))
        for name in (
            "sample_rate", "num_filters", "dimension", "num_codebooks", "codebook_size", "dead_code_batches",
            "decoder_hidden_size", "decoder_num_layers", "search_width",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_residual_layers", "lstm_layers", "warmup_batches"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 0")
        if not 0 <= self.spoken_codebooks <= self.num_codebooks:
            raise ValueError(
                f"spoken_codebooks is {self.spoken_codebooks}; it must be 0 (all) to num_codebooks, "
                f"{self.num_codebooks}"
            )
        if not self.ratios or min(self.ratios) < 2:
            raise ValueError(f"ratios are {self.ratios}; give at least one, each 2 or more")
        if self.decoder not in ("seanet", "source_filter"):
            raise ValueError(f"decoder is {self.decoder!r}; it must be 'seanet' or 'source_filter'")
        if self.decoder == "source_filter":
            self._check_source_filter()
        if not 0 <= self.num_bands < self.dimension:
            raise ValueError(
                f"num_bands is {self.num_bands}; it must lie in [0, {self.dimension - 1}], below dimension"
            )
        if self.num_bands and self.causal:
            raise ValueError("num_bands needs causal: false; a frame's spectrum reaches into its neighbours")
        if self.norm not in ("weight_norm", "none"):
            raise ValueError(f"norm is {self.norm!r}; it must be 'weight_norm' or 'none'")
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay is {self.decay}; it must lie in [0, 1)")
        if not 0.0 <= self.quantizer_dropout <= 1.0:
            raise ValueError(f"quantizer_dropout is {self.quantizer_dropout}; it must lie in [0, 1]")

    @property
    def decoded_codebooks(self) -> int:
        """How many codebooks the decoder learns from."""
        return self.spoken_codebooks or self.num_codebooks

    @property
    def has_computed_latents(self) -> bool:
        """Whether nothing of the latents is learnt."""
        return self.decoder == "source_filter"

    def _check_source_filter(self) -> None:
        wanted = self.num_bands + NUM_VOICE_CHANNELS
        if self.num_bands < 2 or self.dimension != wanted:
            raise ValueError(
                f"num_bands is {self.num_bands} and dimension {self.dimension}; decoder 'source_filter' needs 2 bands "
                f"or more, and dimension num_bands + {NUM_VOICE_CHANNELS}, here {wanted} (pitch, voicing, loudness)"
            )
        if self.hop_samples % 4:
            raise ValueError(
                f"ratios are {self.ratios}, a hop of {self.hop_samples} samples; decoder 'source_filter' needs a "
                f"multiple of 4"
            )

    @property
    def hop_samples(self) -> int:
        """Samples a frame."""
        return math.prod(self.ratios)
