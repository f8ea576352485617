"""Speculative decoding's arithmetic: which of the ids that something cheaper has drafted are kept, and what follows.

Leviathan et al. 2022, "Fast Inference from Transformers via Speculative Decoding" (arXiv:2211.17192), algorithm 1. With
drafts that come without probabilities (looked up in the prompt) a row draws, id by id, exactly what it draws without
them: such a draft is accepted where it is what the row's own number gives, and that is as often as the algorithm would
accept it. With a draft model the distribution is the same, the ids are others.

Shapes: B rows, T drafted ids (of logits, and the place behind them), V ids of text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmllm.inference.engine.filters import draw_each, pick, probabilities
from mmllm.inference.engine.sampling import RowSampler, TextRules, apply_rules, log_probabilities, may_draw


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


def accept_drafts(
    logits_TV: Tensor, draft_ids: Sequence[int], draft_probs_TV: Tensor | None, row: RowSampler
) -> Accepted:
    """Keeps as many drafted ids as the model agrees with, and draws the next one; tells the row.

    Args:
        logits_TV: the model's [T + 1, V]: of what follows the row's last id, and each drafted one.
        draft_ids: T of them, 0 or more.
        draft_probs_TV: [T, V], with what probabilities each was drawn (`propose`); None: they were looked up.
        row: whose ids they are.
    """
    assert len(logits_TV) == len(draft_ids) + 1, f"{len(draft_ids)} drafts and logits of {len(logits_TV)} places"
    masked_TV = may_draw(logits_TV, [row] * len(logits_TV), row.rules)
    ids: list[int] = []
    given = [] if row.has_rules else _verify(masked_TV, draft_ids, draft_probs_TV, row)
    for place in range(len(logits_TV)):
        if given:
            token_id = given[place]
        else:  # what a rule says depends on what was accepted before
            here = slice(place, place + 1)
            probs_TV = None if draft_probs_TV is None else draft_probs_TV[here]
            token_id = _verify(apply_rules(masked_TV[here], [row]), draft_ids[here], probs_TV, row)[0]
        row.accept(token_id)
        ids.append(token_id)
        if row.is_end(token_id) or place == len(draft_ids) or token_id != draft_ids[place]:
            break
    num_drafts = sum(token_id == draft for token_id, draft in zip(ids, draft_ids, strict=False))
    return Accepted(num_drafts, ids, *log_probabilities(masked_TV[: len(ids)], ids, [row.num_logprobs] * len(ids)))


def propose(
    logits_BV: Tensor, rows: Sequence[RowSampler], ahead: int, rules: TextRules
) -> tuple[list[int], Tensor | None]:
    """Drafts an id of each row from a draft model's logits, under the row's filters (not its penalties and rules).

    Args:
        logits_BV: of the draft model, which has the same ids.
        rows: one each.
        ahead: how many ids have been drafted for them already.
        rules: on the logits' device.

    Returns:
        (an id for each row, its probabilities [B, V] for `accept_drafts`; None: all rows are greedy).
    """
    masked_BV = may_draw(logits_BV, rows, rules)
    drawn = [place for place, row in enumerate(rows) if row.filters is not None]
    ids = masked_BV.argmax(dim=-1)
    if not drawn:
        return ids.tolist(), None
    filters = [row.filters for row in rows if row.filters is not None]
    numbers = torch.tensor([rows[place].proposal(ahead) for place in drawn], device=ids.device)
    places = torch.tensor(drawn, device=ids.device)
    probs_RV = probabilities(masked_BV[places], filters)
    ids = ids.index_copy(0, places, pick(probs_RV, numbers))
    return ids.tolist(), probs_RV.new_zeros(masked_BV.shape).index_copy(0, places, probs_RV)


def _verify(logits_TV: Tensor, draft_ids: Sequence[int], draft_probs_TV: Tensor | None, row: RowSampler) -> list[int]:
    """Of each place the id that follows if all drafts before it are accepted; a draft is if it is this id.

    Behind the last draft there may be one place more.
    """
    if row.filters is None:
        return logits_TV.argmax(dim=-1).tolist()
    numbers = [row.uniform(place) for place in range(len(logits_TV))]
    uniforms_T = torch.tensor(numbers, device=logits_TV.device)
    if draft_probs_TV is None or not draft_ids:
        return draw_each(logits_TV, [row.filters] * len(logits_TV), uniforms_T).tolist()
    num_drafts = len(draft_ids)
    probs_TV = probabilities(logits_TV, [row.filters])
    drafts_T = torch.tensor(draft_ids, device=logits_TV.device)
    wanted_T = probs_TV[:num_drafts].gather(1, drafts_T[:, None])[:, 0]
    drafted_T = draft_probs_TV.gather(1, drafts_T[:, None])[:, 0].to(wanted_T)
    chances_T = torch.tensor([row.acceptance(place) for place in range(num_drafts)], device=logits_TV.device)
    is_accepted_T = chances_T * drafted_T < wanted_T
    rest_TV = (probs_TV[:num_drafts] - draft_probs_TV).clamp(min=0)  # what the draft model gives too rarely
    is_empty_T = rest_TV.sum(dim=-1) == 0  # both alike, but for the last bit
    rest_TV = torch.where(is_empty_T[:, None], probs_TV[:num_drafts], rest_TV)
    ids_T = pick(torch.cat([rest_TV, probs_TV[num_drafts:]]), uniforms_T)
    return torch.cat([torch.where(is_accepted_T, drafts_T, ids_T[:num_drafts]), ids_T[num_drafts:]]).tolist()
