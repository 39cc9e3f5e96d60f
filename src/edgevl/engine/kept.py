"""What was computed, kept on disk: features of pictures, keys and values of system messages.

Files ``.edgevl/kept/<kind>-<key>.safetensors`` beside the checkpoint. A key covers what was asked
for and all that the bits of the result depend on, so that a file that is found is the right one.
They are written beside and renamed: whoever reads, in whatever process, finds a whole file or none.
What is in a picture can be told from its features: the directory is its owner's alone.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import stat
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.directory import is_file
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, raw, write_file
from edgevl.engine.packed import ABANDONED_SECONDS, ALIGNMENT, checksum
from edgevl.errors import CheckpointError
from edgevl.files import UNFINISHED, replacing

#: Most bytes of a file beside its array.
HEADER_BYTES = 1024

#: Names of files that are written here; others are left alone.
_NAME = re.compile(r"[a-z]+-[0-9a-f]{32}\.safetensors")
#: Failures of writing that may be over the next time.
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE}
_UNFINISHED_NAME = re.compile(re.escape(UNFINISHED) + "[0-9a-f]{16}")

log = logging.getLogger(__name__)


class Kept:
    """Arrays in files of a directory, of all processes that use the model.

    Nothing here fails: what cannot be read is computed anew, what cannot be written is not kept.

    Args:
        directory: where; made with the first file.
        most_bytes: of all files; those used longest ago make room.
        models: by kind of array, all that it depends on beside its key.
    """

    def __init__(self, directory: Path, most_bytes: int, models: Mapping[str, str]) -> None:
        self._directory = directory
        self._most_bytes = most_bytes
        self._models = models
        self._refused = False
        with contextlib.suppress(OSError):  # there is none yet
            self._check_own()
            self._make_room(0)  # the bound may be another than last time

    def get(self, kind: str, key: str) -> NDArray[Any] | None:
        """Return an array if it is kept; a damaged file is removed."""
        path = self._path(kind, key)
        if not is_file(path):
            return None
        try:
            array = _read(path)
        except MemoryError:
            return None
        except CheckpointError as error:
            # What cannot be read now may be good, or another process has made room.
            if not isinstance(error.__context__, OSError):
                log.warning("%s; computing anew what it had", error)
                with contextlib.suppress(OSError):
                    path.unlink()
            return None
        with contextlib.suppress(OSError):  # a read-only directory
            os.utime(path)  # the latest use
        return array

    def put(self, kind: str, key: str, make: Callable[[], NDArray[Any]]) -> None:
        """Keep what ``make`` returns: a float32 or uint32 array.

        It is not called where the array is kept already, or nothing can be written.
        """
        path = self._path(kind, key)
        if self._refused or is_file(path):
            return
        try:
            array = make()
            size = array.nbytes + HEADER_BYTES
            if size > self._most_bytes:
                return
            self._directory.parent.mkdir(exist_ok=True)
            self._directory.mkdir(mode=0o700, exist_ok=True)
            self._check_own()
            self._make_room(size)
            with replacing(path) as file:
                os.fchmod(file.fileno(), 0o600)
                _write(file, array)
        except (OSError, MemoryError) as error:  # read-only, or the disk is full
            log.info("%s: not written (%s)", path, error)
            # A full disk and too little memory pass; a read-only directory is tried once.
            self._refused = isinstance(error, OSError) and error.errno not in _PASSING

    def _path(self, kind: str, key: str) -> Path:
        name = hashlib.sha256(f"{self._models[kind]} {key}".encode()).hexdigest()[:32]
        return self._directory / f"{kind}-{name}.safetensors"

    def _check_own(self) -> None:
        """Refuse a directory that is not the user's alone.

        Raises:
            OSError: it is another's, or a link, which may lead to anybody's.
        """
        status = self._directory.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "not a directory of this user", str(self._directory))
        if stat.S_IMODE(status.st_mode) != 0o700:
            self._directory.chmod(0o700)

    def _make_room(self, size: int) -> None:
        """Remove files used longest ago, and those of processes that were killed.

        Raises:
            OSError: the directory cannot be read.
        """
        files: list[tuple[int, int, Path]] = []
        for path in self._directory.iterdir():
            with contextlib.suppress(OSError):
                status = path.stat()
                abandoned = time.time() - status.st_mtime > ABANDONED_SECONDS
                if _UNFINISHED_NAME.fullmatch(path.name) and abandoned:
                    path.unlink()
                elif _NAME.fullmatch(path.name):
                    files.append((status.st_mtime_ns, status.st_size, path))
        total = size + sum(used for _, used, _ in files)
        for _, used, path in sorted(files):
            if total <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= used


def _write(file: IO[bytes], array: NDArray[Any]) -> None:
    dtype = "F32" if array.dtype == np.float32 else "U32"
    specs = [TensorSpec("data", dtype, array.shape), TensorSpec("checksum", "U64", (1,))]
    write_file(file, specs, [raw(array), raw(_checksum(array))], alignment=ALIGNMENT)


def _read(path: Path) -> NDArray[Any]:
    """Return a copy of a file's array: the file may be removed.

    Raises:
        CheckpointError: it is damaged, or gone.
    """
    file = SafetensorsFile(path)
    try:
        if set(file) != {"data", "checksum"} or file.dtype("data") not in ("F32", "U32"):
            raise CheckpointError(f"{path}: not what was written")
        array = np.array(file["data"].data)
        if file["checksum"].data.tolist() != _checksum(array).tolist():
            raise CheckpointError(f"{path}: the checksum is wrong, the file is damaged")
        return array
    finally:
        file.close()


def _checksum(array: NDArray[Any]) -> NDArray[np.uint64]:
    """Return the checksum of an array, uint64 [1]; of zeros, as of lost pages, it is not zero."""
    data = np.asarray(array).reshape(-1).view(np.uint8)
    if len(data) % 8:
        data = np.pad(data, (0, -len(data) % 8))
    return ~np.array([checksum(data)], "<u8")
