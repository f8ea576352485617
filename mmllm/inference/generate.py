"""Continues prompts, many at once, with a key-value cache: text, or the units of speech.

Finished rows leave the batch. What is drawn depends on the prompt's number and the seed alone, so that
neither the batch size nor the neighbours change it.

Shapes: B rows, T positions, D width, V ids, K codebooks, F frames, P positions of units (frames under the pattern).
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
from mmllm.inference.prompts import next_position, pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.patterns import invert_pattern, num_positions
from mmllm_tokenizers.vocab import AUDIO_END

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

    Returns:
        A list of ids for each prompt, in order.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
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
    uniforms_NP = _uniforms(len(prompts), max_new_tokens, sampling)
    answers: list[list[int]] = [[] for _ in prompts]
    with evaluating(model):
        for rows in batches(prompts, batch_size):
            decoding = _Decoding(model, [prompts[row] for row in rows], max_new_tokens)
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
        codes_KF = audio.encode(silence, audio.sample_rate)[: tokenizer.num_codebooks]
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
    decoding: _Decoding,
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
        kept = _kept(is_going)
        if kept is not None:
            decoding.keep(kept)
            next_B, rows, is_going = next_B[kept], [rows[place] for place in kept], [True] * len(kept)
        decoding.advance(next_B, next_B.new_full((len(next_B), decoding.num_codebooks), -1), Modality.TEXT)


def generate_units(
    model: MultimodalModel,
    tokenizer: TokenizerFolder,
    prompts: Sequence[Document],
    sampling: Sampling,
    max_frames: int,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Codes of the speech that follows each prompt.

    At every position each codebook can draw its own units alone. The sound ends where codebook 0 draws
    `<|audio_end|>`, or under the delay pattern its filler: then the other codebooks finish their last frames.
    A sound has one frame at least and `max_frames` at most.

    Returns:
        int64 [K, F] on the CPU for each prompt, in order: the folder's K codebooks, pattern undone.

    Raises:
        ValueError: the tokenizer has no audio, or `max_frames` is less than 1.
    """
    if max_frames < 1:
        raise ValueError(f"max_frames is {max_frames}; it must be at least 1")
    if tokenizer.vocabulary.num_codebooks == 0:
        raise ValueError("the model has no audio units, so it cannot speak; train it with a tokenizer that has a codec")
    rules = _UnitRules(tokenizer, max_frames)
    uniforms_NPK = _uniforms(len(prompts), rules.max_positions * rules.num_rows, sampling)
    uniforms_NPK = uniforms_NPK.view(len(prompts), rules.max_positions, rules.num_rows)
    sounds: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model):
        for rows in batches(prompts, batch_size):
            decoding = _Decoding(model, [prompts[row] for row in rows], rules.max_positions)
            _continue_units(decoding, rows, rules, sampling, uniforms_NPK, sounds)
            if progress:
                progress(len(rows))
    return sounds


class _UnitRules:
    """Which codes may stand at which position of units: `mmllm.data.samples.documents` turned round."""

    def __init__(self, tokenizer: TokenizerFolder, max_frames: int) -> None:
        vocabulary = tokenizer.vocabulary
        self.pattern = tokenizer.pattern
        self.num_codebooks = tokenizer.num_codebooks
        self.num_rows = vocabulary.num_codebooks  # 1 when flat
        self.filler = vocabulary.filler
        self.starts = [vocabulary.codebook_start(codebook) for codebook in range(self.num_rows)]
        self.delay = self.num_rows - 1 if self.pattern == "delay" else 0
        self.step = self.num_codebooks if self.pattern == "flatten" else 1
        self.num_first = max_frames * self.step  # positions at which codebook 0 may have a unit
        self.max_positions = num_positions(max_frames, self.num_codebooks, self.pattern)
        self.end_id = self.starts[0] + self.filler if self.delay else tokenizer.id(AUDIO_END)

    def block(self, position: int) -> tuple[int, int]:
        """First id, and number, of the units that the first row may have: when flat the codebooks take turns."""
        size = self.filler // self.step
        return self.starts[0] + position % self.step * size, size

    def first_logits(self, hidden_BD: Tensor, head_VD: Tensor, position: int) -> Tensor:
        """Logits [B, units + 1] of the first row; the last is that of the end."""
        start, size = self.block(position)
        rows = torch.cat([head_VD[start : start + size], head_VD[self.end_id : self.end_id + 1]])
        logits_BV = F.linear(hidden_BD, rows).float()
        if position == 0 or position % self.step:
            logits_BV[:, -1] = -torch.inf
        elif position >= self.num_first:
            logits_BV[:, :-1] = -torch.inf
        return logits_BV


def _continue_units(
    decoding: _Decoding,
    rows: list[int],
    rules: _UnitRules,
    sampling: Sampling,
    uniforms_NPK: Tensor,
    sounds: list[Tensor],
) -> None:
    head_VD = decoding.model.decoder.head_weight_VD
    columns: list[list[list[int]]] = [[] for _ in rows]  # a row's positions, each the codes of its K codebooks
    ends: list[int | None] = [None] * len(rows)  # how many positions have a unit of codebook 0
    is_going = [True] * len(rows)
    for position in range(rules.max_positions):
        uniforms_BK = uniforms_NPK[rows, position].to(decoding.device)
        codes_BK, is_end_B = _draw_column(decoding.hidden_BD, head_VD, rules, position, sampling, uniforms_BK, ends)
        for place, (codes, is_end) in enumerate(zip(codes_BK.tolist(), is_end_B, strict=True)):
            if not is_going[place]:
                continue
            if ends[place] is None and is_end:
                ends[place] = position
            end = ends[place]
            num_columns = rules.max_positions if end is None else end + rules.delay
            if position < num_columns:
                columns[place].append(codes)
            if len(columns[place]) == num_columns:
                is_going[place] = False
                patterned_KP = torch.tensor(columns[place]).T
                sounds[rows[place]] = invert_pattern(patterned_KP, rules.pattern, rules.filler, rules.num_codebooks)
        if not any(is_going):
            return
        kept = _kept(is_going)
        if kept is not None:
            decoding.keep(kept)
            codes_BK = codes_BK[kept]
            rows, columns = [rows[place] for place in kept], [columns[place] for place in kept]
            ends, is_going = [ends[place] for place in kept], [True] * len(kept)
        decoding.advance(codes_BK[:, 0] + rules.starts[0], codes_BK, Modality.UNITS)


def _draw_column(
    hidden_BD: Tensor,
    head_VD: Tensor,
    rules: _UnitRules,
    position: int,
    sampling: Sampling,
    uniforms_BK: Tensor,
    ends: list[int | None],
) -> tuple[Tensor, list[bool]]:
    """The codes [B, K] at one position, fillers where the pattern has them, and which rows end here."""
    start, size = rules.block(position)
    first_B = draw(rules.first_logits(hidden_BD, head_VD, position), sampling, uniforms_BK[:, 0])
    is_end_B = (first_B == size).tolist()
    has_ended_B = torch.tensor([end is not None for end in ends], device=first_B.device) | (first_B == size)
    columns = [torch.where(has_ended_B, rules.filler, first_B + start - rules.starts[0])]
    for codebook in range(1, rules.num_rows):
        block_start = rules.starts[codebook]
        logits_BV = F.linear(hidden_BD, head_VD[block_start : block_start + rules.filler]).float()
        codes_B = draw(logits_BV, sampling, uniforms_BK[:, codebook])
        if rules.delay:
            is_filler = [position < codebook or (end is not None and position >= end + codebook) for end in ends]
            codes_B = codes_B.masked_fill(torch.tensor(is_filler, device=codes_B.device), rules.filler)
        columns.append(codes_B)
    return torch.stack(columns, dim=1), is_end_B


class _Decoding:
    """Rows that are being continued: their cache, and the hidden state from which the next id is drawn."""

    def __init__(self, model: MultimodalModel, prompts: list[Document], num_new: int) -> None:
        self.model = model
        self.device = model.decoder.head_weight_VD.device
        batch = pad_left(prompts).to(self.device)
        self.num_codebooks = batch.audio_codes_BTK.shape[-1]
        num_rows, num_positions = batch.token_ids_BT.shape
        self.cache = model.decoder.make_cache(num_rows, num_positions + num_new)
        self.hidden_BD = model.hidden(batch, self.cache)[:, -1]
        self.positions_B = batch.positions_BT[:, -1]

    def advance(self, token_ids_B: Tensor, codes_BK: Tensor, modality: Modality) -> None:
        """Appends one position to each row."""
        self.positions_B = self.positions_B + 1
        document_ids_B = torch.zeros_like(self.positions_B)
        batch = next_position(token_ids_B, self.positions_B, document_ids_B, codes_BK, modality)
        self.hidden_BD = self.model.hidden(batch, self.cache)[:, -1]

    def keep(self, places: list[int]) -> None:
        """Drops all other rows."""
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


def _kept(is_going: list[bool]) -> list[int] | None:
    kept = [place for place, going in enumerate(is_going) if going]
    return kept if len(kept) <= _COMPACT_SHARE * len(is_going) else None


def _uniforms(num_prompts: int, num_draws: int, sampling: Sampling) -> Tensor:
    """[num_prompts, num_draws] numbers in [0, 1), each row from its own generator; zeros when none are needed."""
    if sampling.temperature == 0:
        return torch.zeros(1, 1).expand(num_prompts, num_draws)
    rows = []
    for prompt in range(num_prompts):
        generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + prompt)
        rows.append(torch.rand(num_draws, generator=generator))
    return torch.stack(rows) if rows else torch.zeros(0, num_draws)
