"""The vocabulary's rows: looked up where ids go in, multiplied with where logits come out.

Shapes: D width, V vocabulary, B of them base rows, A added ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.roles import mark, mark_all

Rows = Tensor | tuple[Tensor, Tensor]
"""The rows of a head in id order: [V, D], or in two blocks, [B, D] and [A, D], of which one alone may be trained."""
Result = TypeVar("Result")
ADDED = "added"
"""Name of the parameter that holds the rows behind the base ids."""


class Embedding(nn.Embedding):
    """Token embeddings in one matrix `weight` [V, D], or in two: `weight` [B, D] and `added` [A, D].

    Two blocks are two parameters, so that one may be frozen without a gradient of the whole. Model folders have them in
    one all the same (`joined_rows`).

    Args:
        vocab_size: V.
        width: D.
        num_base_ids: B, the rows of a block of their own; 0: there is one block.
    """

    added: nn.Parameter | None

    def __init__(self, vocab_size: int, width: int, num_base_ids: int = 0):
        super().__init__(num_base_ids or vocab_size, width)
        added_AD = nn.Parameter(torch.empty(vocab_size - num_base_ids, width)) if num_base_ids else None
        self.register_parameter(ADDED, added_AD)
        if added_AD is not None:
            mark(self, added="embedding")

    @property
    def rows(self) -> Rows:
        """In id order."""
        return self.weight if self.added is None else (self.weight, self.added)

    def forward(self, input: Tensor) -> Tensor:
        """Ids of any shape to embeddings [..., D]."""
        if self.added is None:
            return super().forward(input)
        offset = input - len(self.weight)
        is_added = offset >= 0
        base = F.embedding(torch.where(is_added, 0, input), self.weight)
        return torch.where(is_added[..., None], F.embedding(offset.clamp(min=0), self.added), base)


class Head(nn.Module):
    """From hidden states to logits, with a weight of its own, in one or two blocks, or the embedding's.

    A loss that never holds all logits runs inside of its forward: sharding gathers the weight for just that.
    """

    added: nn.Parameter | None

    def __init__(self, embed_tokens: Embedding, is_tied: bool):
        super().__init__()
        # Not registered a second time: the weight has one name, and one owner that shards and moves it.
        self._embedding = (embed_tokens,)
        for name, rows in (("weight", embed_tokens.weight), (ADDED, embed_tokens.added)):
            own = None if is_tied or rows is None else nn.Parameter(torch.empty(rows.shape))
            self.register_parameter(name, own)
        mark_all(self, "head")

    @property
    def rows(self) -> Rows:
        """In id order."""
        if self.weight is None:
            return self._embedding[0].rows
        return self.weight if self.added is None else (self.weight, self.added)  # pyright: ignore

    @property
    def weight_VD(self) -> Tensor:
        """The rows in one matrix; a copy where they are in two."""
        return joined(self.rows)

    def part(self, begin: int, end: int) -> Callable[[Tensor], Tensor]:
        """What gives the logits of some ids alone; of the rows as they are now."""
        rows_PD = self.weight_VD[begin:end].detach()
        return lambda hidden: F.linear(hidden, rows_PD)

    def forward(self, hidden: Tensor, reduce: Callable[[Tensor, Rows], Result] | None = None) -> Tensor | Result:
        """Logits [..., V], or what `reduce` makes of the hidden states and the rows."""
        if reduce is not None:
            return reduce(hidden, self.rows)
        rows = self.rows
        if isinstance(rows, Tensor):
            return F.linear(hidden, rows)
        return torch.cat([F.linear(hidden, block) for block in rows], dim=-1)


def joined(rows: Rows) -> Tensor:
    """One matrix; a copy where there are two blocks."""
    return rows if isinstance(rows, Tensor) else torch.cat(rows)


def joined_rows(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with all rows of embedding and head in one matrix each, as model folders have them."""
    blocks = {name: name.removesuffix(ADDED) + "weight" for name in state if name.rpartition(".")[2] == ADDED}
    whole = {name: tensor for name, tensor in state.items() if name not in blocks}
    for name, base in blocks.items():
        whole[base] = torch.cat([state[base], state[name]])
    return whole
