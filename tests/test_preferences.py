"""`mmllm prefer`: candidates, labels, exports, beside slow obvious references."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmllm.cli.main import main
from mmllm.data.loading.preference_rows import AnswerWriter, read_row
from mmllm.data.rows.media import Embedded
from mmllm.evaluation.preferences import pairs as pairs_module
from mmllm.evaluation.preferences.candidates import Candidate, CandidateRow, answers_of, read_candidates
from mmllm.evaluation.preferences.judging import Judge, JudgeConfig, label_by_judge
from mmllm.evaluation.preferences.labels import (
    Comparison,
    RewardLabel,
    append_labels,
    labels_path,
    questions,
    read_labels,
)
from mmllm.evaluation.preferences.pairs import ExportConfig, export
from mmllm.evaluation.preferences.prompts import MediaFiles
from mmllm.evaluation.preferences.rewarding import label_by_reward
from mmllm.evaluation.preferences.sampling import SamplingConfig, sample_candidates
from mmllm.inference.api import Model
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import RATE, images, make, sounds


@pytest.fixture(scope="module")
def model() -> Model:
    return make(pointer=PointerRule())


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of every kind, some of them twice or more."""
    folder = tmp_path_factory.mktemp("rows")
    rows: list[dict[str, Any]] = []
    for number, picture in enumerate(images(5)):
        Image.fromarray(picture).save(folder / f"{number}.png")
        rows.append({"id": f"picture {number}", "text": "a red circle", "image": f"{number}.png", "objects": [number]})
    for number, (samples, rate) in enumerate(sounds(3)):
        soundfile.write(folder / f"{number}.wav", samples, rate)
        rows.append({"id": f"sound {number}", "text": f"one two {number}", "audio": f"{number}.wav"})
    rows.append({
        "id": "asked", "segments": [{"text": "look:"}, {"image": "0.png"}, {"audio": "0.wav"}], "question": "how many?",
        "answer": "two",
    })  # fmt: skip
    rows.append({
        "id": "talk",
        "segments": [
            {"text": "what is this?", "role": "user"}, {"image": "1.png", "role": "user"},
            {"text": "a square", "role": "assistant"}, {"text": "red?", "role": "user"},
            {"text": "blue", "role": "assistant"},
        ],
    })  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def draw(model: Model, manifest: Path, out: Path, task: str, **more: Any) -> list[CandidateRow]:
    sample_candidates(model, manifest, out, SamplingConfig(task, **{"num_candidates": 4, **more}))
    return read_candidates(out)


# ---- drawing


def test_candidates_are_what_the_model_draws_with_the_row_s_numbers(
    model: Model, manifest: Path, tmp_path: Path
) -> None:
    rows = draw(model, manifest, tmp_path / "c.jsonl", "caption", temperature=0.7)
    pictures = [str(manifest.parent / f"{number}.png") for number in range(5)]
    said = model.caption(pictures[0], n=4, temperature=0.7, seed=0)
    first = rows[0]
    assert [one.text for one in first.candidates] == list(dict.fromkeys(map(str, said)))
    assert first.num_drawn == 4
    for candidate in first.candidates:
        (same, *_) = [one for one in said if str(one) == candidate.text]
        assert same.logprobs is not None
        assert candidate.logprob == pytest.approx(sum(same.logprobs), abs=1e-4)
        assert candidate.num_tokens == len(same.logprobs)
        assert candidate.is_whole == (same.finish_reason == "stop")
    assert first.row["objects"] == [0] and first.row["text"] == "a red circle"
    (part,) = first.prompt[0]["content"]
    assert (tmp_path / part["image"]).samefile(pictures[0])


@pytest.mark.parametrize("task", ["caption", "speak"])
def test_what_was_interrupted_goes_on_and_the_file_is_the_same_to_the_byte(
    model: Model, manifest: Path, tmp_path: Path, task: str
) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut" / "whole.jsonl"
    settings = SamplingConfig(task, 4, batch_size=2, max_seconds=0.1 if task == "speak" else None)
    assert settings.group_rows == 2
    sample_candidates(model, manifest, whole, settings)
    sample_candidates(model, manifest, cut, settings)
    written = cut.read_bytes()
    lines = written.splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:1]) + lines[1][:20])  # within the first group
    assert sample_candidates(model, manifest, cut, settings).num_found == 0
    assert cut.read_bytes() == written
    cut.write_bytes(b"".join(lines[:2]) + lines[2][:30])
    drawn = sample_candidates(model, manifest, cut, settings)
    assert (drawn.num_found, drawn.num_rows) == (2, len(lines))
    assert cut.read_bytes() == written
    assert sample_candidates(model, manifest, cut, settings).num_found == len(lines)
    assert whole.read_bytes().count(b"\n") == len(lines)
    assert [row.candidates for row in read_candidates(whole)] == [row.candidates for row in read_candidates(cut)]


def test_other_settings_are_no_going_on(model: Model, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    draw(model, manifest, out, "caption", limit=2)
    with pytest.raises(ValueError, match=r"begun with temperature 1\.0, and now it is 0\.5"):
        draw(model, manifest, out, "caption", limit=2, temperature=0.5)
    with pytest.raises(ValueError, match="begun with weights 'a'"):
        other = tmp_path / "d.jsonl"
        config = SamplingConfig("caption", 4, limit=1)
        sample_candidates(model, manifest, other, config, {"weights": "a"})
        sample_candidates(model, manifest, other, config, {"weights": "b"})


def test_equal_answers_are_kept_once_and_counted(model: Model, manifest: Path, tmp_path: Path) -> None:
    out = tmp_path / "c.jsonl"
    drawn = sample_candidates(model, manifest, out, SamplingConfig("caption", 6, temperature=1e-4))
    rows = read_candidates(out)
    assert all(len(row.candidates) == 1 and row.candidates[0].count == 6 for row in rows)
    assert (drawn.num_candidates, drawn.num_duplicates) == (5, 25)
    with pytest.raises(ValueError, match="none of 5 rows has two different candidates"):
        questions(rows, 1)


def test_tasks_write_the_prompts_that_the_model_is_asked(model: Model, manifest: Path, tmp_path: Path) -> None:
    """What is exported is read back as the very prompt that was answered."""
    writer = AnswerWriter(model.tokenizer, model.image_transform, 512)
    sound = str(manifest.parent / "0.wav")
    talk = [{"role": "user", "content": [{"type": "text", "text": "what is this?"}, Path(manifest.parent / "1.png")]},
            {"role": "assistant", "content": "a square"}, {"role": "user", "content": "red?"}]  # fmt: skip
    picture = Path(manifest.parent / "0.png")
    wanted = {
        "caption": model.caption_prompt(picture),
        "transcribe": model.transcript_prompt(sound),
        "question": model.question_prompt(["look:", picture, Path(sound)], "how many?"),
        "chat": model.chat_prompt(talk),
    }
    for task, prompt in wanted.items():
        row = draw(model, manifest, tmp_path / f"{task}.jsonl", task, temperature=1.5)[0]
        assert len(row.candidates) > 1, "this model says many things"
        label = RewardLabel(row.place, row.digest, "reward x", 0, 1.0)
        others = [dataclasses.replace(label, candidate=n, reward=0.0) for n in range(1, len(row.candidates))]
        out = tmp_path / "deep" / f"{task}.jsonl"
        export([row], tmp_path, [label, *others], out, ExportConfig(keeps_cut=True, max_pairs_per_row=1))
        line = out.read_text().splitlines()[0]
        read = read_row(line, "x:1", out.parent)
        document = writer.document(read, read.answers[0])
        count = prompt.num_tokens
        np.testing.assert_array_equal(document.token_ids_T[:count], prompt.token_ids_T)
        assert document.targets_T[count:].all()
        for mine, theirs in zip(document.images, prompt.images, strict=True):
            np.testing.assert_array_equal(mine.pixels_3HW, theirs.pixels_3HW)
    assert read_candidates(tmp_path / "chat.jsonl")[0].row["answer"] == "blue"
    assert [message["role"] for message in read_candidates(tmp_path / "chat.jsonl")[0].prompt] == [
        "user", "assistant", "user",
    ]  # fmt: skip


def test_speech_is_kept_as_codes_with_their_pointer_and_as_sound(model: Model, manifest: Path, tmp_path: Path) -> None:
    rows = draw(model, manifest, tmp_path / "s.jsonl", "speak", temperature=1.0)
    assert [row.candidates[0].text for row in rows] == ["one two 0", "one two 1", "one two 2"]
    spoken = model.speak("one two 0", temperature=1.0, seed=0)
    answer = answers_of(rows[0], tmp_path)[0]
    assert not isinstance(answer, str)
    np.testing.assert_array_equal(answer.codes_KF.numpy(), spoken.codes_KF)
    assert answer.sample_rate == RATE
    np.testing.assert_allclose(answer.wave_T.numpy(), spoken.samples, atol=1e-4)
    assert rows[0].candidates[0].logprob is not None
    label_by_reward(
        rows, tmp_path, lambda answers, _: [float(len(vars(one)["wave_T"])) for one in answers], "long", tmp_path / "l"
    )
    labels = read_labels(tmp_path / "l", rows)
    export(rows, tmp_path, labels, tmp_path / "p.jsonl", ExportConfig(max_pairs_per_row=1))
    read = read_row((tmp_path / "p.jsonl").read_text().splitlines()[0], "p:1", tmp_path)
    document = AnswerWriter(model.tokenizer, model.image_transform, 512).document(read, read.answers[0])
    assert document.pointer is not None and document.has_units


@pytest.mark.parametrize(
    ("kind", "begin", "suffix"),
    [("image", b"\xff\xd8\xff\xe0", ".jpg"), ("image", b"RIFF1234WEBP", ".webp"), ("audio", b"fLaC", ".flac"),
     ("audio", b"RIFF1234WAVE", ".wav"), ("image", b"BM", ".img")],
)  # fmt: skip
def test_what_lies_in_a_file_of_rows_is_written_by_its_type(
    kind: str, begin: bytes, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Embedded, "read_bytes", lambda _: begin)
    path = MediaFiles(tmp_path / "files").path(Embedded(Path("rows"), 0, ("a",), 0xAB), kind, tmp_path)
    assert path == f"files/000000ab{suffix}" and (tmp_path / path).read_bytes() == begin


def test_rows_that_cannot_be_asked_are_named_and_counted(model: Model, tmp_path: Path) -> None:
    talk = [{"id": str(n), "text": "one two"} for n in range(20)] + [{"id": "long", "text": "one two three " * 400}]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    short = dataclasses.replace(model.generation, max_length=64)
    bounded = Model(model.model, model.tokenizer, generation=short)
    drawn = sample_candidates(bounded, tmp_path / "r.jsonl", tmp_path / "c.jsonl", SamplingConfig("chat", 2))
    assert drawn.num_failed == 1
    last = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[-1])
    assert last["candidates"] == [] and "the model learnt 64" in last["error"]
    assert len(read_candidates(tmp_path / "c.jsonl")) == 20
    none_may = SamplingConfig("chat", 2, max_bad_fraction=0.0)
    for _ in range(2):  # also where all was drawn before
        with pytest.raises(ValueError, match="1 of 21 rows can't be used"):
            sample_candidates(bounded, tmp_path / "r.jsonl", tmp_path / "d.jsonl", none_may)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"task": "write"}, "task is 'write'"),
        ({"num_candidates": 0}, r"n is 0; it must be from 1 \(a pair needs 2\)"),
        ({"temperature": 0.0}, "all candidates are the same"),
        ({"max_seconds": 1.0}, "max_seconds is given, which the task 'caption' hasn't"),
        ({"task": "speak", "max_new_tokens": 3}, "max_new_tokens is given, which the task 'speak' hasn't"),
        ({"limit": 0}, "limit is 0"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SamplingConfig(**{"task": "caption", **settings})


def test_a_manifest_without_rows_of_the_task_is_refused(model: Model, tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_text('{"id": "a", "text": "one"}\n')
    with pytest.raises(ValueError, match="has no rows with a picture, which the task 'caption' needs"):
        draw(model, tmp_path / "r.jsonl", tmp_path / "c.jsonl", "caption")


# ---- labels


def made(*texts: str, place: int = 0, digest: str = "d") -> CandidateRow:
    """A row of texts with as many tokens as words."""
    candidates = tuple(Candidate(text, len(text.split())) for text in texts)
    prompt = [{"role": "user", "content": "say it"}]
    return CandidateRow(f"row {place}", "chat", prompt, candidates, {"answer": "a"}, None, place, digest)


def test_rewards_label_each_candidate_once(tmp_path: Path) -> None:
    rows = [made("a", "b b", "c c c", place=place) for place in range(3)]
    seen: list[str] = []

    def reward(answers: Any, told: Any) -> list[float]:
        seen.extend(answers)
        assert [row["answer"] for row in told] == ["a"] * len(answers)
        assert told[0]["task"] == "chat" and told[0]["prompt"] == rows[0].prompt
        return [float(len(answer)) for answer in answers]

    out = tmp_path / "l.jsonl"
    assert label_by_reward(rows[:1], tmp_path, reward, "size", out) == 3
    with out.open("ab") as stream:
        stream.write(b'{"place": 1, "digest": "d", "by"')  # as a process that is killed leaves it
    assert label_by_reward(rows, tmp_path, reward, "size", out) == 6
    assert seen == ["a", "b b", "c c c"] * 3
    labels = read_labels(out, rows)
    assert [(label.place, label.candidate, label.reward) for label in labels if isinstance(label, RewardLabel)] == [
        (place, number, size) for place in range(3) for number, size in enumerate((1.0, 3.0, 5.0))
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [([1.0], "gave 1 numbers for 2 answers"), ([1.0, float("nan")], r"gave nan for the answer 'b' to row 'row 0'")],
)
def test_a_reward_that_gives_no_numbers_is_named(given: list[float], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        label_by_reward([made("a", "b")], tmp_path, lambda *_: given, "odd", tmp_path / "l")
    assert not (tmp_path / "l").exists()


def test_labels_of_other_candidates_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "l.jsonl"
    append_labels(out, [Comparison(0, "other", "hand", 0, 1, "first")])
    with pytest.raises(ValueError, match=r"l\.jsonl:1 is of other candidates than row 1 has now"):
        read_labels(out, [made("a", "b")])
    out.write_text('{"place": 0, "digest": "d", "by": "hand", "first": 0, "second": 5, "choice": "first"}\n')
    with pytest.raises(ValueError, match="names candidate 5 of row 1"):
        read_labels(out, [made("a", "b")])
    of_reward = '{"place": 0, "digest": "d", "by": "reward x", "candidate": 0, "reward": %s}\n'
    wrong = ["nonsense\n", "[" * 100_000 + "\n", *(of_reward % value for value in ("NaN", '"1"', "null", "Infinity"))]
    wrong.append('{"place": [0], "digest": "d", "by": "reward x", "candidate": 0, "reward": 1}\n')
    for line in wrong:
        out.write_text(line)
        with pytest.raises(ValueError, match=r"l\.jsonl:1 is no label"):
            read_labels(out, [made("a", "b")])


def test_an_export_writes_over_nothing_that_it_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, labels = tmp_path / "c.jsonl", tmp_path / "c.labels.jsonl"
    file.write_text(made("a", "b b").to_line())
    labels.write_text("\n")
    for out in (file, labels):
        before = out.read_bytes()
        assert main(["prefer", "export", str(file), "--out", str(out)]) == 2
        assert "would be written over" in capsys.readouterr().err and out.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidates": [{"text": None, "num_tokens": 1}]}, "the text of candidate 0 is None"),
        ({"prompt": None}, "its prompt NoneType"),
        ({"prompt": [3]}, "TypeError"),
        ({"prompt": [{"role": "user", "content": [{"type": "image", "image": 3}]}]}, "a part of its prompt is"),
        ({"row": []}, "its row is list"),
        ({"row": {"image": 3}}, "its image is 3"),
    ],
)
def test_a_line_that_is_no_row_of_candidates_is_named(changes: dict[str, Any], said: str) -> None:
    row = {"id": "a", "task": "caption", "prompt": [], "candidates": [{"text": "x", "num_tokens": 1}], "row": {}}
    assert CandidateRow.from_line(json.dumps(row).encode(), 0, "c.jsonl").candidates == (Candidate("x", 1),)
    with pytest.raises(ValueError, match=rf"c\.jsonl:1 is no row of candidates .*{said}.*prefer sample"):
        CandidateRow.from_line(json.dumps({**row, **changes}).encode(), 0, "c.jsonl")


def test_pairs_to_compare_differ_and_begin_on_either_side() -> None:
    rows = [made("a", "b", "c", place=place, digest=str(place)) for place in range(200)]
    asked = questions(rows, 2, seed=3)
    assert asked == questions(rows, 2, seed=3)
    assert [question.row.place for question in asked] == [*range(200), *range(200)]
    assert len({question.key for question in asked}) == 400
    assert 150 < sum(question.is_swapped for question in asked) < 250
    assert len(questions(rows[:1], 9)) == 3


# ---- a judge


class FakeJudge:
    """OpenAI's route, whose answers a list gives: texts, or statuses of errors."""

    def __init__(self, answers: Any) -> None:
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        outer, given = self, iter(answers)

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.asked.append({"path": self.path, **body})
                outer.keys.append(self.headers.get("authorization"))
                answer = next(given)
                answer = answer(body) if callable(answer) else answer
                is_error = isinstance(answer, int)
                self.send_response(answer if is_error else 200)
                if answer == 302:
                    self.send_header("location", "http://elsewhere.invalid/")
                said = {"choices": [{"message": {"content": answer}}]}
                data = json.dumps({"error": "no"} if is_error else said).encode()
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def judge_of() -> Iterator[Any]:
    """Makes judges, and ends them."""
    judges: list[FakeJudge] = []

    def make_judge(answers: Any) -> FakeJudge:
        judges.append(FakeJudge(answers))
        return judges[-1]

    yield make_judge
    for judge in judges:
        judge.close()


def said_of(body: dict[str, Any]) -> list[str]:
    return [part["text"] for part in body["messages"][1]["content"] if part["type"] == "text"]


def prefers_short(body: dict[str, Any]) -> str:
    """A good judge: the answer with fewer words."""
    texts = said_of(body)
    first, second = texts[texts.index("Answer A:") + 1], texts[texts.index("Answer B:") + 1]
    return f"Not [[C]]. [[{'A' if len(first.split()) < len(second.split()) else 'B'}]]"


def test_a_judge_is_asked_in_both_orders(judge_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [made("one two", "one", place=0), made("one", "one two three", place=1)]
    fake = judge_of(itertools.repeat(prefers_short))
    monkeypatch.setenv("THE_KEY", "secret")
    judge = Judge(JudgeConfig(fake.url, "big", "THE_KEY"))
    verdicts = label_by_judge(questions(rows, 1), tmp_path, judge, "big", tmp_path / "l.jsonl")
    labels = read_labels(tmp_path / "l.jsonl", rows)
    assert [(one.place, one.choice) for one in labels if isinstance(one, Comparison)] == [(0, "second"), (1, "first")]
    assert verdicts.counts == {"second": 1, "first": 1}
    assert len(fake.asked) == 4 and set(fake.keys) == {"Bearer secret"}
    assert fake.asked[0]["path"] == "/v1/chat/completions" and fake.asked[0]["model"] == "big"
    assert said_of(fake.asked[0])[1] == "say it"
    assert label_by_judge(questions(rows, 1), tmp_path, judge, "big", tmp_path / "l.jsonl").counts == {}
    assert len(fake.asked) == 4, "what is labelled is not asked again"


def test_orders_that_disagree_are_a_tie_and_no_verdict_is_skipped(judge_of: Any, tmp_path: Path) -> None:
    rows = [made("one two", "one", place=place) for place in range(3)]
    fake = judge_of(["[[A]]", "[[A]]", "[[C]]", "[[C]]", "I can't say.", "[[A]]"])
    verdicts = label_by_judge(
        questions(rows, 1), tmp_path, Judge(JudgeConfig(fake.url, "m")), "m", tmp_path / "l.jsonl"
    )
    labels = read_labels(tmp_path / "l.jsonl", rows)
    assert [(one.choice, one.note) for one in labels if isinstance(one, Comparison)] == [
        ("tie", "disagreement"), ("tie", None), ("skip", "unreadable"),
    ]  # fmt: skip
    assert verdicts.counts == {"disagreement": 1, "tie": 1, "unreadable": 1}


def test_tries_are_bounded_and_what_is_labelled_is_kept(judge_of: Any, tmp_path: Path) -> None:
    rows = [made("one two", "one", place=place) for place in range(2)]
    waits: list[float] = []
    fake = judge_of([429, "[[B]]", "[[A]]", 503, 503, 503])
    judge = Judge(JudgeConfig(fake.url, "m", num_tries=3), waits.append)
    with pytest.raises(ConnectionError, match=r"status 503.*3 tries failed"):
        label_by_judge(questions(rows, 1), tmp_path, judge, "m", tmp_path / "l.jsonl")
    assert len(read_labels(tmp_path / "l.jsonl", rows)) == 1
    assert waits == [1.0, 1.0, 2.0]
    for status in (401, 302):
        with pytest.raises(ValueError, match=f"refuses the question, status {status}"):
            Judge(JudgeConfig(judge_of([status]).url, "m")).ask([])
    with pytest.raises(ConnectionError, match="1 tries failed"):
        Judge(JudgeConfig("http://127.0.0.1:9/v1", "m", num_tries=1)).ask([])


def test_a_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with pytest.raises(ValueError, match="variable NO_KEY isn't set"):
        Judge(JudgeConfig("http://127.0.0.1:1/v1", "m", "NO_KEY"))
    with pytest.raises(ValueError, match=r"sent to example\.org in the clear"):
        JudgeConfig("http://example.org/v1", "m", "NO_KEY")
    with pytest.raises(ValueError, match="holds a user, a password or a query"):
        JudgeConfig("http://me:secret@127.0.0.1/v1", "m")


def test_a_judge_sees_pictures_and_hears_sounds(model: Model, manifest: Path, tmp_path: Path, judge_of: Any) -> None:
    fake = judge_of(itertools.repeat("[[C]]"))
    judge = Judge(JudgeConfig(fake.url, "m"))
    for task, kind in (("caption", "image_url"), ("speak", "input_audio")):
        rows = draw(model, manifest, tmp_path / f"{task}.jsonl", task, temperature=1.5, limit=1)
        label_by_judge(questions(rows, 1), tmp_path, judge, "m", labels_path(tmp_path / f"{task}.jsonl"))
        kinds = [part["type"] for part in fake.asked[-1]["messages"][1]["content"]]
        assert kinds.count(kind) == (2 if task == "speak" else 1)


# ---- exports


def rewarded(row: CandidateRow, *rewards: float) -> list[RewardLabel]:
    return [RewardLabel(row.place, row.digest, "reward r", n, value) for n, value in enumerate(rewards)]


def exported(rows: Any, labels: Any, tmp_path: Path, **settings: Any) -> list[dict[str, Any]]:
    export(rows, tmp_path, labels, tmp_path / "out.jsonl", ExportConfig(**settings))
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def sides(lines: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(line["chosen"][0]["content"], line["rejected"][0]["content"]) for line in lines]


def test_pairs_are_those_further_apart_than_the_margin(tmp_path: Path) -> None:
    row = made("a", "b", "c", "d")
    rewards = (0.5, 1.0, 0.5, 0.0)
    labels = rewarded(row, *rewards)
    for margin in (0.0, 0.5, 0.7):
        slow = {
            (row.candidates[i].text, row.candidates[j].text)
            for i, j in itertools.permutations(range(4), 2)
            if rewards[i] - rewards[j] > margin
        }
        lines = exported([row], labels, tmp_path, margin=margin)
        assert set(sides(lines)) == slow and len(lines) == len(slow)
    assert sides(exported([row], labels, tmp_path, max_pairs_per_row=1)) == [("b", "d")], "the largest margin first"
    assert lines[0] == {
        "id": "row 0-1-3", "task": "chat", "prompt": [{"role": "user", "content": "say it"}],
        "chosen": [{"role": "assistant", "content": "b"}], "rejected": [{"role": "assistant", "content": "d"}],
        "margin": 1.0,
    }  # fmt: skip


def test_comparisons_give_pairs_and_ties_none(tmp_path: Path) -> None:
    row = made("a", "b", "c")
    labels = [
        Comparison(0, "d", "hand", 0, 1, "second"), Comparison(0, "d", "hand", 0, 2, "tie"),
        Comparison(0, "d", "hand", 1, 2, "skip"),
    ]  # fmt: skip
    assert sides(exported([row], labels, tmp_path)) == [("b", "a")]
    with pytest.raises(ValueError, match=r"margin is 0\.1, but these labels are comparisons"):
        exported([row], labels, tmp_path, margin=0.1)
    with pytest.raises(ValueError, match=r"nothing is left to write .*without a choice: 2"):
        exported([row], labels[1:], tmp_path)


def test_cut_and_empty_answers_are_left_out_and_counted(tmp_path: Path) -> None:
    row = made("a", "b", "", "d")
    cut = dataclasses.replace(row.candidates[0], is_whole=False)
    row = dataclasses.replace(row, candidates=(cut, *row.candidates[1:]))
    labels = rewarded(row, 4, 3, 2, 1)
    assert sides(exported([row], labels, tmp_path)) == [("b", "d")]
    assert (
        export([row], tmp_path, labels, tmp_path / "o", ExportConfig()).left_out[
            "an answer is empty or ran into its bound"
        ]
        == 5
    )
    assert set(sides(exported([row], labels, tmp_path, keeps_cut=True))) == {("a", "b"), ("a", "d"), ("b", "d")}


def test_balanced_lengths_tell_nothing(tmp_path: Path) -> None:
    """Rewards that like long answers: of what is kept, the longer side is chosen as often as not."""
    rng = np.random.default_rng(0)
    rows, labels = [], []
    for place in range(300):
        lengths = rng.integers(1, 12, 2)
        row = made(*("w " * int(count) + str(n) for n, count in enumerate(lengths)), place=place)
        rows.append(row)
        labels += rewarded(row, *(lengths + rng.normal(0, 4, 2)))
    plain = export(rows, tmp_path, labels, tmp_path / "a", ExportConfig())
    assert plain.longer > 2
    balanced = export(rows, tmp_path, labels, tmp_path / "b", ExportConfig(length_balanced=True))
    assert abs(balanced.longer) < 0.3 and balanced.num_written > 100
    lines = [json.loads(line) for line in (tmp_path / "b").read_text().splitlines()]
    signs = [np.sign(len(chosen) - len(rejected)) for chosen, rejected in sides(lines)]
    assert signs.count(1) == signs.count(-1)
    assert plain.num_written - balanced.num_written == balanced.left_out["to balance lengths"]


def test_kto_takes_answers_apart(tmp_path: Path) -> None:
    row, other = made("a", "b", "c"), made("d", "e", place=1)
    labels = [*rewarded(row, 1.0, 0.0, 0.5), *rewarded(other, 3.0, 1.0)]
    lines = exported([row, other], labels, tmp_path, form="kto")
    assert [(line["completion"][0]["content"], line["label"]) for line in lines] == [
        ("a", True), ("b", False), ("d", True), ("e", False),
    ]  # fmt: skip
    assert len(exported([row, other], labels, tmp_path, form="kto", margin=0.6)) == 2
    hand = [Comparison(0, "d", "hand", 0, 1, "first"), Comparison(0, "d", "hand", 1, 2, "second")]
    lines = exported([row], hand, tmp_path, form="kto")
    assert {line["completion"][0]["content"]: line["label"] for line in lines} == {"a": True, "b": False, "c": True}
    with pytest.raises(ValueError, match="all 1 answers are liked"):
        exported([made("a", "")], rewarded(row, 1.0, 0.0), tmp_path, form="kto")


def test_labels_of_several_are_not_mixed(tmp_path: Path) -> None:
    row = made("a", "b")
    labels = [*rewarded(row, 1.0, 0.0), Comparison(0, "d", "hand", 0, 1, "second")]
    with pytest.raises(ValueError, match=r"labels of several.*hand, reward r"):
        exported([row], labels, tmp_path)
    assert sides(exported([row], labels, tmp_path, by="hand")) == [("b", "a")]
    assert sides(exported([row], labels, tmp_path, by="d r")) == [("a", "b")], "a part of a name that no other has"
    with pytest.raises(ValueError, match="no labels by 'you'"):
        exported([row], labels, tmp_path, by="you")


def test_planted_bugs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Balancing that keeps everything is noticed by the test above: its figures are not a matter of course."""
    monkeypatch.setattr(pairs_module, "_balanced", lambda pairs, left_out: list(pairs))
    with pytest.raises(AssertionError):
        test_balanced_lengths_tell_nothing(tmp_path)


# ---- the command line


def test_the_commands_go_together(model: Model, manifest: Path, tmp_path: Path, capsys: Any) -> None:
    from mmllm.checkpoints.folder import save_model

    folder = tmp_path / "model"
    save_model(folder, model.model, model.tokenizer, generation=model.generation)
    file, out = str(tmp_path / "c.jsonl"), str(tmp_path / "pairs.jsonl")
    sample = ["prefer", "sample", "--model", str(folder), "--task", "caption", "--manifest", str(manifest), "--n", "4"]
    assert main([*sample, "--out", file, "--temperature", "1.3"]) == 0
    assert main(["prefer", "label", file, "--reward", "length"]) == 0
    assert main(["prefer", "export", file, "--out", out, "--max-pairs-per-row", "2", "--keep_cut"]) == 0
    said = capsys.readouterr().out
    assert "duplicates:" in said and "new labels by the reward length" in said and "written, of 5 rows" in said
    for line in Path(out).read_text().splitlines():
        chosen, rejected = sides([json.loads(line)])[0]
        assert len(chosen) < len(rejected)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["prefer", "label", "FILE"], "one of the arguments --reward --by_hand --judge is required"),
        (["prefer", "label", "FILE", "--by_hand", "--judge_model", "m"], "--judge_model goes with --judge"),
        (["prefer", "label", "FILE", "--by_hand", "--settings", "{}"], "--settings goes with --reward"),
        (["prefer", "label", "FILE", "--judge", "http://x/v1"], "--judge needs the model's name"),
        (["prefer", "label", "FILE", "--reward", "length", "--pairs_per_row", "2"], "goes with --by_hand and --judge"),
        (["prefer", "label", "FILE", "--by_hand", "--port", "99999"], "--port is 99999; give 0 to 65535"),
        (["prefer", "label", "FILE", "--by_hand", "--pairs_per_row", "0"], "pairs_per_row is 0"),
        (["prefer", "label", "none.jsonl", "--reward", "length"], "none.jsonl: no such file of candidates"),
        (["prefer", "label", "FILE", "--reward", "lenth"], "the reward 'lenth' is unknown"),
        (["prefer", "label", "FILE", "--reward", "length", "--settings", "[1]"], "give a JSON object"),
        (["prefer", "export", "FILE", "--out", "o"], "no such file of labels"),
        (
            ["prefer", "export", "FILE", "--out", "o", "--form", "kto", "--length_balanced"],
            "length_balanced is of pairs",
        ),
        (["prefer", "sample", "--model", "none", "--task", "chat", "--manifest", "m", "--out", "o"], "no such model"),
    ],
)
def test_bad_input_is_named(line: list[str], said: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "c.jsonl").write_text(made("a", "b").to_line())
    assert main([str(tmp_path / "c.jsonl") if part == "FILE" else part for part in line]) == 2
    assert said in capsys.readouterr().err


def test_a_file_of_something_else_is_no_candidates(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "a", "text": "b"}\n')
    with pytest.raises(ValueError, match=r"c\.jsonl:1 is no row of candidates \(KeyError: 'candidates'\)"):
        read_candidates(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no candidates"):
        read_candidates(tmp_path / "c.jsonl")
