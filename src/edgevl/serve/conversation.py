"""A chat request to a prompt, with its pictures and tools, and to what its answer must be."""

from __future__ import annotations

import json
from collections.abc import Sequence

from edgevl.errors import CheckpointError, PromptError
from edgevl.generate.constraint import Constraint
from edgevl.generate.scheduler import Scheduler
from edgevl.preprocess import Message, Prompt
from edgevl.preprocess.messages import Part
from edgevl.preprocess.tools import Tool, ToolCall, check_tools
from edgevl.preprocess.video import DEFAULT_FRAMES
from edgevl.serve.errors import ApiError, blamed_on
from edgevl.serve.job import encoded
from edgevl.serve.requests import (
    AllowedChoice,
    AnyMessage,
    AssistantMessage,
    CallBody,
    ChatRequest,
    ImagePart,
    NamedTool,
    PlainFormat,
    SystemMessage,
    TextPart,
    Texts,
    ToolMessage,
    UserPart,
)
from edgevl.serve.service import Loaded


async def encode(body: ChatRequest, loaded: Loaded, tools: Sequence[Tool]) -> Sequence[Prompt]:
    """Load the pictures of a conversation; return its prompt, with the tools that are shown.

    Raises:
        ApiError: a picture or video cannot be had, or the messages make no prompt.
    """
    loading = _Loading(body, loaded)
    messages = [
        await loading.message(message, f"messages[{number}]")
        for number, message in _in_order_of_calls(body.messages)
    ]

    def prompts() -> Sequence[Prompt]:
        scheduler = loaded.scheduler
        try:
            return [
                scheduler.prompts.encode(
                    _one_system(messages), body.thinking, tools, scheduler.max_context
                )
            ]
        except CheckpointError as error:
            # Templates refuse sequences of roles that they were not written for.
            raise PromptError(f"the chat template refuses the messages: {error}") from None

    return await encoded(loaded, "messages", prompts)


class _Loading:
    """Turns the messages of one request into ours."""

    def __init__(self, body: ChatRequest, loaded: Loaded) -> None:
        self._frames = body.frames or DEFAULT_FRAMES
        self._max_tiles = body.max_tiles
        self._media = loaded.media
        self._budget = loaded.media.budget()

    async def message(self, message: AnyMessage, where: str) -> Message:
        if isinstance(message, AssistantMessage):
            with blamed_on(f"{where}.tool_calls"):
                calls = list(map(_call, message.tool_calls or ()))
            with blamed_on(f"{where}.content"):
                said = _text(message.content or message.refusal or "")
                return Message.assistant(said, calls, message.reasoning_content or "")
        with blamed_on(f"{where}.content"):
            if isinstance(message, SystemMessage):
                return Message.system(_text(message.content))
            if isinstance(message.content, str):
                return Message(message.role, (message.content,))
        parts: list[Part] = []
        for number, part in enumerate(message.content):
            parts += await self._part(part, f"{where}.content[{number}]")
        with blamed_on(f"{where}.content"):
            return Message(message.role, tuple(parts))

    async def _part(self, part: UserPart, where: str) -> list[Part]:
        """Return a part as `Message.user` puts it: a line for each picture, and for each frame."""
        if isinstance(part, TextPart):
            return [part.text]
        with blamed_on(f"{where}.{part.type}"):
            if isinstance(part, ImagePart):
                max_tiles = 1 if part.image_url.detail == "low" else self._max_tiles
                url = part.image_url.url
                return [await self._media.picture(url, max_tiles, self._budget), "\n"]
            frames = await self._media.video(part.video_url.url, self._frames, self._budget)
            return list(Message.user("", videos=[frames]).parts)


def _text(content: Texts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _call(call: CallBody) -> ToolCall:
    """Return a call with its arguments as JSON; clients have several ways to say that of none."""
    given = call.function.arguments
    if isinstance(given, dict):
        given = json.dumps(given, ensure_ascii=False)
    elif not given or not given.strip():
        given = "{}"
    return ToolCall(call.function.name, given, call.id)


def _one_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Join the system messages at the beginning: most templates know one."""
    count = 0
    while count < len(messages) and messages[count].role == "system":
        count += 1
    if count < 2:
        return messages
    text = "\n\n".join(str(part) for message in messages[:count] for part in message.parts)
    return [Message.system(text), *messages[count:]]


def _in_order_of_calls(messages: Sequence[AnyMessage]) -> list[tuple[int, AnyMessage]]:
    """Return messages with their numbers, results of tools in the order of their calls.

    Models are not shown the ids: which result is of which call, they know by the order.

    Raises:
        ApiError: a result is of no call, or a call has no result or several.
    """
    ordered: list[tuple[int, AnyMessage]] = []
    calls: list[str] = []
    results: dict[str, tuple[int, AnyMessage]] = {}
    for number, message in enumerate([*messages, None]):
        missing = [call_id for call_id in calls if call_id not in results]
        if isinstance(message, ToolMessage):
            call_id = message.tool_call_id
            if call_id not in missing:
                param = f"messages[{number}].tool_call_id"
                raise ApiError(
                    400,
                    f"{param}: {call_id!r} is not that of a call in the assistant message before, "
                    "or has a result already",
                    param,
                )
            results[call_id] = (number, message)
            continue
        if missing:
            raise ApiError(
                400,
                f"messages[{number}]: the result of the tool call {missing[0]!r} must come before "
                "it, in a message of the role tool",
                "messages",
            )
        ordered += [results[call_id] for call_id in calls]
        calls, results = [], {}
        if message is not None:
            ordered.append((number, message))
        if isinstance(message, AssistantMessage):
            calls = [call.id for call in message.tool_calls or ()]
    return ordered


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
    chosen: list[str] = []
    if isinstance(choice, NamedTool):
        chosen = [choice.function.name]
    elif isinstance(choice, AllowedChoice):
        chosen = [tool.function.name for tool in choice.allowed_tools.tools]
    for name in chosen:
        if name not in [tool.name for tool in tools]:
            message = f"tool_choice: no tool is named {name!r}: add it to tools"
            raise ApiError(400, message, "tool_choice")
    if isinstance(choice, AllowedChoice):
        tools = [tool for tool in tools if tool.name in chosen]
    if body.must_call and not tools:
        raise ApiError(400, "tool_choice: required needs tools", "tool_choice")
    return [] if choice == "none" else tools


def constraint_on(
    body: ChatRequest, tools: Sequence[Tool], scheduler: Scheduler
) -> Constraint | None:
    """Return what the answer must be: text of a format, calls of tools, or either.

    It is checked, which may take seconds.

    Args:
        body: says so, by ``response_format`` and ``tool_choice``.
        tools: that the model is told of.
        scheduler: that will follow it.

    Raises:
        ApiError: a schema uses what cannot be followed.
    """
    constraint = _constraint(body, tools)
    if constraint is not None:
        with blamed_on("response_format"):
            scheduler.prepare(constraint)
    return constraint


def _constraint(body: ChatRequest, tools: Sequence[Tool]) -> Constraint | None:
    text: Constraint | None = None
    with blamed_on("response_format"):
        wanted = body.response_format
        if wanted is not None and body.formatted:
            if isinstance(wanted, PlainFormat):
                schema, name = wanted.schema_, "response_format.schema"
            else:
                schema, name = wanted.json_schema.schema_, "response_format.json_schema.schema"
            text = Constraint.json_schema({"type": "object"} if schema is None else schema, name)
    with blamed_on("tools"):
        if isinstance(body.tool_choice, NamedTool):
            name = body.tool_choice.function.name
            return Constraint.tool_calls([tool for tool in tools if tool.name == name])
        if body.must_call or (tools and text is not None):
            several = body.parallel_tool_calls is not False
            return Constraint.tool_calls(tools, several, None if body.must_call else text)
    return text
