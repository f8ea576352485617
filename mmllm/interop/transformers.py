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

from safetensors import SafetensorError
from torch import Tensor

from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.rope import RopeScaling
from mmllm.model.router import MoEConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_KEY = "mmllm_tokenizer"
"""In an exported config.json: the hash of the tokenizer folder."""
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
}
"""Of each `rope_type` the keys of `rope_parameters` that are known here."""


def export_family(config: DecoderConfig) -> str:
    """Which transformers family computes the same function: "mixtral" or "qwen3_moe".

    Mixtral has experts in every layer and renormalizes the chosen gates; Qwen3-MoE normalizes queries
    and keys and allows dense layers.

    Raises:
        ValueError: for a config of neither family, naming the first layer or the switch that does not fit.
    """
    dense = [layer for layer in range(config.num_hidden_layers) if not config.has_experts(layer)]
    if config.moe is None or len(dense) == config.num_hidden_layers:
        raise ValueError(
            "layer 0 is dense, as all layers are; Mixtral and Qwen3-MoE have experts: train with decoder.moe to export"
        )
    _check_switches(config.moe)
    _check_attention(config)
    if config.mod_layers:
        raise ValueError(
            f"decoder.mod_layers names layer {config.mod_layers[0]}; no family has a mixture of depths: "
            f"train with mod_layers: [] to export"
        )
    if config.qk_norm_over == "head":
        return "qwen3_moe"
    if config.bias_of != "none":
        raise ValueError(
            f"decoder.attention_bias is {config.bias_of!r} and decoder.qk_norm is 'none': Mixtral has no biases, and "
            f"Qwen3-MoE has them only with qk_norm; train with attention_bias: none, or qk_norm: head to export"
        )
    if dense:
        raise ValueError(
            f"layer {dense[0]} is dense and decoder.qk_norm is false: Mixtral has no dense layers, and Qwen3-MoE "
            f"has them only with qk_norm; set moe_layers: all, or qk_norm: true"
        )
    if not config.moe.norm_topk_prob:
        raise ValueError(
            "layer 0 does not renormalize its gates (moe.norm_topk_prob is false), which Mixtral always does; "
            "set moe.norm_topk_prob: true, or qk_norm: true to export to Qwen3-MoE"
        )
    return "mixtral"


def _check_switches(moe: MoEConfig) -> None:
    """Refuses what changes the function and neither family has; noise and dropout of experts are of training alone."""
    plain = MoEConfig()
    for key in ("scoring_func", "routed_scaling_factor", "n_shared_experts", "use_expert_bias", "modality_experts"):
        got, wanted = getattr(moe, key), getattr(plain, key)
        if got != wanted:
            raise ValueError(
                f"decoder.moe.{key} is {got!r}; Mixtral and Qwen3-MoE compute {wanted!r} alone: train with "
                f"{key}: {'null' if wanted is None else str(wanted).lower()} to export"
            )
    if moe.topk_group < moe.n_group:
        raise ValueError(
            f"decoder.moe.topk_group is {moe.topk_group} of n_group {moe.n_group}; Mixtral and Qwen3-MoE limit no "
            f"token to groups of experts: train with n_group: 1 to export"
        )


def _check_attention(config: DecoderConfig) -> None:
    """Refuses attention that neither family computes, or that is not exported."""
    if config.qk_norm_over == "width":
        raise ValueError(
            "decoder.qk_norm is 'width'; Qwen3-MoE normalizes each head and Mixtral none: train with qk_norm: head or "
            "none to export"
        )
    if config.bias_of == "qkv":
        raise ValueError(
            "decoder.attention_bias is 'qkv'; Qwen3-MoE has biases of all four projections or of none: train with "
            "attention_bias: all or none to export"
        )
    sliding = [layer for layer in range(config.num_hidden_layers) if config.is_sliding(layer)]
    if sliding:
        raise ValueError(
            f"decoder.sliding_window is {config.sliding_window} in layer {sliding[0]}; windows are not exported: train "
            f"with sliding_window: null to export"
        )
    if config.prefix != "none":
        raise ValueError(
            f"decoder.prefix is {config.prefix!r}; Mixtral and Qwen3-MoE are causal throughout: train with prefix: "
            f"none to export"
        )


def _rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """Theta and scaling under their keys, which are ours."""
    scaling = config.rope_scaling
    if scaling is None:
        return {"rope_type": "default", "rope_theta": config.rope_theta}
    keys = _ROPE_KEYS[scaling.rope_type]
    given = {key: value for key in keys if (value := getattr(scaling, key)) is not None}
    return {"rope_type": scaling.rope_type, "rope_theta": config.rope_theta, **given}


def _rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    """What `_rope_parameters` would have written.

    Raises:
        ValueError: a type or a key that this decoder does not know.
    """
    rope_type = rope.get("rope_type", "default")
    if rope_type == "default":
        return None
    if rope_type not in _ROPE_KEYS:
        raise ValueError(
            f"the checkpoint's rope_type is {rope_type!r}; default, {', '.join(_ROPE_KEYS)} can be imported"
        )
    given = {key: value for key, value in rope.items() if key not in ("rope_type", "rope_theta") and value is not None}
    unknown = sorted(set(given) - set(_ROPE_KEYS[rope_type]))
    if unknown:
        raise ValueError(
            f"the checkpoint's rope_parameters have {unknown[0]}, which {rope_type!r} does not know here; it knows "
            f"{', '.join(_ROPE_KEYS[rope_type])}"
        )
    return RopeScaling(rope_type, **given)


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
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_channels,
        "num_experts_per_tok": config.moe.num_experts_per_tok,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": _rope_parameters(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "max_position_embeddings": max_positions,
        "router_aux_loss_coef": config.moe.router_aux_loss_coef,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    if family == "mixtral":
        model = transformers.MixtralForCausalLM(
            transformers.MixtralConfig(
                intermediate_size=config.moe.moe_intermediate_size, num_local_experts=config.moe.num_experts, **common
            )
        )
    else:
        model = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(
                intermediate_size=config.intermediate_size,
                moe_intermediate_size=config.moe.moe_intermediate_size,
                num_experts=config.moe.num_experts,
                norm_topk_prob=config.moe.norm_topk_prob,
                attention_bias=config.bias_of == "all",
                mlp_only_layers=[i for i in range(config.num_hidden_layers) if not config.has_experts(i)],
                **common,
            )
        )
    model.to(decoder.embed_tokens.weight.dtype)
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
    if config.hidden_act != "silu":
        raise ValueError(f"the checkpoint's hidden_act is {config.hidden_act!r}; only 'silu' is supported")
    if config.sliding_window is not None:
        raise ValueError(f"the checkpoint's sliding_window is {config.sliding_window}; only null is supported")
    dense = [
        layer
        for layer in range(config.num_hidden_layers)
        if is_qwen and (layer in config.mlp_only_layers or (layer + 1) % config.decoder_sparse_step)
    ]
    experts = tuple(layer for layer in range(config.num_hidden_layers) if layer not in dense)
    return DecoderConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None),
        intermediate_size=config.intermediate_size,
        moe=MoEConfig(
            num_experts=config.num_local_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            moe_intermediate_size=config.moe_intermediate_size if is_qwen else config.intermediate_size,
            norm_topk_prob=bool(config.norm_topk_prob) if is_qwen else True,
        ),
        moe_layers=experts if dense else "all",
        rope_theta=float(rope["rope_theta"]),
        rope_scaling=_rope_scaling(rope),
        rms_norm_eps=config.rms_norm_eps,
        qk_norm=is_qwen,
        attention_bias=is_qwen and bool(config.attention_bias),
        tie_word_embeddings=config.tie_word_embeddings,
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


def _their_name(name: str) -> str:
    """Our names are theirs, but for the prefix of all that is not the head."""
    return name if name.startswith("lm_head.") else f"model.{name}"


def _to_theirs(decoder: Decoder) -> dict[str, Tensor]:
    return {_their_name(name): weight for name, weight in decoder.state_dict().items()}


def _to_ours(decoder: Decoder, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: theirs[_their_name(name)] for name in decoder.state_dict()}
