"""Speech that is generated with a pointer: from the first letter to the last, at the user's pace."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mmllm.batch import IGNORE
from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_prompt
from mmllm.data.samples.pointers import spoken_pointer
from mmllm.inference.api import Model
from mmllm.inference.engine.letters import Letters, _word_counts
from mmllm.inference.engine.requests import SpeechRequest, SpokenUnits
from mmllm.inference.pacing import Pace
from mmllm.inference.speaking import SpeechOptions
from mmllm.inference.text_settings import try_number
from mmllm.inference.units import generate_units
from mmllm.inference.voices import align_recording, begin, ctc_scores
from mmllm_tokenizers.alignment import text_words
from mmllm_tokenizers.pointer import PointerRule, Spelling
from mmllm_tokenizers.vocab import AUDIO_END
from tests.inference_fixtures import RATE, make

GREEDY, DRAWN = Sampling(), Sampling(temperature=1.0, seed=5)
TEXTS = ["one", "a red circle above two blue squares", "two, three", "said he", "circle"]
FRAME_RATE = 125.0
SHORT = Pace(max_letter_seconds=6 / FRAME_RATE)


@pytest.fixture(scope="module", params=["delay", "parallel"])
def model(request) -> Model:
    return make(request.param, pointer=PointerRule())


def prompts(model: Model) -> list[Document]:
    return [build_prompt("speak", model.tokenizer, text=text) for text in TEXTS]


def biased(model: Model, *biases: float) -> Model:
    """A copy whose pointer moves by what a frame's state says and by these numbers, in nats."""
    model = copy.deepcopy(model)
    pointer = model.model.pointer
    assert pointer is not None
    with torch.no_grad():
        pointer.advance_head.bias.copy_(torch.tensor(biases))
    return model


def say(model: Model, sampling=DRAWN, **settings) -> list[SpokenUnits]:
    return generate_units(model.model, model.tokenizer, prompts(model), sampling, None, **{"pace": SHORT} | settings)


def check_walk(text: str, sound: SpokenUnits, most: int, max_advance: int = 2) -> None:
    """From the first letter to the last, in order, none for too long, and every word."""
    assert sound.pointer_F is not None and sound.is_whole
    spelling = Spelling.of(text)
    places, last = sound.pointer_F.tolist(), len(spelling.letters_L) - 1
    assert sound.codes_KF.shape == (3, len(places)) and int(sound.codes_KF.max()) < 12
    assert places[0] == 0 and places[-1] > last - max_advance
    assert set(np.diff(places)) <= set(range(max_advance + 1))
    assert max(places.count(place) for place in set(places)) <= most
    said = {spelling.words_L[place] for place in places if spelling.letters_L[place] != ord(" ")}
    words = dict(enumerate(text.split()))
    assert [word for number, word in words.items() if number not in said and text_words(word)] == []


def test_random_weights_lose_repeat_and_prolong_nothing(model):
    for sampling in (DRAWN, GREEDY):
        for text, sound in zip(TEXTS, say(model, sampling), strict=True):
            check_walk(text, sound, 6)


@pytest.mark.parametrize("max_advance", range(1, 7))
def test_no_word_is_passed_however_far_a_pointer_may_move(max_advance):
    model = make("delay", pointer=PointerRule(max_advance))
    texts = ["he is on a red box in it or up", "a", "it is I", "as - is", "ox on a box"]
    asked = [build_prompt("speak", model.tokenizer, text=text) for text in texts * 8]
    farthest = biased(model, *[0.0] * max_advance, 1e4)
    for one, most in ((model, 6), (farthest, 1)):
        pace = Pace(max_letter_seconds=most / FRAME_RATE, variation=1.0)
        sounds = generate_units(one.model, one.tokenizer, asked, DRAWN, None, pace=pace)
        for text, sound in zip(texts * 8, sounds, strict=True):
            check_walk(text, sound, most, max_advance)


def test_what_is_not_said_may_be_passed():
    letters_L = Spelling.of("as - is").letters_L
    assert bytes(letters_L.tolist()) == b" as - is "
    begun_L, ended_L = _word_counts(letters_L)
    assert begun_L.tolist() == [0, 1, 1, 1, 1, 1, 2, 2, 2]
    assert ended_L.tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_a_model_that_would_never_move_is_pushed_on(model):
    stuck = biased(model, 1e4, 0.0, 0.0)
    for text, sound in zip(TEXTS, say(stuck), strict=True):
        num_letters = len(Spelling.of(text).letters_L)
        check_walk(text, sound, 6)
        assert sound.num_bounded >= num_letters / 2
        assert sound.codes_KF.shape[1] == 6 * sound.num_bounded
    hasty = biased(model, 0.0, 0.0, 1e4)
    for text, sound in zip(TEXTS, say(hasty), strict=True):
        check_walk(text, sound, 1)
        assert not sound.num_bounded


def continuation(model: Model, text: str, sound: SpokenUnits) -> Document:
    writer = DocumentWriter(model.tokenizer)
    assert sound.pointer_F is not None
    num_positions = model.tokenizer.num_unit_positions(len(sound.pointer_F))
    pointer = spoken_pointer(Spelling.of(text).letters_L, sound.pointer_F.numpy(), num_positions)
    prompt = build_prompt("speak", model.tokenizer, text=text)
    writer.ids(prompt.token_ids_T.tolist(), is_target=False)
    writer.units(sound.codes_KF.numpy(), True, pointer)
    writer.ids([model.tokenizer.id(AUDIO_END)], is_target=True)
    return writer.finish()


@torch.no_grad()
def test_cached_speech_equals_uncached(model):
    """Laid out by training's own code, the whole speech is what the model finds most probable, units and moves."""
    start = model.tokenizer.vocabulary.codebook_start(0)
    for text, sound in zip(TEXTS, say(model, GREEDY), strict=True):
        document = continuation(model, text, sound)
        batch = pack_documents([[document]], document.num_tokens)
        hidden_TD = model.model.hidden(batch)[0]
        logits_TKV = model.model.unit_logits(hidden_TD)[..., :12]
        is_label_TK = batch.audio_labels_BTK[0] != IGNORE
        assert int(is_label_TK.sum()) == sound.codes_KF.numel()
        assert torch.equal(logits_TKV.argmax(dim=-1)[is_label_TK], batch.audio_labels_BTK[0][is_label_TK])
        assert start > 0
        moves = model.model.pointer.advance_head(hidden_TD)
        # A letter lasts until having moved on is more probable than not, or for 6 frames; the longer, the likelier.
        stayed, least, lasted = 1.0, 1.0, 0
        for position in (batch.advance_labels_BT[0] != IGNORE).nonzero().flatten().tolist():
            chances = moves[position].double().softmax(dim=-1)
            least, lasted = min(least, float(chances[0])), lasted + 1
            stayed *= least
            step = 1 + int(chances[1:].argmax()) if stayed < 0.5 or lasted == 6 else 0
            here = int(batch.pointer_BT[0, position])
            if bytes(batch.letters_L[here : here + 3].clamp(min=0).tolist()) == b" a ":
                step = min(step, 1)  # a word of one letter is said
            left = int((document.pointer.letters_L >= 0).sum()) - int(batch.pointer_BT[0, position])
            assert int(batch.advance_labels_BT[0, position]) == step or (step == 2 and left <= 2)
            if step:
                stayed, least, lasted = 1.0, 1.0, 0


def test_a_letter_whose_end_was_missed_ends_soon(model):
    """What a model says of ages that no letter of its training had doesn't hold a letter up."""
    pointer = prompts(model)[0].pointer
    assert pointer is not None
    letters = Letters.of(pointer, Pace(max_letter_seconds=30 / FRAME_RATE), FRAME_RATE, torch.device("cpu"))
    lasted = []
    for chances_to_move in ([0.1, 0.3, *[1e-6] * 20], [0.01] * 30, [0.1] * 22, [0.2, 0.6]):
        before = int(letters.places_B)
        for lasting, chance in enumerate(chances_to_move, start=1):
            letters = letters.moved(torch.tensor([[1 - chance, chance, 0.0]]).log(), torch.zeros(1))
            if int(letters.places_B) > before:
                lasted.append((lasting, int(letters.num_bounded_B)))
                break
    # 0.9 · 0.7 · 0.7 < 0.5; 0.99 ** 30 > 0.5: the bound, which is counted; 0.9 ** 7 < 0.5; 0.8 · 0.4 < 0.5
    assert lasted == [(3, 0), (30, 1), (7, 1), (2, 1)]


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.8, top_k=5, seed=3)])
def test_batch_size_changes_nothing(model, sampling):
    expected = say(model, sampling, batch_size=1)
    for batch_size in (2, 64):
        for got, want in zip(say(model, sampling, batch_size=batch_size), expected, strict=True):
            assert torch.equal(got.codes_KF, want.codes_KF) and torch.equal(got.pointer_F, want.pointer_F)


def test_speech_stops_when_it_is_told_to(model):
    asked = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 9

    sounds = say(biased(model, 3.0, 0.0, 0.0), stop=stop)
    assert all(not sound.is_whole for sound in sounds if sound.codes_KF.shape[1] >= 7)
    assert max(sound.codes_KF.shape[1] for sound in sounds) <= 9
    bounded = generate_units(model.model, model.tokenizer, prompts(model), DRAWN, 5, pace=SHORT)
    assert all(sound.codes_KF.shape[1] <= 5 for sound in bounded) and not bounded[1].is_whole


def test_tries_of_one_prompt_are_those_of_as_many_prompts(model):
    asked = prompts(model)
    pace = Pace(max_letter_seconds=SHORT.max_letter_seconds, variation=1.0)
    tries, others = (
        generate_units(model.model, model.tokenizer, rows, DRAWN, None, pace=pace)
        for rows in (asked * 4, [copy.copy(prompt) for prompt in asked * 4])
    )
    for one, other in zip(tries, others, strict=True):
        assert torch.equal(one.codes_KF, other.codes_KF) and torch.equal(one.pointer_F, other.pointer_F)


def test_codebooks_have_temperatures_of_their_own(model):
    colder = [DRAWN, GREEDY, GREEDY]
    sounds = generate_units(model.model, model.tokenizer, prompts(model), colder, None, pace=SHORT)
    again = generate_units(model.model, model.tokenizer, prompts(model), colder, None, pace=SHORT)
    assert all(torch.equal(a.codes_KF, b.codes_KF) for a, b in zip(sounds, again, strict=True))
    assert any(not torch.equal(a.codes_KF, b.codes_KF) for a, b in zip(sounds, say(model), strict=True))
    with pytest.raises(ValueError, match=r"2 samplings .* 3 codebooks"):
        generate_units(model.model, model.tokenizer, prompts(model), [DRAWN, GREEDY], None)


# ------------------------------------------------------------------------------------------------- voices, best of many
def recording_codes() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(4).integers(0, 12, (3, 80)))


def test_a_recording_is_gone_on_from(model):
    recording = align_recording(model.model, model.tokenizer, recording_codes(), "two red")
    assert [word.word for word in recording.words] == ["two", "red"]
    assert 0 <= recording.words[0].start <= recording.words[1].start < recording.words[1].end <= 80 / FRAME_RATE
    prompt = begin(build_prompt("speak", model.tokenizer, text="two red circle"), "circle", recording, model.tokenizer)
    (sound,) = generate_units(model.model, model.tokenizer, [prompt], DRAWN, None, pace=SHORT)
    first = len(b" two red ") - 1
    assert int(sound.pointer_F[0]) == first and int(sound.pointer_F[-1]) >= first + len("circle")
    assert sound.codes_KF.shape[1] == len(sound.pointer_F)
    # As training would lay out both, what is said next is said at the same positions.
    whole = SpokenUnits(
        torch.cat([recording.codes_KF, sound.codes_KF], dim=1),
        torch.cat([torch.from_numpy(prompt.pointer.places_T[prompt.num_tokens - 81 : -1]), sound.pointer_F]),
    )
    document = continuation(model, "two red circle", whole)
    assert document.token_ids_T[: prompt.num_tokens].tolist() == prompt.token_ids_T.tolist()
    np.testing.assert_array_equal(document.pointer.places_T[: prompt.num_tokens], prompt.pointer.places_T)
    np.testing.assert_array_equal(document.pointer.ages_T[: prompt.num_tokens], prompt.pointer.ages_T)
    np.testing.assert_array_equal(document.codes_TK[: prompt.num_tokens], prompt.codes_TK)


def test_the_best_of_several_tries_is_the_one_that_is_heard_best(model):
    options = SpeechOptions((DRAWN,), None, SHORT, best_of=4)
    best = model.speaker.speak(TEXTS, [None] * len(TEXTS), options)
    for text, prompt, waveform in zip(TEXTS, prompts(model), best, strict=True):
        numbers = [try_number(place) for place in range(4)]
        tries = model.engine.run([SpeechRequest(prompt, (DRAWN,), None, SHORT, number) for number in numbers])
        scores = ctc_scores(model.model, model.tokenizer, [each.codes_KF for each in tries], [text] * 4)
        assert len(set(scores)) > 1
        np.testing.assert_array_equal(waveform.codes_KF, tries[scores.index(min(scores))].codes_KF.numpy())


def test_speak_says_when_its_words_are_said(model):
    spoken = model.speak(TEXTS, temperature=1.0, top_k=None, max_letter_seconds=0.1, seed=1)
    for text, waveform in zip(TEXTS, spoken, strict=True):
        assert waveform.is_whole and [word.word for word in waveform.words] == text.split()
        assert all(a.end <= b.start for a, b in zip(waveform.words, waveform.words[1:], strict=False))
        assert waveform.words[0].start >= 0 and waveform.words[-1].end <= waveform.seconds + 1e-6
    wave = np.random.default_rng(0).normal(0, 0.1, 80 * RATE // 125).astype(np.float32)
    voiced = model.speak("circle", recording=(wave, RATE), recording_text="two red", max_letter_seconds=0.1)
    assert [word.word for word in voiced.words] == ["circle"]
    with pytest.raises(ValueError, match="recording_text"):
        model.speak("circle", recording=(wave, RATE))
    with pytest.raises(ValueError, match="unknown setting 'speed'"):
        model.speak("circle", speed=2)


def test_models_without_a_pointer_have_no_pace():
    plain = make()
    for settings in ({"rate": 2.0}, {"pauses": {0: 1.0}}, {"max_letter_seconds": 1.0}):
        with pytest.raises(ValueError, match="this model has no pointer"):
            plain.speak("one", **settings)
    with pytest.raises(ValueError, match="no pointer into what it says"):
        generate_units(plain.model, plain.tokenizer, prompts(plain), DRAWN, None)
    assert plain.speak("one", temperature=[1.0, 0.0, 0.0]).words == ()
