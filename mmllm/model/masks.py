"""What a query sees of its document."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MaskRule:
    """Of its own document a query sees itself and what came before, and more or less by the settings.

    Attributes:
        window: how many tokens it sees at most, itself included; None: all.
        spans: tokens of one span see each other in both directions, whatever the window.
    """

    window: int | None = None
    spans: bool = False


def visible(
    rule: MaskRule,
    query: Tensor,
    key: Tensor,
    query_span: Tensor | None = None,
    key_span: Tensor | None = None,
) -> Tensor:
    """Whether a query sees a key of the same document, bool, in the shape that the places broadcast to.

    Args:
        rule: what is seen.
        query: place of the query, counted from anywhere.
        key: place of the key, counted from there too.
        query_span: number of its span, -1 none.
        key_span: as of the query.
    """
    seen = key <= query
    if rule.window is not None:
        seen = seen & (query - key < rule.window)
    if rule.spans and query_span is not None and key_span is not None:
        seen = seen | ((query_span == key_span) & (query_span >= 0))
    return seen
