"""The pictures in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from edgevl.errors import ImageError

#: How the names of picture files end, in lower case.
SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif",
)  # fmt: skip

#: Most pictures of a directory: their names are kept in memory.
MAX_PICTURES = 1_000_000


def find_pictures(directory: Path) -> list[Path]:
    """List the picture files in a directory and below it, sorted by path.

    Links to files are followed, links to directories are not.

    Raises:
        ImageError: there are more than ``MAX_PICTURES``.
        OSError: the directory cannot be read.
    """

    def stop(error: OSError) -> None:
        if error.filename == os.fspath(directory):  # one below it is passed over
            raise error

    found: list[Path] = []
    for parent, _, names in os.walk(directory, onerror=stop):
        paths = (Path(parent, name) for name in names if name.lower().endswith(SUFFIXES))
        found += (path for path in paths if path.is_file())
        if len(found) > MAX_PICTURES:
            raise ImageError(
                f"{directory}: more than {MAX_PICTURES} pictures; name a directory below it"
            )
    return sorted(found)
