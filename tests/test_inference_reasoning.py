"""Reasoning helpers: their logic on models that say what a test tells them to, their wiring on a tiny real one."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.cli.main import main
from mmllm.cli.reasoning import METHODS
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.sample import Segment
from mmllm.evaluation import reasoning_task
from mmllm.evaluation.metrics import exact_match
from mmllm.inference.api import Model
from mmllm.inference.engine.requests import Cost, EngineConfig, TextRequest, TextResult
from mmllm.inference.prompts import join
from mmllm.inference.reasoning import (
    SureConfig,
    ThinkConfig,
    TreeConfig,
    Trial,
    Vote,
    VotingConfig,
    by_difficulty,
    choose_threshold,
    effort_trials,
    few_shot,
    self_consistency,
    think,
    threshold_curve,
    tree_search,
)
from mmllm.inference.reasoning.asking import Asker, extracted
from mmllm.inference.reasoning.effort import ALWAYS_VOTE, ThresholdPoint
from mmllm.inference.reasoning.thoughts import ANSWER
from mmllm.inference.reasoning.votes import num_needed
from mmllm.inference.voting import majority
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END
from tests.inference_fixtures import images, make_model, make_tokenizer, sounds
from tests.test_evaluation_tasks import write_rows

CHAT = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>{% endfor %}<|assistant|>"
)
WARM = VotingConfig(7, Sampling(temperature=1.0, seed=3))


@pytest.fixture(scope="module")
def model() -> Model:
    """Blocks of four positions, so that short prompts are cached; it often ends by itself."""
    tokenizer = make_tokenizer()
    weights = make_model(tokenizer)
    with torch.no_grad():
        weights.decoder.head_weight_VD[tokenizer.id(END)] *= 4
    return Model(weights, tokenizer, None, GenerationConfig(max_new_tokens=6), EngineConfig(block_size=4))


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerFolder:
    return make_tokenizer(sound=False)


def asked_of(count: int = 4) -> tuple[list[Any], list[str]]:
    parts = [[picture, "said: ", sound] for picture, sound in zip(images(count), sounds(count), strict=True)]
    return parts, [f"which is {['one', 'two', 'three', 'four'][number]}?" for number in range(count)]


class Told:
    """A model whose texts a function tells: of a request and the text of its prompt, the text's ids and how it ends.

    Ids that are longer than the request allows are cut, as an engine does.
    """

    def __init__(self, tokenizer: TokenizerFolder, say: Callable[[TextRequest, str], tuple[str, float]]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.generation = GenerationConfig(max_new_tokens=40)
        self.engine = SimpleNamespace(run=self.run, config=EngineConfig())
        self.requests: list[TextRequest] = []
        self.num_drawn = 0

    def question_prompt(self, parts: Any, question: str) -> Document:
        writer = DocumentWriter(self.tokenizer)
        writer.ids(self.tokenizer.text.encode(f"{parts}{question}:"), is_target=False)
        return writer.finish()

    def run(self, requests: Sequence[TextRequest]) -> list[TextResult]:
        self.requests += requests
        return [self.answer(request) for request in requests]

    def answer(self, request: TextRequest) -> TextResult:
        ids_of, text_of = self.tokenizer.text.encode, self.tokenizer.text.decode
        said, logprob = self.say(request, text_of(request.prompt.token_ids_T.tolist()))
        stop = next((each for each in request.stop if each in said), None)
        if stop is not None:
            said = said[: said.index(stop) + len(stop)]
        ids = ids_of(said)
        ends = stop is None and len(ids) < request.max_new_tokens
        if len(ids) > request.max_new_tokens:
            ids, stop = ids[: request.max_new_tokens], None
        num_new = len(ids) + ends
        self.num_drawn += num_new
        text = text_of(ids)
        return TextResult(
            tuple(ids),
            text if stop is None else text.removesuffix(stop),
            "stop" if ends or stop is not None else "length",
            None if request.num_logprobs is None else (logprob,) * num_new,
            stop=stop,
            cost=Cost(num_prompt_tokens=request.prompt.num_tokens, num_new_tokens=num_new),
        )


# ---- votes


def is_open(meanings: Sequence[str], num_votes: int) -> bool:
    """Whether the votes that are left might change the majority, by trying all that they could be."""
    letters = sorted({*meanings, "x", "y"})
    ends = itertools.product(letters, repeat=num_votes - len(meanings))
    return len({majority([*meanings, *end]).text for end in ends}) > 1


def slow_surely(first: int, second: int) -> float:
    """P(p > 1/2) of Beta(first + 1, second + 1), by adding up its density."""
    points = [(n + 0.5) / 20_000 for n in range(20_000)]
    density = [p**first * (1 - p) ** second for p in points]
    return sum(density[10_000:]) / sum(density)


def in_rounds(texts: Sequence[str], confidence: float | None) -> tuple[int, int]:
    """Votes drawn in rounds, and how many rounds."""
    num_drawn = num_rounds = 0
    while more := num_needed(texts[:num_drawn], len(texts), confidence):
        num_drawn, num_rounds = num_drawn + more, num_rounds + 1
    return num_drawn, num_rounds


def test_a_vote_ends_when_nothing_can_overtake_it_and_no_sooner_or_later():
    rng, num_early = random.Random(0), 0
    for _ in range(300):
        num_votes = rng.randint(1, 6)
        texts = [rng.choice("aaabc") for _ in range(num_votes)]
        one_by_one = next(n for n in range(num_votes + 1) if not is_open(texts[:n], num_votes))
        drawn, _ = in_rounds(texts, 1.0)
        assert drawn == one_by_one, texts
        assert majority(texts[:drawn]).text == majority(texts).text
        num_early += drawn < num_votes
        assert in_rounds(texts, None) == (num_votes, 1)
    assert num_early > 100


def test_an_adaptive_vote_ends_when_its_majority_is_probable():
    rng, num_sooner = random.Random(1), 0
    for _ in range(60):
        num_votes = rng.randint(1, 14)
        texts = [rng.choice("aaaabc") for _ in range(num_votes)]
        drawn, _ = in_rounds(texts, 0.9)

        def is_sure(num_drawn: int, texts: Sequence[str] = texts) -> bool:
            counts = sorted((texts[:num_drawn].count(letter) for letter in "abc"), reverse=True)
            return num_drawn > 0 and slow_surely(*counts[:2]) >= 0.9

        decided, _ = in_rounds(texts, 1.0)
        assert drawn == next(n for n in range(num_votes + 1) if is_sure(n) or n == decided)
        num_sooner += drawn < decided
    assert num_sooner > 10
    assert num_needed(["a"] * 60, 200, 1.0) == 40, "1 - 2**-61 is no certainty, though it rounds to 1"
    assert num_needed([], 8, 1.0) == 4 and num_needed([], 7, 1.0) == 4


def test_votes_are_those_of_the_model_and_the_rest_is_not_drawn(model):
    parts, questions = asked_of()
    every = [model.answer(one, q, n=7, temperature=1.0, seed=3) for one, q in zip(parts, questions, strict=True)]
    full = self_consistency(model, parts, questions, WARM, confidence=None, meaning=len)
    early = self_consistency(model, parts, questions, WARM, meaning=len)
    for answers, whole, part in zip(every, full, early, strict=True):
        told = majority(answers, len)
        assert (whole.text, whole.votes, whole.agreement) == (told.text, told.votes, told.agreement)
        assert whole.num_tokens == sum(len(one.ids) + (one.finish_reason == "stop") for one in answers)
        assert whole.num_votes == 7 and len(part.text) == len(whole.text)
        drawn = answers[: part.num_votes]
        assert part.text == majority(drawn, len).text
        assert part.num_tokens == sum(len(one.ids) + (one.finish_reason == "stop") for one in drawn)
    assert any(part.num_votes < 7 for part in early)
    alone = [self_consistency(model, one, q, WARM, meaning=len) for one, q in zip(parts, questions, strict=True)]
    assert [(one.text, one.num_tokens) for one in alone] == [(one.text, one.num_tokens) for one in early]
    assert str(early[0]) == early[0].text
    assert full[0].num_prompt_tokens == 7 * model.question_prompt(parts[0], questions[0]).num_tokens


def test_chains_of_thought_vote_by_the_answers_in_them(tokenizer):
    said = iter(["one. the answer is red.", "two. the answer is blue.", "what?", "three. the answer is red"])
    told: Any = Told(tokenizer, lambda request, _: (next(said), -0.1))
    voting = VotingConfig(4, Sampling(temperature=1.0))
    vote = self_consistency(told, "p", "q", voting, extract=ANSWER, confidence=None)
    assert (vote.text, vote.votes, vote.agreement) == ("red", 2, 0.5)
    assert len({request.number for request in told.requests}) == 4


# ---- trees


def random_text(request: TextRequest, prompt: str) -> tuple[str, float]:
    rng = random.Random(f"{prompt} {request.number}")
    return "".join(rng.choice(["one ", "two", "\n", "red.", " "]) for _ in range(rng.randint(0, 12))), -rng.random()


def test_a_tree_never_spends_more_than_its_budget(tokenizer):
    rng, num_spent, num_ended = random.Random(0), 0, 0
    for _ in range(200):
        config = TreeConfig(
            rng.randint(1, 60), rng.randint(1, 5), rng.randint(1, 9), rng.choice(["\n", ""]), rng.choice([None, 1, 3])
        )
        told: Any = Told(tokenizer, random_text)
        answer = tree_search(told, "p", "q", config, max_new_tokens=rng.randint(1, 30))
        assert told.num_drawn == answer.num_tokens <= config.budget
        assert len(told.requests) >= answer.num_nodes >= 1
        assert max(request.max_new_tokens for request in told.requests) <= config.step_tokens
        assert answer.num_prompt_tokens == sum(request.prompt.num_tokens for request in told.requests)
        num_spent += answer.num_tokens == config.budget
        num_ended += answer.is_finished
    assert num_spent > 5 and 20 < num_ended < 200, "the budget does bind, and doesn't always"


GROWN = {  # what follows a text, and the mean log-probability of the step
    "": [("a\n", -0.1), ("b\n", -0.5), ("c\n", -0.6)],
    "a\n": [("a", -2.0), ("e\n", -1.5), ("i\n", -1.9)],
    "a\ne\n": [("x", -9.0)] * 3,
    "b\n": [("bad", -0.9), ("boo", -0.4), ("bee\n", -3.0)],
    "c\n": [("d", -0.01), ("e", -0.7), ("i", -0.8)],
}


def grown(num_asked: dict[str, int]) -> Callable[[TextRequest, str], tuple[str, float]]:
    def say(request: TextRequest, prompt: str) -> tuple[str, float]:
        text = prompt.partition(":")[2]
        number = num_asked[text] = num_asked.get(text, -1) + 1
        return GROWN[text][number]

    return say


def test_the_best_text_grows_first_and_a_beam_keeps_as_many(tokenizer):
    values = {"a\n": 9, "b\n": 5, "c\n": 4, "a\na": 1, "a\ne\n": 3, "a\ni\n": 2, "b\nbad": 6, "b\nboo": 7,
              "b\nbee\n": 0, "c\nd": 10, "c\ne": 1, "c\ni": 1}  # fmt: skip
    for beam, expected in ((None, "b\nboo"), (1, "a\ne\nx"), (2, "b\nboo"), (3, "c\nd")):
        asked: dict[str, int] = {}
        told: Any = Told(tokenizer, grown(asked))
        config = TreeConfig(200, 3, 10, beam=beam)
        answer = tree_search(told, "p", "q", config, value=lambda text: float(values.get(text, 0)), temperature=1.0)
        if beam == 1:
            assert list(asked) == ["", "a\n", "a\ne\n"], "the others were left out"
            assert answer.text == "a\ne\nx" and answer.num_nodes == 7, "three steps that are the same are one"
            continue
        assert answer.text == expected and answer.is_finished and answer.value == values[expected]
        assert answer.path == (expected[0], expected[2:]) and str(answer) == expected
        assert list(asked) == {None: ["", "a\n", "b\n"], 2: ["", "a\n", "b\n"], 3: ["", "a\n", "b\n", "c\n"]}[beam]


def test_a_text_is_worth_the_mean_log_probability_of_its_tokens(tokenizer):
    asked: dict[str, int] = {}
    told: Any = Told(tokenizer, grown(asked))
    answer = tree_search(told, "p", "q", TreeConfig(200, 3, 10), temperature=1.0)
    count = {text: len(tokenizer.text.encode(text)) for text in ("b\n", "boo")}
    value = (-0.5 * count["b\n"] - 0.4 * (count["boo"] + 1)) / (count["b\n"] + count["boo"] + 1)
    assert answer.text == "b\nboo" and math.isclose(answer.value, value)
    assert list(asked) == ["", "a\n", "b\n"]
    with pytest.raises(ValueError, match="not a number"):
        asked.clear()
        tree_search(told, "p", "q", TreeConfig(200, 1, 10), value=lambda _: math.nan, temperature=1.0)


def test_where_the_budget_ends_a_text_that_has_ended_goes_before_a_better_one_that_has_not(tokenizer):
    said = iter(["red", "blue two"])
    told: Any = Told(tokenizer, lambda request, _: (next(said), -0.5 if request.number == 0 else -0.1))
    answer = tree_search(told, "p", "q", TreeConfig(6, 2, 3), temperature=1.0)
    assert answer.num_tokens == 6 and answer.text == "red" and answer.is_finished and answer.num_nodes == 2
    told = Told(tokenizer, lambda request, _: ("one two", -0.1))
    assert not tree_search(told, "p", "q", TreeConfig(2, 1, 2)).is_finished


def test_trees_of_a_model_keep_to_their_budgets_and_to_themselves(model):
    parts, questions = asked_of()
    config = TreeConfig(23, 3, 2, beam=2)
    together = tree_search(model, parts, questions, config, temperature=1.5, max_new_tokens=7)
    alone = [tree_search(model, one, q, config, temperature=1.5, max_new_tokens=7)
             for one, q in zip(parts, questions, strict=True)]  # fmt: skip
    assert [(one.text, one.num_nodes, one.num_tokens) for one in together] == [
        (one.text, one.num_nodes, one.num_tokens) for one in alone
    ]
    assert all(0 < one.num_tokens <= 23 for one in together)
    with pytest.raises(ValueError, match="choices constrains"):
        tree_search(model, parts[0], "q?", choices=["red"])
    with pytest.raises(ValueError, match="branches is 4, but nothing"):
        tree_search(model, parts[0], "q?", temperature=0.0)
    with pytest.raises(ValueError, match="penalties"):
        tree_search(model, parts[0], "q?", frequency_penalty=0.5)


# ---- difficulty


def slow_point(trials: Sequence[Trial], threshold: float) -> tuple[float, float, float]:
    sure = [trial.certainty >= threshold for trial in trials]
    right = [t.is_right_at_once if s else t.is_right_voted for t, s in zip(trials, sure, strict=True)]
    tokens = [t.num_tokens_at_once if s else t.num_tokens_voted for t, s in zip(trials, sure, strict=True)]
    return sum(sure) / len(trials), sum(right) / len(trials), sum(tokens) / len(trials)


def test_a_curve_is_that_of_each_threshold_tried():
    rng = random.Random(0)
    for _ in range(200):
        trials = []
        for _ in range(rng.randint(1, 12)):
            fast = rng.randint(1, 4)
            certainty = rng.choice([0.2, 0.5, 0.9, 1.0, rng.random()])
            trials.append(Trial(certainty, rng.random() < 0.6, fast, rng.random() < 0.7, fast + rng.randint(4, 9)))
        curve = threshold_curve(trials)
        for point in curve:
            expected = slow_point(trials, point.threshold)
            assert (point.share_sure, point.accuracy, point.num_tokens) == pytest.approx(expected)
        assert len(curve) == len({trial.certainty for trial in trials}) + 1
        best = choose_threshold(curve)
        everywhere = [slow_point(trials, n / 500) for n in range(0, 1001)]
        assert best.accuracy >= max(accuracy for _, accuracy, _ in everywhere) - 1e-9
        cheapest = min(tokens for _, accuracy, tokens in everywhere if accuracy >= best.accuracy - 1e-9)
        assert best.num_tokens <= cheapest + 1e-9
    neighbours = [Trial(0.5, True, 1, True, 9), Trial(math.nextafter(0.5, 1), True, 1, True, 9)]
    assert [slow_point(neighbours, point.threshold)[0] for point in threshold_curve(neighbours)] == [1, 0.5, 0]
    points = [ThresholdPoint(0.0, 1, 0.80, 2.0), ThresholdPoint(0.5, 0.5, 0.84, 5.0), ThresholdPoint(2, 0, 0.85, 9.0)]
    assert [choose_threshold(points, give).threshold for give in (0, 0.015, 0.2)] == [2, 0.5, 0]
    with pytest.raises(ValueError, match="no trials"):
        threshold_curve([])


def test_certainty_is_of_the_first_tokens_and_the_threshold_is_sure_itself(tokenizer):
    logprobs = [math.log(prob) for prob in (0.9, 0.5, 0.1)]
    assert [SureConfig(first_tokens=n).of(logprobs) for n in (1, 2, 3, 9)] == pytest.approx([0.9, 0.5, 0.1, 0.1])
    assert [SureConfig(0, "mean", n).of(logprobs) for n in (1, 2, 9)] == pytest.approx([0.9, 0.7, 0.5])
    told: Any = Told(tokenizer, lambda *_: ("red", -0.5))
    edge = math.exp(-0.5)
    assert by_difficulty(told, "p", "q", SureConfig(edge)).is_sure
    unsure = by_difficulty(told, "p", "q", SureConfig(math.nextafter(edge, 1)), VotingConfig(3))
    assert not unsure.is_sure and unsure.num_tokens == 3 * (len(tokenizer.text.encode("red")) + 1), "and two votes"


def test_difficulty_answers_at_once_or_votes_as_the_trials_said(model):
    parts, questions = asked_of()
    greedy = model.answer(parts, questions, temperature=0.0)
    votes = self_consistency(model, parts, questions, WARM, meaning=len)
    right = ["", *(vote.text for vote in votes[1:])]
    sure = SureConfig(0.0, first_tokens=3)
    trials = effort_trials(model, parts, questions, lambda n, text: text == right[n], sure, WARM, meaning=len)
    seen = set()
    for point in threshold_curve(trials):
        config = replace(sure, threshold=point.threshold)
        efforts = by_difficulty(model, parts, questions, config, WARM, meaning=len)
        for place, one in enumerate(efforts):
            assert one.certainty == pytest.approx(min(map(math.exp, greedy[place].logprobs[:3])), abs=1e-4)
            assert one.text == (greedy[place] if one.is_sure else votes[place].text)
            assert one.is_sure == (one.certainty >= point.threshold) == (one.vote is None)
            seen.add(one.is_sure)
        assert sum(one.num_tokens for one in efforts) / 4 == point.num_tokens
        assert sum(one.text == right[n] for n, one in enumerate(efforts)) / 4 == point.accuracy
    assert seen == {True, False}
    mean = by_difficulty(model, parts[0], questions[0], SureConfig(ALWAYS_VOTE, "mean", 2), WARM)
    assert mean.certainty == pytest.approx(fmean(map(math.exp, greedy[0].logprobs[:2])), abs=1e-4)
    assert isinstance(mean.vote, Vote) and not mean.is_sure and str(mean) == mean.vote.text
    assert by_difficulty(model, parts[0], questions[0], SureConfig(0.0), logprobs=None).is_sure


# ---- shots and thoughts


def test_shots_are_the_models_own_documents_and_the_longest_are_left_out(model):
    (a, b, c, d), questions = asked_of()
    shots = [([*a, " red" * 9], questions[0], "one two"), (b, questions[1], "red"), ([c[0]], questions[2], "two")]
    text, end = model.tokenizer.text, model.tokenizer.id(END)

    def expected(kept: Sequence[int]) -> list[int]:
        ids = []
        for place in kept:
            about, question, answer = shots[place]
            ids += [*model.question_prompt(about, question).token_ids_T, *text.encode(answer), end]
        return [*ids, *model.question_prompt(d, questions[3]).token_ids_T]

    lengths = [len(expected([place])) for place in range(3)]
    assert lengths[0] > lengths[1] > lengths[2]
    asker = Asker.of(model, {"max_new_tokens": 5})
    for kept in ((0, 1, 2), (1, 2), (2,), ()):
        bound = len(expected(kept)) + 5
        ((prompt, shown),) = asker.prompts(d, questions[3], shots, max_length=bound)
        assert prompt.token_ids_T.tolist() == expected(kept)
        assert shown.kept == kept and sorted((*kept, *shown.dropped)) == [0, 1, 2]
        assert len(prompt.images) == len(kept) + 1 and len(prompt.clips) == len({0, 1} & set(kept)) + 1
        answer = few_shot(model, shots, d, questions[3], max_length=bound, max_new_tokens=5)
        assert (answer.shots, answer.dropped) == (kept, shown.dropped) and answer.num_tokens <= 5
    first, second = few_shot(model, shots, [d, c], [questions[3], "how many?"])
    assert second.num_cached_tokens >= (lengths[0] + lengths[1]) // 4 and str(first) == first.text
    plain = few_shot(model, [], [d, c], [questions[3], "how many?"])
    assert [one.text for one in plain] == model.answer([d, c], [questions[3], "how many?"])
    tight = Model(
        model.model, model.tokenizer, None, model.generation, EngineConfig(max_length=len(expected((2,))) + 6)
    )
    assert few_shot(tight, shots, d, questions[3]).dropped == (0, 1), "the engine's bound counts by itself"


def test_a_model_with_a_chat_template_is_asked_in_turns(tokenizer):
    templated = TokenizerFolder(tokenizer.text, None, tokenizer.config, chat_template=CHAT)
    chatty = Model(make_model(templated, sight=False), templated, generation=GenerationConfig(max_new_tokens=4))
    shots = [("one, ", "two?", "three"), (["a red", " circle "], "one?", "two")]
    ((prompt, shown),) = Asker.of(chatty, {}).prompts("he ", "said?", shots)
    turns = [
        {"role": "user", "content": "one, two?"}, {"role": "assistant", "content": "three"},
        {"role": "user", "content": "a red circle one?"}, {"role": "assistant", "content": "two"},
        {"role": "user", "content": "he said?"},
    ]  # fmt: skip
    text = templated.text.decode
    assert text(prompt.token_ids_T.tolist()) == text(chatty.chat_prompt(turns).token_ids_T.tolist())
    assert shown.kept == (0, 1)
    answer = few_shot(chatty, shots, "he ", "said?", max_length=prompt.num_tokens + 3)
    assert answer.shots == (0,) and answer.dropped == (1,), "the second one is longer"


@pytest.mark.parametrize(
    ("text", "extract", "answer"),
    [
        (" red. ", None, "red."),
        ("so the answer is: red\nbecause", ANSWER, "red"),
        ("The Answer is blue. No: the answer is red.", ANSWER, "red"),
        ("the answer is 3 circles", ANSWER, "3 circles"),
        ("no idea", ANSWER, None),
        ("4 and 5", r"\d", "5"),
        ("a=4, b=5", r"a=(\d)", "4"),
        ("red blue", lambda text: text.split()[0], "red"),
        ("red", lambda text: None, None),
    ],
)
def test_an_answer_is_found_in_a_text(text, extract, answer):
    assert extracted(text, extract) == answer


def test_a_thought_without_shots_takes_two_calls_of_which_the_second_begins_with_the_first():
    tokenizer = make_tokenizer()
    model = Model(
        make_model(tokenizer), tokenizer, None, GenerationConfig(max_new_tokens=6), EngineConfig(block_size=4)
    )
    parts, questions = asked_of(2)
    config = ThinkConfig("one: ", "he said: ", 5)
    thoughts = think(model, parts, questions, config=config, choices=["red", "blue"], temperature=0.0)
    for thought, part, question in zip(thoughts, parts, questions, strict=True):
        asker = Asker.of(model, {"max_new_tokens": 5, "temperature": 0.0})
        begun = join([model.question_prompt(part, question), asker.written("one: ")])
        (first,) = asker.write([begun])
        assert first.ids
        (second,) = Asker.of(model, {"choices": ["red", "blue"], "temperature": 0.0}).write(
            [join([begun, asker.of_ids(first.ids), asker.written("he said: ")])]
        )
        assert thought.rationale == "one: " + first.text and thought.text == second.text in ("red", "blue")
        assert thought.num_tokens == first.cost.num_new_tokens + second.cost.num_new_tokens
        assert thought.num_cached_tokens >= begun.num_tokens // 4 * 4, "what the first call computed"
        assert thought.num_prompt_tokens == first.cost.num_prompt_tokens + second.cost.num_prompt_tokens
    bound = model.question_prompt(parts[0], questions[0]).num_tokens + 8
    with pytest.raises(ValueError, match="no room for a thought"):
        think(model, parts[0], questions[0], config=config, max_length=bound)


def test_a_thought_is_extracted_from_its_own_place(tokenizer):
    def say(request: TextRequest, prompt: str) -> tuple[str, float]:
        return (" 7 or 8, I think." if prompt.endswith("is") else " 5 and 6 are 11."), -0.1

    told: Any = Told(tokenizer, say)
    thought = think(told, "p", "q", extract=r"\d+")
    assert thought.text == "8" and thought.is_found and thought.rationale == "Let's think step by step. 5 and 6 are 11."
    lost = think(told, "p", "q", extract="red")
    assert lost.text == "7 or 8, I think." and not lost.is_found
    shown: Any = Told(tokenizer, lambda *_: ("a, b. The answer is red.", -0.1))
    shots = [("p", "q", "c. The answer is blue.")]
    thought = think(shown, "p", "q", shots=shots)
    assert (thought.text, thought.is_found, thought.shots) == ("red", True, (0,))
    assert len(shown.requests) == 1 and thought.rationale == "a, b. The answer is red."


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: few_shot(m, [("a", "b")], "p", "q?"), r"shots\[0\] is"),
        (lambda m: few_shot(m, "abc", "p", "q?"), "shots is 'abc'"),
        (lambda m: few_shot(m, [("a", "b", 3)], "p", "q?"), r"shots\[0\]'s answer is 3"),
        (lambda m: few_shot(m, [], ["p"], ["q?", "r?"]), "there are 2 questions but parts for 1"),
        (lambda m: few_shot(m, [], "p", 3), r"questions\[0\] is 3"),
        (lambda m: few_shot(m, [], "p", "q?", best_of=2, temperature=1.0), "best_of chooses among several"),
        (lambda m: think(m, "p", "q?", extract="("), "no regular expression"),
        (lambda m: think(m, "p", "q?", extract=3), "extract is 3"),
        (lambda m: ThinkConfig(max_thought_tokens=0), "max_thought_tokens is 0"),
        (lambda m: self_consistency(m, "p", "q?", temperature=0.0), "temperature is 0"),
        (lambda m: self_consistency(m, "p", "q?", confidence=0.2), "confidence is 0.2"),
        (lambda m: TreeConfig(budget=0), "budget is 0"),
        (lambda m: SureConfig(certainty="most"), "certainty is 'most'"),
        (lambda m: by_difficulty(m, "p", "q?", num_beams=2), "num_beams"),
    ],
)
def test_what_cannot_be_asked_is_named(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


# ---- the shell


def test_the_shell_scores_methods_on_a_manifest(model, tmp_path, capsys, monkeypatch):
    save_model(tmp_path / "model", model.model, model.tokenizer, generation=GenerationConfig(max_new_tokens=8))
    parts = [[Segment(text="See "), "a.png", "a.wav"], ["b.png"]]
    rows = [
        {"id": "a", "segments": [{"text": "See "}, {"image": "a.png"}, {"audio": "a.wav"}], "question": "what?"},
        {"id": "b", "segments": [{"image": "b.png"}], "question": "which?", "answer": "red"},
        {"id": "c", "segments": [{"image": "c.png"}]},
    ]
    write_rows(tmp_path, [{**rows[0], "answer": "x"}, *rows[1:]])
    monkeypatch.chdir(tmp_path)
    said = model.answer(parts[0], "what?", max_new_tokens=16)
    assert said.finish_reason == "stop" and said.strip()
    write_rows(tmp_path, [{**rows[0], "answer": said}, *rows[1:]])
    write_rows(tmp_path, [{"id": "v", "segments": [{"image": "v.png"}], "question": "q?", "answer": "red"}], "v.jsonl")
    methods = list(METHODS)
    assert METHODS == reasoning_task.METHODS
    options = ["--model", "model", "--manifest", "rows.jsonl", "--json", "out/scores.json"]
    assert main(["reason", *options, "--method", *methods, "--validation", "v.jsonl", "--shots", "v.jsonl",
                 "--num_shots", "1", "--votes", "3", "--budget", "9"]) == 0  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == methods
    result = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores = {one["method"]: one for one in result["scores"]}
    assert scores["direct"]["accuracy"] == 0.5 and scores["direct"]["num_rows"] == 2
    for method, score in scores.items():
        right = [(exact_match(one[method], one["reference"]), exact_match(one["direct"], one["reference"]))
                 for one in result["predictions"]]  # fmt: skip
        assert (score["num_gained"], score["num_lost"]) == (right.count((True, False)), right.count((False, True)))
        assert score["accuracy"] == fmean(mine for mine, _ in right) and score["num_tokens"] > 0
    assert scores["difficulty"]["decided"]["threshold"] in [point["threshold"] for point in result["curve"]]
    assert scores["tree"]["decided"]["most tokens"] <= 9 and scores["few_shot"]["decided"]["shots"] == 1
    assert result["predictions"][0]["direct"] == said
    assert [one["id"] for one in result["predictions"]] == ["a", "b"] and len(result["curve"]) == 2
    for wrong, message in (
        (["--method", "difficulty"], "difficulty needs a threshold"),
        (["--method", "few_shot"], "few_shot needs rows to show"),
        (["--method", "direct", "direct"], "given twice"),
        (["--validation", "rows.jsonl"], "flatters"),
    ):
        assert main(["reason", *options, *wrong]) == 2
        assert message in capsys.readouterr().err
