"""Long sounds: where they are cut, how their windows' texts become one, when words are said, and what is doubted."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmllm.inference import long_sound, voice_activity, windows
from mmllm.inference.engine.engine import Engine
from mmllm.inference.inputs import AudioPart
from mmllm.inference.long_sound import Heard, LongSoundSettings, merge, transcribe_long, transcribe_windows
from mmllm.inference.text_settings import text_options
from mmllm.inference.voice_activity import measure_levels, speech_hops
from mmllm.inference.windows import Window, plan_windows
from mmllm.inference.word_times import Alignment, align_words
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.pointer import PointerRule
from tests import inference_fixtures as fixtures

RATE = 8000
PLAIN = LongSoundSettings()


def silence(seconds: float, level_db: float | None = None, seed: int = 0) -> np.ndarray:
    count = round(seconds * RATE)
    if level_db is None:
        return np.zeros(count)
    return 10 ** (level_db / 20) * np.random.default_rng(seed).standard_normal(count)


def speech(seconds: float, seed: int = 0, level_db: float = -20.0) -> np.ndarray:
    """Noise that comes and goes five times a second, as syllables do: it is quiet for 60 ms between two of them."""
    wave = silence(seconds, level_db, seed)
    phase = np.arange(len(wave)) / RATE * 5 % 1
    return wave * np.where(phase < 0.7, np.sin(np.pi * np.minimum(phase / 0.7, 1.0)) + 0.03, 0.003)


def spans(wave: np.ndarray) -> list[tuple[float, float]]:
    found = speech_hops(wave, RATE, measure_levels(wave, RATE))
    return [(first / 100, last / 100) for first, last in found]


def planned(wave: np.ndarray, longest: float | None = 4.0, **more: Any) -> list[Window]:
    return plan_windows(wave, RATE, longest, **more)


# ------------------------------------------------------------------------------------------------------------ activity
def test_levels_are_those_of_hops():
    wave = speech(1.234)[:9871] + 0.2
    levels = measure_levels(wave, RATE)
    wanted = [10 * np.log10(max(np.var(wave[first : first + 80]), 1e-12)) for first in range(0, 9871, 80)]
    np.testing.assert_allclose(levels.level_H, wanted, atol=1e-6)
    assert len(measure_levels(np.zeros(0), RATE).level_H) == 0
    odd = measure_levels(speech(2.0), 11_025)
    assert len(odd.level_H) == int(np.ceil(16_000 / 110.25))


@pytest.mark.parametrize("hush_db", [None, -75.0, -50.0])
@pytest.mark.parametrize("offset", [0.0, 0.3])
def test_speech_is_found_in_silence_and_noise(hush_db, offset):
    wave = np.concatenate([silence(1), speech(2), silence(0.5), speech(1, 1), silence(2)])
    (first, second) = spans(wave + silence(6.5, hush_db, 2) + offset)
    np.testing.assert_allclose([*first, *second], [1.0, 3.0, 3.5, 4.5], atol=0.08)


@pytest.mark.parametrize("gain_db", [-30.0, 0.0, 17.0])
def test_quiet_and_loud_recordings_are_alike(gain_db):
    wave = np.concatenate([silence(1, -70), speech(2), silence(0.5, -70, 1), speech(1, 1), silence(1, -70, 2)])
    np.testing.assert_allclose(spans(wave * 10 ** (gain_db / 20)), spans(wave))


@pytest.mark.parametrize(
    "wave",
    [
        silence(3),
        silence(3, -20),
        silence(30, -45),
        0.3 * np.sin(np.arange(24_000) * 0.3),
        np.full(8000, 0.7),
        speech(3, level_db=-95),
        np.concatenate([silence(2), np.ones(40), silence(2)]),
        np.zeros(1),
        np.zeros(0),
    ],
    ids=["silence", "noise", "long noise", "hum", "offset", "too quiet", "click", "one sample", "empty"],
)
def test_where_nothing_is_said_nothing_is_heard(wave):
    assert planned(wave) == []
    assert planned(wave, None) == []


def test_silero_is_asked_where_it_is_installed(monkeypatch):
    calls = []

    def get_speech_timestamps(wave: torch.Tensor, network: str, sampling_rate: int) -> list[dict[str, int]]:
        assert network == "network" and sampling_rate == 16_000 and wave.dtype == torch.float32
        calls.append(len(wave))
        return [{"start": 16_000, "end": 32_000}, {"start": 40_000, "end": 80_000}]

    fake = ModuleType("silero_vad")
    vars(fake).update(load_silero_vad=lambda: "network", get_speech_timestamps=get_speech_timestamps)
    monkeypatch.setitem(sys.modules, "silero_vad", fake)
    voice_activity._silero.cache_clear()
    wave = silence(6, -20)
    try:
        assert speech_hops(wave, RATE, measure_levels(wave, RATE), "silero") == [(100, 200), (250, 500)]
        assert planned(wave, 3.5, vad="silero") == [Window(0.96, 2.04), Window(2.46, 5.04)]
    finally:
        voice_activity._silero.cache_clear()
    assert calls == [96_000, 96_000]


def test_silero_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "silero_vad", None)
    voice_activity._silero.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[vad\]'"):
        planned(speech(2), vad="silero")
    with pytest.raises(ValueError, match="vad is 'loud'"):
        planned(speech(2), vad="loud")


# ------------------------------------------------------------------------------------------------------------- windows
def test_a_short_sound_is_one_window_without_the_silence_at_its_ends():
    def bounds(wave: np.ndarray, longest: float | None = 4.0) -> list[float]:
        (window,) = planned(wave, longest)
        return [window.start, window.end]

    wave = np.concatenate([silence(1), speech(2), silence(0.9)])
    assert bounds(wave) == pytest.approx([0.96, 2.98]), "the last syllable ends 60 ms before 3 s"
    assert bounds(np.tile(wave, 9), None) == pytest.approx([0.96, 8 * 3.9 + 2.98])
    tight = np.concatenate([silence(0.07), speech(2)])
    assert bounds(tight) == pytest.approx([0.0, 2.07]), "hardly any silence is left as it is"
    assert bounds(np.concatenate([speech(1), silence(0.9), speech(1)])) == pytest.approx([0.0, 2.9]), "nor inside"


@pytest.mark.parametrize("hush_db", [None, -70.0, -40.0])
@pytest.mark.parametrize("seed", range(3))
def test_windows_end_in_pauses(hush_db, seed):
    """Ten sentences with silence between, or with noise as loud as weak consonants."""
    rng = np.random.default_rng(seed)
    pieces, said, time = [], [], 0.0
    for number in range(10):
        length, pause = round(rng.uniform(0.8, 3), 2), round(rng.uniform(0.3, 0.8), 2)
        pieces += [speech(length, number), silence(pause, hush_db, number)]
        said.append((time, time + length))
        time += length + pause
    found = planned(np.concatenate(pieces), 5.0)
    assert found == planned(np.concatenate(pieces), 5.0), "the same each time"
    for start, end in said:
        holding = [window for window in found if window.start <= start + 0.05 and end - 0.1 <= window.end]
        assert len(holding) == 1, "each sentence is whole, in one window"
    assert all(window.end - window.start <= 5.0 + 1e-9 and not window.overlap for window in found)
    assert all(before.end <= after.start for before, after in itertools.pairwise(found))


def test_the_longest_pauses_are_taken():
    lengths = [(1.5, 0.2), (1.5, 0.6), (1.5, 0.2), (1.5, 0.0)]
    wave = np.concatenate([part for length, pause in lengths for part in (speech(length), silence(pause))])
    found = planned(wave, 4.0)
    assert len(found) == 2 and found[0].end == pytest.approx(3.3, abs=0.1)
    assert found[1].start == pytest.approx(3.7, abs=0.1)
    far = np.concatenate([speech(1), silence(1.1), speech(1), silence(6), speech(1)])
    assert len(planned(far)) == 3, "a long pause parts what would fit"


def test_a_weak_pause_is_cut_where_it_is_quietest():
    hush = np.concatenate([silence(0.08, -40, 1), silence(0.03), silence(0.05, -40, 2)])
    wave = np.concatenate([speech(1.94), hush, speech(2, 1)])
    first, second = planned(wave, 3.0)
    assert [first.end, second.start] == pytest.approx([2.02, 2.05], abs=0.011), "nothing but the silence is lost"
    steady = np.concatenate([speech(1.94), silence(0.16, -40, 1), speech(2, 1)])
    first, second = planned(steady, 3.0)
    assert first.end == second.start == pytest.approx(2.02, abs=0.07)


def test_windows_are_of_the_usual_length_where_a_pause_allows_it():
    wave = np.concatenate([part for number in range(6) for part in (speech(1.4, number), silence(0.3))])
    assert len(planned(wave, 20.0)) == 1 and len(planned(wave, 9.0)) == 2
    assert len(planned(wave, 9.0, usual_seconds=1.5)) == 6
    assert len(planned(wave, 9.0, usual_seconds=3.3)) == 3
    assert planned(speech(6), 9.0, usual_seconds=1.5) == planned(speech(6), 9.0), "nor is a word cut for it"
    with pytest.raises(ValueError, match="usual_seconds is -1"):
        planned(wave, 9.0, usual_seconds=-1)


@pytest.mark.parametrize("seconds", [4.5, 7.0, 12.3])
def test_without_a_pause_windows_overlap(seconds):
    found = planned(speech(seconds), 4.0)
    assert found[0].start == pytest.approx(0, abs=0.06) and found[-1].end == pytest.approx(seconds, abs=0.08)
    for before, after in itertools.pairwise(found):
        assert after.overlap >= 4 / 3 - 0.02 and before.end - after.start == pytest.approx(after.overlap)
    assert all(window.end - window.start == pytest.approx(4.0) for window in found)
    assert len(planned(speech(seconds), 4.0, overlap_seconds=0.2)) == np.ceil((seconds - 0.25) / 3.8)


def test_bad_bounds_are_named():
    with pytest.raises(ValueError, match="longest_seconds is 0"):
        planned(speech(5), 0.0)
    with pytest.raises(ValueError, match=r"overlap_seconds is 2.5; it must be above 0 and below .* 2 s"):
        planned(speech(9), 4.0, overlap_seconds=2.5)
    bads: list[dict[str, Any]] = [
        {"vad": "loud"}, {"window_seconds": 0}, {"overlap_seconds": -1}, {"min_logprob": 1}, {"max_no_speech": 2},
        {"min_confidence": -1},
    ]  # fmt: skip
    for bad in bads:
        with pytest.raises(ValueError, match=next(iter(bad))):
            LongSoundSettings(**bad)
    with pytest.raises(ValueError, match=r"window_seconds is 5, but this model .* at most 4 s"):
        transcribe_windows([], 4.0, None, lambda clips: [], LongSoundSettings(window_seconds=5))


SPANS = st.lists(st.tuples(st.integers(15, 60), st.integers(5, 120)), min_size=1, max_size=8)


@settings(max_examples=200, deadline=None)
@given(SPANS, st.integers(40, 200), st.integers(20, 200))
def test_groups_cost_the_least_that_can_be(drawn, most, usual):
    """Against all ways to group."""
    spans, time = [], 0
    for pause, length in drawn:
        spans.append((time + pause, time + pause + length))
        time += pause + length

    def cost(cuts: tuple[int, ...]) -> float:
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(spans))):
            length = spans[stop - 1][1] - spans[start][0]
            if stop - start > 1 and length > most:
                return np.inf
            total += 15 / (spans[start][0] - spans[start - 1][1]) if start else 0.0
            total += 2 * (length - usual) / usual if length > usual else 0.0
        return total

    places = range(1, len(spans))
    every = [cuts for count in range(len(spans)) for cuts in itertools.combinations(places, count)]
    found = windows._grouped(spans, most, usual)
    starts = [first for first, _ in spans]
    cuts = tuple(starts.index(first) for first, _ in found[1:])
    assert cost(cuts) == pytest.approx(min(map(cost, every)))
    assert [last for _, last in found] == [spans[cut - 1][1] for cut in (*cuts, len(spans))]


# ------------------------------------------------------------------------------------------------------------- merging
WORDS = ["a", "red", "circle", "is", "left", "of", "the", "small", "blue", "star", "and", "the", "ring"]


def timed(words: list[str], step: float = 0.4) -> list[WordTime]:
    return [WordTime(word, step * number, step * (number + 1), None, 0.9) for number, word in enumerate(words)]


def is_whole(time: WordTime, window: Window) -> bool:
    return window.start - 1e-6 <= time.start and time.end <= window.end + 1e-6


def aligned(*words: WordTime, missed: float = 0.05) -> Alignment:
    return Alignment(missed, words, (missed,) * len(words))


def hear_window(said: list[WordTime], window: Window, is_timed: bool = True) -> Heard:
    """What is said within a window; of words that it cuts some syllable is heard."""
    inside = [time for time in said if time.end > window.start + 0.05 and time.start < window.end - 0.05]
    words = [
        WordTime(
            time.word if is_whole(time, window) else "uh",
            max(time.start - window.start, 0.0), min(time.end, window.end) - window.start, None, 0.9,
        )
        for time in inside
    ]  # fmt: skip
    text = " ".join(word.word for word in words)
    ends = tuple(itertools.accumulate(len(word.word) + (number > 0) for number, word in enumerate(words)))
    return Heard(text, ends, (-0.1,) * len(words), aligned(*words) if is_timed else None)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(WORDS), min_size=12, max_size=40), st.floats(1.5, 2.0), st.booleans())
def test_windows_that_overlap_say_each_word_once(words, overlap, has_halves):
    said = timed(words)
    total, longest = said[-1].end, 4.3
    found = windows._overlapping(0.0, total, longest, overlap)
    heard = [hear_window(said, window) for window in found]
    if not has_halves:  # nothing is heard of words that are cut
        heard = [hear_window([time for time in said if is_whole(time, window)], window) for window in found]
    segments = merge(found, heard, PLAIN)
    assert " ".join(segment.text for segment in segments).split() == words
    found_words = [word for segment in segments for word in segment.words or ()]
    np.testing.assert_allclose([word.start for word in found_words], [time.start for time in said], atol=1e-6)


def test_windows_are_joined_at_shared_words_without_times():
    said = timed(["one", "two", "three", "four", "five", "six", "seven", "eight"])
    found = [Window(0.0, 2.1), Window(1.1, 3.2, 1.0)]
    heard = [hear_window(said, window, is_timed=False) for window in found]
    assert [each.text for each in heard] == ["one two three four five uh", "uh four five six seven eight"]
    segments = merge(found, heard, PLAIN)
    assert " ".join(segment.text for segment in segments) == "one two three four five six seven eight"
    assert all(segment.words is None for segment in segments)
    assert [(segment.start, segment.end) for segment in segments] == [(0.0, 2.1), (1.1, 3.2)]


def test_windows_without_a_shared_word_each_say_their_half():
    found = [Window(0.0, 4.0), Window(2.0, 6.0, 2.0)]
    first = Heard("a b c", alignment=aligned(WordTime("a", 0, 1), WordTime("b", 2.1, 2.4), WordTime("c", 3.2, 3.6)))
    second = Heard("d e f", alignment=aligned(WordTime("d", 0.2, 0.5), WordTime("e", 1.3, 1.6), WordTime("f", 2.2, 3)))
    assert " ".join(s.text for s in merge(found, [first, second], PLAIN)) == "a b e f"
    far = Heard("b e f", alignment=aligned(WordTime("b", 1.3, 1.6), WordTime("e", 1.7, 1.8), WordTime("f", 2.2, 3)))
    assert " ".join(s.text for s in merge(found, [first, far], PLAIN)) == "a b b e f", "another b, a second later"
    unlike = [Heard("a b c"), Heard("d e f")]
    assert " ".join(s.text for s in merge(found, unlike, PLAIN)) == "a b c d e f", "nothing is lost"


def test_neighbours_that_share_nothing_are_left_alone():
    found = [Window(0.0, 2.0), Window(2.0, 4.0)]
    segments = merge(found, [Heard("the ring"), Heard("the ring")], PLAIN)
    assert [(s.text, s.start, s.end) for s in segments] == [("the ring", 0.0, 2.0), ("the ring", 2.0, 4.0)]


def test_sentences_are_segments():
    words = (WordTime("Hello.", 0, 0.4), WordTime("a", 0.4, 0.6), WordTime("ring", 0.6, 1.0), WordTime("yes", 1.5, 2.0))
    ends, logprobs = (5, 6, 8, 10, 15, 19), (-0.5, -0.1, -0.2, 0.0, -0.4, -1.4)
    heard = Heard("Hello. a – ring  yes", ends, logprobs, aligned(*words))
    first, second, third = merge([Window(10.0, 12.5)], [heard], PLAIN)
    assert (first.text, second.text, third.text) == ("Hello.", "a – ring", "yes")
    assert (first.start, first.end, third.start, third.end) == (10.0, 10.4, 11.5, 12.0)
    assert second.words is not None and [word.word for word in second.words] == ["a", "ring"]
    assert first.logprob == pytest.approx(-0.3) and second.logprob == pytest.approx(-0.2)
    assert third.logprob == pytest.approx(-1.4) and third.doubtful and not first.doubtful
    assert first.confidence == pytest.approx(np.exp([-0.5, -0.1]).mean())
    assert merge([Window(0, 1)], [Heard("Hello. yes")], PLAIN)[0].text == "Hello. yes", "times tell sentences apart"


def test_what_is_doubted():
    window = [Window(0.0, 2.0)]

    def doubt(heard: Heard, **settings: Any) -> bool:
        (segment,) = merge(window, [heard], LongSoundSettings(**settings))
        return segment.doubtful

    def ring(logprob: float = -0.1, confidence: float = 0.9, missed: float = 0.1) -> Heard:
        return Heard("ring", (4,), (logprob,), aligned(WordTime("ring", 0, 1, None, confidence), missed=missed))

    assert not doubt(ring()) and not doubt(Heard("ring", (4,), (-0.1,)))
    assert doubt(ring(-1.1)) and not doubt(ring(-1.1), min_logprob=-1.2)
    assert doubt(ring(missed=0.8)) and not doubt(ring(missed=0.8), max_no_speech=0.9)
    assert doubt(ring(confidence=0.4)) and not doubt(ring(confidence=0.4), min_confidence=0.3)
    (segment,) = merge(window, [ring(-0.2, 0.7, 0.3)], PLAIN)
    assert segment.words is not None and segment.words[0].confidence == segment.confidence == pytest.approx(0.7)
    assert segment.no_speech == pytest.approx(0.3) and segment.logprob == pytest.approx(-0.2)
    assert doubt(Heard("ring", (4,), (-1.0,))), "a probability of 0.37, without a CTC head"
    misfit = Heard("ring", (4,), (-0.1,), Alignment(0.3))
    assert doubt(misfit), "more tokens than the sound has room for"
    assert merge(window, [misfit], PLAIN)[0].no_speech == 0.3
    assert doubt(Heard("ring", (4,), (-0.1,), is_whole=False)) and doubt(Heard("...")), "cut off; no word"
    assert merge(window, [Heard(" ")], PLAIN) == ()


def test_all_windows_of_all_sounds_are_heard_at_once():
    calls = []

    def hear(clips: list[AudioPart]) -> list[Heard]:
        calls.append([round(clip.seconds, 1) for clip in clips])
        assert all(clip.wave_CT.shape[0] == 2 and clip.sample_rate == RATE for clip in clips)
        return [Heard(f"clip {number}") for number in range(len(clips))]

    def part(wave: np.ndarray) -> AudioPart:
        return AudioPart(torch.from_numpy(np.stack([wave, wave])).float(), RATE)

    long = np.concatenate([speech(2.8), silence(0.6), speech(2.2), silence(0.5), speech(1)])
    sounds = [part(speech(2)), part(silence(9)), part(long)]
    found = transcribe_windows(sounds, 4.0, None, hear, PLAIN)
    assert found == ["clip 0", "", "clip 1 clip 2"] and calls == [[2.0, 2.8, 3.7]]
    assert [each.seconds for each in found] == pytest.approx([2.0, 9.0, 7.1])
    assert found[1].segments == () and len(found[2].segments) == 2
    assert transcribe_windows([part(silence(2))], 4.0, None, hear, PLAIN) == [""] and len(calls) == 1, "nobody is asked"
    assert transcribe_windows([], 4.0, None, hear, PLAIN) == []
    narrow = LongSoundSettings(window_seconds=3.0)
    assert transcribe_windows([part(long)], 4.0, None, hear, narrow) == ["clip 0 clip 1 clip 2"]


def test_what_the_head_doubts_is_heard_again_with_more_around():
    said: dict[float, tuple[str, float]] = {}
    calls = []

    def hear(clips: list[AudioPart]) -> list[Heard]:
        calls.append([round(clip.seconds, 2) for clip in clips])
        return [heard_as(*said[round(clip.seconds, 2)]) for clip in clips]

    def heard_as(text: str, confidence: float) -> Heard:
        return Heard(text, alignment=aligned(WordTime(text, 0.5, 1.0, None, confidence)))

    def part(seconds: float) -> AudioPart:
        wave = np.concatenate([silence(0.5), speech(seconds), silence(0.5)])
        return AudioPart(torch.from_numpy(wave)[None].float(), RATE)

    said = {1.02: ("sure", 0.9), 2.02: ("no", 0.4), 2.06: ("yes", 0.6), 3.02: ("right", 0.7), 3.06: ("wrong", 0.6)}
    found = transcribe_windows([part(1), part(2), part(3)], 9.0, None, hear, PLAIN)
    assert calls == [[1.02, 2.02, 3.02], [2.06, 3.06]] and found == ["sure", "yes", "right"]
    starts = [each.segments[0].start for each in found]
    assert starts == pytest.approx([0.96, 0.94, 0.96]), "times are those of the window that was kept"


# -------------------------------------------------------------------------------------------------------------- words
BLANK, SLOT = 0, 0.08


class Text:
    """Letters as tokens."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 96 for letter in text if letter != " "]


def heard_letters(slots: list[tuple[float, str]], num_slots: int) -> Any:
    """A model whose head gives such a probability to a letter in each slot, and the rest to the blank."""
    probs_SV = torch.full((num_slots, 27), 1e-6)
    for slot, (probability, letter) in enumerate(slots):
        probs_SV[slot, ord(letter) - 96] = probability
    probs_SV[:, BLANK] = 1.0 - probs_SV[:, 1:].sum(dim=1)
    config = SimpleNamespace(audio=SimpleNamespace(pad_id=BLANK))
    decoder = SimpleNamespace(head_weight_VD=torch.zeros(1))
    return SimpleNamespace(
        ctc_head=lambda slots_1SD: probs_SV.log()[None], clip_embedding=lambda codes: codes, config=config,
        decoder=decoder, training=False, eval=lambda: None, train=lambda mode: None,
    )  # fmt: skip


FOLDER: Any = SimpleNamespace(text=Text(), audio_pool=4, frame_rate=50.0)
NO, CODES = 1e-6, torch.zeros(2, 80, dtype=torch.int64)


def test_words_are_where_their_letters_are_heard():
    wave = np.concatenate(
        [silence(0.4, -75), speech(0.4, 5), silence(0.24, -75, 1), speech(0.4, 6), silence(0.16, -75)]
    )
    sound = AudioPart(torch.from_numpy(wave)[None].float(), RATE)
    slots = [(NO, "a")] * 5 + [(0.9, "a"), (NO, "a"), (0.9, "b"), (NO, "a"), (NO, "a")]
    slots += [(NO, "a")] * 4 + [(0.7, "c"), (NO, "a"), (0.9, "d")]
    found = align_words(heard_letters(slots, 20), FOLDER, CODES, sound, "ab - cd")
    assert found is not None and found.words is not None and [word.word for word in found.words] == ["ab", "cd"]
    first, second = found.words
    np.testing.assert_allclose([first.start, first.end], [0.4, 0.8], atol=0.09)
    np.testing.assert_allclose([second.start, second.end], [1.04, 1.44], atol=0.09)
    assert found.no_speech == pytest.approx(0.15, abs=1e-3) and found.missed == pytest.approx((0.1, 0.2), abs=1e-3)
    assert [word.confidence for word in found.words] == pytest.approx([0.9, 0.8], abs=1e-3)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_words_begin_where_they_do_wherever_a_head_puts_its_tokens(place):
    """Four words of 0.4 s without a pause, heard early, in the middle or late in each of them."""
    wave = np.concatenate([silence(0.4, -75), speech(1.6, 5), silence(0.8, -75)])
    sound = AudioPart(torch.from_numpy(wave)[None].float(), RATE)
    slots = [(NO, "a")] * 35
    for number, letter in enumerate("abcd"):
        slots[int((0.4 + 0.4 * (number + place)) / SLOT + 1e-6)] = (0.9, letter)
    found = align_words(heard_letters(slots, 35), FOLDER, CODES, sound, "a b c d")
    assert found is not None and found.words is not None
    np.testing.assert_allclose([word.start for word in found.words], [0.4, 0.8, 1.2, 1.6], atol=0.12)
    np.testing.assert_allclose([word.end for word in found.words], [0.8, 1.2, 1.6, 2.0], atol=0.12)


def test_made_up_words_are_not_heard():
    sound = AudioPart(torch.from_numpy(speech(1.6))[None].float(), RATE)
    model = heard_letters([(NO, "a")] * 8 + [(0.8, "d")], 20)
    found = align_words(model, FOLDER, CODES, sound, "ab cd")
    assert found is not None and found.words is not None and found.no_speech == pytest.approx(1 - 0.8 / 4, abs=1e-3)
    long = align_words(model, FOLDER, CODES, sound, "abcdefghij abcdefghijk")
    assert long is not None and long.words is None, "more letters than slots"
    assert long.no_speech == pytest.approx(1 - 0.8 / 21, abs=1e-3)
    assert align_words(model, FOLDER, CODES, sound, " ... ") is None
    model.ctc_head = None
    assert align_words(model, FOLDER, CODES, sound, "ab") is None


# -------------------------------------------------------------------------------------------------------------- models
def test_a_model_hears_a_long_sound_as_its_windows(monkeypatch):
    """As one window each, by the engine; without a CTC head and with one."""
    monkeypatch.setattr(long_sound, "AGAIN_CONFIDENCE", 0.0)
    for pointer in (None, PointerRule()):
        made = fixtures.make(pointer=pointer)
        api: Any = SimpleNamespace(
            model=made.model, tokenizer=made.tokenizer, engine=Engine(made.model, made.tokenizer),
            generation=replace(made.generation, max_heard_seconds=1.2, usual_heard_seconds=0.5),
        )  # fmt: skip
        options = text_options({"max_new_tokens": 9}, api.generation, made.tokenizer)
        wave = np.concatenate([speech(0.6), silence(0.4), speech(0.7, 1), silence(0.3), speech(0.5, 2), silence(0.5)])
        sounds = [AudioPart(torch.from_numpy(each)[None].float(), RATE) for each in (wave, silence(1), speech(0.6))]
        found = transcribe_long(api, sounds, options)
        assert len(found) == 3 and found[1] == "" and found[0].seconds == pytest.approx(3.0)
        plan = plan_windows(wave, RATE, 1.2, 0.5)
        assert len(plan) == 3
        clips = [
            AudioPart(sounds[0].wave_CT[:, round(w.start * RATE) : round(w.end * RATE)], RATE) for w in plan
        ]  # fmt: skip
        alone = [transcribe_long(api, [clip], options)[0] for clip in clips]
        assert found[0] == " ".join(filter(None, alone)), "each as if it were alone"
        assert found[2] == transcribe_long(api, sounds[2:], options)[0]
        for segment in found[0].segments:
            assert segment.logprob is not None and segment.logprob < 0
            assert (segment.no_speech is None) == (pointer is None)
