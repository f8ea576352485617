"""How rows are drawn, against transformers' own filters and against one row at a time."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from mmllm.batch import Modality
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.samples.document import Document
from mmllm.inference.engine.filters import Filters, draw, probabilities
from mmllm.inference.engine.requests import TextRequest
from mmllm.inference.engine.sampling import RowSampler, TextRules, Uniforms, apply_rules, choose, uniforms
from mmllm.inference.engine.speculation import accept_drafts
from mmllm.interop.tokenizers import read_tokenizer
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END
from tests.inference_fixtures import make_tokenizer
from tests.pretrained_fixtures import saved_kind

TOKENIZER = make_tokenizer()
RULES = TextRules.of(TOKENIZER)
END_ID = TOKENIZER.id(END)
V = RULES.num_text
PLAIN = [i for i in range(V) if i not in RULES.forbidden_ids and i != END_ID]


def document(ids=()):
    ids_T = np.array(ids, dtype=np.int64)
    return Document(ids_T, ids_T < 0, np.full(len(ids), int(Modality.TEXT)), np.full((len(ids), 3), -1))


def request(sampling=None, prompt=(), **more):
    return TextRequest(document(prompt), sampling or Sampling(), **more)


def row(sampling=None, prompt=(), **more):
    return RowSampler(request(sampling, prompt, **more), RULES)


def logits(rows, seed=0, scale=3.0):
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * scale


def old_draw(logits_BV, sampling, uniforms_B):
    """As it was written first."""
    if sampling.temperature == 0:
        return logits_BV.argmax(dim=-1)
    logits_BV = logits_BV.double() / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        is_beyond_BV = sorted_BV.cumsum(dim=-1) - sorted_BV >= sampling.top_p
        logits_BV = logits_BV.masked_fill(is_beyond_BV.scatter(-1, order_BV, is_beyond_BV), -torch.inf)
    cumulated_BV = logits_BV.softmax(dim=-1).cumsum(dim=-1)
    return (cumulated_BV <= uniforms_B[:, None].to(cumulated_BV) * cumulated_BV[:, -1:]).sum(dim=-1)


class Only:
    """A constraint: these ids, whatever came before; counts what it is told."""

    def __init__(self, ids):
        self.ids, self.told = list(ids), []

    def begin(self):
        return Only(self.ids)

    def allowed(self):
        allowed_V = torch.zeros(V, dtype=torch.bool)
        allowed_V[self.ids] = True
        return allowed_V

    def accept(self, token_id):
        self.told.append(token_id)


@pytest.mark.parametrize("top_k", [None, 1, 7, V, 10_000])
@pytest.mark.parametrize("top_p", [None, 0.05, 0.8, 1.0])
@pytest.mark.parametrize("temperature", [0, 0.3, 1.0, 2.5])
def test_draws_are_those_of_the_first_version_bit_for_bit(temperature, top_k, top_p):
    logits_BV = RULES.masked(logits(40))
    uniforms_B = torch.rand(40, generator=torch.Generator().manual_seed(1))
    sampling = Sampling(temperature, top_k, top_p)
    assert torch.equal(draw(logits_BV, sampling, uniforms_B), old_draw(logits_BV, sampling, uniforms_B))


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.2, 3), top_k=st.one_of(st.none(), st.integers(1, 400)),
    top_p=st.one_of(st.none(), st.floats(0.01, 0.99)), min_p=st.one_of(st.none(), st.floats(0, 1)),
    typical_p=st.one_of(st.none(), st.floats(0.01, 0.99)), penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 1.0, 5.0]),
)  # fmt: skip
def test_filters_are_transformers(temperature, top_k, top_p, min_p, typical_p, penalty, seed, scale):
    prompt = torch.randint(V, (1, 12), generator=torch.Generator().manual_seed(seed))
    sampling = Sampling(temperature, top_k, top_p, min_p=min_p, typical_p=typical_p, repetition_penalty=penalty)
    theirs = LogitsProcessorList()
    if penalty != 1:
        theirs.append(RepetitionPenaltyLogitsProcessor(penalty))
    theirs.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        theirs.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        theirs.append(TopPLogitsWarper(top_p))
    if min_p is not None:
        theirs.append(MinPLogitsWarper(min_p))
    if typical_p is not None:
        theirs.append(TypicalLogitsWarper(typical_p))
    masked_1V = RULES.masked(logits(1, seed, scale))
    wanted_1V = theirs(prompt, masked_1V.double()).softmax(dim=-1)
    ours = row(sampling, prompt[0].tolist())
    found_1V = probabilities(apply_rules(masked_1V, [ours]), [Filters.of(sampling)])
    if torch.equal(found_1V > 0, wanted_1V > 0):
        # ours are penalized in float32: a rounding of the largest logit, over the temperature
        largest = float(masked_1V[masked_1V > -torch.inf].abs().max()) * max(penalty, 1 / penalty)
        rtol = 4 * 2**-24 * largest / temperature if penalty != 1 else 1e-9
        torch.testing.assert_close(found_1V, wanted_1V, rtol=rtol, atol=1e-12)
        return
    # an id whose probability is on a filter's edge to the last bits falls on one side here and the other there
    differ = ((found_1V > 0) != (wanted_1V > 0)).sum()
    assert differ <= 1, f"{int(differ)} ids are kept by one and not by the other"


def test_penalties_are_openais():
    sampling = Sampling(frequency_penalty=0.5, presence_penalty=0.25)
    ours, logits_1V = row(sampling, prompt=PLAIN[:5]), logits(1)
    a, b, c = PLAIN[3], PLAIN[40], PLAIN[41]
    for token_id in (a, b, b, b):
        ours.accept(token_id)
    found_V = apply_rules(RULES.masked(logits_1V), [ours])[0]
    for token_id, taken in ((a, 0.75), (b, 1.75), (c, 0.0), (PLAIN[4], 0.0)):
        assert found_V[token_id].item() == pytest.approx(logits_1V[0, token_id].item() - taken, abs=1e-6)


def test_presence_is_of_the_text_alone():
    ours, logits_1V = row(Sampling(repetition_penalty=2.0, presence_penalty=1.0), prompt=PLAIN[:2]), logits(1).abs()
    ours.accept(PLAIN[1])
    found_V = apply_rules(RULES.masked(logits_1V), [ours])[0, PLAIN[:3]]
    torch.testing.assert_close(found_V, logits_1V[0, PLAIN[:3]] / torch.tensor([2, 2, 1]) - torch.tensor([0, 1, 0]))


def test_filters_on_their_edges():
    logits_1V = torch.tensor([[0.0, 1.0, 1.0, -torch.inf]])

    def kept(**filters):
        return probabilities(logits_1V, [Filters.of(Sampling(1.0, **filters))])[0].tolist()

    assert kept(min_p=1.0) == [0, 0.5, 0.5, 0] and kept(top_k=1) == [0, 0.5, 0.5, 0]
    assert kept(top_k=2, top_p=0.5) == [0, 1, 0, 0] and kept(top_k=2, top_p=0.51) == [0, 0.5, 0.5, 0]
    assert (
        kept(typical_p=1.0)
        == kept(min_p=0.0)
        == kept(top_p=1)
        == kept()
        == torch.softmax(logits_1V.double(), -1)[0].tolist()
    )


def test_rows_without_a_token_are_never_drawn(tmp_path):
    theirs = saved_kind("byte_level", tmp_path)
    text = read_tokenizer(tmp_path, len(theirs) + 7).text
    rules = TextRules.of(TokenizerFolder(text))
    assert rules.num_text == text.vocab_size > text.num_tokens + 7 and len(rules.end_ids) == 2
    for token_id in range(rules.num_text):
        is_text = token_id < text.num_tokens and token_id not in text.hidden_ids
        assert (rules.mask_V[token_id] == 0) == (is_text or token_id in rules.end_ids)
        assert (token_id in rules.forbidden_ids) == (rules.mask_V[token_id] != 0)


def test_penalties_of_long_texts():
    ours = row(Sampling(repetition_penalty=1.5, frequency_penalty=0.1), prompt=PLAIN[:10])
    drawn = [PLAIN[(i * 7) % len(PLAIN)] for i in range(1000)]
    for token_id in drawn:
        ours.accept(token_id)
    logits_V = logits(1)[0]
    wanted_V = RULES.masked(logits_V)
    for token_id in set(drawn) | set(PLAIN[:10]):
        wanted_V[token_id] *= 1.5 if wanted_V[token_id] < 0 else 1 / 1.5
        wanted_V[token_id] -= 0.1 * drawn.count(token_id)
    torch.testing.assert_close(apply_rules(RULES.masked(logits_V[None]), [ours])[0], wanted_V)


def mixed_rows():
    s = Sampling
    return [
        row(), row(s(0.7, seed=3), number=4), row(s(1.0, top_k=5)), row(s(1.3, top_p=0.7, seed=2**62)),
        row(s(0.9, min_p=0.2)), row(s(1.0, typical_p=0.4)), row(s(1.1, 30, 0.9, 7, 0.05, 0.8)),
        row(s(repetition_penalty=2.0), prompt=PLAIN[:30]), row(s(0.8, repetition_penalty=0.5), PLAIN[5:9]),
        row(s(0.8, frequency_penalty=1.5, presence_penalty=-0.5)), row(min_new_tokens=9, num_logprobs=2),
        row(s(2.0), constraint=Only(PLAIN[7:10]), num_logprobs=0), row(s(0.7, seed=3), number=5),
        row(s(0.5), logit_bias={PLAIN[2]: 9.0, END_ID: -100}, num_logprobs=V), row(stop_ids=(0, PLAIN[1])),
        row(s(1.0, top_k=9, seed=5), number=1), row(s(1e-320)),
    ]  # fmt: skip


def test_a_row_in_any_batch_draws_what_it_draws_alone():
    together, alone = mixed_rows(), mixed_rows()
    for step in range(12):
        logits_BV = logits(len(together), seed=step)
        kept = [place for place in range(len(together)) if step < 5 or place % 3]
        chosen = choose(logits_BV[kept], [together[place] for place in kept], RULES)
        for place, token_id, logprob, top in zip(kept, chosen.ids, chosen.logprobs, chosen.top_logprobs, strict=True):
            one = choose(logits_BV[place : place + 1], [alone[place]], RULES)
            assert (one.ids, one.logprobs, one.top_logprobs) == ([token_id], [logprob], [top]), place
            together[place].accept(token_id)
            alone[place].accept(token_id)


def test_rows_that_are_alike_draw_what_they_draw_in_a_mixed_batch():
    def made():
        return [row(Sampling(0.8, 20, 0.9, seed=1), number=number) for number in range(6)]

    alike, mixed = made(), [*made(), *mixed_rows()]
    for step in range(20):
        logits_BV = logits(len(mixed), seed=step)
        ids = choose(logits_BV[:6], alike, RULES).ids
        assert ids == choose(logits_BV, mixed, RULES).ids[:6]
        assert ids == draw(RULES.masked(logits_BV[:6]), alike[0].sampling, uniforms(range(6), 20, 1)[:, step]).tolist()
        for each, token_id in zip([*alike, *mixed], [*ids, *choose(logits_BV, mixed, RULES).ids], strict=True):
            each.accept(token_id)


def test_numbers_are_those_of_one_long_draw():
    for seed, number in ((0, 0), (5, 3), (7, 2_654_435_761 * 9), (2**40, 1), (-3, 0)):
        wanted = torch.rand(1000, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)).tolist()
        drawn = Uniforms(seed, number)
        assert [drawn[place] for place in (130, *range(1000))] == [wanted[130], *wanted]
        assert uniforms([number], 1000, seed)[0].tolist() == wanted
    assert 0 <= Uniforms(2**63, 9)[0] < 1


def test_only_text_and_ends_are_drawn():
    flat = torch.zeros(1, V)
    flat[:, sorted(RULES.forbidden_ids)] = 50.0
    rows = [row(Sampling(1.0, seed=seed)) for seed in range(300)]
    drawn = choose(flat.expand(300, V), rows, RULES).ids
    assert not RULES.forbidden_ids.intersection(drawn) and len(set(drawn)) > 100
    assert choose(flat, [row()], RULES).ids[0] not in RULES.forbidden_ids
    assert {END_ID} == RULES.end_ids and set(TOKENIZER.text.hidden_ids) - {END_ID} <= RULES.forbidden_ids


def test_ends_come_late_and_where_they_are_asked_for():
    logits_1V = torch.zeros(1, V)
    logits_1V[:, END_ID], logits_1V[:, PLAIN[3]], logits_1V[:, 2] = 9.0, 8.0, 10.0
    assert 2 in RULES.forbidden_ids
    ours = row(min_new_tokens=2, num_logprobs=1)
    for wanted in (PLAIN[3], PLAIN[3], END_ID):
        chosen = choose(logits_1V, [ours], RULES)
        assert chosen.ids == [wanted] and list(chosen.top_logprobs[0]) == [END_ID]
        ours.accept(wanted)
    assert ours.is_end(END_ID) and not ours.is_end(PLAIN[3])
    special = row(stop_ids=(2,))
    assert choose(logits_1V, [special], RULES).ids == [2] and special.is_end(2)
    early = row(stop_ids=(2, PLAIN[3]), min_new_tokens=1)
    assert choose(logits_1V, [early], RULES).ids[0] not in (2, PLAIN[3], END_ID)


def test_log_probabilities_are_of_the_model_alone():
    ours = row(Sampling(0.1, 3, frequency_penalty=1.0), logit_bias={PLAIN[9]: 30.0}, num_logprobs=4)
    ours.accept(PLAIN[9])
    logits_1V = logits(1)
    allowed = [i for i in range(V) if i not in RULES.forbidden_ids]
    wanted = dict(zip(allowed, logits_1V[0, allowed].double().log_softmax(0).tolist(), strict=True))
    chosen = choose(logits_1V, [ours], RULES)
    assert chosen.ids == [PLAIN[9]]
    assert chosen.logprobs[0] == pytest.approx(wanted[PLAIN[9]], abs=1e-5)
    top = chosen.top_logprobs[0]
    assert list(top) == sorted(wanted, key=wanted.get, reverse=True)[:4]
    assert all(value == pytest.approx(wanted[i], abs=1e-5) for i, value in top.items())
    every = choose(logits_1V, [row(num_logprobs=10_000)], RULES).top_logprobs[0]
    assert sorted(every) == allowed
    assert choose(logits_1V, [row()], RULES).logprobs == [None]


def test_constraints_are_told_all_but_ends():
    ours = row(constraint=Only([PLAIN[1], END_ID]))
    assert choose(logits(1), [ours], RULES).ids[0] in (PLAIN[1], END_ID)
    for token_id in (PLAIN[1], PLAIN[1], END_ID):
        ours.accept(token_id)
    assert ours.constraint.told == [PLAIN[1], PLAIN[1]]


@pytest.mark.parametrize("more", [
    {"logit_bias": {V: 1.0}}, {"logit_bias": {-1: 1.0}}, {"logit_bias": {0: 1.0}}, {"logit_bias": {True: 1.0}},
    {"logit_bias": {PLAIN[0]: float("nan")}}, {"logit_bias": {PLAIN[0]: 1e30}}, {"logit_bias": {PLAIN[0]: "1"}},
    {"stop_ids": (V,)}, {"stop_ids": (-1,)}, {"min_new_tokens": 1, "constraint": Only([5])},
])  # fmt: skip
def test_what_cannot_be_asked_for(more):
    with pytest.raises(ValueError, match=r"logit_bias|stop_ids|min_new_tokens"):
        row(**more)


@pytest.mark.parametrize("name, bad", [
    ("temperature", -1), ("temperature", float("inf")), ("temperature", float("nan")), ("temperature", None),
    ("temperature", "hot"), ("temperature", True), ("temperature", 10**400), ("top_k", 0), ("top_k", 2.5),
    ("top_p", 0), ("top_p", 1.1), ("min_p", -0.1), ("min_p", 1.1), ("typical_p", 0.0), ("typical_p", 2),
    ("repetition_penalty", 0), ("repetition_penalty", 1000), ("repetition_penalty", None),
    ("frequency_penalty", 2.1), ("presence_penalty", -3), ("seed", 0.5), ("seed", None),
])  # fmt: skip
def test_settings_are_checked_by_name(name, bad):
    with pytest.raises(ValueError, match=f"{name} is "):
        Sampling(**{name: bad})


def test_older_generation_configs_load():
    old = {"max_new_tokens": 9, "text": {"temperature": 0.5, "top_k": 3, "top_p": None, "seed": 4}}
    assert GenerationConfig.from_dict(old).text == Sampling(0.5, 3, seed=4)
    new = GenerationConfig(text=Sampling(0.5, min_p=0.1, typical_p=0.9, repetition_penalty=1.2, presence_penalty=1))
    assert GenerationConfig.from_dict(new.to_dict()) == new
    with pytest.raises(ValueError, match="speech has repetition_penalty"):
        GenerationConfig(speech=Sampling(repetition_penalty=1.2))


# Speculative decoding.

CHAINS = {
    "plain": Sampling(1.0), "temperature": Sampling(0.6), "top_k": Sampling(1.0, top_k=4),
    "top_p": Sampling(1.2, top_p=0.8), "min_p": Sampling(1.0, min_p=0.2), "typical": Sampling(1.0, typical_p=0.7),
    "penalties": Sampling(1.0, repetition_penalty=1.5, frequency_penalty=0.8, presence_penalty=0.3),
}  # fmt: skip
FEW = PLAIN[:8]


def few(values):
    """Logits [T, V] in which only a few ids have a chance."""
    logits_TV = torch.full((len(values), V), -1e4)
    logits_TV[:, FEW] = torch.tensor(values)
    return logits_TV


def test_greedy_drafts_are_kept_while_they_are_what_is_written_anyway():
    logits_TV = logits(5)
    best = RULES.masked(logits_TV).argmax(-1).tolist()
    for wrong in range(5):
        drafts = [best[i] if i != wrong else (PLAIN[0] if best[i] != PLAIN[0] else PLAIN[1]) for i in range(4)]
        ours = row(num_logprobs=0)
        accepted = accept_drafts(logits_TV, drafts, ours)
        assert accepted.num_drafts == min(wrong, 4) and accepted.ids == best[: accepted.num_drafts + 1] == ours.ids
        assert len(accepted.logprobs) == len(accepted.ids)
    assert accept_drafts(logits_TV[:1], [], row()).ids == best[:1]


def test_nothing_follows_a_drafted_end():
    logits_TV = torch.zeros(3, V)
    logits_TV[0, END_ID] = 9.0
    ours = row()
    accepted = accept_drafts(logits_TV, [END_ID, PLAIN[0]], ours)
    assert (accepted.num_drafts, accepted.ids, ours.ids) == (1, [END_ID], [END_ID])


@pytest.mark.parametrize("more", [
    {}, {"constraint": Only(PLAIN[:20])}, {"min_new_tokens": 12}, {"logit_bias": {PLAIN[3]: 2.0}},
])  # fmt: skip
@pytest.mark.parametrize("sampling", [Sampling(), *CHAINS.values()])
def test_looked_up_drafts_change_nothing_of_what_is_drawn(sampling, more):
    by_history = {}

    def model(ids):
        key = tuple(ids)
        return by_history.setdefault(
            key, logits(1, seed=abs(hash(key)) % 2**31, scale=1.0)[0] / 2 + few([[6.0] * 8])[0]
        )

    sampling = dataclasses.replace(sampling, seed=11)
    plain, drafted = row(sampling, FEW[:3], **more), row(sampling, FEW[:3], **more)
    for _ in range(30):
        plain.accept(choose(model(plain.ids)[None], [plain], RULES).ids[0])
    random, num_kept = np.random.default_rng(0), 0
    while len(drafted.ids) < 30:
        ids = list(drafted.ids)
        right = plain.ids[len(ids) : len(ids) + 3]
        drafts = [i if random.random() < 0.7 else FEW[random.integers(8)] for i in right]
        logits_TV = torch.stack([model(ids + drafts[:n]) for n in range(len(drafts) + 1)])
        num_kept += accept_drafts(logits_TV, drafts, drafted).num_drafts
    assert drafted.ids[:30] == plain.ids and num_kept > 8


SMALL = TextRules(8, torch.zeros(8), frozenset(), frozenset())
"""A tokenizer of eight ids that never ends."""
DRAFT = torch.tensor([[1.0, 0.5, 0.0, -0.5, 2.0, -2.0, 0.3, 0.0], [0.0] * 8])
TARGET = torch.tensor([
    [0.0, 1.5, 0.2, -1.0, 0.5, 1.0, -0.3, 0.1], [1.0, -1.0, 0.5, 0.2, 0.0, 0.8, -0.4, 0.3],
    [0.0] * 8,
])  # fmt: skip


def frequencies(sampling, num):
    """How often each pair of ids comes first in so many rows, when two are drafted."""
    counts = np.zeros((8, 8))
    drafts = DRAFT.argmax(dim=-1).tolist()
    for number in range(num):
        ours = RowSampler(request(sampling, number=number), SMALL)
        ids = list(accept_drafts(TARGET, drafts, ours).ids)
        if len(ids) < 2:
            ids += choose(TARGET[1:2], [ours], SMALL).ids
        counts[ids[0], ids[1]] += 1
    return counts


def expected(sampling):
    """Pairs' probabilities when ids are drawn one by one."""
    found = np.zeros((8, 8))
    filters = [Filters.of(sampling)]
    first_V = probabilities(apply_rules(TARGET[:1], [RowSampler(request(sampling), SMALL)]), filters)[0]
    for token_id in range(8):
        ours = RowSampler(request(sampling), SMALL)
        ours.accept(token_id)
        second_V = probabilities(apply_rules(TARGET[1:2], [ours]), filters)[0]
        found[token_id] = (first_V[token_id] * second_V).numpy()
    return found


def chi_square(counts, probs):
    """How far the statistic is beyond what is expected, in its standard deviations."""
    wanted = probs * counts.sum()
    assert counts[wanted == 0].sum() == 0, "an id came that has no chance"
    is_rare = wanted < 5
    found = np.append(counts[~is_rare], counts[is_rare].sum())
    wanted = np.append(wanted[~is_rare], wanted[is_rare].sum())
    found, wanted = found[wanted > 0], wanted[wanted > 0]
    degrees = len(wanted) - 1
    return (((found - wanted) ** 2 / wanted).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("name", CHAINS)
def test_sampled_drafts_leave_the_distribution_as_it_is(name):
    assert chi_square(frequencies(CHAINS[name], 1500), expected(CHAINS[name])) < 4


def test_twenty_thousand_draws_with_drafts_and_a_shift_of_two_percent():
    num, sampling = 20_000, Sampling(0.8, top_p=0.95)
    wanted_V = probabilities(TARGET[:1], [Filters.of(sampling)])[0]
    drafted = int(DRAFT[0].argmax())
    num_kept, counts_V = 0, np.zeros(8)
    for number in range(num):
        accepted = accept_drafts(TARGET[:2], [drafted], RowSampler(request(sampling, number=number), SMALL))
        num_kept += accepted.num_drafts
        counts_V[accepted.ids[0]] += 1
    assert counts_V.sum() == num and chi_square(counts_V, wanted_V.numpy()) < 4
    assert num_kept == counts_V[drafted] > 0.05 * num
    shift_V = torch.zeros(8, dtype=torch.float64)
    shift_V[1], shift_V[4] = -0.02, 0.02
    assert chi_square(counts_V, (wanted_V + shift_V).numpy()) > 8
    biased_V = counts_V.copy()  # drafts that are kept a little too often
    biased_V[drafted] += 0.02 * num
    biased_V[1] -= 0.02 * num
    assert chi_square(biased_V, wanted_V.numpy()) > 8
