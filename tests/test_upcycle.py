"""`mmllm upcycle`: experts from dense layers that compute the same, and then learn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.cli.main import main
from mmllm.interop.upcycle import Upcycling
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.inference_fixtures import make_model, make_tokenizer
from tests.test_adapters import text_logits
from tests.test_training_adapters import batches
from tests.training_fixtures import ListData, LossRecorder, quiet_trainer

torch.set_num_threads(1)


def make_dense(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tokenizer = make_tokenizer()
    config = make_model(tokenizer).config
    decoder = dataclasses.replace(config.decoder, moe=None, moe_layers="all", **changes)
    torch.manual_seed(2)
    model = MultimodalModel(dataclasses.replace(config, decoder=decoder))
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    save_model(folder, model.to(dtype), tokenizer)
    return folder


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    got = main([str(word) for word in argv])
    said = capsys.readouterr()
    assert got == code, said.err
    return said.out if code == 0 else said.err


@pytest.mark.parametrize(
    ("experts", "top_k", "granularity"), [(8, 2, 1), (4, 1, 1), (4, 2, 2), (3, 2, 4), (2, 2, 16), (5, 1, 3)]
)
def test_logits_are_those_of_the_dense_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], experts: int, top_k: int, granularity: int
) -> None:
    make_dense(tmp_path / "dense")
    said = run(
        capsys, "upcycle", "--model", tmp_path / "dense", "--experts", experts, "--top_k", top_k, "--granularity",
        granularity, "--out", tmp_path / "moe",
    )  # fmt: skip
    assert f"{experts * granularity} experts a layer, {top_k * granularity} a token" in said
    assert "the logits are the dense model's" in said
    dense, moe = load_model(tmp_path / "dense").model, load_model(tmp_path / "moe").model
    config = moe.config.decoder.moe
    assert config is not None and config.moe_intermediate_size == 48 // granularity
    torch.testing.assert_close(text_logits(moe), text_logits(dense), rtol=0, atol=1e-5)
    stored, before = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "dense"))
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items() if ".mlp." not in name)
    rows = stored["decoder.layers.0.mlp.gate.weight"].unflatten(0, (experts, granularity))
    assert (rows == rows[:, :1]).all() and len(rows[:, 0].unique(dim=0)) == experts


def test_slices_are_chosen_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dense(tmp_path / "dense")
    run(capsys, "upcycle", "--model", tmp_path / "dense", "--experts", 4, "--granularity", 6, "--out", tmp_path / "moe")
    router = load_model(tmp_path / "moe").model.decoder.expert_layers()[0].gate
    experts_NK = router(torch.randn(500, 32))[1]
    copies, slices = experts_NK // 6, experts_NK % 6
    assert (slices.sort(dim=1).values == torch.arange(6).repeat_interleave(2)).all()
    assert all(len(row.unique()) == 2 for row in copies)


def test_it_trains_on_and_the_copies_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dense(tmp_path / "dense")
    run(capsys, "upcycle", "--model", tmp_path / "dense", "--experts", 4, "--granularity", 2, "--out", tmp_path / "moe")
    recorder = LossRecorder()
    module = DecoderModule(init_from=str(tmp_path / "moe"), optimizer=OptimizerConfig(lr=3e-3, warmup=0.0))
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=12).fit(module, datamodule=ListData(batches(2) * 6))
    assert recorder.losses[-1] < 0.9 * recorder.losses[0]
    assert module.model is not None
    layer = module.model.decoder.expert_layers()[0]
    stack = layer.experts.gate_up_proj.detach().unflatten(0, (4, 2))
    assert not torch.equal(stack[0], stack[1])
    rows = layer.gate.weight.detach().unflatten(0, (4, 2))
    assert not torch.equal(rows[:, 0], rows[:, 1])


def test_noise_gives_up_equality_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dense(tmp_path / "dense")
    said = run(capsys, "upcycle", "--model", tmp_path / "dense", "--noise", 0.1, "--out", tmp_path / "moe")
    assert "noise of 0.1" in said and "differ" in said
    dense, moe = (text_logits(load_model(tmp_path / name).model) for name in ("dense", "moe"))
    assert (
        not torch.allclose(dense, moe, atol=1e-2)
        and torch.corrcoef(torch.stack([dense.flatten(), moe.flatten()]))[0, 1] > 0.8
    )
    stack = load_file(tmp_path / "moe" / "model.safetensors")["decoder.layers.1.mlp.experts.down_proj"]
    weight = load_file(tmp_path / "dense" / "model.safetensors")["decoder.layers.1.mlp.down_proj.weight"]
    difference = (stack - weight).std() / weight.std()
    assert difference == pytest.approx(0.1, rel=0.05) and not torch.equal(stack[0], stack[1])


def test_half_precision_and_sources_stay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dense(tmp_path / "dense", torch.bfloat16)
    (tmp_path / "dense" / "source").mkdir()
    (tmp_path / "dense" / "source" / "config.json").write_text("{}")
    (tmp_path / "dense" / "adapters" / "old").mkdir(parents=True)
    (tmp_path / "dense" / "adapters" / "old" / "adapter_config.json").write_text("{}")
    said = run(capsys, "upcycle", "--model", tmp_path / "dense", "--out", tmp_path / "dense", code=2)
    assert "would be replaced; give another folder" in said
    said = run(capsys, "upcycle", "--model", tmp_path / "dense", "--out", tmp_path / "moe")
    assert "left behind: old" in said and not (tmp_path / "moe" / "adapters").exists()
    said = run(
        capsys, "upcycle", "--model", tmp_path / "dense", "--granularity", 3, "--out", tmp_path / "three", code=2
    )
    assert "--granularity is 3 and the weights are bfloat16" in said and not (tmp_path / "three").exists()
    run(
        capsys, "upcycle", "--model", tmp_path / "dense", "--granularity", 3, "--noise", 0.1, "--out",
        tmp_path / "three",
    )  # fmt: skip
    stored = load_file(tmp_path / "moe" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("decoder.")} == {torch.bfloat16}
    assert (tmp_path / "moe" / "source" / "config.json").read_text() == "{}"
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["model"]["decoder"]["moe"]["num_experts"] == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--experts", 1), "--experts is 1"),
        (("--top_k", 9), "--top_k is 9; it must be between 1 and --experts, 8"),
        (("--granularity", 0), "--granularity is 0"),
        (("--granularity", 7), "--granularity is 7, which doesn't divide decoder.intermediate_size, 48"),
        (("--noise", -1), "--noise is -1"),
    ],
)
def test_impossible_numbers_exit_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], said: str
) -> None:
    make_dense(tmp_path / "dense")
    message = run(capsys, "upcycle", "--model", tmp_path / "dense", *options, "--out", tmp_path / "moe", code=2)
    assert said in message and not (tmp_path / "moe").exists()


def test_models_that_cant_be_upcycled_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = make_tokenizer()
    save_model(tmp_path / "moe", make_model(tokenizer), tokenizer)
    said = run(capsys, "upcycle", "--model", tmp_path / "moe", "--out", tmp_path / "x", code=2)
    assert "has experts already" in said
    with pytest.raises(ValueError, match=r"mlp_bias is true"):
        Upcycling().config(DecoderConfig(40, mlp_bias=True))
    skipping = DecoderConfig(40, num_hidden_layers=3, mod_layers=(1,))
    assert Upcycling().config(skipping).moe_layers == (0, 2)
