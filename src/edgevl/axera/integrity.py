"""Whether the files of a compiled model are those that were compiled: sizes and checksums.

``board.json`` lists them. Sizes are compared whenever a model is opened. Contents are read once,
when it is first loaded: what was found right is remembered in `MEMORY` of the user's cache, with
all that changes when a file does (size, times, place on the disk).

SHA-256: processors have instructions for it, the Hub gives it for its files, and ``sha256sum``
computes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.errors import BoardError, CheckpointError
from edgevl.files import reading, replacing
from edgevl.json_input import Fields

#: The field of ``board.json`` with an object for each file: name -> ``bytes``, ``sha256``.
FILES = "files"
#: Below the user's cache directory: path -> size, times, place, and the checksum that was found.
MEMORY = "edgevl/boards.json"
#: Largest such file that is read; 10,000 model files take 3 MB.
_MAX_MEMORY_BYTES = 16 << 20
#: Read and hashed at once.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Content:
    """What a file has in it: ``nbytes`` bytes with the SHA-256 ``sha256``, in hexadecimal."""

    nbytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Content:
        """Read a file.

        Raises:
            OSError: it cannot be read.
        """
        digest, size, block = hashlib.sha256(), 0, bytearray(_BLOCK_BYTES)
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                digest.update(memoryview(block)[:count])
                size += count
        return cls(size, digest.hexdigest())

    def to_dict(self) -> dict[str, Any]:
        """Return what ``board.json`` says of the file."""
        return {"bytes": self.nbytes, "sha256": self.sha256}


def listed_files(board: Fields) -> dict[str, Content]:
    """Return what ``board.json`` says of files, by name: nothing if it is of an earlier version.

    Raises:
        CheckpointError: it is malformed.
    """
    files = board.fields(FILES, {})
    entries = {name: files.fields(name) for name in files.values}
    return {
        name: Content(entry.integer("bytes", 0, 1 << 50), entry.text("sha256").lower())
        for name, entry in entries.items()
    }


def check_sizes(paths: Iterable[Path], listed: Mapping[str, Content]) -> None:
    """Compare the sizes of files with those that are listed.

    Raises:
        BoardError: one differs, or a file cannot be looked at.
    """
    for path in paths:
        expected = listed.get(path.name)
        if expected is None:
            continue
        with reading(path, BoardError):
            size = path.stat().st_size
        if size != expected.nbytes:
            raise BoardError(
                f"{path}: {size} bytes, compiled were {expected.nbytes} as board.json says: copy "
                "or download it again"
            )


def check_contents(paths: Iterable[Path], listed: Mapping[str, Content]) -> None:
    """Compare the contents of files with those that are listed, unless that has been done.

    Raises:
        BoardError: one differs, or cannot be read.
    """
    place = _memory_path()
    known = _recall(place)
    found: dict[str, list[Any]] = {}
    try:
        for path in paths:
            expected = listed.get(path.name)
            if expected is None:
                continue
            with reading(path, BoardError):
                key, state = str(path.resolve()), _state(path)
                if known.get(key) == [*state, expected.sha256]:
                    continue
                content = Content.of(path)
            if content != expected:
                same = [name for name, other in listed.items() if content == other]
                if same:
                    raise BoardError(
                        f"{path}: has the content of {same[0]}: rename the two, or copy or "
                        "download them again"
                    )
                raise BoardError(
                    f"{path}: damaged, its SHA-256 is {content.sha256[:12]}… and in board.json "
                    "another: copy or download it again"
                )
            found[key] = [*state, content.sha256]
    finally:
        if found and place is not None:
            _remember(place, found)


def _state(path: Path) -> list[int]:
    """Return what changes when a file is written, replaced or renamed."""
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_dev, about.st_ino]


def _memory_path() -> Path | None:
    """Return where to remember, or None without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / MEMORY
    except RuntimeError:
        return None


def _recall(place: Path | None) -> dict[str, Any]:
    """Return what is remembered: nothing if that cannot be read."""
    try:
        if place is not None:
            return dict(Fields.read(place, _MAX_MEMORY_BYTES).values)
    except CheckpointError:
        pass
    return {}


def _remember(place: Path, found: Mapping[str, list[Any]]) -> None:
    """Add to what is remembered, and forget files that are gone; nothing where that cannot be."""
    memory = {path: state for path, state in _recall(place).items() if Path(path).exists()}
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        with replacing(place) as file:
            file.write(json.dumps({**memory, **found}).encode())
