"""Tiny random models behind a real server on the loopback, for the tests of serving."""

from __future__ import annotations

import base64
import io
import json
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import soundfile
from openai import OpenAI
from PIL import Image

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import EngineConfig
from mmllm.serving.app import create_app
from mmllm.serving.config import ServeConfig
from mmllm.serving.remote import RemoteFiles
from mmllm.serving.run import Server
from mmllm.serving.served import ServedModel
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import RATE, make

CHAT_TEMPLATE = """
{%- for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}
{%- if part.type == 'text' %}{{ part.text }}{% elif part.type == 'image' %}<|image|>{% else %}<|audio|>{% endif %}
{%- endfor %}{% endif %}<|im_end|>
{% endfor %}<|im_start|>assistant
"""
VOICES = ("ann", "bob")
GENERATION = GenerationConfig(max_new_tokens=12, max_seconds=0.2, max_heard_seconds=1.0, voices=VOICES)


def tiny_model(
    pointer: bool = True, generation: GenerationConfig = GENERATION, engine: EngineConfig | None = None
) -> Model:
    made = make(pointer=PointerRule() if pointer else None)
    return Model(made.model, made.tokenizer, generation=generation, engine=engine)


def slow(model: Model, seconds: float = 0.02) -> Model:
    """Each step of its engine takes long enough to be interrupted."""
    step = model.engine.step

    def slowly() -> bool:
        time.sleep(seconds)
        return step()

    model.engine.step = slowly
    return model


@contextmanager
def served(
    model: Model | None = None,
    config: ServeConfig | None = None,
    remote: RemoteFiles | None = None,
    drain_seconds: float = 5.0,
    name: str = "tiny",
) -> Iterator[Server]:
    """A server that listens; its model's name is `tiny`."""
    config = replace(config or ServeConfig(), drain_seconds=drain_seconds)
    one = ServedModel(name, model or tiny_model(), config)
    with Server(create_app({name: one}, config, remote), drain_seconds=drain_seconds) as server:
        yield server


@contextmanager
def client_of(server: Server, key: str = "any", retries: int = 0) -> Iterator[OpenAI]:
    http = httpx.Client(verify=False)  # loading certificates for each takes longer than a test
    with OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=retries, timeout=60, http_client=http) as client:
        yield client


@contextmanager
def streamed(method: str, url: str, **more: Any) -> Iterator[httpx.Response]:
    """As `httpx.stream`, without loading certificates."""
    with httpx.Client(verify=False, timeout=60) as http, http.stream(method, url, **more) as answer:
        yield answer


def request(method: str, url: str, **more: Any) -> httpx.Response:
    """As `httpx.request`, likewise."""
    with httpx.Client(verify=False, timeout=60) as http:
        return http.request(method, url, **more)


def post(url: str, **more: Any) -> httpx.Response:
    return request("POST", url, **more)


def get(url: str, **more: Any) -> httpx.Response:
    return request("GET", url, **more)


def png(width: int = 24, height: int = 20, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return sink.getvalue()


def wav(seconds: float = 0.3, rate: int = RATE, seed: int = 0, channels: int = 1) -> bytes:
    shape = (round(seconds * rate), channels)
    samples = np.random.default_rng(seed).normal(0, 0.2, shape).clip(-1, 1).astype(np.float32)
    sink = io.BytesIO()
    soundfile.write(sink, samples, rate, format="WAV")
    return sink.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_part(data: bytes | None = None) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(png() if data is None else data)}}


def sound_part(data: bytes | None = None, form: str = "wav") -> dict[str, Any]:
    encoded = base64.b64encode(wav() if data is None else data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": form}}


def user(*parts: Any) -> list[Any]:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return [{"role": "user", "content": content}]


def events(body: bytes) -> list[Any]:
    """Of a stream: each event's object, and "[DONE]"."""
    found = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    return [each if each == "[DONE]" else json.loads(each) for each in found]


def samples_of(data: bytes) -> np.ndarray:
    """A streamed WAV's samples, whose header doesn't know its length."""
    assert data[:4] == b"RIFF" and data[36:40] == b"data", data[:44]
    assert struct.unpack("<I", data[40:44]) == (0xFFFFFFFF,)
    return np.frombuffer(data[44:], dtype="<i2")


def spoken_like(seconds: float = 0.8, rate: int = RATE) -> bytes:
    """A WAV that rises and falls as speech does, so that it isn't taken for noise or silence."""
    times = np.arange(round(seconds * rate)) / rate
    level = np.clip(np.sin(2 * np.pi * 2.5 * times), 0, None)
    tone = sum(np.sin(2 * np.pi * 140 * harmonic * times) / harmonic for harmonic in range(1, 12))
    sink = io.BytesIO()
    soundfile.write(sink, (0.3 * level * tone).astype(np.float32), rate, format="WAV")
    return sink.getvalue()
