"""What the report shows is what the tasks write."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mmllm.evaluation.report import MEASURES, Measure
from mmllm.evaluation.speech_task import Judge
from mmllm.evaluation.tasks import evaluate
from tests.inference_fixtures import make
from tests.test_evaluation_tasks import StubModel, scene, scene_of, stubs_are_asked, write_rows  # noqa: F401


class Listener(StubModel):
    """Hears the same in every sound."""

    def transcribe(self, sounds: list, **settings: Any) -> list[str]:
        return ["one two"] * len(sounds)


def captions() -> tuple[StubModel, list[dict]]:
    scenes = [scene_of("red", "blue"), scene_of("red", "blue", "pink"), scene("red"), scene("cyan")]
    scenes[3]["heldout_pairs"] = [["circle", "cyan"]]
    rows = [{"id": str(i), "image": f"{i}.png", **row} for i, row in enumerate(scenes)]
    return StubModel({f"{i}.png": row["text"] for i, row in enumerate(scenes)}), rows


def transcripts() -> tuple[StubModel, list[dict]]:
    rows: list[dict] = [{"id": str(i), "audio": f"{i}.wav", "text": "one two", "speaker": "ann"} for i in range(3)]
    return Listener({}), [*rows, {**rows[0], "id": "x", "audio": "x.wav", "speaker": "bob", "heldout_voice": True}]


def speech() -> tuple[StubModel, list[dict]]:
    """Recordings of one sample more each; a stranger's is said by another voice."""
    lengths = {"one": "20", "one two": "40", "three four five": "70", "six": "90"}
    model = Listener({}, lengths)
    model.generation = dataclasses.replace(model.generation, voices=("ann",))
    speakers = ("ann", "ann", "ann", "stranger")
    return model, [
        {"id": str(i), "audio": f"{i}.wav", "text": text, "speaker": speaker}
        for i, (text, speaker) in enumerate(zip(lengths, speakers, strict=True))
    ]


def answers() -> tuple[StubModel, list[dict]]:
    questions = ["which colour is the shape in the first picture?", "what is it?"]
    rows = [{"id": str(i), "segments": [{"image": f"{i}.png"}], "question": question, "answer": "red"}
            for i, question in enumerate(questions * 2)]  # fmt: skip
    return StubModel({f"{i}.png": "red" for i in range(4)}), rows


def text() -> tuple[Any, list[dict]]:
    return make(), [{"id": str(i), "text": "a red circle above two blue squares"} for i in range(2)]


def keys_of(measure: Measure) -> list[str]:
    shared = [] if measure.clusters is None else [measure.clusters[0]]
    return [measure.key, measure.rows, *shared, *(key for key, _ in measure.controls)]


@pytest.mark.parametrize(
    ("task", "made"),
    [("caption", captions), ("transcribe", transcripts), ("speak", speech), ("interleaved", answers), ("text", text)],
)
def test_each_measure_and_each_control_is_written_by_its_task(tmp_path: Path, task: str, made: Any):
    model, rows = made()
    judge = Judge(SimpleNamespace(transcribe=lambda waves, rate, lexicon: ["one two"] * len(waves)))  # type: ignore[arg-type]
    scores = evaluate(model, task, write_rows(tmp_path, rows), judge=judge if task == "speak" else None).scores
    shown = {key for measure in MEASURES[task] for key in keys_of(measure)}
    assert sorted(shown - set(scores)) == []


def test_every_task_has_measures():
    assert set(MEASURES) == {"caption", "transcribe", "speak", "interleaved", "text", "chat"}
