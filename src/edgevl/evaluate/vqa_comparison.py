"""Two models on the same questions: the accuracy of both, and how closely one follows the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgevl.evaluate.agreement import Comparison, check_same_tokens
from edgevl.evaluate.vqa import (
    Outcome,
    Question,
    QuestionFileError,
    VQAResult,
    ask_question,
)
from edgevl.options import SamplingOptions

if TYPE_CHECKING:
    from edgevl.generate import Answer, Model


@dataclass(frozen=True)
class VQAComparison:
    """A model beside a reference, on the same questions.

    Attributes:
        result: what the model answered.
        against: what the reference answered.
        tokens: tokens of the reference's answers, those that end a turn included.
        token_agreement: share of them that the model finds the most likely, 0 to 1.
        kl_divergence: mean KL(reference ‖ model) before each of them, in nats.
    """

    result: VQAResult
    against: VQAResult
    tokens: int
    token_agreement: float
    kl_divergence: float

    def to_dict(self) -> dict[str, Any]:
        """Return the model's accuracy, the reference's under ``against_…``, and the agreement."""
        against = self.against.to_dict()
        return {
            **self.result.to_dict(),
            "against_accuracy": against["accuracy"],
            "against_families": against["families"],
            "tokens": self.tokens,
            "token_agreement": self.token_agreement,
            "kl_divergence": self.kl_divergence,
        }


def compare_vqa(
    model: Model,
    against: Model,
    questions: Sequence[Question],
    on_outcome: Callable[[Outcome, Outcome], None] | None = None,
    *,
    max_tokens: int = SamplingOptions.max_tokens,
    max_tiles: int | None = None,
) -> VQAComparison:
    """Ask both models every question by itself, greedily, and compare.

    ``model`` is then run over the very tokens of each answer of ``against`` (teacher forcing), so
    that both predict the same position from the same text. Load both with ``exact_logits``.

    Args:
        model: what to measure.
        against: the reference, another object than ``model``.
        questions: at least one, from ``read_questions``.
        on_outcome: called after every question with the outcomes of ``model`` and ``against``.
        max_tokens: most tokens of an answer.
        max_tiles: most tiles of a picture; default is each checkpoint's.

    Raises:
        EdgeVLError: the tokenizers differ, a picture or a prompt cannot be taken, or a logit is not
            finite.
    """
    if not questions:
        raise QuestionFileError("no questions to ask")
    check_same_tokens(model, against)
    options = {"max_tokens": max_tokens, "max_tiles": max_tiles}
    comparison = Comparison()
    outcomes, expected = [], []
    for question in questions:
        reference, answer = ask_question(against, question, **options)
        outcome, _ = ask_question(model, question, **options)
        _compare_answer(model, against, question, answer, comparison, max_tiles)
        outcomes.append(outcome)
        expected.append(reference)
        if on_outcome is not None:
            on_outcome(outcome, reference)
    return VQAComparison(
        VQAResult(tuple(outcomes)),
        VQAResult(tuple(expected)),
        comparison.tokens,
        comparison.token_agreement,
        comparison.kl_divergence,
    )


def _compare_answer(
    model: Model,
    against: Model,
    question: Question,
    answer: Answer,
    comparison: Comparison,
    max_tiles: int | None,
) -> None:
    """Count the positions of an answer of ``against``."""
    reference, other = (
        each.score(
            each.chat(max_tiles=max_tiles).prompt(
                question.question, [question.image], len(answer.token_ids) + 1
            ),
            answer.token_ids,
        )
        for each in (against, model)
    )
    # The end of the turn counts as a token; an answer that was cut off has none.
    left = len(answer.token_ids) + (answer.finish_reason == "stop")
    for expected, found in zip(reference, other, strict=True):
        count = min(len(expected), left)
        # The answer is greedy: its tokens are the reference's most likely ones.
        comparison.add(expected[:count], found[:count], expected[:count].argmax(axis=1))
        left -= count
