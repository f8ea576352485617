"""From image features to the decoder's width: a table of projectors.

Shapes: N images, S features an image (rows first), O slots an image, C channels of the features, D decoder width,
H and W rows and columns of features, h and w of slots, I inner width, A attention heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmllm.model.media_numbers import MediaNumbers
from mmllm.model.roles import mark

QUERY_STD = 0.02
POOLING = ("average", "attention", "perceiver", "c_abstractor")
"""Kinds whose number of slots is chosen."""
DEEP = ("perceiver", "c_abstractor")
"""Kinds with layers of their own."""


@dataclass(frozen=True)
class ImageProjectorConfig:
    """How image features become slots.

    Attributes:
        kind: "linear" and "mlp" make one slot of each feature. "pixel_shuffle" lays `scale_factor` x `scale_factor`
            neighbouring features side by side in channels, then MLP (InternVL, arXiv 2404.16821; SmolVLM). Others pool
            the features to `num_tokens` slots: "average" over the grid, then MLP; "perceiver" by learned queries in
            layers of cross-attention and MLP (Flamingo, arXiv 2204.14198); "c_abstractor" by convolutions before and
            behind an average over the grid (Honeybee, arXiv 2312.06742). "attention", of earlier models, is one layer
            of cross-attention, then MLP. "llava" is the MLP alone, on features that are neither normalized nor told
            where they are (LLaVA-1.5, arXiv 2310.03744): such models come from others, and go to them.
        num_tokens: slots an image (of one that is cut into tiles: a tile). Needed where features are pooled; None
            elsewhere: as many as there are.
        hidden_size: inner width. None: the decoder's; for "perceiver", whose MLPs are meant, four times the features'.
        num_attention_heads: of "perceiver" and "attention".
        num_hidden_layers: of "perceiver"; of "c_abstractor" so many blocks before and as many behind the average.
        scale_factor: of "pixel_shuffle", which makes `scale_factor`² times fewer slots.
        dropout: on the features, in training.
        max_tiles: rows and columns of tiles at most, as `tiling.max_tiles` of the tokenizer folder; slots are told
            where their tile is in the picture. 1: pictures are not cut.
        max_number: a document's pictures are told which of them they are, first, second …, as far as this one; those
            behind share the last number. 0: they aren't told, and the decoder has to count.
        bias: of "llava": whether its layers add one.
        position_std: of the row and column embeddings at the start, beside normalized features. The stronger they are,
            the longer does a picture's place outweigh what is in it.
    """

    kind: Literal["linear", "mlp", "pixel_shuffle", "average", "attention", "perceiver", "c_abstractor", "llava"] = (
        "mlp"
    )
    num_tokens: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int = 4
    num_hidden_layers: int = 3
    scale_factor: int = 2
    dropout: float = 0.0
    max_tiles: int = 1
    max_number: int = 0
    bias: bool = True
    position_std: float = 0.2

    def __post_init__(self) -> None:
        if self.kind in POOLING and self.num_tokens is None:
            raise ValueError(f"image_projector.kind is {self.kind!r}, which needs image_projector.num_tokens")
        for name in ("num_attention_heads", "num_hidden_layers", "scale_factor", "max_tiles"):
            if getattr(self, name) < 1:
                raise ValueError(f"image_projector.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("num_tokens", "hidden_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"image_projector.{name} is {value}; it must be at least 1, or left out")
        if self.max_number < 0:
            raise ValueError(f"image_projector.max_number is {self.max_number}; give 0 (off) or a number of pictures")
        if not self.bias and self.kind != "llava":
            raise ValueError(f"image_projector.bias is false with kind {self.kind!r}; only 'llava' can be without")
        if not (math.isfinite(self.position_std) and self.position_std >= 0):
            raise ValueError(f"image_projector.position_std is {self.position_std}; give a finite number, 0 or more")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"image_projector.dropout is {self.dropout}; it must be in [0, 1)")


class ImageProjector(nn.Module):
    """LayerNorm and learned row and column embeddings (not of "llava"), what `config.kind` says, where the tile is.

    Args:
        config: the kind and its sizes.
        grid: rows and columns of features.
        feature_width: their channels.
        width: the decoder's.

    Raises:
        ValueError: the kind can't make `num_tokens` slots of such a grid, or its heads don't divide the channels.
    """

    def __init__(self, config: ImageProjectorConfig, grid: tuple[int, int], feature_width: int, width: int):
        super().__init__()
        self.config, self.grid = config, grid
        self.num_tokens = _num_slots(config, grid)
        self.norm = self.row_embedding = self.column_embedding = None
        if config.kind != "llava":
            self.norm = nn.LayerNorm(feature_width)
            self.row_embedding = nn.Parameter(torch.randn(grid[0], 1, feature_width) * config.position_std)
            self.column_embedding = nn.Parameter(torch.randn(1, grid[1], feature_width) * config.position_std)
            mark(self, row_embedding="embedding", column_embedding="embedding")
        self.queries = self.pool = None
        hidden = config.hidden_size or width
        match config.kind:
            case "linear":
                self.project: nn.Module = nn.Linear(feature_width, width)
            case "mlp":
                self.project = _mlp(feature_width, hidden, width)
            case "llava":
                self.project = _mlp(feature_width, hidden, width, config.bias)
            case "pixel_shuffle":
                self.pool = PixelShuffle(grid, config.scale_factor)
                self.project = _mlp(feature_width * config.scale_factor**2, hidden, width)
            case "average":
                self.pool = AveragePool(grid, pooled_grid(self.num_tokens, grid))
                self.project = _mlp(feature_width, hidden, width)
            case "attention" | "perceiver":
                _check_heads(config.num_attention_heads, feature_width)
                self.queries = nn.Parameter(torch.randn(self.num_tokens, feature_width) * QUERY_STD)
                mark(self, queries="embedding")
                if config.kind == "attention":
                    self.pool = nn.MultiheadAttention(feature_width, config.num_attention_heads, batch_first=True)
                    self.project = _mlp(feature_width, hidden, width)
                else:
                    self.pool = PerceiverResampler(config, feature_width)
                    self.project = nn.Linear(feature_width, width)
            case "c_abstractor":
                pooled = pooled_grid(self.num_tokens, grid)
                self.pool = ConvAbstractor(config.num_hidden_layers, grid, pooled, feature_width, hidden)
                self.project = _mlp(hidden, hidden, width)
        self.tile_row_embedding = self.tile_column_embedding = None
        if config.max_tiles > 1:  # zeros: a model that saw whole pictures goes on from there
            self.tile_row_embedding = nn.Parameter(torch.zeros(config.max_tiles + 1, width))
            self.tile_column_embedding = nn.Parameter(torch.zeros(config.max_tiles + 1, width))
            mark(self, tile_row_embedding="embedding", tile_column_embedding="embedding")
        self.numbers = MediaNumbers(config.max_number, width) if config.max_number else None

    def forward(self, features_NSC: Tensor, tiles_N2: Tensor | None = None, numbers_N: Tensor | None = None) -> Tensor:
        """[N, O, D].

        Args:
            features_NSC: of whole pictures or of tiles.
            tiles_N2: int64, row and column of each tile in its picture, from 1; 0, 0: a whole picture. None: all are.
            numbers_N: int64, which picture of its document each is, from 0; None: the only one.
        """
        x_NSC = F.dropout(self._placed(features_NSC), self.config.dropout, self.training)
        if self.pool is not None and self.queries is not None:
            queries_NOC = self.queries.expand(x_NSC.shape[0], -1, -1)
            if self.config.kind == "attention":
                x_NSC = queries_NOC + self.pool(queries_NOC, x_NSC, x_NSC, need_weights=False)[0]
            else:
                x_NSC = self.pool(queries_NOC, x_NSC)
        elif self.pool is not None:
            x_NSC = self.pool(x_NSC)
        slots_NOD = self._with_tiles(self.project(x_NSC), tiles_N2)
        return slots_NOD if self.numbers is None else self.numbers(slots_NOD, numbers_N)

    def _placed(self, features_NSC: Tensor) -> Tensor:
        """Normalized, and told where they are."""
        if self.norm is None or self.row_embedding is None or self.column_embedding is None:
            return features_NSC
        return self.norm(features_NSC) + (self.row_embedding + self.column_embedding).flatten(0, 1)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return next(self.parameters()).dtype

    def _with_tiles(self, slots_NOD: Tensor, tiles_N2: Tensor | None) -> Tensor:
        if self.tile_row_embedding is None or self.tile_column_embedding is None:
            return slots_NOD
        if tiles_N2 is None:
            tiles_N2 = torch.zeros(len(slots_NOD), 2, dtype=torch.int64, device=slots_NOD.device)
        rows_ND = F.embedding(tiles_N2[:, 0], self.tile_row_embedding)
        return slots_NOD + (rows_ND + F.embedding(tiles_N2[:, 1], self.tile_column_embedding))[:, None]


def _num_slots(config: ImageProjectorConfig, grid: tuple[int, int]) -> int:
    """Slots an image or a tile."""
    (rows, columns), scale = grid, config.scale_factor
    if config.kind in POOLING:
        assert config.num_tokens is not None
        return config.num_tokens
    if config.kind != "pixel_shuffle":
        scale = 1
    if rows % scale or columns % scale:
        raise ValueError(
            f"image_projector.scale_factor is {scale}, which doesn't divide the tower's {rows} x {columns} features; "
            f"choose one that does, another vision.layer or tower, or kind average, perceiver or c_abstractor"
        )
    num_slots = rows * columns // scale**2
    if config.num_tokens not in (None, num_slots):
        given = f"the tower gives {rows * columns} features"
        made = given if scale == 1 else f"{given}, of which scale_factor {scale} makes {num_slots} slots"
        raise ValueError(
            f"image_projector.num_tokens is {config.num_tokens} but {made}; leave it out, or choose kind average, "
            f"perceiver or c_abstractor"
        )
    return num_slots


def _check_heads(num_heads: int, feature_width: int) -> None:
    if feature_width % num_heads:
        raise ValueError(
            f"image_projector.num_attention_heads is {num_heads}, which doesn't divide the tower's {feature_width} "
            f"channels; choose a divisor"
        )


def pooled_grid(num_tokens: int, grid: tuple[int, int]) -> tuple[int, int]:
    """The most square grid of exactly `num_tokens` cells that is no finer than the features'.

    Raises:
        ValueError: there is none.
    """
    options = [(h, num_tokens // h) for h in range(1, num_tokens + 1) if num_tokens % h == 0]
    fitting = [(h, w) for h, w in options if h <= grid[0] and w <= grid[1]]
    if not fitting:
        raise ValueError(f"image_projector.num_tokens is {num_tokens}; no such grid fits into {grid[0]} x {grid[1]}")
    return min(fitting, key=lambda cell: abs(cell[0] - cell[1]))


def _mlp(width_in: int, hidden: int, width_out: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width_in, hidden, bias), nn.GELU(), nn.Linear(hidden, width_out, bias))


class AveragePool(nn.Module):
    """Adaptive averages over the grid."""

    def __init__(self, grid: tuple[int, int], pooled: tuple[int, int]):
        super().__init__()
        self.grid, self.pooled = grid, pooled

    def forward(self, x_NSC: Tensor) -> Tensor:
        """[N, O, C]."""
        x_NCHW = x_NSC.transpose(1, 2).unflatten(2, self.grid)
        return F.adaptive_avg_pool2d(x_NCHW, self.pooled).flatten(2).transpose(1, 2)


class PixelShuffle(nn.Module):
    """Lays the features of each square of the grid side by side in channels, its rows first."""

    def __init__(self, grid: tuple[int, int], scale: int):
        super().__init__()
        self.grid, self.scale = grid, scale

    def forward(self, x_NSC: Tensor) -> Tensor:
        """[N, S / scale², scale²·C]."""
        (rows, columns), scale = self.grid, self.scale
        x = x_NSC.unflatten(1, (rows // scale, scale, columns // scale, scale))
        return x.transpose(2, 3).flatten(3, 5).flatten(1, 2)


class PerceiverResampler(nn.Module):
    """Queries that look at the features and at each other, layer by layer (Flamingo, arXiv 2204.14198, section 3.1.1).

    As there, keys and values are of the features and the queries together, and projections have no bias. Places are
    told by the projector's row and column embeddings, not by embeddings of time; the last norm is here too.
    """

    def __init__(self, config: ImageProjectorConfig, feature_width: int):
        super().__init__()
        hidden = config.hidden_size or 4 * feature_width
        self.layers = nn.ModuleList(
            PerceiverLayer(feature_width, config.num_attention_heads, hidden) for _ in range(config.num_hidden_layers)
        )
        self.norm = nn.LayerNorm(feature_width)

    def forward(self, queries_NOC: Tensor, x_NSC: Tensor) -> Tensor:
        """[N, O, C]."""
        for layer in self.layers:
            queries_NOC = layer(queries_NOC, x_NSC)
        return self.norm(queries_NOC)


class PerceiverLayer(nn.Module):
    """Cross-attention and MLP, both residual, norms before them."""

    def __init__(self, width: int, num_heads: int, hidden: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.v_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden, bias=False), nn.GELU(), nn.Linear(hidden, width, bias=False)
        )

    def forward(self, queries_NOC: Tensor, x_NSC: Tensor) -> Tensor:
        """[N, O, C]."""
        normed_NOC = self.query_norm(queries_NOC)
        seen_NXC = torch.cat([self.feature_norm(x_NSC), normed_NOC], dim=1)
        q, k, v = (
            self._heads(self.q_proj(normed_NOC)),
            self._heads(self.k_proj(seen_NXC)),
            self._heads(self.v_proj(seen_NXC)),
        )
        attended_NOC = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        queries_NOC = queries_NOC + self.o_proj(attended_NOC)
        return queries_NOC + self.mlp(queries_NOC)

    def _heads(self, x_NXC: Tensor) -> Tensor:
        """[N, A, X, C / A]."""
        return x_NXC.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class ConvAbstractor(nn.Module):
    """Blocks, an average over the grid, blocks (Honeybee's C-Abstractor, arXiv 2312.06742, section 3.3).

    The blocks are RegNet's with squeeze-and-excitation (arXiv 2003.13678), each channel convolved by itself, norms over
    channels in place of BatchNorm: so a picture's slots don't depend on the batch.
    """

    def __init__(self, depth: int, grid: tuple[int, int], pooled: tuple[int, int], width_in: int, width: int):
        super().__init__()
        self.grid, self.pooled = grid, pooled
        self.before = nn.Sequential(*(RegBlock(width if i else width_in, width) for i in range(depth)))
        self.after = nn.Sequential(*(RegBlock(width, width) for _ in range(depth)))

    def forward(self, x_NSC: Tensor) -> Tensor:
        """[N, O, I]."""
        x_NHWI = self.before(x_NSC.unflatten(1, self.grid))
        x_NIhw = F.adaptive_avg_pool2d(x_NHWI.permute(0, 3, 1, 2), self.pooled)
        return self.after(x_NIhw.permute(0, 2, 3, 1)).flatten(1, 2)


class RegBlock(nn.Module):
    """Pointwise, depthwise (3 x 3), squeeze-and-excitation, pointwise; residual. Channels come last."""

    def __init__(self, width_in: int, width: int):
        super().__init__()
        self.expand, self.expand_norm = nn.Linear(width_in, width, bias=False), nn.LayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.conv_norm = nn.LayerNorm(width)
        squeezed = max(1, round(width_in / 4))
        self.squeeze, self.excite = nn.Linear(width, squeezed), nn.Linear(squeezed, width)
        self.contract, self.contract_norm = nn.Linear(width, width, bias=False), nn.LayerNorm(width)
        self.shortcut = None
        if width_in != width:
            self.shortcut = nn.Sequential(nn.Linear(width_in, width, bias=False), nn.LayerNorm(width))

    def forward(self, x_NHWC: Tensor) -> Tensor:
        """[N, H, W, I]."""
        y_NHWI = F.silu(self.expand_norm(self.expand(x_NHWC)))
        y_NHWI = self.conv(y_NHWI.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        y_NHWI = F.silu(self.conv_norm(y_NHWI))
        gates_N11I = self.excite(F.silu(self.squeeze(y_NHWI.mean(dim=(1, 2), keepdim=True)))).sigmoid()
        y_NHWI = self.contract_norm(self.contract(y_NHWI * gates_N11I))
        return F.silu(y_NHWI + (x_NHWC if self.shortcut is None else self.shortcut(x_NHWC)))
