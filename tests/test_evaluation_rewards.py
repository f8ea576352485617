"""Rewards by name: what each gives, and what is refused, by reward and row."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mmllm.evaluation.rewards import load_rewards

SCENE = {
    "id": "scene 1",
    "text": "a small red circle left of a large blue square",
    "objects": [
        {"shape": "circle", "colour": "red", "size": "small"},
        {"shape": "square", "colour": "blue", "size": "large"},
    ],
    "relations": [[0, "left of", 1]],
}


@dataclass(frozen=True, eq=False)
class Said:
    text: str
    codes_KF: Tensor
    wave_T: Tensor
    sample_rate: int = 8000


def said(text: str, samples: int = 800) -> Said:
    return Said(text, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(samples))


def score(config: Any, answers: Sequence[Any], rows: Sequence[dict[str, Any]], **more: Any) -> list[float]:
    configs = config if isinstance(config, list) else [config]
    return load_rewards(configs, **more).score(answers, rows).totals


def test_a_caption_is_worth_what_it_has_right_and_1_only_if_whole() -> None:
    answers = [
        "a small red circle left of a large blue square",
        "a large blue square right of a small red circle",
        "a small green circle left of a large blue square",
        "nonsense",
        "a small red circle left of a large blue square left of a small red star",
    ]
    whole, other_order, one_wrong, nothing, too_many = score("caption_attributes", answers, [SCENE] * 5)
    assert whole == 1
    assert one_wrong == pytest.approx(0.9 * 6 / 7)
    assert nothing == 0
    assert too_many < one_wrong
    assert other_order <= 1
    assert score("caption_attributes", ["A dog.", "a cat"], [{"text": "a dog"}] * 2) == [1, 0]


def test_answers_lengths_words_and_forms() -> None:
    rows = [{"question": "how many?", "answer": "Two", "text": "no answer"}] * 2
    assert score("exact_answer", ["two.", "three"], rows) == [1, 0]
    assert score("words", ["one two  three", ""], rows) == [3, 0]
    assert score("length", ["four", ""], rows) == [-4, 0]
    assert score({"name": "length", "target": 3}, ["four", ""], rows) == [-1, -3]
    assert score("length", [said("two", 1600)], rows[:1]) == [pytest.approx(-0.2)]
    assert score({"name": "format", "pattern": r"\d+"}, [" 12\n", "12 cats"], rows) == [1, 0]
    assert score("shorter_and_right", ["two", "three"], rows) == [2.0, 0]
    longer = "a circle that is small and red left of a large blue square"
    short, long = score("shorter_and_right", [str(SCENE["text"]), longer], [SCENE] * 2)
    assert short > long > 1


def test_rewards_are_added_by_their_weights() -> None:
    configs = [{"name": "exact_answer", "weight": 2.0}, {"name": "words", "weight": -0.5}]
    scores = load_rewards(configs).score(["two", "two cats"], [{"answer": "two"}] * 2)
    assert scores.totals == [1.5, -1.0]
    assert scores.by_name == {"exact_answer": [1, 0], "words": [1, 2]}


def test_speech_is_worth_the_words_that_are_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[Any] = []

    class Ear:
        tokenizer = type("T", (), {"text": type("X", (), {"encode": staticmethod(str.split)})})

        def transcribe(self, sounds: list[Any], **settings: Any) -> list[str]:
            heard.append((sounds, settings))
            return ["one two", "one", "five six seven"]

    answers = [said("one two"), said("one two"), said("one")]
    rewards = score("own_wer", answers, [{}] * 3, get_model=lambda: Ear())
    assert rewards == [1.0, 0.5, 0.0]  # never below 0
    ((sounds, settings),) = heard
    assert [rate for _, rate in sounds] == [8000] * 3
    assert settings["temperature"] == 0

    class Aligner:
        config = type("C", (), {"words": ()})

        def transcribe(self, waves: list[Tensor], rate: int, lexicon: Any) -> list[str]:
            return ["one too"] * len(waves)

    monkeypatch.setattr("mmllm.evaluation.speech_task.Aligner.load", lambda folder: Aligner())
    assert score({"name": "judge_wer", "folder": "aligner"}, answers[:1], [{}]) == [0.5]


def mine(answers: Sequence[Any], rows: Sequence[dict[str, Any]], factor: float = 1.0) -> list[float]:
    return [factor * len(answer) for answer in answers]


def test_any_function_is_a_reward() -> None:
    name = f"{__name__}:mine"
    assert score({"name": name, "factor": 2.0}, ["abc"], [{}]) == [6.0]
    with pytest.raises(ValueError, match=r"mine' with the settings .*'speed'.*unexpected keyword argument 'speed'"):
        load_rewards([{"name": name, "speed": 1}])


WRONG: dict[str, Any] = {
    "nan": lambda answers, rows: [1.0, float("nan")],
    "infinite": lambda answers, rows: np.array([1.0, np.inf]),
    "text": lambda answers, rows: [1.0, "good"],
    "few": lambda answers, rows: [1.0],
    "none": lambda answers, rows: None,
    "fails": lambda answers, rows: 1 / 0,
    "digits": lambda answers, rows: [1.0, "1"],
    "huge": lambda answers, rows: [1.0, 10**400],
    "two": lambda answers, rows: [torch.ones(1), torch.ones(2)],
    "leaves": lambda answers, rows: sys.exit(3),
}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"'nan' gave nan for the answer 'b' to row 'row 2'"),
        ("infinite", r"'infinite' gave inf for the answer 'b' to row 'row 2'"),
        ("text", r"'text' gave 'good' for the answer 'b' to row 'row 2'"),
        ("few", r"'few' gave 1 numbers for 2 answers, the first to row 'row 1'"),
        ("none", r"'none' gave NoneType for 2 answers"),
        ("fails", r"'fails' failed on 2 answers, the first to row 'row 1': ZeroDivisionError"),
        ("digits", r"'digits' gave '1' for the answer 'b' to row 'row 2'"),
        ("huge", r"'huge' gave 10+ for the answer 'b' to row 'row 2'"),
        ("two", r"'two' gave tensor\(\[1., 1.\]\) for the answer 'b' to row 'row 2'"),
        ("leaves", r"'leaves' failed on 2 answers, the first to row 'row 1': SystemExit: 3"),
    ],
)
def test_a_reward_that_goes_wrong_is_named_with_its_row(kind: str, message: str) -> None:
    rewards = load_rewards(["words"])
    rewards.rewards.clear()
    rewards.rewards[kind] = WRONG[kind]
    with pytest.raises(ValueError, match=message):
        rewards.score(["a", "b"], [{"id": "row 1"}, {"id": "row 2"}])


@pytest.mark.parametrize(
    ("configs", "message"),
    [
        ([], "no reward is named"),
        (["word"], "'word' is unknown; choose among caption_attributes"),
        (["words", "words"], "named twice"),
        ([{"weight": 2}], "has no name"),
        ([{"name": "words", "weight": True}], "has the weight True"),
        ([{"name": "format"}], "missing a required argument: 'pattern'"),
        ([{"name": "judge_wer"}], "lacks 'folder'"),
        ([{"name": "own_wer"}], "needs the model that speaks"),
        (["no.such:reward"], "can't be imported"),
        (["math:pi"], "is float; wanted a function"),
        ([3], "a reward is 3; give its name"),
        (["../mine:reward"], "is unknown; .* package.module:function"),
        ([{"name": "words", "weight": 10**400}], "has the weight 10+; give a finite number"),
    ],
)
def test_a_config_that_names_no_reward(configs: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_rewards(configs)


@pytest.mark.parametrize(("text", "message"), [("def f(", "SyntaxError"), ("1 / 0", "ZeroDivisionError")])
def test_a_module_that_cannot_be_imported(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"broken_{message}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"'broken_{message}:f' can't be imported: {message}"):
        load_rewards([f"broken_{message}:f"])


def test_a_reward_changes_no_answers_and_a_sum_is_finite() -> None:
    rewards = load_rewards([{"name": "words", "weight": 1e29}])
    rewards.rewards["words"] = lambda answers, rows: (answers.clear(), [1.0, 2.0])[1]  # pyright: ignore
    assert rewards.score(["a", "b"], [{}, {}]).totals == [1e29, 2e29]
    rewards.rewards["words"] = lambda answers, rows: [1.0, 1e300]
    with pytest.raises(ValueError, match="weighted sum of the rewards words is inf for row 'row 2'"):
        rewards.score(["a", "b"], [{"id": "row 1"}, {"id": "row 2"}])


def test_rewards_of_text_refuse_speech_and_the_other_way_round() -> None:
    with pytest.raises(ValueError, match="words rewards text, but an answer is spoken"):
        score("words", [said("one")], [{}])
    with pytest.raises(ValueError, match="own_wer rewards speech, but an answer is text"):
        score("own_wer", ["one"], [{}], get_model=lambda: None)
    with pytest.raises(ValueError, match="row 'x' has neither 'answer' nor 'text'"):
        score("exact_answer", ["one"], [{"id": "x"}])
