"""The page on which a person compares candidates: what it serves and refuses, and as it is used in a browser."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmllm.evaluation.preferences.candidates import Candidate, CandidateRow, read_candidates
from mmllm.evaluation.preferences.labels import Comparison, labels_path, questions, read_labels

testclient = pytest.importorskip("fastapi.testclient", reason="the page needs fastapi: pip install 'mmllm[serve]'")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WAIT = 20_000
"""Milliseconds, at most."""
JSON = {"content-type": "application/json"}
LONG = "a large crescent " * 12 + "w" * 90


def write_candidates(folder: Path) -> Path:
    """Captions of two pictures, a text that would be markup, a conversation, and speech."""
    lines = []
    for number, pair in enumerate([("a red square", LONG), ("<b>bold</b>", "a blue circle")]):
        pixels = np.full((64, 96, 3), (200, 60 * number, 40), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        prompt = [{"role": "user", "content": [{"type": "image", "image": f"{number}.png"}]}]
        candidates = tuple(Candidate(text, 4) for text in pair)
        lines.append(CandidateRow(f"picture {number}", "caption", prompt, candidates, {}).to_line())
    for name in ("a", "b"):
        soundfile.write(folder / f"{name}.wav", np.sin(np.arange(4000) / (9 if name == "a" else 14)) * 0.2, 8000)
    spoken = tuple(Candidate("two squares", 9, codes=f"{name}.npz", sound=f"{name}.wav") for name in ("a", "b"))
    prompt = [{"role": "user", "content": "two squares"}]
    lines.append(CandidateRow("spoken", "speak", prompt, spoken, {}).to_line())
    talk = [
        {"role": "system", "content": "be short"}, {"role": "user", "content": "which?"},
        {"role": "assistant", "content": "this"}, {"role": "user", "content": "why?"},
    ]  # fmt: skip
    lines.append(CandidateRow("talk", "chat", talk, (Candidate("so", 2), Candidate("because", 2)), {}).to_line())
    path = folder / "c.jsonl"
    path.write_text("".join(lines))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_candidates(tmp_path)


def client_of(file: Path) -> Any:
    from mmllm.serving.prefer_page import Labelling, prefer_app

    rows = read_candidates(file)
    labelling = Labelling(questions(rows, 1), file.parent, labels_path(file))
    return testclient.TestClient(prefer_app(labelling))


def choices(file: Path) -> list[tuple[int, str]]:
    labels = read_labels(labels_path(file), read_candidates(file))
    return [(label.place, label.choice) for label in labels if isinstance(label, Comparison)]


def shown_texts(question: dict[str, Any]) -> list[Any]:
    return [answer[0].get("text") for answer in question["answers"]]


# ---- without a browser


def test_a_choice_is_saved_before_the_next_pair_and_of_what_was_shown(file: Path) -> None:
    client = client_of(file)
    state = client.get("/state").json()
    assert (state["done"], state["total"]) == (0, 4)
    texts = shown_texts(state["question"])
    assert set(texts) == {"a red square", LONG}
    wanted = "first" if texts[0] == "a red square" else "second"
    state = client.post("/choice", json={"key": state["question"]["key"], "choice": "1"}).json()
    assert state["done"] == 1 and choices(file) == [(0, wanted)]
    for _ in range(3):
        state = client.post("/choice", json={"key": state["question"]["key"], "choice": "tie"}).json()
    assert state["question"] is None and state["done"] == 4


def test_both_sides_of_swapped_pairs_are_told_apart(file: Path) -> None:
    """Whichever side is shown first, the label is of the candidate that was clicked."""
    from mmllm.serving.prefer_page import Labelling

    rows = read_candidates(file)
    seen = set()
    for seed in range(8):
        out = file.parent / f"l{seed}.jsonl"
        labelling = Labelling(questions(rows, 1, seed), file.parent, out)
        question = labelling.state()["question"]
        seen.add(labelling.asked[question["key"]].is_swapped)
        place = shown_texts(question).index("a red square") + 1
        labelling.choose(question["key"], str(place))
        (label,) = read_labels(out, rows)
        assert isinstance(label, Comparison) and label.choice == "first"
    assert seen == {True, False}


def test_it_goes_on_after_a_restart_and_back_labels_anew(file: Path) -> None:
    client = client_of(file)
    for choice in ("1", "skip"):
        key = client.get("/state").json()["question"]["key"]
        client.post("/choice", json={"key": key, "choice": choice})
    client = client_of(file)
    state = client.get("/state").json()
    assert state["done"] == 2 and state["question"]["key"] == 2
    state = client.post("/back", json={}).json()
    assert state["question"]["key"] == 1
    client.post("/choice", json={"key": 1, "choice": "tie"})
    assert dict(choices(file))[1] == "tie" and len(choices(file)) == 2, "the last label counts"


def test_it_serves_what_the_rows_name_and_takes_answers_from_itself(file: Path) -> None:
    client = client_of(file)
    (file.parent / "secret.txt").write_text("secret")
    shown = client.get("/file/0").headers
    assert shown["content-type"] == "image/png" and "sandbox" in shown["content-security-policy"]
    for path in ("/file/9", "/file/-1", "/file/../secret.txt", "/file/%2e%2e%2fsecret.txt", "/docs", "/openapi.json"):
        assert client.get(path).status_code in (404, 422), path
    good = {"key": 0, "choice": "1"}
    assert client.post("/choice", content=json.dumps(good), headers={"content-type": "text/plain"}).status_code == 415
    other = {**JSON, "origin": "http://evil.invalid"}
    assert client.post("/choice", content=json.dumps(good), headers=other).status_code == 403
    assert client.get("/state", headers={"host": "evil.invalid"}).status_code == 400
    for bad in ({"key": 99, "choice": "1"}, {"key": True, "choice": "1"}, {"key": 0, "choice": "3"}, [1]):
        assert client.post("/choice", json=bad).status_code == 422
    assert client.post("/choice", content=b"{", headers=JSON).status_code == 422
    assert client.post("/choice", content=b" " * 5000, headers=JSON).status_code == 413
    assert not labels_path(file).exists()
    assert "default-src 'self'" in client.get("/").headers["content-security-policy"]


# ---- the browser


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    file = write_candidates(tmp_path_factory.mktemp("prefer"))
    line = [sys.executable, "-m", "mmllm.cli", "prefer", "label", str(file), "--by_hand", "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        assert select.select([server.stdout], [], [], 120)[0], "the page did not start in two minutes"
        said = server.stdout.readline()
        found = re.match(r"(http://127\.0\.0\.1:\d+) shows 4 pairs", said)
        assert found is not None, said
        yield found[1], file
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
    finally:
        server.kill()
        server.communicate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    library = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    with library.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_a_person_labels_by_clicks_and_keys_at_any_width(browser: Any, served: tuple[str, Path]) -> None:
    url, file = served
    context = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme="dark")
    page, errors, asked = context.new_page(), [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    keep = os.environ.get("SCREENSHOTS")

    def count(text: str) -> None:
        page.locator("#count", has_text=re.compile(f"^{text}$")).wait_for(timeout=WAIT)
        assert page.evaluate("document.documentElement.scrollWidth") <= page.viewport_size["width"]
        if keep:
            page.wait_for_timeout(200)
            page.screenshot(path=f"{keep}/{page.viewport_size['width']}-{text[0]}.png", full_page=True)

    def until(condition: str) -> None:
        """As `page.wait_for_function`, which the page's content policy forbids."""
        deadline = time.monotonic() + WAIT / 1000
        while not page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            page.wait_for_timeout(50)

    page.goto(url)
    count("0 of 4")
    until("document.querySelector('#prompt img').naturalWidth === 96")
    page.locator("[data-choice='1']").click()
    count("1 of 4")
    assert page.locator("#answers b").count() == 0, "text is no markup"
    page.keyboard.press("2")
    count("2 of 4")
    until("[...document.querySelectorAll('#answers audio')].every((sound) => sound.duration > 0.4)")
    page.keyboard.press("b")
    count("1 of 4")
    page.keyboard.press("t")
    count("2 of 4")
    page.set_viewport_size({"width": 1280, "height": 800})
    page.reload()
    count("2 of 4")
    page.keyboard.press("s")
    count("3 of 4")
    assert page.locator("#prompt .role").all_text_contents() == ["system", "user", "assistant", "user"]
    page.keyboard.press("1")
    count("4 of 4")
    assert "All pairs are labelled" in page.locator("#prompt").text_content()
    assert not page.locator("#answers").is_visible() and page.locator("[data-choice='tie']").is_disabled()
    assert [choice for _, choice in choices(file)][1:3] == ["tie", "skip"] and len(choices(file)) == 4
    assert not errors and [address for address in asked if not address.startswith(url)] == []
    context.close()
