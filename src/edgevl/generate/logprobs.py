"""How likely the chosen tokens were, and what else could have come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgevl.engine.base import Floats

#: Stands for the logarithm of probabilities that are 0 in float32; JSON has no infinity.
LEAST = -9999.0


@dataclass(frozen=True)
class TokenLogprobs:
    """A chosen token, the logarithm of its probability, and the likeliest tokens in its place.

    Attributes:
        token_id: the token.
        logprob: of the model's own distribution: before temperature, penalties and constraints.
        top: (token id, log-probability) of the likeliest tokens, in order.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def token_logprobs(logits: Floats, token_id: int, count: int) -> TokenLogprobs:
    """Return the log-probability of a token and of the ``count`` likeliest: logits [V]."""
    highest = logits.max()
    total = float(highest) + float(np.log(np.exp(logits - highest).sum(dtype=np.float64)))
    count = min(count, len(logits))
    top = np.argpartition(-logits, count - 1)[:count] if count else np.empty(0, np.int64)
    top = top[np.argsort(-logits[top], kind="stable")]

    def of(token: int) -> float:
        return max(float(logits[token]) - total, LEAST)

    return TokenLogprobs(token_id, of(token_id), tuple((int(i), of(int(i))) for i in top))
