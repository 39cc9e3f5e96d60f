"""A picture as the vision encoder sees it: one to ``max_tiles`` square tiles, normalised.

Tiling follows ``dynamic_preprocess`` and ``build_transform`` of the InternVL repository to the bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.errors import PromptError
from edgevl.preprocess.image import ImageSource, load_reduced

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelConfig

#: Most tiles of one picture, the thumbnail not counted. InternVL trains with 12 and is evaluated
#: with up to 40.
MAX_TILES = 40


@dataclass(frozen=True)
class Picture:
    """A prepared picture; two are equal if they have the same digest, whatever they came from.

    Attributes:
        pixels: Tiles, and the thumbnail last: float32 [B, 3, tile, tile], read-only.
        digest: SHA-256 (hexadecimal) of the shape and values of ``pixels``.
        width, height: Pixels of the source, upright.
    """

    pixels: NDArray[np.float32] = field(compare=False, repr=False)
    digest: str
    width: int = field(compare=False)
    height: int = field(compare=False)


def prepare_picture(
    source: ImageSource | Picture, config: ModelConfig, max_tiles: int | None = None
) -> Picture:
    """Load a picture and cut it into normalised tiles.

    Args:
        source: Anything that ``load_image`` takes; or what this function has returned for the
            same model, which is left as it is, so that a caller can prepare pictures ahead.
        config: Of the model that will see the picture.
        max_tiles: Most tiles; see `most_tiles`.

    Raises:
        ImageError: The picture cannot be read.
        PromptError: ``max_tiles`` is out of range.
    """
    if isinstance(source, Picture):
        return source
    max_tiles = most_tiles(config, max_tiles)
    tiling = (config.vision.image_size, min(config.min_tiles, max_tiles), max_tiles)

    def resized(width: int, height: int) -> tuple[int, int]:
        columns, rows = choose_grid(width, height, *tiling)
        return columns * tiling[0], rows * tiling[0]

    image, size = load_reduced(source, resized)
    tiles = split(image, *tiling, config.use_thumbnail, size)
    pixels = to_pixels(tiles, config.image_mean, config.image_std)
    pixels.flags.writeable = False
    digest = hashlib.sha256(repr(pixels.shape).encode())
    digest.update(pixels.data)
    return Picture(pixels, digest.hexdigest(), *size)


def most_tiles(config: ModelConfig, max_tiles: int | None = None) -> int:
    """Return the most tiles that a picture may be cut into, the thumbnail not counted.

    ``max_tiles`` is what is asked for, 1 to ``MAX_TILES``, or to the model's own number, which is
    the default, if that is more. If the model does not tile (``dynamic_tiling``) it is 1 anyway.

    Raises:
        PromptError: ``max_tiles`` is out of range.
    """
    if max_tiles is None:
        max_tiles = config.max_tiles
    if isinstance(max_tiles, bool) or not isinstance(max_tiles, int):
        raise PromptError(f"max_tiles must be a whole number, not {max_tiles!r}")
    most = max(MAX_TILES, config.max_tiles)
    if not 1 <= max_tiles <= most:
        raise PromptError(f"max_tiles must be 1 to {most}, not {max_tiles}")
    return max_tiles if config.dynamic_tiling else 1


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
