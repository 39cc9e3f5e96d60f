"""Greedy answers of a board's model beside the reference engine's: one picture, three, three turns.

    python benchmarks/board_agreement.py CHECKPOINT BOARD [--max-tokens 16]

BOARD is what `edgevl compile CHECKPOINT --emulate` wrote, or on a board what Pulsar2 did. The
reference engine, in float32, is shown each answer token by token. Where it would have chosen
another token, the two must be as good as equal: their logits no further apart than rounding to
bfloat16 explains. Exit status 1: they are further apart.

With relative errors of 2^-9 / sqrt(3) (rounding to nearest, uniformly distributed) at `ROUNDINGS`
places of each layer, which add up like a random walk along the residual stream, a logit's error has
the standard deviation s = 2^-9 / sqrt(3) * sqrt(ROUNDINGS * layers) * (standard deviation of the
logits). Two logits are compared, each allowed 4 s.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

import edgevl
from edgevl.options import GREEDY
from edgevl.quantize.calibration.pictures import drawn

#: Where a layer rounds to bfloat16: inputs of its four products, queries, keys, values, weights of
#: attention, its output.
ROUNDINGS = 9
QUESTIONS = ("What is in the picture?", "请描述这幅图。", "Which is the largest thing in it?")


def main() -> int:
    """Compare, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("board", metavar="BOARD")
    parser.add_argument("--max-tokens", type=int, default=16, choices=range(1, 513), metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    arguments = parser.parse_args()
    board = edgevl.load(arguments.board, engine="axera")
    reference = edgevl.load(arguments.checkpoint, engine="reference")
    pictures = [drawn(place, arguments.seed + place) for place in range(3)]
    cases: dict[str, Sequence[tuple[str, list[Any]]]] = {
        "one picture": [(QUESTIONS[0], pictures[:1])],
        "three pictures": [(QUESTIONS[1], pictures)],
        "three turns": [(QUESTIONS[0], pictures[:1]), (QUESTIONS[1], []), (QUESTIONS[2], [])],
    }
    print("| | prompt | computed anew | tokens | not the same | largest gap | allowed |")
    print("|---|---|---|---|---|---|---|")
    failed = False
    for name, turns in cases.items():
        failed |= compare(board, reference, name, turns, arguments.max_tokens)
    return int(failed)


def compare(
    board: edgevl.Model,
    reference: edgevl.Model,
    name: str,
    turns: Sequence[tuple[str, list[Any]]],
    max_tokens: int,
) -> bool:
    """Hold a conversation on the board, a row a turn; whether a token cannot be explained."""
    chat, shadow = board.chat(max_tiles=1), reference.chat(max_tiles=1)
    failed = False
    for number, (text, images) in enumerate(turns, start=1):
        shadow.turns = list(chat.turns)
        started = time.perf_counter()
        answer = chat.ask(text, images=images, max_tokens=max_tokens, **GREEDY)
        elapsed_s = time.perf_counter() - started
        # What ended the answer was chosen too, but is not part of it.
        gaps, allowed = [], math.inf
        prompt = shadow.prompt(text, images, len(answer.token_ids) + 1)
        blocks = reference.score(prompt, answer.token_ids)
        logits = np.concatenate([np.array(block) for block in blocks])[: len(answer.token_ids)]
        for row, token_id in zip(logits, answer.token_ids, strict=True):
            gaps.append(float(row.max() - row[token_id]))
            allowed = min(allowed, tolerance(reference, row))
        usage = answer.usage
        print(
            f"| {name}, turn {number} | {usage.prompt_tokens} | "
            f"{usage.prompt_tokens - usage.cached_tokens} | {len(gaps)} | "
            f"{sum(gap > 0 for gap in gaps)} | {max(gaps, default=0):.4f} | {allowed:.4f} |",
            flush=True,
        )
        print(f"{elapsed_s:.1f} s: {answer.text!r}", file=sys.stderr)
        failed |= max(gaps, default=0) > allowed
    return failed


def tolerance(reference: edgevl.Model, logits: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Return how far apart two logits that rounding to bfloat16 may swap can be."""
    config = reference.checkpoint.config
    layers = config.text.num_hidden_layers + config.vision.num_hidden_layers
    relative = 2**-9 / math.sqrt(3) * math.sqrt(ROUNDINGS * layers)
    return 2 * 4 * relative * float(logits.std())


if __name__ == "__main__":
    sys.exit(main())
