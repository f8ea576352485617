"""How a row of text is drawn: what may be drawn, what makes it likelier, and which id it is.

What a row draws depends on its logits, its request and its own earlier ids alone, bit for bit: rows with different
settings go through one chain of filters, each of which changes nothing of a row that doesn't ask for it.

Shapes: B rows, V ids of text, R rows with some rule, N ids that a rule changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.inference.engine.filters import Filters, draw_each
from mmllm.inference.engine.requests import TextRequest
from mmllm_tokenizers.folder import TokenizerFolder

_CHUNK = 64
"""Uniform numbers that a row asks its generator for at once."""
_MAX_BIAS = 1e6


@dataclass(frozen=True, eq=False)
class TextRules:
    """What any text of a tokenizer may have: text and what ends it, never a unit nor another special token."""

    num_text: int
    """V: ids of text, with special tokens and rows without a token. Logits are of so many ids."""
    mask_V: Tensor
    """float32, 0 where allowed and -inf elsewhere: what is added to logits."""
    forbidden_ids: frozenset[int]
    end_ids: frozenset[int]

    @classmethod
    def of(cls, tokenizer: TokenizerFolder, device: torch.device | str = "cpu") -> TextRules:
        """The rules of a tokenizer, for logits on `device`."""
        text, num_text = tokenizer.text, tokenizer.vocabulary.num_text
        ends = frozenset(text.end_ids)
        forbidden = text.hidden_ids.union(range(text.num_tokens, num_text)) - ends
        mask_V = torch.zeros(num_text)
        mask_V[sorted(forbidden)] = -torch.inf
        return cls(num_text, mask_V.to(device), forbidden, ends)

    def masked(self, logits_BV: Tensor) -> Tensor:
        """The logits in float32, -inf where an id is forbidden."""
        return logits_BV.float() + self.mask_V


class Uniforms:
    """Numbers in [0, 1) by their place, from a generator of their own; drawn when they are asked for.

    They are what `torch.rand` gives after `manual_seed(seed * 1_000_003 + number)`, whatever the chunks.
    """

    def __init__(self, seed: int, number: int) -> None:
        self._seed = seed * 1_000_003 + number
        self._generator: torch.Generator | None = None
        self._drawn: list[float] = []

    def __getitem__(self, place: int) -> float:
        while place >= len(self._drawn):
            if self._generator is None:
                self._generator = _generator(self._seed)
            self._drawn += torch.rand(_CHUNK, generator=self._generator).tolist()
        return self._drawn[place]


def _generator(seed: int) -> torch.Generator:
    is_taken = -(2**63) <= seed < 2**64
    return torch.Generator().manual_seed(int(seed) if is_taken else seed % 2**64)


def uniforms(numbers: Sequence[int], num_draws: int, seed: int | None) -> Tensor:
    """[numbers, num_draws] numbers in [0, 1), each row's as `Uniforms` has them; None: zeros, none are needed.

    A row's first numbers are the same, however many are drawn.
    """
    rows = [torch.zeros(0, num_draws)]
    for number in numbers:
        if seed is None:
            rows.append(torch.zeros(1, num_draws))
            continue
        rows.append(torch.rand(1, num_draws, generator=_generator(seed * 1_000_003 + number)))
    return torch.cat(rows)


class RowSampler:
    """What decides the ids of one row, and what they were so far.

    Args:
        request: what is asked for.
        rules: of its tokenizer.

    Raises:
        ValueError: a bias or a stop is of an id that there isn't, a bias of one that is never drawn, or no usual
            number; or `min_new_tokens` goes with a constraint, which alone says where its text may end.
    """

    def __init__(self, request: TextRequest, rules: TextRules) -> None:
        sampling = request.sampling
        self.rules = rules
        self.sampling = sampling
        self.filters = Filters.of(sampling)
        self.num_logprobs = request.num_logprobs
        self.ids: list[int] = []
        """What was drawn, an end included."""
        _check_ids("stop_ids", request.stop_ids, rules)
        self.end_ids = rules.end_ids.union(request.stop_ids)
        self.more_ids = sorted(rules.forbidden_ids.intersection(request.stop_ids))
        """Ends of this row that no other text has."""
        _check_ids("logit_bias", request.logit_bias, rules, forbidden=rules.forbidden_ids.difference(self.more_ids))
        _check_bias(request.logit_bias.values())
        self.bias = {token_id: float(bias) for token_id, bias in request.logit_bias.items() if bias}
        if request.constraint is not None and request.min_new_tokens:
            raise ValueError(
                f"min_new_tokens is {request.min_new_tokens} beside a constraint, which alone says where its text may "
                f"end; leave one of them out"
            )
        self.constraint = None if request.constraint is None else request.constraint.begin()
        self.history = _History(request) if sampling.has_penalties else None
        self._min_new_tokens = request.min_new_tokens
        self._uniforms = Uniforms(sampling.seed, request.number)
        self._has_lasting_rules = bool(self.more_ids or self.bias or self.constraint or self.history)
        self.has_rules = self._has_lasting_rules or self.forbids_end
        """Whether something beside `filters` makes its next id another than any row's."""

    @property
    def forbids_end(self) -> bool:
        """Whether the text must go on."""
        return len(self.ids) < self._min_new_tokens

    def is_end(self, token_id: int) -> bool:
        """Whether the text ends with this id, which is then no part of it."""
        return token_id in self.end_ids

    def accept(self, token_id: int) -> None:
        """Moves on by an id that was drawn."""
        self.ids.append(token_id)
        if self.has_rules:
            if self.history is not None:
                self.history.add(token_id)
            if self.constraint is not None and token_id not in self.end_ids:
                self.constraint.accept(token_id)
            self.has_rules = self._has_lasting_rules or self.forbids_end

    def uniform(self, ahead: int = 0) -> float:
        """The number in [0, 1) that decides the next id, or one further ahead."""
        return self._uniforms[len(self.ids) + ahead]


class _History:
    """Ids that a row's prompt or text has, each once, and how often the text has it."""

    def __init__(self, request: TextRequest) -> None:
        sampling, prompt = request.sampling, request.prompt
        self.penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        ids_N = np.zeros(0, dtype=np.int64)
        if sampling.repetition_penalty != 1:
            ids_N = np.unique(prompt.token_ids_T[prompt.modality_T == Modality.TEXT])
        self._num = len(ids_N)
        self._places = {token_id: place for place, token_id in enumerate(ids_N.tolist())}
        self._ids_N = np.concatenate([ids_N, np.zeros(_CHUNK, dtype=np.int64)])
        self._counts_N = np.zeros(len(self._ids_N), dtype=np.float32)

    @property
    def ids_N(self) -> np.ndarray:
        return self._ids_N[: self._num]

    @property
    def counts_N(self) -> np.ndarray:
        return self._counts_N[: self._num]

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self._num)
        if place == self._num:
            if self._num == len(self._ids_N):
                self._ids_N = np.concatenate([self._ids_N, np.zeros_like(self._ids_N)])
                self._counts_N = np.concatenate([self._counts_N, np.zeros_like(self._counts_N)])
            self._ids_N[place] = token_id
            self._num += 1
        self._counts_N[place] += 1


@dataclass(frozen=True)
class Chosen:
    """What rows have drawn, in their order."""

    ids: list[int]
    logprobs: Sequence[float | None]
    """Of each id, among all that its row can ever draw, before penalties, temperature and what else chooses. None:
    the row doesn't ask for it."""
    top_logprobs: Sequence[dict[int, float] | None]
    """Of the ids that are most probable, the most probable one first."""


def choose(logits_BV: Tensor, rows: Sequence[RowSampler], rules: TextRules) -> Chosen:
    """The next id of each row. Rows aren't told: call their `accept`.

    Args:
        logits_BV: as the model gives them, of the ids of text.
        rows: one each, all of them under `rules`.
        rules: on the logits' device.
    """
    if any([row.has_rules for row in rows]):
        masked_BV = may_draw(logits_BV, rows, rules)
        ids = _draw_rows(apply_rules(masked_BV, rows), rows)
    else:
        masked_BV = rules.masked(logits_BV)
        ids = _draw_rows(masked_BV, rows)
    return Chosen(ids, *log_probabilities(masked_BV, ids, [row.num_logprobs for row in rows]))


def may_draw(logits_BV: Tensor, rows: Sequence[RowSampler], rules: TextRules) -> Tensor:
    """The logits in float32, -inf where a row can never draw an id."""
    masked_BV = rules.masked(logits_BV)
    for place, row in enumerate(rows):
        if row.more_ids:
            masked_BV[place, row.more_ids] = logits_BV[place, row.more_ids].float()
    return masked_BV


def apply_rules(masked_BV: Tensor, rows: Sequence[RowSampler]) -> Tensor:
    """The logits by which rows draw: constraints, ends that come too early, biases and penalties are in.

    Args:
        masked_BV: of `may_draw`; left as it is.
        rows: one each.
    """
    logits_BV = masked_BV.clone()
    constrained = [(place, row.constraint) for place, row in enumerate(rows) if row.constraint is not None]
    if constrained:
        places = [place for place, _ in constrained]
        allowed_RV = torch.stack([constraint.allowed() for _, constraint in constrained]).to(logits_BV.device)
        logits_BV[places] = logits_BV[places].masked_fill(~allowed_RV, -torch.inf)
    ends = [(place, token_id) for place, row in enumerate(rows) if row.forbids_end for token_id in row.end_ids]
    if ends:
        logits_BV[tuple(zip(*ends, strict=True))] = -torch.inf
    biases = [(place, *bias) for place, row in enumerate(rows) for bias in row.bias.items()]
    if biases:
        places, ids, values = zip(*biases, strict=True)
        logits_BV[places, ids] += torch.tensor(values, device=logits_BV.device)
    histories = [(place, row.history) for place, row in enumerate(rows) if row.history is not None]
    if histories:
        _penalize(logits_BV, histories)
    return logits_BV


def _penalize(logits_BV: Tensor, histories: Sequence[tuple[int, _History]]) -> None:
    """Changes the logits of ids that rows have had already."""
    lengths = [len(history.ids_N) for _, history in histories]
    columns_N = [
        np.repeat([place for place, _ in histories], lengths),
        np.concatenate([history.ids_N for _, history in histories]),
        np.concatenate([history.counts_N for _, history in histories]),
        *np.repeat(np.array([history.penalties for _, history in histories], dtype=np.float32), lengths, axis=0).T,
    ]
    places_N, ids_N, counts_N, repetition_N, frequency_N, presence_N = (
        torch.from_numpy(np.ascontiguousarray(column_N)).to(logits_BV.device) for column_N in columns_N
    )
    chosen_N = logits_BV[places_N, ids_N]
    chosen_N = torch.where(chosen_N < 0, chosen_N * repetition_N, chosen_N / repetition_N)
    logits_BV[places_N, ids_N] = chosen_N - counts_N * frequency_N - (counts_N > 0) * presence_N


def _draw_rows(logits_BV: Tensor, rows: Sequence[RowSampler]) -> list[int]:
    filters = [row.filters for row in rows]
    if not any(filters):
        return logits_BV.argmax(dim=-1).tolist()
    uniforms_B = torch.tensor([row.uniform() if row.filters else 0.0 for row in rows], device=logits_BV.device)
    return draw_each(logits_BV, filters, uniforms_B).tolist()


def log_probabilities(
    masked_BV: Tensor, ids: Sequence[int], nums: Sequence[int | None]
) -> tuple[Sequence[float | None], Sequence[dict[int, float] | None]]:
    """Log-probabilities of rows' ids, and of their most probable ids.

    Args:
        masked_BV: logits, -inf where an id can't be drawn.
        ids: one a row.
        nums: of how many ids, by row; None: the row's own id isn't asked for either.
    """
    asking = [place for place, num in enumerate(nums) if num is not None]
    logprobs: list[float | None] = [None] * len(ids)
    tops: list[dict[int, float] | None] = [None] * len(ids)
    if not asking:
        return logprobs, tops
    log_RV = (masked_BV if len(asking) == len(ids) else masked_BV[asking]).log_softmax(dim=-1)
    own_R1 = torch.tensor([[ids[place]] for place in asking], device=log_RV.device)
    most = max([num for num in nums if num is not None])
    pairs: list[list[tuple[int, float]]] = [[] for _ in asking]
    if most:
        values_RK, ids_RK = log_RV.topk(min(most, log_RV.shape[-1]), dim=-1)
        pairs = [list(zip(*row, strict=True)) for row in zip(ids_RK.tolist(), values_RK.tolist(), strict=True)]
    for place, logprob, row in zip(asking, log_RV.gather(-1, own_R1)[:, 0].tolist(), pairs, strict=True):
        logprobs[place] = logprob
        tops[place] = {token_id: value for token_id, value in row[: nums[place]] if value > -torch.inf}
    return logprobs, tops


def _check_ids(
    name: str, ids: Iterable[int], rules: TextRules, forbidden: frozenset[int] | set[int] = frozenset()
) -> None:
    for token_id in ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < rules.num_text:
            raise ValueError(
                f"{name} has the id {token_id!r}; ids of text are whole numbers from 0 to {rules.num_text - 1}"
            )
        if token_id in forbidden:
            raise ValueError(f"{name} has the id {token_id}, a special token or none, which no text has; leave it out")


def _check_bias(biases: Iterable[float]) -> None:
    for bias in biases:
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not abs(bias) <= _MAX_BIAS:
            raise ValueError(f"logit_bias has the value {bias!r}; it must be a number from {-_MAX_BIAS} to {_MAX_BIAS}")
