"""Votes: against a slow obvious count, and draws that neither batches, neighbours nor further votes change."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from mmllm.checkpoints.settings import Sampling
from mmllm.inference.generate import generate_text
from mmllm.inference.voting import Vote, VotingConfig, draw_number, majority, vote
from mmllm_tokenizers.vocab import END
from tests.inference_fixtures import images, make, sounds

WARM = Sampling(temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def model():
    return make()


def prompts_of(model, count: int = 5):
    pictures, heard = images(count), sounds(count)
    captions = [model.caption_prompt(picture) for picture in pictures[::2]]
    return [*captions, *(model.question_prompt([p, s], "which?") for p, s in zip(pictures, heard, strict=True))]


def slow_majority(texts: list[str], meaning) -> tuple[str, int]:
    """Every draw counts who agrees with it; the first whom most agree with says what, the first commonest wording how.

    Two loops over all pairs, and no table of meanings.
    """
    agreeing = [sum(meaning(other) == meaning(text) for other in texts) for text in texts]
    winner = texts[agreeing.index(max(agreeing))]
    same = [text for text in texts if meaning(text) == meaning(winner)]
    return max(same, key=lambda text: (same.count(text), -same.index(text))), len(same)


def test_majority_is_that_of_a_slow_count():
    rng = random.Random(0)
    texts = ["red", " red", "Red", "blue", "blue ", "BLUE", "", " ", "green"]
    ties = 0
    for _ in range(2_000):
        drawn = [rng.choice(texts) for _ in range(rng.randint(1, 9))]
        for meaning in (str.strip, str.lower, lambda text: text.strip().lower(), len, hash):
            got = majority(drawn, meaning)
            assert (got.text, got.votes) == slow_majority(drawn, meaning)
            assert got.agreement == got.votes / len(drawn)
        counts = sorted(drawn.count(text) for text in set(drawn))
        ties += len(counts) > 1 and counts[-1] == counts[-2]
    assert ties > 500, "ties are among them"


def test_wordings_of_one_meaning_vote_together_and_the_first_wins_a_tie():
    texts = ["blue", "blue", "red", " red", "red "]
    assert majority(texts) == Vote("red", 3, 3 / 5, 0)
    assert majority(texts, meaning=lambda text: text) == Vote("blue", 2, 2 / 5, 0)
    assert majority(["a", "b", "b", "a"]).text == "a"
    assert majority(["b", "a", "a", "b"]).text == "b"
    assert majority([" b", "b", "a", "b "]) == Vote(" b", 3, 3 / 4, 0), "of wordings too, the first"
    with pytest.raises(ValueError, match="no texts"):
        majority([])


def test_a_vote_is_that_of_answers_drawn_one_by_one():
    """The reference asks each prompt for each answer by itself, and counts the tokens that it sees."""
    model = make()
    with torch.no_grad():
        model.model.decoder.head_weight_VD[model.tokenizer.id(END)] *= 4  # else hardly an answer ends by itself
    prompts, num_votes, most = prompts_of(model), 5, 6
    got = vote(model, prompts, VotingConfig(num_votes, WARM), len, max_new_tokens=most)
    lengths = set()
    for place, (prompt, one) in enumerate(zip(prompts, got, strict=True)):
        drawn = [
            generate_text(model.model, model.tokenizer, [prompt], WARM, most, numbers=[draw_number(place, draw)])[0]
            for draw in range(num_votes)
        ]
        lengths |= {len(ids) for ids in drawn}
        texts = [model.tokenizer.text.decode(ids) for ids in drawn]
        assert len(set(texts)) > 1, "votes are drawn apart"
        assert (one.text, one.votes) == slow_majority(texts, len)
        ended = [len(ids) < most for ids in drawn]
        assert one.num_tokens == sum(len(ids) for ids in drawn) + sum(ended)
    assert most in lengths and min(lengths) < most, "some end by themselves, some are cut"


def test_neither_batch_nor_neighbours_nor_more_votes_change_a_draw(model, monkeypatch: pytest.MonkeyPatch):
    prompts, seen = prompts_of(model), []

    def note(texts, meaning):
        seen.append(list(texts))
        return majority(texts, meaning)

    monkeypatch.setattr("mmllm.inference.voting.majority", note)

    def draws(count: int, num_votes: int, batch_size: int = 64, seed: int = 3) -> list[list[str]]:
        seen.clear()
        config = VotingConfig(num_votes, Sampling(temperature=1.0, seed=seed))
        vote(model, prompts[:count], config, max_new_tokens=8, batch_size=batch_size)
        return list(seen)

    expected = draws(len(prompts), 6)
    assert draws(len(prompts), 6) == expected
    assert draws(len(prompts), 6, batch_size=1) == draws(len(prompts), 6, batch_size=7) == expected
    assert draws(3, 6) == expected[:3]
    assert draws(len(prompts), 2) == [texts[:2] for texts in expected]
    alone = generate_text(model.model, model.tokenizer, prompts, WARM, 8)
    assert [texts[0] for texts in expected] == [model.tokenizer.text.decode(ids) for ids in alone]
    assert draws(len(prompts), 6, seed=4) != expected


def test_a_prompt_is_computed_once_for_all_its_votes(model, monkeypatch: pytest.MonkeyPatch):
    """And its votes are those of as many prompts like it, which are computed once as well."""
    prompts = prompts_of(model)
    places = [place for place in range(len(prompts)) for _ in range(6)]
    numbers = [draw_number(place, draw) for place in range(len(prompts)) for draw in range(6)]
    seen, embed = [], model.model.image_embedding

    def count(pixels: torch.Tensor, *others: object) -> torch.Tensor:
        seen.append(len(pixels))
        return embed(pixels, *others)

    monkeypatch.setattr(model.model, "image_embedding", count)
    once, each = (
        generate_text(model.model, model.tokenizer, asked, WARM, 8, numbers=numbers)
        for asked in ([prompts[place] for place in places], [copy.copy(prompts[place]) for place in places])
    )
    assert once == each and len(set(map(tuple, once))) > len(prompts)
    assert seen == [len(prompts), len(prompts)]


def test_draws_differ_in_what_a_generator_keeps_of_a_seed():
    """PyTorch's takes 32 bits: numbers that differ above them alone would all draw the same."""
    kept = {(seed * 1_000_003 + draw_number(place, draw)) % 2**32
            for seed in range(3) for place in range(500) for draw in range(64)}  # fmt: skip
    assert len(kept) == 3 * 500 * 64
    assert [draw_number(place, 0) for place in range(4)] == [0, 1, 2, 3]


def test_defaults_are_the_models_and_progress_hears_of_each_answer(model):
    told: list[int] = []
    prompts = prompts_of(model)[:2]
    votes = vote(model, prompts, VotingConfig(3, WARM), progress=told.append)
    assert sum(told) == 6
    assert votes == vote(model, prompts, VotingConfig(3, WARM), max_new_tokens=model.generation.max_new_tokens)
    assert vote(model, [], VotingConfig()) == []


def test_wrong_use_says_what_to_do(model):
    with pytest.raises(ValueError, match="num_votes is 0; it must be at least 1"):
        VotingConfig(0)
    with pytest.raises(ValueError, match="temperature is 0, at which all votes are the same"):
        VotingConfig(8, Sampling())
    with pytest.raises(ValueError, match="1 prompts but 2 numbers to draw by"):
        generate_text(model.model, model.tokenizer, prompts_of(model)[:1], WARM, 4, numbers=[0, 1])
