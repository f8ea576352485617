"""Speech out: what is spoken, transcribed back by the model and by a judge; its length, level and spectrum.

Shapes: T samples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scoring import causes, derangement, edits_of_words, greedy_settings, rate_scores, scored_set
from mmllm.inference.inputs import AudioPart, as_audio
from mmllm.inference.speaking import Waveform
from mmllm_tokenizers.aligner import Aligner
from mmllm_tokenizers.audio_tokenizer import AudioTokenizer
from mmllm_tokenizers.sound_quality import level_db, mel_error

SPEECH_MARGIN = 1.5
"""Without a pointer, synthesis is stopped at this many times the length of the longest real sound of the rows."""
MIN_SPEECH_SECONDS = 2.0


@dataclass(frozen=True)
class Judge:
    """Who writes down what is spoken, sharing nothing with the model: an aligner, and the words that it may write."""

    aligner: Aligner
    lexicon: tuple[str, ...] | None = None

    @staticmethod
    def load(folder: str | Path) -> Judge:
        """An aligner's folder, with the words that its training heard."""
        aligner = Aligner.load(folder)
        return Judge(aligner, aligner.config.words or None)

    def transcribe(self, sounds: Sequence[tuple[Tensor, int]]) -> list[str]:
        """What is said in each (samples, rate)."""
        texts: list[str] = [""] * len(sounds)
        for rate in sorted({rate for _, rate in sounds}):
            places = [place for place, sound in enumerate(sounds) if sound[1] == rate]
            heard = self.aligner.transcribe([sounds[place][0] for place in places], rate, self.lexicon)
            for place, text in zip(places, heard, strict=True):
                texts[place] = text
        return texts


def evaluate_speech(
    model: AskedModel,
    rows: Sequence[Row],
    batch_size: int,
    seed: int,
    media_dir: Path | None,
    judge: Judge | None = None,
) -> TaskResult:
    """Speaks each row's text in its speaker's voice, or another that the model speaks, and transcribes that back.

    Controls: `shuffled_wer` scores the same transcripts against other rows' texts; `resynthesis_wer` transcribes the
    real speech after it went through the codec and back. `judge_wer` and `judge_resynthesis_wer` are a judge's, who
    shares nothing with the model; its WER on the recordings themselves is `judge_recording_wer`, and that of what is
    spoken against other rows' texts `judge_shuffled_wer`. `length_correlation`
    is of the spoken and the real lengths; where some rows are said by another voice than their own,
    `own_voice_length_correlation` is of the `own_voice_n` others, as voices differ in their speed. `at_bound` is the
    share of rows that ran into a bound of time, of a letter or of all. `level_db` and `mel_error` (dB) compare the
    codec's resynthesis with the recordings. Rows of held-out voices are left out where there are others, since their
    voices can't be asked for.
    """
    rows = [row for row in rows if scored_set(row) != "heldout_voices"] or list(rows)
    texts = [row.text for row in rows]
    sounds = [as_audio(cast("Any", media_source(cast("Media", row.audio)))) for row in rows]
    longest = _longest(model, sounds) if model.model.pointer is None else None
    voices = _voices(model, rows)
    spoken = model.speak(texts, voices, seed, longest)
    written: list[str | None] = [None] * len(rows)
    if media_dir is not None:
        for number, waveform in enumerate(spoken):
            path = media_dir / f"{number:05d}.wav"
            waveform.save(path)
            written[number] = str(path)
    heard_inputs = cast("list[Any]", [
        path or (waveform.samples, waveform.sample_rate) for path, waveform in zip(written, spoken, strict=True)
    ])  # fmt: skip
    greedy = greedy_settings(model, texts, batch_size)
    heard = model.transcribe(heard_inputs, **greedy)
    audio = model.tokenizer.require_audio()
    again = [_resynthesize(audio, sound, model.tokenizer.num_codebooks) for sound in sounds]
    resynthesized = model.transcribe(cast("list[Any]", again), **greedy)
    edits, clusters = edits_of_words(heard, texts), causes(rows)
    scores = rate_scores("round_trip_wer", edits, seed, clusters)
    others = [texts[i] for i in derangement(len(rows), seed)] if len(rows) > 1 else None
    if others is not None:
        scores |= rate_scores("shuffled_wer", edits_of_words(heard, others), seed, clusters)
    scores |= rate_scores("resynthesis_wer", edits_of_words(resynthesized, texts), seed, clusters)
    if judge is not None:
        scores |= _judged(judge, texts, others, spoken, again, sounds, seed, clusters)
    is_own = np.array([voice == _speaker(row) for voice, row in zip(voices, rows, strict=True)])
    scores |= _lengths(spoken, sounds, is_own) | _quality(audio, again, sounds)
    scores["n"] = len(rows)
    predictions = [
        Prediction(
            row.id, row.text, text, 1.0 - edit.rate, edit.errors == 0, audio=str(row.audio), written=path
        )
        for row, text, edit, path in zip(rows, heard, edits, written, strict=True)
    ]  # fmt: skip
    return TaskResult("speak", scores, predictions)


def _longest(model: AskedModel, sounds: Sequence[AudioPart]) -> float:
    generation = model.generation
    bound = min(generation.max_seconds, model.longest_seconds or generation.max_seconds)
    return min(bound, max(SPEECH_MARGIN * max(sound.seconds for sound in sounds), MIN_SPEECH_SECONDS))


def _voices(model: AskedModel, rows: Sequence[Row]) -> list[str | None]:
    """Each row's speaker, or in turn one of those that the model speaks; where these aren't known, none for others."""
    known = model.generation.voices
    voices: list[str | None] = []
    for number, row in enumerate(rows):
        speaker = _speaker(row)
        is_known = not known or speaker in known
        voices.append(speaker if is_known else known[number % len(known)])
    return voices


def _speaker(row: Row) -> str | None:
    speaker = row.metadata.get("speaker")
    return None if speaker is None else str(speaker)


def _judged(
    judge: Judge,
    texts: Sequence[str],
    others: Sequence[str] | None,
    spoken: Sequence[Waveform],
    again: Sequence[tuple[Tensor, int]],
    sounds: Sequence[AudioPart],
    seed: int,
    clusters: Sequence[Hashable] | None,
) -> dict[str, Any]:
    said = [(torch.from_numpy(waveform.samples), waveform.sample_rate) for waveform in spoken]
    recorded = [(sound.wave_CT, sound.sample_rate) for sound in sounds]
    heard = judge.transcribe(said)
    scores = rate_scores("judge_wer", edits_of_words(heard, texts), seed, clusters)
    if others is not None:
        scores |= rate_scores("judge_shuffled_wer", edits_of_words(heard, others), seed, clusters)
    for name, sounds_of in (("judge_resynthesis_wer", again), ("judge_recording_wer", recorded)):
        scores |= rate_scores(name, edits_of_words(judge.transcribe(sounds_of), texts), seed, clusters)
    return scores


def _lengths(spoken: Sequence[Waveform], sounds: Sequence[AudioPart], is_own: np.ndarray) -> dict[str, Any]:
    """Bounds, and how lengths go together: of all rows, and of those said by the voice of their recording."""
    lengths = np.array([[waveform.seconds, sound.seconds] for waveform, sound in zip(spoken, sounds, strict=True)])
    scores: dict[str, Any] = {"at_bound": float(np.mean([bool(w.num_bounded) or not w.is_whole for w in spoken]))}
    sets = {"": np.ones_like(is_own)} if is_own.all() else {"": np.ones_like(is_own), "own_voice_": is_own}
    for name, is_in in sets.items():
        if is_in.sum() > 2 and (lengths[is_in].std(axis=0) > 0).all():
            scores[f"{name}length_correlation"] = float(np.corrcoef(lengths[is_in].T)[0, 1])
    if not is_own.all():
        scores["own_voice_n"] = int(is_own.sum())
    return scores


def _quality(audio: AudioTokenizer, again: Sequence[tuple[Tensor, int]], sounds: Sequence[AudioPart]) -> dict[str, Any]:
    """Of the codec alone: how loud and how near to the recordings what it gives back is."""
    levels, errors = [], []
    for (wave, rate), sound in zip(again, sounds, strict=True):
        recorded = audio.prepare(sound.wave_CT, sound.sample_rate)
        decoded, recorded = (torch.atleast_2d(each).mean(dim=0) for each in (wave, recorded))
        num_samples = min(len(decoded), len(recorded))
        decoded, recorded = decoded[:num_samples], recorded[:num_samples]
        levels.append(float(level_db(decoded, recorded)))
        errors.append(float(mel_error(decoded, recorded, rate)))
    return {"level_db": float(np.mean(levels)), "mel_error": float(np.mean(errors))}


def _resynthesize(audio: AudioTokenizer, sound: AudioPart, num_codebooks: int) -> tuple[Tensor, int]:
    """A real sound after the codec, with the codebooks that the model uses."""
    codes_KF = audio.encode(sound.wave_CT, sound.sample_rate)[:num_codebooks]
    return audio.decode(codes_KF), audio.sample_rate
