"""``edgevl quantize``: a smaller checkpoint, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgevl.cli.options import FILE, flags, output_option
from edgevl.cli.terminal import note, progress_bar, resumable
from edgevl.errors import needs
from edgevl.quantize.settings import QuantizationSettings


@click.command("quantize")
@click.argument("model")
@output_option
@flags(QuantizationSettings)
@click.option(
    "--vqa",
    type=FILE,
    metavar="FILE.jsonl",
    help="Questions on which to compare original and result; see `edgevl eval`.",
)
def command(model: str, output: Path, vqa: Path | None, **options: Any) -> None:
    """Quantize MODEL to INT4 text and INT8 vision, and report what it cost.

    The result runs here and loads in transformers and GPTQModel. DIR/report.html says what was
    lost. A run that was interrupted goes on where it stopped when the same command is given again.
    """
    with needs("quantize"):
        import torch  # noqa: F401
    from edgevl.quantize import quantize_checkpoint

    settings = QuantizationSettings(**options)
    context = click.get_current_context()
    origins = {
        name: "command line"
        for name in context.params
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    with resumable(output):
        report = quantize_checkpoint(
            model, output, settings, origins=origins, vqa=vqa, progress=progress_bar
        )
    for line in summary(report):
        note(line)
    note(f"details: {output / 'report.html'}")
    click.echo(output)


def summary(report: dict[str, Any]) -> Iterator[str]:
    """Yield what a user wants to know of a report, a line each."""
    sizes = report["sizes"]
    yield (
        f"{sizes['original_bytes'] / 1e6:,.0f} MB -> {sizes['quantized_bytes'] / 1e6:,.0f} MB "
        f"in {report['seconds'] / 60:.1f} min"
    )
    if perplexity := report.get("perplexity"):
        yield (
            f"perplexity ({perplexity['source']}): {perplexity['original']:.3f}, rounded to "
            f"nearest {perplexity['rtn']:.3f}, quantized {perplexity['quantized']:.3f}"
        )
    if conversations := report.get("conversations"):
        agreement = conversations["quantized"]["token_agreement"]
        yield f"same next token as the original: {agreement:.1%}"
    if vqa := report.get("vqa"):
        yield f"right answers: {vqa['original']:.1%} -> {vqa['quantized']:.1%}"
    yield from report["calibration"]["notes"]
