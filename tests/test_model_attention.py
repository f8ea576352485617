"""`attend` by each backend against masks written out, and positions against transformers' own."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mmllm.model import attend as attend_module
from mmllm.model.attend import PackedContext, attend, check_backend
from mmllm.model.attention import Attention, AttentionSettings
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.masks import MaskRule
from mmllm.model.rope import RopeScaling, rotary
from mmllm.model.row_cache import Chunk, PromptStep, RowCache, RunningStep
from mmllm.sequences import SequenceMetadata
from tests.cached_decoding import CachedRows

LENGTHS = [[40, 3, 1, 20], [7, 33, 5], [64], [64]]
RULES = [MaskRule(), MaskRule(window=1), MaskRule(window=5), MaskRule(spans=True), MaskRule(window=4, spans=True)]


def _documents(lengths: list[list[int]] = LENGTHS, num_positions: int = 64) -> torch.Tensor:
    ids_BT = torch.full((len(lengths), num_positions), -1)
    for row, each in enumerate(lengths):
        start = 0
        for number, length in enumerate(each):
            ids_BT[row, start : start + length] = number
            start += length
    return ids_BT


def _spans(ids_BT: torch.Tensor) -> torch.Tensor:
    """In each document of 5 and more, tokens 1 to 3 are a span, and the last two another."""
    spans_BT = torch.full_like(ids_BT, -1)
    number = 0
    for row in range(len(ids_BT)):
        for document in ids_BT[row][ids_BT[row] >= 0].unique():
            places = (ids_BT[row] == document).nonzero().flatten()
            if len(places) >= 5:
                spans_BT[row, places[1:4]], spans_BT[row, places[-2:]] = number, number + 1
                number += 2
    return spans_BT


def _slow(q, k, v, ids_BT, spans_BT, rule: MaskRule) -> torch.Tensor:
    """Token by token: what it sees is picked out, and its softmax taken."""
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    flat_ids, flat_spans = ids_BT.flatten(), spans_BT.flatten()
    tokens = (flat_ids >= 0).nonzero().flatten().tolist()
    rows = []
    for at, token in enumerate(tokens):
        seen = []
        for other_at, other in enumerate(tokens):
            same = token // ids_BT.shape[1] == other // ids_BT.shape[1] and flat_ids[token] == flat_ids[other]
            near = other <= token and (rule.window is None or token - other < rule.window)
            spanned = rule.spans and flat_spans[token] >= 0 and flat_spans[token] == flat_spans[other]
            if same and (near or spanned):
                seen.append(other_at)
        heads = []
        for head in range(num_heads):
            kv = head * num_kv_heads // num_heads
            scores = k[seen, kv] @ q[at, head] / q.shape[-1] ** 0.5
            heads.append(scores.softmax(0) @ v[seen, kv])
        rows.append(torch.cat(heads))
    return torch.stack(rows)


def _qkv(num_tokens: int, num_heads: int = 4, num_kv_heads: int = 2, seed: int = 0, dtype=torch.float64) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return [torch.randn(num_tokens, h, 8, generator=generator, dtype=dtype).requires_grad_() for h in heads]


def _attended(qkv, sequences, backend, spans_BT, rule) -> torch.Tensor:
    spans_Q = spans_BT.flatten()[sequences.tokens_Q] if rule.spans else None
    context = PackedContext(sequences, backend, spans_Q)
    context.prepare(rule)
    return attend(*qkv, context, rule)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_dense_attention_is_what_is_written_out(rule: MaskRule) -> None:
    ids_BT = _documents([[9, 3, 1], [6, 7]], 14)
    spans_BT = _spans(ids_BT)
    sequences = SequenceMetadata.of(ids_BT)
    qkv = _qkv(sequences.num_tokens)
    out = _attended(qkv, sequences, "dense", spans_BT, rule)
    torch.testing.assert_close(out, _slow(*qkv, ids_BT, spans_BT, rule), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("backend", ["buckets", "flex"])
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("multiple", [1, 32])
def test_every_backend_gives_the_dense_result_and_gradients(rule: MaskRule, backend: Any, multiple: int) -> None:
    ids_BT = _documents()
    spans_BT = _spans(ids_BT)
    sequences = SequenceMetadata.of(ids_BT, multiple)
    if backend == "flex":  # on a CPU it has no gradient, and computes in float32
        qkv = [x.detach() for x in _qkv(sequences.size, dtype=torch.float32)]
        wanted, got = (_attended(qkv, sequences, name, spans_BT, rule) for name in ("dense", backend))
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
        return
    results = []
    for name in ("dense", backend):
        qkv = _qkv(sequences.size)
        out = _attended(qkv, sequences, name, spans_BT, rule)[: sequences.num_tokens]
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        results.append([out, *torch.autograd.grad((out * weights).sum(), qkv)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_one_head_a_key_value_head_too() -> None:
    sequences = SequenceMetadata.of(_documents())
    for backend in ("dense", "buckets"):
        qkv = _qkv(sequences.size, 2, 2)
        out = _attended(qkv, sequences, backend, None, MaskRule())
        assert out.shape == (sequences.size, 16)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("shares", [True, False])
def test_varlen_is_asked_for_causal_attention_inside_documents(
    monkeypatch: pytest.MonkeyPatch, window: int | None, shares: bool
) -> None:
    """The kernel runs on GPUs alone: here it is played by a loop over documents that takes its arguments."""
    knows_groups = []

    def varlen_attn(q, k, v, starts, starts_k, longest, longest_k, *, window_size=(-1, -1), enable_gqa=False):
        assert torch.equal(starts, starts_k) and longest == longest_k >= int(starts.diff().max())
        assert starts.dtype == torch.int32
        knows_groups.append(enable_gqa)
        out = torch.empty_like(q)
        left, right = window_size
        assert right == 0
        for start, stop in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            part = [x[start:stop].transpose(0, 1)[None].float() for x in (q, k, v)]
            at = torch.arange(stop - start)
            seen = (at <= at[:, None]) & ((at[:, None] - at <= left) if left >= 0 else torch.ones((), dtype=torch.bool))
            each = F.scaled_dot_product_attention(*part, attn_mask=seen, enable_gqa=enable_gqa)
            out[start:stop] = each[0].transpose(0, 1).to(q.dtype)
        return out

    def older(q, k, v, starts, starts_k, longest, longest_k, *, window_size=(-1, -1)):
        assert q.shape == k.shape == v.shape, "this one knows no groups"
        return varlen_attn(q, k, v, starts, starts_k, longest, longest_k, window_size=window_size)

    import torch.nn.attention.varlen as varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn if shares else older)
    attend_module._varlen_settings.cache_clear()
    sequences, rule = SequenceMetadata.of(_documents(), 32), MaskRule(window)
    qkv = [x.to(torch.bfloat16) for x in _qkv(sequences.size)]
    context = PackedContext(sequences, "varlen")
    context.prepare(rule)
    got = attend(*qkv, context, rule)
    attend_module._varlen_settings.cache_clear()
    wanted = _attended([x.float() for x in qkv], sequences, "dense", None, rule)
    torch.testing.assert_close(got.float(), wanted, rtol=2e-2, atol=2e-2)
    assert knows_groups == [shares]


def test_varlen_wants_half_precision_and_knows_no_spans() -> None:
    sequences = SequenceMetadata.of(_documents())
    with pytest.raises(ValueError, match="takes bfloat16 and float16"):
        _attended(_qkv(sequences.size), sequences, "varlen", None, MaskRule())
    with pytest.raises(ValueError, match="'flex', which has no gradient on cpu; set it to buckets or auto"):
        _attended(_qkv(sequences.size, dtype=torch.float32), sequences, "flex", None, MaskRule())
    with pytest.raises(ValueError, match="set attention_backend to flex or auto"):
        check_backend("varlen", has_spans=True)
    with pytest.raises(ValueError, match="choose one of auto, buckets, varlen, flex, dense"):
        check_backend("flash", has_spans=False)


def test_the_cache_sees_what_packed_documents_see() -> None:
    """Prompts of a batch with padding on the left, then one position after the other."""
    total, num_rows = 12, 3
    documents_BT = torch.zeros(num_rows, total, dtype=torch.int64)
    documents_BT[1, :3] = documents_BT[2, :7] = -1
    spans_BT = torch.full_like(documents_BT, -1)
    spans_BT[0, 1:4] = 0
    spans_BT[1, 4:6] = 1
    sequences = SequenceMetadata.of(documents_BT)
    config = DecoderConfig(
        vocab_size=9, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8
    )
    is_real_BT = documents_BT >= 0
    for rule in RULES:
        qkv = _qkv(num_rows * total)
        wanted = _slow(*(x[sequences.tokens_Q] for x in qkv), documents_BT, spans_BT, rule)
        cache = RowCache(config, dtype=torch.float64)
        rows = [cache.allocate(total) for _ in range(num_rows)]
        outputs = torch.zeros(num_rows, total, 32, dtype=torch.float64)
        begin_BT = is_real_BT & (torch.arange(total) < 8)
        step = PromptStep(
            [Chunk(row, int(own_T.sum())) for row, own_T in zip(rows, begin_BT, strict=True)], spans_BT[begin_BT]
        )
        parts = [x.view(num_rows, total, *x.shape[1:])[begin_BT] for x in qkv]
        outputs[begin_BT] = attend(*parts, step.layer(0), rule)
        step.end()
        for row in rows:
            cache.start(row)
        for place in range(8, total):
            running = RunningStep(cache.slabs[0])
            parts = [x.view(num_rows, total, *x.shape[1:])[:, place] for x in qkv]
            outputs[:, place] = attend(*parts, running.layer(0), rule)
            running.end()
        torch.testing.assert_close(outputs.flatten(0, 1)[sequences.tokens_Q], wanted, rtol=1e-10, atol=1e-12)


# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("qk_norm", ["none", "head", "width"])
@pytest.mark.parametrize("bias", ["none", "qkv", "all"])
def test_norms_and_biases_are_where_they_belong(qk_norm: Any, bias: Any) -> None:
    settings = AttentionSettings(24, num_heads=4, num_kv_heads=2, head_dim=6, qk_norm=qk_norm, bias=bias)
    attention = Attention(settings).double()
    for parameter in attention.parameters():
        parameter.data.normal_()
    sequences = SequenceMetadata.of(_documents([[9, 4]], 13))
    x_ND = torch.randn(13, 24, dtype=torch.float64)
    cos, sin = rotary(torch.cat([torch.arange(9), torch.arange(4)]), 6, 100.0, torch.float64)
    context = PackedContext(sequences)
    context.prepare(MaskRule())
    got = attention(x_ND, cos, sin, context)

    def normed(x: torch.Tensor, norm: Any) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight

    weights = {name: getattr(attention, f"{name}_proj") for name in "qkvo"}
    q, k, v = (x_ND @ weights[n].weight.T + (0 if weights[n].bias is None else weights[n].bias) for n in "qkv")
    if qk_norm == "width":
        q, k = normed(q, attention.q_norm), normed(k, attention.k_norm)
    q, k, v = (x.view(13, -1, 6) for x in (q, k, v))
    if qk_norm == "head":
        q, k = normed(q, attention.q_norm), normed(k, attention.k_norm)

    def rotated(x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    none_BT = torch.full((1, 13), -1)
    out = _slow(rotated(q), rotated(k), v, _documents([[9, 4]], 13), none_BT, MaskRule())
    wanted = out @ weights["o"].weight.T + (0 if weights["o"].bias is None else weights["o"].bias)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    assert (weights["q"].bias is None) == (bias == "none") and (weights["o"].bias is None) == (bias != "all")


def test_qk_norm_in_half_precision_stays_in_the_fused_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch leaves the fused norm where weight and input differ in dtype, and the fused attention in float32."""
    seen: dict[str, set[torch.dtype]] = {"norm": set(), "attention": set()}
    rms_norm, attention_of = F.rms_norm, F.scaled_dot_product_attention

    def norm(x: Any, shape: Any, weight: Any, eps: Any) -> Any:
        seen["norm"] |= {x.dtype, weight.dtype}
        return rms_norm(x, shape, weight, eps)

    def attended(q: Any, k: Any, v: Any, **settings: Any) -> Any:
        seen["attention"] |= {q.dtype, k.dtype, v.dtype}
        return attention_of(q, k, v, **settings)

    monkeypatch.setattr(F, "rms_norm", norm)
    monkeypatch.setattr(F, "scaled_dot_product_attention", attended)
    attention = Attention(AttentionSettings(16, 2, 1, 8, qk_norm="head"))
    context = PackedContext(SequenceMetadata.of(_documents([[6]], 6)))
    context.prepare(MaskRule())
    x_ND = torch.randn(6, 16)
    angles = rotary(torch.arange(6), 8, 100.0, torch.float32)
    exact = attention(x_ND, *angles, context)
    seen["attention"].clear()
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x_ND, *angles, context)
    assert seen == {"norm": {torch.bfloat16}, "attention": {torch.bfloat16}}
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.05)


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        RopeScaling("linear", 4.0),
        RopeScaling("llama3", 8.0, 64, low_freq_factor=1.0, high_freq_factor=4.0),
        RopeScaling("yarn", 4.0, 64),
        RopeScaling("yarn", 16.0, 128, beta_fast=16.0, beta_slow=2.0, attention_factor=1.5),
    ],
    ids=str,
)
def test_rotary_positions_are_transformers_own(scaling: RopeScaling | None) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    values: dict[str, Any] = {"rope_type": "default", "rope_theta": 500.0}
    if scaling is not None:
        values |= {k: v for k, v in dataclasses.asdict(scaling).items() if v is not None}
        assert scaling.rope_type in ROPE_INIT_FUNCTIONS
        used = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}.get(
            scaling.rope_type, ("factor", "beta_fast", "beta_slow", "attention_factor")
        )
        kept = ("rope_type", "rope_theta", *used)
        if scaling.rope_type != "linear":
            kept = (*kept, "original_max_position_embeddings")
        values = {k: v for k, v in values.items() if k in kept}
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=32,
        max_position_embeddings=int(64 * (scaling.factor if scaling else 1)),
        rope_parameters=values,
    )
    positions_N = torch.arange(300)
    cos_1NC, sin_1NC = LlamaRotaryEmbedding(config)(torch.zeros(1, 300, 64), positions_N[None])
    cos, sin = rotary(positions_N, 32, 500.0, torch.float32, scaling)
    torch.testing.assert_close(cos[:, 0], cos_1NC[0, :, :16], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(sin[:, 0], sin_1NC[0, :, :16], rtol=1e-5, atol=2e-5)


def _decoder(**changes: Any) -> Decoder:
    values: dict[str, Any] = {
        "vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**values | changes)).double().eval()
    for parameter in decoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def test_sliding_and_global_layers_have_their_own_windows_and_positions() -> None:
    changes = {
        "layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "sliding_window": 3,
        "rope_theta": 1000.0, "sliding_rope_theta": 10.0, "rope_scaling": RopeScaling("linear", 2.0),
    }  # fmt: skip
    decoder = _decoder(**changes)
    assert [decoder.config.rope(layer)[0] for layer in range(3)] == [10.0, 1000.0, 10.0]
    assert decoder.config.rope(0)[1] is None and decoder.config.rope(1)[1] is not None
    x_BTD = torch.randn(1, 20, 16, dtype=torch.float64, requires_grad=True)
    positions_BT, documents_BT = torch.arange(20)[None], torch.zeros(1, 20, dtype=torch.int64)
    hidden_BTD = decoder(x_BTD, positions_BT, documents_BT)[0]
    only_sliding = _decoder(**changes | {"layer_types": ("sliding_attention",) * 3})
    near = only_sliding(x_BTD, positions_BT, documents_BT)[0]
    (grad,) = torch.autograd.grad(near[0, 19].sum(), x_BTD)
    assert grad[0, :13].abs().max() == 0 and (grad[0, 13:].abs().amax(dim=-1) > 0).all(), "three layers, two back each"
    (grad,) = torch.autograd.grad(hidden_BTD[0, 19].sum(), x_BTD)
    assert (grad[0].abs().amax(dim=-1) > 0).all(), "a global layer reaches all"


def test_prefix_decoders_cache_and_pack_alike() -> None:
    decoder = _decoder(prefix="prompt", sliding_window=4)
    documents_BT = torch.tensor([[0] * 9 + [1] * 6 + [-1] * 2])
    positions_BT = torch.cat([torch.arange(9), torch.arange(6), torch.zeros(2, dtype=torch.int64)])[None]
    spans_BT = torch.tensor([[0] * 5 + [-1] * 4 + [1] * 3 + [-1] * 5])
    x_BTD = torch.randn(1, 17, 16, dtype=torch.float64)
    whole = decoder(x_BTD, positions_BT, documents_BT, spans_BT=spans_BT)[0]
    cached = CachedRows(decoder, 1, 9)
    parts = [
        cached(x_BTD[:, s], documents_BT[:, s], spans_BT=spans_BT[:, s])
        for s in (slice(0, 6), slice(6, 7), slice(7, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole[:, :9], rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="no spans were given"):
        decoder(x_BTD, positions_BT, documents_BT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ("full_attention",)}, "layer_types has 1 entries; give one for each of the 3 layers"),
        ({"layer_types": ("full", "full", "full")}, "layer_types has 'full'"),
        ({"layer_types": ("sliding_attention",) * 3}, "give both or neither"),
        ({"layer_types": ("full_attention",) * 3, "sliding_window": 4}, "give both or neither"),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"sliding_rope_theta": 5.0}, "no layer is sliding"),
        ({"prefix": "media", "attention_backend": "varlen"}, "attention_backend is 'varlen'"),
        ({"qk_norm": "heads"}, "qk_norm is 'heads'"),
        ({"attention_bias": "q"}, "attention_bias is 'q'"),
        ({"prefix": "image"}, "prefix is 'image'"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0; it must be at least 1"),
        ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"intermediate_size": 0}, "intermediate_size is 0"),
        ({"head_dim": -8}, "head_dim is -8"),
        ({"rope_theta": 0.0}, "rope_theta is 0.0; give a number above 1"),
        ({"sliding_window": 2, "sliding_rope_theta": float("nan")}, "sliding_rope_theta is nan"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps is -1.0"),
        ({"dropout": 1.5}, "dropout is 1.5; it must be at least 0 and below 1"),
        ({"mod_predictor_coef": float("nan")}, "mod_predictor_coef is nan"),
    ],
)
def test_switches_that_contradict_each_other_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _decoder(**changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_type": "linear", "factor": 0.5}, "factor is 0.5"),
        ({"rope_type": "linear", "factor": float("inf")}, "factor is inf"),
        (
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "attention_factor": 0.0},
            "attention_factor is 0.0",
        ),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings is None"),
        (
            {"rope_type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8, "low_freq_factor": 5},
            "low_freq",
        ),
        ({"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8, "beta_fast": 1}, "beta_fast is 1"),
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type is 'dynamic'"),
    ],
)
def test_bad_scalings_of_positions_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**values)
