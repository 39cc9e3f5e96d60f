"""Questions whose answer is JSON: because they ask for it, or because a schema forces it.

A schema is not shown to the model: it only keeps what cannot come next from being written. So there
are three forms of a turn, which differ in what the model has to write by itself:

- asked: the question asks for JSON, and perhaps names the keys. All of it is learned.
- any: an object is forced, of any keys. All is learned but the brace that opens it.
- schema: keys are forced, too, which the question need not name. The values are learned, from what
  the keys mean, and where an object ends.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from phrasings import (
    ANY_NUMBER,
    AS_JSON,
    AS_JSON_LIKE,
    AS_JSON_WITH,
    COLOUR_OF,
    COUNT,
    DETECT,
    EXISTS,
    LIST,
    NAME,
    READ_IT,
    SHAPE_OF,
    WHERE,
    WORD,
)
from questions import (
    LANGUAGES,
    READING,
    ZH_COLOURS,
    ZH_SHAPES,
    Span,
    Turn,
    box_of,
    family_turn,
    noun_of,
    phrase,
    plural,
    small_talk,
)
from scenes import COLOURS, SHAPES, Box, Scene, Shape
from words import WORDS

VALUE_WEIGHT = 3.0  # of what the picture tells, against the keys and marks around it
FORMS = {"asked": 0.5, "any": 0.12, "schema": 0.38}

# Of what is asked about, the names that keys have. The first is the one that is used where nobody
# names any.
KEYS = {
    "number": {
        "en": "number reading value display digits text result meter num answer output content "
        "data code id measurement label amount total numberRead meter_reading reading_value price",
        "zh": "数字 读数 数值 值 内容 文字 文本 结果 答案 显示 编号 号码 标签 仪表读数 数",
    },
    "word": {
        "en": "word text label content value answer result name title sign string reading caption "
        "output word_text letters",
        "zh": "单词 文字 文本 内容 标签 词 结果 答案 名称 标题 字",
    },
    "shape": {
        "en": "shape name type kind form shape_name",
        "zh": "形状 名称 类型 图形 种类",
    },
    "colour": {
        "en": "color colour shape_color color_name",
        "zh": "颜色 色彩 形状颜色",
    },
    "noun": {"en": "label description caption text", "zh": "标签 描述 文字"},
    "main": {"en": "answer result value output response", "zh": "答案 结果 值 回答"},
    "count": {
        "en": "count number total num quantity amount n how_many shape_count answer result",
        "zh": "数量 个数 总数 数目 数 计数 答案 结果",
    },
    "exists": {
        "en": "exists found present answer visible is_present result contains detected",
        "zh": "存在 有 是否存在 找到 答案 结果",
    },
    "box": {
        "en": "box bbox bounding_box boundingBox position location coordinates region rect area "
        "bbox_2d",
        "zh": "位置 框 边界框 坐标 方框 区域",
    },
    "shapes": {
        "en": "shapes objects items figures results elements detections list",
        "zh": "形状 图形 物体 对象 列表 形状列表 结果",
    },
    "talk": {"en": "answer text message reply content response", "zh": "回答 答案 内容 文字"},
}  # fmt: skip
#: Names that training never sees.
NEW_KEYS = {
    "number": {
        "en": "gauge meterValue score serial observed indication",
        "zh": "示数 数据 序号",
    },
    "word": {"en": "transcription inscription word_read written", "zh": "字样 文字内容 写着"},
    "shape": {"en": "geometry shapeType outline", "zh": "图案 几何形状"},
    "colour": {"en": "shapeColor fill_color tint", "zh": "图形颜色 颜色值"},
    "count": {"en": "numberOfShapes counted sum", "zh": "合计 形状数量"},
}
_CORNERS = (
    ("x1", "y1", "x2", "y2"),
    ("left", "top", "right", "bottom"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x_min", "y_min", "x_max", "y_max"),
)
FLAT_BOXES = {name for corners in _CORNERS for name in corners}


class Corners(list):
    """A box as the numbers of an answer, with the exact one."""

    box: Box


class Number(str):
    """A number as it is written, which JSON may have as a number or as text."""


class Told(str):
    """A text about the shape in a box, if it is about one."""

    box: Box | None = None


class Choice(Told):
    """One of the texts `of`; `usual` if it is said as a model would say it without a schema."""

    of: tuple[str, ...]
    usual: bool


Say = Callable[[str], Choice]  # a shape or a colour as it is said


@dataclass
class Topic:
    """What a question is about: its facts by concept, and which of them it asks for."""

    question: str
    facts: dict[str, Any]  # concept of `KEYS`: its value
    asked: tuple[str, ...]
    main: Any  # the answer to the question, whatever its key


@dataclass
class Layout:
    """The white space of JSON: after a comma, after a colon, and of indents or none."""

    comma: str = ", "
    colon: str = ": "
    indent: int | None = None


def write(value: Any, layout: Layout, form: str = "asked") -> tuple[str, list[Span]]:
    """JSON text, and the weights of the parts that do not weigh 1 or that tell a box.

    Every part of an object that is about one shape tells its box: the next part to be written is
    learned together with which shape it is about.
    """
    text = ""
    spans: list[Span] = []

    def add(part: str, weight: float = 1.0, box: Box | None = None) -> None:
        nonlocal text
        if weight != 1.0 or box:
            spans.append(Span(len(text), len(text) + len(part), weight, box))
        text += part

    def put(value: Any, level: int = 0, box: Box | None = None) -> None:
        if isinstance(value, Corners):
            numbers = (layout.comma if layout.indent is None else ", ").join(map(str, value))
            add("[" + numbers, VALUE_WEIGHT, value.box)
            add("]")
            return
        if not isinstance(value, (dict, list)):
            add(json.dumps(value, ensure_ascii=False), VALUE_WEIGHT, box)
            return
        opening, closing = "{}" if isinstance(value, dict) else "[]"
        box = _box_of_all(value) if isinstance(value, dict) else None
        add(opening, 0.0 if level == 0 and form != "asked" else 1.0, box)
        for place, item in enumerate(value):
            if place:
                # Where a schema lets an object end or go on, it is to end.
                add(",", 0.6 if form == "schema" and isinstance(value, dict) else 1.0)
                add(layout.comma[1:])
            if layout.indent is not None:
                add("\n" + " " * layout.indent * (level + 1))
            if isinstance(value, dict):
                add('"', 1.0, box)
                add(f'{item}":', 0.0 if form == "schema" else 1.0, box)
                add(layout.colon[1:])
                put(value[item], level + 1, box)
            else:
                put(item, level + 1)
        if layout.indent is not None:
            add("\n" + " " * layout.indent * level)
        add(closing)

    put(value)
    return text, spans


def _box_of_all(value: dict[str, Any]) -> Box | None:
    """The box of the one shape that an object is about."""
    boxes = {item.box for item in value.values() if isinstance(item, (Told, Corners))} - {None}
    return boxes.pop() if len(boxes) == 1 else None


def schema_of(value: Any, rng: random.Random) -> dict[str, Any]:
    """A JSON schema of values of this kind; it tells the few texts that there are if it must."""
    if isinstance(value, dict):
        properties = {key: schema_of(item, rng) for key, item in value.items()}
        return {"type": "object", "properties": properties, "required": list(value)}
    if isinstance(value, Corners):
        return {"type": "array", "items": {"type": "integer"}, "minItems": 4, "maxItems": 4}
    if isinstance(value, list):
        return {"type": "array", "items": schema_of(value[0], rng)}
    if isinstance(value, Choice) and (not value.usual or rng.random() < 0.3):
        return {"enum": list(value.of)}
    kinds = {bool: "boolean", int: "integer"}
    return {"type": kinds.get(type(value), "string")}


def json_turn(
    rng: random.Random,
    scene: Scene,
    language: str,
    form: str | None = None,
    topic: str | None = None,
    keys: str = "odd",
) -> Turn | None:
    """A question about the picture and its answer as JSON; None if the picture does not admit it.

    Args:
        rng: what draws.
        scene: the picture.
        language: of the question.
        form: asked, any or schema, as told above, or drawn; "told" is JSON that something before
            the question has asked for.
        topic: what to ask about a picture of shapes, one of `TOPICS`, or drawn.
        keys: "usual" for an object with keys for what is asked, whose names mean it; "new" for such
            names that training never sees; "odd" to draw, now and then, names that mean nothing,
            other facts than what is asked, and counts as text.
    """
    form = form or _draw(rng, FORMS)
    say = _speech(rng, language, form == "schema")
    if scene.kind == "shapes":
        about = _SHAPE_TOPICS[topic or _draw(rng, TOPICS)](rng, scene, language, say)
    else:
        about = _reading_topic(rng, scene, language)
    if about is None:
        return None
    named = form == "schema" or (form == "asked" and rng.random() < 0.5)
    if named:
        # Programs have English names more often than Chinese questions are English.
        other = rng.random() < (0.45 if language == "zh" else 0.04)
        keys_language = LANGUAGES[(LANGUAGES.index(language) + other) % len(LANGUAGES)]
        value = _object(rng, about, keys_language, keys)
    else:
        value = {
            _key(rng, concept, language): about.main
            if concept == "shapes"
            else about.facts[concept]
            for concept in about.asked
        }
    nested = any(isinstance(item, (dict, list)) for item in value.values())
    like = named and form == "asked" and (nested or rng.random() < 0.4)
    value = _typed(rng, value, form == "schema" or like, keys)
    question = about.question
    if like:
        example = json.dumps(_example(rng, value), ensure_ascii=False)
        question = rng.choice(AS_JSON_LIKE[language]).format(question=question, form=example)
    elif named and form == "asked":
        question = rng.choice(AS_JSON_WITH[language]).format(
            question=question, keys=_listed(rng, list(value), language)
        )
    elif form == "asked" or (form == "schema" and rng.random() < 0.3):
        question = rng.choice(AS_JSON[language]).format(
            question=question, bare=question.rstrip("?.？。")
        )
    layout = Layout()
    if form in ("any", "schema"):
        choice = rng.random()
        if choice < 0.08:
            layout = Layout(",", ":")
        elif choice < 0.12 and len(json.dumps(value)) < 150:
            layout = Layout(",", ": ", rng.choice((2, 2, 4)))
        if form == "schema" and len(value) == 1 and rng.random() < 0.1:
            [only] = value.values()
            value = only if isinstance(only, list) and isinstance(only[0], dict) else value
    answer, spans = write(value, layout, "asked" if form == "told" else form)
    values = value.values() if isinstance(value, dict) else [value]
    lists = [item for item in values if isinstance(item, list) and not isinstance(item, Corners)]
    return Turn(question, answer, "json", tuple(spans), value, max(map(len, lists), default=1))


def _draw(rng: random.Random, weights: dict[str, float]) -> str:
    return rng.choices(list(weights), weights=list(weights.values()))[0]


def _choice(text: str, of: Iterable[str], usual: bool) -> Choice:
    choice = Choice(text)
    choice.of, choice.usual = tuple(of), usual
    return choice


def _speech(rng: random.Random, language: str, forced: bool) -> Say:
    """How shapes and colours are said: as in the question, but a schema may want it otherwise."""
    spelt: Callable[[str], str] = str
    said_in = rng.choice(LANGUAGES) if forced and rng.random() < 0.03 else language
    if said_in == "zh":
        spelt = {**ZH_COLOURS, **ZH_SHAPES}.__getitem__
    elif forced and rng.random() < 0.02:
        spelt = rng.choice((str.capitalize, str.upper))

    usual = said_in == language and spelt not in (str.capitalize, str.upper)

    def say(name: str) -> Choice:
        return _choice(spelt(name), map(spelt, COLOURS if name in COLOURS else SHAPES), usual)

    return say


def _key(
    rng: random.Random, concept: str, language: str, named: bool = False, new: bool = False
) -> str:
    """The name of a key: the usual one, or, where it is `named`, any that means it."""
    names = (NEW_KEYS if new else KEYS)[concept][language].split()
    if not named:
        return names[0]
    name = rng.choice(names[:3] if rng.random() < 0.4 else names)
    if rng.random() < 0.06:
        name = rng.choice((name.capitalize(), name.upper()))
    return name


def _any_key(rng: random.Random) -> str:
    """A name that says nothing."""
    first, second = rng.choice(WORDS), rng.choice(WORDS)
    return rng.choice((first, f"{first}_{second}", first + second.capitalize(), first[0]))


def _listed(rng: random.Random, names: list[str], language: str) -> str:
    quote = rng.choice(("", "", '"', '"', "'", "`"))
    *rest, last = [quote + name + quote for name in names]
    comma, both = (", ", " and ") if language == "en" else ("、", "和")
    listed = comma.join(rest) + both + last if rest else last
    the = "the " if language == "en" and not quote and rng.random() < 0.25 else ""
    return the + listed


def _example(rng: random.Random, value: Any) -> Any:
    """An object of this form, as people write one into a question."""
    if isinstance(value, dict):
        return {key: _example(rng, item) for key, item in value.items()}
    if isinstance(value, Corners):
        return rng.choice(([], [0, 0, 0, 0], ["x1", "y1", "x2", "y2"]))
    if isinstance(value, list):
        return [_example(rng, value[0])]
    if isinstance(value, str):
        return rng.choice(("", "..."))
    return {bool: True, int: 0}[type(value)]


def _typed(rng: random.Random, value: Any, free: bool, keys: str) -> Any:
    """The value with numbers as numbers, or, where there is a choice, sometimes as text."""
    if isinstance(value, dict):
        return {key: _typed(rng, item, free, keys) for key, item in value.items()}
    if isinstance(value, Corners):
        return value
    if isinstance(value, list):
        return [_typed(rng, item, False, keys) for item in value]
    if isinstance(value, Number):
        return str(value) if free and rng.random() < 0.38 else int(value)
    if isinstance(value, int) and not isinstance(value, bool) and free and rng.random() < 0.08:
        return value if keys == "usual" else str(value)
    return value


def _object(rng: random.Random, about: Topic, language: str, keys: str) -> dict[str, Any]:
    """An object with keys that somebody else has chosen."""
    if rng.random() < 0.12 and keys == "odd":
        name = _key(rng, "main", language, True) if rng.random() < 0.5 else _any_key(rng)
        return {name: about.main}
    if keys != "odd" or rng.random() < 0.72:
        concepts = rng.sample(about.asked, len(about.asked))
        if len(concepts) > 1 and rng.random() < 0.3:
            concepts = concepts[:1]
    else:
        most = rng.choice((1, 2, 2, 2, 3))
        concepts = rng.sample(list(about.facts), min(len(about.facts), most))
    value: dict[str, Any] = {}
    for concept in concepts:
        fact = about.facts[concept]
        if isinstance(fact, Corners):
            choice = rng.random()
            corners = dict(zip(rng.choice(_CORNERS), fact, strict=True))
            if choice < 0.02:
                value |= corners
                continue
            fact = corners if choice < 0.05 else [fact] if choice < 0.06 else fact
        name = _key(rng, concept, language, True, keys == "new")
        if concept == "shapes":
            fact = _items(rng, fact, language)
        value[name] = fact
    return value


_ITEMS = {
    "shape colour": 0.44,
    "shape colour box": 0.4,
    "shape colour count": 0.06,
    "noun box": 0.04,
    "shape box": 0.04,
    "shape": 0.02,
}


def _items(rng: random.Random, items: list[dict[str, Any]], language: str) -> list[Any]:
    """A list of all shapes, with keys that somebody else has chosen."""
    kind = _draw(rng, _ITEMS)
    concepts = kind.split()
    if "count" in concepts:
        groups = Counter((item["shape"], item["colour"]) for item in items)
        items = [
            {"shape": shape, "colour": colour, "count": count}
            for (shape, colour), count in groups.items()
        ]
    if rng.random() < 0.2:
        rng.shuffle(concepts)
    names = {concept: _key(rng, concept, language, True) for concept in concepts}
    corners = rng.choice(_CORNERS) if rng.random() < 0.02 else None
    listed = []
    for item in items:
        value = {names[concept]: item[concept] for concept in concepts}
        if corners and "box" in concepts:
            value[names["box"]] = dict(zip(corners, item["box"], strict=True))
        listed.append(value)
    return listed


def _reading_topic(rng: random.Random, scene: Scene, language: str) -> Topic:
    """A number or a word, and on what it is."""
    own, _ = READING.get(scene.kind, (WORD, ""))
    other = READ_IT if scene.kind == "word" or rng.random() < 0.3 else ANY_NUMBER
    question = phrase(rng, own if rng.random() < 0.5 else other, language)
    concept, text = ("word", scene.text) if scene.kind == "word" else ("number", Number(scene.text))
    return Topic(question, {concept: text}, (concept,), text)


def _corners(shape: Shape) -> Corners:
    corners = Corners(box_of(shape))
    corners.box = shape.box
    return corners


def _facts(shapes: list[Shape], language: str, say: Say) -> list[dict[str, Any]]:
    """What there is to say of each shape."""

    def facts(shape: Shape) -> dict[str, Any]:
        noun = Told(noun_of(shape.name, shape.colour, language))
        texts = {"shape": say(shape.name), "colour": say(shape.colour), "noun": noun}
        for text in texts.values():
            text.box = shape.box
        return texts | {"box": _corners(shape)}

    return [facts(shape) for shape in shapes]


def _one_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic | None:
    """The only shape of the picture."""
    if len(scene.shapes) > 1:
        return None
    question = phrase(rng, NAME if rng.random() < 0.85 else READ_IT, language)
    return _of_one(question, scene.shapes[0], language, say, ("shape", "colour"), "noun")


def _of_one(
    question: str, shape: Shape, language: str, say: Say, asked: tuple[str, ...], main: str
) -> Topic:
    [facts] = _facts([shape], language, say)
    return Topic(question, facts, asked, facts[main])


def _colour_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic | None:
    shape = rng.choice(scene.shapes)
    if sum(s.name == shape.name for s in scene.shapes) > 1:
        return None
    name = shape.name if language == "en" else ZH_SHAPES[shape.name]
    question = phrase(rng, COLOUR_OF, language, shape=name)
    return _of_one(question, shape, language, say, ("colour",), "colour")


def _shape_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic | None:
    shape = rng.choice(scene.shapes)
    if sum(s.colour == shape.colour for s in scene.shapes) > 1:
        return None
    colour = shape.colour if language == "en" else ZH_COLOURS[shape.colour]
    question = phrase(rng, SHAPE_OF, language, colour=colour)
    return _of_one(question, shape, language, say, ("shape",), "shape")


def _place_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic | None:
    shape = rng.choice(scene.shapes)
    if sum((s.name, s.colour) == (shape.name, shape.colour) for s in scene.shapes) > 1:
        return None
    question = phrase(rng, WHERE, language, what=noun_of(shape.name, shape.colour, language))
    return _of_one(question, shape, language, say, ("box",), "box")


def _count_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic:
    """All shapes, or those of a kind or a colour."""
    facts: dict[str, Any] = {}
    choice = rng.random()
    if choice < 0.2:
        what, shapes = ("shapes", "形状")[LANGUAGES.index(language)], scene.shapes
    elif choice < 0.6:
        name = rng.choice([s.name for s in scene.shapes] if rng.random() < 0.85 else SHAPES)
        what = plural(name) if language == "en" else ZH_SHAPES[name]
        shapes = [s for s in scene.shapes if s.name == name]
        facts["shape"] = say(name)
    else:
        colour = rng.choice(
            [s.colour for s in scene.shapes] if rng.random() < 0.85 else list(COLOURS)
        )
        what = f"{colour} shapes" if language == "en" else f"{ZH_COLOURS[colour]}的形状"
        shapes = [s for s in scene.shapes if s.colour == colour]
        facts["colour"] = say(colour)
    facts["count"] = len(shapes)
    return Topic(phrase(rng, COUNT, language, what=what), facts, ("count",), len(shapes))


def _exists_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic:
    name, colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
    there = rng.choice(scene.shapes)
    choice = rng.random()
    name = there.name if choice < 0.75 else name  # the likeness of one that is there, or itself
    colour = there.colour if choice < 0.5 or choice > 0.9 else colour
    count = sum((s.name, s.colour) == (name, colour) for s in scene.shapes)
    question = phrase(rng, EXISTS, language, what=noun_of(name, colour, language))
    question = question.replace(" a orange", " an orange")
    facts = {"exists": count > 0, "count": count, "shape": say(name), "colour": say(colour)}
    return Topic(question, facts, ("exists",), count > 0)


def _all_topic(rng: random.Random, scene: Scene, language: str, say: Say) -> Topic:
    """Every shape: its name and colour, and, where the question is for places, its box."""
    places = rng.random() < 0.5
    items = _facts(scene.shapes, language, say)
    concepts = ("shape", "colour", "box") if places else ("shape", "colour")
    main = [{_key(rng, c, language): item[c] for c in concepts} for item in items]
    facts = {
        "shapes": items,
        "count": len(items),
    }
    question = phrase(rng, DETECT if places else LIST, language)
    return Topic(question, facts, ("shapes",), main)


_SHAPE_TOPICS = {
    "one": _one_topic,
    "colour": _colour_topic,
    "shape": _shape_topic,
    "place": _place_topic,
    "count": _count_topic,
    "exists": _exists_topic,
    "all": _all_topic,
}
#: How much of each; "all" has conversations of its own, in which there is nothing to copy it from.
TOPICS = {"one": 0.2, "colour": 0.16, "shape": 0.16, "place": 0.2, "count": 0.28, "exists": 0.12}


def mixed_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    """The questions of one conversation about one picture, some of them with JSON as the answer."""

    def turn(json_share: float) -> Turn | None:
        language = rng.choice(LANGUAGES)
        if rng.random() < json_share:
            return json_turn(rng, scene, language)
        return family_turn(rng, scene, language, _draw(rng, _PLAIN))

    choice = rng.random()
    if scene.kind != "shapes":
        turns = [json_turn(rng, scene, rng.choice(LANGUAGES))]
        if choice < 0.3:
            turns.insert(choice < 0.15, turn(0.0))
    elif choice < 0.55:
        turns = [json_turn(rng, scene, rng.choice(LANGUAGES), topic="all")]
    else:
        turns = [turn(0.65) for _ in range(rng.choice((3, 4, 5)))]
        if choice > 0.9:
            turns.append(json_turn(rng, scene, rng.choice(LANGUAGES), topic="all"))
    return [turn for turn in turns if turn] or mixed_turns(rng, scene)


def json_talk(rng: random.Random) -> Turn:
    """A turn without any picture."""
    turn = small_talk(rng)
    language = "en" if turn.answer.isascii() else "zh"
    form = _draw(rng, FORMS)
    question = turn.question
    if form == "asked":
        question = rng.choice(AS_JSON[language]).format(
            question=question, bare=question.rstrip("?.？。")
        )
    value = {_key(rng, "talk", language, form == "schema"): turn.answer}
    answer, spans = write(value, Layout(), form)
    return Turn(question, answer, "json", tuple(spans), value)


def told_turns(rng: random.Random, scene: Scene) -> list[Turn]:
    """Questions after a system message that asks for JSON."""
    turns = [json_turn(rng, scene, rng.choice(LANGUAGES), "told") for _ in range(3)]
    turns = turns[: 1 if scene.kind != "shapes" else 3]
    return [turn for turn in turns if turn] or told_turns(rng, scene)


_PLAIN = {"shape_name": 0.2, "shape_count": 0.3, "shape_locate": 0.5}
