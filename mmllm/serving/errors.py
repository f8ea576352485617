"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_logger = logging.getLogger(__name__)
_MAX_MESSAGE = 600
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_NOT_DONE = {
    "tools": "models here call no tools: leave tools out",
    "tool_choice": "models here call no tools: leave tool_choice out",
    "tool_calls": "models here call no tools: leave tool_calls out",
    "parallel_tool_calls": "models here call no tools: leave parallel_tool_calls out",
    "functions": "models here call no functions: leave functions out",
    "function_call": "models here call no functions: leave function_call out",
    "reasoning_effort": "models here don't reason before they answer: leave reasoning_effort out",
    "verbosity": "models here know no verbosity: bound max_tokens instead, and leave verbosity out",
    "web_search_options": "this server searches no web: leave web_search_options out",
    "prediction": "predicted outputs aren't taken: leave prediction out",
    "moderation": "this server moderates nothing: leave moderation out",
    "suffix": "models here write on and fill in nothing: leave suffix out",
    "instructions": "models here take no instructions about how to speak: choose a voice and a speed",
    "dimensions": "embeddings have the model's own width: leave dimensions out",
    "chunking_strategy": "long sounds are cut at pauses: leave chunking_strategy out",
    "known_speaker_names": "models here tell no speakers apart: leave known_speaker_names out",
    "known_speaker_references": "models here tell no speakers apart: leave known_speaker_references out",
    "keywords": "models here take no keywords: leave keywords out",
    "languages": "models here write down what they were trained on: leave languages out",
    "file": "models here read no documents: send text, image_url or input_audio",
}
"""Fields of OpenAI's that mean nothing here, and what to do."""


class ApiError(Exception):
    """An answer that says what is wrong.

    Args:
        status: of HTTP.
        message: what, got, wanted, next.
        param: the field of the request.
        code: for programs.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def to_dict(self) -> dict[str, Any]:
        """The answer's body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if len(self.message) <= _MAX_MESSAGE else self.message[: _MAX_MESSAGE - 1] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse(self.to_dict(), self.status, self.headers)


def bad_request(message: str, param: str | None = None, code: str | None = "invalid_value") -> ApiError:
    """A 400."""
    return ApiError(400, message, param, code)


def internal_error() -> ApiError:
    """A 500; what went wrong is in the log."""
    return ApiError(500, "this request failed by a fault of the server, whose log says more", code="internal_error")


def as_api_error(error: BaseException, param: str | None = None) -> ApiError:
    """An error of the library as an answer: what is in the client's hands is a 400, what is the server's a 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ValueError):
        return bad_request(" ".join(str(error).split()), param)
    _logger.error("a request failed", exc_info=error)
    return internal_error()


def validation_error(errors: Sequence[Mapping[str, Any]], body: Any) -> ApiError:
    """What pydantic found, the deepest first: of a union's members all speak, and the one that fitted best is meant.

    Args:
        errors: as `ValidationError.errors()` gives them; at least one.
        body: what was validated.
    """
    paths = [_path(error, body) for error in errors]
    deepest = max(range(len(paths)), key=lambda number: len(paths[number]))
    path, first = paths[deepest], errors[deepest]
    param = _spelt(path)
    name = str(path[-1]) if path else "the body"
    match first["type"]:
        case "extra_forbidden":
            hint = _NOT_DONE.get(name, f"there is no parameter {name!r} here; check its name, or leave it out")
            return ApiError(400, f"Unknown parameter: {param!r}: {hint}", param, "unknown_parameter")
        case "missing":
            return ApiError(400, f"Missing required parameter: {param!r}", param, "missing_required_parameter")
    said = dict.fromkeys(
        str(error["msg"]).removeprefix("Value error, ")
        for error, each in zip(errors, paths, strict=True)
        if each == path
    )
    is_type = first["type"].endswith("_type")
    message = f"Invalid {'type' if is_type else 'value'} for {param or 'the body'!r}: {' or '.join(said)}"
    return ApiError(400, message, param, "invalid_type" if is_type else "invalid_value")


def _path(error: Mapping[str, Any], body: Any) -> list[str | int]:
    """The place of an error in the body, without the names of unions' members that pydantic puts between."""
    value, path = body, []
    *inner, last = error["loc"] or (None,)
    for step in inner:
        if _has(value, step):
            value = value[step]
            path.append(step)
    if last is not None and (_has(value, last) or error["type"] == "missing"):
        path.append(last)
    return path


def _has(value: Any, step: Any) -> bool:
    if isinstance(value, list):
        return isinstance(step, int) and step < len(value)
    return isinstance(value, dict) and step in value


def _spelt(path: Sequence[str | int]) -> str | None:
    spelt = "".join(f"[{step}]" if isinstance(step, int) else f".{step[:80]}" for step in path)
    return spelt.removeprefix(".") or None


def add_handlers(app: FastAPI) -> None:
    """Has all that goes wrong answered in one form."""

    async def on_api_error(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        return _http_error(request, error).response()

    async def on_fault(request: Request, error: Exception) -> JSONResponse:
        return internal_error().response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(Exception, on_fault)


def _http_error(request: Request, error: HTTPException) -> ApiError:
    path = request.url.path[:200]
    match error.status_code:
        case 404:
            return ApiError(404, f"there is no {path} here; GET /openapi.json lists what there is", code="unknown_url")
        case 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"{path} doesn't answer {request.method}; it answers {allowed}"
            return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, str(error.detail), code="invalid_request", headers=error.headers)
