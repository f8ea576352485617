"""`POST /v1/embeddings`: texts as vectors in the decoder's space."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch.nn.functional as F
from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from mmllm.inference.embedding import decoder_embeddings
from mmllm.serving import schemas
from mmllm.serving.errors import ApiError, as_api_error
from mmllm.serving.replies import while_wanted
from mmllm.serving.served import ServedModel
from mmllm.serving.state import ServerState
from mmllm.serving.tasks import plan_embeddings


async def answer_embeddings(state: ServerState, body: schemas.EmbeddingRequest, request: Request) -> Response:
    """Embeds texts: the mean of the decoder's hidden states, at length 1.

    Raises:
        ApiError: it can't.
    """
    served = state.find(body.model)
    try:
        with served.admission.enter():
            work = state.decode(lambda: _embedded(body, served, state.config.max_context), "input")
            vectors_ND, num_tokens = await while_wanted(work, request, state.lifecycle)
    except ValueError as error:
        raise as_api_error(error) from error
    data = [
        {"object": "embedding", "index": number, "embedding": _coded(vector_D, body.encoding_format)}
        for number, vector_D in enumerate(vectors_ND)
    ]
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return JSONResponse({"object": "list", "data": data, "model": served.name, "usage": usage})


def _embedded(body: schemas.EmbeddingRequest, served: ServedModel, max_context: int) -> tuple[list[np.ndarray], int]:
    documents = plan_embeddings(body, served)
    for number, document in enumerate(documents):
        if not 0 < document.num_tokens <= max_context:
            raise ApiError(
                400,
                f"input[{number}] has {document.num_tokens} tokens; this server takes 1 to {max_context}",
                "input",
                "context_length_exceeded",
            )
    vectors = decoder_embeddings(served.model.model, documents)
    return [F.normalize(each, dim=-1).numpy() for each in vectors], sum(document.num_tokens for document in documents)


def _coded(vector_D: np.ndarray, form: str | None) -> Any:
    if form == "base64":
        return base64.b64encode(vector_D.astype("<f4").tobytes()).decode()
    return vector_D.tolist()
