"""The native engine: kernels, packed weights, decoder and vision encoder (``native/``).

Arrays are C-contiguous unless it says otherwise. Functions that compute release the GIL. Wrong
arguments are a ValueError. A matrix is a tuple (format, rows, cols, group, packed bytes), with
``cols`` not padded; layouts are in ``native/kernels/layout.h``.
"""

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Format: TypeAlias = Literal["int4", "int8", "bf16", "split"]
Matrix: TypeAlias = tuple[Format, int, int, int, NDArray[np.uint8]]
#: A two-dimensional tensor as a checkpoint stores it: its safetensors type, and its data.
Stored: TypeAlias = tuple[str, NDArray[Any]]
#: The same in a file: safetensors type, rows, columns, descriptor of the file open for reading,
#: which is duplicated, offset of the data in bytes, and the file's name for messages.
InFile: TypeAlias = tuple[str, int, int, int, int, bytes]
Tensors: TypeAlias = dict[str, NDArray[np.float32] | Matrix | Stored | InFile]

def instruction_sets() -> list[str]:
    """Return the instruction sets that this processor can run, the best first."""

class ThreadPool:
    """Threads that compute together; the calling thread is one of them."""

    def __init__(self, threads: int) -> None: ...
    @property
    def size(self) -> int: ...

def padded_cols(format: Format, cols: int, group: int) -> int:
    """Return the columns of a packed matrix."""

def packed_bytes(format: Format, rows: int, cols: int, group: int) -> int:
    """Return the bytes of a packed matrix, a multiple of 64."""

def product_bytes(format: Format, rows: int, cols: int, group: int) -> int:
    """Return those of them that a product with the matrix reads."""

def pack(
    format: Format,
    weight: NDArray[Any],
    dtype: str,
    group: int,
    out: NDArray[np.uint8],
    first_panel: int,
    panel_step: int,
    pool: ThreadPool,
) -> None:
    """Round a weight [R, C] (BF16, F16 as uint16; F32) to nearest into panels of ``out``."""

def pack_gptq(
    qweight: NDArray[np.int32],
    scales: NDArray[Any],
    group: int,
    out: NDArray[np.uint8],
    first_panel: int,
    panel_step: int,
    pool: ThreadPool,
) -> None:
    """Take symmetric 4-bit GPTQ, qweight [C / 8, R] and scales [groups, R], as it is."""

def unpack(
    format: Format, data: NDArray[np.uint8], rows: int, cols: int, group: int
) -> NDArray[np.float32]:
    """Return the weight that the kernels multiply with: float32 [rows, cols]."""

class Cache:
    """Keys and values of one sequence; grows in blocks."""

    @property
    def length(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def truncate(self, length: int) -> None: ...

#: A cache; what is appended to it, embeddings float32 [T, H] or token ids int64 [T]; and how many
#: of the last positions' logits are wanted.
Part: TypeAlias = tuple[Cache, NDArray[Any], int]

class Decoder:
    """The text model. Logits are views of a buffer, valid until the next call.

    The tensors ``embedding`` and ``head_exact`` (optional) are Stored, or InFile: then rows are
    read as they are used. Where that fails, functions raise an OSError, and caches stay as they
    were.
    """

    def __init__(
        self, config: dict[str, Any], tensors: Tensors, pool: ThreadPool, isa: str = ""
    ) -> None: ...
    def new_cache(self) -> Cache: ...
    def share(self, cache: Cache, other: Cache, length: int) -> None:
        """Make ``cache`` the first ``length`` positions of ``other``; they share the memory."""

    def save(self, cache: Cache, length: int) -> NDArray[np.uint32]:
        """Return the first ``length`` positions of ``cache``, for `load`: words [N]."""

    def load(self, cache: Cache, words: NDArray[np.uint32], length: int) -> None:
        """Make ``cache`` the positions that `save` gave: of the same weights, ``kv_cache``, isa."""

    def embed(self, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Token ids [T] -> [T, H]."""

    def step(self, parts: list[Part]) -> NDArray[np.float32]:
        """Append to different sequences, all in one pass of the weights if they are few rows.

        Only of the first part may fewer logits be wanted than it has positions.

        Returns logits [wanted, V], those of one part after the other's.
        """

class VisionEncoder:
    """The vision encoder, pixel shuffle and projector."""

    def __init__(
        self, config: dict[str, Any], tensors: Tensors, pool: ThreadPool, isa: str = ""
    ) -> None: ...
    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """Tiles [B, 3, S, S] -> features [B, image_tokens, H]."""

def read_bandwidth(pool: ThreadPool, bytes: int, isa: str = "") -> float:
    """Return the GB/s of reading a buffer of that size once."""

def int8_rate(pool: ThreadPool, isa: str = "") -> float:
    """Return the int8 rate in GOPS, a multiply-add counted as two operations."""
