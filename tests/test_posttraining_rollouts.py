"""Rollouts: the trainer sees them as the engine that drew them, ranks and resumes change nothing, rewards rise."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.batch import PackedBatch
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.data.loading.collate import pack_documents
from mmllm.data.loading.prompts import PromptDataModule
from mmllm.data.rows.rows import Row
from mmllm.data.samples.documents import build_document
from mmllm.data.samples.sample import Sample
from mmllm.evaluation.rewards import load_rewards
from mmllm.inference.engine.requests import TextRequest, TextResult
from mmllm.losses.policy import AdaptiveKL
from mmllm.training.posttraining.rollout_log import step_means, step_sums
from mmllm.training.posttraining.rollout_module import RolloutModule
from mmllm.training.posttraining.rollout_scoring import Scored
from mmllm.training.posttraining.rollouts import Rewarded, RolloutConfig, packed_rollouts, reward_row
from mmllm.training.posttraining.value_head import PPOConfig
from tests.rollout_fixtures import RATES, SHORT, batch_of, make_module, manifest, model_folder, prompts, without_trainer
from tests.training_fixtures import quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore:.*LeafSpec:FutureWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return manifest(tmp_path_factory.mktemp("rows"))


def drawn(module: RolloutModule, rows: Path, task: str) -> Any:
    assert module.rollouts is not None
    batch = batch_of(rows, task)
    return module.rollouts.draw(batch.rows, batch.numbers)


# ---- the trainer sees what the engine drew


@pytest.mark.parametrize("task", ["caption", "chat"])
def test_log_probabilities_of_text_are_the_engines(folder: Path, rows: Path, tmp_path: Path, task: str) -> None:
    module = without_trainer(make_module(folder), task, tmp_path)
    module.train()
    rollouts = drawn(module, rows, task).rollouts
    assert len({one.answer for one in rollouts}) > 4
    scored = module._scorer(packed_rollouts(rollouts))
    engine_M = torch.tensor([value for one in rollouts for value in one.logprobs])
    torch.testing.assert_close(scored.logprobs_M.detach(), engine_M, atol=1e-4, rtol=0)
    assert module.training and module.model is not None and module.model.training


def test_the_policy_has_the_temperature_of_drawing(folder: Path, rows: Path, tmp_path: Path) -> None:
    config = RolloutConfig(max_new_tokens=5, group_size=2, temperature=0.6)
    module = without_trainer(make_module(folder, config), "caption", tmp_path)
    assert module.served is not None and module.folder is not None
    rollouts = drawn(module, rows, "caption").rollouts
    own_M = module._scorer(packed_rollouts(rollouts)).logprobs_M.detach()
    wanted = []
    for number, one in enumerate(rollouts):  # the engine's whole distribution, over the temperature
        prompt = batch_of(rows, "caption").rows[one.group]
        request = module.rollouts._request(module.rollouts._prompt(prompt), number)  # pyright: ignore
        whole = TextRequest(request.prompt, request.sampling, 5, number=number, num_logprobs=10_000)  # pyright: ignore
        (result,) = module.served.engine.run([whole])
        assert isinstance(result, TextResult) and result.top_logprobs is not None
        ids = one.document.token_ids_T[one.document.targets_T].tolist()
        for token_id, top in zip(ids, result.top_logprobs, strict=True):
            values = torch.tensor(list(top.values())) / 0.6
            wanted.append(top[token_id] / 0.6 - float(values.logsumexp(0)))
    torch.testing.assert_close(own_M, torch.tensor(wanted), atol=1e-4, rtol=0)
    assert float((own_M - torch.tensor([v for one in rollouts for v in one.logprobs])).abs().max()) > 0.1


@pytest.mark.parametrize("pattern", ["delay", "parallel"])
def test_log_probabilities_of_units_are_the_engines(tmp_path: Path, rows: Path, pattern: str) -> None:
    folder = model_folder(tmp_path / "model", pattern)
    config = RolloutConfig(group_size=3)
    rewards = [{"name": "length"}]
    module = without_trainer(make_module(folder, config, rewards=rewards), "speak", tmp_path)
    rollouts = drawn(module, rows, "speak").rollouts
    assert all(one.answer.wave_T.ndim == 1 and len(one.answer.wave_T) for one in rollouts)
    scored = module._scorer(packed_rollouts(rollouts))
    engine_M = torch.tensor([value for one in rollouts for value in one.logprobs])
    assert len(engine_M) == len(scored.logprobs_M) > len(rollouts)
    torch.testing.assert_close(scored.logprobs_M.detach(), engine_M, atol=1e-4, rtol=0)


@pytest.mark.parametrize("task", ["caption", "chat"])
def test_deterministic_log_probabilities_are_the_engines_bit_for_bit(
    folder: Path, rows: Path, tmp_path: Path, task: str
) -> None:
    config = RolloutConfig(max_new_tokens=8, group_size=3, deterministic=True)
    module = without_trainer(make_module(folder, config), task, tmp_path)
    rollouts = drawn(module, rows, task).rollouts
    parts = packed_rollouts(rollouts, alone=True)
    module._scorer.check_bits(rollouts, parts)  # raises unless torch.equal
    wrong = [*parts[1:], parts[0]]
    with pytest.raises(RuntimeError, match="aren't the engine's, bit for bit"):
        module._scorer.check_bits(rollouts, wrong)


def test_the_engine_sees_each_step_of_the_optimizer(folder: Path, rows: Path, tmp_path: Path) -> None:
    module, log = fit(folder, rows, tmp_path, steps=3)
    gaps = [float(row["train/engine_gap"]) for row in log]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4
    assert module.served is not None
    assert float(log[-1]["train/kl"]) > 0  # and the weights have moved


@pytest.mark.parametrize("task", ["caption", "speak"])
def test_rollouts_are_drawn_and_learnt_under_autocast(folder: Path, rows: Path, tmp_path: Path, task: str) -> None:
    """`precision: bf16-mixed`: the engine computes as training does; codec and rewards as they are trained."""
    config = RolloutConfig(max_new_tokens=8, group_size=4, max_seconds=0.2)
    module = without_trainer(make_module(folder, config, rewards=["length"]), task, tmp_path)
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(batch_of(rows, task), 0)["loss"]
    loss.backward()
    assert torch.isfinite(loss)
    assert module._experience is not None and module._experience.old_M.dtype == torch.float32
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)
    if task == "caption":
        # Processors without products in bf16 round by shape, so that the engine's rows differ in their last bits.
        assert module.window.means()["engine_gap"] < 0.05


# ---- ranks


class Meeting:
    """Sums over two threads, each of which is a rank."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2, timeout=60)
        self.values: dict[int, Tensor] = {}

    def reduce(self, rank: int, values: Tensor) -> Tensor:
        self.values[rank] = values.detach()
        self.barrier.wait()
        total = self.values[0] + self.values[1]
        self.barrier.wait()
        return total


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_two_ranks_learn_what_one_process_does(folder: Path, rows: Path, tmp_path: Path, algorithm: Any) -> None:
    grpo = {"scale_rewards": "batch", "loss_type": "grpo"}
    more: dict[str, Any] = {"grpo": grpo, "rloo": {"normalize_advantages": True}}
    config = RolloutConfig(
        algorithm, group_size=3, max_new_tokens=6, beta=0.1, num_iterations=1, **more.get(algorithm, {})
    )
    loader = prompts(rows, "caption", 4)

    def step(rank: int, world_size: int, reduce: Any) -> tuple[list[Tensor], float]:
        module = without_trainer(make_module(folder, config), "caption", tmp_path / str(world_size), world_size)
        if module.value_head is not None:
            torch.nn.init.constant_(module.value_head.linear.weight, 0.1)
        with torch.no_grad():  # the start and now are different models
            for parameter in module.model.decoder.parameters():  # pyright: ignore[reportOptionalMemberAccess]
                parameter.mul_(1.02)
        if reduce is not None:
            module._sum_over_ranks = lambda values: reduce(rank, values)  # pyright: ignore
        loader._rank, loader._world_size = rank, world_size
        batch = loader.batch(0)
        loss = module.training_step(batch, 0)["loss"]
        loss.backward()
        named = [p.grad for p in module.parameters() if p.requires_grad and p.grad is not None]
        return named, module.window.means()["reward"]

    alone, reward = step(0, 1, None)
    meeting, found = Meeting(), {}
    batches = {}
    for rank in range(2):  # the loader is not the threads' to share
        loader._rank, loader._world_size = rank, 2
        batches[rank] = loader.batch(0)
    loader.batch = lambda step, iteration=0: batches[int(threading.current_thread().name)]  # pyright: ignore

    def run(rank: int) -> None:
        found[rank] = step(rank, 2, meeting.reduce)

    threads = [threading.Thread(target=run, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0][1] == pytest.approx(reward)
    assert max(float(each.abs().max()) for each in alone) > 1e-4
    for own, first, second in zip(alone, found[0][0], found[1][0], strict=True):  # DDP takes the mean
        torch.testing.assert_close((first + second) / 2, own, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("task", ["caption", "chat", "speak"])
def test_every_parameter_gets_a_gradient_for_which_ranks_wait(
    folder: Path, rows: Path, tmp_path: Path, task: str
) -> None:
    config = RolloutConfig("ppo", max_new_tokens=4, group_size=2)
    module = without_trainer(make_module(folder, config, rewards=["length"]), task, tmp_path)
    module.training_step(batch_of(rows, task), 0)["loss"].backward()
    assert [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None] == []


# ---- trainings


def fit(
    folder: Path, rows: Path, logs: Path, steps: int, config: RolloutConfig | None = None, task: str = "caption",
    ckpt: Path | None = None, batch_size: int = 4, **settings: Any,
) -> tuple[RolloutModule, list[dict[str, str]]]:  # fmt: skip
    """A training, and the rows of its log."""
    import csv

    from lightning.pytorch.loggers import CSVLogger

    module = make_module(folder, config, **settings)
    data = PromptDataModule(rows, task, batch_size)  # pyright: ignore[reportArgumentType]
    logger = CSVLogger(str(logs), name="", version=f"until{steps}", flush_logs_every_n_steps=1)
    trainer = quiet_trainer(max_steps=steps, logger=logger, log_every_n_steps=1)
    trainer.fit(module, data, ckpt_path=ckpt)
    trainer.save_checkpoint(logs / f"{steps}.ckpt")
    with (Path(logger.log_dir) / "metrics.csv").open(encoding="utf-8") as stream:
        return module, list(csv.DictReader(stream))


def test_rewards_rise(folder: Path, rows: Path, tmp_path: Path) -> None:
    config = RolloutConfig(max_new_tokens=12, group_size=8, log_every=5, num_logged=1)
    module, log = fit(folder, rows, tmp_path, steps=20, config=config, out=str(tmp_path / "model"))
    rewards = [float(row["train/reward"]) for row in log]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 3
    stats = module.rollout_stats()
    assert set(stats) == {"reward", "kl", "entropy", "length"}
    assert stats["reward"] == pytest.approx(sum(rewards) / len(rewards))
    assert not module.rollout_stats()
    assert float(log[0]["train/kl"]) == pytest.approx(0, abs=1e-4)
    assert float(log[-1]["train/kl"]) > 0
    written = [json.loads(line) for line in (tmp_path / "until20" / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in written] == [step for step in (0, 5, 10, 15) for _ in range(8)]
    assert all(line["reward"] == -len(line["answer"]) for line in written)
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_resumed_training_draws_the_same(folder: Path, rows: Path, tmp_path: Path) -> None:
    config = RolloutConfig(max_new_tokens=6, group_size=3, log_every=1, num_logged=4)
    _, whole = fit(folder, rows, tmp_path / "whole", steps=4, config=config)
    fit(folder, rows, tmp_path / "parts", steps=2, config=config)
    _, rest = fit(folder, rows, tmp_path / "parts", steps=4, config=config, ckpt=tmp_path / "parts" / "2.ckpt")
    for column in ("train/reward", "train/loss", "train/kl", "train/grad_norm"):
        assert [row[column] for row in rest[-2:]] == [row[column] for row in whole[-2:]], column
    own, other = ((tmp_path / each / "until4" / "rollouts.jsonl").read_text() for each in ("whole", "parts"))
    assert own.splitlines()[-24:] == other.splitlines()[-24:]


@pytest.mark.parametrize("algorithm", ["rloo", "ppo"])
def test_rollouts_are_used_again_and_policies_stay_near(
    folder: Path, rows: Path, tmp_path: Path, algorithm: Any
) -> None:
    config = RolloutConfig(algorithm, group_size=4, max_new_tokens=8, num_iterations=2, log_every=1, num_logged=9)
    ppo = PPOConfig(kl_target=0.001, kl_horizon=100) if algorithm == "ppo" else None
    module, log = fit(folder, rows, tmp_path, steps=4, config=config, ppo=ppo)
    steps = [json.loads(line)["step"] for line in (tmp_path / "until4" / "rollouts.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == [0, 1]  # two steps on each
    assert [bool(row["train/reward"]) for row in log] == [True, False, True, False]
    if algorithm == "ppo":
        assert module.value_head is not None and module.value_head.linear.weight.abs().max() > 0
        assert float(log[0]["train/loss/value"]) > 0
        assert module.kl.coef != config.kl_coef
        checkpoint = torch.load(tmp_path / "4.ckpt", weights_only=False)
        assert checkpoint["mmllm_kl_coef"] == module.kl.coef
        assert "value_head.linear.weight" in checkpoint["state_dict"]


def test_the_reference_of_an_adapter_is_its_base(folder: Path, rows: Path, tmp_path: Path) -> None:
    before = without_trainer(make_module(folder), "caption", tmp_path).model
    config = RolloutConfig(max_new_tokens=6, group_size=4, beta=0.1)
    adapter = AdapterConfig(r=4)
    module, log = fit(folder, rows, tmp_path, steps=3, config=config, adapter=adapter)
    assert before is not None and module.model is not None and module.start is not None
    assert all("lora" in name for name in module.start.names)
    parts = packed_rollouts(drawn(module, rows, "caption").rollouts)
    with torch.no_grad():
        own_M, reference_M = module._scorer(parts).logprobs_M, module._reference(parts)
        plain = without_trainer(make_module(folder), "caption", tmp_path)
        wanted_M = plain._scorer(parts).logprobs_M
    assert reference_M is not None
    torch.testing.assert_close(reference_M, wanted_M, atol=1e-5, rtol=0)
    assert (own_M - wanted_M).abs().max() > 1e-3
    assert float(log[0]["train/kl"]) == pytest.approx(0, abs=1e-5)


# ---- details of a step


def test_replayed_documents_add_their_usual_loss(folder: Path, rows: Path, tmp_path: Path) -> None:
    def loss(replay: PackedBatch | None, weight: float) -> float:
        module = make_module(folder, RolloutConfig(group_size=2, max_new_tokens=4), replay_weight=weight)
        without_trainer(module, "caption", tmp_path)
        module._name_sources()
        batch = batch_of(rows, "caption")
        batch.replay = replay
        return float(module.training_step(batch, 0)["loss"].detach())

    module = without_trainer(make_module(folder), "caption", tmp_path)
    assert module.folder is not None
    document = build_document(Sample("one", "a red circle above two blue squares"), "text", module.folder)
    replay = pack_documents([[document]], document.num_tokens)
    module._name_sources()
    usual = float(module.loss_of(replay)[0].detach())
    assert loss(replay, 0.5) - loss(None, 0.5) == pytest.approx(0.5 * usual, rel=1e-4)


def test_answers_that_ran_into_their_bound_are_left_out_or_fined(folder: Path, rows: Path, tmp_path: Path) -> None:
    config = RolloutConfig(
        group_size=4, max_new_tokens=3, mask_truncated_completions=True, missing_eos_penalty=100.0, log_every=1,
        num_logged=9,
    )  # fmt: skip
    module = without_trainer(make_module(folder, config), "caption", tmp_path)
    module.training_step(batch_of(rows, "caption"), 0)
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert any(line["is_truncated"] for line in lines)
    for line in lines:
        assert line["reward"] == -len(line["answer"]) - 100.0 * line["is_truncated"]
    assert module._experience is not None
    kept = torch.tensor([not line["is_truncated"] for line in lines])
    lengths = torch.tensor([line["num_tokens"] for line in lines])
    assert torch.equal(module._experience.counts_M, torch.repeat_interleave(kept, lengths))


def test_groups_of_one_reward_are_counted_where_there_are_groups() -> None:
    def means(is_flat: list[bool]) -> dict[str, float]:
        rollouts: Any = [SimpleNamespace(is_truncated=n == 0) for n in range(4)]
        rewarded = Rewarded(rollouts, [1.0, 3.0, 2.0, 2.0], {"length": [1.0, 3.0, 2.0, 2.0]}, 0.5, 0.25)
        before = Scored(torch.zeros(8), torch.arange(8) // 2, torch.ones(8), None, torch.zeros(()))
        return step_means(step_sums(rewarded, before, torch.zeros(8), torch.tensor(is_flat), lambda sums: sums))

    found = means([False, True])
    assert found["zero_std_groups"] == 0.5
    assert (found["reward"], found["length"], found["truncated"], found["kl"]) == (2, 2, 0.25, 0)
    assert found["reward_std"] == found["reward_std/length"] == pytest.approx(0.5**0.5)
    assert "zero_std_groups" not in means([True] * 4)


def test_rewards_see_what_a_row_has_and_nothing_else() -> None:
    asked = [
        {"text": "how many?", "role": "user"},
        {"text": "two", "role": "assistant"},
        {"text": "and?", "role": "user"},
    ]
    document: Any = "the document"
    open_row = Row("a", "interleaved", "rows.jsonl:1", segments=tuple(asked), metadata={"level": 2})
    keys = {"id": "a", "where": "rows.jsonl:1", "level": 2, "task": "chat", "document": document, "tokenizer": "t"}
    assert reward_row(open_row, "chat", document, "t") == keys  # what was said before is no reference
    replies = ({"text": "one", "role": "assistant"}, {"text": " more", "role": "assistant"})
    whole = Row("a", "interleaved", "rows.jsonl:1", segments=(*asked, *replies), metadata={"level": 2})
    assert reward_row(whole, "chat", document, "t") == {**keys, "answer": "one more"}
    with pytest.raises(ValueError, match="has neither 'answer' nor 'text'"):
        load_rewards(["exact_answer"]).score([""], [reward_row(open_row, "chat", document, "t")])


# ---- what is refused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algorithm": "dpo"}, "rollout.algorithm is 'dpo'; choose grpo, rloo, ppo"),
        ({"group_size": 1}, "rollout.group_size is 1; grpo needs at least 2"),
        ({"temperature": 0.0}, "rollout.temperature is 0.0"),
        ({"num_iterations": 0}, "rollout.num_iterations is 0; it must be at least 1"),
        ({"epsilon": 1.5}, "rollout.epsilon is 1.5"),
        ({"top_p": 0.0}, "rollout.top_p is 0.0"),
        ({"loss_type": "bnpo"}, "rollout.loss_type is 'bnpo'; choose grpo, dr_grpo, dapo"),
        ({"algorithm": "rloo", "scale_rewards": "none"}, "scale_rewards is 'none', which is of grpo"),
        ({"normalize_advantages": True}, "normalize_advantages is True, which is of rloo"),
        ({"max_seconds": 0.0}, "rollout.max_seconds is 0.0; it must be positive"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutConfig(**settings)


def test_what_rollouts_can_not_be_drawn_with(folder: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ppo is given, and rollout\.algorithm is 'grpo'"):
        make_module(folder, ppo=PPOConfig())
    with pytest.raises(ValueError, match=r"ppo\.kl_target is 4\.0, and rollout\.beta is 0"):
        make_module(folder, RolloutConfig("ppo", beta=0.0), ppo=PPOConfig(kl_target=4.0))
    with pytest.raises(ValueError, match=r"trainer\.strategy is FSDPStrategy, which splits the model"):
        from lightning.pytorch.strategies import FSDPStrategy

        module = make_module(folder)
        module._trainer = type("T", (), {"strategy": FSDPStrategy()})()  # pyright: ignore
        module.configure_model()
    silent = model_folder(tmp_path / "silent", pointer=False)
    with pytest.raises(ValueError, match="rollouts of speech need a model with a pointer"):
        without_trainer(make_module(silent, rewards=["length"]), "speak", tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.deterministic compares log-probabilities of text"):
        without_trainer(make_module(folder, RolloutConfig(deterministic=True)), "speak", tmp_path)
    with pytest.raises(ValueError, match=r"rollout\.num_iterations is 2 and trainer\.accumulate_grad_batches 2"):
        module = make_module(folder, RolloutConfig(num_iterations=2))
        quiet_trainer(max_steps=1, accumulate_grad_batches=2).fit(module, PromptDataModule(rows, "caption", 2))


def test_a_reward_that_fails_stops_the_training_with_its_name(folder: Path, rows: Path, tmp_path: Path) -> None:
    module = without_trainer(make_module(folder, rewards=["exact_answer", SHORT]), "caption", tmp_path)
    module.rewards.rewards["broken"] = lambda answers, rows: [float("nan")] * len(answers)
    with pytest.raises(ValueError, match=r"the reward 'broken' gave nan for the answer .* to row 'picture \d'"):
        module.training_step(batch_of(rows, "caption"), 0)


def test_the_cost_of_kl_is_that_of_the_algorithm() -> None:
    assert [RolloutConfig(each).kl_coef for each in ("grpo", "rloo", "ppo")] == [0.0, 0.05, 0.05]  # pyright: ignore
    assert [RolloutConfig(each).num_answers for each in ("grpo", "rloo", "ppo")] == [8, 2, 1]  # pyright: ignore
    assert AdaptiveKL(0.05).target is None
    assert RATES.lr > 0
