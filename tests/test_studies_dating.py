"""Planted dates: what drifts and what doesn't; ISO dates are numbers that a curriculum can order by."""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmllm.cli.main import main
from mmllm.data.index.columns import Column
from mmllm.data.plan.readings import measured
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.studies.dating import FIRST, NUM_DAYS, Drift, date_rows

WORDS = ("circle", "square", "star", "ring")


def rows_of(count: int) -> list[Row]:
    """A third of the texts with one of the words, a third with two, a third with three; some with none."""
    rng = np.random.default_rng(0)
    texts = [" beside a Large ".join(rng.choice(WORDS, 1 + n % 3)) for n in range(count)]
    return [Row(f"r{n}", "text", f"f:{n}", "nothing" if n % 50 == 49 else texts[n]) for n in range(count)]


def test_words_come_into_use_one_after_the_other_and_texts_stay_as_long():
    rows = rows_of(3000)
    dated = date_rows(rows, Drift(WORDS))
    assert [row.text for row in dated] == [row.text for row in rows]
    days = np.array([(datetime.date.fromisoformat(row.metadata["date"]) - FIRST).days for row in dated])
    assert days.min() == 0 and days.max() < NUM_DAYS
    assert all(700 < ((days >= start) & (days < start + 365)).sum() < 800 for start in (0, 365, 730, 1095))
    early = [row.text for row, day in zip(rows, days, strict=True) if day < NUM_DAYS // 4]
    late = [row.text for row, day in zip(rows, days, strict=True) if day >= 3 * NUM_DAYS // 4]
    growth = []
    for word in WORDS:
        first, last = (sum(word in text for text in texts) / len(texts) for texts in (early, late))
        growth.append(last / max(first, 1e-9))
    assert growth == sorted(growth) and growth[0] < 1 / 1.5 and growth[-1] > 3, "each word is later than the one before"
    lengths = [np.mean([len(text.split()) for text in texts]) for texts in (early, late)]
    assert abs(lengths[0] - lengths[1]) < 0.1, "early texts are no shorter"
    first = [min(day for row, day in zip(rows, days, strict=True) if row.text == word) for word in WORDS]
    assert first[0] < first[1] < first[2] < first[3]
    assert date_rows(rows, Drift(WORDS)) == dated != date_rows(rows, Drift(WORDS, seed=1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"words": ("a",)}, "words is a; give two or more"), ({"words": ("a", "A")}, "each once"),
        ({"words": ("a", "b c")}, "'b c', which is no single word"),
        ({"words": ("a", "b"), "filter": "import os"}, "import os"),
    ],
)  # fmt: skip
def test_a_drift_that_cannot_be_is_named(settings: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        Drift(**settings)


def test_rows_that_cannot_be_dated_are_named():
    with pytest.raises(ValueError, match="f:9 has no text of its own"):
        date_rows([Row("d", "interleaved", "f:9", segments=({"text": "a"},))], Drift(WORDS))
    with pytest.raises(ValueError, match="f:3 has a date already"):
        date_rows([Row("d", "text", "f:3", "ring", metadata={"date": "1999-01-01"})], Drift(WORDS))


def test_date_writes_a_manifest_and_says_what_drifts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    lines = [json.dumps({"id": str(n), "text": WORDS[n % 4], "plain": n % 2 == 0}) for n in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    command = ["study", "date", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "deep" / "dated.jsonl")]
    assert main([*command, "--words", "circle, star", "--filter", "plain"]) == 0
    said = capsys.readouterr().out
    assert "8 rows, dated 2001-01-01 to 2004-12-31; 0 have none of the words" in said and "star: in " in said
    assert len({row.metadata["date"] for row in read_rows(tmp_path / "deep" / "dated.jsonl")}) == 8
    assert main([*command, "--words", "heart,cross"]) != 0
    assert "no text has any of the words heart, cross" in capsys.readouterr().err


def column(values: Sequence[Any]) -> Column:
    arrays, others = Column.arrays(values, "date")
    return Column(lambda name, start=0, stop=None: arrays[name][start:stop], "date", len(values), **others)


def test_dates_are_numbers_that_a_curriculum_orders_by():
    values = ["2001-03-04", "1969-12-31", None, 2.5, "2001-03-04T12:00:00Z", "2001-03-04T12:00:00-06:00", "2001-13-01"]
    values += ["19991231", "spring", "2000-02-29 06:00", True]
    index: Any = SimpleNamespace(columns={"date": column(values)}, num_documents=len(values))
    inf = float("inf")
    wanted = [11385.0, -1.0, inf, 2.5, 11385.5, 11385.75, inf, inf, inf, 11016.25, 1.0]
    assert measured(index, "date").tolist() == wanted
    only: Any = SimpleNamespace(columns={"date": column(["b", "a"])}, num_documents=2)
    assert measured(only, "date").tolist() == [inf, inf]
