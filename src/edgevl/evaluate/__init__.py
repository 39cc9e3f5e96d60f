"""How well a model answers."""

from edgevl.evaluate.vqa import Outcome, Question, VQAResult, evaluate_vqa, read_questions

__all__ = ["Outcome", "Question", "VQAResult", "evaluate_vqa", "read_questions"]
