"""What benchmarks/train.py counts is right, it refuses to time what differs, and it gives its measures by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its files import each other, as scripts do

import train_peers  # noqa: E402
from allocations import AllocationPeak  # noqa: E402
from attention_work import AttentionWork, sum_of_squares  # noqa: E402
from host_syncs import HostSyncs  # noqa: E402
from train_documents import IGNORE, TINY, Shape, packed, ragged  # noqa: E402

# --- host syncs ---------------------------------------------------------------------------------------------------


class _Asks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        grad.sum().item()
        grad.tolist()
        return grad


X, MASK, COUNTS = torch.randn(5), torch.tensor([True, False, True, True, False]), torch.tensor([1, 2])
LOG_PROBS, TARGETS = torch.randn(5, 2, 4).log_softmax(dim=-1), torch.ones(2, 2, dtype=torch.long)
ASKING: dict[str, Callable[[], Any]] = {
    "item": lambda: X.sum().item(),
    "float": lambda: float(X.sum()),
    "bool": lambda: bool(X.sum() > 0),
    "index": lambda: [1, 2, 3][COUNTS[0]],
    "slice": lambda: X[: COUNTS[1]],
    "format": lambda: f"{X.sum()}",
    "tolist": lambda: X.tolist(),
    "numpy": lambda: X.numpy(),
    "cpu": lambda: X.cpu(),
    "to cpu": lambda: X.to("cpu"),
    "nonzero": lambda: MASK.nonzero(),
    "where": lambda: torch.where(MASK),
    "mask": lambda: X[MASK],
    "masked_select": lambda: X.masked_select(MASK),
    "mask set": lambda: X.clone().index_put_((MASK,), torch.ones(3)),
    "mask set to a row": lambda: X[:, None].clone().index_put_((MASK,), torch.ones(1)),
    "mask added to": lambda: X.clone().index_put_((MASK,), torch.tensor(1.0), accumulate=True),
    "unique": lambda: torch.unique(COUNTS),
    "unique_consecutive": lambda: COUNTS.unique_consecutive(),
    "bincount": lambda: torch.bincount(COUNTS),
    "equal": lambda: torch.equal(X, X),
    "repeat_interleave": lambda: torch.repeat_interleave(COUNTS),
    "multinomial": lambda: torch.multinomial(X.abs() + 1, 1),
    "ctc": lambda: F.ctc_loss(LOG_PROBS, TARGETS, torch.tensor([5, 5]), COUNTS),
    "tensor": lambda: torch.tensor([1, 2], device=X.device),
    "new_tensor": lambda: X.new_tensor([1, 2]),
}
QUIET: dict[str, Callable[[], Any]] = {
    "sum": lambda: X.sum() + X.mean(),
    "gather": lambda: X[COUNTS],
    "select": lambda: X.index_select(0, COUNTS),
    "where of three": lambda: torch.where(MASK, X, 0),
    "mask set to a number": lambda: X.clone().masked_fill_(MASK, 0.0),
    "mask assigned a number": lambda: X.clone().__setitem__(MASK, 0.0),
    "repeat_interleave of a known size": lambda: torch.repeat_interleave(X[:2], COUNTS, output_size=3),
    "ctc with lengths on the host": lambda: F.ctc_loss(LOG_PROBS, TARGETS, (5, 5), (2, 2)),
    "zeros": lambda: torch.zeros(3, device=X.device) + torch.full((3,), 2.0),
    "clip": lambda: torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(X)], 1.0),
    "numbers of the host": lambda: torch.tensor([1, 2]),
}


@pytest.mark.parametrize("name", ASKING)
def test_what_asks_the_host_is_counted_once_and_named(name):
    with HostSyncs() as syncs:
        ASKING[name]()
    assert syncs.count == 1, str(syncs)
    ((_, place),) = syncs.asked
    assert place.startswith(f"{Path(__file__).parent.name}/test_train_benchmark.py:") or "/tests/" in place, place


@pytest.mark.parametrize("name", QUIET)
def test_what_asks_nothing_is_not_counted(name):
    with HostSyncs() as syncs:
        QUIET[name]()
    assert syncs.count == 0, str(syncs)


def test_backward_is_seen_and_outside_nothing_is():
    x = X.clone().requires_grad_()
    with HostSyncs() as syncs:
        out: Any = _Asks.apply(x)
        out.sum().backward()
    x.sum().detach().item()
    assert sorted(what for what, _ in syncs.asked) == ["_local_scalar_dense", "tolist"]


def test_the_kernels_path_for_cpus_is_counted_apart():
    import mmllm_kernels

    weights = torch.randn(4, 6, 8, requires_grad=True), torch.randn(4, 8, 3, requires_grad=True)
    with HostSyncs() as syncs:
        mmllm_kernels.moe(torch.randn(5, 8), torch.randn(5, 4), *weights, 2).out_TD.sum().backward()
    assert syncs.count == 0, str(syncs)
    operators = {what for what, _ in syncs.asked_apart if what.startswith("mmllm_kernels::")}
    assert len(operators) >= 2 and any(what.endswith("_backward") for what in operators)


def test_a_fused_optimizer_asks_nothing():
    weight = torch.nn.Parameter(X.clone())
    optimizer = torch.optim.AdamW([weight], fused=True)
    with HostSyncs() as syncs:
        for _ in range(2):
            weight.grad = X
            optimizer.step()
    assert syncs.count == 0, str(syncs)


# --- memory, attention, documents ---------------------------------------------------------------------------------


@torch.library.custom_op("train_benchmark_test::doubled", mutates_args=())
def _doubled(x: Tensor) -> Tensor:
    """Allocates 4,000 bytes that it gives back, inside an operator of Python's."""
    return x * 2 + torch.ones(1000).sum()


@pytest.mark.parametrize(
    ("run", "wanted"),
    [
        (lambda x: x + 1, 400),
        (lambda x: (x + 1) + (x + 2), 1200),
        (lambda x: [x + 1 for _ in range(9)] and None, 3600),
        (_doubled, 4000 + 400),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_peak_is_what_the_allocator_held(run, wanted):
    x = torch.ones(100)
    with AllocationPeak("cpu") as memory:
        _ = torch.ones(10_000)
        memory.start()
        run(x)
    assert wanted <= memory.peak <= wanted + 64


def test_attention_work_is_counted_of_each_backend():
    query, key = torch.randn(3, 2, 5, 8), torch.randn(3, 2, 7, 8)
    with AttentionWork(2) as work:
        F.scaled_dot_product_attention(query, key, key)
        F.scaled_dot_product_attention(query, query, query, is_causal=True)
    assert work.computed == 3 * 5 * 7 + 3 * 5 * 5
    packed_QHC = torch.randn(9, 2, 8, dtype=torch.bfloat16, requires_grad=True)
    starts = torch.tensor([0, 4, 9], dtype=torch.int32)
    with AttentionWork(2) as work:
        out: Any = varlen_attn(packed_QHC, packed_QHC, packed_QHC, starts, starts, 5, 5)
        out.sum().backward()
    assert work.computed == 4**2 + 5**2 and out.shape == packed_QHC.shape
    with AttentionWork(2) as work:
        flex_attention.create_block_mask(
            lambda b, h, q, k: (q >= k) & (q // 256 == k // 256), None, None, 512, 512, device="cpu"
        )
    assert work.computed == 2 * 2 * 6 * 128**2  # of each document of 256 three blocks
    assert sum_of_squares(torch.tensor([[0, 0, 0, 1, -1], [0, 1, 1, 1, 1]])) == 9 + 1 + 1 + 16


def test_documents_are_ragged_reproducible_and_shifted():
    documents = ragged(TINY)
    assert documents.lengths == ragged(TINY).lengths and documents.lengths != ragged(TINY, seed=1).lengths
    for row, lengths in enumerate(documents.lengths):
        assert sum(lengths) <= TINY.sequence_length and len(set(lengths)) > 1
        start = 0
        for number, length in enumerate(lengths):
            part = slice(start, start + length)
            assert (documents.document_ids_BT[row, part] == number).all()
            assert documents.positions_BT[row, part].tolist() == list(range(length))
            assert (documents.labels_BT[row, part][:-1] == documents.ids_BT[row, part][1:]).all()
            assert documents.labels_BT[row, part][-1] == IGNORE
            start += length
        assert (documents.document_ids_BT[row, start:] == -1).all()
    padded = train_peers.padded_inputs(documents, "cpu")
    assert int(padded["attention_mask"].sum()) == documents.num_tokens
    for inputs in (padded, train_peers.packed_inputs(documents, "cpu")):
        targets = inputs["labels"][:, 1:] != IGNORE  # transformers shifts
        assert int(targets.sum()) == int((documents.labels_BT != IGNORE).sum())


class _Leaks:
    """A "model" whose logits are sums over all that came before, or over what came before in the document."""

    def __init__(self, leaks: bool) -> None:
        self.leaks = leaks

    def __call__(self, input_ids: Tensor, position_ids: Tensor | None = None, use_cache: bool = True) -> Any:
        sums = input_ids.float().cumsum(dim=1)
        if position_ids is not None and not self.leaks:
            starts = torch.arange(input_ids.shape[1]) - position_ids
            sums = sums - F.pad(sums, (1, 0)).gather(1, starts)
        return SimpleNamespace(logits=sums[..., None])


def test_a_peer_whose_documents_see_each_other_is_refused():
    documents = ragged(TINY)
    train_peers.check_no_leak(_Leaks(False), documents, "cpu")
    with pytest.raises(ValueError, match="packed documents see each other"):
        train_peers.check_no_leak(_Leaks(True), documents, "cpu")


# --- the whole script ---------------------------------------------------------------------------------------------

MEASURES = {
    "training tokens/s", "demo step", "head and loss memory", "graph breaks", "host syncs", "attention work", "decode",
}  # fmt: skip


def _run(folder: Path, *arguments: str, code: str | None = None) -> tuple[list[dict[str, Any]], str]:
    """The rows, and what was printed."""
    path = folder / "rows.json"
    script = str(ROOT / "benchmarks" / "train.py")
    command = [sys.executable, *(("-c", code) if code else ()), script, "--quick", "--threads", "1", *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path, str(ROOT / "benchmarks")])}
    result = subprocess.run([*command, "--json", str(path)], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    rows = json.loads(path.read_text())
    for row in rows:
        assert list(row) == ["measure", "case", "value", "unit", "peer", "peer_value", "ratio"]
        assert row["case"].startswith("cpu ")
    return rows, result.stdout


def test_the_counts_are_given_by_name(tmp_path):
    rows, printed = _run(tmp_path, "--only", "graph breaks", "--only", "host syncs")
    assert {(row["measure"], row["case"], row["peer"]) for row in rows} == {
        ("graph breaks", "cpu dense block", None),
        ("graph breaks", "cpu block with experts", None),
        ("host syncs", "cpu text", None),
    }
    assert "mmllm_kernels::" in printed


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_all_measures_are_given_against_another_revision(tmp_path):
    git = ["git", "-C", str(ROOT)]
    found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if found.returncode:
        pytest.skip("this is no git checkout, so there is no other revision")
    rows, printed = _run(tmp_path, "--against", "HEAD")
    assert {row["measure"] for row in rows} == MEASURES
    assert "not run: MFU: needs a GPU" in printed and printed.count("not run: ") == 1, printed[-2000:]
    other = found.stdout.strip()
    assert {row["measure"] for row in rows if row["peer"] == other} == MEASURES
    peers = {row["peer"] for row in rows if row["measure"] == "training tokens/s"}
    assert peers == {"transformers Mixtral padded", "transformers Mixtral packed", other}
    assert {row["peer"] for row in rows if row["measure"] == "head and loss memory"} == {"all logits at once", other}
    bfloat16 = {row["peer"] for row in rows if row["case"].startswith("cpu bfloat16 kernel")}
    assert {"ours, float32", "transformers eager", "transformers grouped_mm"} <= bfloat16
    work = {row["case"]: row["ratio"] for row in rows if row["peer"] == "sum of squares"}
    assert set(work) == {f"cpu {backend}" for backend in ("auto", "buckets", "varlen", "flex", "dense")}
    assert work["cpu varlen"] == 1 <= work["cpu auto"] < work["cpu dense"]
    counts = [row for row in rows if row["measure"] in ("graph breaks", "host syncs", "head and loss memory")]
    assert all(row["value"] == pytest.approx(row["peer_value"], rel=0.1) for row in counts if row["peer"] == other)
    worktrees = subprocess.run([*git, "worktree", "list"], capture_output=True, text=True, check=True)
    assert "against" not in worktrees.stdout


WRONG = """
import runpy, sys
import train_peers
right = train_peers.Training.step
train_peers.Training.step = lambda training: right(training) * 1.001
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.proof
def test_a_peer_with_another_loss_is_not_timed(tmp_path):
    rows, printed = _run(tmp_path, "--only", "training tokens/s", code=WRONG)
    assert [row["peer"] for row in rows] == [None]
    assert printed.count("NOT TIMED: differs from ours by 1.0e-03, more than 0.0001") == 2


@pytest.mark.proof
def test_model_flops_are_those_that_are_counted(tmp_path):
    """By PyTorch's counter, of transformers' Mixtral on one document; it counts attention's whole square."""
    from torch.utils.flop_counter import FlopCounterMode
    from train import model_flops

    shape = Shape("one", 32, 2, 4, 2, 16, 24, 4, 2, vocab_size=50, num_sequences=1, sequence_length=40)
    train_peers.save_weights(shape, tmp_path)
    documents = packed([(40,)], 40, 50, np.random.default_rng(0))
    model = train_peers.load(tmp_path, "eager", "cpu")
    with FlopCounterMode(display=False) as counter:
        model(**train_peers.padded_inputs(documents, "cpu"), use_cache=False).loss.backward()
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    products = sum(counts.get(operator, 0) for operator in (aten.mm, aten.addmm, aten.bmm))
    attention = 6.0 * shape.num_hidden_layers * shape.num_attention_heads * shape.head_dim * 40**2
    assert model_flops(shape, documents.lengths) == pytest.approx(products + attention)
