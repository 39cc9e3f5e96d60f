"""Reads safetensors files by memory map: the header is checked whole, tensor data stays on disk.

Format: https://github.com/huggingface/safetensors#format. Own code rather than the library,
because NumPy has no bfloat16 and the library's NumPy reader copies every tensor.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import struct
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.errors import CheckpointError
from edgevl.files import reading
from edgevl.json_input import Fields, parse_object, shown

#: Largest header in bytes. The format allows 100 MB; known files stay below 1 MB.
MAX_HEADER_BYTES = 8 << 20
#: Largest ``model.safetensors.index.json`` in bytes, and most shards of a checkpoint.
MAX_INDEX_BYTES = 16 << 20
MAX_SHARDS = 4096
#: Most dimensions of a tensor.
MAX_DIMENSIONS = 8
#: Most elements of a tensor, not counting dimensions of size 0 (NumPy counts like this too).
MAX_ELEMENTS = 1 << 48

#: NumPy types of safetensors types. bfloat16 and the 8-bit floats have no NumPy type: their bits
#: are given as unsigned integers.
NUMPY_TYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(code)
    for name, code in {
        "BOOL": "?",
        "U8": "u1",
        "I8": "i1",
        "F8_E4M3": "u1",
        "F8_E5M2": "u1",
        "F8_E8M0": "u1",
        "I16": "<i2",
        "U16": "<u2",
        "F16": "<f2",
        "BF16": "<u2",
        "I32": "<i4",
        "U32": "<u4",
        "F32": "<f4",
        "F64": "<f8",
        "I64": "<i8",
        "U64": "<u8",
        "C64": "<c8",
    }.items()
}
FLOAT_TYPES = ("F32", "F16", "BF16", "F64")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it is on disk.

    Attributes:
        dtype: its safetensors type, such as "BF16".
        data: read-only view of the file, of the type that ``NUMPY_TYPES`` gives.
    """

    dtype: str
    data: NDArray[Any]

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the dimensions."""
        return self.data.shape

    def to_float32(self, rows: Any = None) -> NDArray[np.float32]:
        """Return the values as float32, C-contiguous.

        A view of the file, read-only, where that is what it stores; otherwise a new array.

        Args:
            rows: index of the first dimension (a slice, or an integer array) for a part only.

        Raises:
            ValueError: the tensor is not of a floating-point type of 16 bits or more.
        """
        data = self.data if rows is None else self.data[rows]
        if self.dtype == "BF16":
            # bfloat16 is the upper half of float32.
            wide = np.empty(data.shape, np.uint32)
            np.left_shift(data, 16, out=wide, dtype=np.uint32)
            return wide.view(np.float32)
        if self.dtype not in FLOAT_TYPES:
            raise ValueError(f"a {self.dtype} tensor has no float32 values")
        aligned = np.require(data, np.float32, ["C", "A"])
        return aligned if data.ndim else aligned.reshape(())


@dataclass(frozen=True)
class FilePlace:
    """Where the data of a tensor lies, for a reader that does without the memory map.

    Attributes:
        path: the file, for messages.
        descriptor: the file open for reading, until it is closed here: a longer reader duplicates
            it. What is read from it stays what has been checked, were the path's file replaced.
        offset: of the data in the file, in bytes.
        dtype: the tensor's safetensors type.
    """

    path: Path
    descriptor: int
    offset: int
    dtype: str


class SafetensorsFile(Mapping[str, StoredTensor]):
    """One file, opened and checked; a mapping of names to tensors.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be read, or is not a whole and well-formed safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file():  # opening a pipe would wait for ever
            raise CheckpointError(f"{path}: not a regular file")
        with reading(path, CheckpointError), path.open("rb") as file:
            head = file.read(16)
            size = file.seek(0, 2)
            _refuse_other_formats(head, size, path)
            (header_size,) = struct.unpack("<Q", head[:8])
            if header_size > MAX_HEADER_BYTES or header_size > size - 8:
                raise CheckpointError(
                    f"{path}: the header claims {header_size} bytes, of a file of {size} "
                    f"(limit {MAX_HEADER_BYTES}); damaged or not safetensors, download it again"
                )
            file.seek(8)
            header = file.read(header_size)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            descriptor = os.dup(file.fileno())
        self._map: mmap.mmap | None = mapped
        self._descriptor = descriptor
        self._close_descriptor = weakref.finalize(self, os.close, descriptor)
        self._start = 8 + header_size
        try:
            self._entries = _parse_header(header, size - 8 - header_size, path)
        except CheckpointError:
            self.close()
            raise

    def __getitem__(self, name: str) -> StoredTensor:
        dtype, shape, offset = self._entries[name]
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        kind = NUMPY_TYPES[dtype]
        count = math.prod(shape)
        if count == 0:
            return StoredTensor(dtype, np.empty(shape, kind))
        data = np.frombuffer(self._map, kind, count, self._start + offset)
        return StoredTensor(dtype, data.reshape(shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._entries[name][1]

    def dtype(self, name: str) -> str:
        """Return a tensor's safetensors type."""
        return self._entries[name][0]

    def place(self, name: str) -> FilePlace:
        """Return where a tensor lies in the file."""
        dtype, _, offset = self._entries[name]
        if self._map is None:
            raise ValueError(f"{self.path} is closed")
        return FilePlace(self.path, self._descriptor, self._start + offset, dtype)

    def release(self) -> None:
        """Give back the memory of what has been read; it is read again when it is used again."""
        if self._map is not None and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Unmap the file; if views of it are alive, the last of them does so when it goes."""
        self._close_descriptor()
        mapped, self._map = self._map, None
        if mapped is not None:
            with contextlib.suppress(BufferError):
                mapped.close()


def _refuse_other_formats(head: bytes, size: int, path: Path) -> None:
    """Raise with the right fix for what people commonly have in place of the weights."""
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty; download it again")
    if head[8:9] == b"{":
        return
    if head.startswith(b"version https://"):
        raise CheckpointError(
            f"{path}: this is a Git LFS pointer, not the weights; run `git lfs pull` beside it, or "
            "`edgevl pull`"
        )
    if head.startswith((b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")):
        raise CheckpointError(
            f"{path}: this is a PyTorch pickle, which could run code and is never opened; get the "
            "safetensors version"
        )
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(f"{path}: this is a web page, not the weights; download it again")
    if size < 10:
        raise CheckpointError(f"{path}: truncated, {size} bytes are no safetensors file")


def _parse_header(
    header: bytes, data_size: int, path: Path
) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Check a header against the size of the data: name -> (type, shape, offset)."""
    entries: dict[str, tuple[str, tuple[int, ...], int]] = {}
    spans: list[tuple[int, int, str]] = []
    for name, value in parse_object(header, f"{path}: header").items():
        if name == "__metadata__":
            continue
        where = f"{path}: tensor {shown(name)}"
        if not isinstance(value, dict):
            raise CheckpointError(f"{where} is described by {shown(value)}, expected an object")
        dtype = Fields(value, where).text("dtype")
        if dtype not in NUMPY_TYPES:
            raise CheckpointError(f"{where} has the unknown type {shown(dtype)}")
        shape = _integers(value.get("shape"), MAX_DIMENSIONS, f"{where}: shape")
        offsets = _integers(value.get("data_offsets"), 2, f"{where}: data_offsets")
        if len(offsets) != 2:
            raise CheckpointError(f"{where}: data_offsets has {len(offsets)} numbers, expected 2")
        begin, end = offsets
        needed = math.prod(shape) * NUMPY_TYPES[dtype].itemsize
        if math.prod(max(length, 1) for length in shape) > MAX_ELEMENTS:
            raise CheckpointError(f"{where} has the absurd shape {list(shape)}")
        if end > data_size:
            raise CheckpointError(
                f"{where} ends at byte {end} of {data_size} bytes of data: the file is truncated, "
                "download it again"
            )
        if end - begin != needed:
            raise CheckpointError(
                f"{where} of shape {list(shape)} and type {dtype} needs {needed} bytes but has "
                f"{end - begin}"
            )
        entries[name] = (dtype, shape, begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise CheckpointError(
                f"{path}: tensor {shown(name)} begins at byte {begin}, expected {at}: tensors "
                "overlap or leave holes"
            )
        at = end
    if at != data_size:
        raise CheckpointError(
            f"{path}: the header accounts for {at} bytes of data, the file has {data_size}; "
            "download it again"
        )
    return entries


def _integers(value: object, most: int, where: str) -> tuple[int, ...]:
    """Check a list of at most ``most`` integers, none negative or above 2^63."""
    if not isinstance(value, list) or len(value) > most:
        raise CheckpointError(f"{where} is {shown(value)}, expected a list of at most {most} sizes")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < 1 << 63:
            raise CheckpointError(f"{where} has {shown(item)}, expected an integer from 0")
    return tuple(value)


class Weights(Mapping[str, StoredTensor]):
    """All tensors of a checkpoint directory, from one file or several.

    As transformers does: ``model.safetensors`` if there is one, else the shards that
    ``model.safetensors.index.json`` names, else every ``*.safetensors`` of the directory.

    Args:
        directory: the checkpoint.

    Raises:
        CheckpointError: there are no weights, a file is malformed or missing, or a tensor is in
            two files.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._files: list[SafetensorsFile] = []
        self._home: dict[str, SafetensorsFile] = {}
        try:
            for path in _weight_files(directory):
                file = SafetensorsFile(path)
                self._files.append(file)
                for name in file:
                    if name in self._home:
                        raise CheckpointError(
                            f"{path}: tensor {shown(name)} is also in {self._home[name].path.name}"
                        )
                    self._home[name] = file
        except CheckpointError:
            self.close()
            raise

    def __getitem__(self, name: str) -> StoredTensor:
        return self._home[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._home)

    def __len__(self) -> int:
        return len(self._home)

    def __contains__(self, name: object) -> bool:
        return name in self._home

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._home[name].path

    def place(self, name: str) -> FilePlace:
        """Return where a tensor lies in its file."""
        return self._home[name].place(name)

    @property
    def paths(self) -> list[Path]:
        """The files, in the order of their names."""
        return [file.path for file in self._files]

    def release(self) -> None:
        """Give back the memory of what has been read, file by file."""
        for file in self._files:
            file.release()

    def close(self) -> None:
        """Close every file."""
        for file in self._files:
            file.close()


def _weight_files(directory: Path) -> list[Path]:
    """Return the safetensors files of a directory, sorted."""
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    if index.exists():
        return _indexed_files(index)
    with reading(directory, CheckpointError):
        names = sorted(path.name for path in directory.iterdir())
    found = [directory / name for name in names if name.endswith(".safetensors")]
    if len(found) > MAX_SHARDS:
        raise CheckpointError(f"{directory}: {len(found)} files, expected at most {MAX_SHARDS}")
    if found:
        return found
    if any(name.endswith(".axmodel") or "embed_tokens.weight" in name for name in names):
        raise CheckpointError(
            f"{directory}: compiled for a board, without the weights: give the checkpoint that it "
            "was compiled from"
        )
    other = next((n for n in names if n.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl"))), None)
    if other:
        raise CheckpointError(
            f"{directory / other}: PyTorch pickles could run code and are never opened; get the "
            "safetensors version of this checkpoint"
        )
    other = next((n for n in names if n.endswith((".gguf", ".onnx"))), None)
    if other:
        raise CheckpointError(f"{directory / other}: not supported; get the safetensors version")
    raise CheckpointError(
        f"{directory}: no model.safetensors here; is the download complete? `edgevl pull` resumes "
        "one"
    )


def _indexed_files(index: Path) -> list[Path]:
    """Return the shards that an index names, all inside its directory."""
    weight_map = Fields.read(index, MAX_INDEX_BYTES).fields("weight_map").values
    # Only the files are of interest: which tensors are in them, they say themselves.
    names = {name for name in weight_map.values() if isinstance(name, str)}
    if not names or len(names) > MAX_SHARDS:
        raise CheckpointError(f"{index}: names {len(names)} files, expected 1 to {MAX_SHARDS}")
    for name in sorted(names):
        # Names alone, so that no path can leave the directory. That a file is a symbolic link is
        # fine: the Hub's cache is made of them.
        plain = name.isprintable() and not any(mark in name for mark in "/\\")
        if not plain or not name.endswith(".safetensors") or len(name) > 255:
            raise CheckpointError(
                f"{index}: {shown(name)} is not the plain name of a .safetensors file"
            )
        if not (index.parent / name).exists():
            raise CheckpointError(
                f"{index.parent / name}: this shard is missing; `edgevl pull` resumes a download"
            )
    return [index.parent / name for name in sorted(names)]
