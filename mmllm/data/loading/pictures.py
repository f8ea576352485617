"""How a data module's pictures become the image tower's squares."""

from __future__ import annotations

from typing import Literal

from mmllm.data.samples.decode import ImageTransform
from mmllm_tokenizers.folder import TokenizerFolder

ImageMode = Literal["squash", "pad", "crop"]


class PictureTransform:
    """As `image_mode` says, or as the tower that a training starts from saw them, or else squashed.

    Args:
        image_mode: of the data module; None: it doesn't say.
    """

    def __init__(self, image_mode: ImageMode | None) -> None:
        self._mode: ImageMode | None = image_mode
        self._of_model: ImageTransform | None = None

    def of(self, folder: TokenizerFolder) -> ImageTransform:
        """The transform for pictures of a tokenizer folder's size."""
        return self._of_model or ImageTransform(folder.image_size, mode=self._mode or "squash")

    def take(self, transform: ImageTransform, folder: TokenizerFolder) -> None:
        """Pictures are to be made as a pretrained tower saw them; called before any loader is made.

        Raises:
            ValueError: `image_mode` was set to something else, or the tokenizer folder has pictures of another size.
        """
        if self._mode is not None and (transform.library or transform.mode != self._mode):
            made = f"as {transform.library} does ({transform.mode})" if transform.library else f"by {transform.mode}"
            raise ValueError(
                f"data.init_args.image_mode is {self._mode!r}, but the image tower that the training starts from "
                f"has its pictures made {made}; leave image_mode out, or start without that tower (init_parts)"
            )
        if transform.size != folder.image_size:
            raise ValueError(
                f"the image tower that the training starts from sees {transform.size} pixels but the tokenizer "
                f"folder's image_size is {folder.image_size}; build the folder anew with that size"
            )
        self._of_model = transform
