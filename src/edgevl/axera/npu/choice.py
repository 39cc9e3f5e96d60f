"""Which runtime is used."""

from __future__ import annotations

import atexit
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path

from edgevl.axera.npu.ax import AxRuntime
from edgevl.axera.npu.axcl import AxclRuntime
from edgevl.axera.npu.base import Runtime
from edgevl.axera.npu.libraries import emulator_directory, library_path
from edgevl.axera.npu.vendor import VendorRuntime
from edgevl.errors import BoardError

log = logging.getLogger(__name__)

#: Environment variable that names one of `RUNTIMES`.
VARIABLE = "EDGEVL_NPU"
#: Runtimes by name, and the libraries that they need.
RUNTIMES: dict[str, tuple[str, ...]] = {
    "ax": ("ax_sys", "ax_engine"),
    "axcl": ("axcl_rt",),
    "axengine": (),
}
#: There where the driver of an M.2 card is loaded.
CARD_DEVICE = Path("/dev/axcl_host")

_started: dict[tuple[str, Path | None], Runtime] = {}
_lock = threading.Lock()


def open_runtime(emulated: bool = False) -> Runtime:
    """Return the runtime of this computer's NPU, started once a process and stopped at its end.

    Args:
        emulated: take the emulator's libraries.

    Raises:
        BoardError: there is none, or it does not start.
    """
    directory = emulator_directory() if emulated else None
    name = _choose(directory)
    with _lock:
        key = (name, directory)
        if key not in _started:
            starters: dict[str, Callable[[], Runtime]] = {
                "ax": lambda: AxRuntime(directory),
                "axcl": lambda: AxclRuntime(directory),
                "axengine": VendorRuntime,
            }
            runtime = starters[name]()
            atexit.register(runtime.close)
            if name == "axengine":
                log.warning(
                    "the NPU's C libraries are not used: the package axengine copies all caches in "
                    "every step, which is slower"
                )
            _started[key] = runtime
        return _started[key]


def _choose(directory: Path | None) -> str:
    """Return the name of the runtime to use."""
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in RUNTIMES:
            raise BoardError(f"{VARIABLE}={forced}: choose {', '.join(RUNTIMES)}")
        return forced
    names = ["axcl", "ax"] if directory is None and CARD_DEVICE.exists() else ["ax", "axcl"]
    for name in names:
        if all(library_path(library, directory) for library in RUNTIMES[name]):
            return name
    try:
        VendorRuntime()
    except BoardError as error:
        raise BoardError(
            "no NPU here: libax_engine.so (part of a board's system image, in /soc/lib), "
            "libaxcl_rt.so (the AXCL driver of an M.2 card) are missing, and "
            f"{error}. EDGEVL_NPU_LIBRARIES names the directory of the libraries; without a board, "
            "edgevl compile --emulate makes a model for the emulator"
        ) from None
    return "axengine"
