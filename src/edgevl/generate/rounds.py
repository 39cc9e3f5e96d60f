"""Answers under way with one engine, in rounds: a token of each of them, a part of one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Generic, TypeAlias, TypeVar

from edgevl.engine.base import Engine, Floats
from edgevl.generate.generation import Delta, Generation
from edgevl.generate.prefix import Slots, decode_together, read_on
from edgevl.generate.speculation import AnswerPool

AnswerT = TypeVar("AnswerT", bound=Generation)
#: An answer, and what it has gained or why it failed.
Gain: TypeAlias = tuple[AnswerT, Delta | Exception]


class Rounds(Generic[AnswerT]):
    """The answers under way; whoever calls `step` computes them.

    A round computes one token of every answer and a chunk of one prompt, all in one pass of the
    weights, or a tile of a picture. So answers go on while the next prompt is read. One that is
    shorter than what is left of that prompt goes in between.

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
        self._whole_prompts = whole_prompts
        self._prefilling: list[AnswerT] = []  # each shorter than what was left of the one before
        self._decoding: list[AnswerT] = []
        self._rounds = 0

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
        answers = list(self._decoding)
        if reading is not None and reading.unread is not None:
            yield from self._read_on(reading, reading.unread, answers)
        elif len(answers) == 1:
            yield from self._attempt(answers[0], partial(self._decode_alone, answers[0]))
        elif answers:
            yield from self._decode_together(answers)

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

    def _read_on(
        self, reading: AnswerT, unread: Floats, answers: list[AnswerT]
    ) -> Iterator[Gain[AnswerT]]:
        """Compute the next positions of a prompt together with a token of each answer."""
        count = len(unread)
        if not self._whole_prompts:
            count = min(count, max(self._engine.chunk - len(answers), 1))
        ends = count == len(unread)
        before_ms = self._engine.timings().prefill_ms
        try:
            read, *rows = read_on(
                reading.slot,
                unread[:count],
                ends,
                [answer.slot for answer in answers],
                [answer.latest for answer in answers],
            )
        except Exception as error:
            # The others have lost nothing: they go on in the next round, without this prompt.
            yield from self._gained(reading, error)
            return
        elapsed_ms = self._engine.timings().prefill_ms - before_ms
        reading.read(count, elapsed_ms)
        if ends:
            self._prefilling.remove(reading)
            self._decoding.append(reading)
            yield from self._attempt(reading, partial(reading.begin, read))
        for answer, row in zip(answers, rows, strict=True):
            yield from self._attempt(answer, partial(answer.take, row))

    def _decode_alone(self, answer: AnswerT) -> Delta:
        """Compute an answer's next token, and more where a draft is right."""
        following = answer.following(self._engine.max_draft)
        begun = time.perf_counter()
        if len(following) > 1:
            logits = answer.slot.extend(following)
        else:
            logits = answer.slot.decode(answer.latest)
        return answer.take(logits, 1000 * (time.perf_counter() - begun))

    def _decode_together(self, answers: list[AnswerT]) -> Iterator[Gain[AnswerT]]:
        try:
            logits = decode_together([a.slot for a in answers], [a.latest for a in answers])
        except Exception as error:
            for answer in answers:
                yield from self._gained(answer, error)
            return
        for answer, row in zip(answers, logits, strict=True):
            yield from self._attempt(answer, partial(answer.take, row[None]))

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
