"""The fast step of decoding against the decoder's own code on whole documents, which knows no cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter
from mmllm.inference.engine import fast_step, products
from mmllm.inference.engine.fast_prompts import continue_prompts
from mmllm.inference.engine.fast_step import FastStep
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig
from mmllm.model.row_cache import Chunk, PromptStep

NUM_STEPS = 20
CAPACITY = 24
BEGINS = (0, 0, 1, 4, 9)
"""The step in which each row has its first position: rows of unlike lengths run together."""
TOLERANCE = 1e-5
NOT_WRITTEN = 7.0
"""What lies behind a row's end: it is never read."""

DENSE = DecoderConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=40,
)
MOE = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24)
SIGMOID = MoEConfig(
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=16,
    scoring_func="sigmoid",
    router_z_loss_coef=0.0,
    n_group=4,
    topk_group=2,
    n_shared_experts=2,
    use_expert_bias=True,
    routed_scaling_factor=1.5,
)
BY_MODALITY = dataclasses.replace(MOE, modality_experts={"text": (0, 1, 2, 3), "units": (2, 3, 4, 5, 6, 7)})
YARN = RopeScaling("yarn", 4.0, original_max_position_embeddings=8)
CONFIGS = {
    "dense": DENSE,
    "demo": dataclasses.replace(DENSE, qk_norm=True, conv_size=4, moe=MOE, head_dim=16),
    "many_heads": dataclasses.replace(DENSE, num_key_value_heads=None),
    "one_kv_head": dataclasses.replace(DENSE, num_key_value_heads=1, conv_size=2),
    "biases": dataclasses.replace(DENSE, attention_bias="all", mlp_bias=True, tie_word_embeddings=False),
    "qkv_biases": dataclasses.replace(DENSE, attention_bias="qkv", qk_norm="head"),
    "width_norm": dataclasses.replace(DENSE, qk_norm="width", moe=dataclasses.replace(MOE, norm_topk_prob=False)),
    "partial": dataclasses.replace(DENSE, partial_rotary_factor=0.5, conv_size=3),
    "no_rope": dataclasses.replace(DENSE, no_rope_layers=(1, 0, 1), qk_norm=True),
    "yarn": dataclasses.replace(DENSE, rope_scaling=YARN),
    "sliding": dataclasses.replace(
        DENSE,
        sliding_window=5,
        layer_types=("sliding_attention", "full_attention", "sliding_attention"),
        sliding_rope_theta=100.0,
    ),
    "sees_itself": dataclasses.replace(DENSE, sliding_window=1),
    "some_experts": dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, num_experts=40), moe_layers=(0, 2)),
    "sigmoid": dataclasses.replace(DENSE, moe=SIGMOID, moe_layers=(1, 2)),
    "three_experts": dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, num_experts_per_tok=3)),
    "scaled": dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, routed_scaling_factor=2.5)),
    "shared_experts": dataclasses.replace(DENSE, moe=dataclasses.replace(MOE, n_shared_experts=1)),
    "modalities": dataclasses.replace(DENSE, moe=BY_MODALITY, conv_size=4),
    "media_prefix": dataclasses.replace(DENSE, prefix="media"),
}


@dataclass
class _Slab:
    """Caches of rows that run, as the engine keeps them."""

    kv_LSF: Tensor
    conv_state_MSJD: Tensor | None
    lengths_N: Tensor
    capacity: int = CAPACITY

    @staticmethod
    def of(config: DecoderConfig, num_slots: int, dtype: torch.dtype = torch.float32) -> _Slab:
        shape = (config.num_hidden_layers, num_slots * CAPACITY, 2 * config.kv_heads * config.head_channels)
        kv_LSF = torch.full(shape, NOT_WRITTEN, dtype=dtype)
        state = None
        if config.conv_size:
            shape = (2 * config.num_hidden_layers, num_slots, config.conv_size - 1, config.hidden_size)
            state = torch.zeros(shape, dtype=dtype)
        return _Slab(kv_LSF, state, torch.zeros(0, dtype=torch.int64))

    @property
    def num_rows(self) -> int:
        return len(self.lengths_N)

    @property
    def max_length(self) -> int:
        return int(self.lengths_N.max())


def _decoder(config: DecoderConfig) -> Decoder:
    """Random weights, large enough that each part counts."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "conv" not in name:
                parameter.normal_(std=0.2)
        for moe in decoder.expert_layers().values():
            if moe.gate.e_score_correction_bias is not None:
                moe.gate.e_score_correction_bias.normal_(std=0.2)
    return decoder.eval()


@torch.no_grad()
def _difference(decoder: Decoder, fast: FastStep, begins: Sequence[int] = BEGINS, num_steps: int = NUM_STEPS) -> float:
    """The largest of hidden states, of rows that begin one after another, from those of their whole documents."""
    config, dtype = decoder.config, decoder.norm.weight.dtype
    slab, rows = _Slab.of(config, len(begins) + 1, dtype), [_Row() for _ in begins]
    for step in range(num_steps):
        running = [row for row, begin in zip(rows, begins, strict=True) if begin <= step]
        slab.lengths_N = torch.tensor([len(row.hidden) for row in running])
        x_ND = torch.randn(len(running), config.hidden_size, dtype=dtype)
        modality_N = torch.randint(0, 4, (len(running),))
        hidden_ND = fast.step(x_ND, slab.lengths_N.clone(), modality_N, slab)
        for row, x_D, modality, hidden_D in zip(running, x_ND, modality_N, hidden_ND, strict=True):
            row.inputs.append(x_D)
            row.modalities.append(modality)
            row.hidden.append(hidden_D)
    for slot, length in enumerate((*(slab.lengths_N + 1).tolist(), 0)):
        behind_LSF = slab.kv_LSF[:, slot * CAPACITY + length : (slot + 1) * CAPACITY]
        assert behind_LSF.eq(NOT_WRITTEN).all(), "written behind a row's end"
    return max(row.difference(decoder) for row in rows)


@dataclass
class _Row:
    """What a row was given, and what came out."""

    inputs: list[Tensor] = field(default_factory=list)
    modalities: list[Tensor] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)

    def difference(self, decoder: Decoder) -> float:
        x_1TD, modality_1T = torch.stack(self.inputs)[None], torch.stack(self.modalities)[None]
        positions_1T, ids_1T = torch.arange(len(self.inputs))[None], torch.zeros_like(modality_1T)
        wanted_1TD, _ = decoder(x_1TD, positions_1T, ids_1T, modality_1T, torch.full_like(ids_1T, -1))
        return (torch.stack(self.hidden) - wanted_1TD[0]).abs().max().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_the_decoder(name: str) -> None:
    decoder = _decoder(CONFIGS[name])
    assert _difference(decoder, FastStep(decoder)) <= TOLERANCE


@pytest.mark.parametrize("name", CONFIGS)
def test_one_row_equals_the_decoder(name: str) -> None:
    decoder = _decoder(CONFIGS[name])
    assert _difference(decoder, FastStep(decoder), begins=(0,)) <= TOLERANCE


@pytest.mark.parametrize("name", ["demo", "biases", "shared_experts", "some_experts"])
def test_products_of_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny matrices too."""
    monkeypatch.setattr(products, "_PACKED_WORK", 0)
    decoder = _decoder(CONFIGS[name])
    assert _difference(decoder, FastStep(decoder)) <= TOLERANCE


@pytest.mark.parametrize("name", ["demo", "shared_experts"])
def test_without_onednn(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each expert has its rows."""
    monkeypatch.setattr(products, "packed", lambda weight_FD: None)
    decoder = _decoder(CONFIGS[name])
    assert _difference(decoder, FastStep(decoder)) <= TOLERANCE


@pytest.mark.parametrize("name", ["dense", "demo", "biases", "width_norm"])
def test_bfloat16(name: str) -> None:
    """As near as the roundings of another order of sums let it be; one layer, so that no expert is chosen by them."""
    decoder = _decoder(dataclasses.replace(CONFIGS[name], num_hidden_layers=1)).bfloat16()
    assert _difference(decoder, FastStep(decoder)) <= 0.1


@pytest.mark.parametrize("name", ["demo", "some_experts"])
def test_rows_that_all_choose_the_same_experts(name: str) -> None:
    decoder = _decoder(CONFIGS[name])
    with torch.no_grad():
        for moe in decoder.expert_layers().values():
            moe.gate.weight.zero_()  # of equal logits the first are chosen
    assert _difference(decoder, FastStep(decoder)) <= TOLERANCE


@pytest.mark.parametrize("copied_bytes", [2**30, 0])
def test_large_matrices(copied_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN has copies; without them one row's products are shared out among threads, and nothing is joined."""
    monkeypatch.setattr(fast_step, "SMALL_ELEMENTS", 0)
    config = dataclasses.replace(
        DENSE, hidden_size=512, head_dim=128, intermediate_size=1056, num_hidden_layers=2, attention_bias="all"
    )
    decoder, threads = _decoder(config), torch.get_num_threads()
    with torch.no_grad():
        for parameter in decoder.layers.parameters():
            if parameter.dim() == 2:
                parameter.mul_(0.2)
    try:
        torch.set_num_threads(2)
        fast = FastStep(decoder, copied_bytes)
        assert _difference(decoder, fast, num_steps=12) <= TOLERANCE
        assert _difference(decoder, fast, begins=(0,), num_steps=5) <= TOLERANCE
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", ["demo", "biases"])
def test_adapters_are_called_as_they_are(name: str) -> None:
    pytest.importorskip("peft")
    decoder = _decoder(CONFIGS[name])
    x_ND, slab = torch.randn(1, decoder.config.hidden_size), _Slab.of(decoder.config, 1)
    slab.lengths_N = torch.zeros(1, dtype=torch.int64)
    before_ND = FastStep(decoder).step(x_ND, slab.lengths_N, slab.lengths_N, slab)
    add_adapter(decoder, AdapterConfig(kind="lora", r=2), "one")
    decoder.eval()
    with torch.no_grad():
        for name_, parameter in decoder.named_parameters():
            if "lora_B" in name_:
                parameter.normal_(std=0.05)
    fast = FastStep(decoder)
    assert _difference(decoder, fast) <= TOLERANCE
    after_ND = fast.step(x_ND, slab.lengths_N, slab.lengths_N, slab)
    assert (before_ND - after_ND).abs().max() > 0.01


def test_hooks_are_called() -> None:
    decoder, calls = _decoder(DENSE), []
    decoder.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append(1))  # pyright: ignore
    assert _difference(decoder, FastStep(decoder), begins=(0,), num_steps=3) <= TOLERANCE
    assert len(calls) == 3 + 1


def test_modalities_must_be_given() -> None:
    decoder = _decoder(CONFIGS["modalities"])
    slab = _Slab.of(decoder.config, 1)
    slab.lengths_N = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="modalities were not given"):
        FastStep(decoder).step(torch.randn(1, 32), slab.lengths_N, None, slab)


def test_what_it_does_not_take() -> None:
    skipping = _decoder(dataclasses.replace(DENSE, mod_layers=(1,)))
    assert "mixture of depths" in (FastStep.supports(skipping) or "")
    with pytest.raises(ValueError, match=r"layers \[1\].*use its own forward"):
        FastStep(skipping)
    decoder = _decoder(DENSE)
    assert FastStep.supports(decoder) is None
    assert "training" in (FastStep.supports(decoder.train()) or "")
    decoder.eval().double()
    assert "float64" in (FastStep.supports(decoder) or "")
    with torch.device("meta"):
        assert "no values" in (FastStep.supports(Decoder(DENSE).eval()) or "")
    experts = _decoder(CONFIGS["demo"])
    experts.expert_layers()[0].dispatcher = lambda x_ND, gates_NK, experts_NK, compute: x_ND
    assert "ranks" in (FastStep.supports(experts) or "")
    compiled = _decoder(DENSE)
    compiled.compile_layers()
    assert "compiled" in (FastStep.supports(compiled) or "")


@pytest.mark.parametrize("name", [name for name in CONFIGS if not CONFIGS[name].mod_layers])
@torch.no_grad()
def test_prompts_equal_the_decoders_own_code(name: str) -> None:
    """Several of unlike lengths at once, in two pieces, so long that each expert has many rows."""
    decoder = _decoder(CONFIGS[name])
    lengths, results = (150, 40, 7), []
    torch.manual_seed(1)
    documents = [torch.randn(length, decoder.config.hidden_size) for length in lengths]
    modalities = [torch.randint(0, 4, (length,)) for length in lengths]
    for fast in (None, FastStep(decoder)):
        cache = decoder.make_row_cache()
        rows = [cache.allocate(length) for length in lengths]
        hidden = []
        for piece in (slice(0, 5), slice(5, None)):
            parts = [document[piece] for document in documents]
            step = PromptStep([Chunk(row, len(part)) for row, part in zip(rows, parts, strict=True)])
            positions_N = torch.cat([row.length + torch.arange(len(p)) for row, p in zip(rows, parts, strict=True)])
            inputs = torch.cat(parts), positions_N, torch.cat([modality[piece] for modality in modalities]), step
            hidden.append(decoder.continue_rows(*inputs) if fast is None else continue_prompts(decoder, fast, *inputs))
        kept = torch.cat([row.slab.kv_LSF[:, row.start : row.start + row.length] for row in rows], dim=1)
        results.append((torch.cat(hidden), kept))
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
