"""The embedding beside compiled layers: rows read from the file as they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import EMBEDDING_BF16, EMBEDDING_F32, EMBEDDING_NPY
from edgevl.axera.npu.base import from_device
from edgevl.errors import BoardError
from edgevl.files import reading

#: The forms, the smallest first.
EMBEDDING_FILES = (EMBEDDING_BF16, EMBEDDING_NPY, EMBEDDING_F32)


class EmbeddingFile:
    """The table [V, H], mapped.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path, vocab_size: int, hidden_size: int) -> None:
        """Map a file, one of `EMBEDDING_FILES` by its name.

        Raises:
            BoardError: it cannot be read, or is not a table of that size.
        """
        self.path = path
        shape = (vocab_size, hidden_size)
        with reading(path, BoardError):
            if path.suffix == ".npy":
                self._rows = self._open_npy(shape)
                return
            stored = np.dtype("<u2" if path.name == EMBEDDING_BF16 else "<f4")
            size, expected = path.stat().st_size, vocab_size * hidden_size * stored.itemsize
            if size != expected:
                raise BoardError(
                    f"{path}: {size} bytes, expected {expected} for {vocab_size} tokens of "
                    f"{hidden_size} numbers as config.json says: copy or download it again"
                )
            self._rows = np.memmap(path, stored, "r", shape=shape)

    def rows(self, token_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the embeddings of tokens: int [T] -> float32 [T, H].

        Raises:
            IndexError: an id is not in the vocabulary.
        """
        if len(token_ids) and not 0 <= token_ids.min() <= token_ids.max() < len(self._rows):
            raise IndexError(f"token ids must be from 0 to {len(self._rows) - 1}")
        rows = np.asarray(self._rows[token_ids])
        return from_device(rows, "BF16" if rows.dtype == np.uint16 else "F32")

    def _open_npy(self, shape: tuple[int, int]) -> NDArray[Any]:
        try:
            table = np.load(self.path, mmap_mode="r", allow_pickle=False)
        # Empty, no array, or cut; its text may propose to read it as a pickle, which may run code.
        except (EOFError, ValueError):
            raise BoardError(
                f"{self.path}: {self.path.stat().st_size} bytes, not a whole NumPy array: copy or "
                "download it again"
            ) from None
        if table.shape != shape or table.dtype != np.dtype("<f4"):
            raise BoardError(
                f"{self.path}: {table.dtype} {list(table.shape)}, expected float32 {list(shape)} "
                "as config.json says: copy or download it again"
            )
        return table
