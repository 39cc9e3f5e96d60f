"""Small tools for files: bounded texts, files that are whole or not there, journals."""

from __future__ import annotations

import json
import os
import secrets
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from edgevl.errors import EdgeVLError

#: What the name of a file begins with while it is written beside its place.
UNFINISHED = ".unfinished-"
#: How often a journal is forced to the disk: a power cut costs no more than this.
SYNC_SECONDS = 5.0


def first_line(error: BaseException) -> str:
    """Return the first line of what ``error`` says, or its name."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


@contextmanager
def reading(name: object, error: type[EdgeVLError], what: str = "file") -> Iterator[None]:
    """Turn what goes wrong while a path is opened and read into ``error``.

    Args:
        name: what the message calls it.
        error: what is raised.
        what: what it should be, such as "picture file".
    """
    try:
        yield
    except FileNotFoundError:
        raise error(
            f"{name}: no such file", f"{name}：没有这个文件，可能已过期，请重新上传"
        ) from None
    except IsADirectoryError:
        raise error(f"{name}: is a directory; give a {what}") from None
    except OSError as problem:
        raise error(f"{name}: cannot be read ({problem.strerror or problem})") from None
    except (ValueError, RuntimeError) as problem:  # a NUL in the path; ~ of an unknown user
        raise error(f"{name}: not a path ({problem})") from None


def read_text(
    path: Path,
    max_bytes: int,
    error: type[EdgeVLError],
    *,
    name: str = "",
    may_be_pipe: bool = False,
) -> str:
    """Read a UTF-8 file of at most ``max_bytes``; a byte order mark is left out.

    Args:
        path: the file.
        max_bytes: the limit.
        error: what is raised.
        name: what the message calls it; default: ``path``.
        may_be_pipe: whether it may be a pipe or device, which could be waited for without an end.

    Raises:
        error: it cannot be read, is too large, or is not UTF-8.
    """
    name = name or str(path)
    with reading(name, error):
        status = path.stat()
        is_file = stat.S_ISREG(status.st_mode)
        if not is_file and not may_be_pipe:
            raise error(f"{name}: not a regular file")
        with path.open("rb") as file:
            # `read` allocates what it is asked for, so of files it is not asked for the limit.
            data = file.read((min(status.st_size, max_bytes) if is_file else max_bytes) + 1)
    return as_text(data, max_bytes, name, error)


def as_text(data: bytes, max_bytes: int, name: str, error: type[Exception]) -> str:
    """Return UTF-8 bytes as text; see `read_text`."""
    if len(data) > max_bytes:
        limit = f"{max_bytes >> 20} MiB" if max_bytes >> 20 else f"{max_bytes} bytes"
        raise error(f"{name}: larger than the limit of {limit}: shorten it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(
            f"{name}: not UTF-8 at byte {problem.start}: convert it, or download it again"
        ) from None


def system_text(path: Path) -> str:
    """Return a small file of the system, or nothing where it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Write a file beside ``path`` and rename it on success; on failure leave nothing behind.

    Of several that write it at once, one wins. A device or pipe, such as ``/dev/stdout``, is
    written straight: a file must not take its place.

    Args:
        path: the file; its directory exists.
        sync: have it on the disk before it is renamed.

    Raises:
        OSError: the directory does not exist, is not writable, or is full.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory; name a file", str(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    beside = path.with_name(UNFINISHED + secrets.token_hex(8))
    try:
        file = beside.open("xb")
    except OSError as error:
        raise OSError(error.errno, f"cannot be written: {error.strerror}", str(path)) from None
    try:
        with file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def sync_file(path: Path) -> None:
    """Have a file's data on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


class Journal:
    """JSON objects, one a line, that a job has come to: after an interruption it goes on there."""

    def __init__(self, path: Path) -> None:
        """Use ``path``, a file that need not exist."""
        self._path = path
        self._synced = time.monotonic()

    def recover(self) -> Iterator[dict[str, Any]]:
        """Yield what is there; at the end cut off what was not written to its end."""
        if not self._path.exists():
            return
        with self._path.open("rb+") as file:
            end = 0
            for line in file:
                try:
                    entry = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    entry = None
                if not isinstance(entry, dict):
                    break
                end += len(line)
                yield entry
            file.truncate(end)

    def add(self, entry: Mapping[str, Any]) -> None:
        """Write one line; half a surrogate pair, as in names that are not UTF-8, as its escape.

        Raises:
            OSError: the disk is full.
        """
        line = json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode(errors="backslashreplace"))
            if time.monotonic() - self._synced > SYNC_SECONDS:
                file.flush()
                os.fsync(file.fileno())
                self._synced = time.monotonic()
