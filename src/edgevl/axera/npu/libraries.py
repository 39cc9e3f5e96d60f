"""Finding the C libraries of NPU runtimes."""

from __future__ import annotations

import ctypes.util
import os
import re
from pathlib import Path
from typing import Any

from edgevl.errors import BoardError, needs

#: Environment variable with the directory in which libraries are looked for first.
DIRECTORY_VARIABLE = "EDGEVL_NPU_LIBRARIES"
#: Where boards' images and the drivers of M.2 cards put them.
DIRECTORIES = ("/soc/lib", "/usr/lib", "/usr/lib/axcl", "/opt/lib")
# Functions that AX_ENGINE did not have in the beginning, and those that only `Runtime.info` calls.
_OPTIONAL = re.compile("GroupIO|Get(Version|SocName|MemInfo)$")


def library_path(name: str, directory: Path | None = None) -> str | None:
    """Return what to open for a library, or None if it is not installed.

    Args:
        name: without ``lib`` and ``.so``, such as ``ax_engine``.
        directory: the only place to look in; by default what `DIRECTORY_VARIABLE` says, else
            where the system's loader looks, else `DIRECTORIES`.
    """
    filename = f"lib{name}.so"
    named = os.environ.get(DIRECTORY_VARIABLE)
    if directory is None and named:
        directory = Path(named)
    if directory is not None:
        path = directory / filename
        return str(path) if path.exists() else None
    found = ctypes.util.find_library(name)
    if found:
        return found
    paths = (Path(place) / filename for place in DIRECTORIES)
    return next((str(path) for path in paths if path.exists()), None)


def emulator_directory() -> Path:
    """Return where libax_sys.so, libax_engine.so and libaxcl_rt.so of the emulator are.

    Raises:
        BoardError: they were not built.
    """
    try:
        from edgevl import _native
    except ImportError:
        raise BoardError(
            "the NPU emulator comes with the native engine, which this installation lacks: install "
            "edgevl where there is a C++20 compiler"
        ) from None
    directory = Path(_native.__file__).parent / "emulator"
    if not (directory / "libax_engine.so").is_file():
        raise BoardError(
            f"{directory}: there is no NPU emulator, this edgevl was built with EDGEVL_EMULATOR=OFF"
        )
    return directory


def foreign_functions(declarations: str) -> Any:
    """Return a ``cffi.FFI`` that knows some C declarations.

    Raises:
        BoardError: cffi is not installed.
    """
    with needs("board", BoardError):
        import cffi
    functions = cffi.FFI()
    functions.cdef(declarations)
    return functions


def open_library(functions: Any, name: str, directory: Path | None = None) -> Any:
    """Open a library that `library_path` finds.

    Raises:
        BoardError: it is not there, the system's loader refuses it, or it lacks a function that is
            declared and begins with its name.
    """
    path = library_path(name, directory)
    if path is None:
        raise BoardError(f"lib{name}.so is not installed")
    try:
        library = functions.dlopen(path)
    except OSError as error:
        # cffi goes on to say that it tried to find the path as a name, too.
        reason = str(error).partition(".  Additionally")[0]
        raise BoardError(f"{path}: cannot be loaded ({reason})") from None
    prefix = name.removesuffix("_rt")
    for function in dir(library):
        needed = function.lower().startswith(prefix) and not _OPTIONAL.search(function)
        if needed and not hasattr(library, function):
            raise BoardError(f"{path}: has no {function}: update the board's image or the driver")
    return library


def check_status(status: int, what: str, fix: str = "") -> None:
    """Raise a BoardError if a function of the C API did not return 0."""
    if status:
        raise BoardError(f"{what} failed with status 0x{status & 0xFFFFFFFF:08X}{fix}")
