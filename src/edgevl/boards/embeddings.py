"""The embedding beside a board's model, in the three forms that its programs read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import EMBEDDING_BF16, EMBEDDING_F32, EMBEDDING_NPY
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING
from edgevl.checkpoint.writer import encode, raw

#: Rows that are converted at once.
_ROWS = 4096


def write_embeddings(checkpoint: Checkpoint, directory: Path) -> None:
    """Write the embedding [V, H] row by row: float32 as ``.npy`` and plain, and bfloat16 plain.

    bfloat16 is exact where it is what the checkpoint stores.

    Args:
        checkpoint: an open checkpoint.
        directory: where to; it exists.

    Raises:
        OSError: the disk is full.
    """
    with (
        (directory / EMBEDDING_NPY).open("wb") as npy,
        (directory / EMBEDDING_F32).open("wb") as f32,
        (directory / EMBEDDING_BF16).open("wb") as bf16,
    ):
        shape = checkpoint.shape(EMBEDDING)
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(npy, header)
        for rows in _blocks(checkpoint):
            npy.write(raw(rows))
            f32.write(raw(rows))
            bf16.write(encode(rows, "BF16"))


def embedding_bytes(checkpoint: Checkpoint) -> int:
    """Return what the three files take together, but for a header."""
    vocabulary, hidden = checkpoint.shape(EMBEDDING)
    return vocabulary * hidden * (4 + 4 + 2)


def _blocks(checkpoint: Checkpoint) -> Iterator[NDArray[np.float32]]:
    """Yield the rows as little-endian float32, some at a time."""
    for begin in range(0, checkpoint.shape(EMBEDDING)[0], _ROWS):
        rows = checkpoint.tensor(EMBEDDING, slice(begin, begin + _ROWS))
        yield rows.astype("<f4", copy=False)
        checkpoint.release()
