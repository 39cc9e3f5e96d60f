"""Pictures that are drawn to calibrate on."""

import numpy as np
import pytest
from PIL import Image

from edgevl.preprocess.tiles import choose_grid
from edgevl.quantize.calibration.drawn import DRAWERS, draw
from edgevl.quantize.calibration.pictures import THUMBNAIL_BYTES, thumbnail


@pytest.mark.parametrize("kind", range(len(DRAWERS)), ids=lambda kind: DRAWERS[kind].__name__)
def test_a_picture_is_drawn_from_its_seed(kind):
    first, again, other = draw(kind, 1), draw(kind, 1), draw(kind, 2)
    assert first.image.mode == "RGB"
    assert first == again
    assert first.image != other.image
    pixels = np.asarray(first.image, np.float32)
    assert pixels.std() > 3  # something is to be seen
    assert first.subject.isascii()
    assert not first.subject_zh.isascii()


def test_one_tile_and_several_occur():
    sizes = [draw(kind, 100 + kind).image.size for kind in range(4 * len(DRAWERS))]
    tiles = {columns * rows for columns, rows in (choose_grid(*s, 448, 1, 4) for s in sizes)}
    assert {1, 2, 3, 4} <= tiles
    assert all(100_000 / 2 < width * height < 1_000_000 for width, height in sizes)


def test_a_thumbnail_is_small_whatever_is_in_the_picture():
    noise = np.random.default_rng(0).integers(0, 256, (900, 700, 3), np.uint8)
    data = thumbnail(Image.fromarray(noise))
    assert data.startswith(b"\xff\xd8")
    assert len(data) <= THUMBNAIL_BYTES
