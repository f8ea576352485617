"""Speculative decoding's arithmetic: which of the ids that something cheaper has guessed are kept, and what follows.

Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), algorithm 1, for
guesses that are not drawn: whatever guesses, it gives its most probable ids. A guess is then kept where it is what the
row's own number gives, which is as often as the algorithm would keep it; so a row writes, greedy or drawn, exactly what
it writes without guesses.

Shapes: T drafted ids (of logits, and the place behind them), V ids of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.inference.engine.filters import draw_each
from mmllm.inference.engine.sampling import RowSampler, apply_rules, log_probabilities, may_draw


@dataclass(frozen=True)
class Accepted:
    """What a row has got from its drafts; its sampler has accepted all of it."""

    num_drafts: int
    """Drafted ids that were kept."""
    ids: list[int]
    """These, and the id behind them, unless a kept one ends the text: at least one."""
    logprobs: Sequence[float | None]
    """As of `Chosen`, of each id."""
    top_logprobs: Sequence[dict[int, float] | None]


def accept_drafts(logits_TV: Tensor, draft_ids: Sequence[int], row: RowSampler) -> Accepted:
    """Keeps as many drafted ids as the model agrees with, and draws the next one; tells the row.

    Args:
        logits_TV: the model's [T + 1, V]: of what follows the row's last id, and each drafted one.
        draft_ids: T of them, 0 or more.
        row: whose ids they are.
    """
    assert len(logits_TV) == len(draft_ids) + 1, f"{len(draft_ids)} drafts and logits of {len(logits_TV)} places"
    masked_TV = may_draw(logits_TV, [row] * len(logits_TV), row.rules)
    ids: list[int] = []
    given = [] if row.has_rules else _drawn(masked_TV, row)
    for place in range(len(logits_TV)):
        if given:
            token_id = given[place]
        else:  # what a rule says depends on what was accepted before
            here = slice(place, place + 1)
            token_id = _drawn(apply_rules(masked_TV[here], [row]), row)[0]
        row.accept(token_id)
        ids.append(token_id)
        if row.is_end(token_id) or place == len(draft_ids) or token_id != draft_ids[place]:
            break
    num_drafts = sum(token_id == draft for token_id, draft in zip(ids, draft_ids, strict=False))
    return Accepted(num_drafts, ids, *log_probabilities(masked_TV[: len(ids)], ids, [row.num_logprobs] * len(ids)))


def _drawn(logits_TV: Tensor, row: RowSampler) -> list[int]:
    """Of each place the id that the row writes there, if it keeps all guesses before it."""
    if row.filters is None:
        return logits_TV.argmax(dim=-1).tolist()
    numbers = [row.uniform(place) for place in range(len(logits_TV))]
    uniforms_T = torch.tensor(numbers, device=logits_TV.device)
    return draw_each(logits_TV, [row.filters] * len(logits_TV), uniforms_T).tolist()
