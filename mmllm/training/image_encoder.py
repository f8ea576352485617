"""The tower of `mmllm data build --image_features`, which `mmllm.data` gets handed as a function.

Shapes: N images, P features an image, C channels, H and W pixels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import ImageEncoder, features_hash
from mmllm.interop.foreign_config import read_json
from mmllm.interop.towers import OPEN_CLIP_CONFIG, VISION_MODELS, read_tower
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.training.clip_module import load_clip_config
from mmllm.training.init_source import InitSource

CONFIG = "config.json"
Layers = int | str | tuple[int | str, ...]
Mode = Literal["squash", "pad", "crop"]


def load_image_encoder(
    source: str, layer: int | str | Sequence[int | str] | None = None, mode: Mode | None = None
) -> ImageEncoder:
    """The frozen tower that a decoder would be trained with.

    Args:
        source: a model folder; `out` folder of a finished `ClipModule` run; folder of a vision model of transformers or
            open_clip; or `NAME:WEIGHTS` of an open_clip model, weights being a tag whose file lies in a cache, or a
            file.
        layer: as `VisionConfig.layer`; digits may come as a string, and several with commas between them. None: the
            model folder's, else -1.
        mode: how pictures become square, as the data module's `image_mode`. None: as the tower's pictures were made,
            where that is known (a model folder, a folder of transformers or open_clip), else squash.

    Raises:
        ValueError: there is no such model, tag or layer; or its pictures are not made by `mode`.
        FileNotFoundError: the folder lacks its files, or the weights are not on this machine.
    """
    given = None if layer is None else _layers(layer)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten
        tower, transform, anywhere = _tower(source, given)
    if transform is None:
        transform = ImageTransform(tower.image_size, mode=mode or "squash")
    elif mode is not None and (transform.library or transform.mode != mode):
        made = f"as {transform.library} does ({transform.mode})" if transform.library else f"by {transform.mode}"
        raise ValueError(f"--image_mode is {mode!r}, but the pictures of {source} are made {made}; leave it out")
    settings = {"source": anywhere, "layer": given, "mode": mode}
    hashed = features_hash(tower.hash, transform)
    return ImageEncoder(transform, hashed, _Encode(tower), f"{__name__}:load_image_encoder", settings)


def _tower(source: str, layer: Layers | None) -> tuple[VisionTower, ImageTransform | None, str]:
    """The tower, how its pictures are made where that is known, and the source as other machines find it."""
    anywhere = str(Path(source).absolute())
    match _kind(Path(source)):
        case "model":
            return *_of_model(source, layer), anywhere
        case "vision model":
            imported = read_tower(source, -1 if layer is None else layer)
            tower = VisionTower(dataclasses.replace(imported.vision, trainable=False))
            tower.load_state_dict({name.removeprefix("vision."): value for name, value in imported.tensors()})
            return tower, imported.transform, anywhere
    name, colon, weights = source.partition(":")
    if not colon or Path(source).is_dir():
        config = load_clip_config(source, None)
    else:
        is_file = Path(weights).is_file()
        anywhere = f"{name}:{Path(weights).absolute()}" if is_file else source
        config = VisionConfig(name, None if is_file else weights, weights if is_file else None)
    tower = VisionTower(dataclasses.replace(config, layer=-1 if layer is None else layer, trainable=False))
    tower.load_pretrained()
    return tower, None, anywhere


def _kind(folder: Path) -> Literal["model", "vision model"] | None:
    """What a folder holds; None: a CLIP run's output, or it is no folder."""
    if (folder / CONFIG).is_file():
        config = read_json(folder / CONFIG)
        if config.get("format") == "mmllm":
            return "model"
        if config.get("model_type") in VISION_MODELS:
            return "vision model"
    return "vision model" if (folder / OPEN_CLIP_CONFIG).is_file() else None


def _of_model(source: str, layer: Layers | None) -> tuple[VisionTower, ImageTransform | None]:
    """A model folder's."""
    model = InitSource.open(source)
    vision = model.model.vision
    if vision is None:
        raise ValueError(f"the model in {source} has no image tower; give one that sees")
    if layer is not None and layer != vision.layer:
        raise ValueError(
            f"--image_layer is {layer}, but the model in {source} takes layer {vision.layer}; leave --image_layer out"
        )
    tower = VisionTower(dataclasses.replace(vision, trainable=False))
    state = {
        name.removeprefix("vision."): read() for name, (_, read) in model.readers.items() if name.startswith("vision.")
    }
    tower.load_state_dict(state)
    if vision.mean is None and model.image_transform is not None:  # as `load_model` does
        tower.mean, tower.std = model.image_transform.mean, model.image_transform.std
    return tower, model.image_transform


def _layers(layer: int | str | Sequence[int | str]) -> Layers:
    given = layer.split(",") if isinstance(layer, str) else [layer] if isinstance(layer, int) else layer
    texts = [str(each).strip() for each in given]
    layers = tuple(int(text) if text.removeprefix("-").isdigit() else text for text in texts)
    return layers[0] if len(layers) == 1 else layers


class _Encode:
    """A class, so that it can be pickled."""

    def __init__(self, tower: VisionTower) -> None:
        self._tower = tower

    def __call__(self, images_N3HW: np.ndarray) -> np.ndarray:
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in workers: how sums are split, and so their last bits, goes by threads
        try:
            with torch.inference_mode():
                return self._tower(torch.from_numpy(images_N3HW)).float().numpy()
        finally:
            torch.set_num_threads(num_threads)
