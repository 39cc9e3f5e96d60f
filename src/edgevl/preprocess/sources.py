"""Pictures and videos as files: what users give, what lies in a directory, names in messages."""

from __future__ import annotations

import base64
import binascii
import os
import string
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes

from edgevl.errors import EdgeVLError

#: Most %-escapes of a ``data:`` URL. Decoding one takes half a kilobyte of memory.
_MAX_ESCAPES = 2**17
#: Characters of base64 that are decoded at a time, a multiple of four.
_BASE64_STEP = 2**20


@dataclass(frozen=True)
class Medium:
    """Pictures, or videos: what messages call one, what is raised, what one may be given as."""

    name: str
    name_zh: str
    error: type[EdgeVLError]
    forms: str

    def locate(
        self, source: object, max_bytes: int, fix: str, fix_zh: str
    ) -> tuple[str, bytes | Path]:
        """Return the name of a source, for messages, and its bytes or, of a path, where they are.

        A source is a path, ``"-"`` for standard input, a ``data:`` URL, or the bytes of a file. Of
        what is here already, more than ``max_bytes`` are refused; ``fix`` is what to do then.

        Raises:
            EdgeVLError: of ``error``: it is of another type, empty, over the limit, malformed or on
                the network.
        """
        if isinstance(source, bytes | bytearray | memoryview):
            name, data = "the bytes", bytes(source[: max_bytes + 1])
        elif isinstance(source, str) and source == "-":
            if sys.stdin is None:
                raise self.error(f"standard input is closed; give the path of the {self.name}")
            name, data = "standard input", sys.stdin.buffer.read(max_bytes + 1)
        elif isinstance(source, str) and source[:5].lower() == "data:":
            name, data = "the data: URL", data_url(source, max_bytes, self.error)
        elif not isinstance(source, str | os.PathLike):
            raise self.error(
                f"a {self.name} cannot be a {type(source).__name__}; give {self.forms}"
            )
        else:
            path = os.fsdecode(source)
            name = short_name(path)
            if isinstance(source, str) and path[:8].lower().startswith(("http://", "https://")):
                raise self.error(
                    f"{name}: {self.name}s are not fetched from the network; download it first "
                    "and give its path"
                )
            return name, Path(path)
        self.check_size(name, len(data), max_bytes, fix, fix_zh)
        return name, data

    def check_size(self, name: str, size: int, max_bytes: int, fix: str, fix_zh: str) -> None:
        """Refuse a file of no bytes, or of too many; see `locate`."""
        if not size:
            raise self.error(
                f"{name}: empty; not a {self.name}", f"{name}：文件是空的，不是{self.name_zh}"
            )
        if size > max_bytes:
            gib = max_bytes >> 30
            limit = f"{gib} GiB" if gib else f"{max_bytes >> 20} MiB"
            raise self.error(
                f"{name}: over the limit of {limit}; {fix}",
                f"{name}：超过 {limit} 的大小上限，{fix_zh}",
            )


def data_url(url: str, max_bytes: int, error_type: type[EdgeVLError]) -> bytes:
    """Return the payload of a ``data:`` URL (RFC 2397), base64 or percent-encoded.

    One that must hold more than ``max_bytes`` is refused before it is decoded; what is returned can
    still be somewhat more.

    Raises:
        EdgeVLError: of ``error_type``: the URL is too long or malformed.
    """
    # Each byte takes at most three characters, and some more for the media type.
    if len(url) > 3 * max_bytes + 1024:
        raise error_type(f"the data: URL is over the limit of {max_bytes // 2**20} MiB")
    header, comma, payload = url.partition(",")
    if not comma:
        raise error_type(f"{short_name(url)}: a data: URL needs a comma before its data")
    try:
        data = payload.encode()
    except UnicodeEncodeError:
        raise error_type("the data: URL has half a surrogate pair; correct it") from None
    del payload  # as large as a video may be
    if data.count(b"%") > _MAX_ESCAPES:
        raise error_type(f"the data: URL has more than {_MAX_ESCAPES} %-escapes: use base64")
    data = unquote_to_bytes(data)
    if not header.lower().rstrip().endswith(";base64"):
        return data
    data = data.translate(None, string.whitespace.encode()).rstrip(b"=")
    data += b"=" * (-len(data) % 4)
    try:
        # In steps, between which other threads can run.
        steps = range(0, len(data), _BASE64_STEP)
        return b"".join(base64.b64decode(data[i : i + _BASE64_STEP], validate=True) for i in steps)
    except binascii.Error as error:
        raise error_type(f"the data: URL is not valid base64 ({error})") from None


def short_name(name: str) -> str:
    """Return a path or URL fit for a message: one line, at most 100 characters."""
    name = name.encode("utf-8", "backslashreplace").decode()
    name = "".join(char if char.isprintable() else "?" for char in name[:200])
    return name if len(name) <= 100 else f"{name[:97]}…"


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
