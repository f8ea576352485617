"""Routers and experts against plain loops, and against transformers' layers of the same names."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.batch import Modality
from mmllm.model.config import config_from_dict, config_to_dict
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.experts import MoE
from mmllm.model.router import MoEConfig, Router, TokenInfo
from mmllm.model.routing_stats import layer_sums

WIDTH, NUM_TOKENS = 12, 37
SIGMOID = MoEConfig(8, 3, 10, router_z_loss_coef=0.0, scoring_func="sigmoid", use_expert_bias=True)
GROUPED = dataclasses.replace(SIGMOID, n_group=4, topk_group=2, routed_scaling_factor=2.5)
MODALITIES = {"text": [0, 1, 5], "image": [2, 3], "audio": [4, 6, 7], "units": [6, 2, 0]}
CASES = {
    "softmax": MoEConfig(8, 3, 10),
    "softmax over all": MoEConfig(8, 3, 10, norm_topk_prob=False, routed_scaling_factor=0.7),
    "softmax with a bias": MoEConfig(8, 3, 10, use_expert_bias=True),
    "softmax in groups": MoEConfig(8, 3, 10, n_group=2, topk_group=1, norm_topk_prob=False),
    "sigmoid": dataclasses.replace(SIGMOID, use_expert_bias=False, norm_topk_prob=False),
    "sigmoid with a bias": SIGMOID,
    "sigmoid in groups": GROUPED,
    "modalities": MoEConfig(8, 2, 10, modality_experts=MODALITIES),  # pyright: ignore[reportArgumentType]
    "modalities over all": MoEConfig(8, 2, 10, modality_experts=MODALITIES, norm_topk_prob=False),  # pyright: ignore
    "sigmoid by modality": MoEConfig(
        8, 1, 10, router_z_loss_coef=0.0, scoring_func="sigmoid", modality_experts={"image": (1, 2)}
    ),
    "modalities with a bias": MoEConfig(
        8,
        2,
        10,
        use_expert_bias=True,
        modality_experts={"text": (0, 3, 5), "image": (1, 2, 6), "audio": (4, 7), "units": (4, 7)},
    ),
    "shared": dataclasses.replace(GROUPED, n_shared_experts=2),
}


def _layer(config: MoEConfig, dtype: torch.dtype = torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(WIDTH, config).to(dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if moe.gate.e_score_correction_bias is not None:
        torch.nn.init.normal_(moe.gate.e_score_correction_bias, std=0.1)
    return moe


def _tokens(num_tokens: int = NUM_TOKENS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x_ND = torch.randn(num_tokens, WIDTH, generator=generator, dtype=torch.float64)
    return x_ND, torch.randint(0, len(Modality), (num_tokens,), generator=generator)


def _slow_choice(scores: list[float], allowed: list[int], config: MoEConfig, bias: list[float]) -> list[int]:
    """The definition, for one token."""
    choice = {expert: scores[expert] + bias[expert] for expert in allowed}
    if config.n_group > 1:
        size = config.num_experts // config.n_group
        groups = [range(first, first + size) for first in range(0, config.num_experts, size)]
        best = [sum(sorted((choice[e] for e in group), reverse=True)[:2]) for group in groups]
        chosen = sorted(range(len(groups)), key=lambda g: -best[g])[: config.topk_group]
        choice = {e: value for e, value in choice.items() if e // size in chosen}
    return sorted(choice, key=lambda e: -choice[e])[: config.num_experts_per_tok]


def _slow_moe(moe: MoE, x_ND: Tensor, modality_N: Tensor) -> tuple[Tensor, list[list[int]]]:
    """Token by token, in sums that autograd can follow."""
    config, gate = moe.config, moe.gate
    bias = [0.0] * config.num_experts if gate.e_score_correction_bias is None else gate.e_score_correction_bias.tolist()
    outputs, chosen = [], []
    for x_D, modality in zip(x_ND, modality_N.tolist(), strict=True):
        by_modality = config.modality_experts or {}
        allowed = sorted(by_modality.get(Modality(modality).name.lower(), range(config.num_experts)))
        logits_E = gate.weight @ x_D
        if config.scoring_func == "sigmoid":
            scores = [1 / (1 + torch.exp(-logit)) for logit in logits_E]
        else:
            total = torch.exp(logits_E[allowed]).sum()
            scores = [torch.exp(logit) / total for logit in logits_E]
        experts = _slow_choice([score.item() for score in scores], allowed, config, bias)
        total = sum(scores[e] for e in experts) if config.norm_topk_prob else 1.0
        out_D = torch.zeros_like(x_D)
        for e in experts:
            weights = (moe.experts.gate_up_proj[e], moe.experts.down_proj[e])
            out_D = out_D + scores[e] / total * config.routed_scaling_factor * _swiglu(x_D, *weights)
        for s in range(config.n_shared_experts):
            assert moe.shared_experts is not None
            out_D = out_D + _swiglu(x_D, moe.shared_experts.gate_up_proj[s], moe.shared_experts.down_proj[s])
        outputs.append(out_D)
        chosen.append(experts)
    return torch.stack(outputs), chosen


def _swiglu(x_D: Tensor, gate_up_2ID: Tensor, down_DI: Tensor) -> Tensor:
    gate, up = (gate_up_2ID @ x_D).chunk(2)
    return down_DI @ (gate * torch.sigmoid(gate) * up)


def _gradients(moe: MoE, x_ND: Tensor, out_ND: Tensor) -> dict[str, Tensor]:
    weight_ND = torch.randn(out_ND.shape, generator=torch.Generator().manual_seed(2), dtype=out_ND.dtype)
    named = dict(moe.named_parameters()) | {"x": x_ND}
    grads = torch.autograd.grad((out_ND * weight_ND).sum(), list(named.values()))
    return dict(zip(named, grads, strict=True))


@pytest.mark.parametrize("dispatched", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_layer_of_experts_is_its_definition(name: str, dispatched: bool) -> None:
    moe = _layer(CASES[name])
    if dispatched:  # what the dispatcher gets is what it gives back
        moe.dispatcher = lambda x_ND, gates_NK, experts_NK, compute: compute(x_ND, gates_NK, experts_NK)
    x_ND, modality_N = _tokens()
    x_ND.requires_grad_()
    out_ND, sums = moe(x_ND, TokenInfo(modality_N))
    expected_ND, chosen = _slow_moe(moe, x_ND, modality_N)
    assert moe.gate(x_ND, modality_N).experts_NK.tolist() == chosen
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-12, atol=1e-12)
    wanted = _gradients(moe, x_ND, expected_ND)
    for key, grad in _gradients(moe, x_ND, out_ND).items():
        torch.testing.assert_close(grad, wanted[key], rtol=1e-10, atol=1e-12, msg=f"gradient of {key}")
    assert sums is not None and sums.counts_ME is not None
    counts_ME = torch.zeros_like(sums.counts_ME)
    for experts, modality in zip(chosen, modality_N.tolist(), strict=True):
        counts_ME[modality, experts] += 1
    assert torch.equal(sums.counts_ME, counts_ME)
    assert torch.equal(sums.counts_E, counts_ME.sum(dim=0))
    empty_ND, _ = moe(x_ND[:0], TokenInfo(modality_N[:0]))
    assert empty_ND.shape == (0, WIDTH)


def test_equal_scores_go_to_the_lowest_index() -> None:
    for config in CASES.values():
        router = Router(WIDTH, config)
        router.weight.data.zero_()
        modality_N = torch.tensor([Modality.IMAGE])
        expected = _slow_choice([0.5] * 8, _allowed(config, "image"), config, [0.0] * 8)
        assert router(torch.ones(1, WIDTH), modality_N).experts_NK.tolist() == [expected]


def _allowed(config: MoEConfig, name: str) -> list[int]:
    return sorted((config.modality_experts or {}).get(name, range(config.num_experts)))


def test_sums_by_hand() -> None:
    """Probabilities, z, entropies by modality and counts by sequence; place fillers are in none of them."""
    for name, changes in itertools.product(CASES, ({}, {"expert_dropout": 0.4})):
        config = dataclasses.replace(
            CASES[name],
            **changes,
            aux_loss_scope="sequence",
            local_entropy_loss_coef=0.1,
            global_entropy_loss_coef=0.1,
        )
        moe, (x_ND, modality_N) = _layer(config).train(), _tokens()
        is_real_N = torch.arange(NUM_TOKENS) < NUM_TOKENS - 5
        sequence_N = torch.arange(NUM_TOKENS) // 15
        routing = moe.gate(x_ND, modality_N)
        tokens = TokenInfo(modality_N, sequence_N, 4, is_real_N)
        sums = layer_sums(routing, tokens, config)
        expected: dict[str, Tensor] = {key: torch.zeros_like(value) for key, value in sums._asdict().items()}
        for n in range(NUM_TOKENS - 5):
            logits_E = routing.logits_NE[n].detach()
            if config.scoring_func == "sigmoid":
                probs_E = logits_E.sigmoid() / logits_E.sigmoid().sum()
            else:
                probs_E = logits_E.softmax(dim=0)
            entropy = -sum(p * math.log(p) for p in probs_E.tolist() if p > 0)
            counts_E = torch.zeros(config.num_experts, dtype=torch.int64)
            for expert in routing.experts_NK[n].tolist():
                if expert >= 0:
                    counts_E[expert] += 1
            modality, sequence = int(modality_N[n]), int(sequence_N[n])
            expected["counts_E"] += counts_E
            expected["counts_ME"][modality] += counts_E
            expected["counts_BE"][sequence] += counts_E
            expected["probability_sums_E"] += probs_E
            expected["probability_sums_ME"][modality] += probs_E
            expected["probability_sums_BE"][sequence] += probs_E
            expected["entropy_sums_M"][modality] += entropy
            expected["z_sum"] += logits_E.exp().sum().log() ** 2
        for key, value in sums._asdict().items():
            torch.testing.assert_close(value.detach(), expected[key], rtol=1e-12, atol=1e-12, msg=f"{name}: {key}")
        differentiable = [sums.probability_sums_ME, sums.probability_sums_BE, sums.entropy_sums_M, sums.z_sum]
        grads = torch.autograd.grad(sum(value.square().sum() for value in differentiable), moe.gate.weight)  # pyright: ignore
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


def test_noise_and_dropout_are_of_training_alone() -> None:
    noisy = MoEConfig(8, 3, 10, router_jitter_noise=0.3, expert_dropout=0.5)
    moe, plain = _layer(noisy), _layer(MoEConfig(8, 3, 10))
    x_ND, _ = _tokens(2000)
    torch.testing.assert_close(moe.eval()(x_ND, TokenInfo())[0], plain(x_ND, TokenInfo())[0], rtol=0, atol=0)
    routing, calm = moe.train().gate(x_ND), plain.gate(x_ND)
    stays_NK = routing.experts_NK >= 0
    assert stays_NK.any(dim=1).all()
    assert (routing.gates_NK[~stays_NK] == 0).all()
    assert abs(stays_NK.double().mean() - (0.5 + 0.5**3 / 3)) < 0.02, (
        "half of them, and one of three where all would go"
    )
    torch.testing.assert_close(routing.gates_NK.sum(dim=1), torch.ones(2000, dtype=torch.float64))
    ratio_NE = routing.logits_NE / calm.logits_NE
    assert ratio_NE.std() > 0.1
    ones_ND = torch.ones(1, WIDTH, dtype=torch.float64)
    spread = torch.stack([moe.gate.logits(ones_ND)[0, 0] / moe.gate.weight[0].abs().sum() for _ in range(500)])
    assert 0 < spread.std() < 0.3
    other = _layer(dataclasses.replace(noisy, norm_topk_prob=False, router_jitter_noise=0.0)).train().gate(x_ND)
    whole = _layer(MoEConfig(8, 3, 10, norm_topk_prob=False)).gate(x_ND)
    torch.testing.assert_close(other.gates_NK.sum(dim=1), whole.gates_NK.sum(dim=1))


def test_dropped_choices_are_computed_by_nobody() -> None:
    moe, (x_ND, _) = _layer(MoEConfig(8, 3, 10, expert_dropout=0.6)).train(), _tokens()
    torch.manual_seed(3)
    routing = moe.gate(x_ND)
    torch.manual_seed(3)
    out_ND, sums = moe(x_ND, TokenInfo())
    expected_ND = torch.zeros_like(out_ND)
    for n, k in (routing.experts_NK >= 0).nonzero().tolist():
        e = int(routing.experts_NK[n, k])
        expert = _swiglu(x_ND[n], moe.experts.gate_up_proj[e], moe.experts.down_proj[e])
        expected_ND[n] = expected_ND[n] + routing.gates_NK[n, k] * expert
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-12, atol=1e-12)
    assert int(sums.counts_E.sum()) == int((routing.experts_NK >= 0).sum())


# --- transformers' layers of the same names -----------------------------------------------------------------------


def _random_weights(module: torch.nn.Module) -> None:
    for tensor in (*module.parameters(), *module.buffers()):
        torch.nn.init.normal_(tensor, std=0.3)


def _deepseek() -> tuple[Any, MoEConfig]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    shape: dict[str, Any] = {"n_group": 4, "topk_group": 2, "n_shared_experts": 3, "routed_scaling_factor": 2.5}
    theirs = DeepseekV3Config(
        hidden_size=WIDTH, moe_intermediate_size=10, n_routed_experts=16, num_experts_per_tok=4, **shape
    )
    return DeepseekV3MoE(theirs), MoEConfig(
        16, 4, 10, router_z_loss_coef=0.0, scoring_func="sigmoid", use_expert_bias=True, **shape
    )


def _mixtral() -> tuple[Any, MoEConfig]:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    theirs = MixtralConfig(hidden_size=WIDTH, intermediate_size=10, num_local_experts=8, num_experts_per_tok=2)
    return MixtralSparseMoeBlock(theirs), MoEConfig(8, 2, 10)


def _qwen() -> tuple[Any, MoEConfig]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    theirs = Qwen3MoeConfig(hidden_size=WIDTH, moe_intermediate_size=10, num_experts=8, num_experts_per_tok=3)
    theirs.norm_topk_prob = True
    return Qwen3MoeSparseMoeBlock(theirs), MoEConfig(8, 3, 10)


def _olmoe() -> tuple[Any, MoEConfig]:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    theirs = OlmoeConfig(hidden_size=WIDTH, intermediate_size=10, num_experts=8, num_experts_per_tok=3)
    return OlmoeSparseMoeBlock(theirs), MoEConfig(8, 3, 10, norm_topk_prob=False)


def _ours_from(theirs: Any, moe: MoE) -> dict[str, Tensor]:
    weights = dict(theirs.state_dict())
    if moe.shared_experts is not None:  # one wide SwiGLU is several narrow ones, side by side
        parts = [weights.pop(f"shared_experts.{part}_proj.weight") for part in ("gate", "up", "down")]
        num_shared = moe.config.n_shared_experts
        gate, up = (part.unflatten(0, (num_shared, -1)) for part in parts[:2])
        weights["shared_experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights["shared_experts.down_proj"] = parts[2].unflatten(1, (num_shared, -1)).transpose(0, 1)
    return weights


@pytest.mark.parametrize("make", [_deepseek, _mixtral, _qwen, _olmoe])
def test_transformers_layers_of_the_same_switches_give_the_same(make: Any) -> None:
    pytest.importorskip("transformers")
    theirs, config = make()
    torch.manual_seed(4)
    _random_weights(theirs)
    moe = MoE(WIDTH, config)
    moe.load_state_dict(_ours_from(theirs, moe))
    x_ND = torch.randn(61, WIDTH, generator=torch.Generator().manual_seed(5), requires_grad=True)
    weight_ND = torch.randn(61, WIDTH, generator=torch.Generator().manual_seed(6))
    out_ND, expected_ND = moe(x_ND, TokenInfo())[0], theirs(x_ND[None])[0]
    routing, (_, gates_NK, experts_NK) = moe.gate(x_ND), theirs.gate(x_ND)
    order_NK, their_order_NK = routing.experts_NK.argsort(dim=1), experts_NK.argsort(dim=1)
    assert torch.equal(routing.experts_NK.gather(1, order_NK), experts_NK.gather(1, their_order_NK))
    torch.testing.assert_close(routing.gates_NK.gather(1, order_NK), gates_NK.gather(1, their_order_NK))
    torch.testing.assert_close(out_ND, expected_ND, rtol=1e-4, atol=1e-4)
    (grad_ND,) = torch.autograd.grad((out_ND * weight_ND).sum(), x_ND, retain_graph=True)
    (their_grad_ND,) = torch.autograd.grad((expected_ND * weight_ND).sum(), x_ND, retain_graph=True)
    torch.testing.assert_close(grad_ND, their_grad_ND, rtol=1e-3, atol=1e-3)
    (out_ND * weight_ND).sum().backward()
    (expected_ND * weight_ND).sum().backward()
    torch.testing.assert_close(moe.gate.weight.grad, theirs.gate.weight.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moe.experts.down_proj.grad, theirs.experts.down_proj.grad, rtol=1e-3, atol=1e-3)


# --- config and state ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_group": 3}, "n_group is 3, which does not divide num_experts, 8"),
        ({"n_group": 8, "topk_group": 2}, "n_group is 8, as many as num_experts"),
        ({"n_group": 2, "topk_group": 3}, "topk_group is 3; it must be between 1 and n_group, 2"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "hold 2 experts, fewer than"),
        ({"scoring_func": "sigmoid"}, "router_z_loss_coef is 0.001 with scoring_func sigmoid"),
        ({"scoring_func": "tanh"}, "scoring_func is 'tanh'; choose softmax, sigmoid"),
        ({"aux_loss_scope": "batch"}, "aux_loss_scope is 'batch'; choose global, layer, sequence"),
        ({"n_shared_experts": -1}, "n_shared_experts is -1"),
        ({"expert_dropout": 1.0}, "expert_dropout is 1.0; it must be at least 0 and below 1"),
        ({"router_jitter_noise": -0.1}, "router_jitter_noise is -0.1"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"global_entropy_min_experts": 9}, "global_entropy_min_experts is 9"),
        ({"modality_experts": {"smell": [0, 1]}}, "names the modality 'smell'; choose text, image, audio, units"),
        ({"modality_experts": {"text": []}}, "gives text 0 experts, fewer than num_experts_per_tok, 2"),
        ({"modality_experts": {"text": [1, 8]}}, r"has \[1, 8\] for text; experts are 0 to 7"),
        ({"modality_experts": {"text": [1, 1]}}, r"has \[1, 1\] for text"),
        ({"modality_experts": dict.fromkeys(MODALITIES, (0, 1))}, "no modality choose expert 2"),
        ({"modality_experts": {"text": [0, 1]}, "n_group": 2}, "n_group is 2 and modality_experts is given"),
        ({"modality_experts": {"text": [0, 1]}, "use_expert_bias": True}, "pools of modality_experts overlap"),
        ({"local_entropy_modalities": ["texts"]}, "names the modality 'texts'"),
    ],
)  # fmt: skip
def test_switches_that_contradict_one_another_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MoEConfig(**changes)


def test_a_config_with_every_switch_survives_json() -> None:
    config = DecoderConfig(50, moe=CASES["modalities"])
    again = config_from_dict(DecoderConfig, json.loads(json.dumps(config_to_dict(config))))
    assert again == config
    assert again.moe is not None and again.moe.modality_experts == {k: tuple(v) for k, v in MODALITIES.items()}


def test_the_bias_is_saved_and_stays_exact_when_a_model_is_cast() -> None:
    router = Router(WIDTH, SIGMOID)
    assert router.e_score_correction_bias is not None
    router.e_score_correction_bias.add_(torch.arange(8) * 1e-3 + 1)
    exact = router.e_score_correction_bias.clone()
    assert "e_score_correction_bias" in router.state_dict()
    router.bfloat16()
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.e_score_correction_bias, exact)
    assert router.double().e_score_correction_bias.dtype == torch.float64
    assert router.to("meta").e_score_correction_bias.is_meta


def test_a_router_starts_whole_from_the_meta_device() -> None:
    config = DecoderConfig(
        50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, moe=dataclasses.replace(
            CASES["modalities"], n_shared_experts=1)
    )  # fmt: skip
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu")
    decoder.reset_parameters()
    torch.manual_seed(0)
    other = Decoder(config)
    assert torch.equal(decoder.layers[0].mlp.gate.allowed_ME, other.layers[0].mlp.gate.allowed_ME)
    std = other.layers[0].mlp.shared_experts.down_proj.std().item()
    assert abs(std - 0.02 / 2**0.5) < 2e-3, "what a shared expert writes is scaled as the others'"


def test_modalities_that_are_needed_and_not_given_are_named() -> None:
    config = DecoderConfig(50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, moe=CASES["modalities"])
    decoder = Decoder(config)
    ids_BT = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="modalities were not given; pass modality_BT"):
        decoder(decoder.embed(ids_BT), torch.arange(3)[None], ids_BT)
