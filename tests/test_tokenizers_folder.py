from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch

from mmllm_tokenizers.audio import SmallCodec
from mmllm_tokenizers.codec import Codec, CodecConfig
from mmllm_tokenizers.folder import TokenizerConfig, TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from mmllm_tokenizers.vocab import TEMPLATES, Vocabulary

TINY = CodecConfig(num_filters=4, ratios=(4, 8), dimension=16, num_codebooks=3, codebook_size=16)


@pytest.fixture(scope="module")
def text() -> TextTokenizer:
    return TextTokenizer.train(["a red square", "two blue rings"], 280)


@pytest.fixture
def codec() -> SmallCodec:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SmallCodec(Codec(TINY))


def test_save_load_and_hash(text, codec, tmp_path):
    folder = TokenizerFolder(text, codec, TokenizerConfig(image_tokens=9, image_size=32, audio_pool=4, num_codebooks=2))
    folder.save(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "a" / "longer" / "path")
    loaded = TokenizerFolder.load(tmp_path / "a" / "longer" / "path")
    assert loaded.hash == folder.hash
    assert loaded.config == folder.config
    assert loaded.templates == TEMPLATES
    assert (loaded.num_image_tokens, loaded.image_size, loaded.audio_pool, loaded.pattern) == (9, 32, 4, "delay")
    assert (loaded.frame_rate, loaded.sample_rate, loaded.num_codebooks) == (250.0, 8000, 2)
    assert loaded.text.encode("a red ring") == text.encode("a red ring")
    wave_T = 0.1 * torch.randn(1000)
    assert loaded.require_audio().encode(wave_T, 8000).shape == (2, 32)
    assert torch.equal(loaded.require_audio().encode(wave_T, 8000), codec.encode(wave_T, 8000))
    loaded.save(tmp_path / "again")
    for path in sorted((tmp_path / "first").rglob("*")):
        if path.is_file():
            assert (tmp_path / "again" / path.relative_to(tmp_path / "first")).read_bytes() == path.read_bytes()


def test_a_sound_may_be_heard_with_more_codebooks_than_are_spoken(text, codec, tmp_path):
    config = TokenizerConfig(num_codebooks=2, heard_codebooks=3)
    folder = TokenizerFolder(text, codec, config)
    folder.save(tmp_path)
    loaded = TokenizerFolder.load(tmp_path)
    assert loaded.hash == folder.hash and loaded.config == folder.config
    assert (loaded.num_codebooks, loaded.heard_codebooks) == (2, 3)
    assert loaded.vocabulary == Vocabulary(text.vocab_size, 2, 16)
    wave_T = 0.1 * torch.randn(1000)
    codes_KF = loaded.require_audio().encode(wave_T, 8000)
    assert torch.equal(codes_KF, SmallCodec(codec.codec).encode(wave_T, 8000)) and codes_KF.shape == (3, 32)
    assert torch.equal(loaded.codebooks_KVD, codec.codec.codebooks_KVD[:2])
    assert torch.equal(loaded.heard_codebooks_KVD, codec.codec.codebooks_KVD)
    assert loaded.num_unit_positions(32) == 33  # the delay is of what is spoken
    assert loaded.hash != TokenizerFolder(text, codec, TokenizerConfig(num_codebooks=2)).hash


def test_both_numbers_come_from_the_codec_where_neither_is_given(text, codec):
    tiny = dataclasses.replace(TINY, spoken_codebooks=2)

    def numbers(**settings):
        folder = TokenizerFolder(text, SmallCodec(Codec(tiny)), TokenizerConfig(**settings))
        return folder.num_codebooks, folder.heard_codebooks, folder.require_audio().num_codebooks

    assert numbers() == (2, 3, 3)
    assert numbers(num_codebooks=1) == (1, 1, 1)
    assert numbers(num_codebooks=3) == (3, 3, 3)
    assert numbers(heard_codebooks=2) == (2, 2, 2)
    assert numbers(num_codebooks=1, heard_codebooks=2) == (1, 2, 2)
    plain = TokenizerFolder(text, codec)  # all that there are, as ever, and nothing is said of it
    assert (plain.num_codebooks, plain.heard_codebooks) == (3, 3)
    assert "heard_codebooks" not in plain.config.to_dict()
    assert TokenizerFolder(text, codec, TokenizerConfig(num_codebooks=3, heard_codebooks=3)).hash == plain.hash
    for settings, said in (
        ({"num_codebooks": 3, "heard_codebooks": 2}, "heard_codebooks is 2 and num_codebooks 3"),
        ({"num_codebooks": 2, "heard_codebooks": 4}, "num_codebooks is 4; this audio tokenizer has 3"),
        (
            {"pattern": "flatten", "num_codebooks": 2, "heard_codebooks": 3},
            "pattern is flatten.* 3 codebooks are heard",
        ),
        ({"pattern": "flatten"}, "pattern is flatten.* 3 codebooks are heard and 2 spoken"),
    ):
        with pytest.raises(ValueError, match=said):
            numbers(**settings)
    assert numbers(pattern="flatten", num_codebooks=2) == (2, 2, 2)


def test_the_codec_is_read_when_first_used(text, codec, tmp_path):
    TokenizerFolder(text, codec).save(tmp_path)
    (tmp_path / "codec" / "config.json").unlink()
    folder = TokenizerFolder.load(tmp_path)
    assert folder.vocabulary == Vocabulary(text.vocab_size, 3, 16)
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        _ = folder.audio


def test_every_part_counts_in_the_hash(text, codec):
    folder = TokenizerFolder(text, codec)
    templates = {**TEMPLATES, "caption": {"prompt": "{image}", "target": "{text}<|end|>"}}
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other_codec = SmallCodec(Codec(TINY))
    others = [
        TokenizerFolder(TextTokenizer.train(["a red square"], 275), codec),
        TokenizerFolder(text, other_codec),
        TokenizerFolder(text, codec, TokenizerConfig(pattern="parallel")),
        TokenizerFolder(text, codec, TokenizerConfig(audio_pool=3)),
        TokenizerFolder(text, codec, templates=templates),
        TokenizerFolder(text),
    ]
    assert len({folder.hash, *(other.hash for other in others)}) == 1 + len(others)
    assert TokenizerFolder(text, codec).hash == folder.hash


@pytest.mark.parametrize(
    ("pattern", "blocks", "rows"), [("delay", (3, 16), 3), ("parallel", (3, 16), 3), ("flatten", (1, 48), 1)]
)
def test_patterns_through_the_folder(text, codec, pattern, blocks, rows):
    folder = TokenizerFolder(text, codec, TokenizerConfig(pattern=pattern))
    assert folder.vocabulary == Vocabulary(text.vocab_size, *blocks)
    codes_KF = torch.randint(16, (3, 7))
    patterned_KP = folder.apply_pattern(codes_KF)
    assert patterned_KP.shape == (rows, folder.num_unit_positions(7))
    assert torch.equal(folder.invert_pattern(patterned_KP), codes_KF)


def test_without_sound(text, tmp_path):
    TokenizerFolder(text).save(tmp_path)
    folder = TokenizerFolder.load(tmp_path)
    assert folder.audio is None
    assert folder.vocabulary.size == text.vocab_size
    assert not (tmp_path / "codec").exists()
    with pytest.raises(ValueError, match="has no codec"):
        folder.require_audio()


def test_audio_slots(text, codec):
    folder = TokenizerFolder(text, codec, TokenizerConfig(audio_pool=4))
    assert [folder.num_audio_slots(frames) for frames in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]
    assert folder.id("<|image|>") == 3


def test_damaged_folders_are_named(text, codec, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json does not exist"):
        TokenizerFolder.load(tmp_path)
    TokenizerFolder(text, codec).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "image_token": 3}))
    with pytest.raises(ValueError, match="unknown or missing keys: image_token"):
        TokenizerFolder.load(tmp_path)
    path.write_text(json.dumps({**config, "format_version": 7}))
    with pytest.raises(ValueError, match="format version 7"):
        TokenizerFolder.load(tmp_path)
    path.write_text("[")
    with pytest.raises(ValueError, match="is not JSON"):
        TokenizerFolder.load(tmp_path)
    path.write_text(json.dumps({**config, "codebook_size": 99}))
    with pytest.raises(ValueError, match="belongs to another tokenizer"):
        _ = TokenizerFolder.load(tmp_path).audio
    path.write_text(json.dumps(config))
    shutil.rmtree(tmp_path / "codec")
    with pytest.raises(FileNotFoundError, match="codec is missing"):
        TokenizerFolder.load(tmp_path)


def test_wrong_values_are_named(text, codec):
    with pytest.raises(ValueError, match="audio_pool is 0"):
        TokenizerConfig(audio_pool=0)
    with pytest.raises(ValueError, match="pattern is 'zigzag'"):
        TokenizerConfig(pattern="zigzag")
    with pytest.raises(ValueError, match="num_codebooks is 9; this audio tokenizer has 3"):
        TokenizerFolder(text, codec, TokenizerConfig(num_codebooks=9))
