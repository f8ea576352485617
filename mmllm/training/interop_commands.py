"""What `mmllm export` and `mmllm import` do, and how training starts from an imported decoder."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from safetensors.torch import load_file, save_file

from mmllm.inference.folder import load_model
from mmllm.interop.transformers import from_mixtral, to_mixtral
from mmllm.model.config import config_to_dict
from mmllm.model.decoder import Decoder

log = logging.getLogger(__name__)

WEIGHTS = "decoder.safetensors"
CONFIG = "decoder.json"


def export(model_dir: str, out: str) -> str:
    """Writes a model's decoder as a transformers checkpoint.

    Args:
        model_dir: model folder.
        out: where the checkpoint goes.

    Returns:
        A line to print.

    Raises:
        ValueError: no family of transformers computes this decoder; the message names the layer.
        FileNotFoundError: no such model.
    """
    family = to_mixtral(load_model(model_dir).model.decoder, out)
    return f"{out}: the decoder as {family}; image tower, projectors and codec stay with mmllm"


def import_decoder(source: str, out: str) -> str:
    """Turns a transformers checkpoint into what `DecoderModule(init_from=…)` reads.

    Args:
        source: folder of a Mixtral or Qwen3-MoE checkpoint.
        out: folder for `decoder.safetensors` and `decoder.json`.

    Returns:
        A line to print.

    Raises:
        ValueError: another family, or a variant that this decoder doesn't compute.
        FileNotFoundError: no such checkpoint.
    """
    decoder = from_mixtral(source)
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in decoder.state_dict().items()}
    save_file(state, directory / WEIGHTS, metadata={"format": "pt"})
    values = json.dumps(config_to_dict(decoder.config), indent=2)
    (directory / CONFIG).write_text(values + "\n", encoding="utf-8")
    return f"{out}: train on with model.init_args.init_from={out} and the sizes in {directory / CONFIG}"


def load_decoder(directory: str | Path, decoder: Decoder) -> None:
    """Copies the weights that `import_decoder` wrote; embeddings of another vocabulary stay random.

    Raises:
        FileNotFoundError: the folder lacks them.
        ValueError: a weight has another shape; the message names it.
    """
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise FileNotFoundError(f"{path} doesn't exist; `mmllm import` writes it")
    weights, own = load_file(path), decoder.state_dict()
    for name, tensor in own.items():
        is_vocabulary = name.startswith(("embedding.", "output."))
        found = weights.get(name)
        if found is not None and found.shape == tensor.shape:
            tensor.copy_(found)
        elif is_vocabulary:
            log.warning("%s stays random: the imported vocabulary has another size", name)
        else:
            got = "is missing" if found is None else f"has shape {list(found.shape)}"
            wanted = f"the decoder wants {list(tensor.shape)}: use the sizes in {CONFIG}"
            raise ValueError(f"{name} {got} in {path}; {wanted}")
