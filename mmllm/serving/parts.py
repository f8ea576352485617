"""Pictures and sounds that clients send: bytes become parts of a prompt, within bounds that are kept before decoding.

What a file is is told by how it begins, never by what the client calls it; no file of the server is ever read.
"""

from __future__ import annotations

import base64
import binascii
import io
import re

import soundfile

from mmllm.data.samples.decode import decode_image, picture_size
from mmllm.inference.inputs import AudioPart, ImagePart
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import bad_request
from mmllm.serving.remote import RemoteFiles
from mmllm_tokenizers.audio import read_sound, sound_length

MAX_ASPECT = 200
"""A picture so many times as long as it is wide says nothing once it is a square."""
_SAMPLES_A_SECOND = 2 * 48_000
"""Of a sound's bound in seconds: stereo at the usual rate. What has more channels or a higher rate may last less."""
_DATA_URL = re.compile(r"data:([a-z0-9.+-]+/[a-z0-9.+-]+)?((?:;[a-z0-9-]+=[^;,]{0,100})*)(;base64)?,", re.IGNORECASE)
_PICTURES = "PNG, JPEG, WebP, GIF, BMP or AVIF"
_SOUNDS = "WAV, FLAC, MP3, Ogg or AIFF"
_OTHERS = {
    b"<svg": "an SVG drawing",
    b"<?xml": "XML, perhaps an SVG drawing",
    b"<!doc": "a web page",
    b"<html": "a web page",
    b"%pdf": "a PDF",
    b"%!ps": "PostScript",
    b"ii*\x00": "a TIFF",
    b"mm\x00*": "a TIFF",
    b"\x1aE\xdf\xa3".lower(): "Matroska or WebM",
}


class MediaReader:
    """The pictures and sounds of one request, which are bounded together.

    Args:
        config: bounds.
        remote: where files may be fetched.
    """

    def __init__(self, config: ServeConfig, remote: RemoteFiles) -> None:
        self._config = config
        self._remote = remote
        self._pixels = config.max_pixels
        self._seconds = config.max_sounds_seconds
        self._count = 0

    def picture(self, url: str, param: str) -> ImagePart:
        """A picture of a data URL, or of an address from which the server may fetch it.

        Args:
            url: of the client.
            param: what errors call it.

        Raises:
            ApiError: it can't be read, or is beyond the bounds.
        """
        self._next(param)
        if url[:8].lower().startswith(("http://", "https://")):
            data = self._remote.fetch(url, param, self._config.max_body_bytes)
        else:
            data = data_of_url(url, param)
        if not is_picture(data):
            raise bad_request(f"{param} is {_kind(data)}; send {_PICTURES}", param, "unsupported_picture")
        try:
            width, height = picture_size(data, param)
            self._check_size(width, height, param)
            return ImagePart(decode_image(data, param))
        except ValueError as error:
            raise bad_request(str(error), param, "unreadable_picture") from error

    def sound(self, data: bytes, param: str, said: str | None = None) -> AudioPart:
        """A sound of a file's content.

        Args:
            data: the content.
            param: what errors call it.
            said: the format that the client says it has.

        Raises:
            ApiError: it can't be read, is of another format, or is beyond the bounds.
        """
        self._next(param)
        form = sound_format(data)
        if form is None:
            raise bad_request(f"{param} is {_kind(data)}; send {_SOUNDS}", param, "unsupported_sound")
        if said is not None and form != {"opus": "ogg"}.get(said, said):
            raise bad_request(f"{param} is {form}, though its format says {said}", param)
        try:
            num_samples, rate = sound_length(data, param)
            self._check_length(data, num_samples, rate, param)
            sound = read_sound(data, name=param, max_seconds=self._seconds)
        except ValueError as error:
            raise bad_request(str(error), param, "unreadable_sound") from error
        except (soundfile.LibsndfileError, RuntimeError) as error:
            raise bad_request(f"{param} can't be read as sound: {error}", param, "unreadable_sound") from error
        part = AudioPart(sound.wave_CT, sound.sample_rate)
        self._seconds -= part.seconds
        return part

    def _next(self, param: str) -> None:
        self._count += 1
        if self._count > self._config.max_media:
            raise bad_request(f"there are more than {self._config.max_media} pictures and sounds; send fewer", param)

    def _check_size(self, width: int, height: int, param: str) -> None:
        if max(width, height) > MAX_ASPECT * min(width, height):
            raise bad_request(
                f"{param} is {width}x{height} pixels, more than {MAX_ASPECT} times as long as it is wide; crop it",
                param,
            )
        if width * height > self._pixels:
            raise bad_request(
                f"{param} is {width}x{height} pixels; the pictures of a request may have {self._config.max_pixels} "
                f"together: scale it down",
                param,
                "picture_too_large",
            )
        self._pixels -= width * height

    def _check_length(self, data: bytes, num_samples: int, rate: int, param: str) -> None:
        seconds = num_samples / max(rate, 1)
        with soundfile.SoundFile(io.BytesIO(data)) as opened:
            all_samples = num_samples * opened.channels
        if seconds > self._seconds or all_samples > self._config.max_sounds_seconds * _SAMPLES_A_SECOND:
            raise bad_request(
                f"{param} lasts {seconds:.1f} s and has {all_samples} samples; the sounds of a request may last "
                f"{self._config.max_sounds_seconds:g} s together, in stereo at 48,000 Hz: cut it into pieces",
                param,
                "sound_too_long",
            )


def data_of_url(url: str, param: str) -> bytes:
    """The content of a data URL in base64.

    Raises:
        ApiError: it is none.
    """
    found = _DATA_URL.match(url[:1000])
    if found is None:
        hint = "send a picture as data:image/png;base64,…, or an https address where the server fetches any"
        raise bad_request(f"{param} begins with {url[:24]!r}: {hint}", param)
    if not found[3]:
        raise bad_request(f"{param} is a data URL that isn't in base64; write ;base64 before its comma", param)
    return data_of_base64(url[found.end() :], param)


def data_of_base64(text: str, param: str) -> bytes:
    """What base64 stands for.

    Raises:
        ApiError: it is no base64, or of nothing.
    """
    compact = text if text.isascii() and not any(space in text for space in " \n\r\t") else "".join(text.split())
    try:
        data = base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{param} isn't base64: {error}", param, "invalid_base64") from error
    if not data:
        raise bad_request(f"{param} is empty", param, "invalid_base64")
    return data


def is_picture(data: bytes) -> bool:
    """Whether a file begins as one of the formats of pictures that are read."""
    if data[4:8] == b"ftyp":
        return data[8:12] in (b"avif", b"avis")
    if data[:4] == b"RIFF":
        return data[8:12] == b"WEBP"
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"BM"))


def sound_format(data: bytes) -> str | None:
    """Which of the formats of sounds that are read a file begins as."""
    match data[:4]:
        case b"RIFF" | b"RIFX" | b"RF64":
            return "wav" if data[8:12] == b"WAVE" else None
        case b"fLaC":
            return "flac"
        case b"OggS":
            return "ogg"
        case b"FORM":
            return "aiff" if data[8:12] in (b"AIFF", b"AIFC") else None
    is_mpeg = len(data) > 2 and data[0] == 0xFF and data[1] & 0xE0 == 0xE0 and data[1] & 0x06
    return "mp3" if data[:3] == b"ID3" or is_mpeg else None


def _kind(data: bytes) -> str:
    """What a file that isn't read seems to be."""
    head = data[:400].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    if data[4:8] == b"ftyp":
        return "MP4, M4A or HEIC"
    if is_picture(data):
        return "a picture"
    if sound_format(data) is not None:
        return "a sound"
    return next((kind for magic, kind in _OTHERS.items() if head.startswith(magic)), "of no format that is read here")
