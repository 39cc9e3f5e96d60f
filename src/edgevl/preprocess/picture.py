"""A picture as the vision encoder sees it: normalised tiles and a name by content."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import PromptError
from edgevl.preprocess.image import ImageSource, load_reduced
from edgevl.preprocess.tiles import choose_grid, split, to_pixels

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelConfig

#: Most tiles of one picture, the thumbnail not counted. InternVL trains with 12 and is evaluated
#: with up to 40.
MAX_TILES = 40


@dataclass(frozen=True)
class Picture:
    """A prepared picture.

    Two pictures are equal if they have the same digest, whatever file they came from.

    Attributes:
        pixels: Tiles, and the thumbnail last: float32 [B, 3, tile, tile], read-only.
        digest: SHA-256 (hexadecimal) of the shape and values of ``pixels``.
        width: Pixels of the source, upright.
        height: Pixels of the source, upright.
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

    Args:
        config: Of the model.
        max_tiles: What is asked for, 1 to ``MAX_TILES``, or to the model's own number, which is
            the default, if that is more. One tile is used whatever this says if the model does
            not tile (``dynamic_tiling``).

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
