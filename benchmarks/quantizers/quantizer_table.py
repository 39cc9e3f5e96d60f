"""The table of results, and the sizes in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def directory_bytes(directory: Path) -> int:
    """Return the size of all files under a directory."""
    return sum(path.lstat().st_size for path in directory.rglob("*") if not path.is_dir())


def recovered(perplexity: float, original: float, nearest: float) -> float:
    """Return the share of what rounding to nearest loses that a method does not lose."""
    return (nearest - perplexity) / (nearest - original)


def markdown(results: dict[str, Any], original: str, nearest: str) -> str:
    """Return the table; ``original`` and ``nearest`` name the lines that others relate to."""
    stacks = {stack["name"]: stack for stack in results["stacks"]}
    windows, length = results["heldout_shape"]
    samples, tokens = results["calibration_shape"]
    lines = [
        f"4 bits, symmetric, groups of {results['group_size']}; calibrated on {samples} x {tokens} "
        f"tokens, measured on {windows} x {length}.",
        "",
        "| | perplexity | recovered | minutes | CPU minutes | peak RSS | environment, MB "
        "| beyond PyTorch and transformers, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, stack in stacks.items():
        share = "–"
        if name not in {original, nearest} and {original, nearest} <= set(stacks):
            ends = (stacks[original]["perplexity"], stacks[nearest]["perplexity"])
            share = f"{recovered(stack['perplexity'], *ends):.0%}"
        size = stack.get("environment_bytes")
        cells = [
            f"{stack['perplexity']:.3f}",
            share,
            _number(stack.get("wall_s"), 60),
            _number(stack.get("cpu_s"), 60),
            _number(stack.get("peak_rss_bytes"), 1e9, " GB"),
            _number(size, 1e6, digits=0),
            _number(size and max(size - results["base_bytes"], 0), 1e6, digits=0),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if results["unavailable"]:
        lines += ["", "Not measured:", ""]
        lines += [f"- {name}: {reason}" for name, reason in results["unavailable"].items()]
    return "\n".join(lines) + "\n"


def _number(value: float | None, unit: float, suffix: str = "", digits: int = 1) -> str:
    return "–" if value is None else f"{value / unit:.{digits}f}{suffix}"
