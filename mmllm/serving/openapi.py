"""What the server says of itself at `/openapi.json`: bodies are read here and not by FastAPI, so they are told here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

_TEMPLATE = "#/components/schemas/{model}"
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": about,
        "content": {"application/json": {"schema": {"$ref": _TEMPLATE.format(model="Error")}}},
    }
    for status, about in (
        (400, "The request can't be answered; the message says why."),
        (401, "The API key is missing or wrong."),
        (403, "The page that asks isn't allowed."),
        (404, "There is no such model."),
        (413, "The request is too large."),
        (415, "The body is of another type."),
        (429, "Too many are being answered; `Retry-After` says when to ask again."),
        (500, "A fault of the server."),
        (503, "The server is stopping."),
    )
}
"""What any route may answer."""


def json_body(model: type[BaseModel]) -> dict[str, Any]:
    """A route's body, for `openapi_extra`."""
    schema = {"$ref": _TEMPLATE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def form_body(model: type[BaseModel], files: Mapping[str, str]) -> dict[str, Any]:
    """A route's form with files, for `openapi_extra`."""
    schema = model.model_json_schema(ref_template=_TEMPLATE)
    for name, about in files.items():
        schema["properties"][name] = {"type": "string", "format": "binary", "description": about}
        schema["required"] = [*schema.get("required", ()), name]
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def content(*media_types: str) -> dict[int | str, dict[str, Any]]:
    """A route's answers: what it sends, and errors."""
    known = {"application/json": {"type": "object"}, "text/event-stream": {}}  # events are objects, and `[DONE]`
    kinds = {kind: {"schema": known.get(kind, {"type": "string"})} for kind in media_types}
    return {200: {"description": "The answer.", "content": kinds}, **ERRORS}


def describe(app: FastAPI, bodies: tuple[type[BaseModel], ...]) -> None:
    """Has `/openapi.json` tell the bodies too."""
    made: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        if not made:
            schema = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
            _, definitions = models_json_schema([(model, "validation") for model in bodies], ref_template=_TEMPLATE)
            own = schema.setdefault("components", {}).setdefault("schemas", {})
            own.update(definitions["$defs"])
            own["Error"] = _ERROR
            made.update(schema)
        return made

    app.openapi = openapi
