"""Runtimes that have an NPU compute: memory, models, calls, behind one interface."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import threading
from pathlib import Path

from edgevl.axera.npu.ax import AxRuntime
from edgevl.axera.npu.axcl import AxclRuntime
from edgevl.axera.npu.base import Runtime
from edgevl.axera.npu.libraries import emulator_directory, library_path
from edgevl.axera.npu.vendor import VendorRuntime
from edgevl.errors import BoardError

#: Environment variable that names one of `RUNTIMES`.
VARIABLE = "EDGEVL_NPU"
#: Runtimes by name.
RUNTIMES: dict[str, type[AxRuntime] | type[AxclRuntime] | type[VendorRuntime]] = {
    "ax": AxRuntime,
    "axcl": AxclRuntime,
    "axengine": VendorRuntime,
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
    name = installed_runtime(directory)
    if name is None:
        paths = {library: library_path(library) for library in AxRuntime.LIBRARIES}
        absent = " and ".join(f"lib{library}.so" for library, path in paths.items() if not path)
        there = "".join(f" ({path} is there)" for path in paths.values() if path)
        raise BoardError(
            f"no NPU here: {absent} (of a board's system image, in /soc/lib) not found{there}, nor "
            "libaxcl_rt.so (the AXCL driver of an M.2 card), nor the Python package axengine. "
            "EDGEVL_NPU_LIBRARIES names the directory of the libraries; without a board, edgevl "
            "compile --emulate makes a model for the emulator"
        )
    with _lock:
        key = (name, directory)
        if key not in _started:
            if not _started:
                atexit.register(close_runtimes)
            _started[key] = RUNTIMES[name](directory)
        return _started[key]


def close_runtimes() -> None:
    """Give back all that the process has of NPUs; what other threads compute is waited for.

    For the end of the process: signals do nothing any more, and runtimes cannot be used again.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        with contextlib.suppress(ValueError):  # not the main thread, which handles signals
            while True:
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (KeyboardInterrupt, SystemExit):  # one that has come is raised here
                    continue
                break
    for runtime in list(_started.values()):
        runtime.close()


def installed_runtime(directory: Path | None = None) -> str | None:
    """Return the name of the runtime to use, whether or not it finds an NPU; None without any.

    Args:
        directory: the only place to look in; by default see `library_path`.

    Raises:
        BoardError: `VARIABLE` names none.
    """
    forced = os.environ.get(VARIABLE)
    if forced:
        if forced not in RUNTIMES:
            raise BoardError(f"{VARIABLE}={forced}: choose {', '.join(RUNTIMES)}")
        return forced
    names = ["axcl", "ax"] if directory is None and CARD_DEVICE.exists() else ["ax", "axcl"]
    for name in names:
        if all(library_path(library, directory) for library in RUNTIMES[name].LIBRARIES):
            return name
    return "axengine" if directory is None and importlib.util.find_spec("axengine") else None
