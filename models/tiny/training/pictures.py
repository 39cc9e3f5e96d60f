"""Draws the pictures the tiny model learns from: displays, labels, handwriting, words, shapes.

Each picture comes as a `Scene`: the RGB image, the facts the questions are made of, and a second
image of the same size that says for every pixel which character or which coloured shape covers it
(0 for none). The vision tower is also taught to say that of every patch, which makes reading start
within minutes instead of hours; the product never sees it.
"""

import math
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from canvas import (
    background,
    camera,
    caption,
    contrast_of,
    ink_colour,
    off_centre,
    paper_colour,
    put,
    random_colour,
    source_size,
    turn,
    vary,
)
from fonts import HAND_FONTS, PRINT_FONTS, font_paths
from glyphs import dot_ink, fit, font_ink, segment_ink, tilt, written_ink
from scenes import COLOURS, PATCHES, SHAPES, Colour, Scene, Shape, Style, shape_class
from words import WORDS


def random_number(rng: random.Random) -> str:
    """One to four digits as written; a leading zero is possible."""
    return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 4)))


def _angle(rng: random.Random, style: Style) -> float:
    return rng.choice((0.0, rng.uniform(-12, 12) * style.difficulty))


def _wide_chance(text: str) -> float:
    return 0.18 if len(text) > 5 else 0.1


def draw_display(
    rng: random.Random,
    style: Style,
    text: str | None = None,
    size: tuple[int, int] | None = None,
    captions: bool = True,
) -> Scene:
    """A device with a bezel and a lit LED, LCD or dot-matrix display; maybe with its unit."""
    text = text or random_number(rng)
    width, height = size or source_size(rng, _wide_chance(text))
    image = background(rng, (width, height), random_colour(rng))
    classes = Image.new("L", image.size)
    draw = ImageDraw.Draw(image)

    # The screen's proportions follow the number of places it has.
    places = text.rjust(rng.choice((len(text), len(text), 4)))
    ghost = rng.choice((0, rng.randint(10, 45)))
    glyphs = segment_ink if rng.random() < 0.82 else dot_ink
    ink = glyphs(rng, places, 96, ghost)
    room = width * rng.uniform(0.72, 0.94), height * rng.uniform(0.6, 0.86)
    ink = fit(ink, room[0] * 0.9, room[1] * 0.8)
    screen = ink[0].width * rng.uniform(1.06, 1.15), ink[0].height * rng.uniform(1.1, 1.3)
    bezel = min(width, height) * rng.uniform(0.02, 0.06)
    centre = (
        off_centre(rng, width, screen[0] + 2 * bezel),
        off_centre(rng, height, screen[1] + 2 * bezel),
    )

    def frame(pad: float) -> tuple[float, float, float, float]:
        return (
            centre[0] - screen[0] / 2 - pad,
            centre[1] - screen[1] / 2 - pad,
            centre[0] + screen[0] / 2 + pad,
            centre[1] + screen[1] / 2 + pad,
        )

    if rng.random() < 0.6:
        draw.rounded_rectangle(frame(2.2 * bezel), bezel * 1.5, fill=random_colour(rng))
    draw.rounded_rectangle(frame(bezel), bezel, fill=random_colour(rng, 10, 90))
    if rng.random() < 0.6:  # LED: bright on nearly black
        glass = random_colour(rng, 0, 34)
        lit = rng.choice(
            (
                (255, 45, 35),
                (70, 255, 90),
                (60, 140, 255),
                (255, 180, 40),
                (240, 245, 255),
                (70, 240, 245),
            )
        )
    else:  # LCD: dark on greenish, bluish or grey
        glass = rng.choice(((158, 176, 132), (176, 190, 178), (120, 160, 190), (198, 202, 196)))
        lit = random_colour(rng, 8, 48)
    draw.rectangle(frame(0), fill=vary(rng, glass, 14))
    ink = tilt(ink, _angle(rng, style) * 0.4)
    if sum(lit) > 300 and rng.random() < 0.35:  # light that spills over
        glow = ink[0].filter(ImageFilter.GaussianBlur(ink[0].height * 0.06))
        put(image, classes, (glow.point(lambda v: v // 2), ink[1]), lit, centre)
    put(image, classes, ink, vary(rng, lit, 25) if sum(lit) > 300 else lit, centre)
    if captions and rng.random() < 0.25:
        caption(
            rng,
            image,
            rng.choice(("kWh", "V", "A", "rpm", "kg", "m3", "C", "Hz", "bar")),
            random_colour(rng),
            frame(bezel),
            places_below=True,
        )
    angle = _angle(rng, style)
    if angle:
        image, classes = turn(image, classes, angle * 0.6)
    return Scene("display", camera(rng, image, style), classes, text)


def _draw_card(
    rng: random.Random, style: Style, text: str, size: tuple[int, int] | None
) -> tuple[Image.Image, Image.Image]:
    """Printed text on a coloured card that lies on a background."""
    width, height = size or source_size(rng, _wide_chance(text))
    image = background(rng, (width, height), random_colour(rng))
    classes = Image.new("L", image.size)
    card = paper_colour(rng) if rng.random() < 0.5 else random_colour(rng)
    full = rng.random() < 0.3  # the card fills the picture
    ink = font_ink(rng, text, rng.choice(font_paths(PRINT_FONTS)), 72, 0.0)
    # Long words need the width: eight letters at 96 pixels leave eleven pixels a letter.
    least = min(0.88, 0.5 + 0.05 * len(text))
    ink = tilt(ink, 0.0) if rng.random() < 0.3 else ink
    ink = fit(ink, width * rng.uniform(least, 0.93), height * rng.uniform(0.35, 0.7))
    pad = min(width, height) * rng.uniform(0.03, 0.1)
    inner = ink[0].width + 2 * pad, ink[0].height + 2 * pad
    angle = _angle(rng, style)
    lean = abs(math.sin(math.radians(angle)))
    centre = (
        off_centre(rng, width, inner[0] + lean * inner[1]),
        off_centre(rng, height, inner[1] + lean * inner[0]),
    )
    if not full:
        plate = Image.new("L", (round(inner[0]), round(inner[1])))
        ImageDraw.Draw(plate).rounded_rectangle(
            (0, 0, plate.width - 1, plate.height - 1), rng.choice((0.0, pad)), fill=255
        )
        plate = plate.rotate(angle, Image.BILINEAR, expand=True)
        image.paste(
            card, (round(centre[0] - plate.width / 2), round(centre[1] - plate.height / 2)), plate
        )
    else:
        image.paste(background(rng, image.size, card))
    put(image, classes, tilt(ink, angle), ink_colour(rng, card, contrast_of(rng, style)), centre)
    if rng.random() < 0.2:
        box = (
            centre[0] - inner[0] / 2,
            centre[1] - inner[1] / 2,
            centre[0] + inner[0] / 2,
            centre[1] + inner[1] / 2,
        )
        caption(
            rng,
            image,
            rng.choice(("LOT", "Room", "Price", "Type", "Art.", "Size", "Bin")),
            random_colour(rng),
            box,
            places_below=rng.random() < 0.5,
        )
    return image, classes


def draw_label(
    rng: random.Random, style: Style, text: str | None = None, size: tuple[int, int] | None = None
) -> Scene:
    """A printed number on a card."""
    text = text or random_number(rng)
    image, classes = _draw_card(rng, style, text, size)
    return Scene("label", camera(rng, image, style), classes, text)


def draw_word(
    rng: random.Random, style: Style, text: str | None = None, size: tuple[int, int] | None = None
) -> Scene:
    """A printed word of the list, in lower case, capitalised or in capitals."""
    if text is None:
        text = rng.choice((str.lower, str.capitalize, str.upper))(rng.choice(WORDS))
    image, classes = _draw_card(rng, style, text, size)
    return Scene("word", camera(rng, image, style), classes, text)


def draw_handwriting(
    rng: random.Random, style: Style, text: str | None = None, size: tuple[int, int] | None = None
) -> Scene:
    """A number written by hand: real digits, or a hand-like font, on plain or ruled paper."""
    text = text or random_number(rng)
    width, height = size or source_size(rng, _wide_chance(text))
    dark = rng.random() < 0.15  # chalk on a board
    paper = random_colour(rng, 10, 70) if dark else paper_colour(rng)
    image = background(rng, (width, height), paper)
    classes = Image.new("L", image.size)
    if rng.random() < 0.35:
        draw, line = ImageDraw.Draw(image), vary(rng, paper, 40)
        step = height * rng.uniform(0.12, 0.3)
        for y in np.arange(rng.uniform(0, step), height, step):
            draw.line((0, y, width, y), fill=line, width=max(1, height // 150))
        if rng.random() < 0.4:
            for x in np.arange(rng.uniform(0, step), width, step):
                draw.line((x, 0, x, height), fill=line, width=max(1, height // 150))
    if rng.random() < 0.7:
        ink = written_ink(rng, text, 72, style)
    else:
        ink = font_ink(rng, text, rng.choice(font_paths(HAND_FONTS)), 72, style.difficulty)
    ink = tilt(ink, _angle(rng, style))
    ink = fit(
        ink,
        width * rng.uniform(min(0.8, 0.42 + 0.1 * len(text)), 0.93),
        height * rng.uniform(0.4, 0.8),
    )
    centre = (off_centre(rng, width, ink[0].width), off_centre(rng, height, ink[0].height))
    put(image, classes, ink, ink_colour(rng, paper, contrast_of(rng, style)), centre)
    return Scene("handwriting", camera(rng, image, style), classes, text)


def _outline(shape: str) -> np.ndarray:
    """The shape's corners [n, 2] within -1..1, y down."""
    turn = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    if shape == "circle":
        return np.stack((np.cos(turn), np.sin(turn)), 1)
    if shape == "square":
        return np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * 0.85
    if shape == "triangle":
        return np.array([(0, -0.95), (1, 0.8), (-1, 0.8)])
    if shape == "star":
        corner = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2, 0.42, 1.0)
        return np.stack((np.cos(corner) * radius, np.sin(corner) * radius), 1)
    if shape == "heart":
        x = 16 * np.sin(turn) ** 3
        y = 13 * np.cos(turn) - 5 * np.cos(2 * turn) - 2 * np.cos(3 * turn) - np.cos(4 * turn)
        return np.stack((x / 17, -(y + 2.5) / 15), 1)
    if shape == "diamond":
        return np.array([(0, -1), (0.68, 0), (0, 1), (-0.68, 0)])
    if shape == "cross":
        a, b = 0.33, 0.95
        return np.array(
            [
                (-a, -b),
                (a, -b),
                (a, -a),
                (b, -a),
                (b, a),
                (a, a),
                (a, b),
                (-a, b),
                (-a, a),
                (-b, a),
                (-b, -a),
                (-a, -a),
            ]
        )
    # moon: most of a circle, and back along a smaller circle through the same two ends
    outer, inner = np.radians(np.linspace(50, 310, 30)), np.radians(np.linspace(262, 98, 20))
    return (
        np.concatenate(
            (
                np.stack((np.cos(outer), np.sin(outer)), 1),
                np.stack((0.75 + 0.773 * np.cos(inner), 0.773 * np.sin(inner)), 1),
            )
        )
        * 0.97
    )


def _distinct_from(colour: Colour, others: list[Colour]) -> bool:
    return all(
        sum(abs(a - b) for a, b in zip(colour, other, strict=True)) > 150 for other in others
    )


def draw_shapes(
    rng: random.Random, style: Style, count: int | None = None, size: tuple[int, int] | None = None
) -> Scene:
    """One to six coloured shapes that do not touch, on a background none of them vanishes in."""
    width, height = size or source_size(rng, 0.1)
    side = min(width, height)
    ground = paper_colour(rng) if rng.random() < 0.45 else random_colour(rng)
    image = background(rng, (width, height), ground)
    classes = Image.new("L", image.size)
    draw, draw_class = ImageDraw.Draw(image), ImageDraw.Draw(classes)
    count = count or rng.choice((1, 1, 2, 2, 3, 3, 4, 5, 6))
    grounds = [ground, image.getpixel((0, 0)), image.getpixel((width - 1, height - 1))]
    palette = [name for name, colour in COLOURS.items() if _distinct_from(colour, grounds)]
    if not style.heldout and rng.random() < 0.75:
        # Rivals of one colour: else colour alone tells most shapes apart, and no more is learned.
        palette = rng.sample(palette, rng.choice((1, 1, 2)))
    few_kinds = rng.sample(SHAPES, 2) if rng.random() < 0.4 else SHAPES
    largest = side * (0.42, 0.3, 0.26, 0.22, 0.2, 0.19)[count - 1]
    placed: list[tuple[float, float, float]] = []
    shapes: list[Shape] = []
    for _ in range(300):
        if len(shapes) == count:
            break
        radius = rng.uniform(max(0.13 * side, largest * 0.5), largest)
        x, y = rng.uniform(radius, width - radius), rng.uniform(radius, height - radius)
        if any(math.hypot(x - a, y - b) < (radius + r) * 1.05 for a, b, r in placed):
            continue
        name, colour = rng.choice(few_kinds), rng.choice(palette)
        angle = math.radians(_angle(rng, style))
        turn = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
        corners = _outline(name) @ turn * radius + (x, y)
        points = [tuple(p) for p in corners.tolist()]
        draw.polygon(points, fill=vary(rng, COLOURS[colour], 12))
        draw_class.polygon(points, fill=shape_class(name, colour))
        placed.append((x, y, radius))
        low = corners.min(axis=0).clip(0) / (width, height)
        high = (corners.max(axis=0) / (width, height)).clip(max=1)
        shapes.append(Shape(name, colour, (*low.tolist(), *high.tolist())))
        patch = np.array((width, height)) / PATCHES
        corner = np.floor((low + high) / 2 * PATCHES) * patch
        draw_class.rectangle((*corner, *(corner + patch - 1)), fill=shape_class(name, colour, True))
    # Left to right, so that descriptions have one order.
    shapes.sort(key=lambda s: s.box[0] + s.box[2])
    return Scene("shapes", camera(rng, image, style), classes, shapes=shapes)


DRAWERS = {
    "display": draw_display,
    "label": draw_label,
    "handwriting": draw_handwriting,
    "word": draw_word,
    "shapes": draw_shapes,
}
