"""`POST /v1/completions`: goes on with texts."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from typing import Any, cast

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from mmllm.data.samples.document import Document
from mmllm.inference.engine.requests import Cost, TextRequest, TextResult, TextUpdate
from mmllm.serving import schemas
from mmllm.serving.drawing import completion_logprobs, drawing_options, text_requests, usage
from mmllm.serving.errors import as_api_error, bad_request
from mmllm.serving.replies import Stream, event, while_wanted
from mmllm.serving.rows import Rows, running
from mmllm.serving.served import ServedModel
from mmllm.serving.state import ServerState
from mmllm.serving.tasks import plan_completions


class TextAnswer:
    """Continuations on their way.

    Args:
        state: of the server.
        served: the model.
        body: of the request.
    """

    def __init__(self, state: ServerState, served: ServedModel, body: schemas.CompletionRequest) -> None:
        self._state = state
        self._served = served
        self._body = body
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._started = time.monotonic()
        self._is_first = True
        self._num_tries = max(body.best_of or 1, body.n or 1)
        self._prompts: list[Document] = []

    async def answer(self, request: Request) -> Response:
        """Answers, whole or as a stream."""
        state, body = self._state, self._body
        many = isinstance(body.prompt, list) and isinstance(body.prompt[0], (str, list))
        num_rows = self._num_tries * (len(body.prompt) if many else 1)
        if self._num_tries > state.config.max_choices:
            raise bad_request(f"best_of is {self._num_tries}; this server allows {state.config.max_choices}", "best_of")
        stack = AsyncExitStack()
        async with stack:
            stack.enter_context(self._served.admission.enter(num_rows))
            rows = await while_wanted(self._begin(stack), request, state.lifecycle)
            if not body.stream:
                return JSONResponse(await while_wanted(self._whole(rows), request, state.lifecycle))
            return Stream(self._events(rows), stack.pop_all(), state.lifecycle, state.metrics)
        raise AssertionError("the stack swallows nothing")

    async def _begin(self, stack: AsyncExitStack) -> Rows:
        requests = await self._state.decode(self._decoded)
        return await stack.enter_async_context(running(self._served.thread, self._state.waiting, requests))

    def _decoded(self) -> list[TextRequest]:
        options = drawing_options(self._body, self._served, self._state.config)
        self._prompts = plan_completions(self._body, self._served)
        return [
            request
            for prompt in self._prompts
            for request in text_requests(prompt, options, self._num_tries, self._served, self._state.config)
        ]

    async def _whole(self, rows: Rows) -> dict[str, Any]:
        results = [cast(TextResult, each) for each in await rows.results()]
        self._note_first(results[0].cost.first_seconds)
        choices = []
        for place, prompt in enumerate(self._prompts):
            tries = results[place * self._num_tries : (place + 1) * self._num_tries]
            for result in self._best(tries):
                choices.append(self._choice(len(choices), prompt, result))
        return {**self._frame(choices), "usage": self._usage([result.cost for result in results])}

    def _best(self, tries: Sequence[TextResult]) -> Sequence[TextResult]:
        count = self._body.n or 1
        if count == len(tries):
            return tries
        return sorted(tries, key=lambda each: -(sum(each.logprobs or ()) / max(1, len(each.logprobs or ()))))[:count]

    def _choice(self, number: int, prompt: Document, result: TextResult) -> dict[str, Any]:
        body, tokenizer = self._body, self._served.model.tokenizer.text
        text, told = result.text, None
        prompt_ids = [int(each) for each in prompt.token_ids_T if int(each) not in tokenizer.hidden_ids]
        before = tokenizer.decode(prompt_ids) if body.echo else ""
        if body.logprobs is not None and result.logprobs is not None:
            told = completion_logprobs(tokenizer, result.ids, result.logprobs, result.top_logprobs, len(before))
            if body.echo:
                scores = result.prompt_logprobs or [None] * prompt.num_tokens
                kept = [
                    score for each, score in zip(prompt.token_ids_T, scores, strict=True)
                    if int(each) not in tokenizer.hidden_ids
                ]  # fmt: skip
                own = completion_logprobs(tokenizer, prompt_ids, kept, [None] * len(kept), 0)
                told = {name: [*own[name], *(told[name] or [])] for name in told}
        return {"index": number, "text": before + text, "finish_reason": result.finish_reason, "logprobs": told}

    async def _events(self, rows: Rows) -> AsyncIterator[bytes]:
        num_choices = len(self._prompts) * self._num_tries
        costs, starts = [Cost()] * num_choices, [0] * num_choices
        tokenizer = self._served.model.tokenizer.text
        async for number, update in rows.updates():
            if update is None:
                result = cast(TextResult, rows.result(number))
                costs[number] = result.cost
                yield self._event(number, "", result.finish_reason)
                continue
            news, told = cast(TextUpdate, update), None
            self._note_first()
            if self._body.logprobs is not None and news.logprobs is not None:
                told = completion_logprobs(tokenizer, news.ids, news.logprobs, news.top_logprobs, starts[number])
            starts[number] += len(news.text)
            if news.text or told:
                yield self._event(number, news.text, None, told)
        options = self._body.stream_options
        if options is not None and options.include_usage:
            yield event({**self._frame([]), "usage": self._usage(costs)})

    def _event(self, number: int, text: str, finish: str | None, told: dict[str, Any] | None = None) -> bytes:
        return event(self._frame([{"index": number, "text": text, "finish_reason": finish, "logprobs": told}]))

    def _frame(self, choices: list[Any]) -> dict[str, Any]:
        return {
            "id": self._id,
            "object": "text_completion",
            "created": self._created,
            "model": self._served.name,
            "choices": choices,
        }

    def _usage(self, costs: Sequence[Cost]) -> dict[str, Any]:
        return usage(costs, len(self._prompts))

    def _note_first(self, seconds: float | None = None) -> None:
        if self._is_first:
            self._is_first = False
            self._state.metrics.note_first(self._served.name, seconds or time.monotonic() - self._started)


async def answer_completion(state: ServerState, body: schemas.CompletionRequest, request: Request) -> Response:
    """Goes on with texts.

    Raises:
        ApiError: it can't.
    """
    try:
        return await TextAnswer(state, state.find(body.model), body).answer(request)
    except ValueError as error:
        raise as_api_error(error) from error
