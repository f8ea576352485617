"""`mmllm eval --task chat`: what is asked, what counts as right, and the controls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.checkpoints.folder import save_model
from mmllm.data.rows.bad_rows import BadRows, ManifestError
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.sample import Sample, Segment
from mmllm.evaluation import chat_task, commands
from mmllm.evaluation.asking import AskedModel
from mmllm.evaluation.chat_task import ChatRow, chat_rows, evaluate_chat
from mmllm.evaluation.results import load_result
from mmllm.evaluation.tasks import evaluate
from tests.inference_fixtures import make

TURNS = [
    {"image": "a.png", "role": "user"},
    {"text": "which shape is on the left?", "role": "user"},
    {"text": "the star", "role": "assistant"},
    {"text": "what colour is it?", "role": "user"},
    {"text": "red", "role": "assistant"},
]


def chat(segments: list[dict], name: str = "r", **metadata) -> Row:
    return Row(name, "interleaved", f"rows:{name}", segments=tuple(segments), metadata=metadata)


def picture(folder: Path, name: str, shade: int) -> Path:
    path = folder / name
    Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(path)
    return path


IN_A_ROW = [
    *({"text": text, "role": "user", "new_turn": number > 0} for number, text in enumerate(("look", "what is it?"))),
    {"text": "2", "role": "tool"},
]
"""Three turns that are one in the form of templates.json."""


@pytest.mark.parametrize("before", [TURNS[1:4], IN_A_ROW, [*TURNS[1:3], *IN_A_ROW]])
def test_the_prompt_and_the_answer_are_the_training_document(tmp_path: Path, before: list[dict]) -> None:
    path, model = picture(tmp_path, "a.png", 40), make()
    row = chat([{"image": path, "role": "user"}, *before, TURNS[-1]])
    one = ChatRow.of(row)
    parts = chat_task.prompt_segments(one.row)
    prompt = chat_task._prompt(AskedModel(model), one.messages(parts))
    segments = [
        Segment(s.get("text"), s.get("image"), role=s["role"], new_turn=s.get("new_turn", False)) for s in row.segments
    ]
    document = build_document(Sample("r", segments=tuple(segments)), "chat", model.tokenizer)
    answer = model.tokenizer.text.encode("red")
    told = document.token_ids_T.tolist()
    assert prompt.token_ids_T.tolist() == told[: -len(answer) - 1]
    assert told[-len(answer) - 1 : -1] == answer


@pytest.mark.parametrize(
    ("metadata", "right", "wrong"),
    [
        ({}, ["two", "Two.", " two "], ["three", "2", "two shapes", ""]),
        ({"accept": ["2", "a pair"]}, ["two", "2", "A pair!"], ["3"]),
        ({"answer_pattern": r"(just )?(two|2)( shapes)?"}, ["two", "just 2 shapes", "TWO"], ["two or three", "no two"]),
    ],
)
def test_what_is_right(metadata: dict, right: list[str], wrong: list[str]) -> None:
    one = ChatRow.of(chat([*TURNS[:4], {"text": "two", "role": "assistant"}], **metadata))
    assert all(one.is_right(text) for text in right)
    assert not any(one.is_right(text) for text in wrong)


def test_an_answer_in_pieces_is_one_answer() -> None:
    one = ChatRow.of(chat([*TURNS[:4], *({"text": text, "role": "assistant"} for text in ("dark ", "red"))]))
    assert one.answer == "dark red"
    assert len(one.row.segments) == 4
    twice = ({"text": "dark", "role": "assistant"}, {"text": "red", "role": "assistant", "new_turn": True})
    assert ChatRow.of(chat([*TURNS[:4], *twice])).answer == "dark\nred", "as the task chat of templates.json has it"


def test_turns_keep_their_roles() -> None:
    one = ChatRow.of(chat(TURNS))
    parts = [Segment(text=str(number)) for number in range(4)]
    said = [(message["role"], [part.text for part in message["content"]]) for message in one.messages(parts)]
    assert said == [("user", ["0", "1"]), ("assistant", ["2"]), ("user", ["3"])]


@pytest.mark.parametrize(
    ("segments", "metadata", "message"),
    [
        (TURNS[:4], {}, "does not end with the assistant"),
        ([TURNS[2]], {}, "nothing before"),
        ([*TURNS[:4], {"audio": "a.wav", "role": "assistant"}], {}, "holds a picture or a sound"),
        (TURNS, {"accept": "crimson"}, "list of texts"),
        (TURNS, {"answer_pattern": "(red"}, "no regular expression"),
        (TURNS, {"answer_pattern": 3}, "regular expression"),
    ],
)
def test_bad_rows_are_named(segments: list[dict], metadata: dict, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        ChatRow.of(chat(segments, **metadata))
    bad = BadRows(0.5)
    assert len(chat_rows([chat(TURNS, "good"), chat(segments, "bad", **metadata)], bad, "rows")) == 1
    assert message in str(bad.reasons)


class Eyes:
    """An asked model that answers by a picture's first shade; blind, nothing."""

    class prompter:
        @staticmethod
        def chat(messages: list[dict]) -> list[dict]:
            return messages

    class tokenizer:
        chat_template = None

        class text:
            encode = staticmethod(list)

    def write(self, prompts: list, max_new_tokens: int, batch_size: int, blind: bool = False) -> list[str]:
        seen = [next(part.image for part in prompt[0]["content"] if part.image) for prompt in prompts]
        return ["" if blind else Path(image).stem for image in seen]


def test_controls_by_hand(tmp_path: Path) -> None:
    rows = []
    for number in range(6):
        path = picture(tmp_path, f"{number}.png", number)
        said = str(number) if number < 4 else "other"
        rows.append(chat([{"image": path, "role": "user"}, {"text": "?", "role": "user"},
                          {"text": said, "role": "assistant"}], str(number)))  # fmt: skip
    eyes: AskedModel = Eyes()  # type: ignore[assignment]
    result = evaluate_chat(eyes, [ChatRow.of(row) for row in rows], 8, 0)
    assert result.scores["answer_accuracy"] == pytest.approx(4 / 6)
    assert result.scores["blind_accuracy"] == result.scores["shuffled_accuracy"] == 0
    assert result.scores["n"] == 6
    assert [p.correct for p in result.predictions] == [True] * 4 + [False] * 2
    assert result.predictions[0].segments[-1] == {"text": "?"}


def test_without_controls_each_row_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path, "a.png", 90)
    asks = {"segments": [{"image": "a.png"}], "question": "what?", "answer": "red"}
    rows = [{"id": f"{kind}{number}", **row} for kind, row in (("r", {"segments": TURNS}), ("q", asks))
            for number in range(3)]  # fmt: skip
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[int] = []
    write = AskedModel.write

    def counted(self: AskedModel, prompts: list, *args, **kwargs) -> list[str]:
        asked.append(len(prompts))
        return write(self, prompts, *args, **kwargs)

    monkeypatch.setattr(AskedModel, "write", counted)
    model = make()
    for task in ("chat", "interleaved"):
        whole, alone = (evaluate(model, task, manifest, controls=controls) for controls in (True, False))
        kept = {"answer_accuracy", "answer_accuracy_ci", "n"}
        assert alone.scores == {key: value for key, value in whole.scores.items() if key in kept}
        assert [row.prediction for row in alone.predictions] == [row.prediction for row in whole.predictions]
        assert all(row.blind is None for row in alone.predictions)
    assert asked == [3] * 8


def test_a_tiny_model_by_the_command(tmp_path: Path) -> None:
    picture(tmp_path, "a.png", 90)
    lines = [{"id": f"r{number}", "segments": TURNS, "kind": "turns"} for number in range(3)]
    lines.append({"id": "no chat", "segments": [{"image": "a.png"}, {"text": "no roles"}]})
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = make()
    save_model(tmp_path / "model", model.model, model.tokenizer)
    commands.run_eval(str(tmp_path / "model"), "chat", str(manifest), str(tmp_path / "out.json"))
    result = load_result(tmp_path / "out.json")
    assert result.scores["n"] == 3
    assert {"answer_accuracy", "shuffled_accuracy", "blind_accuracy"} <= result.scores.keys()


def test_a_manifest_without_conversations_is_named(tmp_path: Path) -> None:
    picture(tmp_path, "a.png", 90)
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text(json.dumps({"id": "x", "segments": [{"image": "a.png"}, {"text": "no roles"}]}) + "\n")
    with pytest.raises(ManifestError, match="conversations"):
        evaluate(make(), "chat", read_rows(manifest))
