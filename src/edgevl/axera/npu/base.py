"""What every runtime offers: memory of the NPU, compiled models, and calls prepared once.

A tensor of a call is a *place*, an offset in a memory, so that what one call writes the next one
reads where it lies. The host looks at memory only with `Memory.read` and `Memory.write`.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.number_formats import STORED
from edgevl.errors import BoardError

#: Places of tensors begin at multiples of this many bytes.
ALIGNMENT = 128
#: Largest allocation and largest tensor, in bytes: sizes are 32-bit numbers in the C API, also of
#: allocations rounded up to whole cache lines.
MAX_BYTES = (1 << 32) - ALIGNMENT
#: Most shape groups of a model, tensors of a group, and dimensions of a tensor.
MAX_GROUPS, MAX_TENSORS, MAX_DIMENSIONS = 1024, 1024, 16


@dataclass(frozen=True)
class TensorInfo:
    """What a model says of one of its tensors.

    Attributes:
        name: its name.
        dtype: one of `edgevl.axera.number_formats.STORED`.
        shape: sizes, outermost first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * STORED[self.dtype].itemsize


@dataclass(frozen=True)
class Group:
    """One set of shapes that a model is compiled for."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


class Memory(ABC):
    """Memory of the NPU.

    Attributes:
        size: bytes.
    """

    size: int

    @abstractmethod
    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy a C-contiguous array to ``offset``, and make just these bytes visible to the NPU."""

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return what the NPU wrote; a view that the next call or `write` may overwrite."""

    @abstractmethod
    def close(self) -> None:
        """Give the memory back; further calls do nothing."""

    def clear(self) -> None:
        """Write zeros everywhere."""
        self.write(0, np.zeros(self.size, np.uint8))


#: Where a tensor lies: offset in a memory, in bytes.
Place = tuple[Memory, int]


class Call(ABC):
    """One group of a model with the places of its tensors, ready to run."""

    @abstractmethod
    def run(self) -> None:
        """Compute, and wait for the end.

        Raises:
            BoardError: the NPU reports an error.
        """

    @abstractmethod
    def move_input(self, index: int, offset: int) -> None:
        """Move an input to another offset of the same memory; the caller keeps it inside."""

    @abstractmethod
    def move_output(self, index: int, offset: int) -> None:
        """Move an output to another offset of the same memory; the caller keeps it inside."""


class NpuModel(ABC):
    """A compiled model, loaded.

    Attributes:
        path: its file.
        groups: the shapes that it can be run with.
    """

    path: Path
    groups: tuple[Group, ...]

    @abstractmethod
    def bind(self, group: int, inputs: Sequence[Place], outputs: Sequence[Place]) -> Call:
        """Prepare a call; places are in the order of the group's tensors.

        Raises:
            ValueError: there are more or fewer places than tensors, or one is not aligned or does
                not hold its tensor.
        """

    @abstractmethod
    def close(self) -> None:
        """Unload the model and its calls; further calls do nothing."""

    def check(self, group: int, inputs: Sequence[Place], outputs: Sequence[Place]) -> None:
        """Raise the errors of `bind`."""
        shapes = self.groups[group]
        for tensors, places in ((shapes.inputs, inputs), (shapes.outputs, outputs)):
            for tensor, (memory, offset) in zip(tensors, places, strict=True):
                if offset % ALIGNMENT or not 0 <= offset <= memory.size - tensor.nbytes:
                    raise ValueError(
                        f"{self.path.name}: {tensor.name} of {tensor.nbytes} bytes at {offset} of "
                        f"{memory.size}"
                    )


@dataclass(frozen=True)
class NpuInfo:
    """What a runtime says of itself and its NPU; None is what it does not say.

    Attributes:
        version: of the runtime's library.
        chip: its name, and what else is known of it.
        memory_bytes: of the NPU (CMM), all of it.
        free_bytes: what is left of it.
        emulated: whether there is no NPU, but the emulator.
    """

    version: str | None = None
    chip: str | None = None
    memory_bytes: int | None = None
    free_bytes: int | None = None
    emulated: bool = False


class Runtime(ABC):
    """A library that drives NPUs, initialised. One call at a time, from any thread."""

    def __init__(self) -> None:
        self._held: set[Memory | NpuModel] = set()
        self._lock = threading.RLock()
        self._closed = False

    def info(self) -> NpuInfo:
        """Ask the library what it is and what it drives."""
        return NpuInfo()

    def hold(self, thing: Memory | NpuModel) -> None:
        """Note something before it takes anything of the NPU, so that `close` gives that back.

        Afterwards would be too late: a signal may come before the next line.
        """
        self._held.add(thing)

    @contextmanager
    def giving_back(self, thing: Memory | NpuModel) -> Iterator[None]:
        """Let no other thread close the same thing in the block, and forget it at the end.

        A signal may raise an exception right after any call of the block, and then something else
        closes the thing once more. So what a call gives back is marked as given back in a
        ``finally``, in which no call comes before the mark.
        """
        with self._lock:
            yield
            self._held.discard(thing)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have `close` wait for the end of the block, which another thread may be in.

        Raises:
            BoardError: it is closed.
        """
        with self._lock:
            if self._closed:
                raise BoardError("the NPU's library is shut down, since the program ends")
            yield

    def allocate(self, nbytes: int) -> Memory:
        """Return memory, with anything in it.

        Raises:
            BoardError: there is not that much.
        """
        if not 0 < nbytes <= MAX_BYTES:
            raise BoardError(f"{nbytes} bytes of NPU memory at once: 1 to {MAX_BYTES} are possible")
        with self.in_use():
            return self._allocate(nbytes)

    def load(self, path: Path) -> NpuModel:
        """Load a compiled model.

        Raises:
            BoardError: the NPU refuses it, or it has tensors that are not supported.
        """
        with self.in_use():
            return self._load(path)

    def close(self) -> None:
        """Take back everything and shut the library down; further calls do nothing."""
        if self._closed:
            return
        self._closed = True  # so that a thread that goes on and on takes no more
        with self._lock:
            for each in list(self._held):
                each.close()
            self._shut_down()

    @abstractmethod
    def _allocate(self, nbytes: int) -> Memory: ...

    @abstractmethod
    def _load(self, path: Path) -> NpuModel: ...

    @abstractmethod
    def _shut_down(self) -> None: ...


def checked_tensor(path: Path, name: str, dtype: str | None, shape: Sequence[int]) -> TensorInfo:
    """Return what a model says of a tensor, if it makes sense.

    Raises:
        BoardError: the type is not one that is supported, or the size is absurd.
    """
    if dtype is None or dtype not in STORED:
        raise BoardError(
            f"{path}: tensor {name!r} has a number format that is not supported; supported: "
            f"{', '.join(STORED)}"
        )
    tensor = TensorInfo(name, dtype, tuple(shape))
    if min(tensor.shape, default=1) < 1 or tensor.nbytes > MAX_BYTES:
        raise BoardError(f"{path}: tensor {name!r} has shape {list(shape)}: the file is damaged")
    return tensor
