"""Shots and anchors of `mmllm eval`: prompts are training's documents, draws are a function of seed and row."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.cli.main import main
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.media import Embedded
from mmllm.data.rows.rows import Row
from mmllm.data.samples.document import Document
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.sample import Sample, Segment
from mmllm.evaluation import chat_task
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.chat_task import ChatRow
from mmllm.evaluation.results import load_result, save_result
from mmllm.evaluation.shots import RowShots, ShotsConfig, prompt_segments
from mmllm.evaluation.tasks import evaluate
from mmllm.inference import long_sound
from mmllm.inference.api import Model
from mmllm.inference.reasoning import few_shot
from mmllm.inference.reasoning.asking import Asker
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END
from tests.inference_fixtures import RATE, make, make_model, make_tokenizer
from tests.test_evaluation_tasks import scene, write_rows
from tests.test_inference_long_sound import speech

ANCHOR = "one red circle: two, three"
TURNS = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COLOURS = ("red", "blue", "green", "pink", "cyan", "black", "white", "grey")
TASKS = ("caption", "transcribe", "interleaved")


@pytest.fixture(scope="module")
def model() -> Model:
    return make()


def rows_of(split: str, count: int = 8) -> list[dict[str, Any]]:
    """Captions, recordings and questions, so many each."""
    rows: list[dict[str, Any]] = []
    for n in range(count):
        word = COLOURS[n % len(COLOURS)]
        rows += [
            {"id": f"{split}c{n}", "image": f"{split}c{n}.png", **scene(word)},
            {"id": f"{split}a{n}", "audio": f"{split}a{n}.wav", "text": f"{word}, one two"},
            {"id": f"{split}i{n}", "segments": [{"text": "see " * (n + 1)}, {"image": f"{split}i{n}.png"}],
             "question": f"which {word}?", "answer": word},
        ]  # fmt: skip
    rows.append({"id": f"{split}x", "segments": [{"text": "no question"}, {"image": f"{split}x.png"}]})
    return rows


@pytest.fixture(scope="module")
def manifests(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("rows")
    return {split: write_rows(folder, rows_of(split), f"{split}.jsonl") for split in ("train", "test")}


def of_task(manifest: Path, task: str) -> list[Row]:
    kinds = {"caption": "caption", "transcribe": "audio", "interleaved": "interleaved"}
    rows = [row for row in read_rows(manifest) if row.kind == kinds[task]]
    return [row for row in rows if task != "interleaved" or "question" in row.metadata]


def trained(row: Row, model: Model, task: str | None = None, anchor: str | None = None) -> Document:
    """A row's document as training builds it, by the recipe's source."""
    task = task or {"caption": "caption", "audio": "transcribe", "interleaved": "interleaved"}[row.kind]
    segments = tuple(prompt_segments(row))
    audio = None if row.audio is None else str(row.audio)
    sample = Sample(row.id, row.text, row.image, audio, None, segments, row.metadata)  # type: ignore[arg-type]
    return build_document(sample, task, model.tokenizer, model.image_transform, None, anchor)


def answer_of(row: Row) -> str:
    return str(row.metadata["answer"]) if row.kind == "interleaved" else row.text


def prompts_of(asked: AskedModel, rows: Sequence[Row], room: int = 16) -> list[Document]:
    match rows[0].kind:
        case "caption":
            return asked.caption_prompts([row.image for row in rows], room, rows)
        case "audio":
            return asked.transcript_prompts([str(row.audio) for row in rows], room, rows)
    parts = [prompt_segments(row) for row in rows]
    return asked.answer_prompts(parts, [str(row.metadata["question"]) for row in rows], room, rows)


def ids(document: Document) -> list[int]:
    return document.token_ids_T.tolist()


def shots_of(
    model: Model, manifest: Path, task: str, num_shots: int = 3, seed: int = 0, max_length: int | None = None,
    anchor: str | None = None, max_bad_fraction: float = 0.05,
) -> RowShots:  # fmt: skip
    config = ShotsConfig(manifest, num_shots, max_length)
    return RowShots.read(config, task, seed, model.prompter.anchored(anchor), None, None, max_bad_fraction)


def drawn(shots: RowShots, row: Row) -> list[Row]:
    """The rows that are shown in front of a row, if there is room for all."""
    return [shots._rows[place] for place in shots._places(row)]


# ---- anchors


@pytest.mark.parametrize("anchor", [None, ANCHOR])
@pytest.mark.parametrize("task", TASKS)
def test_a_prompt_is_trainings_document_up_to_the_answer(
    model: Model, manifests: dict[str, Path], task: str, anchor: str | None
):
    rows = of_task(manifests["test"], task)
    prompts = prompts_of(AskedModel(model, anchor=anchor), rows)
    for row, prompt in zip(rows, prompts, strict=True):
        end = [*model.tokenizer.text.encode(answer_of(row)), model.tokenizer.id(END)]
        for of_source in ("interleaved", "question") if task == "interleaved" else (task,):
            document = ids(trained(row, model, of_source, anchor))
            assert [*ids(prompt), *end] == document
        first = [] if anchor is None else model.tokenizer.text.encode(anchor)
        assert ids(prompt) == first + ids(prompts_of(AskedModel(model), [row])[0])


@pytest.mark.parametrize("has_template", [False, True])
@pytest.mark.parametrize("has_system", [False, True])
def test_a_conversations_anchor_is_the_systems_first_turn(has_template: bool, has_system: bool):
    tokenizer = make_tokenizer(sound=False)
    if has_template:
        tokenizer = TokenizerFolder(tokenizer.text, None, tokenizer.config, chat_template=TURNS)
    chatty = Model(make_model(tokenizer, sight=False), tokenizer)
    said = [("user", "one, "), ("user", "two?"), ("assistant", "three"), ("user", "red?"), ("assistant", "blue")]
    said = [("system", "he said: "), *said] if has_system else said
    row = Row("r", "interleaved", "rows:1", segments=tuple({"text": text, "role": role} for role, text in said))
    one = ChatRow.of(row)
    sample = Sample("r", segments=tuple(Segment(text, role=role) for role, text in said))
    for anchor in (None, ANCHOR, "cat.png"):
        asked = AskedModel(chatty, anchor=anchor)
        prompt = chat_task._prompt(asked, one.messages(prompt_segments(one.row)))
        document = build_document(sample, "chat", tokenizer, None, None, anchor)
        end = [*tokenizer.text.encode("blue"), tokenizer.id(END)]
        assert ids(prompt) == ids(document)[: -len(end)] and ids(document)[-len(end) :] == end


def test_the_python_api_takes_an_anchor(model: Model, manifests: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    captions, recordings, questions = (of_task(manifests["test"], task) for task in TASKS)
    anchored = AskedModel(model, anchor=ANCHOR)
    images, waves = [row.image for row in captions], [str(row.audio) for row in recordings]
    assert model.caption(images, anchor=ANCHOR) == anchored.caption(images, 12, 4) != model.caption(images)
    assert model.transcribe(waves, anchor=ANCHOR) == anchored.transcribe(waves, 12, 4) != model.transcribe(waves)
    parts = [prompt_segments(row) for row in questions]
    asked = [str(row.metadata["question"]) for row in questions]
    assert model.answer(parts, asked, anchor=ANCHOR) == anchored.answer(parts, asked, 12, 4)
    assert model.answer(parts, asked, anchor=ANCHOR) != model.answer(parts, asked)
    windows: list[Document] = []

    def build(*given: Any, **keys: Any) -> Document:
        windows.append(build_prompt(*given, **keys))
        return windows[-1]

    monkeypatch.setattr(long_sound, "build_prompt", build)
    said = (speech(0.6).astype(np.float32), RATE)
    model.transcribe(said, timestamps=True, anchor=ANCHOR)
    with_anchor = list(windows)
    windows.clear()
    model.transcribe(said, timestamps=True)
    first = model.tokenizer.text.encode(ANCHOR)
    assert ids(with_anchor[0]) == [*first, *ids(windows[0])], "windows of long sounds have it too"
    assert all(ids(window)[: len(first)] == first for window in with_anchor), "those that are heard again, too"
    with pytest.raises(ValueError, match="anchor is empty"):
        model.caption(images, anchor=" ")
    with pytest.raises(ValueError, match="anchor is 3"):
        model.answer(parts, asked, anchor=3)  # type: ignore[call-overload]


# ---- shots


@pytest.mark.parametrize("anchor", [None, ANCHOR])
@pytest.mark.parametrize("task", TASKS)
def test_shots_are_trainings_documents_in_front_of_the_prompt(
    model: Model, manifests: dict[str, Path], task: str, anchor: str | None
):
    shots = shots_of(model, manifests["train"], task, anchor=anchor)
    asked = AskedModel(model, anchor=anchor)
    rows = of_task(manifests["test"], task)
    plain, prompts = prompts_of(asked, rows), prompts_of(replace(asked, shots=shots), rows)
    for row, without, prompt in zip(rows, plain, prompts, strict=True):
        shown = drawn(shots, row)
        assert len({each.id for each in shown}) == 3 and all(each.kind == row.kind for each in shown)
        wanted = [token for each in shown for token in ids(trained(each, model, anchor=anchor))]
        assert ids(prompt) == [*wanted, *ids(without)]
        assert len(prompt.images) == (0 if task == "transcribe" else 4)
        assert len(prompt.clips) == (4 if task == "transcribe" else 0)
    assert shots.scores() == {"num_shots": 3, "mean_shots_shown": 3.0, "num_rows_with_fewer_shots": 0}


def test_answers_are_those_of_reason(model: Model, manifests: dict[str, Path]):
    """The same prompts as of `mmllm reason --method few_shot`, where the shots are the same; the longest go first."""
    test, room = of_task(manifests["test"], "interleaved"), 16
    whole = max(prompt.num_tokens for prompt in prompts_of(
        AskedModel(model, shots=shots_of(model, manifests["train"], "interleaved")), test))  # fmt: skip
    num_dropped = 0
    for bound in (None, whole + room - 20, whole + room - 45):
        shots = shots_of(model, manifests["train"], "interleaved", max_length=bound)
        prompts = prompts_of(AskedModel(model, shots=shots), test, room)
        config = ShotsConfig(manifests["train"], 3, bound)
        result = evaluate(model, "interleaved", manifests["test"], shots=config, controls=False)
        for row, prompt, prediction in zip(test, prompts, result.predictions, strict=True):
            parts, question = prompt_segments(row), str(row.metadata["question"])
            given = [(prompt_segments(one), str(one.metadata["question"]), str(one.metadata["answer"]))
                     for one in drawn(shots, row)]  # fmt: skip
            asker = Asker.of(model, {"max_new_tokens": room})
            ((wanted, shown),) = asker.prompts(parts, question, given, max_length=bound)
            assert ids(prompt) == ids(wanted)
            num_dropped += len(shown.dropped)
            settings = {"max_new_tokens": room, "temperature": 0.0}
            said = few_shot(model, given, parts, question, max_length=bound, **settings)  # type: ignore[call-overload]
            assert prediction.prediction == said.text
        counts = [len(prompt.images) - 1 for prompt in prompts]
        assert result.scores["mean_shots_shown"] == sum(counts) / len(counts)
        assert result.scores["num_rows_with_fewer_shots"] == sum(count < 3 for count in counts)
        assert (min(counts) < 3) == (bound is not None)
    assert num_dropped > 2


def test_shots_are_a_function_of_seed_and_row(model: Model, manifests: dict[str, Path]):
    rows = of_task(manifests["test"], "caption")
    first = {row.id: [one.id for one in drawn(shots_of(model, manifests["train"], "caption"), row)] for row in rows}
    again = shots_of(model, manifests["train"], "caption")
    assert {row.id: [one.id for one in drawn(again, row)] for row in reversed(rows)} == first
    more = shots_of(model, manifests["train"], "caption", num_shots=5)
    assert {row.id: [one.id for one in drawn(more, row)][:3] for row in rows} == first
    other = shots_of(model, manifests["train"], "caption", seed=1)
    assert {row.id: [one.id for one in drawn(other, row)] for row in rows} != first
    assert len({tuple(each) for each in first.values()}) > 3, "rows have shots of their own"
    shown = [name for each in first.values() for name in each]
    assert len(set(shown)) == 8, "and any row may be one"
    config = ShotsConfig(manifests["train"], 3)
    one, other = (evaluate(model, "caption", manifests["test"], size, shots=config) for size in (64, 3))
    assert one == other, "whatever the batch"


def test_a_row_is_never_its_own_shot(model: Model, manifests: dict[str, Path], tmp_path: Path):
    shots = shots_of(model, manifests["test"], "interleaved", num_shots=7)
    for row in of_task(manifests["test"], "interleaved"):
        assert row.id not in {one.id for one in drawn(shots, row)} and len(drawn(shots, row)) == 7
    with pytest.raises(ManifestError, match=r"test.jsonl has 7 rows that can be shown in front of .*\(testi0\).*is 8"):
        drawn(
            shots_of(model, manifests["test"], "interleaved", num_shots=8), of_task(manifests["test"], "interleaved")[0]
        )
    rows = [{"id": f"{n}", "image": f"{n // 3}.png", **scene("red")} for n in range(6)]  # three captions a picture
    alike = write_rows(tmp_path, rows)
    read = read_rows(alike)
    shots = shots_of(model, alike, "caption")
    assert {one.id for one in drawn(shots, read[0])} == {"3", "4", "5"}, "others of its picture would tell"
    renamed = replace(read[0], id="another")
    assert {one.id for one in drawn(shots, renamed)} == {"3", "4", "5"}
    moved = replace(read[0], image=tmp_path / "elsewhere.png")
    assert {one.id for one in drawn(shots_of(model, alike, "caption", num_shots=5), moved)} == set("12345")
    said = [
        {"id": f"{n}", "segments": [{"text": f"see {n % 3}"}], "question": "q?", "answer": f"{n}"} for n in range(6)
    ]
    spoken = write_rows(tmp_path, said, "said.jsonl")
    shown = drawn(shots_of(model, spoken, "interleaved", num_shots=4), replace(read_rows(spoken)[0], id="x"))
    assert sorted(one.id for one in shown) == ["1", "2", "4", "5"], "what is asked alike is left out, whatever its id"


@pytest.mark.parametrize("is_embedded", [False, True])
def test_a_picture_is_the_same_however_its_path_is_spelt(model: Model, tmp_path: Path, is_embedded: bool):
    rows = [{"id": f"{n}", "image": f"{n // 2}.png", **scene("red")} for n in range(4)]
    alike = read_rows(write_rows(tmp_path, rows))
    (tmp_path / "there").symlink_to(tmp_path)
    asked = Path(os.path.relpath(tmp_path / "there" / "0.png"))

    def media(path: Path) -> Path | Embedded:
        return Embedded(path, 0, ("image",), 1) if is_embedded else path

    train = [replace(row, image=media(cast("Path", row.image))) for row in alike]
    shots = RowShots(train, "caption", ShotsConfig("f", 1), 0, model.prompter, None, None, BadRows(1.0))
    shots._document = lambda place: cast("Document", place)  # type: ignore[method-assign]
    row = replace(alike[0], id="another", image=media(asked))
    for seed in range(8):
        shots._seed = seed
        assert {one.id for one in drawn(shots, row)} <= {"2", "3"}


def test_a_filter_of_shots_is_checked_as_a_recipes(model: Model, tmp_path: Path):
    rows = [{"id": f"{n}", "image": "0.png", "size": n, **scene("red")} for n in range(4)]
    rows[3]["size"] = "large"
    train = write_rows(tmp_path, rows)
    for filter, said in (
        ("not perturbd", r"rows\.jsonl: filter 'not perturbd' reads 'perturbd', which none .* known are .*size"),
        (
            "size < 3",
            r"rows\.jsonl: .*rows\.jsonl:4 \(3\): filter 'size < 3' compares the column 'size', here .*'large'",
        ),
    ):
        config = ShotsConfig(train, 1, filter=filter)
        with pytest.raises(ManifestError, match=said):
            RowShots.read(config, "caption", 0, model.prompter, None, None)
    config = ShotsConfig(train, 1, filter="size == None or id == 'x'")
    with pytest.raises(ManifestError, match="reads 'id'"):
        RowShots.read(config, "caption", 0, model.prompter, None, None)


@pytest.mark.parametrize(("task", "count"), [("caption", 2), ("transcribe", 2), ("interleaved", 1)])
def test_progress_counts_the_prompts_that_are_asked(model: Model, manifests: dict[str, Path], task: str, count: int):
    told: list[tuple[int, int]] = []
    evaluate(
        model, task, manifests["test"], limit=3, shots=ShotsConfig(manifests["train"], 1), controls=False,
        progress=lambda *counts: told.append(counts),
    )  # fmt: skip
    assert {num_all for _, num_all in told} == {3 * count}
    assert told[-1][0] == 3 if count == 1 else 3 < told[-1][0] <= 6  # blind prompts that are equal are asked once


def test_shots_that_cant_be_read_are_counted_and_bounded(model: Model, tmp_path: Path):
    train = write_rows(tmp_path, rows_of("t", 8), "train.jsonl")
    test = write_rows(tmp_path, rows_of("u", 2), "test.jsonl")
    (tmp_path / "tc3.png").write_bytes(b"no picture")
    result = evaluate(model, "caption", test, shots=ShotsConfig(train, 7), max_bad_fraction=0.2)
    assert result.scores["num_skipped_shots"] == 1 and result.scores["mean_shots_shown"] == 7
    assert "num_skipped_rows" not in result.scores
    for number in (4, 5, 6):
        (tmp_path / f"tc{number}.png").write_bytes(b"no picture")
    with pytest.raises(ManifestError, match=r"train\.jsonl: \d of \d rows can't be used"):
        evaluate(model, "caption", test, shots=ShotsConfig(train, 4))
    with pytest.raises(ManifestError, match=r"train\.jsonl has 4 rows that can be shown in front of"):
        evaluate(model, "caption", test, shots=ShotsConfig(train, 5), max_bad_fraction=0.9)
    with pytest.raises(ManifestError, match=r"has 8 rows .* 'caption', and num_shots is 9"):
        evaluate(model, "caption", test, shots=ShotsConfig(train, 9))


@pytest.mark.parametrize(
    ("task", "keys", "said"),
    [
        (
            "text",
            {"shots": ShotsConfig("f", 1)},
            "task is 'text', which has no shots; caption, transcribe, interleaved",
        ),
        ("chat", {"shots": ShotsConfig("f", 1)}, "task is 'chat', which has no shots"),
        ("speak", {"anchor": "a"}, "task is 'speak', which has no anchor; caption, transcribe, interleaved, chat have"),
        ("caption", {"anchor": " "}, "anchor is empty"),
    ],
)
def test_what_has_no_shots_or_anchor_is_named(model: Model, task: str, keys: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        evaluate(model, task, [], **keys)


# ---- the shell


def test_the_shell_scores_with_shots_and_anchor(
    model: Model, manifests: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    generation = GenerationConfig(max_new_tokens=12, max_length=400)
    save_model(tmp_path / "model", model.model, model.tokenizer, generation=generation)
    out, train = tmp_path / "out.json", str(manifests["train"])
    command = ["eval", "--model", str(tmp_path / "model"), "--manifest", str(manifests["test"]), "--json", str(out),
               "--device", "cpu", "--limit", "3"]  # fmt: skip

    def run(task: str, *options: str) -> dict[str, Any]:
        assert main([*command, "--task", task, *options]) == 0, capsys.readouterr().err
        result = load_result(out)
        assert load_result(save_result(result, tmp_path / "again.json")) == result
        return json.loads(out.read_text())

    for task in TASKS:
        plain = run(task)
        assert "prompt" not in plain and "num_shots" not in plain[task]
        shown = run(task, "--shots", train, "--num_shots", "2", "--seed", "0", "--anchor", ANCHOR)
        told = {"manifest": train, "num_shots": 2, "seed": 0, "max_length": 400, "filter": None}
        assert shown["prompt"] == {"anchor": ANCHOR, "shots": told}
        assert shown[task].items() >= {"num_shots": 2, "mean_shots_shown": 2.0, "num_rows_with_fewer_shots": 0}.items()
        assert plain[task].keys() <= shown[task].keys()
        assert [one["id"] for one in shown["predictions"]] == [one["id"] for one in plain["predictions"]]
        said = [[one["prediction"] for one in each["predictions"]] for each in (plain, shown)]
        assert said[0] != said[1]
    assert "mean_shots_shown" in capsys.readouterr().out
    voted = run("caption", "--shots", train, "--num_shots", "2", "--votes", "2")
    assert voted["caption"]["num_votes"] == 2 and voted["caption"]["mean_shots_shown"] == 2
    for wrong, message in (
        (["--num_shots", "2"], "--num_shots is that of shots, but there are none"),
        (["--max_length", "99"], "--max_length is that of shots"),
        (["--shots_filter", "plain"], "--shots_filter is that of shots"),
        (["--shots", train], "give --num_shots K too"),
        (["--shots", train, "--num_shots", "2", "--shots_filter", "plain ="], "filter"),
        (
            ["--shots", train, "--num_shots", "2", "--shots_filter", "plain"],
            "filter 'plain' reads 'plain', which none of the rows",
        ),
        (["--shots", train, "--num_shots", "0"], "num_shots is 0"),
        (["--shots", train, "--num_shots", "2", "--max_length", "1"], "max_length is 1"),
        (["--shots", str(tmp_path / "none.jsonl"), "--num_shots", "2"], "none.jsonl"),
        (["--shots", train, "--num_shots", "2", "--max_length", "30"], "no prompt has room for a shot"),
        (["--anchor", ""], "anchor is empty"),
    ):
        assert main([*command, "--task", "caption", *wrong]) != 0
        assert message in capsys.readouterr().err
