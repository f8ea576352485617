"""A voice from a short recording: its units are gone on from, as if the same speaker said the text next.

Source: VALL-E (https://arxiv.org/abs/2301.02111) prompts a codec language model in this way; here the recording's words
are aligned first, by the CTC head of the model itself.

Shapes: K codebooks, F frames, L letters, T tokens, S slots, V ids, P positions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import IGNORE, Modality
from mmllm.data.samples.document import Document, pattern_codes
from mmllm.data.samples.pointers import Pointer
from mmllm.inference.generate import evaluating
from mmllm.losses.ctc import ctc_losses
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime, text_words
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.letter_paths import path_peaks
from mmllm_tokenizers.pointer import PointerRule, Spelling, ages, follow, letter_starts

KEPT_SECONDS = 0.04
"""Of the silence before and behind what is said in a recording; the rest is cut off."""
_HOP_SECONDS = 0.01
_SILENT_DB, _ABOVE_FLOOR_DB, _SPOKEN_DB = -40.0, 6.0, -20.0
"""Against the loudest 10 ms. Silence lies below the first, or, where a recording hisses, less than the second above its
quietest; what lies above the third is never silence."""


@dataclass(frozen=True)
class Recording:
    """A short recording of a voice.

    Attributes:
        codes_KF: int64, its units, silence at its ends cut off.
        text: what is said in it.
        words: when, from the first of these units.
    """

    codes_KF: Tensor
    text: str
    words: tuple[WordTime, ...]


def align_recording(model: MultimodalModel, tokenizer: TokenizerFolder, codes_KF: Tensor, text: str) -> Recording:
    """When the words of a recording are said, by the model's CTC head; silence at its ends is cut off first.

    The head tells words apart, but not a word from silence before or behind it: where speech begins and ends is told by
    the level of the sound that the units make.

    Args:
        model: that hears.
        tokenizer: of the model.
        codes_KF: the recording's units.
        text: what is said in it.

    Raises:
        ValueError: the model has no CTC head, the text says nothing, or it is too long for the recording.
    """
    if model.ctc_head is None:
        raise ValueError("this model has no CTC head to align a recording with; train it with loss.ctc above 0")
    words = text_words(text)
    if not words:
        raise ValueError(f"the recording's text {text!r} has no word; give what is said in it")
    codes_KF, begin_seconds, end_seconds = _trimmed(codes_KF, tokenizer)
    ids = [tokenizer.text.encode(word if number == 0 else f" {word}") for number, word in enumerate(words)]
    flat = [token for word in ids for token in word]
    with evaluating(model):
        codes_CFK = codes_KF.T[None].to(model.decoder.head_weight_VD.device)
        log_probs_1SV = model.ctc_head(model.clip_embedding(codes_CFK)).float().log_softmax(dim=-1).cpu()
    assert model.config.audio is not None
    log_probs_SV = log_probs_1SV[0]
    slot_seconds = codes_KF.shape[1] / tokenizer.frame_rate / len(log_probs_SV)
    try:
        peaks = path_peaks(log_probs_SV, flat, model.config.audio.pad_id, slot_seconds)
    except ValueError as error:
        raise ValueError(f"the recording doesn't fit its text {text!r}: {error}; give what is said in it") from error
    middles = [(peak.first + peak.last + 1) / 2 * slot_seconds for peak in peaks]
    starts = [begin_seconds, *((before + after) / 2 for before, after in pairwise(middles))]
    first_tokens = np.cumsum([0, *(len(word) for word in ids)])[:-1].tolist()
    begins = np.clip([*(starts[token] for token in first_tokens), end_seconds], begin_seconds, end_seconds).tolist()
    times = (WordTime(word, start, end) for word, (start, end) in zip(words, pairwise(begins), strict=True))
    return Recording(codes_KF, text, tuple(times))


def _trimmed(codes_KF: Tensor, tokenizer: TokenizerFolder) -> tuple[Tensor, float, float]:
    """Units with little silence at both ends, and from when to when something is said in them."""
    audio = tokenizer.require_audio()
    wave = audio.decode(codes_KF)
    begin_seconds, end_seconds = _speech_span(torch.atleast_2d(wave).mean(dim=0).numpy(), audio.sample_rate)
    num_frames = codes_KF.shape[1]
    first = max(0, math.floor((begin_seconds - KEPT_SECONDS) * tokenizer.frame_rate))
    last = min(num_frames, math.ceil((end_seconds + KEPT_SECONDS) * tokenizer.frame_rate))
    cut_seconds, duration = first / tokenizer.frame_rate, (last - first) / tokenizer.frame_rate
    return codes_KF[:, first:last], begin_seconds - cut_seconds, min(end_seconds - cut_seconds, duration)


def _speech_span(wave_T: np.ndarray, sample_rate: int) -> tuple[float, float]:
    """From when to when a sound isn't silent, in seconds; all of it where nothing tells."""
    hop = max(1, round(_HOP_SECONDS * sample_rate))
    num_hops = len(wave_T) // hop
    powers = np.square(wave_T[: num_hops * hop], dtype=np.float64).reshape(num_hops, hop).mean(axis=1)
    if not powers.any():
        return 0.0, len(wave_T) / sample_rate
    level_db = 10 * np.log10(np.maximum(powers / powers.max(), 1e-12))
    floor_db = min(np.quantile(level_db, 0.05) + _ABOVE_FLOOR_DB, _SPOKEN_DB)
    loud = np.flatnonzero(level_db > max(_SILENT_DB, floor_db))
    last = len(wave_T) if loud[-1] == num_hops - 1 else (loud[-1].item() + 1) * hop
    return loud[0].item() * hop / sample_rate, last / sample_rate


def begin(prompt: Document, text: str, recording: Recording, tokenizer: TokenizerFolder) -> Document:
    """A prompt to speak the recording's text and then another, of which the recording is already said.

    Args:
        prompt: `build_prompt("speak", text=f"{recording.text} {text}")`.
        text: what is to be said.
        recording: of a voice.
        tokenizer: of the model.

    Raises:
        ValueError: the recording's text is too long for it.
    """
    assert prompt.pointer is not None, "a recording is gone on from by a pointer"
    codes_KF, rate = recording.codes_KF.numpy(), tokenizer.frame_rate
    num_frames = codes_KF.shape[1]
    rule = tokenizer.config.pointer or PointerRule()
    starts_L = letter_starts(recording.text, recording.words, num_frames / rate)
    pointer_F = follow(starts_L, num_frames, rate, rule)
    # Behind the recording's last word there is one space, with which the new text begins.
    places_F = np.append(pointer_F, len(starts_L) - 1)
    is_same_text = len(Spelling.of(text).letters_L) + len(starts_L) - 1 == (prompt.pointer.letters_L >= 0).sum()
    assert is_same_text, "the prompt says the recording's text and then the other"
    codes_PK = pattern_codes(codes_KF, tokenizer).T[:num_frames]
    pointer = Pointer(
        prompt.pointer.letters_L,
        np.concatenate([prompt.pointer.places_T[:-1], places_F]),
        np.concatenate([prompt.pointer.ages_T[:-1], ages(places_F)]),
        np.full(prompt.num_tokens + num_frames, IGNORE, dtype=np.int64),
    )
    first_id = tokenizer.vocabulary.codebook_start(0)
    return replace(
        prompt,
        token_ids_T=np.concatenate([prompt.token_ids_T, codes_PK[:, 0] + first_id]),
        targets_T=np.concatenate([prompt.targets_T, np.zeros(num_frames, dtype=bool)]),
        modality_T=np.concatenate([prompt.modality_T, np.full(num_frames, int(Modality.UNITS), dtype=np.int64)]),
        codes_TK=np.concatenate([prompt.codes_TK, codes_PK]),
        has_units=True,
        pointer=pointer,
    )


def ctc_scores(
    model: MultimodalModel, tokenizer: TokenizerFolder, sounds: list[Tensor], texts: list[str]
) -> list[float]:
    """How well the model hears each text in its sound: nats of CTC loss a token; infinite where there is no room.

    Args:
        model: that hears.
        tokenizer: of the model.
        sounds: codes [K, F] of each.
        texts: what each should say.

    Raises:
        ValueError: the model has no CTC head.
    """
    if model.ctc_head is None:
        raise ValueError("best_of needs the CTC head of the model, which has none; train it with loss.ctc above 0")
    assert model.config.audio is not None
    blank, scores = model.config.audio.pad_id, []
    device = model.decoder.head_weight_VD.device
    with evaluating(model):
        for codes_KF, text in zip(sounds, texts, strict=True):
            ids_1L = torch.tensor([tokenizer.text.encode(text)])
            slots_1SD = model.clip_embedding(_as_heard(codes_KF, tokenizer).T[None].to(device))
            log_probs_1SV = model.ctc_head(slots_1SD).float().log_softmax(dim=-1).cpu()
            lengths = [log_probs_1SV.shape[1]], [ids_1L.shape[1]]
            (loss,) = ctc_losses(log_probs_1SV, ids_1L, *lengths, blank=blank).tolist()
            scores.append(loss / ids_1L.shape[1])
    return scores


def _as_heard(codes_KF: Tensor, tokenizer: TokenizerFolder) -> Tensor:
    """Units as codes of a sound that is heard: where these are more, those of the sound that the units make."""
    audio, num_frames = tokenizer.require_audio(), codes_KF.shape[1]
    if tokenizer.heard_codebooks == len(codes_KF) or not num_frames:
        return codes_KF
    return audio.encode(audio.decode(codes_KF), audio.sample_rate)
