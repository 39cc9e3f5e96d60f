"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from edgevl.generate.answer import Answer
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Chunk
from edgevl.generate.sampling import TokenLogprobs
from edgevl.generate.scheduler import Scheduler
from edgevl.generate.tool_calls import ToolCallSplitter
from edgevl.preprocess.tools import Tool, ToolCall
from edgevl.serve.bodies import BodyRoute
from edgevl.serve.conversation import encode
from edgevl.serve.errors import ApiError, blamed_on, error_responses
from edgevl.serve.logprobs import TokenTexts
from edgevl.serve.requests import ChatRequest, PlainFormat
from edgevl.serve.respond import AnswerResponse, Job
from edgevl.serve.responses import (
    CallReply,
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    FunctionReply,
    ReplyMessage,
    TimingsBody,
    UsageBody,
)
from edgevl.serve.sampling import questions
from edgevl.serve.service import service_of
from edgevl.serve.tools import mode_of, shown_tools, with_calls

router = APIRouter(route_class=BodyRoute)

PATH = "/v1/chat/completions"

#: Schemas that are checked at the same time: some take seconds, and hold up only one another.
_CONSTRAINTS = CapacityLimiter(2)

EVENTS = {
    "description": "The answer; with `stream`, as events.",
    "content": {"text/event-stream": {}},
}


@router.post(
    PATH,
    response_model=ChatCompletion,
    responses={200: EVENTS, **error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504)},
)
async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
    """Go on with a conversation that may have pictures and videos."""
    service = service_of(request)
    service.check_name(body.model)
    ignored = service.ignored.headers(body)
    _check(body)

    async def prepare() -> Job:
        loaded = service.loaded(body.model)
        tools = shown_tools(body)
        constraint = None
        if _formatted(body) or mode_of(body.tool_choice) == "required":
            constraint = await to_thread.run_sync(
                _constraint,
                body,
                tools,
                loaded.scheduler,
                abandon_on_cancel=True,
                limiter=_CONSTRAINTS,
            )
        prompt = await encode(body, loaded, _thinking(body), tools)
        most = loaded.scheduler.max_context
        max_tokens = body.max_completion_tokens or body.max_tokens or most
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return Job(
            loaded,
            questions(body, loaded, [prompt], max_tokens, service.settings.max_queue, constraint),
            body.n or 1,
            top_logprobs,
            _ChatWriter(body, loaded.texts, tools),
        )

    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return AnswerResponse(request, prepare, bool(body.stream), include_usage, ignored)


def _thinking(body: ChatRequest) -> bool | None:
    if body.enable_thinking is not None or body.chat_template_kwargs is None:
        return body.enable_thinking
    return body.chat_template_kwargs.enable_thinking


def _formatted(body: ChatRequest) -> bool:
    return body.response_format is not None and body.response_format.type != "text"


def _check(body: ChatRequest) -> None:
    if body.top_logprobs and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    formatted = _formatted(body)
    if _thinking(body) and (formatted or mode_of(body.tool_choice) == "required"):
        param = "response_format" if formatted else "tool_choice"
        raise ApiError(400, f"{param} cannot be kept while thinking: leave one out", param)


def _constraint(
    body: ChatRequest, tools: Sequence[Tool], scheduler: Scheduler
) -> Constraint | None:
    """Return what the answer must be, checked; it may take seconds."""
    with blamed_on("response_format"):
        constraint = with_calls(body, tools, _format(body))
        if constraint is not None:
            scheduler.prepare(constraint)
        return constraint


def _format(body: ChatRequest) -> Constraint | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    if isinstance(wanted, PlainFormat):
        schema, name = wanted.schema_, "response_format.schema"
    else:
        schema, name = wanted.json_schema.schema_, "response_format.json_schema.schema"
    return Constraint.json_schema({"type": "object"} if schema is None else schema, name)


class _Reply:
    """What one answer has said: text, and calls of tools if there are any."""

    def __init__(self, tools: Sequence[Tool], tagged: bool) -> None:
        self.text = ""
        self.calls: list[ToolCall] = []
        # Where calls have tags by construction, an object without them is none.
        self._splitter = ToolCallSplitter(() if tagged else tools) if tools else None

    def add(self, text: str) -> Iterable[ReplyMessage]:
        """Take text; return what is certain of it."""
        return self._messages([text] if self._splitter is None else self._splitter.add(text))

    def finish(self) -> Iterable[ReplyMessage]:
        """Return what was held back."""
        return self._messages(() if self._splitter is None else self._splitter.finish())

    def _messages(self, parts: Iterable[str | ToolCall]) -> Iterable[ReplyMessage]:
        for part in parts:
            if isinstance(part, ToolCall):
                yield ReplyMessage(tool_calls=[_call(part, len(self.calls))])
                self.calls.append(part)
            else:
                yield ReplyMessage(content=part)
                self.text += part


def _call(call: ToolCall, index: int | None = None) -> CallReply:
    function = FunctionReply(name=call.name, arguments=call.arguments)
    reply = CallReply(id=call.id, type="function", function=function)
    if index is not None:
        reply.index = index
    return reply


class _ChatWriter:
    """Writes answers as chat completions."""

    def __init__(self, body: ChatRequest, texts: TokenTexts, tools: Sequence[Tool]) -> None:
        self._model = body.model
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._texts = texts
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._tools = tools
        self._tagged = _formatted(body)
        self._replies: dict[int, _Reply] = {}
        self._tokens: dict[int, list[TokenLogprobs]] = {}
        self._answers: dict[int, Answer] = {}

    def add(self, number: int, chunk: Chunk) -> Iterable[ChatChunk]:
        yield from self._begin(number)
        if self._logprobs:
            self._tokens.setdefault(number, []).extend(chunk.logprobs)
        logprobs = self._texts.chat(chunk.logprobs) if self._logprobs else None
        deltas: list[ReplyMessage] = []
        for piece in filter(None, chunk.pieces):
            if piece.thinking:
                deltas.append(ReplyMessage(reasoning_content=piece))
            else:
                deltas += self._replies[number].add(piece)
        if not deltas and chunk.logprobs:
            deltas = [ReplyMessage(content="")]
        for delta in deltas:
            yield self._chunk(number, delta, logprobs)
            logprobs = ChatLogprobs(content=[]) if self._logprobs else None

    def end(self, number: int, answer: Answer) -> Iterable[ChatChunk]:
        yield from self._begin(number)
        for delta in self._replies[number].finish():
            yield self._chunk(number, delta, None)
        self._answers[number] = answer
        yield self._chunk(number, ReplyMessage(), None, self._finish_reason(number))

    def last(self, usage: UsageBody, timings: TimingsBody) -> ChatChunk:
        return ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=[],
            usage=usage,
            timings=timings,
        )

    def whole(self, usage: UsageBody, timings: TimingsBody) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=[self._choice(number) for number in sorted(self._answers)],
            usage=usage,
            timings=timings,
        )

    def _choice(self, number: int) -> ChatChoice:
        answer = self._answers[number]
        reply = self._replies[number]
        text = reply.text if reply.text or not reply.calls else None
        message = ReplyMessage(role="assistant", content=text, refusal=None)
        if reply.calls:
            message.tool_calls = [_call(call) for call in reply.calls]
        if answer.thinking:
            message.reasoning_content = answer.thinking
        tokens = self._tokens.get(number, [])
        return ChatChoice(
            index=number,
            message=message,
            logprobs=self._texts.chat(tokens) if self._logprobs else None,
            finish_reason=self._finish_reason(number),
        )

    def _finish_reason(self, number: int) -> str:
        reason = self._answers[number].finish_reason
        return "tool_calls" if self._replies[number].calls and reason == "stop" else reason

    def _begin(self, number: int) -> Iterable[ChatChunk]:
        """Yield the first event of an answer, which says whose it is."""
        if number not in self._replies:
            self._replies[number] = _Reply(self._tools, self._tagged)
            yield self._chunk(number, ReplyMessage(role="assistant", content=""), None)

    def _chunk(
        self,
        number: int,
        delta: ReplyMessage,
        logprobs: ChatLogprobs | None,
        finish_reason: str | None = None,
    ) -> ChatChunk:
        chunk = ChatChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=[
                ChatDelta(index=number, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
            ],
        )
        if self._usage:
            chunk.usage = None  # said, as all events but the last say it
        return chunk
