"""The trained `Codec` as an audio tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmllm_tokenizers.audio_tokenizer import AudioTokenizer, check_codes, load_weights, read_tokenizer_folder
from mmllm_tokenizers.codec import Codec, CodecConfig, fused
from mmllm_tokenizers.decoder_streams import DecoderStream, SEANetStream, SourceFilterStream

_FIRST_SETTINGS = {
    "num_bands": 0, "decoder": "seanet", "decoder_hidden_size": 96, "decoder_num_layers": 2, "search_width": 1,
    "spoken_codebooks": 0,
}  # fmt: skip
"""Settings that codecs once had no name for, and what they did."""


class SmallCodec(AudioTokenizer):
    """A codec of `mmllm fit` (configs/*/codec.yaml) that encodes and decodes.

    Args:
        codec: copied to the CPU in evaluation mode with its weight normalization fused, so that later
            training changes nothing here.
    """

    def __init__(self, codec: Codec) -> None:
        config = codec.config
        super().__init__(config.sample_rate, config.hop_samples, config.num_codebooks, config.codebook_size)
        self.codec = fused(codec)

    @classmethod
    def load(cls, folder: str | Path) -> SmallCodec:
        """Reads what `save` wrote."""
        config, weights = read_tokenizer_folder(folder, "codec")
        try:
            codec = Codec(CodecConfig(**config["codec"]))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder} has a codec configuration that this release does not know: {error}") from error
        load_weights(codec, weights, str(folder))
        return cls(codec)

    @property
    def spoken_codebooks(self) -> int:
        """As the codec's config says."""
        return min(self.codec.config.decoded_codebooks, self.num_codebooks)

    def _encode_equal(self, waves_NCT: Tensor) -> Tensor:
        return self.codec.encode(waves_NCT[:, 0])[:, : self.num_codebooks]

    @torch.inference_mode()
    def _decode(self, codes_KF: Tensor) -> Tensor:
        return self.codec.decode(codes_KF[None])[0]

    def decode(self, codes_KF: Tensor) -> Tensor:
        """Sound float32 [F * hop] of codes of all codebooks, or of the first few."""
        check_codes(codes_KF, self.codec.config.num_codebooks, self.codebook_size)
        return self._decode(codes_KF).clone()

    def decoder_stream(self) -> DecoderStream:
        """See `AudioTokenizer.decoder_stream`."""
        decoder: Any = self.codec.decoder
        if self.codec.config.decoder == "source_filter":
            return SourceFilterStream(decoder, self._latents)
        return SEANetStream(decoder, self._latents, has_lstm=self.codec.config.lstm_layers > 0)

    def _latents(self, codes_KF: Tensor) -> Tensor:
        return self.codec.quantizer.decode(codes_KF[None])

    def _all_codebooks_KVD(self) -> Tensor:
        return self.codec.codebooks_KVD

    def _config(self) -> dict[str, Any]:
        config = dataclasses.asdict(self.codec.config)
        for name, first in _FIRST_SETTINGS.items():  # as codecs were saved before: their hash stays what it was
            if config[name] == first:
                del config[name]
        return {"kind": "codec", "codec": config}

    def _weights(self) -> Mapping[str, Tensor]:
        return self.codec.state_dict()
