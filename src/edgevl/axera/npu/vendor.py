"""The vendor's Python package ``axengine`` as a runtime.

It copies every input and output of every call, key/value caches included: correct, but slower than
the C libraries called directly, and only used where these are not found.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.npu.base import (
    MAX_GROUPS,
    Call,
    Description,
    Memory,
    NpuInfo,
    NpuModel,
    Place,
    Runtime,
    Side,
)
from edgevl.axera.npu.libraries import library_path
from edgevl.errors import BoardError

log = logging.getLogger(__name__)


class HostMemory(Memory):
    """Memory of the host, which the package copies from and to."""

    def __init__(self, runtime: Runtime, size: int) -> None:
        self._bytes = np.zeros(size, np.uint8)
        super().__init__(runtime, size)

    def read(self, offset: int, nbytes: int) -> NDArray[np.uint8]:
        """Return the bytes, a view."""
        return self._bytes[offset : offset + nbytes]

    def _write(self, offset: int, values: NDArray[np.uint8]) -> None:
        self._bytes[offset : offset + values.size] = values

    def _give_back(self) -> None:
        self._bytes = np.empty(0, np.uint8)


class VendorCall(Call):
    """Arrays for a session."""

    _model: VendorModel

    def __init__(
        self, model: VendorModel, group: int, inputs: Sequence[Place], outputs: Sequence[Place]
    ) -> None:
        self._dtypes = [np.dtype(node.dtype) for node in model.session.get_inputs(group)]
        self._places: dict[Side, list[Place]] = {"Input": [*inputs], "Output": [*outputs]}
        super().__init__(model, group, inputs, outputs)

    def _run(self) -> int:
        """Copy in, compute, copy out."""
        feed = {}
        for tensor, (memory, offset), dtype in zip(
            self._model.groups[self._group].inputs, self._places["Input"], self._dtypes, strict=True
        ):
            stored = memory.read(offset, tensor.nbytes)
            feed[tensor.name] = stored.view(dtype).reshape(tensor.shape)
        try:
            results = self._model.session.run(None, feed, shape_group=self._group)
        except (AssertionError, RuntimeError, ValueError) as error:
            raise BoardError(
                f"{self._model.path}: axengine cannot run group {self._group} ({error})"
            ) from None
        for (memory, offset), result in zip(self._places["Output"], results, strict=True):
            memory.write(offset, np.ascontiguousarray(result))
        return 0

    def _place(self, side: Side, index: int, memory: Any, nbytes: int, offset: int) -> None:
        self._places[side][index] = memory, offset


class VendorModel(NpuModel):
    """A session of the package."""

    runtime: VendorRuntime
    session: Any
    CALL = VendorCall
    # NumPy's names; bfloat16 is that of ml_dtypes.
    DATA_TYPES: ClassVar = {
        "bfloat16": "BF16", "float32": "F32", "int32": "I32", "uint32": "U32", "uint8": "U8",
        "int8": "I8", "uint16": "U16", "int16": "I16",
    }  # fmt: skip

    def _open(self) -> int:
        try:
            with redirect_stdout(sys.stderr):
                self.session = self.runtime.session(str(self.path))
        except Exception as error:  # as it comes: RuntimeError, ValueError, OSError
            raise BoardError(f"{self.path}: axengine cannot load it ({error})") from None
        # The package has no way to ask for the number of groups but this error.
        for group in range(MAX_GROUPS):
            try:
                self.session.get_inputs(group)
            except (IndexError, ValueError):
                return group
        return MAX_GROUPS

    def _describe(self, group: int) -> tuple[Iterator[Description], Iterator[Description]]:
        inputs, outputs = (
            ((node.name, np.dtype(node.dtype).name, node.shape, None) for node in nodes)
            for nodes in (self.session.get_inputs(group), self.session.get_outputs(group))
        )
        return inputs, outputs

    def _give_back(self) -> None:
        self.session = None


class VendorRuntime(Runtime):
    """Whatever NPU ``axengine`` finds."""

    MEMORY, MODEL = HostMemory, VendorModel

    def __init__(self, directory: Path | None = None) -> None:
        """Import the package, which starts the NPU, and stops it when the process ends.

        Args:
            directory: is the package's business.

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
        log.warning(
            "the NPU's C libraries are not used: the package axengine copies all caches in every "
            "step, which is slower"
        )

    def info(self) -> NpuInfo:
        """Ask the libraries that the package has loaded whether they are the emulator's."""
        paths = filter(None, map(library_path, ("ax_sys", "axcl_rt")))
        emulated = any(hasattr(ctypes.CDLL(path), "EDGEVL_EMULATOR_Memory") for path in paths)
        return NpuInfo(emulated=emulated)

    def _shut_down(self) -> None:
        """Leave that to the package."""
