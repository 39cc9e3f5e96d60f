"""``edgevl compile``: a model for a board."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import click

from edgevl.boards.settings import SETTINGS, CompileSettings, Setting
from edgevl.cli.terminal import note, progress_bar

Function = TypeVar("Function", bound=Callable[..., Any])

FILE = click.Path(path_type=Path)


def _option(setting: Setting) -> Callable[[Function], Function]:
    """Return the decorator that adds the flag of a setting."""
    if setting.default is False:
        return click.option(setting.flag, is_flag=True, help=setting.help)
    values = {str(value): value for value in setting.choices}
    kind: Any = FILE if setting.is_path else None
    if values:
        kind = click.Choice([*values])
    elif setting.low is not None:
        kind = click.IntRange(setting.low, setting.high)
    return click.option(
        setting.flag,
        type=kind,
        callback=lambda _, __, given: values.get(given, given),
        default=setting.default,
        required=setting.required,
        show_default=bool(setting.default),
        metavar=setting.metavar,
        help=setting.help,
    )


def _settings(function: Function) -> Function:
    """Add the flags of `CompileSettings`, by the names of its fields."""
    for setting in reversed(SETTINGS.values()):
        function = _option(setting)(function)
    return function


@click.command("compile")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    type=FILE,
    required=True,
    metavar="DIR",
    help="Directory to write; it must not exist, or be empty.",
)
@_settings
def command(model: str, output: Path, **options: Any) -> None:
    """Compile MODEL for an Axera NPU with Pulsar2, the vendor's compiler.

    The result runs with `edgevl chat DIR --engine axera`; DIR/board.json says what it is. A run
    that was interrupted goes on where it stopped when the same command is given again.
    """
    from edgevl.boards.run import compile_model

    settings = CompileSettings(**options)
    try:
        board = compile_model(model, output, settings, progress=progress_bar)
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; the same command goes on in {output}.partial", err=True)
        raise
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
