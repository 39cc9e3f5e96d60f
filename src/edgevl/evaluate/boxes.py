"""Boxes in answers: ``<ref>label</ref><box>[[x1, y1, x2, y2]]</box>``, 0-1000 of the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

#: Boxes reach from 0 to this on both axes, whatever the picture's size.
SCALE = 1000

_NUMBER = r"\s*(\d{1,7}(?:\.\d{1,7})?)\s*"
_BOX = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")
_GROUP = re.compile(r"(?:<ref>(?P<label>[^<]*)</ref>\s*)?<box>(?P<boxes>[^<]*)</box>")

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#000075")
_CHINESE_FONTS = (
    "NotoSansCJK-Regular.ttc", "NotoSansSC-Regular.otf", "SourceHanSansSC-Regular.otf",
    "wqy-microhei.ttc", "wqy-zenhei.ttc", "DroidSansFallbackFull.ttf", "DroidSansFallback.ttf",
    "PingFang.ttc",
)  # fmt: skip


@dataclass(frozen=True)
class Box:
    """A rectangle in thousandths of the picture, with x1 <= x2 and y1 <= y2."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    @property
    def area(self) -> float:
        """Width times height."""
        return (self.x2 - self.x1) * (self.y2 - self.y1)


def parse_boxes(text: str) -> list[Box]:
    """Return the boxes of an answer in their order; malformed or unfinished ones are left out.

    Corners are put in order and kept within 0 to 1000. A label holds for all boxes of its group.
    """
    boxes = []
    for found in _GROUP.finditer(text):
        for numbers in _BOX.findall(found["boxes"]):
            xa, ya, xb, yb = (min(float(number), SCALE) for number in numbers)
            label = (found["label"] or "").strip()
            boxes.append(Box(min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb), label))
    return boxes


def iou(a: Box, b: Box) -> float:
    """Return intersection over union of two boxes, 0 to 1."""
    width = min(a.x2, b.x2) - max(a.x1, b.x1)
    height = min(a.y2, b.y2) - max(a.y1, b.y1)
    if width <= 0 or height <= 0:
        return 0.0
    intersection = width * height
    return intersection / (a.area + b.area - intersection)


def mean_iou(answered: Sequence[Box], expected: Sequence[Box]) -> float:
    """Return the mean IoU of the boxes, paired greedily, the best overlap first.

    0 if the counts differ or there are no boxes.
    """
    if not expected or len(answered) != len(expected):
        return 0.0
    pairs = [(iou(a, b), i, j) for i, a in enumerate(answered) for j, b in enumerate(expected)]
    total, used_answered, used_expected = 0.0, set(), set()
    for overlap, i, j in sorted(pairs, reverse=True):
        if i not in used_answered and j not in used_expected:
            total += overlap
            used_answered.add(i)
            used_expected.add(j)
    return total / len(expected)


def draw_boxes(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """Return a copy of an RGB picture with the boxes and their labels drawn on it."""
    from PIL import ImageDraw

    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    line = max(2, round(max(image.size) / 300))
    font = _font(max(12, round(max(image.size) / 40)))
    # One pixel off the far edge, or a box that reaches 1000 would lose its line.
    scale_x, scale_y = (image.width - 1) / SCALE, (image.height - 1) / SCALE
    labels = list(dict.fromkeys(box.label for box in boxes))
    for box in boxes:
        colour = _COLOURS[labels.index(box.label) % len(_COLOURS)]
        x1, y1 = box.x1 * scale_x, box.y1 * scale_y
        draw.rectangle((x1, y1, box.x2 * scale_x, box.y2 * scale_y), outline=colour, width=line)
        if box.label:
            left, top, right, bottom = draw.textbbox((0, 0), box.label, font=font)
            width, height = right - left + 2 * line, bottom - top + 2 * line
            # Above the box where there is room, else inside it; never out of the picture.
            x = max(0.0, min(x1, image.width - width))
            y = y1 - height if y1 >= height else y1
            draw.rectangle((x, y, x + width, y + height), fill=colour)
            draw.text((x + line - left, y + line - top), box.label, font=font, fill="white")
    return drawn


def _font(size: int) -> Any:
    """Return a font with Chinese glyphs if the system has one, else Pillow's own."""
    from PIL import ImageFont

    for name in _CHINESE_FONTS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)
