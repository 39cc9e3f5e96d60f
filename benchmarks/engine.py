"""Time an engine on this machine: loading, vision, prefill, decode; medians of several runs.

    python benchmarks/engine.py --model tiny --runs 5

Inputs are random: the time does not depend on what a picture shows or a token means.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np

import edgevl
from edgevl.engine import ENGINES, Engine
from edgevl.machine import this_machine


@dataclass(frozen=True)
class Measurement:
    """What was measured, in which unit, and its median, least and greatest value."""

    name: str
    unit: str
    median: float
    least: float
    greatest: float


def measure(name: str, unit: str, runs: int, once: Callable[[], float]) -> Measurement:
    """Call ``once``, which returns milliseconds, ``runs`` times after one call to warm up."""
    once()
    values = sorted(once() for _ in range(runs))
    return Measurement(name, unit, statistics.median(values), values[0], values[-1])


def elapsed_ms(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes, in milliseconds."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def prefill_ms(engine: Engine, tokens: int) -> float:
    """Prefill ``tokens`` positions from an empty cache."""
    embeddings = engine.embed(np.arange(tokens, dtype=np.int64))
    engine.rewind(0)
    return elapsed_ms(lambda: engine.prefill(embeddings, 0))


def decode_ms(engine: Engine, context: int, tokens: int) -> float:
    """Decode ``tokens`` after ``context`` others; return the time of one."""
    prefill_ms(engine, context)

    def decode() -> None:
        for token_id in range(tokens):
            engine.decode(token_id)

    return elapsed_ms(decode) / tokens


def run(model: str, engine_name: str, runs: int) -> list[Measurement]:
    """Measure everything on one model."""
    results = [
        measure("load", "ms", runs, lambda: elapsed_ms(lambda: edgevl.load(model, engine_name)))
    ]
    loaded = edgevl.load(model, engine_name)
    engine = loaded.engine
    if loaded.checkpoint.has_vision:
        size = loaded.checkpoint.config.vision.image_size
        tile = np.random.default_rng(0).standard_normal((1, 3, size, size), dtype=np.float32)
        results.append(
            measure(
                f"vision, one tile of {size} x {size}",
                "ms",
                runs,
                lambda: elapsed_ms(lambda: engine.encode_images(tile)),
            )
        )
    for tokens in (128, 512):
        if tokens < engine.max_context:
            results.append(
                measure(
                    f"prefill, {tokens} tokens", "ms", runs, lambda n=tokens: prefill_ms(engine, n)
                )
            )
    context, tokens = min(128, engine.max_context // 2), min(32, engine.max_context // 2)
    results.append(
        measure(
            f"decode after {context} tokens",
            "ms/token",
            runs,
            lambda: decode_ms(engine, context, tokens),
        )
    )
    return results


def main() -> None:
    """Read the arguments, measure, print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--engine", default="auto", choices=["auto", *ENGINES])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    machine = this_machine()
    results = run(arguments.model, arguments.engine, max(1, arguments.runs))
    if arguments.json:
        import json

        value = {
            "machine": asdict(machine),
            "model": arguments.model,
            "results": [asdict(result) for result in results],
        }
        print(json.dumps(value))
        return
    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"{machine.cpu}, {machine.usable_cores:g} cores usable{load}")
    print(f"{arguments.model}, engine {arguments.engine}, median of {max(1, arguments.runs)} runs")
    print(f"{'':34}{'median':>10}{'least':>10}{'greatest':>10}")
    for result in results:
        print(
            f"{result.name:34}{result.median:>10.2f}{result.least:>10.2f}"
            f"{result.greatest:>10.2f}  {result.unit}"
        )


if __name__ == "__main__":
    main()
