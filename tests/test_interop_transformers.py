from __future__ import annotations

import dataclasses

import pytest
import torch

from mmllm.interop.transformers import from_mixtral, to_mixtral, to_transformers
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")


def _config(**changes) -> DecoderConfig:
    values = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "intermediate_size": 40,
        "moe": MoEConfig(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=24),
        "rope_theta": 5000.0,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    return DecoderConfig(**(values | changes))


def _decoder(config: DecoderConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config)
    for parameter in decoder.parameters():  # far from the initial values, norms included
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def _logits(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return decoder.head(decoder(decoder.embed(ids_BT), positions_BT, torch.zeros_like(ids_BT))[0])


FAMILIES = {
    "mixtral": {},
    "mixtral tied": {"tie_word_embeddings": True},
    "qwen3_moe": {"qk_norm": True, "moe_layers": (1, 2)},
    "mixtral yarn": {"qk_norm": "none", "rope_scaling": RopeScaling("yarn", 4.0, 8, beta_fast=4.0)},
    "qwen3_moe llama3, biases": {
        "qk_norm": "head",
        "attention_bias": True,
        "rope_scaling": RopeScaling("llama3", 2.0, 8),
    },
    "qwen3_moe linear": {"qk_norm": True, "rope_scaling": RopeScaling("linear", 2.5)},
    "qwen3_moe unnormalized gates": {"qk_norm": True, "moe": MoEConfig(5, 2, 24, norm_topk_prob=False)},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_gradient_equal_transformers(family):
    decoder = _decoder(_config(**FAMILIES[family]))
    theirs = to_transformers(decoder)
    assert theirs.config.model_type == family.split()[0]
    # no id 0: to transformers it is padding, whose embedding gets no gradient
    ids_BT = torch.randint(1, 61, (2, 23), generator=torch.Generator().manual_seed(1))
    our_logits, their_logits = _logits(decoder, ids_BT), theirs(ids_BT).logits
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-5, atol=1e-5)
    for logits in (our_logits, their_logits):
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids_BT.roll(-1, 1).flatten()).backward()
    # put their gradients into a model of their kind and import it: names and stacking are then the same
    for parameter in theirs.parameters():
        assert parameter.grad is not None
        parameter.data = parameter.grad
    gradients = dict(from_mixtral(theirs).named_parameters())
    for name, parameter in decoder.named_parameters():
        torch.testing.assert_close(
            parameter.grad, gradients[name].data, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "qwen3_moe llama3, biases"])
def test_round_trip_through_a_folder(family, tmp_path):
    decoder = _decoder(_config(**FAMILIES[family]))
    assert to_mixtral(decoder, tmp_path) == family.split()[0]
    again = from_mixtral(tmp_path)
    intermediate_size = again.config.intermediate_size if family == "mixtral" else 40  # Mixtral has no dense layers
    wanted = dataclasses.replace(
        decoder.config,
        intermediate_size=intermediate_size,
        qk_norm=family != "mixtral",  # "head" is true in short
    )
    assert again.config == wanted
    for name, value in decoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe": None}, "layer 0 is dense"),
        ({"moe_layers": (0, 2)}, "layer 1 is dense and decoder.qk_norm is false"),
        ({"moe": MoEConfig(4, 2, 8, norm_topk_prob=False)}, "layer 0 does not renormalize"),
        ({"moe": MoEConfig(4, 2, 8, router_z_loss_coef=0, scoring_func="sigmoid")}, "scoring_func is 'sigmoid'"),
        ({"moe": MoEConfig(4, 2, 8, routed_scaling_factor=2.5)}, "routed_scaling_factor is 2.5"),
        ({"moe": MoEConfig(4, 2, 8, n_shared_experts=1), "qk_norm": True}, "n_shared_experts is 1; .*: 0 to export"),
        ({"moe": MoEConfig(4, 2, 8, use_expert_bias=True)}, "use_expert_bias is True; .*use_expert_bias: false"),
        ({"moe": MoEConfig(4, 2, 8, modality_experts={"text": (0, 1)})}, "modality_experts is .*: null to export"),
        ({"mod_layers": (1,), "moe_layers": (0, 2), "qk_norm": True}, "mod_layers names layer 1"),
        ({"moe": MoEConfig(4, 2, 8, n_group=2)}, "topk_group is 1 of n_group 2"),
        ({"qk_norm": "width"}, "decoder.qk_norm is 'width'; .*qk_norm: head or none to export"),
        ({"attention_bias": "qkv", "qk_norm": True}, "decoder.attention_bias is 'qkv'; .*attention_bias: all or none"),
        ({"attention_bias": True}, "decoder.attention_bias is 'all' and decoder.qk_norm is 'none'"),
        ({"sliding_window": 8}, "decoder.sliding_window is 8 in layer 0; .*sliding_window: null"),
        ({"prefix": "media"}, "decoder.prefix is 'media'; .*prefix: none to export"),
    ],
)
def test_what_no_family_computes_is_refused_naming_layer_or_switch(changes, message):
    with pytest.raises(ValueError, match=message):
        to_transformers(Decoder(_config(**changes)))


def test_other_checkpoints_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no folder"):
        from_mixtral(tmp_path / "absent")
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        from_mixtral(tmp_path)
    config = transformers.MixtralConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="sliding_window is 64"):
        from_mixtral(transformers.MixtralForCausalLM(config))
