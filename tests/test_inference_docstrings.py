"""The examples in the docstrings of `mmllm.load` and `Model` do what they say."""

from __future__ import annotations

import asyncio
import doctest

import numpy as np
import soundfile
from PIL import Image

import mmllm
from mmllm.checkpoints.folder import save_model
from mmllm.inference import api
from tests.inference_fixtures import RATE, images, make


def test_every_example_runs(tmp_path, monkeypatch):
    model = make()
    save_model(tmp_path / "model", model.model, model.tokenizer, generation=model.generation)
    Image.fromarray(images(1)[0]).save(tmp_path / "cat.jpg")
    wave = np.random.default_rng(0).normal(0, 0.2, RATE // 2).astype(np.float32)
    soundfile.write(tmp_path / "talk.wav", wave, RATE)
    monkeypatch.chdir(tmp_path)
    names = {"mmllm": mmllm, "asyncio": asyncio, "folder": tmp_path / "model"}
    found = doctest.DocTestFinder(recurse=True).find(api, "api", globs=names, extraglobs=names)
    examples = [each for each in found if each.examples]
    runner = doctest.DocTestRunner(verbose=False)
    reports: list[str] = []
    for each in examples:
        each.globs = dict(names)
        runner.run(each, out=reports.append)
    assert runner.failures == 0, "".join(reports)
    methods = {each.name.rsplit(".", 1)[-1] for each in examples}
    public = {"caption", "transcribe", "answer", "generate", "chat", "speak", "stream", "astream", "embed", "score"}
    assert public | {"load"} <= methods, "each public method has an example"
