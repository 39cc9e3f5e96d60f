"""How well a model answers, and how close it is to another."""

from edgevl.evaluate.agreement import Comparison, Perplexity
from edgevl.evaluate.perplexity import (
    PerplexityResult,
    evaluate_perplexity,
    read_text,
    text_windows,
)
from edgevl.evaluate.vqa import (
    Outcome,
    Question,
    VQAComparison,
    VQAResult,
    compare_vqa,
    evaluate_vqa,
    read_questions,
)

__all__ = [
    "Comparison",
    "Outcome",
    "Perplexity",
    "PerplexityResult",
    "Question",
    "VQAComparison",
    "VQAResult",
    "compare_vqa",
    "evaluate_perplexity",
    "evaluate_vqa",
    "read_questions",
    "read_text",
    "text_windows",
]
