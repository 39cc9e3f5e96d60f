"""Write docs/demo.svg: pictures, and what `edgevl chat` really answered about them.

    python docs/make_demo_svg.py [DIRECTORY]

DIRECTORY is where the file goes instead of docs.
"""

from __future__ import annotations

import base64
import html
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: Picture, questions about it, and whether to show the picture with the answer's boxes drawn.
SCENES = [
    ("examples/meter.png", ["What number is on the display?", "显示屏上的数字是多少？"], False),
    ("examples/shapes.png", ["Where is the purple star?"], True),
]
MONO = "ui-monospace, 'SF Mono', Menlo, Consolas, 'DejaVu Sans Mono', 'Noto Sans CJK SC', monospace"
WIDTH, PICTURE, LINE, PAD = 960, 200, 22, 20


def ask(picture: str, question: str, drawing: Path | None) -> str:
    """Return the answer of the shipped model; write its boxes to ``drawing``."""
    command = ["chat", "tiny", "-q", question, "-i", picture]
    if drawing:
        command += ["--draw-boxes", str(drawing)]
    done = subprocess.run(
        [sys.executable, "-m", "edgevl", *command],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.strip()


def text(x: int, y: int, content: str, colour: str) -> str:
    """Return one line of terminal text."""
    return (
        f'<text x="{x}" y="{y}" fill="{colour}" xml:space="preserve">{html.escape(content)}</text>'
    )


def scene(top: int, picture: str, questions: list[str], boxes: bool) -> tuple[int, str]:
    """Draw a picture and its questions from ``top`` on: the height used, the SVG."""
    left = PAD + PICTURE + PAD
    parts = []
    shown = ROOT / picture
    y = top + LINE
    with tempfile.TemporaryDirectory() as folder:
        drawing = Path(folder) / "found.png" if boxes else None
        for question in questions:
            command = f'edgevl chat tiny -q "{question}" -i {picture}'
            command += " --draw-boxes found.png" if boxes else ""
            print(f"$ {command}", file=sys.stderr)
            parts.append(text(left, y, f"$ {command}", "#8b949e"))
            for line in ask(picture, question, drawing).splitlines():
                y += LINE
                parts.append(text(left, y, line, "#e6edf3"))
            y += 2 * LINE
        data = base64.b64encode((drawing or shown).read_bytes()).decode()
    parts.append(
        f'<image x="{PAD}" y="{top}" width="{PICTURE}" height="{PICTURE}" '
        f'preserveAspectRatio="xMidYMin meet" href="data:image/png;base64,{data}"/>'
    )
    height = PICTURE * 3 // 4  # the examples are 4:3
    return max(height, y - top - LINE), "\n".join(parts)


def main() -> None:
    """Ask everything and write the file."""
    top, body = PAD + 10, []
    for picture, questions, boxes in SCENES:
        height, svg = scene(top, picture, questions, boxes)
        body.append(svg)
        top += height + PAD
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" '
        f'viewBox="0 0 {WIDTH} {top}" font-family="{MONO}" font-size="13">\n'
        f'<rect width="{WIDTH}" height="{top}" rx="10" fill="#0d1117"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    (directory / "demo.svg").write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main()
