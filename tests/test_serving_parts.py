"""Pictures and sounds of clients: what is read, what is refused before it is decoded, and bytes of all kinds."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmllm.serving import parts
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import ApiError
from mmllm.serving.parts import MediaReader, data_of_base64, data_of_url
from mmllm.serving.remote import RemoteFiles
from tests.serving_fixtures import data_url, png, wav

CONFIG = ServeConfig(max_pixels=100_000, max_sounds_seconds=2.0, max_media=4)


def reader() -> MediaReader:
    return MediaReader(CONFIG, RemoteFiles(()))


def file_of(picture: Image.Image, form: str) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, form)
    return sink.getvalue()


def sound_file(samples: np.ndarray, form: str, subtype: str | None = None, rate: int = 8000) -> bytes:
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, subtype, format=form)
    return sink.getvalue()


def refused(work) -> ApiError:
    with pytest.raises(ApiError) as caught:
        work()
    error = caught.value
    assert error.status == 400 and error.param == "here" and "here" in error.message, error.message
    return error


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
def test_pictures_are_read_whatever_type_they_claim(form):
    picture = Image.open(io.BytesIO(png())).convert("RGB")
    read = reader().picture(data_url(file_of(picture, form), "image/anything"), "here").image
    assert read.size == picture.size
    difference = np.abs(np.asarray(read, dtype=float) - np.asarray(picture, dtype=float)).mean()
    assert difference < (1 if form in ("PNG", "BMP") else 60)


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3", "AIFF"])
def test_sounds_are_read(form):
    samples = np.sin(np.arange(8000) / 8).astype(np.float32) * 0.5
    part = reader().sound(sound_file(samples, form), "here")
    assert part.sample_rate == 8000 and abs(part.seconds - 1) < 0.2
    assert form == "MP3" or np.abs(part.wave_CT[0, :8000].numpy() - samples).max() < 0.2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>', "SVG"),
        (b"\xef\xbb\xbf\n<?xml version='1.0'?><svg/>", "SVG"),
        (file_of(Image.new("RGB", (4, 4)), "TIFF"), "TIFF"),
        (file_of(Image.new("RGB", (4, 4)), "PPM"), "no format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) (r) file", "PostScript"),
        (b"%PDF-1.7", "PDF"),
        (b"\x00\x00\x00\x18ftypheic", "HEIC"),
        (wav(), "a sound"),
        (b"/etc/passwd", "no format"),
        (b"x", "no format"),
    ],
)
def test_what_is_no_picture_is_refused_by_how_it_begins(data, said):
    for kind in ("image/png", "image/svg+xml"):
        error = refused(lambda kind=kind: reader().picture(data_url(data, kind), "here"))
        assert said in error.message and error.code == "unsupported_picture"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png(), "a picture"),
        (b"\x1aE\xdf\xa3webm", "WebM"),
        (b"\x00\x00\x00\x18ftypM4A ", "M4A"),
        (b"RIFF", "no format"),
    ],
)
def test_what_is_no_sound_is_refused_by_how_it_begins(data, said):
    assert said in refused(lambda: reader().sound(data, "here")).message


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes and many pixels."""
    rows = zlib.compress(bytes(min(10**6, height * (1 + width))), 9)
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(1000, 101), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 65_535), (65_535, 1), (0, 5)]
)
def test_pictures_are_measured_before_they_are_decoded(monkeypatch, size):
    monkeypatch.setattr(parts, "decode_image", lambda *_: pytest.fail("it was decoded"))
    error = refused(lambda: reader().picture(data_url(bomb(*size)), "here"))
    assert len(error.message) > 30


def test_pictures_of_a_request_are_bounded_together():
    one = reader()
    one.picture(data_url(png(300, 300)), "first")
    error = refused(lambda: one.picture(data_url(png(200, 60)), "here"))
    assert error.code == "picture_too_large"
    one.picture(data_url(png(100, 90)), "third")


def test_pictures_and_sounds_are_counted_together():
    one = reader()
    for _ in range(2):
        one.picture(data_url(png(4, 4)), "before")
        one.sound(wav(0.01), "before")
    assert "more than 4" in refused(lambda: one.picture(data_url(png(4, 4)), "here")).message


def test_broken_pictures():
    jpeg = file_of(Image.open(io.BytesIO(png(64, 64))), "JPEG")
    for data in (jpeg[: len(jpeg) // 2], png()[:-20], b"\xff\xd8\xff", b"GIF89a", b"\x89PNG\r\n\x1a\n" + bytes(40)):
        assert refused(lambda data=data: reader().picture(data_url(data), "here")).code == "unreadable_picture"


def test_wavs_that_lie():
    good = wav(0.5)
    longer = bytearray(good)
    longer[40:44] = struct.pack("<I", 2**30)  # samples that aren't there
    for data in (bytes(longer), good[:44], good[:60][:30], good[: len(good) // 2]):
        assert refused(lambda data=data: reader().sound(data, "here")).code == "unreadable_sound"


def test_sounds_that_are_no_numbers():
    for value in (np.nan, np.inf, -np.inf):
        samples = np.zeros(800, dtype=np.float32)
        samples[17] = value
        assert (
            "NaN or infinite"
            in refused(lambda s=samples: reader().sound(sound_file(s, "WAV", "FLOAT"), "here")).message
        )


def test_sounds_are_measured_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr(parts, "read_sound", lambda *_, **__: pytest.fail("it was decoded"))
    long = sound_file(np.zeros(8000 * 60, dtype=np.float32), "FLAC")
    assert len(long) < 20_000  # a minute in few bytes
    many = sound_file(np.zeros((96_000, 8), dtype=np.float32), "FLAC", rate=96_000)  # a second with much in it
    for data in (long, many):
        assert refused(lambda data=data: reader().sound(data, "here")).code == "sound_too_long"


def test_sounds_of_a_request_are_bounded_together():
    one = reader()
    one.sound(wav(1.5), "first")
    assert refused(lambda: one.sound(wav(0.6), "here")).code == "sound_too_long"
    one.sound(wav(0.4), "third")


def test_a_format_is_what_it_says():
    assert reader().sound(wav(), "here", "wav")
    assert "is wav, though its format says mp3" in refused(lambda: reader().sound(wav(), "here", "mp3")).message


@pytest.mark.parametrize(
    "url",
    [
        "", "data:", "data:image/png;base64", "data:image/png,abc", "file:///etc/passwd", "/etc/passwd", "cat.png",
        "ftp://host/a.png", "data:image/png;base64,", "data:image/png;base64,%%%", "data:image/png;base64,YQ",
        "data:image/png;base64,ä", "data:" + "a" * 5000 + ";base64,YQ==",
    ],
)  # fmt: skip
def test_what_is_no_data_url(url):
    refused(lambda: reader().picture(url, "here"))


def test_remote_pictures_are_off():
    error = refused(lambda: reader().picture("HTTPS://example.org/a.png", "here"))
    assert error.code == "remote_not_allowed" and "--allow_remote" in error.message


@given(st.binary(min_size=1, max_size=300))
def test_base64_is_taken_back(data):
    text = base64.b64encode(data).decode()
    broken = "\n".join(text[start : start + 20] for start in range(0, len(text), 20))
    assert data_of_base64(text, "here") == data == data_of_base64(broken, "here")
    assert data_of_url(data_url(data, "image/png;charset=utf-8"), "here") == data


@given(st.text(max_size=60))
def test_any_text_is_base64_or_refused(text):
    try:
        data = data_of_base64(text, "here")
    except ApiError as error:
        assert error.status == 400
    else:
        assert base64.b64encode(data).decode() == "".join(text.split())


def read_or_refused(data: st.DataObject) -> None:
    """A file with bytes changed, cut out and put in: a part, or an error that says why; nothing else."""
    jpeg = file_of(Image.open(io.BytesIO(png(40, 30))), "JPEG")
    flac = sound_file(np.zeros(400, dtype=np.float32), "FLAC")
    ogg = sound_file(np.random.default_rng(0).normal(0, 0.1, 800), "OGG")
    file = bytearray(data.draw(st.sampled_from([png(), jpeg, wav(0.05), flac, ogg])))
    for _ in range(data.draw(st.integers(0, 4))):
        place = data.draw(st.integers(0, len(file)))
        file[place : place + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=9))
    for read in (lambda: reader().sound(bytes(file), "here"), lambda: reader().picture(data_url(bytes(file)), "here")):
        try:
            read()
        except ApiError as error:
            assert error.status == 400 and len(error.message) > 10


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_changed_files_are_read_or_refused(data):
    read_or_refused(data)


@pytest.mark.proof
@settings(max_examples=5000, deadline=None, database=None)
@given(st.data())
def test_many_changed_files_are_read_or_refused(data):
    """5,000 changed files, each as a picture and as a sound."""
    read_or_refused(data)
