"""Writing safetensors files as a stream: no tensor is ever held whole in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.safetensors import NUMPY_TYPES

#: Types whose NumPy type has the same numbers.
_PLAIN_TYPES = ("F16", "F32", "I8", "U8", "I32", "I64")

#: Like the Hub's checkpoints: larger ones are cut into files of this size.
DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class TensorSpec:
    """What a file's header says of one tensor.

    Attributes:
        name: Name in the file.
        dtype: One of `NUMPY_TYPES`.
        shape: Sizes, outermost first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * NUMPY_TYPES[self.dtype].itemsize

    @classmethod
    def of(cls, name: str, array: NDArray[Any]) -> TensorSpec:
        """Return that of an array of numbers, stored as they are."""
        kind = next(dtype for dtype in _PLAIN_TYPES if NUMPY_TYPES[dtype] == array.dtype)
        return cls(name, kind, array.shape)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round float32 to the nearest bfloat16, ties to even: any shape -> uint16 bit patterns."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    # Adding just under half of the dropped part, plus the kept part's last bit, carries exactly
    # when rounding to nearest even goes up.
    rounded: NDArray[np.uint16] = (bits + (np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16).astype(
        np.uint16
    )
    not_a_number = np.isnan(values)
    if not_a_number.any():
        rounded[not_a_number] = 0x7FC0
    return rounded


def encode(values: NDArray[np.float32], dtype: str) -> bytes:
    """Return float32 values as the little-endian bytes of ``BF16``, ``F16``, ``F32`` or ``F64``."""
    if dtype == "BF16":
        return to_bfloat16(values).astype("<u2", copy=False).tobytes()
    return values.astype(NUMPY_TYPES[dtype], copy=False).tobytes()


def raw(array: NDArray[Any]) -> memoryview:
    """Return the bytes of an array, without a copy where it is C-contiguous."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def plan_shards(tensors: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Cut a sequence of tensors, in order, into files of at most ``shard_bytes`` of data.

    A tensor larger than that gets a file of its own.
    """
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.nbytes
    return shards


def write_safetensors(
    directory: Path,
    tensors: Sequence[TensorSpec],
    produce: Callable[[Sequence[TensorSpec]], Iterable[bytes | memoryview]],
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write ``model.safetensors``, or its shards with ``model.safetensors.index.json``.

    Args:
        directory: Where to; it exists.
        tensors: All tensors, in the order of the files.
        produce: Given the tensors of one file, yields their data back to back, in pieces of any
            size.
        shard_bytes: Most bytes of data in one file.
        progress: Called with the number of bytes after each write.
    """
    shards = plan_shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        filename = f"model{'' if single else f'-{number:05}-of-{len(shards):05}'}.safetensors"
        weight_map |= {tensor.name: filename for tensor in shard}
        with (directory / filename).open("wb") as file:
            write_file(file, shard, produce(shard), progress=progress)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def running_total(
    tensors: Sequence[TensorSpec], progress: Callable[[int, int], object]
) -> Callable[[int], None]:
    """Return a ``progress`` for `write_safetensors` that tells another of bytes done and of all."""
    total, done = sum(tensor.nbytes for tensor in tensors), 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return count


def write_file(
    file: IO[bytes],
    tensors: Sequence[TensorSpec],
    pieces: Iterable[bytes | memoryview],
    *,
    alignment: int = 8,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write one file.

    Args:
        file: Where to.
        tensors: Its tensors, in order.
        pieces: Their data back to back, in pieces of any size.
        alignment: Bytes; the first tensor begins at a multiple of it.
        progress: Called with the number of bytes after each write.

    Raises:
        ValueError: ``pieces`` are more or less than ``tensors`` say.
    """
    expected = sum(tensor.nbytes for tensor in tensors)
    written = 0
    file.write(_header(tensors, alignment))
    for piece in pieces:
        size = file.write(piece)
        written += size
        if progress is not None:
            progress(size)
    if written != expected:
        raise ValueError(f"{written} bytes produced for {expected}")


def _header(tensors: Sequence[TensorSpec], alignment: int) -> bytes:
    """Return a file's length prefix and JSON header, padded so that the data is aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % alignment)
    return len(text).to_bytes(8, "little") + text
