"""Answers under way with one engine, in rounds: a token of each of them, a part of one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from edgevl.engine.base import Engine
from edgevl.generate.generation import Delta, Generation
from edgevl.generate.prefix import Reading, Slots, advance
from edgevl.generate.speculation import AnswerPool, StepCosts

AnswerT = TypeVar("AnswerT", bound=Generation)
#: An answer, and what it has gained or why it failed.
Gain: TypeAlias = tuple[AnswerT, Delta | Exception]

#: Most tokens that are drafted for all answers of a round, where their forms force them.
MOST_DRAFTED = 24


class Rounds(Generic[AnswerT]):
    """The answers under way; whoever calls `step` computes them.

    A round computes one token of every answer, with what is drafted of those after it, and a chunk
    of one prompt, all in one pass of the weights; or a tile of a picture. So answers go on while
    the next prompt is read. One that is shorter than what is left of that prompt goes in between.

    Args:
        engine: what computes.
        max_sequences: most answers computed together, and prompts kept to be reused.
        whole_prompts: compute a prompt in one round, which is faster.

    Attributes:
        slots: the sequences.
    """

    def __init__(self, engine: Engine, max_sequences: int, whole_prompts: bool = False) -> None:
        self.slots = Slots(engine, max_sequences)
        self._engine = engine
        self._pool = AnswerPool()
        self._costs = StepCosts()
        self._whole_prompts = whole_prompts
        self._prefilling: list[AnswerT] = []  # each shorter than what was left of the one before
        self._decoding: list[AnswerT] = []
        self._rounds = 0
        self._first = 0  # of the answers, in the latest round

    @property
    def under_way(self) -> list[AnswerT]:
        """The answers that have been started and have not ended."""
        return [*self._prefilling, *self._decoding]

    def start(self, answer: AnswerT) -> bool:
        """Give an answer a sequence, if there is one and no shorter prompt is being read.

        Raises:
            MemoryError: there is no memory for a sequence.
        """
        if self._prefilling and len(answer.prompt.token_ids) >= self._prefilling[-1].left:
            return False
        slot = self.slots.take(answer.prompt, answer.most_tokens)
        if slot is None:
            return False
        answer.start(slot, self._pool)
        self._prefilling.append(answer)
        return True

    def step(self) -> Iterator[Gain[AnswerT]]:
        """Compute a round and yield what comes of it; an answer that is complete or fails ends."""
        reading = None
        if self._prefilling:
            # The latest is the shortest; the oldest gets every other round, however many come.
            self._rounds += 1
            reading = self._prefilling[0 if self._rounds % 2 else -1]
            if reading.unread is None:
                yield from self._prepare(reading)
        while self._decoding and self.slots.overgrown():
            # The one that has grown most beyond what was reserved for it makes room.
            answer = max(self._decoding, key=lambda each: len(each.slot) - each.slot.reserved)
            yield from self._gained(answer, answer.cut())
        if reading is not None and reading.unread is None:
            reading = None
        if reading is not None or self._decoding:
            yield from self._advance(reading, list(self._decoding))

    def end(self, answer: AnswerT) -> None:
        """Stop computing an answer, if it is under way; what its sequence holds can be reused."""
        for under_way in (self._prefilling, self._decoding):
            if answer in under_way:
                under_way.remove(answer)
                answer.preparation.close()
                self.slots.release(answer.slot)

    def clear(self) -> None:
        """End all answers, also one that an interrupt has left half started or half ended."""
        self._prefilling.clear()
        self._decoding.clear()
        self.slots.release_all()

    def _prepare(self, answer: AnswerT) -> Iterator[Gain[AnswerT]]:
        """Encode a tile of a prompt's pictures."""
        try:
            next(answer.preparation, None)
        except Exception as error:
            yield from self._gained(answer, error)

    def _advance(self, reading: AnswerT | None, answers: list[AnswerT]) -> Iterator[Gain[AnswerT]]:
        """Compute the next tokens of each answer, and the next positions of a prompt."""
        following = yield from self._following(answers)
        if reading is None and not following:
            return
        tokens = sum(len(ids) for _, ids in following)
        part = None if reading is None else self._part(reading, tokens)
        before_ms = self._engine.timings().prefill_ms
        begun = time.perf_counter()
        try:
            logits = advance([(answer.slot, ids) for answer, ids in following], part)
        except Exception as error:
            # Beside a prompt the answers have lost nothing: they go on in the next round without.
            failed = [answer for answer, _ in following] if reading is None else [reading]
            for answer in failed:
                yield from self._gained(answer, error)
            return
        plain_ms, each_ms = None, 0.0
        if reading is None:
            plain_ms, each_ms = self._cost(len(following), tokens, time.perf_counter() - begun)
        else:
            assert part is not None
            read = logits.pop()
            reading.read(len(part.embeddings), self._engine.timings().prefill_ms - before_ms)
            if part.last:
                self._prefilling.remove(reading)
                self._decoding.append(reading)
                yield from self._attempt(reading, partial(reading.begin, read))
        for (answer, _), rows in zip(following, logits, strict=True):
            yield from self._attempt(answer, partial(answer.take, rows, plain_ms, each_ms))

    def _part(self, reading: AnswerT, others: int) -> Reading:
        """Return the next positions of a prompt, beside so many tokens of answers."""
        assert reading.unread is not None
        count = len(reading.unread)
        if not self._whole_prompts:
            count = min(count, max(self._engine.chunk - others, 1))
        return Reading(reading.slot, reading.unread[:count], count == len(reading.unread))

    def _following(
        self, answers: list[AnswerT]
    ) -> Generator[Gain[AnswerT], None, list[tuple[AnswerT, list[int]]]]:
        """Return the latest token of each answer, and what is drafted of those after it."""
        most = self._engine.max_draft
        left = MOST_DRAFTED
        # What is looked up may be wrong, and fills up what a step computes for little more.
        looked_up = max(most + 1 - len(answers), 0)
        found: dict[int, list[int]] = {}
        self._first = (self._first + 1) % max(len(answers), 1)  # who drafts first, in turn
        for number in [*range(self._first, len(answers)), *range(self._first)]:
            try:
                found[number] = answers[number].following(min(left, most), looked_up)
            except Exception as error:
                yield from self._gained(answers[number], error)
            else:
                drafted = len(found[number]) - 1
                left -= drafted
                looked_up = max(looked_up - drafted, 0)
        return [(answers[number], found[number]) for number in sorted(found)]

    def _cost(self, answers: int, tokens: int, elapsed_s: float) -> tuple[float | None, float]:
        """Learn from a step: -> what a token would take without drafts, what a drafted one took."""
        elapsed_ms = 1000 * elapsed_s
        self._costs.learn(tokens, elapsed_ms)
        plain_ms = self._costs.of(answers)
        if plain_ms is None or tokens == answers:
            return plain_ms, 0.0
        return plain_ms / answers, (elapsed_ms - plain_ms) / (tokens - answers)

    def _attempt(self, answer: AnswerT, gain: Callable[[], Delta]) -> Iterator[Gain[AnswerT]]:
        try:
            gained: Delta | Exception = gain()
        except Exception as error:
            gained = error
        yield from self._gained(answer, gained)

    def _gained(self, answer: AnswerT, gain: Delta | Exception) -> Iterator[Gain[AnswerT]]:
        if answer.finish_reason or isinstance(gain, Exception):
            self.end(answer)
        yield answer, gain
        # Afterwards: the time of a token is not that of its reader.
        answer.latest_token = time.perf_counter()
