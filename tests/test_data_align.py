import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import torch

from mmllm.cli.main import main
from mmllm.data.rows.forms import read_rows
from mmllm.training.align_commands import align
from mmllm.training.aligner_training import (
    AlignerTraining,
    altered,
    even_labels,
    known_characters,
    known_words,
    measured_lag,
    train_aligner,
)
from mmllm_tokenizers.aligner import Aligner, AlignerConfig, AlignerNetwork
from mmllm_tokenizers.alignment import read_words
from tests.alignment_fixtures import RATE, tone_speech, tone_texts

SMALL: Any = {"sample_rate": RATE, "width": 48, "depth": 2}


def heard(config, texts):
    ears = Aligner(AlignerNetwork(config))
    sounds = [tone_speech(text, seed) for seed, text in enumerate(texts)]
    return [ears.mel(wave, RATE) for wave, _ in sounds], [words for _, words in sounds]


def errors_of(aligner, mels, texts, truth):
    found = aligner.align(mels, texts)
    pairs = [pair for words, wanted in zip(found, truth, strict=True) for pair in zip(words, wanted, strict=True)]
    assert all(one.word == other.word for one, other in pairs)
    times = [(one.start - other.start, one.end - other.end) for one, other in pairs]
    letters = [a - b for one, other in pairs for a, b in zip(one.letters, other.letters, strict=True)]
    return np.abs(np.array(times)), np.abs(np.array(letters))


def test_a_trained_aligner_knows_when_words_are_said():
    texts = tone_texts(80, seed=1)
    config = AlignerConfig(known_characters(texts), **SMALL)
    mels, truth = heard(config, texts)
    aligner = train_aligner(config, mels[:60], texts[:60], AlignerTraining(steps=120, batch_steps=1000, flat_share=0.3))
    times, letters = errors_of(aligner, mels[60:], texts[60:], truth[60:])
    assert np.median(times) < 0.02 and np.quantile(times, 0.95) < 0.05
    assert np.median(letters) < 0.03
    waves = [tone_speech(text, 60 + seed)[0] for seed, text in enumerate(texts[60:])]
    said = aligner.transcribe(waves, RATE, sorted({word for text in texts for word in text.split()}))
    assert np.mean([one == other for one, other in zip(said, texts[60:], strict=True)]) > 0.8


def test_an_aligner_agrees_with_the_synthesizer(tmp_path):
    """Forced alignment against espeak-ng's own events, sounds that it was trained on."""
    pytest.importorskip("espeakng_loader", reason="needs the espeakng-loader wheel: pip install 'mmllm[speech]'")
    from mmllm.quickstart.speech import make_speech

    rows = read_rows(make_speech(tmp_path, 60, 90, 0, 1, 1, seed=3)["train"])
    config = AlignerConfig(known_characters([row.text for row in rows]), **SMALL)
    ears = Aligner(AlignerNetwork(config))
    mels = [ears.mel(*sound_of(row)) for row in rows]
    truth = [read_words(row.metadata["words"], row.text, row.id) for row in rows]
    aligner = train_aligner(
        config, mels, [row.text for row in rows], AlignerTraining(steps=120, batch_steps=1000, flat_share=0.3)
    )
    times, letters = errors_of(aligner, mels, [row.text for row in rows], truth)
    assert np.median(times) < 0.035 and np.quantile(times, 0.95) < 0.15
    assert np.median(letters) < 0.06


def sound_of(row):
    samples, rate = soundfile.read(row.audio, dtype="float32")
    return torch.from_numpy(samples), rate


def test_equal_steps_and_seeds_give_equal_aligners():
    texts = tone_texts(12, seed=2)
    config = AlignerConfig(known_characters(texts), **SMALL)
    mels, _ = heard(config, texts)
    state = torch.random.get_rng_state()
    one, other, third = (
        train_aligner(config, mels, texts, AlignerTraining(steps=4, seed=seed)).network.state_dict()
        for seed in (0, 0, 1)
    )
    assert torch.equal(torch.random.get_rng_state(), state), "no global seed"
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["stem.weight"], third["stem.weight"])


def test_training_can_be_bounded_by_the_clock(monkeypatch):
    texts = tone_texts(6, seed=2)
    config = AlignerConfig(known_characters(texts), **SMALL)
    mels, _ = heard(config, texts)
    times = iter(np.arange(0, 1000, 0.5))
    monkeypatch.setattr("mmllm.training.aligner_training.time", SimpleNamespace(monotonic=lambda: next(times)))
    ticks = []
    train_aligner(config, mels, texts, AlignerTraining(seconds=2.0), lambda done, total: ticks.append((done, total)))
    assert ticks == [(0, 2), (1, 2), (1, 2), (2, 2)]
    with pytest.raises(ValueError, match="train for more than 0 seconds"):
        AlignerTraining(seconds=0.0)
    with pytest.raises(ValueError, match="train for at least 1 step"):
        AlignerTraining(steps=0)


def test_sounds_too_short_for_their_texts_are_not_trained_on():
    config = AlignerConfig("abcdef", **SMALL)
    mels, _ = heard(config, ["ab", "fed"])
    with pytest.raises(ValueError, match="no sound is long enough"):
        train_aligner(config, mels, ["abcdef" * 10] * 2, AlignerTraining(steps=1))
    train_aligner(config, mels, ["ab", "abcdef" * 10], AlignerTraining(steps=1))


def test_alterations_keep_time_and_follow_the_generator():
    mels, _ = heard(AlignerConfig("abcdef", **SMALL), ["ab", "face cade ebb fed", "dab fed"])
    one, steps = altered(mels, torch.Generator().manual_seed(0))
    other, _ = altered(mels, torch.Generator().manual_seed(0))
    assert torch.equal(one, other) and one.isfinite().all() and one.shape[1] % 2 == 0
    assert not torch.equal(one, altered(mels, torch.Generator().manual_seed(1))[0])
    for mel, num in zip(mels, steps.tolist(), strict=True):
        assert 0.84 * len(mel) < num < 1.19 * len(mel)
    burst = torch.full((100, 40), -80.0)
    burst[30:50] = 0.0
    for seed in range(10):
        one, steps = altered([burst, burst[:80]], torch.Generator().manual_seed(seed))
        for row, num, middle in zip(one, steps.tolist(), (0.4, 0.5), strict=True):
            loud = (row[:num].amax(1) > row[:num].max() - 15).nonzero()[:, 0]
            assert abs(float(loud.float().mean() + 0.5) / num - middle) < 0.05


def test_the_words_of_training_are_the_lexicon(monkeypatch):
    assert known_words(["“Red,” don't – 2 reds", "RED 2."]) == ("2", "don't", "red", "reds")
    monkeypatch.setattr("mmllm.training.aligner_training.MAX_WORDS", 3)
    assert known_words(["a b c"]) == ("a", "b", "c") and known_words(["a b c d"]) == ()


def test_letters_are_spread_over_what_is_not_silent():
    mel = torch.full((41, 40), -80.0)
    mel[10:31] = 0.0
    wanted = [0] * 5 + [7] * 4 + [8] * 4 + [9] * 3 + [0] * 5
    assert even_labels(mel, [7, 8, 9]).tolist() == wanted


def test_the_lag_is_measured_at_the_first_word():
    """Per letter: from silence to the first peak, less the half of what lies between two words' peaks."""
    mel = torch.full((80, 40), -80.0)
    mel[20:70] = 0.0  # frames 10 to 34
    sounds = {(2, 1, 3): (11, 15, 17), (3, 1, 2): (14, 18, 24), (3, 4, 1, 2): (15, 16, 18, 20)}
    rows = []
    for labels, frames in sounds.items():
        probs = torch.full((40, 5), -20.0)
        probs[:, 0] = -0.1
        for frame, label in zip(frames, labels, strict=True):
            probs[frame] = torch.tensor([-20.0 * (other != label) for other in range(5)])
        rows.append(probs)
    fake: Any = SimpleNamespace(log_probs=lambda mels: rows[: len(mels)])
    of_two = 0.03 - (0.5 * (24 - 14) + 0.5 * (20 - 16)) / 2 * 0.02  # one onset, two borders
    of_three = (0.09 + 0.11) / 2 - (17 - 11) / 2 * 0.02  # two onsets, one border
    assert measured_lag(fake, [mel] * 3, list(map(list, sounds))) == pytest.approx((of_two + of_three) / 2)
    assert measured_lag(fake, [mel], [[2, 1, 3]]) == 0.0


# ------------------------------------------------------------------------------------------------------------- command
@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in" / "wav").mkdir(parents=True)
    lines = []
    for number, text in enumerate(tone_texts(10, seed=4)):
        wave, _ = tone_speech(text, number)
        soundfile.write(tmp_path / "in" / "wav" / f"{number}.wav", wave.numpy(), RATE)
        lines.append({"id": f"r{number}", "audio": f"wav/{number}.wav", "text": text, "speaker": "t"})
    lines[0]["words"] = None
    own = [word.to_json() for word in tone_speech(lines[1]["text"], 1)[1]]
    lines[1] |= {"words": own}
    lines[2] |= {"words": [*own, *own, *own, *own, *own]}
    lines[3] |= {"text": "abcdef " * 40}
    lines[4] |= {"text": "… – !"}
    (tmp_path / "in" / "wav" / "5.wav").write_bytes(b"RIFF nothing")
    lines.append({"id": "plain", "text": "a text alone"})
    write(tmp_path / "in" / "some.jsonl", lines)
    write(tmp_path / "in" / "more.jsonl", lines[6:8])
    return tmp_path


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def told_by(capsys, *arguments):
    assert main(["data", "align", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_align_writes_words_and_names_what_has_none(folder, capsys):
    inputs = [folder / "in" / "some.jsonl", folder / "in" / "more.jsonl"]
    told = json.loads(
        told_by(capsys, *inputs, "--out", folder / "out", "--steps", 3, "--max_bad_fraction", 0.2, "--json")
    )
    counts = {name: told[name] for name in ("rows", "aligned", "had_words", "replaced_words", "without_words")}
    assert counts == {"rows": 13, "aligned": 8, "had_words": 1, "replaced_words": 1, "without_words": 2}
    assert told["other_rows"] == 1
    assert len(told["skipped"]) == 1 and sum(told["confidence"]["words"].values()) == told["words"] > 7
    assert 5 < told["letters_per_second"] < 20
    rows = {row.id: row for row in read_rows(folder / "out" / "some.jsonl")}
    before = {row.id: row for row in read_rows(inputs[0])}
    assert list(rows) == [name for name in before if name != "r5"]
    for name, row in rows.items():
        if name in ("r3", "r4", "plain"):
            assert "words" not in row.metadata
        else:
            words = read_words(row.metadata["words"], row.text, name)
            own, older = row.audio, before[name].audio
            assert isinstance(own, Path) and isinstance(older, Path) and own.resolve() == older.resolve()
            assert words[-1].end <= soundfile.info(own).duration + 0.0005
        assert row.metadata.get("speaker") == before[name].metadata.get("speaker")
    assert rows["r1"].metadata["words"] == before["r1"].metadata["words"]
    assert [row.id for row in read_rows(folder / "out" / "more.jsonl")] == ["r6", "r7"]
    bad = [json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [line.get("id") for line in bad] == ["r3", "r4", "r2", None]
    assert all(re.search(r"some\.jsonl:\d+$", line["where"]) for line in bad)
    for line, reason in zip(bad, ("its text needs", "no word", "replaced by times: 'words' has", "5.wav"), strict=True):
        assert reason in line["reason"]
    assert Aligner.load(told["aligner"]).config.words[:2] == ("ab", "abcdef")
    again = align([str(inputs[1])], str(folder / "again"), aligner=told["aligner"])
    assert (folder / "again" / "more.jsonl").read_bytes() == (folder / "out" / "more.jsonl").read_bytes()
    assert again["aligner"] == told["aligner"] and not (folder / "again" / "aligner").exists()


def test_align_prints_a_table(folder, capsys):
    out = told_by(
        capsys, folder / "in" / "more.jsonl", "--out", folder / "out", "--steps", 1, "--min_confidence", 0.999
    )
    assert re.search(r"^without words +2$", out, re.MULTILINE) and re.search(
        r"^  low confidence +2$", out, re.MULTILINE
    )
    assert f"named in {folder / 'out' / 'bad_rows.jsonl'}" in out
    out = told_by(
        capsys, folder / "in" / "more.jsonl", "--out", folder / "out", "--aligner", folder / "out" / "aligner"
    )
    assert re.search(r"^aligned +2$", out, re.MULTILINE) and re.search(r"^  words of 0-0.2 +\d+", out, re.MULTILINE)


def test_a_column_that_happens_to_be_called_words_is_replaced_and_named(folder):
    """Or kept, where no times take its place; a list would be taken for times, and goes."""
    lines = [json.loads(line) for line in (folder / "in" / "more.jsonl").read_text().splitlines()]
    lines = [{**lines[0], "words": 3}, {**lines[1], "words": "two words"}, {**lines[1], "id": "long", "words": 280},
             {**lines[1], "id": "list", "words": []}]  # fmt: skip
    for line in lines[2:]:
        line["text"] = "abcdef " * 40
    write(folder / "in" / "more.jsonl", lines)
    told = align([str(folder / "in" / "more.jsonl")], str(folder / "out"), training=AlignerTraining(steps=1))
    counts = {name: told[name] for name in ("aligned", "had_words", "replaced_words", "without_words")}
    assert counts == {"aligned": 2, "had_words": 0, "replaced_words": 2, "without_words": 2}
    rows = {row.id: row for row in read_rows(folder / "out" / "more.jsonl")}
    assert all(read_words(rows[name].metadata["words"], rows[name].text, name) for name in ("r6", "r7"))
    assert rows["long"].metadata["words"] == 280 and "words" not in rows["list"].metadata
    bad = [json.loads(line) for line in (folder / "out" / "bad_rows.jsonl").read_text().splitlines()]
    assert [line["id"] for line in bad] == ["long", "list", "r6", "r7"]
    assert "its own words are no times: 'words' is 280" in bad[0]["reason"]
    assert "its words were replaced by times: 'words' is 3" in bad[2]["reason"]


def test_what_was_learnt_and_what_is_bad_are_written_before_too_many_rows_are(folder):
    """An hour of training is not lost to a few files."""
    out = folder / "out"
    with pytest.raises(ValueError, match="1 of 11 rows can't be used"):
        align([str(folder / "in" / "some.jsonl")], str(out), training=AlignerTraining(steps=1), max_bad_fraction=0.0)
    assert Aligner.load(out / "aligner").config.words
    assert "5.wav" in (out / "bad_rows.jsonl").read_text()


def test_sounds_too_long_to_align_are_left_out_by_name(folder, capsys):
    soundfile.write(folder / "in" / "wav" / "6.wav", np.zeros(int(2.5 * RATE)), RATE)
    arguments = [folder / "in" / "more.jsonl", "--out", folder / "out", "--steps", 1, "--max_seconds", 2.4, "--json"]
    told = json.loads(told_by(capsys, *arguments))
    assert told["aligned"] == 1 and len(told["skipped"]) == 1
    assert re.search(r"more.jsonl:1: .*6\.wav.* 2\.5.* s", told["skipped"][0]), told["skipped"]
    with pytest.raises(ValueError, match="max_seconds is 0"):
        align([str(folder / "in" / "more.jsonl")], str(folder / "out"), max_seconds=0)


def test_align_refuses_what_it_cannot_use(folder):
    some, out = str(folder / "in" / "some.jsonl"), str(folder / "out")
    steps = AlignerTraining(steps=1)
    with pytest.raises(ValueError, match="1 of 11 rows can't be used"):
        align([some], out, training=steps, max_bad_fraction=0.0)
    with pytest.raises(ValueError, match="min_confidence is 2"):
        align([some], out, training=steps, min_confidence=2)
    with pytest.raises(ValueError, match="would be overwritten"):
        align([some], str(folder / "in"), training=steps)
    (folder / "else").mkdir()
    write(folder / "else" / "some.jsonl", [{"text": "a text alone"}])
    with pytest.raises(ValueError, match=r"some.jsonl, as something else is"):
        align([some, str(folder / "else" / "some.jsonl")], out, training=steps)
    with pytest.raises(ValueError, match="there is no sound with a text in"):
        align([str(folder / "else" / "some.jsonl")], out, training=steps)
    write(folder / "in" / "mute.jsonl", [{"audio": "wav/0.wav", "text": "…"}])
    with pytest.raises(ValueError, match="have no letter or digit"):
        align([str(folder / "in" / "mute.jsonl")], out, training=steps)
    with pytest.raises(FileNotFoundError, match=r"config.json does not exist"):
        align([some], out, aligner=str(folder))
