"""What all routes of a server share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TypeVar

from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import ApiError, as_api_error
from mmllm.serving.limits import Lifecycle
from mmllm.serving.metrics import Metrics
from mmllm.serving.parts import MediaReader
from mmllm.serving.remote import RemoteFiles
from mmllm.serving.served import ServedModel

_Value = TypeVar("_Value")
_ENGINE_THREADS = 8
"""Threads that wait for an engine's lock: they don't compute."""
_HEARING_THREADS = 8
"""Transcripts of long sounds at once, whose threads mostly wait for what the engine writes."""


class ServerState:
    """Models, bounds, and threads beside those of the engines.

    Args:
        models: by name.
        config: bounds.
        remote: where pictures may be fetched; None: as the configuration says.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], config: ServeConfig, remote: RemoteFiles | None = None
    ) -> None:
        self.models = dict(models)
        self.config = config
        self.lifecycle = Lifecycle()
        self.metrics = Metrics(list(models.values()))
        self.remote = remote or RemoteFiles(config.allow_remote, config.remote_seconds)
        self.media = ThreadPoolExecutor(config.media_threads, "mmllm-media")
        """Decodes what clients send, and writes prompts."""
        self.hearing = ThreadPoolExecutor(_HEARING_THREADS, "mmllm-hearing")
        """Cuts sounds into windows and joins what is written of them."""
        self.sound = ThreadPoolExecutor(1, "mmllm-sound")
        """Makes sound of units, which must not wait for a large picture."""
        self.waiting = ThreadPoolExecutor(_ENGINE_THREADS, "mmllm-submit")

    def find(self, name: str) -> ServedModel:
        """A model by its name.

        Raises:
            ApiError: 404, there is none.
        """
        if name not in self.models:
            known = ", ".join(self.models)
            raise ApiError(404, f"there is no model {name[:80]!r} here; there is {known}", "model", "model_not_found")
        return self.models[name]

    def reader(self) -> MediaReader:
        """Of a request's pictures and sounds."""
        return MediaReader(self.config, self.remote)

    async def decode(
        self, work: Callable[[], _Value], param: str | None = None, executor: Executor | None = None
    ) -> _Value:
        """Does something in a thread.

        Args:
            work: what; a ValueError of it is the client's.
            param: what errors are of.
            executor: whose thread; None: one for media.

        Raises:
            ApiError: it went wrong.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(executor or self.media, work)
        except Exception as error:
            raise as_api_error(error, param) from error

    def start(self) -> None:
        """Starts the engines' threads."""
        for served in self.models.values():
            served.thread.start()

    def stop(self) -> None:
        """Stops all threads; rows that run are ended."""
        for served in self.models.values():
            served.thread.stop()
        for executor in (self.media, self.hearing, self.sound, self.waiting):
            executor.shutdown(cancel_futures=True)
