"""Image features that are stored with the samples must be what the model's tower would give."""

from __future__ import annotations

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.stored import features_hash
from mmllm.model.vision import VisionTower


def check_features(made_by: str, vision: VisionTower, transform: ImageTransform) -> None:
    """Refuses stored image features that this tower would not give.

    Args:
        made_by: hash of what made them.
        vision: the model's tower.
        transform: how its pictures are made.

    Raises:
        ValueError: the tower is trained, or is another.
    """
    if vision.config.trainable:
        raise ValueError(
            "data.init_args.image_features is on, but the image tower is trained, and stored features would stay "
            "as they are; set model.init_args.optimizer.parts.image_tower (or tower_lr) to 0, or image_features to "
            "false"
        )
    wanted = features_hash(vision.hash, transform)
    if made_by != wanted:
        raise ValueError(
            f"the shards' image features were made by {made_by[:12]}, but the model's tower (layer "
            f"{vision.config.layer}, image_mode {transform.mode}) is {wanted[:12]}; build the shards again with "
            f"--image_features, --image_layer and --image_mode of this model, or set data.init_args.image_features "
            f"to false"
        )
