"""Each task on a stub whose answers are known, and on a tiny real model."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
import torch.nn.functional as F
from PIL import Image

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.rows.bad_rows import ManifestError
from mmllm.data.rows.column_names import ColumnNames
from mmllm.data.rows.forms import read_rows
from mmllm.data.rows.rows import Row
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.sample import Sample
from mmllm.evaluation import commands, tasks, text_task
from mmllm.evaluation.answer_task import shuffled_segments
from mmllm.evaluation.media import MediaBudget
from mmllm.evaluation.metrics import word_edits
from mmllm.evaluation.perplexity import bits_of_documents, plan_windows
from mmllm.evaluation.results import load_result
from mmllm.evaluation.scoring import derangement
from mmllm.evaluation.speech_task import Judge
from mmllm.evaluation.tasks import evaluate
from mmllm.inference.prompts import pad_left
from mmllm.inference.speaking import Waveform
from tests.inference_fixtures import make

RATE = 8000


class StubAudio:
    sample_rate = RATE

    def encode(self, wave: torch.Tensor, sample_rate: int) -> torch.Tensor:
        return wave.reshape(1, -1)

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        return codes * 0.5

    def prepare(self, wave: torch.Tensor, sample_rate: int) -> torch.Tensor:
        return wave


class StubTokenizer:
    num_codebooks = 1
    text = type("Text", (), {"encode": staticmethod(lambda text: list(text.encode()))})

    def require_audio(self) -> StubAudio:
        return StubAudio()


class StubModel:
    """Reads what a picture or sound "says" from a table, by the file's name or the wave's length."""

    tokenizer = StubTokenizer()
    generation = GenerationConfig()
    longest_seconds = shots = None
    model = SimpleNamespace(pointer=None)

    def __init__(self, said: dict[str, str], spoken: dict[str, str] | None = None) -> None:
        self.said = said
        self.spoken = spoken or {}
        self.voices: list[str | None] = []

    progress = None

    @property
    def served(self) -> StubModel:
        return self

    def caption(self, images: list[Path], *, blind: bool = False, **settings) -> list[str]:
        return ["a small red circle in the centre" if blind else self.said[Path(i).name] for i in images]

    def transcribe(self, sounds: list, *, blind: bool = False, **settings) -> list[str]:
        names = [f"{s[0].shape[-1]}" if isinstance(s, tuple) else Path(s).name for s in sounds]
        return ["blind words" if blind else self.said[name] for name in names]

    def speak(self, texts: list[str], voices: list[str | None], *settings) -> list[Waveform]:
        self.voices = voices
        return [Waveform(np.zeros(int(self.spoken[t]), np.float32), RATE, np.zeros((1, 1))) for t in texts]

    def answer(self, parts: list[list], questions: list[str], *, blind: bool = False, **settings) -> list[str]:
        return ["unseen" if blind else self.said[next(Path(p.image) for p in one if p.image).name]
                for one in parts]  # fmt: skip


@pytest.fixture(autouse=True)
def stubs_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub is an `AskedModel`, not asked by one."""
    asked = tasks.AskedModel
    choose = lambda model, progress=None: model if isinstance(model, StubModel) else asked(model, progress)  # noqa: E731
    monkeypatch.setattr(tasks, "AskedModel", choose)


def write_rows(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> Path:
    for number, row in enumerate(rows):
        media = [row, *row.get("segments", [])]
        for item in media:
            if "image" in item:
                Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / item["image"])
            if "audio" in item:
                soundfile.write(folder / item["audio"], np.full(800 + number, 0.1, np.float32), RATE)
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def scene(colour: str, **metadata) -> dict:
    return {
        "text": f"a small {colour} circle in the centre",
        "objects": [{"size": "small", "colour": colour, "shape": "circle"}],
        "relations": [[0, "at", "centre"]],
        **metadata,
    }


def test_captions_of_scenes(tmp_path: Path):
    rows = [
        {"id": "a", "image": "a.png", **scene("red", heldout_pairs=[])},
        {"id": "b", "image": "b.png", **scene("blue")},
        {"id": "c", "image": "c.png", **scene("pink", heldout_pairs=[["circle", "pink"]])},
        {"id": "d", "image": "d.png", **scene("cyan", heldout_pairs=[["circle", "cyan"]])},
    ]
    said = {
        "a.png": "in the middle there is a small red circle",  # right in other words
        "b.png": "a small red circle in the centre",  # colour wrong: 3 of 4
        "c.png": "a large pink circle at the top",  # the pair is right, the scene isn't
        "d.png": "a small blue circle in the centre",
    }
    result = evaluate(StubModel(said), "caption", write_rows(tmp_path, rows))  # type: ignore[arg-type]
    scores = result.scores
    assert scores["n"] == 2 and scores["heldout_pairs_n"] == 2
    assert scores["exact_match"] == 0.5 and scores["blind_exact_match"] == 0.5
    assert scores["attribute_accuracy"] == 7 / 8 and scores["blind_attribute_accuracy"] == 7 / 8
    assert scores["heldout_pairs_accuracy"] == 0.5 and scores["blind_heldout_pairs_accuracy"] == 0
    assert scores["heldout_pairs_exact_match"] == 0
    # the other's caption: "red" said of blue is wrong by its colour, and so is the wrong "red" of red right
    assert scores["shuffled_exact_match"] == 0.5 and scores["shuffled_attribute_accuracy"] == 7 / 8
    assert scores["exact_match_ci"] == [0.0, 1.0]
    assert [p.correct for p in result.predictions] == [True, False, False, False]
    assert [p.group for p in result.predictions] == ["test", "test", "heldout_pairs", "heldout_pairs"]
    assert result.predictions[1].score == 3 / 4


def test_rows_of_any_form_with_embedded_media(tmp_path: Path):
    """On a real model: pictures by data URL in a table, and a sound and a question in JSON."""
    rows = write_rows(
        tmp_path,
        [
            {"id": "s", "audio": "s.wav", "text": "one two"},
            {"id": "q", "segments": [{"text": "See "}, {"image": "q.png"}], "question": "what?", "answer": "red"},
        ],
    )
    data = {name: base64.b64encode((tmp_path / name).read_bytes()).decode() for name in ("s.wav", "q.png")}
    text = rows.read_text().replace('"s.wav"', f'"data:audio/wav;base64,{data["s.wav"]}"')
    rows.write_text(text.replace('"q.png"', f'"data:image/png;base64,{data["q.png"]}"'))
    (tmp_path / "s.wav").unlink()
    (tmp_path / "q.png").unlink()
    table = tmp_path / "captions.csv"
    table.write_text(f"photo|words\ndata:image/png;base64,{data['q.png']}|red square\n{data['q.png']}|blue circle\n")
    columns = ColumnNames.parse(["image=photo,text=words"])
    model = make()
    result = evaluate(model, "caption", table, columns=columns)
    assert result.scores["n"] == 2 and "captions.csv#" in (result.predictions[0].image or "")
    assert MediaBudget().image(result.predictions[0].image) is not None, "the report shows it"
    assert evaluate(model, "transcribe", rows).scores["n"] == 1
    assert evaluate(model, "interleaved", rows).scores["n"] == 1


def scene_of(*colours: str) -> dict:
    """Small circles of these colours from left to right."""
    names = [f"a small {colour} circle" for colour in colours]
    text = f"{names[0]} left of {names[1]}" if len(names) == 2 else "{}, {} and {} from left to right".format(*names)
    objects = [{"size": "small", "colour": colour, "shape": "circle"} for colour in colours]
    return {"text": text, "objects": objects, "relations": [[i, "left of", i + 1] for i in range(len(names) - 1)]}


def test_order_is_scored_where_all_objects_are_named(tmp_path: Path):
    pairs, triples = [("red", "blue")] * 3 + [("red", "pink")] * 2, [("red", "blue", "pink")] * 3
    scenes = [scene_of(*colours) for colours in pairs + triples] + [scene("red")]
    rows = [{"id": str(i), "image": f"{i}.png", **row} for i, row in enumerate(scenes)]
    rows.append({"id": "x", "image": "x.png", **scene_of("cyan", "red"), "heldout_pairs": [["circle", "cyan"]]})
    said = {f"{i}.png": row["text"] for i, row in enumerate(scenes)}
    said["1.png"] = scene_of("blue", "red")["text"]
    said["3.png"] = scene_of("pink", "red")["text"]
    said["4.png"] = scene_of("red", "green")["text"]  # another object: its order says nothing
    said["6.png"] = scene_of("red", "pink", "blue")["text"]
    said["x.png"] = scene_of("red", "cyan")["text"]  # a set of its own
    scores = evaluate(StubModel(said), "caption", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert (scores["order_accuracy_2"], scores["order_n_2"]) == (2 / 4, 4)
    assert (scores["order_accuracy_3"], scores["order_n_3"]) == (2 / 3, 3)
    assert scores["order_accuracy_2_ci"] == [0.0, 1.0]
    assert scores["exact_match"] == 5 / 9, "the share with all objects right, times the order"
    said |= {f"{i}.png": "nothing" for i in (5, 6, 7)}
    scores = evaluate(StubModel(said), "caption", tmp_path / "rows.jsonl").scores  # type: ignore[arg-type]
    assert scores["order_n_3"] == 0 and "order_accuracy_3" not in scores


def test_intervals_draw_what_rows_share(tmp_path: Path):
    """Pairs never trained on, voices never heard and pictures are drawn whole."""
    rows = [{"id": f"{i}", "image": f"{i}.png", **scene("pink" if i < 10 else "cyan"),
             "heldout_pairs": [["circle", "pink" if i < 10 else "cyan"]]} for i in range(20)]  # fmt: skip
    said = {f"{i}.png": "a large pink circle at the top" for i in range(20)}
    scores = evaluate(StubModel(said), "caption", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert scores["heldout_pairs_accuracy"] == 0.5 and scores["num_heldout_pairs"] == 2
    assert scores["heldout_pairs_accuracy_ci"] == [0.0, 1.0], "either of two pairs, or both"
    rows = [{"id": f"{i}", "audio": f"{i}.wav", "text": "one", "heldout_voice": True, "speaker": ("ann", "bob")[i % 2]}
            for i in range(20)]  # fmt: skip
    heard = StubModel({f"{i}.wav": "one" if i % 2 else "two" for i in range(20)})
    scores = evaluate(heard, "transcribe", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert scores["heldout_voices_wer_ci"] == [0.0, 1.0] and scores["num_heldout_voices"] == 2
    rows = [{"id": f"{i}", "image": f"{i % 2}.png", "text": f"photo {i % 2}"} for i in range(20)]
    two = StubModel({"0.png": "photo 0", "1.png": "photo 0"})
    scores = evaluate(two, "caption", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert scores["exact_match"] == 0.5 and scores["exact_match_ci"] == [0.0, 1.0]


def test_captions_without_scenes_have_no_attributes(tmp_path: Path):
    rows = [{"id": n, "image": f"{n}.png", "text": f"a photo of {n}"} for n in ("cats", "dogs")]
    said = {"cats.png": "A photo of cats.", "dogs.png": "a photo of cats"}
    scores = evaluate(StubModel(said), "caption", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert scores["exact_match"] == 0.5 and scores["n"] == 2
    assert not {"attribute_accuracy", "heldout_pairs_accuracy"} & set(scores)


def test_transcripts_score_heldout_voices_apart(tmp_path: Path):
    rows = [
        {"id": "0", "audio": "0.wav", "text": "one two", "heldout_voice": False},
        {"id": "1", "audio": "1.wav", "text": "three four five six"},
        {"id": "2", "audio": "2.wav", "text": "seven", "heldout_voice": True},
    ]
    said = {"0.wav": "One, two!", "1.wav": "three five six", "2.wav": "eleven"}
    scores = evaluate(StubModel(said), "transcribe", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert scores["wer"] == 1 / 6 and scores["n"] == 2
    assert scores["cer"] == pytest.approx(5 / (7 + 19))
    assert scores["exact_match"] == 0.5
    assert scores["blind_wer"] == 1.0 and scores["shuffled_wer"] > 0.9
    assert scores["heldout_voices_wer"] == 1.0 and scores["heldout_voices_n"] == 1
    assert scores["wer_ci"] == [0.0, 0.25]


def test_speech_and_its_controls(tmp_path: Path):
    rows: list[dict] = [{"id": str(i), "audio": f"{i}.wav", "text": t, "speaker": f"v{i}"}
            for i, t in enumerate(["one two", "three four", "five six"])]  # fmt: skip
    rows.append({"id": "x", "audio": "x.wav", "text": "seven", "heldout_voice": True})
    spoken = {"one two": "11", "three four": "12", "five six": "13"}
    said = {"00000.wav": "one two", "00001.wav": "three for", "00002.wav": "five six",
            "800": "one two", "801": "three four", "802": "five"}  # fmt: skip
    model = StubModel(said, spoken)
    manifest = write_rows(tmp_path, rows)
    result = evaluate(model, "speak", manifest, media_dir=tmp_path / "out")  # type: ignore[arg-type]
    scores = result.scores
    assert scores["n"] == 3
    assert scores["round_trip_wer"] == 1 / 6
    assert scores["shuffled_wer"] == 1.0
    assert scores["resynthesis_wer"] == 1 / 6
    assert model.voices == ["v0", "v1", "v2"]
    assert [Path(str(p.written)).is_file() for p in result.predictions] == [True] * 3
    assert soundfile.info(str(tmp_path / "out" / "00001.wav")).frames == 12
    assert scores["level_db"] == pytest.approx(-6.02, abs=0.01)
    assert 0 < scores["mel_error"] < 6.03  # bands at the floor are as loud
    assert scores["at_bound"] == 0.0 and scores["length_correlation"] == pytest.approx(1.0)
    assert not any(key.startswith("own_voice") for key in scores)
    assert not any(key.startswith("judge") for key in scores)


def test_speech_before_a_judge_and_at_its_bounds(tmp_path: Path):
    texts = {"one two": "11", "three four": "12", "five six": "13"}
    manifest = write_rows(tmp_path, [
        {"id": str(i), "audio": f"{i}.wav", "text": text, "speaker": "stranger"} for i, text in enumerate(texts)
    ])  # fmt: skip
    model = StubModel({**dict.fromkeys(["11", "12", "13", "800", "801", "802"], "so")}, texts)
    model.generation = dataclasses.replace(model.generation, voices=("ann", "bob"))
    made = model.speak

    def speak(texts: list[str], voices: list[str | None], *settings) -> list[Waveform]:
        one, two, three = made(texts, voices)
        return [dataclasses.replace(one, num_bounded=2), two, dataclasses.replace(three, is_whole=False)]

    model.speak = speak  # type: ignore[method-assign]
    asked: list[tuple[list[int], object]] = []

    def transcribe(waves: list[torch.Tensor], rate: int, lexicon: object) -> list[str]:
        asked.append(([wave.shape[-1] for wave in waves], lexicon))
        by_length = {11: "one two", 12: "three for", 13: "six", 800: "one two", 801: "three four", 802: "five"}
        return [by_length[wave.shape[-1]] for wave in waves]

    judge = Judge(SimpleNamespace(transcribe=transcribe), ("one", "two"))  # type: ignore[arg-type]
    scores = evaluate(model, "speak", manifest, judge=judge).scores  # type: ignore[arg-type]
    assert scores["judge_wer"] == 2 / 6 and scores["judge_resynthesis_wer"] == 1 / 6
    assert scores["judge_recording_wer"] == 1 / 6 and scores["judge_shuffled_wer"] == 1.0
    assert asked == [([11, 12, 13], ("one", "two")), *[([800, 801, 802], ("one", "two"))] * 2]
    assert scores["at_bound"] == 2 / 3
    assert model.voices == ["ann", "bob", "ann"], "strangers' rows are said by the voices that there are, in turn"


def test_lengths_are_compared_within_voices_too(tmp_path: Path):
    lengths = {"one": 20, "one two": 40, "three four five": 70, "six": 90, "seven": 10}
    rows = [
        {"id": str(i), "audio": f"{i}.wav", "text": text, "speaker": "ann" if i < 3 else "stranger"}
        for i, text in enumerate(lengths)
    ]
    model = StubModel({**{str(n): "so" for n in lengths.values()}, **{str(800 + i): "so" for i in range(5)}},
                      {text: str(length) for text, length in lengths.items()})  # fmt: skip
    model.generation = dataclasses.replace(model.generation, voices=("ann",))
    scores = evaluate(model, "speak", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    real = np.arange(5) + 800
    spoken = np.array([*lengths.values()])
    assert scores["length_correlation"] == pytest.approx(np.corrcoef(spoken, real)[0, 1])
    assert scores["own_voice_length_correlation"] == pytest.approx(np.corrcoef(spoken[:3], real[:3])[0, 1])
    assert scores["own_voice_n"] == 3


def test_answers_beside_shuffled_and_blind(tmp_path: Path):
    rows = [
        {"id": str(i), "segments": [{"text": "see "}, {"image": f"{i}.png"}, {"audio": f"{i}.wav"}],
         "question": "what is it?", "answer": word}
        for i, word in enumerate(["red", "blue", "green", "pink"])
    ]  # fmt: skip
    rows.append({"id": "no question", "segments": [{"image": "9.png"}]})
    said = {"0.png": "Red.", "1.png": "blue", "2.png": "green", "3.png": "black", "9.png": ""}
    result = evaluate(StubModel(said), "interleaved", write_rows(tmp_path, rows))  # type: ignore[arg-type]
    assert result.scores["answer_accuracy"] == 0.75
    assert result.scores["shuffled_accuracy"] == 0.0
    assert result.scores["blind_accuracy"] == 0.0
    assert result.scores["n"] == 4
    assert result.predictions[0].segments[1] == {"image": str(tmp_path / "0.png")}


def test_questions_that_ask_for_one_of_several_are_scored_apart(tmp_path: Path):
    questions = {
        "which colour is the shape in the first picture?": "Red",
        "which word is said second?": "no",
        "what is said in the Third sound?": "green",
        "which picture shows a star?": "the first",  # asks for a picture, not for one told by its place
        "how many seconds does it take?": "pink",
    }
    answers = ["red", "blue", "green", "the first", "cyan"]
    rows = [{"id": str(i), "segments": [{"image": f"{i}.png"}], "question": question, "answer": answer}
            for i, (question, answer) in enumerate(zip(questions, answers, strict=True))]  # fmt: skip
    said = {f"{i}.png": answer for i, answer in enumerate(questions.values())}
    scores = evaluate(StubModel(said), "interleaved", write_rows(tmp_path, rows)).scores  # type: ignore[arg-type]
    assert (scores["ordinal_accuracy"], scores["ordinal_n"]) == (2 / 3, 3)
    assert scores["answer_accuracy"] == 3 / 5
    assert scores["blind_ordinal_accuracy"] == 0 and 0 <= scores["shuffled_ordinal_accuracy"] < 1
    write_rows(tmp_path, rows[3:])
    scores = evaluate(StubModel(said), "interleaved", tmp_path / "rows.jsonl").scores  # type: ignore[arg-type]
    assert scores["n"] == 2 and not [key for key in scores if "ordinal" in key]


def interleaved_row(number: int, num_images: int, num_sounds: int) -> Row:
    segments = [{"text": f"row {number}"}, *({"image": Path(f"{number}-{i}.png")} for i in range(num_images)),
                *({"audio": Path(f"{number}-{i}.wav")} for i in range(num_sounds))]  # fmt: skip
    return Row(str(number), "interleaved", "", segments=tuple(segments))


@pytest.mark.parametrize("seed", range(5))
def test_shuffling_moves_every_picture_and_sound_to_another_row(seed: int):
    rows = [interleaved_row(i, i % 4, (i + 1) % 3) for i in range(12)]
    before = [[value for segment in row.segments for value in segment.values()] for row in rows]
    after = [[part.text or part.image or part.audio for part in parts] for parts in shuffled_segments(rows, seed)]
    flat = [sorted(str(v) for parts in many for v in parts) for many in (before, after)]
    assert flat[0] == flat[1]
    for number, parts in enumerate(after):
        assert [Path(str(v)).suffix for v in parts] == [Path(str(v)).suffix for v in before[number]]
        assert not [v for v in parts if isinstance(v, Path) and v.name.startswith(f"{number}-")]
        assert parts[0] == f"row {number}"


@pytest.mark.parametrize("num_rows", [2, 3, 10, 101])
def test_derangements_have_no_fixed_point(num_rows: int):
    for seed in range(3):
        order = derangement(num_rows, seed)
        assert sorted(order) == list(range(num_rows))
        assert all(i != given for i, given in enumerate(order))
    with pytest.raises(ValueError, match="at least two"):
        derangement(1, 0)


def test_limit_draws_from_each_set_and_repeats(tmp_path: Path):
    rows = [{"id": str(i), "audio": f"{i}.wav", "text": "a", "heldout_voice": i >= 20} for i in range(30)]
    manifest = write_rows(tmp_path, rows)
    model = StubModel({f"{i}.wav": "a" for i in range(30)})
    result = evaluate(model, "transcribe", manifest, limit=5)  # type: ignore[arg-type]
    assert result.scores["n"] == 5 and result.scores["heldout_voices_n"] == 5
    ids = [p.id for p in result.predictions]
    assert ids == [p.id for p in evaluate(model, "transcribe", manifest, limit=5).predictions]  # type: ignore[arg-type]
    assert ids != [str(i) for i in range(5)]


def test_bad_rows_are_named_counted_and_bounded(tmp_path: Path):
    rows = [{"id": str(i), "image": f"{i}.png", "text": "a cat"} for i in range(30)]
    manifest = write_rows(tmp_path, rows)
    model = StubModel({f"{i}.png": "a cat" for i in range(30)})
    (tmp_path / "3.png").write_bytes(b"not a picture")
    scores = evaluate(model, "caption", manifest).scores  # type: ignore[arg-type]
    assert scores["n"] == 29 and scores["num_skipped_rows"] == 1
    (tmp_path / "4.png").write_bytes(b"")
    (tmp_path / "5.png").write_bytes(b"x")
    assert evaluate(model, "caption", manifest).scores["num_skipped_rows"] == 3  # type: ignore[arg-type]
    (tmp_path / "6.png").write_bytes(b"x")
    with pytest.raises(ManifestError, match=r"rows\.jsonl.*can't be used"):
        evaluate(model, "caption", manifest)  # type: ignore[arg-type]


def test_wrong_use_says_what_to_do(tmp_path: Path):
    manifest = write_rows(tmp_path, [{"id": "a", "text": "words"}])
    model = StubModel({})
    with pytest.raises(ValueError, match="task is 'captions'; choose one of caption"):
        evaluate(model, "captions", manifest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="has no caption rows"):
        evaluate(model, "caption", manifest)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="limit is 0"):
        evaluate(model, "text", manifest, limit=0)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError):
        evaluate(model, "text", tmp_path / "none.jsonl")  # type: ignore[arg-type]


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 8, 9, 31, 100])
@pytest.mark.parametrize("window", [2, 3, 8, 200])
def test_windows_score_each_token_once_with_half_a_window_before_it(num_tokens: int, window: int):
    scored: list[int] = []
    for w in plan_windows(num_tokens, window):
        assert w.stop - w.start <= window
        assert w.first_scored > w.start
        if w.start:
            assert w.first_scored - w.start >= window // 2
        scored += range(w.first_scored, w.stop)
    assert scored == list(range(1, num_tokens))


@pytest.fixture(scope="module")
def tiny():
    return make()


def test_bits_are_those_of_the_full_logits(tiny):
    text = "one two, three — ünïcode"
    document = build_document(Sample("x", text), "text", tiny.tokenizer)
    batch = pad_left([document])
    with torch.no_grad():
        nats = F.cross_entropy(tiny.model.logits(batch)[0, :-1], batch.token_ids_BT[0, 1:], reduction="sum")
    bits = bits_of_documents(tiny, [text], window=1024)
    assert bits[0] == pytest.approx(float(nats) / math.log(2), rel=1e-5)
    assert document.num_tokens == 2 + len(tiny.tokenizer.text.encode(text))  # its start is given, its end scored


def test_bits_do_not_depend_on_the_batch_and_windows_only_lose_context(tiny):
    texts = ["one", "a red circle above two blue squares, he said", "three, one, two " * 6]
    alone = [bits_of_documents(tiny, [text], 24)[0] for text in texts]
    assert bits_of_documents(tiny, texts, 24, batch_size=2) == pytest.approx(alone, rel=1e-4)
    whole = bits_of_documents(tiny, texts, 1024)
    assert whole[0] == pytest.approx(alone[0], rel=1e-5)
    assert whole[2] != pytest.approx(alone[2], rel=1e-6)


def test_a_real_model_runs_every_task_from_the_command(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [
        *({"id": f"c{i}", "image": f"c{i}.png", **scene("red")} for i in range(3)),
        *({"id": f"a{i}", "audio": f"a{i}.wav", "text": "one two", "speaker": "ann"} for i in range(3)),
        *({"id": f"i{i}", "segments": [{"text": "see"}, {"image": f"i{i}.png"}, {"audio": f"i{i}.wav"}],
           "question": "what?", "answer": "one"} for i in range(3)),
        *({"id": f"t{i}", "text": "a red circle above two blue squares"} for i in range(2)),
    ]  # fmt: skip
    # what training takes as text is text here too, and files go by what is in them, whatever their names
    rows[6]["segments"][0]["text"], rows[7]["segments"][0]["text"] = "cat.png", "see <|image|> here"
    rows[9]["text"], rows[10]["text"] = "<|image|><|audio|> one two three", "cat.png said he"
    manifest = write_rows(tmp_path, rows)
    (tmp_path / "i2.png").rename(tmp_path / "i2")
    manifest.write_text(manifest.read_text().replace("i2.png", "i2"))
    assert len(read_rows(manifest)) == len(rows)
    monkeypatch.setattr(commands, "load", lambda directory, device, adapter: tiny)
    monkeypatch.setattr(text_task, "CONTINUATION_TOKENS", 4)
    told: list[tuple[int, int]] = []

    def tell(num_done: int, num_all: int) -> None:
        told.append((num_done, num_all))

    counts = {"caption": 3, "transcribe": 3, "speak": 3, "interleaved": 3, "text": 2}
    for task, count in counts.items():
        out = tmp_path / f"{task}.json"
        told.clear()
        result = commands.run_eval("model", task, str(manifest), str(out), sequence_length=32, progress=tell)
        assert {num_all for _, num_all in told} == {tasks.PROMPTS_A_ROW[task] * count}
        assert 2 / 3 * told[-1][1] < told[-1][0] <= told[-1][1]
        assert result.scores["n"] == count == len(result.predictions)
        assert load_result(out) == replace(result, predictions=load_result(out).predictions)
        assert json.loads(out.read_text())[task] == result.scores
        assert commands.score_lines(result)
    assert sorted(p.name for p in (tmp_path / "spoken").iterdir()) == [f"0000{i}.wav" for i in range(3)]
    assert word_edits("", "one two").errors == 2
    with pytest.raises(ValueError, match="a folder; name a file"):
        commands.run_eval("model", "text", str(manifest), str(tmp_path))
