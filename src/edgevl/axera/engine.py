"""The engine of Axera's NPUs: a compiled model behind `Engine`."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import pays_as_chunk
from edgevl.axera.model.decoder import NpuDecoder
from edgevl.axera.model.directory import BoardModel
from edgevl.axera.model.output_layer import NpuOutputLayer
from edgevl.axera.model.vision_encoder import NpuVisionEncoder
from edgevl.axera.npu import Memory, NpuModel, Runtime, open_runtime
from edgevl.engine.base import Engine, EngineTimings, Floats
from edgevl.errors import CheckpointError


class AxeraEngine(Engine):
    """One sequence on an NPU. One call at a time, from any thread."""

    def __init__(
        self, model: BoardModel, max_context: int | None = None, runtime: Runtime | None = None
    ) -> None:
        """Load a model onto the NPU.

        Args:
            model: its files.
            max_context: most positions; default and limit is what it was compiled for.
            runtime: what drives the NPU; default is this computer's.

        Raises:
            BoardError: there is no NPU, it refuses the model or has too little memory, or the files
                do not belong together.
        """
        self.config = model.config
        self._path = model.root
        self._embedding = model.embedding
        self._timings = EngineTimings()
        self.length = 0
        self._runtime = runtime or open_runtime(model.emulated)
        model.check_contents()
        owned = ExitStack()
        try:
            self._load(model, _Owner(self._runtime, owned))
        except BaseException:
            owned.close()
            raise
        # At the end of the process the runtime does it, when no thread computes any more.
        weakref.finalize(self, owned.close).atexit = False
        self.notes = ("emulated NPU: no board computes",) if model.emulated else ()
        if self.top_k is not None:
            self.notes += (f"compiled for the {self.top_k} likeliest tokens: no other is chosen",)
        # The last position that a token is decoded at is the one after the longest history.
        limit = min(self._decoder.shapes.context + 1, self.config.text.max_position_embeddings)
        self.max_context = min(max_context or limit, limit)
        self.chunk = self._decoder.shapes.chunk

    def _load(self, model: BoardModel, runtime: Runtime) -> None:
        text = self.config.text
        layers = [runtime.load(path) for path in model.layers]
        post = runtime.load(model.post)
        vision = None if model.vision is None else runtime.load(model.vision)
        with self._runtime.in_use():
            self._decoder = NpuDecoder(runtime, layers, text)
            self._output_layer = NpuOutputLayer(
                runtime, post, self._decoder.hidden, self._decoder.output, text.vocab_size
            )
            self._vision: NpuVisionEncoder | None = None
            if vision is not None:
                self._vision = NpuVisionEncoder(runtime, vision, self.config)

    @property
    def top_k(self) -> int | None:
        """Tokens that get a finite logit; None for all of the vocabulary."""
        return self._output_layer.top_k

    def encode_images(self, pixels: Floats) -> Floats:
        """Encode tiles one by one: float32 [B, 3, tile, tile] -> [B, image_tokens, H]."""
        if self._vision is None:
            raise CheckpointError(f"{self._path}: no vision encoder, it answers text only")
        start = time.perf_counter()
        features = np.stack([self._encode(self._vision, tile) for tile in pixels])
        self._timings.vision_ms += (time.perf_counter() - start) * 1000
        self._timings.tiles += len(pixels)
        return features

    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""
        return self._embedding.rows(np.asarray(token_ids, np.int64))

    def prefill(self, embeddings: Floats, at: int) -> Floats:
        """Append T embeddings at position ``at``: [T, H] -> last logits [V]."""
        if at != self.length or len(embeddings) == 0:
            raise ValueError(f"prefill of {len(embeddings)} at {at}, but {self.length} are cached")
        self._check_room(len(embeddings))
        start = time.perf_counter()
        done = 0
        while done < len(embeddings):
            row = self._append(embeddings[done:])
            done = self.length - at
        logits = self._logits(row)
        self._timings.prefill_ms += (time.perf_counter() - start) * 1000
        self._timings.prefill_tokens += len(embeddings)
        return logits

    def decode(self, token_id: int) -> Floats:
        """Append one token: -> its logits float32 [V]."""
        self._check_room(1)
        start = time.perf_counter()
        logits = self._logits(self._append(self.embed(np.array([token_id]))))
        self._timings.decode_ms += (time.perf_counter() - start) * 1000
        self._timings.decode_tokens += 1
        return logits

    def extend(self, token_ids: Sequence[int]) -> Floats:
        """Append T tokens: -> the logits after each, float32 [T, V].

        A chunk of them goes through the layers at once; the output layer takes one at a time.
        """
        if len(token_ids) == 0:
            raise ValueError("extend by 0 tokens")
        self._check_room(len(token_ids))
        start = time.perf_counter()
        embeddings = self.embed(np.array(token_ids, np.int64))
        logits = np.empty((len(embeddings), self.config.text.vocab_size), np.float32)
        done = 0
        while done < len(embeddings):
            begin = self.length
            last = self._append(embeddings[done:])
            for row in range(last + 1):
                logits[done + row] = self._logits(row)
            done += self.length - begin
        self._timings.decode_ms += (time.perf_counter() - start) * 1000
        self._timings.decode_tokens += len(token_ids)
        return logits

    def rewind(self, length: int) -> None:
        """Keep the first ``length`` positions: what lies beyond is masked, then overwritten."""
        if not 0 <= length <= self.length:
            raise ValueError(f"rewind to {length}, but {self.length} are cached")
        self.length = length

    def timings(self) -> EngineTimings:
        """Return the totals so far."""
        return replace(self._timings)

    def _append(self, embeddings: Floats) -> int:
        """Append as many embeddings as one step takes: -> the row of the last hidden state.

        That is a chunk; or a token where no chunk was compiled for a history this long, or where so
        few are left that a chunk does not pay.
        """
        shapes = self._decoder.shapes
        step = shapes.step(shapes.prefill, self.length)
        if step is None or not pays_as_chunk(len(embeddings), step.history):
            step = shapes.step(shapes.decode, self.length)
            assert step is not None  # the context is that of the longest
        tokens = min(step.tokens, len(embeddings))
        with self._runtime.in_use():
            self._decoder.run(step, embeddings[:tokens], self.length)
        self.length += tokens
        return tokens - 1

    def _logits(self, row: int) -> Floats:
        with self._runtime.in_use():
            return self._output_layer.logits(row)

    def _encode(self, vision: NpuVisionEncoder, tile: Floats) -> Floats:
        with self._runtime.in_use():
            return vision.encode(tile)

    def _check_room(self, tokens: int) -> None:
        if self.length + tokens > self.max_context:
            raise ValueError(f"{self.length} + {tokens} positions exceed {self.max_context}")


class _Owner(Runtime):
    """A runtime that notes what one engine takes from it, to give that back."""

    def __init__(self, runtime: Runtime, owned: ExitStack) -> None:
        super().__init__()
        self._runtime = runtime
        self._owned = owned

    def _allocate(self, nbytes: int) -> Memory:
        return self._owned.enter_context(closing(self._runtime.allocate(nbytes)))

    def _load(self, path: Path) -> NpuModel:
        return self._owned.enter_context(closing(self._runtime.load(path)))

    def _shut_down(self) -> None:
        """The runtime stays."""
