"""Where positions of one document look: attention weights by an explicit slow pass, and what of them lies on a picture.

Shapes: L layers, M positions that look, N tokens of the document, Q tokens of a layer (learned ones of an adapter
included), H query heads, G key-value heads, C channels a head; O slots of a picture or a tile, h and w their rows and
columns, y and x rows and columns of the whole map.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.batch import PackedBatch
from mmllm.data.samples.document import Document, Picture
from mmllm.model.attend import LayerContext, PackedContext, attend
from mmllm.model.image_projectors import pooled_grid
from mmllm.model.masks import MaskRule
from mmllm.model.multimodal import ModelOutput, MultimodalModel


@dataclass(frozen=True)
class Attention:
    """Where positions of a document look."""

    layers: tuple[int, ...]
    """Which decoder layers the L are. One that only some tokens pass (mixture of depths) is left out, and all are
    with an adapter that puts learned keys before the document (prefix tuning)."""
    weights_LMN: np.ndarray
    """float32, mean over the heads. A row sums to 1, or to less where an adapter's learned tokens are looked at too."""


def watch(model: MultimodalModel, batch: PackedBatch, positions: Sequence[int]) -> tuple[ModelOutput, Attention]:
    """The model's forward pass of one document, and where some of its positions look.

    Weights are computed apart from what the model does: a softmax over all pairs of queries and keys that the layer's
    rule lets see each other. That takes memory of the document's length squared, one layer at a time.

    Args:
        model: in eval mode, not compiled.
        batch: of one document, without padding.
        positions: that look: places in the document.

    Raises:
        ValueError: the decoder has an encoder, each of whose halves has other positions.
    """
    if model.config.decoder.encoder_layers:
        raise ValueError(
            f"decoder.encoder_layers is {model.config.decoder.encoder_layers}; maps of attention are of decoders whose "
            f"layers all have all positions"
        )
    num_tokens = batch.token_ids_BT.shape[1]
    seen: dict[int, Tensor] = {}
    with _watched(model, positions, num_tokens, seen):
        output = model(batch)
    weights = [seen[layer].detach().cpu().numpy() for layer in sorted(seen)]
    empty = np.zeros((0, len(positions), num_tokens), dtype=np.float32)
    return output, Attention(tuple(sorted(seen)), np.stack(weights) if weights else empty)


@contextlib.contextmanager
def _watched(
    model: MultimodalModel, positions: Sequence[int], num_tokens: int, seen: dict[int, Tensor]
) -> Iterator[None]:
    """Stands between each layer's attention and its context."""

    def hook(layer: int):
        def with_watcher(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
            x, cos, sin, context = inputs
            return x, cos, sin, _Watcher(context, layer, positions, num_tokens, seen)

        return with_watcher

    hooks = [
        block.self_attn.register_forward_pre_hook(hook(layer))  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        for layer, block in enumerate(model.decoder.layers)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@dataclass(frozen=True)
class _Watcher:
    """A layer's context that keeps what is looked at, and passes everything on."""

    context: PackedContext | LayerContext
    layer: int
    positions: Sequence[int]
    num_tokens: int
    seen: dict[int, Tensor]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, rule: MaskRule, /) -> Tensor:
        """As the context would."""
        num_learned = len(q) - self.num_tokens
        # Learned keys of a prefix aren't among these keys; with mixture of depths some tokens only seem to pass here.
        if isinstance(self.context, PackedContext) and self.context.keys_Q is None and num_learned >= 0:
            rows = torch.tensor(self.positions, device=q.device) + num_learned
            self.seen[self.layer] = attention_weights(q, k, self.context, rule, rows)[:, num_learned:]
        return attend(q, k, v, self.context, rule)


def attention_weights(
    q_QHC: Tensor, k_QGC: Tensor, context: PackedContext, rule: MaskRule, queries_M: Tensor
) -> Tensor:
    """Softmax over the keys that some queries see, mean over heads: float32 [M, Q].

    Args:
        q_QHC: queries, rotated.
        k_QGC: keys, rotated; G divides H.
        context: the documents.
        rule: what a query sees.
        queries_M: int64, which of the queries.
    """
    dense = PackedContext(context.sequences, "dense", context.spans_Q)
    dense.prepare(rule)
    q_MHC, k_QGC = q_QHC[queries_M].float(), k_QGC.float()
    k_QHC = k_QGC.repeat_interleave(q_MHC.shape[1] // k_QGC.shape[1], dim=1)
    scores_HMQ = torch.einsum("mhc,qhc->hmq", q_MHC, k_QHC) / q_MHC.shape[-1] ** 0.5
    return scores_HMQ.masked_fill(~dense.made(rule)[queries_M], -torch.inf).softmax(dim=-1).mean(dim=0)


@dataclass(frozen=True)
class SeenPicture:
    """A picture of a document as the model gets it, and where its slots are."""

    pixels_3yx: np.ndarray
    """uint8: of one that is cut, its tiles side by side."""
    tiles: tuple[Picture, ...]
    """The whole, or thumbnail and tiles."""
    grid: tuple[int, int] | None
    """h, w: where a tile's slots lie in it, rows first; None: they are of no place (learned queries)."""

    def map_yx(self, weights_N: np.ndarray) -> np.ndarray:
        """Attention on each place of the picture; its sum is that on all of its slots.

        What a thumbnail gets is spread evenly over the places that each of its slots stands for.

        Args:
            weights_N: of one position, over the document's tokens.
        """
        assert self.grid is not None, "slots of no place have no map"
        (h, w), (rows, columns) = self.grid, self._size()
        map_yx = np.zeros((rows * h, columns * w), dtype=np.float64)
        for tile in self.tiles:
            tile_hw = weights_N[tile.start : tile.start + tile.num_slots].reshape(h, w).astype(np.float64)
            if tile.tile == (0, 0):
                map_yx += np.kron(tile_hw, np.ones((rows, columns))) / (rows * columns)
            else:
                top, left = (tile.tile[0] - 1) * h, (tile.tile[1] - 1) * w
                map_yx[top : top + h, left : left + w] += tile_hw
        return map_yx

    def share(self, weights_N: np.ndarray) -> float:
        """Attention on all of its slots."""
        return float(sum(weights_N[tile.start : tile.start + tile.num_slots].sum() for tile in self.tiles))

    def _size(self) -> tuple[int, int]:
        """Rows and columns of tiles."""
        return max(1, *(tile.tile[0] for tile in self.tiles)), max(1, *(tile.tile[1] for tile in self.tiles))


def seen_pictures(model: MultimodalModel, document: Document) -> list[SeenPicture]:
    """The pictures of a document, in order."""
    groups: list[list[Picture]] = []
    for picture in document.images:
        if picture.is_first:
            groups.append([])
        groups[-1].append(picture)
    grid = slot_grid(model)
    return [SeenPicture(_pixels(tiles), tuple(tiles), grid) for tiles in groups]


def _pixels(tiles: Sequence[Picture]) -> np.ndarray:
    cut = [tile for tile in tiles if tile.tile != (0, 0)]
    if not cut:
        return tiles[0].pixels_3HW
    by_place = {tile.tile: tile.pixels_3HW for tile in cut}
    rows, columns = (sorted({place[axis] for place in by_place}) for axis in (0, 1))
    return np.concatenate(
        [np.concatenate([by_place[row, column] for column in columns], axis=2) for row in rows], axis=1
    )


def slot_grid(model: MultimodalModel) -> tuple[int, int] | None:
    """Rows and columns in which a picture's slots lie; None: the model doesn't see, or its slots are of no place."""
    projector = model.image_projector
    if projector is None:
        return None
    rows, columns = projector.grid
    match projector.config.kind:
        case "attention" | "perceiver":
            return None
        case "average" | "c_abstractor":
            return pooled_grid(projector.num_tokens, projector.grid)
        case "pixel_shuffle":
            scale = projector.config.scale_factor
            return rows // scale, columns // scale
    return rows, columns


def enlarged(map_yx: np.ndarray, size: int) -> np.ndarray:
    """A map as a square of so many pixels, float64 [size, size] in [0, 1], smooth between its places; 1 is its peak."""
    peak = map_yx.max()
    scaled = torch.from_numpy(map_yx / (peak if peak > 0 else 1.0))[None, None]
    return F.interpolate(scaled, size=(size, size), mode="bilinear", align_corners=False)[0, 0].numpy()
