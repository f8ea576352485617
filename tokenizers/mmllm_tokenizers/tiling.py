"""How a picture of any size is cut into tiles of the image tower's size.

Told from the picture's width and height alone, so that an index can count a document's tokens without decoding it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class Tiling:
    """How pictures are cut. Each tile fills as many slots as a picture that isn't cut.

    Attributes:
        max_tiles: of one picture, the thumbnail not counted; 2 or more.
        thumbnail: whether the whole picture, scaled to one tile, comes before the tiles.
        max_tokens: slots of one picture at most, those of its thumbnail included; None: as `max_tiles` says.
    """

    max_tiles: int
    thumbnail: bool = True
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_tiles < 2:
            raise ValueError(f"tiling.max_tiles is {self.max_tiles}; give 2 or more, or leave tiling out")

    def limit(self, image_tokens: int) -> int:
        """Tiles that a picture may have, the thumbnail not counted, of so many slots each.

        Raises:
            ValueError: `max_tokens` leaves room for fewer than two.
        """
        if self.max_tokens is None:
            return self.max_tiles
        limit = min(self.max_tiles, self.max_tokens // image_tokens - self.thumbnail)
        if limit < 2:
            least, what = (2 + self.thumbnail) * image_tokens, "two tiles" + " and a thumbnail" * self.thumbnail
            raise ValueError(
                f"tiling.max_tokens is {self.max_tokens}, but {what} of image_tokens {image_tokens} take {least}; give "
                f"at least {least}, fewer image_tokens, or no tiling"
            )
        return limit


@dataclass(frozen=True)
class TileGrid:
    """Rows and columns of tiles of one picture; 1 x 1: it isn't cut."""

    rows: int = 1
    columns: int = 1
    thumbnail: bool = False

    @property
    def is_cut(self) -> bool:
        """Whether there is more than one tile."""
        return self.rows * self.columns > 1

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        """Row and column of each tile from 1, in the order of their slots; (0, 0) is the whole picture."""
        if not self.is_cut:
            return ((0, 0),)
        cells = ((row, column) for row in range(1, self.rows + 1) for column in range(1, self.columns + 1))
        return (*([(0, 0)] * self.thumbnail), *cells)

    @property
    def num_tiles(self) -> int:
        """Pictures of the tower's size, the thumbnail included."""
        return self.rows * self.columns + (self.thumbnail and self.is_cut)


@lru_cache(maxsize=4096)
def choose_grid(width: int, height: int, side: int, limit: int) -> tuple[int, int]:
    """Rows and columns of tiles that suit a picture best.

    Scaled down until it fits into the tiles (never up), a picture keeps some of its pixels, and fills a share of the
    tiles. LLaVA-NeXT takes the grid that keeps most, however few more pixels more tiles keep
    (https://llava-vl.github.io/blog/2024-01-30-llava-next). Here the kept pixels count times the share that they fill:
    a square picture has 2 x 2 tiles if it fills half of them, as in InternVL (arXiv 2404.16821), and a long strip as
    many in a row as there may be. Of equals, the fewest tiles, then the fewest rows.

    Args:
        width: of the picture, in pixels, upright.
        height: likewise.
        side: of a tile.
        limit: tiles at most.
    """
    best, best_kept = (1, 1), _kept_pixels(width, height, side, side)
    for num_tiles in range(2, limit + 1):
        for rows in range(1, num_tiles + 1):
            if num_tiles % rows:
                continue
            columns = num_tiles // rows
            kept = _kept_pixels(width, height, columns * side, rows * side)
            if kept * kept * best[0] * best[1] > best_kept * best_kept * num_tiles:
                best, best_kept = (rows, columns), kept
    return best


def _kept_pixels(width: int, height: int, max_width: int, max_height: int) -> int:
    """Pixels of a picture that is scaled down until it fits; whole numbers, so that all machines choose alike."""
    if width <= max_width and height <= max_height:
        return width * height
    if width * max_height >= height * max_width:
        return max_width * max_width * height // width
    return max_height * max_height * width // height
