"""How many are answered at once, clients that vanish, faults of single requests, and how a server stops."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import httpx
import pytest
from openai import OpenAI, RateLimitError

from mmllm.checkpoints.folder import save_model
from mmllm.cli.main import main
from mmllm.inference.engine.requests import EngineConfig, TextRequest
from mmllm.inference.engine.thread import EngineThread
from mmllm.inference.streaming_sound import next_border
from mmllm.serving import limits, run
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import ApiError
from mmllm.serving.limits import MAX_RETRY_SECONDS, Admission
from mmllm.serving.replies import event
from mmllm.serving.rows import running
from mmllm.serving.run import Server
from mmllm.serving.served import ServedModel
from mmllm.serving.speech import may_begin
from tests.serving_fixtures import (
    client_of,
    events,
    get,
    picture_part,
    post,
    served,
    slow,
    spoken_like,
    streamed,
    tiny_model,
    user,
)

LONG = {"model": "tiny", "prompt": "a", "max_tokens": 400, "logit_bias": {"1": -100}}
"""Some seconds of writing, which the end may not cut short."""


def sent(server: Server, path: str, **request: Any) -> socket.socket:
    """A connection over which a whole request has gone and whose answer nobody has read."""
    message = httpx.Request("POST", server.url + path, **request)
    body = message.read()
    lines = [f"POST {path} HTTP/1.1", *(f"{name}: {value}" for name, value in message.headers.items()), "", ""]
    connection = socket.create_connection(("127.0.0.1", server.port))
    connection.sendall("\r\n".join(lines).encode() + body)
    return connection


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it doesn't come to it"
        time.sleep(0.005)


@contextmanager
def stream(server: Server, path: str = "/v1/completions", **more) -> Iterator[httpx.Response]:
    """A long answer that has begun."""
    with streamed("POST", server.url + path, json={**LONG, "stream": True, **more}, timeout=30) as answer:
        assert answer.status_code == 200
        yield answer


def client_at(server: Server) -> httpx.Client:
    return httpx.Client(verify=False, base_url=server.url, timeout=60)


def counted(server: Server, name: str) -> float:
    found = re.findall(rf"^{re.escape(name)} (\S+)$", get(f"{server.url}/metrics").text, re.MULTILINE)
    assert len(found) == 1, name
    return float(found[0])


def test_who_is_let_in():
    admission = Admission(2, 1)
    with admission.enter(2), admission.enter():
        with pytest.raises(ApiError) as caught, admission.enter():
            pytest.fail("it was let in")
        assert caught.value.status == 429 and 1 <= int(caught.value.headers["Retry-After"]) <= MAX_RETRY_SECONDS
        assert admission.num_rows == 3
    assert admission.num_rows == 0
    with admission.enter(7):  # more than ever fit: alone
        pass


def test_too_many_get_429_and_are_answered_later():
    model = slow(tiny_model(engine=EngineConfig(max_rows=1)))
    with served(model, ServeConfig(max_queue=1)) as server, stream(server), stream(server):
        answers = [post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1}) for _ in range(5)]
        for answer in answers:
            assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full"
            assert answer.json()["error"]["type"] == "rate_limit_error" and int(answer.headers["retry-after"]) >= 1
        with client_of(server) as client, pytest.raises(RateLimitError):
            client.completions.create(**{**LONG, "max_tokens": 1})
        assert get(f"{server.url}/health").status_code == 200
    with served(model, ServeConfig(max_queue=1)) as server:
        assert post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_overload_gives_200_and_429_alone():
    model = tiny_model(engine=EngineConfig(max_rows=4))
    with (
        served(model, ServeConfig(max_queue=4)) as server,
        httpx.Client(verify=False, base_url=server.url, timeout=60) as http,
    ):
        body = {"model": "tiny", "messages": user(picture_part()), "max_tokens": 8}
        with ThreadPoolExecutor(24) as pool:
            statuses = [each.result() for each in [
                pool.submit(lambda: http.post("/v1/chat/completions", json=body).status_code) for _ in range(120)
            ]]  # fmt: skip
        assert set(statuses) == {200, 429} and statuses.count(200) >= 8
        wait_for(lambda: model.engine.num_running + model.engine.num_waiting == 0)
        assert http.post("/v1/chat/completions", json=body).status_code == 200


def test_sounds_that_are_streamed_have_a_bound_of_their_own():
    model = slow(tiny_model())
    body = {"model": "tiny", "input": "one two three " * 4, "voice": "ann", "response_format": "pcm"}
    with (
        served(model, ServeConfig(max_speaking=1)) as server,
        streamed("POST", f"{server.url}/v1/audio/speech", json=body, timeout=30) as answer,
    ):
        answer.raise_for_status()
        refused = post(f"{server.url}/v1/audio/speech", json=body)
        assert refused.status_code == 429 and "streams of sound" in refused.json()["error"]["message"]
        assert post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200
        assert answer.read()


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/audio/speech"])
def test_clients_that_leave_a_stream_free_their_row(path):
    model = slow(tiny_model())
    bodies = {
        "/v1/completions": LONG,
        "/v1/chat/completions": {**LONG, "messages": user(picture_part())},
        "/v1/audio/speech": {"model": "tiny", "input": "one two three " * 6, "voice": "ann"},
    }
    body = {key: value for key, value in bodies[path].items() if path != "/v1/chat/completions" or key != "prompt"}
    with served(model) as server:
        if path != "/v1/audio/speech":
            body["stream"] = True
        with streamed("POST", server.url + path, json=body, timeout=30) as answer:
            answer.raise_for_status()
            wait_for(lambda: model.engine.num_running == 1)
        wait_for(lambda: model.engine.num_running == 0)
        assert model.engine.counts.cancelled == 1
        wait_for(lambda: counted(server, "mmllm_clients_gone_total") == 1)
        assert counted(server, 'mmllm_rows_admitted{model="tiny"}') == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/audio/transcriptions"])
def test_clients_that_leave_before_the_answer_free_their_row(path):
    model = slow(tiny_model(), 0.1)
    with served(model) as server:
        request = {"json": LONG}
        if path == "/v1/audio/transcriptions":
            request = {"data": {"model": "tiny"}, "files": {"file": ("a.wav", spoken_like())}}
        with sent(server, path, **request):
            wait_for(lambda: model.engine.num_running == 1)
        wait_for(lambda: model.engine.counts.cancelled > 0)
        assert model.engine.num_running == 0
        wait_for(lambda: counted(server, 'mmllm_rows_admitted{model="tiny"}') == 0)


def test_a_client_that_leaves_while_it_sends():
    with served() as server:
        with socket.create_connection(("127.0.0.1", server.port)) as half:
            half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            half.sendall(b"Content-Length: 100\r\n\r\n{")
        wait_for(lambda: get(f"{server.url}/health").status_code == 200)
        assert post(f"{server.url}/v1/completions", json={**LONG, "max_tokens": 1}).status_code == 200


def test_a_fault_is_of_its_request_alone(monkeypatch, caplog):
    """What goes wrong in a row is a 500 of this one, without a word of how the server looks inside."""
    model = tiny_model()
    ask = {"model": "tiny", "messages": user(picture_part())}
    with served(model) as server:
        splice = model.model.splice

        def broken(*_: object) -> None:
            monkeypatch.setattr(model.model, "splice", splice)
            raise RuntimeError("secret of the inside")

        monkeypatch.setattr(model.model, "splice", broken)
        answer = post(f"{server.url}/v1/chat/completions", json=ask)
        assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
        assert "secret" not in answer.text and "secret of the inside" in caplog.text
        monkeypatch.setattr(model.model, "splice", broken)
        told = events(post(f"{server.url}/v1/chat/completions", json={**ask, "stream": True}).content)
        assert told[-1]["error"]["code"] == "internal_error" and "[DONE]" not in told
        assert post(f"{server.url}/v1/chat/completions", json=ask).status_code == 200


def test_a_fault_of_a_route(monkeypatch, caplog):
    model = tiny_model()
    with served(model) as server:
        monkeypatch.setattr(model.prompter.__class__, "caption", lambda *_: 1 / 0)
        answer = post(f"{server.url}/v1/chat/completions", json={"model": "tiny", "messages": user(picture_part())})
        assert answer.status_code == 500 and answer.json()["error"]["code"] == "internal_error"
        assert "ZeroDivisionError" in caplog.text


def test_metrics_count(monkeypatch):
    model = tiny_model()
    with served(model) as server:
        ask = {"model": "tiny", "messages": user(picture_part()), "max_tokens": 3}
        for _ in range(2):
            post(f"{server.url}/v1/chat/completions", json=ask).raise_for_status()
        post(f"{server.url}/v1/chat/completions", json={})
        get(f"{server.url}/v1/wherever/1")
        route = 'route="/v1/chat/completions"'
        assert counted(server, f'mmllm_requests_total{{{route},status="200"}}') == 2
        assert counted(server, f'mmllm_requests_total{{{route},status="400"}}') == 1
        assert counted(server, 'mmllm_requests_total{route="other",status="404"}') == 1
        assert counted(server, 'mmllm_time_to_first_token_seconds_count{model="tiny"}') == 2
        assert counted(server, 'mmllm_generated_tokens_total{model="tiny"}') == 6
        prompt = counted(server, 'mmllm_prompt_tokens_total{model="tiny"}')
        assert counted(server, 'mmllm_cached_tokens_total{model="tiny"}') == prompt / 2  # the second one's
        assert counted(server, 'mmllm_rows_running{model="tiny"}') == 0
        assert counted(server, "process_resident_memory_bytes") > 10**7


def test_a_drain_lets_running_requests_end():
    model = slow(tiny_model())
    with (
        served(model) as server,
        httpx.Client(verify=False, base_url=server.url) as http,
        stream(server, max_tokens=60) as answer,
    ):
        pieces = answer.iter_bytes()
        first = next(pieces)
        assert http.get("/health").json() == {"status": "ok"}
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        wait_for(lambda: http.get("/health").status_code == 503)
        assert http.get("/health").json() == {"status": "draining"}
        refused = http.post("/v1/completions", json={**LONG, "max_tokens": 1})
        assert refused.status_code == 503 and refused.json()["error"]["code"] == "draining"
        told = events(first + b"".join(pieces))
        assert told[-1] == "[DONE]" and told[-2]["choices"][0]["finish_reason"] == "length"
        stopping.join(5)
        assert not stopping.is_alive()
        with pytest.raises(httpx.ConnectError):
            get(f"{server.url}/health")


def test_a_drain_ends_what_takes_too_long():
    model = slow(tiny_model())
    with served(model, drain_seconds=0.3) as server, ThreadPoolExecutor(1) as pool, stream(server) as answer:
        whole = pool.submit(post, f"{server.url}/v1/completions", json=LONG, timeout=30)
        wait_for(lambda: model.engine.num_running == 2)
        started = time.monotonic()
        server.stop()
        assert 0.3 <= time.monotonic() - started < 3
        told = events(answer.read())
        assert told[-1]["error"]["code"] == "draining" and whole.result().status_code == 503
        assert model.engine.num_running == 0


def test_answers_on_a_kept_connection_come_at_once():
    """Without Nagle's algorithm: an answer's body doesn't wait for the client to acknowledge its head (40 ms)."""
    with served() as server, client_at(server) as http:
        seconds = []
        for _ in range(40):
            started = time.monotonic()
            http.get("/v1/models").raise_for_status()
            seconds.append(time.monotonic() - started)
    assert sorted(seconds)[20] < 0.03


def test_streams_wait_for_a_client_that_reads_slowly():
    model = tiny_model()
    with served(model) as server, stream(server, max_tokens=200, temperature=1) as answer:
        data = b""
        for piece in answer.iter_raw(1024):
            data += piece
            time.sleep(0.01)
        assert events(data)[-1] == "[DONE]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    model = tiny_model()
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, model.model, model.tokenizer, generation=model.generation)
    return str(path)


def started(folder: str, *more: str) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "mmllm.cli", "serve", "--model", folder, "--port", "0", *more]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.search(r"(http://127\.0\.0\.1:\d+)/v1", line)
    assert found is not None, line + process.stderr.read()
    return process, found[1]


def test_the_command_serves_and_drains(folder, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("# ours\nkey-of-a-client\n\nkey-of-another\n")
    process, url = started(folder, "--api_key_file", str(keys), "--max_queue", "3")
    try:
        with OpenAI(base_url=f"{url}/v1", api_key="key-of-another") as client:
            assert client.models.list().data[0].id == "tiny"
            chunks = client.completions.create(**{**LONG, "max_tokens": 600}, stream=True)
            next(iter(chunks))
            process.send_signal(signal.SIGTERM)
            last = list(chunks)[-1]
            assert last.choices[0].finish_reason == "length"
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.kill()
        out, err = process.communicate()
    assert "stopping" in out and "stopped" in out and err == ""


@pytest.mark.proof
def test_a_second_signal_ends_it_at_once(folder):
    process, url = started(folder)
    try:
        body = {**LONG, "max_tokens": 4096, "n": 16, "temperature": 1, "stream": True}
        with streamed("POST", f"{url}/v1/completions", json=body, timeout=30) as answer:
            pieces = answer.iter_bytes()
            data = next(pieces)
            process.send_signal(signal.SIGINT)
            assert process.stdout is not None and "streams up to" in process.stdout.readline()
            assert "stopping" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            data += b"".join(pieces)
        assert events(data)[-1]["error"]["code"] == "draining"
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.proof
def test_a_server_that_is_killed_in_flight(folder):
    """Its clients see a connection that ends; another server at the same port answers."""
    process, url = started(folder)
    try:
        with streamed("POST", f"{url}/v1/completions", json={**LONG, "max_tokens": 4000, "stream": True}) as answer:
            pieces = answer.iter_bytes()
            next(pieces)
            os.kill(process.pid, signal.SIGKILL)
            with pytest.raises(httpx.RemoteProtocolError):
                list(pieces)
    finally:
        process.wait()
        process.communicate()
    again, other = started(folder, "--port", url.rpartition(":")[2])
    try:
        assert other == url and get(f"{url}/health").status_code == 200
    finally:
        again.terminate()
        assert again.wait(10) == 0
        again.communicate()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model", "nowhere"], "no such model folder"),
        (["--model", "{folder}", "--port", "70000"], "--port is 70000"),
        (["--model", "{folder}", "--api_key_file", "nowhere"], "no such file of keys"),
        (["--model", "{folder}", "--cors", "example.org"], "cors origin"),
        (["--model", "{folder}", "--model", "{folder}"], "name"),
        (["--model", "{folder}", "--adapter", "nobody"], "nobody"),
        (["--model", "{folder}", "--drain_seconds", "-1"], "drain_seconds"),
        (["--model", "a={folder}", "--model", "b={folder}", "--adapter", "x"], "--adapter"),
    ],
)
def test_wrong_options(folder, capsys, options, said):
    assert main(["serve", *(option.format(folder=folder) for option in options)]) == 2
    assert said in capsys.readouterr().err


def test_a_port_that_is_taken(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["serve", "--model", folder, "--port", str(taken.getsockname()[1])]) == 2
    assert "can't listen at 127.0.0.1" in capsys.readouterr().err


def test_events_are_json():
    assert event({"text": "ä\n\n\u2028"}).count(b"\n") == 2
    assert json.loads(event({"text": "ä\n"}).removeprefix(b"data: ")) == {"text": "ä\n"}


def test_rows_of_a_loop_that_has_ended():
    """Updates that come when nobody listens any more do nothing."""
    model = slow(tiny_model())
    request = TextRequest(model.prompter.continuation(["a"]), max_new_tokens=200)

    async def begin(thread: EngineThread, pool: ThreadPoolExecutor) -> None:
        async with running(thread, pool, [request]) as rows:
            async for _ in rows.updates():
                return

    with EngineThread(model.engine) as thread, ThreadPoolExecutor(2) as pool:
        asyncio.run(begin(thread, pool))
        wait_for(lambda: model.engine.num_running == 0)
    assert model.engine.counts.cancelled == 1


def test_how_many_sounds_are_streamed_is_found_out(monkeypatch):
    one = ServedModel("tiny", tiny_model(), ServeConfig())
    for factor, most in ((0.069, 10), (0.001, one.engine.config.max_rows), (5.0, 4)):
        monkeypatch.setattr(run, "_real_time_factor", lambda _, factor=factor: factor)
        run.warm_up(one)
        assert one.speaking.max_running == most
    monkeypatch.undo()
    run.warm_up(one)
    assert one.speaking.max_running >= 4
    given = ServedModel("tiny", one.model, ServeConfig(max_speaking=3))
    run.warm_up(given)
    assert given.speaking.max_running == 3


def test_streams_that_come_too_late_let_no_other_in(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    one = ServedModel("tiny", tiny_model(), ServeConfig(max_speaking=3))
    with one.streaming() as clock:
        now[0] += 50  # nothing was heard yet
        clock.add(0.2)
        now[0] += 10  # the client reads slowly
        clock.wait()
        now[0] += 0.24
        with one.streaming():
            pass
        now[0] += 0.02
        with pytest.raises(ApiError, match="slower than they are listened to") as caught, one.streaming():
            pytest.fail("it was let in")
        assert caught.value.status == 429 and "Retry-After" in caught.value.headers
        clock.add(0.5)
        clock.wait()
        now[0] += 0.4
        with one.streaming():
            pass
        now[0] += 0.4
    assert clock.is_late
    with one.streaming():  # the late one is over
        pass
    assert one.speaking.max_running == 3  # as it was given


def test_how_many_sounds_are_streamed_is_learnt(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(limits.time, "monotonic", lambda: now[0])
    one = ServedModel("tiny", tiny_model(), ServeConfig())
    one.speaking.max_running = 2

    def stream(count: int, seconds: float = 0.0) -> int:
        """So many at once, between whose pieces so much time passes; how many are let in then."""
        with ExitStack() as stack:
            clocks = []
            for _ in range(count):
                with suppress(ApiError):
                    clocks.append(stack.enter_context(one.streaming()))
            for clock in clocks:
                clock.add(0.1)
                clock.wait()
            now[0] += seconds
            for clock in clocks:
                clock.add(0.1)
        return one.speaking.max_running

    assert stream(2) == 2
    assert stream(3) == 4  # two came in time, while one was refused
    assert stream(9) == 8
    assert stream(8, 0.14) == 8  # a gap that isn't heard
    assert stream(8, 0.16) == 7 == stream(6)
    assert stream(2, 1.0) == 1 == stream(1, 1.0)
    assert stream(2) == 2


@pytest.mark.parametrize("speed", [1.3, 1.5, 1.9, 2.1, 4.0, 20.0])
def test_a_stream_begins_when_the_next_pieces_will_be_there(speed):
    """Pieces as they grow, made at a speed: whoever listens from the first that is sent on hears no gap."""
    rate, frame, sent, began = 50.0, 0, 0.0, None
    while frame < 1000:
        frame = next_border(frame)
        seconds, time_made = frame / rate, frame / rate / speed
        if began is None and may_begin(speed, seconds):
            began = time_made
        elif began is not None:
            assert time_made - began <= sent + 0.1, frame  # what is over the bound of 0.1 s is a gap
        sent = seconds
    assert began is not None and began <= (0.07 if speed > 2 else 0.5)
