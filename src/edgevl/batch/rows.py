"""The questions of a batch: lines of a JSONL file, or one about every file of a directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

from edgevl.batch.line import Row, Shown, parse_line
from edgevl.errors import EdgeVLError
from edgevl.files import reading
from edgevl.preprocess.sources import PICTURE_SUFFIXES, VIDEO_SUFFIXES, find_files

#: Longest line of a file, in bytes: a picture of the largest size in a ``data:`` URL, and more.
MAX_LINE_BYTES = 128 << 20
_BLOCK_BYTES = 1 << 20


class BatchError(EdgeVLError):
    """The input of a batch has no questions, or its output cannot be written there."""


@dataclass(frozen=True)
class BatchInput:
    """Rows of which there are ``len``, in an order that stays.

    Attributes:
        path: where they are from.
        question: asked where a row has no question of its own.
        digest: SHA-256 (hexadecimal) of the file, or of the names of the directory's files.
    """

    path: Path
    question: str | None
    digest: str
    _count: int
    _rows: Callable[[int], Iterator[Row]]

    def __len__(self) -> int:
        """Return how many rows there are."""
        return self._count

    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from ``start`` on.

        Raises:
            BatchError: the input can no longer be read.
        """
        return self._rows(start)


def open_batch(path: str | Path, question: str | None = None) -> BatchInput:
    """Open the input of a batch.

    Args:
        path: a directory of pictures and videos, or a file with one JSON object a line; see
            `parse_line`.
        question: what is asked where a line has no question of its own.

    Raises:
        BatchError: it is neither, cannot be read, has no pictures, videos or lines; or it is a
            directory and there is no question.
        EdgeVLError: the directory has far too many files.
    """
    path = Path(path)
    if question is not None and not question.strip():
        raise BatchError("the question is empty: say what is to be asked")
    with reading(path, BatchError):
        if path.is_dir():
            return _directory(path, question)
        if path.name.lower().endswith(PICTURE_SUFFIXES + VIDEO_SUFFIXES) and path.is_file():
            raise BatchError(
                f"{path}: is a picture or video; give the directory it is in, or a file of JSON "
                "lines (edgevl chat asks about one)"
            )
        if path.is_file():
            return _file(path, question)
    raise BatchError(
        f"{path}: no such file or directory; give a directory of pictures and videos, or a file of "
        "JSON lines"
    )


def _directory(path: Path, question: str | None) -> BatchInput:
    """A directory's pictures and videos, and one question for all."""
    if question is None:
        raise BatchError(f"{path}: a directory needs a question (--question TEXT)")
    suffixes = PICTURE_SUFFIXES + VIDEO_SUFFIXES
    found = find_files(path, suffixes)
    if not found:
        raise BatchError(f"{path}: has no pictures or videos ({', '.join(suffixes)})")
    names = [str(each.relative_to(path)) for each in found]

    def rows(start: int) -> Iterator[Row]:
        for name, source in islice(zip(names, found, strict=True), start, None):
            shown = (Shown(name, source),)
            if name.lower().endswith(VIDEO_SUFFIXES):
                yield Row(name, videos=shown, question=question)
            else:
                yield Row(name, images=shown, question=question)

    digest = hashlib.sha256(b"\0".join(map(os.fsencode, names))).hexdigest()
    return BatchInput(path, question, digest, len(found), rows)


def _file(path: Path, question: str | None) -> BatchInput:
    """The lines of a JSONL file that are not blank; it is read as it is needed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
        file.seek(0)
        count = sum(1 for _ in _lines(file))
    if not count:
        raise BatchError(f"{path}: has no questions; write one JSON object a line")

    def rows(start: int) -> Iterator[Row]:
        with reading(path, BatchError), path.open("rb") as file:
            for number, line in islice(_lines(file), start, count):
                if line is None:
                    error = f"line {number}: over the limit of {MAX_LINE_BYTES >> 20} MiB"
                    yield Row(f"line {number}", error=error)
                else:
                    yield parse_line(line, number, path.parent, question)

    return BatchInput(path, question, digest.hexdigest(), count, rows)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that are not blank, and their numbers; None for one that is too long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None
        elif line.strip():
            yield number, line
