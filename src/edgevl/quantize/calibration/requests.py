"""What is asked, in English and Chinese, and about what: decided by the seed alone."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgevl.quantize.calibration.drawn import draw
from edgevl.quantize.calibration.pictures import FoundPicture, set_apart
from edgevl.quantize.settings import QuantizationSettings

#: Conversations about pictures that are drawn, about the user's, without any; windows of text.
Kind = Literal["drawn", "pictures", "chat", "window"]

#: How many topics of conversations without pictures are kept for the held-out ones.
_HELDOUT_TOPICS = 5
#: Shares of conversations: with a second turn, about two pictures, with more than one tile.
_SECOND_TURN, _TWO_PICTURES, _TILED = 1 / 4, 1 / 8, 1 / 4
_MAX_TILES = (2, 3, 4)
#: From one question about a picture to the next; has no divisor in common with their number.
_QUESTION_STEP = 7


@dataclass(frozen=True)
class DrawnPicture:
    """The arguments of `edgevl.quantize.calibration.drawn.draw`."""

    kind: int
    seed: int


@dataclass(frozen=True)
class Request:
    """A conversation to be had with the model.

    Attributes:
        kind: what it is about; never ``window``.
        questions: one or two turns of the user.
        pictures: none, one or two, which go with the first question.
        max_tiles: most tiles of a picture.
        seed: of the replies.
    """

    kind: Kind
    questions: tuple[str, ...]
    pictures: tuple[DrawnPicture | FoundPicture, ...]
    max_tiles: int
    seed: int

    @property
    def digest(self) -> str:
        """What tells it from others: hexadecimal digits."""
        return hashlib.sha256(repr(self).encode()).hexdigest()


def heldout_count(samples: int) -> int:
    """Return how many held-out sequences go with ``samples`` calibration sequences."""
    return max(8, samples // 8)


def kinds(settings: QuantizationSettings, count: int, text_only: bool = False) -> list[Kind]:
    """Return the kind of each of ``count`` sequences, as the user's files have it."""
    text, images = bool(settings.calibration_text), settings.calibration_images is not None
    about: Kind = "pictures" if images else "drawn"
    pattern: list[Kind]
    if text_only:
        pattern = ["window" if text else "chat"]
    elif text:
        pattern = [about, "window"]
    else:
        pattern = [about, about, about, "chat"]
    return list(itertools.islice(itertools.cycle(pattern), count))


def requests(
    kinds: Sequence[Kind],
    seed: int,
    heldout: bool,
    found: Sequence[FoundPicture] = (),
    max_tiles: int = max(_MAX_TILES),
) -> list[Request | None]:
    """Choose conversations, English and Chinese in turn.

    Args:
        kinds: what each is about; a ``window`` needs no conversation and gets None.
        seed: of everything random.
        heldout: whether they are held out; others are chosen than otherwise.
        found: the user's pictures for them, used again, with other questions, if they are few.
        max_tiles: most tiles of a picture that the model takes.
    """
    result: list[Request | None] = []
    counts: dict[Kind, int] = {}
    for kind in kinds:
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        rng = random.Random(f"{seed} {heldout} {kind} {index}")
        language = LANGUAGES[index % len(LANGUAGES)]
        if kind == "window":
            result.append(None)
        elif kind == "chat":
            question = _chat_question(seed, heldout, language, index // len(LANGUAGES))
            result.append(_request(rng, kind, question, (), 1, language))
        else:
            result.append(_about_pictures(rng, kind, index, language, found, max_tiles))
    return result


def _about_pictures(
    rng: random.Random,
    kind: Kind,
    index: int,
    language: Language,
    found: Sequence[FoundPicture],
    max_tiles: int,
) -> Request:
    """Choose the conversation number ``index`` about pictures of this kind."""
    two = rng.random() < _TWO_PICTURES and (kind == "drawn" or len(found) > 1)
    pictures: list[DrawnPicture | FoundPicture] = []
    for number in range(index, index + 1 + two):
        if kind == "drawn":
            pictures.append(DrawnPicture(number, rng.getrandbits(32)))
        else:
            pictures.append(found[number % len(found)])
    tiles = min(rng.choice(_MAX_TILES), max_tiles) if rng.random() < _TILED and not two else 1
    if two:
        question = rng.choice(ABOUT_TWO_PICTURES[language])
    else:
        bank, first = ABOUT_A_PICTURE[language], pictures[0]
        if isinstance(first, DrawnPicture):
            question = rng.choice(bank)
        else:
            begin, uses = int(first.digest[:8], 16), index // len(found)
            question = bank[(begin + _QUESTION_STEP * uses) % len(bank)]
        if "{subject}" in question:  # not `format`: other questions have braces of their own
            question = question.replace("{subject}", _subject(first, language))
    return _request(rng, kind, question, tuple(pictures), tiles, language)


def _subject(picture: DrawnPicture | FoundPicture, language: Language) -> str:
    if isinstance(picture, FoundPicture):
        return ANY_SUBJECT[language]
    drawing = draw(picture.kind, picture.seed)
    return drawing.subject if language == "en" else drawing.subject_zh


def _chat_question(seed: int, heldout: bool, language: Language, index: int) -> str:
    topics = set_apart(TOPICS[language], _HELDOUT_TOPICS)[heldout]
    pairs = list(itertools.product(WITHOUT_PICTURE[language], topics))
    random.Random(f"{seed} {language}").shuffle(pairs)
    question, topic = pairs[index % len(pairs)]
    return question.replace("{topic}", topic)


def _request(
    rng: random.Random,
    kind: Kind,
    question: str,
    pictures: tuple[DrawnPicture | FoundPicture, ...],
    max_tiles: int,
    language: Language,
) -> Request:
    questions = [question]
    if rng.random() < _SECOND_TURN:
        questions.append(rng.choice(FOLLOW_UPS[language]))
    return Request(kind, tuple(questions), pictures, max_tiles, rng.getrandbits(32))


Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, Language] = ("en", "zh")

#: About one picture. ``{subject}`` is something that is in it.
ABOUT_A_PICTURE: dict[Language, tuple[str, ...]] = {
    "en": (
        "Describe this image in detail.",
        "What text can you read in this image? Write it out exactly.",
        "How many objects are there in the image? Count them one by one.",
        "Please provide the bounding box coordinate of the region this sentence describes: "
        "<ref>{subject}</ref>",
        "Which colors dominate this picture, and where are they?",
        "Is there any text in the image? Answer yes or no.",
        "What is the most important information here, and why?",
        'Return a JSON object with the keys "title", "objects" and "colors" for this image.',
        "Write a short caption for this picture.",
        "What is in the upper left corner, and what is in the lower right corner?",
        "List everything you see as bullet points.",
        "Where is the {subject}? Describe its position relative to the other things.",
        "Read all the numbers in the picture. What is the largest one?",
        "What kind of image is this: photo, drawing, chart, map, document or something else? "
        "Explain how you can tell.",
        "Is the background light or dark? Answer with one word.",
        "Think step by step: what could this image be used for?",
        "Detect the {subject} and return its box as <box>[[x1, y1, x2, y2]]</box>.",
        "Translate the text in this image into Chinese.",
        "Are there more than three people in this picture?",
        "Extract the data shown here as a table in Markdown.",
        "What would you change to make this picture easier to understand?",
        "What is unusual or wrong in this image?",
        "Summarize the image in one sentence.",
        "What is the color of the {subject}?",
    ),
    "zh": (
        "请详细描述这张图片。",
        "图中有哪些文字？请逐字写出来。",
        "图中一共有多少个物体？请逐个数一数。",
        "请给出这句话所描述区域的边界框坐标：<ref>{subject}</ref>",
        "这张图片以哪些颜色为主？分别在什么位置？",
        "图片里有文字吗？请回答“有”或“没有”。",
        "图中最重要的信息是什么？为什么？",
        "请用 JSON 格式回答，包含 “标题”、“物体” 和 “颜色” 三个字段。",
        "为这张图片写一个简短的标题。",
        "左上角有什么？右下角又有什么？",
        "请分条列出你看到的所有内容。",
        "{subject}在哪里？请说明它与其他物体的相对位置。",
        "读出图片中的所有数字，其中最大的是多少？",
        "这是照片、图画、图表、地图、文档还是别的什么？请说明判断的理由。",
        "背景是亮的还是暗的？只回答一个词。",
        "请一步一步地思考：这张图片可能有什么用途？",
        "请检测{subject}，并以 <box>[[x1, y1, x2, y2]]</box> 的形式给出它的位置。",
        "请把图中的文字翻译成中文。",
        "这张图片里的人超过三个吗？",
        "请把图中的数据整理成 Markdown 表格。",
        "怎样修改这张图片，才能让它更容易理解？",
        "这张图片有什么不寻常或错误的地方？",
        "用一句话概括这张图片。",
        "{subject}是什么颜色的？",
    ),
}

#: What ``{subject}`` is in a picture of which nothing is known.
ANY_SUBJECT: dict[Language, str] = {"en": "largest object", "zh": "最大的物体"}

ABOUT_TWO_PICTURES: dict[Language, tuple[str, ...]] = {
    "en": (
        "Image-1: <image>\nImage-2: <image>\nWhat are the differences between the two images?",
        "Image-1: <image>\nImage-2: <image>\nWhich of the two is brighter, and what do they have "
        "in common?",
        "Image-1: <image>\nImage-2: <image>\nDescribe the two images one after the other.",
        "Image-1: <image>\nImage-2: <image>\nWhich image has more text? Quote some of it.",
    ),
    "zh": (
        "图1：<image>\n图2：<image>\n这两张图片有什么不同？",
        "图1：<image>\n图2：<image>\n哪一张更亮？它们有什么共同点？",
        "图1：<image>\n图2：<image>\n请依次描述这两张图片。",
        "图1：<image>\n图2：<image>\n哪一张图片的文字更多？请引用其中一些。",
    ),
}

#: Second turns, whatever the first was about.
FOLLOW_UPS: dict[Language, tuple[str, ...]] = {
    "en": (
        "Are you sure? Explain your answer.",
        "Say that again in one short sentence.",
        "What else is there to say about it?",
        "Now answer in Chinese.",
        "Give your answer as a numbered list.",
        "Why do you think so?",
        "Give me an example.",
    ),
    "zh": (
        "你确定吗？请解释一下你的回答。",
        "请用一句简短的话再说一遍。",
        "还有什么可以补充的吗？",
        "现在请用英文回答。",
        "请用编号列表的形式回答。",
        "你为什么这样认为？",
        "请举一个例子。",
    ),
}

#: Without a picture. ``{topic}`` is one of `TOPICS`.
WITHOUT_PICTURE: dict[Language, tuple[str, ...]] = {
    "en": (
        "Explain {topic} to a child of ten.",
        "Write a short story about {topic}.",
        "What are three common mistakes people make with {topic}?",
        "Write a formal e-mail in which you ask a colleague about {topic}.",
        "List five facts about {topic} as a JSON array of strings.",
        "Write a small Python function that has to do with {topic}, with a docstring.",
        "Compare {topic} today with {topic} fifty years ago.",
        "Write a poem of four lines about {topic}.",
        "If I spend 35 minutes a day on {topic}, how many hours is that in a month?",
        "Translate into Chinese: I have always wanted to know more about {topic}.",
    ),
    "zh": (
        "请向一个十岁的孩子解释{topic}。",
        "写一个关于{topic}的小故事。",
        "关于{topic}，人们常犯的三个错误是什么？",
        "写一封正式的邮件，向同事询问有关{topic}的问题。",
        "列出关于{topic}的五个事实，以 JSON 字符串数组的形式回答。",
        "写一个与{topic}有关的 Python 小函数，并附上注释。",
        "比较今天和五十年前的{topic}。",
        "写一首关于{topic}的四行诗。",
        "如果我每天花 35 分钟在{topic}上，一个月一共是多少小时？请写出计算过程。",
        "翻译成英文：我一直想多了解一些关于{topic}的知识。",
    ),
}

TOPICS: dict[Language, tuple[str, ...]] = {
    "en": (
        "the weather", "electric cars", "cooking rice", "the human heart", "learning a language",
        "volcanoes", "online shopping", "football", "gardening", "public transport", "black holes",
        "saving money", "classical music", "databases", "bread", "chess", "the ocean", "vaccines",
        "bridges", "sleep", "photography", "solar power", "history of paper", "dogs", "tea",
    ),
    "zh": (
        "天气", "电动汽车", "煮米饭", "人的心脏", "学习外语", "火山", "网上购物", "足球", "园艺",
        "公共交通", "黑洞", "理财", "古典音乐", "数据库", "面包", "围棋", "海洋", "疫苗", "桥梁",
        "睡眠", "摄影", "太阳能", "造纸的历史", "狗", "茶",
    ),
}  # fmt: skip
