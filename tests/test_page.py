"""The page of `mmllm ui` without a browser: what it asks models, what it draws, and what its routes refuse."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import re
import socket
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.folder import save_model
from mmllm.cli.main import main
from mmllm.data.samples.sample import Segment as Piece
from mmllm.evaluation.answer_traces import AnswerTrace, TracedToken, trace_answer
from mmllm.evaluation.attention_maps import Attention
from mmllm.inference.api import Model, load
from mmllm.inference.inputs import AudioPart, ImagePart, TextPart
from mmllm.inference.speaking import Waveform
from mmllm.inference.transcripts import Segment, Transcript, Word
from mmllm.serving.page_answers import (
    MAX_CHARACTERS,
    MAX_MESSAGES,
    MAX_SENTENCES,
    Asker,
    Conversation,
    SharedModel,
    message_parts,
    sentences,
)
from mmllm.serving.page_looking import (
    ALL_LAYERS,
    layer_names,
    looks_html,
    speech_html,
    speech_traces_html,
    trace_html,
    transcript_html,
    wav_bytes,
)
from mmllm.serving.page_routes import ClosedRoutes, PageLimits
from mmllm.serving.page_run import running_page
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.text import MIN_VOCAB_SIZE
from tests.inference_fixtures import RATE, images, make
from tests.test_adapters import add_to_folder


def wordy() -> Model:
    """A tiny random model that writes syllables of its tokenizer's, and no single bytes."""
    model = make(pointer=PointerRule())
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[:MIN_VOCAB_SIZE] *= 0.2
    return model


@pytest.fixture(scope="module")
def asker() -> Asker:
    return Asker("tiny", SharedModel(wordy()))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("media")
    Image.fromarray(images(1)[0]).save(folder / "a.png")
    soundfile.write(folder / "a.wav", babble(), RATE)
    (folder / "a.txt").write_text("no picture, no sound")
    return {kind: str(folder / name) for kind, name in (("image", "a.png"), ("sound", "a.wav"), ("text", "a.txt"))}


def babble() -> np.ndarray:
    """Bursts of noise with silence between them, as speech has."""
    rng = np.random.default_rng(0)
    bursts = [np.concatenate([rng.normal(0, 0.3, 900), np.zeros(700)]) for _ in range(4)]
    return np.concatenate(bursts).clip(-1, 1).astype(np.float32)


# ---- answers


def test_a_caption_is_the_models_own_and_can_be_looked_into(asker: Asker, files: dict[str, str]) -> None:
    answer = asker.caption(files["image"])
    assert answer.text == asker.model.caption(files["image"]) != ""
    assert answer.prompt is not None and answer.result is not None
    trace = answer.trace()
    ended = answer.result.finish_reason == "stop"
    again = trace_answer(asker.model.model, asker.model.tokenizer, answer.prompt, answer.result.ids, ended)
    assert [token.logprob for token in trace.tokens] == [token.logprob for token in again.tokens]
    assert len(trace.tokens) == len(answer.result.ids) + ended


def test_a_transcript_is_the_models_own_with_times(asker: Asker, files: dict[str, str]) -> None:
    transcript, answer = asker.transcribe(files["sound"])
    assert transcript == asker.model.transcribe(files["sound"], timestamps=True) == answer.text
    assert transcript.seconds == pytest.approx(len(babble()) / RATE, abs=0.01)
    assert transcript.text
    assert "".join(token.piece for token in answer.trace().tokens if not token.is_end) == transcript.text


def test_what_was_heard_in_parts_cannot_be_looked_into(files: dict[str, str]) -> None:
    model = make()
    model = type(model)(
        model.model, model.tokenizer, generation=dataclasses.replace(model.generation, max_heard_seconds=0.3)
    )
    _, answer = Asker("short", SharedModel(model)).transcribe(files["sound"])
    assert answer.prompt is None and not answer.has_trace
    with pytest.raises(ValueError, match="heard in parts"):
        answer.trace()


def test_texts_are_spoken_sentence_by_sentence(asker: Asker) -> None:
    spoken = list(asker.speak("One two. Three!\nFour", rate=2.0))
    assert [each.text for each in spoken] == ["One two.", "Three!", "Four"]
    for each in spoken:
        np.testing.assert_array_equal(each.waveform.samples, asker.model.speak(each.text, rate=2.0).samples)


def test_too_many_sentences_are_one_with_the_last() -> None:
    text = " ".join(f"Number {number}." for number in range(MAX_SENTENCES + 3))
    parts = sentences(text)
    assert len(parts) == MAX_SENTENCES and " ".join(parts) == text
    assert sentences("…  \n - ") == []


@pytest.mark.parametrize(("text", "says"), [("  ", "nothing to say"), ("a" * (MAX_CHARACTERS + 1), "at most")])
def test_texts_that_cannot_be_spoken_are_refused(asker: Asker, text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list(asker.speak(text))


def test_a_message_is_answered_by_task(asker: Asker, files: dict[str, str]) -> None:
    model, new = asker.model, Conversation()
    picture = message_parts("", [files["image"]])
    assert asker.answer(new, picture).text == model.caption(files["image"])
    assert asker.answer(new, message_parts("Caption.", [files["image"]])).text == model.caption(files["image"])
    sound = message_parts("transcribe", [files["sound"]])
    assert asker.answer(new, sound).text == model.transcribe(files["sound"])
    asked = message_parts("which colour?", [files["image"], files["sound"]])
    parts = [Path(files["image"]), Path(files["sound"])]
    assert asker.answer(new, asked).text == model.answer(parts, "which colour?")
    spoken = asker.answer(new, message_parts("One two.", []))
    np.testing.assert_array_equal(spoken.spoken[0].waveform.samples, model.speak("One two.").samples)
    (trace,) = spoken.speech_traces()
    assert spoken.has_trace and [word for word, _ in trace.words] == ["One", "two."]
    html = speech_traces_html([trace])
    assert html.count("<button") == 2 and html.count("<caption>") == 2, "text and units"


def test_what_no_task_answers_is_refused_with_what_is(asker: Asker, files: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"not trained on conversations.*a picture alone or with 'caption'"):
        asker.answer(Conversation(), message_parts("", [files["image"], files["sound"]]))
    with pytest.raises(ValueError, match="message is empty"):
        asker.answer(Conversation(), message_parts(" ", []))
    with pytest.raises(ValueError, match="text alone can be spoken"):
        asker.answer(Conversation(), message_parts("go", [files["image"]]), aloud=True)


def test_a_model_of_conversations_is_asked_with_what_was_said(files: dict[str, str]) -> None:
    asker = Asker("chatting", SharedModel(make()), conversations=True)
    first = message_parts("look.png is no file here", [files["image"]])
    answer = asker.answer(Conversation(), first)
    said = Conversation().said(first, answer.text)
    second = asker.answer(said, message_parts("and now?", []))
    picture, text = first
    assert isinstance(text, TextPart)
    messages = [
        {"role": "user", "content": [picture, Piece(text=text.text)]},
        {"role": "assistant", "content": answer.text},
        {"role": "user", "content": [Piece(text="and now?")]},
    ]
    assert second.text == asker.model.chat(messages)


def test_conversations_forget_their_beginning() -> None:
    talk = Conversation()
    for number in range(MAX_MESSAGES):
        talk = talk.said([TextPart(f"question {number}")], f"answer {number}")
    assert len(talk.messages) == MAX_MESSAGES and talk.messages[-1]["content"] == f"answer {MAX_MESSAGES - 1}"


def test_files_are_what_they_hold_and_text_is_text(files: dict[str, str], tmp_path: Path) -> None:
    renamed = tmp_path / "picture.wav"
    renamed.write_bytes(Path(files["image"]).read_bytes())
    picture, sound, text = message_parts(f" {files['image']} ", [str(renamed), files["sound"]])
    assert isinstance(picture, ImagePart) and isinstance(sound, AudioPart)
    assert isinstance(text, TextPart) and text.text == files["image"]
    with pytest.raises(ValueError, match=r"a\.txt is neither a picture nor a sound"):
        message_parts("", [files["text"]])


def test_askers_of_one_model_take_turns_with_their_adapters() -> None:
    asked: list[str | None] = []

    class Recorded:
        def set_adapter(self, name: str | None) -> None:
            asked.append(name)

    shared = SharedModel(Recorded(), "a")  # type: ignore[arg-type]
    askers = [Asker("a", shared, "a"), Asker("alone", shared)]
    for number in (0, 0, 1, 1, 0):
        with askers[number].in_use():
            assert shared.adapter == askers[number].adapter
            assert not shared._lock.acquire(blocking=False), "in use by one alone"
    assert asked == [None, "a"]


def test_two_adapters_of_one_model_answer_as_each_would_alone(tmp_path: Path, files: dict[str, str]) -> None:
    pytest.importorskip("peft")
    model = wordy()
    save_model(tmp_path / "model", model.model, model.tokenizer, generation=model.generation)
    for seed, name in enumerate(("first", "second"), start=1):
        add_to_folder(tmp_path / "model", name, AdapterConfig(r=4), seed)
    shared = SharedModel(load(tmp_path / "model", "cpu", adapter=["first", "second"]), "first")
    askers = [Asker("first", shared, "first"), Asker("second", shared, "second"), Asker("alone", shared)]
    for _ in range(2):
        for asker in askers:
            alone = load(tmp_path / "model", "cpu", adapter=asker.adapter)
            answer = asker.caption(files["image"])
            assert answer.result is not None
            expected = alone.caption(files["image"])
            assert answer.result.ids == expected.ids
            said = [token.logprob for token in answer.trace().tokens]
            assert said == pytest.approx(expected.logprobs, abs=1e-4), asker.name


# ---- drawing


def _trace(asker: Asker, files: dict[str, str]) -> AnswerTrace:
    return asker.caption(files["image"]).trace()


def test_a_trace_shows_tokens_pictures_and_experts(asker: Asker, files: dict[str, str]) -> None:
    trace = _trace(asker, files)
    html = trace_html(trace)
    assert html.count("<section") == html.count("</section>") == 3
    tokens = re.search(r'<div class="mm-tokens">(.*?)</div>', html, re.DOTALL)
    assert tokens is not None and tokens[1].count("<button") == len(trace.tokens)
    assert html.count('data-heat="data:image/png;base64,') == len(trace.words)
    assert html.count("<caption>") == 2, "text and picture tokens"
    numbers = [int(number) for number in re.findall(r"<td[^>]*>(\d+)</td>", html)]
    assert len(numbers) == 2 * len(trace.routing.layers) * trace.routing.num_experts
    assert sum(numbers) == pytest.approx(200, abs=len(numbers))


def test_attention_is_shown_of_the_layer_that_is_chosen(asker: Asker, files: dict[str, str]) -> None:
    trace = _trace(asker, files)
    assert layer_names(trace) == ["layer 1", "layer 0", ALL_LAYERS]
    (last,), (first,), (mean,) = (looks_html(trace, name) for name in layer_names(trace))
    assert looks_html(trace) == [last] and len({last, first, mean}) == 3
    share = sum(picture.share(trace.looks(trace.words[0], 0)) for picture in trace.pictures)
    assert f"“{trace.words[0].text}”: {share:.0%} of its attention" in first


def test_what_cannot_be_told_is_said(asker: Asker, files: dict[str, str]) -> None:
    trace = _trace(asker, files)
    unwatched = dataclasses.replace(trace, attention=Attention((), np.zeros((0, len(trace.tokens), 1))))
    assert "isn't known" in looks_html(unwatched)[0]
    placeless = dataclasses.replace(
        trace, pictures=tuple(dataclasses.replace(picture, grid=None) for picture in trace.pictures)
    )
    assert "of no place" in looks_html(placeless)[0]
    routing = dataclasses.replace(trace.routing, layers=(), experts_LNK=trace.routing.experts_LNK[:0])
    dense = dataclasses.replace(trace, routing=routing)
    assert "experts" not in trace_html(dense)


def test_nothing_that_a_model_or_a_user_wrote_is_markup(asker: Asker, files: dict[str, str]) -> None:
    evil = '<img src=x onerror="alert(1)">&'
    trace = _trace(asker, files)
    token = TracedToken(evil, -1.0, ((evil, -0.5),))
    words = tuple(dataclasses.replace(word, text=evil) for word in trace.words)
    html = trace_html(dataclasses.replace(trace, tokens=(token,), words=words))
    waveform = Waveform(np.zeros(8, dtype=np.float32), RATE, np.zeros((1, 1)), (WordTime(evil, 0.0, 0.1),))
    segments = (Segment(0.0, 1.0, evil, (Word(evil, 0.0, 1.0),)), Segment(1.0, 2.0, evil))
    html += speech_html(evil, waveform, False) + transcript_html(Transcript(evil, segments), f"file={evil}")
    assert "<img src=x" not in html and 'onerror="' not in html and "&lt;img src=x" in html


def test_words_carry_their_times() -> None:
    words = (Word("red", 0.1, 0.25), Word("ring", 0.25, 0.6))
    html = transcript_html(Transcript("red ring", (Segment(0.1, 0.6, "red ring", words, doubtful=True),)), "x.wav")
    assert re.findall(r'data-start="([\d.]+)" data-end="([\d.]+)">(\w+)<', html) == [
        ("0.100", "0.250", "red"),
        ("0.250", "0.600", "ring"),
    ]
    assert "doubts" in html and "Nothing is said" in transcript_html(Transcript(""), "x.wav")


def test_sounds_are_joined_as_they_are() -> None:
    waveforms = [Waveform(np.full(n, 0.5, dtype=np.float32), RATE, np.zeros((1, 1))) for n in (3, 5)]
    samples, rate = soundfile.read(io.BytesIO(wav_bytes(waveforms)))
    assert rate == RATE and samples == pytest.approx(np.full(8, 0.5), abs=1e-4)


# ---- routes


def ask(
    app: ClosedRoutes, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of one request."""
    given = {"host": "127.0.0.1:7860", **(headers or {})}
    scope = {
        "type": "http", "method": method, "path": path, "query_string": b"", "raw_path": path.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    sent: list[dict] = []
    chunks = [body[start : start + 1000] for start in range(0, len(body), 1000)] or [b""]
    messages = [
        {"type": "http.request", "body": chunk, "more_body": number + 1 < len(chunks)}
        for number, chunk in enumerate(chunks)
    ]

    async def receive() -> dict:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    headers_back = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent[1:]), headers_back


PAGE = b'<head><meta property="og:image" content="https://elsewhere.example/a.jpg" /><title>t</title></head>'


@pytest.fixture
def routes(tmp_path: Path) -> ClosedRoutes:
    """Around an application that answers everything: with the page, or with what it was sent."""

    async def inner(scope, receive, send) -> None:
        body = PAGE
        if scope["method"] == "POST":
            body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})

    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "a.png").write_bytes(b"picture")
    (tmp_path / "own" / "link").symlink_to("/etc/passwd")
    return ClosedRoutes(inner, tmp_path / "own", "127.0.0.1", PageLimits(5000, 3000))


def test_the_page_points_nowhere_else(routes: ClosedRoutes) -> None:
    status, body, headers = ask(routes, "GET", "/")
    assert (status, body) == (200, b"<head><title>t</title></head>")
    assert headers["content-length"] == str(len(body)) and "default-src 'self'" in headers["content-security-policy"]


def test_files_are_those_of_its_folder_alone(routes: ClosedRoutes, tmp_path: Path) -> None:
    own = tmp_path / "own"
    assert ask(routes, "GET", f"/gradio_api/file={own}/a.png")[0] == 200
    for path in (
        "/etc/passwd", f"{own}/../../etc/passwd", f"{own}/link", f"{own}2/a.png", "own/a.png", "", "http://127.0.0.1/x",
        f"{own}/\0", "/proc/self/environ", str(Path(__file__)), "a" * 5000,
    ):  # fmt: skip
        assert ask(routes, "GET", f"/gradio_api/file={path}")[0] == 404, path
    assert ask(routes, "POST", f"/gradio_api/file={own}/a.png")[0] == 404


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file/etc/passwd", "/file=/etc/passwd", "/gradio_api/proxy=http://127.0.0.1:1/", "/gradio_api/info",
        "/gradio_api/call/x", "/gradio_api/stream/a/b/1/playlist.m3u8", "/gradio_api/vibe-code", "/gradio_api/runs",
        "/gradio_api/mcp/sse", "/monitoring", "/gradio_api/deep_link", "/login", "/static/../../secret", "/dev/reload",
        "/gradio_api/custom_component/1/client/component/index.js", "/gradio_api/openapi.json", "/svelte/x",
    ],
)  # fmt: skip
def test_other_routes_are_shut(routes: ClosedRoutes, path: str) -> None:
    assert ask(routes, "GET", path)[0] == 404


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"])
def test_other_methods_are_shut(routes: ClosedRoutes, method: str) -> None:
    assert ask(routes, method, "/")[0] == 404


def test_requests_name_no_file_but_uploads(routes: ClosedRoutes, tmp_path: Path) -> None:
    join = "/gradio_api/queue/join"

    def data(path: object) -> bytes:
        return json.dumps({"data": [1, [{"a": {"path": path, "meta": {"_type": "gradio.FileData"}}}]]}).encode()

    own = data(str(tmp_path / "own" / "a.png"))
    assert ask(routes, "POST", join, own)[:2] == (200, own)
    for path in ("/etc/passwd", "http://192.0.2.1/x.png", "https://example.com/a", "../a.png", str(tmp_path / "b.png")):
        status, body, _ = ask(routes, "POST", join, data(path))
        assert status == 400 and b"not uploaded here" in body, path
        assert ask(routes, "POST", f"{join}/", data(path))[0] == 400
    assert ask(routes, "POST", join, b"{")[0] == 400
    assert ask(routes, "POST", join, b"[" * 2900)[0] == 400


def test_what_is_sent_is_bounded(routes: ClosedRoutes) -> None:
    assert ask(routes, "POST", "/gradio_api/queue/join", b'"' + b"a" * 3000 + b'"')[0] == 413
    assert ask(routes, "POST", "/gradio_api/upload", b"a" * 6000)[0] == 200
    assert ask(routes, "POST", "/gradio_api/upload", b"a" * (5000 + 2**16 + 1))[0] == 413


def test_other_websites_are_not_answered(routes: ClosedRoutes, tmp_path: Path) -> None:
    assert ask(routes, "GET", "/", headers={"host": "evil.example"})[0] == 403  # its name was made to point here
    assert ask(routes, "GET", "/", headers={"host": "localhost:7860"})[0] == 200
    assert ask(routes, "GET", "/", headers={"host": "[::1]:7860"})[0] == 200
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://127.0.0.1:7860", 200)):
        assert ask(routes, "POST", "/gradio_api/upload", b"a", {"origin": origin})[0] == status, origin
    open_routes = ClosedRoutes(routes._app, tmp_path, "0.0.0.0")
    assert ask(open_routes, "GET", "/", headers={"host": "machine.example"})[0] == 200


def test_no_websocket_is_taken(routes: ClosedRoutes) -> None:
    sent: list[dict] = []

    async def send(message: dict) -> None:
        sent.append(message)

    async def receive() -> dict:
        return {"type": "websocket.connect"}

    asyncio.run(routes({"type": "websocket", "path": "/"}, receive, send))  # type: ignore[arg-type]
    assert sent == [{"type": "websocket.close", "code": 1008}]


# ---- the command


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--port", "70000"], "--port is 70000"),
        (["--compare", "nowhere"], "nowhere: no such model folder"),
        (["--adapter", "a", "--adapter", "b", "--adapter", "c"], "more than two"),
    ],
)
def test_wrong_options_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], says: str
) -> None:
    assert main(["ui", "--model", str(tmp_path), *more]) == 2
    assert says in capsys.readouterr().err


def test_a_port_in_use_is_named(asker: Asker) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(OSError, match=r"can't listen at 127\.0\.0\.1, port"),
        running_page([asker], port=taken.getsockname()[1]),
    ):
        pass
