"""``edgevl batch``: many questions about many pictures and videos, into a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import (
    answer_options,
    as_unicode,
    engine_options,
    load_model,
    read_constraint,
)
from edgevl.cli.terminal import chinese, print_json, progress_bar

if TYPE_CHECKING:
    from edgevl.batch import BatchInput, BatchResult
    from edgevl.generate import Model


@click.command("batch")
@click.argument("model")
@click.option(
    "--input",
    "source",
    type=click.Path(path_type=Path),
    required=True,
    metavar="FILE.jsonl|DIR",
    help="A directory of pictures and videos; or one JSON object a line with image or video, "
    "question, id.",
)
@click.option(
    "-q",
    "--question",
    metavar="TEXT",
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
@engine_options
def command(
    model: str,
    source: Path,
    question: str | None,
    output: Path,
    system: str | None,
    think: bool | None,
    max_tiles: int | None,
    frames: int,
    json_object: bool,
    json_schema: Path | None,
    engine: str,
    max_context: int | None,
    precision: str,
    kv_cache: str,
    threads: int | None,
    **sampling: Any,
) -> int:
    """Ask MODEL about many pictures and videos and write a line for each.

    A picture, video or line that cannot be used gives a line with `error`, and the rest goes on. A
    run that was interrupted goes on where it stopped when the same command is given again. The
    exit status is 1 if every line failed.

    \b
    edgevl batch tiny --input photos/ -q "What number is on the display?" -o answers.jsonl
    edgevl batch tiny --input photos/ -q "Read it." --json-schema reading.json -o answers.jsonl
    """  # noqa: D301
    question = as_unicode(question)
    # What can fail at once fails before the model is loaded.
    from edgevl.batch import check_output, open_batch

    to_stdout = str(output) == "-"
    if not to_stdout:
        check_output(output)
    sampling["constraint"] = read_constraint(json_object, json_schema, think)
    questions = open_batch(source, question)
    loading: dict[str, Any] = {
        "engine": engine,
        "max_context": max_context,
        "precision": precision,
        "kv_cache": kv_cache,
    }
    loaded = load_model(model, threads=threads, **loading)
    options = {
        "system": system,
        "thinking": think,
        "max_tiles": max_tiles,
        "frames": frames,
        **sampling,
    }
    if to_stdout:
        result = _print(loaded, questions, options)
    else:
        result = _write(loaded, questions, output, loading, options)
        click.echo(output)
    if result.failed:
        click.echo(
            f"{result.rows} 条中有 {result.failed} 条失败，原因见各行的 `error`"
            if chinese()
            else f"{result.failed} of {result.rows} failed; their `error` says why",
            err=True,
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

    try:
        with progress_bar("回答" if chinese() else "answers") as show:
            return run_batch(model, questions, output, loading=loading, progress=show, **options)
    except (KeyboardInterrupt, SystemExit):
        click.echo(
            f"已中断；再次运行同一命令即可从 {output}.partial 继续"
            if chinese()
            else f"interrupted; the same command goes on in {output}.partial",
            err=True,
        )
        raise
