"""Requests' bodies, read strictly: what isn't JSON, or not as it should be, is a 400 that names it."""

from __future__ import annotations

import json
import re
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from mmllm.serving.errors import ApiError, bad_request, validation_error
from mmllm.serving.schemas import TranscriptionForm

MAX_MARKS = 100_000
"""Commas and brackets of a JSON body: more of them are no conversation, and take much more memory than they have bytes.
"""
_HALVES = re.compile(rb"\\u[dD][89a-fA-F]")
"""Escapes of characters beyond the first 65,536, or of halves of them."""
_MAX_FIELD_BYTES, _MAX_FIELDS = 16_384, 32
_LISTS = ("timestamp_granularities",)
_Model = TypeVar("_Model", bound=BaseModel)


async def read_json(request: Request, model: type[_Model]) -> _Model:
    """A JSON body.

    Raises:
        ApiError: it is no JSON, or not as the model says.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(
            415, f"the body is {kind[:80] or 'of no type'}; send JSON with Content-Type: application/json",
            code="unsupported_media_type",
        )  # fmt: skip
    value = _parsed(await request.body())
    if not isinstance(value, dict):
        raise bad_request(f"the body is {_kind(value)}; send a JSON object", code="invalid_json")
    return _validated(model, value)


def _parsed(body: bytes) -> Any:
    if sum(body.count(mark) for mark in (b",", b"[", b"{")) > MAX_MARKS:
        raise bad_request(f"the body has more than {MAX_MARKS} commas and brackets; send less", code="invalid_json")
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse)
        if _HALVES.search(body):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise bad_request("the body has half of a surrogate pair, which no text has", code="invalid_json") from error
    except UnicodeDecodeError as error:
        raise bad_request(f"the body isn't UTF-8: {error.reason} at byte {error.start}", code="invalid_json") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply", code="invalid_json") from error
    except ValueError as error:
        raise bad_request(f"the body isn't JSON: {error}", code="invalid_json") from error


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


def _validated(model: type[_Model], value: Any) -> _Model:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise validation_error(error.errors(include_url=False, include_input=False), value) from error


async def read_form(request: Request) -> tuple[TranscriptionForm, bytes]:
    """A form with a sound's file, and the file's content.

    Raises:
        ApiError: it is no such form.
    """
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise ApiError(
            415, "send a form: Content-Type: multipart/form-data, with the fields file and model",
            code="unsupported_media_type",
        )  # fmt: skip
    reading = request.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    try:
        form = await reading
    except (HTTPException, UnicodeDecodeError) as error:
        said = error.detail if isinstance(error, HTTPException) else error.reason
        raise bad_request(f"the form can't be read: {said}", code="invalid_form") from error
    try:
        values, upload = _fields(form)
        checked = _validated(TranscriptionForm, values)
        if upload is None:
            raise bad_request("Missing required parameter: 'file'", "file", "missing_required_parameter")
        return checked, await upload.read()
    finally:
        await form.close()


def _fields(form: FormData) -> tuple[dict[str, Any], UploadFile | None]:
    values: dict[str, Any] = {}
    upload = None
    for name, value in form.multi_items():
        key = name.removesuffix("[]")
        if isinstance(value, UploadFile):
            if key != "file":
                raise bad_request(f"{name[:80]} is a file; send the sound as file", name[:80])
            upload = value
        elif key in _LISTS:
            values.setdefault(key, []).append(value)
        elif key == "file":
            raise bad_request("file is text; send the sound's file, with a filename", "file")
        elif key in values:
            raise bad_request(f"{key[:80]} is given twice; leave one out", key[:80])
        else:
            values[key] = value
    return values, upload
