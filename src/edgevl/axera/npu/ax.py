"""The runtime on a board: ``libax_sys`` for memory, ``libax_engine`` for models.

Memory is cached by the CPU: what the host wrote is flushed before the NPU reads it, and what the
NPU wrote is invalidated before the host reads it, in whole cache lines.
"""

from __future__ import annotations

import mmap
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import (
    ALIGNMENT,
    MAX_BYTES,
    MAX_DIMENSIONS,
    Call,
    Description,
    Memory,
    NpuInfo,
    NpuModel,
    Place,
    Runtime,
    Side,
    give_back,
)
from edgevl.axera.npu.libraries import (
    check_status,
    foreign_functions,
    library_path,
    open_library,
)
from edgevl.errors import BoardError
from edgevl.files import system_text

#: Bytes of the CPU's cache line.
CACHE_LINE = 64
#: Where the board's drivers describe the chip and its memory.
PROC = Path("/proc/ax_proc")

_DECLARATIONS = """
int AX_SYS_Init(void);
int AX_SYS_Deinit(void);
int AX_SYS_MemAllocCached(unsigned long long *physical, void **address, unsigned int size,
                          unsigned int alignment, const signed char *token);
int AX_SYS_MemFree(unsigned long long physical, void *address);
int AX_SYS_MflushCache(unsigned long long physical, void *address, unsigned int size);
int AX_SYS_MinvalidateCache(unsigned long long physical, void *address, unsigned int size);

typedef struct { int mode; unsigned int reserved[8]; } NpuAttributes;
typedef struct { unsigned int npu_set; signed char *name; unsigned int reserved[8]; } HandleExtra;
typedef struct {
    char *name;
    int *shape;
    unsigned char dimensions;
    int layout;
    int memory_type;
    int data_type;
    void *extra;
    unsigned int size;
    unsigned int quantization;
    int *strides;
    unsigned long long reserved[9];
} TensorMeta;
typedef struct {
    TensorMeta *inputs;
    unsigned int input_count;
    TensorMeta *outputs;
    unsigned int output_count;
    unsigned int max_batch;
    int dynamic_batch;
    unsigned long long reserved[11];
} TensorTable;
typedef struct {
    unsigned long long physical;
    void *address;
    unsigned int size;
    int *strides;
    unsigned char stride_count;
    unsigned long long reserved[11];
} Buffer;
typedef struct {
    Buffer *inputs;
    unsigned int input_count;
    Buffer *outputs;
    unsigned int output_count;
    unsigned int batch;
    void *setting;
    unsigned long long reserved[11];
} BufferTable;

const char *AX_ENGINE_GetVersion(void);
int AX_ENGINE_Init(NpuAttributes *attributes);
int AX_ENGINE_GetVNPUAttr(NpuAttributes *attributes);
int AX_ENGINE_Deinit(void);
int AX_ENGINE_CreateHandleV2(void **handle, const void *data, unsigned int size,
                             HandleExtra *extra);
int AX_ENGINE_DestroyHandle(void *handle);
int AX_ENGINE_CreateContextV2(void *handle, void **context);
int AX_ENGINE_GetIOInfo(void *handle, TensorTable **table);
int AX_ENGINE_GetGroupIOInfoCount(void *handle, unsigned int *count);
int AX_ENGINE_GetGroupIOInfo(void *handle, unsigned int group, TensorTable **table);
int AX_ENGINE_RunSyncV2(void *handle, void *context, BufferTable *buffers);
int AX_ENGINE_RunGroupIOSync(void *handle, void *context, unsigned int group, BufferTable *buffers);
void EDGEVL_EMULATOR_Memory(unsigned long long *free, unsigned long long *total);
"""


_NO_NPU = (
    ": no NPU answers; does this user have access to it (root has), and are the board's drivers "
    "loaded (ls /dev/ax*, dmesg)?"
)


def read_cmm(path: Path) -> tuple[int | None, int | None]:
    """Read what the board's drivers say of the NPU's memory: all of it and what is left, in bytes.

    The line looks like ``total size=4194304KB(4096MB),used=283228KB(276MB + 604KB),remain=…KB(…)``
    (from programs that read it; there is no documentation). None is what it does not say.
    """
    text = system_text(path)

    def kilobytes(name: str) -> int | None:
        found = re.findall(rf"\b{name}\s*[=:]\s*(\d+)\s*KB", text, re.IGNORECASE)
        return 1024 * int(found[-1]) if found else None  # the sums come last

    total, used, left = map(kilobytes, ("total size", "used", "remain"))
    if left is None and total is not None and used is not None:
        left = total - used
    return total, left


class AxMemory(Memory):
    """Physically contiguous memory (CMM), cached by the CPU."""

    def __init__(self, runtime: AxRuntime, size: int) -> None:
        functions = runtime.functions
        self._system = runtime.system
        self._physical = functions.new("unsigned long long *")
        self._address = functions.new("void **")
        super().__init__(runtime, size)
        # To whole lines, so that no line is shared with what is not ours.
        reserved = -(-size // CACHE_LINE) * CACHE_LINE
        status = self._system.AX_SYS_MemAllocCached(
            self._physical, self._address, reserved, ALIGNMENT, runtime.token
        )
        self._check_taken(status, "NPU memory (CMM)")
        self.physical: int = self._physical[0]
        self.address = functions.cast("char *", self._address[0])
        self._bytes = np.frombuffer(functions.buffer(self.address, reserved), np.uint8)

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Invalidate the cache lines and return the bytes, a view."""
        status = self._system.AX_SYS_MinvalidateCache(*self._lines(offset, nbytes))
        check_status(status, "AX_SYS_MinvalidateCache")
        return self._bytes[offset : offset + nbytes]

    def _write(self, offset: int, values: NDArray[np.uint8]) -> None:
        self._bytes[offset : offset + values.size] = values
        status = self._system.AX_SYS_MflushCache(*self._lines(offset, values.size))
        check_status(status, "AX_SYS_MflushCache")

    def _lines(self, offset: int, nbytes: int) -> tuple[int, Any, int]:
        """Return both addresses and the size of the cache lines that a range of bytes touches."""
        begin = offset // CACHE_LINE * CACHE_LINE
        size = -(-(offset + nbytes) // CACHE_LINE) * CACHE_LINE - begin
        return self.physical + begin, self.address + begin, size

    def _give_back(self) -> None:
        self._bytes = np.empty(0, np.uint8)
        free = self._system.AX_SYS_MemFree
        give_back(self._physical, 0, free, self._physical[0], self._address[0])


class AxCall(Call):
    """A table of physical addresses."""

    _model: AxModel

    def __init__(
        self, model: AxModel, group: int, inputs: Sequence[Place], outputs: Sequence[Place]
    ) -> None:
        new = model.functions.new
        self._buffers = {
            "Input": new("Buffer[]", len(inputs)),
            "Output": new("Buffer[]", len(outputs)),
        }
        self._table = new(
            "BufferTable *",
            {
                "inputs": self._buffers["Input"],
                "input_count": len(inputs),
                "outputs": self._buffers["Output"],
                "output_count": len(outputs),
            },
        )
        super().__init__(model, group, inputs, outputs)

    def _run(self) -> int:
        model, engine = self._model, self._model.engine
        if model.grouped:
            status = engine.AX_ENGINE_RunGroupIOSync(
                model.handle, model.context, self._group, self._table
            )
        else:
            status = engine.AX_ENGINE_RunSyncV2(model.handle, model.context, self._table)
        return int(status)

    def _place(self, side: Side, index: int, memory: Any, nbytes: int, offset: int) -> None:
        buffer = self._buffers[side][index]
        buffer.physical = memory.physical + offset
        buffer.address = memory.address + offset
        buffer.size = nbytes


class AxModel(NpuModel):
    """A model in the NPU's memory."""

    CALL = AxCall
    # AX_ENGINE_DATA_TYPE_T.
    DATA_TYPES: ClassVar = {
        1: "U8", 2: "U16", 3: "F32", 4: "I16", 5: "I8", 6: "I32", 7: "U32", 9: "BF16",
    }  # fmt: skip

    def __init__(self, runtime: AxRuntime, path: Path) -> None:
        self.functions = runtime.functions
        self.engine = runtime.engine
        self._handle, self._context = (self.functions.new("void **") for _ in range(2))
        super().__init__(runtime, path)

    def _open(self) -> int:
        path, new = self.path, self.functions.new
        try:
            with path.open("rb") as file:
                # Kept: the library's documentation does not say that it copies everything.
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise BoardError(f"{path}: cannot be read ({error})") from None
        if len(self._data) > MAX_BYTES:
            raise BoardError(
                f"{path}: {len(self._data)} bytes; the NPU's library takes {MAX_BYTES} at most: "
                "copy it again, or compile a smaller model"
            )
        self._name = new("signed char[]", path.stem.encode()[:255] + b"\0")
        extra = new("HandleExtra *", {"name": self._name})
        data = self.functions.from_buffer(self._data)
        check_status(
            self.engine.AX_ENGINE_CreateHandleV2(self._handle, data, len(self._data), extra),
            f"{path}: loading",
            ": it was compiled for another chip or NPU mode, is damaged, or NPU memory is full",
        )
        self.handle = self._handle[0]
        status = self.engine.AX_ENGINE_CreateContextV2(self.handle, self._context)
        check_status(status, f"{path}: AX_ENGINE_CreateContextV2")
        self.context = self._context[0]
        count = new("unsigned int *")
        # A library from before there were groups has no such function.
        ask = getattr(self.engine, "AX_ENGINE_GetGroupIOInfoCount", None)
        groups = 1 if ask is None or ask(self.handle, count) else int(count[0])
        self.grouped = groups > 1
        return groups

    def _describe(self, group: int) -> tuple[Iterator[Description], Iterator[Description]]:
        found = self.functions.new("TensorTable **")
        if self.grouped:
            status = self.engine.AX_ENGINE_GetGroupIOInfo(self.handle, group, found)
        else:
            status = self.engine.AX_ENGINE_GetIOInfo(self.handle, found)
        check_status(status, f"{self.path}: reading the shapes of group {group}")
        table = found[0]
        return (
            self._descriptions(table.inputs, table.input_count),
            self._descriptions(table.outputs, table.output_count),
        )

    def _descriptions(self, metas: Any, count: int) -> Iterator[Description]:
        for meta in (metas[index] for index in range(count)):
            name = self.functions.string(meta.name, 4096).decode(errors="replace")
            shape = [meta.shape[i] for i in range(min(meta.dimensions, MAX_DIMENSIONS))]
            yield name, meta.data_type, shape, meta.size

    def _give_back(self) -> None:
        destroy = self.engine.AX_ENGINE_DestroyHandle
        give_back(self._handle, self.functions.NULL, destroy, self._handle[0])


class AxRuntime(Runtime):
    """The NPU that this computer is built around."""

    LIBRARIES = ("ax_sys", "ax_engine")
    MEMORY, MODEL = AxMemory, AxModel

    def __init__(self, directory: Path | None = None) -> None:
        """Open and initialise the libraries.

        Args:
            directory: where they are; by default see `library_path`.

        Raises:
            BoardError: they are missing or refuse to start.
        """
        super().__init__()
        if sys.maxsize < 1 << 32:
            raise BoardError(
                "the NPU's library is called from 64-bit programs only: use such a Python"
            )
        self.functions = foreign_functions(_DECLARATIONS)
        # The second depends on the first and finds it loaded.
        self.system = open_library(self.functions, "ax_sys", directory)
        self.engine = open_library(self.functions, "ax_engine", directory)
        self.token = self.functions.new("signed char[]", b"edgevl\0")
        fix = _NO_NPU if directory is None else ""
        there = f"{library_path('ax_sys', directory)} is there, but"
        check_status(self.system.AX_SYS_Init(), f"{there} AX_SYS_Init", fix)
        attributes = self.functions.new("NpuAttributes *")
        # Where another program has set the NPU's mode it is kept; the default is all cores as one.
        if self.engine.AX_ENGINE_GetVNPUAttr(attributes):
            attributes.mode = 0
        status = self.engine.AX_ENGINE_Init(attributes)
        if status:
            self.system.AX_SYS_Deinit()
        check_status(status, f"{there} AX_ENGINE_Init", fix)

    def info(self) -> NpuInfo:
        """Ask the library for its version, and the board's drivers for chip and memory."""
        functions = self.functions
        found = getattr(self.engine, "AX_ENGINE_GetVersion", None)
        version = functions.string(found(), 256).decode(errors="replace") if found else None
        if emulator := getattr(self.system, "EDGEVL_EMULATOR_Memory", None):
            free, total = (functions.new("unsigned long long *") for _ in range(2))
            emulator(free, total)
            return NpuInfo(version, None, total[0], free[0], emulated=True)
        about = [
            " ".join(system_text(PROC / name).strip("\0 \n").split())
            for name in ("chip_type", "board_id", "version")
        ]
        memory, left = read_cmm(PROC / "mem_cmm_info")
        return NpuInfo(version, ", ".join(filter(None, about)) or None, memory, left)

    def _shut_down(self) -> None:
        self.engine.AX_ENGINE_Deinit()
        self.system.AX_SYS_Deinit()
