"""How an answer came about: attention against a computation by hand, log-probabilities and experts against the model.

Shapes: M positions that look, N tokens, H heads, C channels a head, V ids, D width.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch

from mmllm.batch import Modality
from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, set_adapter
from mmllm.checkpoints.settings import GenerationConfig
from mmllm.data.samples.document import DocumentWriter, Picture
from mmllm.data.samples.documents import default_transform
from mmllm.evaluation.answer_traces import END_PIECE, trace_answer
from mmllm.evaluation.attention_maps import SeenPicture, enlarged, seen_pictures, slot_grid, watch
from mmllm.evaluation.routing import chosen_experts
from mmllm.evaluation.speech_traces import trace_speech
from mmllm.inference.prompting import Prompter
from mmllm.inference.prompts import join, pad_left
from mmllm.inference.speaking import speech_options
from mmllm.model.multimodal import MultimodalModel
from mmllm_tokenizers.pointer import PointerRule
from mmllm_tokenizers.tiling import Tiling
from tests.inference_fixtures import images, make, make_model, make_tokenizer


def _prompter(model, tokenizer):
    return Prompter(model.config, tokenizer, default_transform(tokenizer), GenerationConfig())


def _document(tokenizer, model, text=" a red circle"):
    prompt = _prompter(model, tokenizer).caption(images(1)[0])
    writer_ids = tokenizer.text.encode(text)
    return prompt, writer_ids


def _changed(model, **decoder):
    config = dataclasses.replace(model.config, decoder=dataclasses.replace(model.config.decoder, **decoder))
    changed = MultimodalModel(config).eval()
    changed.load_state_dict(model.state_dict(), strict=False)
    return changed


def _turned(vector_C, position, theta):
    """One head's query or key, turned pair by pair with complex numbers."""
    half = len(vector_C) // 2
    out = [0.0] * len(vector_C)
    for pair in range(half):
        angle = position * theta ** (-2 * pair / len(vector_C))
        turned = complex(vector_C[pair], vector_C[pair + half]) * complex(math.cos(angle), math.sin(angle))
        out[pair], out[pair + half] = turned.real, turned.imag
    return out


def _by_hand(model, batch, layer, sees):
    """Attention weights [N, N] of a layer, mean over heads, by loops over heads, queries and keys."""
    decoder, config = model.decoder, model.config.decoder
    inputs = []
    block = decoder.layers[layer]
    hook = block.input_layernorm.register_forward_hook(lambda module, given, normed: inputs.append(normed))
    with torch.no_grad():
        model(batch)
    hook.remove()
    attention, channels = block.self_attn, config.head_channels
    q = attention.q_proj(inputs[0]).unflatten(-1, (-1, channels)).detach().double()
    k = attention.k_proj(inputs[0]).unflatten(-1, (-1, channels)).detach().double()
    num_tokens, num_heads = q.shape[:2]
    weights = np.zeros((num_tokens, num_tokens))
    for head in range(num_heads):
        shared = head * k.shape[1] // num_heads
        queries = [_turned(q[n, head].tolist(), n, config.rope_theta) for n in range(num_tokens)]
        keys = [_turned(k[n, shared].tolist(), n, config.rope_theta) for n in range(num_tokens)]
        for query in range(num_tokens):
            seen = [key for key in range(num_tokens) if sees(query, key)]
            scores = [math.fsum(a * b for a, b in zip(queries[query], keys[n], strict=True)) for n in seen]
            powers = [math.exp(score / math.sqrt(channels)) for score in scores]
            for key, power in zip(seen, powers, strict=True):
                weights[query, key] += power / math.fsum(powers) / num_heads
    return weights


@pytest.mark.parametrize("kind", ["causal", "window", "media"])
def test_attention_is_that_computed_by_hand(kind):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    if kind == "window":
        model = _changed(model, sliding_window=3)
    if kind == "media":
        model = _changed(model, prefix="media")
    prompt, ids = _document(tokenizer, model)
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    writer = DocumentWriter(tokenizer)
    writer.ids(ids, is_target=True)
    batch = pad_left([join([prompt, writer.finish()])])
    first, stop = prompt.images[0].start, prompt.images[0].start + prompt.images[0].num_slots

    def sees(query, key):
        if kind == "window":
            return query - 3 < key <= query
        is_span = kind == "media" and first <= query < stop and first <= key < stop
        return key <= query or is_span

    assert trace.attention.layers == (0, 1)
    for place, layer in enumerate(trace.attention.layers):
        by_hand = _by_hand(model, batch, layer, sees)
        looks = by_hand[prompt.num_tokens - 1 : prompt.num_tokens - 1 + len(ids)]
        np.testing.assert_allclose(trace.attention.weights_LMN[place], looks, atol=2e-6)
        if kind == "media":  # the picture's own slots see each other
            _, slots = watch(model, batch, range(first, stop))
            np.testing.assert_allclose(slots.weights_LMN[place], by_hand[first:stop], atol=2e-6)
    np.testing.assert_allclose(trace.attention.weights_LMN.sum(axis=-1), 1, atol=1e-5)


def test_watching_changes_nothing_and_leaves_nothing_behind():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompt, _ = _document(tokenizer, model)
    batch = pad_left([prompt])
    with torch.no_grad():
        plain = model(batch).hidden_QD
        watched, _ = watch(model, batch, [0, 3])
    assert torch.equal(plain, watched.hidden_QD)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_tokens_have_the_models_own_probabilities_and_experts():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).train()
    prompt, ids = _document(tokenizer, model, " a red circle über two")
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=True)
    assert model.training
    model.eval()
    writer = DocumentWriter(tokenizer)
    end = tokenizer.text.end_ids[0]
    writer.ids([*ids, end], is_target=True)
    document = join([prompt, writer.finish()])
    batch = pad_left([document])
    with torch.no_grad():
        logits_NV = model.logits(batch)[0, :, : model.config.num_text].double()
    for token_id in tokenizer.text.hidden_ids - {end}:  # a text has none of these
        logits_NV[:, token_id] = -torch.inf
    logprobs_NV = logits_NV.log_softmax(dim=-1)
    assert len(trace.tokens) == len(ids) + 1
    for number, (token_id, token) in enumerate(zip([*ids, end], trace.tokens, strict=True)):
        row_V = logprobs_NV[prompt.num_tokens - 1 + number]
        assert token.logprob == pytest.approx(float(row_V[token_id]), abs=1e-4)
        best = sorted(row_V.tolist(), reverse=True)[:3]
        assert [logprob for _, logprob in token.alternatives] == pytest.approx(best, abs=1e-4)
    assert trace.tokens[-1].is_end and trace.tokens[-1].piece == END_PIECE
    assert "".join(token.piece for token in trace.tokens[:-1]) == " a red circle über two"
    assert [word.text for word in trace.words] == ["a", "red", "circle", "über", "two"]
    assert (trace.routing.experts_LNK == chosen_experts(model, batch).numpy()).all()
    assert (trace.routing.modality_N == document.modality_T).all()


def test_counts_are_those_of_a_loop_over_tokens():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompt, ids = _document(tokenizer, model)
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    expected = np.zeros_like(trace.routing.counts_LME)
    for layer, experts_NK in enumerate(trace.routing.experts_LNK):
        for modality, experts_K in zip(trace.routing.modality_N, experts_NK, strict=True):
            for expert in experts_K:
                expected[layer, modality, expert] += 1
    assert (trace.routing.counts_LME == expected).all()
    assert trace.routing.counts_LME[:, Modality.IMAGE].sum() == 2 * prompt.images[0].num_slots
    assert trace.routing.layers == (1,)


def test_words_look_by_the_mean_of_their_tokens_and_layers():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompt, ids = _document(tokenizer, model, " zebra")
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    (word,) = trace.words
    assert (word.start, word.stop) == (0, len(ids)) and len(ids) > 1
    assert trace.looks(word) == pytest.approx(trace.attention.weights_LMN.astype(float).mean(axis=(0, 1)))
    assert trace.looks(word, 1) == pytest.approx(trace.attention.weights_LMN[1].astype(float).mean(axis=0))


def test_an_answer_without_tokens_is_refused():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompt, _ = _document(tokenizer, model)
    with pytest.raises(ValueError, match="no token"):
        trace_answer(model, tokenizer, prompt, [], has_ended=False)


def test_a_picture_that_is_cut_has_one_map_of_all_its_tiles():
    tokenizer = make_tokenizer(tiling=Tiling(4))
    model = make_model(tokenizer)
    picture = np.random.default_rng(1).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    prompt = _prompter(model, tokenizer).caption(picture)
    (seen,) = seen_pictures(model, prompt)
    assert seen.grid == slot_grid(model) == (2, 2)
    rows, columns = (max(tile.tile[axis] for tile in seen.tiles) for axis in (0, 1))
    assert rows * columns == len(seen.tiles) - 1 > 1, "a thumbnail and its tiles"
    weights_N = np.random.default_rng(0).random(prompt.num_tokens)
    map_yx = seen.map_yx(weights_N)
    assert map_yx.shape == (2 * rows, 2 * columns)
    assert map_yx.sum() == pytest.approx(seen.share(weights_N))
    for y in range(map_yx.shape[0]):
        for x in range(map_yx.shape[1]):
            tile = next(tile for tile in seen.tiles if tile.tile == (y // 2 + 1, x // 2 + 1))
            own = weights_N[tile.start + (y % 2) * 2 + x % 2]
            thumbnail = weights_N[seen.tiles[0].start + (y // rows) * 2 + x // columns] / (rows * columns)
            assert map_yx[y, x] == pytest.approx(own + thumbnail)
    side = tokenizer.config.image_size
    assert seen.pixels_3yx.shape == (3, rows * side, columns * side)


def test_a_whole_pictures_map_is_its_slots_rows_first():
    pixels = np.zeros((3, 4, 4), dtype=np.uint8)
    seen = SeenPicture(pixels, (Picture(3, pixels, 6),), (2, 3))
    assert seen.map_yx(np.arange(12.0)).tolist() == [[3, 4, 5], [6, 7, 8]]
    assert seen.share(np.arange(12.0)) == 33


def test_slots_of_learned_queries_have_no_place():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    projector = dataclasses.replace(model.config.image_projector, kind="perceiver", num_tokens=4)
    assert slot_grid(MultimodalModel(dataclasses.replace(model.config, image_projector=projector))) is None
    assert slot_grid(make_model(tokenizer, sight=False)) is None
    pooled = dataclasses.replace(model.config.image_projector, kind="average", num_tokens=2)
    assert slot_grid(MultimodalModel(dataclasses.replace(model.config, image_projector=pooled))) == (1, 2)
    shuffled = dataclasses.replace(model.config.image_projector, kind="pixel_shuffle", scale_factor=2)
    assert slot_grid(MultimodalModel(dataclasses.replace(model.config, image_projector=shuffled))) == (1, 1)


def test_a_map_is_enlarged_in_place():
    large = enlarged(np.array([[0.0, 0.5], [0.0, 0.0]]), 8)
    assert large.shape == (8, 8) and large.max() == pytest.approx(1)
    assert np.unravel_index(large.argmax(), large.shape) == (0, 6) or large[0, 7] == pytest.approx(1)
    assert large[7].max() == pytest.approx(0) and enlarged(np.zeros((2, 2)), 4).max() == 0


@pytest.mark.parametrize(
    ("pattern", "rule"),
    [("delay", None), ("parallel", None), ("flatten", None), ("delay", PointerRule()), ("parallel", PointerRule())],
)
def test_units_that_are_drawn_greedily_are_the_most_probable(pattern, rule):
    model = make(pattern, pointer=rule)
    speaker = model.speaker
    settings = {"temperature": 0} if rule else {"temperature": 0, "max_seconds": 0.2}
    options = speech_options(settings, model.generation, rule is not None)
    (request,) = speaker.requests("one two three", None, options)
    (spoken,) = model.engine.run([request])
    trace = trace_speech(model.model, model.tokenizer, request.prompt, "one two three", spoken)
    num_codebooks, num_frames = spoken.codes_KF.shape
    assert trace.logprobs_KF.shape == (num_codebooks, num_frames) and num_frames >= 2
    whole = num_frames if spoken.is_whole else num_frames - num_codebooks
    # The most probable of 12 units has at least a twelfth; a wrong input would hardly leave all of them first.
    assert (trace.logprobs_KF[:, :whole] >= math.log(1 / 12)).all()
    other = dataclasses.replace(spoken, codes_KF=(spoken.codes_KF + 1) % 12)
    wrong = trace_speech(model.model, model.tokenizer, request.prompt, "one two three", other)
    assert (wrong.logprobs_KF < math.log(1 / 2)).any()
    assert trace.routing.counts_LME[:, Modality.UNITS].sum() == 2 * (model.tokenizer.num_unit_positions(num_frames))
    if rule is None:
        assert [word for word, _ in trace.words] == ["one two three"]
        assert trace.words[0][1] == pytest.approx(trace.logprobs_KF.mean(axis=1))
    else:
        assert [word for word, _ in trace.words] == ["one", "two", "three"]


def test_the_pointer_is_told_when_speech_is_looked_into():
    model = make(pointer=PointerRule())
    options = speech_options({"temperature": 0}, model.generation, True)
    (request,) = model.speaker.requests("one two three", None, options)
    (spoken,) = model.engine.run([request])
    right = trace_speech(model.model, model.tokenizer, request.prompt, "one two three", spoken)
    moved = dataclasses.replace(spoken, pointer_F=spoken.pointer_F.flip(0))
    other = trace_speech(model.model, model.tokenizer, request.prompt, "one two three", moved)
    assert right.logprobs_KF.sum() > other.logprobs_KF.sum()


@pytest.mark.parametrize("kind", ["prompt_tuning", "prefix_tuning"])
def test_learned_tokens_before_the_document_are_not_the_documents(kind):
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    prompt, ids = _document(tokenizer, model)
    plain = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    add_adapter(model.decoder, AdapterConfig(kind, num_virtual_tokens=3), "learned")
    with torch.no_grad():
        for parameter in model.decoder.virtual_tokens.parameters():
            parameter.normal_()
    set_adapter(model.decoder, "learned")
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    assert trace.tokens != plain.tokens and len(trace.tokens) == len(ids)
    assert trace.routing.experts_LNK.shape == plain.routing.experts_LNK.shape
    if kind == "prefix_tuning":
        assert trace.attention.layers == () and trace.attention.weights_LMN.shape[0] == 0
    else:
        sums = trace.attention.weights_LMN.sum(axis=-1)
        assert trace.attention.weights_LMN.shape == plain.attention.weights_LMN.shape
        assert (sums < 1 - 1e-3).all() and (sums > 0).all()


def test_layers_that_some_tokens_skip_are_left_out():
    tokenizer = make_tokenizer()
    model = _changed(make_model(tokenizer), mod_layers=(0,), mod_capacity=0.3)
    prompt, ids = _document(tokenizer, model)
    trace = trace_answer(model, tokenizer, prompt, ids, has_ended=False)
    assert trace.attention.layers == (1,)
    assert trace.looks(trace.words[0]).shape == (prompt.num_tokens + len(ids),)
