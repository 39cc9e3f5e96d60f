"""Tools, calls and their results as the chat templates of Qwen2.5 and Qwen3 write them.

They become text of system, assistant and user messages here, for any chat template: those of
InternVL know nothing of tools, while the text models, Qwen2.5 and Qwen3, have learned this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgevl.preprocess.messages import Markup, Message, Part
from edgevl.preprocess.tools import CALL_END, CALL_START, Tool, ToolCall

_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    f"within {CALL_START}{CALL_END} XML tags:\n{CALL_START}\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    f"{CALL_END}"
)
_RESULT_START, _RESULT_END = "<tool_response>", "</tool_response>"

#: With these in its text, somebody could forge calls and results.
TAGS = (CALL_START, CALL_END, _RESULT_START, _RESULT_END)


def tools_text(tools: Sequence[Tool]) -> tuple[Part, ...]:
    """Return what tells the model of its tools, for the end of the system message."""
    listed = "\n".join(tool.to_json() for tool in tools)
    return Markup(_BEFORE_TOOLS), listed, Markup(_AFTER_TOOLS)


def spell_out(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with calls as text, and results as messages of the user.

    Results that follow one another become one message. Other parts stay as they are, also tokens
    that the model generated.
    """
    spelled: list[Message] = []
    results: list[Part] = []
    for index, message in enumerate(messages):
        if message.role != "tool":
            spelled.append(replace(message, parts=_with_calls(message.parts)))
            continue
        between = [Markup("\n")] if results else []
        opening, closing = Markup(f"{_RESULT_START}\n"), Markup(f"\n{_RESULT_END}")
        results += [*between, opening, *message.parts, closing]
        if index + 1 == len(messages) or messages[index + 1].role != "tool":
            spelled.append(Message("user", tuple(results)))
            results = []
    return spelled


def _with_calls(parts: Sequence[Part]) -> tuple[Part, ...]:
    spelled: list[Part] = []
    for part in parts:
        if not isinstance(part, ToolCall):
            spelled.append(part)
            continue
        before = "\n" if any(earlier != "" for earlier in spelled) else ""
        call = f'{{"name": "{part.name}", "arguments": {part.arguments}}}'
        spelled += [Markup(f"{before}{CALL_START}\n"), call, Markup(f"\n{CALL_END}")]
    return tuple(spelled)
