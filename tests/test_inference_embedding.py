"""Vectors and scores, against slow references; and what the environment is told before torch is imported."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import mmllm
from mmllm.inference.prompts import join, pad_left
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.vision import VisionConfig
from mmllm.training.clip_module import save_clip, with_text_tokens
from mmllm_tokenizers.vocab import END, PAD
from tests.inference_fixtures import CLIP, images, make, sounds


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def clip_model(tmp_path_factory, model):
    """A model with the CLIP of its tower, and that CLIP."""
    folder = tmp_path_factory.mktemp("clip")
    text = model.tokenizer.text
    config = with_text_tokens(VisionConfig(CLIP), text.vocab_size, text.id(END), text.id(PAD))
    torch.manual_seed(3)
    clip = build_clip(config).eval()
    save_clip(folder, clip, config)
    return mmllm.Model(model.model, model.tokenizer, clip=folder), clip, folder


def test_the_decoders_space_is_its_hidden_states(model):
    inputs = [images(1)[0], sounds(2)[1], "a red circle", ["see ", images(2)[1], " and"]]
    prompts = [model.continuation_prompt(mmllm.inference.inputs.parse_parts(each)) for each in inputs]
    for pooling in ("mean", "last"):
        vectors = model.embed(inputs, pooling=pooling, normalize=False)
        for prompt, vector_D in zip(prompts, vectors, strict=True):
            with torch.no_grad():
                hidden_TD = model.model.hidden(pad_left([prompt]))[0]
            expected_D = hidden_TD.mean(dim=0) if pooling == "mean" else hidden_TD[-1]
            torch.testing.assert_close(vector_D, expected_D, atol=1e-5, rtol=1e-5)
        ones = model.embed(inputs, pooling=pooling)
        for vector_D, one_D in zip(vectors, ones, strict=True):
            torch.testing.assert_close(one_D, vector_D / vector_D.norm())
    torch.testing.assert_close(model.embed("a red circle"), model.embed(inputs)[2])
    assert model.embed([]) == []


def test_clips_space_holds_pictures_and_text(clip_model):
    model, clip, _ = clip_model
    pictures, texts = images(3), ["a red circle", "two", "two blue squares, he said: one, two, three one two three"]
    vectors = model.embed([pictures[0], texts[0], *pictures[1:], *texts[1:]], space="clip", normalize=False)
    order = [0, 2, 3], [1, 4, 5]
    text = model.tokenizer.text
    with torch.no_grad():
        for place, picture in zip(order[0], pictures, strict=True):
            pixels = torch.from_numpy(model.image_transform(picture)).float()
            mean, std = (torch.tensor(each).view(3, 1, 1) * 255 for each in clip_statistics())
            torch.testing.assert_close(vectors[place], clip.encode_image(((pixels - mean) / std)[None])[0])
        for place, words in zip(order[1], texts, strict=True):
            ids = [*text.encode(words)[:7], text.id(END)]
            padded = torch.tensor([ids + [text.id(PAD)] * (8 - len(ids))])
            torch.testing.assert_close(vectors[place], clip.encode_text(padded)[0])
    assert float(model.embed("two", space="clip").norm()) == pytest.approx(1.0)


def clip_statistics():
    from mmllm.model.vision import pixel_statistics

    return pixel_statistics(VisionConfig(CLIP))


def test_what_clips_space_has_no_place_for_is_said(model, clip_model, tmp_path):
    with pytest.raises(ValueError, match="space is 'clip', but the model has the image side of a CLIP alone"):
        model.embed("a", space="clip")
    both, _, folder = clip_model
    with pytest.raises(ValueError, match=r"inputs\[0\] is a sound; CLIP's space holds one image or one text"):
        both.embed(sounds(1)[0], space="clip")
    with pytest.raises(ValueError, match=r"inputs\[1\] is text, an image"):
        both.embed(["a", ["see ", images(1)[0]]], space="clip")
    with pytest.raises(ValueError, match=r"space is 'clap'; give 'decoder' or 'clip' \(did you mean clip\?\)"):
        model.embed("a", space="clap")
    with pytest.raises(ValueError, match="pooling is None"):
        model.embed("a", pooling=None)
    with pytest.raises(FileNotFoundError, match=r"lacks config\.json; give the `out` folder"):
        mmllm.Model(model.model, model.tokenizer, clip=tmp_path).embed("a", space="clip")
    config = (folder / "config.json").read_text()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    size = f'"vocab_size": {model.tokenizer.text.vocab_size}'
    (tmp_path / "config.json").write_text(config.replace(size, '"vocab_size": 9'))
    with pytest.raises(ValueError, match="reads 9 text tokens, the model's tokenizer has"):
        mmllm.Model(model.model, model.tokenizer, clip=tmp_path).embed("a", space="clip")
    wide = dataclasses.replace(model.image_transform, size=32)
    with pytest.raises(ValueError, match="sees 16 pixels a side, the model 32"):
        mmllm.Model(model.model, model.tokenizer, wide, clip=folder).embed("a", space="clip")


def slow_score(model: mmllm.Model, prompt, continuation: str) -> float:
    """Token by token, each with a pass of its own."""
    from mmllm.data.samples.document import DocumentWriter

    total = 0.0
    ids = model.tokenizer.text.encode(continuation)
    for place, token in enumerate(ids):
        writer = DocumentWriter(model.tokenizer)
        writer.ids(ids[:place], is_target=True)
        with torch.no_grad():
            hidden_D = model.model.hidden(pad_left([join([prompt, writer.finish()])]))[0, -1].double()
        logits_V = model.model.decoder.head_weight_VD[: model.model.config.num_text].double() @ hidden_D
        total += logits_V.log_softmax(dim=-1)[token].item()
    return total


def test_scores_are_sums_of_log_probabilities(model):
    picture, sound = images(1)[0], sounds(1)[0]
    prompts = [["see ", picture], sound, model.caption_prompt(picture), "a red", ["a ", "red"]]
    texts = ["a red circle", "one, two", "two blue squares", " circle", " circle"]
    scores = model.score(prompts, texts)
    assert scores == pytest.approx([model.score(*pair) for pair in zip(prompts, texts, strict=True)], abs=1e-4)
    documents = [
        model.continuation_prompt(mmllm.inference.inputs.parse_parts(prompts[0])),
        model.continuation_prompt(mmllm.inference.inputs.parse_parts(sound)),
        prompts[2],
        model.prompter.plain(["a red"]),
        model.prompter.plain(["a red"]),
    ]
    for score, document, text in zip(scores, documents, texts, strict=True):
        assert score == pytest.approx(slow_score(model, document, text), abs=1e-4)
    assert model.score("a", "") == 0.0
    with pytest.raises(ValueError, match="prompt 0 is '', which has no token"):
        model.score("", "a")


def test_a_models_own_text_is_as_probable_as_its_completion_says(model):
    said = model.caption(images(1)[0])
    drawn = np.sum(said.logprobs[: len(said.ids)])
    # its probabilities are among what may be drawn, those of `score` among all text ids
    assert drawn >= model.score(model.caption_prompt(images(1)[0]), said) - 1e-4


def test_idle_threads_sleep_for_whoever_imports_mmllm_first():
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}

    def run(code: str, **more: str) -> list[str]:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=clean | more, capture_output=True, text=True, check=True)
        return (done.stdout + done.stderr).split()

    say = "import os; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert run(f"import mmllm; {say}") == ["30000"]
    assert run(f"import mmllm; {say}", GOMP_SPINCOUNT="7") == ["7"], "what is set stays"
    log = "import logging, sys, types; logging.basicConfig(level='DEBUG'); sys.modules['torch'] = types.ModuleType('t')"
    late = run(f"{log}; import mmllm; {say}")
    assert late[0] == "None" and "GOMP_SPINCOUNT=30000" in late
