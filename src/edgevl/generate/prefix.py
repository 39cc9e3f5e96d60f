"""One sequence, kept in step with the prompts it is given: only what is new is computed."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgevl.engine.base import Engine, Floats
from edgevl.preprocess import Picture, Prompt

#: Features of this many tiles are kept, so that a picture is encoded once (1 MiB a tile for 1B).
FEATURE_CACHE_TILES = 256

Result = TypeVar("Result")
#: What stands at a position: a token id, or for an image token the picture's digest and the place
#: in it, so that two pictures never pass for each other.
Key: TypeAlias = int | tuple[str, int]


@dataclass(frozen=True)
class Prefilled:
    """What computing a prompt gave: logits of its last position, float32 [V], and tokens reused."""

    logits: Floats
    cached_tokens: int


class FeatureCache:
    """Features of the pictures that were asked about lately; sequences of a model share it."""

    def __init__(self) -> None:
        """Start empty."""
        self._features: OrderedDict[str, Floats] = OrderedDict()

    def get(self, picture: Picture) -> Floats | None:
        """Return the picture's features [image tokens, H] if they are known."""
        features = self._features.get(picture.digest)
        if features is not None:
            self._features.move_to_end(picture.digest)
        return features

    def put(self, picture: Picture, features: Floats) -> None:
        """Keep features [image tokens, H]; those not used for longest make room."""
        self._features[picture.digest] = features
        tokens_per_tile = len(features) // len(picture.pixels)
        while sum(map(len, self._features.values())) > FEATURE_CACHE_TILES * tokens_per_tile:
            if len(self._features) == 1:
                break
            self._features.popitem(last=False)


class PrefixRunner:
    """Runs prompts through a sequence of an engine and reuses the longest cached prefix.

    Attributes:
        engine: what computes.
        sequence: what it has read; who borrows it leaves it empty.
    """

    def __init__(self, engine: Engine, features: FeatureCache | None = None) -> None:
        """Make a sequence of ``engine``; ``features`` is what its other sequences use too."""
        self.engine = engine
        self.sequence = engine.new_sequence()
        self._features = FeatureCache() if features is None else features
        self._cached: list[Key] = []

    def __len__(self) -> int:
        """Return the positions that can be reused."""
        # A call that was interrupted may have left the two lengths apart.
        return min(len(self._cached), self.sequence.length)

    def match(self, keys: Sequence[Key]) -> int:
        """Return how many of ``keys``, from the first on, the cache holds."""
        known = min(len(self), len(keys))
        return next((i for i in range(known) if self._cached[i] != keys[i]), known)

    def prefill(self, prompt: Prompt, step: int | None = None) -> Generator[None, None, Prefilled]:
        """Bring the cache to exactly ``prompt``.

        Work is done between the yields: a tile of a picture, or ``step`` positions (default: all).
        What has been done when the generator is closed can be reused.

        Returns:
            Logits of the last position, and what did not need to be computed.
        """
        keys = prompt_keys(prompt)
        start = min(self.match(keys), len(keys) - 1)
        embeddings = yield from self._embed(prompt, start)
        self.truncate(start)
        size = step or len(keys)
        for begin in range(start, len(keys), size):
            if begin > start:
                yield
            block = embeddings[begin - start : begin - start + size]
            logits = self.engine.prefill(self.sequence, block)
            self._cached += keys[begin : begin + size]
        return Prefilled(logits, start)

    def embed(self, prompt: Prompt) -> Floats:
        """Embed a prompt, pictures included: float32 [T, H]."""
        return drain(self._embed(prompt, 0))

    def decode(self, token_id: int) -> Floats:
        """Append one token and return the logits after it, float32 [1, V]."""
        return decode_together([self], [token_id])

    def extend(self, token_ids: list[int]) -> Floats:
        """Append tokens and return the logits after each, float32 [T, V]."""
        logits = self.engine.extend(self.sequence, token_ids)
        self._cached.extend(token_ids)
        return logits

    def truncate(self, length: int) -> None:
        """Keep the first ``length`` positions."""
        self.sequence.rewind(length)
        del self._cached[length:]

    def share(self, other: PrefixRunner, length: int) -> None:
        """Become the first ``length`` positions of another sequence of a batched engine."""
        self.engine.share(self.sequence, other.sequence, length)
        self._cached = other._cached[:length]

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


def decode_together(runners: Sequence[PrefixRunner], token_ids: list[int]) -> Floats:
    """Append a token to each of B sequences of an engine: -> logits float32 [B, V]."""
    logits = runners[0].engine.decode([runner.sequence for runner in runners], token_ids)
    for runner, token_id in zip(runners, token_ids, strict=True):
        runner._cached.append(token_id)
    return logits


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
