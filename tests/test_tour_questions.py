"""The tour's questions: each answer follows from the scene, told by a reader that shares nothing with the maker."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from mmllm.data.rows.forms import read_rows
from mmllm.evaluation.scenes import COLORS, SHAPES, SIZES, SceneObject
from mmllm.quickstart.scenes import is_test_scene, make_scenes
from mmllm.quickstart.tour.questions import KINDS, make_questions

NUMBERS = {"none": 0, "one": 1, "two": 2, "three": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    make_scenes(folder / "scenes", 900, 300, 3, seed=1)
    for split in ("train", "test"):
        (folder / "speech" / "audio").mkdir(parents=True, exist_ok=True)
        lines = []
        for number, shape in enumerate(SHAPES):
            soundfile.write(folder / "speech" / "audio" / f"{split}{number}.wav", np.full(400, 0.1), 8000)
            lines.append({"audio": f"audio/{split}{number}.wav", "text": f"move the red {shape} to the top"})
        lines.append({"audio": "audio/two.wav", "text": "the star is left of the ring"})
        lines.append({"audio": "audio/joined.wav", "text": "find the star now we see", "joined": True})
        lines.append({"audio": "audio/none.wav", "text": "seven"})
        (folder / "speech" / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def scenes_of(data: Path) -> dict[str, dict]:
    rows = {}
    for path in (data / "scenes").glob("t*.jsonl"):
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[Path(row["image"]).name] = row
    return rows


def answer_by_hand(asked: list[str], said: list[str], pictures: list[dict], sound: str | None) -> str:
    """The right answer to the last question, from the rows' objects and relations."""
    things = pictures[0]["objects"]
    relation = pictures[0]["relations"][0][1]
    last = asked[-1]
    one = lambda shape: next(t for t in things if t["shape"] == shape)  # noqa: E731
    place = lambda shape: next(i for i, t in enumerate(things) if t["shape"] == shape)  # noqa: E731
    words = re.findall(r"[a-z]+", last)
    shapes = [w for w in words if w in SHAPES]
    if last.startswith("how many"):
        wanted = next((w for w in words if w in (*COLORS, *SIZES)), None)
        count = sum(wanted is None or wanted in t.values() for t in things)
        return next(name for name, number in NUMBERS.items() if number == count)
    if last.startswith("which is"):
        a, b = shapes
        if "larger" in last or "smaller" in last:
            size = "large" if "larger" in last else "small"
            return f"the {a if one(a)['size'] == size else b}"
        is_first = "further left" in last or "higher" in last
        assert relation == ("left of" if "further" in last else "above")
        return f"the {a if (place(a) < place(b)) == is_first else b}"
    if last.startswith("which picture"):
        first, second = (len(p["objects"]) for p in pictures)
        return f"the {'first' if (first > second) == ('more' in last) else 'second'}"
    if last.startswith("do both"):
        of = "shape" if "shape" in last else "colour"
        return "yes" if pictures[0]["objects"][0][of] == pictures[1]["objects"][0][of] else "no"
    if "sound" in last:
        assert sound is not None
        named = next(s for s in SHAPES if s in sound)
        return "yes" if any(t["shape"] == named for t in things) else "no"
    if last.startswith("is there"):
        found = [t for t in things if t["shape"] == shapes[0]]
        return f"yes, it is {found[0]['colour']}" if found else "no, there is none"
    match = re.match(r"is the (\w+) (left of|right of|above|below) the (\w+)\?", last)
    if match:
        a, asked_relation, b = match.groups()
        names = ("left of", "right of") if relation == "left of" else ("above", "below")
        true = names[place(a) > place(b)]
        return f"{'yes' if true == asked_relation else 'no'}, it is {true} it"
    if last.endswith("it large or small?"):
        return one(said[-1].removeprefix("the "))["size"]
    if "colour is it" in last or "colour is that" in last:
        return one(said[-1].removeprefix("the "))["colour"]
    if last.startswith("and the"):
        return one(shapes[0])["colour" if "colour" in asked[0] else "size"]
    match = re.match(r"is the (\w+) (\w+)\?", last)
    assert match, last
    shape, value = match.groups()
    true = one(shape)["colour" if value in COLORS else "size"]
    return f"{'yes' if true == value else 'no'}, it is {true}"


@pytest.mark.parametrize("split", ["train", "test"])
def test_each_answer_follows_from_the_scene(data: Path, split: str) -> None:
    scenes = scenes_of(data)
    rows = make_questions(data, split, 240, 0, data)
    for row in rows:
        segments = row["segments"]
        pictures = [scenes[Path(s["image"]).name] for s in segments if "image" in s]
        sounds = [s["audio"] for s in segments if "audio" in s]
        sound = SHAPES[int(re.findall(r"\d+", sounds[0])[-1])] if sounds else None
        asked = [s["text"] for s in segments if "text" in s and s["role"] == "user"]
        said = [s["text"] for s in segments if s["role"] == "assistant"]
        for number in range(len(asked)):
            if asked[number].startswith(("which shape is", "what is", "what colour is the")):
                continue  # asked for by what follows
            if asked[number].startswith("is the") and asked[number].endswith("large or small?") and number == 0:
                continue
            wanted = answer_by_hand(asked[: number + 1], said[:number], pictures, sound)
            assert said[number] == wanted, (asked, said, pictures)


def test_test_questions_show_scenes_that_training_never_shows(data: Path) -> None:
    scenes = scenes_of(data)
    for split in ("train", "test"):
        for row in make_questions(data, split, 40, 0, data):
            for name in (Path(s["image"]).name for s in row["segments"] if "image" in s):
                scene = scenes[name]
                things = [SceneObject(o["size"], o["colour"], o["shape"]) for o in scene["objects"]]
                relation = scene["relations"][0][2 if len(things) == 1 else 1]
                assert is_test_scene(things, relation) == (split == "test")


def test_balance_and_chance(data: Path) -> None:
    rows = make_questions(data, "train", 1200, 3, data)
    assert Counter(row["kind"] for row in rows) == dict.fromkeys(KINDS, 300)
    for asks in ("all", "colour", "size"):
        answers = Counter(r["segments"][-1]["text"] for r in rows if r["kind"] == "count" and r["asks"] == asks)
        assert len(answers) == 3 and max(answers.values()) < 0.5 * answers.total()
    for kind in ("compare", "reason"):
        for asks in {r["asks"] for r in rows if r["kind"] == kind}:
            chosen = [r["segments"][-1]["text"] for r in rows if r["kind"] == kind and r["asks"] == asks]
            yes = sum(text.startswith("yes") for text in chosen) / len(chosen)
            assert yes == 0 or 0.25 < yes < 0.75, asks
    and_sizes = [[s["text"] for s in r["segments"] if s["role"] == "assistant"]
                 for r in rows if r["asks"] == "and" and r["segments"][-1]["text"] in SIZES]  # fmt: skip
    same = sum(first == second for first, second in and_sizes) / len(and_sizes)
    assert 0.25 < same < 0.75, "the second answer must not follow from the first"


def test_rows_are_read_and_the_same_each_time(data: Path, tmp_path: Path) -> None:
    rows = make_questions(data, "test", 24, 5, tmp_path)
    assert rows == make_questions(data, "test", 24, 5, tmp_path)
    assert rows != make_questions(data, "test", 24, 6, tmp_path)
    assert rows[:8] == make_questions(data, "test", 8, 5, tmp_path)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = read_rows(tmp_path / "rows.jsonl")
    assert [row.kind for row in read] == ["interleaved"] * 24
    assert {row.metadata["kind"] for row in read} == set(KINDS)


def test_too_few_pictures_are_named(data: Path, tmp_path: Path) -> None:
    (tmp_path / "scenes").mkdir()
    (tmp_path / "scenes" / "train.jsonl").write_text("")
    with pytest.raises(FileNotFoundError, match="speech"):
        make_questions(tmp_path, "train", 4, 0, tmp_path)
    (tmp_path / "speech").mkdir()
    (tmp_path / "speech" / "train.jsonl").write_text("")
    with pytest.raises((ValueError, IndexError), match=r"too few|no picture|empty"):
        make_questions(tmp_path, "train", 4, 0, tmp_path)
