"""Reward models: TRL's loss and gradients, calibration, the folder, and scores that are the training's."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.files import REWARD_CONFIG, REWARD_HEAD
from mmllm.checkpoints.folder import load_model
from mmllm.data.loading.preference_rows import AnswerWriter, read_row
from mmllm.data.samples.documents import build_prompt
from mmllm.evaluation.rewards import load_rewards
from mmllm.inference.reward_model import WEIGHT, RewardModel, reward_settings
from mmllm.losses.calibration import calibration, margin_histogram
from mmllm.training.posttraining.reward_module import RewardConfig, RewardModule
from mmllm_tokenizers.tensor_file import save_tensors
from tests.preference_fixtures import RATES, fit, make_data, pair, pairs_file, text_model, write_rows
from tests.training_fixtures import fit_rank, run_two_ranks

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("base") / "model")


def make_reward(model: Path, reward: RewardConfig | None = None, **settings: Any) -> RewardModule:
    torch.manual_seed(0)
    return RewardModule(reward, **{"init_from": str(model), "optimizer": RATES, **settings})


@pytest.mark.parametrize("adapter", [None, AdapterConfig(r=2, lora_alpha=8)], ids=["full", "lora"])
def test_a_reward_model_comes_back_from_its_folder(model: Path, tmp_path: Path, adapter: AdapterConfig | None) -> None:
    path = pairs_file(tmp_path)
    held_out = write_rows(tmp_path / "val.jsonl", [pair(number) for number in range(12, 19)])
    module = make_reward(model, RewardConfig(centering=0.01), adapter=adapter, out=str(tmp_path / "out"))
    data = make_data(path, model, val_pairs=str(held_out))
    losses, _ = fit(module, data, 15)
    assert losses[-1] < losses[0]

    loaded = RewardModel.load(tmp_path / "out")
    rows = [read_row(line, "pairs", tmp_path) for line in held_out.read_text().splitlines()]
    scores = loaded.score_rows(rows)
    module.eval()
    batch = next(iter(make_data(held_out, model, batch_size=7).loader("train", seed=None)))
    rewards_A = module.rewards_of(batch)[0]
    for answer in range(batch.num_answers):
        side = 0 if batch.is_chosen_A[answer] else 1
        assert scores[int(batch.group_A[answer])][side] == pytest.approx(rewards_A[answer].item(), abs=1e-4)
    told = json.loads((tmp_path / "out" / "reward_config.json").read_text())["calibration"]
    assert told["num_pairs"] == 7
    assert told["accuracy"] == pytest.approx(sum(chosen > rejected for chosen, rejected in scores) / 7)
    assert load_model(tmp_path / "out").model is not None, "also a model like any other"

    short = [number for number, row in enumerate(rows) if len(row.prompt) == 1]
    prompts = [build_prompt("chat", loaded.tokenizer, segments=[rows[n].prompt[0].text]) for n in short]
    answers = [rows[number].answers[0].text for number in short]
    wanted = [scores[number][0] for number in short]
    assert loaded.score_answers(prompts, answers) == pytest.approx(wanted, abs=1e-5)
    messages = [{"prompt": json.loads(held_out.read_text().splitlines()[n])["prompt"]} for n in short]
    assert loaded.score_texts(messages, answers) == pytest.approx(wanted, abs=1e-5)
    assert loaded.score_texts([{"prompt": prompt} for prompt in prompts], answers) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_loss_and_gradients_are_those_of_trl(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    import transformers
    from datasets import Dataset
    from trl import RewardConfig as TheirConfig
    from trl import RewardTrainer

    from mmllm.interop.exporting import export_model
    from tests.test_losses_preferences import padded, tokenizer

    path = pairs_file(tmp_path, 5)
    batch = next(iter(make_data(path, model, batch_size=5).loader("train", seed=None)))
    module = make_reward(model, RewardConfig(centering=0.05))
    module.configure_model()
    assert module.reward_head is not None
    loss, _, _ = module.loss_of(batch)
    loss.backward()

    export_model(model, tmp_path / "hf")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf", num_labels=1)
    theirs.config.pad_token_id = 0  # id 0 pads, and stands in no answer
    theirs.score.weight.data.copy_(module.reward_head.weight.detach())
    arguments = TheirConfig(
        output_dir=str(tmp_path / "trl"), report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False,
        center_rewards_coefficient=0.05,
    )  # fmt: skip
    row = {"prompt": "<end>", "chosen": "<end> <end>", "rejected": "<end>"}
    trainer = RewardTrainer(theirs, arguments, train_dataset=Dataset.from_list([row] * 2),
                            processing_class=tokenizer())  # fmt: skip
    their_model: Any = trainer.model
    their_model.eval()
    given = padded(batch)
    del given["completion_mask"]
    wanted: Any = trainer.compute_loss(their_model, given)
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), abs=1e-5)
    own, other = dict(module.named_parameters()), dict(their_model.named_parameters())
    for name, there in (
        ("reward_head.weight", "score.weight"),
        ("model.decoder.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("model.decoder.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
    ):
        assert own[name].grad.abs().max() > 1e-6  # type: ignore[union-attr]
        torch.testing.assert_close(own[name].grad, other[there].grad, rtol=1e-3, atol=1e-5)


def test_rows_say_by_how_much_their_sides_differ(model: Path, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pairs.jsonl", [{**pair(number), "margin": number / 2} for number in range(5)])
    batch = next(iter(make_data(path, model, batch_size=5).loader("train", seed=None)))
    module = make_reward(model, RewardConfig("row"))
    module.configure_model()
    rewards_A = module.rewards_of(batch)[0].tolist()
    wanted = 0.0
    for number in range(5):
        sides = {bool(batch.is_chosen_A[a]): rewards_A[a] for a in range(10) if int(batch.group_A[a]) == number}
        wanted += math.log(1 + math.exp(-(sides[True] - sides[False] - number / 2)))
    assert module.answer_losses(batch).objective.item() == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match=r"reward\.margin is -1"):
        RewardConfig(-1)


def two_ranks(rank: int, port: int, out: str, model: Path, path: Path) -> None:
    fit_rank(rank, port, out, make_reward(model), make_data(path, model, val_pairs=str(path)), max_steps=2)


def test_two_ranks_are_one_process(model: Path, tmp_path: Path) -> None:
    path = pairs_file(tmp_path, 9)
    found = run_two_ranks(two_ranks, tmp_path, model, path)
    module = make_reward(model)
    fit(module, make_data(path, model), 2)
    for rank in found:
        for name, weight in module.state_dict().items():
            assert torch.allclose(rank["weights"][name], weight, atol=2e-5), name


def test_calibration_is_counted_bin_by_bin() -> None:
    margins_P = torch.tensor([0.0, 0.1, -0.1, 2.0, 2.0, -2.0, 2.0, 30.0])
    told = calibration(margin_histogram(margins_P[:4]) + margin_histogram(margins_P[4:]))
    bins: dict[int, list[tuple[float, float]]] = {}
    for margin in margins_P.tolist():
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 0.5 if margin == 0 else float(margin > 0)
        bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((confidence, right))
    wanted = sum(abs(sum(c for c, _ in each) - sum(r for _, r in each)) for each in bins.values()) / 8
    assert told["ece"] == pytest.approx(wanted) and told["num_pairs"] == 8
    assert told["accuracy"] == pytest.approx(5.5 / 8)
    assert [each["pairs"] for each in told["bins"]] == [len(bins[place]) for place in sorted(bins)]


def test_a_reward_model_is_a_reward_of_documents_and_of_prompts(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "judge")
    head_1D = torch.randn(1, load_model(model).model.config.decoder.hidden_size)
    save_tensors({WEIGHT: head_1D}, tmp_path / "judge" / REWARD_HEAD)
    (tmp_path / "judge" / REWARD_CONFIG).write_text(reward_settings(None, None))
    judge = RewardModel.load(tmp_path / "judge")
    again = make_reward(tmp_path / "judge")
    again.configure_model()
    assert again.reward_head is not None and torch.equal(again.reward_head.weight, head_1D), "trained on"
    asked: list[torch.device] = []

    def device() -> torch.device:
        asked.append(torch.device("cpu"))
        return asked[-1]

    rewards = load_rewards([{"name": "reward_model", "folder": str(tmp_path / "judge")}], device=device)
    rows = [read_row(json.dumps(pair(number)), "pairs", tmp_path) for number in (1, 2)]
    writer = AnswerWriter(judge.tokenizer, judge.transform, 99)
    drawn = [{"document": writer.document(row, row.answers[0]), "tokenizer": judge.tokenizer.hash} for row in rows]
    answers = [row.answers[0].text for row in rows]
    wanted = [scores[0] for scores in judge.score_rows(rows)]
    assert rewards.score(answers, drawn).totals == pytest.approx(wanted, abs=1e-5)
    assert rewards.score(answers, [pair(1), pair(2)]).totals == pytest.approx(wanted, abs=1e-5)
    assert asked, "it computes where the training does"
    judge.to("meta")
    assert judge.head_D.is_meta
    with pytest.raises(ValueError, match="train a reward model from a model with the same tokenizer folder"):
        rewards.score(answers, [{**row, "tokenizer": "other"} for row in drawn])


def test_what_is_no_reward_model_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="it is a model, not a reward model"):
        RewardModel.load(model)
    with pytest.raises(FileNotFoundError, match="no model folder"):
        RewardModel.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="form pairs"):
        fit(make_reward(model), make_data(pairs_file(tmp_path), model, form="answers"), 1)
