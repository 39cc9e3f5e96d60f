"""Perplexity of a model on a text, alone or beside another model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgevl import files
from edgevl.errors import CheckpointError, EdgeVLError
from edgevl.evaluate.agreement import Comparison, Perplexity, check_same_tokens

if TYPE_CHECKING:
    from edgevl.generate import Model

#: Most tokens of a window.
WINDOW = 2048
#: Positions whose logits are held at once: 78 MB a model with 151,936 in the vocabulary.
CHUNK = 128
#: A text is read and tokenized whole, which takes 180 times its size; larger ones are refused.
MAX_TEXT_BYTES = 4 << 20


class TextFileError(EdgeVLError):
    """A file of text is missing, too large, too short, or not text."""


@dataclass(frozen=True)
class PerplexityResult:
    """Perplexity of a model, and of the other with what tells the two apart if there was one.

    Attributes:
        perplexity: of the model.
        tokens: tokens that were predicted.
        against_perplexity: of the other model.
        token_agreement: share of positions where both find the same token the most likely.
        kl_divergence: mean KL(other ‖ model), in nats a token.
    """

    perplexity: float
    tokens: int
    against_perplexity: float | None = None
    token_agreement: float | None = None
    kl_divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that there are."""
        return {name: value for name, value in vars(self).items() if value is not None}


def read_text(path: str | Path) -> str:
    """Read a file of text.

    Raises:
        TextFileError: it cannot be read, is larger than `MAX_TEXT_BYTES`, or is not UTF-8.
    """
    return files.read_text(Path(path), MAX_TEXT_BYTES, TextFileError, may_be_pipe=True)


def text_windows(
    model: Model, text: str, size: int = WINDOW, limit: int | None = None
) -> list[NDArray[np.int64]]:
    """Cut a text into windows that do not overlap.

    Each begins with what the tokenizer puts before any text. The last one has what is left, if that
    is enough to predict a token.

    Args:
        model: whose tokenizer to use; its context bounds the windows.
        text: the text.
        size: most tokens of a window.
        limit: take only the first windows.

    Returns:
        Token ids, int64 [T] with T from 2 to ``size``; at least one window.

    Raises:
        EdgeVLError: text or context are too short to predict a token.
        CheckpointError: the tokenizer is of another model.
    """
    start = model.prompts.start_ids
    size = min(size, model.engine.max_context)
    step = size - len(start)
    if step < 1 or size < 2:
        raise EdgeVLError(f"a context of {size} tokens is too short to predict one: give it more")
    ids = model.prompts.tokenizer.encode(text, add_special_tokens=False).ids
    vocabulary = model.checkpoint.config.text.vocab_size
    if max(ids, default=0) >= vocabulary:
        raise CheckpointError(
            f"{model.checkpoint.path}: token id {max(ids)} is outside of the model's vocabulary of "
            f"{vocabulary}; the tokenizer is of another model"
        )
    windows = [
        np.array(start + ids[begin : begin + step], np.int64) for begin in range(0, len(ids), step)
    ]
    windows = [window for window in windows if len(window) >= 2]
    if not windows:
        needed = max(2 - len(start), 1)
        raise EdgeVLError(f"the text has {len(ids)} tokens; at least {needed} are needed")
    return windows[:limit]


def evaluate_perplexity(
    model: Model,
    windows: Sequence[NDArray[np.int64]],
    against: Model | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> PerplexityResult:
    """Predict every token of every window but the first.

    The engines compute; load them with ``exact_logits``. The models' caches are empty afterwards.

    Args:
        model: what to measure.
        windows: from `text_windows`.
        against: the reference to compare ``model`` with, another object than it.
        on_tokens: called with the number of tokens just predicted, for progress.

    Raises:
        EdgeVLError: the tokenizers differ, the other model's context is shorter than a window, or
            a logit is not finite.
    """
    models, alone, comparison = [model], Perplexity(), Comparison()
    if against is not None:
        check_same_tokens(model, against)
        longest = max(map(len, windows))
        if longest > against.engine.max_context:
            raise EdgeVLError(
                f"windows of {longest} tokens exceed the context of {against.checkpoint.path}, "
                f"{against.engine.max_context}: set it for both (--context)"
            )
        models = [against, model]
    with ExitStack() as stack:
        sequences = [stack.enter_context(each.sequence()) for each in models]
        for window in windows:
            for sequence in sequences:
                sequence.rewind(0)
            for begin in range(0, len(window) - 1, CHUNK):
                next_ids = window[begin + 1 : begin + 1 + CHUNK]
                block = window[begin : begin + len(next_ids)].tolist()
                logits = [
                    each.engine.extend(sequence, block)
                    for each, sequence in zip(models, sequences, strict=True)
                ]
                if against is None:
                    alone.add(logits[0], next_ids)
                else:
                    comparison.add(logits[0], logits[1], next_ids)
                if on_tokens is not None:
                    on_tokens(len(next_ids))
    if against is None:
        return PerplexityResult(alone.perplexity, alone.tokens)
    return PerplexityResult(
        comparison.model.perplexity,
        comparison.model.tokens,
        comparison.reference.perplexity,
        comparison.token_agreement,
        comparison.kl_divergence,
    )
