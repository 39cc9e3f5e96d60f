"""Streets, landscapes, textures, icons."""

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from canvas import random_colour
from lettering import blank


def street(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Houses, trees and a sky with sun or moon."""
    width, height = size
    night = rng.random() < 0.3
    image, draw = blank(size, random_colour(rng, 10, 50) if night else (150, 200, 240))
    ground = height * rng.uniform(0.68, 0.85)
    light = min(size) * rng.uniform(0.06, 0.12)
    x, y = rng.uniform(0.1, 0.9) * width, rng.uniform(0.1, 0.25) * height
    glow = (240, 240, 215) if night else (255, 215, 60)
    draw.ellipse((x - light, y - light, x + light, y + light), glow)
    draw.rectangle((0, ground, width, height), (40, 70, 40) if night else (110, 170, 80))
    count = rng.randint(2, 5)
    for place in rng.sample(range(count), count):
        left = (place + rng.uniform(0.05, 0.2)) * width / count
        right = (place + rng.uniform(0.75, 0.95)) * width / count
        top = ground - height * rng.uniform(0.2, 0.45)
        if rng.random() < 0.6:
            _house(rng, draw, (left, top, right, ground), night)
        else:
            _tree(rng, draw, (left, top, right, ground))
    return image


def _house(
    rng: random.Random,
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    night: bool,
) -> None:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    draw.rectangle(box, random_colour(rng, 120, 235))
    draw.polygon(
        [(left, top), ((left + right) / 2, top - height * 0.4), (right, top)],
        random_colour(rng, 60, 160),
    )
    glass = (250, 220, 110) if night else (190, 220, 240)
    for column in range(2):
        x = left + width * (0.15 + 0.45 * column)
        draw.rectangle((x, top + height * 0.15, x + width * 0.25, top + height * 0.4), glass)
    door = left + width * rng.uniform(0.2, 0.6)
    draw.rectangle(
        (door, bottom - height * 0.4, door + width * 0.2, bottom), random_colour(rng, 0, 120)
    )


def _tree(
    rng: random.Random, draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float]
) -> None:
    left, top, right, bottom = box
    middle, trunk = (left + right) / 2, (right - left) * 0.08
    draw.rectangle((middle - trunk, (top + bottom) / 2, middle + trunk, bottom), (95, 65, 40))
    leaves = (rng.randint(20, 80), rng.randint(100, 160), rng.randint(20, 80))
    if rng.random() < 0.5:
        draw.polygon([(left, bottom - trunk), (middle, top), (right, bottom - trunk)], leaves)
    else:
        draw.ellipse((left, top, right, (top + 2 * bottom) / 3), leaves)


def _noise(random_state: np.random.Generator, size: tuple[int, int], octaves: int) -> Image.Image:
    """Return smooth noise, each octave twice as fine and half as strong: mode F, 0 to 1."""
    total = np.zeros((size[1], size[0]), np.float32)
    for octave in range(octaves):
        cells = 3 << octave
        coarse = Image.fromarray(random_state.random((cells, cells), np.float32))
        total += np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) / 2**octave
    total -= total.min()
    return Image.fromarray(total / max(float(total.max()), 1e-6))


def landscape(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Ridges behind each other under a cloudy sky, with the grain of a photograph."""
    state = np.random.default_rng(rng.getrandbits(32))
    width, height = size
    above, below = np.array(random_colour(rng, 40, 200)), np.array(random_colour(rng, 150, 250))
    rise = np.linspace(0, 1, height, dtype=np.float32)[:, None, None]
    pixels = above * (1 - rise) + below * rise
    clouds = np.asarray(_noise(state, size, 5))[..., None]
    pixels = pixels + (np.clip(clouds - 0.55, 0, 1) * 2) * (255 - pixels)
    far, near = np.array(random_colour(rng, 110, 190)), np.array(random_colour(rng, 10, 90))
    ridges = rng.randint(2, 5)
    rows = np.arange(height)[:, None]
    for ridge in range(ridges):
        nearness = (ridge + 1) / ridges
        profile = np.asarray(_noise(state, (width, 8), 4 + ridge))[4]
        line = height * (0.3 + 0.5 * nearness - 0.3 * profile * (1.2 - 0.5 * nearness))
        texture = 1 + 0.5 * (np.asarray(_noise(state, size, 6))[..., None] - 0.5)
        colour = (far * (1 - nearness) + near * nearness) * texture
        pixels = np.where((rows >= line[None, :])[..., None], colour, pixels)
    pixels = pixels + state.normal(0, rng.uniform(0, 8), pixels.shape)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def texture(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A gradient, stripes, a chessboard, clouds of colour, or noise."""
    state = np.random.default_rng(rng.getrandbits(32))
    first, second = random_colour(rng), random_colour(rng)
    x = np.linspace(0, 1, size[0], dtype=np.float32)[None, :]
    y = np.linspace(0, 1, size[1], dtype=np.float32)[:, None]
    angle, waves = rng.uniform(0, math.pi), rng.randint(3, 20)
    along = x * math.cos(angle) + y * math.sin(angle)
    kind = rng.choice(("gradient", "stripes", "chessboard", "clouds", "noise"))
    if kind == "gradient":
        share = (along - along.min()) / (along.max() - along.min())
    elif kind == "stripes":
        share = 0.5 + 0.5 * np.sin(along * waves * 2 * math.pi)
    elif kind == "chessboard":
        share = ((x * waves).astype(int) + (y * waves).astype(int)) % 2
    elif kind == "clouds":
        share = np.asarray(_noise(state, size, rng.randint(2, 7)))
    else:
        share = state.random((size[1], size[0]), np.float32)
    share = share[..., None]
    image = Image.fromarray(
        (np.array(first) * (1 - share) + np.array(second) * share).astype(np.uint8)
    )
    if rng.random() < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(1, 6)))
    return image


def icons(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A grid of simple icons, as on a screen."""
    image, draw = blank(size, random_colour(rng, 20, 240))
    columns, rows = rng.randint(2, 5), rng.randint(2, 4)
    step = min(size[0] / columns, size[1] / rows)
    for column in range(columns):
        for row in range(rows):
            x = (column + 0.5) * size[0] / columns
            y = (row + 0.5) * size[1] / rows
            _icon(rng, draw, x, y, step * 0.36)
    return image


def _icon(rng: random.Random, draw: ImageDraw.ImageDraw, x: float, y: float, radius: float) -> None:
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.rounded_rectangle(box, radius * 0.35, random_colour(rng, 30, 230))
    light, line = (250, 250, 250), max(2, round(radius / 8))
    r = radius * 0.55
    kind = rng.choice(("envelope", "clock", "play", "plus", "wave", "bars", "person"))
    if kind == "envelope":
        draw.rectangle((x - r, y - r * 0.7, x + r, y + r * 0.7), outline=light, width=line)
        draw.line([(x - r, y - r * 0.7), (x, y), (x + r, y - r * 0.7)], light, line)
    elif kind == "clock":
        draw.ellipse((x - r, y - r, x + r, y + r), outline=light, width=line)
        angle = rng.uniform(0, 2 * math.pi)
        hand = (x + 0.7 * r * math.cos(angle), y + 0.7 * r * math.sin(angle))
        draw.line([hand, (x, y), (x, y - r * 0.5)], light, line)
    elif kind == "play":
        draw.polygon([(x - r * 0.6, y - r), (x + r, y), (x - r * 0.6, y + r)], light)
    elif kind == "plus":
        draw.line([(x - r, y), (x + r, y)], light, 2 * line)
        draw.line([(x, y - r), (x, y + r)], light, 2 * line)
    elif kind == "wave":
        for ring in (0.4, 0.7, 1.0):
            reach = r * ring
            draw.arc((x - reach, y - reach, x + reach, y + reach), 215, 325, light, line)
    elif kind == "bars":
        for bar in range(4):
            left = x - r + bar * r / 2
            draw.rectangle((left, y + r - (bar + 1) * r / 2, left + r / 3, y + r), light)
    else:
        draw.ellipse((x - r * 0.4, y - r, x + r * 0.4, y - r * 0.2), light)
        draw.pieslice((x - r, y, x + r, y + 2 * r), 180, 360, light)
