"""The table and the picture of a comparison, from the content of results.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    machine = results["machine"]
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads, {results['date']}; {results['model']}; "
        f"medians of {results['rounds']} interleaved rounds."
    ]
    lines += rates(machine)
    prompts = " / ".join(map(str, results["prompt_tokens"]))
    lines += [
        "",
        f"| stack | prefill {prompts}, ms | decode after {results['after']}, tokens/s | tile, ms "
        "| tile and 300 tokens, ms | peak RSS, MB | load, ms | error of logits / features |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for stack in results["stacks"]:
        medians, error = stack["medians"], stack["relative_error"]
        prefill = [number(medians.get(f"prefill {n}"), ".0f") for n in results["prompt_tokens"]]
        decode = medians.get("decode")
        whole = stack["text"] and stack["vision"]  # memory of a part says nothing
        cells = [
            stack["name"],
            " / ".join(prefill),
            number(decode and 1000 / decode, ".1f"),
            number(medians.get("vision"), ".0f"),
            number(medians.get("first token"), ".0f"),
            number(stack["peak_rss_bytes"] / 1e6 if whole else None, ".0f"),
            number(stack["load_ms"], ".0f"),
            f"{number(error.get('logits'), '.1%')} / {number(error.get('features'), '.1%')}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    if results["unavailable"]:
        lines += ["", "Not measured:"]
        lines += [f"- {name}: {reason}" for name, reason in results["unavailable"].items()]
    return "\n".join(lines) + "\n"


def rates(machine: dict[str, Any]) -> list[str]:
    """Return the line that says the machine's own rates; none where they were not measured."""
    if machine["read_bandwidth_gb_s"] is None:
        return []
    low, high = machine["read_bandwidth_range"]
    return [
        f"In the same run: read bandwidth {machine['read_bandwidth_gb_s']:.1f} GB/s "
        f"({low:.1f} to {high:.1f}), int8 {machine['int8_gops']:.0f} GOPS."
    ]


def number(value: float | None, form: str) -> str:
    """Return a figure, or a dash for what was not measured."""
    return "–" if value is None else format(value, form)


def _rate(rate: float) -> str:
    """Three digits, or all of a whole number; nothing for what was not measured."""
    return "" if rate == 0 else f"{rate:.3g}" if rate < 1000 else f"{rate:.0f}"


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw a bar for each stack, a chart for each step, longer is faster.

    Without matplotlib nothing is drawn, and a line says so.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("no picture: matplotlib is missing (pip install 'edgevl[bench]')")
        return
    charts = [
        *(
            (f"prefill {n}", f"prefill of {n}, tokens/s", 1000 * n)
            for n in results["prompt_tokens"]
        ),
        ("decode", f"decode after {results['after']}, tokens/s", 1000),
        ("vision", "tiles/s", 1000),
    ]
    stacks = list(reversed(results["stacks"]))
    figure = Figure(figsize=(3 * len(charts) + 3, 0.4 * len(stacks) + 1), layout="constrained")
    for axes, (step, title, scale) in zip(
        figure.subplots(1, len(charts), sharey=True, squeeze=False)[0], charts, strict=True
    ):
        rates = [scale / s["medians"][step] if step in s["medians"] else 0 for s in stacks]
        colours = ["tab:blue" if s["peer"] == "edgevl" else "0.7" for s in stacks]
        bars = axes.barh([s["name"] for s in stacks], rates, color=colours)
        axes.bar_label(bars, [_rate(rate) for rate in rates], fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.margins(x=0.18)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
