"""Draws the held-out questions: pictures that training never sees.

    python models/tiny/training/heldout.py models/tiny/heldout

Another seed than training's, handwritten digits that training leaves out, and, like a camera's,
JPEG files.
"""

import argparse
import json
import random
from pathlib import Path

from pictures import draw_shapes
from questions import FAMILIES, LANGUAGES, Turn, family_turn
from samples import family_question
from scenes import Scene, Style

SEED = "held out"
QUESTIONS = 80  # a family, half of them in each language
SHAPE_FAMILIES = [family for family in FAMILIES if family.startswith("shape")]
JPEG_QUALITY = 80


def _shape_question(rng: random.Random, language: str) -> tuple[Scene, list[Turn]]:
    """One picture of shapes with one question of each of the three families."""
    while True:
        scene = draw_shapes(rng, Style(heldout=True))
        turns = [family_turn(rng, scene, language, family) for family in SHAPE_FAMILIES]
        if all(turns):
            return scene, turns


def questions(rng: random.Random) -> list[tuple[Scene, list[Turn]]]:
    """All pictures, each with its questions."""
    drawn = []
    for number in range(QUESTIONS):
        language = LANGUAGES[number % len(LANGUAGES)]
        for family in FAMILIES:
            if family not in SHAPE_FAMILIES:
                scene, turn = family_question(rng, Style(heldout=True), family, language)
                drawn.append((scene, [turn]))
        drawn.append(_shape_question(rng, language))
    return drawn


def main() -> None:
    """Write `questions.jsonl` and `images/` into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for number, (scene, turns) in enumerate(questions(random.Random(SEED))):
        name = f"images/{number:03d}-{scene.kind}.jpg"
        scene.image.save(folder / name, quality=JPEG_QUALITY)
        lines += [
            {"image": name, "question": turn.question, "answer": turn.answer, "family": turn.family}
            for turn in turns
        ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / "questions.jsonl").write_text(text, encoding="utf-8")
    print(f"{len(lines)} questions in {folder}")


if __name__ == "__main__":
    main()
