"""What may be handed over, what may not, and what becomes of the others where one is bad."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

import mmllm
from mmllm.inference.inputs import AudioPart, ImagePart, as_audio, as_image, parse_parts
from mmllm.inference.messages import message_parts
from tests.inference_fixtures import RATE, images, make, sounds


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(images(1)[0]).save(folder / "a.png")
    wave, rate = sounds(1)[0]
    soundfile.write(folder / "a.wav", wave, rate, subtype="FLOAT")
    return folder


def test_files_bytes_and_lists_of_numbers_are_read(model, files):
    picture, sound = files / "a.png", files / "a.wav"
    wave, rate = sounds(1)[0]
    with picture.open("rb") as file:
        assert model.caption(file) == model.caption(picture)
    assert model.caption(io.BytesIO(picture.read_bytes())) == model.caption(picture)
    assert model.caption(bytearray(picture.read_bytes())) == model.caption(picture)
    expected = model.transcribe(sound)
    with sound.open("rb") as file:
        assert model.transcribe(file) == expected
    for given in (io.BytesIO(sound.read_bytes()), (wave.tolist(), rate), (wave, float(rate)), (wave, np.int32(rate))):
        assert model.transcribe(given) == expected
    mixed = model.generate(["see ", picture, " hear ", sound])
    for read in (Path.read_bytes, lambda path: io.BytesIO(path.read_bytes())):
        assert model.generate(["see ", read(picture), " hear ", read(sound)]) == mixed
    assert model.generate(picture.read_bytes()) == model.generate(picture)


@pytest.mark.parametrize(
    "given",
    [
        ("a.wav", "b.wav"),
        (b"RIFF", b"RIFF"),
        (Path("a.wav"), 8000),
        ("a.wav", 8000),
        (np.zeros(9, np.float32), np.zeros(9, np.float32)),
        (np.zeros(9, np.float32), "8000"),
        (8000, np.zeros(9, np.float32)),
        (np.zeros(9, np.float32), 8000, 1),
        (np.zeros(9, np.float32),),
        (),
    ],
)
def test_a_tuple_is_never_guessed(model, given):
    for call in (model.transcribe, model.generate):
        with pytest.raises(ValueError, match=r"a tuple|sample rate"):
            call(given)


def test_the_message_about_a_tuple_says_what_to_do(model):
    with pytest.raises(ValueError, match=r"sounds\[0\] is a tuple of \(str, str\); .* give several things as a list"):
        model.transcribe(("a.wav", "b.wav"))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("chat", ("hello",), "messages is 'hello'; give a list of messages such as"),
        ("chat", (None,), "messages is None"),
        ("chat", ([{"role": "user"}],), r"messages\[0\] has role 'user' and no content"),
        ("chat", ([{"role": "usr", "content": "a"}],), r"did you mean user\?"),
        ("chat", ([{"role": "user", "content": 3}],), "a part of the prompt is int"),
        ("chat", (["hello"],), r"messages\[0\] is 'hello'; give messages such as"),
        ("caption", (None,), r"images\[0\] is given as NoneType; wanted a path"),
        ("caption", (3,), r"images\[0\] is given as int"),
        ("caption", ([[images(1)[0]]],), r"images\[0\] is given as list; .* a list stands where one thing does"),
        ("caption", (b"no picture",), r"images\[0\]: not a picture"),
        ("caption", (np.zeros(3),), r"images\[0\]: an array of shape \(3,\)"),
        ("caption", (io.StringIO("text"),), r"images\[0\] is a file that was opened as text"),
        ("caption", ("a\0b.png",), "no image file at"),
        ("transcribe", (None,), r"sounds\[0\] is given as NoneType; wanted a path"),
        ("transcribe", (np.zeros(9),), "without its rate"),
        ("transcribe", (b"RIFF",), r"sounds\[0\]"),
        ("transcribe", ((["x"], RATE),), r"sounds\[0\]'s samples are list that is no array of numbers"),
        ("transcribe", ((np.full(99, np.nan), RATE),), "NaN"),
        ("transcribe", (mmllm.Audio(np.zeros(9), -1),), r"sounds\[0\]'s sample rate is -1"),
        ("generate", (None,), "a part of the prompt is NoneType"),
        ("generate", (["a", ["b"]],), r"parts\[1\] is a list, parts\[0\] is none"),
        ("generate", ("a\ud800",), "half of a character"),
        ("answer", ("a", 3), r"questions\[0\] is 3; give text"),
        ("answer", ("a", ["b"]), "there are 1 questions but parts for 1; give parts for each"),
        ("answer", (["a"], ["b", "c"]), "there are 2 questions but parts for 1"),
        ("speak", (3,), r"texts\[0\] is 3; give text"),
        ("speak", (None,), r"texts\[0\] is None; give text"),
        ("score", ("a", 3), r"continuations\[0\] is 3"),
        ("score", (["a"], ["b", "c"]), "there are 1 prompts but 2 continuations"),
    ],
)
def test_what_is_wrong_is_named(model, method, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        getattr(model, method)(*arguments)


def test_one_bad_item_does_not_lose_the_rest(model, files):
    good, sound = files / "a.png", files / "a.wav"
    bad = files / "missing.png"
    first, broken, missing, last = model.caption([good, b"no picture", bad, good], on_error="return")
    assert first == last == model.caption(good)
    assert isinstance(broken, ValueError) and "images[1]" in str(broken)
    assert isinstance(missing, FileNotFoundError) and str(bad) in str(missing)
    for method, items, expected in (
        ("transcribe", [sound, bad], model.transcribe(sound)),
        ("generate", [[good], [bad]], model.generate(good)),
        ("speak", ["one", " "], None),
    ):
        fine, failed = getattr(model, method)(items, on_error="return")
        assert isinstance(failed, (ValueError, OSError)) and (expected is None or fine == expected)
    fine, failed = model.answer([good, bad], ["a?", "b?"], on_error="return")
    assert fine == model.answer(good, "a?") and isinstance(failed, FileNotFoundError)
    fine, failed = model.chat([[{"role": "user", "content": "a"}], [{"role": "x"}]], on_error="return")
    assert fine == model.chat([{"role": "user", "content": "a"}]) and "role 'x'" in str(failed)
    vector, failed = model.embed([good, bad], on_error="return")
    assert torch.equal(vector, model.embed(good)) and isinstance(failed, FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        model.caption([good, bad])
    assert isinstance(model.caption(bad, on_error="return"), FileNotFoundError)


def test_what_fails_in_the_engine_is_returned_too(model, files, monkeypatch):
    def complete(runner, requests, stop=None, progress=None):
        return [*complete_all(runner, requests[:-1]), MemoryError("no room")]

    complete_all = type(model._runner).complete
    monkeypatch.setattr(type(model._runner), "complete", complete)
    fine, failed = model.caption([files / "a.png"] * 2, on_error="return")
    assert isinstance(fine, mmllm.Completion) and isinstance(failed, MemoryError)
    with pytest.raises(MemoryError, match="no room"):
        model.caption([files / "a.png"] * 2)


def data_url(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_openais_messages_are_ours(model, files):
    picture, sound = (files / "a.png").read_bytes(), (files / "a.wav").read_bytes()
    openai = [
        {"role": "system", "content": "be kind. "},
        {"role": "user", "content": [
            {"type": "text", "text": "see "},
            {"type": "image_url", "image_url": {"url": data_url(picture, "image/png")}},
            {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}},
        ]},
    ]  # fmt: skip
    ours = [openai[0], {"role": "user", "content": ["see ", files / "a.png", files / "a.wav"]}]
    assert model.chat(openai) == model.chat(ours)
    assert model.chat([{**openai[0], "role": "developer"}, openai[1]]) == model.chat(ours)
    text = {"type": "text", "text": "a.png <|image|>"}
    assert message_parts([text], "content") == ["a.png <|image|>"], "text is text, whatever it says"


def test_no_file_is_read_where_none_may_be(files, monkeypatch):
    monkeypatch.chdir(files)
    assert isinstance(message_parts("a.png", "content")[0], ImagePart)
    assert message_parts("a.png", "content", reads_files=False) == ["a.png"]
    assert message_parts(["a.png", "<|image|>"], "content", reads_files=False) == ["a.png", "<|image|>"]
    for part in (Path("a.png"), b"x", ("a", 1), images(1)[0], None):
        with pytest.raises(ValueError, match=r"content\[0\] is .*; wanted text, or an object of type text, image_url"):
            message_parts([part], "content", reads_files=False)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({}, r"content\[0\] has type None; wanted text, image_url, input_audio"),
        ({"type": "image"}, r"has type 'image'; wanted .* \(did you mean image_url\?\)"),
        ({"type": "text"}, r"content\[0\].text is None; give text"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "url begins with 'https://"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "give a data URL"),
        ({"type": "image_url", "image_url": {}}, "url is None; give text"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "without a comma"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,!!!"}}, "is no base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "is empty"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,abc"}}, "not a picture"),
        ({"type": "input_audio", "input_audio": "abc"}, "give an object with data and format"),
        ({"type": "input_audio", "input_audio": {"data": "\u00e4"}}, "is no base64"),
        ({"type": "input_audio", "input_audio": {"data": "AAAA"}}, r"content\[0\].input_audio.data"),
    ],
)
def test_bad_parts_of_messages_are_named(part, message):
    with pytest.raises(ValueError, match=message):
        message_parts([part], "content")


def test_bytes_are_told_apart_by_their_beginning(files):
    kinds = [type(part) for part in parse_parts([(files / name).read_bytes() for name in ("a.png", "a.wav")])]
    assert kinds == [ImagePart, AudioPart]
    with pytest.raises(ValueError, match="neither an image nor a sound"):
        parse_parts(b"nothing of either")
    with pytest.raises(ValueError, match=r"truncated|broken"):
        parse_parts((files / "a.png").read_bytes()[:60])
    assert as_audio(as_audio(files / "a.wav")).sample_rate == RATE
    assert as_image(torch.zeros(3, 4, 5, dtype=torch.bfloat16)).size == (5, 4)
