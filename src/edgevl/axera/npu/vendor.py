"""The vendor's Python package ``axengine`` as a runtime.

It copies every input and output of every call, key/value caches included: correct, but slower than
the C libraries called directly, and only used where these are not found.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import (
    Call,
    Group,
    Memory,
    NpuInfo,
    NpuModel,
    Place,
    Runtime,
    TensorInfo,
    checked_tensor,
)
from edgevl.axera.npu.libraries import library_path
from edgevl.errors import BoardError

#: NumPy's names of the formats, bfloat16 by ml_dtypes.
DATA_TYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "int32": "I32",
    "uint32": "U32",
    "uint8": "U8",
    "int8": "I8",
    "uint16": "U16",
    "int16": "I16",
}


class VendorRuntime(Runtime):
    """Whatever NPU ``axengine`` finds."""

    def __init__(self) -> None:
        """Import the package, which starts the NPU, and stops it when the process ends.

        Raises:
            BoardError: it is not installed or finds no NPU.
        """
        super().__init__()
        try:
            with redirect_stdout(sys.stderr):  # it prints what it finds
                import axengine
        # It fails in its own ways where there is no NPU: ImportError, RuntimeError, OSError, …
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and error.name == "axengine":
                raise BoardError("the Python package axengine is not installed") from None
            raise BoardError(
                f"the Python package axengine is there, but cannot start: {error}"
            ) from None
        self.session = axengine.InferenceSession

    def info(self) -> NpuInfo:
        """Ask the libraries that the package has loaded whether they are the emulator's."""
        paths = filter(None, map(library_path, ("ax_sys", "axcl_rt")))
        emulated = any(hasattr(ctypes.CDLL(path), "EDGEVL_EMULATOR_Memory") for path in paths)
        return NpuInfo(emulated=emulated)

    def _allocate(self, nbytes: int) -> Memory:
        return HostMemory(nbytes)

    def _load(self, path: Path) -> NpuModel:
        return VendorModel(self, path)

    def _shut_down(self) -> None:
        """Leave that to the package."""


class HostMemory(Memory):
    """Memory of the host, which the package copies from and to."""

    def __init__(self, size: int) -> None:
        """Allocate ``size`` bytes."""
        self.size = size
        self.bytes: NDArray[np.uint8] = np.zeros(size, np.uint8)

    def write(self, offset: int, values: NDArray[Any]) -> None:
        """Copy an array to ``offset``."""
        flat = values.reshape(-1).view(np.uint8)
        self.bytes[offset : offset + flat.size] = flat

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return the bytes, a view."""
        return self.bytes[offset : offset + nbytes]

    def close(self) -> None:
        """Let the memory go."""
        self.bytes = np.empty(0, np.uint8)


class VendorModel(NpuModel):
    """A session of the package."""

    def __init__(self, runtime: VendorRuntime, path: Path) -> None:
        """Load a file."""
        self.path = path
        self._runtime = runtime
        runtime.hold(self)
        try:
            with redirect_stdout(sys.stderr):
                self.session: Any = runtime.session(str(path))
        except Exception as error:  # as it comes: RuntimeError, ValueError, OSError
            self.close()
            raise BoardError(f"{path}: axengine cannot load it ({error})") from None
        # The package has no way to ask for the number of groups but this error.
        groups: list[Group] = []
        while True:
            try:
                inputs = self.session.get_inputs(len(groups))
                outputs = self.session.get_outputs(len(groups))
            except (IndexError, ValueError):
                break
            groups.append(Group(self._tensors(inputs), self._tensors(outputs)))
        self.groups = tuple(groups)

    def bind(self, group: int, inputs: Sequence[Place], outputs: Sequence[Place]) -> Call:
        """Prepare a call."""
        self.check(group, inputs, outputs)
        return VendorCall(self, group, inputs, outputs)

    def close(self) -> None:
        """Let the session go."""
        with self._runtime.giving_back(self):
            self.session = None

    def _tensors(self, nodes: Sequence[Any]) -> tuple[TensorInfo, ...]:
        return tuple(
            checked_tensor(
                self.path, node.name, DATA_TYPES.get(np.dtype(node.dtype).name), node.shape
            )
            for node in nodes
        )


class VendorCall(Call):
    """Arrays for a session."""

    def __init__(
        self, model: VendorModel, group: int, inputs: Sequence[Place], outputs: Sequence[Place]
    ) -> None:
        """Remember the places."""
        self._model = model
        self._group = group
        self._dtypes = [np.dtype(node.dtype) for node in model.session.get_inputs(group)]
        self._inputs = list(inputs)
        self._outputs = list(outputs)

    def run(self) -> None:
        """Copy in, compute, copy out."""
        shapes = self._model.groups[self._group]
        feed = {}
        for tensor, (memory, offset), dtype in zip(
            shapes.inputs, self._inputs, self._dtypes, strict=True
        ):
            stored = memory.read(offset, tensor.nbytes)
            feed[tensor.name] = stored.view(dtype).reshape(tensor.shape)
        try:
            results = self._model.session.run(None, feed, shape_group=self._group)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise BoardError(
                f"{self._model.path}: axengine cannot run group {self._group} ({error})"
            ) from None
        for (memory, offset), result in zip(self._outputs, results, strict=True):
            memory.write(offset, np.ascontiguousarray(result))

    def move_input(self, index: int, offset: int) -> None:
        """Move an input."""
        self._inputs[index] = (self._inputs[index][0], offset)

    def move_output(self, index: int, offset: int) -> None:
        """Move an output."""
        self._outputs[index] = (self._outputs[index][0], offset)
