"""Dynamic tiling: one picture becomes one to ``max_tiles`` square tiles, as InternVL defines it.

Follows ``dynamic_preprocess`` and ``build_transform`` of the InternVL repository to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def choose_grid(
    width: int, height: int, tile_size: int, min_tiles: int, max_tiles: int
) -> tuple[int, int]:
    """Return the (columns, rows) whose aspect ratio is nearest to ``width`` / ``height``.

    Candidates come in ascending area; on a tie the later wins if the picture has more than half
    of the pixels of its grid, so that small pictures are not blown up.

    The original sorts a set, so grids of one area come in an order that hash values decide. With
    ``min_tiles`` 1, as every InternVL has, no two of them are ever tied. Otherwise the order is
    that of transformers: by columns.
    """
    grids = sorted(
        (
            (columns, rows)
            for columns in range(1, max_tiles + 1)
            for rows in range(1, max_tiles + 1)
            if min_tiles <= columns * rows <= max_tiles
        ),
        key=lambda grid: grid[0] * grid[1],
    )
    aspect = width / height
    best, best_difference = (1, 1), float("inf")
    for columns, rows in grids:
        difference = abs(aspect - columns / rows)
        large_enough = width * height > 0.5 * tile_size * tile_size * columns * rows
        if difference < best_difference or (difference == best_difference and large_enough):
            best, best_difference = (columns, rows), difference
    return best


def split(
    image: Image.Image,
    tile_size: int,
    min_tiles: int,
    max_tiles: int,
    thumbnail: bool,
    size: tuple[int, int] | None = None,
) -> list[Image.Image]:
    """Cut an RGB picture into tiles of ``tile_size`` squared, row by row.

    If there is more than one tile and ``thumbnail`` is set, the whole picture at tile size is
    appended. Where ``image`` is reduced, ``size`` is what it was, which decides the grid.
    """
    columns, rows = choose_grid(*(size or image.size), tile_size, min_tiles, max_tiles)
    resized = image.resize((columns * tile_size, rows * tile_size))
    tiles = [
        resized.crop((x, y, x + tile_size, y + tile_size))
        for y in range(0, rows * tile_size, tile_size)
        for x in range(0, columns * tile_size, tile_size)
    ]
    if thumbnail and len(tiles) > 1:
        tiles.append(image.resize((tile_size, tile_size)))
    return tiles


def to_pixels(
    tiles: Sequence[Image.Image], mean: Sequence[float], std: Sequence[float]
) -> NDArray[np.float32]:
    """Scale tiles to [0, 1] and normalise per channel: float32 [B, 3, tile, tile]."""
    pixels = np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles]) / np.float32(255)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def byte_statistics(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Return ``mean`` and ``std`` of `to_pixels` in units of 8-bit values, 0 … 255."""
    return [round(255 * value, 6) for value in mean], [round(255 * value, 6) for value in std]
