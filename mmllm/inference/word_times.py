"""When the words of a transcript are said, and whether they are said at all, by the model's own CTC head.

Shapes: K codebooks, F frames, S slots, V ids, L tokens, H hops (100 a second).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
import torch
from torch import Tensor

from mmllm.inference.generate import evaluating
from mmllm.inference.inputs import AudioPart
from mmllm.inference.voice_activity import HOP_SECONDS, loud_hops, measure_levels, spoken_hops
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.alignment import WordTime, text_words
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.letter_paths import Peak, path_peaks
from mmllm_tokenizers.sound import to_mono

_REACH_SECONDS = 1.0
"""How far from where it is heard a word reaches at most, where no other word is near."""
_HALFWAY_SECONDS = 0.1
"""As if so much speech lay ahead of a first peak and as much behind a last one: few words alone tell little."""


@dataclass(frozen=True)
class Alignment:
    """A text beside what the CTC head hears.

    Attributes:
        no_speech: share of the text's tokens that aren't heard, from 0 to 1: of the slots nearer to a token than to
            another one, the probability that anything is said in them, together, is less than 1.
        words: when each word (`text_words`) is said, in seconds; its confidence is the mean probability of its tokens
            where they are heard. None: the sound is too short for the text.
        missed: share of each word's tokens that aren't heard.
    """

    no_speech: float
    words: tuple[WordTime, ...] | None = None
    missed: tuple[float, ...] = ()


def align_words(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    codes_KF: Tensor,
    sound: AudioPart,
    text: str,
    durations_F: Tensor | None = None,
) -> Alignment | None:
    """When each word of a text is said in a sound, and whether it is.

    Args:
        model: that hears.
        tokenizer: of the model.
        codes_KF: of the sound.
        sound: whose level tells pauses between words.
        text: that was written.
        durations_F: how many frames each code lasts; None: one each.

    Returns:
        None: there is no CTC head, or no word.
    """
    words = text_words(text)
    if model.ctc_head is None or not words:
        return None
    assert model.config.audio is not None
    blank = model.config.audio.pad_id
    with evaluating(model) if model.training else torch.no_grad():  # going through all modules takes milliseconds
        codes_1FK = codes_KF.T[None].to(model.decoder.head_weight_VD.device)
        log_probs_1SV = model.ctc_head(model.clip_embedding(codes_1FK)).float().log_softmax(dim=-1).cpu()
    log_probs_SV = log_probs_1SV[0]
    ids = [tokenizer.text.encode(word if number == 0 else f" {word}") for number, word in enumerate(words)]
    flat = [token for word in ids for token in word]
    said_S = (1.0 - log_probs_SV[:, blank].exp()).clamp(min=0.0).numpy()
    slot_seconds = tokenizer.audio_pool / tokenizer.frame_rate
    try:
        peaks = path_peaks(log_probs_SV, flat, blank, slot_seconds)
    except ValueError:  # more tokens than slots
        return Alignment(1.0 - min(1.0, float(said_S.sum()) / len(flat)))
    missed_L, sure_L = 1.0 - _heard(said_S, peaks), np.array([peak.probability for peak in peaks])
    spans = list(pairwise(np.cumsum([0, *map(len, ids)]).tolist()))
    starts_S = None if durations_F is None else _slot_starts(durations_F, tokenizer)
    middles = [_middle(peaks[first:last], slot_seconds, starts_S) for first, last in spans]
    times = _times(middles, sound)
    timed = tuple(
        WordTime(word, start, end, None, min(1.0, float(sure_L[first:last].mean())))
        for word, (start, end), (first, last) in zip(words, times, spans, strict=True)
    )
    missed = tuple(float(missed_L[first:last].mean()) for first, last in spans)
    return Alignment(float(missed_L.mean()), timed, missed)


def _heard(said_S: np.ndarray, peaks: list[Peak]) -> np.ndarray:
    """float64 [L]: how much of each token is heard, from 0 to 1."""
    middles = [(peak.first + peak.last + 1) / 2 for peak in peaks]
    bounds = [0, *(round((one + other) / 2) for one, other in pairwise(middles)), len(said_S)]
    return np.array([min(1.0, float(said_S[first:last].sum())) for first, last in pairwise(bounds)])


def _slot_starts(durations_F: Tensor, tokenizer: TokenizerFolder) -> np.ndarray:
    """float64 [S + 1], seconds: when each slot begins whose codes last so many frames, and when the last one ends."""
    ends_F = np.concatenate([[0], durations_F.cumsum(0).numpy()])
    places_S = [*range(0, len(durations_F), tokenizer.audio_pool), len(durations_F)]
    return ends_F[places_S] / tokenizer.frame_rate


def _middle(word: list[Peak], slot_seconds: float, starts_S: np.ndarray | None) -> float:
    """Seconds: the middle between the first slot and the last in which a word is heard."""
    if starts_S is None:
        return (word[0].first + word[-1].last + 1) / 2 * slot_seconds
    return float(starts_S[word[0].first] + starts_S[word[-1].last + 1]) / 2


def _times(middles: list[float], sound: AudioPart) -> list[tuple[float, float]]:
    """(start, end) of words from where their tokens are heard, in seconds, and the pauses between them.

    A stretch of speech between two pauses begins with its first word and ends with its last one. Where in a word a head
    puts its token differs from model to model (the demo's: near its beginning). How far it is from a stretch's
    beginning to its first peak, and from its last one to its end, tells by what share of the way from one peak to the
    next the second word begins.
    """
    levels = measure_levels(to_mono(sound.wave_CT).numpy(), sound.sample_rate)
    found = spoken_hops(loud_hops(levels))
    spans = [(first * HOP_SECONDS, min(last * HOP_SECONDS, sound.seconds)) for first, last in found]
    spans = spans or [(0.0, sound.seconds)]
    middles = [min(middle, sound.seconds) for middle in middles]
    nearest = [min(spans, key=lambda span: max(span[0] - middle, middle - span[1], 0.0)) for middle in middles]
    groups = [[*group] for _, group in groupby(range(len(middles)), key=lambda place: nearest[place])]
    ahead = [max(0.0, middles[group[0]] - nearest[group[0]][0]) for group in groups]
    behind = [max(0.0, nearest[group[-1]][1] - middles[group[-1]]) for group in groups]
    share = (sum(behind) + _HALFWAY_SECONDS) / (sum(ahead) + sum(behind) + 2 * _HALFWAY_SECONDS)
    times = []
    for group in groups:
        own, (start, end) = [middles[place] for place in group], nearest[group[0]]
        start = min(max(start, own[0] - _REACH_SECONDS), own[0])
        end = max(min(end, own[-1] + _REACH_SECONDS), own[-1])
        times += pairwise([start, *(one + share * (other - one) for one, other in pairwise(own)), end])
    return times
