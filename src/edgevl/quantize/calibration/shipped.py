"""The pictures that come with EdgeVL: something to calibrate on where the user has none.

``models/tiny/training/calibration.py`` has drawn them. They are few, for each wheel has them; so
that they do for many conversations, a part of a picture is shown, another one each time.
"""

from __future__ import annotations

import functools
import random
import tarfile
from pathlib import Path

from PIL import Image

from edgevl.preprocess import load_image

PICTURES = Path(__file__).with_name("pictures.tar")

#: Least share of a picture's width and of its height that is shown.
LEAST_SHARE = 0.7


def kinds() -> list[str]:
    """Return what is on each picture, such as ``bar_chart``; neighbours differ."""
    return [name.split("-")[1] for name, _ in _files()]


def drawn(place: int, seed: int) -> Image.Image:
    """Return a part of a picture; the same arguments give the same part.

    Args:
        place: of the picture, taken modulo their number, so that counting up goes round.
        seed: of what part.
    """
    files = _files()
    image = load_image(files[place % len(files)][1])
    rng = random.Random(seed)
    width, height = (round(side * rng.uniform(LEAST_SHARE, 1)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


@functools.cache
def _files() -> list[tuple[str, bytes]]:
    """Return the names and the contents of the files in the archive."""
    files = []
    with tarfile.open(PICTURES) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None  # there are only files in it
            files.append((member.name, file.read()))
    return files
