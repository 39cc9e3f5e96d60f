"""Numbers as the NPU stores them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.writer import to_bfloat16

#: NumPy's types of the formats, by the names that safetensors has for them.
STORED: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype("<u2"),
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U32": np.dtype("<u4"),
    "U8": np.dtype("u1"),
    "I8": np.dtype("i1"),
    "U16": np.dtype("<u2"),
    "I16": np.dtype("<i2"),
}
#: Those of real numbers.
FLOATS = ("BF16", "F32")


def to_device(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Return float32 values as ``BF16`` (rounded to nearest even, bit patterns) or ``F32``."""
    if dtype == "BF16":
        return to_bfloat16(values)
    return np.ascontiguousarray(values, STORED["F32"])


def from_device(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Return ``BF16`` (bit patterns) or ``F32`` values as a new float32 array."""
    if dtype != "BF16":
        return np.array(stored, np.float32)
    wide = np.empty(stored.shape, np.uint32)  # bfloat16 is the upper half of float32
    np.left_shift(stored, 16, out=wide, dtype=np.uint32)
    return wide.view(np.float32)
