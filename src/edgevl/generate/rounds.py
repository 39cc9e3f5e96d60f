"""Answers under way with one engine, in rounds: a token of each of them, a part of one prompt."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Generic, TypeAlias, TypeVar

from edgevl.engine.base import Engine
from edgevl.generate.generation import Delta, Generation
from edgevl.generate.prefix import Slots, decode_together

AnswerT = TypeVar("AnswerT", bound=Generation)
#: An answer, and what it has gained or why it failed.
Gain: TypeAlias = tuple[AnswerT, Delta | Exception]


class Rounds(Generic[AnswerT]):
    """The answers under way; whoever calls `step` computes them.

    A round computes one token of every answer, all of them together, and a tile or a chunk of one
    prompt. So answers go on while the next prompt is read. One that is shorter than what is left of
    that prompt goes in between.

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
        answer.start(slot, None if self._whole_prompts else self._engine.chunk)
        self._prefilling.append(answer)
        return True

    def step(self) -> Iterator[Gain[AnswerT]]:
        """Compute a round and yield what comes of it; an answer that is complete or fails ends."""
        if self._prefilling:
            # The latest is the shortest; the oldest gets every other round, however many come.
            self._rounds += 1
            yield from self._prefill(self._prefilling[0 if self._rounds % 2 else -1])
        while self._decoding and self.slots.overgrown():
            # The one that has grown most beyond what was reserved for it makes room.
            answer = max(self._decoding, key=lambda each: len(each.slot) - each.slot.reserved)
            yield from self._gained(answer, answer.cut())
        if len(self._decoding) == 1:
            [answer] = self._decoding
            gain: Delta | Exception
            try:  # more than a token where a draft is right
                gain = answer.step()
            except Exception as error:
                gain = error
            yield from self._gained(answer, gain)
        elif self._decoding:
            yield from self._decode_together(list(self._decoding))

    def end(self, answer: AnswerT) -> None:
        """Stop computing an answer, if it is under way; what its sequence holds can be reused."""
        for under_way in (self._prefilling, self._decoding):
            if answer in under_way:
                under_way.remove(answer)
                answer.prefill.close()
                self.slots.release(answer.slot)

    def clear(self) -> None:
        """End all answers, also one that an interrupt has left half started or half ended."""
        self._prefilling.clear()
        self._decoding.clear()
        self.slots.release_all()

    def _prefill(self, answer: AnswerT) -> Iterator[Gain[AnswerT]]:
        try:
            next(answer.prefill)
        except StopIteration as stop:
            self._prefilling.remove(answer)
            self._decoding.append(answer)
            yield from self._gained(answer, stop.value)
        except Exception as error:
            yield from self._gained(answer, error)

    def _decode_together(self, answers: list[AnswerT]) -> Iterator[Gain[AnswerT]]:
        try:
            logits = decode_together([a.slot for a in answers], [a.latest for a in answers])
        except Exception as error:
            for answer in answers:
                yield from self._gained(answer, error)
            return
        now = time.perf_counter()
        for answer, row in zip(answers, logits, strict=True):
            gain: Delta | Exception
            try:
                gain = answer.take(row, now)
            except Exception as error:
                gain = error
            yield from self._gained(answer, gain)

    def _gained(self, answer: AnswerT, gain: Delta | Exception) -> Iterator[Gain[AnswerT]]:
        if answer.finish_reason or isinstance(gain, Exception):
            self.end(answer)
        yield answer, gain
        # Afterwards: the time of a token is not that of its reader.
        answer.latest_token = time.perf_counter()
