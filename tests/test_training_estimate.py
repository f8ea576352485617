"""What `fit --print_estimate` says, against what is measured: of memory by the allocator, of products by a counter."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mmllm import paths
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.cli.main import main
from mmllm.losses.batch import LossFunction
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops, Work, peak_flops, seen_pairs
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import LossConfig, ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.adapters import adapter_rates
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.estimate_memory import Load, largest_batch, memory_bytes
from mmllm.training.layout import Layout
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from mmllm.training.parts import build_model
from tests.training_fixtures import ListData, quiet_trainer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from allocations import AllocationPeak

torch.set_num_threads(1)
SLOTS, PICTURE, LENGTH, VOCAB = 16, 32, 192, 1500
TOWER: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": PICTURE, "layers": 3, "width": 128, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}


def model_config(is_moe: bool, is_checkpointed: bool, sees: bool) -> ModelConfig:
    decoder = DecoderConfig(
        VOCAB, hidden_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=512, moe=MoEConfig(8, 2, 192) if is_moe else None, gradient_checkpointing=is_checkpointed,
    )  # fmt: skip
    vision = VisionConfig(open_clip=TOWER) if sees else None
    return ModelConfig(decoder, vision, ImageProjectorConfig(kind="mlp"), None, LossConfig(head_z_loss_coef=1e-4))


def load(sees: bool, batch_size: int = 4) -> Load:
    images = 6 if sees else 0
    return Load(batch_size, LENGTH, images, Work((LENGTH,), LENGTH - images * SLOTS, num_images=images), 1, False)


def module_of(config: ModelConfig, muon: bool = False) -> DecoderModule:
    optimizer = OptimizerConfig(lr=1e-3, muon=muon)
    return DecoderModule(config.decoder, config.vision, config.image_projector, None, config.loss, optimizer=optimizer)


def measured(config: ModelConfig, layout: Layout, muon: bool) -> int:
    """The most that PyTorch's allocator held while Lightning made three steps from nothing."""
    with torch.device("meta"):
        shapes = MultimodalModel(config)
    sizes = load(config.vision is not None)
    batches = [largest_batch(shapes, sizes.batch_size, sizes) for _ in range(3 * layout.accumulated)]
    precision: Any = layout.precision
    with quiet_lightning(), AllocationPeak("cpu") as memory:
        trainer = quiet_trainer(
            *([EMA(0.5)] if layout.keeps_average else []), max_steps=3, gradient_clip_val=1.0, precision=precision,
            accumulate_grad_batches=layout.accumulated, log_every_n_steps=100,
        )  # fmt: skip
        trainer.fit(module_of(config, muon), ListData(batches))
    return memory.peak + sum(
        value.nbytes for batch in batches[: 2 * layout.accumulated] for value in vars(batch).values()
        if isinstance(value, torch.Tensor)
    )  # fmt: skip


CASES = {
    "dense": (False, False, False, Layout(), False),
    "dense, checkpointed, pictures": (False, True, True, Layout(), False),
    "experts, pictures": (True, False, True, Layout(), False),
    "experts, checkpointed": (True, True, False, Layout(), False),
    "experts, bf16": (True, False, False, Layout(precision="bf16-mixed"), False),
    "experts, accumulated, averaged, Muon": (True, False, False, Layout(accumulated=2, keeps_average=True), True),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_is_what_the_allocator_measures(case: str) -> None:
    is_moe, is_checkpointed, sees, layout, muon = CASES[case]
    config = model_config(is_moe, is_checkpointed, sees)
    estimated = memory_bytes(module_of(config, muon), config, layout, load(sees))
    wanted = measured(config, layout, muon)
    assert 40e6 < wanted < 200e6
    assert estimated["total"] == pytest.approx(wanted, rel=0.1), (estimated, wanted)
    trained = 4 * sum(p.numel() for p in MultimodalModel(config).parameters())
    assert estimated["weights"] == pytest.approx(trained, rel=0.001)
    assert estimated["gradients"] == pytest.approx(trained, rel=0.001)
    assert estimated["optimizer"] == pytest.approx(2 * trained, rel=0.01) or (muon and estimated["optimizer"] > trained)
    assert ("average" in estimated) == layout.keeps_average
    assert estimated["logits"] > 4 * load(sees).work.num_targets * VOCAB


def test_memory_is_shared_by_shards_and_doubled_by_ddp() -> None:
    config = model_config(True, True, False)
    module = module_of(config)
    alone = memory_bytes(module, config, Layout(), load(False))
    shared = memory_bytes(module, config, Layout(4, True, 4, 4, precision="bf16-mixed"), load(False, 16))
    copied = memory_bytes(module, config, Layout(2, False, 2, 1, True), load(False, 8))
    assert shared["optimizer"] == pytest.approx(alone["optimizer"] / 4, rel=0.01)
    assert alone["weights"] / 4 < shared["weights"] < alone["weights"]
    assert copied["gradients"] == 2 * alone["gradients"]
    assert copied["total"] == pytest.approx(alone["total"] + alone["gradients"], rel=0.01)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_pairs_that_see_each_other_are_counted(window: int | None) -> None:
    for length in (0, 1, 7, 40):
        slow = sum(1 for q in range(length) for k in range(q + 1) if window is None or q - k < window)
        assert seen_pairs(length, window) == slow


@pytest.mark.parametrize("is_moe", [False, True])
def test_products_are_those_that_a_step_makes(is_moe: bool) -> None:
    """Against PyTorch's counter, which leaves out attention on a CPU; the plain experts compute all of them."""
    config = model_config(is_moe, False, True)
    moe = None if config.decoder.moe is None else dataclasses.replace(config.decoder.moe, backend="reference")
    config = dataclasses.replace(
        config,
        decoder=dataclasses.replace(config.decoder, moe=moe),
        loss=dataclasses.replace(config.loss, cross_entropy="full", head_z_loss_coef=0.0),
    )
    model, sizes = MultimodalModel(config), load(True)
    batch = largest_batch(model, sizes.batch_size, sizes)
    work = Work.of(batch)
    assert work.num_tokens == 4 * LENGTH and work.num_images == 24
    assert work.num_targets == 4 * sizes.work.num_targets
    with FlopCounterMode(display=False) as counter:
        output = model(batch)
        LossFunction(config)(model, output, batch).objective.backward()
    decoder, counted = config.decoder, counter.get_total_flops()
    pairs = sum(seen_pairs(length) for length in work.lengths)
    counted += 3 * decoder.num_hidden_layers * pairs * 4 * decoder.num_attention_heads * decoder.head_channels
    if moe is not None:
        unused = moe.num_experts - moe.num_experts_per_tok
        weights = 3 * moe.moe_intermediate_size * decoder.hidden_size
        counted -= 3 * decoder.num_hidden_layers * work.num_tokens * unused * 2 * weights
    assert ModelFlops.of(config).training(work) == pytest.approx(counted, rel=0.01)  # the tower's attention


@pytest.mark.parametrize(("mode", "is_again"), [("none", False), (False, False), ("selective", False), ("full", True)])
def test_products_are_made_again_by_full_checkpoints_alone(mode: Any, is_again: bool) -> None:
    """Selective ones keep what products gave; and a mode is no truth value: "none" is a text."""
    config = model_config(True, False, False)
    config = dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, gradient_checkpointing=mode))
    flops, work = ModelFlops.of(config), Work((40, 7), num_targets=40)
    assert flops.computed_again(work) == (flops.layers(work) if is_again else 0)


def test_tokens_that_skip_a_block_cost_it_nothing() -> None:
    """A block that 1 of 4 tokens pass costs what the same block costs of the quarter of each document."""
    dense = dataclasses.replace(model_config(False, False, False).decoder, num_hidden_layers=1)
    skipped = dataclasses.replace(dense, mod_layers=(0,), mod_capacity=0.25)
    whole, some = (ModelFlops.of(ModelConfig(decoder)) for decoder in (dense, skipped))
    who_passes = 2 * (192 + 192 * 48 + 48)  # the router and the predictor's two matrices, of every token
    assert some.layers(Work((40, 7))) == whole.layers(Work((10, 2))) + who_passes * 47


BOTH = ("text_embedding", "unit_embedding")
TRAINED: dict[str, tuple[AdapterConfig | None, dict[str, float], int]] = {
    "all": (None, {}, 3),
    "lora of attention": (AdapterConfig(r=4), {}, 3),
    "lora of everything": (AdapterConfig(r=4, parts=("attention", "experts")), {}, 3),
    "lora behind attention": (AdapterConfig(r=4, target_modules=("o_proj",)), {}, 1),
    "lora and the embedding": (AdapterConfig(r=4), dict.fromkeys(BOTH, 1e-3), 3),
    "all but attention": (None, {"attention": 0}, 3),
    "all but attention and the embedding": (None, {"attention": 0, **dict.fromkeys(BOTH, 0)}, 1),
    "all but experts": (None, {"experts": 0}, 3),
    "all but the embedding": (None, dict.fromkeys(BOTH, 0), 3),
    "added rows alone": (None, {"text_embedding": 0, "attention": 0, "experts": 0, "routers": 0}, 3),
}
"""Adapter, rates of parts, and how many times its forward pass the first layer's attention costs."""


@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize("case", TRAINED)
def test_frozen_matrices_have_no_gradient_of_their_own(case: str, is_moe: bool) -> None:
    """To the last product, against PyTorch's counter, which leaves out attention on a CPU; all experts are chosen."""
    adapter, parts, first_attention = TRAINED[case]
    moe = MoEConfig(4, 4, 96, backend="reference") if is_moe else None
    decoder = DecoderConfig(
        VOCAB, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        moe=moe, num_base_ids=1000, tie_word_embeddings=True,
    )  # fmt: skip
    config = ModelConfig(decoder, loss=LossConfig(cross_entropy="full"))
    optimizer = OptimizerConfig(lr=1e-3, parts=parts)
    optimizer = optimizer if adapter is None else adapter_rates(optimizer)
    with torch.device("meta"):
        flops = ModelFlops.of_model(build_model(config, optimizer, None, adapter))
    model, sizes = build_model(config, optimizer, None, adapter), load(False)
    batch = largest_batch(model, sizes.batch_size, sizes)
    work = Work.of(batch)
    with FlopCounterMode(display=False) as counter:
        LossFunction(config)(model, model(batch), batch).objective.backward()
    pair = 4 * decoder.num_attention_heads * decoder.head_channels
    attention = (first_attention + 2 * 3) * pair * sum(seen_pairs(length) for length in work.lengths)
    counted = counter.get_total_flops() + attention
    if is_moe and adapter is not None and adapter.parts:  # PEFT makes B·A of each stack twice, and both gradients once
        counted -= 4 * decoder.num_hidden_layers * 2 * 4 * adapter.r * 48 * (2 * 96 + 96)
    if case == "added rows alone":  # "full" makes the gradient of all rows, which chunks of logits don't
        counted -= 2 * work.num_targets * 48 * 1000
    assert flops.training(work) == pytest.approx(counted, rel=1e-4 if is_moe else 0)  # the routers' losses


def test_parts_that_are_frozen_have_no_backward_pass() -> None:
    """Below the decoder only what lies behind something trained has one: the input's gradient."""
    config, passes = model_config(False, False, True), {}
    cases: dict[str, dict[str, float]] = {
        "all": {}, "tower frozen": {"image_tower": 0}, "projector frozen": {"image_projector": 0},
        "both frozen": {"image_tower": 0, "image_projector": 0},
    }  # fmt: skip
    for name, parts in cases.items():
        with torch.device("meta"):
            backward = ModelFlops.of_model(build_model(config, OptimizerConfig(parts=parts))).backward
        passes[name] = backward.per_image, backward.per_projected_image
    flops = ModelFlops.of(config)
    tower, projector = flops.per_image, flops.per_projected_image
    assert passes == {
        "all": (2 * tower, 2 * projector), "tower frozen": (0, 2 * projector),
        "projector frozen": (2 * tower, projector), "both frozen": (0, 0),
    }  # fmt: skip


def test_virtual_tokens_train_nothing_of_the_decoder() -> None:
    config = ModelConfig(DecoderConfig(VOCAB, hidden_size=48, num_hidden_layers=2, num_attention_heads=4))
    found = {}
    for kind in ("prompt_tuning", "prefix_tuning"):
        with torch.device("meta"):
            model = build_model(config, adapter_rates(OptimizerConfig()), None, AdapterConfig(kind))
        found[kind] = ModelFlops.of_model(model)
    prompt, prefix = found["prompt_tuning"], found["prefix_tuning"]
    assert prompt.backward.per_token == prompt.per_token, "the input's gradient alone"
    first = model.decoder.layers[0].named_parameters()
    unread = sum(weight.numel() for name, weight in first if name[:12] in {f"self_attn.{kind}_" for kind in "qkv"})
    assert prompt.backward.per_token - prefix.backward.per_token == 2 * unread, "a prefix begins behind them"
    assert prompt.backward.per_pair == prefix.backward.per_pair == tuple((w, 2 * n) for w, n in prompt.per_pair)


def test_stored_features_cost_the_tower_nothing() -> None:
    flops = ModelFlops.of(model_config(False, False, True))
    seen, stored = (flops.training(Work((40,), num_images=3, num_stored_images=number)) for number in (0, 2))
    assert flops.per_image > 0 and seen - stored == 3 * 2 * flops.per_image


def test_devices_are_known_by_their_names() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA L4") == 121e12 and peak_flops("NVIDIA L40S") == 362e12
    assert peak_flops("Some other device") is None and peak_flops("NVIDIA L400") is None


def told(capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    assert main(["fit", "--print_estimate", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_command_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(paths.configs_dir() / "one_gpu" / "decoder_1b.yaml")
    found = told(capsys, "-c", config, "--flops_per_second", "3.2e14")
    assert set(found) >= {"parameters", "flops_per_token", "memory_bytes", "days"}
    parts = {"weights", "gradients", "optimizer", "activations", "logits", "pictures", "total"}
    assert set(found["memory_bytes"]) == parts
    assert all(isinstance(size, int) and size > 0 for size in found["memory_bytes"].values())
    assert max(found["memory_bytes"].values()) == found["memory_bytes"]["total"] < 80e9
    assert sum(found["parameters"]["by_part"].values()) == found["parameters"]["total"] == 1041387648
    assert 6 * 250e6 < found["flops_per_token"] < 6 * 500e6
    tokens = 60_000 * 4 * 8 * 4096
    assert found["days"] == pytest.approx(tokens * found["flops_per_token"] / 3.2e14 / 86400, rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--flops_per_second", "fast"], "--flops_per_second is 'fast'; give a positive number"),
        (["--flops_per_second"], "--flops_per_second is ''; give a positive number"),
        (["--data.init_args.recipe", "mine.yaml"], "no recipe is at mine.yaml; make it, or give --sequence_length"),
        (["--model.init_args.decoder.vocab_size", "0"], "decoder.vocab_size is 0, which leaves it to the tokenizer"),
        (["--trainer.strategy", "deepspeed"], "trainer.strategy is deepspeed, whose memory"),
    ],
)
def test_what_cannot_be_estimated_is_said(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(paths.configs_dir() / "one_gpu" / "decoder_1b.yaml")
    assert main(["fit", "--print_estimate", "-c", config, *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and not captured.out


def test_a_stage_without_an_estimate_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(paths.configs_dir() / "quickstart" / "codec.yaml")
    assert main(["fit", "--print_estimate", "-c", config]) == 2
    assert "the config has CodecModule with AudioDataModule" in capsys.readouterr().err
