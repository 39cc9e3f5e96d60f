"""Draws the held-out questions: pictures that training never sees.

    python models/tiny/training/heldout.py models/tiny/heldout

Another seed than training's, handwritten digits that training leaves out, and, like a camera's,
JPEG files. `questions.jsonl` has the questions of the seven families, `json.jsonl` others on the
same pictures, whose answers are JSON: of a schema, or because the question asks for it. Their keys
are for what is asked and mean it; those of `json_odd.jsonl` need not.

With `--seed` the questions are others, to choose weights by.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from json_answers import FLAT_BOXES, Corners, json_turn, schema_of
from pictures import draw_shapes
from questions import FAMILIES, LANGUAGES, Turn, family_turn
from samples import family_question
from scenes import Scene, Style

SEED = "held out"
QUESTIONS = 80  # a family, half of them in each language
SHAPE_FAMILIES = [family for family in FAMILIES if family.startswith("shape")]
JPEG_QUALITY = 80

JSON_QUESTIONS = 40  # a family, half of them in each language
#: Family of questions: kinds of pictures, topics of pictures of shapes.
JSON_FAMILIES = {
    "json_number": (("display", "label", "handwriting"), (None,)),
    "json_word": (("word",), (None,)),
    "json_shape": (("shapes",), ("one", "colour", "shape")),
    "json_count": (("shapes",), ("count", "exists")),
    "json_place": (("shapes",), ("place",)),
    "json_list": (("shapes",), ("all",)),
    "json_new_keys": (
        ("display", "label", "handwriting", "word", "shapes"),
        ("one", "colour", "shape", "count"),
    ),
    "json_asked": (
        ("display", "label", "handwriting", "word", "shapes", "shapes"),
        ("one", "colour", "shape", "count", "exists", "place", "all"),
    ),
}


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


def _answer(value: Any) -> Any:
    """The value with boxes as `edgevl eval` has them."""
    if isinstance(value, Corners):
        return f"<box>[{value}]</box>"
    if isinstance(value, dict):
        return {key: _answer(item) for key, item in value.items()}
    if not isinstance(value, list):
        return value
    if all(isinstance(item, Corners) for item in value):  # one box in a list of its own
        return f"<box>{value}</box>"
    return [_answer(item) for item in value]


def _named_in(value: Any) -> Iterator[str]:
    """The names of all keys."""
    for key, item in value.items() if isinstance(value, dict) else ((None, i) for i in value):
        if key is not None:
            yield key
        if isinstance(item, (dict, list)):
            yield from _named_in(item)


def json_questions(
    rng: random.Random, scenes: list[tuple[str, Scene]], keys: str
) -> list[dict[str, Any]]:
    """Lines about pictures that are there, each with its name; `keys` is as for `json_turn`."""
    lines = []
    for family, (kinds, topics) in JSON_FAMILIES.items():
        while sum(line["family"] == family for line in lines) < JSON_QUESTIONS:
            language = LANGUAGES[len(lines) % len(LANGUAGES)]
            kind = rng.choice(kinds)
            name, scene = rng.choice([each for each in scenes if each[1].kind == kind])
            asked = family == "json_asked"
            form = "asked" if asked else "schema"
            of = "new" if family == "json_new_keys" else keys
            turn = json_turn(rng, scene, language, form, rng.choice(topics), of)
            # Four numbers apart are compared as numbers, which boxes are not.
            if turn is None or not isinstance(turn.value, dict):
                continue
            if FLAT_BOXES & set(_named_in(turn.value)):
                continue
            line = {"image": name, "question": turn.question, "answer": _answer(turn.value)}
            if not asked:
                schema = schema_of(turn.value, rng)
                if rng.random() < 0.5:
                    schema["additionalProperties"] = False
                line["json_schema"] = schema
            lines.append(line | {"family": family})
    return lines


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"{len(lines)} questions in {path}")


def main() -> None:
    """Write `questions.jsonl`, `json.jsonl` and `images/` into the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", default=SEED)
    arguments = parser.parse_args()
    folder = arguments.folder
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines, scenes = [], []
    for number, (scene, turns) in enumerate(questions(random.Random(arguments.seed))):
        name = f"images/{number:03d}-{scene.kind}.jpg"
        scene.image.save(folder / name, quality=JPEG_QUALITY)
        scenes.append((name, scene))
        lines += [
            {"image": name, "question": turn.question, "answer": turn.answer, "family": turn.family}
            for turn in turns
        ]
    _write(folder / "questions.jsonl", lines)
    for name, keys in (("json", "usual"), ("json_odd", "odd")):
        json_rng = random.Random(f"{arguments.seed} json")
        _write(folder / f"{name}.jsonl", json_questions(json_rng, scenes, keys))


if __name__ == "__main__":
    main()
