"""`make pretrained` goes its whole way in small, says what it did, and its own pieces are right."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
pytest.importorskip("peft", reason="needs the adapt extra")

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # its files import each other, as scripts do

import pretrained  # noqa: E402
import pretrained_text  # noqa: E402
from pretrained_plan import RATES, SECONDS_SHARE, WEIGHTS, Plan  # noqa: E402
from pretrained_stages import StageFailed, Stages  # noqa: E402

from mmllm.training.parts import PARTS  # noqa: E402


def go(out: Path, **environment: str) -> str:
    """The try-out, as the Makefile calls the script; what it printed."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    line = [sys.executable, "-W", "ignore", "benchmarks/pretrained.py", "--out", str(out), "--max_steps", "2"]
    done = subprocess.run(line, cwd=ROOT, env=given, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tried_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("pretrained") / "run"
    return out, go(out, MMLLM_DATA="")


def test_the_whole_way_reports_what_it_promises(tried_out: tuple[Path, str]) -> None:
    out, printed = tried_out
    report = json.loads((out / "report.json").read_text())
    models = {"aligned", "adapted", "from_nothing"}
    assert report["equal_to_the_bit"] is True
    assert report["text_bits_per_byte"].keys() == models | {"transformers", "imported"}
    assert report["text_bits_per_byte"]["aligned"] == report["text_bits_per_byte"]["imported"]
    assert report["text_bits_per_byte"]["adapted"] != report["text_bits_per_byte"]["imported"], "LoRA moved it"
    assert abs(report["relative_to_transformers"]) < 1e-4 and abs(report["adapted_relative"]) < 0.01
    assert report["captions"].keys() == report["transcripts"].keys() == report["trainable"].keys() == models
    for name in models:
        assert {"exact_match", "attribute_accuracy", "n"} <= report["captions"][name].keys()
        assert {"wer", "cer", "n"} <= report["transcripts"][name].keys()
    shares = {name: found["share"] for name, found in report["trainable"].items()}
    assert 0 < shares["aligned"] < 1 and 0 < shares["adapted"] < 1 and shares["from_nothing"] == 1
    assert report["logits"].keys() == {"decoder, text", "llava, text", "llava, pictures"}
    assert all(found["max_difference"] < 1e-4 for found in report["logits"].values())
    assert all(report["holds"].values()), report["holds"]
    assert report["texts"].startswith("the demo's prose") and report["seed"] == 0
    assert report["minutes"]["total"] > 0 and report["minutes"]["stages"]
    assert "aligned equal to the last bit" in printed and "$ mmllm import " in printed


def test_a_run_that_is_done_is_skipped_and_one_of_other_settings_refused(tried_out: tuple[Path, str]) -> None:
    out, _ = tried_out
    before = (out / "merged" / "model.safetensors").stat().st_mtime_ns
    assert "$ mmllm" not in go(out, MMLLM_DATA="")
    assert (out / "merged" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="holds a run with"):
        pretrained.main(["--out", str(out), "--seed", "1"])


def test_nothing_that_is_scored_was_trained_on(tried_out: tuple[Path, str]) -> None:
    out, _ = tried_out
    trained = {kind: pretrained.read_rows(out / f"rows/train-{kind}.jsonl") for kind in ("caption", "audio", "text")}
    scored = pretrained.read_rows(out / "rows/test.jsonl")
    for kind in ("image", "audio"):
        seen = {Path(row[kind]).name for rows in trained.values() for row in rows if row.get(kind)}
        tested = {Path(row[kind]).name for row in scored if row.get(kind)}
        assert tested and not tested & seen
    documents = {row["text"] for row in pretrained.read_rows(out / "texts/train.jsonl")}
    assert {row["text"] for row in trained["text"]} <= documents
    for row in pretrained.read_rows(out / "texts/heldout.jsonl"):
        assert not any(row["text"] in document for document in documents)


def test_its_language_model_knows_nothing_of_this_project() -> None:
    source = (ROOT / "benchmarks" / "pretrained_text.py").read_text()
    assert not [line for line in source.splitlines() if "import" in line and "mmllm" in line]


def test_its_bits_are_those_of_the_probabilities(tmp_path: Path) -> None:
    """Of a model that gives all ids alike, each token costs log2(ids)."""
    tokenizer = pretrained_text.train_tokenizer(["to be or not to be, that is the question\n\n"] * 9)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    model = transformers.LlamaForCausalLM(config)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(str(tmp_path))
    tokenizer.save_pretrained(str(tmp_path))
    texts = ["to be", "not: the question?"]
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
    wanted = num_tokens * math.log2(len(tokenizer)) / sum(map(len, texts))
    assert pretrained_text.bits_per_byte(tmp_path, texts) == pytest.approx(wanted, rel=1e-6)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "to be?"}], tokenize=False)
    assert chat == "<|begin_of_text|><|im_start|>user\nto be?<|im_end|>\n"
    assert tokenizer(chat, add_special_tokens=False)["input_ids"][0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    "text", ["", "a\n\n\nb", "one two three four five six\n\nseven\n\neight nine ten eleven", "x" * 50]
)
def test_pieces_of_a_text_are_short_and_lose_nothing(text: str) -> None:
    pieces = pretrained.cut(text, 20)
    assert all(0 < len(piece) <= 20 for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())


def test_the_plan_freezes_what_it_says_and_ends_in_time(tmp_path: Path) -> None:
    plan = Plan(tmp_path, 28.0, None, 0, 2)
    plan.write_configs()
    trained = sum(map(plan.seconds, SECONDS_SHARE)) + plan.seconds("from_nothing")
    assert plan.seconds("from_nothing") == plan.seconds("aligned") + plan.seconds("adapted")
    assert trained < 0.8 * 28 * 60, "data, evaluation and starts of processes need time too"
    configs = {path.stem: yaml.safe_load(path.read_text()) for path in (tmp_path / "configs").iterdir()}
    frozen = {part for part, rate in RATES["aligned"].items() if rate == 0}
    assert frozen == {"text_embedding", "attention", "experts"}
    assert set(PARTS) >= {part for rates in RATES.values() for part in rates}
    for name in WEIGHTS:
        assert sum(source["weight"] for source in configs[f"{name}_recipe"]["sources"]) == pytest.approx(1)
    assert sum(source["weight"] for source in configs["from_nothing_recipe"]["sources"]) == pytest.approx(1, abs=1e-3)
    assert configs["from_nothing"]["model"]["init_args"]["init_parts"] == ["image_tower"]


def test_a_stage_that_fails_ends_the_run_and_is_done_again(tmp_path: Path) -> None:
    stages = Stages(tmp_path, {}, 1, shares_process=True)
    try:
        stages.run("configs", "configs", "ls")
        with pytest.raises(StageFailed, match="'import' failed with exit code 2"):
            stages.run("import", "import", tmp_path / "nowhere", "--out", tmp_path / "out")
    finally:
        stages.processes.end_all()
    assert Stages(tmp_path, {}, 1, shares_process=True).seconds.keys() == {"configs"}
