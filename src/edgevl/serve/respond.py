"""Responses that are computed while the client is watched: streamed as events, or whole."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Protocol

import anyio
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgevl.errors import EdgeVLError
from edgevl.generate.answer import Answer, Timings, Usage
from edgevl.generate.generation import Chunk
from edgevl.serve.answers import Question, answer_all, total_usage
from edgevl.serve.errors import ApiError, timed_out
from edgevl.serve.responses import PromptTokensDetails, TimingsBody, UsageBody
from edgevl.serve.service import Loaded, client_of, record_of, service_of


class Writer(Protocol):
    """Puts the answers to a request into the form of its endpoint."""

    def add(self, number: int, chunk: Chunk) -> Iterable[BaseModel]:
        """Take what a step added to answer ``number``; return the events that say so."""

    def end(self, number: int, answer: Answer) -> Iterable[BaseModel]:
        """Take the end of answer ``number``; return the events that say so."""

    def last(self, usage: UsageBody, timings: TimingsBody) -> BaseModel:
        """Return the event with the usage."""

    def whole(self, usage: UsageBody, timings: TimingsBody) -> BaseModel:
        """Return the response of a request that does not stream."""


@dataclass(frozen=True)
class Job:
    """What is to be done for a request.

    Attributes:
        loaded: what does it.
        questions: what to answer, ``n`` in a row for each prompt.
        n: answers to each prompt.
        top_logprobs: alternatives to log for each token; None logs nothing.
        writer: puts it into form.
    """

    loaded: Loaded
    questions: list[Question]
    n: int
    top_logprobs: int | None
    writer: Writer


class AnswerResponse(Response):
    """The response to a request for answers.

    A client that leaves stops the computation at once, whatever is being done: decoding pictures,
    waiting, generating. So does one that takes nothing of a stream for too long.
    """

    def __init__(
        self,
        request: Request,
        prepare: Callable[[], Awaitable[Job]],
        stream: bool,
        include_usage: bool,
        headers: Mapping[str, str],
    ) -> None:
        """Do nothing yet.

        Args:
            request: whose body has been read.
            prepare: says what is to be done.
            stream: send events as they come.
            include_usage: send one with the usage, the last.
            headers: to send besides.
        """
        super().__init__(
            media_type="text/event-stream" if stream else "application/json", headers=headers
        )
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self._prepare = prepare
        self._stream = stream
        self._include_usage = include_usage
        self._client = client_of(request)
        self._record = record_of(request)
        self._service = service_of(request)
        self._settings = self._service.settings
        self._begun = self._ended = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and send the response; errors before its first byte are raised."""
        failure: Exception | None = None
        async with anyio.create_task_group() as group:

            async def leave_with_client() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                if not self._ended:
                    self._record.aborted = "client"
                group.cancel_scope.cancel()

            group.start_soon(leave_with_client)
            try:
                await self._send_within_time(send)
            except Exception as error:
                failure = error
            group.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _send_within_time(self, send: Send) -> None:
        timeout_s = self._settings.timeout_s
        try:
            with anyio.move_on_after(timeout_s) as scope:
                await self._send(send)
            if scope.cancelled_caught:
                raise timed_out(timeout_s)
        except _StalledError:
            self._record.aborted = "stalled"  # the response stays unfinished: the server hangs up
        except Exception as error:
            if not self._begun:
                raise
            failure = self._service.client_error(error)
            self._record.aborted = failure.detail.code or failure.detail.type
            if failure.status == HTTPStatus.INTERNAL_SERVER_ERROR:
                self._record.error = failure.detail.message
            with suppress(_StalledError):
                await self._event(send, json.dumps(failure.body()), more=False)
            if not isinstance(error, ApiError | EdgeVLError):
                raise

    async def _send(self, send: Send) -> None:
        async with aclosing(self._models()) as models:
            if not self._stream:
                (model,) = [model async for model in models]
                body = _json(model).encode()
                self.headers["content-length"] = str(len(body))
                await self._part(send, body, more=False)
                return
            async for model in models:
                await self._event(send, _json(model))
        # The end comes with it: a client that leaves on reading this has not left early.
        await self._event(send, "[DONE]", more=False)

    async def _models(self) -> AsyncGenerator[BaseModel, None]:
        """Yield the events, or the whole response."""
        job = await self._prepare()
        writer, record = job.writer, self._record
        answers: list[tuple[int, Answer]] = []
        async with aclosing(
            answer_all(job.loaded.scheduler, job.questions, self._client, job.top_logprobs, record)
        ) as events:
            async for number, event in events:
                if isinstance(event, Answer):
                    answers.append((number, event))
                    models = writer.end(number, event)
                else:
                    models = writer.add(number, event)
                for model in models:
                    if self._stream:
                        yield model
        record.usage = total_usage(answers, job.n)
        usage, timings = _usage(record.usage), _timings(min(answers)[1].timings)
        if not self._stream:
            yield writer.whole(usage, timings)
        elif self._include_usage:
            yield writer.last(usage, timings)

    async def _event(self, send: Send, data: str, more: bool = True) -> None:
        await self._part(send, f"data: {data}\n\n".encode(), more)

    async def _part(self, send: Send, body: bytes, more: bool) -> None:
        """Send a part of the body, and the head before the first.

        Raises:
            _StalledError: the client takes nothing.
        """
        with anyio.move_on_after(self._settings.stall_s) as scope:
            if not self._begun:
                self._begun = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                )
            self._ended = not more
            await send({"type": "http.response.body", "body": body, "more_body": more})
        if scope.cancelled_caught:
            raise _StalledError


class _StalledError(Exception):
    """The client has taken nothing for too long."""


def _json(model: BaseModel) -> str:
    return model.model_dump_json(exclude_unset=True)


def _usage(usage: Usage) -> UsageBody:
    return UsageBody(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=usage.cached_tokens, image_tokens=usage.image_tokens
        ),
    )


def _timings(timings: Timings) -> TimingsBody:
    return TimingsBody(
        vision_ms=timings.vision_ms,
        prefill_ms=timings.prefill_ms,
        ttft_ms=timings.ttft_ms,
        decode_ms_per_token=timings.decode_ms_per_token,
        decode_tokens_per_s=timings.decode_tokens_per_s,
    )
