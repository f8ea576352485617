"""Texts that a model writes itself, of all its tasks: what a draft model learns where there are no data.

Pictures are random blocks of colour and sounds are random codes: nothing that training saw, so that captions and
transcripts are less like real ones than those of a recipe's documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from mmllm.batch import Modality, PackedBatch
from mmllm.checkpoints.folder import LoadedModel
from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import default_transform
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.inference.prompting import Prompter
from mmllm.inference.prompts import join

_PROMPTS = 64
"""That are answered together, and make a batch."""
_NEW_TOKENS = 96
_LONGEST_SEQUENCE = 1024
_HEARD_SECONDS = 2.0
_QUESTION_CHARACTERS = 60


def written_batches(loaded: LoadedModel, seed: int) -> Iterator[PackedBatch]:
    """Texts that a model writes at temperature 1, packed; endless, the same for a seed."""
    model, tokenizer = loaded.model, loaded.tokenizer
    transform = loaded.image_transform or default_transform(tokenizer)
    prompter = Prompter(model.config, tokenizer, transform, loaded.generation)
    rng = np.random.default_rng(seed)
    questions: list[str] = ["what is this?"]
    engine = Engine(model, tokenizer, EngineConfig(max_rows=_PROMPTS, prefix_cache_bytes=0))
    number = 0
    while True:
        prompts = _prompts(prompter, rng, questions)
        sampling = Sampling(temperature=1.0, seed=seed)
        requests = [TextRequest(each, sampling, _NEW_TOKENS, number=number + n) for n, each in enumerate(prompts)]
        number += len(requests)
        documents = []
        for prompt, result in zip(prompts, engine.run(requests), strict=True):
            assert isinstance(result, TextResult)
            questions = [*questions, result.text[:_QUESTION_CHARACTERS]][-_PROMPTS:] if result.text else questions
            ends = sorted(tokenizer.text.end_ids)[:1] if result.finish_reason == "stop" else []
            documents.append(_document(prompt, [*result.ids, *ends]))
        yield pack(documents)


def _prompts(prompter: Prompter, rng: np.random.Generator, questions: Sequence[str]) -> list[Document]:
    """Of each task as many."""
    tokenizer, config = prompter.tokenizer, prompter.config
    kinds = ["text"]
    if config.vision is not None:
        kinds += ["caption", "question"]
    if config.audio is not None:
        kinds.append("transcribe")
    prompts = []
    for place in range(_PROMPTS):
        match kinds[place % len(kinds)]:
            case "text":
                prompts.append(prompter.continuation([""]))
            case "caption":
                prompts.append(prompter.caption(_blocks(rng, tokenizer.image_size)))
            case "question":
                asked = questions[int(rng.integers(len(questions)))]
                prompts.append(prompter.question([_blocks(rng, tokenizer.image_size)], asked))
            case _:
                assert config.audio is not None
                longest = min(prompter.generation.max_heard_seconds or _HEARD_SECONDS, _HEARD_SECONDS)
                frames = max(1, int(rng.uniform(0.2, 1.0) * longest * tokenizer.frame_rate))
                codes_KF = rng.integers(0, config.audio.codebook_size, (config.audio.num_heard, frames))
                prompts.append(prompter.transcript(torch.from_numpy(codes_KF)))
    return prompts


def _blocks(rng: np.random.Generator, size: int) -> np.ndarray:
    """A picture of some by some blocks, each of a random colour: uint8 [H, W, 3]."""
    side = int(rng.integers(1, 9))
    places = np.arange(size) * side // size
    return rng.integers(0, 256, (side, side, 3), dtype=np.uint8)[places][:, places]


def _document(prompt: Document, ids: Sequence[int]) -> Document:
    """A prompt and what was written behind it, which is to be predicted."""
    count = len(ids)
    written = Document(
        token_ids_T=np.array(ids, dtype=np.int64),
        targets_T=np.ones(count, dtype=bool),
        modality_T=np.full(count, int(Modality.TEXT), dtype=np.int64),
        codes_TK=np.full((count, prompt.codes_TK.shape[1]), -1, dtype=np.int64),
        filler=prompt.filler,
    )
    return join([prompt, written])


def pack(documents: Sequence[Document]) -> PackedBatch:
    """Documents in as many sequences as they need, in their order."""
    length = max(_LONGEST_SEQUENCE, *(document.num_tokens for document in documents))
    rows: list[list[Document]] = [[]]
    for document in documents:
        if sum(each.num_tokens for each in rows[-1]) + document.num_tokens > length:
            rows.append([])
        rows[-1].append(document)
    return pack_documents(rows, max(sum(each.num_tokens for each in row) for row in rows))
