"""Charts, maps and plans."""

import random

from PIL import Image, ImageDraw

from canvas import ink_colour, paper_colour, random_colour
from lettering import blank, phrase, write
from scenes import COLOURS, Colour

#: Of bars, lines and sectors: all but black and white.
PALETTE = [*COLOURS.values()][:-2]
#: Of text with its ground.
CONTRAST = 130


def _axes(
    rng: random.Random, draw: ImageDraw.ImageDraw, size: tuple[int, int], ground: Colour
) -> tuple[float, float, float, float]:
    """A title and axes with numbers: -> left, top, right, bottom of the area."""
    width, height = size
    colour, pixels = ink_colour(rng, ground, CONTRAST), min(size) * 0.035
    left, top, right, bottom = width * 0.12, height * 0.14, width * 0.95, height * 0.86
    write(draw, (width / 2, height * 0.05), phrase(rng, 2), pixels * 1.6, colour, "ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], colour, 2)
    step = rng.choice((1, 5, 10, 20, 50, 100, 250))
    for tick in range(6):
        y = bottom - (bottom - top) * tick / 5
        write(draw, (left - pixels / 2, y), str(tick * step), pixels, colour, "rm")
        draw.line((left, y, right, y), (205, 205, 205))
    return left, top, right, bottom


def bar_chart(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Bars of different heights with names below."""
    ground = paper_colour(rng)
    image, draw = blank(size, ground)
    left, top, right, bottom = _axes(rng, draw, size, ground)
    names = [phrase(rng, 1) for _ in range(rng.randint(3, 7))]
    single = rng.choice(PALETTE) if rng.random() < 0.5 else None
    step = (right - left) / len(names)
    for place, name in enumerate(names):
        x, share = left + (place + 0.2) * step, rng.uniform(0.05, 1)
        colour = single or PALETTE[place % len(PALETTE)]
        draw.rectangle((x, bottom - share * (bottom - top), x + 0.6 * step, bottom), colour)
        at = (x + 0.3 * step, bottom + size[1] * 0.02)
        write(draw, at, name, min(step / 5, min(size) * 0.035), (30, 30, 30), "ma")
    return image


def line_chart(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """One to three lines over months, with a legend."""
    ground = paper_colour(rng)
    image, draw = blank(size, ground)
    left, top, right, bottom = _axes(rng, draw, size, ground)
    months = "Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split()
    months = months[: rng.randint(4, 12)]
    step = (right - left) / (len(months) - 1)
    pixels = min(size) * 0.03
    for place, month in enumerate(months):
        at = (left + place * step, bottom + size[1] * 0.02)
        write(draw, at, month, min(pixels, step / 2.5), (30, 30, 30), "ma")
    lines = rng.sample(PALETTE, rng.randint(1, 3))
    for index, colour in enumerate(lines):
        share = rng.uniform(0.2, 0.8)
        points = []
        for place in range(len(months)):
            points.append((left + place * step, bottom - share * (bottom - top)))
            share = min(1.0, max(0.0, share + rng.uniform(-0.25, 0.25)))
        draw.line(points, colour, max(2, round(min(size) / 150)), "curve")
        y = top + (index + 0.5) * 1.5 * pixels
        draw.line((right - 9 * pixels, y, right - 7.5 * pixels, y), colour, 3)
        write(draw, (right - 7 * pixels, y), phrase(rng, 1), pixels, (30, 30, 30), "lm")
    return image


def pie_chart(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """A pie with a legend of names and per cent."""
    image, draw = blank(size, paper_colour(rng))
    parts = rng.sample(PALETTE, rng.randint(2, 6))
    weights = [rng.uniform(0.3, 2) for _ in parts]
    radius = min(size[0] * 0.28, size[1] * 0.42)
    x, y, angle = size[0] * 0.33, size[1] / 2, rng.uniform(0, 360)
    pixels = min(size) * 0.045
    for place, (colour, weight) in enumerate(zip(parts, weights, strict=True)):
        share = weight / sum(weights)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.pieslice(box, angle, angle + 360 * share, colour, (255, 255, 255))
        angle += 360 * share
        left, top = size[0] * 0.66, size[1] * 0.2 + place * 1.8 * pixels
        draw.rectangle((left, top, left + pixels, top + pixels), colour)
        text = f"{phrase(rng, 1)} {100 * share:.0f}%"
        write(draw, (left + 1.5 * pixels, top), text, min(pixels, size[0] / 26), (30, 30, 30))
    return image


def city_map(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Streets, parks, a river and names."""
    image, draw = blank(size, (238, 234, 224))
    width, height = size
    for _ in range(rng.randint(1, 4)):
        x, y = rng.uniform(0, 0.8) * width, rng.uniform(0, 0.8) * height
        box = (x, y, x + rng.uniform(0.1, 0.3) * width, y + rng.uniform(0.1, 0.3) * height)
        draw.rectangle(box, (196, 224, 180))
    river = [(width * step / 8, height * rng.uniform(0.35, 0.65)) for step in range(9)]
    draw.line(river, (150, 195, 230), round(min(size) * rng.uniform(0.03, 0.08)), "curve")
    streets = rng.randint(4, 9)
    for _ in range(streets):
        ends: list[tuple[float, float]]
        if rng.random() < 0.5:
            ends = [(0, rng.uniform(0, height)), (width, rng.uniform(0, height))]
        else:
            ends = [(rng.uniform(0, width), 0), (rng.uniform(0, width), height)]
        colour = (252, 214, 110) if rng.random() < 0.25 else (255, 255, 255)
        draw.line(ends, colour, round(min(size) * rng.uniform(0.012, 0.03)))
    for _ in range(rng.randint(3, 8)):
        x, y = rng.uniform(0.05, 0.75) * width, rng.uniform(0.05, 0.92) * height
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), (200, 50, 50))
        write(draw, (x + 9, y), phrase(rng, 1), min(size) * 0.032, (50, 50, 60), "lm")
    return image


def floor_plan(rng: random.Random, size: tuple[int, int]) -> Image.Image:
    """Rooms with walls, doors and names."""
    image, draw = blank(size, paper_colour(rng))
    margin = min(size) * 0.06
    rooms = [(margin, margin, size[0] - margin, size[1] - margin)]
    for _ in range(rng.randint(2, 6)):
        rooms.sort(key=lambda room: (room[2] - room[0]) * (room[3] - room[1]))
        left, top, right, bottom = rooms.pop()
        share = rng.uniform(0.35, 0.65)
        if right - left > bottom - top:
            middle = left + share * (right - left)
            rooms += [(left, top, middle, bottom), (middle, top, right, bottom)]
        else:
            middle = top + share * (bottom - top)
            rooms += [(left, top, right, middle), (left, middle, right, bottom)]
    names = ["Kitchen", "Bath", "Bedroom", "Living", "Office", "Hall", "Store"]
    wall, pixels = max(3, round(min(size) * 0.012)), min(size) * 0.036
    for name, (left, top, right, bottom) in zip(rng.sample(names, len(rooms)), rooms, strict=True):
        draw.rectangle((left, top, right, bottom), random_colour(rng, 222, 252), (40, 40, 40), wall)
        x, y = (left + right) / 2, (top + bottom) / 2
        write(draw, (x, y), name, min(pixels, (right - left) / 6), (40, 40, 40), "mm")
        area = f"{(right - left) * (bottom - top) / 4000:.1f} m2"
        write(
            draw, (x, y + 1.3 * pixels), area, min(pixels, (right - left) / 7), (90, 90, 90), "mm"
        )
    left, top, right, bottom = rooms[0]
    draw.rectangle((left + wall, bottom - wall, left + 5 * wall, bottom + 1), (250, 250, 250))
    return image
