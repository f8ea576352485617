"""Adapters through PEFT: against PEFT's own on transformers' model, on disk, side by side, merged."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.adapters import (
    adapter_names,
    add_adapter,
    base_facts,
    base_state,
    load_adapter,
    merge_adapter,
    save_adapter,
    saved_adapters,
    set_adapter,
)
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.weights import Checkpoint
from mmllm.inference.api import load
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.router import MoEConfig
from tests.inference_fixtures import make_model, make_tokenizer

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)

KINDS = {
    "attention": AdapterConfig(r=4, lora_alpha=8),
    "rslora": AdapterConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=("q_proj", "down_proj")),
    "dora": AdapterConfig(r=4, lora_alpha=8, use_dora=True, target_modules=("v_proj", "gate_proj")),
    "experts": AdapterConfig(r=2, lora_alpha=8, parts=("attention", "experts")),
    "one stack": AdapterConfig(r=2, lora_alpha=8, target_parameters=("mlp.experts.gate_up_proj",)),
}


def make_decoder(is_moe: bool, **changes: Any) -> Decoder:
    torch.manual_seed(0)
    moe = MoEConfig(4, 2, 24, backend="reference") if is_moe else None
    decoder = Decoder(
        DecoderConfig(
            60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, moe=moe, moe_layers=changes.pop("moe_layers", "all"), tie_word_embeddings=False,
            **changes,
        )
    )  # fmt: skip
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return decoder


def train_a_little(decoder: Decoder, seed: int = 1) -> None:
    """Random values in the place of what training would make."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in decoder.named_parameters():
        if ".lora_" in name and parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1


def ids() -> Tensor:
    return torch.randint(60, (2, 9), generator=torch.Generator().manual_seed(3))


def logits_of(decoder: Decoder, ids_BT: Tensor) -> Tensor:
    documents = torch.zeros_like(ids_BT)
    positions = torch.arange(ids_BT.shape[1]).expand_as(ids_BT)
    return decoder.head(decoder(decoder.embed(ids_BT), positions, documents)[0])


def their_model(decoder: Decoder) -> Any:
    """The same decoder as transformers has it: its names are ours behind `model.`."""
    c = decoder.config
    common = dict(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads, num_key_value_heads=c.num_key_value_heads,
        rms_norm_eps=c.rms_norm_eps,
        intermediate_size=c.intermediate_size, tie_word_embeddings=False, rope_theta=c.rope_theta,
    )  # fmt: skip
    if c.moe is None:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common))
    else:
        common["intermediate_size"] = c.moe.moe_intermediate_size
        experts = dict(num_local_experts=c.moe.num_experts, num_experts_per_tok=c.moe.num_experts_per_tok)
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**common, **experts))
    theirs = {n if n.startswith("lm_head") else f"model.{n}": t for n, t in base_state(decoder.state_dict()).items()}
    model.load_state_dict(theirs)
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("kind", KINDS)
def test_logits_gradients_and_files_are_those_of_peft_on_transformers(kind: str, tmp_path: Path) -> None:
    config = KINDS[kind]
    is_moe = kind in ("experts", "one stack")
    decoder = make_decoder(is_moe)
    before = logits_of(decoder, ids()).detach()
    add_adapter(decoder, config, "mine")
    torch.testing.assert_close(logits_of(decoder, ids()), before)
    train_a_little(decoder)
    save_adapter(tmp_path / "a", decoder, "mine", {"hidden_size": 32})
    model = their_model(decoder)
    theirs = peft.PeftModel.from_pretrained(model, str(tmp_path / "a"), is_trainable=True)
    ours = logits_of(decoder, ids())
    logits = theirs(ids()).logits
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(ours, before, atol=1e-2)

    ours.square().sum().backward()
    logits.square().sum().backward()
    wanted = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    got = {name: p.grad for name, p in decoder.named_parameters() if p.requires_grad}
    assert len(got) == len(wanted) > 0
    for name, gradient in got.items():
        their_name = "base_model.model.model." + name.replace(".mine.", ".default.")
        torch.testing.assert_close(gradient, wanted[their_name], rtol=2e-3, atol=2e-3, msg=name)

    # PEFT saves it as it is saved here, and what it saves is read
    theirs.save_pretrained(str(tmp_path / "theirs"))
    own, their_files = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("a", "theirs"))
    assert own.keys() == their_files.keys()
    assert all(torch.equal(tensor, their_files[name]) for name, tensor in own.items())
    fresh = make_decoder(is_moe)
    load_adapter(fresh, tmp_path / "theirs", "other")
    torch.testing.assert_close(logits_of(fresh, ids()), ours)


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_decoder_computes_what_the_adapter_did(kind: str) -> None:
    decoder = make_decoder(kind in ("experts", "one stack"))
    names = list(decoder.state_dict())
    add_adapter(decoder, KINDS[kind], "mine")
    train_a_little(decoder)
    wanted = logits_of(decoder, ids())
    merge_adapter(decoder, "mine")
    assert sorted(decoder.state_dict()) == sorted(names) and not adapter_names(decoder)
    torch.testing.assert_close(logits_of(decoder, ids()), wanted, rtol=0, atol=1e-5)


def test_dense_and_expert_layers_are_adapted_together_and_each_weight_gets_a_gradient() -> None:
    decoder = make_decoder(True, moe_layers=(1,))
    add_adapter(decoder, KINDS["experts"], "mine")
    train_a_little(decoder)
    logits_of(decoder, ids()).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.requires_grad == (".lora_" in name) == (parameter.grad is not None), name
        assert parameter.grad is None or parameter.grad.any(), name
    adapted = {name.split(".lora_")[0] for name, _ in decoder.named_parameters() if ".lora_" in name}
    assert {f"layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")} < adapted
    assert {"layers.1.mlp.experts", "layers.1.mlp.experts.base_layer"} < adapted


@pytest.mark.parametrize("checkpointing", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(checkpointing: str) -> None:
    gradients = []
    for mode in ("none", checkpointing):
        decoder = make_decoder(True, gradient_checkpointing=mode).train()
        torch.manual_seed(5)
        add_adapter(decoder, KINDS["experts"], "mine")
        train_a_little(decoder)
        logits_of(decoder, ids()).square().sum().backward()
        gradients.append({name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: AdapterConfig(r=0), r"adapter\.r is 0"),
        (lambda: AdapterConfig(lora_dropout=1.0), "lora_dropout is 1.0"),
        (lambda: AdapterConfig(lora_alpha=-1), "lora_alpha is -1"),
        (lambda: AdapterConfig(parts=("routers",)), r"parts names 'routers'; choose among attention, experts"),
        (lambda: AdapterConfig(target_modules=("lm_head",)), "target_modules names 'lm_head'"),
        (lambda: AdapterConfig(parts=("attention",), target_modules=("q_proj",)), "leave one out"),
        (lambda: AdapterConfig(parts=()).targets(make_decoder(False).config), "parts is empty"),
        (
            lambda: AdapterConfig(parts=("experts",), lora_dropout=0.1).targets(make_decoder(True).config),
            r"adapter\.lora_dropout is 0\.1 and stacks of experts .*leave lora_dropout out",
        ),
        (
            lambda: AdapterConfig(parts=("experts",), use_dora=True).targets(make_decoder(True).config),
            r"adapter\.use_dora is True and stacks",
        ),
        (
            lambda: AdapterConfig(target_modules=("up_proj",)).targets(make_decoder(True).config),
            "target_modules names up_proj, but the decoder has no dense layer",
        ),
        (
            lambda: AdapterConfig(target_parameters=("mlp.experts.down_proj",)).targets(make_decoder(False).config),
            "no layer with experts",
        ),
        (lambda: add_adapter(make_decoder(False), AdapterConfig(), "a.b"), "name is 'a.b'"),
    ],
)
def test_what_cant_be_adapted_is_named(make: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make()


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mmllm\[adapt\]'"):
        add_adapter(make_decoder(False), AdapterConfig(), "mine")


def test_no_code_comes_from_a_hub_with_peft(tmp_path: Path) -> None:
    """bitsandbytes, which PEFT imports, asks the library `kernels` for some on processors with bfloat16."""
    import subprocess
    import sys

    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **kwargs):\n    raise SystemExit('a hub was asked')\n")
    script = (
        "import kernels, sys; from mmllm.checkpoints.peft_library import peft_library; peft_library(); "
        "assert sys.modules['kernels'] is kernels"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- model folders ----------------------------------------------------------------------------------------------------


def add_to_folder(folder: Path, name: str, config: AdapterConfig, seed: int) -> None:
    loaded = load_model(folder)
    decoder = loaded.model.decoder
    add_adapter(decoder, config, name)
    train_a_little(decoder, seed)
    facts = base_facts(Checkpoint.open(folder), decoder.config)
    save_adapter(folder / "adapters" / name, decoder, name, facts)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    tokenizer = make_tokenizer()
    save_model(tmp_path / "model", make_model(tokenizer), tokenizer)
    add_to_folder(tmp_path / "model", "first", AdapterConfig(r=4), 1)
    add_to_folder(tmp_path / "model", "second", AdapterConfig(r=2, target_modules=("o_proj",)), 2)
    return tmp_path / "model"


def text_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return logits_of(model.decoder, ids())


def test_adapters_lie_side_by_side_and_are_chosen_among(made: Path) -> None:
    assert saved_adapters(made) == ["first", "second"]
    alone = text_logits(load_model(made).model)
    apart = {name: text_logits(load_model(made, adapter=name).model) for name in ("first", "second")}
    model = load(made, adapter=["first", "second"])
    assert model.adapters == ["first", "second"] and load(made).adapters == []
    torch.testing.assert_close(text_logits(model.model), apart["first"])
    for name, wanted in (("second", apart["second"]), (None, alone), ("first", apart["first"])):
        model.set_adapter(name)
        torch.testing.assert_close(text_logits(model.model), wanted)
    assert not torch.allclose(apart["first"], apart["second"]) and not torch.allclose(apart["first"], alone)
    assert not any(p.requires_grad for p in model.model.parameters())
    with pytest.raises(ValueError, match="no adapter 'third'; loaded are first, second"):
        model.set_adapter("third")
    with pytest.raises(FileNotFoundError, match="has first, second"):
        load(made, adapter="third")


def test_generation_runs_with_an_adapter(made: Path) -> None:
    prompts = [["one two"], ["a red circle above"]]
    plain, adapted = (load(made, adapter=name).generate(prompts, max_new_tokens=8) for name in (None, "first"))
    assert plain != adapted
    shutil.rmtree(made / "adapters" / "second")
    model = load(made, adapter="first")
    merge_adapter(model.model.decoder, "first")
    assert model.generate(prompts, max_new_tokens=8) == adapted


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_an_adapter_of_another_base_is_refused(made: Path, tmp_path: Path) -> None:
    other, tokenizer = tmp_path / "other", make_tokenizer()
    model = make_model(tokenizer)
    with torch.no_grad():
        model.decoder.layers[0].self_attn.q_proj.weight[0, 0] += 1.0  # type: ignore[union-attr, operator]
    save_model(other, model, tokenizer)
    shutil.copytree(made / "adapters", other / "adapters")
    with pytest.raises(ValueError, match=r"first/base\.json has weights \S+…, the model \S+….*another base"):
        load_model(other, adapter="first")
    folder = made / "adapters" / "first"
    edit(folder / "base.json", num_hidden_layers=4)
    with pytest.raises(ValueError, match=r"base\.json has num_hidden_layers 4, the model 2"):
        load_model(made, adapter="first")


def test_trained_special_tokens_and_units_leave_the_base_the_same(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    facts = []
    for change in (0.0, 1.0):
        model = make_model(tokenizer, tie_word_embeddings=False)
        num_rows = model.config.decoder.vocab_size
        with torch.no_grad():
            model.decoder.embed_tokens.weight[-3:] += change
        save_model(tmp_path / "m", model, tokenizer)
        for num_base_ids in (num_rows - 3, 0):
            config = dataclasses.replace(model.config.decoder, num_base_ids=num_base_ids)
            facts.append(base_facts(Checkpoint.open(tmp_path / "m"), config))
    assert facts[0] == facts[2] and facts[1] != facts[3]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: edit(f / "adapter_config.json", peft_type="LOHA"), r"adapter_config\.json has peft_type 'LOHA'"),
        (lambda f: edit(f / "adapter_config.json", bias="all"), "has bias 'all', wanted 'none'"),
        (lambda f: edit(f / "adapter_config.json", modules_to_save=["lm_head"]), "has modules_to_save"),
        (lambda f: edit(f / "adapter_config.json", r="four"), r"adapter_config\.json has r 'four'"),
        (lambda f: edit(f / "adapter_config.json", target_modules=["nowhere"]), r"adapter_config\.json: .*nowhere"),
        (lambda f: edit(f / "adapter_config.json", target_modules=["q_proj"]), r"k_proj\.lora_A\.weight, but the dec"),
        (lambda f: edit(f / "adapter_config.json", r=8), r"\.lora_A\.weight of shape \[4, 32\].*wants \[8, 32\]"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), r"adapter_model\.safetensors doesn't exist"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"no"), r"adapter_model\.safetensors can't be read"),
        (lambda f: _rename(f / "adapter_model.safetensors"), r"has x\.layers.*begin with base_model"),
    ],
)
def test_damaged_and_other_adapters_are_named(made: Path, change: Any, said: str) -> None:
    change(made / "adapters" / "first")
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        load_model(made, adapter="first")


def _rename(path: Path) -> None:
    tensors = {name.replace("base_model.model.model", "x"): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path)


def test_two_adapters_with_other_stacks_of_experts_are_refused(made: Path) -> None:
    add_to_folder(made, "experts", AdapterConfig(r=2, target_parameters=("mlp.experts.down_proj",)), 3)
    assert load(made, adapter="experts").adapters == ["experts"]
    with pytest.raises(ValueError, match=r"PEFT can't hold both: load one at a time"):
        load(made, adapter=["first", "experts"])


def test_set_adapter_of_none_loaded() -> None:
    decoder = make_decoder(False)
    set_adapter(decoder, None)
    with pytest.raises(ValueError, match="loaded are none"):
        set_adapter(decoder, "x")
