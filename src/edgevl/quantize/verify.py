"""The written checkpoint, loaded as a user would load it, beside the original."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from edgevl import generate
from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.engine.base import Floats
from edgevl.errors import EdgeVLError
from edgevl.evaluate import Outcome, evaluate_vqa, read_questions
from edgevl.generate import Model
from edgevl.loading import load_engine
from edgevl.options import GREEDY, LoadOptions, Precision
from edgevl.quantize.calibration import Example, Sample
from edgevl.quantize.settings import QuantizationError

#: Answers in the report, and their tokens.
EXAMPLES, EXAMPLE_TOKENS = 8, 96

#: What the engine may be off by from what was computed with the same weights, as a share of the
#: logits: rounding activations to INT8 costs some per cent, reading a wrong weight costs all.
TOLERANCE = 0.5

Progress = Callable[[int, int], object]
T = TypeVar("T")


def verify(
    made: Path,
    packed: Mapping[str, Mapping[str, StoredTensor]],
    sample: Sample,
    expected: Floats | None,
) -> None:
    """Load a checkpoint, compare its quantized weights with those meant, and run it.

    Args:
        made: the checkpoint.
        packed: the GPTQ tensors that it should have, by canonical name of the weight.
        sample: a sequence to run.
        expected: its logits at the last position, float32 [V], or None if they are not known.

    Raises:
        CheckpointError: it cannot be opened.
        QuantizationError: a weight differs, or what it computes.
    """
    with Checkpoint.open(made) as checkpoint:
        for name, tensors in packed.items():
            stored = checkpoint.gptq(name)
            for part, tensor in tensors.items():
                read = getattr(stored, part, None)
                if read is None or not np.array_equal(read.data, tensor.data):
                    raise QuantizationError(
                        f"{made}: {part} of {name} is not what was written; is the disk damaged?"
                    )
        checkpoint.release()
        engine = load_engine(checkpoint, LoadOptions(cache=False))
        logits = engine.prefill(engine.new_sequence(), sample.embeddings)
    if not np.isfinite(logits).all():
        raise QuantizationError(f"{made}: its logits are not finite numbers")
    if expected is not None:
        error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
        if error > TOLERANCE:
            raise QuantizationError(
                f"{made}: the engine's logits differ by {error:.0%} from what was quantized"
            )


def compare_answers(
    original: Path, made: Path, examples: Sequence[Example | None], progress: Progress
) -> list[dict[str, Any]]:
    """Ask both models about the first held-out pictures: -> ``examples`` of a report.

    ``progress`` is called after every answer with how many there are and will be.
    """
    asked = [example for example in examples if example is not None][:EXAMPLES]
    done = itertools.count(1)

    def ask(model: Model) -> list[str]:
        texts = []
        for example in asked:
            pictures = list(example.pictures)
            answer = model.ask(
                example.questions[0], pictures, max_tokens=EXAMPLE_TOKENS, max_tiles=1, **GREEDY
            )
            texts.append(answer.text)
            progress(next(done), 2 * len(asked))
        return texts

    return [
        {
            "picture": _data_url(example.pictures[0]) if example.pictures else None,
            "question": example.questions[0],
            "original": before,
            "quantized": after,
        }
        for example, before, after in zip(asked, *_both(original, made, ask), strict=True)
    ]


def compare_accuracy(original: Path, made: Path, file: Path, progress: Progress) -> dict[str, Any]:
    """Ask both models the questions of a file: -> ``vqa`` of a report.

    ``progress`` is called after every answer with how many there are and will be.

    Raises:
        QuestionFileError: the file cannot be used.
    """
    questions = read_questions(file)
    done = itertools.count(1)

    def ask(model: Model) -> dict[str, Any]:
        def count(outcome: Outcome) -> None:
            progress(next(done), 2 * len(questions))

        return evaluate_vqa(model, questions, count).to_dict()

    before, after = _both(original, made, ask)
    return {
        "file": file.name,
        "questions": len(questions),
        "original": before["accuracy"],
        "quantized": after["accuracy"],
        "families": {
            name: {"original": accuracy, "quantized": after["families"][name]}
            for name, accuracy in before["families"].items()
        },
    }


def load(path: Path, precision: Precision = "auto") -> Model:
    """Load a model that is needed once: no packed weights are left beside it.

    Where the memory does not suffice for ``precision``, it is "auto".
    """
    try:
        return generate.load(path, precision=precision, cache=False)
    except EdgeVLError:
        if precision == "auto":
            raise
        return generate.load(path, cache=False)


def _both(original: Path, made: Path, ask: Callable[[Model], T]) -> tuple[T, T]:
    """Have the original asked, in bfloat16, and then the result: never both in memory."""
    return ask(load(original, "bf16")), ask(load(made))


def _data_url(jpeg: bytes) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
