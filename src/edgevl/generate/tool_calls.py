"""Tool calls in what a model says: told apart from the text around them, while it comes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from edgevl.errors import PromptError
from edgevl.generate.text import partial_suffix
from edgevl.preprocess.tools import CALL_END, CALL_START, MAX_TOOL_BYTES, ToolCall

#: A line break before a call belongs to neither: chat templates write one after text.
_STARTS = ("\n" + CALL_START, CALL_START)
#: What a call is read in: strings of JSON must be known, since tags in them mean nothing.
_STEP = re.compile(rf'[^"\\<]+|\\.|"|{CALL_START}|{CALL_END}|<', re.DOTALL)
_HEAD = re.compile(r'\{\s*"name"\s*:\s*"([^"\\]*)"\s*,\s*"arguments"\s*:\s*')


class ToolCallSplitter:
    """Turns pieces of an answer's text into text and tool calls, each as soon as it is certain.

    A call is ``<tool_call>``, JSON with name and arguments, ``</tool_call>``, with white space
    between them, and up to ``MAX_TOOL_BYTES`` characters. What looks like one and is none stays
    text.
    """

    def __init__(self) -> None:
        """Start before the first character."""
        self._held = ""
        self._between = False  # after a call, where white space belongs to nothing
        # In a call, which begins with what is held:
        self._start = ""  # its tag; empty outside of calls
        self._read = 0  # characters looked at
        self._in_string = False

    def add(self, text: str) -> Iterator[str | ToolCall]:
        """Take more text; yield the text and the calls that are now certain, in their order."""
        self._held += text
        while True:
            if not self._start:
                yield from self._text()
                if not self._start:
                    return
            end = self._find_end()
            if end is None:
                if len(self._held) <= MAX_TOOL_BYTES:
                    return
                end = 0
            yield self._end_call(end)

    def finish(self) -> Iterator[str | ToolCall]:
        """Yield what was held back. A call that lacks only its end tag is one."""
        while self._start:
            yield self._end_call(len(self._held))
            yield from self.add("")
        if self._held:
            yield self._held
        self._held = ""

    def _text(self) -> Iterator[str]:
        """Yield text up to where a call starts, or may."""
        if self._between:
            self._held = self._held.lstrip()
            self._between = not self._held
        places = [(self._held.find(start), start) for start in _STARTS if start in self._held]
        if places:
            place, self._start = min(places)
            self._read, self._in_string = len(self._start), False
        else:
            place = len(self._held) - max(partial_suffix(self._held, start) for start in _STARTS)
        text, self._held = self._held[:place], self._held[place:]
        if text:
            yield text

    def _find_end(self) -> int | None:
        """Read on in a call: -> where it ends, at its end tag or before another's start."""
        while step := _STEP.match(self._held, self._read):
            found = step.group()
            rest = self._held[self._read : self._read + len(CALL_END)]
            if found == "<" and (CALL_START.startswith(rest) or CALL_END.startswith(rest)):
                return None  # may become a tag
            if found == '"':
                self._in_string = not self._in_string
            elif not self._in_string and found in (CALL_START, CALL_END):
                return step.start() if found == CALL_START else step.end()
            self._read = step.end()
        return None

    def _end_call(self, end: int) -> str | ToolCall:
        """Return the call that ends there, or, if it is none, its tag, which is text then."""
        call = _parse(self._held[len(self._start) : end].removesuffix(CALL_END))
        piece = self._start if call is None else call
        self._held = self._held[len(self._start) if call is None else end :]
        self._start, self._between = "", call is not None
        return piece


def split_tool_calls(text: str) -> tuple[str, list[ToolCall]]:
    """Return the text of an answer without its tool calls, and these; see `ToolCallSplitter`."""
    splitter = ToolCallSplitter()
    pieces = [*splitter.add(text), *splitter.finish()]
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


def _parse(body: str) -> ToolCall | None:
    body = body.strip()
    head = _HEAD.match(body)
    if head is None or not body.endswith("}"):
        return None
    try:
        return ToolCall(head.group(1), body[head.end() : -1].rstrip())
    except PromptError:
        return None
