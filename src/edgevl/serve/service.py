"""What answers requests: the model and what else all of them share, and the response to each.

A request for answers is a job of prompts. Its response is streamed as events, or sent whole, while
the client is watched. Answers come from the scheduler's thread into a queue of the event loop, so
that no client can hold up another.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any, Protocol, TypeAlias

import anyio
from anyio import to_thread
from fastapi import Request
from pydantic import BaseModel
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgevl.errors import EdgeVLError
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Answer, Delta, Usage
from edgevl.generate.model import Model
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.scheduler import Event, Scheduler
from edgevl.generate.scheduler import Request as Generating
from edgevl.preprocess import Prompt
from edgevl.serve.errors import ApiError, as_api_error, blamed_on, stopping, timed_out, unavailable
from edgevl.serve.media import Fetcher, Media
from edgevl.serve.requests import MAX_ANSWERS, IgnoredFields, Sampling
from edgevl.serve.responses import TimingsBody, TokenTexts, UsageBody
from edgevl.serve.settings import Settings
from edgevl.serve.telemetry import Metrics, Record

#: Seeds of the API may be negative, the sampler's may not.
_SEEDS = 2**64


@dataclass(frozen=True)
class Loaded:
    """What there is once the model is loaded; ``sampling`` are the checkpoint's defaults."""

    scheduler: Scheduler
    media: Media
    texts: TokenTexts
    sampling: Mapping[str, Any]


class Service:
    """What all requests share.

    Attributes:
        settings: What the operator decides.
        created: Unix time in seconds of the server's start.
        metrics: What Prometheus reads.
        ignored: What is said of fields that are not known.
    """

    def __init__(self, settings: Settings) -> None:
        """Be alive, but not ready: `start` comes with the model."""
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics()
        self.ignored = IgnoredFields(settings.strict)
        self._loaded: Loaded | None = None
        self._path = settings.name  # of the model, once it is known

    def start(self, model: Model) -> Scheduler:
        """Take a model and be ready; return what answers with it. From any thread."""
        scheduler = Scheduler(model, max_queue=self.settings.max_queue)
        fetcher = Fetcher(self.settings.allowed_hosts)
        self.metrics.watch(scheduler)
        self._path = str(model.checkpoint.path)
        self._loaded = Loaded(
            scheduler,
            Media(model.checkpoint, scheduler.max_context, fetcher),
            TokenTexts(scheduler.prompts.tokenizer),
            model.checkpoint.config.sampling,
        )
        return scheduler

    def close(self) -> None:
        """Take no more requests; wait for those under way, up to ``grace_s``; cancel the rest."""
        if self._loaded is not None:
            self._loaded.scheduler.close(self.settings.grace_s)

    @property
    def scheduler(self) -> Scheduler | None:
        """The scheduler, once the model is loaded."""
        return self._loaded.scheduler if self._loaded else None

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return self._loaded is not None and self._loaded.scheduler.alive

    def loaded(self) -> Loaded:
        """Return what answers requests.

        Raises:
            ApiError: it is not ready.
        """
        if self._loaded is None:
            raise unavailable("the model is still being loaded: try again in a while")
        if not self._loaded.scheduler.alive:
            raise stopping()
        return self._loaded

    def check_name(self, name: str) -> None:
        """Check that ``name`` is the model's.

        Raises:
            ApiError: it is not.
        """
        if name != self.settings.name:
            message = f"there is no model of this name here: give {self.settings.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def client_error(self, error: Exception) -> ApiError:
        """Return what a client is told of ``error``: nothing of where the model is.

        Its frames are cleared. They hold bodies and pictures, and may hold on to one another until
        Python looks for such cycles, which may be many requests later.
        """
        cause: BaseException | None = error
        while cause is not None:
            traceback.clear_frames(cause.__traceback__)
            cause = cause.__cause__ or cause.__context__
        failure = as_api_error(error)
        path = rf"(?<![\w./-]){re.escape(self._path)}(?![\w-])"  # nothing that only contains it
        failure.detail.message = re.sub(path, lambda _: self.settings.name, failure.detail.message)
        return failure


class Writer(Protocol):
    """Puts one answer into the form of its endpoint."""

    def add(self, delta: Delta) -> Iterable[BaseModel]:
        """Take what a step added; return the choices of the events that say so."""

    def end(self, answer: Answer) -> Iterable[BaseModel]:
        """Take the end; return the choices of the events that say so."""

    def whole(self, answer: Answer) -> BaseModel:
        """Return the choice of a response that does not stream, after `end`."""


@dataclass(frozen=True)
class Job:
    """What is to be done for a request.

    Attributes:
        kind: what the response's id begins with.
        prompts: what to answer, each as often as the request says.
        max_tokens: most tokens of an answer.
        top_logprobs: alternatives to log for each token; None logs nothing.
        writer: makes what puts an answer into form, of its number.
        event: makes an event of a stream, of its choices.
        reply: makes the whole response.
        constraint: what each answer must be.
    """

    kind: str
    prompts: Sequence[Prompt]
    max_tokens: int
    top_logprobs: int | None
    writer: Callable[[int], Writer]
    event: Callable[..., BaseModel]
    reply: Callable[..., BaseModel]
    constraint: Constraint | None = None


#: Says what is to be done for a body, with what is loaded.
Prepare: TypeAlias = Callable[[Any, Loaded], Awaitable[Job]]


def all_params(body: Sampling, job: Job, loaded: Loaded, max_queue: int) -> list[SamplingParams]:
    """Return how each prompt of a job is answered: ``n`` times, with seeds that count up.

    Raises:
        ApiError: more answers than may wait, or a parameter is out of its range.
    """
    n = body.n or 1
    most = min(MAX_ANSWERS, max_queue)
    if n * len(job.prompts) > most:
        raise ApiError(400, f"n: at most {most} answers to all prompts together", "n")
    given = body.options() | {"max_tokens": job.max_tokens, "constraint": job.constraint}
    if body.seed is not None:
        given["seed"] = body.seed % _SEEDS
    with blamed_on("logit_bias"):  # all else has been checked with the body
        params = SamplingParams.resolve(loaded.sampling, given)
        params.check_tokens(loaded.scheduler.prompts.tokenizer)
    if params.seed is None:
        return [params] * n
    return [replace(params, seed=(params.seed + number) % _SEEDS) for number in range(n)]


async def answers(
    scheduler: Scheduler,
    questions: Iterable[tuple[Prompt, SamplingParams]],
    client: str,
    top_logprobs: int | None,
    record: Record,
) -> AsyncGenerator[tuple[int, Delta | Answer], None]:
    """Queue all questions; yield what comes, with the number of the question.

    Whoever leaves early, by closing the generator, stops what is being computed.

    Raises:
        QueueFullError: too many wait.
        ContextLengthError: a prompt is not shorter than the context.
        ApiError: the server stops.
        EdgeVLError: an answer cannot be computed.
    """
    loop = asyncio.get_running_loop()
    # What waits here is bounded by the tokens that may be generated: a reader that is slow holds
    # nobody else up.
    events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()

    def submit(number: int, prompt: Prompt, params: SamplingParams) -> Generating:
        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed by an exit in haste
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return scheduler.submit(prompt, params, deliver, client, top_logprobs)

    requests: list[Generating] = []
    try:
        for number, question in enumerate(questions):
            if not scheduler.alive:
                raise stopping()
            # A constraint may take seconds to start. Who leaves meanwhile waits for the request, to
            # cancel it.
            requests.append(await to_thread.run_sync(submit, number, *question))
        under_way = len(requests)
        while under_way:
            number, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if record.ttft_ms is None:
                record.ttft_ms = 1000 * (time.perf_counter() - record.started)
            if isinstance(event, Answer):
                if event.finish_reason == "cancelled":  # not by us, we would not be here
                    raise stopping()
                under_way -= 1
                record.answers.append(event)
            yield number, event
    finally:
        for request in requests:
            request.cancel()


def total_usage(ended: Sequence[Answer], n: int) -> Usage:
    """Return the tokens of a request, each prompt once: ``n`` answers in a row are to one."""
    first = [answer.usage for answer in ended[::n]]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in first),
        image_tokens=sum(usage.image_tokens for usage in first),
        completion_tokens=sum(answer.usage.completion_tokens for answer in ended),
        cached_tokens=sum(usage.cached_tokens for usage in first),
    )


class AnswerResponse(Response):
    """The response to a request for answers.

    A client that leaves stops the computation at once, whatever is being done: decoding pictures,
    waiting, generating. So does one that takes nothing of a stream for too long.
    """

    def __init__(self, request: Request, body: Sampling, prepare: Prepare) -> None:
        """Do nothing yet but check that the model is there.

        Raises:
            ApiError: it is not.
        """
        self._service: Service = request.app.state.service
        self._service.check_name(body.model)
        self._stream = bool(body.stream)
        super().__init__(media_type="text/event-stream" if self._stream else "application/json")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self._body = body
        self._prepare = prepare
        self._client = request.client.host if request.client else ""  # clients take turns
        self._record: Record = request.scope["edgevl.record"]
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
        timeout_s = self._service.settings.timeout_s
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
        self._body.check()
        loaded = self._service.loaded()
        job = await self._prepare(self._body, loaded)
        params = all_params(self._body, job, loaded, self._service.settings.max_queue)
        questions = [(prompt, each) for prompt in job.prompts for each in params]
        options = self._body.stream_options
        include_usage = bool(options and options.include_usage)
        head: dict[str, Any] = {
            "id": f"{job.kind}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": self._body.model,
        }
        unknown = {"usage": None} if include_usage else {}  # said, as the last event will have it
        writers = [job.writer(number) for number in range(len(questions))]
        ended: dict[int, Answer] = {}
        async with aclosing(
            answers(loaded.scheduler, questions, self._client, job.top_logprobs, self._record)
        ) as events:
            async for number, event in events:
                if isinstance(event, Answer):
                    ended[number] = event
                    choices = writers[number].end(event)
                else:
                    choices = writers[number].add(event)
                for choice in choices:
                    if self._stream:
                        yield job.event(**head, choices=[choice], **unknown)
        self._record.usage = total_usage([ended[i] for i in sorted(ended)], len(params))
        usage = {
            "usage": UsageBody.of(self._record.usage),
            "timings": TimingsBody.model_validate(ended[0].timings),
        }
        if not self._stream:
            choices = [writer.whole(ended[number]) for number, writer in enumerate(writers)]
            yield job.reply(**head, choices=choices, **usage)
        elif include_usage:
            yield job.event(**head, choices=[], **usage)

    async def _event(self, send: Send, data: str, more: bool = True) -> None:
        await self._part(send, f"data: {data}\n\n".encode(), more)

    async def _part(self, send: Send, body: bytes, more: bool) -> None:
        """Send a part of the body, and the head before the first.

        Raises:
            _StalledError: the client takes nothing.
        """
        with anyio.move_on_after(self._service.settings.stall_s) as scope:
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
