"""Which training rows are looked at while a model trains, and that nothing of what they show is trained on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from mmllm.data.rows.holdout import even_hash, shown_contents
from mmllm.data.rows.media import Digests
from mmllm.data.rows.rows import KINDS, Row

_logger = logging.getLogger(__name__)

MAX_LOST = 0.25
"""Share of the rows of a kind that may be lost to training so that some of that kind can be looked at."""


def draw_validation(
    rows: Sequence[Row], counts: Mapping[str, int], seed: int, digests: Digests
) -> tuple[list[Row], list[Row]]:
    """Draws rows to look at, and leaves out of training what shows the same.

    Rows that show one picture, one sound or one text (and those that show the same as these) are a group, and no group
    is parted: a model that was trained on a picture under another caption has seen it. Groups are drawn by the hash of
    their rows: first those that fit whole into what is still wanted of each kind; then, where that is not enough, the
    smallest of the others, of which some rows are looked at and the others are neither looked at nor trained on.
    Groups that would take more than `MAX_LOST` of a kind so stay in training, and fewer rows are looked at.

    Args:
        rows: The rows.
        counts: How many rows to look at, by kind; of kinds that are not there, none.
        seed: Of the draw.
        digests: Of files that were read before.

    Returns:
        `(train, val)`: `train` in the rows' order, `val` by kind, in the rows' order.
    """
    if not any(counts.values()):
        return list(rows), []
    groups = _groups(rows, digests)
    group_of = {place: group for group in groups for place in group}
    order = sorted(range(len(rows)), key=lambda place: even_hash(f"val {seed}:{rows[place].id}"))
    drawn = list({id(group_of[place]): group_of[place] for place in order}.values())
    kinds = [Counter(rows[place].kind for place in group) for group in drawn]
    sizes = Counter(row.kind for row in rows)
    wanted = Counter(counts)
    taken: list[int] = []
    for number, of_kinds in enumerate(kinds):
        if all(wanted[kind] >= count for kind, count in of_kinds.items()):
            taken.append(number)
            wanted -= of_kinds
    if +wanted:
        for number in sorted(set(range(len(drawn))) - set(taken), key=lambda number: (len(drawn[number]), number)):
            lost = kinds[number] - wanted
            is_small = all(count <= MAX_LOST * sizes[kind] for kind, count in lost.items())
            if is_small and any(wanted[kind] for kind in kinds[number]):
                taken.append(number)
                wanted -= kinds[number]
    left = Counter(counts)
    gone, val = set[int](), list[int]()
    for group in (drawn[number] for number in taken):
        gone.update(group)
        for place in group:
            if left[rows[place].kind] > 0:
                left[rows[place].kind] -= 1
                val.append(place)
    if len(gone) > len(val):
        _logger.warning("%d rows are left out: what they show is looked at in validation", len(gone) - len(val))
    val.sort(key=lambda place: (KINDS.index(rows[place].kind), place))
    return [row for place, row in enumerate(rows) if place not in gone], [rows[place] for place in val]


def _groups(rows: Sequence[Row], digests: Digests) -> list[list[int]]:
    """The places of rows that show something in common, directly or through others."""
    parents = list(range(len(rows)))

    def root(place: int) -> int:
        while parents[place] != place:
            parents[place] = parents[parents[place]]
            place = parents[place]
        return place

    first: dict[str, int] = {}
    for place, row in enumerate(rows):
        for content in shown_contents(row, digests):
            one, other = sorted((root(place), root(first.setdefault(content, place))))
            parents[other] = one
    groups: dict[int, list[int]] = {}
    for place in range(len(rows)):
        groups.setdefault(root(place), []).append(place)
    return list(groups.values())
