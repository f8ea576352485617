"""Models that were trained here: out to transformers with their tokenizers, and back."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mmllm
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.cli.main import main
from mmllm.model.decoder import Decoder
from mmllm.model.multimodal import MultimodalModel
from mmllm.training.decoder_module import DecoderModule
from mmllm_tokenizers.folder import TokenizerFolder
from tests.inference_fixtures import make_model, make_tokenizer
from tests.pretrained_fixtures import saved_kind

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")


def run(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What a command prints, in one line."""
    assert main([str(argument) for argument in arguments]) == code
    printed = capsys.readouterr()
    lines = (printed.err if code else printed.out).strip().splitlines()
    assert len(lines) == 1 and not (printed.out if code else printed.err), printed
    return lines[0]


def output(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """All that a command prints."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


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
        ("llama", {"moe": None}),
    ],
)
@pytest.mark.parametrize("keep", [False, True])
def test_an_exported_model_gives_the_same_logits_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, changes: dict[str, Any], keep: bool
) -> None:
    _, tokenizer = save_tiny(tmp_path, **changes)
    options = ["--keep_added"] if keep else []
    said = json.loads(
        output(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "out", "--json", *options)
    )
    assert said["family"] == family and said["format"] == "decoder"
    left = {"image tower", "image projector", "audio front end", "codec"} | (set() if keep else {"audio units"})
    assert set(said["left_behind"]) == left and "image_projector.kind" in said["left_behind"]["image tower"]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    capsys.readouterr()
    num_rows = tokenizer.vocabulary.size if keep else tokenizer.vocabulary.num_text
    assert theirs.config.vocab_size == num_rows == said["num_rows"]
    ids_BT = torch.randint(0, num_rows, (2, 17), generator=torch.Generator().manual_seed(0))
    ours = logits_of(load_model(tmp_path / "model").model.decoder, ids_BT)[..., :num_rows]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids_BT).logits, ours, rtol=1e-5, atol=1e-5)
    assert theirs.generation_config.eos_token_id == tokenizer.id("<|end|>")


def test_it_goes_out_with_its_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, tokenizer = save_tiny(tmp_path)
    output(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    for text in ("a red circle", "naïve <b> 12", "ünïcödé 漢字"):
        assert theirs(text)["input_ids"] == tokenizer.text.encode(text)
        assert theirs.decode(theirs(text)["input_ids"]) == text
    assert theirs("<|text|>a<|end|>")["input_ids"] == tokenizer.text.encode_template("<|text|>a<|end|>")
    assert (theirs.eos_token, theirs.pad_token) == ("<|end|>", "<|pad|>")
    model = mmllm.load(tmp_path / "model")
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "one"}]
    twice = [{"role": role, "content": text} for role in ("assistant", "user") for text in ("four", "five")]
    for more in ([], [{"role": "assistant", "content": "two"}, {"role": "user", "content": "three"}], twice):
        messages += more
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ids == model.chat_prompt(messages).token_ids_T.tolist()
    done = [*messages, {"role": "assistant", "content": "four"}]
    assert theirs.apply_chat_template(done, tokenize=False).endswith("<|assistant|>four<|end|>")


def test_what_went_out_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after training in transformers: the same text tokenizer, so that a training goes on with the same words."""
    model, tokenizer = save_tiny(tmp_path)
    output(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"))
    theirs.save_pretrained(str(tmp_path / "trained"))
    transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out")).save_pretrained(str(tmp_path / "trained"))
    said = json.loads(output(capsys, "import", tmp_path / "trained", "--out", tmp_path / "back", "--json"))
    assert said["num_ids"] == said["num_base_ids"] == tokenizer.vocabulary.num_text
    back = load_model(tmp_path / "back")
    assert back.tokenizer.text.hash == tokenizer.text.hash and back.tokenizer.chat_template is not None
    rows = model.decoder.embed_tokens.weight[: tokenizer.vocabulary.num_text]
    assert torch.equal(back.model.decoder.embed_tokens.weight, rows)
    module = DecoderModule(
        decoder=dataclasses.replace(model.config.decoder, vocab_size=0), tokenizer=str(tmp_path / "tokenizer"),
        init_from=str(tmp_path / "back"),
    )  # fmt: skip
    module.configure_model()
    assert module.model is not None
    weights = model.decoder.state_dict()
    for name, tensor in module.model.decoder.state_dict().items():
        assert torch.equal(tensor[: len(rows)], weights[name][: len(rows)]), name
    units = slice(len(rows), None)
    assert not torch.equal(module.model.decoder.embed_tokens.weight[units], weights["embed_tokens.weight"][units])


def test_what_no_family_computes_exits_with_2_and_names_the_layer(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path, moe_layers=(1,))
    said = run(capsys, "export", "--model", tmp_path / "model", "--out", tmp_path / "x", code=2)
    assert "decoder.moe_layers is (1,)" in said
    assert not (tmp_path / "x").exists()


@pytest.fixture
def mixtral(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A random Mixtral with a tokenizer of its own."""
    tokenizer = saved_kind("byte_fallback", tmp_path / "mixtral")
    config = transformers.MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=2, sliding_window=None,
    )  # fmt: skip
    torch.manual_seed(3)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "mixtral")
    capsys.readouterr()
    return tmp_path / "mixtral"


NORM, EXPERT = "model.layers.0.input_layernorm.weight", "model.layers.1.block_sparse_moe.experts.2.w1.weight"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop(NORM), f"lacks tensor {NORM}"),
        (lambda weights: weights.pop(EXPERT), f"lacks tensor {EXPERT}"),
        (lambda weights: weights.update({NORM: torch.zeros(7)}), f"{NORM} has the shape [7]; config.json says [16]"),
        (lambda weights: weights.update({"model.layers.2.x": torch.zeros(7)}), "unknown tensor model.layers.2.x"),
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
    assert f"{weights} has" in refused(mixtral)
    weights.unlink()
    assert str(mixtral) in refused(mixtral)
    (mixtral / "config.json").write_text("{")
    assert str(mixtral / "config.json") in refused(mixtral)
    shutil.rmtree(mixtral)
    assert f"{mixtral} is no folder" in refused(mixtral)
