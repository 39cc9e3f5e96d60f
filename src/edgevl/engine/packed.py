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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl import _native
from edgevl.checkpoint import Checkpoint, StoredTensor
from edgevl.checkpoint.directory import is_file
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, write_file
from edgevl.engine.plan import MatrixPlan, PackingPlan, Part
from edgevl.engine.smoothing import Floats, loading_factor
from edgevl.errors import CheckpointError
from edgevl.files import UNFINISHED, replacing

Bytes = NDArray[np.uint8]
#: The data of matrices, uint8, by name, and the factors of those that have a norm by `factor_name`.
Packed = dict[str, NDArray[Any]]

#: To be raised when the packed layout, or how weights are rounded, changes.
LAYOUT_VERSION = 3
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


def product_bytes(matrix: MatrixPlan) -> int:
    """Return what a product with a packed matrix reads of it."""
    return _native.product_bytes(matrix.format, matrix.rows, matrix.cols, matrix.group)


def is_cached(plan: PackingPlan) -> bool:
    """Tell whether a model is large enough for files to be kept beside it."""
    return sum(map(packed_bytes, plan.matrices)) >= CACHE_FROM_BYTES


def packed_matrices(
    checkpoint: Checkpoint, plan: PackingPlan, precision: str, pool: _native.ThreadPool
) -> Packed:
    """Return the data of every matrix of ``plan``, read from the cache or packed now.

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


def factor_name(matrix: MatrixPlan) -> str:
    """Return what the factors of a matrix with a norm are called."""
    return matrix.name + ".factor"


def pack_in_memory(checkpoint: Checkpoint, plan: PackingPlan, pool: _native.ThreadPool) -> Packed:
    """Pack all matrices into memory of their own."""
    packed: Packed = {}
    for matrix in plan.matrices:
        packed[matrix.name] = aligned_zeros(packed_bytes(matrix))
        factor = pack_matrix(checkpoint, matrix, packed[matrix.name], pool)
        if factor is not None:
            packed[factor_name(matrix)] = factor
    return packed


def pack_matrix(
    checkpoint: Checkpoint, matrix: MatrixPlan, out: Bytes, pool: _native.ThreadPool
) -> Floats | None:
    """Pack one matrix into ``out``, which is zero.

    Returns:
        If the matrix has a norm, the factors by which that is to be divided: the columns were
        multiplied with them, float32 [cols].

    Raises:
        CheckpointError: the quantization of a weight is damaged.
    """
    factor = None
    for part in matrix.parts:
        if matrix.gptq:
            _pack_gptq(checkpoint, matrix, part, out, pool)
            continue
        if matrix.norm:
            factor = loading_factor(checkpoint, part.weight)
            values = np.require(checkpoint.tensor(part.weight), None, ["C", "A", "W"])
            values *= factor
            weight = StoredTensor("F32", values)
        else:
            weight = convertible(checkpoint, part.weight)
        data = weight.data.reshape(part.rows, matrix.cols)
        if data.dtype == np.float16:
            data = data.view(np.uint16)
        place = (matrix.group, out, part.first_panel, part.panel_step, pool)
        _native.pack(matrix.format, data, weight.dtype, *place)
    checkpoint.release()
    return factor


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

    def pieces() -> Iterator[memoryview]:
        sums, factors = [], []
        for matrix in plan.matrices:
            data = aligned_zeros(packed_bytes(matrix))
            factor = pack_matrix(checkpoint, matrix, data, pool)
            if factor is not None:
                factors.append(factor.astype("<f8"))
            sums.append(checksum(data))
            yield data.data
        for factor in factors:
            sums.append(checksum(factor))
            yield factor.view(np.uint8).data
        yield np.array(sums, "<u8").view(np.uint8).data

    path.parent.mkdir(exist_ok=True)
    _remove_leftovers(path)
    with replacing(path) as file:
        write_file(file, _cached_tensors(plan), pieces(), alignment=ALIGNMENT)


def _cached_tensors(plan: PackingPlan) -> list[TensorSpec]:
    """Return the tensors of a cache file: matrices, factors in whole words for sums, and sums."""
    specs = [TensorSpec(matrix.name, "U8", (packed_bytes(matrix),)) for matrix in plan.matrices]
    smoothed = [matrix for matrix in plan.matrices if matrix.norm]
    specs += [TensorSpec(factor_name(matrix), "F64", (matrix.cols,)) for matrix in smoothed]
    return [*specs, TensorSpec(CHECKSUMS, "U64", (len(specs),))]


def read_cache(path: Path, plan: PackingPlan, threads: int) -> Packed:
    """Map a cache file and check every byte of it.

    The checksum is the sum of all 64-bit words, which runs at the speed of memory: a gigabyte takes
    a tenth of a second. It catches what happens to files, wrong bits and pages never written, not
    deceit: who can write here could change the checkpoint itself. It also brings the file into
    memory, which the first answer would have to wait for anyway.

    Raises:
        CheckpointError: the file is damaged.
    """
    file = SafetensorsFile(path)
    expected = {spec.name: (spec.dtype, spec.shape) for spec in _cached_tensors(plan)}
    found = {name: (file.dtype(name), file.shape(name)) for name in file}
    if found != expected:
        raise CheckpointError(f"{path}: the tensors are not those of the model")
    packed = {name: file[name].data for name in expected if name != CHECKSUMS}
    if any(packed[matrix.name].ctypes.data % ALIGNMENT for matrix in plan.matrices):
        raise CheckpointError(f"{path}: the tensors are not aligned")
    with ThreadPoolExecutor(threads) as pool:
        sums = list(pool.map(checksum, packed.values()))
    if sums != file[CHECKSUMS].data.tolist():
        raise CheckpointError(f"{path}: a checksum is wrong, the file is damaged")
    return packed


def checksum(data: NDArray[Any]) -> int:
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
