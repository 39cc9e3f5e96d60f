"""What training sees and how fast it learns, by step.

Both tables were written while the shipped weights were trained: after each look at the validation,
the weak families got more pictures, and the rate was lowered once averaged weights were found to
be far better than the latest.
"""

import numpy as np

JSON_FROM = 13_700  # the first 13,700 steps knew nothing of JSON
STEPS = 27_100
EASY_STEPS = 900  # the pictures' difficulty rises from 0.15 to 1 until then

# Step and factor of the learning rate; linear between.
_RATES = (
    (0, 0.0), (150, 1.0), (2430, 0.95), (4050, 0.57), (4290, 0.57), (4300, 0.32), (4820, 0.21),
    (5090, 0.18), (5610, 0.18), (6430, 0.13), (6950, 0.08), (6960, 0.05), (7399, 0.0),
    (7400, 0.12), (7899, 0.0), (7900, 0.05), (7960, 0.30), (9899, 0.0), (9900, 0.05),
    (9960, 0.30), (10500, 0.15), (10550, 0.50), (11000, 0.50), (11999, 0.0), (12000, 0.05),
    (12060, 0.50), (12500, 0.50), (13299, 0.0), (13300, 0.02),
    (13320, 0.15), (13699, 0.0), (13700, 0.02), (13780, 0.50), (15150, 0.50), (17049, 0.0),
    (17050, 0.02), (17120, 0.45), (18900, 0.45), (20999, 0.0), (21000, 0.02), (21070, 0.45),
    (22700, 0.45), (24999, 0.0), (25000, 0.02), (25040, 0.2), (25400, 0.2),
    (26199, 0.0), (26200, 0.02), (26240, 0.28), (26600, 0.28), (STEPS, 0.0),
)  # fmt: skip

# From which step, how much of each kind of picture.
_KINDS = (
    (0, {"display": 1.0, "label": 1.0, "handwriting": 1.3, "word": 1.6, "shapes": 1.5}),
    (1030, {"display": 0.9, "label": 0.9, "handwriting": 1.3, "word": 2.4, "shapes": 2.2}),
    (1840, {"display": 1.3, "label": 0.8, "handwriting": 1.6, "word": 2.4, "shapes": 2.2}),
    (2430, {"display": 1.2, "label": 0.6, "handwriting": 1.6, "word": 2.6, "shapes": 3.0}),
    (2690, {"display": 1.2, "label": 0.6, "handwriting": 2.2, "word": 2.6, "shapes": 3.0}),
    (3540, {"display": 1.2, "label": 0.6, "handwriting": 2.2, "word": 2.6, "shapes": 4.0}),
    (4290, {"display": 1.2, "label": 0.5, "handwriting": 2.4, "word": 2.4, "shapes": 5.0}),
    (4820, {"display": 1.0, "label": 0.4, "handwriting": 2.8, "word": 2.2, "shapes": 5.2}),
    (5610, {"display": 1.0, "label": 0.4, "handwriting": 2.6, "word": 2.2, "shapes": 7.0}),
    (6430, {"display": 0.5, "label": 0.2, "handwriting": 1.2, "word": 1.3, "shapes": 7.0}),
    (7400, {"display": 0.4, "label": 0.1, "handwriting": 1.0, "word": 0.9, "shapes": 7.0}),
    (7900, {"display": 0.5, "label": 0.2, "handwriting": 1.2, "word": 1.0, "shapes": 7.0}),
    (11_400, {"display": 0.6, "label": 0.2, "handwriting": 1.5, "word": 1.6, "shapes": 6.0}),
    (12_000, {"display": 0.6, "label": 0.2, "handwriting": 2.0, "word": 1.5, "shapes": 6.5}),
    (13_300, {"display": 0.8, "label": 0.3, "handwriting": 4.0, "word": 1.2, "shapes": 5.0}),
    (13_700, {"display": 1.2, "label": 0.5, "handwriting": 3.0, "word": 2.0, "shapes": 6.5}),
    (15_650, {"display": 0.8, "label": 0.3, "handwriting": 2.2, "word": 1.6, "shapes": 8.5}),
    (17_050, {"display": 0.4, "label": 0.2, "handwriting": 1.3, "word": 0.9, "shapes": 9.0}),
    (18_200, {"display": 0.5, "label": 0.3, "handwriting": 1.4, "word": 2.2, "shapes": 9.0}),
    (21_000, {"display": 0.5, "label": 0.3, "handwriting": 1.2, "word": 1.8, "shapes": 10.0}),
    (25_000, {"display": 0.8, "label": 0.3, "handwriting": 1.8, "word": 4.5, "shapes": 8.0}),
    (26_200, {"display": 1.2, "label": 0.4, "handwriting": 3.0, "word": 2.6, "shapes": 9.0}),
)


def rate(step: int) -> float:
    """The learning rate's factor."""
    return float(np.interp(step + 1, *zip(*_RATES, strict=True)))


def difficulty(step: int) -> float:
    """How hard the pictures are, 0..1: reading begins with clean ones."""
    return min(1.0, 0.15 + 0.85 * step / EASY_STEPS)


def mixture(step: int) -> dict[str, float]:
    """How much of each kind of picture."""
    return [kinds for start, kinds in _KINDS if start <= step][-1]


def json_share(step: int) -> float:
    """Share of the conversations that have JSON among their answers."""
    return 0.0 if step < JSON_FROM else 0.55 if step < 17_050 else 0.75
