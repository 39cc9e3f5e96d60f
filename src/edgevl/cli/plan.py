"""``edgevl plan``: what a board can hold and how long it takes, computed beforehand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from edgevl.boards.settings import TARGETS, Target
from edgevl.cli.options import json_option
from edgevl.cli.terminal import print_result

if TYPE_CHECKING:
    from edgevl.axera.layout import BoardShape
    from edgevl.boards.plan import BoardPlan

#: The model whose times are published.
PUBLISHED_MODEL = "internvl3_5-1b"


@click.command("plan")
@click.argument("model", default=PUBLISHED_MODEL)
@click.option("--target", type=click.Choice([*TARGETS]), default="ax650", show_default=True)
@click.option(
    "--prompt-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Tokens to prefill, template and pictures included.  [default: the longest prefill]",
)
@click.option(
    "--cached-tokens",
    type=click.IntRange(min=0),
    default=0,
    metavar="N",
    help="Tokens of earlier turns, which the cache holds.",
)
@click.option("--generate", type=click.IntRange(min=1), metavar="N", help="Tokens to answer with.")
@click.option("--context", type=int, metavar="N", help="Length of the cache.  [default: 2047]")
@click.option("--chunk", type=int, metavar="N", help="Tokens of a prefill chunk.  [default: 128]")
@click.option(
    "--max-prefill",
    type=int,
    metavar="N",
    help="Longest history that a prefill chunk continues.  [default: 1024]",
)
@click.option(
    "--weight-type",
    type=click.Choice(("s4", "s8")),
    help="Of the layers on the board.  [default: the checkpoint's; s8 if it is not quantized]",
)
@click.option(
    "--memory",
    type=click.FloatRange(min=0, min_open=True, max=1024),
    metavar="GiB",
    help="NPU memory (CMM) of your board.  [default: that of a typical one]",
)
@json_option
def command(
    model: str,
    target: str,
    prompt_tokens: int | None,
    cached_tokens: int,
    generate: int | None,
    weight_type: str | None,
    memory: float | None,
    as_json: bool,
    **sizes: int | None,
) -> None:
    """Compute how long MODEL takes on a board, and whether it fits.

    MODEL may also be a preset of `edgevl synth`; the default is the one whose times on the AX650
    are published. For others they are estimates. No board is asked. Defaults of a compiled model
    are what it was compiled for.
    """
    from dataclasses import replace

    from edgevl.boards.plan import make_plan, planned_model

    described = planned_model(model)
    given = {name: value for name, value in sizes.items() if value is not None}
    shape = replace(described.shape, **given)
    plan = make_plan(
        described.config,
        TARGETS[target],
        shape,
        template_tokens=described.template_tokens,
        prompt_tokens=prompt_tokens,
        cached_tokens=cached_tokens,
        generate=generate,
        weight_bits=int(weight_type[1:]) if weight_type else described.weight_bits,
        vision=described.has_vision,
        memory_bytes=None if memory is None else round(memory * (1 << 30)),
    )
    print_result(
        {"model": model, "target": target, **plan.to_dict()},
        describe(plan, model, TARGETS[target], shape, typical=memory is None),
        as_json,
    )


def describe(
    plan: BoardPlan, model: str, target: Target, shape: BoardShape, typical: bool
) -> Iterator[str]:
    """Yield a plan as lines for people; ``typical`` if the memory is not the user's own figure."""
    yield f"model     {model} on {target.name}, {target.default_npu_mode}, context {shape.context}"
    how = f"{_counted(len(plan.prefill.groups), 'chunk')} of {shape.chunk}"
    if plan.prefill.tokens:
        how += f" and {_counted(plan.prefill.tokens, 'token')} one by one"
    after = f" after {plan.cached_tokens}" if plan.cached_tokens else ""
    yield f"prefill   {plan.prefill_ms:9.1f} ms for {plan.prompt_tokens} tokens{after}: {how}"
    yield f"decode    {plan.decode_ms:9.2f} ms a token, {1000 / plan.decode_ms:.1f} tokens/s"
    if plan.total_ms is not None:
        yield f"answer    {plan.total_ms:9.1f} ms, prompt and {plan.generate} tokens together"
    if plan.next_turn_ms is not None:
        yield f"next turn {plan.next_turn_ms:9.1f} ms for a question of {plan.next_question} tokens"
    if plan.vision_ms is not None:
        yield f"vision    {plan.vision_ms:9.1f} ms a tile, published with InternVL3-1B"
    memory = plan.memory
    parts = (
        ("layers", memory.text_layers),
        ("head", memory.post),
        ("vision", memory.vision),
        ("cache", memory.kv_cache),
    )
    listed = ", ".join(f"{name} {size / 1e6:.0f}" for name, size in parts if size)
    verdict = "" if memory.npu <= plan.available_bytes else ": DOES NOT FIT"
    source = f" ({target.memory_source})" if typical else ""
    yield (
        f"memory    {memory.npu / 1e6:9.0f} MB of the NPU's {plan.available_bytes / 1e6:.0f}"
        f"{source}{verdict}"
    )
    yield f"          {listed}; embedding on the host {memory.embeddings / 1e6:.0f}"
    limits = f"{plan.max_prompt_tokens} tokens prefilled in chunks"
    if plan.memory.vision:
        limits += f", {plan.max_images} pictures of one tile"
    yield f"limits    {limits}; {plan.max_context} with the answer"
    yield f"          NPU times: {plan.basis}; not measured here; the host's time adds to them"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"
