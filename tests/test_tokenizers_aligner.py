import itertools
import json
import re

import numpy as np
import pytest
import torch

from mmllm_tokenizers.aligner import Aligner, AlignerConfig, AlignerNetwork
from mmllm_tokenizers.alignment import read_words, text_words
from mmllm_tokenizers.letter_paths import (
    Peak,
    frames_needed,
    letter_times,
    path_peaks,
    silent_frames,
    spelled,
    text_labels,
    word_bounds,
)
from mmllm_tokenizers.lexicon import BLANK, SPACE, LexiconDecoder, greedy_labels
from tests.alignment_fixtures import RATE, tone_speech


def log_probs(num_frames: int, num_labels: int, seed: int) -> torch.Tensor:
    return (3 * torch.randn(num_frames, num_labels, generator=torch.Generator().manual_seed(seed))).log_softmax(-1)


def collapsed(path):
    return tuple(label for label, _ in itertools.groupby(path) if label != BLANK)


# ------------------------------------------------------------------------------------------------------------- lexicon
def test_greedy_labels_collapse():
    for seed in range(20):
        probs = log_probs(12, 3, seed)
        assert greedy_labels(probs.numpy()) == list(collapsed(probs.argmax(1).tolist()))
    assert greedy_labels(np.zeros((0, 3))) == []


def best_words(probs, words, bonus):
    """Every path there is."""
    best = (-np.inf, [])
    for path in itertools.product(range(probs.shape[1]), repeat=len(probs)):
        labels = collapsed(path)
        parts = [tuple(part) for is_space, part in itertools.groupby(labels, lambda x: x == SPACE) if not is_space]
        spaces = [x for x, _ in itertools.groupby(labels) if x == SPACE]
        joined = [x for number, part in enumerate(parts) for x in ([SPACE] if number else []) + list(part)]
        if joined != list(labels) or any(part not in words for part in parts) or len(spaces) != max(0, len(parts) - 1):
            continue
        score = sum(float(probs[t, label]) for t, label in enumerate(path)) + bonus * len(parts)
        best = max(best, (score, [words[part] for part in parts]))
    return best[1]


@pytest.mark.parametrize(
    ("words", "bonus"),
    [
        ({(2,): "a", (2, 2): "aa", (3, 2): "ba", (2, 3): "ab"}, 0.0),
        ({(2,): "a", (3, 2): "ba", (2, 3): "ab"}, 3.0),
        ({(2, 2): "aa", (3, 2, 2): "baa", (3,): "b"}, -1.0),
    ],
)
def test_the_lexicon_decoder_finds_the_best_of_all_paths(words, bonus):
    decoder, found = LexiconDecoder(words, bonus), []
    for seed in range(12):
        probs = log_probs(6, 4, seed)
        found.append(decoder.decode(probs.numpy()))
        assert found[-1] == best_words(probs, words, bonus), seed
    assert max(map(len, found)) >= 2
    assert decoder.decode(np.zeros((0, 4))) == []
    with pytest.raises(ValueError, match="must have words"):
        LexiconDecoder({})


# --------------------------------------------------------------------------------------------------------------- paths
def test_peaks_lie_on_the_best_of_all_paths():
    for seed, labels in itertools.product(range(6), ([2, 3], [2, 2], [2, 1, 2], [3])):
        probs = log_probs(6, 4, seed)
        paths = [path for path in itertools.product(range(4), repeat=6) if collapsed(path) == tuple(labels)]
        best = max(paths, key=lambda path: sum(float(probs[t, label]) for t, label in enumerate(path)))
        runs = [(label, [t for t, _ in run]) for label, run in itertools.groupby(enumerate(best), lambda x: x[1])]
        wanted = [(run[0], run[-1], max(float(probs[t, x].exp()) for t in run)) for x, run in runs if x != BLANK]
        found = path_peaks(probs, labels)
        assert [(peak.first, peak.last) for peak in found] == [(first, last) for first, last, _ in wanted]
        assert [peak.probability for peak in found] == pytest.approx([probability for *_, probability in wanted])


def test_a_sound_that_is_too_short_is_refused():
    assert frames_needed([2, 2, 3, 3, 2]) == 7
    path_peaks(log_probs(7, 4, 0), [2, 2, 3, 3, 2])
    with pytest.raises(ValueError, match=r"it lasts 0.12 s; its text needs 0.14 s"):
        path_peaks(log_probs(6, 4, 0), [2, 2, 3, 3, 2])


def test_spelling():
    characters = "éabdos2"
    assert text_labels("A – 2 dobs!", characters) == [3, SPACE, 8, SPACE, 5, 6, 4, 7]
    assert spelled("(baß)", characters) == [(1, 4), (2, 3), (3, 7), (3, 7)]
    with pytest.raises(ValueError, match="its text has 'x', 'ü', which this aligner was not trained on"):
        text_labels("a x üx", characters)
    with pytest.raises(ValueError, match="no word that could be said"):
        text_labels("… !", characters)


def test_word_bounds_are_silence_or_halfway():
    words = [[Peak(3, 3, 0.9), Peak(6, 7, 0.8)], [Peak(11, 11, 0.7)], [Peak(20, 20, 0.6)]]
    silent = np.zeros(30, dtype=bool)
    silent[[0, 1, 8, 9, 13, 14, 15, 16, 17, 27, 28, 29]] = True
    (a, b), (c, d), (e, f) = word_bounds(words, silent)
    assert (a, d, e, f) == pytest.approx((0.04, 0.26, 0.36, 0.54)), "pauses"
    assert b == c == pytest.approx((0.15 + 0.23) / 2 - 0.005), "halfway between 0.15 - 0.01 and 0.23"
    assert word_bounds(words, silent, 0.02)[1][0] == pytest.approx(c - 0.02)
    assert word_bounds(words, silent, 1.0)[1][0] == pytest.approx(words[0][-1].middle), "not before the letter itself"
    far = word_bounds([[Peak(60, 60, 1.0)]], np.zeros(200, dtype=bool))
    assert far == [pytest.approx((1.21 - 0.4, 1.21 + 0.4))], "in noise without an end"


def test_letters_share_a_word():
    peaks = [Peak(2, 2, 1.0), Peak(4, 4, 1.0), Peak(8, 8, 1.0)]
    times = letter_times("“a-bc”", [(1, 5), (3, 6), (4, 7)], peaks, 0.02, 0.2, 0.0)
    assert times == pytest.approx((0.02, 0.02, 0.07, 0.07, 0.13, 0.2))
    assert letter_times("ß", [(0, 5), (0, 5)], peaks[:2], 0.0, 0.2, 0.0) == (0.0,)


def test_silence_is_told_from_noise():
    mel = torch.full((100, 40), -20.0)
    mel[20:60] = 30.0
    assert silent_frames(mel).tolist() == [not 10 <= frame < 30 for frame in range(50)]
    noisy = mel + torch.randn(mel.shape, generator=torch.Generator().manual_seed(0))
    noisy = torch.maximum(noisy, torch.tensor(5.0))  # noise 25 dB below
    assert silent_frames(noisy).tolist() == [not 10 <= frame < 30 for frame in range(50)]


# ------------------------------------------------------------------------------------------------------------- aligner
@pytest.fixture(scope="module")
def aligner():
    torch.manual_seed(0)
    network = AlignerNetwork(AlignerConfig("abcdefs", RATE, width=32, depth=2, lag_seconds=0.01, words=("ab", "ebb")))
    torch.nn.init.normal_(network.head.weight)
    for block in network.blocks.children():
        torch.nn.init.normal_(block.get_submodule("out").get_parameter("weight"), std=0.2)
    return Aligner(network)


def test_what_is_heard_depends_on_nothing_but_the_sound(aligner):
    waves = [tone_speech(text, seed)[0] for seed, text in enumerate(("ab", "face cade ebb fed", "dab fed"))]
    mels = [aligner.mel(wave, RATE) for wave in waves]
    assert [tuple(mel.shape) for mel in mels] == [(2 * -(-len(wave) // 160), 40) for wave in waves]
    together = aligner.log_probs(mels)
    for mel, row in zip(mels, together, strict=True):
        (alone,) = aligner.log_probs([mel])
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(aligner.log_probs([mel - 20])[0], alone, rtol=1e-4, atol=1e-4)
    stereo = torch.stack([waves[0], waves[0]])
    torch.testing.assert_close(aligner.mel(stereo, RATE), mels[0])


def test_a_folder_gives_the_same_aligner(aligner, tmp_path):
    aligner.save(tmp_path / "a")
    loaded = Aligner.load(tmp_path / "a")
    mel = aligner.mel(tone_speech("face ebb", 0)[0], RATE)
    assert loaded.config == aligner.config
    assert torch.equal(loaded.log_probs([mel])[0], aligner.log_probs([mel])[0])
    loaded.save(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_a_folder_of_something_else_is_refused(aligner, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"writes an aligner's folder"):
        Aligner.load(tmp_path)
    aligner.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"kind": "codec"}, "is of kind 'codec', version 1"),
        ({"format_version": 2}, "version 2; expected"),
        ({"heads": 3}, "no aligner's configuration"),
        ({"characters": "aab"}, "give each character once"),
        ({"width": 16}, "has the wrong shape for weights"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=re.escape(message)):
            Aligner.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"12345678")
    with pytest.raises(ValueError, match="truncated or foreign"):
        Aligner.load(tmp_path)


def test_word_times_fit_the_text_whatever_it_looks_like(aligner):
    texts = ["“Face” – ab-ba, Daß!", "ebb", "…", "zebra", "abcdef" * 20]
    mels = [aligner.mel(tone_speech("face ab ba da", seed)[0], RATE) for seed in range(len(texts))]
    found = aligner.align(mels, texts)
    for text, words in zip(texts[:2], found[:2], strict=True):
        assert not isinstance(words, ValueError)
        assert [word.word for word in words] == text_words(text)
        read_words([word.to_json() for word in words], text, "row")
        assert all(0 < (word.confidence or 0) <= 1 for word in words)
    messages = [str(error) for error in found[2:]]
    assert all(isinstance(error, ValueError) for error in found[2:])
    assert "no word" in messages[0] and "'r', 'z'" in messages[1] and "its text needs 2.40 s" in messages[2]


def test_transcripts_come_from_the_lexicon_where_there_is_one(aligner):
    waves = [tone_speech("face ab", seed)[0] for seed in range(3)]
    assert aligner.transcribe([torch.zeros(0), torch.zeros(1)], RATE, ["ab"]) == aligner.transcribe(
        [torch.zeros(160)] * 2, RATE, ["ab"]
    )
    spelt = aligner.transcribe(waves, RATE)
    assert all(set(text) <= set("abcdefs ") and text == " ".join(text.split()) for text in spelt)
    said = aligner.transcribe(waves, RATE, ["Face", "face", "ab", "ebb"])
    assert all(set(text.split()) <= {"Face", "ab", "ebb"} for text in said)
    with pytest.raises(ValueError, match="the lexicon has 'face ab', which is not one word"):
        aligner.transcribe(waves, RATE, ["face ab"])
    with pytest.raises(ValueError, match="'z'"):
        aligner.transcribe(waves, RATE, ["zebra"])
