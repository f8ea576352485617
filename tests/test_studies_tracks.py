"""The scoreboard's tracks: fixed rows and their digest, scores of models, the baseline's run, and claims."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import wave
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.checkpoints.folder import save_model
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.cli import study as study_cli
from mmllm.cli.main import main
from mmllm.evaluation.commands import run_eval
from mmllm.studies import tracks_score
from mmllm.studies.tracks import TRACKS, VOICES, TrackSizes, rows_digest, track_of, write_rows
from mmllm.studies.tracks_compare import compare_files
from mmllm.studies.tracks_score import check_sense, score_track, weights_digest
from mmllm_tokenizers.aligner import Aligner, AlignerConfig, AlignerNetwork
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import make_model, make_tokenizer
from tests.rows_fixtures import sound_bytes

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))  # its files import each other, as scripts do

import small_cases

SIZES = TrackSizes(pictures=6, words=2, phrases=2, sentences=3, spoken=3, test_pictures=4, test_sentences=5)
SCORE_KEYS = {"track", "measure", "score", "interval", "seed", "minutes", "rows", "rows_sha256", "commit", "machine",
              "date"}  # fmt: skip


@pytest.fixture
def sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Small stand-ins of the sets, in a folder that MMLLM_DATA names."""
    folder = tmp_path / "sets"
    speakers = (*small_cases.GIVEN_SPEAKERS, *small_cases.OTHER_SPEAKERS)
    names = [f"{digit}_{speaker}" for digit in range(2) for speaker in speakers]
    rows = {
        "fsdd": [{"id": name, "audio": f"{name}.wav", "text": "one", "speaker": name[2:]} for name in names],
        "shakespeare": [{"id": f"d{i}", "text": f"Row {i} says that {i} and {i} make {2 * i}."} for i in range(23)],
    }
    for name, of_set in rows.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_set))
    for number, name in enumerate(names):
        (folder / "fsdd" / f"{name}.wav").write_bytes(sound_bytes(number, "WAV"))
    monkeypatch.setenv("MMLLM_DATA", str(folder))
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with all senses."""
    folder = tmp_path_factory.mktemp("tracks") / "model"
    tokenizer = make_tokenizer(pointer=PointerRule())
    save_model(folder, make_model(tokenizer), tokenizer, generation=GenerationConfig(max_seconds=0.2))
    return folder


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------------------------------------------------------- rows
def test_the_command_knows_every_track():
    assert tuple(TRACKS) == study_cli._TRACKS
    with pytest.raises(ValueError, match="track is 'chess'; choose one of scenes, speech, fsdd, shakespeare"):
        track_of("chess")


def test_made_rows_are_the_same_wherever_they_lie(tmp_path: Path):
    first = write_rows(track_of("scenes"), tmp_path / "a", SIZES)
    assert first == write_rows(track_of("scenes"), tmp_path / "b", SIZES)
    assert (first["train"], first["test"]) == (12, 4)
    assert first == write_rows(track_of("scenes"), tmp_path / "a", SIZES), "what is there is taken"
    shutil.move(tmp_path / "a", tmp_path / "c")
    assert rows_digest(tmp_path / "c" / "rows") == first["rows_sha256"]
    assert not (tmp_path / "b" / "rows" / "heldout.jsonl").exists()


def test_any_change_of_rows_changes_their_digest(tmp_path: Path):
    digests = set()
    for number, change in enumerate((None, _swap_rows, _change_caption, _change_picture, _move_row)):
        folder = tmp_path / str(number)
        write_rows(track_of("scenes"), folder, SIZES)
        if change is not None:
            change(folder / "rows")
            with pytest.raises(ValueError, match="have changed since they were written"):
                write_rows(track_of("scenes"), folder, SIZES)
        digests.add(rows_digest(folder / "rows"))
    assert len(digests) == 5


def _swap_rows(folder: Path) -> None:
    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join(reversed(lines)) + "\n")


def _change_caption(folder: Path) -> None:
    text = (folder / "train.jsonl").read_text()
    (folder / "train.jsonl").write_text(text.replace('"text": "', '"text": "x', 1))


def _change_picture(folder: Path) -> None:
    picture = next((folder / "images" / "test").iterdir())
    picture.write_bytes(picture.read_bytes()[:-1] + b"\0")


def _move_row(folder: Path) -> None:
    lines = (folder / "test.jsonl").read_text().splitlines()
    (folder / "test.jsonl").write_text("\n".join(lines[1:]) + "\n")
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + lines[0] + "\n")


def test_speech_is_tested_in_the_voices_that_it_learns_to_speak_with(tmp_path: Path):
    pytest.importorskip("espeakng_loader", reason="needs the espeakng-loader wheel: pip install 'mmllm[speech]'")
    about = write_rows(track_of("speech"), tmp_path, SIZES)
    assert (about["train"], about["test"]) == (10, 5)
    train, test = read(tmp_path / "rows" / "train.jsonl"), read(tmp_path / "rows" / "test.jsonl")
    assert [row["speaker"] for row in test] == [*VOICES, VOICES[0]]
    assert {row["speaker"] for row in train if row.get("spoken_only")} <= set(VOICES)
    assert not {row["text"] for row in train} & {row["text"] for row in test}


def test_fsdd_has_the_rows_of_the_benchmark(sets: Path, tmp_path: Path):
    write_rows(track_of("fsdd"), tmp_path / "track")
    case = next(case for case in small_cases.cases("fsdd")[0] if case.part == "george")
    case.rows(tmp_path / "small")
    for split in ("train", "test"):
        name = f"{split}.jsonl"
        assert (tmp_path / "track" / "rows" / name).read_text() == (tmp_path / "small" / name).read_text()
    assert len(read(tmp_path / "track" / "rows" / "test.jsonl")) == 2


def test_the_plays_end_is_tested_on(sets: Path, tmp_path: Path):
    write_rows(track_of("shakespeare"), tmp_path)
    assert [row["id"] for row in read(tmp_path / "rows" / "test.jsonl")] == ["d21", "d22"]
    assert len(read(tmp_path / "rows" / "train.jsonl")) == 21


def test_rows_that_are_not_to_be_had_are_named(sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_rows(track_of("fsdd"), tmp_path / "fsdd")
    with pytest.raises(ValueError, match="holds the rows of the track fsdd, not scenes"):
        write_rows(track_of("scenes"), tmp_path / "fsdd", SIZES)
    (sets / "fsdd" / "0_lucas.wav").unlink()
    with pytest.raises(ValueError, match=r"0_lucas.wav can't be read"):
        write_rows(track_of("fsdd"), tmp_path / "other")
    (sets / "shakespeare" / "manifest.jsonl").write_text('{"id": "d0", "text": "Alone."}\n')
    with pytest.raises(ValueError, match="too few rows of shakespeare: none to test on"):
        write_rows(track_of("shakespeare"), tmp_path / "plays")
    assert not (tmp_path / "plays" / "rows").exists()
    monkeypatch.setenv("MMLLM_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="MMLLM_DATA must name the folder that holds shakespeare/"):
        write_rows(track_of("shakespeare"), tmp_path / "plays")
    monkeypatch.delenv("MMLLM_DATA")
    with pytest.raises(ValueError, match=r"MMLLM_DATA is None; the track fsdd .*makes its rows \(scenes, speech\)"):
        write_rows(track_of("fsdd"), tmp_path / "other")


# -------------------------------------------------------------------------------------------------------------- scores
def test_a_models_score_is_that_of_eval(tiny: Path, tmp_path: Path):
    out = tmp_path / "score"
    lines = list(score_track("scenes", out, str(tiny), seed=3, minutes=9.5, sizes=SIZES))
    values = json.loads((out / "score.json").read_text())
    assert set(values) >= SCORE_KEYS and list(values)[:4] == ["track", "measure", "score", "interval"]
    wanted = run_eval(str(tiny), "caption", str(out / "rows" / "test.jsonl")).scores
    assert (values["score"], values["interval"]) == (wanted["exact_match"], list(wanted["exact_match_ci"]))
    assert values["also"][0]["score"] == wanted["attribute_accuracy"]
    assert (values["track"], values["measure"], values["rows"]) == ("scenes", "caption.exact_match", 4)
    assert (values["seed"], values["minutes"], values["is_baseline"]) == (3, 9.5, False)
    assert values["rows_sha256"] == rows_digest(out / "rows")
    assert values["model_sha256"] == weights_digest(tiny) and values["judge_sha256"] is None
    assert any(line.startswith("caption.exact_match") for line in lines)
    list(score_track("scenes", out, str(tiny), seed=3, minutes=9.5, sizes=SIZES))  # the same again
    with pytest.raises(ValueError, match="holds the score of another model with the seed 3"):
        list(score_track("scenes", out, str(tiny), seed=4, sizes=SIZES))


def test_speech_is_written_down_by_a_judge_and_by_the_model(tiny: Path, tmp_path: Path):
    pytest.importorskip("espeakng_loader", reason="needs the espeakng-loader wheel: pip install 'mmllm[speech]'")
    torch.manual_seed(0)
    judge = Aligner(AlignerNetwork(AlignerConfig("abcdefghijklmnopqrstuvwxyz ", width=16, depth=1)))
    judge.save(tmp_path / "judge")
    list(score_track("speech", tmp_path / "score", str(tiny), judge=str(tmp_path / "judge"), sizes=SIZES))
    values = json.loads((tmp_path / "score" / "score.json").read_text())
    test = str(tmp_path / "score" / "rows" / "test.jsonl")
    wanted = run_eval(
        str(tiny), "speak", test, judge=str(tmp_path / "judge"), media_dir=str(tmp_path / "said")
    ).scores  # fmt: skip
    assert (values["measure"], values["score"]) == ("speak.judge_wer", wanted["judge_wer"])
    assert [each["measure"] for each in values["also"]] == ["speak.round_trip_wer"]
    assert values["also"][0]["score"] == wanted["round_trip_wer"]
    assert values["judge_sha256"] == weights_digest(tmp_path / "judge")
    assert values["lower_is_better"] and values["seed"] is None and values["minutes"] is None
    assert len(list((tmp_path / "score" / "eval" / "spoken").glob("*.wav"))) == 5


def test_a_score_is_of_every_row(tiny: Path, sets: Path, tmp_path: Path):
    """A recording that can't be read is no reason to score the others alone."""
    write_rows(track_of("fsdd"), tmp_path)
    (sets / "fsdd" / "0_george.wav").write_bytes(b"no sound")
    about = json.loads((tmp_path / "rows" / "rows.json").read_text())
    about["rows_sha256"] = rows_digest(tmp_path / "rows")
    (tmp_path / "rows" / "rows.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match="0_george"):
        list(score_track("fsdd", tmp_path, str(tiny)))


def test_models_without_the_sense_and_contradictions_are_named(tiny: Path, tmp_path: Path):
    tokenizer = make_tokenizer()
    save_model(tmp_path / "blind", make_model(tokenizer, sight=False), tokenizer)
    with pytest.raises(ValueError, match=r"blind has no vision, which the track scenes needs"):
        check_sense(track_of("scenes"), tmp_path / "blind")
    check_sense(track_of("shakespeare"), tmp_path / "blind")
    score = ["study", "score", "scenes", "--out", str(tmp_path / "out")]
    assert main([*score, "--model", str(tmp_path / "blind")]) == 2
    assert not (tmp_path / "out").exists(), "said before anything is written"
    for options in (["--model", str(tmp_path / "nothing")], ["--judge", str(tiny)], ["--minutes", "-1"],
                    ["--model", str(tiny), "--max_steps", "2"], ["--rows_only", "--seed", "1"]):  # fmt: skip
        assert main([*score, *options]) == 2
    assert main(["study", "score", "chess", "--out", str(tmp_path)]) == 2
    assert not (tmp_path / "out").exists()


class Quickstart:
    """In the place of the baseline's process: it leaves what quickstart leaves."""

    def __init__(self, model: Path) -> None:
        self.model, self.code = model, 0
        self.commands: list[list[str]] = []
        self.cores: list[int] = []

    def __call__(self, command: list[str], num_threads: int) -> int:
        self.commands.append(command)
        self.cores.append(num_threads)
        if hasattr(os, "sched_getaffinity"):
            assert len(os.sched_getaffinity(0)) <= 2
        run = Path(command[command.index("--out") + 1])
        run.mkdir(exist_ok=True)
        if self.code == 0:
            (run / "report.json").write_text(json.dumps({"train": {"seconds": 606.0}}))
            shutil.copytree(self.model, run / "model", dirs_exist_ok=True)
        return self.code


@pytest.fixture
def quickstart(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Quickstart:
    stub = Quickstart(tiny)

    class Processes:
        def run(self, command: list[str], num_threads: int) -> int:
            return stub(command, num_threads)

        def end_all(self) -> None:
            pass

    monkeypatch.setattr(tracks_score, "Processes", Processes)
    return stub


def test_the_baseline_is_quickstart_on_two_cores(quickstart: Quickstart, tmp_path: Path):
    lines = list(score_track("scenes", tmp_path, seed=2, sizes=SIZES))
    rows = tmp_path / "rows"
    command = ["quickstart", "--train", str(rows / "train.jsonl"), "--test", str(rows / "test.jsonl"), "--seed", "2",
               "--out", str(tmp_path / "run"), "--minutes", "10"]  # fmt: skip
    assert quickstart.commands == [command] and f"$ mmllm {' '.join(command)}" in lines
    values = json.loads((tmp_path / "score.json").read_text())
    assert (values["seed"], values["minutes"], values["is_baseline"]) == (2, 10.1, True)
    assert values["machine"]["training_cores"] == quickstart.cores[0] <= 2 and values["max_steps"] is None


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no bound of a process's cores")
def test_cores_are_bounded_for_the_training_alone():
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), tracks_score._cores(1) as cores:
        assert cores == len(os.sched_getaffinity(0)) == 1
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


def test_a_run_goes_on_with_the_code_that_began_it(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracks_score, "commit", lambda: "aaa")
    quickstart.code = 2
    with pytest.raises(ValueError, match="the baseline's run failed"):
        list(score_track("scenes", tmp_path, sizes=SIZES))
    monkeypatch.setattr(tracks_score, "commit", lambda: "bbb")
    with pytest.raises(ValueError, match="was begun by commit aaa, and this is bbb"):
        list(score_track("scenes", tmp_path, sizes=SIZES))
    monkeypatch.setattr(tracks_score, "commit", lambda: "aaa")
    quickstart.code = 0
    list(score_track("scenes", tmp_path, max_steps=2, sizes=SIZES))
    assert quickstart.commands[-1][-2:] == ["--max_steps", "2"] and "--seed" in quickstart.commands[-1]
    assert json.loads((tmp_path / "score.json").read_text())["max_steps"] == 2
    quickstart.code = 130
    with pytest.raises(KeyboardInterrupt):
        list(score_track("scenes", tmp_path, sizes=SIZES))


def test_the_judge_is_trained_on_what_the_track_trains_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    command = tracks_score.judge_command(tmp_path, 7)
    assert command[:3] == ["data", "align", str(tmp_path / "rows" / "train.jsonl")]
    assert command[-4:] == ["--steps", "7", "--seed", "0"]
    calls: list[int] = []

    def call(command: list[str], num_threads: int, failed: str) -> None:
        calls.append(num_threads)
        (Path(command[command.index("--out") + 1]) / "aligner").mkdir(parents=True)

    monkeypatch.setattr(tracks_score, "_call", call)
    for _ in range(2):
        assert tracks_score._judge(tmp_path, command) == tmp_path / "judge" / "aligner"
    assert calls == [1], "one thread, so that it is the same each time; and once"


# -------------------------------------------------------------------------------------------------------------- claims
BASE: dict[str, Any] = {
    "track": "speech", "measure": "speak.judge_wer", "interval": [0, 1], "lower_is_better": True, "minutes": 9.9,
    "rows": 252, "rows_sha256": "r", "judge_sha256": "j", "max_steps": None, "machine": {"processor": "cpu"},
}  # fmt: skip


def write_scores(folder: Path, scores: dict[int, float], **keys: Any) -> list[Path]:
    folder.mkdir(exist_ok=True)
    files = []
    for seed, score in scores.items():
        also = [{"measure": "speak.round_trip_wer", "score": 1 - score, "interval": [0, 1], "lower_is_better": True}]
        values = {**BASE, "score": score, "seed": seed, "also": also, "model_sha256": f"{folder.name}{seed}", **keys}
        files.append(folder / f"{seed}.json")
        files[-1].write_text(json.dumps(values))
    return files


@pytest.mark.parametrize(
    ("scores", "others", "keys", "verdict", "why"),
    [
        ([0.10, 0.12, 0.11], [0.20, 0.21, 0.22], {}, "better", None),
        ([0.20, 0.21, 0.22], [0.10, 0.12, 0.11], {}, "worse", None),
        ([0.20, 0.21, 0.22], [0.10, 0.12, 0.11], {"lower_is_better": False}, "better", None),
        ([0.10, 0.30, 0.11], [0.20, 0.21, 0.22], {}, "unproved", "p is 0."),
        ([0.10, 0.12], [0.20, 0.21], {}, "unproved", "2 seeds on both sides, and a claim needs 3"),
        ([0.1], [0.2], {}, "unproved", "1 seed on both sides"),
        ([0.5, 0.5, 0.5], [0.75, 0.75, 0.75], {}, "unproved", "have no spread"),
        ([0.10, 0.12, 0.11], [0.20, 0.21, 0.22], {"minutes": 12}, "unproved", "took 12 minutes, and a track has 10"),
        ([0.10, 0.12, 0.11], [0.20, 0.21, 0.22], {"minutes": None}, "unproved", "how long a model was trained"),
        ([0.10, 0.12, 0.11], [0.20, 0.21, 0.22], {"max_steps": 3}, "unproved", "try-out"),
    ],
)
def test_a_claim_needs_three_seeds_and_p_below_five_percent(
    tmp_path: Path, scores: list[float], others: list[float], keys: dict[str, Any], verdict: str, why: str | None
):
    stats = pytest.importorskip("scipy.stats", reason="a study's tests need scipy: pip install 'mmllm[studies]'")
    first = write_scores(tmp_path / "a", dict(enumerate(scores)), **keys)
    second = write_scores(tmp_path / "b", dict(enumerate(others)), **keys)
    found = compare_files(first, second[::-1])
    assert found.verdict == verdict
    assert (found.reasons == ()) if why is None else (why in "; ".join(found.reasons))
    ranked = found.differences[0]
    assert ranked.difference == pytest.approx(sum(scores) / len(scores) - sum(others) / len(others))
    if len(set(scores)) > 1 and len(scores) > 1:
        wanted = stats.ttest_rel(scores, others)
        assert ranked.p == pytest.approx(wanted.pvalue)
        assert ranked.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.differences[1].difference == pytest.approx(-ranked.difference), "told too, but it ranks nothing"


def test_only_seeds_of_both_sides_are_compared(tmp_path: Path):
    first = write_scores(tmp_path / "a", {0: 0.10, 1: 0.12, 2: 0.11, 7: 0.9})
    second = write_scores(tmp_path / "b", {2: 0.22, 1: 0.21, 0: 0.20}, machine={"processor": "other"})
    found = compare_files(first, second)
    assert found.seeds == (0, 1, 2) and found.verdict == "better"
    assert found.notes[0] == "seeds of the first side alone are left out: 7"
    assert found.notes[1].startswith("scored on different machines (cpu, other)")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"track": "scenes"}, "scores of different tracks"),
        ({"measure": "speak.round_trip_wer"}, "different measures"),
        ({"rows_sha256": "s"}, r"their rows differ.*rows_sha256 is r and s"),
        ({"judge_sha256": "k"}, r"judged by different aligners.*--judge"),
        ({"seed": None}, "has no seed"),
        ({"seed": 9}, "the seeds are 0, 1 and 9: none is on both sides"),
        ({"score": math.nan}, "has score nan"),
        ({"minutes": math.nan}, "has minutes nan"),
        ({"minutes": -5}, "has minutes -5"),
        ({"lower_is_better": "false"}, "has lower_is_better 'false'"),
        ({"also": [{"measure": "x", "score": "0.1"}]}, "has also"),
    ],
)
def test_what_can_not_be_compared_is_named(tmp_path: Path, keys: dict[str, Any], said: str):
    first, second = write_scores(tmp_path / "a", {0: 0.1, 1: 0.2}), write_scores(tmp_path / "b", {0: 0.3}, **keys)
    with pytest.raises(ValueError, match=said):
        compare_files(first, second)


def test_one_run_is_not_several(tmp_path: Path):
    second = write_scores(tmp_path / "b", {0: 0.3, 1: 0.4})
    again = write_scores(tmp_path / "a", {0: 0.1, 1: 0.2}, model_sha256="same")
    with pytest.raises(ValueError, match="are of the same weights; give a training of its own for each seed"):
        compare_files(again, second)
    with pytest.raises(ValueError, match="the seed 0 is on this side twice"):
        compare_files([second[0], write_scores(tmp_path / "c", {0: 0.1})[0]], second)
    with pytest.raises(ValueError, match="the seed 1 is on this side twice"):
        compare_files(second, [second[1], second[1]])
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"other.json is no score of `mmllm study score`"):
        compare_files([tmp_path / "other.json"], second)
    with pytest.raises(FileNotFoundError, match="no such score"):
        compare_files([tmp_path / "nothing.json"], second)


def test_compare_prints_and_writes_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("scipy", reason="a study's tests need scipy: pip install 'mmllm[studies]'")
    first = [str(path) for path in write_scores(tmp_path / "a", {0: 0.10, 1: 0.12, 2: 0.11})]
    second = [str(path) for path in write_scores(tmp_path / "b", {0: 0.20, 1: 0.21, 2: 0.22})]
    out = tmp_path / "told" / "claim.json"
    assert main(["study", "compare", *first, "--with", *second, "--json", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "speech, seeds 0, 1, 2" and printed[-1] == "better by speak.judge_wer"
    assert "0.1100 against 0.2100: -0.1000" in printed[1]
    assert json.loads(out.read_text())["verdict"] == "better"
    assert main(["study", "compare", first[0], "--with", second[0]]) == 0
    assert "unproved by speak.judge_wer: 1 seed on both sides" in capsys.readouterr().out


def test_rows_alone_are_written(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["study", "score", "fsdd", "--rows_only", "--out", str(tmp_path / "fsdd")]) == 0
    assert capsys.readouterr().out.startswith("fsdd: 6 rows to train on, 2 to test on, in ")
    with wave.open(read(tmp_path / "fsdd" / "rows" / "test.jsonl")[0]["audio"]) as sound:
        assert sound.getnframes()
