"""What must follow in JSON of a schema, laid out as the answer is: a guess, as that is free."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

#: How a model that has shown no habit is taken to lay out JSON: `json.dumps` with this indent.
INDENT = 2
_SPACES = b" \t\r\n"


class JsonForesight:
    """Follows an answer and foresees its text, as far as it lets no choice but white space.

    Where white space is free nothing is forced, so the schema is followed a second time without
    any, and what it forces gets that which the answer has had in such places.

    Args:
        matcher: an ``llguidance.LLMatcher`` of the schema that allows no white space between tokens
            of JSON.
        vocabulary: its ``llguidance.LLTokenizer``.
    """

    def __init__(self, matcher: Any, vocabulary: Any) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._layout = _Layout()

    def add(self, text: bytes) -> None:
        """Take the text of the answer's next token."""
        dense = self._layout.read(text)
        if dense:
            self._matcher.consume_tokens(self._vocabulary.tokenize_bytes(dense))

    def text(self) -> bytes:
        """Return text that is likely to follow; empty where the answer is free to choose."""
        if self._matcher.is_error():
            return b""
        forced = self._matcher.compute_ff_bytes()
        return deepcopy(self._layout).write(forced) if forced else b""


class _Layout:
    """Where a JSON text stands, and the white space that it has, by place."""

    def __init__(self) -> None:
        self._in_string = self._escaped = False
        self._last = 0  # the latest byte that is not white space, outside of strings
        self._space = b""  # since then
        self._items: list[bytes] = []  # before the items of each object and list that is open
        self._first: dict[tuple[int, int], bytes] = {}  # after a bracket, by it and its level
        self._colon = b" "
        self._comma: bytes | None = None  # where the next item is on the same line

    def read(self, text: bytes) -> bytes:
        """Take what follows; return it without white space between tokens of JSON."""
        dense = bytearray()
        for byte in text:
            if not self._in_string and byte in _SPACES:
                self._space += bytes([byte])
            else:
                self._go(byte)
                dense.append(byte)
        return bytes(dense)

    def write(self, dense: bytes) -> bytes:
        """Take what follows, without white space; return it with, if that is as usual so far."""
        if not self._usual(dense[0]).startswith(self._space):
            return b""
        text = bytearray()
        for byte in dense:
            text += self._missing(byte)
            self._go(byte)
            text.append(byte)
        return bytes(text + self._missing(0))  # before a value or an item, whatever it is

    def _missing(self, byte: int) -> bytes:
        """Return the rest of the white space before a byte, and take it."""
        rest = self._usual(byte)[len(self._space) :]
        self._space += rest
        return rest

    def _usual(self, byte: int) -> bytes:
        """Return what white space would be usual before a byte."""
        if self._in_string:
            return b""
        here = self._items[-1] if self._items else b""
        if self._last == ord(":"):
            return self._colon
        if byte in b"}]":
            if self._last in b"{[" or b"\n" not in here:
                return b""
            around = self._items[-2] if len(self._items) > 1 else b""
            return around if b"\n" in around else b"\n"
        if self._last == ord(","):
            return here if b"\n" in here else self._colon if self._comma is None else self._comma
        if self._last in b"{[" and self._last:
            level = len(self._items)
            around = self._items[-2] if level > 1 else b"\n"
            step = INDENT if level == 1 else len(self._items[0]) - 1
            derived = b"\n" + b" " * (level * step) if b"\n" in around else b""
            return self._first.get((self._last, level), derived)
        return b""

    def _go(self, byte: int) -> None:
        """Take a byte that is in a string, or no white space."""
        if self._in_string:
            self._in_string = self._escaped or byte != ord('"')
            self._escaped = byte == ord("\\") and not self._escaped
            return
        closes = byte in b"}]"
        if self._last == ord(":"):
            self._colon = self._space
        elif self._last == ord(",") and self._items:
            self._items[-1] = self._space
            self._comma = self._comma if b"\n" in self._space else self._space
        elif self._last and self._last in b"{[" and not closes:
            self._items[-1] = self._first[self._last, len(self._items)] = self._space
        if closes:
            del self._items[-1:]
        elif byte in b"{[":
            self._items.append(b"")
        self._in_string = byte == ord('"')
        self._last, self._space = byte, b""
