"""``edgevl quantize``: a smaller checkpoint, and what it cost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from edgevl.cli.terminal import note, progress_bar
from edgevl.optional import needs

FILE = click.Path(path_type=Path)


@click.command("quantize")
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
    "--text",
    type=click.Choice(["int4", "int8", "none"]),
    default="int4",
    show_default=True,
    help="Format of the text model's linear layers.",
)
@click.option(
    "--vision",
    type=click.Choice(["int8", "none"]),
    default="int8",
    show_default=True,
    help="Format in which the vision encoder is to run.",
)
@click.option(
    "--method",
    type=click.Choice(["gptq", "rtn"]),
    default="gptq",
    show_default=True,
    help="rtn rounds each weight to nearest: quick, and worse.",
)
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32"]),
    default="128",
    show_default=True,
    help="Inputs that share a scale; fewer cost space and keep more.",
)
@click.option(
    "--calibration-text",
    type=FILE,
    multiple=True,
    metavar="FILE",
    help="Plain text like the one to be read and written; repeatable.",
)
@click.option(
    "--calibration-images",
    type=FILE,
    metavar="DIR|TAR",
    help="Pictures like those to be asked about.  [default: drawn ones]",
)
@click.option(
    "--samples",
    type=click.IntRange(min=1, max=4096),
    default=128,
    show_default=True,
    help="Conversations and texts to calibrate on.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--vqa",
    type=FILE,
    metavar="FILE.jsonl",
    help="Questions on which to compare original and result; see `edgevl eval`.",
)
def command(
    model: str,
    output: Path,
    group_size: str,
    calibration_text: tuple[Path, ...],
    vqa: Path | None,
    **options: Any,
) -> None:
    """Quantize MODEL to INT4 text and INT8 vision, and report what it cost.

    The result runs here and loads in transformers and GPTQModel. DIR/report.html says what was
    lost. A run that was interrupted goes on where it stopped when the same command is given again.
    """
    with needs("quantize"):
        import torch  # noqa: F401
    from edgevl.quantize import QuantizationSettings, quantize_checkpoint

    settings = QuantizationSettings(
        group_size=int(group_size), calibration_text=calibration_text, **options
    )
    context = click.get_current_context()
    origins = {
        name: "command line"
        for name in context.params
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE
    }
    try:
        report = quantize_checkpoint(
            model, output, settings, origins=origins, vqa=vqa, progress=progress_bar
        )
    except (KeyboardInterrupt, SystemExit):
        click.echo(f"interrupted; the same command goes on in {output}.partial", err=True)
        raise
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
