"""Beam search: of one prompt the most probable texts are gone on with side by side, and the best one is given.

Candidates, lengths and the end are those of transformers' `generate(num_beams=…)`, whose scores are log-probabilities
before `logit_bias` and penalties, which are added behind. What runs is forked: a row of the cache is copied where a
beam goes on in two ways.

Shapes: k beams that run, V ids of text, C candidates of all beams.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mmllm.inference.engine.requests import FinishReason, TextRequest, TextResult, TextUpdate
from mmllm.inference.engine.sampling import RowSampler, TextRules, apply_rules, may_draw
from mmllm.model.row_cache import CachedRow
from mmllm_tokenizers.folder import TokenizerFolder


@dataclass(frozen=True)
class Beam:
    """A text on its way, or one that has ended."""

    ids: tuple[int, ...] = ()
    total: float = 0.0
    """Of its ids' log-probabilities, rules included."""
    logprobs: tuple[float, ...] = ()
    """Of each id, rules left out."""
    top_logprobs: tuple[dict[int, float], ...] = ()


@dataclass(frozen=True)
class _Finished:
    """A beam that has ended, by its end or its length."""

    beam: Beam
    score: float
    """Its total by its length."""


@dataclass
class Beams:
    """The cache's rows of one request."""

    rows: list[CachedRow] = field(default_factory=list)
    """Of the beams that run, in their order."""
    spare: list[CachedRow] = field(default_factory=list)
    """Rows that are kept for further ones; they don't run."""


class BeamRow:
    """One request that is answered by beam search.

    Args:
        request: what is asked for, of at least two beams.
        rules: of its tokenizer.
        tokenizer: of the model.

    Raises:
        ValueError: the request asks for what no beam search gives, or names ids that there aren't.
    """

    def __init__(self, request: TextRequest, rules: TextRules, tokenizer: TokenizerFolder) -> None:
        self.request = request
        self.cached = Beams()
        self.prompt_logprobs: list[float | None] = [None] * request.prompt.num_tokens
        self._rules, self._tokenizer = rules, tokenizer
        self._is_told = False
        self.restart()

    def restart(self) -> None:
        """Begins anew behind the prompt; nothing of it was told."""
        self._samplers = [RowSampler(self.request, self._rules)]
        self._beams = [Beam()]
        self._finished: list[_Finished] = []
        self._is_done = False

    @property
    def num_new(self) -> int:
        """Ids of a beam that runs, or of the longest that ran."""
        return max(len(beam.ids) for beam in [*self._beams, *(each.beam for each in self._finished)])

    @property
    def next_ids(self) -> list[int]:
        """The id that the next position of each beam holds."""
        return [beam.ids[-1] for beam in self._beams]

    def take(self, logits_kV: Tensor) -> list[int] | None:
        """Goes on behind the logits of each beam.

        Returns:
            Of each beam that runs now the number of the one that it goes on; None: the search has ended.
        """
        samplers, request, k = self._samplers, self.request, self.request.num_beams
        masked_kV = may_draw(logits_kV, samplers, self._rules)
        log_kV = masked_kV.log_softmax(dim=-1)
        ruled_kV = apply_rules(log_kV, samplers) if any([each.has_rules for each in samplers]) else log_kV
        totals_k = torch.tensor([beam.total for beam in self._beams], device=log_kV.device)
        total_C = (ruled_kV + totals_k[:, None]).flatten()
        most = min(max(2, 1 + len(samplers[0].end_ids)) * k, len(total_C))
        totals, places = (each.tolist() for each in total_C.topk(most))
        candidates = [divmod(place, log_kV.shape[-1]) for place in places]
        grown = self._grown(candidates, totals, log_kV)
        num_new = len(self._beams[0].ids) + 1
        ends = [samplers[0].is_end(token_id) or num_new >= request.max_new_tokens for _, token_id in candidates]
        new = [
            _Finished(beam, beam.total / num_new**request.length_penalty)
            for beam, is_end in zip(grown[:k], ends, strict=False)
            if is_end and beam.total > -torch.inf
        ]
        self._finished = sorted([*self._finished, *new], key=lambda each: -each.score)[:k]
        goes_on = [n for n, is_end in enumerate(ends) if not is_end and totals[n] > -torch.inf][:k]
        if not goes_on or self._has_ended(totals[goes_on[0]], num_new):
            self._is_done = True
            return None
        parents = [candidates[n][0] for n in goes_on]
        self._beams = [grown[n] for n in goes_on]
        self._samplers = self._forked(parents)
        return parents

    def _grown(self, candidates: Sequence[tuple[int, int]], totals: Sequence[float], log_kV: Tensor) -> list[Beam]:
        num = self.request.num_logprobs
        logprobs: Sequence[float] = [0.0] * len(candidates)
        tops: list[dict[int, float]] = []
        if num is not None:
            parents, ids = zip(*candidates, strict=True)
            logprobs = log_kV[list(parents), list(ids)].tolist()
            tops = _most_probable(log_kV, num)
        grown = []
        for (parent, token_id), total, logprob in zip(candidates, totals, logprobs, strict=True):
            beam = replace(self._beams[parent], ids=(*self._beams[parent].ids, token_id), total=total)
            if num is not None:
                beam = replace(
                    beam, logprobs=(*beam.logprobs, logprob), top_logprobs=(*beam.top_logprobs, tops[parent])
                )
            grown.append(beam)
        return grown

    def _has_ended(self, best_total: float, num_new: int) -> bool:
        """Whether no beam that runs may become better than those that have ended."""
        request = self.request
        if len(self._finished) < request.num_beams:
            return False
        if request.early_stopping is True:
            return True
        is_longest = request.early_stopping == "never" and request.length_penalty > 0
        length = request.max_new_tokens if is_longest else num_new
        return best_total / length**request.length_penalty <= self._finished[-1].score

    def _forked(self, parents: Sequence[int]) -> list[RowSampler]:
        """What decides each beam's ids; where a beam goes on in two ways the second is made anew."""
        taken: set[int] = set()
        samplers = []
        for parent, beam in zip(parents, self._beams, strict=True):
            if parent in taken and self._samplers[parent].has_rules:
                sampler = RowSampler(self.request, self._rules)
                for token_id in beam.ids[:-1]:
                    sampler.accept(token_id)
            elif parent in taken:  # nothing but how long it is matters
                sampler = RowSampler(self.request, self._rules)
                sampler.ids = list(beam.ids[:-1])
                sampler.has_rules = False
            else:
                sampler = self._samplers[parent]
            taken.add(parent)
            samplers.append(sampler)
        for sampler, beam in zip(samplers, self._beams, strict=True):
            sampler.accept(beam.ids[-1])
        return samplers

    def stop_at_length(self) -> None:
        """Ends the search where it is: there is no room for more."""
        self._is_done = True

    def update(self) -> TextUpdate | None:
        """The text, once the search has ended: until then the best one may become another."""
        if not self._is_done or self._is_told:
            return None
        self._is_told = True
        result = self.result(False)
        here = slice(len(result.ids))
        logprobs = None if result.logprobs is None else result.logprobs[here]
        tops = None if result.top_logprobs is None else result.top_logprobs[here]
        return TextUpdate(result.text, result.ids, logprobs, tops)

    def result(self, is_cancelled: bool) -> TextResult:
        """The best text; if none has ended, the best so far."""
        if self._finished:
            best, score = self._finished[0].beam, self._finished[0].score
        else:
            best = self._beams[0]
            score = best.total / max(1, len(best.ids)) ** self.request.length_penalty
        has_ended = bool(best.ids) and self._samplers[0].is_end(best.ids[-1])
        ids = best.ids[:-1] if has_ended else best.ids
        finish: FinishReason = "stop" if has_ended else "length"
        has_logprobs = self.request.num_logprobs is not None
        return TextResult(
            ids,
            self._tokenizer.text.decode(list(ids)),
            "cancelled" if is_cancelled else finish,
            best.logprobs if has_logprobs else None,
            best.top_logprobs if has_logprobs else None,
            tuple(self.prompt_logprobs) if self.request.prompt_logprobs else None,
            end_id=best.ids[-1] if has_ended else None,
            beam_score=score,
        )


def _most_probable(log_kV: Tensor, num: int) -> list[dict[int, float]]:
    """Of each row so many ids, the most probable first."""
    if not num:
        return [{} for _ in range(len(log_kV))]
    values_kN, ids_kN = log_kV.topk(min(num, log_kV.shape[-1]), dim=-1)
    rows = zip(ids_kN.tolist(), values_kN.tolist(), strict=True)
    return [{n: value for n, value in zip(*row, strict=True) if value > -torch.inf} for row in rows]
