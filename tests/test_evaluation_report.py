"""The report: its JSON, its self-contained page, its size, and what it does when parts are absent."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image

from mmllm.evaluation.charts import line_chart, routing_maps, waveform
from mmllm.evaluation.curves import group_curves, read_curves, trained_curves
from mmllm.evaluation.galleries import marked_words
from mmllm.evaluation.media import MediaBudget
from mmllm.evaluation.report import ReportInfo, Stage, write_report
from mmllm.evaluation.results import Prediction, TaskResult, load_result, save_result
from mmllm.evaluation.routing import load_routing, routing_summary
from mmllm.paths import config_path
from mmllm.training.codec_module import CodecLossConfig, CodecModule
from mmllm_tokenizers.codec_config import CodecConfig

HOSTILE = '<script>alert("x")</script> & "quotes"'


@pytest.fixture
def results(tmp_path: Path) -> dict[str, TaskResult]:
    image, sound = tmp_path / "a.png", tmp_path / "a.wav"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(image)
    soundfile.write(sound, np.sin(np.arange(4000) / 9).astype(np.float32) * 0.3, 8000)
    picture, heard = str(image), str(sound)
    return {
        "speak": TaskResult(
            "speak",
            {"round_trip_wer": 0.25, "round_trip_wer_ci": [0.1, 0.4], "shuffled_wer": 1.2, "resynthesis_wer": 0.1,
             "n": 2},
            [Prediction("s", "one two", "one", 0.5, False, audio=heard, written=heard)],
        ),
        "caption": TaskResult(
            "caption",
            {"exact_match": 0.5, "exact_match_ci": [0.2, 0.8], "cider": 3.21, "n": 4, "blind_exact_match": 0.125,
             "heldout_pairs_accuracy": 0.7, "heldout_pairs_n": 3},
            [
                Prediction("bad", "a cat", HOSTILE, 0.0, False, blind="a dog", image=picture),
                Prediction("worse", "a bird", "a fish", -1.0, False, blind="a dog", image=picture),
                Prediction("good", "a tree", "a tree", 1.0, True, blind="a dog", image=picture),
                Prediction("apart", "a pink star", "a star", 0.4, False, "heldout_pairs", image=picture),
            ],
        ),
        "interleaved": TaskResult(
            "interleaved", {"answer_accuracy": 1.0, "shuffled_accuracy": 0.5, "n": 1},
            [Prediction("i", "red", "red", 1.0, True, question="which?",
                        segments=[{"text": "look"}, {"image": picture}, {"audio": heard}])],
        ),
        "transcribe": TaskResult(
            "transcribe", {"wer": 0.1, "n": 9, "blind_wer": 1.5},
            [Prediction("t", "one", "one", 1.0, True, audio=heard, blind="two")],
        ),
        "text": TaskResult(
            "text", {"bits_per_byte": 2.125, "n": 7},
            [Prediction("d", "be", "see", -2.1, False, question="To be or not to")],
        ),
    }  # fmt: skip


def page(path: Path) -> str:
    html = path.read_text(encoding="utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", html), "the page loads something from elsewhere"
    assert "url(" not in html and "@import" not in html and "<script" not in html
    return html


def test_json_holds_the_scores_and_what_the_run_took(results, tmp_path: Path):
    """Which keys the scores of a real run have is tested in tests/test_quickstart.py."""
    counts = np.ones((1, 4, 2))
    info = ReportInfo(seconds=12.5, tokens_per_second=100.0, peak_rss_bytes=2**30, recipe_hash="abc", commit="def")
    write_report(tmp_path / "out", results, routing=routing_summary(counts, [1]), info=info)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert list(report) == [
        "caption", "transcribe", "speak", "interleaved", "text", "train", "routing", "recipe_hash", "commit",
    ]  # fmt: skip
    assert report["caption"] == results["caption"].scores
    assert report["train"] == {"seconds": 12.5, "tokens_per_second": 100.0, "peak_rss_bytes": 2**30}
    assert report["routing"]["layers"] == [1]


def test_absent_parts_are_left_out(results, tmp_path: Path):
    html = page(write_report(tmp_path / "out", [results["text"]]))
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == {"text": results["text"].scores}
    assert "Bits a byte" in html and "To be or not to" in html
    for absent in ("Captions", "Transcripts", "Routing", "Training curves", "Stages", "<audio"):
        assert absent not in html


def test_page_without_anything(tmp_path: Path):
    assert "report.json" in page(write_report(tmp_path / "out", {}))


def test_page_shows_rows_and_scores(results, tmp_path: Path):
    curves = {"Decoder": {"train/loss/text": [(0.0, 3.0), (10.0, 1.0)]}, "gone": tmp_path / "none.csv"}
    info = ReportInfo(title="T", stages=(Stage("data", 65.0, "mmllm data build"),))
    routing = routing_summary(np.arange(16.0).reshape(1, 4, 4), [3])
    html = page(write_report(tmp_path / "out", results, curves, routing, info))
    for wanted in ("50.0%", "20.0% – 80.0%", "grey picture <b>12.5%</b>", "3.21", "other words <b>120.0%</b>", "2.12",
                   "1 min 05 s", "mmllm data build", "Loss by modality", "mutual information", "always: “a dog”",
                   "To be or not to", "which?"):  # fmt: skip
        assert wanted in html, wanted
    assert html.index('alt="worse"') < html.index('alt="bad"'), "the worst rows come first"
    assert "&lt;script&gt;" in html
    assert html.count("<audio") == html.count("data:audio/wav") == 6
    assert "pairs never trained on" in html
    assert html.count("<circle cx=") == 5 + 1 and "M191 3l9" not in html, "a score each, and the key"


def test_controls_are_named_for_what_they_are(results, tmp_path: Path):
    """The keys say blind; people read what the model was given."""
    html = page(write_report(tmp_path / "out", results))
    assert "Given a grey picture in the place of each row's own" in html.replace("&#39;", "'")
    assert "Given silence" in html and "silence <b>150.0%</b>" in html
    assert "blind" not in re.sub(r"<style>.*?</style>|class=\"[^\"]*\"", "", html, flags=re.DOTALL)


def test_order_and_ordinals_have_their_rows(tmp_path: Path):
    scores = {
        "order_accuracy_2": 0.55, "order_accuracy_2_ci": [0.5, 0.6], "order_n_2": 305, "order_n_3": 0,
        "heldout_pairs_accuracy": 0.8, "heldout_pairs_n": 504, "num_heldout_pairs": 12,
    }  # fmt: skip
    answers = {"answer_accuracy": 0.6, "ordinal_accuracy": 0.4, "ordinal_n": 353, "blind_ordinal_accuracy": 0.05}
    speech = {"round_trip_wer": 0.2, "level_db": -0.4, "mel_error": 0.7, "at_bound": 0.0, "length_correlation": 0.95,
              "judge_wer": 0.3, "judge_resynthesis_wer": 0.2}  # fmt: skip
    html = page(write_report(tmp_path, [TaskResult("caption", scores, []), TaskResult("interleaved", answers, []),
                                        TaskResult("speak", speech, [])]))  # fmt: skip
    for wanted in ("Order of two objects ↑", "55.0%", "by chance 50%", ">305<",
                   '504<span class="told"> rows</span> in 12 pairs', "353", "→ 0 the nearer to 0 the better",
                   "First, second, third ↑", "grey and silent <b>5.0%</b>", "Level, dB → 0", "-0.40", "Log-mel error ↓",
                   "another judge ↓", "codec alone <b>20.0%</b>", "Length, correlation ↑"):  # fmt: skip
        assert wanted in html, wanted
    assert "Order of three" not in html, "of no rows there is no score"


def test_paraphrases_are_not_marked(tmp_path: Path):
    """Of a caption with one wrong colour that one word is marked, though nearly every word differs."""
    wanted = "a large blue star right of a small green circle"
    said = [("a small red circle to the left of a large blue star", False),
            ("there is a small green circle, and to its right a large blue star", True)]  # fmt: skip
    rows = [Prediction(str(i), wanted, text, 0.9, right) for i, (text, right) in enumerate(said)]
    html = page(write_report(tmp_path, [TaskResult("caption", {"exact_match": 0.5}, rows)]))
    assert set(re.findall(r'<span class="(wrong|missing)">(\w+)</span>', html)) == {
        ("wrong", "red"), ("missing", "green"),
    }  # fmt: skip


def test_sounds_are_as_loud_as_they_are(tmp_path: Path):
    """A player gets the file's own samples; the outline and the level in dBFS show what it lacks of full scale."""
    wave_T = np.sin(np.arange(8000) / 5)
    heights, levels = [], []
    for number, gain in enumerate((1.0, 0.25)):
        soundfile.write(tmp_path / f"{number}.wav", (gain * wave_T).astype(np.float32), 8000, subtype="FLOAT")
        sound = MediaBudget().sound(str(tmp_path / f"{number}.wav"), "#000")
        assert sound is not None
        played_T, _ = soundfile.read(io.BytesIO(base64.b64decode(sound.uri.split(",")[1])))
        assert np.abs(played_T).max() == pytest.approx(gain, rel=1e-3)
        levels.append(sound.level_db)
        heights.append(max(abs(18 - float(y)) for y in re.findall(r" ([\d.]+)", sound.path)))
    assert levels == pytest.approx([-3.01, -15.05], abs=0.02)
    assert heights[1] == pytest.approx(heights[0] / 4, abs=0.1) and heights[0] == pytest.approx(17, abs=0.1)
    silent = write_report(tmp_path, [TaskResult("speak", {"round_trip_wer": 1.0}, [
        Prediction("s", "one", "", 0.0, False, written=str(tmp_path / "1.wav"))])])  # fmt: skip
    assert "1.0 s, −15 dBFS" in page(silent)


def test_scores_are_cards_on_a_phone(results, tmp_path: Path):
    """Below 720 pixels a row of the table is a card whose cells say what they are; the score stays beside its name."""
    html = page(write_report(tmp_path / "out", results))
    phone = html[html.index("@media(max-width:720px)") :]
    for rule in (".scores thead{display:none}", ".scores td{display:block}", ".scores tr{display:grid"):
        assert rule in phone, rule
    assert html.count('<span class="told">95%: </span>') == 2 and html.count('<span class="told"> rows</span>') == 7


def test_a_word_error_rate_beyond_the_bar_is_an_arrow_at_its_end(tmp_path: Path):
    html = page(write_report(tmp_path, [TaskResult("transcribe", {"wer": 1.25, "n": 9}, [])]))
    assert "125.0%" in html and html.count("M191 3l9") == 1 and html.count("<circle cx=") == 1


def test_page_stays_small(results, tmp_path: Path):
    rng = np.random.default_rng(0)
    long, large = tmp_path / "long.wav", []
    soundfile.write(long, rng.normal(0, 0.1, 12 * 16_000).astype(np.float32), 16_000)
    for number in range(12):
        large.append(tmp_path / f"{number}.png")
        Image.fromarray(rng.integers(0, 255, (400, 400, 3), dtype=np.uint8)).save(large[-1])
    many = [Prediction(str(i), "one", "two", 0.0, False, audio=str(long)) for i in range(60)]
    pictures = [Prediction(str(i), "one", "two", 0.0, False, image=str(large[i % 12])) for i in range(60)]
    path = write_report(tmp_path / "out", [
        TaskResult("caption", {"exact_match": 0.0, "n": 60}, pictures),
        TaskResult("transcribe", {"wer": 1.0, "n": 60}, many), TaskResult("speak", {"round_trip_wer": 1.0}, many),
    ])  # fmt: skip
    html = page(path)
    assert path.stat().st_size < 6_000_000
    assert "not embedded" in html and html.count("<audio") >= 4
    assert html.count("<audio", html.index('id="speak"')) >= 2, "the first task must not take all of the space"


def test_embedded_sound_is_the_sound(tmp_path: Path):
    wave_T = np.sin(np.arange(8000) / 5).astype(np.float32) * 0.5
    soundfile.write(tmp_path / "a.wav", wave_T, 8000)
    sound = MediaBudget().sound(str(tmp_path / "a.wav"), "#000")
    assert sound is not None and sound.seconds == 1.0
    decoded_T, rate = soundfile.read(io.BytesIO(base64.b64decode(sound.uri.split(",")[1])))
    assert rate == 8000
    np.testing.assert_allclose(decoded_T, wave_T, atol=1e-4)
    assert MediaBudget().sound(str(tmp_path / "none.wav"), "#000") is None
    assert MediaBudget().image(str(tmp_path / "none.png")) is None


def test_a_picture_shown_twice_costs_twice(tmp_path: Path):
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    first = MediaBudget().image(str(path))
    assert first is not None and first.tiny
    budget = MediaBudget(image_bytes=2 * len(first.uri) + 10)
    assert budget.image(str(path)) == budget.image(str(path)) == first
    assert budget.image(str(path)) is None


def test_marked_words():
    said, wanted = marked_words("a Red, dog", "a red cat runs")
    assert said == [("a", ""), ("Red,", ""), ("dog", "wrong")]
    assert wanted == [("a", ""), ("red", ""), ("cat", "missing"), ("runs", "missing")]
    assert marked_words("", "x") == ([], [("x", "missing")])


def test_curves_are_read_and_grouped(tmp_path: Path):
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,epoch,train/loss/text,train/loss/balance,val/text,train/loss/source/web,train/lr,train/padding_share\n"
        "0,0,4.0,1.5,,3.0,0.1,0.2\n5,0,2.0,1.1,3.5,2.0,0.1,0.2\n9,0,nan,1.1,2.5,2.0,,\n"
    )
    columns = read_curves(path)
    assert columns["train/loss/text"] == [(0.0, 4.0), (5.0, 2.0)]
    groups = group_curves(columns)
    assert list(groups) == ["Loss by modality", "Loss by source", "Routing losses", "Learning rate"]
    assert list(groups["Loss by modality"]) == ["text", "val text"]
    assert list(groups["Loss by source"]) == ["web"]


def test_losses_that_train_have_charts_and_others_have_none():
    """Of each shipped training of quickstart what its module logs; by decoder.yaml's see tests/test_quickstart.py."""
    points = [(0.0, 1.0), (1.0, 0.5)]
    config = yaml.safe_load(config_path("quickstart/codec.yaml").read_text())["model"]["init_args"]
    codec = {**config["codec"], "warmup_batches": 0, "decoder": "source_filter"}
    module = CodecModule(CodecConfig(**codec), CodecLossConfig(**config["losses"]))
    module.log = lambda *args, **options: None  # type: ignore[method-assign]
    module.training_step(0.1 * torch.randn(2, 1, 8000, generator=torch.Generator().manual_seed(0)), 0)
    logged = {f"train/{name}" for name in module.window.sums}
    trained = trained_curves(dict.fromkeys(logged, points), config["losses"])
    assert logged - set(trained) == {"train/l1", "train/mel", "train/commit"}
    for name in set(trained) - {"train/codes_used"}:
        assert list(group_curves({name: points})) == ["Losses"], name
    assert {"train/log_spectrum", "train/level", "train/pitch"} <= set(trained)
    decoder = {
        "train/loss": points,
        "train/loss/text": points,
        "train/loss/ctc": points,
        "val/ctc": points,
        "train/lr": points,
    }
    assert list(trained_curves(decoder, {"text": 1.0, "ctc": 0})) == ["train/loss", "train/loss/text", "train/lr"]
    assert trained_curves(decoder, {}) == decoder
    idle = {"train/loss/z": [(0.0, 0.0), (1.0, 0.0)], "samples/caption_exact_match": [(0.0, 0.0), (1.0, 0.0)]}
    assert list(group_curves(idle)) == ["Scores while training"], "a score of 0 says something"


def test_rows_that_there_was_no_time_for_are_told(results, tmp_path: Path):
    info = ReportInfo(evaluation_limits={"caption": {"scored": 1040, "of": 1508}, "speak": {"scored": 20, "of": 504}})
    html = page(write_report(tmp_path, results, info=info))
    assert "Captions, 1,040 of 1,508 rows; Speech, 20 of 504 rows." in " ".join(html.split())
    told = json.loads((tmp_path / "report.json").read_text())
    assert told["evaluation_limits"] == {"caption": {"scored": 1040, "of": 1508}, "speak": {"scored": 20, "of": 504}}
    assert "Time was short" not in page(write_report(tmp_path, results))


def test_memory_is_told_in_units_of_its_name(results, tmp_path: Path):
    html = page(write_report(tmp_path, results, info=ReportInfo(peak_rss_bytes=5_960_000_000)))
    assert "6.0 GB" in html and "GiB" not in html


def test_chart_places_points_in_its_box():
    chart = line_chart("Loss", {"text": [(float(i), 5.0 - i / 200) for i in range(1000)], "val text": [(0.0, 1.0)]})
    assert chart.lines[0].colour == chart.lines[1].colour and chart.lines[1].dashed
    points = [tuple(map(float, p.split(","))) for line in chart.lines for p in line.points.split()]
    assert len(points) <= 250
    assert all(0 <= x <= chart.width and chart.top <= y <= chart.height - chart.bottom for x, y in points)
    assert [label for _, label in chart.x_ticks] == ["0", "200", "400", "600", "800"]
    flat = line_chart("flat", {"a": [(0.0, 2.0), (1.0, 2.0)]})
    assert flat.y_ticks
    with pytest.raises(ValueError, match="no points"):
        line_chart("none", {"a": []})


def test_heat_map_marks_even_shares_and_dead_experts():
    counts_LME = np.zeros((1, 4, 4))
    counts_LME[0, 0] = [100, 100, 200, 0]
    maps = routing_maps(routing_summary(counts_LME, [2]))
    assert [m.title for m in maps] == ["text"]
    assert [c.label for c in maps[0].cells] == ["1.0", "1.0", "2.0", "×"]
    assert maps[0].rows[0][1] == "2"
    wide = routing_maps(routing_summary(np.ones((2, 4, 64))))
    assert len(wide[0].cells) == 128 and not wide[0].cells[0].label
    assert waveform(np.zeros(0)) == "" and waveform(np.zeros(10)).startswith("M")


def test_results_and_routing_are_read_back(results, tmp_path: Path):
    path = save_result(results["interleaved"], tmp_path / "new" / "i.json")
    assert load_result(path) == results["interleaved"]
    path.write_text("{}")
    with pytest.raises(ValueError, match="no result of `mmllm eval"):
        load_result(path)
    last = np.full((1, 4, 2), 100.0)
    record = {"layers": [4], "modalities": [], "counts": (last * [9, 1]).tolist(), "last_counts": last.tolist()}
    (tmp_path / "routing.json").write_text(json.dumps(record))
    assert load_routing(tmp_path / "routing.json")["load"] == [[0.5, 0.5]]
    record["last_counts"] = (last / 100).tolist()  # too few to say anything: the whole run stands in
    (tmp_path / "routing.json").write_text(json.dumps(record))
    assert load_routing(tmp_path / "routing.json")["load"] == [[0.9, 0.1]]
    (tmp_path / "routing.json").write_text("[]")
    with pytest.raises(ValueError, match="no routing record"):
        load_routing(tmp_path / "routing.json")
