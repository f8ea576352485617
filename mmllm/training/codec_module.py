"""Trains the small audio codec: `mmllm fit` with `class_path: mmllm.training.codec_module.CodecModule`.

Shapes: N clips, T samples, F frames, K codebooks, D latent width, L characters.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from mmllm.batch import SoundBatch
from mmllm.losses.ctc import alignable, ctc_losses
from mmllm.model.roles import mark_all
from mmllm.training.audio_losses import Balancer, LogSpectrumLoss, MultiScaleMelLoss, level_loss
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.staged import StagedModule
from mmllm_tokenizers.audio import SmallCodec
from mmllm_tokenizers.codec import Codec, CodecConfig, CodecOutput
from mmllm_tokenizers.frame_features import FrameFeatures
from mmllm_tokenizers.sound_quality import level_db

BLANK = 0
NUM_CHARACTERS = 257
"""The blank, then the 256 bytes of UTF-8."""


@dataclass(frozen=True)
class CodecLossConfig:
    """Shares of the codec's losses.

    Attributes:
        l1: of the waveform; its share of the balanced gradient.
        mel: of the multi-scale mel spectrogram; its share of the balanced gradient.
        log_spectrum: of log magnitudes, in bands and bins alike, at several scales; its share of the balanced gradient.
        level: of each clip's level; its share of the balanced gradient.
        pitch: weight of the distance in octaves from the pitch that was computed, outside the balance; of a
            source-filter decoder alone.
        commitment: weight of the quantizer's commitment loss, outside the balance.
        ctc: weight of a character CTC loss on the quantized latents, which makes the codes tell words apart;
            0: no such head. Needs data that gives whole clips with their text.
        ctc_width: channels of the CTC head.
    """

    l1: float = 0.1
    mel: float = 2.0
    log_spectrum: float = 0.0
    level: float = 0.0
    pitch: float = 0.0
    commitment: float = 1.0
    ctc: float = 0.0
    ctc_width: int = 128

    def __post_init__(self) -> None:
        for name in ("l1", "mel", "log_spectrum", "level", "pitch", "commitment", "ctc"):
            if getattr(self, name) < 0:
                raise ValueError(f"losses.{name} is {getattr(self, name)}; a weight is 0 or more")
        if self.l1 == self.mel == self.log_spectrum == 0:
            raise ValueError(
                "losses.l1, losses.mel and losses.log_spectrum are all 0; the codec needs at least one of them"
            )


class CodecModule(StagedModule):
    """Waveform in, codes, waveform out. EnCodec's losses without the adversary."""

    def __init__(
        self,
        codec: CodecConfig,
        losses: CodecLossConfig | None = None,
        optimizer: OptimizerConfig | None = None,
        max_seconds: float | None = None,
        out: str | None = None,
    ) -> None:
        """Builds the codec.

        Args:
            codec: its shape.
            losses: their weights.
            optimizer: rates and decay.
            max_seconds: training ends after this long; None: `trainer.max_steps` alone ends it.
            out: folder for the trained codec, which `load_audio_tokenizer` and a tokenizer folder read.
        """
        super().__init__(optimizer, max_seconds)
        self.codec_config = codec
        self.losses = losses or CodecLossConfig()
        self.out = out
        self.codec = Codec(codec)
        if self.losses.pitch and codec.decoder != "source_filter":
            raise ValueError(
                f"losses.pitch is {self.losses.pitch}, but decoder {codec.decoder!r} has no pitch; set it to 0"
            )
        self.mel_loss = MultiScaleMelLoss(codec.sample_rate)
        self.log_spectrum_loss = LogSpectrumLoss(codec.sample_rate)
        weights = {name: getattr(self.losses, name) for name in ("l1", "mel", "log_spectrum", "level")}
        self.balancer = Balancer(weights)
        self.ctc_head = _ctc_head(codec.dimension, self.losses.ctc_width) if self.losses.ctc else None
        if self.ctc_head is not None:
            mark_all(self.ctc_head, "head")

    @property
    def export_dir(self) -> str | None:
        """Where the codec goes when training ends."""
        return self.out

    def export(self, directory: Path) -> None:
        """Writes the codec as an audio tokenizer folder."""
        SmallCodec(self.codec).save(directory)

    def on_train_end(self) -> None:
        """Exports a codec that has codebooks even if training ended in its warm-up.

        All ranks make them, as all are told what rank 0 finds; the first alone exports.
        """
        if self.export_dir:
            self.codec.quantizer.end_warmup()
        super().on_train_end()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """One batch: a `SoundBatch`, waves [N, 1, T] or [N, T], or a pair of waves and their N texts."""
        wave_NT, texts = _unpack(batch)
        is_empty = not len(wave_NT)
        if is_empty:  # all its clips failed; but ranks wait for each other's gradients and codes
            wave_NT, texts = wave_NT.new_zeros(1, wave_NT.shape[-1]), [""]
        if self.codec.is_warming_up:
            return self._warmup_step(wave_NT)
        output = self.codec(wave_NT)
        losses = self._reconstruction_losses(output.wave, wave_NT) | {"commit": output.commit_loss}
        total = self.balancer(losses, output.wave) + self.losses.commitment * output.commit_loss
        if self.losses.pitch:
            losses["pitch"] = pitch_loss(output, self.codec_config.num_bands)
            total = total + self.losses.pitch * losses["pitch"]
        if self.ctc_head is not None:
            losses["ctc"], left_out = character_ctc(self.ctc_head(output.quantized), texts)
            total = total + self.losses.ctc * losses["ctc"]
            losses["ctc_left_out"] = losses["ctc"].new_tensor(left_out)
        if is_empty:
            return total * 0
        self.window.add(losses | {"codes_used": _share_of_codes_used(output.codes, self.codec_config)})
        self.log("mel", losses["mel"], prog_bar=True, logger=False)
        return total

    def _warmup_step(self, wave_NT: Tensor) -> Tensor:
        """Keeps computed latents for the codebooks; what is decoded before there are any would teach little.

        Returns:
            0, with a gradient of 0 for every weight, as distributed training expects.
        """
        with torch.no_grad():
            output = self.codec.quantizer(self.codec.latents(wave_NT))
        self.window.add({"commit": output.commit_loss})
        return torch.stack([weight.sum() for weight in self.parameters()]).sum() * 0.0

    def _reconstruction_losses(self, wave_NT: Tensor, target_NT: Tensor) -> dict[str, Tensor]:
        """Those that have a weight, `l1`, and `mel` in any case: without a weight, the bands of `log_spectrum`."""
        losses = {"l1": (wave_NT - target_NT).abs().mean()}
        if self.losses.level:
            losses["level"] = level_loss(wave_NT, target_NT)
        if self.losses.log_spectrum:
            losses["mel"], bins = self.log_spectrum_loss(wave_NT, target_NT)
            losses["log_spectrum"] = losses["mel"] + bins
        if self.losses.mel or not self.losses.log_spectrum:
            losses["mel"] = self.mel_loss(wave_NT, target_NT)
        return losses

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Also keeps the vectors that the first codebooks will be made of."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["mmllm_first_vectors"] = self.codec.quantizer.first_vectors

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        quantizer = self.codec.quantizer
        kept_RD = checkpoint.get("mmllm_first_vectors", quantizer.first_vectors[:0])
        quantizer.first_vectors = kept_RD.to(quantizer.first_vectors)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the same losses, and the signal-to-distortion ratio in dB."""
        wave_NT, _ = _unpack(batch)
        num_rows = len(wave_NT)
        if not num_rows:  # ranks must log alike; in the means it has no weight
            wave_NT = wave_NT.new_zeros(1, wave_NT.shape[-1])
        output = self.codec(wave_NT)
        values = {
            "val/l1": (output.wave - wave_NT).abs().mean(),
            "val/mel": self.mel_loss(output.wave, wave_NT),
            "val/si_sdr_db": si_sdr_db(output.wave, wave_NT).mean(),
            "val/level_db": level_db(output.wave, wave_NT).mean(),
            "val/codes_used": _share_of_codes_used(output.codes, self.codec_config),
        }
        self.log_dict(values, batch_size=num_rows, sync_dist=True)


def pitch_loss(output: CodecOutput, num_bands: int) -> Tensor:
    """Distance in octaves of the decoder's pitch from the computed one, mean over frames weighted by their voicing."""
    assert output.pitch is not None, "the decoder has no pitch"
    product_NF, voicing_NF = output.latents[:, num_bands], output.latents[:, num_bands + 1]
    ours_NF = voicing_NF * (output.pitch - FrameFeatures.PITCH_MEAN)
    return (ours_NF - product_NF / FrameFeatures.PITCH_SCALE).abs().sum() / voicing_NF.sum().clamp(min=1.0)


def si_sdr_db(wave_NT: Tensor, target_NT: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio, dB [N] (Le Roux et al. 2018, https://arxiv.org/abs/1811.02508)."""
    wave_NT, target_NT = (w.float() - w.float().mean(dim=1, keepdim=True) for w in (wave_NT, target_NT))
    scale_N1 = (wave_NT * target_NT).sum(1, keepdim=True) / target_NT.square().sum(1, keepdim=True).clamp(min=1e-8)
    signal_N = (scale_N1 * target_NT).square().sum(1)
    noise_N = (wave_NT - scale_N1 * target_NT).square().sum(1)
    return 10 * torch.log10(signal_N.clamp(min=1e-8) / noise_N.clamp(min=1e-8))


def character_ctc(logits_NCF: Tensor, texts: list[str] | None) -> tuple[Tensor, float]:
    """CTC loss of UTF-8 bytes, mean over the characters of the clips that have text and frames enough for it.

    A text of L bytes, R of them equal to the one before, needs L + R frames: a blank goes between equals.

    Args:
        logits_NCF: [N, 257, F], class 0 the blank and class b + 1 byte b.
        texts: of each clip; empty ones are left out.

    Returns:
        The loss, 0 where no clip counts, and the share of the clips with text that have too few frames for it.

    Raises:
        ValueError: no texts were given.
    """
    if texts is None:
        raise ValueError(
            "losses.ctc is set but the data gives no texts; set losses.ctc to 0, or let the data module give whole "
            "clips with their text"
        )
    spoken, num_frames = [text.lower().encode() for text in texts], logits_NCF.shape[2]
    repeats = (sum(a == b for a, b in pairwise(text)) for text in spoken)
    rows, num_left_out = alignable((num_frames, len(text), again) for text, again in zip(spoken, repeats, strict=True))
    left_out = num_left_out / max(sum(map(bool, spoken)), 1)
    if not rows:
        return logits_NCF.sum() * 0.0, left_out
    lengths = [len(spoken[row]) for row in rows]
    targets_NL = pad_sequence([torch.tensor([byte + 1 for byte in spoken[row]]) for row in rows], batch_first=True)
    rows_N, targets_NL = (x.to(logits_NCF.device, non_blocking=True) for x in (torch.tensor(rows), targets_NL))
    log_probs_NFC = logits_NCF.index_select(0, rows_N).float().log_softmax(dim=1).transpose(1, 2)
    losses_N = ctc_losses(log_probs_NFC, targets_NL, [num_frames] * len(rows), lengths, blank=BLANK)
    return losses_N.sum() / sum(lengths), left_out


def _ctc_head(dimension: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv1d(dimension, width, 5, padding=2),
        nn.GELU(),
        nn.Conv1d(width, width, 5, padding=2),
        nn.GELU(),
        nn.Conv1d(width, NUM_CHARACTERS, 1),
    )


def _unpack(batch: Any) -> tuple[Tensor, list[str] | None]:
    if isinstance(batch, SoundBatch):
        return batch.waves_N1T[:, 0], batch.texts
    wave, texts = batch if isinstance(batch, (tuple, list)) else (batch, None)
    return (wave[:, 0] if wave.ndim == 3 else wave), texts


def _share_of_codes_used(codes_NKF: Tensor, config: CodecConfig) -> Tensor:
    """Share of all codebooks' codes that occur in the batch."""
    offsets_K1 = torch.arange(config.num_codebooks, device=codes_NKF.device)[:, None] * config.codebook_size
    is_used = torch.zeros(config.num_codebooks * config.codebook_size, device=codes_NKF.device)
    return is_used.index_fill(0, (codes_NKF + offsets_K1).flatten(), 1.0).mean()
