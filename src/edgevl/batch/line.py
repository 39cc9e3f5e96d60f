"""One line of a batch's file: JSON to what is asked about which pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from edgevl.errors import PromptError
from edgevl.json_input import filled_text, parse_object
from edgevl.options import OPTIONS
from edgevl.preprocess.video import MAX_SAMPLED

#: What a line may have.
FIELDS = (
    "id", "image", "images", "video", "videos", "frames", "question", "system", *OPTIONS,
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
        options: ``system``, ``frames`` and fields of `SamplingOptions`, where the line has its own.
        error: what is wrong with the line; empty if nothing is.
    """

    id: str | int
    images: tuple[Shown, ...] = ()
    videos: tuple[Shown, ...] = ()
    question: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""


def parse_line(line: bytes, number: int, directory: Path, question: str | None) -> Row:
    """Read one line.

    It is an object with ``image`` (a path or ``data:`` URL) or ``images`` (a list of them, which
    may be empty), ``video`` or ``videos`` likewise, and where wanted ``frames`` (how many are taken
    of each video), ``question``, ``id`` (text or whole number), ``system`` and fields of
    `SamplingOptions`. Paths are relative to the file's directory.

    Args:
        line: the line, UTF-8.
        number: its number, from 1.
        directory: where the file lies.
        question: asked if the line has none.

    Returns:
        What could be read, and what is wrong with the rest.
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
        count = options["frames"] = fields["frames"]
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= MAX_SAMPLED:
            raise ValueError(f"`frames` must be a whole number, 1 to {MAX_SAMPLED}")
    known["options"] = options


def _shown(name: str, directory: Path) -> Shown:
    if _is_data(name):
        return Shown(name.partition(",")[0][:80] + ",…", name)
    if name.lower().startswith(("http://", "https://")):
        return Shown(name, name)  # nothing is fetched, and reading it says so
    return Shown(name, Path(name) if name.startswith("~") else directory / name)


def _is_data(name: str) -> bool:
    return name[:5].lower() == "data:"
