"""What each parameter is to the optimizer: by the type of its module or a mark, never by its name."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mmllm import paths
from mmllm.model.open_clip_vision import build_clip
from mmllm.model.roles import mark, mark_all, parameter_roles
from mmllm.model.vision import VisionConfig
from mmllm.training.clip_module import with_text_tokens
from mmllm.training.lightning_cli import build_cli, quiet_lightning
from mmllm.training.optimizers import OptimizerConfig, parameter_groups
from tests.training_fixtures import CLIP_CONFIG, tiny_module

GROUPS = Path(__file__).parent / "golden" / "optimizer_groups.json"
CONFIGS = sorted(
    path.relative_to(paths.configs_dir()).as_posix()
    for path in paths.configs_dir().rglob("*.yaml")
    if path.parent.name not in ("studies", "scaling")
)


def _module(config: str) -> Any:
    """The module of a shipped config, at its real size, without data."""
    on_cpu = ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    with quiet_lightning():
        arguments = ["-c", str(paths.configs_dir() / config), *on_cpu, "--trainer.logger", "false"]
        module: Any = build_cli(arguments, run=False).model
    if hasattr(module, "decoder"):
        clip, module.tokenizer, module.clip = module.clip, None, None
        if clip is not None:
            towers = _module("quickstart/clip.yaml").clip_config
            module.vision = dataclasses.replace(towers, layer=module.vision.layer)
        if module.init_from is not None:  # a folder that isn't here, and the adapter of what would be in it
            module.init_from = module.adapter = None
            parts = {part: rate for part, rate in (module.optimizer.parts or {}).items() if part != "adapter"}
            module.optimizer = dataclasses.replace(module.optimizer, parts=parts or None)
        sizes = {"num_codebooks": 4, "codebook_size": 256, "codebook_dim": 48}
        if module.vision is not None:
            module.vision = dataclasses.replace(module.vision, pretrained=None)
        if module.audio is not None:
            sizes = {key: getattr(module.audio, key) or size for key, size in sizes.items()}
            module.audio = dataclasses.replace(module.audio, **sizes)
        module.decoder = dataclasses.replace(module.decoder, vocab_size=module.decoder.vocab_size or 4000)
        module.configure_model()
    elif hasattr(module, "clip_config"):
        module.clip = build_clip(with_text_tokens(module.clip_config, 512, 1, 0))
    return module


def _groups(module: Any) -> dict[str, str]:
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, module.optimizer, module.tower_of)
    placed = {names[id(p)]: group["name"] for group in groups for p in group["params"]}
    trainable = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    assert sorted(placed) == sorted(trainable) and sum(len(group["params"]) for group in groups) == len(trainable)
    return placed


def _group_by_name(module: Any, name: str, parameter: torch.Tensor, embeddings: set[int]) -> str:
    """The rule that looked for parts of names, as it was."""
    looked_up = ("embedding", "embed_tokens", "position", "queries", "attention_conv", "mlp_conv")
    heads = ("head", "mlp.gate.weight", "attnpool", "text_projection")
    is_matrix = parameter.ndim >= 2 and id(parameter) not in embeddings and not any(word in name for word in looked_up)
    is_depthwise = parameter.ndim == 3 and parameter.shape[1] == 1
    is_hidden = is_matrix and parameter.ndim <= 4 and not is_depthwise and not any(word in name for word in heads)
    use_muon = module.optimizer.muon and is_hidden
    return f"{module.tower_of(name)}/{'muon' if use_muon else 'adamw'}/{'decay' if is_matrix else 'no_decay'}"


@pytest.mark.parametrize("config", CONFIGS)
def test_the_groups_of_shipped_configs_are_listed_and_those_that_names_gave(config: str) -> None:
    with torch.device("meta"):
        module = _module(config)
    groups = _groups(module)
    embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    parameters = dict(module.named_parameters())
    assert groups == {name: _group_by_name(module, name, parameters[name], embeddings) for name in groups}
    if not config.startswith("quickstart/"):
        return
    assert _listed(groups) == json.loads(GROUPS.read_text())[config]


def _listed(groups: dict[str, str]) -> dict[str, list[str]]:
    """Names by group, with N for each number of a layer."""
    names: dict[str, set[str]] = {}
    for name, group in groups.items():
        names.setdefault(group, set()).add(re.sub(r"\b\d+\b", "N", name))
    return {group: sorted(names[group]) for group in sorted(names)}


class _Mixer(nn.Module):
    """Names that the old rule took for embeddings and heads."""

    def __init__(self) -> None:
        super().__init__()
        self.position_mlp, self.multi_head_mix = nn.Linear(4, 4), nn.Linear(4, 4)
        self.table, self.filters = nn.EmbeddingBag(5, 4), nn.Conv2d(2, 4, 3)
        self.depthwise = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 4, 3, groups=4))
        self.norm = nn.LayerNorm([2, 4])
        self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)


def test_names_decide_nothing() -> None:
    module = _Mixer()
    roles = parameter_roles(module)
    assert roles["position_mlp.weight"] == roles["multi_head_mix.weight"] == "hidden"
    assert roles["attention.in_proj_weight"] == "hidden" and roles["attention.bias_k"] == "vector"
    assert roles["table.weight"] == "embedding" and roles["filters.weight"] == "filters"
    assert roles["norm.weight"] == roles["position_mlp.bias"] == "vector"
    assert roles["depthwise.parametrizations.weight.original1"] == "filters"
    by_name = {p: group for group in parameter_groups(module, OptimizerConfig(muon=True)) for p in group["params"]}
    for weight in (module.position_mlp.weight, module.multi_head_mix.weight, module.filters.weight):
        assert by_name[weight]["use_muon"] and by_name[weight]["weight_decay"]
    assert not by_name[module.depthwise.parametrizations.weight.original1]["use_muon"]


def test_a_matrix_of_which_nothing_is_known_is_named() -> None:
    module = nn.Module()
    module.inner = nn.Module()
    module.inner.matrix = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"inner\.matrix is a matrix of Module.*roles\.mark\(module, matrix="):
        parameter_roles(module)
    mark(module.inner, matrix="hidden")
    assert parameter_roles(module) == {"inner.matrix": "hidden"}
    module.inner.matrix.optimizer_role = "head"  # pyright: ignore[reportAttributeAccessIssue]
    assert parameter_roles(module) == {"inner.matrix": "head"}, "a parameter's own mark comes first"
    module.inner = nn.Module()
    module.inner.matrix = nn.Parameter(torch.zeros(2, 3), requires_grad=False)
    assert parameter_roles(module) == {}
    with pytest.raises(AssertionError, match="no parameter other"):
        mark(module.inner, other="head")


def test_a_tied_head_is_an_embedding_and_marks_inside_stay() -> None:
    module = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Embedding(5, 3))
    module[0].weight = module[1].weight
    mark_all(module, "head")
    assert parameter_roles(module) == {"0.weight": "head"}
    module = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Embedding(5, 3))
    mark(module[0], weight="head")
    module[0].weight = module[1].weight
    assert parameter_roles(module) == {"0.weight": "embedding"}


RESNET = {**CLIP_CONFIG, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "head_width": 32}}
TIMM = {
    **CLIP_CONFIG,
    "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "image_size": 32, "timm_pool": "token"},
}


def test_parameters_of_open_clip_and_timm_are_told_apart() -> None:
    roles = parameter_roles(build_clip(VisionConfig(CLIP_CONFIG)))
    ended = {name for name, role in roles.items() if role == "head"}
    added = {name for name, role in roles.items() if role == "embedding"}
    assert ended == {"visual.proj", "text_projection"}, "the tower's own projection had been moved by Muon"
    assert added == {"visual.positional_embedding", "positional_embedding", "token_embedding.weight"}
    assert roles["visual.transformer.resblocks.0.attn.in_proj_weight"] == "hidden"
    assert roles["logit_scale"] == roles["visual.class_embedding"] == "vector"
    roles = parameter_roles(build_clip(VisionConfig(RESNET)))
    pool = {name: role for name, role in roles.items() if "attnpool" in name and name.endswith(("weight", "embedding"))}
    assert pool.pop("visual.attnpool.positional_embedding") == "embedding"
    assert set(pool.values()) == {"head"} and len(pool) == 4
    roles = parameter_roles(build_clip(VisionConfig(TIMM)))
    assert roles["visual.trunk.pos_embed"] == roles["visual.trunk.cls_token"] == "embedding"
    assert roles["visual.trunk.patch_embed.proj.weight"] == "filters"
    assert roles["visual.trunk.blocks.0.attn.qkv.weight"] == "hidden"
    assert roles["visual.head.proj.weight"] == "head"


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_roles_survive_sharding_copies_the_meta_device_and_compilers() -> None:
    module = tiny_module()
    module.configure_model()
    model: Any = module.model
    roles = parameter_roles(model)
    assert set(roles.values()) == {"embedding", "vector", "head", "hidden", "filters"}
    assert parameter_roles(copy.deepcopy(model)) == roles
    assert parameter_roles(copy.deepcopy(model).to("meta").to_empty(device="cpu")) == roles
    compiled = parameter_roles(torch.compile(model))  # pyright: ignore[reportArgumentType]
    assert {name.removeprefix("_orig_mod."): role for name, role in compiled.items()} == roles
    mesh = init_device_mesh("cpu", (1,))
    for block in model.decoder.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert parameter_roles(model) == roles
