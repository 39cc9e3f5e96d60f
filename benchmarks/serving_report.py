"""The figures and the table of the comparison of servers."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from load_generator import Load
from report import number, rates


def summary(loads: Sequence[Load]) -> dict[str, Any]:
    """Return the figures of a server under one number of clients, from a load for each round.

    Rates are medians of the rounds. Percentiles are those of all requests of all rounds: one round
    has too few for them. What failed counts in ``errors`` and in the seconds, and nowhere else;
    figures for which nothing is left are None.
    """
    answers = [answer for load in loads for answer in load.succeeded]
    return {
        "output_tokens_per_s": statistics.median(
            sum(answer.output_tokens for answer in load.succeeded) / load.seconds for load in loads
        ),
        "requests_per_s": statistics.median(len(load.succeeded) / load.seconds for load in loads),
        "ttft_p50_ms": percentile([answer.ttft_ms for answer in answers], 50),
        "ttft_p95_ms": percentile([answer.ttft_ms for answer in answers], 95),
        "ms_per_token_p50": percentile([answer.ms_per_token for answer in answers], 50),
        "requests": sum(len(load.answers) for load in loads),
        "errors": Counter(
            answer.error for load in loads for answer in load.answers if answer.error
        ),
        "prompt_tokens": sorted({answer.prompt_tokens for answer in answers}),
        "client_processor_share": max(load.processor_seconds / load.seconds for load in loads),
        "rounds": [
            {
                "seconds": load.seconds,
                "output_tokens": sum(answer.output_tokens for answer in load.succeeded),
                "ttft_ms": [answer.ttft_ms for answer in load.succeeded],
                "ms_per_token": [answer.ms_per_token for answer in load.succeeded],
            }
            for load in loads
        ],
    }


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile, between two values in proportion; None of nothing."""
    return float(np.percentile(values, percent)) if values else None


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown: a line for each server under each number of clients."""
    machine, lines = results["machine"], results["lines"]
    shared = results["shared_tokens"]
    fewest = min((line["clients"] for line in lines), default=1)
    text = [
        f"{machine['cpu']}, {machine['threads']} threads, {results['date']}; {results['model']}, "
        f"{results['precision']}; prompts of {results['prompt_tokens']} tokens"
        f"{f', the first {shared} the same' if shared else ''}"
        f"{', and a picture' if results['image'] else ''}, answers of {results['generate']} at "
        f"temperature {results['temperature']:g}; {results['rounds']} interleaved rounds.",
        *rates(machine),
        "",
        f"| clients | server | output tokens/s | times {_clients(fewest)} | EdgeVL times it "
        "| requests/s | TTFT p50 / p95, ms | ms a token, p50 | errors |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    speed = {(line["clients"], line["server"]): line["output_tokens_per_s"] for line in lines}
    for line in lines:
        clients, server = line["clients"], line["server"]
        cells = [
            str(clients),
            line["label"],
            f"{speed[clients, server]:.1f}",
            number(_ratio(speed[clients, server], speed[fewest, server]), ".2f"),
            number(_ratio(speed.get((clients, "edgevl")), speed[clients, server]), ".2f"),
            f"{line['requests_per_s']:.2f}",
            f"{number(line['ttft_p50_ms'], '.0f')} / {number(line['ttft_p95_ms'], '.0f')}",
            number(line["ms_per_token_p50"], ".1f"),
            f"{sum(line['errors'].values())} of {line['requests']}",
        ]
        text.append(f"| {' | '.join(cells)} |")
    if failed := [line for line in lines if line["errors"]]:
        text += ["", "Errors:"]
        text += [
            f"- {line['label']}, {_clients(line['clients'])}: {count} times {error}"
            for line in failed
            for error, count in line["errors"].items()
        ]
    if lines:
        share = max(line["client_processor_share"] for line in lines)
        text += ["", f"The clients took up to {share:.0%} of a core."]
    if results["unavailable"]:
        text += ["", "Not measured:"]
        text += [f"- {label}: {reason}" for label, reason in results["unavailable"].items()]
    return "\n".join(text) + "\n"


def _clients(number: int) -> str:
    return "1 client" if number == 1 else f"{number} clients"


def _ratio(one: float | None, other: float) -> float | None:
    return one / other if one is not None and other else None
