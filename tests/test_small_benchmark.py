"""`benchmarks/small.py`: what it runs, writes and resumes, and the p-values of its comparisons."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its files import each other, as scripts do

import small  # noqa: E402
import small_cases  # noqa: E402
import small_compare  # noqa: E402
from small_cases import GIVEN_SPEAKERS, MEAN, OTHER_SPEAKERS, SKIN_TONES  # noqa: E402

KEYS = {"name", "measure", "seed", "score", "interval", "minutes"}


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of small sets; the media are empty, since nothing here reads them."""
    folder = tmp_path / "sets"
    speakers = [f"{digit}_{speaker}" for digit in range(3) for speaker in (*GIVEN_SPEAKERS, *OTHER_SPEAKERS)]
    drawings = [f"emoji_u{base}{f'_{tone}' if tone else ''}" for base in ("1f44a", "1f44b") for tone in
                (*SKIN_TONES, "")]  # fmt: skip
    rows = {
        "fsdd": [{"id": name, "audio": f"{name}.wav", "text": "one", "speaker": name[2:]} for name in speakers],
        "cifar10": [{"id": f"photo{i}", "image": f"{i}.jpg", "text": "a photo"} for i in range(60)],
        "emoji": [{"id": name, "image": f"{name}.png", "text": name} for name in drawings],
        "shakespeare": [{"id": f"play{i}", "text": f"Row {i} says that {i} and {i} make {2 * i}."} for i in range(60)],
    }
    for name, of_set in rows.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    monkeypatch.setenv("MMLLM_DATA", str(folder))
    return folder


def parts(options: list[str]) -> tuple[list[dict], list[dict]]:
    """The rows that a run trains and tests on."""
    assert options[::2] == ["--train", "--test"]
    train, test = ([json.loads(line) for line in Path(path).read_text().splitlines()] for path in options[1::2])
    assert train and test and not {row["id"] for row in train} & {row["id"] for row in test}
    return train, test


# ---------------------------------------------------------------------------------------------------- what is held out
def test_a_fold_for_each_speaker_that_is_there(sets: Path, tmp_path: Path):
    found, left_out = small_cases.cases("fsdd")
    assert [case.part for case in found] == [*GIVEN_SPEAKERS, *OTHER_SPEAKERS] and not left_out
    for case in found:
        train, test = parts(case.rows(tmp_path / case.part))
        assert {row["speaker"] for row in test} == {case.part}
        assert {row["speaker"] for row in train} == set(GIVEN_SPEAKERS) - {case.part}, "who judges is never trained on"
        assert all(row["audio"].startswith(str(sets)) for row in train)
    manifest = sets / "fsdd" / "manifest.jsonl"
    kept = [line for line in manifest.read_text().splitlines() if json.loads(line)["speaker"] in GIVEN_SPEAKERS]
    manifest.write_text("\n".join(kept))
    found, left_out = small_cases.cases("fsdd")
    assert [case.part for case in found] == list(GIVEN_SPEAKERS)
    assert left_out == [f"fsdd: no rows of {name} in MMLLM_DATA, so that fold is left out" for name in OTHER_SPEAKERS]


def test_photos_and_tones_are_held_out(sets: Path, tmp_path: Path):
    (photos,), _ = small_cases.cases("cifar10")
    train, test = parts(photos.rows(tmp_path))
    assert len(train) + len(test) == 60 and 2 <= len(test) <= 14
    (drawings,), _ = small_cases.cases("emoji")
    train, test = parts(drawings.rows(tmp_path))
    assert len(train) == 10 and len(test) == 2, "one tone of each drawing; the plain one is trained on"


def test_every_name_has_its_minutes(sets: Path):
    minutes = {name: {case.minutes for case in small_cases.cases(name)[0]} for name in small.NAMES}
    assert minutes == {"demo": {None}, "quick": {3.0}} | {name: {10.0} for name in
                                                          ("fsdd", "cifar10", "emoji", "shakespeare")}  # fmt: skip
    assert [case.slug for case in small_cases.cases("quick")[0]] == [
        "quick-fsdd", "quick-cifar10", "quick-emoji", "quick-shakespeare",
    ]  # fmt: skip


def test_rows_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MMLLM_DATA", raising=False)
    with pytest.raises(SystemExit, match="MMLLM_DATA is None"):
        small_cases.cases("fsdd")
    monkeypatch.setenv("MMLLM_DATA", str(tmp_path))
    with pytest.raises(SystemExit, match=r"fsdd/manifest\.jsonl is not there"):
        small_cases.cases("fsdd")


# ------------------------------------------------------------------------------------------------- running, writing
REPORT = {
    "transcribe": {"wer": 0.25, "wer_ci": [0.2, 0.35], "n": 3},
    "speak": {"round_trip_wer": 0.5, "round_trip_wer_ci": [0.4, 0.6]},
    "train": {"seconds": 90.0, "peak_rss_bytes": 3e9},
}


class FakeQuickstart:
    """Stands for the processes: writes what a run would, and notes the commands."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.fails: set[str] = set()
        self.wer = {speaker: 0.25 for speaker in GIVEN_SPEAKERS}

    def __call__(self, command: list[str], check: bool) -> SimpleNamespace:
        self.commands.append(command[3:])
        out = Path(command[command.index("--out") + 1])
        speaker = out.parent.name.split("-")[1]
        if speaker in self.fails:
            return SimpleNamespace(returncode=2)
        (out / "eval").mkdir(parents=True)
        report = {**REPORT, "transcribe": {**REPORT["transcribe"], "wer": self.wer.get(speaker, 0.25)}}
        (out / "report.json").write_text(json.dumps(report))
        predictions = [{"id": f"{i}", "group": "test", "score": i / 2, "correct": i == 2} for i in range(3)]
        predictions.append({"id": "x", "group": "heldout_voices", "score": 0.0, "correct": False})
        (out / "eval" / "transcribe.json").write_text(json.dumps({"predictions": predictions}))
        return SimpleNamespace(returncode=0)


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> FakeQuickstart:
    fake = FakeQuickstart()
    monkeypatch.setattr(small.subprocess, "run", fake)
    monkeypatch.setattr(small, "commit", lambda: "c0ffee")
    return fake


def go(folder: Path, *options: str, file: str = "f.json") -> list[dict[str, Any]]:
    small.main(["--json", str(folder / file), "--work", str(folder / f"work of {file}"), *options])
    return json.loads((folder / file).read_text())


def test_rows_have_their_form_and_folds_their_mean(sets: Path, tmp_path: Path, quickstart: FakeQuickstart, capsys):
    quickstart.wer |= {"lucas": 0.65}
    rows = go(tmp_path, "--only", "fsdd", "--seeds", "0,1")
    assert all(row.keys() == KEYS for row in rows)
    assert len(quickstart.commands) == 12, "six folds of two seeds"
    command = quickstart.commands[0]
    assert command[command.index("--minutes") + 1] == "10" and command[command.index("--seed") + 1] == "0"
    found = {(row["measure"], row["seed"]): row for row in rows}
    george = found["george: word_accuracy", 0]
    assert george == {"name": "fsdd", "measure": "george: word_accuracy", "seed": 0, "score": 0.75,
                      "interval": [0.65, 0.8], "minutes": 1.5}  # fmt: skip
    mean = found[f"{MEAN}: word_accuracy", 1]
    assert mean["score"] == pytest.approx((3 * 0.75 + 0.35) / 4) and mean["minutes"] == 6.0
    assert mean["interval"][1] - mean["interval"][0] == pytest.approx(0.15 / 2), "four independent folds"
    assert found["theo: word_accuracy", 1]["score"] == 0.75
    assert small.outcomes_of(tmp_path / "f.json")["fsdd", "george: word_accuracy", 0] == {"0": 0.0, "1": 0.5, "2": 1.0}
    assert "fsdd         george: word_accuracy" in capsys.readouterr().out


def test_what_is_done_is_not_run_again_and_what_failed_is(sets: Path, tmp_path: Path, quickstart: FakeQuickstart):
    quickstart.fails = {"jackson"}
    with pytest.raises(SystemExit, match="1 runs failed: fsdd-jackson, seed 0"):
        go(tmp_path, "--only", "fsdd", "--seeds", "0")
    rows = json.loads((tmp_path / "f.json").read_text())
    assert not [row for row in rows if row["measure"].startswith(("jackson", MEAN))]
    quickstart.fails, quickstart.commands = set(), []
    rows = go(tmp_path, "--only", "fsdd", "--seeds", "0")
    assert len(quickstart.commands) == 1 and "fsdd-jackson-seed0/run" in " ".join(quickstart.commands[0])
    assert sum(row["measure"].startswith(MEAN) for row in rows) == 2
    quickstart.commands = []
    assert go(tmp_path, "--only", "fsdd", "--seeds", "0") == rows and not quickstart.commands
    go(tmp_path, "--only", "fsdd", "--seeds", "0,1")
    assert len(quickstart.commands) == 6, "the other seed alone"


def test_a_run_that_other_code_began_is_refused(sets: Path, tmp_path: Path, quickstart: FakeQuickstart, monkeypatch):
    monkeypatch.setattr(small, "commit", lambda: "abc")
    quickstart.fails = {"jackson"}
    with pytest.raises(SystemExit, match="runs failed"):
        go(tmp_path, "--only", "fsdd", "--seeds", "0")
    held = json.loads((tmp_path / "f.json.rows" / "fsdd-george-seed0.json").read_text())
    assert held["commit"] == "abc"
    monkeypatch.setattr(small, "commit", lambda: "def")
    quickstart.fails = set()
    with pytest.raises(SystemExit, match=r"fsdd-jackson-seed0 was begun by commit abc, and this is def; give another"):
        go(tmp_path, "--only", "fsdd", "--seeds", "0")


def test_each_file_has_its_own_runs(sets: Path, tmp_path: Path, quickstart: FakeQuickstart):
    small.main(["--json", str(tmp_path / "g.json"), "--only", "fsdd", "--seeds", "0"])
    out = quickstart.commands[0][quickstart.commands[0].index("--out") + 1]
    assert Path(out) == tmp_path / "g.json.runs" / "fsdd-george-seed0" / "run"


def test_a_try_out_is_never_mixed_with_runs(sets: Path, tmp_path: Path, quickstart: FakeQuickstart):
    rows = go(tmp_path, "--only", "fsdd", "--seeds", "0", "--max_steps", "2")
    assert {row["max_steps"] for row in rows} == {2} and "--minutes" not in quickstart.commands[0]
    with pytest.raises(SystemExit, match="holds rows with --max_steps 2, not None"):
        go(tmp_path, "--only", "fsdd", "--seeds", "0")
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(SystemExit, match=r"other\.json holds no rows of small\.py"):
        go(tmp_path, file="other.json")


def test_a_try_out_of_plays_goes_the_whole_way(sets: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """The process, its report and the rows, for real."""
    (row,) = go(tmp_path, "--only", "shakespeare", "--seeds", "3", "--max_steps", "1")
    assert (row["name"], row["measure"], row["seed"]) == ("shakespeare", "text.bits_per_byte", 3)
    assert row["interval"][0] < row["score"] < row["interval"][1] and row["minutes"] > 0
    scored = small.outcomes_of(tmp_path / "f.json")["shakespeare", "text.bits_per_byte", 3]
    assert len(scored) >= 4 and all(value < 0 for value in scored.values())
    assert "$ mmllm quickstart --train" in capfd.readouterr().out


def test_the_demo_is_read_for_every_measure_that_its_report_has():
    assert len({measure.label for measure in small_cases.DEMO_MEASURES}) == len(small_cases.DEMO_MEASURES)
    report = {"train": {"seconds": 930.0, "peak_rss_bytes": 3.5e9}, "caption": {"exact_match": 0.6}}
    read = {measure.label: measure.read(report) for measure in small_cases.DEMO_MEASURES}
    assert read["minutes"] == (pytest.approx(15.5), None) and read["peak_gb"] == (pytest.approx(3.5), None)
    assert read["caption.exact_match"] == (0.6, None) and read["speak.judge_wer"] is None


# -------------------------------------------------------------------------------------------------------- comparing
@pytest.mark.parametrize(
    ("t", "freedom", "p"),
    [(12.706, 1, 0.05), (4.303, 2, 0.05), (3.182, 3, 0.05), (2.776, 4, 0.05), (2.571, 5, 0.05), (2.228, 10, 0.05),
     (9.925, 2, 0.01), (4.604, 4, 0.01), (3.499, 7, 0.01), (0.0, 3, 1.0)],
)  # fmt: skip
def test_students_distribution_is_that_of_the_tables(t: float, freedom: int, p: float):
    assert small_compare.student_two_sided(t, freedom) == pytest.approx(p, rel=2e-3)
    assert small_compare.student_two_sided(-t, freedom) == small_compare.student_two_sided(t, freedom)


def test_flipping_signs_agrees_with_all_flips():
    differences = np.array([0.5, -0.2, 1.0, 0.7, 0.0, 0.3, -0.1, 0.9, 0.4])
    flips = np.array(list(itertools.product((1, -1), repeat=9))) @ differences
    exact = float((np.abs(flips) >= abs(differences.sum()) - 1e-9).mean())
    assert small_compare.sign_flip_test(differences) == pytest.approx(exact, abs=0.005)
    assert small_compare.sign_flip_test(np.zeros(4)) == 1.0
    assert small_compare.sign_flip_test(np.ones(40)) == pytest.approx(1 / 20_001)


def rows_of(scores: dict[str, list[float]]) -> list[dict[str, Any]]:
    return [{"name": "demo", "measure": measure, "seed": seed, "score": score, "interval": None, "minutes": 1.0}
            for measure, values in scores.items() for seed, score in enumerate(values)]  # fmt: skip


def test_files_are_paired_by_seed_and_by_row():
    first = rows_of({"caption.exact_match": [0.50, 0.60, 0.55], "transcribe.wer": [0.1, 0.2], "gone": [1.0]})
    second = rows_of({"caption.exact_match": [0.58, 0.69, 0.62, 0.9], "transcribe.wer": [0.2, 0.1]})
    old = {("demo", "caption.exact_match", seed): {f"row{i}": 0.0 for i in range(30)} for seed in range(3)}
    new = {key: {f"row{i}": float(i < 20) for i in range(25)} for key in old}
    exact, wer = small_compare.compare(first, second, {"transcribe.wer"}, (old, new))
    differences = np.array([0.08, 0.09, 0.07])
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(3))
    assert exact.seeds == (0, 1, 2) and exact.difference == pytest.approx(0.08)
    assert exact.p_seeds == pytest.approx(small_compare.student_two_sided(t, 2)) and exact.p_seeds < 0.01
    assert exact.num_rows == 25 and exact.p_rows is not None and exact.p_rows < 0.001
    assert exact.verdict == "better"
    assert wer.difference == pytest.approx(0) and wer.p_rows is None and wer.p_seeds == pytest.approx(1)
    worse = small_compare.compare(rows_of({"transcribe.wer": [0.1]}), rows_of({"transcribe.wer": [0.3]}),
                                  {"transcribe.wer"})  # fmt: skip
    assert worse[0].verdict == "worse, unproved" and worse[0].p_seeds is None
    lines = small_compare.table([exact, wer])
    assert "+0.0800" in lines[1] and lines[1].endswith("better")


def test_files_are_compared_from_the_command_line(sets: Path, tmp_path: Path, quickstart: FakeQuickstart, capsys):
    go(tmp_path, "--only", "fsdd", "--seeds", "0,1", file="a.json")
    quickstart.wer = dict.fromkeys(GIVEN_SPEAKERS, 0.15)
    go(tmp_path, "--only", "fsdd", "--seeds", "0,1", file="b.json")
    capsys.readouterr()
    small.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    line = next(line for line in capsys.readouterr().out.splitlines() if f"{MEAN}: word_accuracy" in line)
    assert "+0.1000" in line and line.endswith("better, unproved"), "seeds that differ alike tell no spread"
    with pytest.raises(SystemExit, match=r"c\.json: no such file"):
        small.main(["--compare", str(tmp_path / "a.json"), str(tmp_path / "c.json")])
