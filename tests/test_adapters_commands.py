"""`mmllm adapter`: listed, added, merged, and exported in the form of vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, base_facts, base_state, merge_adapter, save_adapter
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.weights import Checkpoint
from mmllm.cli.main import main
from mmllm.interop.decoder_names import decoder_layout
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.router import MoEConfig
from tests.inference_fixtures import make_tokenizer
from tests.test_adapters import add_to_folder, logits_of, text_logits, train_a_little

pytest.importorskip("peft")
torch.set_num_threads(1)
BOTH = AdapterConfig(r=2, lora_alpha=6, parts=("attention", "experts"))


@pytest.fixture(params=["qwen3_moe", "mixtral"])
def made(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A model folder whose decoder goes out as one of two families, which name their experts differently."""
    tokenizer = make_tokenizer(sound=False)
    is_qwen = request.param == "qwen3_moe"
    decoder = DecoderConfig(
        tokenizer.vocabulary.size, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        moe=MoEConfig(4, 2, 24, backend="reference"), tie_word_embeddings=False, qk_norm=is_qwen, head_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    save_model(tmp_path / "model", MultimodalModel(ModelConfig(decoder)), tokenizer)
    add_to_folder(tmp_path / "model", "both", BOTH, 1)
    return tmp_path / "model"


def run(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    got = main([str(word) for word in argv])
    said = capsys.readouterr()
    assert got == code, said.err
    return said.out if code == 0 else said.err


def test_merged_is_unmerged(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = run(capsys, "adapter", "merge", "--model", made, "--adapter", "both", "--out", tmp_path / "merged")
    assert said.endswith("with both in its weights\n")
    loaded = load_model(made, dtype=torch.bfloat16)
    save_model(tmp_path / "half", loaded.model, loaded.tokenizer)
    shutil.copytree(made / "adapters", tmp_path / "half" / "adapters")
    (tmp_path / "half" / "adapters" / "both" / "base.json").unlink()
    line = ["adapter", "merge", "--model", tmp_path / "half", "--adapter", "both", "--out", tmp_path / "merged-half"]
    assert "rounded to bfloat16" in run(capsys, *line)
    merged = load_model(tmp_path / "merged").model
    wanted = text_logits(load_model(made, adapter="both").model)
    torch.testing.assert_close(text_logits(merged), wanted, rtol=0, atol=1e-5)
    assert not torch.allclose(text_logits(load_model(made).model), wanted, atol=1e-2)
    assert not (tmp_path / "merged" / "adapters").exists()
    assert "the model itself" in run(
        capsys, "adapter", "merge", "--model", made, "--adapter", "both", "--out", made, code=2
    )
    assert "has both" in run(capsys, "adapter", "merge", "--model", made, "--adapter", "x", "--out", tmp_path, code=2)


def test_the_export_is_a_pair_for_each_linear_layer_of_the_checkpoint(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(capsys, "adapter", "export", "--model", made, "--adapter", "both", "--out", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert all(tensor.ndim == 2 and 2 in tensor.shape for tensor in tensors.values())
    layers = {key.rsplit(".lora_", 1)[0] for key in tensors}
    assert {layer.rpartition(".")[2] for layer in layers} == set(config["target_modules"])

    # W + s·B·A of each of the checkpoint's tensors is what the merged model has there
    loaded = load_model(made, adapter="both").model.decoder
    before = {name: tensor.clone() for name, tensor in base_state(loaded.state_dict()).items()}
    merge_adapter(loaded, "both")
    after, scale = loaded.state_dict(), 6 / 2
    family = "qwen3_moe" if loaded.config.qk_norm else "mixtral"
    num_seen = 0
    for piece in decoder_layout(loaded.config, family).pieces:
        path = f"base_model.model.{piece.theirs.removesuffix('.weight')}"
        delta = after[piece.ours][piece.ours_at] - before[piece.ours][piece.ours_at]
        if path in layers:
            num_seen += 1
            pair = tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
            torch.testing.assert_close(scale * pair, delta, rtol=1e-4, atol=1e-5)
            assert delta.any()
        else:
            assert not delta.any(), piece
    assert num_seen == len(layers) == 2 * (4 + 4 * 3)
    names = ("w1", "w3", "w2") if family == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    assert set(names) < set(config["target_modules"])


def test_the_models_export_says_that_adapters_stay_behind(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = json.loads(run(capsys, "export", "--model", made, "--out", tmp_path / "out", "--json"))
    assert said["left_behind"]["adapters"].startswith("both; `mmllm adapter merge`")


def test_an_adapter_of_attention_goes_out_as_it_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(made / "adapters" / "both")
    add_to_folder(made, "plain", AdapterConfig(r=4), 3)
    run(capsys, "adapter", "export", "--model", made, "--adapter", "plain", "--out", tmp_path / "out")
    got, wanted = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "out", made / "adapters" / "plain"))
    assert got.keys() == wanted.keys() and all(torch.equal(got[key], wanted[key]) for key in got)
    add_to_folder(made, "dora", AdapterConfig(r=4, use_dora=True), 3)
    said = run(capsys, "adapter", "export", "--model", made, "--adapter", "dora", "--out", tmp_path / "x", code=2)
    assert "use_dora" in said and "merge" in said


def test_adapters_of_peft_are_added_and_listed(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = load_model(made).model.decoder
    add_adapter(loaded, AdapterConfig(r=4), "other")
    train_a_little(loaded)
    wanted = logits_of(loaded, torch.arange(12).view(2, 6)).detach()
    save_adapter(tmp_path / "peft", loaded, "other", base_facts(Checkpoint.open(made), loaded.config))
    (tmp_path / "peft" / "base.json").unlink()
    run(capsys, "adapter", "add", tmp_path / "peft", "--model", made, "--name", "theirs")
    with torch.no_grad():
        got = logits_of(load_model(made, adapter="theirs").model.decoder, torch.arange(12).view(2, 6))
    torch.testing.assert_close(got, wanted)
    said = run(capsys, "adapter", "ls", "--model", made)
    assert "theirs: LORA, rank 4, k_proj o_proj q_proj v_proj" in said and "both: LORA, rank 2" in said
    said = run(capsys, "adapter", "merge", "--model", made, "--adapter", "theirs", "--out", tmp_path / "merged")
    assert "both stayed behind" in said
    again = run(capsys, "adapter", "add", tmp_path / "peft", "--model", made, "--name", "theirs", code=2)
    assert "is there already" in again
    said = run(capsys, "generate", "one two", "--model", made, "--adapter", "nowhere", code=2)
    assert "has both, theirs" in said


def test_an_adapter_of_another_model_is_not_added(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    run(capsys, "adapter", "merge", "--model", made, "--adapter", "both", "--out", other)
    source = made / "adapters" / "both"
    said = run(capsys, "adapter", "add", source, "--model", other, "--name", "x", code=2)
    assert "base.json has weights" in said and "another base" in said and not (other / "adapters").exists()
    run(capsys, "adapter", "add", source, "--model", made, "--name", "again")
    assert (made / "adapters" / "again" / "base.json").read_bytes() == (source / "base.json").read_bytes()
