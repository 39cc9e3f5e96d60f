"""What every runtime offers: memory of the NPU, compiled models, and calls prepared once.

A tensor of a call is a *place*, an offset in a memory, so that what one call writes the next one
reads where it lies. The host looks at memory only with `Memory.read` and `Memory.write`.

All that runtimes have in common is here; the file of one says which functions of its library do it.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.libraries import check_status
from edgevl.checkpoint.writer import to_bfloat16
from edgevl.errors import BoardError

#: NumPy's types of the formats in which the NPU stores numbers, by their names in safetensors.
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
#: Places of tensors begin at multiples of this many bytes.
ALIGNMENT = 128
#: Largest allocation and largest tensor, in bytes: sizes are 32-bit numbers in the C API, also of
#: allocations rounded up to whole cache lines.
MAX_BYTES = (1 << 32) - ALIGNMENT
#: Most shape groups of a model, tensors of a group, and dimensions of a tensor.
MAX_GROUPS, MAX_TENSORS, MAX_DIMENSIONS = 1024, 1024, 16


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


@dataclass(frozen=True)
class TensorInfo:
    """What a model says of one of its tensors.

    Attributes:
        name: its name.
        dtype: one of `STORED`.
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


class Lent(ABC):
    """Memory or a model, which a runtime's library lends.

    It is noted before the library is asked for it: afterwards would be too late, since a signal may
    come before the next line. So a subclass has all that `close` looks at before it calls
    ``__init__``.
    """

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        runtime.held.add(self)

    def close(self) -> None:
        """Give it back; further calls do nothing."""
        with self.runtime.lock:  # lest another thread give back the same
            self._give_back()
            self.runtime.held.discard(self)

    @abstractmethod
    def _give_back(self) -> None:
        """Give back what has been taken and not yet been given back, each with `give_back`."""


def give_back(cell: Any, empty: Any, function: Callable[..., object], *arguments: Any) -> None:
    """Call what gives back the thing that a C variable names, unless the variable is ``empty``.

    A signal may raise an exception right after the call, and then something else closes the thing
    once more. So it is marked as given back in a ``finally``, in which no call comes before the
    mark.
    """
    if cell[0] != empty:
        try:
            function(*arguments)
        finally:
            cell[0] = empty


class Memory(Lent):
    """Memory of the NPU.

    Attributes:
        size: bytes.
    """

    def __init__(self, runtime: Runtime, size: int) -> None:
        self.size = size
        super().__init__(runtime)

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy a C-contiguous array to ``offset``, and make just these bytes visible to the NPU."""
        self._write(offset, values.reshape(-1).view(np.uint8))

    @abstractmethod
    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return what the NPU wrote; a view that the next call or `write` may overwrite."""

    @abstractmethod
    def _write(self, offset: int, values: NDArray[np.uint8]) -> None: ...

    def _check_taken(self, status: int, what: str) -> None:
        """Raise if the library has not lent it, after `close`."""
        if status:
            self.close()
            raise BoardError(
                f"no {self.size} bytes of {what} left, status 0x{status & 0xFFFFFFFF:08X}: end "
                "other programs that use it, or compile with a shorter --context"
            )


#: Where a tensor lies: offset in a memory, in bytes.
Place = tuple[Memory, int]
#: What libraries say of a tensor: name, number or name of its type, sizes, and bytes or None.
Description = tuple[str, Any, Sequence[int], int | None]
Side = Literal["Input", "Output"]


class NpuModel(Lent):
    """A compiled model, loaded.

    Attributes:
        path: its file.
        groups: the shapes that it can be run with.
        CALL: makes calls of it.
        DATA_TYPES: the types of `STORED` by what the library calls them.
    """

    groups: tuple[Group, ...]
    CALL: ClassVar[type[Call]]
    DATA_TYPES: ClassVar[Mapping[Any, str]]

    def __init__(self, runtime: Runtime, path: Path) -> None:
        self.path = path
        super().__init__(runtime)
        try:
            count = self._open()
            if not 1 <= count <= MAX_GROUPS:
                raise BoardError(f"{path}: {count} shape groups: the file is damaged")
            described = map(self._describe, range(count))
            self.groups = tuple(Group(*map(self._tensors, sides)) for sides in described)
        except BaseException:
            self.close()
            raise

    def bind(self, group: int, inputs: Sequence[Place], outputs: Sequence[Place]) -> Call:
        """Prepare a call; places are in the order of the group's tensors.

        Raises:
            ValueError: there are more or fewer places than tensors, or one is not aligned or does
                not hold its tensor.
        """
        return self.CALL(self, group, inputs, outputs)

    def _tensors(self, described: Iterator[Description]) -> tuple[TensorInfo, ...]:
        """Return what the library says of tensors, if it makes sense."""
        tensors = []
        for name, kind, shape, nbytes in islice(described, MAX_TENSORS + 1):
            dtype, where = self.DATA_TYPES.get(kind), f"{self.path}: tensor {name!r}"
            if dtype is None:
                raise BoardError(
                    f"{where} has a number format that is not supported; supported: "
                    f"{', '.join(STORED)}"
                )
            tensor = TensorInfo(name, dtype, tuple(shape))
            if min(tensor.shape, default=1) < 1 or tensor.nbytes > MAX_BYTES:
                raise BoardError(f"{where} has shape {list(shape)}: the file is damaged")
            if nbytes not in (None, tensor.nbytes):
                raise BoardError(
                    f"{where} takes {nbytes} bytes, expected {tensor.nbytes} for {dtype} "
                    f"{list(shape)}: padded tensors are not supported"
                )
            tensors.append(tensor)
        if len(tensors) > MAX_TENSORS:
            raise BoardError(f"{self.path}: more than {MAX_TENSORS} tensors: the file is damaged")
        return tuple(tensors)

    @abstractmethod
    def _open(self) -> int:
        """Have the library load the file: -> how many shape groups it says that there are."""

    @abstractmethod
    def _describe(self, group: int) -> tuple[Iterator[Description], Iterator[Description]]:
        """Ask the library for the inputs of a group, and for its outputs."""


class Call(ABC):
    """One group of a model with the places of its tensors, ready to run."""

    def __init__(
        self, model: NpuModel, group: int, inputs: Sequence[Place], outputs: Sequence[Place]
    ) -> None:
        self._model = model
        self._group = group
        # Memory and size of each tensor: memories are kept while they are used.
        self._tensors: dict[Side, list[tuple[Memory, int]]] = {"Input": [], "Output": []}
        shapes = model.groups[group]
        sides: tuple[Side, Side] = ("Input", "Output")
        for side, tensors, places in zip(
            sides, (shapes.inputs, shapes.outputs), (inputs, outputs), strict=True
        ):
            for index, (tensor, (memory, offset)) in enumerate(zip(tensors, places, strict=True)):
                if offset % ALIGNMENT or not 0 <= offset <= memory.size - tensor.nbytes:
                    raise ValueError(
                        f"{model.path.name}: {tensor.name} of {tensor.nbytes} bytes at {offset} of "
                        f"{memory.size}"
                    )
                self._tensors[side].append((memory, tensor.nbytes))
                self.move(side, index, offset)

    def run(self) -> None:
        """Compute, and wait for the end.

        Raises:
            BoardError: the NPU reports an error.
        """
        status = self._run()
        if status:
            check_status(status, f"{self._model.path}: running group {self._group}")

    def move(self, side: Side, index: int, offset: int) -> None:
        """Move a tensor to another offset of the same memory; the caller keeps it inside."""
        self._place(side, index, *self._tensors[side][index], offset)

    @abstractmethod
    def _run(self) -> int:
        """Compute: -> the library's status."""

    @abstractmethod
    def _place(self, side: Side, index: int, memory: Any, nbytes: int, offset: int) -> None:
        """Tell the library where a tensor lies."""


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
    """A library that drives NPUs, initialised. One call at a time, from any thread.

    Attributes:
        LIBRARIES: the C libraries that it needs, without ``lib`` and ``.so``.
        MEMORY, MODEL: what its memory and its models are.
        held: what they lend.
        lock: of what one thread does at a time.
    """

    LIBRARIES: ClassVar[tuple[str, ...]] = ()
    MEMORY: ClassVar[type[Memory]]
    MODEL: ClassVar[type[NpuModel]]

    def __init__(self) -> None:
        self.held: set[Lent] = set()
        self.lock = threading.RLock()
        self._closed = False

    def info(self) -> NpuInfo:
        """Ask the library what it is and what it drives."""
        return NpuInfo()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Have `close` wait for the end of the block, which another thread may be in.

        Raises:
            BoardError: it is closed.
        """
        with self.lock:
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
        with self.lock:
            for each in list(self.held):
                each.close()
            self._shut_down()

    def _allocate(self, nbytes: int) -> Memory:
        return self.MEMORY(self, nbytes)

    def _load(self, path: Path) -> NpuModel:
        return self.MODEL(self, path)

    @abstractmethod
    def _shut_down(self) -> None: ...
