"""The sequences of a model that answers many requests, and which of them takes a prompt."""

from __future__ import annotations

from edgevl.engine.base import Engine
from edgevl.generate.prefix import FeatureCache, PrefixRunner, prompt_keys
from edgevl.machine import this_machine
from edgevl.preprocess import Prompt

#: Tokens of an answer that room is kept for. One that grows beyond delays the next request instead,
#: and is cut off where the memory does not suffice for those under way.
RESERVED_TOKENS = 1024
#: Share of the free memory that keys and values may take.
MEMORY_SHARE = 0.5


class Slot(PrefixRunner):
    """A sequence: idle, with what it last held to be reused, or taken by an answer.

    Attributes:
        reserved: positions that its answer may need; 0 if it is idle.
        used: number of the latest take or release; the least has been idle longest.
    """

    def __init__(self, engine: Engine, features: FeatureCache) -> None:
        """Start idle and empty."""
        super().__init__(engine, features)
        self.reserved = 0
        self.used = 0


class Slots:
    """Up to ``most`` sequences; more are made as they are needed, if the engine is batched.

    A prompt goes to the sequence that begins like it, where not much else is lost with that.
    Otherwise an idle sequence takes over the part that any other has in common with it, in use or
    not, without computing it.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        """Begin without any: an NPU has but one sequence, and others may use it first."""
        self._features = FeatureCache()
        self._engine = engine
        self._slots: list[Slot] = []
        self.most = most if engine.batched else 1
        self._room = _room(engine)
        self._uses = 0

    @property
    def first(self) -> Slot:
        """The first slot, whether it is taken or not."""
        return self._slots[0] if self._slots else self._new()

    def take(self, prompt: Prompt, most_tokens: int) -> Slot | None:
        """Return a slot for a prompt, or None if all are taken or the memory is.

        Args:
            prompt: what it will compute.
            most_tokens: positions that prompt and answer may come to.
        """
        idle = [slot for slot in self._slots if not slot.reserved]
        if not idle and len(self._slots) == self.most:
            return None
        if not self._slots:
            idle = [self._new()]
        needed = min(most_tokens, len(prompt.token_ids) + RESERVED_TOKENS)
        taken = self._taken()
        if taken and taken + needed > self._room:
            return None
        keys = prompt_keys(prompt)
        match, source = max(
            ((slot.match(keys), slot) for slot in self._slots),
            key=lambda found: (found[0], not found[1].reserved),
        )
        if source.reserved or 2 * match < len(source):
            slot = self._emptiest(idle, source)
            if slot is not source and match:
                slot.share(source, match)
        else:
            slot = source
        slot.reserved = needed
        self._mark(slot)
        self._evict(taken + needed)
        return slot

    def release(self, slot: Slot) -> None:
        """Make a slot idle; what it holds can be reused."""
        slot.reserved = 0
        self._mark(slot)

    def release_all(self) -> None:
        """Make all slots idle."""
        for slot in self._slots:
            slot.reserved = 0

    def overgrown(self) -> bool:
        """Make room for what answers have grown by; tell whether they alone take too much."""
        if len(self._slots) == 1:  # there is room for a whole context
            return False
        taken = self._taken()
        self._evict(taken)
        return taken > self._room

    def _taken(self) -> int:
        """Return the positions that answers hold, or have reserved."""
        return sum(max(slot.reserved, len(slot)) for slot in self._slots if slot.reserved)

    def _emptiest(self, idle: list[Slot], source: Slot) -> Slot:
        """Return an idle slot with the least to lose, a new one if there may be more."""
        empty = [slot for slot in idle if not len(slot)]
        if empty:
            return empty[0]
        if len(self._slots) < self.most:
            return self._new()
        others = [slot for slot in idle if slot is not source]
        return min(others or idle, key=lambda slot: slot.used)

    def _new(self) -> Slot:
        self._slots.append(Slot(self._engine, self._features))
        return self._slots[-1]

    def _evict(self, taken: int) -> None:
        """Empty the slots that were idle longest until all that is held fits in the memory."""
        idle = sorted((s for s in self._slots if not s.reserved), key=lambda slot: slot.used)
        held = taken + sum(map(len, idle))
        for slot in idle:
            if held <= self._room:
                return
            held -= len(slot)
            slot.truncate(0)

    def _mark(self, slot: Slot) -> None:
        self._uses += 1
        slot.used = self._uses


def _room(engine: Engine) -> float:
    """Return how many positions all sequences may hold together."""
    weights = engine.weight_bytes()
    if weights is None:
        return float("inf")
    room = MEMORY_SHARE * this_machine().available_bytes / weights.cache_per_token
    return max(room, engine.max_context)
