"""The questions of a batch: lines of a JSONL file, or one about every file of a directory."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any

from edgevl.batch.line import parse_line
from edgevl.errors import EdgeVLError
from edgevl.files import reading
from edgevl.preprocess.sources import PICTURE_SUFFIXES, VIDEO_SUFFIXES, find_files

#: Longest line of a file, in bytes: a picture of the largest size in a ``data:`` URL, and more.
MAX_LINE_BYTES = 128 << 20
_BLOCK_BYTES = 1 << 20


class BatchError(EdgeVLError):
    """The input of a batch has no questions, or its output cannot be written there."""


@dataclass(frozen=True)
class Row:
    """One question, or why there is none.

    Attributes:
        id: what the input calls it; else the name of its first picture or video, or ``line N``.
        images: its pictures, as the input names them; of ``data:`` URLs only the beginning.
        videos: its videos, likewise.
        sources: the pictures, to be read.
        video_sources: the videos, to be read.
        question: what is asked.
        options: ``system``, ``frames`` and fields of `SamplingOptions`, where the line has its own.
        error: what is wrong with the line; empty if nothing is.
    """

    id: str | int
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    sources: tuple[str | Path, ...] = ()
    video_sources: tuple[str | Path, ...] = ()
    question: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class BatchInput(ABC):
    """Rows of which there are ``len``, in an order that stays.

    Attributes:
        path: where they are from.
        question: asked where a row has no question of its own.
        digest: SHA-256 (hexadecimal) of the file, or of the names of the directory's files.
    """

    path: Path
    question: str | None
    digest: str

    @abstractmethod
    def __len__(self) -> int:
        """Return how many rows there are."""

    @abstractmethod
    def rows(self, start: int = 0) -> Iterator[Row]:
        """Yield the rows from ``start`` on.

        Raises:
            BatchError: the input can no longer be read.
        """


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
            return _Directory(path, question)
        if path.name.lower().endswith(PICTURE_SUFFIXES + VIDEO_SUFFIXES) and path.is_file():
            raise BatchError(
                f"{path}: is a picture or video; give the directory it is in, or a file of JSON "
                "lines (edgevl chat asks about one)"
            )
        if path.is_file():
            return _Lines(path, question)
    raise BatchError(
        f"{path}: no such file or directory; give a directory of pictures and videos, or a file of "
        "JSON lines"
    )


class _Directory(BatchInput):
    """A directory's pictures and videos, and one question for all."""

    def __init__(self, path: Path, question: str | None) -> None:
        if question is None:
            raise BatchError(f"{path}: a directory needs a question (--question TEXT)")
        self.path, self.question = path, question
        suffixes = PICTURE_SUFFIXES + VIDEO_SUFFIXES
        self._paths = find_files(path, suffixes)
        if not self._paths:
            raise BatchError(f"{path}: has no pictures or videos ({', '.join(suffixes)})")
        names = b"\0".join(os.fsencode(each.relative_to(path)) for each in self._paths)
        self.digest = hashlib.sha256(names).hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def rows(self, start: int = 0) -> Iterator[Row]:
        for path in self._paths[start:]:
            name = str(path.relative_to(self.path))
            question = self.question or ""
            if name.lower().endswith(VIDEO_SUFFIXES):
                yield Row(name, videos=(name,), video_sources=(path,), question=question)
            else:
                yield Row(name, images=(name,), sources=(path,), question=question)


class _Lines(BatchInput):
    """The lines of a JSONL file that are not blank; it is read as it is needed."""

    def __init__(self, path: Path, question: str | None) -> None:
        self.path, self.question = path, question
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            file.seek(0)
            self._count = sum(1 for _ in _lines(file))
        self.digest = digest.hexdigest()
        if not self._count:
            raise BatchError(f"{path}: has no questions; write one JSON object a line")

    def __len__(self) -> int:
        return self._count

    def rows(self, start: int = 0) -> Iterator[Row]:
        with reading(self.path, BatchError), self.path.open("rb") as file:
            for number, line in islice(_lines(file), start, self._count):
                if line is None:
                    error = f"line {number}: over the limit of {MAX_LINE_BYTES >> 20} MiB"
                    yield Row(f"line {number}", error=error)
                    continue
                known, error = parse_line(line, number, self.path.parent, self.question)
                yield Row(**known, error=error)


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
