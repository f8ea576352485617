"""How text is drawn, from a request's fields; and what is told of its tokens."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from typing import Any

from mmllm.data.samples.document import Document
from mmllm.inference.engine.requests import Cost, TextRequest
from mmllm.inference.engine.token_texts import token_texts
from mmllm.inference.text_settings import MAX_SEED, TextOptions, text_options, try_number
from mmllm.serving import schemas
from mmllm.serving.config import ServeConfig
from mmllm.serving.errors import ApiError, bad_request
from mmllm.serving.served import ServedModel
from mmllm_tokenizers.text import TextTokenizer

_SAME = (
    "temperature", "top_p", "top_k", "min_p", "typical_p", "repetition_penalty", "frequency_penalty",
    "presence_penalty", "stop",
)  # fmt: skip
"""Fields that the library calls as clients do."""
_LEAST_LOGPROB = -9999.0
"""OpenAI's, where JSON has no minus infinity."""


def drawing_options(
    body: schemas.ChatRequest | schemas.CompletionRequest, served: ServedModel, config: ServeConfig
) -> TextOptions:
    """How a request's text is to be drawn, with the model's defaults.

    Raises:
        ApiError: it asks for more than the server allows.
        ValueError: the library refuses a value.
    """
    settings = {name: getattr(body, name) for name in _SAME if getattr(body, name) is not None}
    most, name = body.max_tokens, "max_tokens"
    if isinstance(body, schemas.ChatRequest):
        if body.max_completion_tokens is not None:
            most, name = body.max_completion_tokens, "max_completion_tokens"
        settings["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
        schema = _json_schema(body.response_format)
        if schema is not None:
            settings["json_schema"] = schema
    else:
        settings["logprobs"] = 0 if body.best_of and body.logprobs is None else body.logprobs
        settings["prompt_logprobs"] = bool(body.echo and body.logprobs is not None)
    if most is not None:
        if most > config.max_new_tokens:
            raise bad_request(f"{name} is {most}; this server allows {config.max_new_tokens}", name)
        settings["max_new_tokens"] = most
    if body.logit_bias:
        settings["logit_bias"] = {int(key): bias for key, bias in body.logit_bias.items()}
    settings["seed"] = seed_of(body.seed)
    if (body.n or 1) > config.max_choices:
        raise bad_request(f"n is {body.n}; this server allows {config.max_choices}", "n")
    return text_options(settings, served.model.generation, served.model.tokenizer)


def seed_of(given: int | None) -> int:
    """The seed that a client gave, or one that nobody knows: asking again then draws anew."""
    return secrets.randbelow(MAX_SEED + 1) if given is None else given % (MAX_SEED + 1)


def _json_schema(form: Any) -> dict[str, Any] | None:
    match form:
        case schemas.JsonObjectFormat():
            return {"type": "object"}
        case schemas.JsonSchemaFormat():
            if form.json_schema.schema_ is None:
                param = "response_format.json_schema.schema"
                raise bad_request(f"{param} is missing; give a JSON schema", param, "missing_required_parameter")
            return form.json_schema.schema_
    return None


def text_requests(
    prompt: Document, options: TextOptions, count: int, served: ServedModel, config: ServeConfig, first: int = 0
) -> list[TextRequest]:
    """Requests for answers to one prompt, each with a number of its own. Compiles a constraint, which takes time.

    Args:
        prompt: to be written on.
        options: of the request.
        count: of answers.
        served: the model.
        config: bounds.
        first: number of the first answer.

    Raises:
        ApiError: prompt and answer are longer than the server allows.
    """
    needed = prompt.num_tokens + options.max_new_tokens
    if needed > config.max_context:
        raise ApiError(
            400,
            f"the prompt has {prompt.num_tokens} tokens and the answer may have {options.max_new_tokens}, together "
            f"more than the {config.max_context} that this server allows; shorten the prompt, or ask for fewer",
            "messages",
            "context_length_exceeded",
        )
    (one,) = options.requests(prompt, options.compiled(served.model.tokenizer))
    return [dataclasses.replace(one, number=try_number(number)) for number in range(first, first + count)]


def usage(costs: Sequence[Cost], num_prompts: int = 1, spoken: Cost | None = None) -> dict[str, Any]:
    """What was spent; a prompt with several answers counts once, a text that was written and then spoken not again.

    Args:
        costs: of what was written, each prompt's answers together.
        num_prompts: that were written on.
        spoken: of what was spoken.
    """
    num_units = 0 if spoken is None else spoken.num_new_tokens
    each = len(costs) // num_prompts if costs else 1
    prompts = costs[::each] if costs else [spoken or Cost()]
    num_prompt = sum(cost.num_prompt_tokens for cost in prompts)
    num_text = sum(cost.num_new_tokens for cost in costs)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_text + num_units,
        "total_tokens": num_prompt + num_text + num_units,
        "prompt_tokens_details": {"cached_tokens": sum(cost.num_cached_tokens for cost in prompts)},
        "completion_tokens_details": {"text_tokens": num_text, "audio_tokens": num_units},
    }


def chat_logprobs(
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float],
    top: Sequence[dict[int, float]] | None,
    num_top: int,
) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities, and the most probable ones at their places."""
    told = []
    for place, (token, logprob) in enumerate(zip(ids, logprobs, strict=False)):  # the end's comes behind the ids'
        best = sorted((top[place] if top else {}).items(), key=lambda pair: -pair[1])[:num_top]
        told.append(
            {
                **_token(tokenizer, token, logprob),
                "top_logprobs": [_token(tokenizer, other, value) for other, value in best],
            }
        )
    return told


def _token(tokenizer: TextTokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = token_texts(tokenizer).middle(token) or tokenizer.token(token).encode()
    return {"token": _shown(data), "logprob": max(logprob, _LEAST_LOGPROB), "bytes": list(data)}


def _shown(data: bytes) -> str:
    """A token's text; of a part of a character its bytes, as OpenAI shows them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(
    tokenizer: TextTokenizer,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top: Sequence[dict[int, float] | None] | None,
    start: int,
) -> dict[str, Any]:
    """As `/v1/completions` tells them; `start`: characters before the first token."""
    tokens = [_written(tokenizer, token) for token in ids]
    offsets = [start + len(tokenizer.decode(list(ids[:place]))) for place in range(len(ids))]
    kept = [None if value is None else max(value, _LEAST_LOGPROB) for value in logprobs[: len(ids)]]
    best = None
    if top:
        best = [
            None if each is None else {_written(tokenizer, other): value for other, value in each.items()}
            for each in top[: len(ids)]
        ]
    return {"tokens": tokens, "token_logprobs": kept, "top_logprobs": best, "text_offset": offsets}


def _written(tokenizer: TextTokenizer, token: int) -> str:
    return _shown(token_texts(tokenizer).middle(token) or tokenizer.token(token).encode())
