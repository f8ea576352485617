"""Continues prompts, many at once, with a key-value cache: text. Speech is in `mmllm.inference.units`.

Finished rows leave the batch. What is drawn depends on the prompt's number and the seed alone, so that
neither the batch size nor the neighbours change it.

Shapes: B rows, T positions, D width, V ids, K codebooks, F frames.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.batch import Modality
from mmllm.checkpoints.settings import Sampling
from mmllm.data.samples.documents import Document
from mmllm.inference.prompts import SpokenLetters, next_position, pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder

GREY = 128
SILENT_FRAMES = 32
_COMPACT_SHARE = 0.75
"""Rows leave the cache when this share or less still goes on: copying it for each costs more than it saves."""


def draw(logits_BV: Tensor, sampling: Sampling, uniforms_B: Tensor) -> Tensor:
    """One id a row.

    Args:
        logits_BV: -inf where an id is forbidden; at least one a row is not.
        sampling: how to draw.
        uniforms_B: in [0, 1): a row's id is where the cumulated probability passes its number.

    Returns:
        int64 [B].
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        is_beyond_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p  # of those before it
        logits_BV = logits_BV.masked_fill(is_beyond_BV.scatter(-1, order_BV, is_beyond_BV), -torch.inf)
    cumulated_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    passed_BV = cumulated_BV <= uniforms_B[:, None].to(cumulated_BV) * cumulated_BV[:, -1:]
    return passed_BV.sum(dim=-1)


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
        batch_size: rows at once; prompts of like length go together.
        blind: a grey picture stands for each image and silence for each sound: what the words alone give away.
        progress: called with the number of prompts of each batch that is done.
        numbers: one a prompt, which with the seed decides what it draws; None: its place among the prompts.

    Returns:
        A list of ids for each prompt, in order.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
    if numbers is not None and len(numbers) != len(prompts):
        raise ValueError(f"there are {len(prompts)} prompts but {len(numbers)} numbers to draw by; give one for each")
    places = list(range(len(prompts)))
    if blind:
        prompts = _hidden(prompts, tokenizer)
        if sampling.temperature == 0:  # many are alike once nothing is seen
            prompts, places = _distinct(prompts)
    ends = set(tokenizer.text.end_ids)
    allowed_V = torch.zeros(tokenizer.vocabulary.num_text, dtype=torch.bool)
    allowed_V[: tokenizer.text.num_tokens] = True
    allowed_V[list(tokenizer.text.hidden_ids)] = False
    allowed_V[list(ends)] = True
    seed = sampling.seed if sampling.temperature else None
    uniforms_NP = uniforms(range(len(prompts)) if numbers is None else numbers, max_new_tokens, seed)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for rows in batches(prompts, batch_size):
            decoding = Decoding(model, [prompts[row] for row in rows], max_new_tokens)
            _continue_text(decoding, rows, allowed_V, ends, sampling, uniforms_NP, answers)
            if progress:
                progress(len(rows))
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


def _continue_text(
    decoding: Decoding,
    rows: list[int],
    allowed_V: Tensor,
    ends: set[int],
    sampling: Sampling,
    uniforms_NP: Tensor,
    answers: list[list[int]],
) -> None:
    is_forbidden_V = ~allowed_V.to(decoding.device)
    head_VD = decoding.model.decoder.head_weight_VD[: len(allowed_V)]
    is_going = [True] * len(rows)
    for step in range(uniforms_NP.shape[1]):
        logits_BV = F.linear(decoding.hidden_BD, head_VD).float().masked_fill(is_forbidden_V, -torch.inf)
        next_B = draw(logits_BV, sampling, uniforms_NP[rows, step].to(decoding.device))
        for place, token_id in enumerate(next_B.tolist()):
            is_going[place] = is_going[place] and token_id not in ends
            if is_going[place]:
                answers[rows[place]].append(token_id)
        if not any(is_going) or step + 1 == uniforms_NP.shape[1]:
            return
        kept = kept_rows(is_going)
        if kept is not None:
            decoding.keep(kept)
            next_B, rows, is_going = next_B[kept], [rows[place] for place in kept], [True] * len(kept)
        decoding.advance(next_B, next_B.new_full((len(next_B), decoding.num_codebooks), -1), Modality.TEXT)


class Decoding:
    """Rows that are being continued: their cache, and the hidden state from which the next id is drawn.

    A prompt that is given several times (votes, tries) is computed once.
    """

    def __init__(self, model: MultimodalModel, prompts: list[Document], num_new: int) -> None:
        self.model = model
        self.device = model.decoder.head_weight_VD.device
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        batch = pad_left(distinct).to(self.device)
        self.num_codebooks = batch.audio_codes_BTK.shape[-1]
        num_rows, num_positions = batch.token_ids_BT.shape
        self.cache = model.decoder.make_cache(num_rows, num_positions + num_new)
        self.hidden_BD = model.hidden(batch, self.cache)[:, -1]
        self.positions_B = batch.positions_BT[:, -1]
        self.letters_L = batch.letters_L
        self.pointer_B = batch.pointer_BT[:, -1] if batch.pointer_BT.numel() else None
        """Which of the letters each row says next; None: no row has a pointer."""
        if len(distinct) < len(prompts):
            number_of = {id(prompt): number for number, prompt in enumerate(distinct)}
            rows = [number_of[id(prompt)] for prompt in prompts]
            self.keep(rows)
            self.pointer_B = None if self.pointer_B is None else self.pointer_B[rows]

    def advance(
        self, token_ids_B: Tensor, codes_BK: Tensor, modality: Modality, spoken: SpokenLetters | None = None
    ) -> None:
        """Appends one position to each row."""
        if self.cache.length == self.cache.max_length:
            self.cache.grow(2 * self.cache.max_length)
        self.positions_B = self.positions_B + 1
        document_ids_B = torch.zeros_like(self.positions_B)
        batch = next_position(token_ids_B, self.positions_B, document_ids_B, codes_BK, modality, spoken)
        self.hidden_BD = self.model.hidden(batch, self.cache)[:, -1]

    def keep(self, places: list[int]) -> None:
        """Drops all other rows; one that is named twice is there twice."""
        self.cache.keep(places)
        self.hidden_BD, self.positions_B = self.hidden_BD[places], self.positions_B[places]


@contextmanager
def evaluating(model: MultimodalModel) -> Iterator[None]:
    """Eval mode without gradients; afterwards the model is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def batches(prompts: Sequence[Document], batch_size: int) -> Iterator[list[int]]:
    """Numbers of the prompts, those of like length together, the longest first (so that memory fails early)."""
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    order = sorted(range(len(prompts)), key=lambda row: -prompts[row].num_tokens)
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def kept_rows(is_going: Sequence[bool]) -> list[int] | None:
    """The rows that go on, where enough have ended for the others to be worth dropping; else None."""
    kept = [place for place, going in enumerate(is_going) if going]
    return kept if len(kept) <= _COMPACT_SHARE * len(is_going) else None


def uniforms(prompts: Sequence[int], num_draws: int, seed: int | None) -> Tensor:
    """[prompts, num_draws] numbers in [0, 1), each row from a generator of its own; None: zeros, none are needed.

    A row's first numbers are the same, however many are drawn.
    """
    rows = [torch.zeros(0, num_draws)]
    for prompt in prompts:
        if seed is None:
            rows.append(torch.zeros(1, num_draws))
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + prompt)
        rows.append(torch.rand(1, num_draws, generator=generator))
    return torch.cat(rows)
