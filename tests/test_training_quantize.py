"""A base in four bits beside an adapter that is trained (QLoRA), on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import load_file

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.inference.api import load
from mmllm.training.ema import EMA
from mmllm.training.estimate_memory import memory_bytes
from mmllm.training.layout import Layout
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.test_adapters import text_logits
from tests.test_training_adapters import (
    PARTS,
    _Rest,
    batches,
    fit,
    make_base,
    make_module,
    weights_of,
)
from tests.training_fixtures import LossRecorder, quiet_trainer

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
from bitsandbytes.functional import dequantize_4bit

pytestmark = pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning")
NF4 = AdapterConfig(r=4, lora_alpha=8, quantization="nf4")
PLAIN = AdapterConfig(r=4, lora_alpha=8)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", hidden_size=64, intermediate_size=128, moe=None, moe_layers="all")


def test_the_base_is_small_frozen_and_nearly_the_same(wide: Path) -> None:
    module = make_module(wide, NF4)
    module.configure_model()
    assert module.model is not None
    layer: Any = module.model.decoder.layers[0].self_attn.q_proj.base_layer  # type: ignore[union-attr]
    assert layer.weight.dtype == torch.uint8 and layer.weight.numel() == 64 * 64 / 2
    before = weights_of(module)
    quantized, whole = fit(module, 4), fit(make_module(wide, PLAIN), 4)
    assert quantized == pytest.approx(whole, rel=0.1) and quantized != whole
    moved = {name for name, weight in module.named_parameters() if not torch.equal(weight, before[name])}
    trained = {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert moved <= trained and {name for name in trained if "image_projector" not in name} <= moved
    assert any(".lora_A." in name for name in moved) and any(name.endswith(".added") for name in moved)


def test_it_resumes_exactly_and_goes_out_with_the_folders_weights(wide: Path, tmp_path: Path) -> None:
    def run(steps: int, name: str, **settings: Any) -> tuple[list[float], Any]:
        module = make_module(wide, NF4, **settings)
        saving = ModelCheckpoint(tmp_path / name, save_last=True, save_top_k=0, every_n_train_steps=1)
        return fit(module, steps, saving, EMA(0.9), enable_checkpointing=True), module

    whole, _ = run(4, "whole")
    first, _ = run(2, "cut")
    resumed, recorder = make_module(wide, NF4, seed=9, out=str(tmp_path / "out")), LossRecorder()
    with quiet_lightning():
        trainer = quiet_trainer(recorder, EMA(0.9), max_steps=4)
        data = _Rest(batches(4), 2)
        trainer.fit(resumed, datamodule=data, ckpt_path=tmp_path / "cut" / "last.ckpt", weights_only=True)
    assert first + recorder.losses == whole
    saved = torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("base_layer" in name for name in saved)

    stored, frozen = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", wide))
    for name, tensor in stored.items():
        if "image_projector" not in name:  # whose matrices alone decay, without a picture
            is_trained = "embed_tokens" in name or "lm_head" in name
            assert torch.equal(tensor, frozen[name]) != is_trained, name
    # the adapter that went out is the one that was trained: with the four bits in its weights, the model is the same
    model, trained = load(tmp_path / "out", adapter="default").model, resumed.model
    assert trained is not None
    apart = text_logits(model)
    for name, layer in trained.decoder.named_modules():
        if hasattr(layer, "quant_state") and not hasattr(layer, "base_layer"):
            packed: Any = layer.weight
            weight: Any = model.decoder.get_parameter(f"{name}.weight")
            weight.copy_(dequantize_4bit(packed.data, packed.quant_state))
    torch.testing.assert_close(text_logits(model), text_logits(trained), rtol=1e-3, atol=1e-3)
    assert 0 < (text_logits(model) - apart).abs().mean() < apart.abs().mean()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"compile": True}, "compile are given"),
        ({"optimizer": OptimizerConfig(parts={**PARTS, "attention": 1e-3})}, r"optimizer\.parts\.attention is 0\.001"),
    ],
)
def test_what_does_not_go_with_four_bits_is_named(wide: Path, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make_module(wide, NF4, **settings).configure_model()


def test_other_refusals(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmllm.training.quantize import check_quantization

    with pytest.raises(ValueError, match="under a MeshStrategy"):
        check_quantization(True, False, {})
    with pytest.raises(ValueError, match="quantization is 'int3'"):
        AdapterConfig(quantization="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="use_dora and quantization"):
        AdapterConfig(quantization="nf4", use_dora=True)
    module: Any = make_module(wide, NF4)
    with pytest.raises(ValueError, match="--print_estimate does not know"):
        memory_bytes(module, module.resolved_config(), Layout(), None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[qlora\]'"):
        make_module(wide, NF4).configure_model()
