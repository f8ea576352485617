"""Looks at held-out tasks: what they find, that they change nothing, that they resume, and the alarm."""

from __future__ import annotations

import copy
import csv
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from mmllm.data.loading.collate import pack_documents
from mmllm.evaluation.tasks import evaluate
from mmllm.inference.api import Model, load
from mmllm.inference.engine.sampling import TextRules
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.posttraining.costs import HeldOutTask, RewardHackingStop, TaskScores
from mmllm.training.posttraining.drift import _drawn, drift
from mmllm.training.posttraining.held_out import Look
from mmllm.training.posttraining.start_weights import StartWeights
from tests.test_training_adapters import batches, make_base
from tests.training_fixtures import quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
]
RATES = OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder, with rows to score it by beside it."""
    folder = tmp_path_factory.mktemp("costs")
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number in range(6):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        rows.append({"id": f"c{number}", "image": f"{number}.png", "text": "a word of it"})
        rows.append({"id": f"t{number}", "text": f"a text {number}"})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_base(folder / "base")


def make_scores(base: Path, directory: Path, **settings: Any) -> TaskScores:
    manifest = str(base.parent / "rows.jsonl")
    tasks = [HeldOutTask("caption", manifest), HeldOutTask("text", manifest, limit=4, name="prose")]
    given = {"every_steps": 2, "num_answers": 4, "max_new_tokens": 6, **settings}
    return TaskScores(tasks, str(directory), **given)


def make_module(base: Path, kind: type[DecoderModule] = DecoderModule, **settings: Any) -> Any:
    torch.manual_seed(0)
    return kind(init_from=str(base), optimizer=RATES, **settings)


class _Loader:
    """Goes on where it was; many more batches than are taken."""

    def __init__(self) -> None:
        self.place = 0

    def __len__(self) -> int:
        return 30

    def __iter__(self) -> Iterator[Any]:
        for batch in batches(30)[self.place :]:
            self.place += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class _Data(pl.LightningDataModule):
    def train_dataloader(self) -> _Loader:
        return _Loader()


def fit(module: Any, count: int, *callbacks: Any, ckpt: Any = None, **settings: Any) -> None:
    with quiet_lightning():
        trainer = quiet_trainer(*callbacks, max_steps=count, **settings)
        trainer.fit(module, datamodule=_Data(), ckpt_path=ckpt, weights_only=True)


def test_looks_before_during_and_after_find_what_evaluation_finds(base: Path, tmp_path: Path) -> None:
    scores = make_scores(base, tmp_path)
    fit(make_module(base, out=str(tmp_path / "model")), 5, scores)
    assert [look.step for look in scores.looks] == [0, 2, 4, 5]
    for folder, look in ((base, scores.looks[0]), (tmp_path / "model", scores.looks[-1])):
        model = load(folder, "cpu")
        for task in scores.tasks:
            result = evaluate(model, task.task, task.manifest, limit=task.limit)
            assert look.scores[task.label] == pytest.approx(task.score(result.scores), abs=1e-5)
            assert look.values[task.label] == pytest.approx(task.values(result), abs=1e-5)
    start, *_, end = scores.looks
    assert start.kl == pytest.approx(0.0, abs=1e-4) and end.kl is not None and end.kl > 0.05
    assert end.scores["prose"] != start.scores["prose"]
    with (tmp_path / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    prose = {int(row["step"]): row for row in rows if row["name"] == "prose"}
    assert list(prose) == [0, 2, 4, 5]
    assert float(prose[5]["points_lost"]) == pytest.approx(
        100 * (start.scores["prose"] - end.scores["prose"]), abs=1e-3
    )
    assert {row["name"] for row in rows} == {"caption", "prose", "kl", "entropy", "length"}
    told = json.loads((tmp_path / "forgetting.json").read_text())
    assert told["tasks"] == ["caption", "prose"] and told["steps"] == [0, 2, 4, 5] and len(told["scores"][0]) == 2
    assert told["looks"][-1]["points_lost"]["prose"] == pytest.approx(float(prose[5]["points_lost"]), abs=1e-3)
    page = (tmp_path / "costs.html").read_text()
    assert page.count("<polyline") == 5 and "KL to the start" in page and "points lost" in page


def test_the_drift_is_that_of_every_answer_by_both_models(base: Path) -> None:
    module = make_module(base)
    module.configure_model()
    model = module.model
    before, start = copy.deepcopy(model).eval(), StartWeights(model)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight), alpha=0.03)
    served = Model(model, module.folder, module.image_transform)
    pictures = [served.caption_prompt(str(base.parent / f"{n}.png")) for n in range(5)]
    found = drift(served, start, pictures, 6, seed=0)
    allowed = ~torch.isinf(TextRules.of(module.folder, torch.device("cpu")).mask_V)
    sums, entropies, num_tokens = [], [], 0
    model.eval()
    for answer in _drawn(served, pictures, 6, 0):
        document = answer.document
        batch = pack_documents([[document]], document.num_tokens)
        logs = []
        for each in (model, before):
            with torch.no_grad():
                logits = each.decoder.lm_head(each(batch).hidden_QD)[:, : len(allowed)]
            logs.append(logits.masked_fill(~allowed, -torch.inf).double().log_softmax(-1))
        places = np.flatnonzero(document.targets_T)
        ids = document.token_ids_T[places]
        sums.append(sum(float(logs[0][t - 1, i] - logs[1][t - 1, i]) for t, i in zip(places, ids, strict=True)))
        now = logs[0][places - 1][:, allowed]
        entropies += (-(now.exp() * now).sum(-1)).tolist()
        num_tokens += len(places)
    assert found.kl == pytest.approx(np.mean(sums), abs=1e-4) and abs(found.kl) > 0.01
    assert found.entropy == pytest.approx(np.mean(entropies), abs=1e-4)
    assert found.length == num_tokens / 5


def test_looks_change_nothing_that_is_trained(base: Path, tmp_path: Path) -> None:
    alone, looked = make_module(base), make_module(base)
    fit(alone, 4)
    fit(looked, 4, make_scores(base, tmp_path))
    for (name, weight), other in zip(alone.state_dict().items(), looked.state_dict().values(), strict=True):
        assert torch.equal(weight, other), name


def test_a_resumed_run_has_the_looks_of_one_that_was_not_stopped(base: Path, tmp_path: Path) -> None:
    whole = make_scores(base, tmp_path / "whole")
    fit(make_module(base), 5, whole)
    saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
    cut = tmp_path / "cut"
    fit(make_module(base), 3, make_scores(base, cut), saving, enable_checkpointing=True)
    again = make_scores(base, cut)
    fit(make_module(base), 5, again, ckpt=tmp_path / "step=2.ckpt")
    assert [look.step for look in again.looks] == [0, 2, 4, 5]
    for one, two in zip(again.looks, whole.looks, strict=True):
        assert one.scores == pytest.approx(two.scores, abs=1e-6) and one.kl == pytest.approx(two.kl, abs=1e-6)
    names = [
        [line.split(",")[2] for line in (out / "scores.csv").read_text().splitlines()] for out in (whole.directory, cut)
    ]
    assert names[0] == names[1]


def test_the_last_look_is_at_what_is_exported(base: Path, tmp_path: Path) -> None:
    scores = make_scores(base, tmp_path / "scores", every_steps=None)
    fit(make_module(base, wise_ft=0.0), 3, scores)
    first, last = scores.looks
    assert (first.step, last.step) == (0, 3)
    assert last.scores == pytest.approx(first.scores), "nothing of what was trained is in it"


class _Hacked(DecoderModule):
    """Tells a reward that rises by itself."""

    def rollout_stats(self) -> dict[str, float]:
        return {"reward": float(self.trainer.global_step)}


def fit_hacked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, falls: bool, **settings: Any) -> Any:
    scores, stop = make_scores(base, tmp_path, every_steps=4), RewardHackingStop(str(tmp_path), **settings)

    def found(module: Any, step: int, is_start: bool) -> Look:
        right = 1.0 if not falls or step < 8 else 0.0
        return Look(step, 0.0, {"caption": right, "prose": 1.0}, {"caption": [right] * 32, "prose": [1.0]},
                    reward=float(step), num_rewards=len(scores.rewards))  # fmt: skip

    monkeypatch.setattr(scores, "_found", found)
    module = make_module(base, _Hacked)
    fit(module, 24, stop, scores)
    return scores, stop, json.loads((tmp_path / "hacking.json").read_text())


def test_the_run_says_reward_hacking_and_stops_there(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        scores, _, told = fit_hacked(base, tmp_path, monkeypatch, falls=True)
    assert told["noticed_at_step"] == 20, "looks at 16 and 20: before, there are too few rewards"
    assert told["evidence"]["truth_best"] == 1.0 and told["evidence"]["truth_now"] == 0.0
    assert scores.looks[-1].step == 21, "the alarm stands before TaskScores in the list, so it comes a step later"
    assert any("reward hacking at step 20: the reward rose from" in record.getMessage() for record in caplog.records)
    assert "Reward and true score" in (tmp_path / "costs.html").read_text()


def test_it_only_says_so_where_it_is_asked_to(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _, told = fit_hacked(base, tmp_path, monkeypatch, falls=True, stops=False)
    assert told["noticed_at_step"] == 20 and scores.looks[-1].step == 24


def test_the_last_look_keeps_the_reward_of_one_at_its_step(base: Path, tmp_path: Path) -> None:
    """A run that is stopped at a look is looked at there once more, with no step and no reward between."""

    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 4

    scores = make_scores(base, tmp_path, num_answers=0)
    fit(make_module(base, _Hacked), 9, scores, Stops())
    assert [(look.step, look.reward) for look in scores.looks] == [(0, None), (2, 1.5), (4, 3.5)]


def test_prompts_are_those_of_rows_that_are_scored(base: Path, tmp_path: Path, caplog: Any) -> None:
    """Stories, questions and conversations may lie in one manifest; a picture that is gone is named."""
    turns = [{"text": "what?", "role": "user"}, {"text": "a word", "role": "assistant"}]
    rows: list[dict[str, Any]] = [
        {"segments": [{"text": "a story"}]},
        {"segments": [{"text": "a word"}], "question": "which?", "answer": "word"},
        {"segments": turns},
        {"image": str(base.parent / "0.png"), "text": "a word"},
        {"image": str(tmp_path / "gone.png"), "text": "a word"},
    ]
    Image.new("RGB", (16, 16)).save(tmp_path / "gone.png")
    manifest = tmp_path / "mixed.jsonl"
    manifest.write_text("".join(json.dumps({"id": f"r{n}", **row}) + "\n" for n, row in enumerate(rows)))
    scores = TaskScores([HeldOutTask(task, str(manifest)) for task in ("interleaved", "chat", "caption")], "out", None)
    module = make_module(base)
    module.configure_model()
    scores.setup(quiet_trainer(), module, "fit")
    assert {name: len(found) for name, found in scores._rows.items()} == {"interleaved": 1, "chat": 1, "caption": 2}
    with pytest.raises(ValueError, match="has no audio rows, which the task 'transcribe' needs"):
        TaskScores([HeldOutTask("transcribe", str(manifest))], "out").setup(quiet_trainer(), module, "fit")
    (tmp_path / "gone.png").unlink()
    served = Model(module.model, module.folder, module.image_transform)
    assert len(scores._fixed_prompts(served)) == 3
    assert "TaskScores draws no answer to" in caplog.text and "gone.png" in caplog.text


def test_an_honest_run_is_told_to_be_none(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores, _, told = fit_hacked(base, tmp_path, monkeypatch, falls=False)
    assert told["noticed_at_step"] is None and scores.looks[-1].step == 24


def test_what_is_missing_is_said(base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match="reads the looks of TaskScores, of which the trainer has 0"):
        fit(make_module(base), 1, RewardHackingStop(str(tmp_path)))
    stop = RewardHackingStop(str(tmp_path), truth="captions")
    with pytest.raises(ValueError, match="truth is 'captions'; TaskScores has caption, prose"):
        fit(make_module(base), 1, make_scores(base, tmp_path), stop)
    with pytest.raises(ValueError, match="give one or more, each with a name of its own"):
        TaskScores([HeldOutTask("text", "a"), HeldOutTask("text", "b")], "out")
    with pytest.raises(ValueError, match="task is 'captions'; choose one of"):
        HeldOutTask("captions", "a")
    with pytest.raises(ValueError, match="has a judge, which only speak has"):
        HeldOutTask("caption", "a", judge="b")
    scores = make_scores(base, tmp_path)
    module, trainer = make_module(base), quiet_trainer()
    module._device_mesh = object()
    scores.on_train_start(trainer, module)
    assert "no rank has the whole of a sharded model" in caplog.text and not scores.looks
