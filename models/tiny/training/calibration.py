"""Draws the pictures that `edgevl quantize` calibrates on where the user has none.

    python models/tiny/training/calibration.py src/edgevl/quantize/calibration/pictures.tar

They are to be small, for every wheel has them: letters have hard edges, and of a picture that takes
too many bytes, or so few that hardly anything is in it, the next seed's is taken. No fonts are
needed but Pillow's own.
"""

import argparse
import io
import itertools
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image

from charts import bar_chart, city_map, floor_plan, line_chart, pie_chart
from papers import document, meter, sign, table
from pictures import draw_display, draw_shapes
from scenes import Style
from views import icons, landscape, street, texture

LEAST_BYTES, MOST_BYTES = 500, 1900
ROUNDS = 2  # pictures of each kind
#: Width : height, and how often.
ASPECTS = {(1, 1): 3, (4, 3): 3, (3, 4): 2, (16, 9): 2, (9, 16): 1, (2, 1): 1, (3, 1): 1}


def shapes(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Coloured shapes."""
    return draw_shapes(rng, Style(difficulty=0), size=size).image


def display(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A device with digits."""
    return draw_display(rng, Style(difficulty=0), size=size, captions=False).image


#: What is drawn; neighbours differ in kind.
DRAWERS: tuple[Callable[[random.Random, tuple[int, int]], Image.Image], ...] = (
    shapes, document, landscape, bar_chart, display, street, table, meter, texture, sign,
    line_chart, icons, pie_chart, city_map, floor_plan,
)  # fmt: skip
#: Kinds that look like photographs, for which there is a better way to pack.
PHOTOGRAPHS = (landscape, texture, display)


def draw(index: int, seed: int) -> Image.Image:
    """The picture of a drawer and a seed, of between 0.1 and 0.3 megapixels."""
    rng = random.Random(f"{index} {seed}")
    columns, rows = rng.choices(list(ASPECTS), list(ASPECTS.values()))[0]
    side = rng.uniform(320, 560)
    size = round(side * (columns / rows) ** 0.5), round(side * (rows / columns) ** 0.5)
    return DRAWERS[index](rng, size)


def packed(index: int, image: Image.Image) -> bytes:
    """The picture as WebP."""
    file = io.BytesIO()
    if DRAWERS[index] in PHOTOGRAPHS:
        image.save(file, "WEBP", quality=30, method=6)
    else:
        image.save(file, "WEBP", lossless=True, method=6)
    return file.getvalue()


def pictures() -> Iterator[tuple[str, Image.Image, bytes]]:
    """All pictures: a name that ends in the seed, as it was drawn, and packed."""
    seeds = [itertools.count() for _ in DRAWERS]
    for number in range(ROUNDS * len(DRAWERS)):
        index = number % len(DRAWERS)
        for seed in seeds[index]:
            image = draw(index, seed)
            data = packed(index, image)
            if LEAST_BYTES <= len(data) <= MOST_BYTES:
                break
        yield f"{number:02}-{DRAWERS[index].__name__}-{seed}.webp", image, data


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("archive", type=Path)
    with tarfile.open(parser.parse_args().archive, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, image, data in pictures():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            print(f"{name}: {image.width} x {image.height}, {len(data)} bytes")


if __name__ == "__main__":
    main()
