"""Load on an OpenAI-compatible server: clients that each ask one question after another.

It runs on the machine that it measures, so that it must be cheap: aiohttp parses HTTP in C.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

#: Longest time of a request, in seconds: those that wait behind 15 others are not lost.
TIMEOUT_S = 600
#: Characters of a server's message that an error keeps.
MESSAGE_LENGTH = 200


class RequestFailedError(Exception):
    """A request did not get the answer it asked for; the message says what it got."""


@dataclass(frozen=True)
class Answer:
    """What a client got for one request.

    Attributes:
        error: why it counts as failed; the other fields are 0 then.
        ttft_ms: from sending the request to the first text that arrived.
        ms_per_token: from the first text to the last, divided by the tokens after the first.
        output_tokens: as the server counts them, see `AnswerStream.answer`.
        prompt_tokens: likewise; 0 where it does not say.
    """

    error: str = ""
    ttft_ms: float = 0.0
    ms_per_token: float = 0.0
    output_tokens: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True)
class Load:
    """What a server did under load.

    Attributes:
        seconds: from the first request to the end of the last answer.
        processor_seconds: processor time of this process, which shares the machine.
        answers: one for each request.
    """

    seconds: float
    processor_seconds: float
    answers: tuple[Answer, ...]

    @property
    def succeeded(self) -> list[Answer]:
        """The answers without an error."""
        return [answer for answer in self.answers if not answer.error]


class AnswerStream:
    """The server-sent events of one answer: when text came, how it ended, what was counted."""

    def __init__(self) -> None:
        """Nothing has arrived."""
        self._first = self._last = 0.0
        self._finish_reason: str | None = None
        self._usage: dict[str, Any] = {}
        self._pieces = 0
        self._done = False

    def add(self, line: bytes, now: float) -> None:
        """Take a line that arrived at ``now``, in seconds.

        Raises:
            RequestFailedError: it is an error.
            ValueError: it is not JSON.
            LookupError, TypeError, AttributeError: it is not a chunk of an answer.
        """
        if not line.startswith(b"data:"):
            return  # empty lines end events, those with a colon in front are comments
        data = line[len(b"data:") :].strip()
        if data == b"[DONE]":
            self._done = True
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise RequestFailedError(f"in the stream: {str(chunk['error'])[:MESSAGE_LENGTH]}")
        self._usage = chunk.get("usage") or self._usage
        for choice in chunk["choices"]:
            delta = choice.get("delta") or {}
            text = choice.get("text") or delta.get("content") or delta.get("reasoning_content")
            finish_reason = choice.get("finish_reason")
            self._pieces += "text" in choice and not finish_reason
            if text or finish_reason:
                self._first = self._first or now
                self._last = now
            self._finish_reason = finish_reason or self._finish_reason

    def answer(self, begun: float, output_tokens: int) -> Answer:
        """Return the whole answer to a request of ``begun``, in seconds, for so many tokens.

        A server that counts no tokens in streams says by the finish reason "length" that it made
        as many as it was asked for; where it sent more pieces of text, it made more.

        Raises:
            RequestFailedError: the stream broke off, or had another number of tokens.
        """
        if not self._done:
            raise RequestFailedError("the stream ended without [DONE]")
        if self._finish_reason != "length":
            raise RequestFailedError(f"finished by {self._finish_reason!r}, not by its length")
        counted = self._usage.get("completion_tokens", max(self._pieces, output_tokens))
        if self._usage and counted != output_tokens:
            raise RequestFailedError(f"{counted} tokens instead of {output_tokens}")
        return Answer(
            ttft_ms=1000 * (self._first - begun),
            ms_per_token=1000 * (self._last - self._first) / max(counted - 1, 1),
            output_tokens=counted,
            prompt_tokens=self._usage.get("prompt_tokens", 0),
        )


def run_load(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    """Let clients send requests, each its next one when it has the whole answer to its last.

    Args:
        url: of the endpoint.
        bodies: the requests, in the order in which they are sent; streamed, with ``max_tokens``.
        clients: as many as at most wait for an answer at once.
    """
    return asyncio.run(_run_load(url, bodies, clients))


async def _run_load(url: str, bodies: Sequence[dict[str, Any]], clients: int) -> Load:
    waiting = iter(bodies)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    # A connection a request: llama-server closes them after a stream without saying so.
    connector = aiohttp.TCPConnector(limit=clients, force_close=True)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        begun, processor = time.perf_counter(), time.process_time()
        answers = await asyncio.gather(*(_client(session, url, waiting) for _ in range(clients)))
        seconds, processor_seconds = time.perf_counter() - begun, time.process_time() - processor
    return Load(seconds, processor_seconds, tuple(answer for part in answers for answer in part))


async def _client(
    session: aiohttp.ClientSession, url: str, waiting: Iterator[dict[str, Any]]
) -> list[Answer]:
    return [await _ask(session, url, body) for body in waiting]


async def _ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> Answer:
    begun = time.perf_counter()
    stream = AnswerStream()
    try:
        async with session.post(url, json=body) as response:
            if response.status != 200:
                message = (await response.text())[:MESSAGE_LENGTH]
                raise RequestFailedError(f"status {response.status}: {message}")
            async for line in response.content:
                stream.add(line, time.perf_counter())
        return stream.answer(begun, body["max_tokens"])
    except RequestFailedError as error:
        return Answer(error=str(error))
    except asyncio.TimeoutError:
        return Answer(error=f"no whole answer within {TIMEOUT_S} s")
    except (aiohttp.ClientError, OSError) as error:
        # The address that some messages name differs from run to run, which would part like errors.
        return Answer(error=f"connection: {type(error).__name__}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        return Answer(
            error=f"not an OpenAI stream: {type(error).__name__}: {error}"[:MESSAGE_LENGTH]
        )
