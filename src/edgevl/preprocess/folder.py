"""The pictures and videos in a directory."""

from __future__ import annotations

import os
from pathlib import Path

from edgevl.errors import EdgeVLError

#: How the names of picture files end, in lower case: as Pillow and pillow_heif have them.
PICTURE_SUFFIXES = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif",
    ".tif", ".tiff", ".heic", ".heif", ".hif", ".heics", ".heifs",
)  # fmt: skip

#: How the names of video files end, in lower case; ``.ts`` is TypeScript more often than MPEG.
VIDEO_SUFFIXES = (
    ".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".mkv", ".webm", ".avi", ".divx", ".mpg",
    ".mpeg", ".mpe", ".m1v", ".m2v", ".vob", ".mts", ".m2ts", ".m2t", ".flv", ".f4v", ".wmv",
    ".asf", ".ogv", ".mxf", ".ivf", ".h264", ".264", ".h265", ".265", ".hevc",
)  # fmt: skip

#: Most files of a directory: their names are kept in memory.
MAX_FILES = 1_000_000


def has_suffix(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file's name ends in one of ``suffixes``, and does not hide.

    Names that begin with a dot hide; macOS leaves ``._a.jpg``, which is no picture, beside each
    ``a.jpg`` on other systems' disks and in archives.
    """
    name = name.rpartition("/")[2]
    return name.lower().endswith(suffixes) and not name.startswith(".")


def find_files(directory: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """List the files in a directory and below it that `has_suffix`, sorted by path.

    Links to files are followed, links to directories are not; nor are directories that hide.

    Raises:
        EdgeVLError: there are more than ``MAX_FILES``.
        OSError: the directory cannot be read.
    """

    def stop(error: OSError) -> None:
        if error.filename == os.fspath(directory):  # one below it is passed over
            raise error

    found: list[Path] = []
    for parent, directories, names in os.walk(directory, onerror=stop):
        directories[:] = (name for name in directories if not name.startswith("."))
        paths = (Path(parent, name) for name in names if has_suffix(name, suffixes))
        found += (path for path in paths if path.is_file())
        if len(found) > MAX_FILES:
            raise EdgeVLError(
                f"{directory}: more than {MAX_FILES} files; name a directory below it"
            )
    return sorted(found)
