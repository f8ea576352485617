"""An encoder-decoder in the engine: each answer is what whole passes find, whatever else runs; what batches know."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from mmllm.checkpoints.folder import load_model, save_model
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.sample import Sample
from mmllm.inference.api import Model
from mmllm.inference.engine.engine import Engine
from mmllm.inference.engine.requests import EngineConfig, Request, SpeechRequest, TextRequest, TextResult
from mmllm.model.flops import Work
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.drafting import begin_draft
from tests.inference_fixtures import images, make, sounds
from tests.test_inference_engine import DRAWN, LONG_TEXT, SHORT, alone, check_equal, prompt_of, uncached_ids


@pytest.fixture(scope="module")
def model() -> Model:
    """Three layers, the first of which is the encoder, with convolutions and experts."""
    torch.manual_seed(2)
    plain = make()
    config = plain.model.config
    decoder = dataclasses.replace(config.decoder, num_hidden_layers=3, encoder_layers=1, conv_size=3, moe_layers=(0, 2))
    made = MultimodalModel(dataclasses.replace(config, decoder=decoder))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.dim() > 1 and not name.startswith("vision"):
                parameter.normal_(std=0.25)
    return Model(made.eval(), plain.tokenizer, generation=plain.generation)


def test_what_is_written_is_what_whole_passes_find(model):
    requests = [TextRequest(prompt_of(model, number), max_new_tokens=6) for number in range(6)]
    for request, result in zip(requests, Engine(model.model, model.tokenizer).run(requests), strict=True):
        assert isinstance(result, TextResult) and list(result.ids) == uncached_ids(model, request.prompt, 6)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(prefill_tokens=7),
        EngineConfig(deterministic=True),
        EngineConfig(speculation="lookup"),
        EngineConfig(kv_dtype="bfloat16"),
    ],
    ids=["usual", "long prompts", "deterministic", "speculation", "fewer bits"],
)
def test_each_request_gets_what_it_would_get_alone(model, config):
    requests: list[Request] = [
        TextRequest(prompt_of(model, number), DRAWN, 5 + number, number=number, num_logprobs=2) for number in range(5)
    ]
    speech = build_prompt("speak", model.tokenizer, text=LONG_TEXT[:12], voice="he")
    requests.append(SpeechRequest(speech, (DRAWN,), 6, SHORT, 5))
    results = Engine(model.model, model.tokenizer, config).run(requests)
    if config.kv_dtype == "auto":
        check_equal(results, alone(model, requests))


def test_a_prompts_own_tokens_are_scored_where_they_are_predicted(model):
    document = build_document(Sample("a", "a red circle", images(1)[0]), "caption", model.tokenizer)
    (result,) = Engine(model.model, model.tokenizer).run(
        [TextRequest(document, max_new_tokens=1, prompt_logprobs=True)]
    )
    assert isinstance(result, TextResult) and result.prompt_logprobs is not None
    first = int(document.targets_T.argmax())
    assert result.prompt_logprobs[:first] == (None,) * first
    batch = pack_documents([[document]], document.num_tokens)
    with torch.no_grad():
        logits_TV = model.model.logits(batch)[0, :, : model.model.config.num_text]
    nats_TV = logits_TV.log_softmax(dim=-1)
    nats = [float(nats_TV[place - 1, document.token_ids_T[place]]) for place in range(first, len(nats_TV))]
    assert list(result.prompt_logprobs[first:]) == pytest.approx(nats, abs=1e-4)


def test_the_host_knows_what_the_device_finds(model):
    """Where prompts end, of pictures, sounds, what is spoken, texts, and documents without a target."""
    folder, picture = model.tokenizer, images(1)[0]
    documents = [
        build_document(Sample("c", "a red circle", picture), "caption", folder),
        build_document(Sample("t", "he said", audio=sounds(1)[0]), "transcribe", folder),
        build_document(Sample("s", "he said", audio=sounds(2)[1]), "speak", folder),
        build_document(Sample("x", "two blue squares"), "text", folder),
        build_prompt("caption", folder, image=picture),
    ]
    length = sum(document.num_tokens for document in documents)
    for multiple in (1, 16):
        batch = pack_documents([documents, documents[:1]], length + 3).with_metadata(multiple)
        spans_BT = model.model.spans(batch)
        assert batch.metadata is not None and spans_BT is not None
        sequences = batch.metadata.sequences
        found = [
            int((spans_BT[row] == number).sum()) for row in (0, 1) for number in range(len(documents) if not row else 1)
        ]
        assert sequences.num_prompt is not None and list(sequences.num_prompt[: len(found)]) == found
        starts = [int(document.targets_T.argmax()) - 1 for document in documents[:4]]
        assert found[:5] == [*starts, documents[4].num_tokens - 1] and found[3] == 0
        assert Work.of(batch).prompts == tuple(found)


def test_a_folder_keeps_it_and_drafts_are_refused(model, tmp_path: Path):
    save_model(tmp_path / "m", model.model, model.tokenizer)
    again = load_model(tmp_path / "m")
    assert again.model.config.decoder.encoder_layers == 1
    with pytest.raises(ValueError, match=r"encoder_layers is 1: a copy with some of its layers"):
        begin_draft(model.model, 2)
