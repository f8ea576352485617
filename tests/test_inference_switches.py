"""With every switch of the decoder: what is generated with a cache is what training's packed forward pass computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmllm.batch import IGNORE, Modality
from mmllm.data.loading.collate import pack_documents
from mmllm.data.samples.decode import ImageInput
from mmllm.data.samples.document import Document, DocumentWriter
from mmllm.data.samples.documents import build_document, build_prompt
from mmllm.data.samples.schema import Sample
from mmllm.evaluation.perplexity import bits_of_documents
from mmllm.inference.api import Model
from mmllm.inference.engine.prompts import embed_prompts
from mmllm.inference.prompts import join, pad_left
from mmllm.model.audio_projectors import AudioProjectorConfig
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import AudioConfig, LossConfig, ModelConfig, MultimodalModel
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig
from mmllm.model.row_cache import Chunk, PromptStep, RunningStep
from mmllm.model.vision import VisionConfig
from tests.inference_fixtures import CLIP, images, make_tokenizer, sounds

WORDS = [20, 25, 31, 300, 41, 22]
BY_TURNS = ("sliding_attention", "full_attention") * 2
SWITCHES: dict[str, dict[str, Any]] = {
    "one key-value head, norm over the width": {"num_key_value_heads": 1, "qk_norm": "width"},
    "norm a head, all biases, yarn": {
        "qk_norm": "head", "attention_bias": "all", "rope_scaling": RopeScaling("yarn", 4.0, 16),
    },
    "windows": {"sliding_window": 3, "sliding_rope_theta": 50.0, "layer_types": BY_TURNS},
    "depths and windows": {"mod_layers": (1, 3), "mod_capacity": 0.5, "sliding_window": 4, "layer_types": BY_TURNS},
    "random depths": {"mod_layers": (1, 3), "mod_capacity": 0.5, "mod_router": "random"},
    "depths and experts": {"moe": {}, "moe_layers": (0, 2), "mod_layers": (1, 3), "mod_capacity": 0.3},
    "shared experts, a bias, pools": {
        "moe": {
            "n_shared_experts": 1, "use_expert_bias": True,
            "modality_experts": {"text": (0, 1), "image": (2, 3), "audio": (2, 3), "units": (2, 3)},
        },
    },
    "sigmoids in groups, not normalized": {
        "moe": {
            "num_experts": 8, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "router_z_loss_coef": 0.0,
            "norm_topk_prob": False, "routed_scaling_factor": 2.5, "use_expert_bias": True,
        },
    },
    "what is for training alone": {
        "moe": {"router_jitter_noise": 0.3, "expert_dropout": 0.5, "aux_loss_scope": "sequence"},
        "dropout": 0.5, "gradient_checkpointing": "selective", "loss": LossConfig(word_dropout=0.5),
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def _model(tokenizer, moe: dict[str, Any] | None = None, loss: LossConfig | None = None, **switches: Any):
    """Float64, and weights so large that every switch matters."""
    torch.manual_seed(3)
    experts = None
    if moe is not None:
        experts = MoEConfig(**{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **moe})
    vocabulary = tokenizer.vocabulary
    sizes: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    sizes |= {"vocab_size": vocabulary.size, "hidden_size": 32, "num_hidden_layers": 4, "moe": experts}
    projector = AudioProjectorConfig(pool=2, num_hidden_layers=1, kernel_size=3)
    config = ModelConfig(
        decoder=DecoderConfig(**{**sizes, **switches}),
        vision=VisionConfig(CLIP),
        audio=AudioConfig(vocabulary.num_codebooks, vocabulary.codebook_size, 8, projector),
        loss=loss or LossConfig(),
    )
    model = MultimodalModel(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision"):
                parameter.add_(torch.randn_like(parameter) * 0.25)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.normal_(std=0.3)
    return model.double().eval()


def _prompts(tokenizer) -> list[Document]:
    picture: ImageInput = images(1)[0]
    return [
        build_prompt("caption", tokenizer, image=picture),
        build_prompt("transcribe", tokenizer, audio=sounds(2)[1]),
        build_prompt("speak", tokenizer, text="one two three four", voice="he"),
    ]


def _said(tokenizer, ids: list[int]) -> Document:
    writer = DocumentWriter(tokenizer)
    writer.ids(ids, is_target=True)
    return writer.finish()


@torch.no_grad()
def _generated(model: MultimodalModel, prompts: list[Document]) -> torch.Tensor:
    """Hidden states from which each of `WORDS` is predicted, [prompts, words, D]."""
    decoder = model.decoder
    cache = decoder.make_row_cache()
    rows = [cache.allocate(prompt.num_tokens + len(WORDS)) for prompt in prompts]
    inputs = embed_prompts(model, prompts, [0] * len(prompts))
    step = PromptStep(
        [Chunk(row, prompt.num_tokens) for row, prompt in zip(rows, prompts, strict=True)],
        None if inputs[0].spans_T is None else torch.cat([each.spans_T for each in inputs]),
    )
    hidden_ND = decoder.continue_rows(
        torch.cat([each.x_TD for each in inputs]),
        torch.cat([torch.arange(prompt.num_tokens) for prompt in prompts]),
        torch.cat([each.modality_T for each in inputs]),
        step,
    )
    hidden = [hidden_ND[torch.tensor([prompt.num_tokens for prompt in prompts]).cumsum(0) - 1]]
    for row in rows:
        cache.start(row)
    (slab,) = cache.slabs
    assert slab.rows == rows
    text_N = torch.full((len(rows),), int(Modality.TEXT))
    for word in WORDS[:-1]:
        running = RunningStep(slab)
        x_ND = decoder.embed(torch.full((len(rows),), word))
        hidden.append(decoder.continue_rows(x_ND, running.lengths_N, text_N, running))
    return torch.stack(hidden, dim=1)


@pytest.mark.parametrize("prefix", ["none", "media", "prompt", "encoder"])
@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_generating_computes_what_training_computed(tokenizer, switches: dict[str, Any], prefix: str) -> None:
    if prefix == "encoder" and ("mod_layers" in switches or "aux_loss_scope" in switches.get("moe", {})):
        pytest.skip("an encoder is refused beside these")
    seen = {"encoder_layers": 2} if prefix == "encoder" else {"prefix": prefix}
    model, prompts = _model(tokenizer, **seen, **switches), _prompts(tokenizer)
    got = _generated(model, prompts)
    before = build_prompt("caption", tokenizer, image=images(3)[2])
    for row, prompt in enumerate(prompts):
        document = join([prompt, _said(tokenizer, WORDS)])
        batch = pack_documents([[before, document]], before.num_tokens + document.num_tokens + 3)
        with torch.no_grad():
            hidden_TD = model.hidden(batch)[0]
        wanted = hidden_TD[(batch.labels_BT[0] != IGNORE) & (batch.document_ids_BT[0] == 1)]
        torch.testing.assert_close(got[row], wanted, rtol=1e-9, atol=1e-9)


def test_a_prefix_matters_to_what_is_generated(tokenizer) -> None:
    prompts = _prompts(tokenizer)[:1]
    plain, *others = (_generated(_model(tokenizer, prefix=prefix), prompts) for prefix in ("none", "media", "prompt"))
    assert all((plain - other).abs().max() > 1e-3 for other in others)


def test_bits_of_text_do_not_see_the_answer_under_a_prompt_prefix(tokenizer) -> None:
    model = _model(tokenizer, prefix="prompt")
    text = "a red circle above two blue squares"
    document = build_document(Sample("x", text), "text", tokenizer)
    batch = pack_documents([[document]], document.num_tokens)
    with torch.no_grad():
        nats = F.cross_entropy(model.logits(batch)[0], batch.labels_BT[0], ignore_index=IGNORE, reduction="sum")
    (bits,) = bits_of_documents(Model(model, tokenizer), [text], window=1024)
    assert bits == pytest.approx(float(nats) / np.log(2), rel=1e-5)


def test_earlier_answers_of_a_conversation_are_no_prompt(tokenizer) -> None:
    """As in training, where the first thing that the assistant says is the first target."""
    model = _model(tokenizer, prefix="prompt")
    roles = (("user", "one?"), ("assistant", "two"), ("user", "three?"))
    prompt = Model(model, tokenizer).chat_prompt([{"role": role, "content": text} for role, text in roles])
    spans_T = model.spans(pad_left([prompt]))
    first = Model(model, tokenizer).chat_prompt([{"role": "user", "content": "one?"}])
    assert spans_T is not None
    assert spans_T[0].tolist() == [0] * first.num_tokens + [-1] * (prompt.num_tokens - first.num_tokens)
