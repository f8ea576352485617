"""Speech has a pointer: alignments to letters, documents, the model's input, its loss."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from mmllm.batch import IGNORE, LETTER_GAP, Modality
from mmllm.checkpoints.folder import save_model
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.sample import Sample
from mmllm.inference.api import load
from mmllm.losses.batch import LossFunction
from mmllm.model.pointer import PointerConfig, SpeechPointer
from mmllm_tokenizers.alignment import WordTime
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule, Spelling, ages, follow, letter_starts
from tests.inference_fixtures import make, make_model, make_tokenizer

RATE = 125.0  # frames a second of the fixtures' codec
WORDS = [
    {"word": "Red", "start": 0.1, "end": 0.4},
    {"word": "circle", "start": 0.5, "end": 0.8, "letters": [0.5, 0.52, 0.6, 0.62, 0.7, 0.75]},
]
NUM_FRAMES = 120


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerFolder:
    return make_tokenizer(pointer=PointerRule())


def sample(text: str = "Red circle", num_frames: int = NUM_FRAMES, words: object = WORDS, key: str = "row") -> Sample:
    codes_KF = np.random.default_rng(len(key)).integers(0, 12, (3, num_frames))
    return Sample(key, text, codes_KF=codes_KF, metadata={"words": words})


# --------------------------------------------------------------------------------------------------- letters and times
def test_a_text_is_spelt_with_silence_around_each_word():
    spelling = Spelling.of("Ein  Öl - ja!")
    assert bytes(spelling.letters_L.tolist()).decode() == " ein öl - ja! "
    assert spelling.words_L.tolist() == [-1, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3]
    for nothing in ("", " ", "- !"):
        with pytest.raises(ValueError, match="no word that can be said"):
            Spelling.of(nothing)


def test_letters_begin_when_their_words_say_so():
    times = [WordTime("öl", 0.2, 0.6), WordTime("ja!", 1.0, 1.3, (1.0, 1.1, 1.3))]
    starts_L = letter_starts("Öl - ja!", times, 2.0)
    assert bytes(Spelling.of("Öl - ja!").letters_L.tolist()).decode() == " öl - ja! "
    # ö has two bytes, which share its half of the word; the dash takes no time.
    wanted = [0.0, 0.2, 0.3, 0.4, 0.6, 0.6, 0.6, 1.0, 1.1, 1.3, 1.3]
    np.testing.assert_allclose(starts_L, wanted)
    assert letter_starts("Öl - ja!", times, 1.25).max() == 1.25, "the sound's end ends all letters"
    with pytest.raises(ValueError, match=r"words\[0\] \('öl'\) ends at 0.6 s, but the sound lasts 0.49 s; .* seconds"):
        letter_starts("Öl - ja!", times, 0.49)
    with pytest.raises(ValueError, match="2 words, but 1 have times"):
        letter_starts("Öl - ja!", times[:1], 2.0)


def test_letters_that_are_folded_to_more_keep_their_times():
    times = [WordTime("Straße", 0.0, 1.0, (0.0, 0.5, 0.6, 0.7, 0.8, 0.9)), WordTime("İß", 1.0, 2.0, (1.2, 1.6))]
    text = "Straße İß"
    assert bytes(Spelling.of(text).letters_L.tolist()).decode() == f" {text.casefold()} "
    wanted = [0.0, 0.0, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 1.0, 1.2, 1.2 + 0.4 / 3, 1.2 + 0.8 / 3, 1.6, 1.8, 2.0]
    np.testing.assert_allclose(letter_starts(text, times, 2.0), wanted)


def slow_follow(starts_L: np.ndarray, num_frames: int, frame_rate: float, max_advance: int) -> list[int]:
    """The definition: as near to the letter that is said in the middle of a frame as what came and must come allows."""
    last, places = len(starts_L) - 1, [0]
    for frame in range(1, num_frames):
        middle = (frame + 0.5) / frame_rate
        said = max(letter for letter in range(last + 1) if starts_L[letter] <= middle or letter == 0)
        reachable = [
            letter
            for letter in range(last + 1)
            if 0 <= letter - places[-1] <= max_advance and last - letter <= max_advance * (num_frames - 1 - frame)
        ]
        places.append(min(reachable, key=lambda letter: abs(letter - said)))
    return places


@pytest.mark.parametrize("seed", range(30))
def test_the_pointer_follows_the_letters(seed):
    rng = np.random.default_rng(seed)
    max_advance, num_letters = int(rng.integers(1, 4)), int(rng.integers(2, 25))
    num_frames = int(rng.integers(math.ceil((num_letters - 1) / max_advance) + 1, 60))
    frame_rate = float(rng.choice([12.5, 50.0]))
    starts_L = np.sort(rng.uniform(0, num_frames / frame_rate * rng.choice([0.3, 1.0]), num_letters))
    starts_L[0] = 0.0
    pointer_F = follow(starts_L, num_frames, frame_rate, PointerRule(max_advance))
    assert pointer_F.tolist() == slow_follow(starts_L, num_frames, frame_rate, max_advance)
    assert pointer_F[0] == 0 and pointer_F[-1] == num_letters - 1
    assert set(np.diff(pointer_F)) <= set(range(max_advance + 1))
    lasted = 0
    for frame, age in enumerate(ages(pointer_F).tolist()):
        lasted = 0 if frame == 0 or pointer_F[frame] != pointer_F[frame - 1] else lasted + 1
        assert age == lasted


def test_too_many_letters_for_the_frames():
    with pytest.raises(ValueError, match=r"10 letters are said in 5 frames, but a pointer passes 2 a frame"):
        follow(np.linspace(0, 1, 10), 5, 50.0, PointerRule(2))
    assert follow(np.linspace(0, 1, 9), 5, 50.0, PointerRule(2)).tolist() == [0, 2, 4, 6, 8]
    assert ages(np.zeros(0, dtype=np.int64)).tolist() == []


def test_the_tokenizer_folder_keeps_the_rule(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    again = TokenizerFolder.load(tmp_path)
    assert again.config.pointer == PointerRule(2) and again.hash == tokenizer.hash
    without = make_tokenizer()
    assert without.hash != tokenizer.hash and "pointer" not in without.config.to_dict()
    with pytest.raises(ValueError, match="flatten, which spreads a frame"):
        TokenizerConfig(pattern="flatten", pointer=PointerRule())
    with pytest.raises(ValueError, match="max_advance is 0"):
        PointerRule(0)
    values = {**tokenizer.config.to_dict(), "pointer": {"max_advance": 2, "more": 1}}
    with pytest.raises(ValueError, match=r"unknown or missing keys: pointer\.more"):
        TokenizerConfig.from_dict(values, "here")


# ----------------------------------------------------------------------------------------------------------- documents
@pytest.mark.parametrize("pattern", ["delay", "parallel"])
def test_a_document_says_at_each_frame_what_is_said_and_what_follows(pattern):
    tokenizer = make_tokenizer(pattern, pointer=PointerRule())
    document = build_document(sample(), "speak", tokenizer)
    assert document.pointer is not None
    letters = document.pointer.letters_L[:-LETTER_GAP]
    assert bytes(letters.tolist()) == b" red circle " and set(document.pointer.letters_L[-LETTER_GAP:]) == {-1}
    times = [WordTime(**{**word, "letters": tuple(word["letters"]) if "letters" in word else None}) for word in WORDS]
    pointer_F = follow(letter_starts("Red circle", times, NUM_FRAMES / RATE), NUM_FRAMES, RATE, PointerRule())
    first = int((document.modality_T == Modality.UNITS).argmax()) - 1  # where the first frame is predicted
    places, advances = document.pointer.places_T, document.pointer.advances_T
    num_positions = NUM_FRAMES + (2 if pattern == "delay" else 0)
    for position in range(document.num_tokens):
        frame = position - first
        if not 0 <= frame < num_positions:
            assert places[position] == -1 and advances[position] == IGNORE
            continue
        assert places[position] == pointer_F[min(frame, NUM_FRAMES - 1)]
        if frame >= NUM_FRAMES:
            assert advances[position] == IGNORE
        else:
            after = pointer_F[frame + 1] if frame + 1 < NUM_FRAMES else len(letters)
            assert advances[position] == after - pointer_F[frame]
    np.testing.assert_array_equal(document.pointer.ages_T[first : first + num_positions], ages(places[places >= 0]))


def test_rows_without_times_are_refused_by_name(tokenizer):
    with pytest.raises(ValueError, match=r"row: the tokenizer folder has a pointer, .* `mmllm data align`"):
        build_document(dataclasses.replace(sample(), metadata={}), "speak", tokenizer)
    early = [{"word": word["word"], "start": 0.0, "end": 0.03} for word in WORDS]
    with pytest.raises(ValueError, match=r"row: 12 letters are said in 4 frames"):
        build_document(sample(num_frames=4, words=early), "speak", tokenizer)
    with pytest.raises(ValueError, match="row"):
        build_document(sample("Red"), "speak", tokenizer)
    late = [{**word, "start": 1000 * word["start"], "end": 1000 * word["end"], "letters": None} for word in WORDS]
    with pytest.raises(ValueError, match=r"row: words\[0\] \('Red'\) ends at 400 s, but the sound lasts 0.96 s"):
        build_document(sample(words=late), "speak", tokenizer)
    heard = build_document(sample(), "transcribe", tokenizer)
    assert heard.pointer is None, "what is heard has no pointer"
    assert build_document(sample(), "speak", make_tokenizer()).pointer is None


def test_memory_counts_the_pointer(tokenizer):
    """Loaders bound what they hold by it."""
    document = build_document(sample(), "speak", tokenizer)
    assert document.pointer is not None
    without = dataclasses.replace(document, pointer=None)
    arrays = [getattr(document.pointer, name) for name in ("letters_L", "places_T", "ages_T", "advances_T")]
    assert document.num_bytes - without.num_bytes == sum(array.nbytes for array in arrays) > 24 * NUM_FRAMES


def test_a_prompt_points_to_its_first_letter(tokenizer):
    prompt = build_prompt("speak", tokenizer, text="Red circle")
    assert prompt.pointer is not None
    assert prompt.pointer.places_T.tolist() == [-1] * (prompt.num_tokens - 1) + [0]
    trained = build_document(sample(), "speak", tokenizer)
    assert trained.token_ids_T[: prompt.num_tokens].tolist() == prompt.token_ids_T.tolist()
    assert trained.pointer is not None
    np.testing.assert_array_equal(trained.pointer.places_T[: prompt.num_tokens], prompt.pointer.places_T)


# --------------------------------------------------------------------------------------------------------------- model
def window(letters: bytes, place: int, before: int, after: int) -> list[int]:
    return [letters[i] if 0 <= i < len(letters) else 256 for i in range(place - before, place + after + 1)]


def test_the_input_holds_the_letters_around_the_pointer(tokenizer):
    pointer = make_model(tokenizer).pointer
    assert pointer is not None
    torch.nn.init.normal_(pointer.age_embedding)
    documents = [
        build_document(sample(key="a"), "speak", tokenizer),
        build_document(sample(key="bb"), "speak", tokenizer),
    ]
    batch = pack_documents([documents[:1], documents[1:]], 160)
    assert batch.metadata is not None
    (where,) = (batch.pointer_BT.flatten() >= 0).nonzero(as_tuple=True)
    assert torch.equal(where, batch.metadata.media.pointers_W)
    got_WD = pointer(batch.letters_L, batch.pointer_BT.flatten()[where], batch.pointer_age_BT.flatten()[where])
    row = 0
    tables = pointer.letters.weight.view(4, 257, -1)
    for document in documents:
        assert document.pointer is not None
        for place, age in zip(document.pointer.places_T.tolist(), document.pointer.ages_T.tolist(), strict=True):
            if place >= 0:
                letters = window(b" red circle ", place, 1, 2)
                want = sum(tables[i, letter] for i, letter in enumerate(letters))
                for step in range(min(age, 4) + 1):
                    want = want + pointer.age_embedding[step]
                torch.testing.assert_close(got_WD[row], want)
                row += 1
    assert row == len(got_WD)


def test_an_age_that_training_never_held_is_as_the_oldest_it_did():
    pointer = SpeechPointer(PointerConfig(before=1, after=2, max_age=5, max_advance=2), 16)
    optimizer = torch.optim.AdamW(pointer.parameters(), lr=0.1, weight_decay=0.1)
    letters_L, at_W = torch.full((9,), ord("a")), torch.full((3,), 4)
    for _ in range(3):
        optimizer.zero_grad()
        pointer(letters_L, at_W, torch.tensor([0, 1, 2])).square().sum().backward()
        optimizer.step()
    spoken_WD = pointer(letters_L, at_W.new_full((4,), 4), torch.tensor([1, 2, 3, 4]))
    assert not pointer.age_embedding[3:].any(), "Adam moves what has the smallest gradient"
    for older in (2, 3):
        torch.testing.assert_close(spoken_WD[older], spoken_WD[1])
    assert not torch.allclose(spoken_WD[0], spoken_WD[1])


def test_a_model_speaks_in_bfloat16(tmp_path):
    """Weights are loaded in another dtype, buffers that no file holds are not."""
    model = make("delay", pointer=PointerRule())
    assert model.model.pointer is not None
    torch.nn.init.normal_(model.model.pointer.age_embedding)
    save_model(tmp_path / "model", model.model, model.tokenizer)
    whole = load(tmp_path / "model", "cpu").speak("one", max_letter_seconds=0.05, temperature=0)
    spoken = load(tmp_path / "model", "cpu", dtype="bfloat16").speak("one", max_letter_seconds=0.05, temperature=0)
    assert [word.word for word in spoken.words] == ["one"] and spoken.is_whole and whole.is_whole


def test_packed_speech_is_as_it_is_alone(tokenizer):
    model = make_model(tokenizer).double()
    others = [sample("Red circle", 90, key=f"row {i}") for i in range(3)]
    documents = [build_document(each, "speak", tokenizer) for each in others]
    heard = build_document(sample(), "transcribe", tokenizer)
    packed = model(pack_documents([[documents[0], heard, documents[1]], [documents[2]]], 400)).hidden_QD
    alone = torch.cat(
        [model(pack_documents([[each]], 400)).hidden_QD for each in (documents[0], heard, *documents[1:])]
    )
    torch.testing.assert_close(packed, alone)


def test_the_model_and_the_tokenizer_must_agree(tokenizer):
    model = make_model(make_tokenizer())
    with pytest.raises(ValueError, match="speech has a pointer, but the model has none"):
        model(pack_documents([[build_document(sample(), "speak", tokenizer)]], 200))


# ---------------------------------------------------------------------------------------------------------------- loss
def test_the_advance_is_a_loss_of_its_own(tokenizer):
    model = make_model(tokenizer).double()
    documents = [build_document(sample(key=f"row {i}"), "speak", tokenizer) for i in range(2)]
    heard = build_document(sample(), "transcribe", tokenizer)
    batch = pack_documents([[heard, documents[0]], [documents[1]]], 400)
    losses = LossFunction(model.config)(model, model(batch), batch)
    hidden_BTD = model.hidden(batch)
    assert model.pointer is not None
    logits_BTJ = model.pointer.advance_head(hidden_BTD)
    total, count = 0.0, 0
    for row, position in (batch.advance_labels_BT != IGNORE).nonzero().tolist():
        total = total - logits_BTJ[row, position].log_softmax(0)[batch.advance_labels_BT[row, position]]
        count += 1
    assert count == 2 * NUM_FRAMES == int(losses.counts["advance"])
    torch.testing.assert_close(losses.sums["advance"], torch.as_tensor(total).detach())
    no_weight = dataclasses.replace(model.config, loss=dataclasses.replace(model.config.loss, advance=0.0))
    model.config = no_weight
    without = LossFunction(no_weight)(model, model(batch), batch)
    torch.testing.assert_close(losses.objective, without.objective + 0.3 * total)
    (losses.objective - without.objective).backward()
    wanted = torch.autograd.grad(0.3 * total, list(model.pointer.parameters()))  # type: ignore[arg-type]
    for parameter, gradient in zip(model.pointer.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_a_batch_without_speech_has_gradients_of_zero_for_the_pointer(tokenizer):
    model = make_model(tokenizer)
    batch = pack_documents([[build_document(sample(), "transcribe", tokenizer)]], 200)
    assert batch.pointer_BT.numel() == 0
    losses = LossFunction(model.config)(model, model(batch), batch)
    (losses.objective + losses.ctc_sum).backward()
    assert model.pointer is not None
    assert all(p.grad is not None and not p.grad.any() for p in model.pointer.parameters())
    assert not losses.counts["advance"]


def test_models_without_a_pointer_report_no_advance():
    model = make().model
    tokenizer = make_tokenizer()
    batch = pack_documents([[build_document(sample(), "speak", tokenizer)]], 200)
    assert "advance" not in LossFunction(model.config)(model, model(batch), batch).sums
