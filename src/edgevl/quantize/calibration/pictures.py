"""Pictures to calibrate on: ours, or those of a directory or a tar file, which is never unpacked.

Ours, ``pictures.tar``, were drawn by ``models/tiny/training/calibration.py``. They are few, for
each wheel has them; so that they do for many conversations, a part of a picture is shown, another
one each time.
"""

from __future__ import annotations

import functools
import hashlib
import io
import random
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image

from edgevl.errors import ImageError
from edgevl.files import first_line, reading
from edgevl.preprocess.image import MAX_BYTES, load_image
from edgevl.preprocess.sources import PICTURE_SUFFIXES, find_files, has_suffix
from edgevl.quantize.settings import QuantizationError

#: Most members of a tar file, and most bytes that one takes which is only a header.
MAX_MEMBERS = 100_000
MAX_HEADER_BYTES = 1 << 20
#: Most bytes of a picture in a report, and pixels of its sides.
THUMBNAIL_BYTES = 20_000
_THUMBNAIL_SIDE = 384

#: The pictures that come with EdgeVL.
PICTURES = Path(__file__).with_name("pictures.tar")
#: Least share of their width and of their height that is shown.
LEAST_SHARE = 0.7

_T = TypeVar("_T")


@dataclass(frozen=True)
class FoundPicture:
    """A picture that has been read once: where it is, and the SHA-256 of its file."""

    place: int
    digest: str


def open_pictures(path: Path) -> PictureFiles:
    """List the picture files of a directory or a tar file.

    Returns:
        What has ``path``; its length, the number of files; ``read``, which returns the bytes of a
        file at a place, or raises an `ImageError`; and ``close``.

    Raises:
        QuantizationError: it is neither, is damaged, or has no file with a picture's suffix.
        ImageError: a directory has far too many.
    """
    with reading(path, QuantizationError):
        if path.is_dir():
            files: PictureFiles = PictureDirectory(path)
        elif path.is_file():
            files = PictureTar(path)
        else:
            raise QuantizationError(
                f"{path}: no such directory or tar file; name one that has pictures"
            )
    if not len(files):
        raise QuantizationError(
            f"{path}: has no pictures; name a directory or tar file with "
            f"{', '.join(PICTURE_SUFFIXES)}"
        )
    return files


class PictureDirectory:
    """The pictures in a directory and below it, as `find_files` lists them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._paths = find_files(path, PICTURE_SUFFIXES)

    def __len__(self) -> int:
        return len(self._paths)

    def read(self, place: int) -> bytes:
        """Return what a file contains."""
        path = self._paths[place]
        with reading(path, ImageError), path.open("rb") as file:
            return file.read(MAX_BYTES + 1)

    def close(self) -> None:
        """Do nothing: no file is open."""


class _BoundedTarInfo(tarfile.TarInfo):
    """A member whose header, which is read into memory as it is met, has a bounded size."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _BoundedTarInfo:
        info = super().frombuf(buf, encoding, errors)
        if not info.isreg() and info.size > MAX_HEADER_BYTES:
            raise QuantizationError(
                f"member header of {info.size} bytes, over the limit of {MAX_HEADER_BYTES}"
            )
        return info


class PictureTar:
    """The regular members of a tar file that are named as pictures, in the order of the file.

    Nothing is written to disk, and names of members are not used as paths.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._members: list[tarfile.TarInfo] = []
        try:
            self._tar = tarfile.open(path, "r:*", tarinfo=_BoundedTarInfo)  # noqa: SIM115
            for count, member in enumerate(self._tar, start=1):
                if count > MAX_MEMBERS:
                    raise QuantizationError(
                        f"more than {MAX_MEMBERS} members; pack a smaller choice of pictures"
                    )
                if member.isreg() and has_suffix(member.name, PICTURE_SUFFIXES):
                    self._members.append(member)
        except QuantizationError as error:
            raise QuantizationError(f"{path}: {error}") from None
        except Exception as error:  # decompressors raise nearly anything on damaged input
            reason = first_line(error).rstrip(":")
            raise QuantizationError(
                f"{path}: not a whole tar file ({reason}); name a tar file or a directory of "
                "pictures"
            ) from None

    def __len__(self) -> int:
        return len(self._members)

    def close(self) -> None:
        """Close the file."""
        self._tar.close()

    def read(self, place: int) -> bytes:
        """Return what a member contains."""
        member = self._members[place]
        if member.size > MAX_BYTES:
            raise ImageError(f"{self.path}: a member is over the limit of {MAX_BYTES} bytes")
        try:
            file = self._tar.extractfile(member)
            assert file is not None  # it is a regular member
            return file.read()
        except Exception as error:  # as above
            raise ImageError(f"{self.path}: a member cannot be read ({error})") from None


PictureFiles = PictureDirectory | PictureTar


def choose_pictures(files: PictureFiles, wanted: int) -> tuple[list[FoundPicture], int]:
    """Choose readable, different pictures, evenly spread: -> at most ``wanted``, files skipped.

    Only what is needed is read; the same files give the same choice.

    Raises:
        QuantizationError: none can be read.
    """
    found: list[FoundPicture] = []
    digests: set[str] = set()
    untried = list(range(len(files)))
    tried = skipped = 0
    reason = ""
    while untried and len(found) < wanted:
        # Twice as many each time, so that a tar file is not gone through for each damaged picture.
        chosen = spread(untried, max(wanted - len(found), tried))
        tried += len(chosen)
        for place in chosen:
            try:
                data = files.read(place)
                load_image(data)
            except ImageError as error:
                skipped += 1
                reason = reason or str(error)
                continue
            digest = hashlib.sha256(data).hexdigest()
            if digest not in digests:
                digests.add(digest)
                found.append(FoundPicture(place, digest))
        untried = sorted(set(untried) - set(chosen))
    if not found:
        raise QuantizationError(
            f"{files.path}: none of its {skipped} pictures can be read ({reason}); give others"
        )
    return spread(sorted(found, key=lambda picture: picture.place), wanted), skipped


def spread(items: Sequence[_T], count: int) -> list[_T]:
    """Return ``count`` items at even distances, or all if there are fewer."""
    if count >= len(items):
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def set_apart(items: Sequence[_T], count: int) -> tuple[list[_T], list[_T]]:
    """Take ``count`` items at even distances out: -> those that stay, those taken."""
    taken = set(spread(range(len(items)), count))
    return (
        [item for index, item in enumerate(items) if index not in taken],
        [items[index] for index in sorted(taken)],
    )


def thumbnail(image: Image.Image) -> bytes:
    """Return an RGB picture as a small JPEG, of at most `THUMBNAIL_BYTES`."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    while True:
        for quality in (80, 60, 40):
            file = io.BytesIO()
            small.save(file, "JPEG", quality=quality)
            if file.tell() <= THUMBNAIL_BYTES:
                return file.getvalue()
        small = small.reduce(2)  # noise compresses badly


def drawn_kinds() -> list[str]:
    """Return what is on each of our pictures, such as ``bar_chart``; neighbours differ."""
    return [name.split("-")[1] for name, _ in _files()]


def drawn(place: int, seed: int) -> Image.Image:
    """Return a part of a picture that comes with EdgeVL; the same arguments give the same part.

    Args:
        place: of the picture, taken modulo their number, so that counting up goes round.
        seed: of what part.
    """
    files = _files()
    image = load_image(files[place % len(files)][1])
    rng = random.Random(seed)
    width, height = (round(side * rng.uniform(LEAST_SHARE, 1)) for side in image.size)
    left, top = rng.randint(0, image.width - width), rng.randint(0, image.height - height)
    return image.crop((left, top, left + width, top + height))


@functools.cache
def _files() -> list[tuple[str, bytes]]:
    """Return the names and the contents of the files in the archive."""
    files = []
    with tarfile.open(PICTURES) as tar:
        for member in tar:
            file = tar.extractfile(member)
            assert file is not None  # there are only files in it
            files.append((member.name, file.read()))
    return files
