"""`mmllm study ask`: questions about pictures, from what their captions' rows say is there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.cli.main import main
from mmllm.data.rows.forms import read_rows
from mmllm.studies.asking import QUESTIONS, Asking, ask, ask_rows

THINGS = [
    [{"colour": "red", "shape": "ring"}],
    [{"colour": "red", "shape": "star"}, {"colour": "blue", "shape": "ring"}],
    [{"colour": "red", "shape": "star"}, {"colour": "blue", "shape": "star"}, {"colour": "red", "shape": "cross"}],
]


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    folder = tmp_path / "scenes"
    folder.mkdir()
    rows = []
    for number in range(9):
        Image.fromarray(np.full((8, 8, 3), 20 * number, dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"s{number}", "image": f"{number}.png", "text": f"scene {number}",
                     "objects": THINGS[number % 3], "plain": number < 6})  # fmt: skip
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_answers_are_what_the_objects_say(captions: Path):
    by_about = {about: [row.metadata["answer"] for row in ask_rows(read_rows(captions)[:3], Asking((about,)))]
                for about in QUESTIONS}  # fmt: skip
    assert by_about == {
        "colour": ["red", "blue and red", "blue and red"],
        "shape": ["ring", "ring and star", "cross and star"],
        "number": ["1", "2", "3"],
    }


def test_a_manifest_of_questions_reads_as_one(captions: Path, tmp_path: Path):
    out = tmp_path / "run" / "questions.jsonl"
    assert (
        main(["study", "ask", str(captions), "--out", str(out), "--filter", "plain", "--about", "colour,number"]) == 0
    )
    rows = read_rows(out)
    assert [row.id for row in rows] == [f"s{n}_{('colour', 'number')[n % 2]}" for n in range(6)]
    assert {row.kind for row in rows} == {"interleaved"}
    assert [row.metadata["asks"] for row in rows] == ["colour", "number"] * 3
    assert rows[1].metadata["question"] == QUESTIONS["number"][0] and rows[1].metadata["answer"] == "2"
    assert [Path(row.segments[0]["image"]).resolve() for row in rows] == [
        captions.parent / f"{n}.png" for n in range(6)
    ]


def test_a_limit_draws_by_the_seed(captions: Path, tmp_path: Path):
    rows = read_rows(captions)
    drawn = [[row.id for row in ask_rows(rows, Asking(("shape",), limit=4, seed=seed))] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and len(drawn[0]) == 4
    assert len(ask_rows(rows, Asking(limit=100))) == 9
    assert "4 questions for shape, with" in ask(captions, tmp_path / "q.jsonl", Asking(("shape",), limit=4))[0]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"about": ("size",)}, "about is size; give one or more of colour, shape, number"),
        ({"about": ()}, "about is empty"),
        ({"limit": 0}, "limit is 0"),
        ({"filter": "plain ="}, "filter"),
    ],
)
def test_wrong_settings_are_refused(keys, said: str):
    with pytest.raises(ValueError, match=said):
        Asking(**keys)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"id": "x", "image": "0.png", "text": "no objects"}, "has no objects"),
        ({"id": "x", "image": "0.png", "text": "a word is missing", "objects": [{"shape": "ring"}]}, "'colour'"),
        ({"id": "x", "text": "words alone"}, "has no picture"),
    ],
)
def test_rows_that_cannot_be_asked_about_are_named(captions: Path, tmp_path: Path, row, said: str):
    path = captions.parent / "bad.jsonl"
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=rf"bad.jsonl.*{said}"):
        ask(path, tmp_path / "q.jsonl", Asking())


def test_a_filter_that_keeps_nothing_or_reads_what_no_row_has_is_refused(captions: Path, tmp_path: Path):
    with pytest.raises(ValueError, match="no row passes the filter"):
        ask(captions, tmp_path / "q.jsonl", Asking(filter="plain and not plain"))
    with pytest.raises(ValueError, match="reads 'plian', which none of the rows has; known are objects, plain"):
        ask(captions, tmp_path / "q.jsonl", Asking(filter="not plian"))
