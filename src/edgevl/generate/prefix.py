"""One engine, kept in step with the prompts it is given: only what is new is computed."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevl.engine.base import Engine, Floats
from edgevl.preprocess import Picture, Prompt

#: Features of this many tiles are kept, so that a picture is encoded once (1 MiB a tile for 1B).
FEATURE_CACHE_TILES = 256


@dataclass(frozen=True)
class Prefilled:
    """What computing a prompt gave: logits of its last position, float32 [V], and tokens reused."""

    logits: Floats
    cached_tokens: int


class PrefixRunner:
    """Runs prompts through an engine and reuses the longest cached prefix.

    A position is known by its key: a token id, or for an image token the picture's digest and the
    place in it, so that two pictures never pass for each other.
    """

    def __init__(self, engine: Engine) -> None:
        """Take charge of ``engine``: nothing else may move its cache."""
        self._engine = engine
        self._cached: list[int | tuple[str, int]] = []
        self._features: OrderedDict[str, Floats] = OrderedDict()

    def prefill(self, prompt: Prompt) -> Prefilled:
        """Bring the cache to exactly ``prompt`` and return the logits of its last position."""
        keys = prompt_keys(prompt)
        # A run that was interrupted may have left the two lengths apart.
        known = min(len(self._cached), self._engine.length, len(keys) - 1)
        start = next((i for i in range(known) if self._cached[i] != keys[i]), known)
        embeddings = self.embed(prompt, start)
        self._engine.rewind(start)
        del self._cached[start:]
        logits = self._engine.prefill(embeddings, start)
        self._cached = keys
        return Prefilled(logits, start)

    def embed(self, prompt: Prompt, start: int = 0) -> Floats:
        """Embed the positions from ``start`` on, pictures included: float32 [T - start, H]."""
        embeddings = np.array(self._engine.embed(prompt.token_ids[start:]))
        for span in prompt.images:
            begin = max(span.start, start)
            end = span.start + span.length
            if begin < end:
                features = self._encode(span.picture)
                embeddings[begin - start : end - start] = features[begin - span.start :]
        return embeddings

    def decode(self, token_id: int) -> Floats:
        """Append one token and return the logits after it, float32 [V]."""
        logits = self._engine.decode(token_id)
        self._cached.append(token_id)
        return logits

    def extend(self, token_ids: list[int]) -> Floats:
        """Append tokens and return the logits after each, float32 [T, V]."""
        logits = self._engine.extend(token_ids)
        self._cached.extend(token_ids)
        return logits

    def drop(self, count: int) -> None:
        """Take back the last ``count`` tokens."""
        if count:
            self._engine.rewind(self._engine.length - count)
            del self._cached[-count:]

    def _encode(self, picture: Picture) -> Floats:
        """Return the picture's features [image tokens, H], encoding it if it is not known."""
        features = self._features.get(picture.digest)
        if features is None:
            features = self._engine.encode_images(picture.pixels)
            features = features.reshape(-1, features.shape[-1])
            self._features[picture.digest] = features
            tokens_per_tile = len(features) // len(picture.pixels)
            while sum(map(len, self._features.values())) > FEATURE_CACHE_TILES * tokens_per_tile:
                if len(self._features) == 1:
                    break
                self._features.popitem(last=False)
        self._features.move_to_end(picture.digest)
        return features


def prompt_keys(prompt: Prompt) -> list[int | tuple[str, int]]:
    """Return the key of every position of ``prompt``."""
    ids: NDArray[np.int64] = prompt.token_ids
    keys: list[int | tuple[str, int]] = ids.tolist()
    for span in prompt.images:
        for place in range(span.length):
            keys[span.start + place] = (span.picture.digest, place)
    return keys
