"""The official client drives every route; what it gets is what the Python API gives, whole or piece by piece."""

from __future__ import annotations

import base64
import io
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import numpy as np
import openai
import pytest
import soundfile
from openai import OpenAI
from PIL import Image

from mmllm.data.samples.sample import Segment as PromptSegment
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import TextRequest
from mmllm.inference.inputs import Audio, as_audio
from mmllm.inference.transcripts import Segment, Transcript, Word
from mmllm.serving.audio import transcript_response
from mmllm.serving.config import ServeConfig
from mmllm.serving.run import Server
from mmllm.serving.schemas import TranscriptionForm
from tests.serving_fixtures import (
    CHAT_TEMPLATE,
    client_of,
    events,
    get,
    picture_part,
    png,
    post,
    samples_of,
    served,
    sound_part,
    spoken_like,
    streamed,
    tiny_model,
    user,
    wav,
)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_model()


@pytest.fixture(scope="module")
def server(model) -> Iterator[Server]:
    with served(model) as running:
        yield running


@pytest.fixture(scope="module")
def client(server) -> Iterator[OpenAI]:
    with client_of(server) as one:
        yield one


def ask(client: OpenAI, messages: list, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def sound() -> Audio:
    samples, rate = soundfile.read(io.BytesIO(wav()), dtype="float32")
    return Audio(samples, rate)


def test_a_picture_gives_its_caption(client, model):
    wanted = model.caption(png())
    for messages in (user(picture_part()), user(picture_part(), "caption"), user(" Caption. ", picture_part())):
        answer = ask(client, messages)
        assert answer.choices[0].message.content == wanted.text
        assert answer.choices[0].finish_reason == wanted.finish_reason
        assert answer.usage.prompt_tokens == wanted.num_prompt_tokens
        assert answer.usage.completion_tokens == answer.usage.total_tokens - answer.usage.prompt_tokens


def test_a_sound_gives_its_transcript(client, model):
    prompter = model.prompter
    prompt = prompter.transcript(prompter.codes([as_audio(wav())])[0])
    (result,) = model.engine.run([TextRequest(prompt, max_new_tokens=model.generation.max_new_tokens)])
    wanted = result.text
    for messages in (user(sound_part()), user("transcribe", sound_part())):
        assert ask(client, messages).choices[0].message.content == wanted


def test_media_and_text_give_the_answer(client, model):
    wanted = model.answer([sound(), png_image()], "how many?")
    assert ask(client, user(sound_part(), "how many?", picture_part())).choices[0].message.content == wanted.text


def png_image() -> Image.Image:
    return Image.open(io.BytesIO(png()))


def test_a_text_is_spoken(client, model):
    wanted = model.speak("a red circle", voice="ann", seed=5)
    answer = ask(
        client, user("a red circle"), modalities=["text", "audio"], audio={"voice": "ann", "format": "wav"}, seed=5
    )
    message = answer.choices[0].message
    assert message.content is None and message.audio.transcript == "a red circle"
    assert message.audio.id.startswith("audio_") and message.audio.expires_at > answer.created
    given = samples_of(base64.b64decode(message.audio.data))
    assert np.array_equal(given, np.round(wanted.samples.clip(-1, 1) * 32767).astype("<i2"))
    assert answer.usage.completion_tokens_details.audio_tokens == answer.usage.completion_tokens > 0


def test_max_tokens_counts_text_and_never_units(client):
    more = {"modalities": ["text", "audio"], "audio": {"voice": "ann", "format": "pcm16"}, "seed": 5}
    long = ask(client, user("a red circle"), **more).choices[0]
    short = ask(client, user("a red circle"), max_tokens=1, **more).choices[0]
    assert short.message.audio.data == long.message.audio.data
    assert short.message.audio.transcript == "a red circle" and short.finish_reason == long.finish_reason


def test_what_is_seen_can_be_said(client, model):
    more = {"modalities": ["text", "audio"], "audio": {"voice": {"id": "bob"}, "format": "wav"}, "seed": 5}
    answer = ask(client, user(picture_part()), **more)
    said = answer.choices[0].message.audio
    assert said.transcript == model.caption(png()).text
    wanted = model.speak(said.transcript, voice="bob", seed=5)
    assert len(samples_of(base64.b64decode(said.data))) == len(wanted.samples)
    assert answer.usage.completion_tokens_details.text_tokens > 0 < answer.usage.completion_tokens_details.audio_tokens


def test_streamed_text_is_the_whole_text(client):
    more = {"temperature": 1.0, "seed": 3, "n": 2, "logprobs": True, "top_logprobs": 2, "max_tokens": 9}
    whole = ask(client, user(picture_part(), "what?"), **more)
    chunks = list(
        ask(client, user(picture_part(), "what?"), stream=True, stream_options={"include_usage": True}, **more)
    )
    for number, choice in enumerate(whole.choices):
        own = [one for chunk in chunks for one in chunk.choices if one.index == number]
        assert "".join(one.delta.content or "" for one in own) == choice.message.content
        assert [one.finish_reason for one in own if one.finish_reason] == [choice.finish_reason]
        told = [token for one in own if one.logprobs for token in one.logprobs.content]
        assert [token.token for token in told] == [token.token for token in choice.logprobs.content]
        assert own[0].delta.role == "assistant"
    assert whole.choices[0].message.content != whole.choices[1].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1 and all(chunk.usage is None for chunk in chunks[:-1])


def test_streamed_sound_is_the_whole_sound(server, client):
    body = {
        "model": "tiny", "messages": user("two blue squares, he said: one. " * 8), "modalities": ["text", "audio"],
        "audio": {"voice": "ann", "format": "wav"}, "seed": 4,
    }  # fmt: skip
    whole = post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"]["audio"]
    with streamed("POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        chunks = events(answer.read())
    assert chunks[-1] == "[DONE]"
    pieces = [chunk["choices"][0]["delta"].get("audio") or {} for chunk in chunks[:-1]]
    sound = b"".join(base64.b64decode(piece.get("data", "")) for piece in pieces)
    assert sound == base64.b64decode(whole["data"])
    assert "".join(piece.get("transcript", "") for piece in pieces) == whole["transcript"]
    assert sum("data" in piece for piece in pieces) > 2 and pieces[0]["id"].startswith("audio_")


def test_seeds_decide(client):
    def drawn(seed):
        return ask(client, user(picture_part()), temperature=1.5, seed=seed).choices[0].message.content

    assert drawn(1) == drawn(1) == drawn(1 + 2**32) and drawn(-1) == drawn(2**32 - 1)
    assert len({drawn(None) for _ in range(4)}) > 1


def test_log_probabilities_are_the_python_apis(client, model):
    choice = ask(client, user(picture_part()), logprobs=True, top_logprobs=3).choices[0]
    wanted = model.caption(png(), logprobs=3)
    told = choice.logprobs.content
    assert np.allclose([token.logprob for token in told], wanted.logprobs[: len(told)], atol=1e-5)
    assert bytes(byte for token in told for byte in token.bytes).decode(errors="replace") == choice.message.content
    for token in told:
        best = [one.logprob for one in token.top_logprobs]
        assert len(best) == 3 and best == sorted(best, reverse=True) and best[0] == pytest.approx(token.logprob)


def test_bounds_of_answers(client):
    whole = ask(client, user(picture_part())).choices[0].message.content
    for name in ("max_tokens", "max_completion_tokens"):
        short = ask(client, user(picture_part()), **{name: 2})
        assert whole.startswith(short.choices[0].message.content) and short.choices[0].finish_reason == "length"
        assert short.usage.completion_tokens == 2
    stop = whole[3:5]
    stopped = ask(client, user(picture_part()), stop=[stop, "never there"]).choices[0]
    assert stopped.message.content == whole[: whole.index(stop)] and stopped.finish_reason == "stop"


def test_biases(client, model):
    first = model.caption(png(), max_new_tokens=1)
    (banned,) = first.ids
    other = ask(client, user(picture_part()), logit_bias={str(banned): -100}, max_tokens=1).choices[0]
    assert other.message.content == model.caption(png(), max_new_tokens=1, logit_bias={banned: -100}) != first


def test_json_that_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"color": {"enum": ["red", "blue"]}, "count": {"type": "integer"}},
        "required": ["color", "count"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "shape", "schema": schema, "strict": True}}
    answer = ask(client, user(picture_part()), response_format=form, max_tokens=60).choices[0]
    told = json.loads(answer.message.content)
    assert told["color"] in ("red", "blue") and isinstance(told["count"], int) and answer.finish_reason == "stop"
    free = ask(client, user(picture_part()), response_format={"type": "json_object"}, max_tokens=60).choices[0]
    assert free.message.content.lstrip().startswith("{")
    plain = ask(client, user(picture_part()), response_format={"type": "text"}).choices[0]
    assert plain.message.content == ask(client, user(picture_part())).choices[0].message.content
    for broken in ({"type": "nothing"}, {"enum": []}, {"$ref": "#/nowhere"}, {"$ref": "file:///etc/passwd"}):
        form["json_schema"]["schema"] = broken
        with pytest.raises(openai.BadRequestError):
            ask(client, user(picture_part()), response_format=form)


def test_completions(client, model):
    wanted = [model.generate(text).text for text in ("a red", "two blue")]
    many = client.completions.create(model="tiny", prompt=["a red", "two blue"])
    assert [choice.text for choice in many.choices] == wanted
    ids = model.tokenizer.text.encode("a red")
    assert client.completions.create(model="tiny", prompt=ids).choices[0].text == wanted[0]
    echoed = client.completions.create(model="tiny", prompt=[ids, ids], echo=True, logprobs=2).choices[1]
    assert echoed.text == "a red" + wanted[0]
    told = echoed.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) == len(told.top_logprobs)
    assert told.text_offset[0] == 0 and told.text_offset == sorted(told.text_offset)
    pieces = list(
        client.completions.create(model="tiny", prompt="a red", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == wanted[0]
    assert pieces[-1].usage.completion_tokens > 0


def test_the_best_of_several(client):
    best = client.completions.create(
        model="tiny", prompt="a", temperature=1, seed=2, n=1, best_of=4, logprobs=0
    ).choices[0]
    all_of = client.completions.create(model="tiny", prompt="a", temperature=1, seed=2, n=4, logprobs=0).choices
    means = [np.mean(choice.logprobs.token_logprobs) for choice in all_of]
    assert best.text == all_of[int(np.argmax(means))].text


@pytest.mark.parametrize("form", ["wav", "pcm", "flac", "mp3", "opus"])
def test_speech(client, model, form):
    wanted = model.speak("one two three", voice="ann", seed=1)
    with client.audio.speech.with_streaming_response.create(
        model="tiny", input="one two three", voice="ann", response_format=form, extra_body={"seed": 1}
    ) as answer:
        data = b"".join(answer.iter_bytes())
        rate, kind = int(answer.headers["x-sample-rate"]), answer.headers["content-type"]
    assert rate == wanted.sample_rate
    pcm = np.round(wanted.samples.clip(-1, 1) * 32767).astype("<i2")
    match form:
        case "wav":
            assert np.array_equal(samples_of(data), pcm)
            assert len(soundfile.read(io.BytesIO(data))[0]) == len(pcm)  # players read on to the end
        case "pcm":
            assert data == pcm.tobytes() and f"rate={rate}" in kind
        case "flac":
            assert data[:4] == b"fLaC" and np.array_equal(flac_samples(data, len(pcm)), pcm)
        case _:
            assert len(data) > 100


def flac_samples(data: bytes, num_samples: int) -> np.ndarray:
    """Of a FLAC whose header doesn't tell its length, as of a pipe: libsndfile must be told."""
    told = int.from_bytes(data[21:26], "big")
    assert told & (2**36 - 1) == 0
    patched = data[:21] + (told | num_samples).to_bytes(5, "big") + data[26:]
    return soundfile.read(io.BytesIO(patched), dtype="int16")[0]


def test_speed_is_the_rate(client, model):
    wanted = model.speak("one two three", voice="ann", seed=1, rate=2.0)
    answer = client.audio.speech.create(
        model="tiny", input="one two three", voice="ann", response_format="pcm", speed=2.0, extra_body={"seed": 1}
    )
    assert len(answer.content) == 2 * len(wanted.samples)


def test_speech_as_events(server):
    body = {"model": "tiny", "input": "one two", "voice": "ann", "seed": 1}
    whole = post(f"{server.url}/v1/audio/speech", json=body).content
    told = events(post(f"{server.url}/v1/audio/speech", json={**body, "stream_format": "sse"}).content)
    assert [one["type"] for one in told[:-2]] == ["speech.audio.delta"] * (len(told) - 2)
    assert told[-2]["type"] == "speech.audio.done" and told[-1] == "[DONE]"
    assert b"".join(base64.b64decode(one["audio"]) for one in told[:-2]) == whole


def test_transcriptions(client, model):
    data = spoken_like()
    wanted = model.transcribe(data, timestamps=True)

    def get(**more):
        return client.audio.transcriptions.create(model="tiny", file=("talk.wav", data), **more)

    assert wanted.text and get().text == wanted.text
    assert get(response_format="text") == wanted.text + "\n"
    told = get(response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert told.text == wanted.text and told.duration == pytest.approx(wanted.seconds, abs=1e-3)
    assert [segment.text for segment in told.segments] == [segment.text for segment in wanted.segments]
    assert [word.word for word in told.words] == [word.word for each in wanted.segments for word in each.words or ()]
    assert " --> " in get(response_format="srt")
    assert get(response_format="vtt").startswith("WEBVTT\n")
    pieces = list(get(stream=True))
    assert "".join(piece.delta for piece in pieces[:-1]) == wanted.text == pieces[-1].text


def test_words_of_transcripts():
    words = (Word("one", 0.1, 0.25), Word("two", 0.3, 0.45))
    segments = (Segment(0.1, 0.45, "one two", words, 0.9), Segment(0.5, 0.9, "three", None))
    heard = Transcript("one two three", segments, 1.0)

    def told(*wanted):
        form = TranscriptionForm(model="tiny", response_format="verbose_json", timestamp_granularities=list(wanted))
        return json.loads(bytes(transcript_response(heard, form).body))

    both = told("word", "segment")
    assert [(word["word"], word["start"]) for word in both["words"]] == [("one", 0.1), ("two", 0.3)]
    assert [segment["text"] for segment in both["segments"]] == ["one two", "three"]
    assert "segments" not in told("word") and "words" not in told("segment") and told() == told("segment")


def test_silence_gives_nothing(client):
    data = wav(0.3)  # noise of one level
    assert client.audio.transcriptions.create(model="tiny", file=("a.wav", data)).text == ""
    assert client.audio.transcriptions.create(model="tiny", file=("a.wav", data), response_format="srt") == ""


def test_embeddings(client, model):
    wanted = [model.embed(text).numpy() for text in ("a red circle", "two")]
    for form in ("float", "base64"):
        told = client.embeddings.create(model="tiny", input=["a red circle", "two"], encoding_format=form)
        for number, vector in enumerate(wanted):
            given = told.data[number].embedding
            if isinstance(given, str):
                given = np.frombuffer(base64.b64decode(given), dtype="<f4")
            assert np.allclose(given, vector, atol=1e-6)
    assert np.allclose(client.embeddings.create(model="tiny", input="two").data[0].embedding, wanted[1], atol=1e-6)
    ids = model.tokenizer.text.encode("two")
    assert np.allclose(client.embeddings.create(model="tiny", input=ids).data[0].embedding, wanted[1], atol=1e-6)


def test_models(client):
    (one,) = client.models.list().data
    assert one.id == "tiny" and one.voices == ["ann", "bob"] and one.input_modalities == ["text", "image", "audio"]
    assert client.models.retrieve("tiny").model_dump() == one.model_dump()
    with pytest.raises(openai.NotFoundError, match="there is tiny"):
        client.models.retrieve("gpt-4o")


def test_a_model_of_conversations(model):
    tokenizer = model.tokenizer
    talking = tiny_model()
    talking.tokenizer.chat_template = CHAT_TEMPLATE
    messages = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "a.png <|image|>"},
        {"role": "assistant", "content": [{"type": "text", "text": "one"}]},
        *user("two?", picture_part()),
    ]
    own = [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": [text_segment("a.png <|image|>")]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": [text_segment("two?"), png_image()]},
    ]
    assert tokenizer is not talking.tokenizer
    with served(talking) as running, client_of(running) as client:
        assert ask(client, messages).choices[0].message.content == talking.chat(own).text
        assert client.models.list().data[0].conversations


def text_segment(text: str) -> PromptSegment:
    return PromptSegment(text=text)


CAPTION_SCRIPT = """
import base64, sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="sk-none")
image = base64.b64encode(open(sys.argv[2], "rb").read()).decode()
response = client.chat.completions.create(
    model="tiny",
    messages=[{"role": "user", "content": [
        {"type": "text", "text": "What's in this image?"},
        {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{image}", "detail": "auto"}},
    ]}],
    max_tokens=300,
)
print(response.choices[0].message.content)
"""
TRANSCRIPTION_SCRIPT = """
import sys
from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="sk-none")
with open(sys.argv[2], "rb") as audio_file:
    transcription = client.audio.transcriptions.create(
        model="tiny", file=audio_file, response_format="verbose_json", timestamp_granularities=["segment"]
    )
print(transcription.text)
"""


@pytest.mark.parametrize(("script", "content"), [(CAPTION_SCRIPT, png()), (TRANSCRIPTION_SCRIPT, spoken_like())])
def test_scripts_written_for_openai(server, tmp_path, script, content):
    """OpenAI's own examples of a caption and a transcription, with only base_url and model changed."""
    file = tmp_path / "file.bin"
    file.write_bytes(content)
    command = [sys.executable, "-c", textwrap.dedent(script), f"{server.url}/v1", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip(), done.stderr


def test_the_schema_is_told(server):
    told = get(f"{server.url}/openapi.json").json()
    assert json.dumps(told).count("#/components/schemas/HTTPValidationError") <= 1
    routes = {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/audio/speech",
        "/v1/audio/transcriptions",
        "/v1/embeddings",
    }
    assert routes < set(told["paths"]) and "ChatRequest" in told["components"]["schemas"]


def test_what_the_configuration_refuses():
    for settings in (
        {"api_keys": ("short",)}, {"cors_origins": ("example.org",)}, {"allow_remote": ("http://a.org",)},
        {"max_queue": -1}, {"max_speaking": 0}, {"max_body_bytes": 0},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(settings)).split("_")[0].replace("api", "API")):
            ServeConfig(**settings)
    assert "secret-key" not in repr(ServeConfig(api_keys=("secret-key",)))
