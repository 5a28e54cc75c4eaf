"""Dynamic tiling, InternVL's way of showing a large picture to a fixed-size vision tower. Pure functions.

The grid rule is the official one (`dynamic_preprocess`); ports that break ties otherwise choose another grid on hundreds of
common sizes. Legend: P tiles, H height, W width, C channels (RGB).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tiling:
    """How a model cuts pictures: tile edge in pixels, tiles a picture, tokens a tile."""

    tile_size: int = 448
    min_tiles: int = 1
    max_tiles: int = 12
    thumbnail: bool = True
    tokens_per_tile: int = 256

    def tiles_of(self, width: int, height: int) -> int:
        """How many tiles a picture of this size becomes, the thumbnail included."""
        columns, rows = choose_grid(width, height, self)
        return columns * rows + (self.thumbnail and columns * rows > 1)

    def tokens_of(self, width: int, height: int) -> int:
        """How many `<IMG_CONTEXT>` tokens a picture of this size becomes."""
        return self.tiles_of(width, height) * self.tokens_per_tile


@cache
def _grids(min_tiles: int, max_tiles: int) -> tuple[tuple[int, int], ...]:
    # Built and sorted in the official order: among equal products it is the order of the set, and ties look at it.
    found: set[tuple[int, int]] = set()
    for most in range(min_tiles, max_tiles + 1):
        found.update((i, j) for i in range(1, most + 1) for j in range(1, most + 1) if min_tiles <= i * j <= max_tiles)
    return tuple(sorted(found, key=lambda grid: grid[0] * grid[1]))


def choose_grid(width: int, height: int, tiling: Tiling) -> tuple[int, int]:
    """(columns, rows) with the aspect ratio nearest to the picture's.

    On an exact tie the grid with more tiles wins if the picture has more than half of its pixels.
    """
    aspect = width / height
    area = width * height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in _grids(tiling.min_tiles, tiling.max_tiles):
        difference = abs(aspect - columns / rows)
        if difference < best_difference:
            best, best_difference = (columns, rows), difference
        elif difference == best_difference and area > 0.5 * tiling.tile_size**2 * columns * rows:
            best = (columns, rows)
    return best


def cut_tiles(picture: Image.Image, tiling: Tiling) -> np.ndarray:
    """An upright RGB picture as uint8 `tiles_PHWC`: the grid row by row, then the thumbnail unless there is one tile.

    Resizing is Pillow's bicubic, as in the official code: the pixels are equal to its own, bit by bit.
    """
    size = tiling.tile_size
    columns, rows = choose_grid(*picture.size, tiling)
    resized = np.asarray(picture.resize((columns * size, rows * size), Image.Resampling.BICUBIC))
    grid_RHCWK = resized.reshape(rows, size, columns, size, 3)
    tiles_PHWC = grid_RHCWK.transpose(0, 2, 1, 3, 4).reshape(rows * columns, size, size, 3)
    if tiling.thumbnail and columns * rows > 1:
        small = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        tiles_PHWC = np.concatenate([tiles_PHWC, small[None]])
    return np.ascontiguousarray(tiles_PHWC)
