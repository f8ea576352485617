"""Decoders of every family, as transformers saved them: what they compute here, and that they go out as they came."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmllm.checkpoints.weights import Checkpoint, write_weights
from mmllm.interop.decoder_names import LLAVA, Names
from mmllm.interop.decoders import DecoderReader, DecoderWriter, read_config, read_decoder
from mmllm.interop.family_configs import family_config
from tests.interop_fixtures import CASES, Case, case, continued, our_generation, our_logits, saved

transformers = pytest.importorskip("transformers", reason="needs the transformers extra")

TOLERANCE = 1e-4
NUM_GENERATED = 50


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose time with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(params=CASES)
def each(request: pytest.FixtureRequest, root: Path) -> Case:
    return case(request.param, root)


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def their_logits(model, ids_BT: Tensor, mask_BT: Tensor | None = None) -> Tensor:
    positions_BT = None if mask_BT is None else (mask_BT.cumsum(1) - 1).clamp(min=0)
    return model(ids_BT, attention_mask=mask_BT, position_ids=positions_BT).logits


def test_logits_equal_theirs_packed_and_padded(each: Case) -> None:
    ids_BT = ids(2, 41)
    wanted = their_logits(each.theirs, ids_BT)
    assert wanted.std() > 0.3, "differences would drown"
    torch.testing.assert_close(our_logits(each.ours, ids_BT), wanted, rtol=0, atol=TOLERANCE)
    # the same two, and a short one before and between them, in one packed row
    short = ids(1, 7)[0]
    row = torch.cat([short, ids_BT[0], short[:3], ids_BT[1]])[None]
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate((7, 41, 3, 41))])[None]
    packed = our_logits(each.ours, row, documents)[0]
    torch.testing.assert_close(packed[7:48], wanted[0], rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(packed[51:], wanted[1], rtol=0, atol=TOLERANCE)
    for side in ("left", "right"):
        mask_BT = torch.ones_like(ids_BT)
        mask_BT[1, slice(0, 13) if side == "left" else slice(28, 41)] = 0
        ours = our_logits(each.ours, ids_BT, mask_BT - 1)
        theirs = their_logits(each.theirs, ids_BT, mask_BT)
        torch.testing.assert_close(ours[mask_BT == 1], theirs[mask_BT == 1], rtol=0, atol=TOLERANCE)


def test_greedy_generation_equals_theirs(each: Case) -> None:
    ids_BT, mask_BT = ids(2, 19), torch.ones(2, 19, dtype=torch.int64)
    mask_BT[1, :8] = 0
    settings = {"do_sample": False, "max_new_tokens": NUM_GENERATED, "eos_token_id": None, "pad_token_id": 0}
    theirs = each.theirs.generate(ids_BT, attention_mask=mask_BT, **settings)[:, 19:]
    assert torch.equal(our_generation(each.ours, ids_BT, mask_BT - 1, NUM_GENERATED), theirs), "with a cache"
    # without one: where each token is the likeliest behind those before it, choosing them one by one gives the same
    whole = our_logits(each.ours, torch.cat([ids_BT, theirs], dim=1), continued(mask_BT - 1, NUM_GENERATED))
    assert torch.equal(whole[:, 18:-1].argmax(dim=-1), theirs), "without a cache"


def test_it_goes_out_as_it_came_and_loads(each: Case, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(each.folder)
    reader = DecoderReader(checkpoint, read_config(each.folder))
    assert not reader.ignored and not reader.left_out
    writer = DecoderWriter(reader.config, reader.family, reader.specs)
    assert writer.specs == checkpoint.specs, "names, dtypes and shapes"
    seen = set()
    for name, tensor in writer.tensors(reader.read):
        assert torch.equal(tensor, checkpoint.read(name)), name
        seen.add(name)
    assert seen == set(checkpoint.specs)
    # with a config.json of our own
    config = family_config(reader.config, reader.family, max_positions=256)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_weights(tmp_path, writer.specs, writer.tensors(reader.read))
    again, found = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), found
    assert type(again) is type(each.theirs)
    ids_BT = ids(2, 41)
    assert torch.equal(their_logits(again, ids_BT), their_logits(each.theirs, ids_BT))
    assert read_decoder(tmp_path).config == replace(reader.config, head_dim=reader.config.head_channels)


@pytest.mark.parametrize("name", ["llama", "phi3", "mixtral", "glm4_moe", "dots1"])
def test_shards_half_precision_and_their_names_in_memory(name: str, tmp_path: Path) -> None:
    model = saved(name, tmp_path / "shards", torch.bfloat16, max_shard_size="20KB")
    checkpoint = Checkpoint.open(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    reader = DecoderReader(checkpoint, read_config(tmp_path / "shards"))
    weights = dict(reader.tensors())
    dtypes = {name: tensor.dtype for name, tensor in weights.items() if "e_score" not in name}
    assert set(dtypes.values()) == {torch.bfloat16}
    assert all(t.dtype == torch.float32 for name, t in weights.items() if "e_score" in name)
    writer = DecoderWriter(reader.config, reader.family, reader.specs)
    assert writer.specs == checkpoint.specs
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in writer.tensors(reader.read))
    # as transformers 5 holds them in memory: experts in one tensor; and inside of a model with pictures
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    forms = {
        "memory": state,
        "llava": {f"language_model.{name}": tensor for name, tensor in load_all(checkpoint).items()},
        "llava in memory": {
            name.replace("model.", "model.language_model.", 1): tensor for name, tensor in state.items()
        },
    }
    for form, tensors in forms.items():
        folder = tmp_path / form
        folder.mkdir()
        tower = {"vision_tower.patch.weight": torch.zeros(3)}
        save_file({**tensors, **tower}, folder / "model.safetensors")
        other = DecoderReader(Checkpoint.open(folder), read_config(tmp_path / "shards"), elsewhere=("vision_tower.",))
        for name, tensor in other.tensors():
            assert torch.equal(tensor, weights[name]), (form, name)
        assert other.specs == reader.specs
    assert other.names == Names("model.language_model.", "lm_head.weight")
    out = DecoderWriter(reader.config, reader.family, reader.specs, LLAVA)
    assert out.specs.keys() == forms["llava"].keys()


def load_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.specs}


def test_added_rows_stay_behind(root: Path) -> None:
    reader = DecoderReader(Checkpoint.open(case("llama", root).folder), read_config(case("llama", root).folder))
    writer = DecoderWriter(reader.config, "llama", reader.specs, num_rows=90)
    out = dict(writer.tensors(reader.read))
    for ours, theirs in (("embed_tokens.weight", "model.embed_tokens.weight"), ("lm_head.weight", "lm_head.weight")):
        assert torch.equal(out[theirs], reader.read(ours)[:90])
    assert family_config(reader.config, "llama", num_rows=90)["vocab_size"] == 90


def test_buffers_and_layers_that_predict_further_are_told(tmp_path: Path) -> None:
    saved("glm4_moe", tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    further = {"model.layers.4.eh_proj.weight": torch.zeros(32, 64), "model.layers.4.enorm.weight": torch.zeros(32)}
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.zeros(4) for layer in range(4)}
    save_file({**weights, **further, **buffers}, path)
    reader = DecoderReader(Checkpoint.open(tmp_path), read_config(tmp_path))
    assert set(reader.left_out) == set(further) and set(reader.ignored) == set(buffers)
    save_file({**weights, "model.layers.4.enorm.weight": torch.zeros(32)}, path)
    with pytest.raises(ValueError, match=r"unknown tensor model\.layers\.4\.enorm\.weight; config\.json says nothing"):
        DecoderReader(Checkpoint.open(tmp_path), read_config(tmp_path))
