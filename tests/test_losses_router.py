"""Router losses against token-by-token computations, and ranks' parts against the whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmllm.losses.router import (
    balance_loss,
    balance_losses,
    global_entropy_losses,
    local_entropy_losses,
    sequence_balance_loss,
    z_loss,
)

LAYERS, TOKENS, EXPERTS, TOP_K, GROUPS = 3, 23, 5, 2, 4


class Routing:
    """Router logits of some tokens, and the sums over them."""

    def __init__(self, logits_LNE: Tensor, group_N: Tensor):
        self.logits, self.group = logits_LNE, group_N
        self.probabilities = logits_LNE.softmax(-1)
        chosen = self.probabilities.topk(TOP_K, dim=-1).indices
        self.one_hot = torch.zeros_like(self.probabilities).scatter(-1, chosen, 1.0).detach()

    @property
    def num_tokens(self) -> int:
        return self.logits.shape[1]

    @property
    def counts_LE(self) -> Tensor:
        return self.one_hot.sum(1).long()

    @property
    def sums_LE(self) -> Tensor:
        return self.probabilities.sum(1)

    def by_group(self, values_LNE: Tensor) -> Tensor:
        return torch.stack([values_LNE[:, self.group == group].sum(1) for group in range(GROUPS)], dim=1)

    @property
    def tokens_G(self) -> Tensor:
        return torch.bincount(self.group[self.group >= 0], minlength=GROUPS)

    def rank(self, index: int) -> Routing:
        return Routing(self.logits[:, index::2], self.group[index::2])


@pytest.fixture
def routing() -> Routing:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(LAYERS, TOKENS, EXPERTS, dtype=torch.float64, generator=generator) * 2
    group = torch.randint(-1, GROUPS - 1, (TOKENS,), generator=generator)  # the last group has no tokens
    return Routing(logits.requires_grad_(), group)


def _same(routing: Routing, got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad(x.sum(), routing.logits, retain_graph=True)[0] for x in (got, wanted))
    torch.testing.assert_close(ours, theirs)
    assert theirs.any()


def _balance(one_hot_NE: Tensor, probabilities_NE: Tensor) -> Tensor:
    share_E, mean_E = one_hot_NE.mean(0) / TOP_K, probabilities_NE.mean(0)
    return EXPERTS * (share_E * mean_E).sum()


def test_balance_of_each_layer(routing):
    wanted = torch.stack([_balance(routing.one_hot[i], routing.probabilities[i]) for i in range(LAYERS)])
    got = balance_losses(routing.counts_LE, routing.sums_LE, TOKENS, TOP_K)
    _same(routing, got, wanted)
    _same(routing, balance_loss(routing.counts_LE, routing.sums_LE, TOKENS, TOP_K), wanted.mean())
    _same(routing, balance_loss(routing.counts_LE, routing.sums_LE, torch.tensor(TOKENS), TOP_K), wanted.mean())


def test_balance_over_all_layers_together(routing):
    wanted = _balance(routing.one_hot.flatten(0, 1), routing.probabilities.flatten(0, 1))
    _same(routing, balance_loss(routing.counts_LE, routing.sums_LE, TOKENS, TOP_K, "global"), wanted)


def test_balance_as_transformers_has_it_but_for_top_k(routing):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    theirs = mixtral.load_balancing_loss_func(tuple(routing.logits.float()), EXPERTS, TOP_K)
    ours = balance_loss(routing.counts_LE, routing.sums_LE.float(), TOKENS, TOP_K, "global")
    torch.testing.assert_close(ours * TOP_K, theirs, check_dtype=False)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_bounds_of_balance(scope):
    even = torch.full((LAYERS, EXPERTS), 10.0)
    num_tokens = 10 * EXPERTS // TOP_K
    balanced = balance_loss(even, even / TOP_K, num_tokens, TOP_K, scope)
    torch.testing.assert_close(balanced, torch.tensor(1.0))
    collapsed = torch.zeros(LAYERS, EXPERTS)
    collapsed[:, :TOP_K] = num_tokens
    worst = balance_loss(collapsed, collapsed / TOP_K, num_tokens, TOP_K, scope)
    torch.testing.assert_close(worst, torch.tensor(EXPERTS / TOP_K))


def test_one_collapsed_layer_hides_from_the_global_balance():
    counts = torch.full((EXPERTS, EXPERTS), 0.0).fill_diagonal_(50.0)  # each layer has an expert of its own
    assert balance_loss(counts, counts, 50, 1, "global") == 1
    assert balance_loss(counts, counts, 50, 1, "layer") == EXPERTS


def test_balance_within_sequences(routing):
    got, count = sequence_balance_loss(
        routing.by_group(routing.one_hot), routing.by_group(routing.probabilities), routing.tokens_G, TOP_K
    )
    wanted = []
    for layer in range(LAYERS):
        for group in range(GROUPS - 1):
            rows = routing.group == group
            wanted.append(_balance(routing.one_hot[layer, rows], routing.probabilities[layer, rows]))
    _same(routing, got, torch.stack(wanted).sum() / LAYERS)
    assert count == GROUPS - 1


def test_z_loss(routing):
    z_sums_L = routing.logits.logsumexp(-1).square().sum(1)
    _same(routing, z_loss(z_sums_L, TOKENS), routing.logits.logsumexp(-1).square().mean())
    _same(routing, z_loss(z_sums_L, torch.tensor(TOKENS)), routing.logits.logsumexp(-1).square().mean())


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum(-1)


def test_local_entropy(routing):
    sums = routing.by_group(_entropy(routing.probabilities))
    wanted = torch.zeros(LAYERS, GROUPS, dtype=torch.float64)
    for group in range(GROUPS - 1):
        wanted[:, group] = _entropy(routing.probabilities[:, routing.group == group]).mean(1)
    _same(routing, local_entropy_losses(sums, routing.tokens_G), wanted)


@pytest.mark.parametrize("threshold", [None, 1.35])
def test_global_entropy(routing, threshold):
    wanted = torch.zeros(LAYERS, GROUPS, dtype=torch.float64)
    for group in range(GROUPS - 1):
        loss = -_entropy(routing.probabilities[:, routing.group == group].mean(1))
        wanted[:, group] = loss if threshold is None else (threshold + loss).clamp(min=0)
    if threshold is not None:
        assert 0 < (wanted[:, : GROUPS - 1] > 0).sum() < LAYERS * (GROUPS - 1)  # on both sides of it
    got = global_entropy_losses(routing.by_group(routing.probabilities), routing.tokens_G, threshold=threshold)
    _same(routing, got, wanted)


def test_global_entropy_of_scores_that_are_no_probabilities():
    """Sigmoid scores have any sum, so that the gradient must be whole, not up to a constant."""
    sums = torch.rand(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tokens = torch.tensor([2, 1, 5])
    means = sums / tokens[:, None]
    got, wanted = global_entropy_losses(sums, tokens), (means * means.log()).sum(-1)
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad(x.sum(), sums, retain_graph=True)[0] for x in (got, wanted))
    torch.testing.assert_close(ours, theirs)


def test_entropy_of_certain_routing_is_finite():
    sums = torch.tensor([[[4.0, 0.0, 0.0]]], requires_grad=True)
    loss = global_entropy_losses(sums, torch.tensor([4]))
    assert loss == 0 and torch.autograd.grad(loss.sum(), sums)[0].isfinite().all()


@pytest.mark.parametrize("threshold", [None, 1.35])
def test_ranks_add_up(routing, threshold):
    def losses(part: Routing, whole: Routing) -> list[Tensor]:
        sums_LGE, all_sums_LGE = part.by_group(part.probabilities), whole.by_group(whole.probabilities).detach()
        entropy = part.by_group(_entropy(part.probabilities))
        args = (whole.counts_LE, part.sums_LE, whole.num_tokens, TOP_K)
        return [
            balance_loss(*args),
            balance_loss(*args, "global"),
            z_loss(part.logits.logsumexp(-1).square().sum(1), whole.num_tokens),
            local_entropy_losses(entropy, whole.tokens_G),
            global_entropy_losses(sums_LGE, whole.tokens_G, all_sums_LGE, threshold),
        ]

    first, second = routing.rank(0), routing.rank(1)
    wholes = losses(routing, routing)
    for a, b, wanted in zip(losses(first, routing), losses(second, routing), wholes, strict=True):
        _same(routing, a + b, wanted)


def test_no_tokens_and_no_layers():
    counts, sums = torch.zeros(LAYERS, EXPERTS), torch.zeros(LAYERS, EXPERTS, requires_grad=True)
    for scope in ("layer", "global"):
        assert balance_loss(counts, sums, 0, TOP_K, scope) == 0
        assert balance_loss(counts, sums, torch.tensor(0), TOP_K, scope) == 0
        assert balance_loss(counts[:0], sums[:0], 0, TOP_K, scope) == 0
    assert z_loss(torch.zeros(LAYERS), 0) == 0
    assert z_loss(torch.zeros(0), 0) == 0
    none = torch.zeros(GROUPS, dtype=torch.long)
    total, count = sequence_balance_loss(*[torch.zeros(LAYERS, GROUPS, EXPERTS)] * 2, none, TOP_K)
    assert total == 0 and count == 0
    for threshold in (None, 1.0):
        assert not global_entropy_losses(torch.zeros(LAYERS, GROUPS, EXPERTS), none, threshold=threshold).any()
    assert not local_entropy_losses(torch.zeros(LAYERS, GROUPS), none).any()


def test_an_unknown_scope_is_named():
    with pytest.raises(ValueError, match=r"scope of the balance loss is 'sequence'; choose layer or global"):
        balance_loss(torch.zeros(1, 2), torch.zeros(1, 2), 1, 1, "sequence")  # pyright: ignore
