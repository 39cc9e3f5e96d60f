"""The report of a quantization: ``report.json`` for programs, ``report.html`` for people."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

#: Width of a layer's bar and of the gap after it, in the units of a chart.
BAR, GAP = 8, 2
#: Height of a chart, likewise.
HEIGHT = 60

#: What the page shows for a figure that is not known.
UNKNOWN = "–"


def write_report(report: Mapping[str, Any], directory: Path) -> dict[str, Any]:
    """Write ``report.json`` and ``report.html`` to a directory, which is made if need be.

    The page needs nothing else: no network, no JavaScript. Texts in the report are untrusted.

    Args:
        report: ``edgevl``, ``model``, ``created``, ``seconds``, ``peak_rss_bytes``, ``machine``,
            ``settings``, ``calibration``, ``sizes``, ``text``, ``vision``, ``perplexity``,
            ``conversations``, ``vqa``, ``examples``, as docs/quantization.md lists them; all but
            ``settings`` and ``sizes`` may be None or missing. ``perplexity`` and ``conversations``
            may have ``arithmetic``: ``float`` (the default, quantized weights in float arithmetic)
            or ``engine``. Numbers that are not finite are written as null.
        directory: where to.

    Returns:
        What ``report.json`` has.

    Raises:
        OSError: the files cannot be written.
    """
    plain: dict[str, Any] = _plain(report)
    page = render_report(plain)
    text = json.dumps(plain, ensure_ascii=False, allow_nan=False, indent=1)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "report.json").write_text(text + "\n", "utf-8")
    (directory / "report.html").write_text(page, "utf-8")
    return plain


def render_report(report: Mapping[str, Any]) -> str:
    """Return the page for a report of plain JSON types."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": _size,
        "number": _number,
        "percent": _percent,
        "change": _change,
        "duration": _duration,
        "value": _value,
    }
    text, vision = report.get("text") or {}, report.get("vision") or {}
    return environment.get_template("report.html.jinja").render(
        r=report,
        text_charts=charts(
            (f"{layer['layer']}.{layer['name']}", layer.get("rtn_error"), layer.get("error"))
            for layer in text.get("layers") or ()
        ),
        vision_charts=charts(
            (layer["name"], layer.get("plain_error"), layer.get("error"))
            for layer in vision.get("layers") or ()
        ),
        height=HEIGHT,
        bar=BAR,
    )


def charts(
    errors: Iterable[tuple[str, float | None, float | None]],
) -> list[dict[str, Any]]:
    """Arrange errors as bar charts, one for each kind of linear layer, all of one size and scale.

    Args:
        errors: name, error before and after; ``0.self_attn.q_proj`` and ``layers.1.attn.qkv`` are
            bars of the charts ``self_attn.q_proj`` and ``attn.qkv``. Names without a number are
            bars of one chart without a name.

    Returns:
        For each chart ``name``, ``width``, ``top`` (the error at full height) and ``bars``: each
        with ``x``, ``name``, the errors ``before`` and ``after``, and their heights.
    """
    rows = list(errors)
    top = max((error for _, *pair in rows for error in pair if error is not None), default=0.0)
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, before, after in rows:
        match = re.fullmatch(r"(?:.*?\.)?\d+\.(.+)", name)
        bars = groups.setdefault(match[1] if match else "", [])
        heights = [HEIGHT * (error or 0.0) / top if top else 0.0 for error in (before, after)]
        bars.append(
            {
                "name": name,
                "x": len(bars) * (BAR + GAP),
                "before": before,
                "after": after,
                "before_height": heights[0],
                "after_height": heights[1],
            }
        )
    width = max((len(bars) for bars in groups.values()), default=0) * (BAR + GAP) - GAP
    return [
        {"name": name, "bars": bars, "top": top, "width": width} for name, bars in groups.items()
    ]


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON has it: NumPy's numbers as numbers, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


# --- how figures are written -----------------------------------------------------------------


def _size(count: float | None) -> str:
    """Write bytes in decimal units, after a space that does not break."""
    if not isinstance(count, (int, float)):
        return UNKNOWN
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            digits = 2 if count < 10 * scale else 1 if count < 100 * scale else 0
            return f"{count / scale:.{digits}f}\u00a0{unit}"
    return f"{count:.0f}\u00a0B"


def _number(value: float | None, digits: int = 3) -> str:
    """Write a number with some significant digits, or a whole one with separators."""
    if not isinstance(value, (int, float)):
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    return f"{value:.{max(digits - 1 - math.floor(math.log10(abs(value))), 0)}f}"


def _percent(share: float | None, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%" if isinstance(share, (int, float)) else UNKNOWN


def _change(after: float | None, before: float | None) -> str:
    """Write by how many percent a figure changed."""
    if not isinstance(after, (int, float)) or not isinstance(before, (int, float)) or not before:
        return UNKNOWN
    return f"{100 * (after / before - 1):+.1f}%".replace("-", "−")


def _duration(seconds: float | None) -> str:
    if not isinstance(seconds, (int, float)):
        return UNKNOWN
    hours, rest = divmod(round(seconds), 3600)
    minutes, rest = divmod(rest, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _value(value: Any) -> str:
    """Write a setting."""
    if value is None or value == []:
        return UNKNOWN
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
