"""Switches of the experts in training: the bias that balances them, ranks, resuming, and what is logged."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch._dynamo.testing import CompileCounter

from mmllm.batch import Modality, PackedBatch
from mmllm.evaluation.routing import changed_share, chosen_experts, load_routing, routing_drift
from mmllm.losses.routing import RoutingTotals, router_losses
from mmllm.model.router import MoEConfig, Router
from mmllm.training.callbacks import RoutingLog
from mmllm.training.expert_bias import ExpertBias
from mmllm.training.lightning_cli import quiet_lightning
from tests.training_fixtures import (
    ListData,
    LossRecorder,
    TinyData,
    fit_rank,
    merge,
    mixed_pairs,
    quiet_trainer,
    run_two_ranks,
    tiny_batch,
    tiny_module,
)

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from host_syncs import HostSyncs

SIGMOID = MoEConfig(4, 2, 16, router_aux_loss_coef=0.0, router_z_loss_coef=0.0, scoring_func="sigmoid",
                    use_expert_bias=True, bias_update_speed=0.003)  # fmt: skip
SWITCHED = MoEConfig(
    4, 2, 16, n_group=2, topk_group=1, n_shared_experts=1, use_expert_bias=True, routed_scaling_factor=1.5,
    aux_loss_scope="sequence", local_entropy_loss_coef=0.02, global_entropy_loss_coef=0.02,
    global_entropy_min_experts=3,
)  # fmt: skip


def _fit(
    module: pl.LightningModule, data: pl.LightningDataModule, *callbacks: pl.Callback, ckpt: Any = None, **trainer: Any
) -> list[float]:
    recorder = LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, *callbacks, **trainer).fit(module, datamodule=data, ckpt_path=ckpt, weights_only=True)
    return recorder.losses


def _router(module: Any) -> Router:
    return module.model.decoder.layers[1].mlp.gate


def test_a_bias_rises_where_the_load_is_below_the_mean() -> None:
    routers = [Router(3, SIGMOID), Router(3, SIGMOID)]
    bias = ExpertBias(routers, SIGMOID.expert_pools(), 0.01)
    bias.step()
    bias.add(torch.tensor([[3, 3, 3, 3], [6, 0, 3, 3]]))
    bias.add(torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]))
    bias.step()
    bias.step()  # no load: nothing moves
    first, second = (router.e_score_correction_bias for router in routers)
    assert first is not None and second is not None
    torch.testing.assert_close(first, torch.tensor([-0.01, 0.01, 0.01, -0.01]))
    torch.testing.assert_close(second, torch.tensor([-0.01, 0.01, 0.0, 0.0]))


def test_experts_of_a_modality_are_compared_with_one_another() -> None:
    pools = {"text": (0, 3), "image": (1, 2, 4), "audio": (0, 3), "units": (0, 3)}
    config = MoEConfig(5, 2, 8, use_expert_bias=True, modality_experts=pools)
    router = Router(3, config)
    bias = ExpertBias([router], config.expert_pools(), 0.1)
    bias.add(torch.tensor([[90, 1, 2, 110, 3]]))
    bias.step()
    assert router.e_score_correction_bias is not None
    torch.testing.assert_close(router.e_score_correction_bias, torch.tensor([0.1, 0.1, 0.0, -0.1, -0.1]))


def test_a_bias_alone_balances_the_experts() -> None:
    module = tiny_module(moe=SIGMOID)
    module.configure_model()
    bias_E = _router(module).e_score_correction_bias
    assert bias_E is not None and module.model is not None
    bias_E += torch.tensor([0.1, 0.0, 0.0, -0.1])  # one expert is liked, and one is not
    module.optimizer = dataclasses.replace(module.optimizer, lr=1e-5)
    violations = []
    for _ in range(2):
        counts_LE = module.model(tiny_batch(99, 8)).routing.counts_LE.double()
        violations.append(float(counts_LE.max() / counts_LE.mean() - 1))
        _fit(module, ListData([tiny_batch(number, text_only=True) for number in range(40)]), max_steps=40)
    assert violations[0] > 0.8
    assert violations[1] < 0.4


def test_a_run_with_a_bias_resumes_exactly_also_inside_an_accumulation_window(tmp_path: Path) -> None:
    def run(name: str, stop: int | None = None, ckpt: Any = None) -> dict[str, torch.Tensor]:
        module = tiny_module(seed=3, moe=SIGMOID)
        torch.manual_seed(3)
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        settings: dict[str, Any] = {"enable_checkpointing": True, "limit_train_batches": 100, "max_steps": 5}
        stopping = [] if stop is None else [_SaveAndStop(stop, tmp_path / "cut.ckpt")]
        _fit(module, TinyData(), saving, *stopping, ckpt=ckpt, accumulate_grad_batches=2, **settings)
        return module.state_dict()

    whole = run("whole")
    for batch in (5, 6):  # inside a window, and at its end
        run(f"cut{batch}", stop=batch)
        saved = torch.load(tmp_path / "cut.ckpt", weights_only=True)["state_dict"]
        bias = next(value for name, value in saved.items() if name.endswith("e_score_correction_bias"))
        assert bias.abs().max() > 0
        resumed = run(f"cut{batch}", ckpt=tmp_path / "cut.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole)


class _SaveAndStop(pl.Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx + 1 == self.batch:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def _train_rank(rank: int, port: int, out: str, pairs: list[tuple[PackedBatch, PackedBatch]]) -> None:
    module = tiny_module(moe=SWITCHED, moe_layers=(0, 1))
    logger = CSVLogger(out, name="", version="")
    fit_rank(rank, port, out, module, ListData(pairs), max_steps=3, accumulate_grad_batches=2, logger=logger)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_give_the_losses_weights_biases_and_log_of_one(tmp_path: Path) -> None:
    pairs = [*mixed_pairs(), *mixed_pairs()[:2]]
    alone = tiny_module(moe=SWITCHED, moe_layers=(0, 1))
    data = ListData([merge(list(pair)) for pair in pairs])
    logger = CSVLogger(tmp_path / "alone", name="", version="")
    losses = _fit(alone, data, max_steps=3, accumulate_grad_batches=2, logger=logger)
    ranks = run_two_ranks(_train_rank, tmp_path, pairs)
    for name, weight in alone.state_dict().items():
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name]), name
        assert torch.allclose(ranks[0]["weights"][name], weight, atol=2e-5), name
    assert all(rank["losses"] == pytest.approx(losses, rel=1e-5) for rank in ranks)
    assert any(name.endswith("e_score_correction_bias") and value.any() for name, value in alone.state_dict().items())
    logged = [_logged_losses(folder / "metrics.csv") for folder in (tmp_path, tmp_path / "alone")]
    assert {f"train/loss/{name}" for name in ("balance", "z", "local_entropy", "global_entropy")} <= logged[0].keys()
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)


def _logged_losses(path: Path) -> dict[str, float]:
    with path.open(newline="") as file:
        row = list(csv.DictReader(file))[-1]
    return {name: float(value) for name, value in row.items() if name.startswith("train/loss") and value}


# --- telemetry ----------------------------------------------------------------------------------------------------


def test_routing_is_logged_by_layer_and_modality_and_read_back(tmp_path: Path) -> None:
    module, logger = tiny_module(moe_layers=(0, 1)), CSVLogger(tmp_path, name="", version="")
    routing_log = RoutingLog(str(tmp_path), every_steps=3, probe=True)
    _fit(module, TinyData(), routing_log, max_steps=9, logger=logger, log_every_n_steps=3)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["routing/dead_experts"]]
    assert len(rows) == 3
    for name in ("max_violation", "router_entropy_bits"):
        for row in rows:
            values = [float(row[f"routing/{name}/layer_{layer}"]) for layer in (0, 1)]
            assert float(row[f"routing/{name}/max"]) == pytest.approx(max(values))
            assert float(row[f"routing/{name}/mean"]) == pytest.approx(sum(values) / 2)
    for modality in Modality:
        assert 0 < float(rows[-1][f"routing/router_entropy_bits/{modality.name.lower()}"]) <= 2
    for name in ("load_drift_bits", "changed_share"):
        assert not rows[0][f"routing/{name}/mean"], "there is nothing to compare the first window with"
        assert 0 < float(rows[2][f"routing/{name}/max"]) < 1
    record = json.loads((tmp_path / "routing.json").read_text())
    counts, tokens = torch.tensor(record["counts"]), torch.tensor(record["tokens"])
    assert torch.equal(counts.sum(dim=2), 2 * tokens.expand(2, -1)), "each token chooses two experts in each layer"
    summary = load_routing(tmp_path / "routing.json")
    bits = torch.tensor(record["entropy_sums"]).sum(dim=1) / tokens.sum() / torch.tensor(2.0).log()
    assert summary["router_entropy_bits"] == pytest.approx(bits.tolist(), abs=1e-4)
    for key in ("entropy_sums", "tokens", "last_entropy_sums", "last_tokens"):
        del record[key]
    (tmp_path / "routing.json").write_text(json.dumps(record))
    earlier = load_routing(tmp_path / "routing.json")
    assert "router_entropy_bits" not in earlier
    assert earlier["max_violation"] == summary["max_violation"]


def test_a_probe_changes_nothing_in_training(tmp_path: Path) -> None:
    def run(name: str, *callbacks: pl.Callback) -> dict[str, torch.Tensor]:
        module = tiny_module(moe=MoEConfig(4, 2, 16, expert_dropout=0.2, router_jitter_noise=0.1))
        _fit(module, TinyData(), *callbacks, max_steps=4)
        assert module.training
        return module.state_dict()

    plain = run("plain")
    probed = run("probed", RoutingLog(str(tmp_path), every_steps=1, probe=True))
    assert all(torch.equal(plain[name], probed[name]) for name in plain)


def test_a_probe_compiles_nothing() -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    module = tiny_module()
    module.configure_model()
    assert module.model is not None
    module.model.decoder.compile_layers(backend=counter)
    batch, compiled = tiny_batch(0).with_metadata(), module.model.decoder.layers[0].compiled
    chosen = [chosen_experts(module.model, batch) for _ in range(3)]
    assert torch.equal(chosen[0], chosen[2]) and counter.frame_count == 0
    assert module.model.decoder.layers[0].compiled is compiled
    torch._dynamo.reset()


def test_totals_of_an_earlier_checkpoint_are_read(tmp_path: Path) -> None:
    log = RoutingLog(str(tmp_path))
    counts_LME = torch.ones(1, 4, 4, dtype=torch.int64)
    log.load_state_dict({"total": counts_LME, "last": None, "last_step": 3})
    state = log.state_dict()
    assert torch.equal(state["total"]["counts"], counts_LME)
    again = RoutingLog(str(tmp_path))
    again.load_state_dict(state)
    assert again.state_dict()["last"] is None
    assert torch.equal(again.state_dict()["total"]["counts"], counts_LME)


def test_drift_of_two_models_by_hand() -> None:
    first = tiny_module()
    first.configure_model()
    second = copy.deepcopy(first)
    batch = tiny_batch(5)
    assert first.model is not None and second.model is not None
    experts_LNK = chosen_experts(first.model, batch)
    assert experts_LNK.shape == (1, int((batch.document_ids_BT >= 0).sum()), 2)
    assert routing_drift(first.model, second.model, batch) == {
        "layers": [1], "changed_share": [0.0], "load_divergence_bits": [0.0],
    }  # fmt: skip
    _router(second).weight.data.copy_(_router(first).weight.data.roll(1, dims=0))  # expert e is e + 1 now
    expected_LNK = ((experts_LNK + 1) % 4).sort(dim=-1).values
    assert torch.equal(chosen_experts(second.model, batch), expected_LNK)
    drift = routing_drift(first.model, second.model, batch)
    assert drift["changed_share"] == [
        pytest.approx((expected_LNK != experts_LNK).any(-1).double().mean().item(), abs=1e-5)
    ]
    assert 0 < drift["load_divergence_bits"][0] < 1
    noisy = tiny_module(moe=MoEConfig(4, 2, 16, expert_dropout=0.5, router_jitter_noise=0.5))
    noisy.configure_model()
    assert noisy.model is not None
    calm_LNK = chosen_experts(noisy.model.train(), batch)
    assert (calm_LNK >= 0).all() and torch.equal(calm_LNK, chosen_experts(noisy.model, batch))
    with pytest.raises(ValueError, match="models of one shape on one batch"):
        changed_share(experts_LNK, experts_LNK[:, 1:])


# --- mixture of depths --------------------------------------------------------------------------------------------


class _TextData(ListData):
    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader(self.batches[:4], batch_size=None, collate_fn=lambda batch: batch)


def _deep(**settings: Any) -> Any:
    module = tiny_module(moe_layers=(1,), **settings)
    module.decoder = dataclasses.replace(module.decoder, mod_layers=(0,), mod_capacity=0.4, mod_predictor_coef=0.1)
    return module


def test_a_mixture_of_depths_learns_and_its_predictor_is_what_is_validated(tmp_path: Path) -> None:
    module, logger = _deep(), CSVLogger(tmp_path, name="", version="")
    data = _TextData([tiny_batch(number % 4, text_only=True) for number in range(80)])
    settings = {"val_check_interval": 40, "check_val_every_n_epoch": None, "log_every_n_steps": 20}
    losses = _fit(module, data, max_steps=80, logger=logger, **settings)
    assert sum(losses[-4:]) < sum(losses[:4])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = [float(row["val/depth_right"]) for row in rows if row["val/depth_right"]]
    passed = [float(row["val/depth_passed"]) for row in rows if row["val/depth_passed"]]
    trained = [float(row["train/loss/depth_passed"]) for row in rows if row["train/loss/depth_passed"]]
    assert right[-1] > 0.7, "a predictor that says no is right for 55%"
    assert all(0.4 <= share < 0.5 for share in trained), "a document's share is rounded up"
    assert 0.1 < passed[-1] < 0.7 and passed[-1] != trained[-1]


def test_a_random_choice_of_depths_trains_by_the_seed_without_a_predictor(tmp_path: Path) -> None:
    found = []
    for run, seed in enumerate((0, 0, 1)):
        module, logger = _deep(), CSVLogger(tmp_path / str(run), name="", version="")
        module.decoder = dataclasses.replace(module.decoder, mod_router="random")
        module.configure_model()
        weights = {name: weight.clone() for name, weight in module.state_dict().items()}
        assert not [name for name in weights if "depth.predictor" in name]
        module._seed = seed  # of each step's draws
        data = _TextData([tiny_batch(number % 4, text_only=True) for number in range(6)])
        found.append((weights, _fit(module, data, max_steps=6, logger=logger, log_every_n_steps=2)))
        assert "depth" not in (tmp_path / str(run) / "metrics.csv").read_text().splitlines()[0]
    weights, losses = zip(*found, strict=True)
    assert all(torch.equal(weights[0][name], weights[2][name]) for name in weights[0]), "they differ in the draws alone"
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_ranks_give_the_losses_and_weights_of_one_with_a_mixture_of_depths(tmp_path: Path) -> None:
    pairs = mixed_pairs()
    alone = _deep()
    data = ListData([merge(list(pair)) for pair in pairs])
    losses = _fit(alone, data, max_steps=len(pairs), precision="64-true")
    ranks = run_two_ranks(_train_deep_rank, tmp_path, pairs)
    for name, weight in alone.state_dict().items():
        assert torch.allclose(ranks[0]["weights"][name], weight, rtol=0, atol=1e-11), name
    assert all(rank["losses"] == pytest.approx(losses, rel=1e-11) for rank in ranks)


def _train_deep_rank(rank: int, port: int, out: str, pairs: list[tuple[PackedBatch, PackedBatch]]) -> None:
    fit_rank(rank, port, out, _deep(), ListData(pairs), max_steps=len(pairs), precision="64-true")


def test_no_switch_asks_the_host() -> None:
    pools = {"text": (0, 1), "image": (2, 3), "audio": (2, 3), "units": (0, 1)}
    for moe in (
        dataclasses.replace(SWITCHED, expert_dropout=0.2, router_jitter_noise=0.1),
        MoEConfig(4, 2, 16, use_expert_bias=True, modality_experts=pools, local_entropy_loss_coef=0.1),
    ):
        module = _deep(moe=moe)
        module.configure_model()
        bias = ExpertBias.of(module.model.decoder)
        assert bias is not None
        batch = tiny_batch(3).with_metadata()
        for is_training in (True, False):
            module.train(is_training)
            with HostSyncs() as syncs:
                losses = module._losses_of(batch)
                totals = RoutingTotals.of(losses.routing)
                loss = losses.objective + losses.routing.depth.loss(totals.num_tokens)
                for value in router_losses(moe, losses.routing, totals).values():
                    loss = loss + value
                loss.backward()
                bias.add(totals.counts_LE)
                bias.step()
                module.routing.add(losses.routing)
            ours = ("routing", "router", "experts", "depth", "expert_bias", "attend", "sequences", "decoder")
            assert not [place for _, place in syncs.asked if place.partition(".py")[0].endswith(ours)], str(syncs)
