"""Text as ink: two "L" images of one size, how much ink and which character is where."""

import functools
import math
import random

import numpy as np
from PIL import Image, ImageDraw

from fonts import font_at
from scenes import Style, glyph_class

HELDOUT_DIGITS = slice(-360, None, 2)  # of scikit-learn's load_digits: never used in training

Ink = tuple[Image.Image, Image.Image]


def _empty_ink(width: int, height: int) -> Ink:
    return Image.new("L", (width, height)), Image.new("L", (width, height))


def font_ink(rng: random.Random, text: str, path: str, height: int, jitter: float) -> Ink:
    """`text` in a font; `jitter` 0..1 moves each character as a hand would."""
    font = font_at(path, max(8, round(height / 2) * 2))
    tracking = rng.uniform(0.0, 0.12) * font.size
    top, bottom = font.getbbox("0Ay" if set(text) & set("gjpqy") else "0A")[1::2]
    margin = round(jitter * 0.12 * font.size) + 2
    lengths = [font.getlength(c) for c in text]
    width = math.ceil(sum(lengths) + tracking * (len(text) - 1)) + 2 * margin
    ink, classes = _empty_ink(width, bottom - top + 2 * margin)
    draw, draw_class = ImageDraw.Draw(ink), ImageDraw.Draw(classes)
    x = float(margin)
    for character, length in zip(text, lengths, strict=True):
        dy = rng.uniform(-1, 1) * jitter * 0.1 * font.size
        draw.text((x, margin - top + dy), character, fill=255, font=font)
        draw_class.rectangle(
            (x, margin, x + length, ink.height - margin), fill=glyph_class(character)
        )
        x += length + tracking
    return ink, classes


@functools.cache
def _handwritten_digits(heldout: bool) -> dict[str, list[np.ndarray]]:
    """Real handwritten digits by value, 8x8 floats 0..1."""
    from sklearn.datasets import load_digits

    data = load_digits()
    part = np.zeros(len(data.images), dtype=bool)
    part[HELDOUT_DIGITS] = True
    part = part if heldout else ~part
    digits: dict[str, list[np.ndarray]] = {c: [] for c in "0123456789"}
    for image, value in zip(data.images[part], data.target[part], strict=True):
        digits[str(value)].append(image.astype(np.float32) / 16)
    return digits


def written_ink(rng: random.Random, text: str, height: int, style: Style) -> Ink:
    """`text` of real handwritten digits, each enlarged smoothly and moved a little."""
    cells = []
    for character in text:
        pixels = rng.choice(_handwritten_digits(style.heldout)[character])
        columns = np.flatnonzero(pixels.max(axis=0) > 0.1)
        pixels = np.pad(pixels[:, columns[0] : columns[-1] + 1], 1)
        # Enlarged in two steps and then sharpened, the 8x8 image becomes a smooth pen stroke.
        size = (round(height * pixels.shape[1] / 10 * rng.uniform(0.85, 1.1)), height)
        cell = Image.fromarray((pixels * 255).astype(np.uint8)).resize(size, Image.BICUBIC)
        gain, threshold = rng.uniform(2, 5), rng.uniform(85, 140)
        cell = cell.point(
            [min(255, max(0, round((v - threshold) * gain + 90))) for v in range(256)]
        )
        # Moving the corners leans, turns and stretches it: the images are few, hands are many.
        corners = [
            edge + rng.uniform(-0.13, 0.13) * length * style.difficulty
            for x, y in ((0, 0), (0, 1), (1, 1), (1, 0))
            for edge, length in ((x * size[0], size[0]), (y * size[1], size[1]))
        ]
        cell = cell.transform(size, Image.QUAD, corners, Image.BILINEAR)
        cells.append((character, cell))
    gap = round(height * rng.uniform(-0.06, 0.1))
    lift = round(height * 0.08)
    ink, classes = _empty_ink(sum(c.width + gap for _, c in cells) - gap, height + 2 * lift)
    x = 0
    for character, cell in cells:
        y = lift + rng.randint(-lift, lift)
        ink.paste(255, (x, y), cell)
        classes.paste(glyph_class(character), (x, lift, x + cell.width, lift + height))
        x += cell.width + gap
    return ink, classes


# Segments a..g as polylines in a cell of 1 x 2; which of them each digit lights.
_SEGMENTS = {
    "a": ((0, 0), (1, 0)),
    "b": ((1, 0), (1, 1)),
    "c": ((1, 1), (1, 2)),
    "d": ((0, 2), (1, 2)),
    "e": ((0, 1), (0, 2)),
    "f": ((0, 0), (0, 1)),
    "g": ((0, 1), (1, 1)),
}
_LIT = {
    "0": "abcdef",
    "1": "bc",
    "2": "abdeg",
    "3": "abcdg",
    "4": "bcfg",
    "5": "acdfg",
    "6": "acdefg",
    "7": "abc",
    "8": "abcdefg",
    "9": "abcdfg",
}
_DOTS = {  # the usual 5x7 characters of dot-matrix displays, one row of bits per number
    "0": (14, 17, 19, 21, 25, 17, 14),
    "1": (4, 12, 4, 4, 4, 4, 14),
    "2": (14, 17, 1, 2, 4, 8, 31),
    "3": (31, 2, 4, 2, 1, 17, 14),
    "4": (2, 6, 10, 18, 31, 2, 2),
    "5": (31, 16, 30, 1, 1, 17, 14),
    "6": (6, 8, 16, 30, 17, 17, 14),
    "7": (31, 1, 2, 4, 8, 8, 8),
    "8": (14, 17, 17, 14, 17, 17, 14),
    "9": (14, 17, 17, 15, 1, 2, 12),
}


def segment_ink(rng: random.Random, text: str, height: int, ghost: int) -> Ink:
    """Seven-segment digits; a blank is an unlit place, `ghost` 0..255 how far unlit ones show."""
    thickness = height * rng.uniform(0.09, 0.16)
    cell = height * rng.uniform(0.42, 0.52)
    pitch = cell + thickness + height * rng.uniform(0.1, 0.2)
    gap = thickness * rng.uniform(0.55, 0.72)
    slant = rng.choice((0.0, 0.0, rng.uniform(0.04, 0.15)))
    pointed = rng.random() < 0.6
    margin = thickness
    width = math.ceil(pitch * len(text) + slant * height + 2 * margin)
    ink, classes = _empty_ink(width, math.ceil(height + 2 * margin))
    draw, draw_class = ImageDraw.Draw(ink), ImageDraw.Draw(classes)
    unit = (height - thickness) / 2

    def point(left: float, x: float, y: float) -> tuple[float, float]:
        return left + x + slant * (height - y), margin + thickness / 2 + y

    for place, character in enumerate(text):
        left = margin + thickness / 2 + place * pitch
        if character != " ":
            corners = [
                point(left, x, y)
                for x, y in (
                    (-thickness / 2, 0),
                    (cell + thickness / 2, 0),
                    (cell + thickness / 2, 2 * unit),
                    (-thickness / 2, 2 * unit),
                )
            ]
            draw_class.polygon(corners, fill=glyph_class(character))
        for name, ((x1, y1), (x2, y2)) in _SEGMENTS.items():
            level = 255 if name in _LIT.get(character, "") else ghost
            if not level:
                continue
            # A segment runs along its axis from `gap` after one corner to `gap` before the other.
            across = y1 == y2
            ax, ay, bx, by = x1 * cell, y1 * unit, x2 * cell, y2 * unit
            half = thickness / 2
            tip = half if pointed else 0.0
            if across:
                outline = [
                    (ax + gap - tip, ay),
                    (ax + gap, ay - half),
                    (bx - gap, by - half),
                    (bx - gap + tip, by),
                    (bx - gap, by + half),
                    (ax + gap, ay + half),
                ]
            else:
                outline = [
                    (ax, ay + gap - tip),
                    (ax + half, ay + gap),
                    (bx + half, by - gap),
                    (bx, by - gap + tip),
                    (bx - half, by - gap),
                    (ax - half, ay + gap),
                ]
            draw.polygon([point(left, x, y) for x, y in outline], fill=level)
    return ink, classes


def dot_ink(rng: random.Random, text: str, height: int, ghost: int) -> Ink:
    """Dot-matrix digits, 5x7 dots each."""
    step = height / 7
    radius = step * rng.uniform(0.38, 0.5)
    square = rng.random() < 0.4
    ink, classes = _empty_ink(math.ceil(step * 6 * len(text)), math.ceil(height))
    draw, draw_class = ImageDraw.Draw(ink), ImageDraw.Draw(classes)
    for place, character in enumerate(text):
        left = place * step * 6
        if character != " ":
            draw_class.rectangle((left, 0, left + 5 * step, height), fill=glyph_class(character))
        for row in range(7):
            for column in range(5):
                lit = character != " " and _DOTS[character][row] >> (4 - column) & 1
                x, y = left + (column + 0.5) * step, (row + 0.5) * step
                corners = (x - radius, y - radius, x + radius, y + radius)
                (draw.rectangle if square else draw.ellipse)(corners, fill=255 if lit else ghost)
    return ink, classes


def fit(ink: Ink, width: float, height: float) -> Ink:
    """Scales the ink to the largest size inside width x height."""
    scale = min(width / ink[0].width, height / ink[0].height)
    size = max(1, round(ink[0].width * scale)), max(1, round(ink[0].height * scale))
    return ink[0].resize(size, Image.BILINEAR, reducing_gap=2.0), ink[1].resize(size, Image.NEAREST)


def tilt(ink: Ink, degrees: float) -> Ink:
    """Turns the ink counter-clockwise."""
    return (
        ink[0].rotate(degrees, Image.BILINEAR, expand=True),
        ink[1].rotate(degrees, Image.NEAREST, expand=True),
    )
