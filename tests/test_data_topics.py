"""Topics of rows: TF-IDF and clusters against slow ones, and topics that are known."""

from __future__ import annotations

import json
import math
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.topics import (
    NO_TOPIC,
    Topics,
    TopicsConfig,
    Vocabulary,
    _nearest,
    topics_lines,
    topics_of,
    write_topics,
)
from tests.data_fixtures import write_manifest

SPOKEN = {
    "sea": ("boat", "wave", "sail", "harbour", "tide", "anchor"),
    "kitchen": ("spoon", "oven", "flour", "butter", "knife", "bowl"),
    "sky": ("cloud", "star", "moon", "rain", "thunder", "sun"),
}
SIZES = {"sea": 60, "kitchen": 40, "sky": 20}


def texts_of(seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts with words of one topic each among words that all have, and their topics."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation([name for name, size in SIZES.items() for _ in range(size)]).tolist()
    texts = [f"A {' '.join(rng.choice(SPOKEN[label], 4))}, and the {rng.choice(SPOKEN[label])}" for label in labels]
    return texts, labels


def slow_weights(texts: list[str]) -> list[dict[str, float]]:
    """Of each text, its words' TF-IDF by the formula."""
    words = [text.lower().replace(",", "").split() for text in texts]
    holding = Counter(word for each in words for word in set(each))
    found = []
    for each in words:
        weights = {
            word: (1 + math.log(count)) * (math.log((1 + len(texts)) / (1 + holding[word])) + 1)
            for word, count in Counter(each).items()
            if holding[word] > 1
        }
        length = math.sqrt(sum(weight**2 for weight in weights.values()))
        found.append({word: weight / length for word, weight in weights.items()})
    return found


def test_weights_are_those_of_the_formula():
    texts = [*texts_of()[0], "alone", "A boat boat BOAT"]
    vocabulary = Vocabulary(texts)
    weights = vocabulary.weights(texts)
    assert "alone" not in vocabulary.words
    for number, wanted in enumerate(slow_weights(texts)):
        words, values = weights.text(number)
        found = {vocabulary.words[word]: value for word, value in zip(words.tolist(), values.tolist(), strict=True)}
        assert found == pytest.approx(wanted)


def test_topics_that_are_there_are_found():
    texts, labels = texts_of()
    topics = topics_of(texts, TopicsConfig(3))
    found_N = topics.of(texts)
    for number, name in enumerate(SIZES):  # the largest first
        assert {label for label, found in zip(labels, found_N.tolist(), strict=True) if found == number} == {name}
        assert set(topics.words(number)[:6]) == set(SPOKEN[name])
    assert np.array_equal(found_N, topics_of(texts, TopicsConfig(3)).of(texts))
    assert topics.of(["the knife", "nothing known", "moon"]).tolist() == [1, NO_TOPIC, 2]


def test_texts_without_known_words_may_lie_anywhere(monkeypatch: pytest.MonkeyPatch):
    topics = topics_of(texts_of()[0], TopicsConfig(3))
    monkeypatch.setattr("mmllm.data.rows.topics._CHUNK", 6)  # two words of texts
    mixed = ["zebra", "the knife", "zebra", "zebra", "zebra", "zebra", "moon", "boat", "zebra"]
    wanted = {"zebra": NO_TOPIC, "the knife": 1, "moon": 2, "boat": 0}
    assert topics.of(mixed).tolist() == [wanted[text] for text in mixed]
    assert topics.of(["zebra"]).tolist() == [NO_TOPIC] and topics.of([]).tolist() == []


@pytest.mark.parametrize("chunk", [7, 1024])
def test_centres_are_the_means_of_the_texts_that_are_nearest_to_them(monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr("mmllm.data.rows.topics._CHUNK", chunk)
    texts = texts_of(1)[0]
    topics = topics_of(texts, TopicsConfig(5, seed=3, starts=2))
    dense_NV = np.zeros((len(texts), len(topics.vocabulary.words)))
    for number, weights in enumerate(slow_weights(texts)):
        for word, weight in weights.items():
            dense_NV[number, topics.vocabulary.words.index(word)] = weight
    found_N = (dense_NV @ topics.centers_VK).argmax(axis=1)
    assert np.array_equal(found_N, topics.of(texts)) and len(set(found_N.tolist())) == 5
    for topic in range(5):
        mean_V = dense_NV[found_N == topic].sum(axis=0)
        np.testing.assert_allclose(topics.centers_VK[:, topic], mean_V / np.linalg.norm(mean_V), atol=1e-9)


def test_fewer_different_texts_than_topics_leave_some_empty():
    topics = topics_of(["a red star", "a red star", "a blue moon", "a blue moon"], TopicsConfig(4))
    assert isinstance(topics, Topics) and np.isfinite(topics.centers_VK).all()
    found = topics.of(["a red star", "a blue moon"]).tolist()
    assert found[0] != found[1]
    with pytest.raises(ValueError, match=r"topics is 9, but 2 of 3 texts have a word"):
        topics_of(["a star", "a moon", "nothing"], TopicsConfig(9))
    with pytest.raises(ValueError, match="topics is 0"):
        TopicsConfig(0)


def test_topics_without_texts_have_no_words_and_are_counted(tmp_path: Path):
    rows = [{"id": f"{n}", "text": text} for n, text in enumerate(["a red star", "a blue moon"] * 4)]
    target = write_manifest(tmp_path, [{"text": "a star"}, {"text": "the moon"}], "t.jsonl")
    told = write_topics([write_manifest(tmp_path, rows)], tmp_path / "o.jsonl", TopicsConfig(5), [target])
    assert [topic["rows"] for topic in told["topics"]] == [4, 4, 0, 0, 0]
    assert [bool(topic["words"]) for topic in told["topics"]] == [True, True, False, False, False]
    assert sum(topic["target"] for topic in told["topics"][:2]) == 1  # nothing is like an empty topic
    assert any(line.startswith("3 of 5 topics are empty") for line in topics_lines(told))


def test_few_products_are_held_at_once_however_long_the_texts(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{number}" for number in rng.choice(2000, 400, replace=False)) for _ in range(200)]
    topics = topics_of(texts, TopicsConfig(8, starts=1, rounds=2))
    weights = topics.vocabulary.weights(texts)
    whole = _nearest(weights, topics.centers_VK)
    monkeypatch.setattr("mmllm.data.rows.topics._CHUNK", 8 * 1000)
    tracemalloc.start()
    found = _nearest(weights, topics.centers_VK)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8 * 8 * 1000 < 8 * 8 * len(weights.words_E) / 10
    assert all(np.array_equal(one, other) for one, other in zip(found, whole, strict=True))


@pytest.mark.parametrize("column", ["text", "id", "image", "audio", "segments", "question", "answer", "", " "])
def test_a_column_of_which_rows_are_made_is_refused(tmp_path: Path, column: str):
    with pytest.raises(ValueError, match=f"column is '{column}'; topics would take the place"):
        write_topics([tmp_path / "never_read.jsonl"], tmp_path / "o.jsonl", TopicsConfig(2), column=column)


def test_the_command_writes_topics_into_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts, labels = texts_of()
    rows = [
        {"id": f"{n}", "text": text, "label": label} for n, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    rows.append({"id": "odd", "text": "zebra", "label": ""})
    rows.append(
        {"id": "asked", "segments": [{"text": "and the moon"}], "question": "star?", "answer": "cloud", "label": "sky"}
    )
    manifest = write_manifest(tmp_path, rows)
    target = write_manifest(
        tmp_path, [{"text": f"the {word}"} for word in ("oven", "bowl", "wave", "flour")], "t.jsonl"
    )
    out = tmp_path / "new" / "topics.jsonl"
    command = ["data", "topics", str(manifest), "--topics", "3", "--out", str(out), "--target", str(target)]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["topic", "rows", "share", "target", "words"]
    assert lines[2].split()[:4] == ["1", "40", "32.8%", "75.0%"] and lines[-1].split()[:2] == ["-1", "1"]
    found = read_rows(out)
    assert [row.id for row in found] == [row["id"] for row in rows]
    named = {"sea": 0, "kitchen": 1, "sky": 2, "": NO_TOPIC}
    assert all(row.metadata["topic"] == named[row.metadata["label"]] for row in found)
    shares = {row.metadata["topic"]: row.metadata["topic_target"] for row in found}
    assert shares == {0: 0.25, 1: 0.75, 2: 0.0, NO_TOPIC: 0.0}
    again = [*command[:2], str(out), *command[3:7], "--json"]
    assert main(again) == 0 and json.loads(capsys.readouterr().out)["replaced"] == len(rows)
    assert main([*command[:3], "--topics", "3", "--out", str(out), "--target", str(tmp_path / "none.jsonl")]) == 2
