"""Speculation by prompt lookup: what followed these tokens before may follow them again.

Answers often repeat what the prompt or they themselves said: names, fields of a table, a text to be
corrected. The tokens that followed the last occurrence of the latest ones are a draft, and the
engine computes all of a draft in one step, which costs little more than one token as long as
reading the weights is what takes the time. What the sampler then chooses at each position is what
counts; the draft only decides how far the step is of use. So answers are the same with and without.

The idea: Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

#: Lengths of the token sequences that are looked up, the most telling first.
LENGTHS = (4, 3, 2)
#: Tokens of the first draft, and the least of one after a rejection.
FIRST_DRAFT = 2
#: Weight of the latest step in the running means.
LATEST = 0.2
#: Most opportunities that are passed over before speculation is tried again.
MAX_PAUSE = 64


class PromptLookup:
    """Drafts the continuation of one answer, while that pays.

    It pays where a drafted step gives more tokens than plain steps would in the same time. Where it
    does not, it pauses, ever longer. Drafts grow as long as they are right to their end, so that
    trying costs little.

    Args:
        token_ids: the prompt.
        max_draft: most tokens of a draft; with 0 there never is one.
    """

    def __init__(self, token_ids: Sequence[int], max_draft: int) -> None:
        self._max_draft = max_draft
        self._length = FIRST_DRAFT
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self._plain_ms = 0.0
        self._saved_ms = 0.0
        self._pause = 1
        self._passed_over = 0
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

    def draft(self, most: int) -> list[int]:
        """Return tokens that may come next: none, or up to ``most``."""
        most = min(most, self._max_draft, self._length)
        if most <= 0:
            return []
        for length in LENGTHS:
            place = self._next.get(tuple(self._tokens[-length:]))
            if place is not None:
                if self._saved_ms < 0 and self._passed_over < self._pause:
                    self._passed_over += 1
                    return []
                return self._tokens[place : place + most]
        return []

    def learn(self, drafted: int, gained: int, elapsed_ms: float) -> None:
        """Take the result of a step.

        Args:
            drafted: tokens of the draft; 0 for a plain step.
            gained: tokens of the answer that the step gave, at least 1.
            elapsed_ms: what it took.
        """
        if not drafted:
            share = LATEST if self._plain_ms else 1
            self._plain_ms += (elapsed_ms - self._plain_ms) * share
            return
        if gained > drafted:
            self._length = min(2 * self._length + 1, self._max_draft)  # a step of twice as many
        else:
            self._length = max(FIRST_DRAFT, gained)
        if not self._plain_ms:
            return
        saved_ms = gained * self._plain_ms - elapsed_ms
        self._saved_ms += (saved_ms - self._saved_ms) * LATEST
        if self._passed_over:  # the first try after a pause decides by itself
            self._saved_ms = saved_ms
            self._passed_over = 0
            self._pause = 1 if saved_ms > 0 else min(2 * self._pause, MAX_PAUSE)
