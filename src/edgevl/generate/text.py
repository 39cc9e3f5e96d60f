"""Token ids to text, while they come: whole characters, stop strings, thinking apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer

from edgevl.preprocess.tokenizer import SPOKEN_TOKENS

#: What an incomplete UTF-8 sequence decodes to: once, or once for each of its up to 3 bytes.
REPLACEMENT = "\ufffd"
MAX_REPLACEMENTS = 3
#: When so many tokens wait for a character to become whole, most of them are no part of any; the
#: last few are enough to decode those that may be.
MAX_WAITING, KEPT_WAITING = 24, 12


def hidden_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of tokens that are no text: special ones that do not speak."""
    return frozenset(
        token_id
        for token_id, token in tokenizer.get_added_tokens_decoder().items()
        if token.special and token.content not in SPOKEN_TOKENS
    )


class Detokenizer:
    """Turns tokens into text as they come, whole characters at a time.

    Special tokens that steer a conversation are hidden, those that speak are kept.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._hidden = hidden_ids(tokenizer)
        # The tokens of what was given out last, then `_waiting` that are not; `_shown` characters
        # are out. Decoding may depend on the tokens before: a leading space, or bytes in a row,
        # which some tokenizers make characters of only if all of them are whole.
        self._ids: list[int] = []
        self._waiting = 0
        self._shown = 0

    def add(self, token_id: int) -> str:
        """Take the next token and return the text that is now certain."""
        if token_id in self._hidden:
            return ""
        self._ids.append(token_id)
        self._waiting += 1
        text = self._decode()
        if text.endswith(REPLACEMENT):
            if len(self._ids) < MAX_WAITING:
                return ""
            held = min(len(text) - len(text.rstrip(REPLACEMENT)), MAX_REPLACEMENTS)
            piece = text[self._shown : len(text) - held]
            self._ids = self._ids[-KEPT_WAITING:]
            self._shown = len(self._decode()) - held
            return piece
        piece = text[self._shown :]
        self._ids, self._waiting = self._ids[-self._waiting :], 0
        self._shown = len(self._decode())
        return piece

    def finish(self) -> str:
        """Return what is left: bytes that never became a character show as U+FFFD."""
        return self._decode()[self._shown :]

    def _decode(self) -> str:
        text: str = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return text


def spoken_text(tokenizer: Tokenizer, token_ids: Sequence[int]) -> str:
    """Return the text of tokens as an answer shows it, with its thinking."""
    detokenizer = Detokenizer(tokenizer)
    return "".join([*map(detokenizer.add, token_ids), detokenizer.finish()])


class StopStrings:
    """Cuts a stream of text at the first of several strings; with none, text passes through."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._held = ""
        self.found = False

    def add(self, text: str) -> str:
        """Take more text; return what cannot be part of a stop string, up to one that is found."""
        self._held += text
        ends = [at for at in map(self._held.find, self._stop) if at >= 0]
        if ends:
            self.found = True
            piece, self._held = self._held[: min(ends)], ""
            return piece
        safe = len(self._held) - max(
            (partial_suffix(self._held, stop) for stop in self._stop), default=0
        )
        piece, self._held = self._held[:safe], self._held[safe:]
        return piece

    def finish(self) -> str:
        """Return what was held back."""
        piece, self._held = self._held, ""
        return piece


def partial_suffix(text: str, target: str) -> int:
    """Return the length of the longest end of ``text`` that begins, but is not, ``target``."""
    for length in range(min(len(text), len(target) - 1), 0, -1):
        if text.endswith(target[:length]):
            return length
    return 0


class ThinkingSplitter:
    """Tells the thinking part, ``<think>…</think>`` at the start of an answer, from the answer.

    White space around the thoughts belongs to neither. With ``opened`` the prompt ends with the
    opening tag, so that the answer begins with thoughts. A model may repeat the tag.
    """

    OPEN, CLOSE = "<think>", "</think>"

    def __init__(self, opened: bool = False) -> None:
        self._opened = opened
        self._held = ""
        self._state = "undecided"  # then "thinking" (or straight on), "gap", "answer"
        self._begun = False  # the thoughts are

    @property
    def in_thinking(self) -> bool:
        """Whether thoughts have begun, or begin with the answer, and have not ended."""
        return self._state == "thinking" or (self._state == "undecided" and self._opened)

    def add(self, text: str) -> Iterator[tuple[bool, str]]:
        """Take more text; yield (is thinking, text) pieces. The tags are in neither."""
        self._held += text
        if self._state == "undecided":
            start = self._held.lstrip()
            if start.startswith(self.OPEN):
                self._state, self._held = "thinking", start[len(self.OPEN) :]
            elif self.OPEN.startswith(start):
                return  # may still become the tag
            else:
                self._state = "thinking" if self._opened else "answer"
        if self._state == "thinking":
            thought, tag, rest = self._held.partition(self.CLOSE)
            if not self._begun:
                thought = thought.lstrip()
            certain = len(thought) if tag else len(thought) - partial_suffix(thought, self.CLOSE)
            kept = thought[:certain].rstrip()
            if tag:
                self._state, self._held = "gap", rest
            else:
                self._held = thought[len(kept) :]
            if kept:
                self._begun = True
                yield True, kept
        if self._state == "gap":  # blank lines between the two belong to neither
            self._held = self._held.lstrip()
            if self._held:
                self._state = "answer"
        if self._state == "answer" and self._held:
            piece, self._held = self._held, ""
            yield False, piece

    def finish(self) -> Iterator[tuple[bool, str]]:
        """Yield what was held back."""
        thinking = self.in_thinking
        piece = self._held.rstrip() if thinking else self._held
        self._held = ""
        if piece:
            yield thinking, piece


class Piece(str):
    """A piece of streamed text; ``thinking`` tells whether it stands in the thinking part."""

    thinking: bool
    __slots__ = ("thinking",)

    def __new__(cls, text: str, thinking: bool = False) -> Piece:
        """Make a piece."""
        piece = super().__new__(cls, text)
        piece.thinking = thinking
        return piece


class AnswerText:
    """Collects the text of an answer from its tokens and passes it on in pieces.

    It ends before any of the strings ``stop``. With ``thinking`` the prompt has opened thoughts.

    Attributes:
        stops: tells whether a stop string has been reached.
        splitter: tells whether what comes next may still be thinking.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], thinking: bool = False) -> None:
        self._detokenizer = Detokenizer(tokenizer)
        self.stops = StopStrings(stop)
        self.splitter = ThinkingSplitter(thinking)
        self._parts: dict[bool, list[str]] = {False: [], True: []}

    @property
    def text(self) -> str:
        """The answer so far, without thinking."""
        return "".join(self._parts[False])

    @property
    def thinking(self) -> str:
        """The thinking so far."""
        return "".join(self._parts[True])

    def add(self, token_id: int) -> Iterator[Piece]:
        """Take a token; yield the text that is now certain."""
        text = self.stops.add(self._detokenizer.add(token_id))
        yield from self._collect(self.splitter.add(text))

    def finish(self) -> Iterator[Piece]:
        """Yield what was held back, unless a stop string cut it off."""
        if not self.stops.found:
            text = self.stops.add(self._detokenizer.finish())
            text += "" if self.stops.found else self.stops.finish()
            yield from self._collect(self.splitter.add(text))
        yield from self._collect(self.splitter.finish())

    def _collect(self, pieces: Iterator[tuple[bool, str]]) -> Iterator[Piece]:
        for thinking, text in pieces:
            self._parts[thinking].append(text)
            yield Piece(text, thinking)
