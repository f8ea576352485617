"""`mmllm ui` as it is used and misused: one server, a headless Chromium, and requests that no browser would send."""

from __future__ import annotations

import http.client
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import soundfile
from PIL import Image

from mmllm.checkpoints.folder import save_model
from mmllm.inference.api import load
from tests.inference_fixtures import RATE, images
from tests.test_page import babble, wordy

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'mmllm[ui]'")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, PHONE = (1280, 900), (390, 844)
WAIT = 30_000
"""Milliseconds, at most."""


# ---- the server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, a picture and a sound."""
    folder = tmp_path_factory.mktemp("page")
    model = wordy()
    save_model(folder / "model", model.model, model.tokenizer, generation=model.generation)
    Image.fromarray(images(1)[0]).save(folder / "a.png")
    soundfile.write(folder / "a.wav", babble(), RATE)
    return folder


def environment(folder: Path) -> dict[str, str]:
    """Of processes that are started here: what they leave behind is in the folder."""
    more = {"OMP_NUM_THREADS": "1", "TMPDIR": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)}
    return {**os.environ, **more}


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    line = [sys.executable, "-m", "mmllm.cli", "ui", "--model", "model", "--compare", "model", "--port", "0"]
    server = subprocess.Popen(line, cwd=folder, env=environment(folder), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert select.select([server.stdout], [], [], 120)[0], "the page did not start in two minutes"
        said = server.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+) shows the page", said)
        assert found is not None, said
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert not list(folder.glob("mmllm-ui-*")), "its uploads are gone with it"
    finally:
        server.kill()
        server.communicate()


def fetch(
    url: str, method: str, path: str, body: bytes = b"", headers: dict[str, str] | None = None
) -> tuple[int, str, dict[str, str]]:
    """A request as it stands: no client in between tidies its path."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    try:
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace"), dict(answer.getheaders())
    finally:
        connection.close()


def upload(url: str, path: Path) -> str:
    """Where the server keeps a file that was sent to it."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{boundary}--\r\n".encode()
    kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
    status, said, _ = fetch(url, "POST", "/gradio_api/upload", body, kind)
    assert status == 200, said
    return json.loads(said)[0]


def config_of(url: str) -> dict[str, Any]:
    """What the page says of its parts."""
    return json.loads(fetch(url, "GET", "/config")[1])


def caption_event(url: str) -> tuple[int, int]:
    """The number of the function that captions, and of what starts it."""
    config = config_of(url)
    (image,) = [each["id"] for each in config["components"] if each["props"].get("elem_id") == "caption-picture"]
    (event,) = [each for each in config["dependencies"] if each["inputs"] == [image]]
    return event["id"], image


def ask_for_caption(url: str, path: str) -> tuple[int, str]:
    """Asks for a file's caption as the page would; status, and what came."""
    event, image = caption_event(url)
    session = uuid.uuid4().hex[:10]
    request = {
        "data": [{"path": path, "meta": {"_type": "gradio.FileData"}}], "event_data": None, "fn_index": event,
        "trigger_id": image, "session_hash": session,
    }  # fmt: skip
    kind = {"content-type": "application/json"}
    status, said, _ = fetch(url, "POST", "/gradio_api/queue/join", json.dumps(request).encode(), kind)
    if status != 200:
        return status, said
    return status, fetch(url, "GET", f"/gradio_api/queue/data?session_hash={session}")[1]


def test_a_picture_is_captioned_without_a_browser(url: str, folder: Path) -> None:
    kept = upload(url, folder / "a.png")
    assert Path(kept).is_relative_to(folder), "in a folder of its own"
    status, said = ask_for_caption(url, kept)
    caption = load(folder / "model", "cpu").caption(folder / "a.png")
    assert status == 200 and json.dumps(str(caption)) in said


def test_no_file_of_the_machine_is_served_or_read(url: str, folder: Path) -> None:
    model_file = str(folder / "model" / "config.json")
    kept = upload(url, folder / "a.png")
    assert fetch(url, "GET", f"/gradio_api/file={kept}")[0] == 200
    for path in (
        "/etc/passwd", "%2Fetc%2Fpasswd", "/etc/../etc/passwd", model_file, f"{kept}/../../../model/config.json",
        "../model/config.json", "model/config.json", "/proc/self/environ", "http://127.0.0.1:1/", "file:///etc/passwd",
    ):  # fmt: skip
        for route in ("/gradio_api/file=", "/gradio_api/file/", "/file=", "/gradio_api/proxy=", "/static/", "/assets/"):
            status, said, _ = fetch(url, "GET", route + path)
            assert status in (400, 403, 404), (route, path, said[:200])
            assert "root:" not in said and "format_version" not in said
    for path in (model_file, "/etc/passwd", "http://127.0.0.1:1/a.png", "https://192.0.2.1/a.png", f"{kept}/../../x"):
        status, said = ask_for_caption(url, path)
        assert status == 400 and "not uploaded here" in said


@pytest.mark.proof
def test_gradio_itself_refuses_files_too(folder: Path) -> None:
    """Were our routes open, what Gradio checks by itself must be on: it isn't where an application is only mounted."""
    program = """
from mmllm.inference.api import load
from mmllm.serving.page import page_app, page_folder
from mmllm.serving.page_answers import Asker, SharedModel
with page_folder() as own:
    app = page_app([Asker("tiny", SharedModel(load("model", "cpu")))], own, "127.0.0.1")
    blocks = app._app.routes[-1].app.get_blocks()
    assert blocks.has_launched and blocks.max_file_size and blocks.allowed_paths == []
    assert not (blocks.analytics_enabled or blocks.run_history or blocks.share or blocks.mcp_server)
"""
    subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment(folder), check=True, timeout=120)


def test_the_page_is_closed(url: str) -> None:
    status, page, headers = fetch(url, "GET", "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    tags = re.findall(r"<(?:script|link|img|meta|iframe)\b[^>]*>", page)
    assert tags and not [tag for tag in tags if re.search(r"https?://", tag)]
    assert "fonts.googleapis" not in page and "cdnjs" not in page
    assert all(not event["api_visibility"].startswith("public") for event in config_of(url)["dependencies"])
    for path in ("/gradio_api/info", "/gradio_api/call/x", "/gradio_api/vibe-code", "/gradio_api/mcp/", "/docs"):
        assert fetch(url, "GET", path)[0] == 404
    assert fetch(url, "GET", "/", headers={"Host": "evil.example"})[0] == 403
    assert fetch(url, "POST", "/gradio_api/upload", b"", {"Origin": "http://evil.example"})[0] == 403


def test_what_is_no_picture_is_refused_by_a_sentence(url: str, folder: Path) -> None:
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:60])
    status, said = ask_for_caption(url, upload(url, folder / "b.png"))
    messages = [json.loads(line[6:]) for line in said.splitlines() if line.startswith("data: ")]
    (told,) = [each["log"] for each in messages if each["msg"] == "log"]
    assert status == 200 and "b.png" in told and str(folder) not in said
    assert [each["success"] for each in messages if each["msg"] == "process_completed"] == [True]


def test_uploads_are_bounded(url: str) -> None:
    assert fetch(url, "POST", "/gradio_api/upload", bytes(33 * 2**20), {"content-type": "text/plain"})[0] == 413


# ---- the browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with library.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--autoplay-policy=no-user-gesture-required"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Shown:
    """The page in a window, and what it asked for."""

    def __init__(self, browser: Any, url: str, size: tuple[int, int], scheme: str = "light") -> None:
        self.context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        self.page = self.context.new_page()
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.url, self.width = url, size[0]
        self.page.goto(url)
        self.page.wait_for_selector("#caption-picture", timeout=WAIT)

    def tab(self, name: str) -> None:
        """Opens a tab; narrow windows have the last ones in a menu."""
        tab = self.page.get_by_role("tab", name=name, exact=True)
        if tab.count() and tab.first.is_visible():
            tab.first.click()
        else:
            self.page.locator(".overflow-menu button").first.click()
            self.page.locator(".overflow-dropdown button", has_text=name).click()

    def send(self, where: str, path: Path) -> None:
        """Chooses a file, as a click on the field and in the dialogue does."""
        field = self.page.locator(f"{where} input[type=file]").first
        field.wait_for(state="attached", timeout=WAIT)
        field.set_input_files(str(path))

    def check(self) -> None:
        """Nothing runs out of the window, failed, or was fetched from elsewhere."""
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        assert not self.errors
        own = (self.url, "data:", "blob:")
        assert [address for address in self.asked if not address.startswith(own)] == []


@pytest.fixture(scope="module")
def wide(browser: Any, url: str) -> Iterator[Shown]:
    shown = Shown(browser, url, WIDE)
    yield shown
    shown.context.close()


def see_caption(shown: Shown, folder: Path) -> None:
    """Upload → caption, and how it came about."""
    page, model = shown.page, load(folder / "model", "cpu")
    shown.send("#caption-picture", folder / "a.png")
    page.wait_for_function("document.querySelector('#caption-text textarea').value !== ''", timeout=WAIT)
    caption = model.caption(folder / "a.png")
    assert page.locator("#caption-text textarea").input_value().strip() == str(caption).strip()
    page.locator("#look").click()
    page.wait_for_selector(".mm-tokens button", timeout=WAIT)
    assert page.locator(".mm-tokens button").count() == len(caption.ids) + (caption.finish_reason == "stop")
    before = page.locator(".mm-heat").first.get_attribute("src")
    for word in page.locator(".mm-looks button").all():
        word.click()
        assert page.locator(".mm-heat").first.get_attribute("src") == word.get_attribute("data-heat")
        assert word.get_attribute("aria-pressed") == "true"
    assert before.startswith("data:image/png")
    page.locator(".mm-tokens button").first.click()
    assert "most probable" in page.locator(".mm-part .mm-info").first.inner_text()
    assert page.locator(".mm-map").count() == 2
    shown.check()


def see_transcript(shown: Shown, folder: Path) -> None:
    """Sound → transcript, whose words light up one after the other."""
    page, model = shown.page, load(folder / "model", "cpu")
    shown.tab("Transcribe")
    shown.send("#heard-sound", folder / "a.wav")
    page.wait_for_selector("#heard-text .mm-said", timeout=WAIT)
    transcript = model.transcribe(folder / "a.wav", timestamps=True)
    plain = page.locator("#heard-text .mm-said").inner_text().split()
    assert plain and plain == transcript.text.split()
    words = page.locator("#heard-text .mm-said span[data-start]")
    assert words.count() == len(transcript.words or ()) > 0
    page.wait_for_function("document.querySelector('#heard-text audio').readyState >= 1", timeout=WAIT)
    for number, word in enumerate(transcript.words or ()):
        middle = (word.start + word.end) / 2
        page.evaluate(f"document.querySelector('#heard-text audio').currentTime = {middle}")
        page.wait_for_function(
            f"document.querySelectorAll('#heard-text .mm-said span')[{number}].classList.contains('mm-lit')",
            timeout=WAIT,
        )
        assert page.locator("#heard-text .mm-lit").count() == 1
    shown.check()


def hear_speech(shown: Shown) -> None:
    """Text → sound, a whole one of each sentence, played one after the other."""
    page = shown.page
    shown.tab("Speak")
    page.locator("#say-text textarea").fill("One two. Three!")
    page.locator("#say").click()
    page.wait_for_function("document.querySelectorAll('.mm-sentence audio').length === 2", timeout=WAIT)
    page.wait_for_function(
        "[...document.querySelectorAll('.mm-sentence audio')].every((audio) => audio.duration > 0)", timeout=WAIT
    )
    said = [each.inner_text().split() for each in page.locator(".mm-sentence .mm-said").all()]
    assert said == [["One", "two."], ["Three!"]]
    page.wait_for_function(
        "[...document.querySelectorAll('.mm-sentence audio')].every((audio) => audio.ended)", timeout=WAIT
    )
    page.wait_for_selector("#said-whole", timeout=WAIT)
    page.locator("#look").click()
    page.wait_for_function("document.querySelectorAll('#trace .mm-tokens button').length === 3", timeout=WAIT)
    shown.check()


def talk(shown: Shown, folder: Path) -> None:
    """A picture with a question, a text that is spoken, and a message that no task answers."""
    page, model = shown.page, load(folder / "model", "cpu")
    shown.tab("Chat")
    field = page.locator("#chat-message textarea")
    shown.send("#chat-message", folder / "a.png")
    page.wait_for_selector("#chat-message .thumbnail-item", timeout=WAIT)
    field.fill("which colour?")
    field.press("Enter")
    page.wait_for_selector("#chat .bot.message", timeout=WAIT)
    answer = str(model.answer([folder / "a.png"], "which colour?")).split()
    assert page.locator("#chat .bot.message").first.inner_text().split() == answer
    is_sent = "document.querySelector('#chat-message textarea').value === ''"
    page.wait_for_function(is_sent, timeout=WAIT)
    field.fill("One two.")
    field.press("Enter")
    page.wait_for_function("document.querySelectorAll('#chat .bot.message').length === 2", timeout=WAIT)
    page.wait_for_function(is_sent, timeout=WAIT)
    field.fill("a" * 1200)
    field.press("Enter")
    page.wait_for_selector("text=give at most 1000", timeout=WAIT)
    assert field.input_value() == "a" * 1200, "what was written stays"
    shown.check()


def test_upload_gives_a_caption_and_how_it_came_about(wide: Shown, folder: Path) -> None:
    see_caption(wide, folder)


def test_a_sound_gives_a_transcript_whose_words_light_up(wide: Shown, folder: Path) -> None:
    see_transcript(wide, folder)


def test_a_text_gives_sound(wide: Shown) -> None:
    hear_speech(wide)


def test_messages_are_answered(wide: Shown, folder: Path) -> None:
    talk(wide, folder)


def test_two_models_answer_side_by_side(wide: Shown, folder: Path) -> None:
    wide.tab("Compare")
    wide.send("#compare-picture", folder / "a.png")
    wide.page.wait_for_selector("#compare-picture img", timeout=WAIT)
    wide.page.locator("#compare").click()
    wide.page.wait_for_function("document.querySelector('#compared-1 textarea').value !== ''", timeout=WAIT)
    caption = str(load(folder / "model", "cpu").caption(folder / "a.png")).strip()
    for number in (0, 1):
        assert wide.page.locator(f"#compared-{number} textarea").input_value().strip() == caption
    wide.check()


@pytest.mark.proof
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_of_it_works_on_a_phone(browser: Any, url: str, folder: Path, scheme: str) -> None:
    shown = Shown(browser, url, PHONE, scheme)
    try:
        see_caption(shown, folder)
        see_transcript(shown, folder)
        hear_speech(shown)
        talk(shown, folder)
        for field in ("#chat-message textarea", "#chat"):
            box = shown.page.locator(field).bounding_box()
            assert box["x"] >= 0 and box["x"] + box["width"] <= PHONE[0]
    finally:
        shown.context.close()


@pytest.mark.proof
def test_a_full_queue_is_told_of(url: str, folder: Path) -> None:
    """More questions at once than may wait: each is answered, or told that the queue is full."""
    event, image = caption_event(url)
    kept = upload(url, folder / "a.png")
    kind = {"content-type": "application/json"}
    told = []
    for number in range(60):
        request = {
            "data": [{"path": kept, "meta": {"_type": "gradio.FileData"}}], "event_data": None, "fn_index": event,
            "trigger_id": image, "session_hash": f"s{number:09d}",
        }  # fmt: skip
        status, said, _ = fetch(url, "POST", "/gradio_api/queue/join", json.dumps(request).encode(), kind)
        told.append(status)
        assert status in (200, 503), said
    assert set(told) == {200, 503}, told
    time.sleep(1)
    assert ask_for_caption(url, kept)[0] == 200, "and it goes on"
