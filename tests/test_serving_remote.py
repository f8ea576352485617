"""Files of other hosts: allowed by name, never at a private address, whatever redirects and names lead to."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mmllm.serving.errors import ApiError
from mmllm.serving.remote import RemoteFiles, is_public

CONTENT = b"\x89PNG" + bytes(range(256)) * 40


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        seen: list[str] = self.server.seen  # pyright: ignore[reportAttributeAccessIssue]
        seen.append(f"{self.headers['Host']}{self.path}")
        match self.path.partition("?")[0].split("/")[1]:
            case "file":
                self.answer(200, CONTENT)
            case "to":
                self.answer(302, b"", f"http://{self.path.removeprefix('/to/')}")
            case "missing":
                self.answer(404, b"")
            case "loop":
                self.answer(307, b"", "/loop")
            case "nowhere":
                self.answer(302, b"", "")
            case "slow":
                with contextlib.suppress(OSError):
                    self.send_response(200)
                    self.end_headers()
                    for _ in range(200):
                        self.wfile.write(b"x")
                        time.sleep(0.05)
            case "slow_head":
                with contextlib.suppress(OSError):
                    self.wfile.write(b"HTTP/1.0 200 OK\r\n")
                    for _ in range(200):
                        self.wfile.write(b"X-A: b\r\n")
                        time.sleep(0.05)

    def answer(self, status: int, body: bytes, location: str | None = None) -> None:
        self.send_response(status)
        if location is not None:
            self.send_header("Location", location)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def seen() -> Iterator[list[str]]:
    """What the other host is asked, which listens at the loopback's port 80."""
    try:
        server = ThreadingHTTPServer(("127.0.0.1", 80), Handler)
    except PermissionError:
        pytest.skip("port 80 is not for us")
    server.seen = []  # pyright: ignore[reportAttributeAccessIssue]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.seen  # pyright: ignore[reportAttributeAccessIssue]
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(url: str, resolve=None, is_allowed=None, hosts=("files.test",), seconds=5.0, max_bytes=10**6) -> bytes:
    """As from a host whose name leads to the loopback, which counts as public here."""
    resolve = resolve or (lambda host, port: ["127.0.0.1"])
    is_allowed = is_allowed or (lambda address: address == "127.0.0.1")
    return RemoteFiles(hosts, seconds, resolve, is_allowed).fetch(url, "here", max_bytes)


def refused(url: str, **settings) -> ApiError:
    with pytest.raises(ApiError) as caught:
        fetch(url, **settings)
    assert caught.value.status == 400 and caught.value.param == "here"
    return caught.value


def test_a_file_of_an_allowed_host(seen):
    assert fetch("http://files.test/file?a=b") == CONTENT
    assert fetch("HTTP://FILES.TEST./file") == CONTENT
    assert seen[0] == "files.test/file?a=b"


@pytest.mark.parametrize(
    "url",
    [
        "http://other.test/file", "http://files.test.other.test/file", "http://files.test@other.test/file",
        "http://user:pass@files.test/file", "http://files.test:8080/file", "http://files.test:99999/file", "http://[::1",
        "http://127.0.0.1/file", "http:///file", "https://", "http://files.test/a\r\nHost: other.test",
        "http://files.test/ä", "http://other.test#files.test/", "http://other.test\\@files.test/",
    ],
)  # fmt: skip
def test_other_addresses_are_refused_before_anybody_is_asked(seen, url):
    before = len(seen)
    resolved: list[str] = []
    refused(url, resolve=lambda host, port: resolved.append(host) or ["127.0.0.1"])
    assert len(seen) == before and not resolved


def test_nothing_is_fetched_where_no_host_is_allowed():
    assert "--allow_remote" in refused("http://files.test/file", hosts=()).message


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.1.2.3", "0.0.0.0", "10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.1.1",
        "169.254.169.254", "100.64.0.1", "192.0.0.8", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "::ffff:127.0.0.1",
        "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b:1::a9fe:a9fe", "2002:7f00:1::", "2002:a9fe:a9fe::1",
        "2001:0:7f00:1::", "2001:db8::1",
    ],
)  # fmt: skip
def test_private_addresses(seen, address):
    assert not is_public(address)
    before = len(seen)
    error = refused("http://files.test/file", resolve=lambda *_: [address], is_allowed=is_public)
    assert error.code == "remote_not_allowed" and len(seen) == before


@pytest.mark.parametrize("address", ["93.184.216.34", "8.8.8.8", "2606:4700:4700::1111", "64:ff9b::808:808"])
def test_public_addresses(address):
    assert is_public(address)


def test_one_private_address_among_others_is_enough(seen):
    before = len(seen)
    refused("http://files.test/file", resolve=lambda *_: ["127.0.0.1", "10.0.0.1"])
    assert len(seen) == before


def test_a_name_is_resolved_once_and_its_address_kept(seen, monkeypatch):
    """A name that leads to another address the next time (DNS rebinding) is connected to where it was looked at."""
    answers = iter([["127.0.0.1"]])
    connected = []
    connect = socket.create_connection

    def noted(address, *rest):
        connected.append(address)
        return connect(address, *rest)

    monkeypatch.setattr(socket, "create_connection", noted)
    look_up = socket.getaddrinfo

    def numbers_alone(host, *rest, **more):
        assert host == "127.0.0.1", "the name was resolved again"
        return look_up(host, *rest, **more)

    monkeypatch.setattr(socket, "getaddrinfo", numbers_alone)
    assert fetch("http://files.test/file", resolve=lambda *_: next(answers)) == CONTENT
    assert connected == [("127.0.0.1", 80)]


def test_redirects_begin_anew(seen):
    assert fetch("http://files.test/to/files.test/file") == CONTENT
    before = len(seen)
    error = refused("http://files.test/to/other.test/file")
    assert "other.test" in error.message and len(seen) == before + 1
    assert "127.0.0.1" in refused("http://files.test/to/127.0.0.1/file").message
    refused("http://files.test/to/169.254.169.254/latest/meta-data")


def test_a_redirect_whose_name_has_become_private(seen):
    answers = iter([["127.0.0.1"], ["10.0.0.1"]])
    before = len(seen)
    error = refused("http://files.test/to/files.test/file", resolve=lambda *_: next(answers))
    assert error.code == "remote_not_allowed" and len(seen) == before + 1


def test_redirects_end(seen):
    assert "redirects" in refused("http://files.test/loop").message
    assert "redirects" in refused("http://files.test/nowhere").message


def test_what_isnt_there(seen):
    assert "answered 404" in refused("http://files.test/missing").message
    assert "can't be read" in refused("https://files.test/file").message  # nothing speaks TLS there

    def unknown(host, port):
        raise socket.gaierror(-2, "Name or service not known")

    assert "Name or service" in refused("http://files.test/file", resolve=unknown).message


def test_large_files(seen):
    assert fetch("http://files.test/file", max_bytes=len(CONTENT)) == CONTENT
    assert refused("http://files.test/file", max_bytes=len(CONTENT) - 1).code == "remote_too_large"


@pytest.mark.parametrize("path", ["slow", "slow_head"])
def test_slow_files(seen, path):
    started = time.monotonic()
    refused(f"http://files.test/{path}", seconds=0.4)
    assert time.monotonic() - started < 2
