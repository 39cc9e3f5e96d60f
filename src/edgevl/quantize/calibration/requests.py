"""What is asked, in English and Chinese, and about what: decided by the seed alone.

The questions are in ``questions.json``: about a picture, which has a ``{subject}`` (of each kind
that is drawn, and of any other), about two, without any, about a ``{topic}``, and second turns.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgevl.quantize.calibration import shipped
from edgevl.quantize.calibration.pictures import FoundPicture, set_apart
from edgevl.quantize.settings import QuantizationSettings

#: Conversations about pictures that are drawn, about the user's, without any; windows of text.
Kind = Literal["drawn", "pictures", "chat", "window"]

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, Language] = ("en", "zh")

#: How many of the topics of conversations without pictures, and of the pictures that come with
#: EdgeVL, are kept for the held-out ones.
_HELDOUT = 5
#: Shares of conversations: with a second turn, about two pictures, with more than one tile.
_SECOND_TURN, _TWO_PICTURES, _TILED = 1 / 4, 1 / 8, 1 / 4
_MAX_TILES = (2, 3, 4)
#: From one question about a picture to the next; has no divisor in common with their number.
_QUESTION_STEP = 7


@dataclass(frozen=True)
class DrawnPicture:
    """The arguments of `edgevl.quantize.calibration.shipped.drawn`."""

    place: int
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
            if kind == "pictures":
                known: Sequence[FoundPicture | int] = found
            else:
                known = set_apart(range(len(shipped.kinds())), _HELDOUT)[heldout]
            result.append(_about_pictures(rng, kind, index, language, known, max_tiles))
    return result


def _about_pictures(
    rng: random.Random,
    kind: Kind,
    index: int,
    language: Language,
    known: Sequence[FoundPicture | int],
    max_tiles: int,
) -> Request:
    """Choose the conversation number ``index`` about pictures, or places of drawn ones."""
    two = rng.random() < _TWO_PICTURES and len(known) > 1
    pictures: list[DrawnPicture | FoundPicture] = []
    for number in range(index, index + 1 + two):
        each = known[number % len(known)]
        pictures.append(DrawnPicture(each, rng.getrandbits(32)) if isinstance(each, int) else each)
    tiles = min(rng.choice(_MAX_TILES), max_tiles) if rng.random() < _TILED and not two else 1
    if two:
        question = rng.choice(_questions()[language]["about_two_pictures"])
    else:
        bank, first = _questions()[language]["about_a_picture"], pictures[0]
        if isinstance(first, DrawnPicture):
            question = rng.choice(bank)
        else:
            begin, uses = int(first.digest[:8], 16), index // len(known)
            question = bank[(begin + _QUESTION_STEP * uses) % len(bank)]
        # Not `format`: other questions have braces of their own.
        question = question.replace("{subject}", _subject(first, language))
    return _request(rng, kind, question, tuple(pictures), tiles, language)


def _subject(picture: DrawnPicture | FoundPicture, language: Language) -> str:
    subjects: dict[str, str] = _questions()[language]["subjects"]
    return subjects[shipped.kinds()[picture.place] if isinstance(picture, DrawnPicture) else "any"]


def _chat_question(seed: int, heldout: bool, language: Language, index: int) -> str:
    bank = _questions()[language]
    topics = set_apart(bank["topics"], _HELDOUT)[heldout]
    pairs = list(itertools.product(bank["without_picture"], topics))
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
        questions.append(rng.choice(_questions()[language]["follow_ups"]))
    return Request(kind, tuple(questions), pictures, max_tiles, rng.getrandbits(32))


@functools.cache
def _questions() -> dict[Language, dict[str, Any]]:
    """Return what can be asked, for each language."""
    return json.loads(Path(__file__).with_name("questions.json").read_text("utf-8"))
