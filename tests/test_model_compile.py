"""A compiled layer: no graph break, the same results, and few shapes to compile for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.router import MoEConfig
from mmllm.sequences import SequenceMetadata

pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")

NUM_LAYERS = 12
"""More than torch compiles for one piece of code before it gives up."""


def _decoder(**changes: Any) -> Decoder:
    values: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 2,
        "num_key_value_heads": 1, "intermediate_size": 24, "qk_norm": True, "attention_backend": "dense",
    }  # fmt: skip
    torch.manual_seed(0)
    return Decoder(DecoderConfig(**values | changes))


def _batch(seed: int, multiple: int = 32) -> tuple[torch.Tensor, torch.Tensor, SequenceMetadata, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    documents_BT, positions_BT = torch.full((2, 64), -1), torch.zeros(2, 64, dtype=torch.int64)
    for row in range(2):
        start = number = 0
        used = int(torch.randint(20, 60, (), generator=generator))
        while start < used:
            length = min(int(torch.randint(1, 20, (), generator=generator)), 62 - start)
            documents_BT[row, start : start + length] = number
            positions_BT[row, start : start + length] = torch.arange(length)
            start, number = start + length, number + 1
    x_BTD = torch.randn(2, 64, 16, generator=generator)
    return x_BTD, positions_BT, SequenceMetadata.of(documents_BT, multiple), torch.randint(0, 4, (2, 64))


KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "experts": {"moe": MoEConfig(4, 2, 8)},
    "selective": {"moe": MoEConfig(4, 2, 8, n_shared_experts=1), "gradient_checkpointing": "selective"},
    "every switch": {
        "moe": MoEConfig(
            8, 2, 8, scoring_func="sigmoid", router_z_loss_coef=0.0, n_group=2, topk_group=1, use_expert_bias=True,
            n_shared_experts=1, router_jitter_noise=0.1, expert_dropout=0.1, aux_loss_scope="sequence",
        ),
        "sliding_window": 8, "attention_bias": True, "dropout": 0.1, "gradient_checkpointing": True,
    },
    "turned in part, and not at all": {
        "partial_rotary_factor": 0.5, "no_rope_layers": (1, 1, 0) * 4, "mlp_bias": True,
    },
    "skipped tokens": {"mod_layers": (1,), "mod_capacity": 0.5, "gradient_checkpointing": "selective"},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_layers_have_no_break_and_compile_a_few_times(kind: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounter()
    decoder = _decoder(**KINDS[kind])
    decoder.compile_layers(backend=counter, fullgraph=True)  # a break is an error then
    sizes = set()
    for seed in range(8):
        x_BTD, positions_BT, sequences, modality_BT = _batch(seed)
        hidden_QD, stats = decoder.packed(x_BTD.requires_grad_(), positions_BT, sequences, modality_BT)
        (hidden_QD.sum() + stats.probability_sums_LE.sum()).backward()
        sizes.add(sequences.size)
    assert len(sizes) <= 3, "rounded up to multiples of 32"
    num_forms = 2 if "no_rope_layers" in KINDS[kind] else 1
    assert 1 <= counter.frame_count <= 3 * num_forms, "once, and once more where a number turned out to change"
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dense", "experts", "selective", "turned in part, and not at all", "skipped tokens"])
def test_compiled_layers_compute_the_same(kind: str) -> None:
    torch._dynamo.reset()
    results = []
    changes = KINDS[kind] | {"num_hidden_layers": 2}
    if "no_rope_layers" in changes:
        changes["no_rope_layers"] = (1, 0)
    for is_compiled in (False, True):
        decoder = _decoder(**changes).double()
        if is_compiled:
            decoder.compile_layers(backend="aot_eager")
        x_BTD, positions_BT, sequences, modality_BT = _batch(1)
        x_BTD = x_BTD.double().requires_grad_()
        hidden_QD, stats = decoder.packed(x_BTD, positions_BT, sequences, modality_BT)
        parameters = [p for p in decoder.parameters() if p is not decoder.embed_tokens.weight]
        loss = (hidden_QD[: sequences.num_tokens].square().sum()) + stats.z_sums_L.sum()
        if stats.depth is not None:
            loss = loss + stats.depth.loss(1)
        results.append([hidden_QD, *torch.autograd.grad(loss, [x_BTD, *parameters])])
        assert all(name.count("_orig_mod") == 0 for name in decoder.state_dict())
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-6, atol=1e-7)
    torch._dynamo.reset()
