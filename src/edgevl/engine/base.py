"""The engine interface: embeddings in, logits out.

An `Engine` has the weights of a model, each `Sequence` the key/value cache of a text.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from edgevl.engine.kept import Kept

Floats = NDArray[np.float32]


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
        text: decoder layers and head, but for its lower bits, read once by each step.
        embedding: the embedding table, of which a step reads a row a token.
        cache_per_token: keys and values of one position of the cache, over all layers.
        lower: lower bits of the head, of which a step reads the rows of its candidates.
    """

    vision: int
    text: int
    embedding: int
    cache_per_token: int
    lower: int = 0

    @property
    def total(self) -> int:
        """All weights together."""
        return self.vision + self.text + self.embedding + self.lower


class Sequence:
    """The positions ``0 … length - 1`` of one text in an engine's cache.

    `Engine.new_sequence` makes it.
    """

    def __init__(self) -> None:
        self.length = 0

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions.

        Raises:
            ValueError: ``length`` is negative or more than is cached.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind to {length}, but {self.length} are cached")
        self.length = length


@dataclass(frozen=True)
class Part:
    """What a step appends to one sequence.

    Attributes:
        sequence: what is appended to.
        inputs: embeddings of a prompt, float32 [T, H], or the token ids of an answer.
        wanted: how many of the last positions' logits are to be computed.
    """

    sequence: Sequence
    inputs: Floats | list[int]
    wanted: int


class Engine(ABC):
    """The weights of one model. What it has read of a text is in a `Sequence`.

    ``prefill``, ``decode``, ``extend`` and ``step`` append to sequences. One call at a time: who
    shares an engine among threads lets them take turns. Logits may be a view that the next call
    overwrites.

    Shapes use B tiles or sequences, T tokens, H hidden size of the text model, V vocabulary.
    """

    #: Most positions of a sequence.
    max_context: int
    #: Positions computed at once by ``prefill``; longer inputs are cut into chunks.
    chunk: int
    #: Threads that compute; None where the engine does not say.
    threads: int | None = None
    #: Most drafted tokens that `extend` verifies for little more than a `decode`, each with the
    #: bits of a `decode`, so that a seed draws the same answer; 0 for none.
    max_draft: int = 0
    #: Whether sequences are decoded together in less time than one by one, and can `share`.
    batched: bool = False
    #: Where features and saved positions outlive the process, if anywhere.
    kept: Kept | None = None
    #: What a user should know of how the model was loaded, a line each.
    notes: tuple[str, ...] = ()

    def __init__(self) -> None:
        self._timings = EngineTimings()

    def encode_images(self, pixels: Floats) -> Floats:
        """Encode tiles one by one: float32 [B, 3, tile, tile] -> [B, image_tokens, H].

        Raises:
            CheckpointError: the model has no vision encoder.
        """
        start = time.perf_counter()
        features = np.concatenate([self._encode(tile[None]) for tile in pixels])
        self._timings.vision_ms += (time.perf_counter() - start) * 1000
        self._timings.tiles += len(pixels)
        return features

    @abstractmethod
    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""

    @abstractmethod
    def new_sequence(self) -> Sequence:
        """Return a new, empty sequence.

        Raises:
            EdgeVLError: there can be no other.
        """

    def prefill(self, sequence: Sequence, embeddings: Floats) -> Floats:
        """Append T embeddings [T, H]: -> the logits after the last, float32 [V].

        Raises:
            ValueError: T is 0, or the context would overflow.
        """
        self._check_room(sequence, len(embeddings))
        start = time.perf_counter()
        logits = self._prefill(sequence, embeddings)
        self._timings.prefill_ms += (time.perf_counter() - start) * 1000
        self._timings.prefill_tokens += len(embeddings)
        return logits

    def decode(self, sequences: list[Sequence], token_ids: list[int]) -> Floats:
        """Append one token to each of B different sequences: -> their logits, float32 [B, V].

        Raises:
            ValueError: a sequence is of another model, occurs twice or is full.
        """
        for sequence in sequences:
            self._check_room(sequence, 1)
        start = time.perf_counter()
        logits = self._decode(sequences, token_ids)
        self._count_decoded(start, len(token_ids))
        return logits

    def extend(self, sequence: Sequence, token_ids: list[int]) -> Floats:
        """Append T tokens: -> the logits after each, float32 [T, V].

        Raises:
            ValueError: T is 0, or the context would overflow.
        """
        self._check_room(sequence, len(token_ids))
        start = time.perf_counter()
        logits = self._extend(sequence, token_ids)
        self._count_decoded(start, len(token_ids))
        return logits

    def step(self, prompt: Part | None, answers: list[Part]) -> list[Floats]:
        """Append a part of a prompt to one sequence, and tokens to others: -> logits of each part.

        Where the engine is `batched` that reads the weights once.

        Args:
            prompt: embeddings, of which the last logits are wanted or none; None where there are
                only answers.
            answers: tokens for other sequences; all their logits are wanted.

        Returns:
            float32 [wanted, V] for the prompt, if there is one, then for each answer.

        Raises:
            ValueError: a part is empty, the context would overflow, a sequence is of another model
                or occurs twice.
        """
        parts = [*([prompt] if prompt else []), *answers]
        for part in parts:
            self._check_room(part.sequence, len(part.inputs))
        start = time.perf_counter()
        logits = self._step(parts)
        elapsed_ms = (time.perf_counter() - start) * 1000
        positions = sum(len(part.inputs) for part in parts)
        read = len(prompt.inputs) if prompt else 0
        share = read / positions
        self._timings.prefill_ms += share * elapsed_ms
        self._timings.prefill_tokens += read
        self._timings.decode_ms += (1 - share) * elapsed_ms
        self._timings.decode_tokens += positions - read
        return logits

    def share(self, sequence: Sequence, other: Sequence, length: int) -> None:
        """Make ``sequence`` the first ``length`` positions of ``other``, which stays as it is.

        Raises:
            ValueError: ``length`` is negative or more than ``other`` holds, or one of them is of
                another model.
        """
        raise NotImplementedError  # where it is not `batched`

    def save(self, sequence: Sequence, length: int) -> NDArray[np.uint32]:
        """Return the first ``length`` positions of ``sequence`` as they are cached, for `load`.

        Raises:
            ValueError: ``length`` is less than 1 or more than is cached.
        """
        raise NotImplementedError  # where nothing is `kept`

    def load(self, sequence: Sequence, saved: NDArray[np.uint32], length: int) -> None:
        """Make ``sequence`` the ``length`` positions that `save` gave; what it held is lost.

        Raises:
            ValueError: they are not so many, or more than the context holds.
        """
        raise NotImplementedError  # where nothing is `kept`

    def timings(self) -> EngineTimings:
        """Return the totals so far."""
        return replace(self._timings)

    def weight_bytes(self) -> WeightBytes | None:
        """Return what the weights take, or None where the engine does not say."""
        return None

    # What engines do of it, with sequences of their own kind. Each moves `Sequence.length` on as
    # soon as positions are in the cache, since a call may be interrupted.

    @abstractmethod
    def _encode(self, pixels: Floats) -> Floats:
        """See `encode_images`, for one tile."""

    @abstractmethod
    def _prefill(self, sequence: Any, embeddings: Floats) -> Floats:
        """See `prefill`."""

    @abstractmethod
    def _decode(self, sequences: list[Any], token_ids: list[int]) -> Floats:
        """See `decode`."""

    @abstractmethod
    def _extend(self, sequence: Any, token_ids: list[int]) -> Floats:
        """See `extend`."""

    def _step(self, parts: list[Part]) -> list[Floats]:
        """See `step`; one part after the other, where the engine is not `batched`."""
        logits = []
        for part in parts:
            if isinstance(part.inputs, list):
                found = self._extend(part.sequence, part.inputs)
            else:
                found = self._prefill(part.sequence, part.inputs)[None][: part.wanted]
            logits.append(np.array(found))
        return logits

    def _check_room(self, sequence: Sequence, tokens: int) -> None:
        if tokens == 0:
            raise ValueError("0 tokens to append")
        if sequence.length + tokens > self.max_context:
            raise ValueError(f"{sequence.length} + {tokens} positions exceed {self.max_context}")

    def _count_decoded(self, start: float, tokens: int) -> None:
        self._timings.decode_ms += (time.perf_counter() - start) * 1000
        self._timings.decode_tokens += tokens
