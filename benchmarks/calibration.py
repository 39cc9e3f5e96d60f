"""What calibrating on pictures is worth: the same model, quantized after seeing this or that.

    python benchmarks/calibration.py [--model tiny] [--questions FILE.jsonl] [--seeds 3]

The pictures of every other question are calibrated on where a row says so, and the other questions
are measured on, in every row. Only the text model is quantized (INT4, groups of 128); it runs in
bfloat16, so that weights are all that differs.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import edgevl
from edgevl.checkpoint import Checkpoint
from edgevl.evaluate import compare_vqa, evaluate_vqa, read_questions
from edgevl.loading import locate
from edgevl.quantize import QuantizationSettings
from edgevl.quantize.calibration import Sample, collect
from quantize_text import quantize_text

QUESTIONS = Path(__file__).parents[1] / "models/tiny/heldout/questions.jsonl"


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--questions", type=Path, default=QUESTIONS)
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration")
    parser.add_argument("--samples", type=int, default=128, help="sequences to calibrate on")
    arguments = parser.parse_args()
    questions = read_questions(arguments.questions)
    pictures = sorted({question.image for question in questions})
    seen = set(pictures[::2])
    measured = [question for question in questions if question.image not in seen]
    print(f"{len(measured)} questions; medians of {arguments.seeds} seeds (smallest to largest)\n")
    print("| calibrated on | KL divergence | same next token | right answers |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "pictures").mkdir()
        for picture in seen:
            shutil.copy(picture, directory / "pictures")
        drawn = QuantizationSettings(samples=arguments.samples)
        given = replace(drawn, calibration_images=directory / "pictures")
        rows = {
            "nothing: rounded to nearest": replace(drawn, method="rtn"),
            "conversations without pictures": drawn,
            "the default: drawn pictures": drawn,
            "pictures of the same kind": given,
        }
        against = edgevl.load(arguments.model, precision="bf16", exact_logits=True)
        for row, settings in rows.items():
            results = []
            for seed in range(arguments.seeds):
                work = directory / f"{row}-{seed}"
                (work / "checkpoint").mkdir(parents=True)
                seeded = replace(settings, seed=seed)
                samples: Sequence[Sample] = ()
                if settings.method == "gptq":
                    loaded = edgevl.load(arguments.model)
                    samples = collect(loaded, seeded, work, text_only="without" in row).samples
                with Checkpoint.open(locate(arguments.model)) as checkpoint:
                    quantize_text(checkpoint, seeded, samples, work, work / "checkpoint")
                model = edgevl.load(work / "checkpoint", precision="bf16", exact_logits=True)
                results.append(compare_vqa(model, against, measured))
            columns = [
                spread([result.kl_divergence for result in results], "{:.4f}"),
                spread([result.token_agreement for result in results], "{:.2%}"),
                spread([result.result.accuracy for result in results], "{:.1%}"),
            ]
            print(f"| {row} | {' | '.join(columns)} |", flush=True)
        accuracy = evaluate_vqa(against, measured).accuracy
        print(f"| (the original) | 0 | 100 % | {accuracy:.1%} |")


def spread(values: Sequence[float], form: str) -> str:
    """Return the median, and smallest to largest."""
    low, middle, high = (
        form.format(value) for value in (min(values), statistics.median(values), max(values))
    )
    return f"{middle} ({low} to {high})"


if __name__ == "__main__":
    main()
