"""What speculation gains: the same answers with and without it, in turn.

    python benchmarks/speculation.py MODEL [--shapes CHECKPOINT] [--temperature T]

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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np

import edgevl
from edgevl import Constraint
from edgevl.checkpoint import Checkpoint
from edgevl.engine import Engine
from edgevl.generate import SamplingParams, generation
from edgevl.generate.rounds import Rounds
from edgevl.generate.speculation import AnswerPool, Drafts
from edgevl.loading import load_engine
from edgevl.options import GREEDY, PRECISIONS, LoadOptions
from edgevl.preprocess import Message
from speculation_prompts import PROMPTS, SCHEMAS

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
        steps: tokens forced, tokens drafted and tokens gained, of every step of every round.
        forced: what the answer's form forced after each of its tokens.
    """

    kind: str
    text: str
    prompt: list[int]
    answer: tuple[int, ...] = ()
    differs: bool = False
    plain_ms: list[float] = field(default_factory=list)
    drafted_ms: list[float] = field(default_factory=list)
    steps: list[tuple[int, int, int]] = field(default_factory=list)
    forced: list[list[int]] = field(default_factory=list)

    @property
    def constraint(self) -> Constraint | None:
        """The form that the answer must have."""
        schema = SCHEMAS.get(self.text)
        return None if schema is None else Constraint.json_schema(schema)


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
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--kinds", nargs="+", choices=PROMPTS, default=list(PROMPTS))
    parser.add_argument("--no-forced", action="store_true", help="leave out what a form forces")
    parser.add_argument("--together", type=int, default=1, metavar="N", help="answers at once")
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
        for kind in arguments.kinds
        for text in PROMPTS[kind]
    ]
    sampling = {**GREEDY, "temperature": arguments.temperature, "max_tokens": arguments.max_tokens}
    if arguments.together > 1:
        return measure_together(model, questions, arguments.together, arguments.rounds, sampling)
    measure_answers(model, questions, arguments.rounds, sampling, not arguments.no_forced)
    if not arguments.no_forced:
        for question in questions:
            question.forced = forced(model, question)
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
    model: edgevl.Model,
    questions: Iterable[Question],
    rounds: int,
    sampling: dict[str, Any],
    with_forced: bool,
) -> None:
    """Answer every question without and with speculation, round after round.

    What a question's answer said is known to those after it in the same round.
    """
    steps: list[tuple[int, int, int]] = []

    class Recorder(Drafts):
        def draft(
            self, most: int, forced: Sequence[int] = (), looked_up: int | None = None
        ) -> list[int]:
            return super().draft(most, forced if with_forced else (), looked_up)

        def learn(
            self, drafted: int, gained: int, plain_ms: float | None = None, each_ms: float = 0.0
        ) -> None:
            steps.append((min(self._forced, drafted), drafted, gained))
            super().learn(drafted, gained, plain_ms, each_ms)

    longest = model.engine.max_draft
    pool = AnswerPool()
    order = [(number, question) for number in range(rounds + 1) for question in questions]
    with mock.patch.object(generation, "Drafts", Recorder):
        for index, (number, question) in enumerate(order):
            pool = pool if index and order[index - 1][0] == number else AnswerPool()
            for max_draft in (longest, 0) if number % 2 else (0, longest):
                model.engine.max_draft = max_draft
                model._rounds._pool = pool if max_draft else AnswerPool()
                steps.clear()
                answer = model.ask(
                    question.text,
                    constraint=question.constraint,
                    seed=0,
                    **{**sampling, **SAMPLING.get(question.kind, {})},
                )
                question.answer = question.answer or answer.token_ids
                question.differs |= answer.token_ids != question.answer
                if number:  # the first round warms up
                    times = question.drafted_ms if max_draft else question.plain_ms
                    times.append(answer.timings.decode_ms_per_token)
                    question.steps += steps if max_draft else []


def measure_together(
    model: edgevl.Model,
    questions: Sequence[Question],
    together: int,
    rounds: int,
    sampling: dict[str, Any],
) -> int:
    """Answer the questions of each kind so many at once, in three ways in turn, and print times.

    Returns:
        1 if an answer was not the same in all of them, or else 0.
    """

    class Unforced(Drafts):
        def draft(
            self, most: int, forced: Sequence[int] = (), looked_up: int | None = None
        ) -> list[int]:
            return super().draft(most, (), looked_up)

    ways: dict[str, tuple[int, type[Drafts]]] = {
        "no drafts": (0, Drafts),
        "none forced": (model.engine.max_draft, Unforced),
        "drafts": (model.engine.max_draft, Drafts),
    }
    status = 0
    print(f"{together} answers at once; shares of the time without drafts\n")
    print("| | tokens | ms a token without drafts | none forced | drafts |\n|---|---|---|---|---|")
    for kind in dict.fromkeys(question.kind for question in questions):
        asked = [question for question in questions if question.kind == kind]
        while len(asked) < together:
            asked += asked
        times: dict[str, list[float]] = {way: [] for way in ways}
        tokens = 0
        for number in range(rounds + 1):
            order = [*ways][number % len(ways) :] + [*ways][: number % len(ways)]
            answers = {}
            for way in order:
                model.engine.max_draft, drafts = ways[way]
                with mock.patch.object(generation, "Drafts", drafts):
                    answers[way], elapsed_ms = answer_together(model, asked, together, sampling)
                if number:  # the first round warms up
                    times[way].append(elapsed_ms)
            tokens = sum(map(len, answers["drafts"]))
            if not answers["no drafts"] == answers["none forced"] == answers["drafts"]:
                print(f"{kind}: not the same with speculation", file=sys.stderr)
                status = 1
        plain = times.pop("no drafts")
        shares = [
            statistics.median(own / other for own, other in zip(each, plain, strict=True))
            for each in times.values()
        ]
        print(
            f"| {kind} | {tokens} | {statistics.median(plain) / tokens:.2f} "
            f"| {' | '.join(f'{share:.2f}' for share in shares)} |",
            flush=True,
        )
    return status


def answer_together(
    model: edgevl.Model, questions: Sequence[Question], together: int, sampling: dict[str, Any]
) -> tuple[list[tuple[int, ...]], float]:
    """Answer questions: -> their tokens, and the milliseconds of it all, prompts included."""
    rounds: Rounds[generation.Generation] = Rounds(model.engine, together)
    answers = []
    for number, question in enumerate(questions):
        message = Message.user(question.text, [])
        own = {**sampling, **SAMPLING.get(question.kind, {})}
        answers.append(
            generation.Generation(
                model.prompts,
                model.masks,
                model.prompts.encode([message]),
                SamplingParams(constraint=question.constraint, seed=number, **own),
                model.max_context,
                time.perf_counter(),
            )
        )
    waiting, begun = answers[::-1], time.perf_counter()
    while waiting or rounds.under_way:
        if waiting and rounds.start(waiting[-1]):
            waiting.pop()
        for _, gain in rounds.step():
            if isinstance(gain, Exception):
                raise gain
    elapsed_ms = 1000 * (time.perf_counter() - begun)
    return [answer.answer(0.0).token_ids for answer in answers], elapsed_ms


def forced(model: edgevl.Model, question: Question) -> list[list[int]]:
    """Return what the form of a question's answer forces after each of its tokens."""
    if question.constraint is None:
        return []
    mask = model.masks.start(question.constraint)
    following = []
    for token_id in question.answer:
        mask.accept(token_id)
        draft = mask.foreseen()
        following.append(draft[: mask.allowed(draft)])
    return following


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
        known = question.forced[place] if question.forced else []
        draft = lookup.draft(len(answer) - place - 2, known)
        rest = answer[place + 1 :]
        right = next((i for i, token in enumerate(draft) if token != rest[i]), len(draft))
        cost = costs[len(draft) + 1 if draft else 0]
        lookup.learn(len(draft), right + 1, costs[0], (cost - costs[0]) / max(len(draft), 1))
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
    headings = ["questions", "tokens", "tokens a step", "forced tokens right"]
    headings += ["looked-up tokens right", "time", "slowest"]
    headings += [f"computed {name}" for name in computed]
    print(f"| | {' | '.join(headings)} |\n{'|---' * (len(headings) + 1)}|")
    for kind in dict.fromkeys(question.kind for question in questions):
        asked = [question for question in questions if question.kind == kind]
        tokens = sum(len(question.answer) for question in asked)
        steps = [step for question in asked for step in question.steps]
        gained = sum(step[2] for step in steps)
        foreseen = sum(step[0] for step in steps)
        foreseen_right = sum(min(step[0], step[2] - 1) for step in steps)
        looked_up = sum(step[1] - step[0] for step in steps)
        looked_up_right = sum(max(step[2] - 1 - step[0], 0) for step in steps)
        slowest = max(ratio([question]) for question in asked)
        cells = [
            str(len(asked)),
            str(tokens),
            f"{gained / len(steps):.2f}",
            f"{foreseen_right / foreseen:.0%} of {foreseen}" if foreseen else "",
            f"{looked_up_right / looked_up:.0%} of {looked_up}" if looked_up else "",
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
