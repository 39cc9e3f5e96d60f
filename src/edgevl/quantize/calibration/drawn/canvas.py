"""What all drawers use: a picture with what is to be found in it, colours, text."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Colour: TypeAlias = tuple[int, int, int]

#: English, Chinese, and the colour itself.
COLOURS: tuple[tuple[str, str, Colour], ...] = (
    ("red", "红色", (208, 42, 38)),
    ("green", "绿色", (48, 150, 62)),
    ("blue", "蓝色", (40, 86, 200)),
    ("yellow", "黄色", (240, 205, 40)),
    ("orange", "橙色", (240, 140, 30)),
    ("purple", "紫色", (130, 60, 165)),
    ("brown", "棕色", (125, 82, 48)),
    ("pink", "粉色", (240, 150, 180)),
)

WORDS = (
    "North River Market Station Coffee Garden Energy Report Winter Summer Budget Water Museum "
    "Harbour Pressure Machine Library Silver Ticket Express Forest Kitchen Monday Friday Service "
    "Battery Signal Travel Morning Paper Engine Island Window Account Health School Bridge Valley "
    "Planet Quality Storage Supply Motor Camera Record Public Square Central Delivery Product"
).split()


@dataclass(frozen=True)
class Drawing:
    """A picture, and something that is to be found in it, in English and in Chinese."""

    image: Image.Image
    subject: str
    subject_zh: str


def any_colour(rng: random.Random, low: int = 0, high: int = 255) -> Colour:
    """Return a colour with its three values in a range."""
    return rng.randint(low, high), rng.randint(low, high), rng.randint(low, high)


def paper(rng: random.Random) -> Colour:
    """Return a light colour, often white."""
    return (255, 255, 255) if rng.random() < 0.4 else any_colour(rng, 222, 250)


def ink(rng: random.Random) -> Colour:
    """Return a dark colour, often black."""
    return (20, 20, 20) if rng.random() < 0.5 else any_colour(rng, 0, 95)


def blank(size: tuple[int, int], colour: Colour) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Return a picture of one colour, and what draws on it."""
    image = Image.new("RGB", size, colour)
    return image, ImageDraw.Draw(image)


def write(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    pixels: float,
    colour: Colour,
    anchor: str = "la",
) -> float:
    """Write one line in Pillow's own font: -> its width.

    Args:
        draw: what draws.
        at: where the anchor of the text goes.
        text: what to write; the font has Latin letters only.
        pixels: size of the font.
        colour: of the text.
        anchor: as Pillow calls it: ``l``, ``m`` or ``r``, and ``a`` (top), ``m`` or ``s`` (base).
    """
    font = ImageFont.load_default(size=max(8, pixels))
    draw.text(at, text, colour, font, anchor)
    return float(draw.textlength(text, font))


def phrase(rng: random.Random, words: int) -> str:
    """Return some words in a row."""
    return " ".join(rng.choices(WORDS, k=words))


def number(rng: random.Random) -> str:
    """Return a number as it stands in tables and on displays."""
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
