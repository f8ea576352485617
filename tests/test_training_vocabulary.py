"""What a decoder module takes from its tokenizer folder: words that weigh more, and speech's pointer."""

from __future__ import annotations

import dataclasses

import pytest

from mmllm.model.pointer import PointerConfig
from mmllm.training.vocabulary import with_vocabulary, word_ids
from mmllm_tokenizers.pointer import PointerRule
from tests.inference_fixtures import make_model, make_tokenizer


def test_words_weigh_with_and_without_a_space(caplog):
    folder = make_tokenizer()
    with_space, without, only_with_space = (folder.text.encode(text) for text in (" he", "he", " two"))
    assert [len(ids) for ids in (with_space, without, only_with_space)] == [1, 1, 1] and with_space != without
    assert len(folder.text.encode("two")) == 2, "its pieces are other words' too"
    assert word_ids({"he": 2.0}, folder) == {with_space[0]: 2.0, without[0]: 2.0}
    ids = word_ids({"two": 6.0}, folder)
    assert ids == {only_with_space[0]: 6.0}
    assert all(folder.text.decode([token_id]).strip() == "two" for token_id in ids)
    assert word_ids(None, None) == {} == word_ids({}, folder)
    assert word_ids({"hippopotamus": 2.0}, folder) == {}
    assert "'hippopotamus' weighs as all do: it is" in caplog.text
    with pytest.raises(ValueError, match="words need a tokenizer"):
        word_ids({"two": 2.0}, None)


def test_model_and_folder_have_a_pointer_both_or_neither():
    folder = make_tokenizer(pointer=PointerRule(3))
    config = make_model(folder).config
    assert config.audio is not None and config.audio.pointer is not None
    unset = dataclasses.replace(config.audio, pointer=PointerConfig())
    _, audio = with_vocabulary(config.decoder, unset, folder)
    assert audio is not None and audio.pointer == PointerConfig(max_advance=3)
    with pytest.raises(ValueError, match=r"audio\.pointer\.max_advance is 2 but the tokenizer folder says 3"):
        wrong = dataclasses.replace(config.audio, pointer=PointerConfig(max_advance=2))
        with_vocabulary(config.decoder, wrong, folder)
    with pytest.raises(ValueError, match=r"the tokenizer folder has a pointer for speech, but audio\.pointer has none"):
        with_vocabulary(config.decoder, dataclasses.replace(config.audio, pointer=None), folder)
    with pytest.raises(ValueError, match=r"audio\.pointer has a pointer for speech, but the folder has none"):
        with_vocabulary(config.decoder, unset, make_tokenizer())
    with pytest.raises(ValueError, match=r"audio\.pointer\.before is 9; give 0 to 8"):
        PointerConfig(before=9)
