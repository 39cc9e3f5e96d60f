"""What a Pulsar2 build prints: how far it is, how exact the result is, and why it failed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

#: Below this cosine between a compiled layer and the same layer in floats, a warning is due.
COSINE_WARNING = 0.99
#: What is printed when the layers are written, and when they have been checked.
BUILT, CHECKED = "build llm model done!", "check llm model done!"
#: Longest piece of a line that is looked at, and longest that is quoted.
_MAX_LINE, _MAX_QUOTE = 4096, 200

_COSINE = re.compile(r"([^|]*?)\s*cos_sim is: *([-+.\w]+)")
_LAYER = re.compile(r"(\w+) layer(\d+)_gt")
#: A progress bar of the `rich` library: what is done, the bar, counts.
_BAR = re.compile(r"^\s*(\w[\w .()-]*?)\W*[━╸╺]+\s+(\d+)/(\d+)")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_DECORATION = re.compile(r"^[\W_]*$")

_OUT_OF_MEMORY = re.compile(
    r"MemoryError|std::bad_alloc|[Cc]annot allocate memory|[Oo]ut of memory|^Killed\b"
)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_UNSUPPORTED = re.compile(
    r"\bop(s|erators?|_types?)?\b.*\b(un|not (yet )?)(support|implement)"
    r"|\b(un|not (yet )?)(support|implement).*\bop(s|erators?|_types?)?\b",
    re.IGNORECASE,
)


@dataclass
class BuildLog:
    """Reads the output of a build as it comes.

    Attributes:
        cosines: what was compared, such as "decode layer 0", and the cosine found.
        bar: stage, count and total of the last progress bar.
        built: whether all layers were written.
        checked: whether the check of the layers has ended.
    """

    cosines: dict[str, float] = field(default_factory=dict)
    bar: tuple[str, int, int] | None = None
    built: bool = False
    checked: bool = False
    _rest: bytes = b""

    def feed(self, data: bytes) -> None:
        """Take the next piece of the output."""
        *lines, rest = re.split(rb"[\r\n]", self._rest + data)
        for line in lines:
            self._line(_ESCAPE.sub("", line[:_MAX_LINE].decode("utf-8", "replace")))
        self._rest = rest[:_MAX_LINE]

    def _line(self, line: str) -> None:
        if match := _BAR.search(line):
            self.bar = match[1].strip(), int(match[2]), int(match[3])
        if match := _COSINE.search(line.rpartition(" - ")[2]):
            layer = _LAYER.search(match[1])
            name = f"{layer[1]} layer {layer[2]}" if layer else match[1].strip()
            try:
                self.cosines[name] = float(match[2])
            except ValueError:  # not a number: as bad as can be
                self.cosines[name] = math.nan
        self.built |= BUILT in line
        self.checked |= CHECKED in line


def low_cosines(cosines: dict[str, float]) -> Iterator[str]:
    """Yield a line for each result that differs too much from the same in floats."""
    for name, cosine in cosines.items():
        if not cosine >= COSINE_WARNING:
            yield (
                f"{name}: cosine {cosine:.4f} to the same in floats, below {COSINE_WARNING}; "
                "compare answers before you use it"
            )


def explain(log: Path, status: int) -> str:
    """Return one line on why a build failed.

    Args:
        log: its output.
        status: its exit status; negative for a signal.
    """
    last = ""
    found: dict[str, str] = {}
    with log.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, raw in enumerate(file, 1):
            line = _ESCAPE.sub("", raw.rstrip().rpartition("\r")[2][:_MAX_LINE]).strip()
            if _DECORATION.match(line) or _BAR.search(line):
                continue
            last = line
            if _DISK_FULL.search(line):
                found["disk"] = "the disk is full; free some space, then the same command goes on"
            elif _OUT_OF_MEMORY.search(line):
                found["memory"] = _memory()
            elif _UNSUPPORTED.search(line):
                found.setdefault(
                    "operator",
                    f"Pulsar2 cannot compile an operator, line {number} of {log}: {_quote(line)}",
                )
    if status in (137, -9):
        found.setdefault("memory", _memory())
    for kind in ("disk", "memory", "operator"):
        if kind in found:
            return found[kind]
    state = f"stopped by signal {-status}" if status < 0 else f"failed with status {status}"
    return f"Pulsar2 {state}{': ' + _quote(last) if last else ''} (see {log})"


def _memory() -> str:
    return (
        "Pulsar2 ran out of memory; close other programs, give Docker more memory, or lower "
        "--parallel, then the same command goes on"
    )


def _quote(line: str) -> str:
    return line if len(line) <= _MAX_QUOTE else line[:_MAX_QUOTE] + "…"
