from __future__ import annotations

import itertools
import json
import random
import re
import sys
import wave
from types import SimpleNamespace

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.quickstart.interleaved import make_interleaved
from mmllm.quickstart.prose import make_prose
from mmllm.quickstart.scenes import heldout_pairs
from mmllm.quickstart.speech import WORDS, Joined, Utterance, make_speech, sample_sentence, say_utterances
from mmllm.quickstart.speech import sample_utterance as plan
from mmllm.quickstart.spoken_words import Phoneme, word_times
from mmllm.quickstart.synthesis import Espeak, clean_speech, resample, synthesize, trim_silence, voices
from mmllm_tokenizers.alignment import WordTime, moved, read_words


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def espeak():
    pytest.importorskip("espeakng_loader", reason="needs the espeakng-loader wheel: pip install 'mmllm[speech]'")


def test_resampling_keeps_a_tone_and_removes_what_does_not_fit():
    seconds = np.arange(22050) / 22050
    for hertz, kept in ((440, True), (3000, True), (5000, False)):
        out = resample(np.sin(2 * np.pi * hertz * seconds), 22050, 8000)
        assert out.shape == (8000,)
        expected = np.sin(2 * np.pi * hertz * np.arange(8000) / 8000) * kept
        assert np.abs(out - expected)[400:-400].max() < 0.02
    assert np.array_equal(resample(np.ones(5), 8000, 8000), np.ones(5))
    assert resample(np.ones(1), 22050, 8000).shape == (1,)
    assert resample(np.ones(3), 8000, 22050).shape == (9,)


def test_silence_is_cut_and_added():
    tone = np.sin(np.arange(8000) / 3)
    for lead, tail in ((4000, 2000), (0, 0), (100, 0)):
        padded = np.pad(tone, (lead, tail))
        out, num_later = trim_silence(padded, 8000, keep_seconds=0.04)
        assert abs(len(out) - 8000 - 640) <= 160
        assert np.abs(out[:160]).max() == np.abs(out[-160:]).max() == 0
        for place in (lead + 500, lead + 7000):
            assert out[place + num_later] == padded[place]
    assert len(trim_silence(np.zeros(3), 8000)[0]) == 3
    assert not clean_speech(np.zeros(4000, dtype=np.int16), 8000, -20)[0].any()


def test_cleaning_says_by_how_much_all_is_later():
    clicks = np.zeros(22050, dtype=np.int16)
    clicks[[6615, 11025]] = 20000  # at 0.3 and 0.5 s
    out, seconds_later = clean_speech(clicks, 8000, -20)
    found = np.sort(np.argsort(np.abs(out.astype(int)))[-2:]) / 8000
    assert found - seconds_later == pytest.approx([0.3, 0.5], abs=1 / 8000)
    assert seconds_later == pytest.approx(0.04 - 0.3, abs=0.0101)


def phonemes_of(*values):
    return [Phoneme(*value) for value in values]


def test_word_times_of_phonemes():
    said = phonemes_of(
        ("r", 0, 0.1), ("E", 0, 0.2), ("d", 0, 0.4), ("_:", 4, 0.5), ("k", 4, 0.6), ("r", 4, 0.7), ("0", 4, 0.8),
        ("s", 4, 1.0), ("_:", 9, 1.4), ("_", 9, 1.5),
    )  # fmt: skip
    red, cross = word_times("red cross", said)
    assert red == WordTime("red", 0.1, 0.5, (0.1, 0.2, 0.4))
    assert cross.start == 0.6 and cross.end == 1.4
    assert cross.letters == pytest.approx((0.6, 0.68, 0.76, 0.88, 1.08))
    of, the, top = word_times("of the top", phonemes_of(
        ("V", 0, 0.0), ("v", 0, 0.1), ("D", 0, 0.3), ("@2", 0, 0.4), ("t", 7, 0.5), ("_", 7, 0.6)
    ))  # fmt: skip
    assert (of.start, of.end, the.start, the.end, top.start, top.end) == (0.0, 0.3, 0.3, 0.5, 0.5, 0.6)
    assert the.letters == pytest.approx((0.3, 0.3 + 2 / 3 * 0.1, 0.4 + 1 / 3 * 0.1))
    with pytest.raises(ValueError, match="'a -' in 'a -' has 1 phonemes"):
        word_times("a -", phonemes_of(("a", 0, 0.0), ("_", 2, 0.2)))


def test_speech_does_not_depend_on_what_was_said_before(espeak, tmp_path):
    first = synthesize("a small red circle", "en-us+f2")
    synthesize("draw the blue square", "en-gb-scotland+m2", 200, 30)
    assert np.array_equal(first, synthesize("a small red circle", "en-us+f2"))
    assert not np.array_equal(first, synthesize("a small red circle", "en-us+m3"))
    assert 1 < len(first) / 22050 < 2 and np.abs(first).max() > 3000
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        synthesize("red", "nobody")


def test_words_are_where_the_sound_is(espeak):
    """Every voice: silence around the words, and an "s" hisses from where its letter starts."""
    text = "the small red circle is left of the blue star"
    with Espeak() as talker:
        for voice in (*voices(False), *voices(True)):
            samples = talker.say(text, voice)
            words = word_times(text, talker.phonemes)
            assert [word.word for word in words] == text.split()
            samples, seconds_later = clean_speech(samples, 16000, -20)
            words = moved(words, seconds_later, len(samples) / 16000)
            read_words([word.to_json() for word in words], text, voice)
            frames = np.lib.stride_tricks.sliding_window_view(samples / 32768, 320)[::80] * np.hanning(320)
            power = np.abs(np.fft.rfft(frames, axis=1)) ** 2
            times = (np.arange(len(power)) * 80 + 160) / 16000
            energy = 10 * np.log10(power.sum(axis=1) + 1e-9)
            loud = times[energy > energy.max() - 35]
            assert abs(loud[0] - words[0].start) < 0.02 and abs(loud[-1] - words[-1].end) < 0.06, voice  # some echo
            hiss = 10 * np.log10((power[:, 60:].sum(axis=1) + 1e-9) / (power[:, 4:40].sum(axis=1) + 1e-9))
            for word in (words[1], words[3], words[-1]):
                first, second = word.letter_starts(len(word.word))[:2]
                into, vowel = (times > first + 0.01) & (times < second), (times > second + 0.06) & (times < word.end)
                assert hiss[into].max() > hiss[vowel].min() + 10, (voice, word)


def test_watching_phonemes_changes_no_sample(espeak, monkeypatch):
    arguments = [("put two red stars in the corner", voice, 150 + i, 40 + i) for i, voice in enumerate(voices(False))]
    with Espeak() as talker:
        watched = [talker.say(*each) for each in arguments]
    monkeypatch.setattr("mmllm.quickstart.synthesis._PHONEME_EVENTS", 0)
    with Espeak() as talker:
        for each, samples in zip(arguments, watched, strict=True):
            assert np.array_equal(talker.say(*each), samples)
            assert not talker.phonemes


def test_the_number_of_processes_changes_no_sample(espeak, tmp_path, monkeypatch):
    monkeypatch.setattr("mmllm.quickstart.speech.ROWS_A_PROCESS", 3)
    for num_processes in (1, 2):
        (tmp_path / str(num_processes)).mkdir()
        rng = random.Random(5)
        paths = [tmp_path / str(num_processes) / f"{i}.wav" for i in range(7)]
        say_utterances([plan(path, "blue star", rng.choice(voices(False)), rng) for path in paths], 8000, num_processes)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "2")


def test_speech_rows(espeak, tmp_path):
    manifests = make_speech(tmp_path / "a", 8, 8, 8, 12, 12, seed=1)
    make_speech(tmp_path / "b", 8, 8, 8, 12, 12, seed=1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    rows = {split: rows_of(path) for split, path in manifests.items()}
    assert [row["level"] for row in rows["train"]] == ["word"] * 8 + ["phrase"] * 8 + ["sentence"] * 8
    assert all(row["heldout_voice"] == (split == "heldout") for split in ("test", "heldout") for row in rows[split])
    speakers = {split: {row["speaker"] for row in rows[split]} for split in rows}
    assert not (speakers["train"] | speakers["test"]) & speakers["heldout"]
    for split in rows:
        for row in rows[split]:
            with wave.open(str(tmp_path / "a" / row["audio"])) as file:
                assert (file.getnchannels(), file.getsampwidth(), file.getframerate()) == (1, 2, 8000)
                samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").astype(float) / 32768
            assert len(samples) / 8000 == pytest.approx(row["duration"], abs=1e-4)
            assert 0.15 < row["duration"] < 5
            words = read_words(row["words"], row["text"], row["id"])
            assert [word.word for word in words] == row["text"].split()
            assert 0.03 < words[0].start < 0.06 and row["duration"] - 0.1 < words[-1].end <= row["duration"]
            assert all(len(word.letters or ()) == len(word.word) for word in words)
            assert 0.03 < np.sqrt(np.mean(samples**2)) < 0.2


def test_joined_texts_are_said_one_after_the_other(espeak, tmp_path):
    texts, pauses, voice, rate = ("red star", "blue cross now", "we see"), (0.3, 0.15), "en-us+f2", 8000
    joined = tuple(Joined(text, pause, -60, seed=3) for text, pause in zip(texts[1:], pauses, strict=True))
    (said,) = say_utterances([Utterance(tmp_path / "a.wav", texts[0], voice, 170, 50, -20, joined)], rate)
    with wave.open(str(tmp_path / "a.wav")) as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    place, words = 0, []
    with Espeak() as talker:
        for text, pause in zip(texts, (*pauses, 0.0), strict=True):
            spoken = talker.say(text, voice, 170, 50)
            alone, seconds_later = clean_speech(spoken, rate, -20)
            assert np.array_equal(samples[place : place + len(alone)], alone)
            words += moved(word_times(text, talker.phonemes), place / rate + seconds_later, 100)
            place += len(alone)
            hush = samples[place : place + round(pause * rate)] / 32768
            assert not len(hush) or 20 * np.log10(np.sqrt(np.mean(hush**2))) == pytest.approx(-60, abs=0.5)
            place += len(hush)
    assert place == len(samples) and said.duration == pytest.approx(place / rate, abs=1e-4)
    assert [word.word for word in said.words] == " ".join(texts).split()
    for found, wanted in zip(said.words, words, strict=True):
        assert found.start == pytest.approx(wanted.start) and found.letters == pytest.approx(wanted.letters)


def test_joined_and_further_spoken_rows_leave_the_others_as_they_are(espeak, tmp_path):
    spoken = ("en-us+f2", "en-us+john")
    manifests = make_speech(tmp_path / "a", 2, 3, 4, 5, 5, seed=1, num_joined=12, num_spoken=6, spoken_voices=spoken)
    without = make_speech(tmp_path / "b", 2, 3, 4, 5, 5, seed=1)
    for split in ("test", "heldout"):
        assert manifests[split].read_bytes() == without[split].read_bytes()
        assert files_of(tmp_path / "a" / "audio" / split) == files_of(tmp_path / "b" / "audio" / split)
    rows = rows_of(manifests["train"])
    assert rows[:9] == rows_of(without["train"]) and len(rows) == 27
    joined, further = rows[9:21], rows[21:]
    assert not any("joined" in row for row in rows[:9] + further)
    assert not any("spoken_only" in row for row in rows[:21])
    num_pauses = []
    for row in joined:
        assert row["joined"] is True and row["level"] == "joined" and 1.5 < row["duration"] < 13
        words = read_words(row["words"], row["text"], row["id"])
        gaps = [after.start - before.end for before, after in itertools.pairwise(words)]
        num_pauses.append(sum(gap > 0.15 for gap in gaps))
    assert set(num_pauses) == {1, 2}
    assert all(row["spoken_only"] is True for row in further)
    assert [row["speaker"] for row in further] == [spoken[0]] * 3 + [spoken[1]] * 3
    assert [row["level"] for row in further] == ["phrase", "sentence", "sentence"] * 2
    for voices_to_speak in ((), ("nobody",), voices(heldout=True)):
        with pytest.raises(ValueError, match="1 rows are to be said by"):
            make_speech(tmp_path / "c", 0, 0, 0, 0, 0, seed=1, num_spoken=1, spoken_voices=voices_to_speak)


def test_test_sentences_are_never_trained_on():
    rng = random.Random(0)
    train, test = ({sample_sentence(rng, 1, is_test) for _ in range(3000)} for is_test in (False, True))
    assert not train & test and len(test) > 1000
    words = [text.split() for text in train | test]
    assert {len(text) for text in words} == set(range(4, 10))
    assert {word for text in words for word in text} <= {*WORDS, "a", "an", "to", "are"}
    assert len(WORDS) == len(set(WORDS)) >= 60
    said = " , ".join(train)
    assert not any(f"{colour} {shape}" in said for shape, colour in heldout_pairs())


def test_heldout_voices_are_other_variants():
    known, unknown = ({name.split("+")[1] for name in voices(heldout)} for heldout in (False, True))
    assert not known & unknown and len(known) >= 24 and len(unknown) >= 6


def test_without_the_wheel_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[speech\]'"):
        make_speech(tmp_path, 1, 0, 0, 0, 0, seed=1)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[speech\]'"):
        make_interleaved(tmp_path, 1, 0, seed=1, with_speech=True)
    make_interleaved(tmp_path, 1, 0, seed=1, with_speech=False)


def broken():
    raise RuntimeError("data path not exists")


@pytest.mark.parametrize(
    ("wheel", "reason"),
    [
        (None, r"pip install 'mmllm\[speech\]'"),
        ({"get_library_path": lambda: __file__, "get_data_path": lambda: ""}, "does not load: .*; reinstall"),
        ({"get_library_path": lambda: "/none.so", "get_data_path": lambda: ""}, "does not load: .*; reinstall"),
        ({"get_data_path": broken}, "data path not exists"),
    ],
)
def test_the_demo_does_without_speech_where_there_is_none(wheel, reason, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "espeakng_loader", wheel and SimpleNamespace(**wheel))
    assert main(["demo-data", "--out", str(tmp_path), "--share", "0.001"]) == 0
    made = json.loads((tmp_path / "manifests.json").read_text())
    assert len(made["left_out"]) == 1 and re.search(f"speech is left out: .*{reason}", made["left_out"][0])
    assert len(made["train"]) == 3 and not list(tmp_path.rglob("*.wav"))


def test_the_demo_shares_out_synthesis_and_stays_the_same(espeak, tmp_path, monkeypatch):
    pools = []

    class Pool:
        def __init__(self, num_processes, mp_context):
            pools.append(num_processes)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            pass

        def map(self, function, chunks):
            return map(function, chunks)

    monkeypatch.setattr("mmllm.quickstart.speech.ROWS_A_PROCESS", 5)
    monkeypatch.setattr("mmllm.quickstart.speech.ProcessPoolExecutor", Pool)
    assert main(["demo-data", "--out", str(tmp_path / "a"), "--share", "0.001"]) == 0 and not pools
    assert main(["demo-data", "--out", str(tmp_path / "b"), "--share", "0.001", "--workers", "2"]) == 0
    assert pools == [2] * 5, "three sets of speech, two of documents"
    alone, together = files_of(tmp_path / "a"), files_of(tmp_path / "b")
    del alone["manifests.json"], together["manifests.json"]  # with paths
    assert alone == together


def check_interleaved(folder, manifests):
    for split, path in manifests.items():
        for row in rows_of(path):
            files = [s.get("image") or s.get("audio") for s in row["segments"] if "text" not in s]
            assert 2 <= len(files) <= 3 and all((folder / file).is_file() for file in files)
            assert row["segments"][0]["text"]
            assert all("text" in one or "text" in other
                       for one, other in itertools.pairwise(row["segments"]))  # fmt: skip
            assert ("question" in row) == ("answer" in row)
            assert split == "train" or row["answer"]


def test_interleaved_pictures(tmp_path):
    manifests = make_interleaved(tmp_path / "a", 20, 400, seed=1, with_speech=False)
    make_interleaved(tmp_path / "b", 20, 400, seed=1, with_speech=False)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    check_interleaved(tmp_path / "a", manifests)
    rows = rows_of(manifests["test"])
    by_question: dict[str, list[str]] = {}
    for row in rows:
        by_question.setdefault(row["question"], []).append(row["answer"])
    best_guess = sum(max(answers.count(answer) for answer in answers) for answers in by_question.values())
    assert best_guess / len(rows) < 0.3, "the best answer to each question alone is seldom right"
    told = [row["answer"] in " ".join(s.get("text", "") for s in row["segments"]) for row in rows]
    assert np.mean(told) < 0.15, "the text around does not tell the answer but by chance"


def test_interleaved_sounds(espeak, tmp_path):
    manifests = make_interleaved(tmp_path / "a", 12, 12, seed=2, with_speech=True)
    make_interleaved(tmp_path / "b", 12, 12, seed=2, with_speech=True)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    check_interleaved(tmp_path / "a", manifests)
    rows = [row for path in manifests.values() for row in rows_of(path)]
    assert any("audio" in segment for row in rows for segment in row["segments"])
    assert any("image" in segment for row in rows for segment in row["segments"])


def test_prose_is_split_without_a_paragraph_in_both(tmp_path):
    manifests = make_prose(tmp_path / "a", seed=1)
    make_prose(tmp_path / "b", seed=1)
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    texts = {split: [row["text"] for row in rows_of(path)] for split, path in manifests.items()}
    assert len(texts["test"]) == 500 and len(texts["train"]) > 100
    assert max(map(len, texts["train"] + texts["test"])) < 2000
    train, test = ({" ".join(p.split()) for t in texts[split] for p in t.split("\n\n")} for split in ("train", "test"))
    assert not train & test
    with pytest.raises(ValueError, match="num_test is 99999"):
        make_prose(tmp_path, seed=1, num_test=99999)
