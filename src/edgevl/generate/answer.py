"""What a question gives back."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Usage:
    """Tokens of one answer.

    Attributes:
        prompt_tokens: the whole prompt: history, pictures, question.
        image_tokens: those of them that stand for pictures.
        completion_tokens: tokens generated, without the one that ended the turn.
        cached_tokens: prompt tokens that were in the cache already and cost nothing.
    """

    prompt_tokens: int
    image_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Where the time of one answer went, in milliseconds.

    Attributes:
        load_ms: loading the model, once.
        vision_ms: encoding the pictures that had not been encoded before.
        prefill_ms: computing the prompt tokens that were not cached.
        ttft_ms: from the question to the first token, everything included.
        decode_ms_per_token: mean over the tokens after the first; 0 if there was only one.
        decode_tokens_per_s: the same as a rate; 0 if there was only one.
    """

    load_ms: float
    vision_ms: float
    prefill_ms: float
    ttft_ms: float
    decode_ms_per_token: float
    decode_tokens_per_s: float


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: what the model says, without its thinking.
        thinking: what stood between ``<think>`` and ``</think>``; empty if it did not think.
        token_ids: the tokens generated, without the one that ended the turn.
        finish_reason: ``stop`` (end of turn, a stop string, or all that a constraint allows) or
            ``length`` (out of tokens).
        usage: token counts.
        timings: times.
    """

    text: str
    thinking: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings

    def __str__(self) -> str:
        """Return the text."""
        return self.text

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain types, for JSON; ``thinking`` only if there was some."""
        result = asdict(self) | {"token_ids": list(self.token_ids)}
        if not self.thinking:
            del result["thinking"]
        return result
