"""The server: OpenAI's routes before models of ours."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mmllm.serving import schemas
from mmllm.serving.audio import answer_speech, answer_transcription
from mmllm.serving.bodies import read_form, read_json
from mmllm.serving.chat import answer_chat
from mmllm.serving.completions import answer_completion
from mmllm.serving.config import ServeConfig
from mmllm.serving.embeddings import answer_embeddings
from mmllm.serving.errors import add_handlers
from mmllm.serving.gate import Gate
from mmllm.serving.metrics import CONTENT_TYPE
from mmllm.serving.openapi import ERRORS, content, describe, form_body, json_body
from mmllm.serving.remote import RemoteFiles
from mmllm.serving.replies import ClientGone
from mmllm.serving.served import ServedModel
from mmllm.serving.state import ServerState

_BODIES = (schemas.ChatRequest, schemas.CompletionRequest, schemas.SpeechRequest, schemas.EmbeddingRequest)
_GONE = 499
"""Nginx's, of a client that has gone; nobody reads it."""


def create_app(models: Mapping[str, ServedModel], config: ServeConfig, remote: RemoteFiles | None = None) -> FastAPI:
    """A server of models, as an ASGI application; `app.state.server` is what its routes share.

    Args:
        models: by the names that clients ask for.
        config: bounds.
        remote: where pictures may be fetched; None: as the configuration says.
    """
    state = ServerState(models, config, remote)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.start()
        try:
            yield
        finally:
            state.stop()

    app = FastAPI(
        title="mmllm", version="1", summary="Models that see, hear, read and speak, as OpenAI's clients ask them",
        lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.server = state
    _add_models(app, state)
    _add_answers(app, state)
    add_handlers(app)
    app.add_exception_handler(ClientGone, _on_gone(state))
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"], expose_headers=["Retry-After", "X-Sample-Rate"],
        )  # fmt: skip
    app.add_middleware(Gate, config=config, lifecycle=state.lifecycle, metrics=state.metrics)
    describe(app, _BODIES)
    return app


def _on_gone(state: ServerState) -> Any:
    async def on_gone(request: Request, error: Exception) -> Response:
        state.metrics.note_gone()
        return Response(status_code=_GONE)

    return on_gone


def _add_models(app: FastAPI, state: ServerState) -> None:
    """Routes that tell how the server is."""
    plain: dict[int | str, dict[str, Any]] = {status: ERRORS[status] for status in (401, 403, 404)}

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses={503: {"description": "It stops, and takes no requests."}})
    async def health() -> JSONResponse:
        if state.lifecycle.is_draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics", responses={200: {"content": {"text/plain": {}}}, **plain})
    async def metrics() -> Response:
        return Response(state.metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", responses=plain)
    async def list_models() -> JSONResponse:
        return JSONResponse({"object": "list", "data": [served.to_dict() for served in state.models.values()]})

    @app.get("/v1/models/{model:path}", responses=plain)
    async def get_model(model: str) -> JSONResponse:
        return JSONResponse(state.find(model).to_dict())


def _add_answers(app: FastAPI, state: ServerState) -> None:
    """Routes that ask models."""

    @app.post(
        "/v1/chat/completions",
        openapi_extra=json_body(schemas.ChatRequest),
        responses=content("application/json", "text/event-stream"),
        response_class=Response,
    )
    async def chat(request: Request) -> Response:
        return await answer_chat(state, await read_json(request, schemas.ChatRequest), request)

    @app.post(
        "/v1/completions",
        openapi_extra=json_body(schemas.CompletionRequest),
        responses=content("application/json", "text/event-stream"),
        response_class=Response,
    )
    async def complete(request: Request) -> Response:
        return await answer_completion(state, await read_json(request, schemas.CompletionRequest), request)

    @app.post(
        "/v1/audio/speech",
        openapi_extra=json_body(schemas.SpeechRequest),
        responses=content("audio/wav", "audio/pcm", "audio/flac", "audio/mpeg", "audio/ogg", "text/event-stream"),
        response_class=Response,
    )
    async def speak(request: Request) -> Response:
        return await answer_speech(state, await read_json(request, schemas.SpeechRequest), request)

    @app.post(
        "/v1/audio/transcriptions",
        openapi_extra=form_body(schemas.TranscriptionForm, {"file": "A sound."}),
        responses=content("application/json", "text/plain", "text/vtt", "text/event-stream"),
        response_class=Response,
    )
    async def transcribe(request: Request) -> Response:
        form, data = await read_form(request)
        return await answer_transcription(state, form, data, request)

    @app.post(
        "/v1/embeddings",
        openapi_extra=json_body(schemas.EmbeddingRequest),
        responses=content("application/json"),
        response_class=Response,
    )
    async def embed(request: Request) -> Response:
        return await answer_embeddings(state, await read_json(request, schemas.EmbeddingRequest), request)
