"""Chat completions and completions: from a request to its job, from an answer to its reply."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from anyio import CapacityLimiter, to_thread

from edgevl.errors import CheckpointError, PromptError
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Answer, Delta, check_length
from edgevl.generate.scheduler import Scheduler
from edgevl.generate.tool_calls import ToolCallSplitter
from edgevl.preprocess import Message, Prompt
from edgevl.preprocess.messages import Part
from edgevl.preprocess.tools import Tool, ToolCall, check_tools
from edgevl.preprocess.video import DEFAULT_FRAMES
from edgevl.serve.errors import ApiError, blamed_on
from edgevl.serve.requests import (
    AllowedChoice,
    AnyMessage,
    AssistantMessage,
    CallBody,
    ChatRequest,
    CompletionRequest,
    ImagePart,
    NamedTool,
    PlainFormat,
    SystemMessage,
    TextPart,
    Texts,
    ToolMessage,
    UserPart,
)
from edgevl.serve.responses import (
    CallReply,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FunctionReply,
    ReplyMessage,
    TokenTexts,
)
from edgevl.serve.service import Job, Loaded

DEFAULT_MAX_TOKENS = 16

#: Prompts are encoded one at a time: a long one may take a hundred megabytes meanwhile.
_ENCODING = CapacityLimiter(1)
#: Schemas that are checked at the same time: some take seconds, and hold up only one another.
_CONSTRAINTS = CapacityLimiter(2)


async def prepare_chat(body: ChatRequest, loaded: Loaded) -> Job:
    """Return what is to be done for a conversation.

    Raises:
        ApiError: the request asks for what cannot be.
    """
    scheduler = loaded.scheduler
    tools = _shown_tools(body)
    constraint = None
    if body.formatted or body.must_call:
        constraint = await to_thread.run_sync(
            _constraint, body, tools, scheduler, abandon_on_cancel=True, limiter=_CONSTRAINTS
        )
    loading = _Loading(body, loaded)
    messages = [
        await loading.message(message, f"messages[{number}]")
        for number, message in _in_order_of_calls(body.messages)
    ]

    def encode() -> list[Prompt]:
        shown = _one_system(messages)
        try:
            return [scheduler.prompts.encode(shown, body.thinking, tools, scheduler.max_context)]
        except CheckpointError as error:
            # Templates refuse sequences of roles that they were not written for.
            raise PromptError(f"the chat template refuses the messages: {error}") from None

    return Job(
        "chatcmpl",
        await _encoded(loaded, "messages", encode),
        body.max_completion_tokens or body.max_tokens or scheduler.max_context,
        (body.top_logprobs or 0) if body.logprobs else None,
        partial(_ChatWriter, body, loaded.texts, tools),
        partial(ChatChunk, object="chat.completion.chunk"),
        partial(ChatCompletion, object="chat.completion"),
        constraint,
    )


class _Loading:
    """Turns the messages of one request into ours."""

    def __init__(self, body: ChatRequest, loaded: Loaded) -> None:
        self._frames = body.frames or DEFAULT_FRAMES
        self._frame_threshold = body.frame_threshold or 0.0
        self._max_tiles = body.max_tiles
        self._media = loaded.media
        self._budget = loaded.media.budget()

    async def message(self, message: AnyMessage, where: str) -> Message:
        if isinstance(message, AssistantMessage):
            with blamed_on(f"{where}.tool_calls"):
                calls = list(map(_tool_call, message.tool_calls or ()))
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
            frames = await self._media.video(
                part.video_url.url, self._frames, self._budget, self._frame_threshold
            )
            return list(Message.user("", videos=[frames]).parts)


def _text(content: Texts) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)


def _tool_call(call: CallBody) -> ToolCall:
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


def _shown_tools(body: ChatRequest) -> list[Tool]:
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


def _constraint(
    body: ChatRequest, tools: Sequence[Tool], scheduler: Scheduler
) -> Constraint | None:
    """Return what the answer must be: text of a format, calls of tools, or either.

    The scheduler checks it, which may take seconds.

    Raises:
        ApiError: a schema uses what cannot be followed.
    """
    constraint: Constraint | None = None
    with blamed_on("response_format"):
        wanted = body.response_format
        if wanted is not None and body.formatted:
            if isinstance(wanted, PlainFormat):
                schema, name = wanted.schema_, "response_format.schema"
            else:
                schema, name = wanted.json_schema.schema_, "response_format.json_schema.schema"
            schema = {"type": "object"} if schema is None else schema
            constraint = Constraint.json_schema(schema, name)
    with blamed_on("tools"):
        if isinstance(body.tool_choice, NamedTool):
            name = body.tool_choice.function.name
            constraint = Constraint.tool_calls([tool for tool in tools if tool.name == name])
        elif body.must_call or (tools and constraint is not None):
            several = body.parallel_tool_calls is not False
            text = None if body.must_call else constraint
            constraint = Constraint.tool_calls(tools, several, text)
    if constraint is not None:
        with blamed_on("response_format"):
            scheduler.prepare(constraint)
    return constraint


async def prepare_completion(body: CompletionRequest, loaded: Loaded) -> Job:
    """Return what is to be done for one text or several, given as text or ids.

    Raises:
        ApiError: the request asks for what cannot be.
    """
    encoder, most = loaded.scheduler.prompts, loaded.scheduler.max_context

    def encode() -> list[Prompt]:
        prompts: list[Prompt] = []
        ids: list[int] = []
        for prompt in body.prompt if isinstance(body.prompt, list) else [body.prompt]:
            if isinstance(prompt, int):
                ids.append(prompt)
            elif isinstance(prompt, str):
                prompts.append(encoder.encode_text(prompt, most))
            else:
                prompts.append(encoder.encode_ids(prompt))
        return prompts or [encoder.encode_ids(ids)]

    completion = partial(Completion, object="text_completion")
    return Job(
        "cmpl",
        await _encoded(loaded, "prompt", encode),
        body.max_tokens or DEFAULT_MAX_TOKENS,
        body.logprobs,
        partial(_CompletionWriter, body, loaded.texts),
        completion,
        completion,
    )


async def _encoded(
    loaded: Loaded, param: str, encode: Callable[[], Sequence[Prompt]]
) -> Sequence[Prompt]:
    """Return the prompts that ``encode`` makes of the field ``param``, beside the event loop.

    Raises:
        ApiError: it makes none, or the context does not hold one and a token of its answer.
    """
    with blamed_on(param):
        prompts = await to_thread.run_sync(encode, limiter=_ENCODING)
        for prompt in prompts:
            check_length(len(prompt.token_ids), loaded.scheduler.max_context)
        return prompts


class _ChatWriter:
    """Writes an answer as a message: text, thoughts, and calls of tools if there are any."""

    def __init__(
        self, body: ChatRequest, texts: TokenTexts, tools: Sequence[Tool], number: int
    ) -> None:
        self._number = number
        self._texts = texts
        self._logprobs = ChatLogprobs(content=[]) if body.logprobs else None
        # Where calls have tags by construction, an object without them is none.
        untagged = () if body.formatted else tools
        self._splitter = ToolCallSplitter(untagged) if tools else None
        self._one_call = body.parallel_tool_calls is False
        self._begun = False
        self._text = ""
        self._calls: list[ToolCall] = []

    @property
    def _full(self) -> bool:
        """Whether what comes yet is not given: there is a call, and only one was asked for."""
        return self._one_call and bool(self._calls)

    def add(self, delta: Delta) -> Iterable[ChatDelta]:
        yield from self._begin()
        if self._full:
            return
        logprobs = None
        if self._logprobs:
            logprobs = self._texts.chat(delta.logprobs)
            self._logprobs.content += logprobs.content
        replies: list[ReplyMessage] = []
        for piece in filter(None, delta.pieces):
            if piece.thinking:
                replies.append(ReplyMessage(reasoning_content=piece))
            else:
                replies += self._said([piece] if not self._splitter else self._splitter.add(piece))
        if not replies and delta.logprobs:
            replies = [ReplyMessage(content="")]
        for reply in replies:
            yield self._delta(reply, logprobs)
            logprobs = ChatLogprobs(content=[]) if self._logprobs else None

    def end(self, answer: Answer) -> Iterable[ChatDelta]:
        yield from self._begin()
        for reply in self._said(self._splitter.finish() if self._splitter else ()):
            yield self._delta(reply)
        yield self._delta(ReplyMessage(), finish_reason=self._finish_reason(answer))

    def whole(self, answer: Answer) -> ChatChoice:
        text = self._text if self._text or not self._calls else None
        message = ReplyMessage(role="assistant", content=text, refusal=None)
        if self._calls:
            message.tool_calls = list(map(_call, self._calls))
        if answer.thinking:
            message.reasoning_content = answer.thinking
        return ChatChoice(
            index=self._number,
            message=message,
            logprobs=self._logprobs,
            finish_reason=self._finish_reason(answer),
        )

    def _finish_reason(self, answer: Answer) -> str:
        called = self._calls and (self._full or answer.finish_reason == "stop")
        return "tool_calls" if called else answer.finish_reason

    def _begin(self) -> Iterator[ChatDelta]:
        """Yield the first event of an answer, which says whose it is."""
        if not self._begun:
            self._begun = True
            yield self._delta(ReplyMessage(role="assistant", content=""))

    def _said(self, parts: Iterable[str | ToolCall]) -> Iterator[ReplyMessage]:
        for part in parts:
            if self._full:
                return
            if isinstance(part, ToolCall):
                yield ReplyMessage(tool_calls=[_call(part, index=len(self._calls))])
                self._calls.append(part)
            else:
                yield ReplyMessage(content=part)
                self._text += part

    def _delta(
        self,
        reply: ReplyMessage,
        logprobs: ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> ChatDelta:
        return ChatDelta(
            index=self._number, delta=reply, logprobs=logprobs, finish_reason=finish_reason
        )


def _call(call: ToolCall, **index: int) -> CallReply:
    function = FunctionReply(name=call.name, arguments=call.arguments)
    return CallReply(id=call.id, type="function", function=function, **index)


class _CompletionWriter:
    """Writes an answer as text: all of the model's, thinking not told apart."""

    def __init__(self, body: CompletionRequest, texts: TokenTexts, number: int) -> None:
        self._number = number
        self._texts = texts
        self._logprobs: CompletionLogprobs | None = None
        if body.logprobs is not None:
            self._logprobs = texts.completion([], 0)
        self._text = ""
        self._characters = 0  # that begin in the tokens so far

    def add(self, delta: Delta) -> Iterable[CompletionChoice]:
        text = "".join(delta.pieces)
        self._text += text
        logprobs = None
        if self._logprobs:
            logprobs = self._texts.completion(delta.logprobs, self._characters)
            self._characters += sum(self._texts.characters(t.token_id) for t in delta.logprobs)
            for name, values in logprobs:
                getattr(self._logprobs, name).extend(values)
        if text or delta.logprobs:
            yield self._choice(text, logprobs)

    def end(self, answer: Answer) -> Iterable[CompletionChoice]:
        yield self._choice("", None, answer.finish_reason)

    def whole(self, answer: Answer) -> CompletionChoice:
        return self._choice(self._text, self._logprobs, answer.finish_reason)

    def _choice(
        self, text: str, logprobs: CompletionLogprobs | None, reason: str | None = None
    ) -> CompletionChoice:
        return CompletionChoice(
            index=self._number, text=text, logprobs=logprobs, finish_reason=reason
        )
