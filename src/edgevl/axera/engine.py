"""The engine of Axera's NPUs: a compiled model behind `Engine`."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.decoder import NpuDecoder
from edgevl.axera.directory import BoardModel
from edgevl.axera.ends import NpuOutputLayer, NpuVisionEncoder
from edgevl.axera.npu import open_runtime
from edgevl.axera.npu.base import Memory, NpuModel, Runtime
from edgevl.engine.base import Engine, Floats, Sequence
from edgevl.errors import CheckpointError, EdgeVLError


class AxeraEngine(Engine):
    """A model on an NPU, with memory for one sequence. One call at a time, from any thread."""

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
        super().__init__()
        self.config = model.config
        self._path = model.root
        self._embedding = model.embedding
        self._sequence: Callable[[], Sequence | None] = lambda: None
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

    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""
        return self._embedding.rows(np.asarray(token_ids, np.int64))

    def new_sequence(self) -> Sequence:
        """Return a new, empty sequence, if there is no other.

        Raises:
            EdgeVLError: there is.
        """
        if self._sequence() is not None:
            raise EdgeVLError("the NPU has memory for one sequence, and there is one already")
        sequence = Sequence()
        self._sequence = weakref.ref(sequence)
        return sequence

    def _encode(self, pixels: Floats) -> Floats:
        if self._vision is None:
            raise CheckpointError(f"{self._path}: no vision encoder, it answers text only")
        with self._runtime.in_use():
            return self._vision.encode(pixels[0])[None]

    def _prefill(self, sequence: Sequence, embeddings: Floats) -> Floats:
        begin = sequence.length
        while (done := sequence.length - begin) < len(embeddings):
            row = self._append(sequence, embeddings[done:])
        return self._logits(row)

    def _decode(self, sequences: list[Sequence], token_ids: list[int]) -> Floats:
        [sequence] = sequences
        return self._logits(self._append(sequence, self.embed(np.array(token_ids))))[None]

    def _extend(self, sequence: Sequence, token_ids: list[int]) -> Floats:
        """A chunk goes through the layers at once; the output layer takes a token at a time."""
        embeddings = self.embed(np.array(token_ids, np.int64))
        logits = np.empty((len(embeddings), self.config.text.vocab_size), np.float32)
        begin = sequence.length
        while (done := sequence.length - begin) < len(embeddings):
            last = self._append(sequence, embeddings[done:])
            for row in range(last + 1):
                logits[done + row] = self._logits(row)
        return logits

    def _append(self, sequence: Sequence, embeddings: Floats) -> int:
        """Append as many embeddings as one step takes: -> the row of the last hidden state."""
        step = self._decoder.shapes.step(sequence.length, len(embeddings))
        tokens = min(step.tokens, len(embeddings))
        with self._runtime.in_use():
            self._decoder.run(step, embeddings[:tokens], sequence.length)
        sequence.length += tokens
        return tokens - 1

    def _logits(self, row: int) -> Floats:
        with self._runtime.in_use():
            return self._output_layer.logits(row)


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
