"""How the next token is chosen from its logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevl.engine.base import Floats
from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.constraint import Constraint
from edgevl.generate.token_mask import TokenMask
from edgevl.options import SamplingOptions

#: Weights that are summed at once: a running sum of all would take ten times as long.
_BLOCK = 512
#: Logits of which the largest is looked at first: as many as there are blocks of so many.
_FEW = 128


@dataclass(frozen=True)
class SamplingParams(SamplingOptions):
    """What a request may ask of the sampler: the fields of `SamplingOptions`, and a form.

    Attributes:
        constraint: what the answer must be; None lets it be anything. An answer that ``max_tokens``
            or ``stop`` cuts off is the beginning of one.

    Raises:
        PromptError: a value is out of its range.
    """

    constraint: Constraint | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.constraint, Constraint | None):
            raise PromptError(
                f"constraint is {self.constraint!r}: it must be an edgevl.Constraint, such as "
                "Constraint.json_object()"
            )

    @classmethod
    def resolve(cls, defaults: Mapping[str, Any], given: Mapping[str, Any]) -> SamplingParams:
        """Return how a question is answered: as ``given`` says, where None says nothing.

        ``defaults`` is what the checkpoint has of its own, `ModelConfig.sampling`.

        Raises:
            PromptError: a value is out of its range.
        """
        said = {name: value for name, value in given.items() if value is not None}
        return cls(**{**defaults, **said})

    def check_tokens(self, tokenizer: Tokenizer) -> None:
        """Check that ``logit_bias`` names tokens of the model.

        Raises:
            PromptError: it names another.
        """
        for token_id in self.logit_bias:
            if tokenizer.id_to_token(token_id) is None:
                raise PromptError(f"logit_bias: the model has no token {token_id}: leave it out")


class Sampler:
    """Chooses tokens of one answer; keeps the random state and the tokens seen.

    Args:
        params: how to choose.
        prompt_ids: the prompt's token ids.
        mask: of ``params.constraint``, if there is one.
    """

    def __init__(
        self, params: SamplingParams, prompt_ids: Iterable[int], mask: TokenMask | None = None
    ) -> None:
        self._params = params
        self._mask = mask
        self._random = np.random.default_rng(params.seed)
        self._biased = np.fromiter(params.logit_bias.keys(), np.int64)
        self._biases = np.fromiter(params.logit_bias.values(), np.float32)
        self._penalizes = bool(
            params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
        )
        self._seen = _Seen(prompt_ids if params.repetition_penalty != 1 else ())
        # Kept, since memory that is new takes longer to touch than to compute with.
        self._logits = np.empty(0, np.float32)
        self._weights = np.empty(0, np.float32)

    def constrain(self, mask: TokenMask) -> None:
        """Follow ``mask`` from the next token on."""
        self._mask = mask

    @property
    def complete(self) -> bool:
        """Whether the constraint lets nothing follow the tokens chosen so far."""
        return self._mask is not None and self._mask.complete

    def foreseen(self) -> list[int]:
        """Return what the constraint lets come next, as far as it leaves no choice."""
        return self._mask.foreseen() if self._mask is not None else []

    def allowed(self, draft: list[int]) -> list[int]:
        """Return a draft up to where the constraint would not let it be chosen."""
        return draft[: self._mask.allowed(draft)] if self._mask is not None else draft

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose a token: logits float32 [V] -> id.

        The constraint comes first, and what it does not allow nothing else can bring back. The
        rest applies in the order of `transformers` and vLLM: biases, penalties (repetition,
        frequency, presence), temperature, top-k, top-p, min-p.

        Raises:
            EdgeVLError: the logits are not finite, so the weights must be damaged; -inf is taken
                for a token that cannot come next, as long as another can. Or the constraint cannot
                be met.
        """
        if not np.isfinite(logits.max()):
            raise EdgeVLError("the model's logits are not finite: its weights are damaged")
        own = self._mask is not None
        if self._mask is not None:
            logits = self._mask.apply(logits)
        if self._penalizes or len(self._biased):
            logits = self._adjusted(logits if own else self._copied(logits))
        token_id = int(np.argmax(logits)) if self._params.greedy else self._draw(logits)
        if self._penalizes:
            self._seen.add(token_id)
        if self._mask is not None:
            self._mask.accept(token_id)
        return token_id

    def _copied(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        if len(self._logits) != len(logits):
            self._logits = np.empty_like(logits)
        np.copyto(self._logits, logits)
        return self._logits

    def _adjusted(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        """Add biases and penalties to the logits, in place. What is finite stays finite."""
        params = self._params
        logits[self._biased] += self._biases
        if self._penalizes:
            ids, counts = self._seen.ids, self._seen.counts
            old = logits[ids]
            penalty = np.float32(params.repetition_penalty)
            logits[ids] = np.where(old > 0, old / penalty, old * penalty) - (
                np.float32(params.frequency_penalty) * counts
                + np.float32(params.presence_penalty) * (counts > 0)
            )
        return logits

    def _draw(self, logits: NDArray[np.float32]) -> int:
        """Draw from the filtered distribution. Nothing is sorted that need not be."""
        params = self._params
        ids = _likeliest(logits, params.top_k) if params.top_k > 0 else None
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


class _Seen:
    """The tokens of prompt and answer: ``ids``, each once, int64 [N], and float32 ``counts`` [N].

    What is counted is how often the answer has it.
    """

    def __init__(self, prompt_ids: Iterable[int]) -> None:
        self._places = {token_id: i for i, token_id in enumerate(dict.fromkeys(prompt_ids))}
        self.ids = np.fromiter(self._places, np.int64)
        self.counts = np.zeros(len(self.ids), np.float32)

    def add(self, token_id: int) -> None:
        """Take a token of the answer."""
        place = self._places.setdefault(token_id, len(self.ids))
        if place == len(self.ids):
            self.ids = np.append(self.ids, token_id)
            self.counts = np.append(self.counts, np.float32(0))
        self.counts[place] += 1


def _place(weights: NDArray[np.float32], share: float) -> int:
    """Return where the running sum of the weights [V] exceeds a share of the total, 0 to below 1.

    None of them is negative, and one is positive.
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
    # So many blocks have a logit as large as this, so that the largest are among these.
    highest = np.maximum.reduceat(logits, np.arange(0, len(logits), _FEW))
    ids = np.arange(len(logits))
    if count <= len(highest):
        ids = np.flatnonzero(logits >= np.partition(highest, -count)[-count])
    found = logits[ids]
    least = np.partition(found, -count)[-count]
    above, equal = ids[found > least], ids[found == least]
    return np.sort(np.concatenate((above, equal[: count - len(above)])))


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
