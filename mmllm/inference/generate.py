"""Continues prompts, many at once: text. Speech is in `mmllm.inference.units`; both are the engine's.

What is drawn depends on the prompt's number and the seed alone, so that neither the batch size nor the neighbours
change it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.prepared import eval_mode, trained_modules
from mmllm.inference.engine.requests import EngineConfig, TextRequest, TextResult
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

GREY = 128
SILENT_FRAMES = 32


def generate_text(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    prompts: Sequence[Document],
    sampling: Sampling,
    max_new_tokens: int,
    batch_size: int = 64,
    blind: bool = False,
    progress: Callable[[int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Text ids that continue each prompt, up to its end (which is left out).

    Only text, `<|end|>` and what else ends a text can be drawn: never a unit, nor another special token.

    Args:
        model: in any mode; it is run in eval mode and left as it was.
        tokenizer: of the model.
        prompts: as `mmllm.data.samples.documents.build_prompt` writes them.
        sampling: how ids are drawn.
        max_new_tokens: at most so many, the end included.
        batch_size: rows at once.
        blind: a grey picture stands for each image and silence for each sound: what the words alone give away.
        progress: called with the number of prompts that have become done.
        numbers: one a prompt, which with the seed decides what it draws; None: its place among the prompts.

    Returns:
        A list of ids for each prompt, in order.
    """
    if numbers is not None and len(numbers) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts but {len(numbers)} numbers to draw by; give one for each")
    places = list(range(len(prompts)))
    if blind:
        prompts = _hidden(prompts, tokenizer)
        if sampling.temperature == 0:  # many are alike once nothing is seen
            prompts, places = _distinct(prompts)
    requests = [
        TextRequest(prompt, sampling, max_new_tokens, number=number)
        for prompt, number in zip(prompts, range(len(prompts)) if numbers is None else numbers, strict=False)
    ]
    results = Engine(model, tokenizer, EngineConfig(max_rows=batch_size)).run(requests, progress)
    answers = [result.ids if isinstance(result, TextResult) else () for result in results]
    return [list(answers[place]) for place in places]


def _hidden(prompts: Sequence[Document], tokenizer: TokenizerFolder) -> list[Document]:
    """The prompts with grey pictures and silence of the same length: inputs that say nothing, of a kind that is known.

    (Zeros in the slots, which training never shows, would get nonsense for an answer, and flatter what is beside it.)
    """
    silence_K = np.zeros(0, dtype=np.int64)
    if any(prompt.clips for prompt in prompts):
        audio = tokenizer.require_audio()
        silence = torch.zeros(SILENT_FRAMES * audio.hop_samples)
        codes_KF = audio.encode(silence, audio.sample_rate)
        silence_K = codes_KF[:, codes_KF.shape[1] // 2].numpy()  # away from the ends
    hidden = []
    for prompt in prompts:
        images = tuple(
            dataclasses.replace(picture, pixels_3HW=np.full_like(picture.pixels_3HW, GREY)) for picture in prompt.images
        )
        clips = tuple(
            dataclasses.replace(clip, codes_FK=np.broadcast_to(silence_K, clip.codes_FK.shape)) for clip in prompt.clips
        )
        hidden.append(dataclasses.replace(prompt, images=images, clips=clips))
    return hidden


def _distinct(prompts: Sequence[Document]) -> tuple[list[Document], list[int]]:
    """Prompts of unlike tokens, and where among them each prompt is."""
    kept: dict[bytes, tuple[int, Document]] = {}
    places = [kept.setdefault(prompt.token_ids_T.tobytes(), (len(kept), prompt))[0] for prompt in prompts]
    return [prompt for _, prompt in kept.values()], places


@contextmanager
def evaluating(model: MultimodalModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards each of its modules is as it was."""
    with eval_mode(trained_modules(model)), torch.no_grad():
        yield


def batches(prompts: Sequence[Document], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the prompts, those of like length together, the longest first (so that memory fails early)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = sorted(range(len(prompts)), key=lambda row: -prompts[row].num_tokens)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
