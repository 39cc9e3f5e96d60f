"""What is read: signs, documents, tables, displays, meters."""

import math
import random

from PIL import Image

from canvas import ink_colour, paper_colour, random_colour
from lettering import blank, number, phrase, write
from scenes import COLOURS
from words import WORDS

#: Of text with its ground.
CONTRAST = 130


def sign(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A board with a few words or numbers in different sizes."""
    value = rng.choice([*COLOURS.values()])
    image, draw = blank(size, random_colour(rng, 60, 235))
    width, height = size
    margin = min(size) * 0.06
    draw.rounded_rectangle((margin, margin, width - margin, height - margin), margin, value)
    text_colour = (20, 20, 20) if sum(value) > 380 else (250, 250, 250)
    lines = rng.randint(1, 4)
    for line in range(lines):
        text = rng.choice((phrase(rng, 1), phrase(rng, 2), number(rng)))
        # A letter is a bit more than half as wide as it is high.
        room = (width - 4 * margin) / (0.62 * len(text))
        pixels = min(room, (height - 4 * margin) / lines * rng.uniform(0.5, 0.85))
        y = 2 * margin + (line + 0.5) * (height - 4 * margin) / lines
        write(draw, (width / 2, y), text, pixels, text_colour, "mm")
    if rng.random() < 0.4:
        image = image.rotate(
            rng.uniform(-8, 8), Image.Resampling.BILINEAR, fillcolor=image.getpixel((0, 0))
        )
    return image


def document(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A page: letterhead, heading, paragraphs, a list."""
    ground = paper_colour(rng)
    image, draw = blank(size, ground)
    width, height = size
    colour = ink_colour(rng, ground, CONTRAST)
    margin, pixels = width * rng.uniform(0.06, 0.1), rng.uniform(12, 20)
    y = margin
    write(draw, (margin, y), phrase(rng, 2).upper(), pixels * 0.8, random_colour(rng, 60, 150))
    date = f"20{rng.randint(10, 29)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    write(draw, (width - margin, y), date, pixels * 0.8, colour, "ra")
    y += 2.5 * pixels
    heading = phrase(rng, 3)
    room = (width - 2 * margin) / (0.6 * len(heading))
    write(draw, (margin, y), heading, min(pixels * rng.uniform(1.3, 1.9), room), colour)
    y += 3 * pixels
    while y < height - margin - 3 * pixels:
        items = rng.random() < 0.3
        for line in range(rng.randint(2, 5)):
            start = f"{line + 1}. " if items else ""
            x = margin + (pixels if items else 0)
            text = start + phrase(rng, 1).lower()
            while draw.textlength(text) * pixels / 10 < width - 2 * margin - 7 * pixels:
                text += " " + (number(rng) if rng.random() < 0.1 else rng.choice(WORDS))
            write(draw, (x, y), text, pixels, colour)
            y += 1.4 * pixels
            if y > height - margin - 1.5 * pixels:
                break
        y += 0.8 * pixels
    return image


def table(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A table with a header, names and numbers."""
    ground = paper_colour(rng)
    image, draw = blank(size, ground)
    width, height = size
    colour, head = ink_colour(rng, ground, CONTRAST), random_colour(rng, 150, 225)
    columns, rows = rng.randint(2, 5), rng.randint(3, 9)
    margin = min(size) * 0.05
    cell = (width - 2 * margin) / columns, min((height - 2 * margin) / (rows + 1), 60)
    pixels = min(cell[1] * 0.55, cell[0] / 6)
    draw.rectangle((margin, margin, width - margin, margin + cell[1]), head)
    striped = rng.random() < 0.4
    for row in range(rows + 1):
        top = margin + row * cell[1]
        if striped and row and row % 2 == 0:
            draw.rectangle((margin, top, width - margin, top + cell[1]), (235, 238, 242))
        for column in range(columns):
            text = phrase(rng, 1) if row == 0 or column == 0 else number(rng)
            x = margin + (column + 0.5) * cell[0]
            write(draw, (x, top + cell[1] / 2), text, pixels, colour, "mm")
    if not striped:
        for row in range(rows + 2):
            y = margin + row * cell[1]
            draw.line((margin, y, width - margin, y), colour)
        for column in range(columns + 1):
            x = margin + column * cell[0]
            draw.line((x, margin, x, margin + (rows + 1) * cell[1]), colour)
    return image


def meter(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A round gauge with a needle, or a clock."""
    image, draw = blank(size, random_colour(rng, 90, 230))
    x, y, radius = size[0] / 2, size[1] / 2, min(size) * rng.uniform(0.36, 0.46)
    face = paper_colour(rng)
    colour = ink_colour(rng, face, CONTRAST)
    box = (x - radius, y - radius, x + radius, y + radius)
    draw.ellipse(box, face, colour, max(3, round(radius / 25)))
    clock = rng.random() < 0.35
    marks = 12 if clock else rng.choice((5, 8, 10))
    begin, sweep = (-math.pi / 3, 2 * math.pi) if clock else (0.75 * math.pi, 1.5 * math.pi)
    step = rng.choice((1, 2, 5, 10, 20))
    for mark in range(marks if clock else marks + 1):
        angle = begin + sweep * mark / marks
        unit = math.cos(angle), math.sin(angle)
        inner, outer = 0.85 * radius, 0.95 * radius
        ends = [(x + reach * unit[0], y + reach * unit[1]) for reach in (inner, outer)]
        draw.line(ends, colour, max(2, round(radius / 40)))
        text = str(mark + 1 if clock else mark * step)
        at = (x + 0.7 * radius * unit[0], y + 0.7 * radius * unit[1])
        write(draw, at, text, radius * 0.14, colour, "mm")
    hands = ((0.45, 0.06), (0.65, 0.035)) if clock else ((0.7, 0.03),)
    for reach, thickness in hands:
        angle = begin + sweep * rng.random()
        tip = (x + reach * radius * math.cos(angle), y + reach * radius * math.sin(angle))
        draw.line([(x, y), tip], (170, 30, 30), max(3, round(radius * thickness)))
    return image
