"""How the next token is chosen from its logits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.constraint import Constraint
from edgevl.generate.token_mask import TokenMask

#: Weights that are summed at once: a running sum of all would take ten times as long.
_BLOCK = 512


@dataclass(frozen=True)
class SamplingParams:
    """What a request may ask of the sampler.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens that together reach this probability (nucleus sampling).
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divide the positive logits of tokens already in prompt or answer by it
            and multiply the negative ones (Keskar et al. 2019); 1 is off.
        seed: the same seed gives the same answer; None draws a new one each time.
        stop: strings that end the answer; they are not part of it.
        constraint: what the answer must be; None lets it be anything. An answer that ``max_tokens``
            or ``stop`` cuts off is the beginning of one.

    Raises:
        PromptError: a value is out of its range.
    """

    max_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | tuple[str, ...] = ()
    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        object.__setattr__(self, "stop", stop)
        for name in ("max_tokens", "top_k", "seed"):
            value = getattr(self, name)
            if not isinstance(value, Integral) and not (name == "seed" and value is None):
                raise PromptError(f"{name} is {value!r}: it must be a whole number")
        for name in ("temperature", "top_p", "min_p", "repetition_penalty"):
            if not isinstance(getattr(self, name), Real):
                raise PromptError(f"{name} is {getattr(self, name)!r}: it must be a number")
        for name, allowed, rule in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 (off) to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0; 1 is off"),
            ("seed", self.seed is None or self.seed >= 0, "0 or more"),
            ("stop", all(isinstance(s, str) and s for s in stop), "strings that are not empty"),
        ):
            if not allowed:
                raise PromptError(f"{name} is {getattr(self, name)!r}: it must be {rule}")
        if not isinstance(self.constraint, Constraint | None):
            raise PromptError(
                f"constraint is {self.constraint!r}: it must be an edgevl.Constraint, such as "
                "Constraint.json_object()"
            )


class Sampler:
    """Chooses tokens of one answer; keeps the random state and the tokens seen."""

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], mask: TokenMask | None = None
    ) -> None:
        """Start an answer.

        Args:
            params: how to choose.
            prompt_ids: the prompt's token ids.
            mask: of ``params.constraint``, if there is one.
        """
        self._params = params
        self._mask = mask
        self._random = np.random.default_rng(params.seed)
        self._seen = set(prompt_ids) if params.repetition_penalty != 1 else None
        # Kept, since memory that is new takes longer to touch than to compute with.
        self._weights = np.empty(0, np.float32)

    def constrain(self, mask: TokenMask) -> None:
        """Follow ``mask`` from the next token on."""
        self._mask = mask

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing follow the tokens chosen so far."""
        return self._mask is not None and self._mask.complete

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose a token: logits float32 [V] -> id.

        The constraint comes first. The filters then apply in the order of `transformers`:
        repetition penalty, temperature, top-k, top-p, min-p.

        Raises:
            EdgeVLError: the logits are not finite, so the weights must be damaged; -inf is taken
                for a token that cannot come next, as long as another can. Or the constraint cannot
                be met.
        """
        params = self._params
        if not np.isfinite(logits.max()):
            raise EdgeVLError("the model's logits are not finite: its weights are damaged")
        if self._mask is not None:
            logits = self._mask.apply(logits)
        if self._seen is not None:
            seen = np.fromiter(self._seen, np.int64)
            logits = logits.copy()
            penalty, old = np.float32(params.repetition_penalty), logits[seen]
            logits[seen] = np.where(old > 0, old / penalty, old * penalty)
        token_id = int(np.argmax(logits)) if params.temperature == 0 else self._draw(logits)
        if self._seen is not None:
            self._seen.add(token_id)
        if self._mask is not None:
            self._mask.accept(token_id)
        return token_id

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """Draw from the filtered distribution. Nothing is sorted that need not be."""
        params = self._params
        ids = _likeliest(logits, params.top_k) if params.top_k else None
        candidates = logits if ids is None else logits[ids]
        temperature = max(np.float32(params.temperature), np.finfo(np.float32).tiny)
        if len(self._weights) != len(candidates):
            self._weights = np.empty_like(candidates)
        weights = np.subtract(candidates, candidates.max(), out=self._weights)
        with np.errstate(over="ignore"):  # -inf, probability 0, is the limit of low temperatures
            weights /= temperature
        np.exp(weights, out=weights)
        if params.top_p < 1:
            total = weights.sum(dtype=np.float64)
            # All tokens less likely than this together are less than what is left out.
            likely = np.flatnonzero(weights >= (1 - params.top_p) * total / len(weights))
            order = likely[np.argsort(-weights[likely], kind="stable")]
            reached = np.cumsum(weights[order], dtype=np.float64)
            kept = np.zeros_like(weights)
            nucleus = order[reached - weights[order] < params.top_p * total]
            kept[nucleus] = weights[nucleus]
            weights = kept
        if params.min_p:
            weights[weights < params.min_p] = 0  # the largest weight is 1
        place = _place(weights, self._random.random())
        return int(place if ids is None else ids[place])


def _place(weights: NDArray[np.float32], share: float) -> int:
    """Return the index where the running sum of the weights exceeds a share of the total.

    Args:
        weights: [V], not negative, one of them positive.
        share: from 0, to 1 exclusively.
    """
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64)
    reached = np.cumsum(sums)
    target = share * reached[-1]
    # Roundings must not lead to a weight of 0.
    block = min(np.searchsorted(reached, target, side="right"), np.flatnonzero(sums)[-1])
    inner = weights[block * _BLOCK : (block + 1) * _BLOCK]
    rest = target - (reached[block] - sums[block])
    place = np.searchsorted(np.cumsum(inner, dtype=np.float64), rest, side="right")
    return int(block * _BLOCK + min(place, np.flatnonzero(inner)[-1]))


def _likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Return the ids of the ``count`` largest logits; of equal ones the first."""
    count = min(count, len(logits))
    least = np.partition(logits, len(logits) - count)[len(logits) - count]
    above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
    return np.sort(np.concatenate((above, equal[: count - len(above)])))
