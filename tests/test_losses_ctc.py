"""CTC losses against all alignments one by one, and beside clips that can't be aligned."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmllm.losses.ctc import ctc_losses, mean_over_targets, required_slots, sum_over_targets

BLANK = 0


def _collapsed(path: tuple[int, ...]) -> list[int]:
    return [label for label, _ in itertools.groupby(path) if label != BLANK]


def _all_alignments(log_probs_TV: Tensor, targets: list[int]) -> Tensor | None:
    """-log of the summed probability of every path that reads as the targets; None: there is no such path."""
    num_slots, num_classes = log_probs_TV.shape
    paths = [p for p in itertools.product(range(num_classes), repeat=num_slots) if _collapsed(p) == targets]
    if not paths:
        return None
    scores = torch.stack([sum(log_probs_TV[t, label] for t, label in enumerate(path)) for path in paths])
    return -scores.logsumexp(0)


def _batch(targets: list[list[int]], slots: list[int], seed: int = 0, dtype=torch.float64):
    width = max([len(t) for t in targets] + [1])
    padded = torch.tensor([t + [-1] * (width - len(t)) for t in targets])
    generator = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(len(targets), max(slots), 3, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
    )
    return logits, padded, torch.tensor(slots), torch.tensor([len(t) for t in targets])


def test_against_every_alignment():
    targets = [[1, 2], [1, 1], [1, 1], [2], [], [2, 2, 1], [1, 2, 1], [1, 2, 1, 2]]
    slots = [4, 3, 2, 1, 3, 4, 2, 4]
    logits, padded, num_slots, lengths = _batch(targets, slots)
    log_probs = logits.log_softmax(-1)
    losses = ctc_losses(log_probs, padded, num_slots, lengths, blank=BLANK)
    wanted = torch.zeros(len(targets), dtype=torch.float64)
    for n, target in enumerate(targets):
        loss = _all_alignments(log_probs[n, : slots[n]], target)
        assert bool(losses.is_counted_N[n]) == (loss is not None and len(target) > 0)
        if losses.is_counted_N[n]:
            assert loss is not None
            wanted[n] = loss
    torch.testing.assert_close(losses.losses_N, wanted)
    assert losses.num_left_out == 2  # 1, 1 in two slots, and three targets in two
    weights = torch.arange(1.0, len(targets) + 1, dtype=torch.float64)
    ours = torch.autograd.grad((losses.losses_N * weights).sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(ours, torch.autograd.grad((wanted * weights).sum(), logits)[0])


def test_fewest_slots():
    targets = torch.tensor([[1, 1, 1, 1], [1, 2, 2, 1], [3, 3, 3, 3], [1, 1, -1, -1]])
    assert required_slots(targets, torch.tensor([4, 4, 0, 2])).tolist() == [7, 5, 0, 3]
    assert required_slots(targets, torch.tensor([1, 2, 3, 1])).tolist() == [1, 2, 5, 1]
    assert required_slots(torch.zeros(2, 0, dtype=torch.long), torch.tensor([0, 0])).tolist() == [0, 0]


@pytest.mark.parametrize("mean", [mean_over_targets, sum_over_targets])
def test_an_impossible_neighbour_changes_nothing(mean):
    """A mean of 8.67 stays 8.67: the neighbour is counted with neither loss nor length, and has no gradient."""
    alone_logits, targets, slots, lengths = _batch([[1, 2, 1]], [6])
    losses = ctc_losses(alone_logits.log_softmax(-1), targets, slots, lengths)
    total, count = mean(losses, lengths)
    alone, gradient = total / count, torch.autograd.grad(total, alone_logits)[0]
    for neighbour, num_slots in (([1, 2, 2, 1, 1, 2, 1, 2], 6), ([2, 2], 2), ([1], 0)):
        logits, targets, slots, lengths = _batch([[1, 2, 1], neighbour], [6, num_slots])
        logits = torch.cat([alone_logits.detach(), logits.detach()[1:]]).requires_grad_()
        losses = ctc_losses(logits.log_softmax(-1), targets, slots, lengths)
        total, count = mean(losses, lengths)
        torch.testing.assert_close(total / count, alone)
        assert losses.num_left_out == 1
        ours = torch.autograd.grad(total, logits)[0]
        torch.testing.assert_close(ours[:1], gradient)
        assert not ours[1].any()


def test_clips_without_targets_are_not_left_out():
    logits, targets, slots, lengths = _batch([[1], [], []], [3, 3, 3])
    losses = ctc_losses(logits.log_softmax(-1), targets, slots, lengths)
    assert losses.is_counted_N.tolist() == [True, False, False]
    assert losses.num_left_out == 0
    assert mean_over_targets(losses, lengths)[1] == 1


def test_what_is_not_counted_may_hold_anything():
    logits, targets, slots, lengths = _batch([[1, 2], [1, 1, 1]], [4, 3])
    log_probs = logits.log_softmax(-1).detach()
    log_probs[1] = float("nan")
    log_probs.requires_grad_()
    losses = ctc_losses(log_probs, targets, slots, lengths)
    gradient = torch.autograd.grad(losses.losses_N.sum(), log_probs)[0]
    assert losses.losses_N.isfinite().all() and gradient[0].any()
    assert not gradient[1].any()


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 0, 3), (2, 4, 3)])
def test_nothing_to_align(shape):
    log_probs = torch.zeros(shape, requires_grad=True)
    targets = torch.zeros(shape[0], 0 if shape[1] else 2, dtype=torch.long)
    slots, lengths = torch.full(shape[:1], shape[1]), torch.full(shape[:1], targets.shape[1])
    losses = ctc_losses(log_probs, targets, slots, lengths)
    assert losses.losses_N.shape == shape[:1] and not losses.losses_N.any()
    assert losses.num_left_out == (0 if shape[1] else shape[0])
    assert not torch.autograd.grad(losses.losses_N.sum(), log_probs)[0].any()


def test_half_precision_is_summed_in_float32():
    logits, targets, slots, lengths = _batch([[1, 2, 1]], [6], dtype=torch.bfloat16)
    losses = ctc_losses(logits.log_softmax(-1), targets, slots, lengths)
    assert losses.losses_N.dtype == torch.float32
    losses.losses_N.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_slots_known_beforehand():
    logits, targets, slots, lengths = _batch([[1, 1], [2, 1]], [2, 2])
    required = required_slots(targets, lengths)
    got = ctc_losses(logits.log_softmax(-1), targets, slots, lengths, required_slots_N=required)
    wanted = ctc_losses(logits.log_softmax(-1), targets, slots, lengths)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_asks_the_host(monkeypatch):
    """Tensors without data: whatever had to read one would fail. torch's own function has no shape without data."""
    logits, targets, slots, lengths = _batch([[1, 2, 1], [1, 1]], [6, 2])
    log_probs = logits.log_softmax(-1).detach()
    monkeypatch.setattr(torch.nn.functional, "ctc_loss", lambda log_probs_TNV, *_, **__: log_probs_TNV[0, :, 0])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        log_probs, targets, slots, lengths = (mode.from_tensor(x) for x in (log_probs, targets, slots, lengths))
        losses = ctc_losses(log_probs, targets, slots, lengths)
        for mean in (mean_over_targets, sum_over_targets):
            total, count = mean(losses, lengths)
            assert total.shape == count.shape == losses.num_left_out.shape == ()
