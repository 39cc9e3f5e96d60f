"""The engine interface: embeddings in, logits out; the engine owns the key/value cache."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
#: How keys and values are cached: in bfloat16, or in INT8 with a scale for each position and head.
KVCacheFormat = Literal["bf16", "int8"]
KV_CACHE_FORMATS: tuple[KVCacheFormat, ...] = ("bf16", "int8")


@dataclass
class EngineTimings:
    """Time spent inside the engine since it was loaded, in milliseconds, and what it bought."""

    vision_ms: float = 0.0
    tiles: int = 0
    prefill_ms: float = 0.0
    prefill_tokens: int = 0
    decode_ms: float = 0.0
    decode_tokens: int = 0


@dataclass(frozen=True)
class WeightBytes:
    """What an engine's weights take as it holds and reads them, in bytes.

    Attributes:
        vision: encoder and projector, read once by each batch of tiles.
        text: decoder layers and head, read once by each step of the decoder.
        embedding: the embedding table, of which a step reads a row a token.
        cache_per_token: keys and values of one position of the cache, over all layers.
    """

    vision: int
    text: int
    embedding: int
    cache_per_token: int

    @property
    def total(self) -> int:
        """All weights together."""
        return self.vision + self.text + self.embedding


class Engine(ABC):
    """One model, loaded, with the cache of one sequence.

    Positions ``0 … length - 1`` are in the cache. ``prefill``, ``decode`` and ``extend`` append to
    it, ``rewind`` shortens it. Logits may be a view that the engine's next call overwrites.

    Shapes use B tiles, T tokens, H hidden size of the text model, V vocabulary.
    """

    #: Most positions the cache may hold.
    max_context: int
    #: Positions computed at once by ``prefill``; longer inputs are cut into chunks.
    chunk: int
    #: Positions now in the cache.
    length: int
    #: Threads that compute; None where the engine does not say.
    threads: int | None = None
    #: Most drafted tokens that `extend` verifies for little more than a `decode`; 0 for none.
    max_draft: int = 0
    #: What a user should know of how the model was loaded, a line each.
    notes: tuple[str, ...] = ()

    @abstractmethod
    def encode_images(self, pixels: Floats) -> Floats:
        """Encode tiles: float32 [B, 3, tile, tile] -> features float32 [B, image_tokens, H]."""

    @abstractmethod
    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""

    @abstractmethod
    def prefill(self, embeddings: Floats, at: int) -> Floats:
        """Append T embeddings at position ``at`` (= ``length``): [T, H] -> last logits [V].

        Raises:
            ValueError: ``at`` is not ``length``, T is 0, or the context would overflow.
        """

    @abstractmethod
    def decode(self, token_id: int) -> Floats:
        """Append one token: -> its logits float32 [V].

        Raises:
            ValueError: the context would overflow.
        """

    @abstractmethod
    def extend(self, token_ids: Sequence[int]) -> Floats:
        """Append T tokens: -> the logits after each, float32 [T, V].

        Raises:
            ValueError: T is 0, or the context would overflow.
        """

    @abstractmethod
    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions of the cache.

        Raises:
            ValueError: ``length`` is negative or more than is cached.
        """

    @abstractmethod
    def timings(self) -> EngineTimings:
        """Return the totals so far."""

    def weight_bytes(self) -> WeightBytes | None:
        """Return what the weights take, or None where the engine does not say."""
        return None


class BatchedEngine(Engine):
    """An engine that computes several sequences of one model together.

    Each object is a sequence, and they share the weights; one call of any of them at a time.
    """

    @abstractmethod
    def new_sequence(self) -> BatchedEngine:
        """Return a new, empty sequence of the same model."""

    @abstractmethod
    def share(self, other: BatchedEngine, length: int) -> None:
        """Become the first ``length`` positions of another sequence, which stays as it is.

        Raises:
            ValueError: ``length`` is negative or more than ``other`` holds, or it is of another
                model.
        """

    @abstractmethod
    def decode_batch(self, others: Sequence[BatchedEngine], token_ids: Sequence[int]) -> Floats:
        """Append one token to this and each of the other sequences: -> logits float32 [B, V].

        Raises:
            ValueError: a sequence is of another model, occurs twice or is full.
        """
