"""Pictures, sounds and text as vectors: in the decoder's space, and in that of the CLIP whose tower the model has.

Shapes: B prompts, T positions, D width of the decoder, N inputs, L text tokens, C channels of CLIP's space, H and W
pixels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmllm.data.samples.decode import ImageTransform
from mmllm.data.samples.document import Document
from mmllm.inference.answering import OnError, each
from mmllm.inference.generate import batches, evaluating
from mmllm.inference.inputs import AudioPart, ImagePart, parse_parts
from mmllm.inference.prompting import Prompter
from mmllm.inference.prompts import pad_left
from mmllm.model.multimodal import MultimodalModel
from mmllm.model.vision import VisionConfig, pixel_statistics
from mmllm_tokenizers.folder import TokenizerFolder
from mmllm_tokenizers.vocab import END, PAD

Space = Literal["decoder", "clip"]
Pooling = Literal["mean", "last"]
_BATCH_SIZE = 32


def decoder_embeddings(
    model: MultimodalModel, prompts: Sequence[Document], pooling: Pooling = "mean", batch_size: int = _BATCH_SIZE
) -> list[Tensor]:
    """The decoder's hidden states, behind its last norm, of each prompt: float32 [D] on the CPU.

    Args:
        model: in any mode.
        prompts: with one token at least.
        pooling: "mean" of all the prompt's positions, or that of the "last" one, which has seen all before it.
        batch_size: prompts at once; those of like length go together.
    """
    found: list[Tensor] = [torch.empty(0)] * len(prompts)
    with evaluating(model):
        for rows in batches(prompts, batch_size):
            batch = pad_left([prompts[row] for row in rows]).to(model.decoder.head_weight_VD.device)
            hidden_BTD = model.hidden(batch).float()
            is_there_BT1 = (batch.document_ids_BT >= 0)[..., None]
            if pooling == "last":
                pooled_BD = hidden_BTD[:, -1]
            else:
                pooled_BD = (hidden_BTD * is_there_BT1).sum(dim=1) / is_there_BT1.sum(dim=1)
            for row, each_D in zip(rows, pooled_BD.cpu(), strict=True):
                found[row] = each_D
    return found


class Embedder:
    """Puts pictures, sounds and text into a space.

    Args:
        model: that gives the decoder's space.
        prompter: that writes its prompts.
        image_transform: how pictures reach its tower.
        clip: folder of the CLIP of its tower, for that space; None: there is none.
    """

    def __init__(
        self,
        model: MultimodalModel,
        prompter: Prompter,
        image_transform: ImageTransform,
        clip: str | os.PathLike[str] | None = None,
    ) -> None:
        self._model, self._prompter, self._transform = model, prompter, image_transform
        self._clip_folder, self._clip = clip, None

    def embed(
        self, items: Sequence[Any], space: Space, pooling: Pooling, normalize: bool, on_error: OnError
    ) -> list[Tensor | Exception]:
        """A vector of each item, or why there is none; see `Model.embed`."""
        found: list[Any]
        if space == "clip":
            self._clip_space()  # said before anything is read
            found = each(items, lambda place, one: clip_part(parse_parts(one), f"inputs[{place}]"), on_error)
        else:
            found = each(items, lambda _, one: self._prompter.continuation(parse_parts(one)), on_error)
        places = [place for place, one in enumerate(found) if not isinstance(one, Exception)]
        given = [found[place] for place in places]
        vectors = self._clip_space().embeddings(given) if space == "clip" else (
            decoder_embeddings(self._model, given, pooling)
        )  # fmt: skip
        for place, vector_C in zip(places, vectors, strict=True):
            found[place] = F.normalize(vector_C, dim=-1) if normalize else vector_C
        return found

    def _clip_space(self) -> ClipSpace:
        if self._clip is None:
            if self._clip_folder is None:
                raise ValueError(
                    "space is 'clip', but the model has the image side of a CLIP alone; give the folder of the whole "
                    "CLIP: mmllm.load(folder, clip=FOLDER), or take space='decoder'"
                )
            device = self._model.decoder.head_weight_VD.device
            self._clip = ClipSpace(self._clip_folder, self._prompter.tokenizer, self._transform, device)
        return self._clip


class ClipSpace:
    """A CLIP with both its sides: pictures and text in one space.

    Args:
        folder: what training a CLIP wrote (`out` of `mmllm.training.clip_module.ClipModule`).
        tokenizer: that it was trained with.
        image_transform: how pictures reach the model's tower, which is this CLIP's.
        device: where it runs.

    Raises:
        FileNotFoundError: the folder lacks its files.
        ValueError: the CLIP is of another tokenizer or pictures of another size.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        tokenizer: TokenizerFolder,
        image_transform: ImageTransform,
        device: torch.device | str = "cpu",
    ) -> None:
        from mmllm.model.open_clip_vision import build_clip  # open_clip is imported where it is asked for

        directory = Path(folder)
        for name in ("config.json", "model.safetensors"):
            if not (directory / name).is_file():
                raise FileNotFoundError(f"{directory} lacks {name}; give the `out` folder of a CLIP's training")
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        if not isinstance(values, dict) or not isinstance(values.get("open_clip"), dict):
            raise ValueError(f"{directory} holds no CLIP that mmllm trained; give the `out` folder of its training")
        mean, std = (tuple(values[key]) if values.get(key) else None for key in ("mean", "std"))
        text_cfg: dict[str, Any] = values["open_clip"]["text_cfg"]
        wanted = (tokenizer.text.vocab_size, tokenizer.text.id(END))
        if (text_cfg["vocab_size"], text_cfg.get("eos_id")) != wanted:
            raise ValueError(
                f"{directory} reads {text_cfg['vocab_size']} text tokens, the model's tokenizer has {wanted[0]}; give "
                f"the CLIP that was trained with the same tokenizer"
            )
        weights = str(directory / "model.safetensors")
        config = VisionConfig(values["open_clip"], checkpoint=weights, norm=values["norm"], mean=mean, std=std)
        self._clip: Any = build_clip(config).to(device).eval().requires_grad_(False)
        size: Any = self._clip.visual.image_size
        size = int(size if isinstance(size, int) else size[0])
        if size != image_transform.size:
            raise ValueError(
                f"{directory} sees {size} pixels a side, the model {image_transform.size}; give the CLIP of its tower"
            )
        statistics = [torch.tensor(each, device=device).view(3, 1, 1) * 255 for each in pixel_statistics(config)]
        self._mean_311, self._std_311 = statistics
        self._transform, self._tokenizer, self._device = image_transform, tokenizer, device
        self._context_length, self._pad_id = int(text_cfg["context_length"]), tokenizer.text.id(PAD)

    def embeddings(self, parts: Sequence[str | ImagePart]) -> list[Tensor]:
        """Of each picture or text: float32 [C] on the CPU, not normalized."""
        found: list[Tensor] = [torch.empty(0)] * len(parts)
        places = {kind: [n for n, part in enumerate(parts) if isinstance(part, kind)] for kind in (str, ImagePart)}
        with torch.no_grad():
            for kind, own in places.items():
                for start in range(0, len(own), _BATCH_SIZE):
                    rows = own[start : start + _BATCH_SIZE]
                    chosen: list[Any] = [parts[row] for row in rows]
                    encoded_NC = self._texts(chosen) if kind is str else self._pictures(chosen)
                    for row, each_C in zip(rows, encoded_NC.float().cpu(), strict=True):
                        found[row] = each_C
        return found

    def _texts(self, texts: Sequence[str]) -> Tensor:
        ids_NL = np.full((len(texts), self._context_length), self._pad_id, dtype=np.int64)
        for row, text in enumerate(texts):
            ids = [*self._tokenizer.text.encode(text)[: self._context_length - 1], self._tokenizer.id(END)]
            ids_NL[row, : len(ids)] = ids
        return self._clip.encode_text(torch.from_numpy(ids_NL).to(self._device))

    def _pictures(self, pictures: Sequence[ImagePart]) -> Tensor:
        pixels_N3HW = torch.from_numpy(np.stack([self._transform(each.image) for each in pictures])).to(self._device)
        return self._clip.encode_image((pixels_N3HW - self._mean_311) / self._std_311)


def clip_part(parts: Sequence[str | ImagePart | AudioPart], name: str) -> str | ImagePart:
    """What CLIP's space has a place for: one picture, or text.

    Raises:
        ValueError: it is something else.
    """
    if len(parts) == 1 and isinstance(parts[0], (str, ImagePart)):
        return parts[0]
    kinds = ", ".join({str: "text", ImagePart: "an image", AudioPart: "a sound"}[type(part)] for part in parts)
    raise ValueError(
        f"{name} is {kinds or 'empty'}; CLIP's space holds one image or one text: take space='decoder' for others"
    )
