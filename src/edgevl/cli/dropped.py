"""Pictures and videos named in a line, as terminals write the paths of files dropped on them."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

#: A path between quotes, with ``\'`` between two quoted parts for a quote in it, or a word, whose
#: blanks are escaped. An apostrophe within a word quotes nothing.
_WORD = re.compile(r"""(?<!\S)(?:'(?:[^']|'\\'')+'|"[^"]+"|(?:\\.|[^\s\\])+)""", re.DOTALL)


def unquoted(text: str) -> str:
    """Return the path that ``text`` stands for: quoted, with escaped blanks, a URL, or itself."""
    if text[:1] in ("'", '"') and text[-1:] == text[0] and len(text) > 1:
        return text[1:-1].replace(r"'\''", "'")
    if text[:7].lower() == "file://":
        return unquote("/" + text[7:].partition("/")[2])  # without the host
    return re.sub(r"\\(.)", r"\1", text)


def find_files(line: str, suffixes: tuple[str, ...]) -> tuple[str, list[str]]:
    """Find the existing files with one of ``suffixes`` in a line.

    Args:
        line: what was typed, pasted or dropped; it may have several lines.
        suffixes: how their names end, in lower case.

    Returns:
        The question, and the paths. Paths at the line's beginning and end are no part of the
        question; of one in its middle the file's name is left.
    """
    if path := _existing(line, suffixes):  # blanks and quotes may be in the name itself
        return "", [path]
    found = [
        (match, path)
        for match in _WORD.finditer(line)
        if (path := _existing(unquoted(match[0]), suffixes))
    ]
    begin, end = 0, len(line)
    for match, _ in found:
        if not line[begin : match.start()].strip():
            begin = match.end()
    for match, _ in reversed(found):
        if match.start() >= begin and not line[match.end() : end].strip():
            end = match.start()
    question, position = "", begin
    for match, path in found:
        if begin <= match.start() and match.end() <= end:
            question += line[position : match.start()] + Path(path).name
            position = match.end()
    return (question + line[position:end]).strip(), [path for _, path in found]


def _existing(text: str, suffixes: tuple[str, ...]) -> str | None:
    """Return the path of a file with one of ``suffixes``; ``~`` is the user's home."""
    if not text.lower().endswith(suffixes):
        return None
    try:
        path = Path(text).expanduser()
        return str(path) if path.is_file() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL, nobody's home
        return None
