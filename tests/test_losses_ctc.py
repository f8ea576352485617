"""CTC losses against all alignments one by one, and beside clips that can't be aligned."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mmllm.losses.ctc import alignable, ctc_losses

BLANK = 0


def _collapsed(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != BLANK]


def _all_alignments(log_probs_TV: Tensor, targets: list[int]) -> Tensor | None:
    """-log of the summed probability of every path that reads as the targets; None: there is no such path."""
    num_slots, num_classes = log_probs_TV.shape
    paths = [p for p in itertools.product(range(num_classes), repeat=num_slots) if _collapsed(p) == targets]
    if not paths:
        return None
    scores = torch.stack([log_probs_TV[range(num_slots), path].sum() for path in paths])
    return -scores.logsumexp(0)


def _logits(slots: list[int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(slots), max(slots), 3, dtype=torch.float64, generator=generator)


def _losses(logits: Tensor, targets: list[list[int]], slots: list[int]) -> tuple[Tensor, list[int], int]:
    """Of the clips that can be aligned, which these are, and how many can't."""
    repeats = [sum(a == b for a, b in itertools.pairwise(each)) for each in targets]
    rows, num_left_out = alignable(zip(slots, map(len, targets), repeats, strict=True))
    width = max(map(len, targets))
    padded = torch.tensor([targets[row] + [-1] * (width - len(targets[row])) for row in rows])
    lengths = [[each[row] for row in rows] for each in (slots, [*map(len, targets)])]
    return ctc_losses(logits[rows].log_softmax(-1), padded, *lengths, blank=BLANK), rows, num_left_out


def test_against_every_alignment() -> None:
    targets = [[1, 2], [1, 1], [1, 1], [2], [], [2, 2, 1], [1, 2, 1], [1, 2, 1, 2]]
    slots = [4, 3, 2, 1, 3, 4, 2, 4]
    logits = _logits(slots).requires_grad_()
    losses, rows, num_left_out = _losses(logits, targets, slots)
    wanted = [_all_alignments(logits[n].log_softmax(-1)[: slots[n]], target) for n, target in enumerate(targets)]
    assert rows == [n for n, loss in enumerate(wanted) if loss is not None and targets[n]]
    assert num_left_out == 2  # 1, 1 in two slots, and three targets in two; not the clip without targets
    slow = torch.stack([loss for n, loss in enumerate(wanted) if n in rows and loss is not None])
    torch.testing.assert_close(losses, slow)
    weights = torch.arange(1.0, len(rows) + 1, dtype=torch.float64)
    ours = torch.autograd.grad((losses * weights).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((slow * weights).sum(), logits)[0])


@pytest.mark.parametrize(
    ("lengths", "rows", "num_left_out"),
    [
        ([(7, 4, 3), (6, 4, 3)], [0], 1),
        ([(5, 4, 1), (3, 0, 0), (0, 1, 0), (1, 1, 0)], [0, 3], 1),
        ([], [], 0),
        ([(0, 0, 0)], [], 0),
    ],
)
def test_fewest_slots(lengths: list[tuple[int, int, int]], rows: list[int], num_left_out: int) -> None:
    assert alignable(lengths) == (rows, num_left_out)


@pytest.mark.parametrize(("neighbour", "num_slots"), [([1, 2, 2, 1, 1, 2, 1, 2], 6), ([2, 2], 2), ([1], 0)])
def test_an_impossible_neighbour_changes_nothing(neighbour: list[int], num_slots: int) -> None:
    logits = _logits([6, 6])
    (alone,), _, _ = _losses(logits[:1], [[1, 2, 1]], [6])
    (beside,), rows, num_left_out = _losses(logits, [[1, 2, 1], neighbour], [6, num_slots])
    assert rows == [0] and num_left_out == 1
    torch.testing.assert_close(beside, alone)
