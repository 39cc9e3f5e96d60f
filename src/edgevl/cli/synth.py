"""``edgevl synth``: a checkpoint with real shapes and random weights."""

from __future__ import annotations

from pathlib import Path

import click

from edgevl.cli.options import output_option
from edgevl.cli.terminal import bar_of
from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import DTYPES, LAYOUTS, stored_bytes, write_checkpoint


def _parse_size(context: click.Context, parameter: click.Parameter, value: str) -> int:
    """Read a size such as ``5GB`` (decimal, as on the Hub): bytes."""
    digits = value.upper().removesuffix("B")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9}.get(digits[-1:], 1)
    digits = digits if unit == 1 else digits[:-1]
    if not digits.isdecimal() or not 10**3 <= int(digits) * unit <= 10**15:
        raise click.BadParameter(f"{value!r} is not a size such as 5GB or 500MB")
    return int(digits) * unit


@click.command("synth")
@click.option(
    "--preset", type=click.Choice(list(PRESETS)), required=True, help="Model whose shape to take."
)
@click.option(
    "--layout",
    type=click.Choice(LAYOUTS),
    default="internvl_chat",
    show_default=True,
    help="Files as in OpenGVLab/InternVL3_5-1B, or as in its -HF sibling.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@click.option(
    "--shard-size",
    callback=_parse_size,
    default="5GB",
    show_default=True,
    metavar="SIZE",
    help="Largest file of weights.",
)
@output_option
def command(preset: str, layout: str, seed: int, dtype: str, shard_size: int, output: Path) -> None:
    """Write a checkpoint with real shapes, real files and random weights.

    For measuring speed and memory where the real weights cannot be downloaded.
    """
    chosen = PRESETS[preset]
    size = stored_bytes(chosen.config, dtype)
    with bar_of(total=size, unit="B", unit_scale=True, desc=output.name) as bar:
        write_checkpoint(
            chosen.config,
            output,
            layout=layout,
            seed=seed,
            dtype=dtype,
            shard_bytes=shard_size,
            base_vocabulary=chosen.base_vocabulary,
            progress=bar.update,
        )
    click.echo(output)
