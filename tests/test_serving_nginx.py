"""Two servers behind Debian's nginx, with the configuration of the guide: streams, drains, one that is killed."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from mmllm.checkpoints.folder import save_model
from mmllm.inference.engine.requests import EngineConfig
from mmllm.serving.config import ServeConfig
from mmllm.serving.run import Server
from tests.serving_fixtures import events, get, picture_part, served, slow, tiny_model, user

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/sbin")
GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "serve.md"
ASK = {"model": "tiny", "messages": user(picture_part()), "max_tokens": 8}
CHAT = "/v1/chat/completions"

pytestmark = pytest.mark.skipif(NGINX is None, reason="there is no nginx here (Debian: nginx-light)")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@pytest.fixture
def pair() -> Iterator[list[Server]]:
    with ExitStack() as stack:
        config = ServeConfig(max_queue=1)
        models = [slow(tiny_model(engine=EngineConfig(max_rows=1)), 0.01) for _ in range(2)]
        yield [stack.enter_context(served(model, config)) for model in models]


@contextmanager
def balanced(ports: list[int], folder: Path) -> Iterator[httpx.Client]:
    """A client of an nginx before servers at these ports, as the guide configures it."""
    (site,) = re.findall(r"```nginx\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    own = free_port()
    for number, port in zip((8001, 8002, 8000), (*ports, own), strict=True):
        assert f"127.0.0.1:{number}" in site
        site = site.replace(f"127.0.0.1:{number}", f"127.0.0.1:{port}")
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};" for kind in kinds)
    config, log = folder / "nginx.conf", folder / "error.log"
    config.write_text(
        f"daemon off; pid {folder}/pid; error_log {log}; worker_processes 1;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}\n{site}\n}}\n"
    )
    assert NGINX is not None
    process = subprocess.Popen([NGINX, "-c", str(config), "-e", str(log)])
    try:
        with httpx.Client(verify=False, base_url=f"http://127.0.0.1:{own}", timeout=30) as client:
            for _ in range(250):
                try:
                    client.get("/nginx-health").raise_for_status()
                    break
                except httpx.ConnectError:
                    time.sleep(0.02)
            yield client
    finally:
        process.terminate()
        process.wait(5)


@pytest.fixture
def http(pair, tmp_path) -> Iterator[httpx.Client]:
    with balanced([server.port for server in pair], tmp_path) as client:
        yield client


def test_both_are_asked_and_streams_come_through(pair, http):
    for _ in range(6):
        assert http.post(CHAT, json=ASK).status_code == 200
    with http.stream("POST", CHAT, json={**ASK, "stream": True}) as answer:
        pieces = list(answer.iter_raw())
    assert len(pieces) > 2 and events(b"".join(pieces))[-1] == "[DONE]"  # not kept back until the end
    for server in pair:
        text = get(f"{server.url}/metrics").text
        assert re.search(r'mmllm_requests_total{route="/v1/chat/completions",status="200"} [1-9]', text)


@contextmanager
def asking(http: httpx.Client) -> Iterator[list[int]]:
    """Clients that ask all the time; the statuses of their answers."""
    statuses: list[int] = []
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            statuses.append(http.post(CHAT, json=ASK).status_code)

    clients = [threading.Thread(target=ask) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        time.sleep(0.3)
        yield statuses
        num_before = len(statuses)
        time.sleep(0.5)
    finally:
        is_over.set()
        for client in clients:
            client.join()
    assert len(statuses) > num_before + 1, statuses


def test_no_request_fails_while_one_drains(pair, http):
    with asking(http) as statuses:
        pair[0].stop()
    assert set(statuses) == {200}
    assert get(f"{pair[1].url}/health").json() == {"status": "ok"}
    with pytest.raises(httpx.ConnectError):
        get(f"{pair[0].url}/health")


@pytest.mark.proof
def test_no_request_fails_when_one_is_killed(tmp_path):
    """Two processes as the guide starts them, of which one is killed: what it had begun is asked of the other."""
    model = tiny_model()
    save_model(tmp_path / "tiny", model.model, model.tokenizer, generation=model.generation)
    command = [sys.executable, "-m", "mmllm.cli", "serve", "--model", str(tmp_path / "tiny"), "--port", "0"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        lines = [process.stdout.readline() for process in processes if process.stdout is not None]
        ports = [int(re.findall(r":(\d+)/v1", line)[0]) for line in lines]
        with balanced(ports, tmp_path) as http, asking(http) as statuses:
            processes[0].kill()
        assert set(statuses) == {200}
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_one_that_is_full_has_the_other_asked(pair, http):
    """The bound of both is that of each twice; a 429 comes when both are full."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 2000, "logit_bias": {"1": -100}, "stream": True}
    with ExitStack() as stack:
        answers = [stack.enter_context(http.stream("POST", "/v1/completions", json=body)) for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200] * 4
        assert http.post("/v1/completions", json=body).status_code == 429
