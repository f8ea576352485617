"""Transcripts of recordings against their texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch

from mmllm.data.rows.media import Media, media_source
from mmllm.data.rows.rows import Row
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.metrics import character_edits, error_rate
from mmllm.evaluation.results import Prediction, TaskResult
from mmllm.evaluation.scoring import (
    causes,
    derangement,
    edits_of_words,
    greedy_settings,
    mean_scores,
    rate_scores,
    scored_set,
)
from mmllm.inference.inputs import Audio, AudioPart, as_audio

MAX_JOINED = 100
"""Pairs of recordings that are transcribed as one."""
JOINED_PAUSE_SECONDS = 0.3
"""Of silence between the two."""


def evaluate_transcripts(model: AskedModel, rows: Sequence[Row], batch_size: int, seed: int) -> TaskResult:
    """WER and CER over all words and characters, and rows without an error; `heldout_voice` rows apart.

    `shuffled_wer` is that of other sounds' transcripts. Voices never heard are drawn whole for their interval.
    `joined_wer` is of two recordings of one speaker as one sound, of test rows: longer than any of them alone; there is
    none with shots.
    """
    sounds = cast("list[Any]", [media_source(cast("Media", row.audio)) for row in rows])
    settings = greedy_settings(model, [row.text for row in rows], batch_size)
    said = model.transcribe(sounds, **settings, rows=rows)
    blind = model.transcribe(sounds, blind=True, **settings, rows=rows)
    scores: dict[str, Any] = {}
    predictions = []
    for group in ("test", "heldout_voices"):
        places = [place for place, row in enumerate(rows) if (scored_set(row) == "heldout_voices") == (group != "test")]
        if not places:
            continue
        references = [rows[i].text for i in places]
        clusters = causes([rows[i] for i in places])
        edits = edits_of_words([said[i] for i in places], references)
        blind_edits = edits_of_words([blind[i] for i in places], references)
        if group == "test":
            letters = [character_edits(said[i], rows[i].text) for i in places]
            blind_letters = [character_edits(blind[i], rows[i].text) for i in places]
            scores |= rate_scores("wer", edits, seed, clusters) | rate_scores("cer", letters, seed, clusters)
            scores |= mean_scores("exact_match", [e.errors == 0 for e in edits], seed, clusters)
            scores["n"] = len(places)
            scores |= rate_scores("blind_wer", blind_edits, seed, clusters)
            if len(places) > 1:
                others = [said[places[i]] for i in derangement(len(places), seed)]
                scores |= rate_scores("shuffled_wer", edits_of_words(others, references), seed, clusters)
            scores["blind_cer"] = error_rate(blind_letters)
            scores["blind_exact_match"] = float(np.mean([e.errors == 0 for e in blind_edits]))
        else:
            scores |= rate_scores("heldout_voices_wer", edits, seed, clusters)
            scores["heldout_voices_n"] = len(places)
            voices = {rows[i].metadata.get("speaker") for i in places}
            if None not in voices:
                scores["num_heldout_voices"] = len(voices)
            scores["blind_heldout_voices_wer"] = error_rate(blind_edits)
        predictions += [
            Prediction(
                rows[i].id, rows[i].text, said[i], 1.0 - edit.rate, edit.errors == 0, group, blind[i],
                audio=str(rows[i].audio),
            )
            for i, edit in zip(places, edits, strict=True)
        ]  # fmt: skip
    if model.shots is None:  # they are drawn for single rows
        scores |= _joined_scores(model, [row for row in rows if scored_set(row) != "heldout_voices"], batch_size, seed)
    return TaskResult("transcribe", scores, predictions)


def _joined_scores(model: AskedModel, rows: Sequence[Row], batch_size: int, seed: int) -> dict[str, Any]:
    """Of neighbouring rows of each speaker, two by two; nothing where no two fit into what the model hears."""
    waiting: dict[Any, Row] = {}
    joined: list[Audio] = []
    texts = []
    longest = model.longest_seconds
    for row in rows:
        if len(joined) == MAX_JOINED or row.metadata.get("speaker") is None:
            continue
        first = waiting.pop(row.metadata["speaker"], None)
        if first is None:
            waiting[row.metadata["speaker"]] = row
            continue
        sound = _in_one(*(as_audio(cast("Any", media_source(cast("Media", each.audio)))) for each in (first, row)))
        if sound is not None and (longest is None or sound.seconds <= longest):
            joined.append(Audio(sound.wave_CT, sound.sample_rate))
            texts.append(f"{first.text} {row.text}")
    if not joined:
        return {}
    said = model.transcribe(cast("list[Any]", joined), **greedy_settings(model, texts, batch_size))
    return {**rate_scores("joined_wer", edits_of_words(said, texts), seed, None), "joined_n": len(joined)}


def _in_one(first: AudioPart, second: AudioPart) -> AudioPart | None:
    """Two sounds and silence between them; None: their rates or channels differ."""
    rate, (num_channels, _) = first.sample_rate, first.wave_CT.shape
    if (second.sample_rate, len(second.wave_CT)) != (rate, num_channels):
        return None
    silence_CT = first.wave_CT.new_zeros(num_channels, round(JOINED_PAUSE_SECONDS * rate))
    return AudioPart(torch.cat([first.wave_CT, silence_CT, second.wave_CT], dim=1), rate)
