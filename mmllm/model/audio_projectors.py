"""From audio codes to the decoder's width.

Shapes: C clips, F frames a clip, K codebooks, V codes a codebook (filler included), D decoder width, W inner width,
P places of clips laid end to end, R of them slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.media_numbers import MediaNumbers
from mmllm.sequences import clip_frames
from mmllm_tokenizers.spectrum import FrameSpectrum


@dataclass(frozen=True)
class AudioProjectorConfig:
    """How the frames of a clip that is heard become slots.

    Attributes:
        kind: "linear" or "mlp" of each `pool` frames, or "conv": residual convolution blocks over the slots
            (not causal) after it.
        pool: frames a slot; the tokenizer folder's `audio_pool`.
        hidden_size: inner width; None: the decoder's.
        num_hidden_layers: convolution blocks.
        kernel_size: slots that a block sees; odd.
        dropout: inside the blocks, in training.
        code_dropout: in training, chance that a clip is heard with only its first few codebooks.
        frame_mask: in training, share of frames that are hidden in spans (as SpecAugment, arXiv 1904.08779).
        mask_span: frames a span.
        spectrum: leading channels of the codes' embeddings that are a spectrum (those of a codec's `num_bands`): two
            layers of two-dimensional convolution over time and frequency come first, and the
            other channels are left out; 0: there is none. A voice's resonances move along frequency.
        range_db: bands quieter than this below the clip's loudest are raised to it: speech is understood from its
            upper 30 dB (ANSI S3.5-1997), and what lies below is the room and the recorder, unlike those of training.
            Needs `spectrum`; 0: all is kept.
        warp: in training, by up to this share the bands of each clip are stretched and moved along frequency, as a
            shorter or longer vocal tract would (Jaitly and Hinton 2013); needs `spectrum`.
        band_mask: in training, up to this many neighbouring bands of each clip are hidden (as SpecAugment); needs
            `spectrum`.
        clip_norm: normalize each channel over the frames of a clip, as cepstral mean and variance normalization
            does: what stays the same throughout a clip (voice, microphone) is taken out. False: LayerNorm a frame.
        max_number: a document's clips are told which of them they are, first, second …, as far as this one; those
            behind share the last number. 0: they aren't told, and the decoder has to count.
    """

    kind: Literal["linear", "mlp", "conv"] = "conv"
    pool: int = 2
    hidden_size: int | None = None
    num_hidden_layers: int = 4
    kernel_size: int = 7
    dropout: float = 0.0
    code_dropout: float = 0.0
    frame_mask: float = 0.0
    mask_span: int = 8
    spectrum: int = 0
    range_db: float = 0.0
    warp: float = 0.0
    band_mask: int = 0
    clip_norm: bool = False
    max_number: int = 0

    def __post_init__(self) -> None:
        if self.pool < 1:
            raise ValueError(f"audio projector.pool is {self.pool}; it must be at least 1 frame a slot")
        if self.kernel_size % 2 == 0:
            raise ValueError(f"audio projector.kernel_size is {self.kernel_size}; it must be odd")
        if self.spectrum % 4 or (self.spectrum and self.kind != "conv"):
            raise ValueError(
                f"audio projector.spectrum is {self.spectrum} with kind {self.kind!r}; it must be a multiple of 4, and "
                f"needs kind 'conv'"
            )
        if not 0 <= self.warp < 0.5 or not 0 <= self.band_mask <= self.spectrum:
            raise ValueError(
                f"audio projector.warp is {self.warp} and band_mask {self.band_mask}; they must be in [0, 0.5) and in "
                f"[0, spectrum], here {self.spectrum}"
            )
        if self.range_db < 0:
            raise ValueError(f"audio projector.range_db is {self.range_db}; it must be 0 (all) or more decibels")
        if (self.warp or self.band_mask or self.range_db) and not self.spectrum:
            raise ValueError("audio projector.warp, band_mask and range_db need spectrum: bands are what they change")
        if self.max_number < 0:
            raise ValueError(f"audio projector.max_number is {self.max_number}; give 0 (off) or a number of clips")
        if self.mask_span < 1:
            raise ValueError(f"audio projector.mask_span is {self.mask_span}; it must be at least 1 frame")
        if not 0 <= self.frame_mask < 1:
            raise ValueError(f"audio projector.frame_mask is {self.frame_mask}; it must be in [0, 1)")


class CodeEmbedding(nn.Module):
    """Sum of the embeddings of a frame's codes; code -1 adds nothing.

    Frames of units have fewer codes than those that are heard, where a sound is heard with more than are spoken: theirs
    are the first ones.

    Args:
        num_codebooks: K, of a sound that is heard.
        codebook_size: codes a codebook, the filler left out.
        latent_width: of an embedding.
        keeps_scale: remember by what the codec's codebooks are divided, for a projector that counts in decibels.
    """

    scale: Tensor | None

    def __init__(self, num_codebooks: int, codebook_size: int, latent_width: int, keeps_scale: bool = False):
        super().__init__()
        self.num_codebooks, self.codebook_size = num_codebooks, codebook_size
        self.table = nn.Embedding(num_codebooks * (codebook_size + 1), latent_width)
        self.register_buffer("scale", torch.ones(()) if keeps_scale else None)
        nn.init.normal_(self.table.weight, std=latent_width**-0.5)

    def initialize(self, codebooks_KVD: Tensor) -> None:
        """Copies the codec's codebooks, scaled so that a sum of one code of each has unit variance.

        Similar sounds then start close to each other.

        Raises:
            ValueError: for codebooks of another number, size or width.
        """
        width = self.table.embedding_dim
        wanted = (self.num_codebooks, self.codebook_size, width)
        if codebooks_KVD.ndim != 3 or codebooks_KVD.shape[1:] != wanted[1:] or len(codebooks_KVD) < wanted[0]:
            raise ValueError(
                f"the codec's codebooks are {list(codebooks_KVD.shape)}; the model's audio config wants {list(wanted)}"
            )
        codebooks_KVD = codebooks_KVD[: self.num_codebooks].float()
        variance = codebooks_KVD.var(dim=1).sum(dim=0).mean().clamp(min=1e-12)
        with torch.no_grad():
            table_KVD = self.table.weight.view(self.num_codebooks, self.codebook_size + 1, width)
            if self.scale is not None:
                self.scale.copy_(variance.sqrt())
            table_KVD[:, :-1] = (codebooks_KVD / variance.sqrt()).to(table_KVD)
            table_KVD[:, -1] = 0

    def forward(self, codes: Tensor) -> Tensor:
        """[..., K] codes to [..., latent width].

        A single table takes one code a position, or (a flat stream's clips, which are heard whole) one of each of K
        codebooks, whose units it holds one after another.

        Raises:
            ValueError: a frame has more codes than there are codebooks.
        """
        num_codes = codes.shape[-1]
        is_flat = self.num_codebooks == 1 and num_codes > 1
        if num_codes > self.num_codebooks and not is_flat:
            raise ValueError(
                f"a frame has {num_codes} codes, but the model hears {self.num_codebooks} codebooks; encode sound by "
                f"the model's own tokenizer folder"
            )
        size = self.codebook_size // num_codes if is_flat else self.codebook_size + 1
        ids = codes.clamp(min=0) + torch.arange(num_codes, device=codes.device) * size
        weights = (codes >= 0).to(self.table.weight.dtype)
        flat = F.embedding_bag(
            ids.reshape(-1, num_codes),
            self.table.weight,
            mode="sum",
            per_sample_weights=weights.reshape(-1, num_codes),
        )
        return flat.view(*codes.shape[:-1], -1)


class ConvBlock(nn.Module):
    """Residual: convolution over time, LayerNorm, MLP (ConvNeXt, arXiv 2201.03545, in one dimension)."""

    def __init__(self, width: int, kernel: int, dropout: float):
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(2 * width, width)
        )

    def forward(self, x_PW: Tensor, is_slot_P1: Tensor) -> Tensor:
        """Positions between clips stay zero, so a clip's result does not depend on its neighbours."""
        mixed_PW = self.conv(x_PW.T[None])[0].T
        return x_PW + self.mlp(self.norm(mixed_PW)) * is_slot_P1


class SpectrumStem(nn.Module):
    """Two convolutions over time and frequency, each followed by the larger of two neighbouring bands."""

    CHANNELS = (16, 32)

    def __init__(self, num_bands: int):
        super().__init__()
        self.num_bands = num_bands
        first, second = self.CHANNELS
        self.first = nn.Conv2d(1, first, 3, padding=1)
        self.second = nn.Conv2d(first, second, 3, padding=1)
        self.norm = nn.LayerNorm(second * num_bands // 4)

    @property
    def width(self) -> int:
        """Channels a frame."""
        return self.CHANNELS[1] * self.num_bands // 4

    def forward(self, x_PBL: Tensor, is_frame_PB: Tensor) -> Tensor:
        """[P, B, width] of B frames a place; both convolutions see zeros where there is no frame."""
        is_frame = is_frame_PB.view(1, 1, -1, 1)
        x_1CFM = x_PBL.flatten(0, 1)[:, : self.num_bands][None, None]
        x_1CFM = F.max_pool2d(F.gelu(self.first(x_1CFM)), (1, 2)) * is_frame
        x_1CFM = F.max_pool2d(F.gelu(self.second(x_1CFM)), (1, 2))
        return self.norm(x_1CFM[0].transpose(0, 1).flatten(1)).unflatten(0, x_PBL.shape[:2])


def _over_frames(x_CFW: Tensor, mask_CF1: Tensor, floor: float = 0.05) -> Tensor:
    """Zero mean, unit variance for each channel of each clip; `floor` keeps silence from being amplified."""
    count_C11 = mask_CF1.sum(dim=1, keepdim=True).clamp(min=1)
    centred_CFW = x_CFW - (x_CFW * mask_CF1).sum(dim=1, keepdim=True) / count_C11
    variance_C1W = (centred_CFW.square() * mask_CF1).sum(dim=1, keepdim=True) / count_C11
    return centred_CFW * (variance_C1W + floor).rsqrt()


class AudioProjector(nn.Module):
    """Clips that are heard: code embeddings, convolutions over time if any, `pool` frames to a slot."""

    def __init__(self, config: AudioProjectorConfig, latent_width: int, width: int):
        super().__init__()
        self.config = config
        inner = config.hidden_size or width
        self.frame_norm = None if config.clip_norm else nn.LayerNorm(latent_width)
        self.mask_embedding = nn.Parameter(torch.zeros(latent_width))
        if config.kind == "conv":
            if config.spectrum > latent_width:
                raise ValueError(
                    f"audio projector.spectrum is {config.spectrum}; the codes' embeddings have {latent_width} channels"
                )
            self.picture = SpectrumStem(config.spectrum) if config.spectrum else None
            frame_width = self.picture.width if self.picture is not None else latent_width
            self.stem = nn.Linear(frame_width * config.pool, inner)
            self.blocks = nn.ModuleList(
                ConvBlock(inner, config.kernel_size, config.dropout) for _ in range(config.num_hidden_layers)
            )
            self.norm = nn.LayerNorm(inner)
        if config.kind == "mlp":
            self.project: nn.Module = nn.Sequential(
                nn.Linear(latent_width * config.pool, inner), nn.GELU(), nn.Linear(inner, width)
            )
        else:
            self.project = nn.Linear(inner if config.kind == "conv" else latent_width * config.pool, width)
        self.numbers = MediaNumbers(config.max_number, width) if config.max_number else None

    def forward(
        self,
        codes_CFK: Tensor,
        embedding: CodeEmbedding,
        num_frames: tuple[int, ...] | None = None,
        numbers_C: Tensor | None = None,
    ) -> Tensor:
        """[C, ceil(F / pool), D]; -1 codes pad a clip's end.

        Args:
            codes_CFK: the codes.
            embedding: of the codes.
            num_frames: of each clip; None: the device is asked.
            numbers_C: int64, which clip of its document each is, from 0; None: the only one.
        """
        slots_CSD = self._heard(codes_CFK, embedding, num_frames)
        return slots_CSD if self.numbers is None else self.numbers(slots_CSD, numbers_C)

    def _heard(self, codes_CFK: Tensor, embedding: CodeEmbedding, num_frames: tuple[int, ...] | None) -> Tensor:
        mask_CF1 = (codes_CFK[..., :1] >= 0).to(embedding.table.weight.dtype)
        if self.training:
            codes_CFK = self._drop_codebooks(codes_CFK)
        x_CFL = embedding(codes_CFK)
        if self.config.range_db:
            if embedding.scale is None:
                raise ValueError("audio projector.range_db needs a CodeEmbedding with keeps_scale")
            x_CFL = self._within_range(x_CFL, mask_CF1, embedding.scale)
        x_CFL = _over_frames(x_CFL, mask_CF1) if self.frame_norm is None else self.frame_norm(x_CFL)
        if self.training:
            x_CFL = self._altered_bands(x_CFL)
        hidden_CF1 = self._hidden_frames(codes_CFK) if self.training and self.config.frame_mask else None
        if hidden_CF1 is not None:
            x_CFL = torch.where(hidden_CF1, self.mask_embedding.to(x_CFL.dtype), x_CFL)
        else:
            x_CFL = x_CFL + self.mask_embedding.sum() * 0.0
        pool = self.config.pool
        missing = -x_CFL.shape[1] % pool
        x_CFL = F.pad(x_CFL * mask_CF1, (0, 0, 0, missing))
        if self.config.kind != "conv":
            return self.project(x_CFL.unflatten(1, (-1, pool)).flatten(2))
        is_frame_CSB = F.pad(mask_CF1[..., 0], (0, missing)).unflatten(1, (-1, pool))
        num_frames = clip_frames(codes_CFK) if num_frames is None else num_frames
        return self.project(self._convolved(x_CFL.unflatten(1, (-1, pool)), is_frame_CSB, num_frames))

    def _convolved(self, x_CSBL: Tensor, is_frame_CSB: Tensor, num_frames: tuple[int, ...]) -> Tensor:
        """Convolves the clips laid end to end, zeros between them: padding short clips to the longest costs more."""
        num_clips, num_slots = x_CSBL.shape[:2]
        rows, places, num_places = self._laid_out(num_frames, num_slots)
        rows_R, places_R = rows.to(x_CSBL.device, non_blocking=True), places.to(x_CSBL.device, non_blocking=True)
        x_RBL = x_CSBL.flatten(0, 1).index_select(0, rows_R)
        is_slot_P1 = x_RBL.new_zeros(num_places, 1).index_fill(0, places_R, 1.0)
        if self.picture is not None:
            x_PBL = x_RBL.new_zeros(num_places, *x_RBL.shape[1:]).index_copy(0, places_R, x_RBL)
            is_frame_RB = is_frame_CSB.flatten(0, 1).index_select(0, rows_R)
            is_frame_PB = x_RBL.new_zeros(num_places, x_RBL.shape[1]).index_copy(0, places_R, is_frame_RB)
            x_RBL = self.picture(x_PBL, is_frame_PB)[places_R]
        x_RW = self.stem(x_RBL.flatten(1))
        x_PW = x_RW.new_zeros(num_places, x_RW.shape[1]).index_copy(0, places_R, x_RW)
        for block in self.blocks:
            x_PW = block(x_PW, is_slot_P1)
        x_RW = self.norm(x_PW[places_R])
        x_NW = x_RW.new_zeros(num_clips * num_slots, x_RW.shape[1]).index_copy(0, rows_R, x_RW)
        return x_NW.unflatten(0, (num_clips, num_slots))

    def _laid_out(self, num_frames: tuple[int, ...], num_slots: int) -> tuple[Tensor, Tensor, int]:
        """Of each slot that a clip fills: its row in C·S, and its place where they lie end to end; and all places."""
        gap = max(self.config.kernel_size // 2, 1)
        rows: list[int] = []
        places: list[int] = []
        start = 0
        for clip, frames in enumerate(num_frames):
            own = -(-frames // self.config.pool)
            rows += range(clip * num_slots, clip * num_slots + own)
            places += range(start, start + own)
            start += own + gap
        return torch.tensor(rows, dtype=torch.int64), torch.tensor(places, dtype=torch.int64), start

    def _drop_codebooks(self, codes_CFK: Tensor) -> Tensor:
        num_codebooks = codes_CFK.shape[2]
        if not self.config.code_dropout or num_codebooks == 1:
            return codes_CFK
        device = codes_CFK.device
        kept_C = torch.randint(1, num_codebooks, (codes_CFK.shape[0],), device=device)
        kept_C = torch.where(torch.rand(len(kept_C), device=device) < self.config.code_dropout, kept_C, num_codebooks)
        dropped_CK = torch.arange(num_codebooks, device=device) >= kept_C[:, None]
        return codes_CFK.masked_fill(dropped_CK[:, None], -1)

    def _within_range(self, x_CFL: Tensor, mask_CF1: Tensor, scale: Tensor) -> Tensor:
        """The spectrum with a floor `range_db` below the loudest band of each clip."""
        x_CFM, rest = x_CFL.tensor_split([self.config.spectrum], dim=-1)
        loudest_C11 = x_CFM.masked_fill(mask_CF1 == 0, -torch.inf).amax(dim=(1, 2), keepdim=True)
        floor_C11 = loudest_C11 - self.config.range_db / (FrameSpectrum.DECIBELS * scale)
        return torch.cat([torch.maximum(x_CFM, floor_C11), rest], dim=-1)

    def _altered_bands(self, x_CFL: Tensor) -> Tensor:
        """The spectrum of each clip stretched and moved along frequency, and some of its bands hidden."""
        num_bands, (num_clips, num_frames) = self.config.spectrum, x_CFL.shape[:2]
        if not self.config.warp and not self.config.band_mask:
            return x_CFL
        x_CFM, rest = x_CFL[..., :num_bands], x_CFL[..., num_bands:]
        bands_M = torch.arange(num_bands, device=x_CFL.device, dtype=x_CFL.dtype)
        if self.config.warp:
            amounts_C2 = self.config.warp * (2 * torch.rand(num_clips, 2, 1, device=x_CFL.device).to(x_CFL) - 1)
            middle = (num_bands - 1) / 2
            places_CM = (bands_M - middle) * (1 + amounts_C2[:, 0]) + middle + amounts_C2[:, 1] * num_bands / 2
            places_CM = places_CM.clamp(0, num_bands - 1)
            below_CM = places_CM.floor()
            share_C1M = (places_CM - below_CM)[:, None]
            below_CFM = below_CM.long()[:, None].expand(-1, num_frames, -1)
            above_CFM = (below_CFM + 1).clamp(max=num_bands - 1)
            x_CFM = x_CFM.gather(2, below_CFM) * (1 - share_C1M) + x_CFM.gather(2, above_CFM) * share_C1M
        if self.config.band_mask:
            width_C1 = torch.randint(0, self.config.band_mask + 1, (num_clips, 1), device=x_CFL.device)
            first_C1 = torch.rand(num_clips, 1, device=x_CFL.device) * (num_bands - width_C1 + 1)
            is_hidden_CM = (bands_M >= first_C1.floor()) & (bands_M < first_C1.floor() + width_C1)
            x_CFM = x_CFM.masked_fill(is_hidden_CM[:, None], 0.0)
        return torch.cat([x_CFM, rest], dim=-1)

    def _hidden_frames(self, codes_CFK: Tensor) -> Tensor:
        """Spans start at random so that about `frame_mask` of the frames are hidden, bool [C, F, 1]."""
        span = self.config.mask_span
        chance = 1 - (1 - self.config.frame_mask) ** (1 / span)
        starts_CF = (torch.rand(codes_CFK.shape[:2], device=codes_CFK.device) < chance).float()
        spans_CF = F.max_pool1d(F.pad(starts_CF, (span - 1, 0))[:, None], span, stride=1)[:, 0]
        return spans_CF.bool()[..., None]
