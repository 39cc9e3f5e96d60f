"""Bodies of responses. What is not set is not sent, so that None can mean JSON's null."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict


class PromptTokensDetails(BaseModel):
    """What the prompt's tokens are."""

    cached_tokens: int
    image_tokens: int


class UsageBody(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TimingsBody(BaseModel):
    """Where the time of the first answer went (an extension), as in ``chat --json``."""

    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float
    decode_tokens_per_s: float


class TopLogprob(BaseModel):
    """A token that could stand in the place of another."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer, thinking included."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionReply(BaseModel):
    """What is to be called, with a JSON object as text."""

    name: str
    arguments: str


class CallReply(BaseModel):
    """A call that the model asks for; in a stream with its number."""

    index: int | None = None
    id: str
    type: Literal["function"]
    function: FunctionReply


class ReplyMessage(BaseModel):
    """An answer, or a piece of one."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallReply] | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    """One of the answers."""

    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class ChatCompletion(BaseModel):
    """The answers to a conversation."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageBody
    timings: TimingsBody


class ChatDelta(BaseModel):
    """What a step added to an answer."""

    index: int
    delta: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunk(BaseModel):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    usage: UsageBody | None = None
    timings: TimingsBody | None = None


class CompletionLogprobs(BaseModel):
    """Tokens, side by side in lists."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the texts, or in a stream what a step added to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


class Completion(BaseModel):
    """What follows a text; in a stream, an event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageBody | None = None
    timings: TimingsBody | None = None


class ModelBody(BaseModel):
    """A model."""

    model_config = ConfigDict(protected_namespaces=())

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The models: one."""

    object: Literal["list"]
    data: list[ModelBody]


class Status(BaseModel):
    """A word on the server's state."""

    status: str
