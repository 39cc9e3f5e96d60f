"""Bodies of responses, and the log-probabilities of tokens in them.

What is not set is not sent, so that None can mean JSON's null.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict
from tokenizers import Tokenizer, decoders

from edgevl.generate.generation import Usage
from edgevl.generate.sampling import TokenLogprobs
from edgevl.generate.text import hidden_ids


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

    @classmethod
    def of(cls, usage: Usage) -> UsageBody:
        """Return it for the counts of all answers."""
        details = PromptTokensDetails(
            cached_tokens=usage.cached_tokens, image_tokens=usage.image_tokens
        )
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            total_tokens=usage.prompt_tokens + usage.completion_tokens,
            prompt_tokens_details=details,
        )


class TimingsBody(BaseModel):
    """Where the time of the first answer went (an extension), as in ``chat --json``."""

    model_config = ConfigDict(from_attributes=True)

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


class TokenTexts:
    """Says what tokens are, one at a time: text and bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = tokenizer.get_added_tokens_decoder()
        self._hidden = hidden_ids(tokenizer)
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._byte_of = _byte_of_character() if byte_level else {}

    def text(self, token_id: int) -> str:
        """Return the text of a token; parts of characters show as U+FFFD."""
        text: str = self._tokenizer.decode([token_id], skip_special_tokens=False)
        return text

    def bytes(self, token_id: int) -> bytes:
        """Return the bytes of a token; those of several together may be one character."""
        token = self._tokenizer.id_to_token(token_id)
        if token_id not in self._added and token and all(map(self._byte_of.__contains__, token)):
            return bytes(map(self._byte_of.__getitem__, token))
        return self.text(token_id).encode()

    def characters(self, token_id: int) -> int:
        """Return how many characters of the answer begin in a token."""
        if token_id in self._hidden:
            return 0
        data = self.bytes(token_id)
        return len(data) - _continues(data)

    def chat(self, tokens: Sequence[TokenLogprobs]) -> ChatLogprobs:
        """Return the log-probabilities of an answer's tokens for chat completions."""
        return ChatLogprobs(
            content=[
                TokenLogprob(
                    **self._top(token.token_id, token.logprob).model_dump(),
                    top_logprobs=[self._top(*top) for top in token.top],
                )
                for token in tokens
            ]
        )

    def completion(self, tokens: Sequence[TokenLogprobs], offset: int) -> CompletionLogprobs:
        """Return the same for completions.

        Args:
            tokens: of a piece of the answer.
            offset: characters of the answer that begin before it.
        """
        offsets = []
        for token in tokens:
            # A token in the middle of a character is where that begins.
            offsets.append(max(offset - _continues(self.bytes(token.token_id)[:1]), 0))
            offset += self.characters(token.token_id)
        return CompletionLogprobs(
            tokens=[self.text(token.token_id) for token in tokens],
            token_logprobs=[token.logprob for token in tokens],
            top_logprobs=[
                {self.text(token_id): logprob for token_id, logprob in token.top}
                for token in tokens
            ],
            text_offset=offsets,
        )

    def _top(self, token_id: int, logprob: float) -> TopLogprob:
        return TopLogprob(
            token=self.text(token_id),
            logprob=logprob,
            bytes=list(self.bytes(token_id)),
        )


def _continues(data: bytes) -> int:
    """Return how many bytes go on with a character of UTF-8 that began before."""
    return sum(byte & 0xC0 == 0x80 for byte in data)


def _byte_of_character() -> dict[str, int]:
    """Return the bytes that GPT-2's byte-level alphabet writes as characters.

    As ``bytes_to_unicode`` in its code: printable Latin-1 stands for itself, and the rest, in
    order, for the characters from 256 on.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
