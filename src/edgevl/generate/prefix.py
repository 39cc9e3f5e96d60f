"""The sequences of an engine, kept in step with the prompts they are given.

Only what is new is computed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgevl.engine.base import Engine, Floats, Part
from edgevl.machine import this_machine
from edgevl.preprocess import Picture, Prompt

if TYPE_CHECKING:
    from edgevl.engine.kept import Kept

#: Features of this many tiles are kept, so that a picture is encoded once (1 MiB a tile for 1B).
FEATURE_CACHE_TILES = 256

#: Shorter system messages are computed as soon as they are read.
LEAST_KEPT_TOKENS = 64
#: System messages of this many prompts are remembered, to see which are used again.
REMEMBERED_PREFIXES = 1024

#: Tokens of an answer that room is kept for. One that grows beyond delays the next request instead,
#: and is cut off where the memory does not suffice for those under way.
RESERVED_TOKENS = 1024
#: Share of the free memory that keys and values may take.
MEMORY_SHARE = 0.5

Result = TypeVar("Result")
#: What stands at a position: a token id, or for an image token the picture's digest and the place
#: in it, so that two pictures never pass for each other.
Key: TypeAlias = int | tuple[str, int]


class FeatureCache:
    """Features of the pictures that were asked about lately; sequences of a model share it.

    Args:
        kept: where they outlive the process, if anywhere.
    """

    def __init__(self, kept: Kept | None = None) -> None:
        self._features: OrderedDict[str, Floats] = OrderedDict()
        self._kept = kept
        self._new: set[str] = set()  # digests of those that `keep` writes

    def get(self, picture: Picture) -> Floats | None:
        """Return the picture's features [image tokens, H] if they are known."""
        features = self._features.get(picture.digest)
        if features is not None:
            self._features.move_to_end(picture.digest)
        elif self._kept and (features := self._kept.get("features", picture.digest)) is not None:
            self._add(picture, features)
        return features

    def put(self, picture: Picture, features: Floats) -> None:
        """Add features [image tokens, H]; those not used for longest make room."""
        self._add(picture, features)
        if self._kept:
            self._new.add(picture.digest)

    def keep(self) -> None:
        """Write what is new to disk."""
        while self._kept and self._new:
            digest = self._new.pop()
            self._kept.put("features", digest, partial(self._features.__getitem__, digest))

    def _add(self, picture: Picture, features: Floats) -> None:
        self._features[picture.digest] = features
        self._features.move_to_end(picture.digest)
        tokens_per_tile = len(features) // len(picture.pixels)
        most = FEATURE_CACHE_TILES * tokens_per_tile
        while len(self._features) > 1 and sum(map(len, self._features.values())) > most:
            self._new.discard(self._features.popitem(last=False)[0])


class KeptPrefixes:
    """System messages whose keys and values outlive the process; sequences of a model share it.

    The first one of a process is kept, as it is the only one of most; of the others those that a
    second conversation begins with. Some clients write the time of day into theirs.

    Args:
        kept: where.
    """

    def __init__(self, kept: Kept) -> None:
        self._kept = kept
        #: What followed a system message when it was last used.
        self._followed: OrderedDict[str, Sequence[Key]] = OrderedDict()
        self._any_kept = False

    def get(self, prefix: Sequence[Key]) -> NDArray[np.uint32] | None:
        """Return what `Engine.save` gave for a system message, if it is kept."""
        return self._kept.get("prefix", _digest(prefix))

    def put(self, prefix: Sequence[Key], save: Callable[[], NDArray[np.uint32]]) -> None:
        """Keep what ``save`` returns, as `Engine.save` gives it, if it is not kept."""
        self._kept.put("prefix", _digest(prefix), save)
        self._any_kept = True

    def wants(self, prefix: Sequence[Key], following: Sequence[Key]) -> bool:
        """Note that a system message is used; tell whether it should be kept.

        ``following`` tells conversations apart: it is the beginning of what comes after, of which
        a conversation's first question has less than its second.
        """
        digest = _digest(prefix)
        before = self._followed.get(digest, following)
        common = min(len(before), len(following))
        again = before[:common] != following[:common]
        self._followed[digest] = following
        self._followed.move_to_end(digest)
        if len(self._followed) > REMEMBERED_PREFIXES:
            self._followed.popitem(last=False)
        return again or not self._any_kept


class Slot:
    """Runs prompts through a sequence of an engine and reuses the longest cached prefix.

    It is idle, or taken by an answer. ``len`` is how many positions can be reused.

    Args:
        engine: what computes.
        features: what the engine's other sequences use too.
        prefixes: likewise; None where nothing is kept.

    Attributes:
        engine: what computes.
        sequence: what it has read; who borrows it leaves it empty.
        reserved: positions that its answer may need; 0 if it is idle.
        used: number of the latest take or release; the least has been idle longest.
    """

    def __init__(
        self, engine: Engine, features: FeatureCache, prefixes: KeptPrefixes | None = None
    ) -> None:
        self.engine = engine
        self.sequence = engine.new_sequence()
        self.reserved = 0
        self.used = 0
        self._features = features
        self._prefixes = prefixes
        self._cached: list[Key] = []
        self._keys: list[Key] = []  # of the prompt that is read
        self._new_prefix: list[Key] = []  # what `keep` writes

    def __len__(self) -> int:
        # A call that was interrupted may have left the two lengths apart.
        return min(len(self._cached), self.sequence.length)

    def match(self, keys: Sequence[Key]) -> int:
        """Return how many of ``keys``, from the first on, the cache holds."""
        known = min(len(self), len(keys))
        return next((i for i in range(known) if self._cached[i] != keys[i]), known)

    def prepare(self, prompt: Prompt) -> Generator[None, None, Floats]:
        """Bring the cache to the part of ``prompt`` that it holds, and embed the rest.

        Yields after each tile of a picture. `advance` computes what this returns.

        Returns:
            Embeddings of what is left to compute, float32 [T, H]; at least one position.
        """
        self._keys = prompt_keys(prompt)
        self._begin(self._keys, prompt.system)
        start = min(self.match(self._keys), len(self._keys) - 1)
        embeddings = yield from self._embed(prompt, start)
        self.truncate(start)
        return embeddings

    def read(self, prompt: Prompt) -> Floats:
        """Bring the cache to exactly ``prompt``: -> logits of the last position, float32 [1, V]."""
        [logits] = advance([], Reading(self, drain(self.prepare(prompt)), True))
        return logits

    def embed(self, prompt: Prompt) -> Floats:
        """Embed a prompt, pictures included: float32 [T, H]."""
        return drain(self._embed(prompt, 0))

    def decode(self, token_id: int) -> Floats:
        """Append one token and return the logits after it, float32 [1, V]."""
        return self.extend([token_id])

    def extend(self, token_ids: list[int]) -> Floats:
        """Append tokens and return the logits after each, float32 [T, V]."""
        [logits] = advance([(self, token_ids)])
        return logits

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        self.sequence.rewind(length)
        del self._cached[length:]

    def share(self, other: Slot, length: int) -> None:
        """Become the first ``length`` positions of another sequence of a batched engine."""
        self.engine.share(self.sequence, other.sequence, length)
        self._cached = other._cached[:length]

    def keep(self) -> None:
        """Write the system message to disk, if it is new and to be kept."""
        prefix, self._new_prefix = self._new_prefix, []
        if self._prefixes and prefix and self.match(prefix) == len(prefix):
            self._prefixes.put(prefix, lambda: self.engine.save(self.sequence, len(prefix)))

    def _begin(self, keys: list[Key], system: int) -> None:
        """Take the system message, the first ``system`` positions, from disk if it is not here."""
        self._new_prefix = []
        if self._prefixes is None or system < LEAST_KEPT_TOKENS:
            return
        prefix = keys[:system]
        if self._prefixes.wants(prefix, keys[system : system + LEAST_KEPT_TOKENS]):
            self._new_prefix = prefix
        if self.match(prefix) < system and (saved := self._prefixes.get(prefix)) is not None:
            self.truncate(0)
            self.engine.load(self.sequence, saved, len(prefix))
            self._cached = list(prefix)

    def _embed(self, prompt: Prompt, start: int) -> Generator[None, None, Floats]:
        """Embed the positions from ``start`` on: float32 [T - start, H]; yields between tiles."""
        embeddings = np.array(self.engine.embed(prompt.token_ids[start:]))
        for span in prompt.images:
            begin = max(span.start, start)
            end = span.start + span.length
            if begin < end:
                features = yield from self._encode(span.picture)
                embeddings[begin - start : end - start] = features[begin - span.start :]
        return embeddings

    def _encode(self, picture: Picture) -> Generator[None, None, Floats]:
        """Return the picture's features [image tokens, H], encoding it if it is not known."""
        features = self._features.get(picture)
        if features is None:
            tiles: list[Floats] = []
            for tile in picture.pixels:
                tiles.append(self.engine.encode_images(tile[None])[0])
                yield
            features = np.concatenate(tiles)
            self._features.put(picture, features)
        return features


@dataclass(frozen=True)
class Reading:
    """A part of a prompt that is to be computed.

    Attributes:
        slot: what the prompt was prepared for.
        embeddings: the next positions, float32 [T, H].
        last: whether the prompt ends with them.
    """

    slot: Slot
    embeddings: Floats
    last: bool


def advance(
    answers: Sequence[tuple[Slot, list[int]]], reading: Reading | None = None
) -> list[Floats]:
    """Append tokens to the sequences of answers, and to that of a prompt, in one pass.

    Args:
        answers: sequences, and tokens for each.
        reading: a part of a prompt.

    Returns:
        Logits after each token of each answer [T, V]; then those of the prompt's last position
        [1, V], or none [0, V] where it goes on.
    """
    engine = reading.slot.engine if reading else answers[0][0].engine
    parts = [Part(slot.sequence, ids, len(ids)) for slot, ids in answers]
    if reading:
        slot, embeddings = reading.slot, reading.embeddings
        read, *logits = engine.step(Part(slot.sequence, embeddings, int(reading.last)), parts)
        begin = len(slot._cached)
        slot._cached += slot._keys[begin : begin + len(embeddings)]
        logits.append(read)
    elif all(len(ids) == 1 for _, ids in answers):
        tokens = [ids[0] for _, ids in answers]
        logits = np.split(engine.decode([part.sequence for part in parts], tokens), len(parts))
    elif len(answers) == 1:
        logits = [engine.extend(answers[0][0].sequence, answers[0][1])]
    else:
        logits = engine.step(None, parts)
    for slot, ids in answers:
        slot._cached += ids
    return logits


def _digest(keys: Sequence[Key]) -> str:
    return hashlib.sha256(repr(keys).encode()).hexdigest()


def prompt_keys(prompt: Prompt) -> list[Key]:
    """Return the key of every position of ``prompt``."""
    ids: NDArray[np.int64] = prompt.token_ids
    keys: list[Key] = ids.tolist()
    for span in prompt.images:
        for place in range(span.length):
            keys[span.start + place] = (span.picture.digest, place)
    return keys


def drain(steps: Generator[None, None, Result]) -> Result:
    """Do all steps of a piece of work and return its result."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            result: Result = stop.value
            return result


class Slots:
    """Up to ``most`` sequences; more are made as they are needed, if the engine is batched.

    A prompt goes to the sequence that begins like it, where not much else is lost with that.
    Otherwise an idle sequence takes over the part that any other has in common with it, in use or
    not, without computing it.
    """

    def __init__(self, engine: Engine, most: int) -> None:
        self._features = FeatureCache(engine.kept)
        self._prefixes = KeptPrefixes(engine.kept) if engine.kept else None
        self._engine = engine
        self._slots: list[Slot] = []  # none yet: an NPU has but one, which others may use first
        self.most = most if engine.batched else 1
        self._uses = 0
        weights = engine.weight_bytes()
        self._room = float("inf")  # positions that all may hold together
        if weights is not None:
            room = MEMORY_SHARE * this_machine().available_bytes / weights.cache_per_token
            self._room = max(room, engine.max_context)

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

    def keep(self) -> None:
        """Write to disk what idle slots have computed and is to outlive the process."""
        self._features.keep()
        for slot in self._slots:
            if not slot.reserved:
                slot.keep()

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
        self._slots.append(Slot(self._engine, self._features, self._prefixes))
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
