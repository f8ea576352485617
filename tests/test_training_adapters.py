"""Training adapters: what moves, what checkpoints hold, how it resumes, goes out, compiles and is sharded."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import adapter_names, base_state, saved_adapters
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.document import DocumentWriter
from mmllm.inference.api import load
from mmllm.model.decoder import Decoder
from mmllm.model.embedding import joined_rows
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.ema import EMA
from mmllm.training.estimate import estimate
from mmllm.training.layout import Layout
from mmllm.training.lightning_cli import build_cli, quiet_lightning
from mmllm.training.optimizers import OptimizerConfig, parameter_groups
from mmllm.training.parts import part_of
from mmllm.training.strategy import MeshStrategy
from tests.inference_fixtures import make_model, make_tokenizer
from tests.training_fixtures import ListData, LossRecorder, fit_rank, quiet_trainer, run_two_ranks

pytest.importorskip("peft")
torch.set_num_threads(1)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning"),
]
ATTENTION = AdapterConfig(r=4, lora_alpha=8)
BOTH = AdapterConfig(r=2, lora_alpha=8, parts=("attention", "experts"))
PARTS = {"unit_embedding": 1e-2, "image_projector": 1e-2}


def make_base(folder: Path, **changes: Any) -> Path:
    tokenizer = make_tokenizer()
    config = make_model(tokenizer, tie_word_embeddings=False).config
    num_base_ids = tokenizer.vocabulary.num_text - 10
    decoder = dataclasses.replace(config.decoder, num_base_ids=num_base_ids, **changes)
    torch.manual_seed(1)
    model = MultimodalModel(dataclasses.replace(config, decoder=decoder))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25 * (32 / decoder.hidden_size) ** 0.5)
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


def batches(count: int, num_sequences: int = 2) -> list[Any]:
    tokenizer = make_tokenizer()
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(count):
        sequences = []
        for _ in range(num_sequences):
            writer = DocumentWriter(tokenizer)
            writer.ids(torch.randint(14, 320, (12,), generator=generator).tolist(), is_target=True)
            sequences.append([writer.finish()])
        made.append(pack_documents(sequences, 16))
    return made


def make_module(base: Path, adapter: AdapterConfig | None = ATTENTION, seed: int = 0, **settings: Any) -> DecoderModule:
    torch.manual_seed(seed)
    optimizer = settings.pop("optimizer", OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0, parts=dict(PARTS)))
    return DecoderModule(init_from=str(base), adapter=adapter, optimizer=optimizer, **settings)


def fit(module: DecoderModule, count: int, *callbacks: Any, ckpt: Any = None, **settings: Any) -> list[float]:
    recorder = LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(recorder, *callbacks, max_steps=count, **settings)
        trainer.fit(module, datamodule=ListData(batches(count)), ckpt_path=ckpt, weights_only=True)
    return recorder.losses


def weights_of(module: DecoderModule) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in module.named_parameters()}


@pytest.mark.parametrize("adapter", [ATTENTION, BOTH], ids=["attention", "experts too"])
def test_the_adapter_and_the_parts_with_a_rate_move_and_nothing_else(base: Path, adapter: AdapterConfig) -> None:
    module = make_module(base, adapter)
    module.configure_model()
    before = weights_of(module)
    losses = fit(module, 4)
    assert losses[-1] < losses[0]
    for name, weight in module.named_parameters():
        is_trained = part_of(name) in ("adapter", *PARTS)
        assert weight.requires_grad == is_trained, name
        if not name.startswith("model.image_projector"):  # no picture is there
            assert torch.equal(weight, before[name]) != is_trained, name
    folder = load_model(base).model
    own = joined_rows(base_state(module.model.state_dict()))  # type: ignore[union-attr]
    assert torch.equal(
        own["decoder.layers.0.self_attn.q_proj.weight"], folder.decoder.layers[0].self_attn.q_proj.weight
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("rate", [None, 0.0, 1e-3])
def test_the_older_rate_of_projectors_is_that_of_all_that_hears(base: Path, rate: float | None) -> None:
    module = make_module(base, optimizer=OptimizerConfig(lr=1e-2, projector_lr=rate))
    module.configure_model()
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    parts = {"adapter", "image_projector", "audio_front_end"} if rate else {"adapter"}
    assert {part_of(name) for name in trained} == parts
    assert any("code_embedding" in name for name in trained) == bool(rate)
    groups = parameter_groups(module, module.optimizer, module.tower_of)
    assert all(group["peak_lr"] == (1e-2 if group["name"].startswith("decoder/") else rate) for group in groups)


@pytest.mark.parametrize("adapter", [ATTENTION, BOTH], ids=["attention", "experts too"])
def test_checkpoints_hold_what_is_trained_and_resuming_is_exact(
    base: Path, tmp_path: Path, adapter: AdapterConfig
) -> None:
    def run(steps: int, name: str, ckpt: Any = None, seed: int = 0) -> tuple[list[float], dict[str, torch.Tensor]]:
        module = make_module(base, adapter, seed)
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        losses = fit(module, steps, saving, EMA(0.9), ckpt=ckpt, enable_checkpointing=True)
        return losses, weights_of(module)

    whole, weights = run(6, "whole")
    first, _ = run(3, "cut")
    path = tmp_path / "cut" / "last.ckpt"
    # another seed: nothing is drawn that isn't in the checkpoint or the base
    module = make_module(base, adapter, seed=9)
    recorder = LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(recorder, EMA(0.9), max_steps=6)
        trainer.fit(module, datamodule=_Rest(batches(6), 3), ckpt_path=path, weights_only=True)
    assert first + recorder.losses == whole
    assert all(torch.equal(weight, weights[name]) for name, weight in weights_of(module).items())

    saved = torch.load(path, weights_only=True)
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    kept = {name for name in saved["state_dict"] if name in dict(module.named_parameters())}
    assert kept == trained
    assert saved["mmllm_base"]["folder"] == str(base) and len(saved["mmllm_base"]["hash"]) == 64
    averages = next(state for name, state in saved["callbacks"].items() if "EMA" in name)["average"]
    assert set(averages) == trained
    assert path.stat().st_size < 0.9 * (base / "model.safetensors").stat().st_size * 4


class _Rest(ListData):
    """Batches from a number on, as a resumed data module would give."""

    def __init__(self, all_batches: list[Any], first: int) -> None:
        super().__init__(all_batches[first:])


def test_a_base_that_changed_and_a_checkpoint_without_its_adapter_are_refused(base: Path, tmp_path: Path) -> None:
    saving = ModelCheckpoint(tmp_path / "c", save_last=True, save_top_k=0, every_n_train_steps=1)
    fit(make_module(base), 1, saving, enable_checkpointing=True)
    ckpt = tmp_path / "c" / "last.ckpt"
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tokenizer, model = make_tokenizer(), load_model(base).model
    with torch.no_grad():
        model.decoder.norm.weight[3] += 1e-3
    save_model(other, model, tokenizer)
    with pytest.raises(ValueError, match=r"trained on .*base with hash \S+…, but init_from, .*other, has \S+…"):
        fit(make_module(other), 2, ckpt=ckpt)
    with pytest.raises(ValueError, match=r"holds only what was trained, .*go on with the same model\.init_args"):
        fit(make_module(base, None), 2, ckpt=ckpt)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"optimizer": OptimizerConfig(parts={"adapter": 1e-3}), "adapter": None},
            "names 'adapter', but there is none",
        ),
        ({"adapter": AdapterConfig(target_parameters=("mlp.experts.down_proj",), use_dora=True)}, "use_dora is True"),
        ({"out": "base", "tokenizer": None}, "out is .*which is init_from"),
    ],
)
def test_what_does_not_go_together_is_named(
    base: Path, settings: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base.parent)
    with pytest.raises(ValueError, match=said):
        fit(make_module(base, **{"adapter": ATTENTION, **settings}), 1)
    model = load_model(base).model.config
    with pytest.raises(ValueError, match="adapter is given without init_from"):
        DecoderModule(model.decoder, adapter=ATTENTION).configure_model()
    with pytest.raises(ValueError, match="name is 'a/b'"):
        make_module(base, adapter_name="a/b")


def test_the_export_is_a_model_folder_with_the_adapter_and_earlier_ones(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make_module(base, out=str(tmp_path / "one"), adapter_name="first")
    fit(first, 2)
    assert saved_adapters(tmp_path / "one") == ["first"]
    second = make_module(tmp_path / "one", BOTH, out=str(tmp_path / "two"), adapter_name="second")
    fit(second, 2)
    assert saved_adapters(tmp_path / "two") == ["first", "second"], "units were trained, which keeps the base"
    ids_BT = torch.arange(20, 38).view(2, 9)
    for folder, name, module in ((tmp_path / "one", "first", first), (tmp_path / "two", "second", second)):
        model = load(folder, adapter=name)
        assert model.adapters == [name]
        with torch.no_grad():
            torch.testing.assert_close(logits(model.model, ids_BT), logits(module.model, ids_BT))
    stored = load_file(tmp_path / "two" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in stored)
    frozen = load_file(base / "model.safetensors")
    name = "decoder.layers.1.mlp.experts.down_proj"
    assert torch.equal(stored[name], frozen[name])
    config = json.loads((tmp_path / "two" / "adapters" / "second" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 2, None)

    # one of PEFT's own, which names no base, goes along, and what half precision holds is the same base
    half, loaded = tmp_path / "half", load_model(tmp_path / "one", dtype=torch.bfloat16)
    save_model(half, loaded.model, loaded.tokenizer)
    shutil.copytree(tmp_path / "one" / "adapters" / "first", half / "adapters" / "theirs")
    (half / "adapters" / "theirs" / "base.json").unlink()
    fit(make_module(half, out=str(tmp_path / "wide"), adapter_name="mine"), 2)
    assert saved_adapters(tmp_path / "wide") == ["mine", "theirs"]
    shutil.copytree(tmp_path / "wide" / "adapters" / "mine", half / "adapters" / "mine")
    assert load(half, adapter="mine").adapters == ["mine"]

    # where the decoder itself is trained too, adapters of the earlier one stay behind
    (tmp_path / "two" / "adapters" / "first" / "base.json").unlink()
    parts = OptimizerConfig(lr=1e-2, parts={**PARTS, "attention": 1e-2})
    third = make_module(tmp_path / "two", out=str(tmp_path / "three"), adapter_name="third", optimizer=parts)
    with caplog.at_level(logging.WARNING):
        fit(third, 2)
    assert saved_adapters(tmp_path / "three") == ["third"] and "first of" in caplog.text


def logits(model: Any, ids_BT: torch.Tensor) -> torch.Tensor:
    decoder = model.eval().decoder
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return decoder.head(decoder(decoder.embed(ids_BT), positions_BT, torch.zeros_like(ids_BT))[0])


def test_dora_starts_from_the_folders_weights(base: Path) -> None:
    adapter = AdapterConfig(r=2, use_dora=True)
    module = make_module(base, adapter)
    module.configure_model()
    ids_BT = torch.arange(20, 38).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(logits(module.model, ids_BT), logits(load_model(base).model, ids_BT))
    assert len(fit(make_module(base, adapter), 2)) == 2


@pytest.mark.parametrize("adapter", [ATTENTION, BOTH], ids=["attention", "experts too"])
def test_a_compiled_training_gives_the_losses_of_a_plain_one(
    base: Path, adapter: AdapterConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_layers = Decoder.compile_layers
    monkeypatch.setattr(Decoder, "compile_layers", lambda self, **o: compile_layers(self, backend="aot_eager", **o))
    plain = fit(make_module(base, adapter), 2)
    torch._dynamo.reset()
    compiled = fit(make_module(base, adapter, compile=True), 2)
    assert compiled == pytest.approx(plain, rel=1e-4)


def test_the_estimate_has_the_adapter(base: Path) -> None:
    from mmllm.data.loading.datamodules import PackedDataModule

    data = PackedDataModule(recipe=str(base / "none.yaml"), batch_size=2)
    module = make_module(base, AdapterConfig(r=8))
    told = estimate(module, data, Layout(), sequence_length=64)
    built = make_module(base, AdapterConfig(r=8))
    built.configure_model()
    trained = 4 * sum(p.numel() for p in built.parameters() if p.requires_grad)
    assert told.memory_bytes["gradients"] == pytest.approx(trained, rel=0.01)
    assert told.memory_bytes["optimizer"] == pytest.approx(2 * trained, rel=0.02)


def test_a_config_file_has_an_adapter(base: Path, tmp_path: Path) -> None:
    import yaml

    config = {
        "trainer": {"accelerator": "cpu", "max_steps": 1, "logger": False},
        "model": {
            "class_path": "mmllm.training.decoder_module.DecoderModule",
            "init_args": {"init_from": str(base), "adapter": {"r": 4, "parts": ["attention", "experts"]}},
        },
        "data": {"class_path": "tests.training_fixtures.TinyData"},
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with quiet_lightning():
        module: Any = build_cli(["-c", str(tmp_path / "c.yaml"), "--model.init_args.adapter.r", "2"], run=False).model
    assert module.adapter == AdapterConfig(r=2, parts=("attention", "experts"))
    config["model"]["init_args"]["adapter"] = {"rank": 4}  # type: ignore[index]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    with quiet_lightning(), pytest.raises(ValueError, match="rank"):
        build_cli(["-c", str(tmp_path / "c.yaml")], run=False)


# --- more ranks -------------------------------------------------------------------------------------------------------


def _sharded_rank(rank: int, port: int, out: str, folder: Path, adapter: AdapterConfig, where: str, ckpt: Any) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)  # of a command line in this process: ranks would draw anew from it
    module = make_module(folder, adapter, out=where)
    data = ListData([(one, two) for one, two in zip(batches(3, 1), batches(3, 1), strict=True)])
    strategy = MeshStrategy(fsdp=2, save_distributed_checkpoint=ckpt is None)
    saving = ModelCheckpoint(Path(out) / "ckpt", save_last=True, save_top_k=0, every_n_train_steps=1)
    fit_rank(rank, port, out, module, data, saving, max_steps=3, strategy=strategy, enable_checkpointing=True)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("adapter", [ATTENTION, BOTH], ids=["attention", "experts too"])
def test_sharded_adapters_train_as_in_one_process(base: Path, tmp_path: Path, adapter: AdapterConfig) -> None:
    alone = make_module(base, adapter)
    data = [batch for batch in batches(3, 1)]
    with quiet_lightning():
        quiet_trainer(max_steps=3).fit(alone, datamodule=ListData([_twice(batch) for batch in data]))
    ranks = run_two_ranks(_sharded_rank, tmp_path, base, adapter, str(tmp_path / "out"), None)
    for name, weight in alone.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], weight, atol=2e-4, rtol=0, msg=name)
    model = load(tmp_path / "out", adapter="default").model
    ids_BT = torch.arange(20, 38).view(2, 9)
    with torch.no_grad():
        torch.testing.assert_close(logits(model, ids_BT), logits(alone.model, ids_BT), atol=1e-3, rtol=1e-3)


def _resuming_rank(rank: int, port: int, out: str, folder: Path, steps: int, is_folder: bool, ckpt: Any) -> None:
    os.environ.pop("PL_GLOBAL_SEED", None)
    module = make_module(folder, seed=0 if ckpt is None else 9)
    data = [(one, two) for one, two in zip(batches(3, 1), batches(3, 1), strict=True)]
    strategy = MeshStrategy(fsdp=2, save_distributed_checkpoint=is_folder)
    saving = ModelCheckpoint(Path(out) / "ckpt", save_last=True, save_top_k=0, every_n_train_steps=1)
    settings: dict[str, Any] = {"max_steps": steps, "strategy": strategy, "enable_checkpointing": True}
    rest = ListData(data[0 if ckpt is None else 2 :])
    fit_rank(rank, port, out, module, rest, saving, EMA(0.9), ckpt=ckpt, **settings)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("is_folder", [True, False], ids=["in shards", "one file"])
def test_sharded_adapters_go_on_exactly_from_what_is_trained(base: Path, tmp_path: Path, is_folder: bool) -> None:
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    ckpt = tmp_path / "cut" / "ckpt" / "last.ckpt"
    whole = run_two_ranks(_resuming_rank, tmp_path / "whole", base, 3, is_folder, None)
    run_two_ranks(_resuming_rank, tmp_path / "cut", base, 2, is_folder, None)
    size = sum(path.stat().st_size for path in (ckpt.rglob("*") if is_folder else [ckpt]) if path.is_file())
    module = make_module(base)
    module.configure_model()
    trained = 4 * sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    frozen = 4 * sum(weight.numel() for weight in module.parameters() if not weight.requires_grad)
    assert 4 * trained < size < 4 * trained + frozen / 2 + 100_000  # weights, two moments and an average of each
    rest = run_two_ranks(_resuming_rank, tmp_path / "cut", base, 3, is_folder, ckpt)
    for name, weight in whole[0]["weights"].items():
        assert torch.equal(rest[0]["weights"][name], weight), name


def _twice(batch: Any) -> Any:
    from tests.training_fixtures import merge

    return merge([batch, batch])


def test_axes_that_adapters_cant_be_split_over_are_refused(base: Path) -> None:
    from mmllm.parallel.mesh import ParallelConfig
    from mmllm.training.adapters import check_sharding

    decoder = load_model(base).model.config.decoder
    for adapter, axes, said in (
        (ATTENTION, ParallelConfig(fsdp=1, tensor=2), r"strategy\.tensor is 2"),
        (BOTH, ParallelConfig(fsdp=2, expert=2), r"strategy\.expert is 2.*leave experts out"),
        (AdapterConfig(use_dora=True), ParallelConfig(fsdp=2), r"use_dora is true under a MeshStrategy"),
    ):
        with pytest.raises(ValueError, match=said):
            check_sharding(adapter, decoder, axes)
    check_sharding(ATTENTION, decoder, ParallelConfig(fsdp=2, expert=2))


def test_adapter_names_of_a_plain_decoder_are_none(base: Path) -> None:
    assert adapter_names(load_model(base).model.decoder) == []


FROZEN = {"text_embedding": 0.0, "attention": 0.0, "experts": 0.0, "routers": 0.0, "image_tower": 0.0}


def frozen_module(base: Path, **settings: Any) -> DecoderModule:
    """An alignment: no adapter, and the language model and the tower are frozen."""
    optimizer = OptimizerConfig(lr=1e-2, warmup=0.0, min_lr_ratio=1.0, parts=dict(FROZEN))
    return make_module(base, None, optimizer=optimizer, **settings)


def test_checkpoints_leave_out_what_is_frozen_without_an_adapter_too(base: Path, tmp_path: Path) -> None:
    losses = fit(frozen_module(base), 4)
    saver = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=2)
    fit(frozen_module(base), 2, saver, enable_checkpointing=True)
    saved = torch.load(tmp_path / "saved" / "last.ckpt", weights_only=True)
    parts = {part_of(name) for name in saved["state_dict"]}
    assert parts == {"unit_embedding", "image_projector", "audio_front_end"}
    recorder = LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(recorder, max_steps=4)
        resumed = frozen_module(base, seed=9)
        trainer.fit(
            resumed, datamodule=_Rest(batches(4), 2), ckpt_path=tmp_path / "saved" / "last.ckpt", weights_only=True
        )
    assert recorder.losses == losses[2:]
    with pytest.raises(ValueError, match=r"holds only what was trained.*go on with the same"):
        fit(make_module(base, None, optimizer=OptimizerConfig(lr=1e-2)), 4, ckpt=tmp_path / "saved" / "last.ckpt")
    other = make_base(tmp_path / "other", rms_norm_eps=1e-3)
    with pytest.raises(ValueError, match="the base changed, or is another"):
        fit(frozen_module(other), 4, ckpt=tmp_path / "saved" / "last.ckpt")
    with pytest.raises(ValueError, match=r"out is .*which is init_from"):
        fit(frozen_module(base, out=str(base)), 1)


def test_frozen_weights_go_out_in_the_dtype_of_their_folder(base: Path, tmp_path: Path) -> None:
    loaded = load_model(base, dtype=torch.bfloat16)
    half = tmp_path / "half"
    save_model(half, loaded.model, loaded.tokenizer)
    was = load_file(half / "model.safetensors")
    fit(frozen_module(half, out=str(tmp_path / "aligned")), 2)
    now = load_file(tmp_path / "aligned" / "model.safetensors")
    num_base = loaded.model.config.decoder.num_base_ids
    for name, tensor in now.items():
        if part_of(name) in ("unit_embedding", "image_projector", "audio_front_end"):
            continue
        rows = slice(num_base) if "embed_tokens" in name or "lm_head" in name else slice(None)
        assert tensor.dtype == torch.bfloat16 and torch.equal(tensor[rows], was[name][rows]), name
    assert now["image_projector.project.0.weight"].dtype == torch.float32
    assert not torch.equal(now["decoder.embed_tokens.weight"], was["decoder.embed_tokens.weight"])
    assert isinstance(load(tmp_path / "aligned").score("a", "b"), float)
    experts = OptimizerConfig(lr=1e-2, parts={**FROZEN, "experts": 1e-2})
    fit(make_module(half, None, optimizer=experts, out=str(tmp_path / "tuned")), 1)
    tuned = load_file(tmp_path / "tuned" / "model.safetensors")
    dtypes = {tensor.dtype for name, tensor in tuned.items() if name.startswith("decoder.")}
    assert dtypes == {torch.float32}, "a decoder of which more is trained keeps what was learned"
    assert tuned[next(name for name in tuned if name.startswith("vision."))].dtype == torch.bfloat16
