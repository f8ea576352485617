"""A page on which a person says which of two candidates is better; each answer is saved before the next is shown.

It listens on this machine alone, serves no file but those that the rows name, and takes answers from itself alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mmllm.evaluation.preferences.candidates import Candidate
from mmllm.evaluation.preferences.labels import HAND, Choice, Comparison, Question, append_labels, read_labels
from mmllm.serving.page_run import listen, wait_for
from mmllm.serving.run import told_to_stop

HOST = "127.0.0.1"
_PAGE = Path(__file__).parent / "prefer_page.html"
_CHOICES = ("1", "2", "tie", "skip")
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
}
_FILE_HEADERS = {"Content-Security-Policy": "default-src 'none'; sandbox"}
"""A picture may be SVG, which would run scripts here where it is opened alone."""
_MOST_BYTES = 4096
"""Of an answer."""


class Labelling:
    """Which pairs are labelled by hand, and which is next.

    Args:
        asked: all pairs, in the order in which they are shown.
        folder: in which the file of candidates lies.
        out: the file of labels.
    """

    def __init__(self, asked: Sequence[Question], folder: Path, out: Path) -> None:
        self.asked, self.folder, self._out = list(asked), folder, out
        self._lock = threading.Lock()
        rows = list({question.row.place: question.row for question in asked}.values())
        labels = [one for one in read_labels(out, rows) if isinstance(one, Comparison) and one.by == HAND]
        known = {(label.place, label.first, label.second) for label in labels}
        self._done = [place for place, question in enumerate(self.asked) if question.key in known]
        self.files = self._named_files()

    def _named_files(self) -> list[Path]:
        """What may be served: pictures and sounds of the prompts and candidates that are shown."""
        found: dict[Path, None] = {}
        for question in self.asked:
            for message in question.row.prompt:
                content = message["content"]
                for part in [] if isinstance(content, str) else content:
                    if part["type"] != "text":
                        found[self.folder / part[part["type"]]] = None
            for number in (question.first, question.second):
                if (sound := question.row.candidates[number].sound) is not None:
                    found[self.folder / sound] = None
        return list(found)

    def state(self) -> dict[str, Any]:
        """What the page shows: how far it is, and the next pair; None: there is none."""
        done = set(self._done)
        place = next((place for place in range(len(self.asked)) if place not in done), None)
        question = None if place is None else self._shown(place)
        return {"done": len(self._done), "total": len(self.asked), "question": question}

    def choose(self, key: Any, choice: Any) -> None:
        """Saves the answer to a pair.

        Raises:
            ValueError: there is no such pair, or choice.
        """
        with self._lock:
            if not isinstance(key, int) or isinstance(key, bool) or not 0 <= key < len(self.asked):
                raise ValueError(f"there is no pair {key!r}")
            if choice not in _CHOICES:
                raise ValueError(f"the choice is {choice!r}; wanted one of {', '.join(_CHOICES)}")
            question = self.asked[key]
            told = {"1": "second", "2": "first"} if question.is_swapped else {"1": "first", "2": "second"}
            append_labels(self._out, [question.label(HAND, cast("Choice", told.get(choice, choice)))])
            if key not in self._done:
                self._done.append(key)

    def back(self) -> None:
        """Shows the last pair that was labelled once more; its next answer is the one that counts."""
        with self._lock:
            if self._done:
                self._done.pop()

    def _shown(self, place: int) -> dict[str, Any]:
        question = self.asked[place]
        numbers = [question.first, question.second]
        if question.is_swapped:
            numbers.reverse()
        prompt = []
        for message in question.row.prompt:
            if len(question.row.prompt) > 1:
                prompt.append({"kind": "role", "text": message["role"]})
            content = message["content"]
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                prompt.append(self._part(part["type"], part[part["type"]]))
        candidates = question.row.candidates
        return {"key": place, "prompt": prompt, "answers": [self._answer(candidates[number]) for number in numbers]}

    def _answer(self, candidate: Candidate) -> list[dict[str, Any]]:
        if candidate.sound is not None:
            return [self._part("audio", candidate.sound)]
        return [self._part("text", candidate.text or "(nothing)")]

    def _part(self, kind: str, value: str) -> dict[str, Any]:
        if kind == "text":
            return {"kind": "text", "text": value}
        return {"kind": kind, "url": f"file/{self.files.index(self.folder / value)}"}


def prefer_app(labelling: Labelling) -> FastAPI:
    """The page as an ASGI application."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost", "testserver"])
    page = _PAGE.read_text(encoding="utf-8")

    @app.get("/")
    def show() -> HTMLResponse:
        return HTMLResponse(page, headers=_HEADERS)

    @app.get("/state")
    def state() -> JSONResponse:
        return JSONResponse(labelling.state(), headers=_HEADERS)

    @app.get("/file/{number}")
    def file(number: int) -> FileResponse:
        if not 0 <= number < len(labelling.files) or not labelling.files[number].is_file():
            raise HTTPException(404, "there is no such file")
        return FileResponse(labelling.files[number], headers=_FILE_HEADERS)

    @app.post("/choice")
    async def choose(request: Request) -> JSONResponse:
        value = await _body(request)
        try:
            labelling.choose(value.get("key"), value.get("choice"))
        except ValueError as error:
            raise HTTPException(422, str(error)) from None
        return JSONResponse(labelling.state(), headers=_HEADERS)

    @app.post("/back")
    async def back(request: Request) -> JSONResponse:
        await _body(request)
        labelling.back()
        return JSONResponse(labelling.state(), headers=_HEADERS)

    return app


async def _body(request: Request) -> dict[str, Any]:
    """JSON that this page sent: another site's form can't send such a type, and names its origin."""
    if request.headers.get("content-type") != "application/json":
        raise HTTPException(415, "wanted application/json")
    origin = request.headers.get("origin")
    if origin is not None and origin != f"http://{request.headers.get('host')}":
        raise HTTPException(403, f"{origin} is another page")
    if int(request.headers.get("content-length", _MOST_BYTES + 1)) > _MOST_BYTES:
        raise HTTPException(413, "too long")
    try:
        value = await request.json()
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise HTTPException(422, "wanted a JSON object")
    return value


def serve_prefer_page(labelling: Labelling, port: int = 0) -> Iterator[str]:
    """Serves the page until the process is told to stop; lines to print, the first one once it listens.

    Raises:
        OSError: the port can't be listened at.
    """
    with told_to_stop() as (stopping, _), _running(labelling, port) as url:
        yield f"{url} shows {len(labelling.asked)} pairs, each saved at once; Ctrl-C ends it"
        while not stopping.wait(0.5):  # a signal must find the main thread awake
            pass


@contextmanager
def _running(labelling: Labelling, port: int) -> Iterator[str]:
    listening = listen(HOST, port)
    with listening:
        server = uvicorn.Server(
            uvicorn.Config(
                prefer_app(labelling), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=3
            )
        )
        thread = threading.Thread(target=server.run, args=([listening],), name="mmllm-prefer-page", daemon=True)
        thread.start()
        try:
            wait_for(server, thread)
            yield f"http://{HOST}:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
