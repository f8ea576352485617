from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmllm
from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.cli.main import main
from mmllm.data.samples.sample import Segment
from mmllm.inference.api import Model
from mmllm.inference.inputs import parse_parts
from mmllm_tokenizers.decoder_streams import WholeDecoderStream
from tests.inference_fixtures import RATE, images, make, make_model, make_tokenizer, sounds


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(images(1)[0]).save(folder / "a picture.png")
    wave, rate = sounds(1)[0]
    soundfile.write(folder / "a sound.wav", wave, rate, subtype="FLOAT")
    return folder


def test_all_kinds_of_images_agree(model, files):
    array = images(1)[0]
    path = files / "a picture.png"
    chw = torch.from_numpy(array).permute(2, 0, 1)
    kinds = [
        path,
        str(path),
        path.read_bytes(),
        Image.open(path),
        array,
        chw,
        chw.numpy(),
        array.astype(np.float32) / 255,
        chw.double() / 255,
        np.dstack([array, np.full(array.shape[:2], 255, np.uint8)]),
    ]
    assert set(model.caption(kinds)) == {model.caption(array)}
    assert {model.generate(["see ", kind]) for kind in kinds if not isinstance(kind, bytes)} == {
        model.generate(["see ", array])
    }
    assert model.caption(array) != model.caption(images(2)[1])


def test_all_kinds_of_sounds_agree(model, files):
    wave, rate = sounds(1)[0]
    path = files / "a sound.wav"
    kinds = [
        path,
        str(path),
        path.read_bytes(),
        (wave, rate),
        (torch.from_numpy(wave), rate),
        (np.stack([wave, wave]), rate),
        mmllm.Audio(wave, rate),
        mmllm.Audio(wave.tolist(), rate),
    ]
    assert set(model.transcribe(kinds)) == {model.transcribe((wave, rate))}
    assert model.generate([str(path), " said"]) == model.generate([mmllm.Audio(wave, rate), " said"])
    assert isinstance(model.transcribe((np.repeat(wave, 2), 2 * rate)), str)


def test_lists_equal_one_by_one(model):
    assert model.caption(images(4)) == [model.caption(image) for image in images(4)]
    assert model.transcribe(sounds(4)) == [model.transcribe(sound) for sound in sounds(4)]
    together = model.speak(["one", "a red circle"], voice=["he", None], temperature=0)
    alone = [model.speak("one", voice="he", temperature=0), model.speak("a red circle", temperature=0)]
    assert all((a.samples == b.samples).all() for a, b in zip(together, alone, strict=True))
    parts = [["see ", image, "?"] for image in images(2)]
    assert model.generate(parts) == [model.generate(one) for one in parts]
    questions = ["how many?", "red?"]
    assert model.answer(parts, questions) == [model.answer(*pair) for pair in zip(parts, questions, strict=True)]
    talks = [[{"role": "user", "content": one}] for one in parts]
    assert model.chat(talks) == [model.chat(one) for one in talks]
    nothing = [model.caption([]), model.transcribe([]), model.speak([]), model.answer([], []), model.generate([])]
    assert [*nothing, model.chat([]), model.embed([]), model.score([], [])] == [[]] * 8


@pytest.mark.parametrize("pattern", ["delay", "parallel", "flatten"])
def test_sounds_are_heard_and_spoken_under_every_pattern(pattern):
    hearing = make(pattern, 3)
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 2).astype(np.float32)
    assert isinstance(hearing.transcribe((noise, RATE), max_new_tokens=4), str)
    assert hearing.speak("red", max_seconds=0.1).codes_KF.shape[0] == 3


def test_speech_of_a_stereo_codec_is_mixed_down(model, monkeypatch):
    audio = model.tokenizer.require_audio()
    decode = audio.decode

    def stereo(codes_KF: torch.Tensor) -> torch.Tensor:
        return torch.stack([decode(codes_KF), 3 * decode(codes_KF)])

    monkeypatch.setattr(audio, "decoder_stream", lambda: WholeDecoderStream(stereo))
    spoken = model.speak("one", temperature=0)
    np.testing.assert_allclose(spoken.samples, 2 * decode(torch.from_numpy(spoken.codes_KF)).numpy(), rtol=1e-6)


def test_speech_is_written(model, tmp_path):
    waveform = model.speak("one two", tmp_path / "new" / "out.wav", seed=3)
    samples, rate = soundfile.read(tmp_path / "new" / "out.wav")
    assert rate == waveform.sample_rate == RATE
    assert len(samples) == len(waveform.samples) == waveform.codes_KF.shape[1] * 64
    assert waveform.seconds <= model.generation.max_seconds + 64 / RATE
    np.testing.assert_allclose(samples, waveform.samples.clip(-1, 1), atol=1e-4)
    model.speak(["one", "two"], [tmp_path / "1.flac", tmp_path / "2.wav"])
    assert (tmp_path / "1.flac").stat().st_size and (tmp_path / "2.wav").stat().st_size
    with pytest.raises(ValueError, match="there are 2 texts but 1 files"):
        model.speak(["one", "two"], [tmp_path / "1.wav"])
    with pytest.raises(ValueError, match=r"its suffix is '\.doc'"):
        model.speak("one", tmp_path / "1.doc")
    with pytest.raises(ValueError, match="max_seconds is 0"):
        model.speak("one", max_seconds=0)


def test_a_voice_that_training_never_heard_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    generation = GenerationConfig(max_seconds=0.1, voices=("ann", "bob"))
    save_model(tmp_path / "m", make_model(tokenizer), tokenizer, generation=generation)
    speaking = mmllm.load(tmp_path / "m")
    assert speaking.generation.voices == ("ann", "bob")
    assert len(speaking.speak(["one", "two"], voice=["bob", None])) == 2
    with pytest.raises(ValueError, match="is empty; give words"):
        speaking.speak(["one", " "])
    with pytest.raises(ValueError, match="no voice 'carl'; this model speaks as ann, bob; or leave voice out"):
        speaking.speak("one", voice="carl")


def test_slots_are_filled_in_order(model):
    first, second = images(2)
    inline = model.generate(["Compare ", first, " with ", second, "."])
    assert model.generate("Compare <|image|> with <|image|>.", images=[first, second]) == inline
    assert model.generate(["Compare <|image|> with <|image|>.", first, second]) == inline
    assert model.generate("Compare <|image|> with <|image|>.", images=[second, first]) != inline
    heard = model.generate(["a ", sounds(1)[0], "b"])
    assert model.generate("a <|audio|>b", sounds=sounds(1)) == heard


@pytest.mark.parametrize(
    ("text", "given", "message"),
    [
        (
            "<|image|> and <|image|>",
            {"images": images(1)},
            r"prompt has 2 image slots but 1 images were given; pass one image for each <\|image\|>",
        ),
        ("no slot", {"images": images(1)}, "prompt has 0 image slots but 1 images were given"),
        ("<|image|>", {}, "prompt has 1 image slots but 0 images were given"),
        ("<|audio|>", {"sounds": sounds(2)}, r"prompt has 1 audio slots but 2 audios were given.*<\|audio\|>"),
    ],
)
def test_slots_and_inputs_must_agree(model, text, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate(text, **given)


def test_parts_are_told_apart(files):
    path = str(files / "a picture.png")
    parsed = parse_parts(["see cat.jpg now.", "what is in dog.png", path, Path(path), "Hello.wav is a file"])
    kinds = [part if isinstance(part, str) else type(part).__name__ for part in parsed]
    assert kinds == ["see cat.jpg now.", "what is in dog.png", "ImagePart", "ImagePart", "Hello.wav is a file"]


def test_text_that_looks_like_a_misspelt_path_is_said(caplog):
    assert parse_parts(["cat.pgn", "pi=3.14", "e.g.", "etc...", "see a.pgn there"])[0] == "cat.pgn"
    assert [record.getMessage() for record in caplog.records] == [
        "cat.pgn is taken for text: it ends as no picture or sound that can be read does"
    ]


def test_a_segments_text_is_text(files):
    parts = [
        Segment(text="cat.jpg"),
        "see <|image|>",
        Segment(text="not <|image|>"),
        Segment(image=files / "a picture.png"),
    ]
    parsed = parse_parts(parts)
    kinds = [part if isinstance(part, str) else type(part).__name__ for part in parsed]
    assert kinds == ["cat.jpg", "see ", "ImagePart", "not <|image|>"]


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ("cat.jpg", FileNotFoundError, "no image file at cat.jpg"),
        (["hear ", Path("no.wav")], FileNotFoundError, "no sound file at no.wav"),
        ([Path("model.onnx")], ValueError, "its name ends in '.onnx'"),
        ([3], ValueError, "a part of the prompt is int"),
        ([(np.zeros(0, np.float32), RATE)], ValueError, "no sound|zero"),
        ([(np.full(9, np.nan, np.float32), RATE)], ValueError, "NaN"),
        ([np.zeros((2, 3, 4, 5), np.uint8)], ValueError, "shape"),
    ],
)
def test_bad_parts_are_explained(model, parts, error, message):
    with pytest.raises(error, match=message):
        model.generate(parts)


def test_special_tokens_in_text_are_text(model):
    plain = model.continuation_prompt(["he said <|end|>"])
    assert model.tokenizer.id("<|end|>") not in plain.token_ids_T


def test_chat(model):
    picture = images(1)[0]
    messages = [
        {"role": "system", "content": "he is red. "},
        {"role": "user", "content": ["see ", picture]},
        {"role": "assistant", "content": "one.png"},
        {"role": "user", "content": "two?"},
    ]
    prompt = model.chat_prompt(messages)
    text = model.tokenizer.text
    expected = [
        *text.encode_template("<|user|>"), *text.encode("he is red. "), *text.encode("\nsee "),
        *[model.tokenizer.id("<|image|>")] * 4, *text.encode_template("<|assistant|>"),
        *text.encode("one.png"), *text.encode_template("<|end|><|user|>"), *text.encode("two?"),
        *text.encode_template("<|assistant|>"),
    ]  # fmt: skip
    assert prompt.token_ids_T.tolist() == expected
    assert prompt.token_ids_T[prompt.images[0].start] == model.tokenizer.id("<|image|>")
    assert isinstance(model.chat(messages), str)
    with pytest.raises(ValueError, match="must be the user's"):
        model.chat(messages[:-1])
    with pytest.raises(ValueError, match="role 'robot'"):
        model.chat([{"role": "robot", "content": "x"}, messages[-1]])


def test_missing_senses_are_said(files):
    tokenizer = make_tokenizer(sound=False)
    model = mmllm.Model(make_model(tokenizer, sight=False), tokenizer)
    assert isinstance(model.generate("one", max_new_tokens=3), str)
    with pytest.raises(ValueError, match="does not see"):
        model.caption(images(1)[0])
    with pytest.raises(ValueError, match="does not hear"):
        model.transcribe(sounds(1)[0])
    with pytest.raises(ValueError, match="does not speak"):
        model.speak("one")
    with pytest.raises(ValueError, match="does not see"):
        model.generate(["see ", images(1)[0]])


def test_unknown_setting_is_named(model):
    with pytest.raises(
        ValueError, match=r"unknown setting 'temprature' \(did you mean temperature\?\); wanted one of .*temperature"
    ):
        model.caption(images(1)[0], temprature=1.0)
    with pytest.raises(ValueError, match="max_new_tokens is 0"):
        model.caption(images(1)[0], max_new_tokens=0)
    with pytest.raises(ValueError, match="unknown setting 'batch_size'; how many are answered at once is the engine's"):
        model.caption(images(1)[0], batch_size=8)
    with pytest.raises(ValueError, match="unknown setting 'blind'; it is evaluation's"):
        model.caption(images(1)[0], blind=True)


def test_commands(model, files, tmp_path, capsys):
    folder = str(save_model(tmp_path / "model", model.model, model.tokenizer, generation=model.generation))
    picture, sound = str(files / "a picture.png"), str(files / "a sound.wav")

    def said(*command: str) -> str:
        assert main([*command, "--model", folder]) == 0
        return capsys.readouterr().out.removesuffix("\n")

    assert said("caption", picture, picture) == "\n".join([model.caption(picture)] * 2)
    assert said("caption", picture, "--max_new_tokens", "1") == model.caption(picture, max_new_tokens=1)
    assert said("transcribe", sound) == model.transcribe(sound)
    assert said("generate", "see ", picture) == model.generate(["see ", picture])
    drawn = ["--temperature", "2", "--top_k", "40", "--top_p", "0.9", "--seed", "3"]
    settings = {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "seed": 3}
    assert said("generate", "see <|image|>", "--image", picture, *drawn) == model.generate(
        ["see ", Path(picture)], **settings
    )
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": ["two?", picture]}]
    assert said("chat", "two?", picture, "--system", "be kind") == model.chat(messages)
    message = said("speak", "one", "--out", str(tmp_path / "out.wav"), "--max_seconds", "0.2")
    assert "out.wav" in message and message.endswith(f"{model.tokenizer.num_codebooks} units")
    info = soundfile.info(io.BytesIO((tmp_path / "out.wav").read_bytes()))
    assert info.samplerate == RATE and info.duration <= 0.2 + 1e-6


def test_a_sound_that_no_sequence_could_hold_is_refused(model, files):
    wave, rate = sounds(1)[0]
    generation = dataclasses.replace(model.generation, max_heard_seconds=len(wave) / rate)
    short = Model(model.model, model.tokenizer, model.image_transform, generation)
    assert short.transcribe((wave, rate)) == model.transcribe((wave, rate))
    joined = (np.concatenate([wave, wave]), rate)
    with pytest.raises(ValueError, match=r"sound 2 of 2 lasts .* hears .* at once"):
        short.generate([(wave, rate), joined])
    with pytest.raises(ValueError, match=r"the sound lasts .* hears .* at once"):
        short.stream("transcribe", joined)
    with pytest.raises(ValueError, match="several completions are asked for of a sound that is transcribed in windows"):
        short.transcribe(joined, n=2, temperature=1.0)
    first, second = short.transcribe([joined, (wave, rate)])
    assert isinstance(first, mmllm.Transcript) and isinstance(second, mmllm.Completion)
    with pytest.raises(ValueError, match="max_heard_seconds is 0"):
        GenerationConfig(max_heard_seconds=0)


def test_import_stays_light():
    code = "import sys, mmllm; assert 'torch' not in sys.modules; mmllm.nonsense"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'mmllm' has no attribute 'nonsense'" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="PyTorch finds no GPU here"):
        mmllm.load(tmp_path, device="cuda:0")


def test_the_package_says_its_version():
    assert mmllm.__version__ == metadata.version("mmllm")
