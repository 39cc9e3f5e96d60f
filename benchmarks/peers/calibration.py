"""Tiles for post-training quantization and for the check: pictures of smooth random colour."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MEAN = np.array((0.485, 0.456, 0.406), np.float32)
DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)
#: Tiles that quantizers see.
COUNT = 16


def tiles(size: int, count: int = COUNT) -> list[NDArray[np.float32]]:
    """Return different tiles, each of a whole 8-bit picture normalised, float32 [1, 3, S, S]."""
    random = np.random.default_rng(1)
    return [_tile(random, size) for _ in range(count)]


def check_tile(size: int) -> NDArray[np.float32]:
    """Return a tile that is not among those of ``tiles``."""
    return _tile(np.random.default_rng(0), size)


def _tile(random: np.random.Generator, size: int) -> NDArray[np.float32]:
    rgb = np.zeros((size, size, 3), np.float32)
    for blocks in (4, 16, 64, size):  # from broad patches of colour to the grain
        coarse = random.uniform(0, 1, (blocks, blocks, 3)).astype(np.float32)
        index = np.arange(size) * blocks // size
        rgb += coarse[index][:, index] / 4
    rgb = np.round(rgb * 255) / np.float32(255)
    return np.ascontiguousarray(((rgb - MEAN) / DEVIATION).transpose(2, 0, 1)[None])
