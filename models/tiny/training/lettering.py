"""Text in Pillow's own font, for pictures that need no others."""

import random

from PIL import Image, ImageDraw, ImageFont

from scenes import Colour
from words import WORDS


def blank(size: tuple[int, int], colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A picture of one colour, and what draws on it; letters have hard edges, which pack well."""
    image = Image.new("RGB", size, colour)
    draw = ImageDraw.Draw(image)
    draw.fontmode = "1"
    return image, draw


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    pixels: float,
    colour: Colour,
    anchor: str = "la",
) -> None:
    """Writes one line, its `anchor`, as Pillow calls it, at a place."""
    draw.text(at, text, colour, ImageFont.load_default(size=max(8, pixels)), anchor)


def phrase(rng: random.Random, words: int) -> str:
    """Some words in a row, each capitalised."""
    return " ".join(rng.choices(WORDS, k=words)).title()


def number(rng: random.Random) -> str:
    """A number as it stands in tables and on displays."""
    return rng.choice(
        (
            str(rng.randint(0, 99)),
            str(rng.randint(100, 9999)),
            f"{rng.uniform(0, 100):.1f}",
            f"{rng.uniform(0, 1000):.2f}",
            f"{rng.randint(1, 99)}%",
            f"{rng.randint(1, 99)},{rng.randint(0, 999):03}",
        )
    )
