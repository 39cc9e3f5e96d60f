"""What speculation gains: the same greedy answers with and without it, in turn.

    python benchmarks/speculation.py MODEL [--shapes CHECKPOINT]

MODEL is a trained checkpoint, small ones will do: how many drafted tokens are right is a matter of
the text, what a step costs a matter of the model's size. CHECKPOINT, with weights that may be
random, has the size of interest: its steps of several tokens are timed, and the answers of MODEL
are replayed with their costs. Exit status 1: an answer was not the same with and without.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

import edgevl
from edgevl.checkpoint import Checkpoint
from edgevl.engine import Engine
from edgevl.generate import generation
from edgevl.generate.speculation import Drafts
from edgevl.loading import load_engine
from edgevl.options import GREEDY, PRECISIONS, LoadOptions
from edgevl.preprocess import Message
from speculation_prompts import PROMPTS

#: The small model loops when it chats, and a loop is too easily foretold.
SAMPLING: dict[str, dict[str, Any]] = {"chat": {"repetition_penalty": 1.1}}
#: Positions in the cache before the steps that are timed.
CONTEXTS = (100, 1000)

#: Time of a step of so many tokens; 0 stands for `decode`.
Costs = dict[int, float]


@dataclass
class Question:
    """A question, what was measured of its answer, and how it was given.

    Attributes:
        plain_ms: of decoding without speculation, one a round.
        drafted_ms: with it.
        steps: tokens drafted and tokens gained, of every step of every round.
    """

    kind: str
    text: str
    prompt: list[int]
    answer: tuple[int, ...] = ()
    differs: bool = False
    plain_ms: list[float] = field(default_factory=list)
    drafted_ms: list[float] = field(default_factory=list)
    steps: list[tuple[int, int]] = field(default_factory=list)


def main() -> int:
    """Measure, print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--shapes", metavar="CHECKPOINT")
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    parser.add_argument("--shapes-precision", choices=PRECISIONS, default="int4")
    parser.add_argument("--rounds", type=int, default=5, choices=range(1, 1001), metavar="N")
    parser.add_argument("--max-tokens", type=int, default=300, choices=range(2, 4097), metavar="N")
    parser.add_argument("--threads", type=int)
    parser.add_argument(
        "--busy", action="store_true", help="others compute here: one thread, its processor time"
    )
    arguments = parser.parse_args()
    if arguments.busy:
        arguments.threads = 1
        time.perf_counter = time.process_time  # also for what the lookup itself learns from
    model = edgevl.load(
        arguments.model, "cpu", precision=arguments.precision, threads=arguments.threads
    )
    questions = [
        Question(kind, text, model.prompts.encode([Message.user(text, [])]).token_ids.tolist())
        for kind, texts in PROMPTS.items()
        for text in texts
    ]
    measure_answers(model, questions, arguments.rounds, arguments.max_tokens)
    computed: dict[str, Costs] = {}
    if arguments.shapes:
        engine = load_engine(
            Checkpoint.open(arguments.shapes),
            LoadOptions("cpu", precision=arguments.shapes_precision, threads=arguments.threads),
        )
        for context in CONTEXTS:
            computed[f"after {context}"] = costs = measure_steps(engine, context, arguments.rounds)
            print_steps(context, costs)
    print_answers(questions, computed)
    different = [question for question in questions if question.differs]
    for question in different:
        print(f"not the same with speculation: {question.text[:70]!r}", file=sys.stderr)
    return 1 if different else 0


def measure_answers(
    model: edgevl.Model, questions: Iterable[Question], rounds: int, max_tokens: int
) -> None:
    """Answer every question without and with speculation, round after round."""
    steps: list[tuple[int, int]] = []

    class Recorder(Drafts):
        def learn(self, drafted: int, gained: int, elapsed_ms: float) -> None:
            steps.append((drafted, gained))
            super().learn(drafted, gained, elapsed_ms)

    longest = model.engine.max_draft
    order = [(number, question) for number in range(rounds + 1) for question in questions]
    with mock.patch.object(generation, "Drafts", Recorder):
        for number, question in order:
            for max_draft in (longest, 0) if number % 2 else (0, longest):
                model.engine.max_draft = max_draft
                steps.clear()
                sampling = {**GREEDY, **SAMPLING.get(question.kind, {})}
                answer = model.ask(question.text, max_tokens=max_tokens, **sampling)
                question.answer = question.answer or answer.token_ids
                question.differs |= answer.token_ids != question.answer
                if number:  # the first round warms up
                    times = question.drafted_ms if max_draft else question.plain_ms
                    times.append(answer.timings.decode_ms_per_token)
                    question.steps += steps if max_draft else []


def measure_steps(engine: Engine, context: int, rounds: int) -> Costs:
    """Return the median milliseconds of `decode` (0) and of `extend` by 1 to 12 tokens."""
    token_ids = np.random.default_rng(0).integers(256, size=context)
    sequence = engine.new_sequence()
    engine.prefill(sequence, engine.embed(token_ids))
    samples: dict[int, list[float]] = {tokens: [] for tokens in range(engine.max_draft + 2)}
    for _ in range(3 * rounds):
        for tokens, times in samples.items():
            following = token_ids[: max(tokens, 1)].tolist()
            started = time.perf_counter()
            if tokens:
                engine.extend(sequence, following)
            else:
                engine.decode([sequence], following)
            times.append(1000 * (time.perf_counter() - started))
            sequence.rewind(context)
    return {tokens: statistics.median(times) for tokens, times in samples.items()}


def replayed_ms(question: Question, max_draft: int, costs: Costs) -> float:
    """Return the milliseconds that a question's answer takes where steps cost ``costs``."""
    lookup = Drafts(question.prompt, max_draft)
    answer, place, total_ms = question.answer, 0, 0.0
    while place < len(answer) - 1:
        lookup.add(answer[place])
        draft = lookup.draft(len(answer) - place - 2)
        rest = answer[place + 1 :]
        right = next((i for i, token in enumerate(draft) if token != rest[i]), len(draft))
        cost = costs[len(draft) + 1 if draft else 0]
        lookup.learn(len(draft), right + 1, cost)
        for token in rest[:right]:
            lookup.add(token)
        total_ms += cost
        place += right + 1
    return total_ms


def print_steps(context: int, costs: Costs) -> None:
    """Print what steps cost beside `decode`."""
    print(f"after {context} tokens `decode` takes {costs[0]:.1f} ms, `extend` by\n")
    tokens = [tokens for tokens in costs if tokens]
    print(f"| tokens | {' | '.join(map(str, tokens))} |")
    print("|---" * (len(tokens) + 1) + "|")
    print(f"| times `decode` | {' | '.join(f'{costs[n] / costs[0]:.2f}' for n in tokens)} |\n")


def print_answers(questions: list[Question], computed: dict[str, Costs]) -> None:
    """Print a line for each kind of question; times are shares of those without speculation."""
    headings = ["questions", "tokens", "tokens a step", "drafted tokens right", "time", "slowest"]
    headings += [f"computed {name}" for name in computed]
    print(f"| | {' | '.join(headings)} |\n{'|---' * (len(headings) + 1)}|")
    for kind in PROMPTS:
        asked = [question for question in questions if question.kind == kind]
        tokens = sum(len(question.answer) for question in asked)
        steps = [step for question in asked for step in question.steps]
        drafted = sum(step[0] for step in steps)
        gained = sum(step[1] for step in steps)
        right = sum(step[1] - 1 for step in steps)
        slowest = max(ratio([question]) for question in asked)
        cells = [
            str(len(asked)),
            str(tokens),
            f"{gained / len(steps):.2f}",
            f"{right / max(drafted, 1):.0%}",
            f"{ratio(asked):.2f}",
            f"{slowest:.2f}",
        ]
        for costs in computed.values():
            times = sum(replayed_ms(question, max(costs) - 1, costs) for question in asked)
            cells.append(f"{times / costs[0] / (tokens - len(asked)):.2f}")
        print(f"| {kind} | {' | '.join(cells)} |")


def ratio(asked: list[Question]) -> float:
    """Return the time a token with speculation over that without: median of the rounds."""
    return statistics.median(
        sum(drafted) / sum(plain)
        for drafted, plain in zip(
            zip(*(question.drafted_ms for question in asked), strict=True),
            zip(*(question.plain_ms for question in asked), strict=True),
            strict=True,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
