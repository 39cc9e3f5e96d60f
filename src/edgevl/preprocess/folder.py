"""The pictures and videos in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from edgevl.errors import EdgeVLError

#: How the names of picture files end, in lower case.
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif",
)  # fmt: skip

#: How the names of video files end, in lower case; ``.ts`` is TypeScript more often than MPEG.
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".mts", ".m2ts",
    ".flv", ".wmv", ".ogv", ".mxf", ".ivf",
)  # fmt: skip

#: Most files of a directory: their names are kept in memory.
MAX_FILES = 1_000_000


def find_files(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files in a directory and below it whose names end in ``suffixes``, sorted by path.

    Links to files are followed, links to directories are not.

    Raises:
        EdgeVLError: there are more than ``MAX_FILES``.
        OSError: the directory cannot be read.
    """

    def stop(error: OSError) -> None:
        if error.filename == os.fspath(directory):  # one below it is passed over
            raise error

    found: list[Path] = []
    for parent, _, names in os.walk(directory, onerror=stop):
        paths = (Path(parent, name) for name in names if name.lower().endswith(suffixes))
        found += (path for path in paths if path.is_file())
        if len(found) > MAX_FILES:
            raise EdgeVLError(
                f"{directory}: more than {MAX_FILES} files; name a directory below it"
            )
    return sorted(found)
