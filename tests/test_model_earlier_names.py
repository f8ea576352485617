"""Folders, YAML files and weights with the names that keys and weights had first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.model.earlier_names import current_key, current_keys, current_weights, is_earlier
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.init_from import initialize
from mmllm.training.init_source import InitSource
from mmllm.training.lightning_cli import build_cli, quiet_lightning
from tests.inference_fixtures import make_model, make_tokenizer

LAYERS = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "attention.q_norm_C": ("self_attn.q_norm.weight",),
    "attention.k_norm_C": ("self_attn.k_norm.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.router_ED": ("mlp.gate.weight",),
    "mlp.gate_up_E2ID": ("mlp.experts.gate_up_proj",),
    "mlp.down_EDI": ("mlp.experts.down_proj",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
OTHERS = {
    "decoder.embedding.weight": "decoder.embed_tokens.weight",
    "decoder.output.weight": "decoder.lm_head.weight",
    "image_projector.rows_HC": "image_projector.row_embedding",
    "image_projector.columns_WC": "image_projector.column_embedding",
}


def _earlier(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As they were saved first."""
    left, old = dict(weights), {}
    layers = {name.split(".")[2] for name in weights if name.startswith("decoder.layers.")}
    for layer in layers:
        for name, parts in LAYERS.items():
            found = [left.pop(f"decoder.layers.{layer}.{part}", None) for part in parts]
            if found[0] is not None:
                old[f"decoder.blocks.{layer}.{name}"] = torch.cat(found)
    for name, new in OTHERS.items():
        if new in left:
            old[name] = left.pop(new)
    assert not any(name.startswith(("decoder.layers", "image_projector.row")) for name in left)
    return old | left


@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_a_model_folder_of_the_first_format_loads(tmp_path: Path, tie_word_embeddings: bool) -> None:
    tokenizer = make_tokenizer()
    model = make_model(tokenizer, tie_word_embeddings=tie_word_embeddings)
    folder = save_model(tmp_path / "model", model, tokenizer)
    save_file(_earlier(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    decoder, audio = config["model"]["decoder"], config["model"]["audio"]
    moe = decoder["moe"]
    for values, names in (
        (decoder, {"width": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads"}),
        (decoder, {"num_kv_heads": "num_key_value_heads", "mlp_width": "intermediate_size", "head_width": "head_dim"}),
        (decoder, {"norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings"}),
        (moe, {"top_k": "num_experts_per_tok", "expert_width": "moe_intermediate_size"}),
        (moe, {"balance_weight": "router_aux_loss_coef", "renormalise": "norm_topk_prob"}),
        (audio, {"latent_width": "codebook_dim"}),
        (audio["projector"], {"width": "hidden_size", "num_layers": "num_hidden_layers", "kernel": "kernel_size"}),
    ):
        for earlier, name in names.items():
            values[earlier] = values.pop(name)
    (folder / "config.json").write_text(json.dumps(config | {"format_version": 1}))
    loaded = load_model(folder).model
    assert loaded.config == model.config
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_an_imported_decoder_of_before_loads(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    decoder = make_model(tokenizer).decoder
    weights = {f"decoder.{name}": weight.clone() for name, weight in decoder.state_dict().items()}
    old = {name.removeprefix("decoder."): weight for name, weight in _earlier(weights).items()}
    old.pop("output.weight", None)
    assert {"embedding.weight", "blocks.0.attention.qkv.weight"} < old.keys()
    save_file(old, tmp_path / "decoder.safetensors", metadata={"format": "pt", "tokenizer": tokenizer.hash})
    from mmllm.model.config import config_to_dict

    values = config_to_dict(decoder.config)
    values["width"], values["num_layers"] = values.pop("hidden_size"), values.pop("num_hidden_layers")
    (tmp_path / "decoder.json").write_text(json.dumps(values))
    model = make_model(tokenizer)
    for parameter in model.decoder.parameters():
        parameter.data.zero_()
    initialize(model, InitSource.open(tmp_path), tokenizer)
    assert all(torch.equal(weight, decoder.state_dict()[name]) for name, weight in model.decoder.state_dict().items())


def test_yaml_and_options_with_earlier_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(
        "model:\n  class_path: mmllm.training.decoder_module.DecoderModule\n  init_args:\n"
        "    decoder: {vocab_size: 40, width: 16, num_heads: 2, moe: {top_k: 1, num_experts: 2}}\n"
        "    optimiser: {lr: 0.25}\n"
        "data: {class_path: tests.training_fixtures.TinyData}\n"
    )
    options = ["--trainer.logger=false", "--model.init_args.optimiser.weight_decay", "0.5"]
    with quiet_lightning():
        module = build_cli(["-c", str(path), *options], run=False).model
    assert isinstance(module, DecoderModule)
    assert (module.decoder.hidden_size, module.decoder.num_attention_heads) == (16, 2)
    assert module.decoder.moe is not None and module.decoder.moe.num_experts_per_tok == 1
    assert (module.optimizer.lr, module.optimizer.weight_decay) == (0.25, 0.5)
    assert "old.yaml has earlier names" in caplog.text


def test_both_names_of_a_key_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder\.width is what decoder\.hidden_size was called earlier"):
        current_keys({"decoder": {"width": 16, "hidden_size": 16}})


def test_keys_are_told_by_what_holds_them() -> None:
    assert current_key("--model.init_args.decoder.moe.top_k") == "--model.init_args.decoder.moe.num_experts_per_tok"
    assert current_keys({"vision": {"width": 3}, "speech": {"top_k": 5}}) == {
        "vision": {"width": 3},
        "speech": {"top_k": 5},
    }


def test_weights_of_other_parts_keep_their_names() -> None:
    names = [
        "clip_projector.blocks.0.mlp.0.weight",
        "code_embedding.table.weight",
        "vision.trunk.token_embedding.weight",
    ]
    weights = {name: torch.zeros(2) for name in names}
    assert not any(map(is_earlier, names))
    assert current_weights(weights, 2, 1).keys() == weights.keys()


def test_a_checkpoint_with_earlier_names_is_named() -> None:
    module = DecoderModule.__new__(DecoderModule)
    checkpoint = {"state_dict": {"model.decoder.blocks.0.attention.qkv.weight": torch.zeros(3)}}
    with pytest.raises(ValueError, match=r"blocks\.0\.attention\.qkv\.weight, a name that an earlier mmllm gave"):
        module.on_load_checkpoint(checkpoint)
