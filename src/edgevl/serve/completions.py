"""Chat completions and completions: from a request to its job, from an answer to its reply."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from anyio import CapacityLimiter, to_thread

from edgevl.generate.answer import Answer
from edgevl.generate.generation import Delta
from edgevl.generate.tool_calls import ToolCallSplitter
from edgevl.preprocess import Prompt
from edgevl.preprocess.tools import Tool, ToolCall
from edgevl.serve.conversation import constraint_on, encode, shown_tools
from edgevl.serve.job import Job, encoded
from edgevl.serve.requests import ChatRequest, CompletionRequest
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
from edgevl.serve.service import Loaded

DEFAULT_MAX_TOKENS = 16

#: Schemas that are checked at the same time: some take seconds, and hold up only one another.
_CONSTRAINTS = CapacityLimiter(2)


async def prepare_chat(body: ChatRequest, loaded: Loaded) -> Job:
    """Return what is to be done for a conversation.

    Raises:
        ApiError: the request asks for what cannot be.
    """
    tools = shown_tools(body)
    constraint = None
    if body.formatted or body.must_call:
        constraint = await to_thread.run_sync(
            constraint_on,
            body,
            tools,
            loaded.scheduler,
            abandon_on_cancel=True,
            limiter=_CONSTRAINTS,
        )
    prompts = await encode(body, loaded, tools)
    return Job(
        "chatcmpl",
        prompts,
        body.max_completion_tokens or body.max_tokens or loaded.scheduler.max_context,
        (body.top_logprobs or 0) if body.logprobs else None,
        # Where calls have tags by construction, an object without them is none.
        partial(_ChatWriter, body, loaded.texts, tools, () if body.formatted else tools),
        partial(ChatChunk, object="chat.completion.chunk"),
        partial(ChatCompletion, object="chat.completion"),
        constraint,
    )


async def prepare_completion(body: CompletionRequest, loaded: Loaded) -> Job:
    """Return what is to be done for one text or several, given as text or ids.

    Raises:
        ApiError: the request asks for what cannot be.
    """
    encoder, most = loaded.scheduler.prompts, loaded.scheduler.max_context

    def encode_all() -> list[Prompt]:
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

    prompts = await encoded(loaded, "prompt", encode_all)
    completion = partial(Completion, object="text_completion")
    return Job(
        "cmpl",
        prompts,
        body.max_tokens or DEFAULT_MAX_TOKENS,
        body.logprobs,
        partial(_CompletionWriter, body, loaded.texts),
        completion,
        completion,
    )


class _ChatWriter:
    """Writes an answer as a message: text, thoughts, and calls of tools if there are any."""

    def __init__(
        self,
        body: ChatRequest,
        texts: TokenTexts,
        tools: Sequence[Tool],
        untagged: Sequence[Tool],
        number: int,
    ) -> None:
        """Begin the answer of a number; ``untagged`` tools may be called without tags."""
        self._number = number
        self._texts = texts
        self._logprobs = ChatLogprobs(content=[]) if body.logprobs else None
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
