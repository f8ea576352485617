"""Speech: words, phrases and sentences that share the scenes' words, said by many espeak-ng voices."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import random
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mmllm.evaluation.scenes import COLORS, SHAPES, SIZES
from mmllm.quickstart.scenes import split_pairs
from mmllm.quickstart.spoken_words import word_times
from mmllm.quickstart.synthesis import Espeak, clean_speech, voices, write_wav
from mmllm_tokenizers.alignment import WordTime, moved

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = {shape: shape + ("es" if shape.endswith("ss") else "s") for shape in SHAPES}
VERBS = ("draw", "find", "show", "move", "paint", "take")
ADVERBS = ("now", "again", "please", "here")
RELATIONS = ("left of", "right of", "above", "below")
PLACES = ("in the centre", "in the middle", "in the corner", "at the top", "at the bottom", "on the left",
          "on the right")  # fmt: skip
FUNCTION_WORDS = ("the", "is", "there", "in", "at", "on", "of", "and", "left", "right", "above", "below", "centre",
                  "middle", "corner", "top", "bottom", "put", "we", "see", "where", "how", "many")  # fmt: skip
CONTENT_WORDS = (*SHAPES, *COLORS, *SIZES, *NUMBERS, *VERBS, *ADVERBS)
WORDS = (*CONTENT_WORDS, *PLURALS.values(), *FUNCTION_WORDS)
"""The words said alone. Sentences also have "a", "an" and "to", which alone would sound like something else."""

ROWS_A_PROCESS = 250
"""Rows that one loaded espeak-ng says; a constant, so that the number of processes cannot change a sample."""
TEST_SHARE = 4
"""Every fourth sentence that the grammar can make is a test sentence."""
PAUSE_SECONDS = (0.15, 0.5)
"""Between sentences that are joined."""
HUSH_DB = (-75.0, -55.0)
"""Level of the noise in such a pause, in decibels of full scale."""
THREE_JOINED = 0.25
"""Share of joined rows of three sentences; the others have two."""


@dataclass(frozen=True)
class Utterance:
    """What one `Espeak` is asked to say, and the file that it goes to."""

    path: Path
    text: str
    voice: str
    words_per_minute: int
    pitch: int
    level_db: float
    joined: tuple[Joined, ...] = ()
    """What is said behind `text`, as one recording."""


@dataclass(frozen=True)
class Joined:
    """A further text of an utterance, and the near-silence before it."""

    text: str
    pause_seconds: float
    hush_db: float
    seed: int
    """Of the noise."""


def sample_utterance(path: Path, text: str, voice: str, rng: random.Random) -> Utterance:
    """An utterance with a speed, pitch and level by chance."""
    return Utterance(path, text, voice, rng.randint(145, 205), rng.randint(35, 65), rng.uniform(-25, -17))


def _sample_joined(text: str, rng: random.Random) -> Joined:
    return Joined(text, rng.uniform(*PAUSE_SECONDS), rng.uniform(*HUSH_DB), rng.getrandbits(32))


# ---------------------------------------------------------------------------------------------------------- grammar
def _with_article(noun_phrase: str) -> str:
    return f"{'an' if noun_phrase[0] in 'aeiou' else 'a'} {noun_phrase}"


def _thing(rng: random.Random, plural: bool = False) -> str:
    """A shape with a colour, a size, both or neither. The scenes' held-out pairs are not said either."""
    shape, colour = rng.choice(split_pairs()[0])
    words = [rng.choice(SIZES)] if rng.random() < 0.5 else []
    words += [colour] if rng.random() < 0.7 else []
    return " ".join([*words, PLURALS[shape] if plural else shape])


def _phrase(rng: random.Random) -> str:
    match rng.randrange(6):
        case 0 | 1:
            return _thing(rng)
        case 2:
            return f"{rng.choice(NUMBERS)} {_thing(rng, plural=True)}"
        case 3:
            return f"{rng.choice(RELATIONS)} the {rng.choice(SHAPES)}"
        case 4:
            return rng.choice(PLACES) if rng.random() < 0.4 else f"the {_thing(rng)}"
        case _:
            return rng.choice((f"{rng.choice(VERBS)} the {_thing(rng)}", f"there is {_with_article(_thing(rng))}"))


def _sentence(rng: random.Random) -> str:
    match rng.randrange(9):
        case 0 | 1:
            return f"the {_thing(rng)} is {rng.choice(RELATIONS)} the {_thing(rng)}"
        case 2:
            return f"{rng.choice(VERBS)} the {_thing(rng)} {rng.choice(ADVERBS)}"
        case 3:
            return f"there is {_with_article(_thing(rng))} {rng.choice(PLACES)}"
        case 4:
            return (f"put {rng.choice(NUMBERS)} {_thing(rng, plural=True)} "
                    f"{rng.choice((*RELATIONS[2:], *RELATIONS))} the {rng.choice(SHAPES)}")  # fmt: skip
        case 5:
            return f"we see {rng.choice(NUMBERS)} {_thing(rng, plural=True)} and {_with_article(_thing(rng))}"
        case 6:
            return rng.choice((f"where is the {_thing(rng)} {rng.choice(ADVERBS)}",
                               f"how many {_thing(rng, plural=True)} are there"))  # fmt: skip
        case 7:
            return f"paint the {_thing(rng)} {rng.choice(COLORS)}" + rng.choice(("", f" and {rng.choice(COLORS)}"))
        case _:
            return f"move the {_thing(rng)} to the {rng.choice(('left', 'right', 'top', 'bottom'))}"


def _with_length(make: Callable[[random.Random], str], rng: random.Random, low: int, high: int) -> str:
    while True:
        text = make(rng)
        if low <= text.count(" ") + 1 <= high:
            return text


def sample_phrase(rng: random.Random) -> str:
    """A phrase of two to four words."""
    return _with_length(_phrase, rng, 2, 4)


def sample_sentence(rng: random.Random, seed: int, is_test: bool) -> str:
    """A sentence of four to nine words. No sentence is both a test and a training sentence of one seed."""
    while True:
        text = _with_length(_sentence, rng, 4, 9)
        digest = hashlib.sha256(f"{seed} {text}".encode()).digest()
        if (digest[0] % TEST_SHARE == 0) == is_test:
            return text


# ---------------------------------------------------------------------------------------------------------- files
@dataclass(frozen=True)
class Said:
    """How long an utterance lasts, and when each of its words is said."""

    duration: float
    """Seconds."""
    words: list[WordTime]


def _say_all(utterances: list[Utterance], sample_rate: int) -> list[Said]:
    said = []
    with Espeak() as espeak:
        for item in utterances:
            samples_T, words = _say(espeak, item, item.text, sample_rate)
            for more in item.joined:
                before_T = np.concatenate([samples_T, _hush(more, sample_rate)])
                more_T, more_words = _say(espeak, item, more.text, sample_rate)
                samples_T = np.concatenate([before_T, more_T])
                words += moved(more_words, len(before_T) / sample_rate, len(samples_T) / sample_rate)
            write_wav(item.path, samples_T, sample_rate)
            said.append(Said(round(len(samples_T) / sample_rate, 4), words))
    return said


def _say(espeak: Espeak, item: Utterance, text: str, sample_rate: int) -> tuple[NDArray[np.int16], list[WordTime]]:
    """A text as an utterance's voice says it, and when its words are said."""
    samples_T = espeak.say(text, item.voice, item.words_per_minute, item.pitch)
    words = word_times(text, espeak.phonemes)
    samples_T, seconds_later = clean_speech(samples_T, sample_rate, item.level_db)
    return samples_T, moved(words, seconds_later, len(samples_T) / sample_rate)


def _hush(joined: Joined, sample_rate: int) -> NDArray[np.int16]:
    noise_T = np.random.default_rng(joined.seed).standard_normal(round(joined.pause_seconds * sample_rate))
    return np.round(noise_T * 10 ** (joined.hush_db / 20) * 32767).astype(np.int16)


def say_utterances(utterances: list[Utterance], sample_rate: int, num_processes: int = 1) -> list[Said]:
    """Says and writes utterances; returns how long they last. The number of processes changes no sample."""
    chunks = [utterances[i : i + ROWS_A_PROCESS] for i in range(0, len(utterances), ROWS_A_PROCESS)]
    say = partial(_say_all, sample_rate=sample_rate)
    if num_processes == 1 or len(chunks) < 2:
        return [said for chunk in chunks for said in say(chunk)]
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        return [one for said in pool.map(say, chunks) for one in said]


def _training_texts(level: str, i: int, rng: random.Random, seed: int) -> list[str]:
    match level:
        case "word":
            return [WORDS[i % len(WORDS)]]
        case "phrase":
            return [sample_phrase(rng)]
        case "joined":
            num_joined = 3 if rng.random() < THREE_JOINED else 2
            return [sample_sentence(rng, seed, is_test=False) for _ in range(num_joined)]
        case _:
            return [sample_sentence(rng, seed, is_test=False)]


def _write_split(
    out_dir: Path, split: str, plan: Iterable[tuple[dict[str, Any], Utterance]], sample_rate: int, num_processes: int
) -> Path:
    (out_dir / "audio" / split).mkdir(parents=True, exist_ok=True)
    rows, utterances = zip(*plan, strict=True) if (plan := list(plan)) else ((), ())
    all_said = say_utterances(list(utterances), sample_rate, num_processes)
    path = out_dir / f"{split}.jsonl"
    with path.open("w") as file:
        for row, said in zip(rows, all_said, strict=True):
            words = [word.to_json() for word in said.words]
            file.write(json.dumps({**row, "duration": said.duration, "words": words}) + "\n")
    return path


def _plan_row(
    out_dir: Path, split: str, i: int, texts: list[str], level: str, voice: str, rng: random.Random
) -> tuple[dict[str, Any], Utterance]:
    audio = f"audio/{split}/{split}_{i:06d}.wav"
    first, *others = texts
    row: dict[str, Any] = {
        "id": f"speech_{split}_{i:06d}",
        "audio": audio,
        "text": " ".join(texts),
        "speaker": voice,
        "level": level,
    }
    if others:
        row["joined"] = True
    if split != "train":
        row["heldout_voice"] = split == "heldout"
    utterance = sample_utterance(out_dir / audio, first, voice, rng)
    return row, replace(utterance, joined=tuple(_sample_joined(text, rng) for text in others))


def make_speech(
    out_dir: Path | str,
    num_words: int,
    num_phrases: int,
    num_sentences: int,
    num_test: int,
    num_test_voices: int,
    seed: int,
    sample_rate: int = 8000,
    num_processes: int = 1,
    num_joined: int = 0,
    num_spoken: int = 0,
    spoken_voices: Sequence[str] = (),
    test_voices: Sequence[str] = (),
) -> dict[str, Path]:
    """Synthesizes speech and writes `train.jsonl`, `test.jsonl` and `heldout.jsonl` with mono 16-bit WAV files.

    Rows carry `speaker` (the voice), `level` ("word", "phrase", "sentence" or "joined"), `duration` in seconds and
    `words`: when each is said, with its letters (`mmllm_tokenizers.alignment`). Equal arguments, but for
    `num_processes`, give equal bytes on one version of espeak-ng; which training rows there are changes no test row.

    Args:
        out_dir: Folder to write to; made where it is missing.
        num_words: Training rows of a single word; every word is said about equally often.
        num_phrases: Training rows of two to four words.
        num_sentences: Training rows of four to nine words.
        num_test: Rows of sentences that training never says, by voices of training.
        num_test_voices: Rows of further such sentences, by voices that training never hears (`heldout_voice`).
        seed: Chooses everything.
        sample_rate: Samples a second.
        num_processes: Processes that synthesize; above one they are spawned.
        num_joined: Training rows of two sentences, or three, that a voice says with a pause between (`joined`).
        num_spoken: Training rows from which to learn to speak alone (`spoken_only`), a third of them phrases and the
            others sentences.
        spoken_voices: Who says those.
        test_voices: Who says the `num_test` rows, in turn; empty: all voices of training.

    Returns:
        The manifests' paths under "train", "test" and "heldout".

    Raises:
        ModuleNotFoundError: The `espeakng-loader` wheel is not installed.
        ValueError: There are rows to say, but no voice to say them, or one that training may not hear.
    """
    out_dir = Path(out_dir)
    Espeak().close()
    plans: dict[str, list[tuple[dict[str, Any], Utterance]]] = {"train": [], "test": [], "heldout": []}
    known, unknown = voices(heldout=False), voices(heldout=True)
    if not set(spoken_voices) <= set(known) or (num_spoken and not spoken_voices):
        raise ValueError(f"{num_spoken} rows are to be said by {list(spoken_voices)}; give voices out of {known}")
    if not set(test_voices) <= set(known):
        raise ValueError(f"test_voices is {list(test_voices)}; training hears none but {known}")
    plan = plans["train"]
    levels = {"word": num_words, "phrase": num_phrases, "sentence": num_sentences, "joined": num_joined}
    for level, num_rows in levels.items():
        for i in range(num_rows):
            rng = random.Random(f"speech {seed} {level} {i}")
            texts = _training_texts(level, i, rng, seed)
            plan.append(_plan_row(out_dir, "train", len(plan), texts, level, rng.choice(known), rng))
    for i in range(num_spoken):
        rng, level = random.Random(f"speech {seed} spoken {i}"), "phrase" if i % 3 == 0 else "sentence"
        # each voice says a phrase and two sentences in turn
        texts, voice = _training_texts(level, i, rng, seed), spoken_voices[i // 3 % len(spoken_voices)]
        row, utterance = _plan_row(out_dir, "train", len(plan), texts, level, voice, rng)
        plan.append(({**row, "spoken_only": True}, utterance))
    said: set[str] = set()
    for split, num_rows in (("test", num_test), ("heldout", num_test_voices)):
        for i in range(num_rows):
            rng = random.Random(f"speech {seed} {split} {i}")
            while (text := sample_sentence(rng, seed, is_test=True)) in said:
                pass
            said.add(text)
            voice = unknown if split == "heldout" else test_voices or known
            plans[split].append(_plan_row(out_dir, split, i, [text], "sentence", voice[i % len(voice)], rng))
    return {split: _write_split(out_dir, split, plan, sample_rate, num_processes) for split, plan in plans.items()}
