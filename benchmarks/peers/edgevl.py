"""EdgeVL itself, measured through the same interface as everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers.base import Peer


class EdgeVL(Peer):
    """The engine as ``edgevl.load`` sets it up; variants of the text model are its precisions."""

    name = "edgevl"

    @classmethod
    def build(cls, checkpoint: Path, directory: Path) -> None:
        """Point at the checkpoint and load it once, so that its packed weights are cached."""
        (directory / "checkpoint").symlink_to(checkpoint)
        cls(directory, "int4", "int8", 1)

    def __init__(self, directory: Path, text: str | None, vision: str | None, threads: int) -> None:
        """Load everything: there is one precision for both parts."""
        import edgevl

        precision: Any = text  # `load` says which ones there are
        checkpoint = (directory / "checkpoint").resolve()
        model = edgevl.load(checkpoint, "cpu", precision=precision, threads=threads)
        self._engine = model.engine
        self._sequence = self._engine.new_sequence()
        self._logits = np.empty(0, np.float32)

    def prefill(self, token_ids: NDArray[np.int64]) -> None:
        """Look up the embeddings and prefill."""
        self._sequence.rewind(0)
        self._logits = self._engine.prefill(self._sequence, self._engine.embed(token_ids))

    def decode(self, tokens: int) -> None:
        """Decode greedily."""
        for _ in range(tokens):
            [self._logits] = self._engine.decode([self._sequence], [int(self._logits.argmax())])

    def logits(self) -> NDArray[np.float32]:
        """Return a copy: the engine's next step overwrites them."""
        return self._logits.copy()

    def encode_tile(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Encode a tile."""
        return self._engine.encode_images(pixels)[0]
