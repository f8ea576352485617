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
from mmllm.quickstart.speech import WORDS, make_speech, sample_sentence, say_utterances
from mmllm.quickstart.speech import sample_utterance as plan
from mmllm.quickstart.synthesis import clean_speech, resample, synthesize, trim_silence, voices


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
        out = trim_silence(np.pad(tone, (lead, tail)), 8000, keep_seconds=0.04)
        assert abs(len(out) - 8000 - 640) <= 160
        assert np.abs(out[:160]).max() == np.abs(out[-160:]).max() == 0
    assert len(trim_silence(np.zeros(3), 8000)) == 3
    assert not clean_speech(np.zeros(4000, dtype=np.int16), 8000, -20).any()


def test_speech_does_not_depend_on_what_was_said_before(espeak, tmp_path):
    first = synthesize("a small red circle", "en-us+f2")
    synthesize("draw the blue square", "en-gb-scotland+m2", 200, 30)
    assert np.array_equal(first, synthesize("a small red circle", "en-us+f2"))
    assert not np.array_equal(first, synthesize("a small red circle", "en-us+m3"))
    assert 1 < len(first) / 22050 < 2 and np.abs(first).max() > 3000
    with pytest.raises(ValueError, match="no voice 'nobody'"):
        synthesize("red", "nobody")


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
            assert 0.03 < np.sqrt(np.mean(samples**2)) < 0.2


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
