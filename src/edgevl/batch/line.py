"""One line of a batch's file: JSON to what is asked about which pictures and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgevl.errors import PromptError
from edgevl.json_input import parse_object
from edgevl.options import OPTIONS
from edgevl.preprocess.video import MAX_SAMPLED

#: What a line may have.
FIELDS = (
    "id", "image", "images", "video", "videos", "frames", "question", "system", *OPTIONS,
)  # fmt: skip
#: Longest question or system message, in bytes of UTF-8.
MAX_TEXT_BYTES = 1 << 20


def parse_line(
    line: bytes, number: int, directory: Path, question: str | None
) -> tuple[dict[str, Any], str]:
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
        The fields of a `Row` that could be read, ``id`` always, and what is wrong with the line or
        an empty text.
    """
    known: dict[str, Any] = {"id": f"line {number}"}
    where = f"line {number}"
    try:
        value = parse_object(line, where, PromptError)
        _read(value, directory, question, known)
    except PromptError as error:
        return known, str(error)
    except ValueError as error:
        return known, f"{where}: {error}"
    return known, ""


def _read(
    value: dict[str, Any], directory: Path, question: str | None, known: dict[str, Any]
) -> None:
    """Fill ``known``; a ValueError says what is wrong."""
    fields = {name: each for name, each in value.items() if each is not None}
    _read_sources(fields, directory, known)
    if "id" in fields:
        known["id"] = _id(fields["id"])
    if unknown := [name for name in fields if name not in FIELDS]:
        raise ValueError(f"unknown field {unknown[0][:80]!r}; a line has {', '.join(FIELDS)}")
    for one, several in (("image", "images"), ("video", "videos")):
        if one in fields and several in fields:
            raise ValueError(f"has both `{one}` and `{several}`; give one of them")
    if "sources" not in known and "video_sources" not in known:
        raise ValueError("has no `image` or `video`; to ask without them write `images`: []")
    if "question" in fields:
        known["question"] = _text(fields["question"], "question")
    elif question is not None:
        known["question"] = question
    else:
        raise ValueError("has no `question`, and there is none for all lines (--question TEXT)")
    options: dict[str, Any] = {}
    if "system" in fields:
        options["system"] = _text(fields["system"], "system")
    if "frames" in fields:
        options["frames"] = _count(fields["frames"], "frames", MAX_SAMPLED)
    try:
        options |= {name: OPTIONS[name].check(fields[name]) for name in OPTIONS if name in fields}
    except PromptError as error:
        raise ValueError(error) from None
    known["options"] = options


def _read_sources(fields: dict[str, Any], directory: Path, known: dict[str, Any]) -> None:
    # Pictures last: a row is called after the first of them.
    for kind, sources in (("video", "video_sources"), ("image", "sources")):
        names = [fields[kind]] if kind in fields else fields.get(f"{kind}s")
        if names is None:
            continue
        if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
            raise ValueError(f"`{kind}` must be a path or data: URL, `{kind}s` a list of them")
        known[f"{kind}s"] = tuple(map(_shown, names))
        known[sources] = tuple(_source(name, directory) for name in names)
        if names and not _is_data(names[0]):
            known["id"] = names[0]


def _is_data(name: str) -> bool:
    return name[:5].lower() == "data:"


def _shown(name: str) -> str:
    return name.partition(",")[0][:80] + ",…" if _is_data(name) else name


def _source(name: str, directory: Path) -> str | Path:
    if _is_data(name) or name.lower().startswith(("http://", "https://")):
        return name  # nothing is fetched, and reading it says so
    # A path even where it is "-", which as a text would mean standard input.
    return Path(name) if name.startswith("~") else directory / name


def _id(value: object) -> str | int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    return _text(value, "id")


def _count(value: object, field: str, most: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise ValueError(f"`{field}` must be a whole number, 1 to {most}")
    return value


def _text(value: object, field: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{field}` must be a text, not empty")
    try:
        size = len(value.encode())
    except UnicodeEncodeError:  # which JSON can spell and no tokenizer can read
        raise ValueError(f"`{field}` has half a surrogate pair") from None
    if size > MAX_TEXT_BYTES:
        raise ValueError(f"`{field}` is over the limit of {MAX_TEXT_BYTES >> 20} MiB")
    return value
