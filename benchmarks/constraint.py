"""What a constraint adds to a token: the mask of a model's whole vocabulary, in milliseconds.

    python benchmarks/constraint.py TOKENIZER.json [--vocabulary 151936]

No model is needed: a given answer is followed, as if it were being generated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import numpy as np
from tokenizers import Tokenizer

from edgevl import Constraint
from edgevl.generate.token_mask import TokenMasks

Result = TypeVar("Result")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["cat", "dog", "猫"]},
        "scores": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 120}},
        "sure": {"type": ["boolean", "null"]},
    },
    "required": ["name", "kind", "scores", "sure"],
    "additionalProperties": False,
}
#: What an answer must be, and one that is.
CASES = {
    "any object": (
        Constraint.json_object(),
        '{"title": "Some words, 汉字 and 12345", "list": [1, 2.5, {"a": null, "b": [true]}]}',
    ),
    "schema": (
        Constraint.json_schema(SCHEMA),
        '{"name": "Anna 猫", "kind": "猫", "scores": [1, 20, 120], "sure": null}',
    ),
    "regex": (Constraint.regex("[A-Z][a-z]+( [a-z]+)*"), "Hello and some more words of text"),
}


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return what ``call`` returns and the milliseconds it took."""
    begun = time.perf_counter()
    result = call()
    return result, 1000 * (time.perf_counter() - begun)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tokenizer")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(args.tokenizer)
    end = tokenizer.token_to_id("<|im_end|>")
    if end is None:
        parser.error(f"{args.tokenizer}: it has no <|im_end|>")
    masks = TokenMasks(tokenizer, {end})
    logits = np.random.default_rng(0).standard_normal(args.vocabulary, np.float32)
    first_ms = timed(lambda: masks.start(Constraint.json_object()))[1]
    report: dict[str, object] = {"first_answer_ms": round(first_ms)}
    for name, (constraint, answer) in CASES.items():
        starts, tokens = [], []
        for _ in range(9):
            mask, start_ms = timed(partial(masks.start, constraint))
            starts.append(start_ms)
            for token_id in tokenizer.encode(answer, add_special_tokens=False).ids:
                tokens.append(timed(partial(mask.apply, logits))[1])
                mask.accept(token_id)
        report[name] = {
            "start_ms": round(statistics.median(starts), 2),
            "token_ms": round(statistics.median(tokens), 3),
            "token_p95_ms": round(float(np.quantile(tokens, 0.95)), 3),
        }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
