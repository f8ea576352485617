"""Decoders to and from transformers checkpoints: Mixtral, and Qwen3-MoE where there are dense layers.

Only the decoder travels: token ids in, logits out. Images and sounds are this project's own.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from mmllm.model.decoder import Decoder, DecoderConfig
from mmllm.model.moe import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_KEY = "mmllm_tokenizer"
"""In an exported config.json: the hash of the tokenizer folder."""


def export_family(config: DecoderConfig) -> str:
    """Which transformers family computes the same function: "mixtral" or "qwen3_moe".

    Mixtral has experts in every layer and renormalises the chosen gates; Qwen3-MoE normalises queries
    and keys and allows dense layers.

    Raises:
        ValueError: for a config of neither family, naming the first layer that does not fit.
    """
    dense = [layer for layer in range(config.num_layers) if not config.has_experts(layer)]
    if config.moe is None or len(dense) == config.num_layers:
        raise ValueError(
            "layer 0 is dense, as all layers are; Mixtral and Qwen3-MoE have experts: train with decoder.moe to export"
        )
    if config.qk_norm:
        return "qwen3_moe"
    if dense:
        raise ValueError(
            f"layer {dense[0]} is dense and decoder.qk_norm is false: Mixtral has no dense layers, and Qwen3-MoE "
            f"has them only with qk_norm; set moe_layers: all, or qk_norm: true"
        )
    if not config.moe.renormalise:
        raise ValueError(
            "layer 0 does not renormalise its gates (moe.renormalise is false), which Mixtral always does; "
            "set moe.renormalise: true, or qk_norm: true to export to Qwen3-MoE"
        )
    return "mixtral"


def to_transformers(decoder: Decoder, max_positions: int = 32768) -> PreTrainedModel:
    """A transformers model with copies of the decoder's weights.

    Raises:
        ValueError: see `export_family`.
        ModuleNotFoundError: without transformers.
    """
    config = decoder.config
    family = export_family(config)
    transformers = _transformers()
    assert config.moe is not None
    common: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "num_experts_per_tok": config.moe.top_k,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": max_positions,
        "router_aux_loss_coef": config.moe.balance_weight,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "mixtral":
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                intermediate_size=config.moe.expert_width, num_local_experts=config.moe.num_experts, **common
            )
        )
    else:
        model = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                intermediate_size=config.mlp_width,
                moe_intermediate_size=config.moe.expert_width,
                num_experts=config.moe.num_experts,
                norm_topk_prob=config.moe.renormalise,
                mlp_only_layers=[i for i in range(config.num_layers) if not config.has_experts(i)],
                **common,
            )
        )
    model.to(decoder.embedding.weight.dtype)
    missing, unexpected = model.load_state_dict(_to_theirs(decoder), strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise RuntimeError(f"this transformers version names weights otherwise: missing {missing}, new {unexpected}")
    model.tie_weights()
    return model.eval()


def to_mixtral(decoder: Decoder, folder: str | Path, tokenizer: str | None = None) -> str:
    """Writes the decoder as a transformers checkpoint.

    Args:
        decoder: what to write.
        folder: where to.
        tokenizer: hash of the tokenizer folder that the ids belong to; kept in config.json.

    Returns:
        The family, "mixtral" or "qwen3_moe".
    """
    model = to_transformers(decoder)
    if tokenizer is not None:
        setattr(model.config, TOKENIZER_KEY, tokenizer)
    with _quiet(_transformers()):
        model.save_pretrained(str(folder))
    return str(model.config.model_type)


def tokenizer_of(folder: str | Path) -> str | None:
    """Hash of the tokenizer folder that a checkpoint's ids belong to; None where mmllm didn't write it."""
    path = Path(folder) / "config.json"
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get(TOKENIZER_KEY)
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no checkpoint's config: {error}") from error
    return None if value is None else str(value)


def from_mixtral(source: PreTrainedModel | str | Path) -> Decoder:
    """A decoder with the weights of a Mixtral or Qwen3-MoE model, or of the folder of one.

    Raises:
        ValueError: for another family, a variant that this decoder does not compute, or a damaged checkpoint.
        FileNotFoundError: for a folder that does not exist.
        ModuleNotFoundError: without transformers.
    """
    model: Any = _read(Path(source)) if isinstance(source, (str, Path)) else source
    decoder = Decoder(decoder_config(model.config))
    decoder.to(next(iter(model.parameters())).dtype)
    decoder.load_state_dict(_to_ours(decoder, model.state_dict()))
    return decoder


def _read(folder: Path) -> Any:
    """The model of a folder. What transformers would fill in at random, or leave out, is an error here."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give the folder of a Mixtral or Qwen3-MoE checkpoint")
    transformers = _transformers()
    with _quiet(transformers) as reports:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        decoder_config(config)  # refuses what can't be imported before gigabytes are read
        try:
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                str(folder), local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (SafetensorError, RuntimeError, KeyError) as error:
            named = re.findall(r"^(\S+) *\|.*CONVERSION", "\n".join(reports), re.MULTILINE)
            what = f": weights are missing in {', '.join(named[:3])}" if named else f" can't be read: {error}"
            raise ValueError(f"the weights in {folder}{what}; copy the checkpoint again") from error
    problems = {
        "lacks": found["missing_keys"],
        "has the unknown": found["unexpected_keys"],
        "has the wrong shape for": [key[0] for key in found["mismatched_keys"]],
    }
    for problem, names in problems.items():
        if names:
            shown = ", ".join(sorted(names)[:3])
            raise ValueError(f"{folder} {problem} weights {shown} ({len(names)} in all); it isn't what its config says")
    return model


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[list[str]]:
    """Without its bars; what it would log is given. What matters in that is raised."""
    bars, logger = transformers.utils.logging, logging.getLogger("transformers")
    had_bars, handlers, propagate = bars.is_progress_bar_enabled(), logger.handlers, logger.propagate
    collector = _Collector()
    bars.disable_progress_bar()
    logger.handlers, logger.propagate = [collector], False
    try:
        yield collector.messages
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        if had_bars:
            bars.enable_progress_bar()


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def decoder_config(config: Any) -> DecoderConfig:
    """The decoder config that computes what a Mixtral or Qwen3-MoE config describes."""
    _check_family(config.model_type)
    is_qwen = config.model_type == "qwen3_moe"
    rope = dict(config.rope_parameters or {})
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"the checkpoint's rope_type is {rope['rope_type']!r}; only 'default' is supported")
    if config.hidden_act != "silu":
        raise ValueError(f"the checkpoint's hidden_act is {config.hidden_act!r}; only 'silu' is supported")
    if config.sliding_window is not None:
        raise ValueError(f"the checkpoint's sliding_window is {config.sliding_window}; only null is supported")
    if getattr(config, "attention_bias", False):
        raise ValueError("the checkpoint has attention_bias; only checkpoints without biases are supported")
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if is_qwen and (layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step)
    ]
    experts = tuple(layer for layer in range(config.num_hidden_layers) if layer not in dense)
    return DecoderConfig(
        vocab_size=config.vocab_size,
        width=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_width=getattr(config, "head_dim", None),
        mlp_width=config.intermediate_size,
        moe=MoEConfig(
            num_experts=config.num_local_experts,
            top_k=config.num_experts_per_tok,
            expert_width=config.moe_intermediate_size if is_qwen else config.intermediate_size,
            renormalise=bool(config.norm_topk_prob) if is_qwen else True,
        ),
        moe_layers=experts if dense else "all",
        rope_theta=float(rope["rope_theta"]),
        norm_eps=config.rms_norm_eps,
        qk_norm=is_qwen,
        tie_embeddings=config.tie_word_embeddings,
    )


def _check_family(family: str) -> None:
    if family not in ("mixtral", "qwen3_moe"):
        raise ValueError(f"the checkpoint's model_type is {family!r}; mixtral and qwen3_moe can be imported")


def _transformers() -> Any:
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("transformers is not installed; pip install 'mmllm[transformers]'") from error
    return transformers


def _names(decoder: Decoder) -> dict[str, str]:
    """Our names to theirs, where a weight is one tensor on both sides."""
    names = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
    if decoder.output is not None:
        names["output.weight"] = "lm_head.weight"
    for layer in range(decoder.config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        names[f"{ours}.attention_norm.weight"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}.attention.out.weight"] = f"{theirs}.self_attn.o_proj.weight"
        names[f"{ours}.mlp_norm.weight"] = f"{theirs}.post_attention_layernorm.weight"
        if decoder.config.qk_norm:
            names[f"{ours}.attention.q_norm_C"] = f"{theirs}.self_attn.q_norm.weight"
            names[f"{ours}.attention.k_norm_C"] = f"{theirs}.self_attn.k_norm.weight"
        if decoder.config.has_experts(layer):
            names[f"{ours}.mlp.router_ED"] = f"{theirs}.mlp.gate.weight"
            names[f"{ours}.mlp.gate_up_E2ID"] = f"{theirs}.mlp.experts.gate_up_proj"
            names[f"{ours}.mlp.down_EDI"] = f"{theirs}.mlp.experts.down_proj"
        else:
            names[f"{ours}.mlp.down.weight"] = f"{theirs}.mlp.down_proj.weight"
    return names


def _stacks(decoder: Decoder) -> dict[str, tuple[list[str], list[int]]]:
    """Our stacked weights: their names in row order, and their numbers of rows."""
    config = decoder.config
    heads = [config.num_heads, config.kv_heads, config.kv_heads]
    stacks: dict[str, tuple[list[str], list[int]]] = {}
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        qkv = [f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"]
        stacks[f"{ours}.attention.qkv.weight"] = (qkv, [number * config.head_channels for number in heads])
        if not config.has_experts(layer):
            gate_up = [f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")]
            stacks[f"{ours}.mlp.gate_up.weight"] = (gate_up, [config.mlp_width] * 2)
    return stacks


def _to_theirs(decoder: Decoder) -> dict[str, Tensor]:
    ours = decoder.state_dict()
    theirs = {name: ours[our_name] for our_name, name in _names(decoder).items()}
    for our_name, (names, rows) in _stacks(decoder).items():
        theirs.update(zip(names, ours[our_name].split(rows), strict=True))
    return theirs


def _to_ours(decoder: Decoder, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    ours = {our_name: theirs[name] for our_name, name in _names(decoder).items()}
    for our_name, (names, _) in _stacks(decoder).items():
        ours[our_name] = torch.cat([theirs[name] for name in names])
    return ours
