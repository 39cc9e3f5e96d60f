"""Answers under way: from the scheduler's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial

import anyio.to_thread

from edgevl.generate.answer import Answer, Usage
from edgevl.generate.generation import Chunk
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.scheduler import Event, Request, Scheduler
from edgevl.preprocess import Prompt
from edgevl.serve.errors import unavailable


@dataclass
class Record:
    """What is known of a request afterwards, for its line in the log and for the metrics.

    Attributes:
        started: ``time.perf_counter()`` when its first line was read.
        request_id: its name.
        ttft_ms: from then to the first token, whatever was waited for.
        answers: those that ended.
        usage: the tokens of all of them.
        aborted: why it ended without a whole response: the ``client`` left, took nothing for too
            long (``stalled``), the server's ``shutdown``, or an error's code.
        error: what failed, if the server did.
    """

    started: float
    request_id: str
    ttft_ms: float | None = None
    answers: list[Answer] = field(default_factory=list)
    usage: Usage | None = None
    aborted: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Question:
    """A prompt, and how to answer it."""

    prompt: Prompt
    params: SamplingParams


async def answer_all(
    scheduler: Scheduler,
    questions: Sequence[Question],
    client: str,
    top_logprobs: int | None,
    record: Record,
) -> AsyncGenerator[tuple[int, Chunk | Answer], None]:
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

    def deliver_to(number: int) -> Callable[[Event], None]:
        def deliver(event: Event) -> None:
            with suppress(RuntimeError):  # the loop was closed by an exit in haste
                loop.call_soon_threadsafe(events.put_nowait, (number, event))

        return deliver

    requests: list[Request] = []
    try:
        for number, question in enumerate(questions):
            if not scheduler.alive:
                raise unavailable("the server stops: ask another one")
            submit = partial(
                scheduler.submit,
                question.prompt,
                question.params,
                deliver_to(number),
                client,
                top_logprobs,
            )
            # A constraint may take seconds to start. Who leaves meanwhile waits for the request, to
            # cancel it.
            requests.append(await anyio.to_thread.run_sync(submit))
        under_way = len(requests)
        while under_way:
            number, event = await events.get()
            if isinstance(event, Exception):
                raise event
            if record.ttft_ms is None:
                record.ttft_ms = 1000 * (time.perf_counter() - record.started)
            if isinstance(event, Answer):
                if event.finish_reason == "cancelled":  # not by us, we would not be here
                    raise unavailable("the server stops: ask another one")
                under_way -= 1
                record.answers.append(event)
            yield number, event
    finally:
        for request in requests:
            request.cancel()


def total_usage(answers: Sequence[tuple[int, Answer]], n: int) -> Usage:
    """Return the tokens of a request: each of its prompts counted once, all answers.

    Args:
        answers: with their numbers; those of a prompt are ``n`` in a row.
        n: answers to each prompt.
    """
    first = [answer.usage for number, answer in answers if number % n == 0]
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in first),
        image_tokens=sum(usage.image_tokens for usage in first),
        completion_tokens=sum(answer.usage.completion_tokens for _, answer in answers),
        cached_tokens=sum(usage.cached_tokens for usage in first),
    )
