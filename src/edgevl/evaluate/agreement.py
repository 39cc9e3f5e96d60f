"""How likely a model finds tokens, and how far it is from another model: running totals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import EdgeVLError

if TYPE_CHECKING:
    from edgevl.generate import Model

#: Logits taken to float64 at once, so that a large vocabulary needs little memory besides.
BLOCK = 1 << 20


class Perplexity:
    """Perplexity of one model: the exponential of the mean negative log likelihood of tokens.

    Attributes:
        tokens: how many have been counted.
    """

    def __init__(self, name: str = "the model") -> None:
        """Start at nothing; ``name`` is what errors call the model."""
        self.tokens = 0
        self._name = name
        self._log_likelihood = 0.0

    def add(self, logits: NDArray[np.float32], next_ids: NDArray[np.int64]) -> None:
        """Count T tokens ``next_ids`` [T], each with the logits that predict it [T, V].

        Raises:
            EdgeVLError: a logit is not finite.
        """
        for rows in _blocks(logits):
            self.log_probabilities(logits[rows], next_ids[rows])

    def log_probabilities(
        self, logits: NDArray[np.float32], next_ids: NDArray[np.int64]
    ) -> NDArray[np.float64]:
        """Count as `add` does, all at once; return the logarithms of all probabilities [T, V]."""
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            position = self.tokens + int(np.argmin(finite))
            raise EdgeVLError(
                f"the logits of {self._name} are not all finite at predicted token {position}: "
                "its weights are damaged, or it overflows"
            )
        result = logits.astype(np.float64)
        result -= result.max(axis=1, keepdims=True)
        result -= np.log(np.exp(result).sum(axis=1, keepdims=True))
        self.tokens += len(next_ids)
        self._log_likelihood += float(result[np.arange(len(next_ids)), next_ids].sum())
        return result

    @property
    def perplexity(self) -> float:
        """The perplexity so far.

        Raises:
            EdgeVLError: nothing has been counted, or a float cannot hold the result.
        """
        _require_tokens(self.tokens)
        try:
            return math.exp(-self._log_likelihood / self.tokens)
        except OverflowError:
            raise EdgeVLError(
                f"the perplexity of {self._name} exceeds what a float can hold: its weights are "
                "damaged"
            ) from None


class Comparison:
    """A model beside a reference, over the same tokens.

    Attributes:
        reference: the perplexity of the reference.
        model: that of the model that is compared.
    """

    def __init__(self, reference: str = "the reference", model: str = "the model") -> None:
        """Start at nothing; the names are what errors call the models."""
        self.reference = Perplexity(reference)
        self.model = Perplexity(model)
        self._same = 0
        self._divergence = 0.0

    def add(
        self,
        reference_logits: NDArray[np.float32],
        model_logits: NDArray[np.float32],
        next_ids: NDArray[np.int64],
    ) -> None:
        """Count T tokens ``next_ids`` [T], with the logits of both models that predict them [T, V].

        Raises:
            EdgeVLError: a logit is not finite.
            ValueError: the shapes of the logits differ.
        """
        if reference_logits.shape != model_logits.shape:
            raise ValueError(f"logits {reference_logits.shape} beside {model_logits.shape}")
        for rows in _blocks(reference_logits):
            reference = self.reference.log_probabilities(reference_logits[rows], next_ids[rows])
            model = self.model.log_probabilities(model_logits[rows], next_ids[rows])
            first = reference_logits[rows].argmax(axis=1)
            self._same += int((first == model_logits[rows].argmax(axis=1)).sum())
            self._divergence += float((np.exp(reference) * (reference - model)).sum())

    @property
    def token_agreement(self) -> float:
        """Share of positions where both models' most likely token is the same, 0 to 1."""
        _require_tokens(self.model.tokens)
        return self._same / self.model.tokens

    @property
    def kl_divergence(self) -> float:
        """Mean Kullback-Leibler divergence KL(reference ‖ model), in nats a token, at least 0."""
        _require_tokens(self.model.tokens)
        return max(self._divergence, 0.0) / self.model.tokens  # rounding may leave it just below


def check_same_tokens(model: Model, against: Model) -> None:
    """Raise an EdgeVLError unless the two models mean the same by every token id."""
    paths = f"{model.checkpoint.path} and {against.checkpoint.path}"
    sizes = [each.checkpoint.config.text.vocab_size for each in (model, against)]
    if sizes[0] != sizes[1]:
        raise EdgeVLError(
            f"{paths} have vocabularies of {sizes[0]} and {sizes[1]} tokens: only models with the "
            "same tokenizer can be compared token by token"
        )
    one, other = model.prompts, against.prompts
    if one.start_ids != other.start_ids or one.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise EdgeVLError(
            f"{paths} have different tokenizers: only models with the same one can be compared "
            "token by token"
        )


def _blocks(logits: NDArray[np.float32]) -> Iterator[slice]:
    """Yield slices of rows, of about `BLOCK` numbers each."""
    step = max(BLOCK // logits.shape[1], 1)
    for begin in range(0, len(logits), step):
        yield slice(begin, begin + step)


def _require_tokens(tokens: int) -> None:
    if not tokens:
        raise EdgeVLError("no tokens have been counted, so there is nothing to tell of them")
