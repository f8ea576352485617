"""Transcripts of two recordings in one, as the task `transcribe` scores them beside one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import soundfile

from mmllm.data.rows.rows import Row
from mmllm.evaluation import transcript_task
from mmllm.evaluation.transcript_task import evaluate_transcripts
from mmllm.inference.inputs import as_audio

RATE = 8000


class Listener:
    """Says what the levels of a sound's halves stand for; of two it mistakes the second word for "x"."""

    def __init__(self, longest: float | None) -> None:
        self.longest_seconds = longest
        self.tokenizer: Any = None
        self.shots = None
        self.heard: list[np.ndarray] = []

    def transcribe(self, sounds: list[Any], blind: bool = False, **settings: Any) -> list[str]:
        texts = []
        for sound in sounds:
            part = as_audio(sound)
            assert part.sample_rate == RATE
            wave = part.wave_CT[0].numpy()
            self.heard.append(wave)
            texts.append("a b" if len(wave) == RATE // 2 else "a b a x")
        return texts


@pytest.fixture
def rows(tmp_path) -> list[Row]:
    """Five recordings of half a second, of three speakers, and one that names none."""
    found = []
    for number, speaker in enumerate(["ann", "bob", "ann", "ann", "cid", None]):
        wave = np.full(RATE // 2, 0.1 * (number + 1), dtype=np.float32)
        path = tmp_path / f"{number}.wav"
        soundfile.write(path, wave, RATE, subtype="FLOAT")
        metadata = {} if speaker is None else {"speaker": speaker}
        found.append(Row(str(number), "audio", text="a b", audio=path, metadata=metadata, where="rows"))
    return found


def scored(monkeypatch, rows: list[Row], longest: float | None = None) -> tuple[Listener, dict[str, Any]]:
    listener = Listener(longest)
    monkeypatch.setattr(transcript_task, "greedy_settings", lambda model, texts, batch_size: {})
    return listener, evaluate_transcripts(listener, rows, 8, 0).scores  # pyright: ignore[reportArgumentType]


def test_two_recordings_of_one_speaker_are_heard_as_one(monkeypatch, rows):
    listener, scores = scored(monkeypatch, rows)
    assert scores["joined_n"] == 1, "ann's first two; her third, and those of others, have no second"
    assert scores["joined_wer"] == 0.25 and scores["wer"] == 0.0
    wave, pause = listener.heard[-1], round(0.3 * RATE)
    half = RATE // 2
    assert len(wave) == 2 * half + pause
    np.testing.assert_allclose(wave[:half], 0.1, rtol=1e-6)
    assert not wave[half : half + pause].any()
    np.testing.assert_allclose(wave[half + pause :], 0.3, rtol=1e-6)


def test_what_the_model_cannot_hear_at_once_is_not_joined(monkeypatch, rows):
    assert "joined_wer" not in scored(monkeypatch, rows, longest=1.29)[1]
    assert scored(monkeypatch, rows, longest=1.31)[1]["joined_n"] == 1


def test_voices_never_heard_are_not_joined(monkeypatch, rows):
    for row in rows:
        row.metadata["heldout_voice"] = True
    assert "joined_wer" not in scored(monkeypatch, rows)[1]


def test_there_are_not_too_many(monkeypatch, rows):
    monkeypatch.setattr(transcript_task, "MAX_JOINED", 2)
    many = [
        Row(f"{i}", "audio", text="a b", audio=rows[0].audio, metadata={"speaker": "ann"}, where="rows")
        for i in range(9)
    ]
    assert scored(monkeypatch, many)[1]["joined_n"] == 2
