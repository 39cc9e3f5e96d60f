"""What is asked about a picture and what the right answer is, in English and in Chinese."""

import functools
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from phrasings import (
    AGAIN,
    ANY_NUMBER,
    COLOUR_OF,
    COUNT,
    DESCRIBE,
    DISPLAY,
    EXISTS,
    HANDWRITING,
    LABEL,
    NAME,
    OF_SEVERAL,
    OTHER_LANGUAGE,
    PLACES,
    SHAPE_OF,
    SMALL_TALK,
    WHERE,
    WORD,
    Pool,
)
from scenes import COLOURS, SHAPES, Box, Scene, Shape

LANGUAGES = ("en", "zh")
FAMILIES = ("display", "label", "handwriting", "words", "shape_name", "shape_count", "shape_locate")


BOX_WEIGHT = 2.0  # of the numbers of a box, against the words around it


@dataclass
class Span:
    """Characters of an answer that weigh more or less than others, or that tell a box."""

    start: int
    end: int
    weight: float
    box: Box | None = None


@dataclass
class Turn:
    """One question and its answer; `value` is the answer's if it is JSON.

    An answer of several `parts`, one for each shape it lists, weighs as much as these alone would.
    """

    question: str
    answer: str
    family: str
    spans: tuple[Span, ...] = ()
    value: Any = None
    parts: int = 1


ZH_COLOURS = dict(zip(COLOURS, "红色 绿色 蓝色 黄色 橙色 紫色 黑色 白色".split(), strict=True))
ZH_SHAPES = dict(
    zip(SHAPES, "圆形 正方形 三角形 五角星 心形 菱形 十字形 月牙形".split(), strict=True)
)

READING = {
    "display": (DISPLAY, "display"),
    "label": (LABEL, "label"),
    "handwriting": (HANDWRITING, "handwriting"),
}


def phrase(rng: random.Random, pool: Pool, language: str, **parts: str) -> str:
    """A question of the pool, now and then typed carelessly."""
    question = rng.choice(pool[language]).format(**parts)
    if rng.random() < 0.08:
        question = question.rstrip("?.？。")
    if rng.random() < 0.04:
        question = question.lower()
    return question


def noun_of(shape: str, colour: str, language: str) -> str:
    """`red circle`, `红色的圆形`."""
    if language == "en":
        return f"{colour} {shape}"
    return f"{ZH_COLOURS[colour]}的{ZH_SHAPES[shape]}"


def _named(shape: Shape, language: str) -> str:
    """`a red circle`, `红色的圆形`."""
    noun = noun_of(shape.name, shape.colour, language)
    if language == "zh":
        return noun
    return f"{'an' if noun[0] == 'o' else 'a'} {noun}"


def plural(shape: str) -> str:
    """The shapes of a kind in English."""
    return shape + ("es" if shape == "cross" else "s")


def box_of(shape: Shape) -> list[int]:
    """The box in thousandths of the picture, in steps of ten: finer would be noise at 96 pixels."""
    return [round(edge * 100) * 10 for edge in shape.box]


def describe(scene: Scene, language: str) -> str:
    """The one sentence that describes the picture."""
    text, english = scene.text, language == "en"
    if scene.kind == "display":
        return f"A display that shows {text}." if english else f"显示屏显示{text}。"
    if scene.kind == "label":
        return f"A label with the number {text}." if english else f"标签上的数字是{text}。"
    if scene.kind == "handwriting":
        return f"The handwritten number {text}." if english else f"手写的数字{text}。"
    if scene.kind == "word":
        return f"A label with the word {text}." if english else f"标签上的单词是{text}。"
    names = [_named(shape, language) for shape in scene.shapes]
    if english:
        head = f"{len(names)} shapes: " if len(names) > 1 else ""
        sentence = head + ", ".join(names) + "."
        return sentence[0].upper() + sentence[1:]
    return (f"{len(names)}个形状：" if len(names) > 1 else "") + "，".join(names) + "。"


def _reading_turn(rng: random.Random, scene: Scene, language: str) -> Turn:
    if scene.kind == "word":
        return Turn(phrase(rng, WORD, language), scene.text, "words")
    own, family = READING[scene.kind]
    pool = own if rng.random() < 0.5 else ANY_NUMBER
    return Turn(phrase(rng, pool, language), scene.text, family)


def _answer_language(rng: random.Random, question: str, language: str) -> tuple[str, str]:
    """Sometimes the question says in which language to answer."""
    if rng.random() > 0.1:
        return question, language
    wanted = rng.choice(LANGUAGES)
    return question + rng.choice(OTHER_LANGUAGE[wanted]), wanted


def _name_turn(rng: random.Random, scene: Scene, language: str) -> Turn | None:
    kinds, colours = (
        Counter(s.name for s in scene.shapes),
        Counter(s.colour for s in scene.shapes),
    )
    if len(scene.shapes) == 1 and rng.random() < 0.6:
        question, language = _answer_language(rng, phrase(rng, NAME, language), language)
        return Turn(question, _named(scene.shapes[0], language), "shape_name")
    shape = rng.choice(scene.shapes)
    if kinds[shape.name] == 1 and rng.random() < 0.75:
        name = shape.name if language == "en" else ZH_SHAPES[shape.name]
        question = phrase(rng, COLOUR_OF, language, shape=name)
        question, language = _answer_language(rng, question, language)
        answer = shape.colour if language == "en" else ZH_COLOURS[shape.colour]
        return Turn(question, answer, "shape_name")
    if colours[shape.colour] == 1:
        colour = shape.colour if language == "en" else ZH_COLOURS[shape.colour]
        question = phrase(rng, SHAPE_OF, language, colour=colour)
        question, language = _answer_language(rng, question, language)
        return Turn(question, _named(shape, language), "shape_name")
    return None


def _count_turn(rng: random.Random, scene: Scene, language: str, of_all: float = 0.4) -> Turn:
    """How many shapes, with the probability `of_all`, or how many of one kind or colour."""
    english = language == "en"
    choice = rng.random()
    if rng.random() < of_all:
        what = "shapes" if english else "形状"
        number = len(scene.shapes)
    elif choice < 0.58:
        name = rng.choice([s.name for s in scene.shapes] if rng.random() < 0.85 else SHAPES)
        what = plural(name) if english else ZH_SHAPES[name]
        number = sum(s.name == name for s in scene.shapes)
    else:
        colour = rng.choice(
            [s.colour for s in scene.shapes] if rng.random() < 0.85 else list(COLOURS)
        )
        what = f"{colour} shapes" if english else f"{ZH_COLOURS[colour]}的形状"
        number = sum(s.colour == colour for s in scene.shapes)
    return Turn(phrase(rng, COUNT, language, what=what), str(number), "shape_count")


def _locate_turn(rng: random.Random, scene: Scene, language: str) -> Turn | None:
    shape = rng.choice(scene.shapes)
    if sum((s.name, s.colour) == (shape.name, shape.colour) for s in scene.shapes) > 1:
        return None
    what = noun_of(shape.name, shape.colour, language)
    question = phrase(rng, WHERE, language, what=what)
    head = f"<ref>{what}</ref>"
    box = f"<box>[{box_of(shape)}]"
    span = Span(len(head), len(head) + len(box), BOX_WEIGHT, shape.box)
    return Turn(question, f"{head}{box}</box>", "shape_locate", (span,))


def _exists_turn(rng: random.Random, scene: Scene, language: str) -> Turn:
    shape, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    if rng.random() < 0.5:
        there = rng.choice(scene.shapes)
        shape, colour = there.name, there.colour
    found = any((s.name, s.colour) == (shape, colour) for s in scene.shapes)
    question = phrase(rng, EXISTS, language, what=noun_of(shape, colour, language))
    question = question.replace(" a orange", " an orange")
    return Turn(question, (("No", "Yes") if language == "en" else ("没有", "有"))[found], "exists")


def describe_turn(rng: random.Random, scene: Scene, language: str) -> Turn:
    """A request for a description; each shape's name tells its box."""
    answer = describe(scene, language)
    spans, end = [], 0
    for shape in scene.shapes:
        named = _named(shape, language)
        start = answer.lower().index(named, end)
        end = start + len(named)
        spans.append(Span(start, end, 1.0, shape.box))
    question = phrase(rng, DESCRIBE, language)
    return Turn(question, answer, "describe", tuple(spans), parts=max(1, len(spans)))


_SHAPE_TURNS = {"shape_name": _name_turn, "shape_count": _count_turn, "shape_locate": _locate_turn}


def family_turn(rng: random.Random, scene: Scene, language: str, family: str) -> Turn | None:
    """A question of one family; None if this picture admits none."""
    if scene.kind == "shapes":
        return _SHAPE_TURNS[family](rng, scene, language)
    return _reading_turn(rng, scene, language)


def picture_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    """The questions of one conversation about one picture, each in a language of its own."""
    if scene.kind != "shapes":
        turns = [_reading_turn(rng, scene, rng.choice(LANGUAGES))]
        if rng.random() < 0.15:
            turns.insert(rng.randrange(2), describe_turn(rng, scene, rng.choice(LANGUAGES)))
        return turns
    # Counting all shapes is learned early, counting those of a kind late.
    count_turn = functools.partial(_count_turn, of_all=0.12)
    makers = rng.choices(
        (_name_turn, count_turn, _locate_turn, _exists_turn, describe_turn),
        weights=(16, 26, 46, 2, 10),
        k=rng.choice((4, 5, 6, 7)),
    )
    if _name_turn not in makers and rng.random() < 0.3:
        makers.insert(0, _name_turn)
    turns = [maker(rng, scene, rng.choice(LANGUAGES)) for maker in makers]
    return [turn for turn in turns if turn] or [_count_turn(rng, scene, rng.choice(LANGUAGES))]


def again_turn(rng: random.Random, scene: Scene, language: str) -> Turn:
    """A follow-up about a new picture that means the question asked before."""
    return Turn(phrase(rng, AGAIN, language), scene.text, "several")


def several_turn(rng: random.Random, scenes: list[Scene], language: str) -> Turn:
    """A question about one of two pictures by its place."""
    place = rng.randrange(2)
    return Turn(
        phrase(rng, OF_SEVERAL, language, place=PLACES[language][place]),
        scenes[place].text,
        "several",
    )


def small_talk(rng: random.Random) -> Turn:
    """A turn without any picture."""
    questions, answer = rng.choice(SMALL_TALK)
    return Turn(rng.choice(questions), answer, "talk")
