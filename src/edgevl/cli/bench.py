"""``edgevl bench``: how fast a model runs here, beside what the machine allows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgevl.cli.options import flags, json_option, load_model
from edgevl.cli.terminal import bar_of, print_result
from edgevl.files import replacing
from edgevl.options import LoadOptions

if TYPE_CHECKING:
    from edgevl.evaluate.bench import BenchResult

#: Most lengths of prompts in one run.
MAX_LENGTHS = 32


def _lengths(context: click.Context, parameter: click.Parameter, value: str) -> tuple[int, ...]:
    """Read lengths such as ``128,300``: whole numbers from 1, each once, in ascending order."""
    words = value.split(",")
    if len(words) > MAX_LENGTHS:
        raise click.BadParameter(f"{len(words)} lengths; {MAX_LENGTHS} are the most")
    for word in words:
        if not (word.strip().isdecimal() and 1 <= int(word) <= 1 << 24):
            raise click.BadParameter(f"{word!r} is not a number of tokens; write as 128,300,1024")
    return tuple(sorted({int(word) for word in words}))


@click.command("bench")
@click.argument("model")
@click.option(
    "--prompt-tokens",
    callback=_lengths,
    default="128,300,1024",
    show_default=True,
    metavar="N,N,…",
    help="Lengths to prefill; decoding follows the middle one.",
)
@click.option(
    "--generate",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    metavar="N",
    help="Tokens to decode.",
)
@click.option("--image", is_flag=True, help="Encode a tile, too.")
@click.option(
    "--runs",
    type=click.IntRange(1, 1000),
    default=5,
    show_default=True,
    metavar="N",
    help="Rounds; each figure is the median.",
)
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="OUT.png",
    help="Draw the machine's roofline and the steps under it.",
)
@flags(LoadOptions)
@json_option
def command(
    model: str,
    prompt_tokens: tuple[int, ...],
    generate: int,
    image: bool,
    runs: int,
    plot: Path | None,
    as_json: bool,
    **loading: Any,
) -> None:
    """Measure how fast MODEL runs on this machine, and how much of the machine that is.

    Memory bandwidth and int8 rate are measured in the same run, between the steps. Inputs are
    random.
    """
    if plot is not None and plot.suffix.lower() != ".png":
        raise click.UsageError(f"--plot {plot}: the name must end in .png")
    with ExitStack() as stack:
        # What can fail at once fails before the model is loaded.
        drawing = stack.enter_context(replacing(plot)) if plot else None
        if plot is not None:
            from edgevl.evaluate.bench import plot_roofline, require_matplotlib

            require_matplotlib()
        from edgevl.evaluate.bench import run_bench

        loaded = load_model(model, quiet=True, **loading)
        steps = (runs + 1) * (len(prompt_tokens) + 1 + image)
        bar = stack.enter_context(
            bar_of(total=steps, bar_format="{percentage:3.0f}%|{bar}| {elapsed} {desc}")
        )

        def progress(step: str) -> None:
            bar.set_description_str(step)
            bar.update()

        result = run_bench(
            loaded, model, loaded.load_ms, prompt_tokens, generate, image, runs, progress=progress
        )
        bar.close()
        if drawing is not None:
            plot_roofline(result, loaded.checkpoint.config, loaded.engine.weight_bytes(), drawing)
    print_result(result.to_dict(), describe(result), as_json)


def describe(result: BenchResult) -> Iterator[str]:
    """Yield a result as lines for people; what is unknown is left out."""
    machine = f"machine   {result.cpu}"
    if result.threads is not None:
        machine += f", {result.threads} threads"
    if result.read_bandwidth_gb_s is not None and result.int8_gops is not None:
        machine += f", {result.read_bandwidth_gb_s:.1f} GB/s, {result.int8_gops:.0f} int8 GOPS"
    yield machine
    yield f"model     {result.model}, loaded in {result.load_ms:.0f} ms"
    if result.vision_ms is not None:
        yield f"vision    {result.vision_ms:9.1f} ms a tile"
    for step in result.prefill:
        rate = f"{step.tokens_per_s:.0f} tokens/s"
        yield f"prefill   {step.ms:9.1f} ms for {step.tokens} tokens, {rate}"
    decode = result.decode
    yield (
        f"decode    {decode.ms_per_token:9.2f} ms a token after {decode.after}, "
        f"{decode.tokens_per_s:.1f} tokens/s"
    )
    if decode.bytes_per_token is not None and decode.achieved_gb_s is not None:
        line = (
            f"          {decode.bytes_per_token / 1e6:9.1f} MB read a token, "
            f"{decode.achieved_gb_s:.1f} GB/s"
        )
        if decode.fraction_of_bandwidth is not None:
            line += f", {decode.fraction_of_bandwidth:.0%} of the bandwidth"
        yield line
    memory = f"memory    {result.peak_rss_bytes / 1e6:9.0f} MB at most"
    if result.weights_bytes is not None:
        memory += f", {result.weights_bytes / 1e6:.0f} MB of weights"
    yield memory
    yield f"          medians of {result.rounds} rounds"
    for line in result.notes:
        yield f"          {line}"
