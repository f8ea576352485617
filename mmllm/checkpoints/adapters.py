"""Adapters of a decoder through PEFT: made, saved in PEFT's own layout, loaded, chosen among, and merged.

```
adapters/NAME/adapter_config.json        PEFT's config, for the decoder as transformers has it
adapters/NAME/adapter_model.safetensors  its weights, under the names that PEFT gives them on transformers' model
adapters/NAME/base.json                  which decoder it was trained on
```

PEFT's classes are the optional extra `adapt`; nothing of it is imported before an adapter is asked for.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmllm.checkpoints.adapter_config import AdapterConfig
from mmllm.checkpoints.files import ADAPTERS, read_json, write_json
from mmllm.checkpoints.peft_library import peft_library
from mmllm.checkpoints.weights import Checkpoint
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.virtual_tokens import VirtualTokens
from mmllm_tokenizers.tensor_file import save_tensors

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
PREFIX = "base_model.model.model."
"""What PEFT's names of a transformers decoder begin with; ours follow."""
_HEAD_NUMBERS = 16384
"""Of each weight, by which a base is known."""
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_KINDS = {"PROMPT_TUNING": "prompt_tuning", "PREFIX_TUNING": "prefix_tuning"}
"""PEFT's names of adapters that are tokens, and ours."""
_TOKENS = "prompt_embeddings"
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")


def check_name(name: str) -> None:
    """Raises ValueError where an adapter's name would be no plain folder's, or no part of a weight's name."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"the adapter's name is {name!r}; use letters, digits, _ and -")


# --- in a decoder -----------------------------------------------------------------------------------------------------


def add_adapter(decoder: Decoder, config: AdapterConfig, name: str) -> None:
    """Puts a new adapter into a decoder, in place; its output is 0 until it is trained.

    Args:
        decoder: whose other parameters become frozen.
        config: of the adapter.
        name: among those of this decoder.

    Raises:
        ValueError: the decoder lacks a target, or has an adapter with other stacks of experts.
        ModuleNotFoundError: without PEFT.
    """
    check_name(name)
    if config.kind != "lora":
        _add_tokens(decoder, config, name)
        return
    modules, parameters = config.targets(decoder.config)
    lora = peft_library().LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=list(modules),
        target_parameters=list(parameters) or None,
        task_type="CAUSAL_LM",
    )
    _inject(decoder, lora, name)


def _add_tokens(decoder: Decoder, config: AdapterConfig, name: str) -> None:
    assert config.kind != "lora"
    tokens = VirtualTokens(config.kind, config.num_virtual_tokens, decoder.config)
    weight = decoder.embed_tokens.weight
    decoder.virtual_tokens[name] = tokens.to(weight.device, weight.dtype) if not weight.is_meta else tokens
    set_adapter(decoder, name)


def _inject(decoder: Decoder, lora: Any, name: str) -> None:
    decoder.active_virtual = None
    for other, theirs in _lora_configs(decoder).items():
        if sorted(theirs.target_parameters or ()) != sorted(lora.target_parameters or ()):
            raise ValueError(
                f"adapter {name} adapts the parameters {sorted(lora.target_parameters or ())}, and adapter {other}, "
                f"which is loaded, {sorted(theirs.target_parameters or ())}; PEFT can't hold both: load one at a time"
            )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        peft_library().inject_adapter_in_model(lora, decoder, name)


def adapter_names(decoder: Decoder) -> list[str]:
    """Names of the adapters that a decoder has."""
    return [*_lora_configs(decoder), *decoder.virtual_tokens]


def _lora_configs(decoder: Decoder) -> dict[str, Any]:
    """PEFT's config of each LoRA, by name."""
    return dict(getattr(decoder, "peft_config", {}))


def set_adapter(decoder: Decoder, name: str | None) -> None:
    """Chooses the adapter that a decoder runs with.

    Args:
        decoder: with its adapters.
        name: of one of them; None: the decoder runs as if it had none.

    Raises:
        ValueError: it has no adapter of this name.
    """
    names = adapter_names(decoder)
    if name is not None and name not in names:
        raise ValueError(f"there is no adapter {name!r}; loaded are {', '.join(names) or 'none'}")
    decoder.active_virtual = name if name is not None and name in decoder.virtual_tokens else None
    is_lora = name in _lora_configs(decoder)
    for layer in _layers(decoder):
        layer.enable_adapters(is_lora)
        if is_lora:
            layer.set_adapter([name], inference_mode=True)


def _layers(decoder: Decoder) -> Iterator[Any]:
    """PEFT's modules around ours."""
    yield from (module for module in decoder.modules() if hasattr(module, "enable_adapters"))


def merge_adapter(decoder: Decoder, name: str) -> None:
    """Adds an adapter to the decoder's own weights, in place, and takes all adapters out.

    Raises:
        ValueError: there is none of this name, it isn't finite, or it adds nothing to weights.
    """
    if name in decoder.virtual_tokens:
        raise ValueError(f"adapter {name} is tokens before each document, which no weights can hold; use it as it is")
    set_adapter(decoder, name)
    for layer in list(_layers(decoder)):
        layer.merge(safe_merge=True, adapter_names=[name])
    wrapped: list[tuple[str, Any]] = [(p, m) for p, m in decoder.named_modules() if hasattr(m, "enable_adapters")]
    for path, layer in reversed(wrapped):  # the inner ones first
        owner, _, leaf = path.rpartition(".")
        setattr(decoder.get_submodule(owner), leaf, layer.get_base_layer())
    del decoder.peft_config
    decoder.virtual_tokens = nn.ModuleDict()


def keep_stacks_uncompiled(decoder: Decoder) -> bool:
    """Leaves PEFT's modules around stacks of experts to Python: they change modules while they run.

    Returns:
        Whether there are any, so that compiled layers have breaks.
    """
    stacks = [layer for layer in _layers(decoder) if hasattr(layer, "parameter_name")]
    for layer in stacks:
        layer.forward = torch.compiler.disable(layer.forward)
    return bool(stacks)


def is_adapters(name: str) -> bool:
    """Whether a parameter or tensor belongs to an adapter."""
    return ".lora_" in name or "virtual_tokens." in name


def base_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without adapters, under the names that it has without them."""
    return {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if not is_adapters(name)}


# --- on disk ----------------------------------------------------------------------------------------------------------


def adapter_folder(model_folder: str | Path, name: str) -> Path:
    """Where a model folder has an adapter.

    Raises:
        FileNotFoundError: it has none of this name.
    """
    check_name(name)
    folder = Path(model_folder) / ADAPTERS / name
    if not (folder / CONFIG).is_file():
        names = saved_adapters(model_folder)
        raise FileNotFoundError(f"{folder} has no {CONFIG}; {model_folder} has {', '.join(names) or 'no adapters'}")
    return folder


def saved_adapters(model_folder: str | Path) -> list[str]:
    """Names of the adapters that a model folder has."""
    folder = Path(model_folder) / ADAPTERS
    return sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))


def adapter_tensors(decoder: Decoder, name: str, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """An adapter's weights under the names that PEFT saves on a transformers model.

    Args:
        decoder: with the adapter.
        name: the adapter's.
        state: the decoder's state dict, where its tensors lie elsewhere (gathered from ranks); None: its own.
    """
    given = dict(decoder.state_dict() if state is None else state)
    if name in decoder.virtual_tokens:
        return {_TOKENS: given[f"virtual_tokens.{name}.{_TOKENS}"]}
    found = peft_library().get_peft_model_state_dict(decoder, given, adapter_name=name)
    return {PREFIX + key: tensor for key, tensor in found.items()}


def save_adapter(
    folder: Path, decoder: Decoder, name: str, base: Mapping[str, Any], state: Mapping[str, Tensor] | None = None
) -> None:
    """Writes an adapter's folder.

    Args:
        folder: that is made.
        decoder: with the adapter.
        name: the adapter's.
        base: of `base_facts`, of the model folder that it belongs to.
        state: as of `adapter_tensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = adapter_tensors(decoder, name, state)
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_tensors(plain, folder / WEIGHTS, metadata={"format": "pt"})
    config = _tokens_config(decoder, name) if name in decoder.virtual_tokens else _lora_configs(decoder)[name]
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    values |= {"inference_mode": True}
    write_json(folder / CONFIG, json.loads(json.dumps(values, default=str)))
    write_json(folder / BASE, dict(base))


def _tokens_config(decoder: Decoder, name: str) -> Any:
    """PEFT's config of tokens: it counts key-value heads as heads."""
    tokens: Any = decoder.virtual_tokens[name]
    num_layers, _, num_heads, channels = tokens.heads
    is_prompt = tokens.kind == "prompt_tuning"
    config_class = peft_library().PromptTuningConfig if is_prompt else peft_library().PrefixTuningConfig
    return config_class(
        task_type="CAUSAL_LM",
        num_virtual_tokens=tokens.num_tokens,
        token_dim=decoder.config.hidden_size if is_prompt else num_heads * channels,
        num_transformer_submodules=1,
        num_attention_heads=decoder.config.num_attention_heads if is_prompt else num_heads,
        num_layers=num_layers,
    )


def base_facts(checkpoint: Checkpoint, config: DecoderConfig) -> dict[str, Any]:
    """What tells a decoder from others: its sizes, and a hash of the beginning of each of its weights.

    Rows of the vocabulary behind `num_base_ids` are left out: it stays the same decoder when they are trained. So it
    does in another dtype that holds the same numbers, as training writes what was imported in bfloat16.
    """
    digest = hashlib.sha256()
    for name, spec in sorted(checkpoint.specs.items()):
        if not name.startswith("decoder."):
            continue
        shape = spec.shape
        if config.num_base_ids and name.removeprefix("decoder.") in _VOCABULARY:
            shape = (config.num_base_ids, *shape[1:])
        num_bytes = min(_HEAD_NUMBERS, math.prod(shape)) * spec.dtype.itemsize
        numbers = torch.frombuffer(bytearray(checkpoint.read_start(name, num_bytes)), dtype=spec.dtype)
        digest.update(f"{name} {list(shape)}".encode())
        digest.update(numbers.double().numpy().data)
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return {**{key: getattr(config, key) for key in sizes}, "weights": digest.hexdigest()}


def copy_adapters(source: Path, target: Path, before: Mapping[str, Any], base: Mapping[str, Any], but: str) -> None:
    """Copies a model folder's adapters to another, where the decoder is the same.

    Args:
        source: the model folder.
        target: the other.
        before: of `base_facts`, of the model folder.
        base: of the other.
        but: name of one that stays behind.
    """
    for name in saved_adapters(source):
        folder = source / ADAPTERS / name
        if name == but:
            continue
        written = read_json(folder / BASE) if (folder / BASE).is_file() else dict(before)  # PEFT's own name none
        if written != dict(base):
            log.warning("adapter %s of %s stays behind: the decoder's weights were trained", name, source)
            continue
        shutil.copytree(folder, target / ADAPTERS / name)


def load_adapter(decoder: Decoder, folder: str | Path, name: str, base: Mapping[str, Any] | None = None) -> None:
    """Puts an adapter from disk into a decoder, in place.

    Args:
        decoder: with weights of the base.
        folder: written here, or by PEFT for the decoder as transformers has it.
        name: among those of this decoder.
        base: of `base_facts`; None: nobody knows, and only sizes are compared.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it is of another kind, damaged, or of another base; the message names file and field.
        ModuleNotFoundError: without PEFT.
    """
    folder = Path(folder)
    check_name(name)
    if name in adapter_names(decoder):
        raise ValueError(f"there is an adapter {name} already; give the one in {folder} another name")
    values = _read_config(folder)
    _check_base(folder, base)
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"{folder / WEIGHTS} doesn't exist; an adapter is {CONFIG} and {WEIGHTS}")
    stored = Checkpoint.open_file(folder / WEIGHTS)
    if values["peft_type"] in _KINDS:
        _load_tokens(decoder, folder, stored, values, name)
    else:
        _load_lora(decoder, folder, stored, _lora_config(folder, values), name)


def _load_tokens(decoder: Decoder, folder: Path, stored: Checkpoint, values: Mapping[str, Any], name: str) -> None:
    count = values.get("num_virtual_tokens")
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"{folder / CONFIG} has num_virtual_tokens {count!r}; wanted a number: save it again")
    if values.get("prefix_projection"):
        raise ValueError(f"{folder / CONFIG} has prefix_projection true, whose MLP isn't known here; train it without")
    tokens = VirtualTokens(_KINDS[values["peft_type"]], count, decoder.config)  # pyright: ignore[reportArgumentType]
    wanted = {_TOKENS: tuple(tokens.prompt_embeddings.shape)}
    _check_tensors(folder, wanted, {key: spec.shape for key, spec in stored.specs.items()})
    weight = decoder.embed_tokens.weight
    tokens.prompt_embeddings.data = stored.read(_TOKENS).to(weight.device, weight.dtype)
    decoder.virtual_tokens[name] = tokens


def _load_lora(decoder: Decoder, folder: Path, stored: Checkpoint, lora: Any, name: str) -> None:
    foreign = [key for key in stored.specs if not key.startswith(PREFIX)]
    if foreign:
        raise ValueError(
            f"{folder / WEIGHTS} has {foreign[0]}; wanted names that begin with {PREFIX}, as PEFT gives them on a "
            f"decoder of transformers: save the adapter of such a model"
        )
    try:
        _inject(decoder, lora, name)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    wanted = {key: tuple(tensor.shape) for key, tensor in adapter_tensors(decoder, name).items()}
    _check_tensors(folder, wanted, {key: spec.shape for key, spec in stored.specs.items()})
    state = {key.removeprefix(PREFIX): stored.read(key) for key in stored.specs}
    peft_library().set_peft_model_state_dict(decoder, state, adapter_name=name)


def _check_tensors(folder: Path, wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> None:
    problem = _difference(wanted, got)
    if problem:
        raise ValueError(f"{folder / WEIGHTS} {problem}; it is an adapter of another base: load it with that")


def _difference(wanted: Mapping[str, tuple[int, ...]], got: Mapping[str, tuple[int, ...]]) -> str | None:
    """The first thing in which an adapter's tensors aren't those that its config makes of this decoder."""
    for key in sorted(wanted.keys() | got.keys()):
        if key not in got:
            return f"lacks {key}, which the decoder's {list(wanted[key])} asks for"
        if key not in wanted:
            return f"has {key}, but the decoder has no such layer"
        if wanted[key] != got[key]:
            return f"has {key} of shape {list(got[key])}, but the decoder wants {list(wanted[key])}"
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist; an adapter is {CONFIG} and {WEIGHTS}")
    values = read_json(path)
    kind = values.get("peft_type")
    if kind not in ("LORA", *_KINDS):
        raise ValueError(f"{path} has peft_type {kind!r}; LORA, {' and '.join(_KINDS)} can be loaded")
    return values


def _lora_config(folder: Path, values: dict[str, Any]) -> Any:
    """PEFT's config of a LoRA for the decoder as it is here."""
    path = folder / CONFIG
    for key, plain in (("bias", "none"), ("modules_to_save", None), ("trainable_token_indices", None)):
        if values.get(key, plain) not in (plain, [], {}):
            raise ValueError(
                f"{path} has {key} {values[key]!r}, wanted {plain!r}: it changes weights of the base; merge it with "
                f"PEFT and import the result"
            )
    for key in ("r", "lora_alpha"):
        if not isinstance(values.get(key), (int, float)):
            raise ValueError(f"{path} has {key} {values.get(key)!r}; wanted a number: save the adapter again")
    config_class = peft_library().LoraConfig
    known = {field.name for field in dataclasses.fields(config_class)}
    values = {key: value for key, value in values.items() if key in known and key not in ("peft_type", "revision")}
    values |= {"base_model_name_or_path": None, "inference_mode": True}
    for key in ("target_modules", "target_parameters"):
        if isinstance(values.get(key), list):
            values[key] = [str(target).removeprefix("model.") for target in values[key]]
    try:
        return config_class(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no config of PEFT's LoRA: {error}; save the adapter again") from error


def _check_base(folder: Path, base: Mapping[str, Any] | None) -> None:
    path = folder / BASE
    if base is None or not path.is_file():  # PEFT's own adapters name no weights
        return
    written = read_json(path)
    for key, own in base.items():
        if written.get(key) != own:
            raise ValueError(
                f"{path} has {key} {_short(written.get(key))}, the model {_short(own)}: it is an adapter of another "
                f"base; load it with the model that it was trained on"
            )


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) > 12 else str(value)


def reset_magnitudes(decoder: Decoder, name: str) -> None:
    """Takes DoRA's norms from the decoder's weights anew, once those are loaded."""
    for layer in _layers(decoder):
        vectors = getattr(layer, "lora_magnitude_vector", {})
        if name in vectors:
            layer.lora_variant[name].init(layer, adapter_name=name, config=_lora_configs(decoder)[name])
            vectors[name].requires_grad_(True)
