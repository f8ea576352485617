from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mmllm.batch import IGNORE, Modality
from mmllm.data.loading.collate import Gap, pack_documents
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.lengths import document_length
from mmllm.data.samples.sample import Sample, Segment
from mmllm.data.samples.stored import pack_codes, unpack_codes
from mmllm.data.samples.text_parts import num_parts, part_bounds
from mmllm_tokenizers.vocab import AUDIO, AUDIO_END, AUDIO_START, CAPTION, END, IMAGE, SPEAK, TRANSCRIBE
from tests.data_fixtures import make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("tok"))


def picture(value: int = 7) -> np.ndarray:
    return np.full((16, 16, 3), value, dtype=np.uint8)


def codes(num_frames: int = 5) -> np.ndarray:
    return np.arange(2 * num_frames).reshape(2, num_frames) % 16


def test_a_caption(folder):
    document = build_document(Sample("k", "red square", picture()), "caption", folder)
    text = folder.text.encode("red square")
    ids = [folder.id(IMAGE)] * 4 + [folder.id(CAPTION), *text, folder.id(END)]
    assert document.token_ids_T.tolist() == ids
    assert document.targets_T.tolist() == [False] * 5 + [True] * (len(text) + 1)
    assert document.modality_T.tolist() == [Modality.IMAGE] * 4 + [Modality.TEXT] * (len(text) + 2)
    assert [(item.start, item.num_slots, item.pixels_3HW.shape) for item in document.images] == [(0, 4, (3, 16, 16))]
    assert not document.has_units and (document.codes_TK == -1).all()


def test_transcribing(folder):
    document = build_document(Sample("k", "red", codes_KF=codes()), "transcribe", folder)
    ids = document.token_ids_T.tolist()
    assert ids[:4] == [folder.id(AUDIO)] * 3 + [folder.id(TRANSCRIBE)] and ids[-1] == folder.id(END)
    (clip,) = document.clips
    assert (clip.start, clip.num_slots) == (0, 3) and clip.codes_FK.tolist() == codes().T.tolist()
    assert list(clip.target_ids) == folder.text.encode("red")
    assert document.targets_T.tolist() == [False] * 4 + [True] * (len(ids) - 4)


def test_speaking_under_delay(folder):
    sample = Sample("voice", "red", codes_KF=codes(), metadata={"speaker": "ann"})
    document = build_document(sample, "speak", folder)
    vocabulary = folder.vocabulary
    start = document.token_ids_T.tolist().index(folder.id(AUDIO_START))
    prompt = [folder.id(SPEAK), *folder.text.encode("ann")]
    assert document.token_ids_T[: len(prompt)].tolist() == prompt
    units = slice(start + 1, start + 7)  # 5 frames and one of delay
    first = vocabulary.codebook_start(0)
    assert (document.token_ids_T[units] - first).tolist() == [*codes()[0].tolist(), vocabulary.filler]
    assert document.codes_TK[units, 1].tolist() == [vocabulary.filler, *codes()[1].tolist()]
    assert document.token_ids_T[-1] == folder.id(AUDIO_END) and len(document.token_ids_T) == start + 8
    assert document.targets_T.tolist() == [False] * (start + 1) + [True] * 7
    assert (document.modality_T[units] == Modality.UNITS).all()

    batch = pack_documents([[document]], 40)
    labels_T, codes_TK = batch.labels_BT[0], batch.audio_labels_BTK[0]
    assert labels_T[start] == document.token_ids_T[start + 1] and labels_T[start + 6] == folder.id(AUDIO_END)
    assert labels_T[start + 5] == first + vocabulary.filler  # the end of codebook 0 can be predicted
    assert codes_TK[start : start + 6, 0].tolist() == [*codes()[0].tolist(), IGNORE]
    assert codes_TK[start : start + 6, 1].tolist() == [IGNORE, *codes()[1].tolist()]
    assert (codes_TK[start + 6 :] == IGNORE).all() and (codes_TK[:start] == IGNORE).all()
    known_T = codes_TK[:, 0] != IGNORE
    assert (labels_T[known_T] == first + codes_TK[known_T, 0]).all()


@pytest.mark.parametrize(("pattern", "positions", "codebooks"), [("parallel", 5, 2), ("flatten", 10, 1)])
def test_other_patterns(tmp_path, pattern, positions, codebooks):
    folder = make_folder(tmp_path, pattern)
    sample = Sample("k", "red", codes_KF=codes())
    document = build_document(sample, "speak", folder)
    is_unit = document.modality_T == Modality.UNITS
    assert is_unit.sum() == positions and document.codes_TK.shape[1] == codebooks
    assert document.num_tokens == document_length("speak", folder, key="k", text="red", num_frames=5)
    codes_KP = torch.from_numpy(document.codes_TK[is_unit].T.copy())
    assert folder.invert_pattern(codes_KP).tolist() == codes().tolist()


def test_voices_are_dropped_from_some_documents_only(folder):
    lengths = [
        build_document(
            Sample(f"k{n}", "red", codes_KF=codes(), metadata={"speaker": "ann"}), "speak", folder
        ).num_tokens
        for n in range(200)
    ]
    dropped = lengths.count(min(lengths))
    assert len(set(lengths)) == 2 and 20 <= dropped <= 60
    again = build_prompt("speak", folder, text="red", voice="ann").num_tokens
    assert again == build_prompt("speak", folder, text="red", voice="ann").num_tokens
    assert again > build_prompt("speak", folder, text="red").num_tokens


def test_interleaved_with_a_question(folder):
    segments = (Segment(text="first "), Segment(image=picture()), Segment(text=" then "), Segment(audio=codes()))
    plain = build_document(Sample("k", segments=segments), "interleaved", folder)
    assert plain.token_ids_T[-1] == folder.id(END) and len(plain.images) == len(plain.clips) == 1
    is_text = plain.modality_T == Modality.TEXT
    assert plain.targets_T[is_text].all() and not plain.targets_T[~is_text].any()
    sample = Sample("k", segments=segments, metadata={"question": "which?", "answer": "red"})
    asked = build_document(sample, "interleaved", folder)
    answer = [*folder.text.encode("red"), folder.id(END)]
    assert asked.token_ids_T[-len(answer) :].tolist() == answer and asked.targets_T[-len(answer) :].all()
    only = build_document(sample, "question", folder)
    assert only.token_ids_T.tolist() == asked.token_ids_T.tolist() and only.targets_T.sum() == len(answer)
    sizes = ["first ", None, " then ", 5]
    assert asked.num_tokens == document_length("interleaved", folder, segments=sizes, metadata=sample.metadata)
    assert plain.num_tokens == document_length("interleaved", folder, segments=sizes)


def test_prompts_begin_the_training_documents(folder):
    text = "blue circle"
    image_sample = Sample("k", text, picture())
    cases = [
        (build_document(image_sample, "caption", folder), build_prompt("caption", folder, image=picture())),
        (
            build_document(Sample("k", text, codes_KF=codes()), "transcribe", folder),
            build_prompt("transcribe", folder, audio=codes()),
        ),
        (
            build_document(Sample("k", text, codes_KF=codes()), "speak", folder),
            build_prompt("speak", folder, text=text),
        ),
        (build_document(Sample("k", text), "text", folder), build_prompt("text", folder, text="blue")),
    ]
    for document, prompt in cases:
        num_tokens = prompt.num_tokens
        assert 0 < num_tokens < document.num_tokens
        assert document.targets_T[:num_tokens].tolist() == prompt.targets_T.tolist(), "as in training"
        assert document.token_ids_T[:num_tokens].tolist() == prompt.token_ids_T.tolist()
        assert len(prompt.images) == len(document.images) and len(prompt.clips) == len(document.clips)
    mixed = build_prompt("interleaved", folder, segments=["look: ", picture(), {"audio": codes()}, {"text": "so"}])
    assert len(mixed.images) == len(mixed.clips) == 1
    parts = (Segment(text="look: "), Segment(image=picture()), Segment(audio=codes()), Segment(text="so"))
    document = build_document(Sample("k", segments=parts), "interleaved", folder)
    assert document.targets_T[: mixed.num_tokens].tolist() == mixed.targets_T.tolist() and mixed.targets_T.any()
    chat = build_prompt("chat", folder, segments=["hi"])
    assert folder.text.decode(chat.token_ids_T.tolist()) == "hi"


def test_sound_is_encoded_from_waves_and_files(folder):
    wave = np.sin(np.arange(640) * 0.2).astype(np.float32)
    at_rate = build_prompt("transcribe", folder, audio=wave)
    with_rate = build_prompt("transcribe", folder, audio=(wave, 8000))
    assert at_rate.clips[0].codes_FK.tolist() == with_rate.clips[0].codes_FK.tolist()
    assert at_rate.clips[0].codes_FK.shape == (10, 2)


def test_what_is_missing_is_named(folder):
    for task, field in (("caption", "image"), ("transcribe", "audio"), ("speak", "text"), ("question", "question")):
        with pytest.raises(ValueError, match=f"'{field}'"):
            build_prompt(task, folder)
    with pytest.raises(ValueError, match="task is 'sing'"):
        build_prompt("sing", folder)
    with pytest.raises(ValueError, match="codebooks"):
        build_prompt("transcribe", folder, audio=codes()[:1])


def test_packing_shifts_labels_and_restarts_positions(folder):
    one = build_document(Sample("k", "red square", picture(1)), "caption", folder)
    two = build_document(Sample("k", "blue", codes_KF=codes()), "transcribe", folder)
    gap = Gap(3)
    batch = pack_documents([[one, gap, two], [], [two]], 48, [[4, 0, 1], [], [1]], {"step": 1})
    first, second = one.num_tokens, two.num_tokens
    assert batch.state == {"step": 1} and batch.token_ids_BT.shape == (3, 48)
    ids = [0] * first + [-1] * 3 + [2] * second
    assert batch.document_ids_BT[0].tolist() == ids + [-1] * (48 - len(ids))
    assert (batch.document_ids_BT[1] == -1).all() and (batch.labels_BT[1] == IGNORE).all()
    assert batch.positions_BT[0, : first + 4].tolist() == [*range(first), 0, 0, 0, 0]
    assert batch.source_BT[0, [0, first, first + 3]].tolist() == [4, -1, 1]
    for start, document in ((0, one), (first + 3, two)):
        for place in range(document.num_tokens):
            wanted = IGNORE
            if place + 1 < document.num_tokens and document.targets_T[place + 1]:
                wanted = document.token_ids_T[place + 1]
            assert batch.labels_BT[0, start + place] == wanted
    assert batch.image_slots_NS.tolist() == [[0, 1, 2, 3]] and batch.images_NCHW.shape == (1, 3, 16, 16)
    assert batch.clip_slots_CS.tolist() == [[first + 3 + n for n in range(3)], [96 + n for n in range(3)]]
    assert batch.clip_codes_CFK[1].tolist() == codes().T.tolist()
    assert (batch.labels_BT != IGNORE).sum() == int(one.targets_T.sum() + 2 * two.targets_T.sum())


def test_a_batch_without_pictures_and_sound(folder):
    batch = pack_documents([[build_document(Sample("k", "red"), "text", folder)]], 8)
    assert batch.images_NCHW.shape[0] == batch.clip_codes_CFK.shape[0] == batch.clip_slots_CS.shape[0] == 0
    assert batch.images_NCHW.dtype == torch.uint8 and batch.audio_codes_BTK.shape == (1, 8, 2)


def test_packing_refuses_what_does_not_fit(folder):
    document = build_document(Sample("k", "red square"), "text", folder)
    with pytest.raises(ValueError, match="sequence_length is 3"):
        pack_documents([[document]], 3)
    other = dataclasses.replace(document, codes_TK=document.codes_TK[:, :1])
    with pytest.raises(ValueError, match="codebooks"):
        pack_documents([[document, other]], 100)


@pytest.mark.parametrize("num_tokens", [2, 9, 10, 11, 19, 20, 100])
def test_parts_make_every_token_a_target_once(num_tokens):
    bounds = [part_bounds(num_tokens, 10, part) for part in range(num_parts(num_tokens, 10))]
    targets = [token for start, stop in bounds for token in range(start + 1, stop)]
    assert targets == list(range(1, num_tokens)) and all(stop - start <= 10 for start, stop in bounds)


def test_stored_codes_that_are_broken_or_anothers_are_named():
    codes_KF = np.arange(6).reshape(2, 3)
    stored = pack_codes(codes_KF, "a" * 64, 50.0)
    assert stored == pack_codes(codes_KF, "a" * 64, 50.0)
    assert np.array_equal(unpack_codes(stored, "a" * 64, "s.tar:k"), codes_KF)
    with pytest.raises(ValueError, match=r"s\.tar:k: the stored codes were made by a{12}, but b{12} is wanted"):
        unpack_codes(stored, "b" * 64, "s.tar:k")
    with pytest.raises(ValueError, match=r"s\.tar:k: the stored codes are broken"):
        unpack_codes(stored[:40], "a" * 64, "s.tar:k")
