"""How long the sounds were that training heard, as the model folder keeps it: the longest, and the usual."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data import commands
from mmllm.data.loading.datamodules import PackedDataModule
from mmllm.training.exporting import generation_after
from tests.data_fixtures import make_folder, write_manifest, write_sound

SECONDS = [0.2, 0.8, 0.4, 1.6, 0.4, 2.4]
TICK = 0.02
"""A frame, and the codec's padding."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sounds with texts, and documents with some of them, one with two."""
    folder = tmp_path_factory.mktemp("heard")
    make_folder(folder / "tok")
    rng = np.random.default_rng(0)
    for number, seconds in enumerate(SECONDS):
        write_sound(folder / f"{number}.wav", rng, seconds)
    rows: list[dict[str, Any]] = [
        {"id": f"s{number}", "audio": f"{number}.wav", "text": "red circle", "slow": number == 5} for number in range(6)
    ]
    write_manifest(folder, rows, "speech.jsonl")
    both = [{"audio": "0.wav"}, {"text": "red"}, {"audio": "3.wav"}, {"text": "circle"}]
    documents = [
        {"id": "a", "segments": [{"text": "red"}, {"text": "circle"}]},
        {"id": "b", "segments": both, "two": True},
        {"id": "c", "segments": [{"audio": "2.wav"}, {"text": "red"}]},
    ]
    write_manifest(folder, documents, "documents.jsonl")
    for name in ("speech", "documents"):
        commands.build(folder / f"{name}.jsonl", folder / name, folder / "tok")
        commands.index(str(folder / name), folder / "tok")
    return folder


def heard(made: Path, *sources: dict[str, Any], length: int = 512) -> tuple[float, float] | None:
    named = [{"name": f"source{number}", **source} for number, source in enumerate(sources)]
    path = made / "recipe.yaml"
    path.write_text(json.dumps({"tokenizer": str(made / "tok"), "sequence_length": length, "sources": named}))
    return PackedDataModule(path, batch_size=2).heard_seconds


def speech(made: Path, tasks: list[str], **more: Any) -> dict[str, Any]:
    return {"kind": "audio", "shards": str(made / "speech" / "*.tar"), "tasks": tasks, **more}


def documents(made: Path, **more: Any) -> dict[str, Any]:
    return {"kind": "interleaved", "shards": str(made / "documents" / "*.tar"), **more}


def test_only_sounds_that_are_heard_count(made: Path):
    assert heard(made, speech(made, ["transcribe"])) == pytest.approx((2.4, 1.6), abs=TICK)
    assert heard(made, speech(made, ["speak", "transcribe"])) == pytest.approx((2.4, 1.6), abs=TICK)
    assert heard(made, speech(made, ["speak"])) is None
    quick = speech(made, ["transcribe"], filter="not slow")
    assert heard(made, quick, speech(made, ["speak"])) == pytest.approx((1.6, 0.8), abs=TICK)
    assert heard(made, speech(made, ["transcribe"]), length=128) == pytest.approx((1.6, 0.8), abs=TICK), "2.4 s is cut"


def test_each_sound_of_a_document_counts(made: Path):
    assert heard(made, documents(made)) == pytest.approx((1.6, 1.6), abs=TICK), "not its two together"
    assert heard(made, documents(made, filter="not two")) == pytest.approx((0.4, 0.4), abs=TICK)


def test_sources_count_by_their_weights(made: Path):
    few, many = documents(made, filter="not two"), speech(made, ["transcribe"])
    assert heard(made, {**few, "weight": 0.9}, {**many, "weight": 0.1}) == pytest.approx((2.4, 0.4), abs=TICK)
    never = {"weight_schedule": [[0, 0.0], [10, 0.0]]}
    try:
        assert heard(made, few, {**many, **never}) == pytest.approx((0.4, 0.4), abs=TICK)
    except ValueError as error:  # a recipe may refuse what is never drawn
        assert "weight_schedule" in str(error)


def test_against_a_count_by_hand(made: Path):
    """Half of 5.8 seconds lie in sounds of up to 1.6 s: 0.2 + 0.4 + 0.4 + 0.8 = 1.8, and 1.6 more is 3.4."""
    frames, clock = sorted(SECONDS), 0.0
    for seconds in frames:
        clock += seconds
        if clock >= sum(SECONDS) / 2:
            break
    assert heard(made, speech(made, ["transcribe"])) == pytest.approx((max(SECONDS), seconds), abs=TICK)


@pytest.mark.parametrize(
    ("found", "wanted"), [((3.0, 1.5), (3.0, 1.5)), (None, (7.0, 2.0))], ids=["heard", "no sounds"]
)
def test_a_folder_keeps_what_was_heard(found, wanted):
    """A training on other things leaves what its start has heard."""
    before = GenerationConfig(max_heard_seconds=7.0, usual_heard_seconds=2.0, max_new_tokens=9)
    generation = generation_after(before, SimpleNamespace(heard_seconds=found, voices=()))
    assert (generation.max_heard_seconds, generation.usual_heard_seconds) == wanted
    assert generation.max_new_tokens == 9


def test_older_folders_still_load():
    older = GenerationConfig(max_heard_seconds=20.48).to_dict()
    del older["usual_heard_seconds"]
    read = GenerationConfig.from_dict(older)
    assert read.max_heard_seconds == 20.48 and read.usual_heard_seconds is None
    assert GenerationConfig.from_dict(GenerationConfig(usual_heard_seconds=2.5).to_dict()).usual_heard_seconds == 2.5
    with pytest.raises(ValueError, match="usual_heard_seconds is 0"):
        GenerationConfig(usual_heard_seconds=0)
