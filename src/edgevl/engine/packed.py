"""Packed weights: made from a checkpoint, or mapped from the cache file beside it.

The cache is ``.edgevl/<precision>-<key>.safetensors`` in the checkpoint's directory. Its key covers
the checkpoint's fingerprint, the plan, and the layout's version, so that a file that is found is
the right one. It is written beside and renamed: several processes may write it at once, and one
of them wins. Where it cannot be written, the model is packed in memory at every start.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import mmap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgevl import _native
from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.directory import is_file
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, write_file
from edgevl.engine.plan import MatrixPlan, PackingPlan, Part
from edgevl.errors import CheckpointError
from edgevl.files import UNFINISHED, replacing

Bytes = NDArray[np.uint8]

#: To be raised when the packed layout, or how weights are rounded, changes.
LAYOUT_VERSION = 1
#: Smaller models are packed as fast as they are mapped.
CACHE_FROM_BYTES = 64 << 20
#: Packed data begins at multiples of this.
ALIGNMENT = 64
#: The tensor of the cache file that has a checksum for each of the others.
CHECKSUMS = "checksums"
#: An unfinished file this old is from a process that was killed.
ABANDONED_SECONDS = 3600

log = logging.getLogger(__name__)


def packed_bytes(matrix: MatrixPlan) -> int:
    """Return the size of a packed matrix."""
    return _native.packed_bytes(matrix.format, matrix.rows, matrix.cols, matrix.group)


def is_cached(plan: PackingPlan) -> bool:
    """Tell whether a model is large enough for files to be kept beside it."""
    return sum(map(packed_bytes, plan.matrices)) >= CACHE_FROM_BYTES


def packed_matrices(
    checkpoint: Checkpoint, plan: PackingPlan, precision: str, pool: _native.ThreadPool
) -> dict[str, Bytes]:
    """Return the data of every matrix of ``plan`` by name, read from the cache or packed now.

    Raises:
        CheckpointError: the quantization of a weight is damaged.
    """
    if not is_cached(plan):
        return pack_in_memory(checkpoint, plan, pool)
    path = cache_path(checkpoint, plan, precision)
    if is_file(path):
        try:
            return read_cache(path, plan, pool.size)
        except CheckpointError as error:
            log.warning("%s; packing the weights anew", error)
    try:
        write_cache(path, checkpoint, plan, pool)
        return read_cache(path, plan, pool.size)
    except (OSError, CheckpointError) as error:  # read-only, the disk is full, or just removed
        log.info("%s: not written (%s), the weights are packed in memory", path, error)
        return pack_in_memory(checkpoint, plan, pool)


# --- packing -------------------------------------------------------------------------------


def pack_in_memory(
    checkpoint: Checkpoint, plan: PackingPlan, pool: _native.ThreadPool
) -> dict[str, Bytes]:
    """Pack all matrices into memory of their own."""
    packed = {}
    for matrix in plan.matrices:
        packed[matrix.name] = aligned_zeros(packed_bytes(matrix))
        pack_matrix(checkpoint, matrix, packed[matrix.name], pool)
    return packed


def pack_matrix(
    checkpoint: Checkpoint, matrix: MatrixPlan, out: Bytes, pool: _native.ThreadPool
) -> None:
    """Pack one matrix into ``out``, which is zero.

    Raises:
        CheckpointError: the quantization of a weight is damaged.
    """
    for part in matrix.parts:
        if matrix.gptq:
            _pack_gptq(checkpoint, matrix, part, out, pool)
            continue
        weight = convertible(checkpoint, part.weight)
        data = weight.data.reshape(part.rows, matrix.cols)
        if data.dtype == np.float16:
            data = data.view(np.uint16)
        place = (matrix.group, out, part.first_panel, part.panel_step, pool)
        _native.pack(matrix.format, data, weight.dtype, *place)
    checkpoint.release()


def _pack_gptq(
    checkpoint: Checkpoint, matrix: MatrixPlan, part: Part, out: Bytes, pool: _native.ThreadPool
) -> None:
    packed = checkpoint.gptq(part.weight)
    assert packed is not None  # the plan says so
    scales = packed.scales.data if packed.scales.dtype == "F16" else packed.scales.to_float32()
    # Where the plan cuts long groups, their parts have the same scale.
    groups = -(-matrix.cols // matrix.group)
    scales = np.repeat(scales, -(-groups // len(scales)), axis=0)[:groups]
    integers = np.require(packed.qweight.data, np.int32, ["C", "A"])
    scales = np.require(scales, None, ["C", "A"])
    place = (matrix.group, out, part.first_panel, part.panel_step, pool)
    _native.pack_gptq(integers, scales, *place)


def convertible(checkpoint: Checkpoint, name: str) -> StoredTensor:
    """Return a weight in a type that the native engine reads: as stored, or as float32.

    Raises:
        CheckpointError: it is quantized, and damaged.
    """
    if checkpoint.gptq(name) is None:
        stored = checkpoint.stored(name)
        if stored.dtype != "F64":
            data = np.require(stored.data, None, ["C", "A"])
            return StoredTensor(stored.dtype, data)
    return StoredTensor("F32", checkpoint.tensor(name))


def aligned_zeros(size: int) -> Bytes:
    """Return zeros that begin at a multiple of `ALIGNMENT` and take memory when written to."""
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size)


# --- the cache file --------------------------------------------------------------------------


def cache_directory(checkpoint: Checkpoint) -> Path:
    """Return where files are kept beside a checkpoint."""
    return checkpoint.path / ".edgevl"


def cache_path(checkpoint: Checkpoint, plan: PackingPlan, precision: str) -> Path:
    """Return where the packed weights of a checkpoint are kept."""
    text = f"{LAYOUT_VERSION} {checkpoint.fingerprint()} {plan.matrices}"
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_directory(checkpoint) / f"{precision}-{key}.safetensors"


def write_cache(
    path: Path, checkpoint: Checkpoint, plan: PackingPlan, pool: _native.ThreadPool
) -> None:
    """Pack all matrices into a cache file, one at a time, and remove those it takes the place of.

    Raises:
        OSError: it cannot be written; nothing is left behind.
        CheckpointError: the quantization of a weight is damaged.
    """
    sizes = [packed_bytes(matrix) for matrix in plan.matrices]
    specs = [
        TensorSpec(matrix.name, "U8", (size,))
        for matrix, size in zip(plan.matrices, sizes, strict=True)
    ]
    specs.append(TensorSpec(CHECKSUMS, "U64", (len(sizes),)))

    def pieces() -> Iterator[memoryview]:
        sums = []
        for matrix, size in zip(plan.matrices, sizes, strict=True):
            data = aligned_zeros(size)
            pack_matrix(checkpoint, matrix, data, pool)
            sums.append(checksum(data))
            yield data.data
        yield np.array(sums, "<u8").view(np.uint8).data

    path.parent.mkdir(exist_ok=True)
    _remove_leftovers(path)
    with replacing(path) as file:
        write_file(file, specs, pieces(), alignment=ALIGNMENT)


def read_cache(path: Path, plan: PackingPlan, threads: int) -> dict[str, Bytes]:
    """Map a cache file and check every byte of it.

    The checksum is the sum of all 64-bit words, which runs at the speed of memory: a gigabyte takes
    a tenth of a second. It catches what happens to files, wrong bits and pages never written, not
    deceit: who can write here could change the checkpoint itself. It also brings the file into
    memory, which the first answer would have to wait for anyway.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = SafetensorsFile(path)
    expected = {matrix.name: ("U8", (packed_bytes(matrix),)) for matrix in plan.matrices}
    expected[CHECKSUMS] = ("U64", (len(plan.matrices),))
    found = {name: (file.dtype(name), file.shape(name)) for name in file}
    if found != expected:
        raise CheckpointError(f"{path}: the tensors are not those of the model")
    packed = {matrix.name: file[matrix.name].data for matrix in plan.matrices}
    if any(data.ctypes.data % ALIGNMENT for data in packed.values()):
        raise CheckpointError(f"{path}: the tensors are not aligned")
    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(checksum, packed.values()))
    if sums != file[CHECKSUMS].data.tolist():
        raise CheckpointError(f"{path}: a checksum is wrong, the file is damaged")
    return packed


def checksum(data: Bytes) -> int:
    """Return the sum of the 64-bit words of ``data``, modulo 2^64."""
    return int(data.view("<u8").sum(dtype=np.uint64))


def _remove_leftovers(path: Path) -> None:
    """Remove caches of what the checkpoint was before, and files of processes that were killed.

    Who has one of them mapped keeps it: on POSIX a file lives as long as it is used.
    """
    precision = path.name.partition("-")[0]
    for other in path.parent.iterdir():
        with contextlib.suppress(OSError):
            unfinished = other.name.startswith(UNFINISHED)
            abandoned = unfinished and time.time() - other.stat().st_mtime > ABANDONED_SECONDS
            outdated = other.name.startswith(f"{precision}-") and other != path
            if abandoned or outdated:
                other.unlink()
