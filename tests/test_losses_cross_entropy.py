"""Chunked cross-entropy against all logits at once: values, every gradient, memory."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from mmllm.batch import IGNORE
from mmllm.losses import chunked, cross_entropy
from mmllm.losses.cross_entropy import (
    CodeTargets,
    CrossEntropy,
    linear_cross_entropy,
    log_probabilities,
    weighted_cross_entropy,
)

TOLERANCES = {torch.float64: (1e-10, 1e-12), torch.float32: (2e-5, 3e-5)}
SIZES = {  # targets, width, vocabulary, bytes of a chunk
    "odd": (37, 8, 53, 1000),
    "one target": (1, 5, 11, 64),
    "no target": (0, 5, 11, 64),
    "a row is larger than a chunk": (7, 4, 29, 1),
    "one chunk": (9, 6, 20, 2**20),
}
BLOCK, NUM_BLOCKS = 5, 2
has_torch_backend = pytest.mark.skipif(
    not hasattr(torch.nn, "LinearCrossEntropyOptions"), reason="this torch has no linear_cross_entropy by chunks"
)
WAYS = [(backend, softcap) for backend in ("auto", "chunked", "full") for softcap in (None, 2.5)]
WAYS.append(pytest.param("torch", None, marks=has_torch_backend))  # it knows no soft cap: an error, see below


class Case:
    """Inputs, with some targets ignored and some that are the best guess."""

    def __init__(self, num_targets: int, width: int, vocabulary: int, chunk_bytes: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(num_targets + vocabulary)
        randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
        rand = lambda *shape: torch.rand(*shape, dtype=torch.float64, generator=generator).to(dtype)  # noqa: E731
        self.hidden = randn(num_targets, width).requires_grad_()
        self.weight = randn(vocabulary, width).requires_grad_()
        self.labels = torch.randint(vocabulary, (num_targets,), generator=generator)
        self.labels[::3] = (self.hidden[::3] @ self.weight.T).argmax(dim=-1)
        self.labels[2::5] = IGNORE
        self.upstream, self.on_logsumexp = rand(num_targets), rand(num_targets)
        frames = torch.arange(num_targets)[1::2]
        codes = torch.randint(BLOCK, (len(frames), NUM_BLOCKS), generator=generator)
        codes[::2, 1] = IGNORE
        self.codes = CodeTargets(frames, codes, rand(*codes.shape), vocabulary - BLOCK * NUM_BLOCKS, BLOCK)
        self.chunk_bytes = chunk_bytes

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, (self.hidden, self.weight), retain_graph=True))


def _reference(case: Case, softcap: float | None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Target by target: losses, logsumexp and whether it is the best guess."""
    losses, logsumexps, is_best = [], [], []
    for hidden, label in zip(case.hidden, case.labels.tolist(), strict=True):
        logits = case.weight @ hidden
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        if label == IGNORE:
            losses.append(logits.sum() * 0)
            logsumexps.append(logits.sum() * 0)
            is_best.append(False)
            continue
        logsumexps.append(logits.exp().sum().log())
        losses.append(logsumexps[-1] - logits[label])
        is_best.append(int(logits.argmax()) == label)
    return losses, logsumexps, torch.tensor(is_best, dtype=torch.bool)


def _weighted_reference(case: Case, z_loss_coef: float, softcap: float | None) -> tuple[Tensor, Tensor]:
    """The total, and the codes' losses."""
    losses, logsumexps, _ = _reference(case, softcap)
    total = (case.hidden.sum() + case.weight.sum()) * 0
    for weight, loss, logsumexp in zip(case.upstream, losses, logsumexps, strict=True):
        total = total + weight * (loss + z_loss_coef * logsumexp**2)
    frames, codes, weights, first_row, block = case.codes
    code_losses = torch.zeros(codes.shape, dtype=case.hidden.dtype)
    for u, frame in enumerate(frames.tolist()):
        for j, code in enumerate(codes[u].tolist()):
            if code == IGNORE:
                continue
            logits = case.weight[first_row + j * block : first_row + (j + 1) * block] @ case.hidden[frame]
            logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
            loss = F.cross_entropy(logits, torch.tensor(code))
            code_losses[u, j] = loss.detach()
            total = total + weights[u, j] * loss
    return total, code_losses


def _check(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(got, wanted.to(got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("backend", "softcap"), WAYS)
def test_any_upstream_gradient(backend, size, dtype, softcap):
    case, exact = Case(*SIZES[size], dtype), Case(*SIZES[size], torch.float64)
    result = linear_cross_entropy(
        case.hidden, case.weight, case.labels, softcap=softcap, backend=backend, chunk_bytes=case.chunk_bytes
    )
    losses, logsumexps, is_best = _reference(exact, softcap)
    assert result.losses_M.dtype == result.logsumexp_M.dtype == dtype
    assert not result.is_best_M.requires_grad
    if losses:
        _check(result.losses_M, torch.stack(losses), dtype)
        _check(result.logsumexp_M, torch.stack(logsumexps), dtype)
    torch.testing.assert_close(result.is_best_M, is_best)
    loss = (result.losses_M * case.upstream).sum() + (result.logsumexp_M.square() * case.on_logsumexp).sum()
    wanted = (exact.hidden.sum() + exact.weight.sum()) * 0
    for m in range(len(losses)):
        wanted = wanted + exact.upstream[m] * losses[m] + exact.on_logsumexp[m] * logsumexps[m] ** 2
    for got, gradient in zip(case.gradients(loss), exact.gradients(wanted), strict=True):
        assert got.dtype == dtype
        _check(got, gradient, dtype)


@pytest.mark.parametrize("z_loss_coef", [0.0, 0.1])
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("backend", "softcap"), WAYS)
def test_weighted_sum(backend, size, dtype, z_loss_coef, softcap):
    case, exact = Case(*SIZES[size], dtype), Case(*SIZES[size], torch.float64)
    result = weighted_cross_entropy(
        *(case.hidden, case.weight, case.labels, case.upstream, case.codes),
        z_loss_coef=z_loss_coef,
        softcap=softcap,
        backend=backend,
        chunk_bytes=case.chunk_bytes,
    )
    total, code_losses = _weighted_reference(exact, z_loss_coef, softcap)
    losses, logsumexps, is_best = _reference(exact, softcap)
    _check(result.total, total, dtype)
    _check(result.code_losses_UJ, code_losses, dtype)
    if losses:
        _check(result.losses_M, torch.stack(losses), dtype)
        _check(result.logsumexp_M, torch.stack(logsumexps), dtype)
    torch.testing.assert_close(result.is_best_M, is_best)
    assert not any(tensor.requires_grad for tensor in result[1:])
    for got, gradient in zip(case.gradients(result.total * 3), exact.gradients(total * 3), strict=True):
        assert got.dtype == dtype
        _check(got, gradient, dtype)


@pytest.mark.parametrize("cut", [1, 40, 45, 52], ids=lambda cut: f"{cut} rows first")  # 45 cuts the codes' blocks
@pytest.mark.parametrize("trained", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("dtype", [*TOLERANCES, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["chunked", "full"])
def test_rows_in_two_blocks_are_as_in_one_and_have_gradients_of_their_own(cut, trained, dtype, backend):
    case = Case(*SIZES["odd"], torch.float32 if dtype == torch.bfloat16 else dtype)

    def loss_of(weight):
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return weighted_cross_entropy(
                *(case.hidden, weight, case.labels, case.upstream, case.codes),
                z_loss_coef=0.1, softcap=2.5, backend=backend, chunk_bytes=case.chunk_bytes,
            )  # fmt: skip

    blocks = tuple(
        rows.detach().clone().requires_grad_(has_grad)
        for rows, has_grad in zip(case.weight.split((cut, 53 - cut)), trained, strict=True)
    )
    got, wanted = loss_of(blocks), loss_of(case.weight)
    rtol, atol = TOLERANCES.get(dtype, (2e-2, 2e-2))
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)
    got.total.backward()
    of_hidden, of_weight = case.hidden.grad, torch.autograd.grad(wanted.total, (case.hidden, case.weight))
    torch.testing.assert_close(of_hidden, of_weight[0], rtol=rtol, atol=atol)
    for block, whole, has_grad in zip(blocks, of_weight[1].split((cut, 53 - cut)), trained, strict=True):
        assert (block.grad is not None) == has_grad
        if block.grad is not None:
            torch.testing.assert_close(block.grad, whole, rtol=rtol, atol=atol)


@pytest.mark.parametrize("backend", ["chunked", "full"])
def test_all_ignored_is_zero_with_zero_gradients(backend):
    case = Case(*SIZES["odd"], torch.float32)
    case.labels[:] = IGNORE
    codes = case.codes._replace(codes_UJ=torch.full_like(case.codes.codes_UJ, IGNORE))
    result = weighted_cross_entropy(
        case.hidden, case.weight, case.labels, case.upstream, codes, z_loss_coef=1.0, backend=backend
    )
    assert result.total == 0
    assert all(not gradient.any() for gradient in case.gradients(result.total))
    result = linear_cross_entropy(case.hidden, case.weight, case.labels, backend=backend)
    assert not result.losses_M.any() and not result.logsumexp_M.any() and not result.is_best_M.any()
    assert all(not gradient.any() for gradient in case.gradients((result.losses_M + result.logsumexp_M).sum()))


def test_gradcheck():
    case = Case(7, 3, 13, 64, torch.float64)

    def per_target(hidden, weight):
        return linear_cross_entropy(hidden, weight, case.labels, softcap=3.0, backend="chunked", chunk_bytes=300)[:2]

    def weighted(hidden, weight):
        args = (hidden, weight, case.labels, case.upstream, case.codes)
        return weighted_cross_entropy(*args, z_loss_coef=0.2, softcap=3.0, chunk_bytes=300).total

    assert torch.autograd.gradcheck(per_target, (case.hidden, case.weight))
    assert torch.autograd.gradcheck(weighted, (case.hidden, case.weight))


def test_only_the_gradients_that_are_wanted():
    case = Case(*SIZES["odd"], torch.float64)
    hidden, weight = case.gradients(weighted_cross_entropy(case.hidden, case.weight, case.labels, case.upstream).total)
    for frozen in ("hidden", "weight"):
        h = case.hidden.detach() if frozen == "hidden" else case.hidden
        w = case.weight.detach() if frozen == "weight" else case.weight
        trained, wanted = (w, weight) if frozen == "hidden" else (h, hidden)
        total = weighted_cross_entropy(h, w, case.labels, case.upstream).total
        torch.testing.assert_close(torch.autograd.grad(total, trained)[0], wanted)
        losses = linear_cross_entropy(h, w, case.labels, backend="chunked").losses_M
        torch.testing.assert_close(torch.autograd.grad((losses * case.upstream).sum(), trained)[0], wanted)
    with torch.no_grad():
        assert not weighted_cross_entropy(case.hidden, case.weight, case.labels, case.upstream).total.requires_grad


def test_the_total_may_be_used_twice_but_has_no_second_derivative():
    case = Case(*SIZES["odd"], torch.float64)
    total = weighted_cross_entropy(case.hidden, case.weight, case.labels, case.upstream).total
    once = torch.autograd.grad(total, case.hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(2 * total, case.hidden, retain_graph=True)[0], 2 * once)
    gradient = torch.autograd.grad(total, case.hidden, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.square().sum().backward()


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    labels = torch.tensor([1, 1, 2])
    for backend in ("chunked", "full"):
        losses, logsumexp, is_best = linear_cross_entropy(hidden, weight, labels, backend=backend)
        torch.testing.assert_close(losses, torch.tensor([2e4, 0.0, 3.0]).where(torch.tensor([1, 1, 0]) > 0, losses))
        torch.testing.assert_close(losses[2], torch.tensor(3.0).log())
        torch.testing.assert_close(logsumexp[:2], torch.tensor([1e4, 1e4]))
        assert is_best.tolist() == [False, True, False]  # of equal logits the first is the best
        assert all(g.isfinite().all() for g in torch.autograd.grad(losses.sum(), (hidden, weight)))


def test_a_range_of_the_vocabulary():
    case = Case(*SIZES["odd"], torch.float64)
    labels = case.labels.remainder(20).where(case.labels != IGNORE, IGNORE)
    got = linear_cross_entropy(case.hidden, case.weight, labels, rows=(11, 31), backend="chunked", chunk_bytes=500)
    wanted = linear_cross_entropy(case.hidden, case.weight[11:31], labels, backend="full")
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    ours = case.gradients((got.losses_M * case.upstream).sum())
    for gradient, theirs in zip(ours, case.gradients((wanted.losses_M * case.upstream).sum()), strict=True):
        torch.testing.assert_close(gradient, theirs)


def test_log_probabilities():
    case = Case(*SIZES["odd"], torch.float64)
    has_label = case.labels != IGNORE
    log_probs = (case.hidden @ case.weight.T).log_softmax(dim=-1)
    wanted = log_probs.gather(1, case.labels.clamp(min=0)[:, None]).squeeze(1) * has_label
    for backend in ("chunked", "full", "auto"):
        got = log_probabilities(case.hidden, case.weight, case.labels, backend=backend, chunk_bytes=700)
        torch.testing.assert_close(got, wanted)
        ratio = (got - got.detach()).exp() * case.upstream  # as a policy gradient has it
        for ours, theirs in zip(
            case.gradients(ratio.sum()), case.gradients((wanted * case.upstream).sum()), strict=True
        ):
            torch.testing.assert_close(ours, theirs)


def _in_bf16(how: str, case: Case, backend: str) -> tuple[CrossEntropy, list[Tensor]]:
    hidden, weight = case.hidden, case.weight
    context = torch.autocast("cpu", torch.bfloat16) if how == "autocast" else contextlib.nullcontext()
    if how == "weights":
        hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    with context:
        result = linear_cross_entropy(hidden, weight, case.labels, backend=backend, chunk_bytes=4000)
        total = (result.losses_M * case.upstream).sum()
        if backend == "chunked":
            known = weighted_cross_entropy(hidden, weight, case.labels, case.upstream, chunk_bytes=4000)
            torch.testing.assert_close(known.losses_M, result.losses_M)
            known_gradients = torch.autograd.grad(known.total, (hidden, weight))
    gradients = list(torch.autograd.grad(total, (hidden, weight)))
    if backend == "chunked":
        for got, wanted in zip(known_gradients, gradients, strict=True):
            assert got.dtype == wanted.dtype == hidden.dtype
            torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)
    return result, gradients


@pytest.mark.parametrize("how", ["autocast", "weights"])
def test_bf16(how):
    case = Case(61, 32, 97, 0, torch.float32)
    got, gradients = _in_bf16(how, case, "chunked")
    wanted, full_gradients = _in_bf16(how, case, "full")
    assert got.losses_M.dtype == got.logsumexp_M.dtype == torch.float32
    torch.testing.assert_close(got.losses_M, wanted.losses_M)  # the same bf16 logits, then float32
    torch.testing.assert_close(got.is_best_M, wanted.is_best_M)
    exact = [g.double() for g in case.gradients((linear_cross_entropy(
        case.hidden, case.weight, case.labels, backend="full").losses_M * case.upstream).sum())]  # fmt: skip
    for ours, theirs, true in zip(gradients, full_gradients, exact, strict=True):
        error, their_error = (ours.double() - true).norm() / true.norm(), (theirs.double() - true).norm() / true.norm()
        assert error < 0.01
        assert error < 1.3 * their_error  # no worse than all logits at once


def test_autocast_leaves_float64_alone():
    case = Case(*SIZES["odd"], torch.float64)
    wanted = linear_cross_entropy(case.hidden, case.weight, case.labels, backend="full")
    with torch.autocast("cpu", torch.bfloat16):
        got = linear_cross_entropy(case.hidden, case.weight, case.labels, backend="chunked")
    torch.testing.assert_close(got.losses_M, wanted.losses_M)


# --- memory, host syncs, compile --------------------------------------------------------------------------------------


def _peak_bytes(function) -> tuple[int, int]:
    """The most that was allocated at once, and the largest allocation, by what the allocator reports."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    results = profiler.profiler.kineto_results
    sizes = [event.nbytes() for event in results.events() if event.name() == "[memory]"]
    current = peak = 0
    for size in sizes:
        current += size
        peak = max(peak, current)
    return peak, max(sizes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_of_head_and_loss(dtype):
    """The proportions of 4,096 targets of 40,968 ids at width 1,024, an eighth of each."""
    num_targets, width, vocabulary, chunk_bytes = 512, 128, 5121, 2**20
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_targets, width, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, width, generator=generator).requires_grad_()
    labels = torch.randint(vocabulary, (num_targets,), generator=generator)
    upstream = torch.rand(num_targets, generator=generator)
    args = (hidden, weight, labels)

    def autocast():
        return torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16)

    def all_logits():
        with autocast():
            logits = F.linear(hidden, weight)
            losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE, reduction="none")
            (logits.argmax(dim=-1) == labels).sum()
        del logits
        (losses * upstream).sum().backward()

    def in_chunks():
        with autocast():
            result = weighted_cross_entropy(*args, upstream, z_loss_coef=1e-4, chunk_bytes=chunk_bytes)
        result.total.backward()

    def per_target():
        with autocast():
            result = linear_cross_entropy(*args, chunk_bytes=chunk_bytes)
        (result.losses_M * upstream).sum().backward()

    peaks, largest = {}, {}
    for function in (all_logits, in_chunks, per_target):
        hidden.grad = weight.grad = None
        peaks[function.__name__], largest[function.__name__] = _peak_bytes(function)
    assert largest["all_logits"] >= num_targets * vocabulary * 4  # what is measured is seen
    for name in ("in_chunks", "per_target"):
        assert largest[name] <= max(chunk_bytes, vocabulary * width * 4)
        assert peaks[name] <= 0.25 * peaks["all_logits"], peaks


def test_nothing_asks_the_host():
    """Tensors without data: whatever had to read one would fail."""
    case = Case(*SIZES["odd"], torch.float32)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        hidden, weight, labels, upstream, *codes = (
            mode.from_tensor(tensor.detach())
            for tensor in (case.hidden, case.weight, case.labels, case.upstream, *case.codes[:3])
        )
        settings = (*case.codes[3:], 0.1, 2.0, torch.float32, 1000)
        blocks, wanted = (weight[:50], weight[50:]), (True, False, True)
        outputs = chunked.weighted._init_fn(hidden, *blocks, labels, upstream, *codes, *settings, *wanted)
        assert [gradient.numel() for gradient in outputs[-2:]] == [0, weight[50:].numel()]
        losses, logsumexp, _ = chunked.per_target._init_fn(hidden, weight, labels, 0, 53, 0.0, torch.float32, 1000)
        args = (upstream, upstream, hidden, weight, labels, logsumexp, 0, 53, 0.0, torch.float32, 1000, True, True)
        assert chunked.per_target_backward._init_fn(*args)[1].shape == weight.shape
        with pytest.raises(DataDependentOutputException):
            losses.sum().item()


def test_operators_are_registered_rightly():
    case = Case(7, 4, 17, 200, torch.float64)
    settings = (0.1, 3.0, torch.float64, 200)
    blocks = [block.detach().requires_grad_() for block in case.weight.split((10, 7))]
    args = (case.hidden, *blocks, case.labels, case.upstream, *case.codes, *settings, True, True, True)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(chunked.weighted, args, test_utils=tests)
    args = (case.hidden, case.weight, case.labels, 0, 17, 3.0, torch.float64, 200)
    torch.library.opcheck(chunked.per_target, args, test_utils=tests)


def test_compiled_without_a_break():
    case = Case(*SIZES["odd"], torch.float64)

    def step(hidden, weight, labels, upstream):
        known = weighted_cross_entropy(hidden, weight, labels, upstream, case.codes, z_loss_coef=0.1, chunk_bytes=1000)
        free = linear_cross_entropy(hidden, weight, labels, backend="chunked", chunk_bytes=1000)
        return known.total, (free.losses_M * upstream).sum(), known.is_best_M

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    args = (case.hidden, case.weight, case.labels, case.upstream)
    got, wanted = compiled(*args), step(*args)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)
    for index in range(2):
        for ours, theirs in zip(case.gradients(got[index]), case.gradients(wanted[index]), strict=True):
            torch.testing.assert_close(ours, theirs)


# --- backends ---------------------------------------------------------------------------------------------------------


def test_bad_choices_are_named():
    case = Case(*SIZES["odd"], torch.float32)
    args = (case.hidden, case.weight, case.labels)
    for function, more in ((linear_cross_entropy, ()), (weighted_cross_entropy, (case.upstream,))):
        with pytest.raises(ValueError, match=r"backend is 'fast'; choose auto, chunked"):
            function(*args, *more, backend="fast")
        with pytest.raises(ValueError, match="chunk_bytes is 0; it must be positive"):
            function(*args, *more, chunk_bytes=0)
        with pytest.raises((ValueError, ModuleNotFoundError), match="choose chunked"):
            function(*args, *more, softcap=2.0, backend="torch")


def test_liger_is_asked_for_when_missing(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    case = Case(*SIZES["odd"], torch.float32)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'liger-kernel>=0.8.5', or choose chunked"):
        linear_cross_entropy(case.hidden, case.weight, case.labels, backend="liger")


def test_torch_is_asked_for_when_too_old(monkeypatch):
    monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    case = Case(*SIZES["odd"], torch.float32)
    with pytest.raises(ModuleNotFoundError, match=r"install torch 2\.14 or newer, or choose chunked"):
        linear_cross_entropy(case.hidden, case.weight, case.labels, backend="torch")


def test_auto_takes_all_logits_only_where_they_fit_a_chunk():
    chosen = cross_entropy._chosen
    assert chosen("auto", 100 * 50, torch.float32, 100 * 50 * 4) == "full"
    assert chosen("auto", 100 * 50, torch.float32, 100 * 50 * 4 - 1) == "chunked"
    assert chosen("auto", 100 * 50, torch.bfloat16, 100 * 50 * 4 - 1) == "chunked"


def test_chunks_are_even():
    assert [c.stop - c.start for c in chunked.chunks(11, 10, 40)] == [4, 4, 3]
    assert [c.stop - c.start for c in chunked.chunks(2, 10, 1)] == [1, 1]
    assert not list(chunked.chunks(0, 10, 40))
    assert max(c.stop - c.start for c in chunked.chunks(4096, 40968 * 4, 64 * 2**20)) * 40968 * 4 <= 64 * 2**20
