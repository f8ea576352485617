"""`mmllm import` and `mmllm export`: whole checkpoints in and out, through the command line, against transformers."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file

import mmllm
from mmllm.checkpoints.folder import load_model, save_model
from mmllm.checkpoints.weights import Checkpoint
from mmllm.cli.main import main
from mmllm.data.samples.document import DocumentWriter
from mmllm.data.samples.documents import media_slots
from mmllm.data.samples.sample import Segment
from mmllm.inference.prompts import join, pad_left
from mmllm.interop.growth import grown
from mmllm_tokenizers.vocab import SPECIAL_TOKENS
from tests.inference_fixtures import make_tokenizer
from tests.interop_fixtures import CASES, quiet, randomize
from tests.pretrained_fixtures import CHATML, byte_level, saved, saved_kind

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")
quiet()

FAMILIES = {
    "llama 3.1, biases, tied": "byte_level", "mistral": "byte_fallback", "qwen2": "byte_level", "qwen3": "unigram",
    "smollm3": "byte_level", "phi3": "byte_fallback", "mixtral": "byte_fallback", "olmoe": "byte_level",
    "qwen3_moe": "byte_level", "glm4_moe": "byte_level", "dots1": "unigram",
}  # fmt: skip
"""A case of each family, and what kind of tokenizer it gets here."""
PADDING = 11


def save_checkpoint(folder: Path, name: str = "qwen3", kind: str = "byte_level", dtype=torch.float32, **options):
    """A random model with a tokenizer and a padded vocabulary, as transformers saves both."""
    tokenizer = saved_kind(kind, folder)
    prefix, values = copy.deepcopy(CASES[name])  # transformers writes into what it is given
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    sizes = {
        "vocab_size": len(tokenizer) + PADDING, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 256,
    }  # fmt: skip
    layers = {"num_hidden_layers": 4} if "layer_types" in values or "mlp_only_layers" in values else {}
    config = getattr(transformers, f"{prefix}Config")(**(sizes | values | layers | ids))
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    randomize(model)
    model.to(dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(str(folder), **options)
    return model, tokenizer


def run(capsys, *arguments, code=0):
    capsys.readouterr()
    found = main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert found == code, printed.err or printed.out
    return printed.err if code else printed.out


@pytest.fixture(scope="module", params=FAMILIES)
def imported(request, tmp_path_factory):
    """A checkpoint of each family, imported."""
    root = tmp_path_factory.mktemp("family")
    model, tokenizer = save_checkpoint(root / "theirs", request.param, FAMILIES[request.param])
    assert main(["import", str(root / "theirs"), "--out", str(root / "ours")]) == 0
    return root, model, tokenizer


def test_scores_are_those_of_transformers_to_rounding(imported):
    root, theirs, _ = imported
    ours = mmllm.load(root / "ours")
    pairs = [("the quick brown", " fox jumps"), ("a", "b"), ("שלום", " мир <|end|></s>"), ("x", "")]
    for prompt, continuation in pairs:
        ids = [ours.tokenizer.text.encode(text) for text in (prompt, continuation)]
        with torch.no_grad():
            logits = theirs(torch.tensor([ids[0] + ids[1]])).logits[0].double().log_softmax(dim=-1)
        places = range(len(ids[0]) - 1, len(ids[0]) + len(ids[1]) - 1)
        wanted = sum(float(logits[place, token_id]) for place, token_id in zip(places, ids[1], strict=True))
        assert ours.score(prompt, continuation) == pytest.approx(wanted, abs=1e-3, rel=1e-5)
    together = ours.score([prompt for prompt, _ in pairs], [continuation for _, continuation in pairs])
    assert together == pytest.approx([ours.score(*pair) for pair in pairs], abs=1e-3)
    with pytest.raises(ValueError, match="prompt 0 is '', which has no token"):
        ours.score("", "x")
    with pytest.raises(ValueError, match="2 prompts but 1 continuations"):
        ours.score(["a", "b"], ["c"])


def test_text_goes_on_as_in_transformers(imported):
    """Fifty tokens, greedily; those that we never write (special tokens, padding) are forbidden there too."""
    root, theirs, tokenizer = imported
    ours = mmllm.load(root / "ours")
    text = ours.tokenizer.text
    prompt = "the quick brown fox"
    allowed = [i for i in range(text.num_tokens) if i not in text.hidden_ids] + [tokenizer.eos_token_id]
    ids = ours.tokenizer.text.encode_template(ours.tokenizer.templates["text"]["prompt"]) + text.encode(prompt)
    with torch.no_grad():
        found = theirs.generate(
            torch.tensor([ids]),
            max_new_tokens=50,
            do_sample=False,
            suppress_tokens=[i for i in range(theirs.config.vocab_size) if i not in allowed],
        )
    wanted = text.decode(found[0, len(ids) :].tolist())
    document = ours.continuation_prompt([prompt])
    assert document.token_ids_T.tolist() == ids
    assert ours.generate(prompt, max_new_tokens=50) == wanted
    assert found.shape[1] - len(ids) > 5


def test_what_was_not_trained_goes_out_as_it_came(imported, tmp_path, capsys):
    root, theirs, tokenizer = imported
    said = json.loads(run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "out", "--json"))
    assert said["format"] == "decoder" and said["num_rows"] == theirs.config.vocab_size
    assert said["left_behind"].keys() == {"special tokens"}
    theirs_had, went_out = (load_file(folder / "model.safetensors") for folder in (root / "theirs", tmp_path / "out"))
    assert theirs_had.keys() == went_out.keys()
    for name, tensor in theirs_had.items():
        assert tensor.dtype == went_out[name].dtype and torch.equal(tensor, went_out[name]), name
    for path in (root / "theirs").iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, theirs(ids).logits)
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    assert read("a b <|end|>")["input_ids"] == tokenizer("a b <|end|>")["input_ids"]


def test_added_ids_go_out_where_wanted(imported, tmp_path, capsys):
    root, _, tokenizer = imported
    run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "out", "--keep_added")
    ours = load_model(root / "ours")
    again = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    for name in SPECIAL_TOKENS:
        assert read.convert_tokens_to_ids(name) == ours.tokenizer.id(name)
    words = "a b שלום<|caption|>c<|end|>"
    assert read(words, add_special_tokens=False)["input_ids"][-1] == ours.tokenizer.id("<|end|>")
    for text in ("the quick", "мир  x"):
        assert read(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = torch.tensor([[1, 2, 3, ours.tokenizer.id("<|caption|>"), 5]])
    with torch.no_grad():
        found = again(ids).logits
        positions = torch.arange(5)[None]
        hidden = ours.model.decoder(ours.model.decoder.embed(ids), positions, torch.zeros_like(ids))[0]
        torch.testing.assert_close(found, ours.model.decoder.head(hidden), rtol=1e-4, atol=1e-4)


def test_the_report_names_what_came_what_is_new_and_what_was_left_out(tmp_path, capsys):
    model, tokenizer = save_checkpoint(tmp_path / "theirs", "glm4_moe", dtype=torch.bfloat16)
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    last = model.config.num_hidden_layers
    weights[f"model.layers.{last}.eh_proj.weight"] = torch.ones(4, 4)
    save_file(weights, tmp_path / "theirs" / "model.safetensors", {"format": "pt"})
    said = json.loads(run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", "--json"))
    assert said["family"] == "glm4_moe" and said["num_base_ids"] == len(tokenizer) + PADDING
    assert said["num_ids"] == said["num_base_ids"] + len(SPECIAL_TOKENS) and said["new"] == {}
    assert set(said["left_out"]) == {
        f"model.layers.{last}.eh_proj.weight", "model.layers.0.self_attn.rotary_emb.inv_freq",
    }  # fmt: skip
    assert said["grown"]["embed_tokens.weight"] == [said["num_base_ids"], len(SPECIAL_TOKENS)]
    lines = run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert "left out  model.layers" in lines and "grown     embed_tokens.weight" in lines
    loaded = load_model(tmp_path / "ours")
    assert loaded.model.decoder.embed_tokens.weight.dtype == torch.bfloat16
    assert loaded.model.decoder.layers[2].mlp.gate.e_score_correction_bias.dtype == torch.float32  # pyright: ignore
    said = json.loads(run(capsys, "export", "--model", tmp_path / "ours", "--out", tmp_path / "out", "--json"))
    wrote = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in wrote.items())


def test_old_rows_are_kept_to_the_bit_and_new_ones_begin_at_the_mean():
    torch.manual_seed(0)
    base = torch.randn(50, 8).bfloat16()
    base[40:] = 0  # padding
    codebooks = torch.randn(2, 6, 5)
    whole = grown(base, 50 + 3 + 2 * 7, codebooks)
    assert torch.equal(whole[:50], base) and whole.dtype == torch.bfloat16
    mean = base[:40].float().mean(dim=0)
    torch.testing.assert_close(whole[50:53].float(), mean.expand(3, -1), rtol=0, atol=1e-2)
    units = whole[53:].float().unflatten(0, (2, 7))
    torch.testing.assert_close(units[:, -1], mean.expand(2, -1), rtol=0, atol=1e-2)
    near, far = torch.cdist(codebooks, codebooks), torch.cdist(units[:, :-1], units[:, :-1])
    for k in range(2):
        pairs = torch.triu_indices(6, 6, 1)
        assert torch.corrcoef(torch.stack([near[k][*pairs], far[k][*pairs]]))[0, 1] > 0.3
    assert torch.equal(grown(base, 67, codebooks), whole)


def test_a_sharded_checkpoint_is_the_same_model(tmp_path, capsys):
    save_checkpoint(tmp_path / "one", "qwen3_moe")
    save_checkpoint(tmp_path / "many", "qwen3_moe", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    for name in ("one", "many"):
        run(capsys, "import", tmp_path / name, "--out", tmp_path / f"{name}_out")
    first, second = (load_file(tmp_path / f"{name}_out" / "model.safetensors") for name in ("one", "many"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ({"model_type": "deepseek_v3", "kv_lora_rank": 32}, "multi-head latent"),
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method is 'fp8'"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "auto_map"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "spiral", "rope_theta": 1e4}}, "spiral"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type is ['llama']"),
        ({"rope_parameters": {"rope_type": ["x"], "rope_theta": 1e4}}, "rope_parameters.rope_type"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": -5.0}}, "rope_theta is -5.0"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, but the checkpoint has"),
        ({"hidden_size": 10**12}, "hidden_size is 1000000000000"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_code_2_naming_the_field(tmp_path, capsys, damage, said):
    save_checkpoint(tmp_path / "theirs", "llama")
    path = tmp_path / "theirs" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | damage))
    error = run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", code=2)
    assert said in error and "config.json" in error and str(tmp_path / "theirs") in error
    assert not (tmp_path / "ours").exists()


def test_damaged_checkpoints_are_refused(tmp_path, capsys):
    source = tmp_path / "theirs"
    _, tokenizer = save_checkpoint(source, "qwen2", max_shard_size="20KB")

    def refused():
        return run(capsys, "import", source, "--out", tmp_path / "ours", code=2)

    index = json.loads((source / "model.safetensors.index.json").read_text())
    shard = sorted(set(index["weight_map"].values()))[1]
    shutil.move(source / shard, tmp_path / "away")
    assert f"{shard} doesn't exist" in refused()
    shutil.move(tmp_path / "away", source / shard)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "vocab_size": len(tokenizer) - 1}))
    assert "embed_tokens" in refused()
    (source / "config.json").write_text(json.dumps(config))
    shutil.move(source / "tokenizer.json", tmp_path / "away")
    assert "tokenizer.json doesn't exist" in refused()
    (source / "tokenizer.model").write_bytes(b"")
    assert "tokenizer.model alone" in refused()
    shutil.move(tmp_path / "away", source / "tokenizer.json")
    for path in source.glob("model*"):
        path.unlink()
    (source / "pytorch_model.bin").write_bytes(b"")
    assert "a pickle" in refused()
    assert "no folder" in run(capsys, "import", tmp_path / "nowhere", "--out", tmp_path / "ours", code=2)


def test_nothing_else_is_replaced(tmp_path, capsys):
    """Neither the checkpoint that is read, nor another, nor the folder around it; nor a model by a checkpoint."""
    save_checkpoint(tmp_path / "theirs", "llama")
    shutil.copytree(tmp_path / "theirs", tmp_path / "other")
    shutil.copytree(tmp_path / "theirs", tmp_path / "other" / "within")
    run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for source, out in (("theirs", "theirs"), ("theirs", "other"), ("other/within", "other")):
        error = run(capsys, "import", tmp_path / source, "--out", tmp_path / out, code=2)
        assert "a checkpoint of transformers is there" in error and out in error
    error = run(capsys, "export", "--model", tmp_path / "ours", "--out", tmp_path / "ours", code=2)
    assert "a model folder of mmllm is there" in error
    (tmp_path / "around").mkdir()
    shutil.move(tmp_path / "ours", tmp_path / "around" / "ours")
    (tmp_path / "around" / "config.json").write_text("{}")
    error = run(capsys, "export", "--model", tmp_path / "around" / "ours", "--out", tmp_path / "around", code=2)
    assert "would be replaced" in error
    shutil.move(tmp_path / "around" / "ours", tmp_path / "ours")
    shutil.rmtree(tmp_path / "around")
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_link_is_written_through(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "llama")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    for _ in range(2):
        run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "link")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "target", "theirs"]
        assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "model.safetensors").is_file()


def test_matrices_of_several_dtypes_are_refused_and_norms_may_be_of_another(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "llama")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    path = tmp_path / "theirs" / "model.safetensors"
    save_file({name: t if "lm_head" in name else t.bfloat16() for name, t in weights.items()}, path)
    error = run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", code=2)
    assert "embed_tokens.weight is bfloat16 and lm_head.weight is float32; wanted one dtype" in error
    save_file({name: t if "norm" in name else t.bfloat16() for name, t in weights.items()}, path)
    run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    assert mmllm.load(tmp_path / "ours").generate("a", max_new_tokens=2) is not None


def test_further_chat_templates_go_out_as_they_came(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "llama")
    (tmp_path / "theirs" / "additional_chat_templates").mkdir()
    (tmp_path / "theirs" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    said = json.loads(run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", "--json"))
    assert "chat template 'tool_use'" in said["left_out"]
    run(capsys, "export", "--model", tmp_path / "ours", "--out", tmp_path / "out")
    read = transformers.AutoTokenizer.from_pretrained(str(tmp_path / "out"), local_files_only=True)
    assert read.chat_template["tool_use"] == "{{ tools }}"


def test_tokenizer_and_embedding_must_belong_together(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "llama")
    byte_level(vocab_size=900).save(str(tmp_path / "theirs" / "tokenizer.json"))
    assert "don't belong together" in run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", code=2)


def test_tied_weights_that_differ_are_refused(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs", "qwen2")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "theirs" / "model.safetensors")
    assert "tied weights differ" in run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours", code=2)


def test_a_trained_model_no_longer_claims_its_config(tmp_path, capsys):
    """A decoder that was changed goes out with a config.json that says what it is now."""
    save_checkpoint(tmp_path / "theirs", "llama")
    run(capsys, "import", tmp_path / "theirs", "--out", tmp_path / "ours")
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    config["model"]["decoder"]["rms_norm_eps"] = 0.25
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
    run(capsys, "export", "--model", tmp_path / "ours", "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rms_norm_eps"] == 0.25
    assert Checkpoint.open(tmp_path / "out").specs == Checkpoint.open(tmp_path / "theirs").specs


# --- pictures and sounds --------------------------------------------------------------------------------------


def save_tower(folder: Path, kind: str = "Siglip"):
    """A small CLIP or SigLIP, as transformers saves it, with its image processor."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7,
    }  # fmt: skip
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(vision_config=sizes, text_config={**text, "vocab_size": 20})
    torch.manual_seed(1)
    model = getattr(transformers, f"{kind}Model")(config)
    randomize(model)
    model.save_pretrained(str(folder))
    size = {"size": {"height": 28, "width": 28}}
    if kind == "CLIP":
        size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    getattr(transformers, f"{kind}ImageProcessor")(**size).save_pretrained(str(folder))
    return model


def picture(seed: int, width: int = 50, height: int = 40):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def with_senses(tmp_path_factory):
    """A language model with a tower of CLIP and a codec."""
    root = tmp_path_factory.mktemp("senses")
    theirs, tokenizer = save_checkpoint(root / "text", "llama", "byte_fallback")
    tower = save_tower(root / "tower", "CLIP")
    make_tokenizer().require_audio().save(root / "codec")
    line = ["import", root / "text", "--out", root / "ours", "--vision", root / "tower", "--codec", root / "codec"]
    assert main([*map(str, line)]) == 0
    return root, theirs, tokenizer, tower


def test_eyes_and_ears_are_added_and_the_rest_is_intact(with_senses, tmp_path, capsys):
    root, theirs, _, tower = with_senses
    line = ["import", root / "text", "--vision", root / "tower", "--codec", root / "codec", "--json"]
    said = json.loads(run(capsys, *line, "--out", tmp_path / "ours"))
    assert set(said["new"]) == {"image projector", "audio front end"}
    assert said["whole"].keys() == {"decoder", "image tower"}
    assert any("text_model" in what for what in said["left_out"]), "the tower's text model is named"
    wrote = load_file(tmp_path / "ours" / "model.safetensors")
    assert torch.equal(wrote["decoder.layers.1.mlp.up_proj.weight"], theirs.model.layers[1].mlp.up_proj.weight)
    rows = theirs.model.embed_tokens.weight
    assert torch.equal(wrote["decoder.embed_tokens.weight"][: len(rows)], rows)
    name = "encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(wrote[f"vision.visual.{name}"], tower.vision_model.state_dict()[name])
    again = load_file(root / "ours" / "model.safetensors")
    assert again.keys() == wrote.keys() and all(torch.equal(again[name], wrote[name]) for name in wrote), "one seed"
    model = mmllm.load(tmp_path / "ours")
    assert isinstance(model.caption(picture(0), max_new_tokens=4), str)
    assert isinstance(model.transcribe((np.zeros(4000, np.float32), 8000), max_new_tokens=4), str)
    assert model.speak("hi", max_seconds=0.1).samples.ndim == 1
    chat = [{"role": "user", "content": ["see", PIL.Image.fromarray(picture(1))]}]
    assert isinstance(model.chat(chat, max_new_tokens=4), str)


def test_pictures_and_sounds_do_not_change_what_text_is_worth(with_senses, tmp_path):
    root, *_ = with_senses
    assert main(["import", str(root / "text"), "--out", str(tmp_path / "blind")]) == 0
    blind, ours = mmllm.load(tmp_path / "blind"), mmllm.load(root / "ours")
    assert ours.score("the quick brown", " fox") == blind.score("the quick brown", " fox")


def test_parts_are_chosen_by_a_file(with_senses, tmp_path, capsys):
    root, *_ = with_senses
    (tmp_path / "parts.yaml").write_text(
        "vision_layer: -1\nimage_projector: {kind: pixel_shuffle, scale_factor: 2}\naudio_pool: 4\n"
        "audio_projector: {kind: mlp}\nloss: {ctc: 0.3}\n"
    )
    line = ["import", root / "text", "--vision", root / "tower", "--codec", root / "codec", "--out", tmp_path / "ours"]
    run(capsys, *line, "--parts", tmp_path / "parts.yaml")
    loaded = load_model(tmp_path / "ours")
    assert loaded.model.num_image_tokens == 4 == loaded.tokenizer.num_image_tokens
    assert loaded.tokenizer.audio_pool == 4 and loaded.model.ctc_head is not None
    (tmp_path / "parts.yaml").write_text("layer: -1\n")
    assert "unknown key 'layer'" in run(capsys, *line, "--parts", tmp_path / "parts.yaml", code=2)


@pytest.mark.parametrize("keep", [False, True])
def test_a_model_with_pictures_goes_out_as_llava(with_senses, tmp_path, capsys, keep):
    root, *_ = with_senses
    options = ["--keep_added"] if keep else []
    said = json.loads(run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "out", "--json", *options))
    assert said["format"] == "llava" and "audio front end" in said["left_behind"]
    assert ("audio units" in said["left_behind"]) is not keep
    check_llava_logits(root / "ours", tmp_path / "out")
    said = json.loads(
        run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "text", "--format", "decoder", "--json")
    )
    assert "image tower" in said["left_behind"] and said["format"] == "decoder"
    was, now = (load_file(folder / "model.safetensors") for folder in (root / "text", tmp_path / "text"))
    assert was.keys() == now.keys() and all(torch.equal(was[name], now[name]) for name in was)


def check_llava_logits(folder: Path, out: Path) -> None:
    """Text and picture logits of an exported LLaVA, by its own processor, are those of the model folder."""
    ours = mmllm.load(folder)
    processor = transformers.AutoProcessor.from_pretrained(str(out), local_files_only=True)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(str(out), local_files_only=True).eval()
    images = [PIL.Image.fromarray(picture(seed)) for seed in (3, 4)]
    token = processor.image_token
    inputs = processor(text=f"see {token} and {token} quick", images=images, return_tensors="pt")
    with torch.no_grad():
        found = theirs(**inputs).logits[0]
    text, slots = ours.tokenizer.text, [Segment(image=image) for image in images]
    documents = []
    for ids in split(inputs["input_ids"][0].tolist(), text.id("<|image|>"), ours.tokenizer.num_image_tokens):
        if ids is None:
            documents.append(media_slots(slots.pop(0), ours.tokenizer, ours.image_transform))
        else:
            writer = DocumentWriter(ours.tokenizer)
            writer.ids(ids, is_target=False)
            documents.append(writer.finish())
    batch = pad_left([join(documents)])
    assert batch.token_ids_BT[0].tolist() == inputs["input_ids"][0].tolist() and not slots
    with torch.no_grad():
        wanted = ours.model.logits(batch)[0]
    torch.testing.assert_close(found, wanted[:, : found.shape[1]], rtol=1e-4, atol=1e-4)
    assert found.std() > 0.3


def split(ids, image_id, num_slots):
    """Runs of other ids, and None for each picture."""
    runs, run_ = [], []
    place = 0
    while place < len(ids):
        if ids[place] == image_id:
            runs += [run_, None]
            run_ = []
            place += num_slots
        else:
            run_.append(ids[place])
            place += 1
    return [run for run in [*runs, run_] if run is None or run]


@pytest.fixture(scope="module", params=[("CLIP", "llama"), ("Siglip", "qwen2"), ("CLIP", "mistral")])
def llava(request, tmp_path_factory):
    """A LLaVA that transformers saved, and its import."""
    root = tmp_path_factory.mktemp("llava")
    tower, text = request.param
    tokenizer = saved(
        byte_level(("<|endoftext|>", "<image>", "<|im_end|>")), root / "theirs", CHATML, eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )  # fmt: skip
    prefix, values = copy.deepcopy(CASES[text])
    sizes = {"vocab_size": len(tokenizer) + PADDING, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 40}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": tokenizer.eos_token_id}
    strategy = "default" if tower == "CLIP" else "full"
    vision = {
        "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 28,
        "patch_size": 7,
    } | ({"vision_use_head": False} if tower == "Siglip" else {})  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=getattr(transformers, f"{tower}VisionConfig")(**vision),
        text_config=getattr(transformers, f"{prefix}Config")(**(sizes | heads | values)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy=strategy,
    )
    torch.manual_seed(2)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    randomize(model)
    model.save_pretrained(str(root / "theirs"))
    size = {"height": 28, "width": 28}
    options = {"size": {"shortest_edge": 28}, "crop_size": size} if tower == "CLIP" else {"size": size}
    transformers.LlavaProcessor(
        getattr(transformers, f"{tower}ImageProcessor")(**options), tokenizer, patch_size=7,
        vision_feature_select_strategy=strategy, num_additional_image_tokens=int(tower == "CLIP"),
    ).save_pretrained(str(root / "theirs"))  # fmt: skip
    assert main(["import", str(root / "theirs"), "--out", str(root / "ours")]) == 0
    return root, model


def test_a_llava_comes_in_and_goes_out_as_it_came(llava, tmp_path, capsys):
    root, _ = llava
    said = json.loads(run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "out", "--json"))
    assert said["format"] == "llava"
    was, now = (load_file(folder / "model.safetensors") for folder in (root / "theirs", tmp_path / "out"))
    assert was.keys() == now.keys()
    assert all(torch.equal(was[name], now[name]) and was[name].dtype == now[name].dtype for name in was)
    for path in (root / "theirs").iterdir():
        if path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    check_llava_logits(root / "ours", tmp_path / "out")


def test_a_llava_that_grew_and_its_decoder_alone_go_out_too(llava, tmp_path, capsys):
    root, theirs = llava
    run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "more", "--keep_added")
    check_llava_logits(root / "ours", tmp_path / "more")
    run(capsys, "export", "--model", root / "ours", "--out", tmp_path / "text", "--format", "decoder")
    decoder = transformers.AutoModelForCausalLM.from_pretrained(str(tmp_path / "text"), local_files_only=True)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(decoder(ids).logits, theirs(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_a_llava_with_another_tower_is_refused(llava, tmp_path, capsys):
    root, _ = llava
    line = ["import", root / "theirs", "--out", tmp_path / "ours", "--vision", "ViT-B-32"]
    assert "has an image tower of its own" in run(capsys, *line, code=2)


def test_each_part_keeps_its_dtype_and_they_run_together(tmp_path, capsys):
    """A decoder in bfloat16 with a tower in float32: neither is rounded to the other's."""
    save_checkpoint(tmp_path / "text", "llama", "byte_fallback", dtype=torch.bfloat16)
    save_tower(tmp_path / "tower")
    line = ["import", tmp_path / "text", "--out", tmp_path / "ours", "--vision", tmp_path / "tower", "--json"]
    said = json.loads(run(capsys, *line))
    assert said["dtypes"] == {"decoder": "bfloat16", "image tower": "float32", "image projector": "bfloat16"}
    model = mmllm.load(tmp_path / "ours")
    assert isinstance(model.caption(picture(0), max_new_tokens=4), str)
    whole = mmllm.load(tmp_path / "ours", dtype="float32")
    assert whole.score("a", "b c") == pytest.approx(model.score("a", "b c"), rel=0.05)
    said = json.loads(run(capsys, "export", "--model", tmp_path / "ours", "--out", tmp_path / "out", "--json"))
    assert any("the image tower is float32" in note for note in said["notes"])
    wide = load_model(tmp_path / "ours", dtype=torch.float32)  # as a training writes it
    transform, source = wide.image_transform, tmp_path / "ours" / "source"
    save_model(tmp_path / "wide", wide.model, wide.tokenizer, image_transform=transform, source=source)
    line = ["export", "--model", tmp_path / "wide", "--out", tmp_path / "out-wide", "--json"]
    assert "weights are float32; those that were imported were bfloat16" in json.loads(run(capsys, *line))["notes"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_checkpoint_that_was_not_imported_is_told_from_a_model_folder(tmp_path):
    save_checkpoint(tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"is a checkpoint of transformers, not a model folder; .*mmllm import"):
        mmllm.load(tmp_path / "theirs")


def test_what_is_replaced_and_sampling_that_is_not_used_are_said(tmp_path, capsys):
    save_checkpoint(tmp_path / "theirs")
    path = tmp_path / "theirs" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True, "temperature": 0.6}))
    line = ["import", tmp_path / "theirs", "--out", tmp_path / "ours", "--json"]
    said = json.loads(run(capsys, *line))
    assert "generation_config.json: do_sample, temperature" in said["left_out"] and said["notes"] == []
    assert json.loads(run(capsys, *line))["notes"] == [f"the model that was in {tmp_path / 'ours'} before is replaced"]
    line = ["export", "--model", tmp_path / "ours", "--out", tmp_path / "out", "--json"]
    assert json.loads(run(capsys, *line))["notes"] == []
    assert "before is replaced" in json.loads(run(capsys, *line))["notes"][0]
