"""Draws the example pictures of the repository, with the same code that draws the training's.

python models/tiny/training/examples.py examples
"""

import argparse
import random
from pathlib import Path

from pictures import draw_display, draw_handwriting, draw_label, draw_shapes, draw_word
from scenes import Style

SIZE = (480, 360)


def main() -> None:
    """Write the pictures into the folder; the seeds are ones that look well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    clean, tilted = Style(difficulty=0.0), Style(difficulty=0.5)
    scenes = {
        "meter": draw_display(random.Random(8), clean, "7305", SIZE),
        "shapes": draw_shapes(random.Random(7), clean, 4, SIZE),
        "label": draw_label(random.Random(102), tilted, "2048", SIZE),
        "word": draw_word(random.Random(101), tilted, "Coffee", SIZE),
        "handwriting": draw_handwriting(random.Random(103), clean, "916", SIZE),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in scenes.items():
        scene.image.save(folder / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
