"""What `mmllm export` and `mmllm import` do, and how training starts from an imported decoder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmllm.inference.folder import load_model
from mmllm.interop.transformers import from_mixtral, to_mixtral, tokenizer_of
from mmllm.model.config import config_from_dict, config_to_dict
from mmllm.model.decoder import Decoder
from mmllm.model.decoder_config import DecoderConfig
from mmllm.model.earlier_names import current_keys, current_weights
from mmllm.parallel.deferred import fill

log = logging.getLogger(__name__)

WEIGHTS = "decoder.safetensors"
CONFIG = "decoder.json"

_VOCABULARY = ("embed_tokens.", "lm_head.")
_COMPUTED = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "kv_heads", "head_channels", "rope_theta",
    "rms_norm_eps", "qk_norm",
)  # fmt: skip
_COMPUTED_BY_EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")


def export(model_dir: str, out: str) -> str:
    """Writes a model's decoder as a transformers checkpoint.

    Its config.json names the tokenizer folder's hash: what the ids mean is known when it is imported again.

    Args:
        model_dir: model folder.
        out: where the checkpoint goes.

    Returns:
        A line to print.

    Raises:
        ValueError: no family of transformers computes this decoder; the message names the layer.
        FileNotFoundError: no such model.
    """
    loaded = load_model(model_dir)
    family = to_mixtral(loaded.model.decoder, out, loaded.tokenizer.hash)
    return f"{out}: the decoder as {family}; image tower, projectors and codec stay with mmllm"


def import_decoder(source: str, out: str) -> str:
    """Turns a transformers checkpoint into what `DecoderModule(init_from=…)` reads.

    Args:
        source: folder of a Mixtral or Qwen3-MoE checkpoint.
        out: folder for `decoder.safetensors` and `decoder.json`.

    Returns:
        A line to print.

    Raises:
        ValueError: another family, a variant that this decoder doesn't compute, or a damaged checkpoint.
        FileNotFoundError: no such checkpoint.
    """
    decoder = from_mixtral(source)
    tokenizer = tokenizer_of(source)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in decoder.state_dict().items()}
    metadata = {"format": "pt"} if tokenizer is None else {"format": "pt", "tokenizer": tokenizer}
    save_file(state, directory / WEIGHTS, metadata=metadata)
    sizes = {**config_to_dict(decoder.config), "vocab_size": 0}  # the tokenizer's, wherever it is trained on
    (directory / CONFIG).write_text(json.dumps(sizes, indent=2) + "\n", encoding="utf-8")
    return f"{out}: train on with model.init_args.init_from={out} and the decoder of {directory / CONFIG}"


def load_decoder(directory: str | Path, decoder: Decoder, tokenizer: str | None = None) -> None:
    """Copies the weights that `import_decoder` wrote.

    Embeddings and head are copied only where the ids mean the same: where the checkpoint was exported from a model
    of this very tokenizer folder. Otherwise they stay random, also in vocabularies that happen to be equally large.

    Args:
        directory: what `import_decoder` wrote.
        decoder: takes the weights.
        tokenizer: hash of the tokenizer folder that gives `decoder` its ids.

    Raises:
        FileNotFoundError: the folder lacks a file.
        ValueError: a file is damaged, or the decoder computes something else; the message names key or weight.
    """
    path, config_path = Path(directory) / WEIGHTS, Path(directory) / CONFIG
    for wanted in (path, config_path):
        if not wanted.is_file():
            raise FileNotFoundError(f"{wanted} doesn't exist; `mmllm import` writes it")
    _check_config(config_path, decoder.config)
    weights, made_for = _read(path)
    weights = current_weights(weights, decoder.config.num_attention_heads, decoder.config.kv_heads)
    knows_ids = tokenizer is not None and made_for == tokenizer
    if not knows_ids:
        log.warning("embeddings and head stay random: the ids of %s aren't those of this tokenizer", directory)
    own = decoder.state_dict()
    for name in weights.keys() - own.keys():
        if knows_ids or not name.startswith(_VOCABULARY):
            raise ValueError(f"{path} has {name}, which the decoder lacks; use the values of {config_path}")
    for name, tensor in own.items():
        if name.startswith(_VOCABULARY) and not knows_ids:
            continue
        found = weights.get(name)
        if found is None or found.shape != tensor.shape:
            got = "is missing" if found is None else f"has shape {list(found.shape)}"
            raise ValueError(f"{name} {got} in {path}; the decoder wants {list(tensor.shape)}: import it again")
        fill(tensor, found)


def _check_config(path: Path, wanted: DecoderConfig) -> None:
    """Refuses a decoder that would compute another function with the same weights."""
    try:
        values = current_keys(json.loads(path.read_text(encoding="utf-8")), "decoder")
        found = config_from_dict(DecoderConfig, values)
    except ValueError as error:
        raise ValueError(f"{path} is no imported decoder's config: {error}; import it again") from error
    pairs: dict[str, tuple[Any, Any]] = {key: (getattr(wanted, key), getattr(found, key)) for key in _COMPUTED}
    for layer in range(min(wanted.num_hidden_layers, found.num_hidden_layers)):
        pairs[f"has_experts({layer})"] = wanted.has_experts(layer), found.has_experts(layer)
    if not all(wanted.has_experts(layer) for layer in range(wanted.num_hidden_layers)):
        pairs["intermediate_size"] = wanted.intermediate_size, found.intermediate_size
    if wanted.moe is not None and found.moe is not None:
        for key in _COMPUTED_BY_EXPERTS:
            pairs[f"moe.{key}"] = getattr(wanted.moe, key), getattr(found.moe, key)
    for key, (got, own) in pairs.items():
        if got != own:
            raise ValueError(f"decoder.{key} is {got} but the imported decoder has {own}; use the values of {path}")


def _read(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """Weights, and the hash of the tokenizer folder that their ids belong to, if it is known."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, (file.metadata() or {}).get("tokenizer")  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} can't be read: {error}; import it again") from error
