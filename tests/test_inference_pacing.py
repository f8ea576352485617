"""Speech at the user's pace: rates that keep the pitch, rests of silence, and word times that move along."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import soundfile
import torch

import mmllm
from mmllm.checkpoints.folder import save_model
from mmllm.cli.main import main
from mmllm.inference.api import Model
from mmllm.inference.pacing import Pace, Said, paced
from mmllm.inference.speaking import SpeechOptions, Waveform, speech_options
from mmllm.inference.voices import align_recording
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.pointer import PointerRule, Spelling
from mmllm_tokenizers.tempo import at_rate
from tests.inference_fixtures import RATE, make

FRAME_RATE, HOP = 125.0, 64
TEXT = "a red circle above two blue squares"
DRAWN = {"temperature": 1.0, "top_k": None, "seed": 3, "max_letter_seconds": 0.1}


def tone(hertz: float, seconds: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


def pitch(wave_T: np.ndarray) -> float:
    """The strongest frequency of a sound, Hz."""
    spectrum = np.abs(np.fft.rfft(wave_T * np.hanning(len(wave_T)), 1 << 16))
    return float(spectrum.argmax()) * RATE / (1 << 16)


def level_db(wave_T: np.ndarray) -> float:
    return float(10 * np.log10(np.mean(np.square(wave_T, dtype=np.float64)) + 1e-20))


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.8, 0.99, 1.25, 2.0, 4.0])
def test_a_rate_changes_length_and_neither_pitch_nor_level_nor_order(rate):
    parts = [tone(hertz, seconds) for hertz, seconds in ((220, 0.9), (700, 1.3), (330, 0.8))]
    wave_T = np.concatenate(parts)
    fast_T = at_rate(wave_T, RATE, rate)
    assert fast_T.dtype == np.float32 and len(fast_T) == round(len(wave_T) / rate)
    borders = np.cumsum([0, *map(len, parts)]) / rate
    for part, begin, end in zip(parts, borders, borders[1:], strict=False):
        inner = fast_T[int(begin) + 200 : int(end) - 200]  # a window's reach from the borders
        assert pitch(inner) == pytest.approx(pitch(part), rel=0.01)
        assert level_db(inner) == pytest.approx(level_db(part), abs=1.0)
    assert level_db(fast_T[:80]) > -20 and level_db(fast_T[-80:]) > -20, "nothing is faded in or out"


def test_the_models_own_rate_changes_nothing():
    wave_T = tone(220, 0.5)
    assert at_rate(wave_T, RATE, 1.0) is wave_T
    for num_samples in (0, 1, 30, 500):
        assert len(at_rate(wave_T[:num_samples], RATE, 0.5)) == 2 * num_samples


# --------------------------------------------------------------------------------------------------------------- model
@pytest.fixture(scope="module")
def model() -> Model:
    """Its pointer moves by what a frame's state says, surely: as trained ones do."""
    sharp = copy.deepcopy(make("delay", pointer=PointerRule()))
    pointer = sharp.model.pointer
    assert pointer is not None
    with torch.no_grad():
        pointer.age_embedding.normal_(std=2.0)
        pointer.advance_head.weight.mul_(40.0)
    return sharp


def biased(model: Model, *biases: float) -> Model:
    model = copy.deepcopy(model)
    assert model.model.pointer is not None
    with torch.no_grad():
        model.model.pointer.advance_head.bias.copy_(torch.tensor(biases))
    return model


@pytest.mark.parametrize("rate", [0.5, 1.25, 2.0])
def test_the_rate_is_the_users(model, rate):
    texts = [TEXT, "two, three", "said he"]
    for plain, fast in zip(model.speak(texts, **DRAWN), model.speak(texts, rate=rate, **DRAWN), strict=True):
        assert fast.seconds == pytest.approx(plain.seconds / rate, rel=1e-3)
        np.testing.assert_array_equal(fast.codes_KF, plain.codes_KF)
        assert [word.word for word in fast.words] == [word.word for word in plain.words]
        for word, slow in zip(fast.words, plain.words, strict=True):
            assert (word.start, word.end) == pytest.approx((slow.start / rate, slow.end / rate))
    bounded = model.speak(TEXT, rate=rate, max_seconds=0.06, **DRAWN)
    assert bounded.seconds == pytest.approx(0.06, abs=1 / FRAME_RATE) and not bounded.is_whole


@pytest.mark.parametrize("rate", [1.0, 0.5, 2.0])
@pytest.mark.parametrize("skips", [False, True])
def test_pauses_are_the_users(model, rate, skips):
    speaker = biased(model, 0.0, 0.0, 1e6) if skips else model  # which says every second letter: some spaces never
    pauses = {-1: 0.2, 2: 0.4, 3: 0.1, 6: 0.3}
    plain = speaker.speak(TEXT, rate=rate, **DRAWN)
    paused = speaker.speak(TEXT, rate=rate, pauses=pauses, **DRAWN)
    np.testing.assert_array_equal(paused.codes_KF, plain.codes_KF)
    assert paused.seconds == pytest.approx(plain.seconds + sum(pauses.values()), abs=1e-9)
    assert [word.word for word in paused.words] == TEXT.split() and level_db(plain.samples) > -45
    starts = [*(word.start for word in paused.words), paused.seconds]
    ends = [0.0, *(word.end for word in paused.words)]
    was = [b.start - a.end for a, b in zip(plain.words, plain.words[1:], strict=False)]
    for word in range(-1, len(TEXT.split())):
        gap = starts[word + 1] - ends[word + 1]
        if word in pauses:
            assert gap == pytest.approx(pauses[word], abs=1 / FRAME_RATE)
            silence = paused.samples[round(ends[word + 1] * RATE) : round(starts[word + 1] * RATE)]
            assert level_db(silence) < -50
        else:
            assert gap == pytest.approx(was[word], abs=1e-9), "words beside no rest are as long as they were"
    for word, slow in zip(paused.words, plain.words, strict=True):
        assert word.end - word.start == pytest.approx(slow.end - slow.start, abs=0.1 / rate)


def test_what_is_said_around_rests_is_as_it_was(model):
    plain, paused = model.speak(TEXT, **DRAWN), model.speak(TEXT, pauses={2: 0.4}, **DRAWN)
    cut = round(paused.words[2].end * RATE)
    rest = np.concatenate([paused.samples[:cut], paused.samples[cut + round(0.4 * RATE) :]])
    differs = np.flatnonzero(rest != plain.samples)
    assert len(rest) == len(plain.samples)
    assert cut - 0.005 * RATE <= differs.min() and differs.max() < cut + 0.005 * RATE, "faded for 5 ms"
    assert not paused.samples[cut - 1] and not paused.samples[cut + round(0.4 * RATE)] and plain.samples[cut], "to 0"
    assert model.speak(TEXT, pauses={2: 0.0}, **DRAWN).seconds == plain.seconds


def said_by(text: str, places: list[int], is_whole: bool = True) -> Said:
    return Said.of(np.array(places), text, 0, FRAME_RATE, is_whole)


def test_a_rest_begins_where_it_is_quiet():
    """The pointer is a frame early at the border, and skips the space."""
    wave_T = np.concatenate([tone(500, 10 / FRAME_RATE), np.zeros(HOP, np.float32), tone(900, 9 / FRAME_RATE)])
    said = said_by("ab cd", [0, *[1] * 4, *[2] * 5, *[4] * 5, *[5] * 5])
    words = {number: WordTime(word, *said.word(number)) for number, word in enumerate(("ab", "cd"))}
    quiet_T, moved = paced(wave_T, RATE, words, said, Pace(pauses={0: 0.5}))
    silent = np.flatnonzero(np.abs(quiet_T) < 1e-6)
    assert 10 * HOP <= silent[np.diff(silent, prepend=-9) == 1].min() <= 11 * HOP
    assert [pitch(part) for part in (quiet_T[: 9 * HOP], quiet_T[-8 * HOP :])] == pytest.approx([500, 900], rel=0.02)
    assert moved[1].start - moved[0].end == pytest.approx(0.5)


def test_rests_stand_where_their_words_end():
    wave_T = np.random.default_rng(0).normal(0, 0.1, 12 * HOP).astype(np.float32)
    places = [0, 1, 2, 3, 5, 6, 7, 8, 8, 9, 9, 10]  # " ab - cd e "
    text = "ab - cd e"
    assert bytes(Spelling.of(text).letters_L.tolist()) == b" ab - cd e "
    for is_whole, upto, rests in ((True, 12, {-1, 0, 1, 2, 3}), (False, 7, {-1, 0, 1}), (False, 3, {-1})):
        said = said_by(text, places[:upto], is_whole)
        numbers = [number for number in (0, 2, 3) if said.word(number)]
        words = {number: WordTime(text.split()[number], *said.word(number)) for number in numbers}
        for word in range(-1, 4):
            quiet_T, moved = paced(wave_T[: upto * HOP], RATE, words, said, Pace(pauses={word: 0.25}))
            added = 0.25 if word in rests else 0.0
            assert len(quiet_T) == upto * HOP + added * RATE
            for number, time in zip(numbers, moved, strict=True):
                later = time.start - words[number].start
                assert later == pytest.approx(added if number > word else 0.0, abs=2 / FRAME_RATE)


def test_wrong_paces_are_refused(model):
    with pytest.raises(ValueError, match=r"pauses\[7\] stands behind no word; the text 'a red .*' has words 0 to 6"):
        model.speak(TEXT, pauses={7: 0.1})
    for options, message in (
        ({"rate": 0}, "rate is 0; give 0.25 to 4"),
        ({"rate": float("nan")}, "rate is nan"),
        ({"max_letter_seconds": 0.0}, "max_letter_seconds is 0.0; it must be positive"),
        ({"variation": 2.0}, "variation is 2.0; give 0 to 1"),
        ({"pauses": {0: -1.0}}, r"pauses\[0\] is -1.0; give seconds, 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            model.speak(TEXT, **options)


# ------------------------------------------------------------------------------------------------------ other settings
def test_tries_that_cannot_differ_or_be_heard_are_refused_before_anything_is_spoken(model, monkeypatch):
    def speaks(*args, **settings):
        raise AssertionError("it has spoken")

    monkeypatch.setattr("mmllm.inference.running.Runner.complete", speaks)
    with pytest.raises(ValueError, match="best_of is 2, but the model has no CTC head"):
        make("delay").speak("one", best_of=2, temperature=1.0)
    with pytest.raises(ValueError, match="best_of is 3, but nothing is left to chance"):
        model.speak("one", best_of=3, temperature=0)
    with pytest.raises(ValueError, match="nothing is left to chance"):
        model.speak("one", best_of=3, temperature=[0.7, 0.7, 0.7], top_k=1)
    with pytest.raises(ValueError, match="there is no temperature; give one"):
        model.speak("one", temperature=[])
    wave = (np.random.default_rng(0).normal(0, 0.1, 80 * HOP).astype(np.float32), RATE)
    with pytest.raises(ValueError, match="the voice 'ann' and a recording are both given; leave one out"):
        model.speak("one", voice="ann", recording=wave, recording_text="two")
    varied = speech_options({"temperature": 0, "variation": 0.5, "best_of": 3}, model.generation, True)
    assert isinstance(varied, SpeechOptions)


@pytest.mark.parametrize("num_silent", [0, 3, 40, 75])
def test_silence_around_a_recording_is_no_part_of_its_words(model, monkeypatch, num_silent):
    """Units whose first codebook is 0 are silence here, of 60 dB less."""
    audio = model.tokenizer.require_audio()

    def decode(codes_KF: torch.Tensor) -> torch.Tensor:
        is_loud_T = (codes_KF[0] > 0).repeat_interleave(HOP)
        noise_T = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, len(is_loud_T))).float()
        return torch.where(is_loud_T, noise_T, 1e-3 * noise_T)

    monkeypatch.setattr(audio, "decode", decode)
    spoken_KF = torch.from_numpy(np.random.default_rng(4).integers(1, 12, (3, 80)))
    silence_KF = torch.zeros(3, num_silent, dtype=torch.int64)
    padded_KF = torch.cat([silence_KF, spoken_KF, silence_KF], dim=1)
    recording = align_recording(model.model, model.tokenizer, padded_KF, "two red")
    kept = min(num_silent, 6)  # about 40 ms of frames of 8 ms, told to 10 ms
    first = num_silent - kept
    assert abs(recording.codes_KF.shape[1] - (80 + 2 * kept)) <= 2
    begin, end = recording.words[0].start, recording.words[-1].end
    assert begin == pytest.approx(kept / FRAME_RATE, abs=0.02) and end == pytest.approx(
        (kept + 80) / FRAME_RATE, abs=0.02
    )
    assert begin <= recording.words[0].end <= recording.words[1].start <= end
    where = recording.codes_KF.shape[1] - padded_KF.shape[1] + 2 * first
    assert abs(where) <= 2


# ------------------------------------------------------------------------------------------------------------- command
def test_the_command_speaks_as_the_api_does(model, tmp_path, capsys):
    generation = dataclasses.replace(model.generation, voices=("ann", "bob"))
    folder = str(save_model(tmp_path / "model", model.model, model.tokenizer, generation=generation))
    wave = np.random.default_rng(0).normal(0, 0.1, 80 * HOP).astype(np.float32)
    voice = str(tmp_path / "voice.wav")
    soundfile.write(voice, wave, RATE, subtype="FLOAT")
    loaded = mmllm.load(folder, "cpu")

    def said(*arguments: str) -> tuple[np.ndarray, str]:
        out = tmp_path / "said.wav"
        command = ["speak", TEXT, "--out", str(out), "--model", folder, "--max_letter_seconds", "0.1", *arguments]
        assert main(command) == 0
        return soundfile.read(out, dtype="float32")[0], capsys.readouterr().out

    def same(samples: np.ndarray, spoken: Waveform) -> None:
        np.testing.assert_allclose(samples, spoken.samples.clip(-1, 1), atol=1.1 / 32768)

    most = {"seed": 0, "max_letter_seconds": 0.1}
    paced = ["--rate", "1.25", "--pause", "2=0.4", "--pause=-1=0.1", "--temperature", "0.7,0.5,0", "--voice", "ann"]
    samples, out = said(*paced, "--variation", "0.5", "--best_of", "3")
    settings = {"rate": 1.25, "pauses": {2: 0.4, -1: 0.1}, "temperature": [0.7, 0.5, 0.0], "variation": 0.5}
    want = loaded.speak(TEXT, voice="ann", best_of=3, **settings, **most)
    same(samples, want)
    assert f"{want.seconds:.2f} s at {RATE} Hz" in out and out.strip().splitlines()[0].endswith("3 units")
    samples, _ = said("--recording", voice, "--recording_text", "two red", "--temperature", "0.6")
    want = loaded.speak(TEXT, recording=voice, recording_text="two red", temperature=0.6, **most)
    same(samples, want)
    for arguments, message in (
        (["--pause", "2"], "--pause is '2'; give a word's number and seconds, such as 2=0.5"),
        (["--pause", "9=0.5"], "pauses[9] stands behind no word"),
        (["--rate", "9"], "rate is 9.0; give 0.25 to 4"),
        (["--best_of", "2", "--temperature", "0"], "nothing is left to chance"),
        (["--recording", voice], "recording_text"),
        (["--recording", str(tmp_path / "none.wav"), "--recording_text", "two"], "none.wav"),
        (
            ["--recording", voice, "--recording_text", "two red", "--voice", "ann"],
            "leave one out",
        ),
        (["--temperature", "0.7,0.5"], "2 samplings (or temperatures) but the model speaks with 3 codebooks"),
        (["--voice", "carl"], "this model speaks as ann, bob"),
    ):
        assert main(["speak", TEXT, "--out", str(tmp_path / "x.wav"), "--model", folder, *arguments]) != 0
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x.wav").exists()
