from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from mmllm.batch import IGNORE
from mmllm.checkpoints.settings import GenerationConfig, Sampling
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_prompt
from mmllm.inference.engine.filters import draw
from mmllm.inference.generate import generate_text
from mmllm.inference.prompts import join, pad_left
from mmllm.inference.units import generate_units
from mmllm_tokenizers.vocab import AUDIO_END, END, SPECIAL_TOKENS
from tests.inference_fixtures import images, make, sounds

GREEDY = Sampling()
MAX_NEW_TOKENS = 12
MAX_FRAMES = 14


@pytest.fixture(scope="module")
def model():
    return make()


def caption_prompts(model) -> list[Document]:
    return [build_prompt("caption", model.tokenizer, image=image) for image in images(8)]


def transcribe_prompts(model) -> list[Document]:
    return [build_prompt("transcribe", model.tokenizer, audio=sound) for sound in sounds(8)]


def speak_prompts(model) -> list[Document]:
    texts = ["one", "a red circle above two blue squares", "two, three", "", "said he", "circle"]
    return [build_prompt("speak", model.tokenizer, text=text, voice="he") for text in texts]


def scale_rows(model, ids: list[int], factor: float) -> None:
    with torch.no_grad():
        model.model.decoder.head_weight_VD[ids] *= factor


def text_continuation(model, ids: list[int]) -> Document:
    writer = DocumentWriter(model.tokenizer)
    writer.ids([*ids, model.tokenizer.id(END)], is_target=True)
    return writer.finish()


def units_continuation(model, codes_KF: torch.Tensor) -> Document:
    writer = DocumentWriter(model.tokenizer)
    writer.units(codes_KF.numpy(), is_target=True)
    writer.ids([model.tokenizer.id(AUDIO_END)], is_target=True)
    return writer.finish()


@torch.no_grad()
def run_uncached(model, prompt: Document, continuation: Document):
    """Logits and targets of a whole document in one pass, laid out by the training's own code."""
    document = join([prompt, continuation])
    batch = pack_documents([[document]], document.num_tokens)
    return model.model.logits(batch)[0], batch


@pytest.mark.parametrize("prompts", [caption_prompts, transcribe_prompts])
def test_cached_text_equals_uncached(model, prompts):
    model = copy.deepcopy(model)
    scale_rows(model, [model.tokenizer.id(END)], -4.0)  # often far from zero: texts end soon, though not at once
    documents = prompts(model)
    answers = generate_text(model.model, model.tokenizer, documents, GREEDY, MAX_NEW_TOKENS)
    assert len({len(answer) for answer in answers}) > 1, "rows should end at different lengths"
    for document, answer in zip(documents, answers, strict=True):
        logits_TV, batch = run_uncached(model, document, text_continuation(model, answer))
        end = model.tokenizer.id(END)
        allowed = [end, *range(len(SPECIAL_TOKENS), model.tokenizer.text.vocab_size)]
        places = (batch.labels_BT[0] != IGNORE).nonzero().flatten().tolist()
        labels = batch.labels_BT[0, places].tolist()
        expected = [allowed[int(logits_TV[place, allowed].argmax())] for place in places]
        num_drawn = min(len(answer) + 1, MAX_NEW_TOKENS)  # its end too, unless it was cut
        assert expected[:num_drawn] == labels[:num_drawn]


def test_units_and_special_tokens_are_never_written(model):
    model = copy.deepcopy(model)
    size, num_text = model.tokenizer.vocabulary.size, model.tokenizer.text.vocab_size
    end = model.tokenizer.id(END)
    scale_rows(model, [i for i in range(size) if i != end and not len(SPECIAL_TOKENS) <= i < num_text], 20.0)
    documents = caption_prompts(model)
    unconstrained = model.model.logits(pad_left(documents))[:, -1].argmax(dim=-1)
    assert not any(len(SPECIAL_TOKENS) <= i < num_text for i in unconstrained.tolist())
    answers = generate_text(model.model, model.tokenizer, documents, Sampling(temperature=1.0), MAX_NEW_TOKENS)
    assert all(len(SPECIAL_TOKENS) <= i < num_text for answer in answers for i in answer)
    assert any(answers)


@pytest.mark.parametrize(("pattern", "num_codebooks"), [("delay", 4), ("delay", 1), ("parallel", 3), ("flatten", 2)])
def test_cached_speech_equals_uncached(pattern, num_codebooks):
    model = make(pattern, num_codebooks)
    documents = speak_prompts(model)
    spoken = generate_units(model.model, model.tokenizer, documents, GREEDY, MAX_FRAMES)
    sounds_KF = [each.codes_KF for each in spoken]
    vocabulary = model.tokenizer.vocabulary
    num_units = vocabulary.filler
    start = vocabulary.codebook_start(0)
    per_frame = num_codebooks if pattern == "flatten" else 1
    for document, codes_KF in zip(documents, sounds_KF, strict=True):
        assert codes_KF.shape[0] == num_codebooks and 1 <= codes_KF.shape[1] <= MAX_FRAMES
        logits_TV, batch = run_uncached(model, document, units_continuation(model, codes_KF))
        places = (batch.labels_BT[0] != IGNORE).nonzero().flatten().tolist()
        end = start + vocabulary.filler if pattern == "delay" and num_codebooks > 1 else model.tokenizer.id(AUDIO_END)
        num_first = codes_KF.shape[1] * per_frame
        for position, place in enumerate(places):
            if position <= num_first and not (position == num_first and codes_KF.shape[1] == MAX_FRAMES):
                block = num_units // per_frame
                first = start + position % per_frame * block
                allowed = list(range(first, first + block))
                allowed += [end] if position and position % per_frame == 0 else []
                assert allowed[int(logits_TV[place, allowed].argmax())] == int(batch.labels_BT[0, place])
            for codebook in range(1, vocabulary.num_codebooks):
                code = int(batch.audio_labels_BTK[0, place, codebook])
                if code != IGNORE:
                    first = vocabulary.codebook_start(codebook)
                    assert int(logits_TV[place, first : first + num_units].argmax()) == code


def test_speech_ends_by_itself(model):
    documents = speak_prompts(model)
    spoken = generate_units(model.model, model.tokenizer, documents, Sampling(temperature=1.0), 200)
    codes = [each.codes_KF for each in spoken]
    assert all(each.is_whole for each in spoken)
    assert all(codes_KF.shape[1] < 200 for codes_KF in codes)
    assert len({codes_KF.shape[1] for codes_KF in codes}) > 2


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=3)])
def test_batch_size_changes_nothing(model, sampling):
    documents = [*caption_prompts(model), *transcribe_prompts(model)]
    expected = generate_text(model.model, model.tokenizer, documents, sampling, MAX_NEW_TOKENS, batch_size=1)
    for batch_size in (3, 64):
        got = generate_text(model.model, model.tokenizer, documents, sampling, MAX_NEW_TOKENS, batch_size)
        assert got == expected
    documents = speak_prompts(model)
    expected = generate_units(model.model, model.tokenizer, documents, sampling, MAX_FRAMES, batch_size=1)
    for batch_size in (2, 64):
        got = generate_units(model.model, model.tokenizer, documents, sampling, MAX_FRAMES, batch_size)
        assert all(torch.equal(a.codes_KF, b.codes_KF) for a, b in zip(got, expected, strict=True))


def test_seed_decides_what_is_drawn(model):
    documents = caption_prompts(model)
    runs = [
        generate_text(model.model, model.tokenizer, documents, Sampling(temperature=1.0, seed=seed), MAX_NEW_TOKENS)
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]


def test_blind_sees_and_hears_nothing(model):
    documents = caption_prompts(model)
    blind = generate_text(model.model, model.tokenizer, documents, GREEDY, MAX_NEW_TOKENS, blind=True)
    seeing = generate_text(model.model, model.tokenizer, documents, GREEDY, MAX_NEW_TOKENS)
    assert all(answer == blind[0] for answer in blind)
    assert len({tuple(answer) for answer in seeing}) > 1
    equal_sounds = [(wave[:640], rate) for wave, rate in sounds(4)]
    heard = [build_prompt("transcribe", model.tokenizer, audio=sound) for sound in equal_sounds]
    blind = generate_text(model.model, model.tokenizer, heard, GREEDY, MAX_NEW_TOKENS, blind=True)
    hearing = generate_text(model.model, model.tokenizer, heard, GREEDY, MAX_NEW_TOKENS)
    assert all(answer == blind[0] for answer in blind)
    assert len({tuple(answer) for answer in hearing}) > 1


def test_training_mode_and_random_state_are_left_alone(model):
    model.model.train()
    state = torch.get_rng_state()
    generate_text(model.model, model.tokenizer, caption_prompts(model)[:1], Sampling(temperature=1.0), 3)
    assert model.model.training and torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)
    model.model.eval()


def test_pad_left_holds_what_pack_documents_holds(model):
    parts = ["a red ", images(1)[0], " and "]
    document = build_prompt("interleaved", model.tokenizer, segments=parts)
    document = join([document, build_prompt("transcribe", model.tokenizer, audio=sounds(2)[1])])
    padded, packed = pad_left([document]), pack_documents([[document]], document.num_tokens)
    for field in dataclasses.fields(padded):
        if field.name not in ("state", "source_BT", "clip_targets_CL", "metadata"):
            assert torch.equal(getattr(padded, field.name), getattr(packed, field.name)), field.name


def test_pad_left_restarts_positions_behind_the_padding(model):
    long, short = (build_prompt("speak", model.tokenizer, text=text) for text in ("a red circle above", "one"))
    batch = pad_left([long, short])
    padding = long.num_tokens - short.num_tokens
    assert padding > 0
    assert batch.document_ids_BT[1].tolist() == [-1] * padding + [0] * short.num_tokens
    assert batch.positions_BT[1].tolist() == [0] * padding + list(range(short.num_tokens))
    assert batch.token_ids_BT[1, padding:].tolist() == short.token_ids_T.tolist()


def test_draw_follows_the_probabilities():
    logits_BV = torch.tensor([[0.1, 0.2, 0.4, 0.3, 0.0]]).log().expand(20_000, -1)
    uniforms_B = torch.rand(20_000, generator=torch.Generator().manual_seed(0))

    def shares(**settings) -> torch.Tensor:
        return draw(logits_BV, Sampling(**settings), uniforms_B).bincount(minlength=5) / 20_000

    torch.testing.assert_close(shares(temperature=1.0), torch.tensor([0.1, 0.2, 0.4, 0.3, 0.0]), atol=0.01, rtol=0)
    torch.testing.assert_close(shares(temperature=1.0, top_k=2), torch.tensor([0, 0, 4, 3, 0]) / 7, atol=0.01, rtol=0)
    torch.testing.assert_close(
        shares(temperature=1.0, top_p=0.75), torch.tensor([0, 2, 4, 3, 0]) / 9, atol=0.01, rtol=0
    )
    squares = torch.tensor([1.0, 4.0, 16.0, 9.0, 0.0]) / 30
    torch.testing.assert_close(shares(temperature=0.5), squares, atol=0.01, rtol=0)
    assert shares(temperature=0.0)[2] == 1


def test_draw_never_takes_what_is_forbidden():
    logits_BV = torch.full((2, 6), -torch.inf)
    logits_BV[:, 3] = 5.0
    edges_B = torch.tensor([0.0, 1.0 - 2**-24])
    assert draw(logits_BV, Sampling(temperature=1.0), edges_B).tolist() == [3, 3]
    assert draw(logits_BV, Sampling(temperature=1.0, top_k=4, top_p=0.5), edges_B).tolist() == [3, 3]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
    ],
)
def test_bad_sampling_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


def test_generation_config_names_unknown_keys():
    config = GenerationConfig(speech=Sampling(temperature=0.3, top_k=7))
    assert GenerationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"unknown key speech\.temprature"):
        GenerationConfig.from_dict({"speech": {"temprature": 1.0}})
    with pytest.raises(ValueError, match="unknown key num_beams"):
        GenerationConfig.from_dict({"num_beams": 4})
