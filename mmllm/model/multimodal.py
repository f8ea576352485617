"""The whole model: images, sounds and text in one stream, and one decoder that writes and speaks.

Images and clips go through projectors into their slots between the token embeddings; text and audio
units are predicted by the same head.

Shapes: B sequences, T positions, D width, K codebooks, V vocabulary, N images, S slots, C clips,
F frames, M targets of the whole batch, U of them with unit targets; of image features: P an image, C channels.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.batch import IGNORE, Modality, PackedBatch, count_in_document
from mmllm.model.audio_projectors import AudioProjector, AudioProjectorConfig, CodeEmbedding
from mmllm.model.config import config_from_dict, config_to_dict
from mmllm.model.decoder import INIT_STD, Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjector, ImageProjectorConfig
from mmllm.model.media_numbers import numbers_in_documents
from mmllm.model.pointer import PointerConfig, SpeechPointer
from mmllm.model.roles import mark_all
from mmllm.model.routing_stats import RoutingStats
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.sequences import BatchMetadata, MediaMetadata
from mmllm_tokenizers.vocab import AUDIO_END, PAD, SPECIAL_TOKENS


@dataclass(frozen=True)
class AudioConfig:
    """Sound, in and out, as codes of K codebooks.

    Attributes:
        num_codebooks: K that are spoken, as the tokenizer folder's.
        codebook_size: units a codebook, without the filler.
        codebook_dim: of the codes' embeddings; the codec's dimension where `initialize_audio` is used.
        projector: of clips that are heard.
        pointer: speech that is predicted knows what is being said; None: it has to find out.
        audio_end_id: of `<|audio_end|>`; the tokenizer folder's is taken where there is one.
        pad_id: of `<|pad|>`, which stands for the blank of CTC; likewise.
        heard_codebooks: of clips that are heard, the spoken ones first; None: as many as are spoken. The tokenizer
            folder's is taken.
    """

    num_codebooks: int
    codebook_size: int
    codebook_dim: int = 128
    projector: AudioProjectorConfig = field(default_factory=AudioProjectorConfig)
    pointer: PointerConfig | None = None
    audio_end_id: int = SPECIAL_TOKENS.index(AUDIO_END)
    pad_id: int = SPECIAL_TOKENS.index(PAD)
    heard_codebooks: int | None = None

    def __post_init__(self) -> None:
        if self.heard_codebooks is not None and self.heard_codebooks < max(self.num_codebooks, 1):
            raise ValueError(
                f"audio.heard_codebooks is {self.heard_codebooks} and audio.num_codebooks {self.num_codebooks}; what "
                f"is spoken is heard as well: give at least as many, or leave heard_codebooks out"
            )

    @property
    def num_heard(self) -> int:
        """Codebooks of clips that are heard."""
        return self.heard_codebooks or self.num_codebooks


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses, and noise on the input.

    Attributes:
        text: weight of text targets.
        units: weight of unit targets and the end of sound.
        codebook_weights: what each codebook weighs in a frame's loss, in relation to the others; None: all alike.
        source_weights: factors of the losses of sources, by their names in the recipe; 1 for those not named.
        word_weights: factors of the losses of words where they are targets, with and without a space before them, as
            far as they are one token. For the few words on which the meaning of a text hangs.
        answers: factor of the losses of answers, which are a few tokens at the end of a document with a question.
        ctc: weight of the auxiliary CTC loss on clips that are heard; 0: no CTC head.
        advance: weight of predicting how far a speech's pointer advances, where there is one.
        head_z_loss_coef: weight of the z-loss on the head's softmax, logsumexp² (PaLM, arXiv 2204.02311: 1e-4).
        cross_entropy: which implementation: "chunked" never holds all logits, "full" does, "torch" and "liger" are
            those libraries'; "auto" chooses.
        word_dropout: in training, share of target text tokens that are hidden where they are inputs.
    """

    text: float = 1.0
    units: float = 1.0
    codebook_weights: tuple[float, ...] | None = None
    source_weights: dict[str, float] | None = None
    word_weights: dict[str, float] | None = None
    answers: float = 1.0
    ctc: float = 0.0
    advance: float = 0.3
    head_z_loss_coef: float = 0.0
    cross_entropy: Literal["auto", "chunked", "full", "torch", "liger"] = "auto"
    word_dropout: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.codebook_weights, list):  # as YAML and JSON give it
            object.__setattr__(self, "codebook_weights", tuple(self.codebook_weights))
        plain = ("text", "units", "answers", "ctc", "advance", "head_z_loss_coef")
        weights = {key: getattr(self, key) for key in plain}
        weights |= {f"codebook_weights[{k}]": weight for k, weight in enumerate(self.codebook_weights or ())}
        for key in ("source_weights", "word_weights"):
            weights |= {f"{key}[{name!r}]": weight for name, weight in (getattr(self, key) or {}).items()}
        for key, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise ValueError(f"loss.{key} is {weight}; a weight is a finite number, 0 or more")
        if self.codebook_weights is not None and not sum(self.codebook_weights):
            raise ValueError("loss.codebook_weights are all 0; give one codebook a weight, or set loss.units to 0")
        if not 0 <= self.word_dropout <= 1:
            raise ValueError(f"loss.word_dropout is {self.word_dropout}; it is a share of words, from 0 to 1")


@dataclass(frozen=True)
class ModelConfig:
    """A multimodal model. `vision` None: it does not see; `audio` None: it neither hears nor speaks."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None
    image_projector: ImageProjectorConfig = field(default_factory=ImageProjectorConfig)
    audio: AudioConfig | None = None
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        if self.audio is not None and self.num_text < len(SPECIAL_TOKENS):
            raise ValueError(
                f"decoder.vocab_size is {self.decoder.vocab_size}, which leaves {self.num_text} text ids beside "
                f"{self.audio.num_codebooks} codebooks of {self.audio.codebook_size}; use the tokenizer's "
                f"Vocabulary.size"
            )
        if self.audio is not None and self.decoder.num_base_ids > self.num_text:
            raise ValueError(
                f"decoder.num_base_ids is {self.decoder.num_base_ids}, but units begin at id {self.num_text}; base ids "
                f"are text: give at most {self.num_text}"
            )

    @property
    def num_text(self) -> int:
        """Ids of special and text tokens; units follow them."""
        num_units = self.audio.num_codebooks * (self.audio.codebook_size + 1) if self.audio else 0
        return self.decoder.vocab_size - num_units

    def to_dict(self) -> dict[str, Any]:
        """As JSON-serializable dicts and lists."""
        return config_to_dict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; an unknown key raises a ValueError that names it."""
        return config_from_dict(ModelConfig, values, "model")


@dataclass
class ModelOutput:
    """What the model makes of a batch; losses are elsewhere."""

    hidden_QD: Tensor
    """After the final norm, of the tokens that `metadata.sequences` lists."""
    metadata: BatchMetadata
    clips_CSD: Tensor | None
    """What clips that are heard put into their slots; None: there are none."""
    routing: RoutingStats
    zero: Tensor
    """0, with a gradient of 0 for every parameter that this batch may not have used: part of any loss."""


class MultimodalModel(nn.Module):
    """Sees, hears, reads, writes and speaks. Weights are random: see `load_pretrained`, `initialize_audio`."""

    def __init__(
        self,
        config: ModelConfig,
        decoder_init: AbstractContextManager[Any] | None = None,
        splits_vocabulary: bool = False,
    ):
        """Builds all parts.

        Args:
            config: their sizes.
            decoder_init: entered while the decoder is built, whose weights may wait until they are sharded.
            splits_vocabulary: rows of base ids and added rows are parameters of their own.
        """
        super().__init__()
        self.config = config
        self.always_runs_tower = False
        """Set where the tower is sharded: without pictures it then runs on a blank one, with the other ranks."""
        width = config.decoder.hidden_size
        with decoder_init or nullcontext():
            self.decoder = Decoder(config.decoder, splits_vocabulary)
        self.vision = self.image_projector = None
        if config.vision is not None:
            self.vision = VisionTower(config.vision)
            self.image_projector = ImageProjector(config.image_projector, self.vision.grid, self.vision.width, width)
        self.code_embedding = self.clip_projector = self.unit_projector = self.pointer = self.ctc_head = None
        if config.audio is not None:
            audio = config.audio
            keeps_scale = audio.projector.range_db > 0
            self.code_embedding = CodeEmbedding(audio.num_heard, audio.codebook_size, audio.codebook_dim, keeps_scale)
            self.clip_projector = AudioProjector(audio.projector, audio.codebook_dim, width)
            self.unit_projector = nn.Sequential(
                nn.Linear(audio.codebook_dim, width), nn.GELU(), nn.Linear(width, width)
            )
            if audio.pointer is not None:
                self.pointer = SpeechPointer(audio.pointer, width)
            if config.loss.ctc:
                self.ctc_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, config.num_text))
                mark_all(self.ctc_head, "head")
        self.mask_embedding = None
        if config.loss.word_dropout:
            self.mask_embedding = nn.Parameter(torch.randn(width) * INIT_STD)

    @property
    def num_image_tokens(self) -> int:
        """Slots an image (or a tile of one) fills; 0 without a tower."""
        return self.image_projector.num_tokens if self.image_projector is not None else 0

    def load_pretrained(self) -> None:
        """Reads the CLIP weights that the config names, if any."""
        if self.vision is not None:
            self.vision.load_pretrained()

    def initialize_audio(self, codebooks_KVD: Tensor) -> None:
        """Starts the codes' embeddings from the codec's codebooks."""
        if self.code_embedding is None:
            raise ValueError("this model's config has no audio; give audio, or leave the codebooks out")
        self.code_embedding.initialize(codebooks_KVD)

    def num_parameters(self) -> int:
        """Parameters in all, tied ones once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_parameters(self) -> int:
        """Parameters that one token passes: of E experts only the K chosen, and a share of blocks that tokens skip.

        Of an encoder and a decoder, the larger one's.
        """
        decoder, inactive = self.config.decoder, 0
        if decoder.encoder_layers:
            return self.num_parameters() - self._smaller_half()
        for layer in decoder.mod_layers:
            block = sum(parameter.numel() for parameter in self.decoder.layers[layer].parameters())
            inactive += round(block * (1 - decoder.mod_capacity))
        for moe in self.decoder.expert_layers().values():
            experts, config = sum(weight.numel() for weight in moe.experts.parameters()), moe.config
            inactive += experts * (config.num_experts - config.num_experts_per_tok) // config.num_experts
        return self.num_parameters() - inactive

    def _smaller_half(self) -> int:
        """What a token of an encoder-decoder's larger half doesn't pass: the other half, and experts not chosen."""
        first, experts = self.config.decoder.encoder_layers, self.decoder.expert_layers()
        halves, inactive = [0, 0], [0, 0]
        for layer, block in enumerate(self.decoder.layers):
            half = int(layer >= first)
            halves[half] += sum(parameter.numel() for parameter in block.parameters())
            if layer in experts:
                count = sum(weight.numel() for weight in experts[layer].experts.parameters())
                moe = experts[layer].config
                inactive[half] += count * (moe.num_experts - moe.num_experts_per_tok) // moe.num_experts
        return min(halves[0] + inactive[1], halves[1] + inactive[0])

    def image_embedding(
        self, images_NCHW: Tensor, tiles_N3: Tensor | None = None, numbers_N: Tensor | None = None
    ) -> Tensor:
        """uint8 images to slots [N, S, D].

        Args:
            images_NCHW: pictures, or tiles.
            tiles_N3: as `PackedBatch.image_tiles_N3`; None, as [0, 3]: all are whole pictures.
            numbers_N: which picture of its document each is, from 0; None: the only one.

        Raises:
            ValueError: the model has no tower, or its projector is made for whole pictures and these are cut.
        """
        if self.vision is None or self.image_projector is None:
            raise ValueError("this model has no vision tower; give it no images, or set model.vision")
        if tiles_N3 is None or not len(tiles_N3):
            return self.image_projector(self._features(images_NCHW), None, numbers_N)
        if self.config.image_projector.max_tiles == 1:
            raise ValueError(
                "the batch has pictures that are cut into tiles, but image_projector.max_tiles is 1; set it to "
                "tiling.max_tiles of the tokenizer folder"
            )
        return self.image_projector(self._features(images_NCHW), tiles_N3[:, 1:], numbers_N)

    def _features(self, images_NCHW: Tensor) -> Tensor:
        """What the tower gives, in the projector's dtype: one that was imported may have another."""
        assert self.vision is not None and self.image_projector is not None
        return self.vision(images_NCHW).to(self.image_projector.dtype)

    def feature_embedding(self, features_NPC: Tensor, numbers_N: Tensor | None = None) -> Tensor:
        """What the frozen tower gave for images, as it was stored, to slots [N, S, D]; see `image_embedding`."""
        if self.vision is None or self.image_projector is None:
            raise ValueError("this model has no vision tower; give it no images, or set model.vision")
        if self.vision.config.trainable:
            raise ValueError("the batch has image features, but the tower is trained; freeze it, or give it the images")
        wanted = (self.vision.grid[0] * self.vision.grid[1], self.vision.width)
        if features_NPC.shape[1:] != wanted:
            raise ValueError(
                f"the batch has {list(features_NPC.shape[1:])} features an image, but the tower gives {list(wanted)}; "
                f"build the shards with --image_features of this tower"
            )
        return self.image_projector(features_NPC.to(self.image_projector.dtype), None, numbers_N)

    def clip_embedding(
        self, codes_CFK: Tensor, num_frames: tuple[int, ...] | None = None, numbers_C: Tensor | None = None
    ) -> Tensor:
        """Codes of clips that are heard, -1 behind each end, to slots [C, ceil(F / pool), D].

        Args:
            codes_CFK: the codes.
            num_frames: of each clip; None: the device is asked.
            numbers_C: which clip of its document each is, from 0; None: the only one.
        """
        if self.clip_projector is None or self.code_embedding is None:
            raise ValueError("this model has no audio; give it no sound, or set model.audio")
        return self.clip_projector(codes_CFK, self.code_embedding, num_frames, numbers_C)

    def unit_embedding(self, codes: Tensor) -> Tensor:
        """What a frame of units is as an input: [..., K] patterned codes (-1: none) to [..., D]."""
        if self.unit_projector is None or self.code_embedding is None:
            raise ValueError("this model has no audio; give it no sound, or set model.audio")
        return self.unit_projector(self.code_embedding(codes))

    def splice(self, batch: PackedBatch) -> Tensor:
        """Input embeddings [B, T, D]: tokens, with images, clips and frames of units in their places."""
        return self._splice(batch, batch.media_metadata())[0]

    def _splice(self, batch: PackedBatch, media: MediaMetadata) -> tuple[Tensor, Tensor | None]:
        """The input embeddings, and the clips' slots (for CTC)."""
        num_sequences, num_positions = batch.token_ids_BT.shape
        x_BTD = self.decoder.embed(batch.token_ids_BT)
        if self.training and self.mask_embedding is not None:
            x_BTD = torch.where(self._hidden_words(batch)[..., None], self.mask_embedding.to(x_BTD.dtype), x_BTD)
        x_PD = x_BTD.flatten(0, 1)
        if batch.num_images:
            images_NCHW, features_NPC = batch.images_NCHW, batch.image_features_NPC
            if len(features_NPC):
                slots_NSD = self.feature_embedding(features_NPC, self._picture_numbers(batch))
            else:
                slots_NSD = self.image_embedding(images_NCHW, batch.image_tiles_N3, self._picture_numbers(batch))
            if slots_NSD.shape[:2] != batch.image_slots_NS.shape:
                raise ValueError(
                    f"the batch has {list(batch.image_slots_NS.shape)} image slots, but the model fills "
                    f"{list(slots_NSD.shape[:2])}; set the tokenizer folder's image_tokens to {self.num_image_tokens}"
                )
            x_PD = x_PD.index_copy(0, batch.image_slots_NS.flatten(), slots_NSD.flatten(0, 1).to(x_PD.dtype))
        elif self.always_runs_tower and self.vision is not None:
            blank_1CHW = batch.images_NCHW.new_zeros(1, 3, self.vision.image_size, self.vision.image_size)
            x_PD = x_PD + self.image_embedding(blank_1CHW).sum().to(x_PD.dtype) * 0.0
        clips_CSD = None
        if batch.clip_codes_CFK.shape[0]:
            clips_CSD = self.clip_embedding(batch.clip_codes_CFK, media.clip_frames, self._clip_numbers(batch))
            if clips_CSD.shape[:2] != batch.clip_slots_CS.shape:
                raise ValueError(
                    f"the batch has {list(batch.clip_slots_CS.shape)} clip slots, but the model fills "
                    f"{list(clips_CSD.shape[:2])}; set audio.projector.pool to the tokenizer folder's audio_pool"
                )
            slots_R = batch.clip_slots_CS.flatten()[media.clip_slots_R]
            x_PD = x_PD.index_copy(0, slots_R, clips_CSD.flatten(0, 1)[media.clip_slots_R].to(x_PD.dtype))
        if len(media.frames_F):
            frames_FD = self.unit_embedding(batch.audio_codes_BTK.flatten(0, 1)[media.frames_F])
            x_PD = x_PD.index_copy(0, media.frames_F, frames_FD.to(x_PD.dtype))
        if len(media.pointers_W):
            x_PD = x_PD.index_add(0, media.pointers_W, self._spoken(batch, media.pointers_W).to(x_PD.dtype))
        return x_PD.view(num_sequences, num_positions, -1), clips_CSD

    def _picture_numbers(self, batch: PackedBatch) -> Tensor | None:
        """Which picture of its document each image (or the picture of each tile) is; None: they aren't told."""
        if not self.config.image_projector.max_number or not batch.image_slots_NS.shape[1]:
            return None
        tiles_N3 = batch.image_tiles_N3
        return numbers_in_documents(
            batch.image_slots_NS[:, 0], batch.document_ids_BT, tiles_N3[:, 0] if len(tiles_N3) else None
        )

    def _clip_numbers(self, batch: PackedBatch) -> Tensor | None:
        """Which clip of its document each is; None: they aren't told."""
        assert self.config.audio is not None
        if not self.config.audio.projector.max_number or not batch.clip_slots_CS.shape[1]:
            return None
        return numbers_in_documents(batch.clip_slots_CS[:, 0].clamp(min=0), batch.document_ids_BT)

    def _spoken(self, batch: PackedBatch, pointers_W: Tensor) -> Tensor:
        """What is being said where there is a pointer, [W, D]."""
        if self.pointer is None:
            raise ValueError(
                "the batch's speech has a pointer, but the model has none; set audio.pointer to {}, or take "
                "a tokenizer folder without a pointer"
            )
        pointer_W, age_W = (each.flatten()[pointers_W] for each in (batch.pointer_BT, batch.pointer_age_BT))
        return self.pointer(batch.letters_L, pointer_W, age_W)

    def _hidden_words(self, batch: PackedBatch) -> Tensor:
        """Which text tokens, targets of the position before, are hidden as inputs, bool [B, T]."""
        was_target_BT = F.pad(batch.labels_BT != IGNORE, (1, 0))[:, :-1] & (batch.positions_BT > 0)
        is_text_BT = batch.modality_BT == Modality.TEXT
        random_BT = torch.rand(is_text_BT.shape, device=is_text_BT.device)
        return was_target_BT & is_text_BT & (random_BT < self.config.loss.word_dropout)

    def spans(self, batch: PackedBatch) -> Tensor | None:
        """Which positions see each other in both directions, int64 [B, T] (-1: none); None where none ever do.

        With `decoder.encoder_layers` those are the encoder's positions.
        """
        if self.config.decoder.encoder_layers:
            return _encoder_spans(batch)
        match self.config.decoder.prefix:
            case "media":
                return _media_spans(batch)
            case "prompt":
                return _prompt_spans(batch)
        return None

    def hidden(self, batch: PackedBatch) -> Tensor:
        """Hidden states after the final norm, [B, T, D]."""
        return self.decoder(
            self.splice(batch),
            batch.positions_BT,
            batch.document_ids_BT,
            batch.modality_BT,
            self.spans(batch),
        )[0]

    def logits(self, batch: PackedBatch) -> Tensor:
        """Logits over the whole vocabulary at every position, [B, T, V]: for tests, not for training."""
        return self.decoder.head(self.hidden(batch))

    def unit_logits(self, hidden: Tensor) -> Tensor:
        """Each codebook's block of the head, filler last, [..., K, codebook size + 1]."""
        assert self.config.audio is not None
        audio = self.config.audio
        logits = F.linear(hidden, self.decoder.head_weight_VD[self.config.num_text :])
        return logits.unflatten(-1, (audio.num_codebooks, audio.codebook_size + 1))

    def forward(self, batch: PackedBatch) -> ModelOutput:
        """Hidden states and routing of a batch. `mmllm.losses` makes losses of them.

        Args:
            batch: packed documents; with its metadata, nothing waits for the device.
        """
        batch = batch.with_metadata()
        assert batch.metadata is not None
        x_BTD, clips_CSD = self._splice(batch, batch.metadata.media)
        hidden_QD, routing = self.decoder.packed(
            x_BTD, batch.positions_BT, batch.metadata.sequences, batch.modality_BT, self.spans(batch)
        )
        if clips_CSD is not None:
            clips_CSD = clips_CSD.clone()  # FSDP2 hooks itself to outputs, which it can't do to a view
        return ModelOutput(hidden_QD, batch.metadata, clips_CSD, routing, self._touch_unused(batch, x_BTD))

    def _touch_unused(self, batch: PackedBatch, x_BTD: Tensor) -> Tensor:
        """Zero, through every parameter that this batch may not have used.

        Otherwise a rank with text alone would leave gradients out that other ranks wait for.
        """
        assert batch.metadata is not None
        has_clips, has_frames = len(batch.clip_codes_CFK) > 0, len(batch.metadata.media.frames_F) > 0
        modules: list[nn.Module | None] = []  # the CTC head's loss passes it in every batch
        if not batch.num_images and not self.always_runs_tower:
            modules += [self.vision, self.image_projector]
        if not has_clips:
            modules.append(self.clip_projector)
        if not has_frames:
            modules.append(self.unit_projector)
        if not has_clips and not has_frames:
            modules.append(self.code_embedding)
        if not len(batch.metadata.media.pointers_W):
            modules.append(self.pointer)
        parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
        if self.mask_embedding is not None:
            parameters.append(self.mask_embedding)
        return sum((parameter.sum() * 0.0 for parameter in parameters), start=x_BTD.new_zeros(()))


def _media_spans(batch: PackedBatch) -> Tensor:
    """Each picture's slots and each clip's are one span."""
    modality_BT = batch.modality_BT
    is_media_BT = (modality_BT == Modality.IMAGE) | (modality_BT == Modality.AUDIO)
    before_BT = F.pad(modality_BT, (1, 0), value=-1)[:, :-1]
    begins = ((modality_BT != before_BT) | (batch.positions_BT == 0)).flatten()
    if batch.image_slots_NS.numel():  # two pictures may follow each other without a word between
        starts_N, numbers_N = batch.image_slots_NS[:, 0], batch.image_tiles_N3[:, 0]
        if len(numbers_N):  # a picture's tiles are one span
            is_first_N = F.pad(numbers_N, (1, 0), value=-1)[:-1] != numbers_N
            begins = begins.index_copy(0, starts_N, is_first_N | begins[starts_N])
        else:
            begins = begins.index_fill(0, starts_N, True)
    if batch.clip_slots_CS.numel():
        begins = begins.index_fill(0, batch.clip_slots_CS[:, 0].clamp(min=0), True)
    spans_BT = begins.long().cumsum(0).view_as(modality_BT)
    return torch.where(is_media_BT, spans_BT, -1)


def _encoder_spans(batch: PackedBatch) -> Tensor:
    """All of a document before the position that predicts its first target, which is at most its last one."""
    spans_BT, document_ids_BT = _prompt_spans(batch), batch.document_ids_BT
    goes_on_BT = F.pad(spans_BT, (0, 1), value=-1)[:, 1:] == document_ids_BT
    return torch.where(goes_on_BT, spans_BT, -1)


def _prompt_spans(batch: PackedBatch) -> Tensor:
    """All of a document up to the position that predicts its first target."""
    has_target_BT = batch.labels_BT != IGNORE
    if batch.audio_labels_BTK.shape[-1]:
        has_target_BT = has_target_BT | (batch.audio_labels_BTK != IGNORE).any(dim=-1)
    earlier_BT = count_in_document(has_target_BT, batch.positions_BT) - has_target_BT.long()
    is_prompt_BT = (earlier_BT == 0) & (batch.document_ids_BT >= 0)
    return torch.where(is_prompt_BT, batch.document_ids_BT, -1)
