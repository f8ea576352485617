"""Near copies of short texts and of pictures, against comparing all with all."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmllm.cli.main import main
from mmllm.data import commands
from mmllm.data.rows import near_copies
from mmllm.data.rows.cleaning import CleaningConfig, choose, measure
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.near_copies import (
    NUM_HASHES,
    Shingles,
    banding,
    candidates,
    minhash,
    near_rows,
    thumbnail,
)
from tests.data_fixtures import make_folder, write_manifest, write_sound

SIZES, COLOURS, SHAPES = ("small", "large"), ("red", "blue", "green", "pink"), ("circle", "square", "star", "ring")
PLACES = ("above", "below", "left of", "right of")


def caption(rng: np.random.Generator) -> str:
    first, second = (f"a {rng.choice(SIZES)} {rng.choice(COLOURS)} {rng.choice(SHAPES)}" for _ in range(2))
    return f"{first} {rng.choice(PLACES)} {second}"


def edited(text: str, rng: np.random.Generator) -> str:
    words = text.split()
    place = int(rng.integers(len(words) - 1))
    match rng.integers(3):
        case 0:
            del words[place]
        case 1:
            words[place : place + 2] = words[place : place + 2][::-1]
        case 2:
            words[place] = f"{words[place].upper()},"
    return " ".join(words)


def picture(rng: np.random.Generator, side: int = 48) -> np.ndarray:
    """uint8 [side, side, 3], smooth, as pictures are."""
    coarse = Image.fromarray(rng.integers(0, 255, (6, 6, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


def noisy(image: np.ndarray, rng: np.random.Generator, levels: int = 4) -> np.ndarray:
    return (image.astype(int) + rng.integers(-levels, levels + 1, image.shape)).clip(0, 255).astype(np.uint8)


def slow_clusters(pairs: list[tuple[int, int]], count: int) -> list[int]:
    """All but the first of each connected component, by walking from each row to all that it reaches."""
    beside = {row: {other for pair in pairs if row in pair for other in pair} for row in range(count)}
    lost = []
    for row in range(count):
        reached, todo = {row}, [row]
        while todo:
            new = beside[todo.pop()] - reached
            reached |= new
            todo += new
        if min(reached) < row:
            lost.append(row)
    return lost


def jaccard(first: str, second: str, size: int) -> float:
    """Slow and plain: runs of characters as strings."""
    sets = [{text[n : n + size] for n in range(len(text) - size + 1)} for text in (first, second)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def signatures(texts: list[str], shingles: Shingles) -> np.ndarray:
    found = [minhash(text, shingles) for text in texts]
    assert all(signature is not None for signature in found)
    return np.stack(found)  # pyright: ignore[reportArgumentType]


def test_shingles_are_runs_of_words_or_characters():
    by_words, by_chars = Shingles.parse("words:2"), Shingles.parse("chars:5")
    assert by_words == Shingles("words", 2) and by_chars == Shingles("chars", 5)
    assert len(by_words.of("A red, red circle!")) == 3 and by_words.of("a red red circle") == by_words.of(
        "A RED; red circle"
    )
    assert len(by_chars.of("abcdefg")) == 3 == len(by_chars.of("ABC-DE")) + 1  # punctuation is a blank
    assert len(by_chars.of("abc")) == 1 == len(by_words.of(""))
    assert minhash("a small red circle") is None  # as ever: of runs of five words there are too few
    assert minhash("a small red circle", by_chars) is not None and minhash("a small ri", by_chars) is None
    for wrong in ("words", "words:0", "letters:3", "chars:-1", "chars:five"):
        with pytest.raises(ValueError, match=r"give words:N or chars:N"):
            Shingles.parse(wrong)


def test_signatures_of_captions_estimate_the_jaccard_similarity_of_their_characters():
    rng = np.random.default_rng(0)
    texts = [caption(rng) for _ in range(200)]
    texts += [edited(text, rng).lower().replace(",", "") for text in texts[:100]]
    found = signatures(texts, Shingles("chars", 5))
    pairs = [(n, 200 + n) for n in range(100)] + list(zip(range(199), range(1, 200), strict=True))
    wanted = np.array([jaccard(texts[a], texts[b], 5) for a, b in pairs])
    errors = np.array([(found[a] == found[b]).mean() for a, b in pairs]) - wanted
    assert np.abs(errors).max() < 4.5 * 0.5 / NUM_HASHES**0.5 and abs(errors.mean()) < 0.02
    assert (wanted[:100] > 0.5).mean() > 0.8 > (wanted[100:] > 0.5).mean() + 0.6


def test_bands_are_as_narrow_as_the_recall_asks():
    assert banding(0.8) == (16, 8)  # as it was before a threshold chose them
    for threshold in (0.1, 0.3, 0.5, 0.65, 0.7, 0.75, 0.9, 1.0):
        num_bands, size = banding(threshold)
        assert num_bands * size <= NUM_HASHES and 1 - (1 - threshold**size) ** num_bands >= 0.9
        wider = size + 1
        missed = 1 - (1 - threshold**wider) ** (NUM_HASHES // wider) < 0.9
        assert missed or size == near_copies.MAX_BAND_ROWS, threshold


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_candidates_follow_the_s_curve(threshold: float):
    rng, (num_bands, size) = np.random.default_rng(1), banding(threshold)
    count = 600
    for similarity in (0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
        agree_NP = rng.random((count, NUM_HASHES)) < similarity
        first_NP = rng.integers(2**32, size=(count, NUM_HASHES), dtype=np.uint32)
        second_NP = np.where(agree_NP, first_NP, rng.integers(2**32, size=agree_NP.shape, dtype=np.uint32))
        found = set()
        for bucket in candidates(np.concatenate([first_NP, second_NP]), np.arange(2 * count), threshold):
            together = set(bucket.tolist())
            found |= {row for row in together if row + count in together}
        wanted = 1 - (1 - similarity**size) ** num_bands
        assert len(found) / count == pytest.approx(wanted, abs=4 * (wanted * (1 - wanted) / count) ** 0.5 + 1e-3)


@pytest.mark.parametrize("threshold", [0.5, 0.7])
def test_clusters_of_captions_are_those_of_comparing_all(tmp_path: Path, threshold: float):
    rng = np.random.default_rng(2)
    texts = list(dict.fromkeys(caption(rng) for _ in range(200)))
    texts += [edited(text, rng) for text in texts[:80]]
    rows = read_rows(write_manifest(tmp_path, [{"text": text} for text in texts]))
    measures = [measure(row, signature=True, shingles="chars:5") for row in rows]
    found_NP = signatures(texts, Shingles("chars", 5))
    pairs = [(a, b) for a, b in combinations(range(len(texts)), 2) if (found_NP[a] == found_NP[b]).mean() >= threshold]
    slow = slow_clusters(pairs, len(texts))
    near = near_rows(measures, [True] * len(texts), threshold)
    assert near == sorted(near) and not set(near) - set(slow)
    assert len(near) > 60 and len(near) >= 0.97 * len(slow)  # a chain may hang on a pair that is no candidate
    keep = [row % 2 == 0 for row in range(len(texts))]
    assert not [row for row in near_rows(measures, keep, threshold) if not keep[row]]


def test_a_chain_is_one_cluster():
    texts = ["one two three four five six seven eight nine ten"]
    for word in ("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"):
        texts.append(" ".join([*texts[-1].split()[1:], word]))
    found = [{"signature": item.astype("<u4").tobytes().hex()} for item in signatures(texts, Shingles("words", 1))]
    ends = (np.frombuffer(bytes.fromhex(found[n]["signature"]), "<u4") for n in (0, -1))
    assert (next(ends) == next(ends)).mean() < 0.6
    assert near_rows(found, [True] * len(found), 0.6) == list(range(1, len(found)))
    assert near_rows(found, [True, True, True, False, False, False, True], 0.6) == [1, 2]


@pytest.mark.parametrize("changed", [0, 3])
def test_a_large_cluster_needs_few_comparisons(monkeypatch: pytest.MonkeyPatch, changed: int):
    """3,000 rows of one signature, or of such as differ in few of its hashes: each is looked at a few times a band."""
    rng, count, num_looked = np.random.default_rng(6), 3000, 0
    found_NP = np.repeat(rng.integers(2**32, size=(1, NUM_HASHES), dtype=np.uint32), count, axis=0)
    for _ in range(changed):
        found_NP[np.arange(count), rng.integers(NUM_HASHES, size=count)] = rng.integers(2**32, size=count)
    roots = near_copies._Clusters.roots

    def looked(self: near_copies._Clusters, rows: np.ndarray) -> np.ndarray:
        nonlocal num_looked
        num_looked += len(rows)
        return roots(self, rows)

    monkeypatch.setattr(near_copies._Clusters, "roots", looked)
    measures = [{"signature": row.astype("<u4").tobytes().hex()} for row in found_NP]
    assert near_rows(measures, [True] * count, 0.8) == list(range(1, count))
    assert num_looked < 100 * count


def test_equal_texts_are_copies_where_their_pictures_are(tmp_path: Path):
    """Equal signatures are put together at once, but only with equal pictures; near ones are still compared."""
    rng, rows = np.random.default_rng(7), []
    said = "a small red circle above a large blue square"
    for number in range(40):
        image = picture(rng)
        for copy in range(3):  # twice the same, once a noisy one
            name = f"{number}-{copy}.png"
            Image.fromarray(noisy(image, rng, 2) if copy == 2 else image).save(tmp_path / name)
            rows.append({"id": name, "text": said, "image": name})
    read = read_rows(write_manifest(tmp_path, rows))
    measures = [measure(row, signature=True, shingles="chars:5") for row in read]
    assert near_rows(measures, [True] * len(read), 0.5) == [row for row in range(len(rows)) if row % 3]


def test_equal_texts_are_no_copies_where_only_a_third_picture_is_like_theirs():
    drawn = np.random.default_rng(9).integers(2**32, size=(2, NUM_HASHES))
    one, other = (item.astype("<u4").tobytes().hex() for item in drawn)
    pictures = [f"image {bytes([level] * 3 * near_copies.THUMBNAIL_SIDE**2).hex()}" for level in (100, 103, 106)]

    def near(*said: str) -> list[int]:
        measures = [{"signature": text, "media": [shown]} for text, shown in zip(said, pictures, strict=True)]
        return near_rows(measures, [True] * 3, 0.8)

    assert near(one, other, one) == [] and near(one, one, one) == [1, 2] and near(one, one, other) == [1]


def test_by_default_captions_of_twelve_words_and_their_answers_are_compared(tmp_path: Path):
    """Runs of five words tell texts of twelve words or more, of whatever kind; shorter ones are compared exactly."""
    said = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
    Image.fromarray(picture(np.random.default_rng(8))).save(tmp_path / "a.png")
    asked = {"question": "which is the first?", "answer": "one"}
    rows = [
        {"id": "short", "text": " ".join(said[1:]), "image": "a.png"},
        {"id": "short-copy", "text": " ".join(said[1:]).upper(), "image": "a.png"},
        {"id": "long", "text": " ".join(said), "image": "a.png"},
        {"id": "long-copy", "text": " ".join(said).upper(), "image": "a.png"},
        {"id": "asked", "segments": [{"text": " ".join(said)}], **asked},
        {"id": "asked-copy", "segments": [{"text": " ".join(said).upper()}], **asked},
        {"id": "asked-else", "segments": [{"text": " ".join(said)}], "question": "what is behind ten?", "answer": "it"},
    ]
    read = read_rows(write_manifest(tmp_path, rows))
    kept, _ = choose(read, [measure(row, signature=True) for row in read], CleaningConfig("minhash"))
    assert [row.id for row in read if row not in kept] == ["long-copy", "asked-copy"]


def test_pictures_decide_whether_near_texts_are_copies(tmp_path: Path):
    """160 pictures, each with a noisy or re-encoded copy, under captions of which many are near."""
    rng = np.random.default_rng(3)
    rows = []
    for number in range(160):
        image, text = picture(rng), caption(rng)
        Image.fromarray(image).save(tmp_path / f"{number}.png")
        if number % 2:
            Image.fromarray(noisy(image, rng)).save(tmp_path / f"{number}-copy.png")
        else:
            Image.fromarray(noisy(image, rng, 2)).resize((64, 64)).save(tmp_path / f"{number}-copy.jpg", quality=88)
        rows.append({"id": f"{number}", "text": text, "image": f"{number}.png"})
        copy = f"{number}-copy.{'png' if number % 2 else 'jpg'}"
        other = caption(rng) if number % 8 == 0 else text.replace("a ", "the ")
        rows.append({"id": f"{number}-copy", "text": other, "image": copy})
    read = read_rows(write_manifest(tmp_path, rows))
    measures = [measure(row, signature=True, shingles="chars:5") for row in read]
    near = near_rows(measures, [True] * len(read), 0.5)
    thumbs = [thumbnail(row.image).astype(float) for row in read if row.image is not None]
    found_NP = signatures([row.text for row in read], Shingles("chars", 5))
    pairs = [
        (a, b) for a, b in combinations(range(len(read)), 2)
        if ((thumbs[a] - thumbs[b]) ** 2).mean() ** 0.5 <= near_copies.THUMBNAIL_RMS
        and (found_NP[a] == found_NP[b]).mean() >= 0.5
    ]  # fmt: skip
    assert near == slow_clusters(pairs, len(read))
    copies = [2 * number + 1 for number in range(160) if number % 8]
    assert set(copies) <= set(near) and len(near) < len(copies) + 5
    texts_alone = [{**found, "media": []} for found in measures]
    assert len(near_rows(texts_alone, [True] * len(read), 0.5)) > len(near) + 50  # what pictures told apart


def test_sounds_and_several_pictures_must_all_be_the_same(tmp_path: Path):
    rng = np.random.default_rng(4)
    for name in ("a", "b"):
        image = picture(rng)
        Image.fromarray(image).save(tmp_path / f"{name}.png")
        Image.fromarray(noisy(image, rng, 2)).save(tmp_path / f"{name}2.png")
        write_sound(tmp_path / f"{name}.wav", rng)
    (tmp_path / "copy.wav").write_bytes((tmp_path / "a.wav").read_bytes())
    said = "a small red circle above a large blue square"
    asked = {"question": "what is above?", "answer": "a circle"}

    def document(*names: str, **more: str) -> dict:
        return {"segments": [{"text": said}, *({"image": f"{name}.png"} for name in names)], **more}

    rows = [
        {"id": "1", "text": said, "audio": "a.wav"},
        {"id": "2", "text": said.title(), "audio": "copy.wav"},
        {"id": "3", "text": said.upper(), "audio": "b.wav"},
        {"id": "4", **document("a", "b")},
        {"id": "5", **document("a2", "b2")},
        {"id": "6", **document("b2", "a2")},
        {"id": "7", **document("a2")},
        {"id": "8", **document("a", "b", **asked)},
        {"id": "9", **document("a2", "b2", question="how large is what is below?", answer="large")},
        {"id": "10", "text": said, "image": "a.png"},
        {"id": "11", "text": said + "!", "image": "a2.png"},
        {"id": "12", "text": said},
    ]
    read = read_rows(write_manifest(tmp_path, rows))
    config = CleaningConfig("minhash", 0.8, shingles="chars:5")
    kept, counts = choose(read, [measure(row, signature=True, shingles="chars:5") for row in read], config)
    assert [row.id for row in read if row not in kept] == ["2", "5", "11"]
    assert counts == {"quality": 0, "exact": 0, "near": 3}


def test_build_takes_shingles_and_names_pictures_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rng = np.random.default_rng(5)
    make_folder(tmp_path / "tok")
    rows = []
    for number in range(40):
        Image.fromarray(picture(rng)).save(tmp_path / f"{number}.png")
        rows.append({"id": f"{number}", "text": caption(rng), "image": f"{number}.png"})
    (tmp_path / "3.png").write_bytes(b"no picture")
    rows.append({**rows[7], "id": "copy", "text": rows[7]["text"].upper()})
    manifest = write_manifest(tmp_path, rows)
    command = ["data", "build", str(manifest), "--out", str(tmp_path / "s"), "--dedup", "minhash"]
    assert main([*command, "--dedup_shingles", "chars:5"]) == 0
    assert '"near": 1' in capsys.readouterr().out
    told = commands.build(manifest, tmp_path / "s", cleaning=CleaningConfig("minhash", shingles="chars:5"))
    assert told["num_samples"] == 39 and len(told["bad"]) == 1 and "3.png" in str(told["bad"])
    assert commands.build(manifest, tmp_path / "s", cleaning=CleaningConfig("minhash"))["num_samples"] == 40
    assert main([*command, "--dedup_shingles", "5"]) == 2 and "give words:N" in capsys.readouterr().err
