"""Speculation: drafts of what may come next, of which the engine computes all in one step.

That costs little more than one token as long as reading the weights is what takes the time. What
the sampler then chooses at each position is what counts, and it chooses and draws as it does
without: a draft only decides how far the step is of use. So answers are the same with and without.

A draft begins with what the answer's form forces. What follows is what came after the latest tokens
before: answers often repeat what the prompt or they themselves said, names, fields of a table, a
text to be corrected, or what other answers to such prompts said.

The idea of the lookup: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

#: Lengths of the token sequences that are looked up, the most telling first.
LENGTHS = (4, 3, 2)
#: Tokens of the first draft, and the least of one after a rejection.
FIRST_DRAFT = 2
#: Weight of the latest step in the running means.
LATEST = 0.2
#: Most opportunities that are passed over before speculation is tried again.
MAX_PAUSE = 64
#: Tokens of answers that are kept for other answers: with their index 0.8 MB.
POOL_TOKENS = 1 << 16


class AnswerPool:
    """What the latest answers of a model said, for others to look up.

    The oldest make room. Not safe between threads: who computes the answers has it.

    Args:
        size: tokens that are kept.
    """

    def __init__(self, size: int = POOL_TOKENS) -> None:
        # A ring, with -1, which is no token, after each answer: so nothing goes on from the latest
        # answer to the oldest.
        self._tokens = array("i", [-1]) * size
        self._end = 0
        # Places by the hash of the tokens before. What is found is compared, so that one may take
        # another's place, or have been overwritten.
        self._places = array("i", [0]) * (2 * size)

    def add(self, before: Sequence[int], answer: Sequence[int]) -> None:
        """Keep an answer, and the last tokens before it, by which its beginning is found."""
        tokens = [*before[-LENGTHS[0] :], *answer]
        for number, token_id in enumerate([*tokens, -1]):
            if number >= LENGTHS[0]:
                self._places[self._slot(tokens[number - LENGTHS[0] : number])] = self._end
            self._tokens[self._end] = token_id
            self._end = (self._end + 1) % len(self._tokens)

    def find(self, tokens: Sequence[int], most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the last of ``tokens``, if any did."""
        latest = list(tokens[-LENGTHS[0] :])
        if len(latest) < LENGTHS[0]:
            return []
        place = self._places[self._slot(latest)]
        known = [
            self._tokens[number % len(self._tokens)]
            for number in range(place - len(latest), place + most)
        ]
        if known[: len(latest)] != latest:
            return []
        found = known[len(latest) :]
        return found[: found.index(-1)] if -1 in found else found

    def _slot(self, tokens: Sequence[int]) -> int:
        return hash(tuple(tokens)) % len(self._places)


class StepCosts:
    """What steps take by the number of tokens computed in them: running means, in milliseconds."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}

    def learn(self, tokens: int, elapsed_ms: float) -> None:
        """Take what a step of so many tokens took."""
        mean = self._means.get(tokens, elapsed_ms)
        self._means[tokens] = mean + (elapsed_ms - mean) * LATEST

    def of(self, tokens: int) -> float | None:
        """Return what a step of so many tokens takes, between others if none has been of as many.

        None where all were of more, or all of fewer.
        """
        fewer = max((known for known in self._means if known <= tokens), default=None)
        more = min((known for known in self._means if known >= tokens), default=None)
        if fewer is None or more is None:
            return None
        below, above = self._means[fewer], self._means[more]
        return below + (above - below) * (tokens - fewer) / max(more - fewer, 1)


class Payoff:
    """Whether drafts of one kind gain time. Where they do not they pause, ever longer."""

    def __init__(self) -> None:
        self._saved_ms = 0.0
        self._pause = 1
        self._passed_over = 0

    def promises(self) -> bool:
        """Return whether an opportunity should be used."""
        if self._saved_ms < 0 and self._passed_over < self._pause:
            self._passed_over += 1
            return False
        return True

    def learn(self, saved_ms: float) -> None:
        """Take the time that a draft has saved, or cost if it is negative."""
        self._saved_ms += (saved_ms - self._saved_ms) * LATEST
        if self._passed_over:  # the first try after a pause decides by itself
            self._saved_ms = saved_ms
            self._passed_over = 0
            self._pause = 1 if saved_ms > 0 else min(2 * self._pause, MAX_PAUSE)


class Drafts:
    """Drafts the continuation of one answer, while that pays.

    It pays where a drafted step gives more tokens than plain steps would in the same time. Drafts
    that were looked up grow as long as they are right to their end, so that trying costs little.

    Args:
        token_ids: the prompt.
        max_draft: most tokens of a draft; with 0 there never is one.
        pool: what other answers said; looked up where prompt and answer have nothing.
    """

    def __init__(
        self, token_ids: Sequence[int], max_draft: int, pool: AnswerPool | None = None
    ) -> None:
        self._max_draft = max_draft
        self._pool = pool
        self._length = FIRST_DRAFT
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self._forcing, self._looking, self._going_on = Payoff(), Payoff(), Payoff()
        self._forced = 0  # tokens of the latest draft
        self._followed = 0
        if max_draft:
            for token_id in token_ids:
                self.add(token_id)

    def follow(self, answer: Sequence[int]) -> None:
        """Take the tokens that the answer has by now, those taken before among them."""
        for token_id in answer[self._followed :]:
            self.add(token_id)
        self._followed = len(answer)

    def add(self, token_id: int) -> None:
        """Take the next token of prompt or answer."""
        if not self._max_draft:
            return
        place = len(self._tokens)
        # Only what has a continuation: this token is that of those before it.
        for length in LENGTHS:
            if place >= length:
                self._next[tuple(self._tokens[-length:])] = place
        self._tokens.append(token_id)

    def draft(
        self, most: int, forced: Sequence[int] = (), looked_up: int | None = None
    ) -> list[int]:
        """Return tokens that may come next: none, or up to ``most``.

        Args:
            most: as many as are of use.
            forced: what the answer's form lets come next, with which the draft begins.
            looked_up: how many of them may be looked up; as many as there is room for by default.
        """
        most = min(most, self._max_draft)
        if most <= 0:
            return []
        looked_up = most if looked_up is None else looked_up
        draft = list(forced[:most]) if forced and self._forcing.promises() else []
        self._forced = len(draft)
        found = self._look_up(draft, min(self._length, most - len(draft), looked_up))
        looking = self._going_on if draft else self._looking
        return draft + found if found and looking.promises() else draft

    def _look_up(self, draft: list[int], most: int) -> list[int]:
        """Return up to ``most`` tokens that followed the latest ones, and those of a draft."""
        if most <= 0:
            return []
        latest = self._tokens[-LENGTHS[0] :] + draft
        # What is forced comes again and again, and tells little of what follows.
        for length in LENGTHS[:1] if draft else LENGTHS:
            place = self._next.get(tuple(latest[-length:]))
            if place is not None:
                return self._tokens[place : place + most]
        return self._pool.find(latest, most) if self._pool else []

    def learn(
        self, drafted: int, gained: int, plain_ms: float | None = None, each_ms: float = 0.0
    ) -> None:
        """Take the result of a step.

        Args:
            drafted: tokens of the draft; 0 for a plain step, of which there is nothing to learn.
            gained: tokens of the answer that the step gave, at least 1.
            plain_ms: what a token takes without drafts; None where that is not known.
            each_ms: what each drafted token took.
        """
        if not drafted:
            return
        forced = min(self._forced, drafted)
        looked_up = drafted - forced
        if gained > drafted > forced:
            self._length = min(2 * self._length + 1, self._max_draft)  # a step of twice as many
        elif gained > forced:
            self._length = max(FIRST_DRAFT, gained - forced)
        if plain_ms is None:
            return
        right = gained - 1
        if forced:
            self._forcing.learn(min(right, forced) * plain_ms - forced * each_ms)
        if looked_up:
            looking = self._going_on if forced else self._looking
            looking.learn(max(right - forced, 0) * plain_ms - looked_up * each_ms)
