"""The runtime of an M.2 card: ``libaxcl_rt``, with memory behind the bus, reached by copies."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import (
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

_DECLARATIONS = """
typedef struct { uint32_t count; int32_t ids[256]; } Devices;
typedef struct { int32_t count; int32_t sizes[32]; } Dimensions;

int32_t axclInit(const char *config);
int32_t axclFinalize();
int32_t axclrtGetVersion(int32_t *major, int32_t *minor, int32_t *patch);
const char *axclrtGetSocName();
int32_t axclrtGetMemInfo(int attribute, size_t *free, size_t *total);
int32_t axclrtGetDeviceList(Devices *devices);
int32_t axclrtSetDevice(int32_t device);
int32_t axclrtResetDevice(int32_t device);
int32_t axclrtGetCurrentContext(void **context);
int32_t axclrtSetCurrentContext(void *context);
int32_t axclrtMalloc(void **memory, size_t size, int policy);
int32_t axclrtFree(void *memory);
int32_t axclrtMemcpy(void *to, const void *from, size_t count, int kind);

int32_t axclrtEngineInit(int mode);
int32_t axclrtEngineGetVNpuKind(int *mode);
int32_t axclrtEngineFinalize();
int32_t axclrtEngineLoadFromFile(const char *path, uint64_t *model);
int32_t axclrtEngineUnload(uint64_t model);
int32_t axclrtEngineCreateContext(uint64_t model, uint64_t *context);
int32_t axclrtEngineGetIOInfo(uint64_t model, void **info);
int32_t axclrtEngineGetShapeGroupsCount(void *info, int32_t *count);
uint32_t axclrtEngineGetNumInputs(void *info);
uint32_t axclrtEngineGetNumOutputs(void *info);
const char *axclrtEngineGetInputNameByIndex(void *info, uint32_t index);
const char *axclrtEngineGetOutputNameByIndex(void *info, uint32_t index);
int32_t axclrtEngineGetInputDims(void *info, uint32_t group, uint32_t index, Dimensions *sizes);
int32_t axclrtEngineGetOutputDims(void *info, uint32_t group, uint32_t index, Dimensions *sizes);
int32_t axclrtEngineGetInputDataType(void *info, uint32_t index, int *type);
int32_t axclrtEngineGetOutputDataType(void *info, uint32_t index, int *type);
int32_t axclrtEngineCreateIO(void *info, void **buffers);
int32_t axclrtEngineDestroyIO(void *buffers);
int32_t axclrtEngineSetInputBufferByIndex(void *buffers, uint32_t index, const void *at,
                                          uint64_t size);
int32_t axclrtEngineSetOutputBufferByIndex(void *buffers, uint32_t index, const void *at,
                                           uint64_t size);
int32_t axclrtEngineExecute(uint64_t model, uint64_t context, uint32_t group, void *buffers);
void EDGEVL_EMULATOR_Memory(uint64_t *free, uint64_t *total);
"""

# axclrtMemMallocPolicy and axclrtMemcpyKind.
_NORMAL_PAGES = 2
_CMM = 0  # of axclrtMemAttr: the NPU's memory
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_NO_MODEL = (1 << 64) - 1  # 0 may be the first one's number


class AxclMemory(Memory):
    """Memory of the card."""

    runtime: AxclRuntime

    def __init__(self, runtime: AxclRuntime, size: int) -> None:
        self._memory = runtime.functions.new("void **")
        self._read = np.empty(0, np.uint8)
        super().__init__(runtime, size)
        status = runtime.enter().axclrtMalloc(self._memory, size, _NORMAL_PAGES)
        self._check_taken(status, "the card's memory")
        self.address = runtime.functions.cast("char *", self._memory[0])

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Copy bytes from the card."""
        if self._read.size < nbytes:
            self._read = np.empty(nbytes, np.uint8)
        to = self.runtime.functions.from_buffer(self._read)
        library = self.runtime.enter()
        status = library.axclrtMemcpy(to, self.address + offset, nbytes, _DEVICE_TO_HOST)
        check_status(status, "axclrtMemcpy from the card")
        return self._read[:nbytes]

    def _write(self, offset: int, values: NDArray[np.uint8]) -> None:
        source = self.runtime.functions.from_buffer(values)
        library = self.runtime.enter()
        status = library.axclrtMemcpy(self.address + offset, source, values.size, _HOST_TO_DEVICE)
        check_status(status, "axclrtMemcpy to the card")

    def _give_back(self) -> None:
        if self._memory[0]:
            free, null = self.runtime.enter().axclrtFree, self.runtime.functions.NULL
            give_back(self._memory, null, free, self._memory[0])


class AxclCall(Call):
    """A table of addresses on the card."""

    _model: AxclModel

    def __init__(
        self, model: AxclModel, group: int, inputs: Sequence[Place], outputs: Sequence[Place]
    ) -> None:
        library = model.runtime.enter()
        buffers = model.runtime.functions.new("void **")
        model.calls.append(buffers)
        status = library.axclrtEngineCreateIO(model.info, buffers)
        check_status(status, f"{model.path}: axclrtEngineCreateIO")
        self._buffers = buffers[0]
        self._setters = {
            "Input": library.axclrtEngineSetInputBufferByIndex,
            "Output": library.axclrtEngineSetOutputBufferByIndex,
        }
        super().__init__(model, group, inputs, outputs)

    def _run(self) -> int:
        model = self._model
        library = model.runtime.enter()
        status = library.axclrtEngineExecute(model.model, model.context, self._group, self._buffers)
        return int(status)

    def _place(self, side: Side, index: int, memory: Any, nbytes: int, offset: int) -> None:
        status = self._setters[side](self._buffers, index, memory.address + offset, nbytes)
        check_status(status, f"axclrtEngineSet{side}BufferByIndex")


class AxclModel(NpuModel):
    """A model on the card."""

    runtime: AxclRuntime
    CALL = AxclCall
    # axclrtEngineDataType.
    DATA_TYPES: ClassVar = {
        3: "I8", 4: "U8", 5: "I16", 6: "U16", 7: "I32", 8: "U32", 14: "BF16", 15: "F32",
    }  # fmt: skip

    def __init__(self, runtime: AxclRuntime, path: Path) -> None:
        self._loaded = runtime.functions.new("uint64_t *", _NO_MODEL)
        self.calls: list[Any] = []
        super().__init__(runtime, path)

    def _open(self) -> int:
        path, library, new = self.path, self.runtime.enter(), self.runtime.functions.new
        context, info, count = new("uint64_t *"), new("void **"), new("int32_t *")
        check_status(
            library.axclrtEngineLoadFromFile(str(path).encode(), self._loaded),
            f"{path}: loading",
            ": it was compiled for another chip or NPU mode, is damaged, or the card's memory is "
            "full",
        )
        self.model: int = self._loaded[0]
        status = library.axclrtEngineCreateContext(self.model, context)
        check_status(status, f"{path}: axclrtEngineCreateContext")
        self.context: int = context[0]
        status = library.axclrtEngineGetIOInfo(self.model, info)
        check_status(status, f"{path}: axclrtEngineGetIOInfo")
        self.info = info[0]
        status = library.axclrtEngineGetShapeGroupsCount(self.info, count)
        check_status(status, f"{path}: axclrtEngineGetShapeGroupsCount")
        return int(count[0])

    def _describe(self, group: int) -> tuple[Iterator[Description], Iterator[Description]]:
        return self._descriptions("Input", group), self._descriptions("Output", group)

    def _descriptions(self, side: Side, group: int) -> Iterator[Description]:
        library, functions = self.runtime.enter(), self.runtime.functions
        for index in range(getattr(library, f"axclrtEngineGetNum{side}s")(self.info)):
            found = getattr(library, f"axclrtEngineGet{side}NameByIndex")(self.info, index)
            name = functions.string(found, 4096).decode(errors="replace")
            sizes, dtype = functions.new("Dimensions *"), functions.new("int *")
            status = getattr(library, f"axclrtEngineGet{side}Dims")(self.info, group, index, sizes)
            check_status(status, f"{self.path}: reading the shape of {name!r}")
            status = getattr(library, f"axclrtEngineGet{side}DataType")(self.info, index, dtype)
            check_status(status, f"{self.path}: reading the type of {name!r}")
            shape = [sizes.sizes[i] for i in range(min(max(sizes.count, 0), MAX_DIMENSIONS))]
            yield name, dtype[0], shape, None

    def _give_back(self) -> None:
        if self._loaded[0] != _NO_MODEL:
            library, null = self.runtime.enter(), self.runtime.functions.NULL
            for buffers in self.calls:
                give_back(buffers, null, library.axclrtEngineDestroyIO, buffers[0])
            give_back(self._loaded, _NO_MODEL, library.axclrtEngineUnload, self._loaded[0])


class AxclRuntime(Runtime):
    """The first M.2 card of this computer."""

    LIBRARIES = ("axcl_rt",)
    MEMORY, MODEL = AxclMemory, AxclModel

    def __init__(self, directory: Path | None = None) -> None:
        """Open and initialise the library and the card.

        Args:
            directory: where it is; by default see `library_path`.

        Raises:
            BoardError: it is missing or refuses to start, or there is no card.
        """
        super().__init__()
        self.functions = foreign_functions(_DECLARATIONS)
        self.library = open_library(self.functions, "axcl_rt", directory)
        check_status(
            self.library.axclInit(self.functions.NULL),
            f"{library_path('axcl_rt', directory)} is there, but axclInit",
            ": is there a card, and its driver loaded (lspci, ls /dev/axcl*, dmesg)?",
        )
        self._engine_started = False
        self._device: int | None = None
        try:
            self._start()
        except BaseException:
            self._shut_down()
            raise

    def _start(self) -> None:
        library, new = self.library, self.functions.new
        devices = new("Devices *")
        check_status(library.axclrtGetDeviceList(devices), "axclrtGetDeviceList")
        if not devices.count:
            raise BoardError("AXCL finds no M.2 card: is its driver loaded (lspci, dmesg)?")
        check_status(library.axclrtSetDevice(devices.ids[0]), "axclrtSetDevice")
        self._device = devices.ids[0]
        status = library.axclrtEngineInit(0)  # all cores as one
        # It refuses where another program has set the mode, which is then kept.
        if status and library.axclrtEngineGetVNpuKind(new("int *")):
            check_status(status, "axclrtEngineInit")
        self._engine_started = not status
        context = new("void **")
        check_status(library.axclrtGetCurrentContext(context), "axclrtGetCurrentContext")
        self._context = context[0]
        self._threads = threading.local()
        self._threads.entered = True

    def info(self) -> NpuInfo:
        """Ask the library for its version, and the card for its chip and memory."""
        library, new = self.enter(), self.functions.new
        version = chip = total = free = None
        numbers = [new("int32_t *") for _ in range(3)]
        ask = getattr(library, "axclrtGetVersion", None)
        if ask and not ask(*numbers):
            version = ".".join(str(number[0]) for number in numbers)
        if ask := getattr(library, "axclrtGetSocName", None):
            chip = self.functions.string(ask(), 256).decode(errors="replace")
        sizes = [new("size_t *") for _ in range(2)]
        ask = getattr(library, "axclrtGetMemInfo", None)
        if ask and not ask(_CMM, *sizes):
            free, total = (size[0] for size in sizes)
        emulated = getattr(library, "EDGEVL_EMULATOR_Memory", None) is not None
        return NpuInfo(version, chip, total, free, emulated)

    def enter(self) -> Any:
        """Make the card's context that of this thread, and return the library."""
        if not getattr(self._threads, "entered", False):
            status = self.library.axclrtSetCurrentContext(self._context)
            check_status(status, "axclrtSetCurrentContext")
            self._threads.entered = True
        return self.library

    def _shut_down(self) -> None:
        if self._engine_started:
            self.library.axclrtEngineFinalize()
        if self._device is not None:
            self.library.axclrtResetDevice(self._device)
        self.library.axclFinalize()
