"""The emulator's libraries through ctypes, as a program on a board would use the runtime's."""

import ctypes as c
from pathlib import Path

import numpy as np

from edgevl.axera.npu.libraries import emulator_directory

DTYPES = {1: np.uint8, 3: np.float32, 6: np.int32, 7: np.uint32, 9: np.uint16}


class Meta(c.Structure):
    _fields_ = [
        ("name", c.c_char_p),
        ("shape", c.POINTER(c.c_int32)),
        ("rank", c.c_uint8),
        ("layout", c.c_int32),
        ("memory", c.c_int32),
        ("dtype", c.c_int32),
        ("extra", c.c_void_p),
        ("size", c.c_uint32),
        ("quantization", c.c_uint32),
        ("stride", c.c_void_p),
        ("reserved", c.c_uint64 * 9),
    ]


class Info(c.Structure):
    _fields_ = [
        ("inputs", c.POINTER(Meta)),
        ("n_inputs", c.c_uint32),
        ("outputs", c.POINTER(Meta)),
        ("n_outputs", c.c_uint32),
        ("max_batch", c.c_uint32),
        ("dynamic", c.c_int32),
        ("reserved", c.c_uint64 * 11),
    ]


class Buffer(c.Structure):
    _fields_ = [
        ("address", c.c_uint64),
        ("cpu", c.c_void_p),
        ("size", c.c_uint32),
        ("stride", c.c_void_p),
        ("rank", c.c_uint8),
        ("reserved", c.c_uint64 * 11),
    ]


class Table(c.Structure):
    _fields_ = [
        ("inputs", c.POINTER(Buffer)),
        ("n_inputs", c.c_uint32),
        ("outputs", c.POINTER(Buffer)),
        ("n_outputs", c.c_uint32),
        ("batch", c.c_uint32),
        ("setting", c.c_void_p),
        ("reserved", c.c_uint64 * 11),
    ]


class Counters(c.Structure):
    _fields_ = [
        (name, c.c_uint64)
        for name in (
            "runs flushes invalidates memcpys allocations flushed_bytes invalidated_bytes "
            "memcpy_bytes problems emulator_ns npu_ns cmm_bytes cmm_peak_bytes weight_bytes "
            "blocks models"
        ).split()
    ]


class Board:
    """The runtime, initialized with what the environment says now."""

    def __init__(self):
        directory = emulator_directory()
        self.sys = c.CDLL(str(directory / "libax_sys.so"))
        self.engine = c.CDLL(str(directory / "libax_engine.so"))
        self.engine.AX_ENGINE_GetVersion.restype = c.c_char_p
        self.check(self.sys.AX_SYS_Init())
        self.check(self.engine.AX_ENGINE_Init(c.byref((c.c_int32 * 9)())))

    @staticmethod
    def check(status):
        assert status == 0, f"status {status & 0xFFFFFFFF:#x}"

    def counters(self):
        counters = Counters()
        self.engine.EDGEVL_EMULATOR_Counters(c.byref(counters))  # found in libax_sys.so
        return {name: getattr(counters, name) for name, _ in Counters._fields_}

    def reset_counters(self):
        self.engine.EDGEVL_EMULATOR_ResetCounters()


class Memory:
    """An allocation, and an array over what the processor sees of it."""

    def __init__(self, board, shape, dtype):
        self.board = board
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address, cpu = c.c_uint64(), c.c_void_p()
        board.check(
            board.sys.AX_SYS_MemAllocCached(
                c.byref(address), c.byref(cpu), c.c_uint32(size), c.c_uint32(128), b"test"
            )
        )
        self.address, self.cpu, self.size = address.value, cpu.value, size
        raw = (c.c_uint8 * size).from_address(cpu.value)
        self.array = np.frombuffer(raw, dtype).reshape(shape)

    def __call__(self, size, offset=0):
        """Return a buffer of ``size`` bytes in it."""
        return Buffer(self.address + offset, self.cpu + offset, size)

    def flush(self):
        self.board.check(self._call(self.board.sys.AX_SYS_MflushCache))

    def invalidate(self):
        self.board.check(self._call(self.board.sys.AX_SYS_MinvalidateCache))
        return self.array

    def _call(self, function):
        return function(c.c_uint64(self.address), c.c_void_p(self.cpu), c.c_uint32(self.size))

    def free(self):
        self.board.check(
            self.board.sys.AX_SYS_MemFree(c.c_uint64(self.address), c.c_void_p(self.cpu))
        )


class BoardModel:
    """A model file, loaded; ``groups`` are (inputs, outputs) of (name, dtype, shape)."""

    def __init__(self, board, path):
        self.board, engine = board, board.engine
        self.handle, self.context = c.c_void_p(), c.c_void_p()
        data = path.read_bytes()  # which the runtime copies
        board.check(
            engine.AX_ENGINE_CreateHandleV2(c.byref(self.handle), data, c.c_uint32(len(data)), None)
        )
        board.check(engine.AX_ENGINE_CreateContextV2(self.handle, c.byref(self.context)))
        count = c.c_uint32()
        board.check(engine.AX_ENGINE_GetGroupIOInfoCount(self.handle, c.byref(count)))
        self.groups = [self._group(index) for index in range(count.value)]

    def _group(self, index):
        info = c.POINTER(Info)()
        self.board.check(
            self.board.engine.AX_ENGINE_GetGroupIOInfo(
                self.handle, c.c_uint32(index), c.byref(info)
            )
        )

        def describe(metas, count):
            return [
                (
                    meta.name.decode(),
                    DTYPES[meta.dtype],
                    tuple(meta.shape[i] for i in range(meta.rank)),
                )
                for meta in metas[:count]
            ]

        found = info.contents
        return describe(found.inputs, found.n_inputs), describe(found.outputs, found.n_outputs)

    def status(self, group, inputs, outputs):
        table = Table(
            (Buffer * len(inputs))(*inputs),
            len(inputs),
            (Buffer * len(outputs))(*outputs),
            len(outputs),
            1,
        )
        return self.board.engine.AX_ENGINE_RunGroupIOSync(
            self.handle, self.context, c.c_uint32(group), c.byref(table)
        )

    def run(self, group, inputs, outputs):
        self.board.check(self.status(group, inputs, outputs))

    def run_arrays(self, group, arrays):
        """Run on arrays, copied in and out: -> output arrays."""
        inputs, outputs = self.groups[group]
        memory = [Memory(self.board, shape, dtype) for _, dtype, shape in inputs + outputs]
        for place, array in zip(memory, arrays, strict=False):
            place.array[...] = array
            place.flush()
        buffers = [place(place.size) for place in memory]
        self.run(group, buffers[: len(inputs)], buffers[len(inputs) :])
        results = [place.invalidate().copy() for place in memory[len(inputs) :]]
        for place in memory:
            place.array = None
            place.free()
        return results

    def close(self):
        self.board.check(self.board.engine.AX_ENGINE_DestroyHandle(self.handle))


class Argument:
    """What the vendor's binding says of a tensor; bfloat16 is that of ml_dtypes."""

    def __init__(self, name, dtype, shape):
        import ml_dtypes

        self.name, self.shape = name, list(shape)
        self.dtype = np.dtype(ml_dtypes.bfloat16 if dtype is np.uint16 else dtype)


class Session:
    """`axengine.InferenceSession` as programs use it, which takes arrays of exact shapes only."""

    def __init__(self, path):
        self.model = BoardModel(Board(), Path(path))
        self.groups = [
            tuple([Argument(*tensor) for tensor in tensors] for tensors in group)
            for group in self.model.groups
        ]

    def get_inputs(self, shape_group=0):
        return self.groups[shape_group][0]

    def run(self, output_names, input_feed, shape_group=0):
        inputs, outputs = self.groups[shape_group]
        assert set(input_feed) == {argument.name for argument in inputs}
        arrays = []
        for argument in inputs:
            array = input_feed[argument.name]
            found = (list(array.shape), array.dtype)
            assert found == (argument.shape, argument.dtype), (argument.name, found)
            arrays.append(array if array.dtype.kind in "iu" else array.view(np.uint16))
        results = self.model.run_arrays(shape_group, arrays)
        return [
            result.view(argument.dtype) for result, argument in zip(results, outputs, strict=True)
        ]
