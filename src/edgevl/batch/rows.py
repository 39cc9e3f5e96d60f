"""The questions of a batch: lines of a JSONL file, or one about every file of a directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, Any, NamedTuple

from edgevl.errors import EdgeVLError, PromptError
from edgevl.files import reading
from edgevl.json_input import filled_text, parse_object
from edgevl.options import OPTIONS
from edgevl.preprocess.sources import PICTURE_SUFFIXES, VIDEO_SUFFIXES, find_files
from edgevl.preprocess.video import check_frames, check_threshold

#: Longest line of a file, in bytes: a picture of the largest size in a ``data:`` URL, and more.
MAX_LINE_BYTES = 128 << 20
_BLOCK_BYTES = 1 << 20
#: What a line may have.
FIELDS = (
    "id", "image", "images", "video", "videos", "frames", "frame_threshold", "question", "system",
    *OPTIONS,
)  # fmt: skip
#: Longest question or system message, in bytes of UTF-8.
MAX_TEXT_BYTES = 1 << 20


class Shown(NamedTuple):
    """A picture or video: as the input names it, of ``data:`` URLs the beginning, and what to read.

    A path that is to be read is a `Path` even where it is "-", which as a text would mean standard
    input.
    """

    name: str
    source: str | Path


@dataclass(frozen=True)
class Row:
    """One question, or why there is none.

    Attributes:
        id: what the input calls it; else the name of its first picture or video, or ``line N``.
        images: its pictures.
        videos: its videos.
        question: what is asked.
        options: ``system``, ``frames``, ``frame_threshold`` and fields of `SamplingOptions`, where
            the line has its own.
        error: what is wrong with the line; empty if nothing is.
    """

    id: str | int
    images: tuple[Shown, ...] = ()
    videos: tuple[Shown, ...] = ()
    question: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


class BatchError(EdgeVLError):
    """The input of a batch has no questions, or its output cannot be written there."""


@dataclass(frozen=True)
class BatchInput:
    """Rows from ``path``, of which there are ``len``, in an order that stays.

    Attributes:
        path: a file or a directory.
        question: asked where a row has no question of its own.
        digest: SHA-256 (hexadecimal) of the file, or of the names of the directory's files.
    """

    path: Path
    question: str | None
    digest: str
    _count: int
    _rows: Callable[[int], Iterator[Row]]

    def __len__(self) -> int:
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


def parse_line(line: bytes, number: int, directory: Path, question: str | None) -> Row:
    """Read one line.

    It is an object with ``image`` (a path or ``data:`` URL) or ``images`` (a list of them, which
    may be empty), ``video`` or ``videos`` likewise, and where wanted ``frames`` (how many are taken
    of each video), ``frame_threshold``, ``question``, ``id`` (text or whole number), ``system`` and
    fields of `SamplingOptions`. Paths are relative to ``directory``, where the file lies;
    ``question`` is asked if the line has none. A row has what could be read, and what is wrong with
    the rest.
    """
    where = f"line {number}"
    try:
        value = parse_object(line, where, PromptError)
    except PromptError as error:
        return Row(where, error=str(error))
    known: dict[str, Any] = {"id": where}
    try:
        _read(value, directory, question, known)
    except (PromptError, ValueError) as error:
        known["error"] = f"{where}: {error}"
    return Row(**known)


def _read(
    value: dict[str, Any], directory: Path, question: str | None, known: dict[str, Any]
) -> None:
    """Fill ``known``; a PromptError or ValueError says what is wrong."""
    fields = {name: each for name, each in value.items() if each is not None}
    for kind in ("video", "image"):  # last the pictures: a row is called after the first of them
        names = [fields[kind]] if kind in fields else fields.get(f"{kind}s")
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"`{kind}` must be a path or data: URL, `{kind}s` a list of them")
        known[f"{kind}s"] = tuple(_shown(name, directory) for name in names)
        if names and not _is_data(names[0]):
            known["id"] = names[0]
    if "id" in fields:
        whole = isinstance(fields["id"], int) and not isinstance(fields["id"], bool)
        known["id"] = fields["id"] if whole else filled_text(fields["id"], "id", MAX_TEXT_BYTES)
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0][:80]!r}; a line has {', '.join(FIELDS)}")
    for kind in ("image", "video"):
        if kind in fields and f"{kind}s" in fields:
            raise ValueError(f"has both `{kind}` and `{kind}s`; give one of them")
    if "images" not in known and "videos" not in known:
        raise ValueError("has no `image` or `video`; to ask without them write `images`: []")
    asked = fields.get("question")
    if asked is None and question is None:
        raise ValueError("has no `question`, and there is none for all lines (--question TEXT)")
    known["question"] = (
        question if asked is None else filled_text(asked, "question", MAX_TEXT_BYTES)
    )
    options = {name: OPTIONS[name].check(fields[name]) for name in OPTIONS if name in fields}
    if "system" in fields:
        options["system"] = filled_text(fields["system"], "system", MAX_TEXT_BYTES)
    if "frames" in fields:
        options["frames"] = check_frames(fields["frames"])
    if "frame_threshold" in fields:
        options["frame_threshold"] = check_threshold(fields["frame_threshold"])
    known["options"] = options


def _shown(name: str, directory: Path) -> Shown:
    if _is_data(name):
        return Shown(name.partition(",")[0][:80] + ",…", name)
    if name.lower().startswith(("http://", "https://")):
        return Shown(name, name)  # nothing is fetched, and reading it says so
    return Shown(name, Path(name) if name.startswith("~") else directory / name)


def _is_data(name: str) -> bool:
    return name[:5].lower() == "data:"
