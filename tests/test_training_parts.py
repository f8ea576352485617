"""Parts of a model that are frozen or have their own rates: what moves, what it costs, what is refused."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.embedding import joined_rows
from mmllm.model.image_projectors import ImageProjectorConfig
from mmllm.model.multimodal import LossConfig, ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig
from mmllm.model.vision import VisionConfig
from mmllm.training.codec_module import CodecModule
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.estimate_memory import Load, largest_batch, memory_bytes
from mmllm.training.layout import Layout
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig, parameter_groups
from mmllm.training.parts import PARTS, part_of
from mmllm.training.strategy import MeshStrategy
from mmllm_tokenizers.codec import CodecConfig
from tests.training_fixtures import (
    NUM_TEXT,
    VOCAB,
    ListData,
    TinyData,
    fit_rank,
    merge,
    mixed_pairs,
    quiet_trainer,
    run_two_ranks,
    tiny_batch,
    tiny_module,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from allocations import AllocationPeak

NUM_BASE = 33
OWN_PARTS = tuple(part for part in PARTS if part != "adapter")


def module_with(parts: dict[str, float] | None, tied: bool = False, **optimizer: Any) -> DecoderModule:
    module = tiny_module(optimizer=OptimizerConfig(lr=1e-2, warmup=0.1, parts=parts, **optimizer))
    module.decoder = dataclasses.replace(module.decoder, tie_word_embeddings=tied, num_base_ids=NUM_BASE)
    return module


def fit(module: DecoderModule, data: Any = None, **settings: Any) -> Any:
    with quiet_lightning():
        trainer = quiet_trainer(max_steps=3, **settings)
        trainer.fit(module, datamodule=data or TinyData(), weights_only=True)
    return trainer


def weights_of(module: DecoderModule) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


def test_each_parameter_has_a_part() -> None:
    module = module_with({"text_embedding": 0})
    module.loss = dataclasses.replace(module.loss, word_dropout=0.1)
    module.configure_model()
    parts = {name.removeprefix("model."): part_of(name) for name, _ in module.named_parameters()}
    assert set(parts.values()) == set(OWN_PARTS)
    wanted = {
        "vision.visual.conv1.weight": "image_tower",
        "image_projector.row_embedding": "image_projector",
        "code_embedding.table.weight": "audio_front_end",
        "unit_projector.0.weight": "audio_front_end",
        "ctc_head.1.weight": "audio_front_end",
        "mask_embedding": "unit_embedding",
        "decoder.embed_tokens.weight": "text_embedding",
        "decoder.embed_tokens.added": "unit_embedding",
        "decoder.lm_head.weight": "text_embedding",
        "decoder.lm_head.added": "unit_embedding",
        "decoder.norm.weight": "text_embedding",
        "decoder.layers.0.input_layernorm.weight": "attention",
        "decoder.layers.0.self_attn.q_proj.weight": "attention",
        "decoder.layers.0.post_attention_layernorm.weight": "experts",
        "decoder.layers.0.mlp.gate_proj.weight": "experts",
        "decoder.layers.1.mlp.experts.down_proj": "experts",
        "decoder.layers.1.mlp.gate.weight": "routers",
    }
    assert {name: parts[name] for name in wanted} == wanted


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("part", OWN_PARTS)
def test_a_frozen_part_stays_to_the_bit_and_the_others_move(part: str, tied: bool) -> None:
    module = module_with({part: 0}, tied)
    module.configure_model()
    before = weights_of(module)
    trainer = fit(module)
    held = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    for name, weight in module.named_parameters():
        is_frozen = part_of(name) == part
        if not name.endswith("mask_embedding"):  # nothing is masked here
            assert torch.equal(weight, before[name]) == is_frozen, name
        assert (id(weight) in held) == (not is_frozen) == weight.requires_grad, name
        assert weight.grad is None or not is_frozen, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rates", [{"text_embedding": 0}, {"text_embedding": 1e-3}, {"unit_embedding": 0}], ids=str)
def test_rows_in_two_blocks_have_the_loss_and_gradients_of_one(rates: dict[str, float], tied: bool) -> None:
    halves, whole = module_with(rates, tied), module_with(None, tied)
    for module in (halves, whole):
        module.configure_model()
    ours, theirs = halves.model, whole.model
    assert ours is not None and theirs is not None
    theirs.load_state_dict(joined_rows(ours.state_dict()))
    batch = tiny_batch(3)
    torch.testing.assert_close(ours.logits(batch), theirs.logits(batch))
    losses = [module.loss_of(batch)[0] for module in (halves, whole)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    dense = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        wanted = dense[name.replace(".added", ".weight")]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            wanted = wanted[:NUM_BASE]
        if name.endswith(".added"):
            wanted = wanted[NUM_BASE:]
        assert (parameter.grad is None) == (not parameter.requires_grad) == (rates.get(part_of(name)) == 0), name
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, wanted, msg=name)
    if tied:
        assert "decoder.lm_head.added" not in dict(ours.named_parameters())


def test_each_part_has_its_own_rate_and_older_keys_are_read() -> None:
    rates = {part: (number + 1) * 1e-4 for number, part in enumerate(OWN_PARTS)}
    module = module_with(rates)
    module.configure_model()
    names = {id(p): name for name, p in module.named_parameters()}
    groups = parameter_groups(module, module.optimizer, module.tower_of)
    assert all(group["lr"] == rates[part_of(names[id(p)])] for group in groups for p in group["params"])
    assert {group["name"].split("/")[0] for group in groups} == set(OWN_PARTS)
    decays = {names[id(p)]: group["weight_decay"] > 0 for group in groups for p in group["params"]}
    assert not decays["model.decoder.embed_tokens.added"] and decays["model.decoder.lm_head.added"]

    older = module_with({"attention": 0}, tower_lr=0.0, projector_lr=0.0)
    older.configure_model()
    frozen = {part_of(name) for name, p in older.named_parameters() if not p.requires_grad}
    assert frozen == {"image_tower", "image_projector", "audio_front_end", "attention"}
    trained = [name for name, p in older.named_parameters() if p.requires_grad]
    assert "model.code_embedding.table.weight" in trained, "projector_lr never was its rate"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: tiny_module(optimizer=OptimizerConfig(parts={"attn": 0})), "names 'attn'.*choose image_tower"),
        (
            lambda: CodecModule(CodecConfig(), optimizer=OptimizerConfig(parts={"attention": 0})),
            "CodecModule.*leave parts out",
        ),
        (lambda: OptimizerConfig(parts={"experts": -1.0}), r"parts\.experts is -1"),
        (lambda: OptimizerConfig(parts={"image_tower": 0}, tower_lr=1e-3), "tower_lr and parts.image_tower"),
        (lambda: OptimizerConfig(parts={"audio_front_end": 0}, projector_lr=1e-3), "projector_lr and parts.audio"),
        (lambda: DecoderConfig(VOCAB, num_base_ids=VOCAB + 1), "num_base_ids"),
        (lambda: DecoderConfig(VOCAB, num_base_ids=-1), "num_base_ids"),
    ],
)
def test_what_is_no_part_or_no_rate_is_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_rows_of_one_block_cant_have_two_rates() -> None:
    module = module_with({"text_embedding": 0})
    module.decoder = dataclasses.replace(module.decoder, num_base_ids=0)
    with pytest.raises(ValueError, match=r"text_embedding 0 and that of unit_embedding 0\.01.*num_base_ids is 0"):
        module.configure_model()
    module = module_with({"text_embedding": 0, "unit_embedding": 0})
    module.decoder = dataclasses.replace(module.decoder, num_base_ids=0)
    module.configure_model()
    module.decoder = dataclasses.replace(module.decoder, num_base_ids=NUM_TEXT + 1)
    with pytest.raises(ValueError, match="units begin at id 40"):
        module.resolved_config()


def test_nothing_left_to_train_is_said() -> None:
    module = module_with(dict.fromkeys(OWN_PARTS, 0))
    with pytest.raises(ValueError, match="each part's rate is 0"):
        fit(module)


def test_a_frozen_router_keeps_its_bias() -> None:
    moe = MoEConfig(4, 2, 16, use_expert_bias=True, bias_update_speed=0.1)
    for rate in (0.0, 1e-3):
        module = tiny_module(moe=moe, optimizer=OptimizerConfig(parts={"routers": rate}))
        fit(module)
        assert module.model is not None
        bias = module.model.decoder.expert_layers()[1].gate.e_score_correction_bias
        assert bias is not None and bool(bias.any()) == (rate > 0)


def test_a_resumed_training_with_frozen_rows_equals_one_without_a_stop(tmp_path: Path) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    weights = []
    for steps, name, ckpt in ((4, "whole", None), (2, "cut", None), (4, "cut", "cut/last.ckpt")):
        torch.manual_seed(0)
        module = module_with({"text_embedding": 0, "attention": 1e-3}, min_lr_ratio=1.0)
        module.optimizer = dataclasses.replace(module.optimizer, warmup=0.0)
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        with quiet_lightning():
            trainer = quiet_trainer(saving, EMA(0.9), max_steps=steps, enable_checkpointing=True)
            trainer.fit(module, datamodule=TinyData(), ckpt_path=ckpt and tmp_path / ckpt, weights_only=True)
        weights.append(weights_of(module))
    assert all(torch.equal(weight, weights[2][name]) for name, weight in weights[0].items())


# --- memory -----------------------------------------------------------------------------------------------------------

SLOTS, LENGTH, LARGE_VOCAB = 16, 160, 6000
TOWER: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
}
ALL_FROZEN = dict.fromkeys(OWN_PARTS, 0.0)
CASES: dict[str, tuple[dict[str, float], bool, Layout]] = {
    "nothing frozen": ({}, False, Layout()),
    "text rows frozen": ({"text_embedding": 0}, False, Layout()),
    "text rows frozen, tied": ({"text_embedding": 0}, True, Layout()),
    "text rows frozen, bf16": ({"text_embedding": 0}, False, Layout(precision="bf16-mixed")),
    "added rows frozen": ({"unit_embedding": 0}, False, Layout()),
    "experts frozen": ({"experts": 0, "routers": 0}, False, Layout()),
    "projector alone": (ALL_FROZEN | {"image_projector": 1e-3}, False, Layout()),
    "alignment, averaged": ({k: 0.0 for k in ("image_tower", "text_embedding", "attention", "experts", "routers")},
                            False, Layout(keeps_average=True)),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_frozen_parts_cost_what_the_estimate_says_and_the_allocator_measures(case: str) -> None:
    parts, tied, layout = CASES[case]
    decoder = DecoderConfig(
        LARGE_VOCAB, hidden_size=160, num_hidden_layers=3, num_attention_heads=4, intermediate_size=512,
        moe=MoEConfig(8, 2, 192), moe_layers=(1, 2), tie_word_embeddings=tied, num_base_ids=5800,
    )  # fmt: skip
    vision = VisionConfig(open_clip=TOWER)
    optimizer = OptimizerConfig(lr=1e-3, parts=parts)
    module = DecoderModule(decoder, vision, ImageProjectorConfig(kind="mlp"), optimizer=optimizer)
    config, load = module.resolved_config(), _load()
    estimated = memory_bytes(module, config, layout, load)
    with torch.device("meta"):
        shapes = MultimodalModel(config)
    batches = [largest_batch(shapes, load.batch_size, load) for _ in range(3)]
    precision: Any = layout.precision
    averages = [EMA(0.5)] if layout.keeps_average else []
    with quiet_lightning(), AllocationPeak("cpu") as memory:
        quiet_trainer(*averages, max_steps=3, precision=precision).fit(module, ListData(batches))
    pictures = sum(v.nbytes for batch in batches[:2] for v in vars(batch).values() if isinstance(v, torch.Tensor))
    assert estimated["total"] == pytest.approx(memory.peak + pictures, rel=0.1)

    assert module.model is not None
    sizes = {name: p.numel() for name, p in module.model.named_parameters()}
    trained = 4 * sum(size for name, size in sizes.items() if parts.get(part_of(name)) != 0)
    assert estimated["weights"] == pytest.approx(4 * sum(sizes.values()), rel=0.001)
    assert estimated["gradients"] == pytest.approx(trained, rel=0.001)
    assert estimated["optimizer"] == pytest.approx(2 * trained, rel=0.01)
    assert estimated.get("average", 0) == pytest.approx(trained if layout.keeps_average else 0, rel=0.001)


def _load() -> Load:
    from mmllm.model.flops import Work

    images = 2
    return Load(2, LENGTH, images, Work((LENGTH,), LENGTH - images * SLOTS, num_images=images), 1, False)


def test_no_gradient_of_frozen_rows_is_ever_there() -> None:
    """Of all that operators make in a step, nothing but views of the weights has so many rows."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            rows.extend(
                len(each) for each in tree_leaves(made) if isinstance(each, torch.Tensor) and each.shape[1:] == (16,)
                and each.untyped_storage().data_ptr() not in weights
            )  # fmt: skip
            return made

    for parts, wanted in (({"text_embedding": 0}, False), ({}, True)):
        module = module_with(parts)
        module.loss = LossConfig()  # the CTC head has a row for each text id
        module.decoder = dataclasses.replace(module.decoder, vocab_size=VOCAB + 2000, num_base_ids=NUM_BASE + 2000)
        module.configure_model()
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        rows: list[int] = []
        with Rows():
            module.loss_of(tiny_batch(0))[0].backward()
        assert (max(rows) >= 2000) == wanted


def test_print_estimate_counts_frozen_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    from mmllm import paths
    from mmllm.cli.main import main

    config = yaml.safe_load((paths.configs_dir() / "one_gpu/decoder_1b.yaml").read_text())
    config["model"]["init_args"]["vision"].pop("pretrained")
    settings = config["model"]["init_args"]
    settings["optimizer"].pop("tower_lr")
    settings["decoder"] |= {"hidden_size": 128, "num_hidden_layers": 2, "num_base_ids": 32768}
    totals = {}
    for name, parts in (("all", None), ("frozen", {"experts": 0, "text_embedding": 0, "image_tower": 0})):
        settings["optimizer"]["parts"] = parts
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        code = main(["fit", "-c", str(tmp_path / "c.yaml"), "--print_estimate", "--sequence_length", "256"])
        said = capsys.readouterr()
        assert code == 0, said.err
        totals[name] = json.loads(said.out)["memory_bytes"]
    assert totals["frozen"]["optimizer"] < 0.3 * totals["all"]["optimizer"]
    assert totals["frozen"]["total"] < totals["all"]["total"]


# --- more ranks -------------------------------------------------------------------------------------------------------


def _sharded_rank(rank: int, port: int, out: str, pairs: Any) -> None:
    strategy = MeshStrategy(fsdp=2, save_distributed_checkpoint=False)
    module = module_with({"text_embedding": 0, "attention": 0})
    module.out, module.folder = None, None
    fit_rank(rank, port, out, module, ListData(pairs), max_steps=len(pairs), strategy=strategy)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_frozen_rows_are_sharded_and_train_as_in_one_process(tmp_path: Path) -> None:
    pairs = mixed_pairs()
    alone = module_with({"text_embedding": 0, "attention": 0})
    alone.configure_model()
    before = weights_of(alone)
    fit(alone, ListData([merge(list(pair)) for pair in pairs[:3]]))
    ranks = run_two_ranks(_sharded_rank, tmp_path, pairs[:3])
    for name, weight in alone.state_dict().items():
        for rank in ranks:
            torch.testing.assert_close(rank["weights"][name], weight, atol=1e-4, rtol=0, msg=name)
        if name in before and part_of(name) in ("text_embedding", "attention"):
            assert torch.equal(ranks[0]["weights"][name], before[name]), name


def test_rows_that_the_tensor_axis_splits_cant_have_two_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    module = module_with({"text_embedding": 0})
    mesh: Any = SimpleNamespace(config=SimpleNamespace(tensor=2, check_model=lambda config: None))
    monkeypatch.setattr("mmllm.training.decoder_module.mesh_and_sharding", lambda _: (mesh, None))
    with pytest.raises(ValueError, match=r"strategy\.tensor is 2.*one rate"):
        module.configure_model()


def test_a_folder_has_the_rows_in_one_matrix(tmp_path: Path) -> None:
    from safetensors import safe_open

    from mmllm.checkpoints.folder import load_model, save_model
    from mmllm.training.parts import build_model
    from mmllm_tokenizers.folder import TokenizerFolder
    from mmllm_tokenizers.text import TextTokenizer

    tokenizer = TokenizerFolder(TextTokenizer.train(["some words to learn from"], 280))
    vocab_size = tokenizer.vocabulary.size
    decoder = DecoderConfig(
        vocab_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        tie_word_embeddings=False, num_base_ids=vocab_size - 4,
    )  # fmt: skip
    model = build_model(ModelConfig(decoder, loss=LossConfig()), OptimizerConfig(parts={"text_embedding": 0}))
    save_model(tmp_path / "m", model, tokenizer)
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert shapes["decoder.embed_tokens.weight"] == shapes["decoder.lm_head.weight"] == [vocab_size, 16]
    assert not any("added" in name for name in shapes)
    loaded = load_model(tmp_path / "m").model
    for name, weight in joined_rows(model.state_dict()).items():
        assert torch.equal(loaded.state_dict()[name], weight), name
