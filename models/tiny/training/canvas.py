"""Colours, backgrounds, ink put on a picture, and what a camera does to it."""

import functools
import io
import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from fonts import PRINT_FONTS, font_at, font_paths
from glyphs import Ink
from scenes import Colour, Style


def _luma(colour: Colour) -> float:
    return 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]


def random_colour(rng: random.Random, low: int = 0, high: int = 255) -> Colour:
    """Any colour with its three values in a range."""
    return (rng.randint(low, high), rng.randint(low, high), rng.randint(low, high))


def paper_colour(rng: random.Random) -> Colour:
    """A light, slightly tinted colour."""
    base = rng.randint(200, 255)
    return tuple(min(255, max(0, base + rng.randint(-18, 12))) for _ in range(3))


def ink_colour(rng: random.Random, paper: Colour, contrast: float) -> Colour:
    """A colour at least `contrast` (0..255 of luma) from the paper's."""
    for _ in range(60):
        colour = random_colour(rng)
        if abs(_luma(colour) - _luma(paper)) >= contrast:
            return colour
    return (10, 10, 10) if _luma(paper) > 128 else (245, 245, 245)


def contrast_of(rng: random.Random, style: Style) -> float:
    """How far ink and paper are apart at least, in 0..255 of luma."""
    return rng.uniform(120 - 40 * style.difficulty, 150)


def vary(rng: random.Random, colour: Colour, amount: int) -> Colour:
    """A neighbouring colour."""
    return tuple(min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)


def background(rng: random.Random, size: tuple[int, int], colour: Colour) -> Image.Image:
    """Plain, or shading softly into a neighbouring colour."""
    plain = Image.new("RGB", size, colour)
    if rng.random() < 0.5:
        return plain
    shade = Image.linear_gradient("L").rotate(rng.choice((0, 90, 180, 270)))
    return Image.composite(
        Image.new("RGB", size, vary(rng, colour, 35)), plain, shade.resize(size, Image.BILINEAR)
    )


def source_size(rng: random.Random, wide: float) -> tuple[int, int]:
    """Size of a picture; `wide` is the probability of an aspect that takes two tiles."""
    if rng.random() < wide:
        aspect = rng.choice((rng.uniform(1.5, 2.5), rng.uniform(1.5, 2.2), rng.uniform(0.6, 0.72)))
    else:
        aspect = math.exp(rng.uniform(math.log(0.78), math.log(1.45)))
    area = rng.choice((rng.uniform(110, 240), rng.uniform(140, 240), rng.uniform(220, 400))) ** 2
    return max(96, round((area * aspect) ** 0.5)), max(96, round((area / aspect) ** 0.5))


def put(
    image: Image.Image, classes: Image.Image, ink: Ink, colour: Colour, centre: tuple[float, float]
) -> None:
    """Puts ink of a colour on the picture, and its classes beside."""
    corner = round(centre[0] - ink[0].width / 2), round(centre[1] - ink[0].height / 2)
    image.paste(colour, corner, ink[0])
    classes.paste(ink[1], corner, ink[1].point(lambda v: 255 if v else 0))


def off_centre(rng: random.Random, room: float, inner: float) -> float:
    """Centre of something `inner` long, anywhere it fits within `room`."""
    slack = max(0.0, (room - inner) / 2 - 1)
    return room / 2 + rng.uniform(-slack, slack)


@functools.cache
def _noise_bank() -> np.ndarray:
    """Gaussian noise int16 [1024, 1024, 3] of deviation 64; pieces of it are cheaper than new."""
    return (np.random.default_rng(0).standard_normal((1024, 1024, 3)) * 64).astype(np.int16)


def camera(rng: random.Random, image: Image.Image, style: Style) -> Image.Image:
    """Blur, noise, exposure and JPEG traces, all legible at the model's 96 pixels."""
    hard = style.difficulty
    if rng.random() < 0.4 * hard:
        image = image.filter(
            ImageFilter.GaussianBlur(rng.uniform(0.002, 0.006) * min(image.size) * hard)
        )
    if rng.random() < 0.4 * hard:
        gain, offset = rng.uniform(0.75, 1.15), rng.uniform(-15, 20)
        image = image.point([min(255, max(0, round(v * gain + offset))) for v in range(256)] * 3)
    if rng.random() < 0.5 * hard and max(image.size) < 1024:
        shift = rng.choice((2, 3, 3, 4, 4))  # deviation 16, 8 or 4 levels of 255
        x, y = rng.randrange(1024 - image.width), rng.randrange(1024 - image.height)
        noise = _noise_bank()[y : y + image.height, x : x + image.width] >> shift
        pixels = np.clip(np.asarray(image, dtype=np.int16) + noise, 0, 255)
        image = Image.fromarray(pixels.astype(np.uint8))
    if rng.random() < 0.25 * hard:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=rng.randint(35, 90))
        image = Image.open(file).convert("RGB")
    return image


def turn(
    image: Image.Image, classes: Image.Image, degrees: float
) -> tuple[Image.Image, Image.Image]:
    """Tilts the whole picture; the corners take the colour of the picture's own corner."""
    corner = image.getpixel((1, 1))
    return (
        image.rotate(degrees, Image.BILINEAR, fillcolor=corner),
        classes.rotate(degrees, Image.NEAREST),
    )


def caption(
    rng: random.Random,
    image: Image.Image,
    text: str,
    colour: Colour,
    box: tuple[float, float, float, float],
    places_below: bool,
) -> None:
    """Small print above or below a box where there is room; no part of the answer."""
    size = round(min(image.size) * rng.uniform(0.06, 0.1))
    y = box[3] + size * 0.2 if places_below else box[1] - size * 1.4
    if size < 8 or y < 0 or y + size > image.height:
        return
    font = font_at(rng.choice(font_paths(PRINT_FONTS)), size)
    x = rng.uniform(box[0], max(box[0], box[2] - font.getlength(text)))
    ImageDraw.Draw(image).text((x, y), text, fill=colour, font=font)
