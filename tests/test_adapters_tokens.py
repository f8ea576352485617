"""Prompt and prefix tuning: against PEFT's on transformers' model, packed against one by one, with a cache, trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import add_adapter, load_adapter, merge_adapter, save_adapter, set_adapter
from mmllm.checkpoints.folder import load_model
from mmllm.inference.api import load
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.training.lightning_cli import quiet_lightning
from mmllm.training.optimizers import OptimizerConfig
from tests.cached_decoding import CachedRows
from tests.test_adapters import ids, logits_of, made, make_decoder, text_logits, their_model  # noqa: F401
from tests.test_training_adapters import base, batches, fit, make_module, weights_of  # noqa: F401
from tests.training_fixtures import ListData, LossRecorder, quiet_trainer

peft = pytest.importorskip("peft")
torch.set_num_threads(1)
KINDS = ("prompt_tuning", "prefix_tuning")
pytestmark = pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor that is not a leaf:UserWarning")


def adapted(kind: Any, is_moe: bool = False, num_tokens: int = 5, **changes: Any) -> Decoder:
    decoder = make_decoder(is_moe, **changes)
    add_adapter(decoder, AdapterConfig(kind, num_virtual_tokens=num_tokens), "mine")
    torch.manual_seed(4)
    with torch.no_grad():
        decoder.virtual_tokens["mine"].prompt_embeddings.normal_(std=0.7)  # type: ignore[union-attr]
    return decoder


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_moe", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_files_are_those_of_peft_on_transformers(kind: str, is_moe: bool, tmp_path: Path) -> None:
    decoder = adapted(kind, is_moe)
    plain = logits_of(make_decoder(is_moe), ids())
    save_adapter(tmp_path / "a", decoder, "mine", {})
    theirs = peft.PeftModel.from_pretrained(their_model(decoder), str(tmp_path / "a"))
    theirs.prompt_encoder["default"].embedding.weight.requires_grad_(True)
    ours = logits_of(decoder, ids())
    logits = theirs(input_ids=ids(), attention_mask=torch.ones_like(ids())).logits[:, -ids().shape[1] :]
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, plain, atol=1e-2)
    ours.square().sum().backward()
    logits.square().sum().backward()
    wanted = theirs.prompt_encoder["default"].embedding.weight.grad
    tokens: Any = decoder.virtual_tokens["mine"]
    torch.testing.assert_close(tokens.prompt_embeddings.grad, wanted, rtol=2e-3, atol=2e-3)

    theirs.save_pretrained(str(tmp_path / "theirs"))
    fresh = make_decoder(is_moe)
    load_adapter(fresh, tmp_path / "theirs", "other")
    set_adapter(fresh, "other")
    torch.testing.assert_close(logits_of(fresh, ids()), ours)
    set_adapter(fresh, None)
    torch.testing.assert_close(logits_of(fresh, ids()), plain)


@pytest.mark.parametrize("backend", ["buckets", "dense"])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_are_as_each_alone(kind: str, backend: str) -> None:
    decoder = adapted(kind, True, attention_backend=backend)
    lengths, rows = [(3, 5), (7,), (1, 2, 4)], torch.full((3, 9), 7)
    documents = torch.full((3, 9), -1)
    positions = torch.zeros(3, 9, dtype=torch.int64)
    for row, sizes in enumerate(lengths):
        start = 0
        for number, size in enumerate(sizes):
            stop = start + size
            documents[row, start:stop], positions[row, start:stop] = number, torch.arange(size)
            rows[row, start:stop] = torch.randint(60, (size,))
            start = stop
    modality = torch.zeros_like(rows)
    hidden, stats = decoder(decoder.embed(rows), positions, documents, modality_BT=modality)
    for row in range(3):
        for number in range(len(lengths[row])):
            here = documents[row] == number
            alone = logits_of(decoder, rows[row][here][None])
            torch.testing.assert_close(decoder.head(hidden[row][here])[None], alone, rtol=1e-4, atol=1e-4)
    assert (hidden[documents < 0] == 0).all()
    assert int(stats.counts_LE.sum()) == 2 * 2 * int((documents >= 0).sum()), "learned tokens are in no count"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_gives_the_same(kind: str) -> None:
    decoder = adapted(kind, True)
    ids_BT = ids()
    wanted = logits_of(decoder, ids_BT)
    cached = CachedRows(decoder, 2, 12)
    lengths, got = (9, 6), []
    padded = torch.zeros(2, 6, dtype=torch.int64)
    padded[0], padded[1, 3:] = ids_BT[0, :6], ids_BT[1, :3]  # left-padded, as prompts are
    documents = torch.zeros(2, 6, dtype=torch.int64)
    documents[1, :3] = -1
    steps: list[tuple[Tensor, Tensor]] = [(padded, documents)]
    for step in range(3):
        column = torch.stack([ids_BT[0, 6 + step], ids_BT[1, 3 + step]])[:, None]
        steps.append((column, torch.zeros(2, 1, dtype=torch.int64)))
    with torch.no_grad():
        for step_ids, document in steps:
            got.append(decoder.head(cached(decoder.embed(step_ids), document)))
    whole = torch.cat(got, dim=1)
    torch.testing.assert_close(whole[0], wanted[0, : lengths[0]], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(whole[1, 3:], wanted[1, : lengths[1]], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_it_trains_is_exported_and_generates(base: Path, tmp_path: Path, kind: Any) -> None:  # noqa: F811
    adapter = AdapterConfig(kind, num_virtual_tokens=4)
    module = make_module(base, adapter, out=str(tmp_path / "out"), adapter_name="tokens")
    module.configure_model()
    before = weights_of(module)
    fit(module, 3)
    name = "model.decoder.virtual_tokens.tokens.prompt_embeddings"
    moved = {n for n, weight in module.named_parameters() if not torch.equal(weight, before[n])}
    assert name in moved and not any(".self_attn." in each or ".mlp." in each for each in moved)
    model = load(tmp_path / "out", adapter="tokens")
    assert model.adapters == ["tokens"]
    with torch.no_grad():
        torch.testing.assert_close(text_logits(model.model), text_logits(module.model))
    said = model.generate([["one two"], ["a red circle above"]], max_new_tokens=6)
    assert said == [model.generate(prompt, max_new_tokens=6) for prompt in ("one two", "a red circle above")]
    model.set_adapter(None)
    torch.testing.assert_close(text_logits(model.model), text_logits(load_model(tmp_path / "out").model))
    with pytest.raises(ValueError, match="which no weights can hold"):
        merge_adapter(model.model.decoder, "tokens")


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_is_learnt_by_tokens_alone(base: Path, kind: Any) -> None:  # noqa: F811
    optimizer = OptimizerConfig(lr=0.3, warmup=0.0, min_lr_ratio=1.0)
    module = make_module(base, AdapterConfig(kind, num_virtual_tokens=8), optimizer=optimizer)
    recorder = LossRecorder()
    with quiet_lightning():
        quiet_trainer(recorder, max_steps=25).fit(module, datamodule=ListData(batches(1) * 25))
    assert min(recorder.losses[-3:]) < 0.9 * recorder.losses[0], recorder.losses


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_same_when_recomputed_and_compiled(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for mode, is_compiled in (("none", False), ("full", False), ("selective", False), ("none", True)):
        decoder = adapted(kind, gradient_checkpointing=mode).train()
        if is_compiled:
            torch._dynamo.reset()
            decoder.compile_layers(backend="aot_eager")
        logits_of(decoder, ids()).square().sum().backward()
        results.append(decoder.virtual_tokens["mine"].prompt_embeddings.grad)  # type: ignore[union-attr]
    for gradient in results[1:]:
        torch.testing.assert_close(gradient, results[0], rtol=1e-4, atol=1e-4)


def test_lora_and_tokens_lie_side_by_side(made: Path) -> None:  # noqa: F811
    loaded = load_model(made)
    decoder = loaded.model.decoder
    add_adapter(decoder, AdapterConfig("prefix_tuning", num_virtual_tokens=3), "prefix")
    save_adapter(made / "adapters" / "prefix", decoder, "prefix", {})
    (made / "adapters" / "prefix" / "base.json").unlink()
    prefixed = text_logits(loaded.model)
    model = load(made, adapter=["first", "prefix"])
    assert model.adapters == ["first", "prefix"]
    apart = text_logits(load_model(made, adapter="first").model)
    torch.testing.assert_close(text_logits(model.model), apart)
    model.set_adapter("prefix")
    torch.testing.assert_close(text_logits(model.model), prefixed)
    model.set_adapter("first")
    torch.testing.assert_close(text_logits(model.model), apart)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AdapterConfig("prompt_tuning", r=4), r"adapter\.r is given, but kind is prompt_tuning"),
        (lambda: AdapterConfig("prompt_tuning", num_virtual_tokens=0), "num_virtual_tokens is 0"),
        (lambda: AdapterConfig("ia3"), "kind is 'ia3'; choose lora, prompt_tuning, prefix_tuning"),  # type: ignore[arg-type]
        (
            lambda: add_adapter(Decoder(DecoderConfig(40, sliding_window=4)), AdapterConfig("prefix_tuning"), "a"),
            r"decoder\.sliding_window is 4.*choose adapter\.kind lora",
        ),
        (
            lambda: add_adapter(Decoder(DecoderConfig(40, prefix="media")), AdapterConfig("prompt_tuning"), "a"),
            r"decoder\.prefix is media",
        ),
    ],
)
def test_what_cant_have_tokens_is_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_tokens_of_another_base_are_refused(tmp_path: Path) -> None:
    save_adapter(tmp_path / "a", adapted("prefix_tuning"), "mine", {})
    with pytest.raises(ValueError, match=r"prompt_embeddings of shape \[5, 64\], but the decoder wants \[5, 128\]"):
        load_adapter(make_decoder(False, head_dim=16), tmp_path / "a", "mine")
