"""``edgevl compile``: a model for a board."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgevl.cli.terminal import note, progress_bar

FILE = click.Path(path_type=Path)


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
@click.option(
    "--target",
    type=click.Choice(["ax650", "ax630c"]),
    required=True,
    help="The chip; ax650 is the AX650N, AX650A and AX8850 too, ax630c the AX620Q.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    default=2047,
    show_default=True,
    help="Positions of the key/value cache; prompt and answer take one more at most.",
)
@click.option(
    "--chunk",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens of a prompt that are computed at once.",
)
@click.option(
    "--max-prefill",
    type=click.IntRange(min=0),
    default=1024,
    show_default=True,
    help="Longest history that a chunk may follow; beyond, a prompt goes token by token.",
)
@click.option(
    "--npu-mode",
    type=click.Choice(["NPU1", "NPU2", "NPU3"]),
    help="NPU cores that work as one.  [default: all]",
)
@click.option(
    "--calibration-images",
    type=FILE,
    metavar="DIR|TAR",
    help="Pictures like those to be asked about.  [default: drawn ones]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1, max=1024),
    default=32,
    show_default=True,
    help="Pictures to calibrate vision on.",
)
@click.option(
    "--uint8-input",
    is_flag=True,
    help="Give pictures to the NPU as bytes: a quarter of the size, normalised there.",
)
@click.option(
    "--weight-type",
    type=click.Choice(["s4", "s8"]),
    help="What plain text weights are rounded to; GPTQ stays as it is.  [default: s8]",
)
@click.option(
    "--post-topk",
    type=click.IntRange(min=0),
    default=0,
    metavar="K",
    help="Return only the K most probable tokens from the NPU, not all logits.",
)
@click.option(
    "--pulsar2",
    metavar="docker:IMAGE|PATH",
    help="The vendor's compiler.  [default: pulsar2 on PATH]",
)
@click.option(
    "--pulsar2-config",
    type=FILE,
    metavar="FILE",
    help="Configuration of the vision build; see docs/boards.md.",
)
@click.option(
    "--llm-build",
    type=click.Choice(["1", "2"]),
    help="Pulsar2's command for text: llm_build or llm_build2.  [default: the newest it has]",
)
@click.option(
    "--decode-step",
    type=click.IntRange(min=0),
    metavar="N",
    help="With llm_build2: a decode group for each N positions of context; 0 makes one.",
)
@click.option(
    "--parallel",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Layers that Pulsar2 builds at once; each takes memory.",
)
@click.option(
    "--check-level",
    type=click.IntRange(0, 2),
    default=1,
    show_default=True,
    help="How Pulsar2 checks text: 0 not, 1 a layer against floats, 2 by generating, for hours.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Write everything but the compiled files, and a build.sh that makes them elsewhere.",
)
@click.option("--emulate", is_flag=True, help="Write a model for the emulator; needs no Pulsar2.")
def command(
    model: str,
    output: Path,
    context: int,
    chunk: int,
    max_prefill: int,
    llm_build: str | None,
    **options: Any,
) -> None:
    """Compile MODEL for an Axera NPU with Pulsar2, the vendor's compiler.

    The result runs with `edgevl chat DIR --engine axera`; DIR/board.json says what it is. A run
    that was interrupted goes on where it stopped when the same command is given again.
    """
    from edgevl.axera.layout import BoardShape
    from edgevl.boards.run import compile_model
    from edgevl.boards.settings import CompileSettings

    settings = CompileSettings(
        shape=BoardShape(context, chunk, max_prefill),
        llm_build=None if llm_build is None else 1 if llm_build == "1" else 2,
        **options,
    )
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
