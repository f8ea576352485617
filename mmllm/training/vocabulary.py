"""What a decoder module takes from its tokenizer folder: sizes, ids, tiles, speech's pointer, words that weigh more."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping

from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import AudioConfig, MultimodalModel
from mmllm.model.pointer import PointerConfig
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import AUDIO_END, PAD, Vocabulary

log = logging.getLogger(__name__)


def with_vocabulary(
    decoder: DecoderConfig, audio: AudioConfig | None, folder: TokenizerFolder
) -> tuple[DecoderConfig, AudioConfig | None]:
    """The configs with the sizes that the tokenizer folder decides; 0 stands for any.

    Raises:
        ValueError: a size that is given contradicts the folder.
    """
    vocabulary: Vocabulary = folder.vocabulary
    if audio is not None and vocabulary.num_codebooks == 0:
        log.info("the tokenizer folder has no codec: the model gets no audio")
        audio = None
    if audio is not None:
        wanted = {"num_codebooks": vocabulary.num_codebooks, "codebook_size": vocabulary.codebook_size}
        for key, value in {**wanted, "heard_codebooks": folder.heard_codebooks}.items():
            _check_size(f"audio.{key}", getattr(audio, key) or 0, value)
        codebook_dim = audio.codebook_dim or folder.codebooks_KVD.shape[-1]
        ids = {"audio_end_id": folder.id(AUDIO_END), "pad_id": folder.id(PAD)}
        pointer = _with_rule(audio.pointer, folder)
        heard = folder.config.heard_codebooks
        audio = dataclasses.replace(
            audio, codebook_dim=codebook_dim, heard_codebooks=heard, pointer=pointer, **wanted, **ids
        )
        if audio.projector.pool != folder.audio_pool:
            raise ValueError(
                f"audio.projector.pool is {audio.projector.pool} but the tokenizer folder's audio_pool is "
                f"{folder.audio_pool}; set audio.projector.pool to {folder.audio_pool}"
            )
    _check_size("decoder.vocab_size", decoder.vocab_size, vocabulary.size)
    return dataclasses.replace(decoder, vocab_size=vocabulary.size), audio


def word_ids(weights: Mapping[str, float] | None, folder: TokenizerFolder | None) -> dict[int, float]:
    """`loss.word_weights` by id: of each word with and without a space before it.

    Words that are several tokens weigh as all do, and are named in a warning: their pieces are other words' too.

    Raises:
        ValueError: there is no tokenizer.
    """
    if not weights:
        return {}
    if folder is None:
        raise ValueError("loss.word_weights is set but tokenizer is not; words need a tokenizer")
    found = {}
    for word, weight in weights.items():
        whole = [ids for ids in (folder.text.encode(word), folder.text.encode(f" {word}")) if len(ids) == 1]
        if not whole:
            num_pieces = len(folder.text.encode(f" {word}"))
            log.warning("loss.word_weights: %r weighs as all do: it is %d tokens of the tokenizer", word, num_pieces)
        found |= {token_id: weight for (token_id,) in whole}
    return found


def _with_rule(pointer: PointerConfig | None, folder: TokenizerFolder) -> PointerConfig | None:
    """The pointer's config with the folder's `pointer.max_advance`.

    Raises:
        ValueError: one of them has a pointer and the other none, or another.
    """
    rule = folder.config.pointer
    if (rule is None) != (pointer is None):
        said, other = ("the tokenizer folder", "audio.pointer") if pointer is None else ("audio.pointer", "the folder")
        raise ValueError(
            f"{said} has a pointer for speech, but {other} has none; set audio.pointer to {{}} and assemble the "
            f"tokenizer folder with --pointer, or leave both out"
        )
    if rule is None or pointer is None:
        return None
    _check_size("audio.pointer.max_advance", pointer.max_advance, rule.max_advance)
    return dataclasses.replace(pointer, max_advance=rule.max_advance)


def _check_size(key: str, got: int, wanted: int) -> None:
    if got not in (0, wanted):
        raise ValueError(f"{key} is {got} but the tokenizer folder says {wanted}; set it to {wanted} or to 0")


def with_tiles(config: ImageProjectorConfig, folder: TokenizerFolder) -> ImageProjectorConfig:
    """The image projector's config with the folder's `tiling.max_tiles`.

    Raises:
        ValueError: it has another.
    """
    tiling = folder.config.tiling
    wanted = 1 if tiling is None else tiling.max_tiles
    if config.max_tiles not in (1, wanted):
        raise ValueError(
            f"image_projector.max_tiles is {config.max_tiles} but the tokenizer folder's tiling makes it {wanted}; set "
            f"it to {wanted}, or leave it out"
        )
    return dataclasses.replace(config, max_tiles=wanted)


def check_image_slots(model: MultimodalModel, folder: TokenizerFolder) -> None:
    """Refuses a projector that fills other slots than the folder lays out.

    Raises:
        ValueError: the message names both numbers.
    """
    assert model.vision is not None
    got, wanted = model.num_image_tokens, folder.num_image_tokens
    if got != wanted:
        raise ValueError(
            f"the image projector fills {got} slots an image but the tokenizer folder's image_tokens is {wanted}; "
            f"set image_projector.num_tokens to {wanted} with kind average, perceiver or c_abstractor, or build the "
            f"folder anew"
        )
    if model.vision.image_size != folder.image_size:
        raise ValueError(
            f"the image tower sees {model.vision.image_size} pixels but the tokenizer folder's image_size is "
            f"{folder.image_size}; choose a tower of that size or build the folder anew"
        )
