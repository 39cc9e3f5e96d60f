"""What is said to and by the model, before it becomes tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from edgevl.errors import PromptError
from edgevl.preprocess.picture import Picture
from edgevl.preprocess.tools import ToolCall

#: Where a picture goes in the text of a user.
IMAGE_MARKER = "<image>"

_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class GeneratedTokens:
    """An assistant's reply as the very ids that the model produced.

    Putting the ids back, rather than their text, keeps the tokens of a conversation a prefix of
    those of its next turn. The id that ended the turn is not among them: the template adds it.
    """

    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Markup:
    """Text of the prompt's own making: what looks like a special token in it is one.

    Nothing that people or tools wrote belongs here.
    """

    text: str


#: A piece of a message.
Part: TypeAlias = str | Picture | GeneratedTokens | ToolCall | Markup


@dataclass(frozen=True)
class Message:
    """One turn of a conversation: text, pictures, generated tokens and calls in any sequence.

    Attributes:
        role: ``"system"``, ``"user"``, ``"assistant"``, or ``"tool"`` for what one call gave. The
            results of several calls follow one another in the order of the calls.
        parts: The pieces, in order. Text is taken literally: it forges no turn, and ``<image>``
            in it stays text. Generated tokens contain the calls that are among them.
        thinking: What the assistant thought before it said this. Templates that know of thoughts
            drop them where models are trained to find them dropped; others have no place for them.

    Raises:
        PromptError: Another role, a part of another type, generated tokens or calls of another
            role than the assistant, or text that is not Unicode.
    """

    role: str
    parts: tuple[Part, ...]
    thinking: str = ""

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise PromptError(
                f"the role of a message is one of {', '.join(_ROLES)}, not {self.role!r}"
            )
        if not isinstance(self.parts, tuple):
            raise PromptError(
                f"the parts of a message come in a tuple, not a {type(self.parts).__name__}"
            )
        if self.thinking and self.role != "assistant":
            raise PromptError(f"thoughts belong to the assistant, not the {self.role}")
        check_unicode(self.thinking)
        for part in self.parts:
            if isinstance(part, str):
                check_unicode(part)
            elif isinstance(part, GeneratedTokens | ToolCall):
                if self.role != "assistant":
                    raise PromptError(
                        "generated tokens and tool calls belong to the assistant, not the "
                        f"{self.role}"
                    )
            elif not isinstance(part, Picture | Markup):
                raise PromptError(
                    f"a message consists of text, pictures, generated tokens and tool calls, not "
                    f"of a {type(part).__name__}; prepare_picture makes pictures"
                )

    @classmethod
    def system(cls, text: str) -> Message:
        """Return a system message."""
        return cls("system", (text,))

    @classmethod
    def user(
        cls,
        text: str,
        pictures: Sequence[Picture] = (),
        videos: Sequence[Sequence[Picture]] = (),
    ) -> Message:
        """Return a user's message with its pictures and videos in place.

        Videos, given as their frames, come first, one after another: for each frame a line
        ``Frame1: <image>``, ``Frame2: <image>`` and so on, as in InternVL's example. Markers in the
        text are for pictures alone.

        With as many ``<image>`` markers in the text as pictures, the pictures take their places.
        With none, the pictures come first, each followed by a newline, as in InternVL's ``chat``.
        Without pictures, the text is taken as it is.

        Raises:
            PromptError: The numbers of markers and pictures differ, or there is nothing at all.
        """
        if not isinstance(text, str):
            raise PromptError(
                f"the text of a message must be a string, not a {type(text).__name__}"
            )
        if not (text or pictures or videos):
            raise PromptError("the message is empty; give a text, a picture or a video")
        for picture in [*pictures, *(frame for frames in videos for frame in frames)]:
            if not isinstance(picture, Picture):
                raise PromptError(
                    f"a picture of a message must be a Picture, not a {type(picture).__name__}; "
                    "prepare_picture makes one"
                )
        pieces = text.split(IMAGE_MARKER) if pictures else [text]
        markers = len(pieces) - 1
        if markers == 0:
            pieces = [""] + ["\n"] * len(pictures)
            pieces[-1] += text
        elif markers != len(pictures):
            raise PromptError(
                f"the text has {markers} {IMAGE_MARKER} markers but {len(pictures)} pictures were "
                "given; use as many markers as pictures, or none"
            )
        shown: list[Picture] = []
        texts = [""]  # before, between and after them
        for frames in videos:
            for number, frame in enumerate(frames, start=1):
                texts[-1] += f"Frame{number}: "
                texts.append("\n")
                shown.append(frame)
        texts[-1:] = [texts[-1] + pieces[0], *pieces[1:]]
        shown += pictures
        parts: list[Part] = [texts[0]]
        for picture, piece in zip(shown, texts[1:], strict=True):
            parts += [picture, piece]
        return cls("user", tuple(part for part in parts if part != ""))

    @classmethod
    def assistant(
        cls,
        reply: str | GeneratedTokens,
        tool_calls: Sequence[ToolCall] = (),
        thinking: str = "",
    ) -> Message:
        """Return a reply of the assistant: ids where they are known, else text and calls."""
        return cls("assistant", (reply, *tool_calls), thinking)

    @classmethod
    def tool(cls, result: str) -> Message:
        """Return what a call gave."""
        return cls("tool", (result,))


def check_unicode(text: str) -> None:
    """Check that a text is Unicode.

    Raises:
        PromptError: It has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"the text is not valid Unicode: lone surrogate {text[error.start]!r} at character "
            f"{error.start}"
        ) from None
