"""What is asked, in English and Chinese, and about what; how it is answered; and windows of text.

The questions are in ``questions.json``: about a picture, which has a ``{subject}`` (of each kind
that is drawn, and of any other), about two, without any, about a ``{topic}``, and second turns.
Which are asked is decided by the seed alone. The model itself answers.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from edgevl.files import Journal, read_text
from edgevl.generate import Model
from edgevl.preprocess import GeneratedTokens, Message, Picture, Prompt, PromptEncoder
from edgevl.quantize.calibration.calibration_set import Sample
from edgevl.quantize.calibration.pictures import FoundPicture, drawn_kinds, set_apart, spread
from edgevl.quantize.settings import QuantizationError, QuantizationSettings

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

#: Tokens of a reply, and how it is drawn: varied, but still what the model would say.
MAX_REPLY_TOKENS, TEMPERATURE, TOP_P = 96, 0.7, 0.95

_FORMAT = 1

#: Tokens of a window: the most, and the fewest that are worth it.
MAX_WINDOW, MIN_WINDOW = 512, 128

#: Largest file of text.
MAX_FILE_BYTES = 64 << 20

#: Text goes to the tokenizer in pieces of so many characters; where there is more than windows
#: need, at even distances. A token rarely has more than 16.
_PIECE_CHARS = 16 * MAX_WINDOW


@dataclass(frozen=True)
class DrawnPicture:
    """The arguments of `edgevl.quantize.calibration.pictures.drawn`."""

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
    drawn = set_apart(range(len(drawn_kinds())), _HELDOUT)[heldout]
    result: list[Request | None] = []
    counts: dict[Kind, int] = {}
    for kind in kinds:
        index = counts.get(kind, 0)
        counts[kind] = index + 1
        rng = random.Random(f"{seed} {heldout} {kind} {index}")
        language = LANGUAGES[index % len(LANGUAGES)]
        if kind == "window":
            result.append(None)
            continue
        pictures: Sequence[DrawnPicture | FoundPicture] = ()
        tiles = 1
        if kind == "chat":
            question = _chat_question(seed, heldout, language, index // len(LANGUAGES))
        else:
            known = found if kind == "pictures" else drawn
            question, pictures, tiles = _about_pictures(rng, index, language, known, max_tiles)
        questions = [question]
        if rng.random() < _SECOND_TURN:
            questions.append(rng.choice(_questions()[language]["follow_ups"]))
        seed_of_replies = rng.getrandbits(32)
        result.append(Request(kind, tuple(questions), tuple(pictures), tiles, seed_of_replies))
    return result


def _about_pictures(
    rng: random.Random,
    index: int,
    language: Language,
    known: Sequence[FoundPicture] | Sequence[int],
    max_tiles: int,
) -> tuple[str, list[DrawnPicture | FoundPicture], int]:
    """Choose for conversation number ``index`` about pictures, or places of drawn ones.

    Returns:
        The question, its pictures, and the most tiles of one.
    """
    two = rng.random() < _TWO_PICTURES and len(known) > 1
    pictures: list[DrawnPicture | FoundPicture] = []
    for number in range(index, index + 1 + two):
        each = known[number % len(known)]
        pictures.append(DrawnPicture(each, rng.getrandbits(32)) if isinstance(each, int) else each)
    tiles = min(rng.choice(_MAX_TILES), max_tiles) if rng.random() < _TILED and not two else 1
    if two:
        return rng.choice(_questions()[language]["about_two_pictures"]), pictures, tiles
    bank, first = _questions()[language]["about_a_picture"], pictures[0]
    if isinstance(first, DrawnPicture):
        question, shown = rng.choice(bank), drawn_kinds()[first.place]
    else:
        begin, uses = int(first.digest[:8], 16), index // len(known)
        question, shown = bank[(begin + _QUESTION_STEP * uses) % len(bank)], "any"
    # Not `format`: other questions have braces of their own.
    return question.replace("{subject}", _questions()[language]["subjects"][shown]), pictures, tiles


def _chat_question(seed: int, heldout: bool, language: Language, index: int) -> str:
    bank = _questions()[language]
    topics = set_apart(bank["topics"], _HELDOUT)[heldout]
    pairs = list(itertools.product(bank["without_picture"], topics))
    random.Random(f"{seed} {language}").shuffle(pairs)
    question, topic = pairs[index % len(pairs)]
    return question.replace("{topic}", topic)


@functools.cache
def _questions() -> dict[Language, dict[str, Any]]:
    """Return what can be asked, for each language."""
    return json.loads(Path(__file__).with_name("questions.json").read_text("utf-8"))


@dataclass(frozen=True)
class Reply:
    """What the model said.

    Attributes:
        token_ids: without the one that ended the turn.
        text: the same as text.
        finish_reason: ``stop`` if it ended by itself, else ``length``.
    """

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str


def converse(model: Model, request: Request, images: Sequence[Image.Image]) -> list[Reply]:
    """Have a conversation about ``images``: -> a reply for each question."""
    session = model.chat(max_tiles=request.max_tiles)
    replies = []
    for turn, question in enumerate(request.questions):
        answer = session.ask(
            question,
            images if turn == 0 else (),
            max_tokens=MAX_REPLY_TOKENS,
            temperature=TEMPERATURE,
            top_p=TOP_P,
            seed=request.seed + turn,
        )
        replies.append(Reply(answer.token_ids, answer.text, answer.finish_reason))
    return replies


def to_sample(
    model: Model, request: Request, pictures: Sequence[Picture], replies: Sequence[Reply]
) -> Sample:
    """Embed a finished conversation about ``pictures``.

    The last reply has the token that ends its turn if the model came to that.
    """
    messages: list[Message] = []
    for question, reply in zip(request.questions, replies, strict=True):
        messages += [
            Message.user(question, pictures if not messages else ()),
            Message.assistant(GeneratedTokens(reply.token_ids)),
        ]
    # What the reply was drawn from, the beginning of the assistant's turn included.
    prompt = model.prompts.encode(messages[:-1])
    said = [*replies[-1].token_ids]
    if replies[-1].finish_reason == "stop":
        said += _end_of_turn(model.prompts)
    token_ids = np.concatenate([prompt.token_ids, np.array(said, np.int64)])
    is_image = np.zeros(len(token_ids), np.bool_)
    for span in prompt.images:
        is_image[span.start : span.start + span.length] = True
    embeddings = model.embed(Prompt(token_ids, prompt.images))
    return Sample(token_ids, embeddings, is_image, len(prompt.token_ids))


def text_sample(model: Model, token_ids: Sequence[int]) -> Sample:
    """Embed a window of text."""
    ids = np.array(token_ids, np.int64)
    return Sample(ids, model.embed(Prompt(ids, ())), np.zeros(len(ids), np.bool_), 0)


def _end_of_turn(prompts: PromptEncoder) -> list[int]:
    """Return the id that the chat template puts after a reply, in a list; empty if it has none."""
    ids = prompts.encode([Message.user("?"), Message.assistant("!")]).token_ids.tolist()
    return [token_id for token_id in ids if token_id in prompts.stop_ids][-1:]


class ConversationLog:
    """A file to which each finished conversation is added, so that none is had twice.

    Its first line names the checkpoint; what is there of another one is dropped.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        """Open or start the file ``path``.

        Raises:
            OSError: it cannot be read or written.
        """
        self._journal = Journal(path)
        header = {"format": _FORMAT, "checkpoint": fingerprint}
        first, *known = [*self._journal.recover()] or [{}]
        if first != header:
            path.unlink(missing_ok=True)
            self._journal.add(header)
            known = []
        self._known = {
            entry["request"]: [
                Reply(tuple(reply.pop("token_ids")), **reply) for reply in entry["replies"]
            ]
            for entry in known
        }

    def replies(self, request: Request) -> list[Reply] | None:
        """Return what the model said to ``request``, or None if that is not known."""
        return self._known.get(request.digest)

    def add(self, request: Request, replies: Sequence[Reply]) -> None:
        """Keep a finished conversation."""
        self._journal.add(
            {
                "request": request.digest,
                "kind": request.kind,
                "questions": request.questions,
                "replies": [asdict(reply) for reply in replies],
            }
        )


def token_windows(
    paths: Sequence[Path], tokenizer: Tokenizer, count: int, longest: int = MAX_WINDOW
) -> list[list[int]]:
    """Cut files into ``count`` windows of the same length that do not overlap.

    Args:
        paths: files of text.
        tokenizer: makes tokens of it.
        count: windows wanted.
        longest: most tokens of a window; `MAX_WINDOW` is another limit.

    Raises:
        QuantizationError: a file cannot be read, or all together are too short.
    """
    texts = [read_text(path, MAX_FILE_BYTES, QuantizationError) for path in paths]
    pieces = [
        text[at : at + _PIECE_CHARS]
        for text in dict.fromkeys(texts)  # a repeated one once
        for at in range(0, len(text), _PIECE_CHARS)
    ]
    tokens: list[int] = []
    for piece in spread(pieces, 2 * count):
        tokens += tokenizer.encode(piece, add_special_tokens=False).ids
    longest = min(longest, MAX_WINDOW)
    length = min(longest, len(tokens) // count)
    if length < min(MIN_WINDOW, longest):
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise QuantizationError(
            f"{paths[0]}{more}: {len(tokens)} tokens of text, {count * min(MIN_WINDOW, longest)} "
            f"are needed for {count} windows; give more text or calibrate on fewer samples"
        )
    return spread(
        [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)], count
    )
