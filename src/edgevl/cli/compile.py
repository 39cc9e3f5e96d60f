"""``edgevl compile``: a model for a board."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgevl.boards.settings import CompileSettings
from edgevl.cli.options import flags, output_option
from edgevl.cli.terminal import note, progress_bar, resumable


@click.command("compile")
@click.argument("model")
@output_option
@flags(CompileSettings)
def command(model: str, output: Path, **options: Any) -> None:
    """Compile MODEL for an Axera NPU with Pulsar2, the vendor's compiler.

    The result runs with `edgevl chat DIR --engine axera`; DIR/board.json says what it is. A run
    that was interrupted goes on where it stopped when the same command is given again.
    """
    from edgevl.boards.run import compile_model

    settings = CompileSettings(**options)
    with resumable(output):
        board = compile_model(model, output, settings, progress=progress_bar)
    for line in board["warnings"]:
        click.echo(f"warning: {line}", err=True)
    for line in summary(board):
        note(line)
    if settings.dry_run:
        click.echo(
            f"{output} is not a board's model yet: copy it to a machine with Pulsar2 and run its "
            "build.sh",
            err=True,
        )
    click.echo(output)


def summary(board: dict[str, Any]) -> Iterator[str]:
    """Yield what a user wants to know of ``board.json``, a line each."""
    yield (
        f"{board['chip']} {board['npu_mode']}, {board['weights']} weights, context "
        f"{board['context']}, chunks of {board['chunk']}, by {board['compiler']} in "
        f"{board['seconds'] / 60:.1f} min"
    )
    cosines = board["cosines"] or {}
    if cosines.get("vision_onnx") is not None:
        yield f"vision, ONNX beside the original: cosine {cosines['vision_onnx']:.6f}"
    for name, cosine in (cosines.get("layers") or {}).items():
        yield f"{name}, compiled beside floats: cosine {cosine}"
