"""Samples: conversations in which the model itself answers, and windows of the user's text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from edgevl.files import Journal, read_text
from edgevl.generate import Model
from edgevl.preprocess import GeneratedTokens, Message, Picture, Prompt, PromptEncoder
from edgevl.quantize.calibration.calibration_set import Sample
from edgevl.quantize.calibration.pictures import spread
from edgevl.quantize.calibration.requests import Request
from edgevl.quantize.settings import QuantizationError

#: Tokens of a reply, and how it is drawn: varied, but still what the model would say.
MAX_REPLY_TOKENS, TEMPERATURE, TOP_P = 96, 0.7, 0.95

_FORMAT = 1


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
                Reply(tuple(reply["token_ids"]), reply["text"], reply["finish_reason"])
                for reply in entry["replies"]
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


#: Tokens of a window: the most, and the fewest that are worth it.
MAX_WINDOW, MIN_WINDOW = 512, 128

#: Largest file of text.
MAX_FILE_BYTES = 64 << 20

#: Text goes to the tokenizer in pieces of so many characters; where there is more than windows
#: need, at even distances. A token rarely has more than 16.
_PIECE_CHARS = 16 * MAX_WINDOW


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read files of text, a repeated one once.

    Raises:
        QuantizationError: one cannot be read, is too large, or is not UTF-8.
    """
    return list(dict.fromkeys(read_text(path, MAX_FILE_BYTES, QuantizationError) for path in paths))


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
    pieces = [
        text[at : at + _PIECE_CHARS]
        for text in read_texts(paths)
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
