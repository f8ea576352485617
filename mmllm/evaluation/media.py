"""Pictures and sounds small enough to live inside one HTML file: thumbnails and short WAVs as data URIs."""

from __future__ import annotations

import base64
import io
import logging
import math
from dataclasses import dataclass, field

import numpy as np
import soundfile
from PIL import Image

from mmllm.data.rows.media import media_source, named_media
from mmllm.data.samples.decode import decode_image
from mmllm.evaluation.charts import waveform
from mmllm_tokenizers.audio import load_audio, resample, to_mono

_logger = logging.getLogger(__name__)

THUMBNAIL_PIXELS = 192
TINY_PIXELS = 64
"""Pictures up to this side are shown with hard pixels."""
SAMPLE_RATES = (16_000, 8_000)
"""At most the first; the second where the page would grow too large."""
MAX_SECONDS = 10.0


@dataclass(frozen=True)
class EmbeddedImage:
    """A picture for `<img>`."""

    uri: str
    tiny: bool


@dataclass(frozen=True)
class EmbeddedSound:
    """A sound for `<audio>`, as loud as it is, with its outline; `uri` is empty once the page has enough."""

    uri: str
    path: str
    seconds: float
    level_db: float
    """Root mean square against full scale."""
    colour: str


@dataclass
class MediaBudget:
    """Bytes of data URIs that a page may still take; what no longer fits is left out."""

    image_bytes: int = 1_800_000
    sound_bytes: int = 3_600_000
    _images: dict[str, EmbeddedImage | None] = field(default_factory=dict)

    def image(self, path: str | None) -> EmbeddedImage | None:
        """A thumbnail; None where there is no path, it can't be read, or the budget is spent."""
        if path is None:
            return None
        if path not in self._images:
            self._images[path] = _embed_image(path)
        image = self._images[path]
        if image is None or len(image.uri) > self.image_bytes:
            return None
        self.image_bytes -= len(image.uri)  # each time: a data URI can't be shared between two places
        return image

    def sound(self, path: str | None, colour: str) -> EmbeddedSound | None:
        """A 16-bit mono WAV of at most `MAX_SECONDS`; None where there is no path or it can't be read."""
        if path is None:
            return None
        try:
            wave_CT, rate = load_audio(media_source(named_media(path)), name=path)
        except (OSError, ValueError) as error:
            _logger.warning("sound left out of the report: %s", error)
            return None
        wave_T = to_mono(wave_CT)
        seconds, level_db = len(wave_T) / rate, _level_db(wave_T.numpy())
        wave_T = wave_T[: int(MAX_SECONDS * rate)]
        outline = waveform(wave_T.numpy())
        for highest in SAMPLE_RATES:
            lower_T = resample(wave_T, rate, highest) if rate > highest else wave_T
            uri = _wav_uri(lower_T.numpy(), min(rate, highest))
            if len(uri) <= self.sound_bytes:
                self.sound_bytes -= len(uri)
                return EmbeddedSound(uri, outline, seconds, level_db, colour)
        return EmbeddedSound("", outline, seconds, level_db, colour)


def _level_db(samples_T: np.ndarray) -> float:
    """Root mean square in dBFS; of silence -99."""
    rms = math.sqrt(float(np.mean(np.square(samples_T, dtype=np.float64)))) if len(samples_T) else 0.0
    return 20 * math.log10(max(rms, 10 ** (-99 / 20)))


def _embed_image(path: str) -> EmbeddedImage | None:
    try:
        picture = decode_image(named_media(path).read_bytes(), path)
    except (OSError, ValueError) as error:
        _logger.warning("picture left out of the report: %s", error)
        return None
    tiny = max(picture.size) <= TINY_PIXELS
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    return EmbeddedImage(_smaller_uri(picture), tiny)


def _smaller_uri(picture: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller: drawings stay sharp, photos small."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    picture.save(png, "PNG", optimize=True)
    picture.save(jpeg, "JPEG", quality=85)
    kind, data = ("png", png) if png.tell() <= 1.5 * jpeg.tell() else ("jpeg", jpeg)
    return f"data:image/{kind};base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _wav_uri(samples_T: np.ndarray, rate: int) -> str:
    stream = io.BytesIO()
    soundfile.write(stream, np.clip(samples_T, -1.0, 1.0), rate, format="WAV", subtype="PCM_16")
    return "data:audio/wav;base64," + base64.b64encode(stream.getvalue()).decode("ascii")
