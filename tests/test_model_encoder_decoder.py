"""An encoder and a decoder in one stack, against one document at a time, written plainly; and what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter
from mmllm.interop.family_configs import family_for
from mmllm.losses.routing import RoutingTotals, router_losses
from mmllm.model.decoder import Block, Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.flops import ModelFlops, Work
from mmllm.model.multimodal import ModelConfig, MultimodalModel
from mmllm.model.rope import rotary
from mmllm.model.router import MoEConfig, TokenInfo
from mmllm.model.virtual_tokens import VirtualTokens
from mmllm.parallel.mesh import ParallelConfig
from mmllm.sequences import SequenceMetadata
from tests.cached_decoding import CachedRows

CONFIG = DecoderConfig(
    50, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
    encoder_layers=2,
)  # fmt: skip
EXPERTS = MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=12)
LENGTHS = [[11, 1, 7], [19], [0]]
"""Documents of three packed sequences of 20 positions; the last holds nothing."""
_TOKENS = TokenInfo()
PROMPTS = [[4, 0, 4], [0], []]
"""Of each how many tokens are the encoder's: of some none."""
SWITCHES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one layer of either": {"num_hidden_layers": 2, "encoder_layers": 1},
    "norms, biases, positions in part": {
        "qk_norm": "head", "attention_bias": "all", "partial_rotary_factor": 0.5, "no_rope_layers": (1, 0, 1, 0),
    },
    "norm over the width, one key-value head": {"qk_norm": "width", "num_key_value_heads": 1},
    "windows": {"sliding_window": 3, "sliding_rope_theta": 50.0},
    "convolutions": {"conv_size": 3},
    "experts": {"moe": EXPERTS},
}  # fmt: skip


def _decoder(**changes: Any) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(dataclasses.replace(CONFIG, **changes)).double()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return decoder


def _batch() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    positions_BT, documents_BT = torch.zeros(3, 20, dtype=torch.int64), torch.full((3, 20), -1)
    spans_BT = documents_BT.clone()
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for d, length in enumerate(lengths):
            positions_BT[b, start : start + length] = torch.arange(length)
            documents_BT[b, start : start + length] = d
            if length:
                spans_BT[b, start : start + PROMPTS[b][d]] = d
            start += length
    x_BTD = torch.randn(3, 20, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x_BTD, positions_BT, documents_BT, spans_BT


def _documents() -> list[tuple[int, slice, int]]:
    """Row, place and number of prompt tokens of each."""
    found = []
    for b, lengths in enumerate(LENGTHS):
        stops = torch.tensor(lengths).cumsum(0).tolist()
        places = [slice(stop - length, stop) for stop, length in zip(stops, lengths, strict=True)]
        found += [(b, place, n) for place, n, length in zip(places, PROMPTS[b], lengths, strict=False) if length]
    return found


def _mixed(conv: Any, x_ND: Tensor) -> Tensor:
    """A short convolution, token by token."""
    if conv is None:
        return x_ND
    rows = [
        x_ND[n] + sum(conv.weight[back] * x_ND[n - back] for back in range(len(conv.weight)) if n >= back)
        for n in range(len(x_ND))
    ]
    return torch.stack(rows) if rows else x_ND


def _projected(decoder: Decoder, block: Block, layer: int, x_ND: Tensor, places_N: Tensor) -> list[Tensor]:
    """Queries, keys and values [N, heads, C], queries and keys rotated."""
    attention, config = block.self_attn, decoder.config
    found = []
    for name, norm in (("q", attention.q_norm), ("k", attention.k_norm), ("v", None)):
        y = getattr(attention, f"{name}_proj")(x_ND)
        y = norm(y) if norm is not None and config.qk_norm == "width" else y
        y = y.unflatten(-1, (-1, config.head_channels))
        y = norm(y) if norm is not None and config.qk_norm == "head" else y
        count = config.rotary_channels(layer)
        if name != "v" and count:
            cos, sin = rotary(places_N, count, config.rope(layer)[0], x_ND.dtype)
            first, second = y[..., : count // 2], y[..., count // 2 : count]
            turned = [first * cos - second * sin, second * cos + first * sin, y[..., count:]]
            y = torch.cat(turned, dim=-1)
        found.append(y)
    return found


def _attended(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
    """One softmax, head by head."""
    shared, outputs = q.shape[1] // keys.shape[1], []
    for head in range(q.shape[1]):
        scores = q[:, head] @ keys[:, head // shared].T / math.sqrt(q.shape[-1])
        outputs.append(scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ values[:, head // shared])
    return torch.cat(outputs, dim=-1)


def _slow(decoder: Decoder, x_ND: Tensor, num_prompt: int) -> Tensor:
    """One document: hidden states after the final norm."""
    places_N, config = torch.arange(len(x_ND)), decoder.config
    states, x = x_ND[:num_prompt], x_ND[num_prompt:]
    blocks: Any = decoder.layers
    for layer, block in enumerate(blocks):
        is_encoder = layer < config.encoder_layers
        here, places = (states, places_N[:num_prompt]) if is_encoder else (x, places_N[num_prompt:])
        if not len(here):
            continue
        normed = _mixed(block.attention_conv, block.input_layernorm(here))
        q, keys, values = _projected(decoder, block, layer, normed, places)
        seen = torch.ones(len(here), len(here), dtype=torch.bool)
        if not is_encoder:
            given = block.input_layernorm(states)
            _, more_keys, more_values = _projected(decoder, block, layer, given, places_N[:num_prompt])
            keys, values = torch.cat([more_keys, keys]), torch.cat([more_values, values])
            seen = places_N <= places[:, None]
            if config.sliding_window is not None:
                seen = seen & (places[:, None] - places_N < config.sliding_window)
        here = here + block.self_attn.o_proj(_attended(q, keys, values, seen))
        normed = _mixed(block.mlp_conv, block.post_attention_layernorm(here))
        here = here + (block.mlp(normed, _TOKENS)[0] if block.has_experts else block.mlp(normed))
        states, x = (here, x) if is_encoder else (states, here)
    return decoder.norm(torch.cat([states, x]))


CASES = [(name, "buckets", 1) for name in SWITCHES]
CASES += [(name, "buckets", 16) for name in ("plain", "windows", "convolutions", "experts")]
CASES += [(name, backend, 16) for name in ("plain", "windows") for backend in ("dense", "flex")]


@pytest.mark.parametrize(("name", "backend", "multiple"), CASES)
def test_packed_documents_are_what_each_is_alone(name: str, backend: str, multiple: int) -> None:
    decoder = _decoder(attention_backend=backend, **SWITCHES[name])
    x_BTD, positions_BT, documents_BT, spans_BT = _batch()
    has_gradient = backend != "flex"  # FlexAttention has no backward pass on a CPU
    x_BTD.requires_grad_(has_gradient)
    sequences = SequenceMetadata.of(documents_BT, multiple)
    with torch.set_grad_enabled(has_gradient):
        hidden_QD, _ = decoder.packed(x_BTD, positions_BT, sequences, spans_BT=spans_BT)
        hidden_ND = hidden_QD[: sequences.num_tokens]
        expected_ND = torch.cat([_slow(decoder, x_BTD[b, place], n) for b, place, n in _documents()])
    torch.testing.assert_close(hidden_ND, expected_ND, rtol=1e-10, atol=1e-10)
    if not has_gradient:
        return
    weight_ND = torch.randn(hidden_ND.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    named = {name: p for name, p in decoder.named_parameters() if name.startswith("layers")} | {"x": x_BTD}
    for key, got, wanted in zip(
        named,
        torch.autograd.grad((hidden_ND * weight_ND).sum(), list(named.values()), allow_unused=True),
        torch.autograd.grad((expected_ND * weight_ND).sum(), list(named.values()), allow_unused=True),
        strict=True,
    ):
        zeros = torch.zeros_like(named[key])
        got, wanted = (zeros if each is None else each for each in (got, wanted))
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8, msg=lambda text, key=key: f"{key}: {text}")


def test_documents_and_what_comes_later_are_not_seen() -> None:
    decoder = _decoder(conv_size=3)
    x_BTD, positions_BT, documents_BT, spans_BT = _batch()

    def hidden(place: int, row: int = 0) -> Tensor:
        changed = x_BTD.clone()
        changed[row, place] += 1.0
        with torch.no_grad():
            return decoder(changed, positions_BT, documents_BT, None, spans_BT)[0]

    before = hidden(0, row=2)  # padding
    moved = [(hidden(place) - before).abs().amax(dim=-1)[0] > 1e-12 for place in range(19)]
    for place in (0, 3):  # of the first prompt, its last token too: all of the document sees it
        assert moved[place].tolist() == [True] * 11 + [False] * 9
    for place in (4, 8):  # of its answer
        assert moved[place].tolist() == [False] * place + [True] * (11 - place) + [False] * 9
    assert moved[11].nonzero().flatten().tolist() == [11]  # a document of one token
    assert moved[12].nonzero().flatten().tolist() == [*range(12, 19)]


@pytest.mark.parametrize("which", ["texts", "prompts", "nothing"])
def test_a_half_may_have_no_token(which: str) -> None:
    decoder = _decoder(moe=EXPERTS, conv_size=3, qk_norm="head")
    documents_BT = torch.tensor([[0] * 5 + [1] * 4 + [-1]])
    if which == "nothing":
        documents_BT = torch.full_like(documents_BT, -1)
    spans_BT = documents_BT if which == "prompts" else torch.full_like(documents_BT, -1)
    x_BTD = torch.randn(1, 10, 16, dtype=torch.float64, requires_grad=True)
    hidden_QD, stats = decoder.packed(
        x_BTD, torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0]]), SequenceMetadata.of(documents_BT), None, spans_BT
    )
    (hidden_QD.sum() + stats.z_sums_L.sum()).backward()
    count = int((documents_BT >= 0).sum())
    wanted = {"texts": [0, 0, count, count], "prompts": [count, count, 0, 0], "nothing": [0] * 4}[which]
    assert stats.tokens_L is not None and stats.tokens_L.tolist() == wanted
    assert hidden_QD.shape == (count, 16) and torch.isfinite(hidden_QD).all()
    lost = [name for name, parameter in decoder.layers.named_parameters() if parameter.grad is None]
    assert not lost  # ranks wait for each other's gradients


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_what_is_computed_again_has_the_same_gradients(mode: str) -> None:
    grads = []
    for each in ("none", mode):
        decoder = _decoder(gradient_checkpointing=each, conv_size=3, moe=EXPERTS)
        x_BTD, positions_BT, documents_BT, spans_BT = _batch()
        hidden_BTD, stats = decoder(x_BTD, positions_BT, documents_BT, None, spans_BT)
        parameters = list(decoder.layers.parameters())
        grads.append(torch.autograd.grad(hidden_BTD.square().sum() + stats.z_sums_L.sum(), parameters))
    for plain, again in zip(*grads, strict=True):
        torch.testing.assert_close(again, plain, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("multiple", [1, 16])
def test_experts_are_balanced_over_the_tokens_of_their_half(multiple: int) -> None:
    decoder = _decoder(moe=EXPERTS)
    x_BTD, positions_BT, documents_BT, spans_BT = _batch()
    modality_BT = torch.arange(60).view(3, 20) % 3
    sequences = SequenceMetadata.of(documents_BT, multiple)
    _, stats = decoder.packed(x_BTD, positions_BT, sequences, modality_BT, spans_BT)
    of_prompts = sum(sum(row) for row in PROMPTS)
    counts = [of_prompts] * 2 + [38 - of_prompts] * 2
    assert stats.tokens_L is not None and stats.tokens_L.tolist() == counts
    assert stats.counts_LE.sum(dim=1).tolist() == [2 * count for count in counts]
    losses = router_losses(EXPERTS, stats, RoutingTotals.of(stats))
    tokens_L = torch.tensor(counts, dtype=torch.float64)
    balance_L = 4 * (stats.counts_LE * stats.probability_sums_LE).sum(dim=1) / (tokens_L**2 * 2)
    torch.testing.assert_close(losses["balance"], balance_L.mean(), rtol=1e-9, atol=0)
    torch.testing.assert_close(losses["z"], (stats.z_sums_L / tokens_L).mean(), rtol=1e-9, atol=0)
    assert stats.entropy_sums_LM is not None and stats.tokens_M is not None
    means_LM = stats.entropy_sums_LM / stats.tokens_M.clamp(min=1)  # what reports tell
    assert (means_LM <= math.log(4) + 1e-9).all() and (means_LM[:, :3] > 0).all()


@pytest.mark.parametrize("switches", [s for s in SWITCHES.values() if s], ids=[s for s in SWITCHES if SWITCHES[s]])
def test_with_a_cache_it_computes_the_same(switches: dict[str, Any]) -> None:
    decoder = _decoder(**switches).eval()
    x_BTD, positions_BT, documents_BT, spans_BT = _batch()
    with torch.no_grad():
        wanted = decoder(x_BTD, positions_BT, documents_BT, None, spans_BT)[0]
    documents = [each for each in _documents() if each[2]]
    rows = CachedRows(decoder, len(documents), 20)
    lengths = [n + 1 for _, _, n in documents]  # a prompt, and the position where the decoder begins
    longest = max(lengths)
    first_BTD = torch.zeros(len(documents), longest, 16, dtype=torch.float64)
    ids_BT, own_BT = (torch.full((len(documents), longest), -1) for _ in range(2))
    for row, (b, place, n) in enumerate(documents):
        first_BTD[row, : n + 1] = x_BTD[b, place][: n + 1]
        ids_BT[row, : n + 1] = 0
        own_BT[row, :n] = 0
    got = rows(first_BTD, ids_BT, None, own_BT)
    for row, (b, place, n) in enumerate(documents):
        torch.testing.assert_close(got[row, : n + 1], wanted[b, place][: n + 1], rtol=1e-10, atol=1e-10)
    for step in range(2):
        x_B1D = torch.stack([x_BTD[b, place][n + 1 + step] for b, place, n in documents])[:, None]
        got = rows(x_B1D, torch.zeros(len(documents), 1, dtype=torch.int64))
        expected = torch.stack([wanted[b, place][n + 1 + step] for b, place, n in documents])[:, None]
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    slab = rows.rows[0].slab
    assert len(slab.kv_LSF) == decoder.config.num_hidden_layers - decoder.config.encoder_layers


@pytest.mark.parametrize("moe", [None, EXPERTS], ids=["dense", "experts"])
def test_operations_are_those_that_a_position_passes(moe: MoEConfig | None) -> None:
    """Products with weights as torch counts them; of attention the pairs that see each other."""
    config = dataclasses.replace(CONFIG, moe=moe and dataclasses.replace(moe, backend="reference"))
    flops = ModelFlops.of(ModelConfig(config))
    pair = 4 * config.num_attention_heads * config.head_channels
    work = Work((11, 7), prompts=(4, 0))
    pairs = 2 * pair * 4 * 4 + 2 * pair * (sum(range(5, 12)) + sum(range(1, 8)))
    decoder = Decoder(config)
    counts = [4, 4, 14, 14]
    products = 0
    for count, (layer, block) in zip(counts, enumerate(decoder.layers), strict=True):
        for name, weight in block.named_parameters():
            if weight.ndim > 1:
                own = weight.numel() // 2 if ".experts." in name else weight.numel()  # 2 of 4
                is_shared = layer >= 2 and name in ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
                products += 2 * own * (18 if is_shared else count)
    assert flops.layers(work) == products + pairs
    assert flops.layers(Work((18,))) == flops.layers(Work((18,), prompts=(0,)))  # without prompts all is the decoder's
    plain = ModelFlops.of(ModelConfig(dataclasses.replace(config, encoder_layers=0)))
    assert flops.layers(work) < 0.65 * plain.layers(Work((11, 7)))


def test_active_parameters_are_the_larger_halfs() -> None:
    models = [MultimodalModel(ModelConfig(dataclasses.replace(CONFIG, encoder_layers=n, moe=EXPERTS))) for n in (0, 1)]
    blocks = [sum(p.numel() for p in block.parameters()) for block in models[1].decoder.layers]
    experts = sum(p.numel() for p in models[1].decoder.expert_layers()[0].experts.parameters())
    assert models[0].num_parameters() == models[1].num_parameters()
    assert models[1].num_active_parameters() == models[1].num_parameters() - blocks[0] - 3 * experts // 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dataclasses.replace(CONFIG, encoder_layers=4), r"encoder_layers is 4 of 4 layers"),
        (lambda: dataclasses.replace(CONFIG, encoder_layers=-1), r"encoder_layers is -1"),
        (lambda: dataclasses.replace(CONFIG, prefix="prompt"), r"decoder\.prefix is 'prompt', and encoder_layers 2"),
        (lambda: dataclasses.replace(CONFIG, mod_layers=(3,)), r"decoder\.mod_layers is \(3,\)"),
        (lambda: dataclasses.replace(CONFIG, attention_backend="varlen"), r"attention_backend is 'varlen'"),
        (
            lambda: dataclasses.replace(CONFIG, moe=dataclasses.replace(EXPERTS, aux_loss_scope="sequence")),
            r"moe\.aux_loss_scope is 'sequence'",
        ),
        (
            lambda: dataclasses.replace(CONFIG, moe=dataclasses.replace(EXPERTS, local_entropy_loss_coef=0.1)),
            r"moe\.local_entropy_loss_coef is 0\.1",
        ),
        (lambda: Decoder(CONFIG).compile_layers(), r"encoder_layers is 2, of which every batch has other shapes"),
        (lambda: VirtualTokens("prompt_tuning", 2, CONFIG), r"decoder\.encoder_layers is 2"),
        (lambda: family_for(CONFIG), r"decoder\.encoder_layers is 2, which no family of transformers"),
        (lambda: ParallelConfig(fsdp=2).check_model(ModelConfig(CONFIG)), r"encoder_layers is 2, which strategy\.fsdp"),
        (
            lambda: Decoder(CONFIG)(torch.zeros(1, 2, 16), torch.arange(2)[None], torch.zeros(1, 2, dtype=torch.int64)),
            r"no spans were given",
        ),
    ],
)
def test_what_it_does_not_go_with_is_named(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_adapter_of_keys_and_values_is_of_the_encoders_states_too() -> None:
    """LoRA against its product added to the weights."""
    decoder, merged = _decoder(), _decoder()
    add_adapter(decoder, AdapterConfig(target_modules=("k_proj", "v_proj"), r=2, lora_alpha=6), "a")
    torch.manual_seed(3)
    with torch.no_grad():
        for layer, plain in zip(decoder.layers, merged.layers, strict=True):
            for name in ("k_proj", "v_proj"):
                adapted: Any = layer.self_attn.get_submodule(name)  # pyright: ignore
                weight: Any = plain.self_attn.get_submodule(name).weight  # pyright: ignore
                adapted.lora_B["a"].weight.copy_(torch.randn_like(adapted.lora_B["a"].weight))
                weight.add_(3 * adapted.lora_B["a"].weight @ adapted.lora_A["a"].weight)
    x_BTD, positions_BT, documents_BT, spans_BT = _batch()
    got, wanted, before = (
        each(x_BTD, positions_BT, documents_BT, None, spans_BT)[0] for each in (decoder, merged, _decoder())
    )
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert (got - before).abs().max() > 1e-2
