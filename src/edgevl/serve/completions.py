"""``POST /v1/completions``: text to go on with, without a chat template."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Sequence

from anyio import to_thread
from fastapi import APIRouter, Request
from starlette.responses import Response

from edgevl.generate.answer import Answer
from edgevl.generate.generation import Chunk
from edgevl.generate.sampling import TokenLogprobs
from edgevl.preprocess import Prompt, PromptEncoder
from edgevl.serve.bodies import BodyRoute
from edgevl.serve.chat import EVENTS
from edgevl.serve.errors import blamed_on, error_responses
from edgevl.serve.logprobs import TokenTexts
from edgevl.serve.requests import CompletionRequest
from edgevl.serve.respond import AnswerResponse, Job
from edgevl.serve.responses import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TimingsBody,
    UsageBody,
)
from edgevl.serve.sampling import check_length, questions
from edgevl.serve.service import ENCODING, service_of

router = APIRouter(route_class=BodyRoute)

PATH = "/v1/completions"

DEFAULT_MAX_TOKENS = 16


@router.post(
    PATH,
    response_model=Completion,
    responses={200: EVENTS, **error_responses(400, 401, 404, 413, 415, 429, 500, 503, 504)},
)
async def create_completion(body: CompletionRequest, request: Request) -> Response:
    """Go on with a text. Special tokens in it are special tokens."""
    service = service_of(request)
    service.check_name(body.model)
    ignored = service.ignored.headers(body)

    async def prepare() -> Job:
        loaded = service.loaded(body.model)
        with blamed_on("prompt"):
            context = loaded.scheduler.max_context
            prompts = await to_thread.run_sync(
                _prompts, body, loaded.prompts, context, limiter=ENCODING
            )
            for prompt in prompts:
                check_length(prompt, context)
        return Job(
            loaded,
            questions(
                body,
                loaded,
                prompts,
                body.max_tokens or DEFAULT_MAX_TOKENS,
                service.settings.max_queue,
            ),
            body.n or 1,
            body.logprobs,
            _CompletionWriter(body, loaded.texts),
        )

    include_usage = bool(body.stream_options and body.stream_options.include_usage)
    return AnswerResponse(request, prepare, bool(body.stream), include_usage, ignored)


def _prompts(body: CompletionRequest, encoder: PromptEncoder, max_tokens: int) -> list[Prompt]:
    """Encode one prompt or several, of text or of ids."""
    prompts: list[Prompt] = []
    ids: list[int] = []
    for prompt in body.prompt if isinstance(body.prompt, list) else [body.prompt]:
        if isinstance(prompt, int):
            ids.append(prompt)
        elif isinstance(prompt, str):
            prompts.append(encoder.encode_text(prompt, max_tokens))
        else:
            prompts.append(encoder.encode_ids(prompt))
    return prompts or [encoder.encode_ids(ids)]


class _CompletionWriter:
    """Writes answers as completions: all text of the model's, thinking not told apart."""

    def __init__(self, body: CompletionRequest, texts: TokenTexts) -> None:
        self._model = body.model
        self._logprobs = body.logprobs is not None
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        self._texts = texts
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._written: dict[int, str] = {}
        self._token_chars: dict[int, int] = {}
        self._tokens: dict[int, list[TokenLogprobs]] = {}
        self._answers: dict[int, Answer] = {}

    def add(self, number: int, chunk: Chunk) -> Iterable[Completion]:
        text = "".join(chunk.pieces)
        self._written[number] = self._written.get(number, "") + text
        logprobs = None
        if self._logprobs:
            offset = self._token_chars.get(number, 0)
            logprobs = self._texts.completion(chunk.logprobs, offset)
            characters = (self._texts.characters(token.token_id) for token in chunk.logprobs)
            self._token_chars[number] = offset + sum(characters)
            self._tokens.setdefault(number, []).extend(chunk.logprobs)
        if text or chunk.logprobs:
            yield self._event([self._choice(number, text, logprobs, None)])

    def end(self, number: int, answer: Answer) -> Iterable[Completion]:
        self._answers[number] = answer
        yield self._event([self._choice(number, "", None, answer.finish_reason)])

    def last(self, usage: UsageBody, timings: TimingsBody) -> Completion:
        event = self._event([])
        event.usage, event.timings = usage, timings
        return event

    def whole(self, usage: UsageBody, timings: TimingsBody) -> Completion:
        choices = [
            self._choice(
                number,
                self._written.get(number, ""),
                self._texts.completion(self._tokens.get(number, []), 0) if self._logprobs else None,
                answer.finish_reason,
            )
            for number, answer in sorted(self._answers.items())
        ]
        completion = self._event(choices)
        completion.usage, completion.timings = usage, timings
        return completion

    def _choice(
        self, number: int, text: str, logprobs: CompletionLogprobs | None, reason: str | None
    ) -> CompletionChoice:
        return CompletionChoice(index=number, text=text, logprobs=logprobs, finish_reason=reason)

    def _event(self, choices: Sequence[CompletionChoice]) -> Completion:
        completion = Completion(
            id=self._id,
            object="text_completion",
            created=self._created,
            model=self._model,
            choices=list(choices),
        )
        if self._usage:
            completion.usage = None  # said, as all events but the last say it
        return completion
