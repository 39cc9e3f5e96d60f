"""``edgevl batch``: many questions about many pictures and videos, into a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import (
    FILE,
    answer_options,
    as_unicode,
    flags,
    load_model,
    question_of,
    taken,
)
from edgevl.cli.terminal import print_json, progress_bar, resumable, tell, translated
from edgevl.options import LoadOptions

if TYPE_CHECKING:
    from edgevl.batch import BatchInput, BatchResult
    from edgevl.generate import Model


@click.command("batch")
@click.argument("model")
@click.option(
    "--input",
    "source",
    type=FILE,
    required=True,
    metavar="FILE.jsonl|DIR",
    help="A directory of pictures and videos; or one JSON object a line with image or video, "
    "question, id.",
)
@click.option(
    "-q",
    "--question",
    metavar="TEXT",
    callback=as_unicode,
    help="Asked about every picture and video, and where a line has no question of its own.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, allow_dash=True),
    required=True,
    metavar="OUT.jsonl",
    help="File to write, one JSON object a line; it must not exist. - is standard output.",
)
@answer_options
@flags(LoadOptions)
def command(model: str, source: Path, question: str | None, output: Path, **options: Any) -> int:
    """Ask MODEL about many pictures and videos and write a line for each.

    A picture, video or line that cannot be used gives a line with `error`, and the rest goes on. A
    run that was interrupted goes on where it stopped when the same command is given again. The
    exit status is 1 if every line failed.

    \b
    edgevl batch tiny --input photos/ -q "What number is on the display?" -o answers.jsonl
    edgevl batch tiny --input photos/ -q "Read it." --json-schema reading.json -o answers.jsonl
    """  # noqa: D301
    # What can fail at once fails before the model is loaded.
    from edgevl.batch import check_output, open_batch

    to_stdout = str(output) == "-"
    if not to_stdout:
        check_output(output)
    loading = taken(LoadOptions, options)
    asked = question_of(options)
    questions = open_batch(source, question)
    loaded = load_model(model, **loading)
    if to_stdout:
        result = _print(loaded, questions, asked)
    else:
        result = _write(loaded, questions, output, loading, asked)
        click.echo(output)
    if result.failed:
        tell(
            f"{result.failed} of {result.rows} failed; their `error` says why",
            f"{result.rows} 条中有 {result.failed} 条失败，原因见各行的 `error`",
        )
    return int(result.failed == result.rows)


def _print(model: Model, questions: BatchInput, options: dict[str, Any]) -> BatchResult:
    """Write every row to standard output as soon as it is there."""
    from edgevl.batch import BatchResult, answer_rows

    rows = failed = 0
    for result in answer_rows(model, questions.rows(), **options):
        print_json(result)
        sys.stdout.flush()
        rows += 1
        failed += "error" in result
    return BatchResult(rows, failed)


def _write(
    model: Model,
    questions: BatchInput,
    output: Path,
    loading: dict[str, Any],
    options: dict[str, Any],
) -> BatchResult:
    """Write the rows to a file, with a bar on the terminal."""
    from edgevl.batch import run_batch

    # Answers are the same however many threads there are, and whatever is kept.
    others = ("threads", "keep_bytes")
    decisive = {name: value for name, value in loading.items() if name not in others}
    bar = progress_bar(translated("answers", "回答"))
    with resumable(output), bar as show:
        return run_batch(model, questions, output, loading=decisive, progress=show, **options)
