"""Sounds whose letters are tones, and when each of their words is said."""

from __future__ import annotations

import numpy as np
import torch

from mmllm_tokenizers.alignment import WordTime

LETTERS = "abcdef"
WORDS = ("ab", "cade", "fed", "bead", "dab", "face", "ebb")
RATE = 8000


def tone_speech(text: str, seed: int) -> tuple[torch.Tensor, list[WordTime]]:
    """Each letter a tone of its own, 60 to 120 ms long; equal ones are parted by a dip; some words by silence."""
    rng = np.random.default_rng(seed)
    pieces = [np.zeros(int(rng.uniform(0.03, 0.2) * RATE))]
    words = []
    for word in text.split():
        starts = []
        for letter in word:
            starts.append(sum(map(len, pieces)) / RATE)
            seconds = np.arange(int(rng.uniform(0.06, 0.12) * RATE)) / RATE
            shape = np.minimum(1, np.minimum(seconds, seconds[-1] - seconds) / 0.01)
            hertz = 350 * 1.4 ** LETTERS.index(letter) * rng.uniform(0.97, 1.03)
            pieces.append(0.3 * shape * np.sin(2 * np.pi * hertz * seconds))
        words.append(WordTime(word, starts[0], sum(map(len, pieces)) / RATE, tuple(starts)))
        if rng.random() < 0.4:
            pieces.append(np.zeros(int(rng.uniform(0.13, 0.2) * RATE)))
    pieces.append(np.zeros(int(rng.uniform(0.03, 0.2) * RATE)))
    wave_T = np.concatenate(pieces)
    return torch.from_numpy(wave_T + 1e-4 * rng.standard_normal(len(wave_T))).float(), words


def tone_texts(num: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(num)]
