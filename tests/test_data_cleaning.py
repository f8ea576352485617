from __future__ import annotations

import numpy as np
import pytest

from mmllm.data import commands
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.cleaning import CleaningConfig, choose, measure, text_facts
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.near_copies import minhash, near_rows
from tests.data_fixtures import write_manifest, write_picture

VOCABULARY = [f"word{number}" for number in range(400)]


def text(seed: int, count: int = 120) -> str:
    return " ".join(np.random.default_rng(seed).choice(VOCABULARY, count))


def changed(seed: int, places: int) -> str:
    words = text(seed).split()
    for place in np.random.default_rng(seed + 1000).choice(len(words), places, replace=False):
        words[place] = "other"
    return " ".join(words)


def rows_of(folder, rows: list[dict]):
    return read_rows(write_manifest(folder, rows))


def jaccard(first: str, second: str) -> float:
    """Slow and plain: shingles as tuples of words."""
    sets = [{tuple(t.split()[n : n + 5]) for n in range(len(t.split()) - 4)} for t in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_signatures_estimate_jaccard_similarity():
    for places in (0, 1, 3, 8, 30):
        for seed in range(5):
            first, second = minhash(text(seed)), minhash(changed(seed, places))
            assert first is not None and second is not None
            estimate = (first == second).mean()
            assert estimate == pytest.approx(jaccard(text(seed), changed(seed, places)), abs=0.16)
    assert minhash("a few words only") is None
    assert minhash(text(0).upper()).tolist() == minhash(text(0)).tolist()  # pyright: ignore


def test_near_duplicates_are_those_of_comparing_all(tmp_path):
    texts = [text(seed) for seed in range(30)]
    texts += [changed(seed, 1) for seed in range(10)] + [changed(seed, 40) for seed in range(10, 20)]
    measures = [measure(row, signature=True) for row in rows_of(tmp_path, [{"text": item} for item in texts])]
    near = near_rows(measures, [True] * len(texts), 0.7)
    signatures = [np.frombuffer(bytes.fromhex(item["signature"]), "<u4") for item in measures]
    slow = []
    for number, signature in enumerate(signatures):
        before = [other for other in range(number) if other not in slow]
        if any((signatures[other] == signature).mean() >= 0.7 for other in before):
            slow.append(number)
    assert near == slow == list(range(30, 40))


def test_cleaning_counts_what_each_stage_leaves_out(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_picture(tmp_path / f"{name}.png", rng)
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    given = [
        {"id": "1", "text": text(1)},
        {"id": "2", "text": text(1)},
        {"id": "3", "text": changed(1, 1)},
        {"id": "4", "text": "!!! ??? ### !!! ???"},
        {"id": "5", "text": "a red square", "image": "a.png"},
        {"id": "6", "text": "a red square", "image": "copy.png"},
        {"id": "7", "text": "a red square", "image": "b.png"},
        {"id": "8", "text": "one red square", "image": "a.png"},
    ]
    rows = rows_of(tmp_path, given)
    config = CleaningConfig("minhash", quality="symbols < 0.5 and words >= 3")
    kept, counts = choose(rows, [measure(row, True, True) for row in rows], config)
    assert [row.id for row in kept] == ["1", "5", "7", "8"]
    assert counts == {"quality": 1, "exact": 2, "near": 1}
    exact = CleaningConfig("exact")
    assert len(choose(rows, [measure(row) for row in rows], exact)[0]) == 6
    told = commands.build(tmp_path / "manifest.jsonl", tmp_path / "s", cleaning=config, workers=1)
    assert told["num_samples"] == 4 and told["left_out"] == counts
    with pytest.raises(ManifestError, match=r"reads 'wrods', which no row has; there are characters, .*words"):
        commands.build(tmp_path / "manifest.jsonl", tmp_path / "s", cleaning=CleaningConfig(quality="wrods > 3"))
    with pytest.raises(ManifestError, match=r"leaves none of 8 rows \(8 by quality\)"):
        commands.build(tmp_path / "manifest.jsonl", tmp_path / "s", cleaning=CleaningConfig(quality="words > 999"))


def test_a_split_comes_after_deduplication(tmp_path):
    rows = [{"id": f"{n}-{copy}", "text": changed(n, copy)} for n in range(30) for copy in range(2)]
    manifest = write_manifest(tmp_path, rows)
    config = CleaningConfig("minhash", 0.7)
    counts = [
        commands.build(manifest, tmp_path / part, holdout="0.3", part=part, cleaning=config)["num_samples"]
        for part in ("train", "heldout")
    ]
    assert sum(counts) == 30 and min(counts) >= 3


def test_facts_of_texts():
    facts = text_facts("Hello, big world\nHello, big world\n\nend")
    assert facts["words"] == 7 and facts["repeated_lines"] == pytest.approx(1 / 3)
    assert facts["symbols"] == pytest.approx(2 / 31) and facts["letters"] == pytest.approx(29 / 31)
    assert text_facts("")["mean_word"] == 0


def test_wrong_settings_are_named(tmp_path):
    for wrong, said in (
        ({"dedup": "some"}, "dedup"), ({"threshold": 0}, "threshold"), ({"quality": "a("}, "filter"),
        ({"dedup": "minhash", "shingles": "words"}, "give words:N or chars:N"),
        ({"dedup": "exact", "shingles": "chars:5"}, "only minhash"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            CleaningConfig(**wrong)  # pyright: ignore[reportArgumentType]
