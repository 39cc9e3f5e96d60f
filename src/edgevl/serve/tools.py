"""Tools of a chat request: what the model is shown of them, what is forced, calls and results."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import Any

from edgevl.generate.constraint import Constraint
from edgevl.preprocess.tools import Tool, ToolCall, check_tools
from edgevl.serve.errors import ApiError, blamed_on
from edgevl.serve.requests import (
    AllowedChoice,
    AnyMessage,
    AssistantMessage,
    ChatRequest,
    NamedTool,
    ToolChoice,
    ToolMessage,
)


def shown_tools(body: ChatRequest) -> list[Tool]:
    """Return the tools that the model is told of.

    Raises:
        ApiError: one is malformed, or ``tool_choice`` asks for one that is not there.
    """
    tools = []
    for number, given in enumerate(body.tools or ()):
        with blamed_on(f"tools[{number}].function"):
            function = given.function
            tools.append(Tool(function.name, function.description or "", function.parameters))
    with blamed_on("tools"):
        check_tools(tools)
    choice = body.tool_choice
    chosen: list[str] | None = None
    if isinstance(choice, NamedTool):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedChoice):
        chosen = [tool.function.name for tool in choice.allowed_tools.tools]
    for name in chosen or ():
        if name not in [tool.name for tool in tools]:
            raise ApiError(
                400, f"tool_choice: no tool is named {name!r}: add it to tools", "tool_choice"
            )
    if isinstance(choice, AllowedChoice):
        tools = [tool for tool in tools if tool.name in (chosen or ())]
    if mode_of(choice) == "required" and not tools:
        raise ApiError(400, "tool_choice: required needs tools", "tool_choice")
    return [] if choice == "none" else tools


def mode_of(choice: ToolChoice) -> str:
    """Return whether tools may be called (``auto``), must be (``required``), or not (``none``)."""
    if isinstance(choice, AllowedChoice):
        return choice.allowed_tools.mode
    return "required" if isinstance(choice, NamedTool) else choice or "auto"


def with_calls(
    body: ChatRequest, tools: Sequence[Tool], text: Constraint | None
) -> Constraint | None:
    """Return the constraint on an answer that may call tools, or must.

    Args:
        body: says so, by ``tool_choice``.
        tools: that the model is told of.
        text: the constraint on what it says if it calls none.

    Raises:
        ApiError: a tool's parameters use what cannot be followed.
    """
    choice = body.tool_choice
    with blamed_on("tools"):
        if isinstance(choice, NamedTool):
            return Constraint.tool_calls([t for t in tools if t.name == choice.function.name])
        several = body.parallel_tool_calls is not False
        if mode_of(choice) == "required":
            return Constraint.tool_calls(tools, several)
        if tools and text is not None:
            return Constraint.tool_calls(tools, several, text)
    return text


def calls_of(message: AssistantMessage) -> list[ToolCall]:
    """Return the calls of an earlier answer.

    Raises:
        PromptError: one is malformed.
    """
    return [
        ToolCall(call.function.name, _arguments(call.function.arguments), call.id)
        for call in message.tool_calls or ()
    ]


def _arguments(given: str | dict[str, Any] | None) -> str:
    """Return arguments as JSON; clients have several ways to say that there are none."""
    if isinstance(given, dict):
        return json.dumps(given, ensure_ascii=False)
    return given if given and given.strip() else "{}"


def in_order_of_calls(messages: Sequence[AnyMessage]) -> list[tuple[int, AnyMessage]]:
    """Return messages with their numbers, results of tools in the order of their calls.

    Models are not shown the ids: which result is of which call, they know by the order.

    Raises:
        ApiError: a result is of no call, or a call has no result or several.
    """
    ordered: list[tuple[int, AnyMessage]] = []
    calls: list[str] = []  # whose results must come now
    results: dict[str, tuple[int, AnyMessage]] = {}
    for number, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            call_id = message.tool_call_id
            if call_id not in calls or call_id in results:
                raise ApiError(
                    400,
                    f"messages[{number}].tool_call_id: {call_id!r} is not that of a call in the "
                    "assistant message before, or has a result already",
                    f"messages[{number}].tool_call_id",
                )
            results[call_id] = (number, message)
            if len(results) == len(calls):
                ordered += [results[call_id] for call_id in calls]
                calls, results = [], {}
            continue
        if calls:
            raise _missing(number, calls, results)
        ordered.append((number, message))
        if isinstance(message, AssistantMessage):
            calls = [call.id for call in message.tool_calls or ()]
    if calls:
        raise _missing(len(messages), calls, results)
    return ordered


def _missing(number: int, calls: Sequence[str], results: Collection[str]) -> ApiError:
    missing = next(call_id for call_id in calls if call_id not in results)
    return ApiError(
        400,
        f"messages[{number}]: the result of the tool call {missing!r} must come before it, in a "
        "message of the role tool",
        "messages",
    )
