"""Accuracy on a file of questions about pictures, of a model alone or beside another."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgevl.errors import EdgeVLError, PromptError
from edgevl.evaluate.agreement import Comparison, check_same_tokens
from edgevl.evaluate.boxes import mean_iou, parse_boxes
from edgevl.files import read_text
from edgevl.json_input import check_unicode, filled_text, parse_object
from edgevl.options import GREEDY, SamplingOptions

if TYPE_CHECKING:
    from edgevl.generate import Answer, Constraint, Model

#: An answer with boxes is right from this mean IoU on, the usual threshold of grounding tasks.
IOU_THRESHOLD = 0.5

#: A question file is read whole; larger ones are refused.
MAX_FILE_BYTES = 256 << 20

_TRAILING = ".,;:!?。，；：！？、…"


class QuestionFileError(EdgeVLError):
    """A question file is missing, malformed, or names a picture it may not."""


#: What is right: a text, or the value of an answer that must be a JSON object.
Expected = str | dict[str, Any]


@dataclass(frozen=True)
class Question:
    """One line of a question file.

    Attributes:
        image: an existing file.
        question: what is asked.
        answers: each of them is right.
        family: what it is counted with.
        line: its number in the file.
        constraint: what the answer is made to be, of the line's JSON schema.
    """

    image: Path
    question: str
    answers: tuple[Expected, ...]
    family: str
    line: int
    constraint: Constraint | None = None


@dataclass(frozen=True)
class Outcome:
    """A question, what the model said, and whether that was right."""

    question: Question
    text: str
    right: bool

    def to_dict(self) -> dict[str, Any]:
        """Return the line of a record file: the question's fields, ``text`` and ``right``."""
        return {
            "line": self.question.line,
            "image": str(self.question.image),
            "question": self.question.question,
            "answer": list(self.question.answers),
            "family": self.question.family,
            "text": self.text,
            "right": self.right,
        }


@dataclass(frozen=True)
class VQAResult:
    """All outcomes, in the order of the file."""

    outcomes: tuple[Outcome, ...]

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return sum(outcome.right for outcome in self.outcomes) / len(self.outcomes)

    @property
    def families(self) -> dict[str, tuple[int, int]]:
        """Family -> (right answers, questions), by name."""
        counts: dict[str, tuple[int, int]] = {}
        for outcome in self.outcomes:
            right, total = counts.get(outcome.question.family, (0, 0))
            counts[outcome.question.family] = (right + outcome.right, total + 1)
        return dict(sorted(counts.items()))

    def to_dict(self) -> dict[str, Any]:
        """Return ``accuracy``, ``questions`` and ``families`` {name: accuracy}."""
        return {
            "accuracy": self.accuracy,
            "questions": len(self.outcomes),
            "families": {name: right / total for name, (right, total) in self.families.items()},
        }


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


def read_questions(path: str | Path, limit: int | None = None) -> list[Question]:
    """Read the first ``limit`` questions of a file with one JSON object a line.

    A line has ``image`` (path of a picture, relative to the file and not outside its directory),
    ``question``, ``answer`` (a text, a JSON object, or a list of them) and, if wanted, ``family``
    and ``json_schema``, which the answer is made to fit.

    Raises:
        QuestionFileError: the file cannot be read or a line is wrong; names file and line.
        EdgeVLError: a line has a schema, and ``llguidance`` is not installed.
    """
    path = Path(path)
    text = read_text(path, MAX_FILE_BYTES, QuestionFileError, may_be_pipe=True)
    questions = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            questions.append(_question(line, path, number))
            if len(questions) == limit:
                break
    if not questions:
        raise QuestionFileError(f"{path}: has no questions; write one JSON object a line")
    return questions


def _question(line: str, path: Path, number: int) -> Question:
    where = f"{path}:{number}"
    value = parse_object(line, where, QuestionFileError)
    try:
        for name in ("image", "question"):
            filled_text(value.get(name), name)
        answers = value.get("answer")
        answers = answers if isinstance(answers, list) else [answers]
        if not answers or not all(
            isinstance(answer, dict) or (isinstance(answer, str) and normalise(answer))
            for answer in answers
        ):
            raise ValueError(
                "`answer` must be a text, not empty (numbers in quotes), an object, or a list of "
                "them"
            )
        check_unicode(json.dumps(answers, ensure_ascii=False), "answer")
        return Question(
            _picture(path.parent, value["image"]),
            value["question"],
            tuple(answers),
            filled_text(value.get("family", "all"), "family"),
            number,
            _constraint(value["json_schema"]) if "json_schema" in value else None,
        )
    except (PromptError, ValueError) as error:
        raise QuestionFileError(f"{where}: {error}") from None


def _constraint(schema: Any) -> Constraint:
    from edgevl.generate.constraint import Constraint

    return Constraint.json_schema(schema)


def _picture(directory: Path, name: str) -> Path:
    """Return the path of a picture; refuse what leads out of ``directory``, also by a link."""
    image = directory / name
    try:
        inside = image.resolve().is_relative_to(directory.resolve())
        exists = inside and image.is_file()
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, a loop of links
        raise ValueError(f"`image` {name[:80]!r} is not a usable path") from None
    if not inside:
        raise ValueError(
            f"`image` {name!r} lies outside of {directory}; put pictures beside the file"
        )
    if not exists:
        raise ValueError(f"`image` {name!r} is not a file in {directory}")
    return image


def normalise(text: str) -> str:
    """Bring answers to one form: NFKC, case folded, single spaces, no trailing punctuation."""
    text = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return text.rstrip(_TRAILING + " ")


def is_right(text: str, answers: Sequence[Expected]) -> bool:
    """Tell whether ``text`` is one of ``answers``.

    Texts are compared as ``normalise`` writes them. Where an expected text has boxes, the boxes
    alone count: as many as expected, and a mean IoU of at least ``IOU_THRESHOLD``.

    An expected object is the value of an answer in JSON: the same keys with the same values, texts
    compared as above, objects in a list in any order. A box in it is a text, ``<box>[[…]]</box>``,
    and in the answer a list of four numbers, or a list of such lists.
    """
    return any(
        _same(_json_of(text), answer) if isinstance(answer, dict) else _same(text, answer)
        for answer in answers
    )


def _json_of(text: str) -> Any:
    """Return the value of JSON text, fenced or not; None, which is no object, if it is none."""
    bare = text.strip().removeprefix("```json").removeprefix("```").removesuffix("```")
    try:
        return json.loads(bare)
    except (ValueError, RecursionError):
        return None


def _same(given: Any, expected: Any) -> bool:
    if isinstance(expected, str) and (boxes := parse_boxes(expected)):
        text = given if isinstance(given, str) else f"<box>{json.dumps(given)}</box>"
        return mean_iou(parse_boxes(text), boxes) >= IOU_THRESHOLD
    if isinstance(expected, str):
        return isinstance(given, str) and normalise(given) == normalise(expected)
    if isinstance(expected, dict):
        return (
            isinstance(given, dict)
            and given.keys() == expected.keys()
            and all(_same(given[key], expected[key]) for key in expected)
        )
    if isinstance(expected, list):
        if not isinstance(given, list) or len(given) != len(expected):
            return False
        if not all(isinstance(item, dict) for item in expected):
            return all(map(_same, given, expected))
        left = list(given)
        for item in expected:
            place = next((i for i, other in enumerate(left) if _same(other, item)), None)
            if place is None:
                return False
            del left[place]
        return True
    # True is not 1.
    return isinstance(given, bool) == isinstance(expected, bool) and given == expected


def evaluate_vqa(
    model: Model,
    questions: Sequence[Question],
    on_outcome: Callable[[Outcome], None] | None = None,
    **options: Any,
) -> VQAResult:
    """Ask every question by itself and compare the answers.

    Args:
        model: what to ask.
        questions: at least one, from ``read_questions``.
        on_outcome: called after every answer, for progress and records.
        options: passed to ``Model.ask``, such as ``max_tokens`` or ``max_tiles``.

    Raises:
        EdgeVLError: a picture or a prompt the model cannot take.
    """
    if not questions:
        raise QuestionFileError("no questions to ask")
    outcomes = []
    for question in questions:
        outcome, _ = ask_question(model, question, **options)
        outcomes.append(outcome)
        if on_outcome is not None:
            on_outcome(outcome)
    return VQAResult(tuple(outcomes))


def ask_question(model: Model, question: Question, **options: Any) -> tuple[Outcome, Answer]:
    """Ask one question and judge the answer; ``options`` are passed to ``Model.ask``.

    Unless they say otherwise the answer is greedy, whatever defaults the checkpoint has: figures
    are to be the same every time, and to tell of the model alone.
    """
    options = {**GREEDY, "constraint": question.constraint, **options}
    answer = model.ask(question.question, images=[question.image], **options)
    return Outcome(question, answer.text, is_right(answer.text, question.answers)), answer


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
        asked, count = (question.question, [question.image]), len(answer.token_ids)
        scores = [
            each.score(each.chat(max_tiles=max_tiles).prompt(*asked, count + 1), answer.token_ids)
            for each in (against, model)
        ]
        # The end of the turn counts as a token; an answer that was cut off has none.
        left = count + (answer.finish_reason == "stop")
        for first, other in zip(*scores, strict=True):
            taken = min(len(first), left)
            # The answer is greedy: its tokens are the reference's most likely ones.
            comparison.add(first[:taken], other[:taken], first[:taken].argmax(axis=1))
            left -= taken
        outcomes.append(outcome)
        expected.append(reference)
        if on_outcome is not None:
            on_outcome(outcome, reference)
    return VQAComparison(
        VQAResult(tuple(outcomes)),
        VQAResult(tuple(expected)),
        comparison.model.tokens,
        comparison.token_agreement,
        comparison.kl_divergence,
    )
