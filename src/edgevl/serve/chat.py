"""``POST /v1/chat/completions``."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Iterable

from fastapi import APIRouter, Request
from starlette.responses import Response

from edgevl.generate.answer import Answer
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Chunk
from edgevl.generate.logprobs import TokenLogprobs
from edgevl.serve.conversation import encode
from edgevl.serve.errors import ApiError, blamed_on, error_responses
from edgevl.serve.logprobs import TokenTexts
from edgevl.serve.requests import ChatRequest, PlainFormat
from edgevl.serve.respond import AnswerResponse, Plan
from edgevl.serve.responses import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ReplyMessage,
    TimingsBody,
    UsageBody,
)
from edgevl.serve.sampling import questions
from edgevl.serve.service import service_of

router = APIRouter()

PATH = "/v1/chat/completions"

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
    _check(body)

    async def prepare() -> Plan:
        loaded = service.loaded(body.model)
        constraint = await _constraint(body)
        prompt = await encode(body, loaded, _thinking(body))
        most = loaded.scheduler.max_context
        max_tokens = body.max_completion_tokens or body.max_tokens or most
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        return Plan(
            loaded,
            questions(body, [prompt], max_tokens, service.settings.max_queue, constraint),
            body.n or 1,
            top_logprobs,
            _ChatWriter(body, loaded.texts),
        )

    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return AnswerResponse(request, prepare, bool(body.stream), include_usage)


def _thinking(body: ChatRequest) -> bool:
    arguments = body.chat_template_kwargs
    return bool(body.enable_thinking or (arguments and arguments.enable_thinking))


def _check(body: ChatRequest) -> None:
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
    if body.stream_options and not body.stream:
        raise ApiError(400, "stream_options needs stream: true", "stream_options")
    if _thinking(body) and body.response_format and body.response_format.type != "text":
        raise ApiError(
            400, "response_format cannot be kept while thinking: leave one out", "response_format"
        )


async def _constraint(body: ChatRequest) -> Constraint | None:
    wanted = body.response_format
    if wanted is None or wanted.type == "text":
        return None
    with blamed_on("response_format"):
        if isinstance(wanted, PlainFormat):
            return await asyncio.to_thread(Constraint.json_object)
        schema = wanted.json_schema.schema_
        if schema is None:
            schema = {"type": "object"}
        return await asyncio.to_thread(Constraint.json_schema, schema)


class _ChatWriter:
    """Writes answers as chat completions."""

    def __init__(self, body: ChatRequest, texts: TokenTexts) -> None:
        self._model = body.model
        self._logprobs = bool(body.logprobs)
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._texts = texts
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._begun: set[int] = set()
        self._tokens: dict[int, list[TokenLogprobs]] = {}
        self._answers: dict[int, Answer] = {}

    def add(self, number: int, chunk: Chunk) -> Iterable[ChatChunk]:
        yield from self._begin(number)
        if self._logprobs:
            self._tokens.setdefault(number, []).extend(chunk.logprobs)
        logprobs = self._texts.chat(chunk.logprobs) if self._logprobs else None
        pieces = [piece for piece in chunk.pieces if piece]
        for piece in pieces:
            delta = (
                ReplyMessage(reasoning_content=piece)
                if piece.thinking
                else ReplyMessage(content=piece)
            )
            yield self._chunk(number, delta, logprobs)
            logprobs = ChatLogprobs(content=[]) if self._logprobs else None
        if not pieces and chunk.logprobs:
            yield self._chunk(number, ReplyMessage(content=""), logprobs)

    def end(self, number: int, answer: Answer) -> Iterable[ChatChunk]:
        yield from self._begin(number)
        self._answers[number] = answer
        yield self._chunk(number, ReplyMessage(), None, answer.finish_reason)

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
        message = ReplyMessage(role="assistant", content=answer.text, refusal=None)
        if answer.thinking:
            message.reasoning_content = answer.thinking
        tokens = self._tokens.get(number, [])
        return ChatChoice(
            index=number,
            message=message,
            logprobs=self._texts.chat(tokens) if self._logprobs else None,
            finish_reason=answer.finish_reason,
        )

    def _begin(self, number: int) -> Iterable[ChatChunk]:
        """Yield the first event of an answer, which says whose it is."""
        if number not in self._begun:
            self._begun.add(number)
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
