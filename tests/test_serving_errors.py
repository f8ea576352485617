"""Whatever a client sends: a 4xx in OpenAI's form that names what is wrong, and the next request is answered."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import httpx
import openai
import pytest

from mmllm.serving.bodies import MAX_MARKS
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import validation_error
from mmllm.serving.run import Server
from tests.serving_fixtures import (
    client_of,
    data_url,
    get,
    picture_part,
    png,
    post,
    request,
    served,
    sound_part,
    tiny_model,
    user,
    wav,
)

CONFIG = ServeConfig(
    api_keys=("a-first-key", "a-second-key"), max_body_bytes=600_000, max_new_tokens=50, max_context=200,
    max_choices=4, max_speech_characters=100, max_pixels=100_000, cors_origins=("https://page.example",),
)  # fmt: skip
KEY = {"Authorization": "Bearer a-second-key"}
CHAT = "/v1/chat/completions"
GOOD = {"model": "tiny", "messages": user(picture_part()), "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with served(tiny_model(), CONFIG) as running:
        yield running


@pytest.fixture(scope="module")
def http(server) -> Iterator[httpx.Client]:
    with httpx.Client(verify=False, base_url=server.url, headers=KEY, timeout=60) as one:
        yield one


@pytest.fixture(autouse=True)
def the_next_is_answered(request) -> Iterator[None]:
    yield
    if "http" in request.fixturenames:
        answer = request.getfixturevalue("http").post(CHAT, json=GOOD)
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"]


def check(
    answer: httpx.Response, status: int, param: str | None = None, code: str | None = None, said: str = ""
) -> str:
    """An answer's error, in the form that clients read."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    (error,) = answer.json().values()
    assert list(answer.json()) == ["error"] and sorted(error) == ["code", "message", "param", "type"]
    assert isinstance(error["message"], str) and 10 < len(error["message"]) <= 600 and isinstance(error["type"], str)
    assert (param is None or error["param"] == param) and (code is None or error["code"] == code), error
    assert said.lower() in error["message"].lower(), error
    return error["message"]


def chat(**more) -> dict:
    return {**GOOD, **more}


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        (chat(temprature=1), "temprature", "Unknown parameter: 'temprature'"),
        (chat(tools=[]), "tools", "call no tools"),
        (chat(response_format={"type": "xml"}), "response_format", "json_object"),
        (chat(messages=[{"role": "user", "content": "x", "foo": 1}]), "messages[0].foo", "Unknown parameter"),
        (chat(messages=[{"role": "tool", "content": "x"}]), "messages[0]", "'user'"),
        (chat(messages=[{"content": "x"}]), "messages[0]", "role"),
        (chat(messages=[{"role": "user"}]), "messages[0].content", "Missing required parameter"),
        (chat(messages=[{"role": "user", "content": 5}]), "messages[0].content", "valid string or"),
        (chat(messages=[{"role": "user", "content": [{"type": "text"}]}]), "messages[0].content[0].text", "Missing"),
        (chat(messages=user({"type": "image_url", "image_url": "data:"})), "messages[0].content[0].image_url", "type"),
        (chat(messages=user({"type": "file", "file": {"file_id": "x"}})), "messages[0].content[0]", "text"),
        (chat(messages=[]), "messages", "at least 1"),
        (chat(messages="hello"), "messages", "list"),
        (chat(messages=None), "messages", "list"),
        (chat(model=None), "model", "string"),
        (chat(temperature="1"), "temperature", "Invalid type"),
        (chat(temperature=True), "temperature", "Invalid type"),
        (chat(temperature=2.1), "temperature", "less than or equal to 2"),
        (chat(temperature=-1), "temperature", "0"),
        (chat(top_p=0), "top_p", "greater than 0"),
        (chat(max_tokens=0), "max_tokens", "1"),
        (chat(max_tokens=1.5), "max_tokens", "int"),
        (chat(max_tokens=51), "max_tokens", "allows 50"),
        (chat(max_tokens=10**30), "max_tokens", "allows 50"),
        (chat(max_completion_tokens=2), None, "one thing"),
        (chat(seed=2**63), "seed", "9223372036854775808"),
        (chat(n=5), "n", "allows 4"),
        (chat(n=0), "n", "1"),
        (chat(stop=["a"] * 17), "stop", "16"),
        (chat(stop=[""]), "stop[0]", "1 character"),
        (chat(stop="a" * 257), "stop", "256"),
        (chat(stop=5), "stop", "string or"),
        (chat(logit_bias={"x": 1}), "logit_bias.x", "match"),
        (chat(logit_bias={"99999999": 1}), None, "logit_bias"),
        (chat(logit_bias={"5": 101}), "logit_bias.5", "100"),
        (chat(top_logprobs=2), None, "logprobs"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "20"),
        (chat(stream_options={"include_usage": True}), None, "stream"),
        (chat(stream="yes"), "stream", "bool"),
        (chat(audio={"voice": "ann", "format": "wav"}), None, "modalities"),
        (chat(modalities=["video"]), "modalities[0]", "'text' or 'audio'"),
        (chat(modalities=["audio"]), "modalities", "text"),
        (chat(modalities=["text", "audio"], audio={"voice": "alloy", "format": "wav"}), "audio.voice", "ann, bob"),
        (
            chat(modalities=["text", "audio"], audio={"voice": "ann", "format": "aac"}),
            "audio.format",
            "wav, pcm or flac",
        ),
        (chat(modalities=["text", "audio"], n=2), None, "one answer"),
        (chat(user="u" * 257), "user", "256"),
        (chat(store=True), "store", "False"),
        (chat(messages=user("x\ud800")), None, "surrogate"),
        ([GOOD], None, "a list; send a JSON object"),
        ("hello", None, "a string"),
        (None, None, "null"),
    ],
)
def test_fields(http, body, param, said):
    answer = http.post(CHAT, content=json.dumps(body), headers={"Content-Type": "application/json"})
    check(answer, 400, param, said=said)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "isn't JSON"), (b"{", "isn't JSON"), (b"{'a': 1}", "isn't JSON"), (b'{"a": NaN}', "NaN"),
        (b'{"temperature": Infinity}', "Infinity"), (b"\xff\xfe{}", "UTF-8"), (b'{"a": "\xc3"}', "UTF-8"),
        (b"[" * 90_000, "nested"), (b'{"a":' * 90_000, "nested"), (b"[" + b"0," * MAX_MARKS, "commas"),
        (b'{"n": ' + b"9" * 10_000 + b"}", "JSON"), (b"\x00", "JSON"),
    ],
)  # fmt: skip
def test_bodies_that_are_no_json(http, content, said):
    check(http.post(CHAT, content=content, headers={"Content-Type": "application/json"}), 400, said=said)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_bodies_of_other_types(http, kind):
    """Pages of other origins can send these without asking."""
    answer = http.post(CHAT, content=json.dumps(GOOD), headers={"Content-Type": kind})
    check(answer, 415, said="application/json")


def test_bodies_that_are_too_large(http, server):
    check(http.post(CHAT, json=chat(user="u" * 600_000)), 413, code="request_too_large", said="600000 bytes")
    pieces = (b" " * 50_000 for _ in range(20))  # of no length that is told
    check(http.post(CHAT, content=pieces, headers={"Content-Type": "application/json"}), 413)
    with httpx.Client(verify=False, base_url=server.url, headers=KEY) as other:
        check(other.post(CHAT, content=bytes(3_000_000), headers={"Content-Type": "application/json"}), 413)


def test_routes_that_arent_there(http):
    check(http.get("/v1/nothing"), 404, code="unknown_url", said="/v1/nothing")
    check(http.get("/"), 404)
    check(http.get(CHAT), 405, code="method_not_allowed", said="POST")
    check(http.delete("/v1/models/tiny"), 405, said="GET")
    check(http.get("/v1/models/../../etc/passwd"), 404)
    check(http.get("/docs"), 404)


def test_models_that_arent_there(http):
    for path, more in (
        (CHAT, {"messages": user("x")}), ("/v1/completions", {"prompt": "x"}), ("/v1/embeddings", {"input": "x"}),
        ("/v1/audio/speech", {"input": "x", "voice": "ann"}),
    ):  # fmt: skip
        check(http.post(path, json={"model": "gpt-4o", **more}), 404, "model", "model_not_found", "tiny")
    answer = http.post("/v1/audio/transcriptions", data={"model": "gpt-4o"}, files={"file": ("a.wav", wav())})
    check(answer, 404, "model", "model_not_found")


@pytest.mark.parametrize(
    "messages",
    [
        user("hello"), user(""), user(picture_part(), picture_part()), user(picture_part(), sound_part()),
        user(picture_part(), "transcribe"), user(sound_part(), "caption"), user(),
        [{"role": "system", "content": "be short"}, *user(picture_part())],
        [*user(picture_part()), {"role": "assistant", "content": "a"}, *user("b")],
        [{"role": "assistant", "content": "a"}],
    ],
)  # fmt: skip
def test_what_a_model_of_tasks_does_not_answer(http, messages):
    said = check(http.post(CHAT, json=chat(messages=messages)), 400, "messages", "unsupported_messages")
    for name in ("`caption`", "`transcribe`", "`modalities`", "question"):
        assert name in said


def test_media_of_messages(http):
    def ask(*parts):
        return http.post(CHAT, json=chat(messages=user(*parts)))

    part = {"type": "image_url", "image_url": {"url": "cat.jpg"}}
    check(ask("x", part), 400, "messages[0].content[1].image_url.url", said="data:")
    for url in ("file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/a.png", data_url(b"<svg/>", "image/svg+xml")):
        part = {"type": "image_url", "image_url": {"url": url}}
        check(ask(part), 400, "messages[0].content[0].image_url.url")
    check(ask(picture_part(png(400, 300))), 400, code="picture_too_large")
    broken = {"type": "input_audio", "input_audio": {"data": "%%", "format": "wav"}}
    check(ask(broken), 400, "messages[0].content[0].input_audio.data", said="base64")
    check(ask(sound_part(form="mp3")), 400, said="format says mp3")
    check(ask(sound_part(wav(3.0))), 400, said="hears 1 s")


def test_texts_that_name_files_are_texts(http):
    """`/etc/hostname.wav` in a text is a text: the words reach the model, and no file is looked for."""
    question = chat(messages=user(picture_part(), "/etc/passwd.png"))
    assert http.post(CHAT, json=question).status_code == 200
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": "cat.jpg"}).status_code == 200
    assert http.post("/v1/embeddings", json={"model": "tiny", "input": "cat.wav"}).status_code == 200
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": "<|image|><|end|>"}).status_code == 200


def test_long_prompts(http):
    words = "a red circle above two blue squares " * 60
    check(http.post("/v1/completions", json={"model": "tiny", "prompt": words}), 400, code="context_length_exceeded")
    check(http.post("/v1/embeddings", json={"model": "tiny", "input": words}), 400, code="context_length_exceeded")
    check(http.post(CHAT, json=chat(messages=user(picture_part(), words))), 400, code="context_length_exceeded")
    speech = {"model": "tiny", "voice": "ann", "input": "word " * 30}
    check(http.post("/v1/audio/speech", json=speech), 400, "input", "text_too_long")


def test_completions(http):
    def post(**more):
        return http.post("/v1/completions", json={"model": "tiny", "prompt": "a", **more})

    check(post(suffix="b"), 400, "suffix", said="suffix")
    check(post(prompt=[]), 400)
    check(post(prompt=[[]]), 400)
    check(post(prompt=[1, "a"]), 400)
    check(post(prompt=[-1]), 400)
    check(post(prompt=[10**9]), 400, "prompt", said="no id of text")
    check(post(prompt=[1]), 400, "prompt", said="no id of text")  # <|end|>
    check(post(prompt=["a"] * 65), 400)
    check(post(best_of=2, n=3), 400, said="best_of")
    check(post(best_of=9, temperature=1), 400, "best_of", said="allows 4")
    check(post(best_of=2, stream=True), 400, said="stream")


def test_speech(http):
    def post(**more):
        return http.post("/v1/audio/speech", json={"model": "tiny", "input": "one", "voice": "ann", **more})

    check(post(voice="alloy"), 400, "voice", "unknown_voice", "ann, bob")
    check(post(voice={"id": "alloy"}), 400, "voice", "unknown_voice")
    check(post(response_format="aac"), 400, "response_format", said="wav, pcm or flac")
    check(post(response_format="mp4"), 400, "response_format")
    check(post(speed=5), 400, "speed")
    check(post(input=""), 400, "input")
    check(post(input="  \n"), 400, "input", said="empty")
    check(post(instructions="like a pirate"), 400, "instructions", said="voice")
    assert post(voice="default").status_code == post(voice=None).status_code == 200


def test_a_model_without_a_pointer_has_one_speed():
    with served(tiny_model(pointer=False)) as running, httpx.Client(verify=False, base_url=running.url) as http:
        body = {"model": "tiny", "input": "one", "voice": "ann"}
        check(http.post("/v1/audio/speech", json={**body, "speed": 2}), 400, "speed", said="leave speed out")
        assert http.post("/v1/audio/speech", json=body).status_code == 200
        form = {"model": "tiny", "response_format": "verbose_json", "timestamp_granularities[]": "word"}
        answer = http.post("/v1/audio/transcriptions", data=form, files={"file": ("a.wav", wav())})
        check(answer, 400, "timestamp_granularities", said="CTC head")


def test_transcriptions(http):
    def post(file=None, **fields):
        files = {"file": ("a.wav", wav() if file is None else file)}
        return http.post("/v1/audio/transcriptions", data={"model": "tiny", **fields}, files=files)

    check(post(b""), 400, "file")
    check(post(b"hello"), 400, "file", "unsupported_sound")
    check(post(wav()[:-100]), 400, "file", "unreadable_sound", "cut short")
    check(post(prompt="names"), 400, "prompt", "unknown_parameter")
    check(post(response_format="xml"), 400, "response_format")
    check(post(temperature="hot"), 400, "temperature")
    check(post(language="english"), 400, "language")
    check(post(**{"timestamp_granularities[]": "word"}), 400, said="verbose_json")
    check(post(stream="true", response_format="srt"), 400, said="stream")
    check(post(**{f"f{n}": "x" for n in range(40)}), 400, code="invalid_form")
    check(post(model="x" * 20_000), 400, code="invalid_form")
    check(http.post("/v1/audio/transcriptions", data={"model": "tiny"}), 415, said="multipart")
    check(http.post("/v1/audio/transcriptions", json={"model": "tiny"}), 415)
    answer = http.post("/v1/audio/transcriptions", data={"model": "tiny", "file": "a"}, files={"x": ("a", b"b")})
    check(answer, 400, "file")
    two = [("file", ("a.wav", wav())), ("file", ("b.wav", wav()))]
    check(http.post("/v1/audio/transcriptions", data={"model": "tiny"}, files=two), 400, code="invalid_form")
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    check(http.post("/v1/audio/transcriptions", content=b"--y\r\n", headers=kind), 400)
    check(http.post("/v1/audio/transcriptions", content=b"--x", headers={"Content-Type": "multipart/form-data"}), 400)


def test_embeddings(http):
    def post(**more):
        return http.post("/v1/embeddings", json={"model": "tiny", "input": "a", **more})

    check(post(dimensions=8), 400, "dimensions", said="width")
    check(post(input=""), 400, "input")
    check(post(input=[""]), 400, "input[0]")
    check(post(input=[[10**6]]), 400, "input")
    check(post(encoding_format="int8"), 400, "encoding_format")
    check(post(input={"a": 1}), 400, "input")


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer a-first-ke", "Bearer a-first-keyy", "Basic a-first-key", "a-first-key",
     "Bearer a-first-key a-second-key", "Bearer " + "k" * 10_000],
)  # fmt: skip
def test_wrong_keys(server, header):
    headers = {} if header is None else {"Authorization": header}
    for method, path in (
        ("POST", CHAT),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/x"),
    ):
        answer = request(method, server.url + path, headers=headers)
        check(answer, 401, code="invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert get(f"{server.url}/health", headers=headers).json() == {"status": "ok"}
    assert request("HEAD", f"{server.url}/health", headers=headers).status_code == 200


def test_right_keys(server):
    for key in CONFIG.api_keys:
        with client_of(server, key) as client:
            assert client.models.list().data[0].id == "tiny"
    with client_of(server, "another-key") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


def test_pages_of_other_origins(http):
    """A browser lets any page send simple requests to the loopback: those say where they come from."""
    for origin in ("https://evil.example", "null", "http://127.0.0.1:8000", "https://page.example.evil.example"):
        check(http.post(CHAT, json=GOOD, headers={"Origin": origin}), 403, code="origin_not_allowed")
    answer = http.post(CHAT, json=GOOD, headers={"Origin": "https://page.example"})
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://page.example"
    asked = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
    assert request("OPTIONS", str(http.base_url) + CHAT, headers=asked).status_code == 200
    asked["Origin"] = "https://evil.example"
    assert request("OPTIONS", str(http.base_url) + CHAT, headers=asked).status_code == 403


def test_there_is_no_cors_unless_asked():
    with served() as running:
        check(post(running.url + CHAT, json=GOOD, headers={"Origin": "http://localhost"}), 403)
        assert "access-control-allow-origin" not in get(f"{running.url}/v1/models").headers


def test_the_deepest_error_is_told():
    """Pydantic names each member of a union that didn't fit; the one that went farthest is what was meant."""
    body = {"messages": [{"role": "user", "content": [{"type": "text", "text": 5}]}]}
    errors = [
        {"type": "string_type", "loc": ("messages", 0, "user", "content", "str"), "msg": "a string"},
        {"type": "string_type", "loc": ("messages", 0, "user", "content", "list", 0, "text", "text"), "msg": "text!"},
    ]
    error = validation_error(errors, body)
    assert error.param == "messages[0].content[0].text" and "text!" in error.message and "a string" not in error.message


def test_large_base64(http):
    encoded = base64.b64encode(bytes(120_000)).decode()
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    check(http.post(CHAT, json=chat(messages=user(part))), 400, said="no format")
