"""Tool calls in what a model says: told apart from the text around them, while it comes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence

from edgevl.errors import PromptError
from edgevl.generate.constraint import MAX_CALLS
from edgevl.generate.text import partial_suffix
from edgevl.preprocess.tools import CALL_END, CALL_START, MAX_TOOL_BYTES, Tool, ToolCall

#: A line break before a call belongs to neither: chat templates write one after text.
_STARTS = ("\n" + CALL_START, CALL_START)
#: What a call is read in: strings of JSON must be known, since tags in them mean nothing.
_STEP = re.compile(rf'[^"\\<]+|\\.|"|{CALL_START}|{CALL_END}|<', re.DOTALL)

#: Around the objects of calls: white space, a list's brackets and commas, fences of Markdown.
_FENCES = ("```json", "```tool_call")
_GAP = re.compile(r"(?:[\s\[\],]|```(?:json|tool_call)?(?!\w))*")
_SPACE = re.compile(r"\s*")
#: An underscore that Markdown has escaped, which JSON does not know.
_UNDERSCORE = re.compile(r"(?<!\\)((?:\\\\)*)\\_")
_JSON = json.JSONDecoder()
#: What the object of a call consists of; some of these say nothing.
_KEYS = ("name", "function", "arguments", "parameters", "type", "id")


class ToolCallSplitter:
    """Turns pieces of an answer's text into text and tool calls, each as soon as it is certain.

    A call is ``<tool_call>``, JSON that names a function, ``</tool_call>``, with white space
    between them, and up to ``MAX_TOOL_BYTES`` characters. Models that have not learned the tags
    well leave them out: an answer that is nothing but JSON objects, in Markdown's fences or not,
    is calls if each is one of ``tools``, those that were offered, with arguments that the tool
    takes. What looks like a call and is none stays text.

    The JSON is ``{"name": …, "arguments": {…}}`` in any order, with ``parameters`` for
    ``arguments``, with those as a string of JSON, without any, or inside of ``{"function": {…}}``.
    """

    def __init__(self, tools: Sequence[Tool] = ()) -> None:
        self._tools = {tool.name: tool for tool in tools}
        self._held = ""
        # The answer so far may be calls without tags: these, and what follows them.
        self._bare = bool(tools)
        self._calls: list[ToolCall] = []
        self._rest = ""
        self._between = False  # after a call, where white space belongs to nothing
        # In a call, which begins with what is held:
        self._start = ""  # its tag; empty outside of calls
        self._read = 0  # characters looked at
        self._in_string = False

    def add(self, text: str) -> Iterator[str | ToolCall]:
        """Take more text; yield the text and the calls that are now certain, in their order."""
        self._held += text
        if self._bare:
            self._bare = len(self._held) <= MAX_TOOL_BYTES and self._may_be_calls(text)
            if self._bare:
                return
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
            yield from self._end_call(end)

    def finish(self) -> Iterator[str | ToolCall]:
        """Yield what was held back. A call that lacks only its end tag is one."""
        if self._bare:
            self._bare = False
            if self._calls and _GAP.fullmatch(self._rest):
                self._held = ""
                yield from self._calls
            yield from self.add("")
        while self._start:
            yield from self._end_call(len(self._held))
            yield from self.add("")
        if self._held:
            yield self._held
        self._held = ""

    def _fits(self, call: ToolCall) -> bool:
        tool = self._tools.get(call.name)
        return tool is not None and tool.takes(json.loads(call.arguments))

    def _may_be_calls(self, text: str) -> bool:
        """Read on: whether all that is held may be calls without tags, or become ones."""
        self._rest += text
        if "}" in text:  # which ends an object, perhaps
            calls, self._rest = _calls_in(self._rest)
            self._calls += calls
            if len(self._calls) > MAX_CALLS or not all(map(self._fits, calls)):
                return False
        rest = self._rest[_skip(_GAP, self._rest, 0) :]
        if not rest.startswith("{"):
            return any(fence.startswith(rest) for fence in _FENCES)
        if "}" in text and _members(rest, 0)[0]:  # whole, and no call
            return False
        opening = rest[1:].lstrip()
        key, closed, after = opening[1:].partition('"')
        if not opening.startswith('"'):
            return not opening
        if not closed:
            return any(known.startswith(key) for known in _KEYS)
        name, closed, _ = after.lstrip().removeprefix(":").lstrip()[1:].partition('"')
        if key != "name" or "\\" in name:
            return key in _KEYS
        return name in self._tools if closed else any(tool.startswith(name) for tool in self._tools)

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

    def _end_call(self, end: int) -> Sequence[str | ToolCall]:
        """Return the calls that end there, or, if they are none, the tag, which is text then."""
        calls, rest = _calls_in(self._held[len(self._start) : end].removesuffix(CALL_END))
        whole = calls and _GAP.fullmatch(rest)
        pieces: Sequence[str | ToolCall] = calls if whole else [self._start]
        self._held = self._held[end if pieces is calls else len(self._start) :]
        self._start, self._between = "", pieces is calls
        return pieces


def split_tool_calls(text: str, tools: Sequence[Tool] = ()) -> tuple[str, list[ToolCall]]:
    """Return the text of an answer without its tool calls, and these; see `ToolCallSplitter`.

    Args:
        text: what the model said.
        tools: those that were offered; calls without tags are found with them only.
    """
    splitter = ToolCallSplitter(tools)
    pieces = [*splitter.add(text), *splitter.finish()]
    calls = [piece for piece in pieces if isinstance(piece, ToolCall)]
    return "".join(piece for piece in pieces if isinstance(piece, str)), calls


def _calls_in(text: str) -> tuple[list[ToolCall], str]:
    """Return the calls that a text begins with, and what follows the last."""
    text = _UNDERSCORE.sub(r"\1_", text)
    calls: list[ToolCall] = []
    end = 0
    while True:
        members, after = _members(text, _skip(_GAP, text, end))
        call = _call(members)
        if call is None:
            return calls, text[end:]
        calls.append(call)
        end = after


def _members(text: str, at: int) -> tuple[dict[str, str], int]:
    """Return the members of an object, each value as it is written, and where it ends, if whole."""
    members: dict[str, str] = {}
    follows = "{"
    try:
        while text[at : at + 1] == follows:
            name, at = _JSON.raw_decode(text, _skip(_SPACE, text, at + 1))
            at = _skip(_SPACE, text, at)
            if not isinstance(name, str) or text[at : at + 1] != ":":
                break
            start = _skip(_SPACE, text, at + 1)
            _, at = _JSON.raw_decode(text, start)
            members[name] = text[start:at]
            at = _skip(_SPACE, text, at)
            if text[at : at + 1] == "}":
                return members, at + 1
            follows = ","
    except (ValueError, RecursionError):
        pass
    return {}, at


def _call(members: dict[str, str]) -> ToolCall | None:
    """Return the call that an object makes."""
    function = members.get("function", "")
    if function.startswith("{") and "name" not in members:
        members = _members(function, 0)[0]
    if not members.keys() <= set(_KEYS) or {"arguments", "parameters"} <= members.keys():
        return None
    name = json.loads(members.get("name") or members.get("function") or "null")
    arguments = members.get("arguments") or members.get("parameters") or "null"
    if arguments.startswith('"'):
        arguments = json.loads(arguments).strip()
    try:
        return ToolCall(name, "{}" if arguments in ("", "null") else arguments)
    except PromptError:
        return None


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return where what the pattern matches at a place ends."""
    match = pattern.match(text, at)
    return match.end() if match else at
