"""Losses of text and units against a target-by-target computation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mmllm.batch import IGNORE
from mmllm.losses.tokens import HeadLayout, TokenLosses, TokenTargets, TokenWeights, token_losses
from mmllm.model.multimodal import LossConfig

NUM_TEXT, SIZE, WIDTH, NUM_SOURCES, END = 20, 6, 8, 3, 4
SOURCES = ("0", "1", "2")
"""The sources' names: their indices."""
PLAIN = LossConfig()
WEIGHTED = LossConfig(
    text=0.5, units=2.0, codebook_weights=(3.0, 1.0, 0.0), source_weights={"0": 0.25, "2": 4.0}, head_z_loss_coef=0.1,
    word_weights={"3": 6.0, "11": 0.5, "4": 2.0},
)  # fmt: skip
"""Words are their ids here; 4 is the end of sound, too, which is no text."""


class Stream:
    """Positions with text, ends of sound, frames of units and nothing, as the collator lays them out."""

    def __init__(self, num_codebooks: int, num_sequences: int = 2, num_positions: int = 12, seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        self.layout = HeadLayout(NUM_TEXT, num_codebooks, SIZE if num_codebooks else 0, END)
        vocabulary = NUM_TEXT + num_codebooks * (SIZE + 1 if num_codebooks else 0)
        shape = (num_sequences, num_positions)
        randint = lambda high, *size: torch.randint(high, size, generator=generator)  # noqa: E731
        kind = randint(5, *shape)  # 0 nothing, 1 text, 2 end of sound, 3 frame, 4 frame without codebook 0
        self.labels = torch.full(shape, IGNORE)
        self.labels[kind == 1] = randint(NUM_TEXT, int((kind == 1).sum()))
        self.labels[kind == 2] = END
        self.audio_labels = torch.full((*shape, num_codebooks), IGNORE)
        if num_codebooks:
            first = randint(SIZE + 1, *shape)  # the filler may be predicted
            self.labels[kind == 3] = NUM_TEXT + first[kind == 3]
            codes = randint(SIZE, *shape, num_codebooks)
            codes[randint(4, *shape, num_codebooks) == 0] = IGNORE
            self.audio_labels[kind >= 3] = codes[kind >= 3]
        self.sources = randint(NUM_SOURCES + 1, *shape) - 1
        self.hidden = torch.randn(*shape, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        self.weight = torch.randn(vocabulary, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()
        has_target = (self.labels != IGNORE) | (self.audio_labels != IGNORE).any(-1)
        self.targets = has_target.flatten().nonzero().squeeze(1)
        codes = self.audio_labels.flatten(0, 1)[self.targets][:, 1:]
        self.frames = (codes != IGNORE).any(-1).nonzero().squeeze(1)

    def pad(self, count: int) -> None:
        self.targets, self.frames = F.pad(self.targets, (0, count), value=-1), F.pad(self.frames, (0, count), value=-1)

    def losses(self, config: LossConfig, **options) -> TokenLosses:
        targets = TokenTargets.of(self.labels, self.audio_labels, self.sources, self.targets, self.frames)
        words = {int(word): weight for word, weight in (config.word_weights or {}).items()}
        weights = TokenWeights.of(config, self.layout, SOURCES, NUM_SOURCES, words)
        hidden = self.hidden.flatten(0, 1)[self.targets.clamp(min=0)]
        return token_losses(hidden, self.weight, targets, self.layout, weights, **options)

    def reference(self, config: LossConfig) -> dict[str, Tensor]:
        """One target after the other."""
        num_codebooks = self.layout.num_codebooks
        shares = torch.tensor(config.codebook_weights or (1.0,) * num_codebooks, dtype=torch.float64)
        shares = shares / shares.sum()
        zero = (self.hidden.sum() + self.weight.sum()) * 0
        sums = dict.fromkeys(("objective", "text_sum", "text_count", "units_sum", "units_count"), zero)
        sums |= dict.fromkeys(("num_correct", "z_sum", "z_count"), zero)
        source_sums, source_counts = [zero] * NUM_SOURCES, [zero] * NUM_SOURCES
        for position, label in enumerate(self.labels.flatten().tolist()):
            hidden = self.hidden.flatten(0, 1)[position]
            source = max(int(self.sources.flatten()[position]), 0)
            kind = "units" if label in (IGNORE, END) or label >= NUM_TEXT else "text"
            factor = getattr(config, kind) * (config.source_weights or {}).get(str(source), 1.0)
            if kind == "text":
                factor *= (config.word_weights or {}).get(str(label), 1.0)
            terms = []  # share, loss, z-loss
            if label != IGNORE:
                logits = self.weight @ hidden
                share = shares[0] if label >= NUM_TEXT else 1.0
                z = logits.exp().sum().log() ** 2
                terms.append((share, F.cross_entropy(logits, torch.tensor(label)), z))
                sums["z_sum"], sums["z_count"] = sums["z_sum"] + share * z, sums["z_count"] + share
                if kind == "text":
                    sums["num_correct"] = sums["num_correct"] + (int(logits.argmax()) == label)
            for k, code in enumerate(self.audio_labels.flatten(0, 1)[position].tolist()):
                if k == 0 or code == IGNORE:
                    continue
                first = NUM_TEXT + k * (SIZE + 1)
                logits = self.weight[first : first + SIZE + 1] @ hidden
                terms.append((shares[k], F.cross_entropy(logits, torch.tensor(code)), 0.0))
            for share, loss, z in terms:
                sums["objective"] = sums["objective"] + factor * share * (loss + config.head_z_loss_coef * z)
                sums[f"{kind}_sum"] = sums[f"{kind}_sum"] + share * loss
                sums[f"{kind}_count"] = sums[f"{kind}_count"] + share
                source_sums[source] = source_sums[source] + share * loss
                source_counts[source] = source_counts[source] + share
        return sums | {"source_sums_S": torch.stack(source_sums), "source_counts_S": torch.stack(source_counts)}


@pytest.mark.parametrize("chunk_bytes", [1, 500, None])
@pytest.mark.parametrize("config", [PLAIN, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize("num_codebooks", [0, 1, 3])
def test_against_one_target_after_the_other(num_codebooks, config, chunk_bytes):
    if num_codebooks != 3:
        config = dataclasses.replace(config, codebook_weights=None)
    for backend in ("auto", "full"):
        stream = Stream(num_codebooks)
        wanted = stream.reference(config)
        if num_codebooks == 3:
            assert min(float(value.detach().min()) for name, value in wanted.items() if name != "num_correct") > 0
        got = stream.losses(config, backend=backend, chunk_bytes=chunk_bytes)
        for name, value in got._asdict().items():
            torch.testing.assert_close(value.double(), wanted[name].detach(), msg=lambda text, n=name: f"{n}: {text}")
            assert value.requires_grad == (name == "objective")
        inputs = (stream.hidden, stream.weight)
        gradients = torch.autograd.grad(got.objective, inputs)
        for ours, theirs in zip(gradients, torch.autograd.grad(wanted["objective"], inputs), strict=True):
            torch.testing.assert_close(ours, theirs)


def test_correct_guesses_count_only_where_text_is_the_target():
    stream = Stream(3)
    logits = stream.hidden.flatten(0, 1) @ stream.weight.T
    text = (stream.labels.flatten() != IGNORE) & (stream.labels.flatten() < NUM_TEXT) & (stream.labels.flatten() != END)
    best = logits.argmax(-1)
    stream.labels = torch.where(text & (best < NUM_TEXT) & (best != END), best, stream.labels.flatten()).view(2, -1)
    wanted = stream.reference(PLAIN)["num_correct"]
    assert 0 < wanted < text.sum()
    assert stream.losses(PLAIN).num_correct == wanted


@pytest.mark.parametrize("num_codebooks", [0, 3])
def test_padded_indices_change_nothing(num_codebooks):
    stream = Stream(num_codebooks)
    plain = stream.losses(PLAIN)
    gradients = torch.autograd.grad(plain.objective, (stream.hidden, stream.weight))
    stream.pad(5)
    padded = stream.losses(PLAIN)
    for name, value in padded._asdict().items():
        torch.testing.assert_close(value, getattr(plain, name))
    for ours, theirs in zip(
        torch.autograd.grad(padded.objective, (stream.hidden, stream.weight)), gradients, strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_no_target_at_all():
    stream = Stream(3)
    stream.targets, stream.frames = stream.targets[:0], stream.frames[:0]
    losses = stream.losses(WEIGHTED)
    assert all(not value.any() for value in losses)
    assert all(not g.any() for g in torch.autograd.grad(losses.objective, (stream.hidden, stream.weight)))


def test_equal_codebook_weights_are_the_default():
    stream = Stream(3)
    explicit = stream.losses(LossConfig(codebook_weights=(5.0, 5.0, 5.0)))
    for ours, theirs in zip(explicit, stream.losses(PLAIN), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_nothing_asks_the_host():
    """Tensors without data: whatever had to read one would fail."""
    stream = Stream(3)
    weights = TokenWeights.of(WEIGHTED, stream.layout, SOURCES, NUM_SOURCES)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for name in ("labels", "audio_labels", "sources", "targets", "frames"):
            setattr(stream, name, mode.from_tensor(getattr(stream, name)))
        hidden = mode.from_tensor(torch.zeros(len(stream.targets), WIDTH))
        weight = mode.from_tensor(stream.weight.detach().float())
        targets = TokenTargets.of(stream.labels, stream.audio_labels, stream.sources, stream.targets, stream.frames)
        losses = token_losses(hidden, weight, targets, stream.layout, weights)
    assert losses.source_sums_S.shape == (NUM_SOURCES,)


def test_compiled_without_a_break():
    stream = Stream(3)
    weights = TokenWeights.of(WEIGHTED, stream.layout, SOURCES, NUM_SOURCES)

    def step(hidden, weight, labels, audio_labels, sources, indices, frames):
        targets = TokenTargets.of(labels, audio_labels, sources, indices, frames)
        return token_losses(hidden[indices], weight, targets, stream.layout, weights)

    args = (stream.hidden.detach().flatten(0, 1), stream.weight.detach(), stream.labels, stream.audio_labels)
    args = (*args, stream.sources, stream.targets, stream.frames)
    got = torch.compile(step, backend="aot_eager", fullgraph=True)(*args)
    for ours, theirs in zip(got, step(*args), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"text": -1.0}, r"loss.text is -1.0; a weight is a finite number"),
        ({"head_z_loss_coef": float("nan")}, r"loss.head_z_loss_coef is nan"),
        ({"codebook_weights": (1.0, -2.0)}, r"loss.codebook_weights\[1\] is -2.0"),
        ({"codebook_weights": (0.0, 0.0)}, r"loss.codebook_weights are all 0; give one"),
        ({"source_weights": {"1": float("inf")}}, r"loss.source_weights\['1'\] is inf"),
    ],
)
def test_bad_weights_are_named(values, message):
    with pytest.raises(ValueError, match=message):
        LossConfig(**values)


def test_weights_must_fit_vocabulary_and_recipe():
    layout = HeadLayout(NUM_TEXT, 3, SIZE, END)
    with pytest.raises(ValueError, match=r"codebook_weights has 2 weights but the vocabulary has 3 codebooks"):
        TokenWeights.of(LossConfig(codebook_weights=(1.0, 1.0)), layout, SOURCES, 1)
    with pytest.raises(ValueError, match=r"names '7', which is no source of the recipe; it has 0, 1, 2"):
        TokenWeights.of(LossConfig(source_weights={"7": 2.0}), layout, SOURCES, 3)
