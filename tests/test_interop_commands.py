"""`mmllm export`, `mmllm import`, and training that starts from what they wrote."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmllm.cli.main import main
from mmllm.inference.folder import load_model, save_model
from mmllm.interop.transformers import from_mixtral
from mmllm.model.config import config_from_dict
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.text import TextTokenizer
from tests.inference_fixtures import make_model, make_tokenizer

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command prints, in one line."""
    assert main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    lines = (printed.err if code else printed.out).strip().splitlines()
    assert len(lines) == 1 and not (printed.out if code else printed.err), printed
    return lines[0]


def save_tiny(folder: Path, **changes: Any) -> tuple[MultimodalModel, TokenizerFolder]:
    """A model with experts in every layer, saved with its tokenizer folder beside it."""
    tokenizer = make_tokenizer()
    config = make_model(tokenizer).config
    torch.manual_seed(2)
    model = MultimodalModel(
        dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, **{"moe_layers": "all", **changes}))
    )
    save_model(folder / "model", model, tokenizer)
    tokenizer.save(folder / "tokenizer")
    return model, tokenizer


def logits_of(decoder: Decoder, ids_BT: torch.Tensor) -> torch.Tensor:
    positions_BT = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    with torch.no_grad():
        return decoder.head(decoder(decoder.embed(ids_BT), positions_BT, torch.zeros_like(ids_BT))[0])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mixtral", {}),
        ("mixtral", {"tie_word_embeddings": False}),
        ("qwen3_moe", {"qk_norm": True, "moe_layers": (1,)}),
    ],
)
def test_an_exported_model_gives_the_same_logits_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, changes: dict[str, Any]
) -> None:
    model, _ = save_tiny(tmp_path, **changes)
    said = run(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "out")
    assert f"the decoder as {family}" in said
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    capsys.readouterr()
    ids_BT = torch.randint(0, model.config.decoder.vocab_size, (2, 17), generator=torch.Generator().manual_seed(0))
    ours = logits_of(load_model(tmp_path / "model").model.decoder, ids_BT)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BT).logits, ours, rtol=1e-5, atol=1e-5)


def test_what_no_family_computes_exits_with_2_and_names_the_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, moe_layers=(1,))
    assert "layer 0 is dense" in run(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "x", code=2)
    assert not (tmp_path / "x").exists()


@pytest.fixture
def mixtral(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A random Mixtral, with as many ids as the tokenizer of `make_tokenizer`: by chance, as it were."""
    config = transformers.MixtralConfig(
        vocab_size=make_tokenizer().vocabulary.size, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(3)  # `make_tokenizer` sets another
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    capsys.readouterr()
    return tmp_path / "mixtral"


def started_from(folder: Path, tokenizer: Path, **changes: Any) -> Decoder:
    """The decoder that training would start with."""
    config = config_from_dict(DecoderConfig, json.loads((folder / "decoder.json").read_text()))
    module = DecoderModule(
        decoder=dataclasses.replace(config, **changes), tokenizer=str(tokenizer), init_from=str(folder)
    )
    module.configure_model()
    assert module.model is not None
    return module.model.decoder


def test_training_starts_with_the_imported_weights_but_not_with_foreign_embeddings(
    tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said = run(capsys, "import", mixtral, "--out", tmp_path / "decoder")
    assert f"init_from={tmp_path / 'decoder'}" in said
    make_tokenizer().save(tmp_path / "tokenizer")
    with caplog.at_level(logging.WARNING):
        decoder = started_from(tmp_path / "decoder", tmp_path / "tokenizer")
    assert "stay random" in caplog.text
    theirs = from_mixtral(mixtral)
    assert decoder.config == theirs.config
    vocabulary = {"embed_tokens.weight", "lm_head.weight"}
    ours = decoder.state_dict()
    differing = {name for name, tensor in theirs.state_dict().items() if not torch.equal(ours[name], tensor)}
    assert differing == vocabulary, "equal sizes don't make equal ids"
    # the rest computes what the checkpoint computed: with its embeddings, its logits
    own = {name: theirs.state_dict()[name] for name in vocabulary}
    decoder.load_state_dict(own, strict=False)
    ids_BT = torch.arange(12).view(2, 6)
    model = transformers.AutoModelForCausalLM.from_pretrained(mixtral, local_files_only=True)
    with torch.no_grad():
        torch.testing.assert_close(logits_of(decoder.eval(), ids_BT), model(ids_BT).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_come_back_with_the_tokenizer_that_they_were_exported_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tied: bool
) -> None:
    model, tokenizer = save_tiny(tmp_path, tie_word_embeddings=tied)
    run(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "out")
    # as after training in transformers: what it writes keeps the hash
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "trained")
    capsys.readouterr()
    run(capsys, "import", tmp_path / "trained", "--out", tmp_path / "decoder")
    decoder = started_from(tmp_path / "decoder", tmp_path / "tokenizer")
    weights = model.decoder.state_dict()
    assert weights.keys() == decoder.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in decoder.state_dict().items())
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        started_from(tmp_path / "decoder", tmp_path / "tokenizer", tie_word_embeddings=not tied)
    # another tokenizer of the same size
    text = TextTokenizer.train(["one two, three: four blue circles he said above squares"] * 3, vocab_size=320)
    text = text if text.vocab_size == tokenizer.text.vocab_size else tokenizer.text
    other = TokenizerFolder(text, tokenizer.audio, dataclasses.replace(tokenizer.config, audio_pool=3))
    assert other.vocabulary == tokenizer.vocabulary and other.hash != tokenizer.hash
    other.save(tmp_path / "other")
    random = started_from(tmp_path / "decoder", tmp_path / "other")
    assert not torch.equal(random.embed_tokens.weight, weights["embed_tokens.weight"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": 500.0}, r"decoder\.rope_theta is 500\.0 but the imported decoder has"),
        ({"num_hidden_layers": 1}, r"decoder\.num_hidden_layers is 1 but the imported decoder has 2"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 4}, r"decoder\.num_attention_heads is 2"),
        ({"moe_layers": (1,)}, r"decoder\.has_experts\(0\) is False"),
        ({"hidden_size": 24}, r"decoder\.hidden_size is 24"),
    ],
)
def test_a_decoder_that_computes_something_else_is_refused(
    tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    run(capsys, "import", mixtral, "--out", tmp_path / "decoder")
    make_tokenizer().save(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=said):
        started_from(tmp_path / "decoder", tmp_path / "tokenizer", **changes)


def test_damaged_imports_are_named(tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_tokenizer().save(tmp_path / "tokenizer")
    folder = tmp_path / "decoder"
    run(capsys, "import", mixtral, "--out", folder)
    whole = load_file(folder / "decoder.safetensors")
    save_file({name: tensor for name, tensor in whole.items() if name != "norm.weight"}, folder / "decoder.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight is missing in .*decoder\.safetensors"):
        started_from(folder, tmp_path / "tokenizer")
    (folder / "decoder.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"decoder\.safetensors can't be read"):
        started_from(folder, tmp_path / "tokenizer")
    (folder / "decoder.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"decoder\.safetensors doesn't exist; `mmllm import` writes it"):
        started_from(folder, tmp_path / "tokenizer")


NORM, EXPERT = "model.layers.0.input_layernorm.weight", "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(NORM), f"lacks weights {NORM}"),
        (lambda weights: weights.pop(EXPERT), "missing in model.layers.1.mlp.experts"),
        (lambda weights: weights.update({NORM: torch.zeros(7)}), f"wrong shape for weights {NORM}"),
        (lambda weights: weights.update({"model.layers.2.x": torch.zeros(7)}), "unknown weights model.layers.2.x"),
    ],
)
def test_checkpoints_that_transformers_would_fill_in_at_random_exit_with_2(
    tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str], change: Any, said: str
) -> None:
    weights = load_file(mixtral / "model.safetensors")
    change(weights)
    save_file(weights, mixtral / "model.safetensors", metadata={"format": "pt"})
    message = run(capsys, "import", mixtral, "--out", tmp_path / "decoder", code=2)
    assert said in message and str(mixtral) in message
    assert not (tmp_path / "decoder").exists()


def test_other_sources_exit_with_2_and_name_the_file(
    tmp_path: Path, mixtral: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(source: Path) -> str:
        return run(capsys, "import", source, "--out", tmp_path / "decoder", code=2)

    weights = mixtral / "model.safetensors"
    assert "is no folder" in refused(weights)
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"the weights in {mixtral} can't be read" in refused(mixtral)
    weights.unlink()
    assert str(mixtral) in refused(mixtral)
    (mixtral / "config.json").write_text("{")
    assert str(mixtral / "config.json") in refused(mixtral)
    shutil.rmtree(mixtral)
    assert f"{mixtral} is no folder" in refused(mixtral)
