"""Sound is heard with more codebooks than are spoken: documents, batches, model, training's start, speech, scores."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.settings import Sampling
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.documents import build_document, build_prompt, encode_audio, media_slots
from mmllm.data.samples.sample import Sample, Segment
from mmllm.inference.api import Model
from mmllm.inference.generate import _hidden
from mmllm.inference.pacing import Pace
from mmllm.inference.prompts import pad_left
from mmllm.inference.speaking import SpeechOptions
from mmllm.inference.voices import align_recording, begin, ctc_scores
from mmllm.model.config import config_to_dict
from mmllm.model.flops import ModelFlops
from mmllm.model.multimodal import AudioConfig, ModelConfig, MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm.training.vocabulary import with_vocabulary
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import RATE, make_model, make_tokenizer, sounds

HEARD, SPOKEN, SIZE = 5, 3, 12
WORDS = [{"word": "one", "start": 0.0, "end": 0.1}]


@pytest.fixture(scope="module")
def tokenizer() -> TokenizerFolder:
    return make_tokenizer(num_codebooks=HEARD, spoken_codebooks=SPOKEN, pointer=PointerRule())


@pytest.fixture(scope="module")
def model(tokenizer: TokenizerFolder) -> Model:
    return Model(make_model(tokenizer), tokenizer)


def codes(num_frames: int = 20, num_codebooks: int = HEARD, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, SIZE, (num_codebooks, num_frames))


def sample(**more) -> Sample:
    return Sample("k", "one", codes_KF=codes(), metadata={"words": WORDS}, **more)


def test_what_is_heard_has_all_codes_and_what_is_spoken_the_first(tokenizer):
    heard = build_document(sample(), "transcribe", tokenizer)
    assert heard.clips[0].codes_FK.tolist() == codes().T.tolist() and heard.codes_TK.shape[1] == SPOKEN
    spoken = build_document(sample(), "speak", tokenizer)
    alone = TokenizerFolder(tokenizer.text, make_tokenizer(num_codebooks=HEARD).audio, dataclasses.replace(
        tokenizer.config, heard_codebooks=None,
    ))  # fmt: skip
    wanted = build_document(Sample("k", "one", codes_KF=codes()[:SPOKEN], metadata={"words": WORDS}), "speak", alone)
    for name in ("token_ids_T", "targets_T", "codes_TK"):
        np.testing.assert_array_equal(getattr(spoken, name), getattr(wanted, name))
    wave, rate = sounds(1)[0]
    whole_KF = tokenizer.require_audio().encode(torch.from_numpy(wave), rate).numpy()
    np.testing.assert_array_equal(encode_audio((torch.from_numpy(wave)[None], rate), tokenizer), whole_KF)
    assert len(whole_KF) == HEARD
    segment = media_slots(Segment(audio=codes()), tokenizer)
    np.testing.assert_array_equal(segment.clips[0].codes_FK, codes().T)
    with pytest.raises(ValueError, match=r"have shape \(3, 20\); the tokenizer needs 5 codebooks x frames; stored"):
        encode_audio(codes()[:SPOKEN], tokenizer, "k")


def test_a_batch_holds_both(tokenizer):
    documents = [build_document(sample(), task, tokenizer) for task in ("transcribe", "speak")]
    batch = pack_documents([documents], 128)
    assert batch.clip_codes_CFK.shape == (1, 20, HEARD) and batch.audio_codes_BTK.shape == (1, 128, SPOKEN)
    assert batch.clip_codes_CFK[0].tolist() == codes().T.tolist()
    left = pad_left([build_prompt("transcribe", tokenizer, audio=codes())])
    assert left.clip_codes_CFK[0].tolist() == codes().T.tolist() and left.audio_codes_BTK.shape[2] == SPOKEN


def test_units_and_clips_share_the_first_codebooks_of_the_table(tokenizer, model):
    own = model.model
    table_KVD = own.code_embedding.table.weight.view(HEARD, SIZE + 1, -1)
    assert own.config.num_text == tokenizer.vocabulary.num_text, "the head speaks no more than before"
    own.initialize_audio(tokenizer.heard_codebooks_KVD)
    books_KVD = tokenizer.require_audio().codebooks_KVD
    scale = books_KVD.var(dim=1).sum(dim=0).mean().sqrt()
    torch.testing.assert_close(table_KVD[:, :-1], books_KVD / scale)
    torch.testing.assert_close(tokenizer.codebooks_KVD, books_KVD[:SPOKEN])
    frame_K = torch.tensor([3, 1, 4])
    wanted_D = sum(table_KVD[k, code] for k, code in enumerate(frame_K.tolist()))
    torch.testing.assert_close(own.code_embedding(frame_K[None])[0], wanted_D)
    codes_CFK = torch.from_numpy(codes().T[None])
    changed_CFK = codes_CFK.clone()
    changed_CFK[..., -1] = (changed_CFK[..., -1] + 1) % SIZE
    with torch.no_grad():
        assert not torch.allclose(own.clip_embedding(changed_CFK), own.clip_embedding(codes_CFK)), "the last is heard"
    with pytest.raises(ValueError, match="a frame has 6 codes, but the model hears 5 codebooks"):
        own.clip_embedding(torch.zeros(1, 4, 6, dtype=torch.int64))
    assert ModelFlops.of(own.config).per_heard_frame > 0


def test_the_folder_decides_and_contradictions_are_named(tokenizer, model):
    config = model.model.config
    assert config.audio is not None and config.audio.num_heard == HEARD
    _, audio = with_vocabulary(config.decoder, dataclasses.replace(config.audio, heard_codebooks=None), tokenizer)
    assert audio is not None and (audio.heard_codebooks, audio.num_codebooks) == (HEARD, SPOKEN)
    with pytest.raises(ValueError, match=r"audio\.heard_codebooks is 4 but the tokenizer folder says 5"):
        with_vocabulary(config.decoder, dataclasses.replace(config.audio, heard_codebooks=4), tokenizer)
    with pytest.raises(ValueError, match=r"audio\.heard_codebooks is 2 and audio\.num_codebooks 3"):
        AudioConfig(3, SIZE, heard_codebooks=2)
    for pattern in ("delay", "flatten"):  # as many as are spoken: nothing is said of it
        plain = make_tokenizer(pattern)
        given = AudioConfig(0, 0, 0, dataclasses.replace(config.audio.projector))
        _, audio = with_vocabulary(dataclasses.replace(config.decoder, vocab_size=0), given, plain)
        assert audio is not None and audio.heard_codebooks is None
        assert audio.num_heard == plain.vocabulary.num_codebooks


def test_models_of_before_are_read(model):
    values = config_to_dict(dataclasses.replace(model.model.config, audio=AudioConfig(SPOKEN, SIZE, 8)))
    del values["audio"]["heard_codebooks"]
    read = ModelConfig.from_dict(values)
    assert read.audio is not None and read.audio == AudioConfig(SPOKEN, SIZE, 8) and read.audio.num_heard == SPOKEN


def test_a_model_is_saved_loaded_and_started_from(tokenizer, model, tmp_path: Path):
    with torch.no_grad():  # not the codec's, from which a table starts anyway
        model.model.code_embedding.table.weight.normal_(std=0.25)
    save_model(tmp_path / "model", model.model, tokenizer)
    loaded = load_model(tmp_path / "model")
    assert loaded.tokenizer.heard_codebooks == HEARD and loaded.model.config == model.model.config
    name = "code_embedding.table.weight"
    table = model.model.state_dict()[name]
    assert torch.equal(loaded.model.state_dict()[name], table)
    same = DecoderModule(init_from=str(tmp_path / "model"))
    same.configure_model()
    assert same.model is not None and torch.equal(same.model.state_dict()[name], table)
    # Heard with fewer: the table's first rows.
    config = dataclasses.replace(tokenizer.config, heard_codebooks=4)
    fewer = TokenizerFolder(tokenizer.text, make_tokenizer(num_codebooks=HEARD, spoken_codebooks=SPOKEN).audio, config)
    fewer.save(tmp_path / "fewer")
    audio = dataclasses.replace(model.model.config.audio, heard_codebooks=None)
    module = DecoderModule(init_from=str(tmp_path / "model"), tokenizer=str(tmp_path / "fewer"), audio=audio)
    module.configure_model()
    assert module.model is not None
    assert torch.equal(module.model.state_dict()[name], table[: 4 * (SIZE + 1)])


def test_tries_are_scored_by_the_sound_that_they_make(tokenizer, model):
    """As anybody hears them: not by units, of which a sound that is heard has more."""
    units = [torch.from_numpy(codes(30, SPOKEN, seed)) for seed in range(2)]
    audio = tokenizer.require_audio()
    scores = ctc_scores(model.model, tokenizer, units, ["one", "two"])
    again = [audio.encode(audio.decode(codes_KF), audio.sample_rate) for codes_KF in units]
    assert all(codes_KF.shape == (HEARD, 30) for codes_KF in again)
    assert scores == ctc_scores(model.model, tokenizer, again, ["one", "two"])
    assert np.isfinite(scores).all() and len(set(scores)) == 2


def test_it_speaks_hears_itself_and_goes_on_with_a_voice(tokenizer, model):
    pace = Pace(max_letter_seconds=0.05)
    options = SpeechOptions((Sampling(1.0, seed=1),), None, pace, best_of=2)
    (spoken,) = model.speaker.speak(["one two"], [None], options)
    assert spoken.codes_KF.shape[0] == SPOKEN and np.isfinite(spoken.samples).all()
    assert isinstance(model.transcribe((spoken.samples, RATE), max_new_tokens=4), str)
    codes_KF = tokenizer.require_audio().encode(0.1 * torch.randn(80 * RATE // 125), RATE)
    recording = align_recording(model.model, tokenizer, codes_KF, "two red")
    prompt = build_prompt("speak", tokenizer, text="two red circle")
    begun = begin(prompt, "circle", recording, tokenizer)
    first_K = codes_KF[:SPOKEN, 0].numpy()
    assert begun.codes_TK.shape[1] == SPOKEN and begun.codes_TK[prompt.num_tokens, 0] == first_K[0]
    assert begun.codes_TK[prompt.num_tokens + 2, 2] == first_K[2], "the delay pattern"


def test_silence_is_silent_in_all_codebooks(tokenizer):
    (hidden,) = _hidden([build_prompt("transcribe", tokenizer, audio=codes())], tokenizer)
    silence_KF = tokenizer.require_audio().encode(torch.zeros(20 * 64), RATE)
    np.testing.assert_array_equal(hidden.clips[0].codes_FK[5], silence_KF[:, 10].numpy())
    assert hidden.clips[0].codes_FK.shape == (20, HEARD)


def test_gradients_reach_the_rows_that_are_only_heard(tokenizer, model):
    own = MultimodalModel(model.model.config)
    batch = pack_documents([[build_document(sample(), "transcribe", tokenizer)]], 64)
    own.train()(batch).hidden_QD.square().sum().backward()
    assert own.code_embedding is not None and own.code_embedding.table.weight.grad is not None
    gradient_KV = own.code_embedding.table.weight.grad.view(HEARD, SIZE + 1, -1).abs().sum(dim=2)
    for codebook, used in enumerate(codes()):
        assert set(gradient_KV[codebook].nonzero().flatten().tolist()) == set(used.tolist())


def test_the_flat_stream_hears_what_it_speaks():
    with pytest.raises(ValueError, match="pattern is flatten"):
        make_tokenizer("flatten", num_codebooks=HEARD, spoken_codebooks=SPOKEN)
    assert TokenizerConfig(pattern="flatten").heard_codebooks is None
