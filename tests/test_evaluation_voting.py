"""Votes beside the greedy answer: what is scored of them, and that nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.cli.main import main
from mmllm.evaluation.captions import caption_matches, caption_meaning, reference_scene
from mmllm.evaluation.metrics import exact_match, text_meaning
from mmllm.evaluation.results import load_result, save_result
from mmllm.evaluation.tasks import evaluate
from mmllm.inference import voting
from mmllm.inference.api import Model
from mmllm.inference.voting import VotingConfig
from tests.inference_fixtures import make
from tests.test_evaluation_tasks import scene, scene_of, write_rows

THREE = VotingConfig(3, Sampling(temperature=0.7))
OF_VOTES = {"num_votes", "vote_temperature", "mean_agreement", "mean_agreement_ci", "tokens_per_answer"}


@pytest.fixture(scope="module")
def tiny() -> Model:
    return make()


def say(monkeypatch: pytest.MonkeyPatch, model: Model, drawn: list[list[str]]) -> None:
    """Lets votes draw these texts, prompt by prompt."""
    texts = [text for of_prompt in drawn for text in of_prompt]

    def generate(_model, tokenizer, prompts, sampling, *_, **__) -> list[list[int]]:
        assert len(prompts) == len(texts) and sampling.temperature == 0.7
        return [tokenizer.text.encode(text) for text in texts]

    monkeypatch.setattr(voting, "generate_text", generate)


def test_texts_match_exactly_where_their_meaning_is_equal():
    texts = ["Red.", "red", " red ", "a red", "", " ", ".", "!", "...", "don't", "dont", "don t",
             scene("red")["text"], "in the middle there is a small red circle", scene_of("red", "pink")["text"],
             "a small pink circle right of a small red circle", scene_of("pink", "red")["text"]]  # fmt: skip
    for a in texts:
        for b in texts:
            assert (text_meaning(a) == text_meaning(b)) == exact_match(a, b)
    for row in (scene("red"), scene_of("red", "pink"), scene_of("pink", "red")):
        known = reference_scene(row)
        for text in texts:
            assert (caption_meaning(text) == caption_meaning(row["text"])) == caption_matches(text, "", known)


def test_captions_vote_by_what_they_say(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        {"id": "a", "image": "a.png", **scene("red")},
        {"id": "b", "image": "b.png", **scene_of("red", "blue")},
        {"id": "c", "image": "c.png", "text": "a photo of cats"},
        {"id": "d", "image": "d.png", **scene("pink"), "heldout_pairs": [["circle", "pink"]]},
    ]
    drawn = [
        ["a small blue circle at the top", "a small red circle in the middle", "a small red circle in the centre"],
        [scene_of("blue", "red")["text"], scene_of("blue", "red")["text"], scene_of("red", "blue")["text"]],
        ["A photo of cats!", "a photo of dogs", "a photo of cats"],
        ["a large pink circle at the top", "a large pink circle at the top edge", "a small pink circle in the centre"],
    ]  # fmt: skip
    manifest = write_rows(tmp_path, rows)
    plain = evaluate(tiny, "caption", manifest)
    say(monkeypatch, tiny, drawn)
    result = evaluate(tiny, "caption", manifest, voting=THREE)
    new = set(result.scores) - set(plain.scores)
    assert {key: result.scores[key] for key in plain.scores} == plain.scores
    scored = {"voted_exact_match", "voted_heldout_pairs_accuracy", "voted_heldout_pairs_exact_match"}
    assert new == OF_VOTES | scored | {f"{key}_ci" for key in scored}
    assert result.scores["voted_exact_match"] == 2 / 3, "of the test rows a and c; b's majority has the order wrong"
    assert 0 <= result.scores["voted_exact_match_ci"][0] < 2 / 3 < result.scores["voted_exact_match_ci"][1] <= 1
    assert result.scores["voted_heldout_pairs_accuracy"] == 1 and result.scores["voted_heldout_pairs_exact_match"] == 0
    assert result.scores["mean_agreement"] == pytest.approx(2 / 3)
    assert (result.scores["num_votes"], result.scores["vote_temperature"]) == (3, 0.7)
    encode = tiny.tokenizer.text.encode
    assert result.scores["tokens_per_answer"] == sum(len(encode(t)) + 1 for texts in drawn for t in texts) / 4
    assert [p.voted for p in result.predictions] == [drawn[0][1], drawn[1][0], drawn[2][0], drawn[3][0]]
    assert [replace(p, voted=None, agreement=None) for p in result.predictions] == plain.predictions


def test_answers_vote_by_their_words(tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    questions = {"which colour is the first picture?": "red", "what is it?": "star", "the second picture?": "blue"}
    rows = [{"id": str(i), "segments": [{"image": f"{i}.png"}], "question": question, "answer": answer}
            for i, (question, answer) in enumerate(questions.items())]  # fmt: skip
    manifest = write_rows(tmp_path, rows)
    plain = evaluate(tiny, "interleaved", manifest)
    say(monkeypatch, tiny, [["blue", "Red", "red."], ["star", "ring", "ring"], ["pink", "blue", "cyan"]])
    result = evaluate(tiny, "interleaved", manifest, voting=THREE)
    assert {key: result.scores[key] for key in plain.scores} == plain.scores
    new = set(result.scores) - set(plain.scores)
    scored = {"voted_answer_accuracy", "voted_ordinal_accuracy"}
    assert new == OF_VOTES | scored | {f"{key}_ci" for key in scored}
    assert result.scores["voted_answer_accuracy"] == 1 / 3 and result.scores["voted_ordinal_accuracy"] == 1 / 2
    assert result.scores["mean_agreement"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert [p.voted for p in result.predictions] == ["Red", "ring", "pink"]
    assert [p.agreement for p in result.predictions] == [2 / 3, 2 / 3, 1 / 3]


def test_votes_are_kept_in_a_file_and_leave_no_trace_without(tiny: Model, tmp_path: Path):
    manifest = write_rows(tmp_path, [{"id": "a", "image": "a.png", **scene("red")}])
    told: list[tuple[int, int]] = []
    result = evaluate(tiny, "caption", manifest, voting=THREE, progress=lambda *counts: told.append(counts))
    assert told[-1] == (4, 4), "a caption (its blind one is not counted) and three votes"
    assert load_result(save_result(result, tmp_path / "voted.json")) == result
    kept = save_result(evaluate(tiny, "caption", manifest), tmp_path / "plain.json").read_text()
    assert not [key for key in ("voted", "agreement", "num_votes", "mean_agreement") if f'"{key}"' in kept]


@pytest.mark.parametrize("task", ["transcribe", "speak", "text"])
def test_other_tasks_refuse_votes_by_name(tiny: Model, tmp_path: Path, task: str):
    with pytest.raises(ValueError, match=f"task is '{task}', which has no votes; those of caption and interleaved"):
        evaluate(tiny, task, [], voting=THREE)


def test_votes_from_the_command(tiny: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    save_model(tmp_path / "model", tiny.model, tiny.tokenizer, generation=GenerationConfig(max_new_tokens=12))
    rows = [{"id": f"c{i}", "image": f"c{i}.png", **scene("red")} for i in range(3)]
    rows += [{"id": f"i{i}", "segments": [{"text": "see"}, {"image": f"i{i}.png"}, {"audio": f"i{i}.wav"}],
              "question": "what?", "answer": "one"} for i in range(3)]  # fmt: skip
    command = [
        "eval",
        "--model",
        str(tmp_path / "model"),
        "--manifest",
        str(write_rows(tmp_path, rows)),
        "--device",
        "cpu",
    ]

    def run(task: str, *options: str) -> dict:
        out = tmp_path / "out.json"
        assert main([*command, "--task", task, "--json", str(out), *options]) == 0
        return json.loads(out.read_text())

    for task, key in (("caption", "voted_exact_match"), ("interleaved", "voted_answer_accuracy")):
        plain = run(task)
        voted = run(task, "--votes", "4", "--temperature", "0.9", "--batch_size", "2")
        assert key in capsys.readouterr().out
        assert {k: voted[task][k] for k in plain[task]} == plain[task]
        assert (voted[task]["num_votes"], voted[task]["vote_temperature"]) == (4, 0.9)
        assert all(1 / 4 <= p["agreement"] <= 1 and p["voted"] is not None for p in voted["predictions"])
        assert voted == run(task, "--votes", "4", "--temperature", "0.9"), "whatever the batch"
        assert run(task, "--votes", "2")[task]["vote_temperature"] == VotingConfig().sampling.temperature
    for options, said in (
        (["--task", "speak", "--votes", "2"], "'speak', which has no votes"),
        (["--task", "caption", "--temperature", "0.5"], "give --votes N too"),
        (["--task", "caption", "--votes", "0"], "num_votes is 0"),
        (["--task", "caption", "--votes", "2", "--temperature", "0"], "all votes are the same"),
    ):
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err
