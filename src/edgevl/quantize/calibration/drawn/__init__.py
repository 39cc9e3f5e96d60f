"""Pictures drawn from a seed: something to calibrate on where the user has no pictures."""

from __future__ import annotations

import random
from collections.abc import Callable

from edgevl.quantize.calibration.drawn.canvas import Drawing
from edgevl.quantize.calibration.drawn.charts import (
    bar_chart,
    city_map,
    floor_plan,
    line_chart,
    pie_chart,
)
from edgevl.quantize.calibration.drawn.papers import display, document, meter, sign, table
from edgevl.quantize.calibration.drawn.scenes import icons, landscape, shapes, street, texture

__all__ = ["DRAWERS", "Drawing", "draw"]

#: What can be drawn; neighbours differ in kind.
DRAWERS: tuple[Callable[[random.Random, tuple[int, int]], Drawing], ...] = (
    shapes, document, landscape, bar_chart, display, street, table, meter, texture, sign,
    line_chart, icons, pie_chart, city_map, floor_plan,
)  # fmt: skip

#: Width : height, and how often.
_ASPECTS = {(1, 1): 3, (4, 3): 3, (3, 4): 2, (16, 9): 2, (9, 16): 1, (2, 1): 1, (3, 1): 1}


def draw(kind: int, seed: int) -> Drawing:
    """Draw a picture of between 0.1 and 0.7 megapixels; the same arguments give the same picture.

    Args:
        kind: index of a drawer, taken modulo their number, so that counting up goes round.
        seed: of everything else.
    """
    rng = random.Random(seed)
    columns, rows = rng.choices(list(_ASPECTS), list(_ASPECTS.values()))[0]
    side = rng.uniform(320, 840)
    size = (
        round(side * (columns / rows) ** 0.5 * rng.uniform(0.95, 1.05)),
        round(side * (rows / columns) ** 0.5),
    )
    return DRAWERS[kind % len(DRAWERS)](rng, size)
