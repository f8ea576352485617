"""Families of decoders: which one computes what was trained here, and what of others is refused by name."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.checkpoints.weights import Checkpoint, TensorSpec
from mmllm.interop.decoders import DecoderReader, DecoderWriter, read_config, read_decoder, write_decoder
from mmllm.interop.families import FAMILIES, decoder_config, family_of, unread_fields
from mmllm.interop.family_configs import family_config, family_for
from mmllm.interop.fields import defaults_of
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig
from tests.interop_fixtures import CASES, our_logits, quiet, saved, their_config

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

SIGMOID = MoEConfig(
    8, 3, 24, router_z_loss_coef=0, scoring_func="sigmoid", n_group=4, topk_group=2, n_shared_experts=2,
    routed_scaling_factor=2.5, use_expert_bias=True,
)  # fmt: skip
MOE = MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24)
SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 12, "intermediate_size": 40, "rope_theta": 5000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
SLIDING = ("sliding_attention", "full_attention", "sliding_attention")
TRAINED: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama tied, biases": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {"sliding_window": 5},
    "mistral, heads that don't divide the width": {"num_attention_heads": 6},
    "qwen2": {"attention_bias": "qkv", "rope_scaling": RopeScaling("yarn", 4.0, 8, beta_fast=4.0, truncate=False)},
    "qwen3 windows": {"qk_norm": True, "layer_types": SLIDING, "sliding_window": 4},
    "smollm3": {"no_rope_layers": (1, 0, 1), "rope_scaling": RopeScaling("llama3", 2.0, 8)},
    "smollm3 windows": {"layer_types": SLIDING, "sliding_window": 4, "mlp_bias": True},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 6},
    "mixtral": {"moe": MOE},
    "mixtral yarn, tied": {
        "moe": MOE, "tie_word_embeddings": True, "rope_scaling": RopeScaling("yarn", 4.0, 8, beta_fast=4.0),
    },
    "qwen3_moe": {"moe": MOE, "qk_norm": True, "moe_layers": (0, 2)},
    "qwen3_moe llama3, biases": {
        "moe": MOE, "qk_norm": "head", "attention_bias": True, "rope_scaling": RopeScaling("llama3", 2.0, 8),
    },
    "qwen3_moe linear": {"moe": MOE, "qk_norm": True, "rope_scaling": RopeScaling("linear", 2.5)},
    "qwen3_moe unnormalized gates": {"moe": dataclasses.replace(MOE, norm_topk_prob=False), "qk_norm": True},
    "olmoe": {"moe": MOE, "qk_norm": "width", "head_dim": None},
    "glm4_moe": {
        "moe": SIGMOID, "qk_norm": "head", "attention_bias": "qkv", "partial_rotary_factor": 0.5, "moe_layers": (1, 2),
    },
    "glm4_moe without a bias": {"moe": dataclasses.replace(SIGMOID, use_expert_bias=False)},
    "dots1": {"moe": SIGMOID, "qk_norm": "head", "attention_bias": True, "layer_types": SLIDING, "sliding_window": 4},
}  # fmt: skip
"""Decoders as they might be trained here, by the family that computes them."""


def trained(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**(SIZES | changes)))
    for parameter in decoder.parameters():  # far from the initial values, norms included
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for moe in decoder.expert_layers().values():
        if moe.gate.e_score_correction_bias is not None:
            moe.gate.e_score_correction_bias.normal_()
    return decoder


class InMemory:
    """A state dict, read as a checkpoint is."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.tensors = tensors

    @property
    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        return self.tensors[name]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_trained_here_goes_out_with_logits_and_every_gradient(name: str, tmp_path: Path) -> None:
    decoder = trained(**TRAINED[name])
    family = name.split()[0].removesuffix(",")
    assert write_decoder(decoder, tmp_path, {"pad_token_id": 0}) == family
    quiet()
    theirs, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert theirs.config.model_type == family
    # no id 0: to transformers it is padding, whose embedding gets no gradient
    ids_BT = torch.randint(1, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    ours_BTV = decoder.head(decoder(decoder.embed(ids_BT), torch.arange(23).expand(2, 23), torch.zeros_like(ids_BT))[0])
    theirs_BTV = theirs(ids_BT).logits
    torch.testing.assert_close(ours_BTV, theirs_BTV, rtol=1e-5, atol=2e-5)
    for logits in (ours_BTV, theirs_BTV):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT.roll(-1, 1).flatten()).backward()
    # their gradients under the names of their weights, read as a checkpoint is
    gradients = dict(theirs.named_buffers())
    for parameter_name, parameter in theirs.named_parameters():
        gradients[parameter_name] = parameter.grad
    gradients = {key: gradients[key] for key in theirs.state_dict() if key in gradients}
    reader = DecoderReader(InMemory(gradients), read_config(tmp_path))
    for parameter_name, parameter in decoder.named_parameters():
        torch.testing.assert_close(
            parameter.grad, reader.read(parameter_name), rtol=1e-5, atol=2e-6,
            msg=lambda text, which=parameter_name: f"{which}: {text}",
        )  # fmt: skip


@pytest.mark.parametrize("name", TRAINED)
def test_what_goes_out_comes_back(name: str, tmp_path: Path) -> None:
    decoder = trained(**TRAINED[name])
    write_decoder(decoder, tmp_path)
    again = read_decoder(tmp_path)
    ids_BT = torch.randint(0, 61, (1, 19), generator=torch.Generator().manual_seed(1))
    assert torch.equal(our_logits(decoder.eval(), ids_BT), our_logits(again.eval(), ids_BT))
    own = decoder.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, own[key]) if key in own else not value.any(), key
    assert family_for(again.config) == read_config(tmp_path)["model_type"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": MOE, "moe_layers": (0, 2)}, r"moe_layers is \(0, 2\), .*nearest is mixtral"),
        ({"moe": dataclasses.replace(MOE, norm_topk_prob=False)}, "moe.norm_topk_prob is False"),
        ({"moe": dataclasses.replace(MOE, router_z_loss_coef=0, scoring_func="sigmoid")}, "n_shared_experts is 0"),
        ({"moe": dataclasses.replace(MOE, routed_scaling_factor=2.5)}, "routed_scaling_factor is 2.5"),
        ({"moe": dataclasses.replace(MOE, n_shared_experts=1), "qk_norm": True}, "n_shared_experts is 1, .*qwen3_moe"),
        ({"moe": dataclasses.replace(MOE, use_expert_bias=True)}, "use_expert_bias is True"),
        ({"moe": dataclasses.replace(MOE, modality_experts={"text": (0, 1)})}, "modality_experts is {'text'"),
        ({"moe": dataclasses.replace(MOE, num_experts=4, n_group=2)}, "topk_group is 1"),
        ({"mod_layers": (1,)}, r"mod_layers is \[1\]"),
        ({"conv_size": 4}, r"conv_size is 4"),
        ({"qk_norm": "width"}, "qk_norm is 'width'"),
        ({"attention_bias": "qkv", "qk_norm": True}, "decoder.qk_norm is 'head'.*nearest is qwen2, with"),
        ({"moe": MOE, "attention_bias": True}, "decoder.attention_bias is 'all'"),
        ({"sliding_window": 8, "sliding_rope_theta": 50.0}, "sliding_rope_theta is 50.0"),
        ({"prefix": "media"}, "decoder.prefix is 'media'"),
        ({"partial_rotary_factor": 0.5, "qk_norm": True}, "partial_rotary_factor is 0.5"),
        ({"no_rope_layers": (1, 1, 0), "qk_norm": True}, r"no_rope_layers is \(1, 1, 0\)"),
        ({"partial_rotary_factor": 0.5, "rope_scaling": RopeScaling("linear", 2.0)}, "partial_rotary_factor is"),
    ],
)
def test_what_no_family_computes_is_refused_naming_the_switch(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        family_for(DecoderConfig(**(SIZES | changes)))
    assert "to export" in str(error.value)


def test_another_family_than_the_one_that_computes_it_is_refused() -> None:
    config = DecoderConfig(**SIZES, qk_norm="head")
    with pytest.raises(ValueError, match=r"decoder\.qk_norm is 'head', which llama does not compute; qwen3 does"):
        family_config(config, "llama")


def plain_config(kind: str = "llama", **changes: Any) -> dict[str, Any]:
    """A config.json, as a dict, of a family that transformers knows."""
    name = next(name for name in CASES if name.split()[0].removesuffix(",") == kind)
    config = their_config(name, num_hidden_layers=4)
    return json.loads(config.to_json_string(use_diff=False)) | changes


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"model_type": "gpt2"}, "model_type is 'gpt2'; llama, mistral,"),
        ("llama", {"model_type": None}, "model_type is None; llama"),
        ("llama", {"model_type": "deepseek_v3"}, "model_type 'deepseek_v3': multi-head latent attention"),
        ("llama", {"kv_lora_rank": 512}, "kv_lora_rank is 512 .*multi-head latent attention"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; llama is imported with 'silu'"),
        ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method is 'fp8'"),
        ("llama", {"quantization_config": {"quant_method": "awq", "bits": 4}}, "quant_method is 'awq'"),
        ("llama", {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "auto_map is .* code of its own"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier is 12.0"),
        ("llama", {"is_causal": False}, "is_causal is False"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ("olmoe", {"head_dim": 7}, "head_dim is 7"),
        ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_scaling.rope_type is 'dynamic'"),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            "rope_type is 'longrope'; phi3 is imported with default",
        ),
        ("phi3", {"rope_scaling": {"type": "su", "short_factor": [1.0], "long_factor": [2.0]}}, "is 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "mine"}}, "rope_parameters.rope_type is 'mine'; .*default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters lacks factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters.factor is '2'"),
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "mine": 1}}, "rope_scaling.mine is 1"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, "factor is 0.5"),
        (
            "qwen2",
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1.0}}},
            "positions of their own for 'full_attention'",
        ),
        ("llama", {"partial_rotary_factor": 0.5, "rope_parameters": None}, "partial_rotary_factor is 0.5"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "layer_types is .* only where sliding_window"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types is "),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 9, "layer_types": ["sliding_attention"]}, "1 entries"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers is"),
        ("llama", {"hidden_size": "big"}, "hidden_size is 'big'; llama is imported with a whole number"),
        ("llama", {"num_attention_heads": 0}, "num_attention_heads is 0"),
        ("llama", {"hidden_size": 30, "head_dim": None}, "hidden_size is 30, which 4 heads do not divide"),
        ("llama", {"rms_norm_eps": None}, "rms_norm_eps is None"),
        ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ("mixtral", {"num_experts_per_tok": 99}, "num_experts_per_tok is 99"),
        ("dots1", {"n_shared_experts": None}, "n_shared_experts is None"),
        ("glm4_moe", {"n_group": 3}, "n_group is 3"),
    ],
)
def test_config_that_cannot_be_computed_is_refused_naming_the_field(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_config(plain_config(family, **changes))


@pytest.mark.parametrize("family", FAMILIES)
def test_absent_fields_are_the_familys_defaults(family: str) -> None:
    whole = plain_config(family)
    defaults = defaults_of(family)
    absent = {key for key, value in whole.items() if key in defaults and value == defaults[key]}
    assert absent
    short = {key: value for key, value in whole.items() if key not in absent}
    assert decoder_config(short) == decoder_config(whole)
    assert not unread_fields(whole)
    assert unread_fields(whole | {"sauce": 1, "_name_or_path": "x", "empty": None}) == ("sauce",)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_that_says_next_to_nothing_is_what_transformers_makes_of_it(family: str) -> None:
    dots1 = {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    needed = {"dots1": dots1, "glm4_moe": {"head_dim": 128}}.get(family, {})
    config = json.loads(transformers.CONFIG_MAPPING[family](**needed).to_json_string(use_diff=False))
    found = [decoder_config(values) for values in ({"model_type": family, **needed}, config)]
    ours, theirs = (
        dataclasses.replace(each, num_key_value_heads=each.kv_heads, head_dim=each.head_channels) for each in found
    )
    assert ours == theirs


@pytest.mark.parametrize("name", CASES)
def test_windows_and_layers_are_derived_where_they_are_not_listed(name: str) -> None:
    config = json.loads(their_config(name).to_json_string(use_diff=False))
    derived = {"layer_types", "no_rope_layers"} - CASES[name][1].keys()
    short = {key: value for key, value in config.items() if key not in derived}
    assert decoder_config(short) == decoder_config(config)


def test_positions_as_they_were_written_before_transformers_5() -> None:
    def scaled(**values: Any) -> RopeScaling | None:
        config = {key: value for key, value in plain_config().items() if key != "rope_parameters"}
        parsed = decoder_config(config | {"rope_theta": 500000.0} | values)
        assert parsed.rope_theta == 500000.0
        return parsed.rope_scaling

    assert scaled() is None and scaled(rope_scaling=None) is None
    assert scaled(rope_scaling={"type": "linear", "factor": 4.0}) == RopeScaling("linear", 4.0)
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    assert scaled(rope_scaling={"rope_type": "llama3", **llama3}) == RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
    assert scaled(rope_scaling=yarn) == RopeScaling("yarn", 4.0, 32768)
    del yarn["original_max_position_embeddings"]
    assert scaled(rope_scaling=yarn, max_position_embeddings=512) == RopeScaling("yarn", 4.0, 512)
    config = {key: value for key, value in plain_config("smollm3").items() if key != "rope_parameters"}
    assert decoder_config(config).rope_theta == 2000000.0, "SmolLM3's own default"


def test_models_of_custom_code_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    config = plain_config() | {"auto_map": {"AutoConfig": "mine.Config"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise RuntimeError('it ran')")
    with pytest.raises(ValueError, match=f"{tmp_path}: config.json: auto_map"):
        read_decoder(tmp_path)
    with pytest.raises(ValueError, match="remove auto_map"):
        family_of(config)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    saved("llama 3.1, biases, tied", tmp_path)
    return tmp_path


EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda w: w.pop(NORM), {}, f"lacks tensor {NORM}; config.json says it has it"),
        (lambda w: w.pop(EMBEDDING), {}, "has 0 tensors embed_tokens.weight"),
        (lambda w: w.update({"model.x": torch.zeros(7)}), {}, r"unknown tensor model\.x; config.json says nothing"),
        (lambda w: w.update({NORM: torch.zeros(7)}), {}, r"norm.weight has the shape \[7\]; config.json says \[32\]"),
        (lambda w: None, {"vocab_size": 90}, r"embed_tokens.weight has the shape \[97, 32\]; config.json says \[90,"),
        (lambda w: None, {"attention_bias": False}, "unknown tensors model.layers.0.self_attn.*bias.* more"),
        (lambda w: None, {"num_hidden_layers": 2}, r"unknown tensors model\.layers\.2"),
        (lambda w: None, {"num_hidden_layers": 4}, r"lacks tensors model\.layers\.3"),
        (lambda w: None, {"tie_word_embeddings": False}, r"lacks tensor lm_head\.weight"),
        (
            lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}),
            {},
            r"tie_word_embeddings is true, but the tied weights differ: lm_head\.weight is not model\.embed_tokens",
        ),
        (
            lambda w: w.update({NORM: w[NORM].to(torch.float8_e4m3fn)}),
            {},
            r"norm\.weight has dtype float8_e4m3fn; wanted bfloat16",
        ),
        (lambda w: w.update({f"b.{EMBEDDING}": torch.zeros(7)}), {}, "has 2 tensors embed_tokens.weight at"),
    ],
)
def test_weights_that_do_not_fit_their_config_are_named(
    checkpoint: Path, change: Any, config: dict[str, Any], message: str
) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text(json.dumps(read_config(checkpoint) | config))
    with pytest.raises(ValueError, match=message) as error:
        read_decoder(checkpoint)
    assert str(checkpoint) in str(error.value)


def test_a_tied_head_that_is_there_twice_is_ignored_by_name(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    save_file({**weights, "lm_head.weight": weights[EMBEDDING].clone()}, checkpoint / "model.safetensors")
    reader = DecoderReader(Checkpoint.open(checkpoint), read_config(checkpoint))
    assert reader.ignored == ("lm_head.weight",) and "lm_head.weight" not in reader.specs


def test_experts_in_several_dtypes_are_refused(tmp_path: Path) -> None:
    saved("mixtral", tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    one = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    weights[one] = weights[one].bfloat16()
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"experts\.2\.w1\.weight of torch\.bfloat16"):
        read_decoder(tmp_path)


def test_folders_that_are_none() -> None:
    with pytest.raises(FileNotFoundError, match="absent is no folder"):
        read_decoder("absent")


def test_a_writer_wants_the_weights_of_its_config() -> None:
    decoder = trained()
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in decoder.state_dict().items()}
    with pytest.raises(ValueError, match=r"norm\.weight is missing"):
        DecoderWriter(decoder.config, "llama", {name: spec for name, spec in specs.items() if name != "norm.weight"})
    with pytest.raises(ValueError, match=r"norm\.weight has the shape \[3\]"):
        DecoderWriter(decoder.config, "llama", specs | {"norm.weight": TensorSpec(torch.float32, (3,))})
