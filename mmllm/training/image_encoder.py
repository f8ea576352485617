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
from mmllm.model.vision import VisionConfig, VisionTower
from mmllm.training.clip_module import load_clip_config


def load_image_encoder(
    source: str, layer: int | str | Sequence[int | str] = -1, mode: Literal["squash", "pad", "crop"] = "squash"
) -> ImageEncoder:
    """The frozen tower that a decoder would be trained with.

    Args:
        source: `out` folder of a finished `ClipModule` run, or `NAME:WEIGHTS` of an open_clip model, weights being a
            tag whose file lies in a cache, or a file.
        layer: as `VisionConfig.layer`; digits may come as a string, and several with commas between them.
        mode: how pictures become square, as the data module's `image_mode`.

    Raises:
        ValueError: open_clip has no such model, tag or layer.
        FileNotFoundError: the folder lacks its files, or the weights are not on this machine.
    """
    name, colon, weights = source.partition(":")
    if not colon or Path(source).is_dir():
        config, anywhere = load_clip_config(source, None), str(Path(source).absolute())
    else:
        is_file = Path(weights).is_file()
        anywhere = f"{name}:{Path(weights).absolute()}" if is_file else source
        config = VisionConfig(name, None if is_file else weights, weights if is_file else None)
    layers = _layers(layer)
    with torch.random.fork_rng(devices=[]):  # building draws weights that are overwritten
        tower = VisionTower(dataclasses.replace(config, layer=layers, trainable=False))
        tower.load_pretrained()
    transform = ImageTransform(tower.image_size, mode=mode)
    settings = {"source": anywhere, "layer": layers, "mode": mode}
    hashed = features_hash(tower.hash, transform)
    return ImageEncoder(transform, hashed, _Encode(tower), f"{__name__}:load_image_encoder", settings)


def _layers(layer: int | str | Sequence[int | str]) -> int | str | tuple[int | str, ...]:
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
