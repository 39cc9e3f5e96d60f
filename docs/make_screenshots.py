"""Write docs/page-*.png: the web page in Chromium, answered by the shipped model.

    python docs/make_screenshots.py [DIRECTORY]

DIRECTORY is where the pictures go instead of docs.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from PIL import Image

import edgevl
from edgevl.page import create_page

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))

from page_browser import answered, ask, attach, chromium, open_page, served  # noqa: E402
from repository import EXAMPLES  # noqa: E402

COLOURS = 128


def save(tab: Any, path: Path) -> None:
    """Write what the tab shows, with a palette."""
    tab.mouse.move(0, 0)
    tab.wait_for_timeout(700)  # scrolling and the side panel move
    with Image.open(io.BytesIO(tab.screenshot())) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


def main() -> None:
    """Hold three conversations."""
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs"
    directory.mkdir(parents=True, exist_ok=True)
    model = edgevl.load("tiny")
    tiles = model.checkpoint.config.max_tiles
    page = create_page(model.chat, "EdgeVL · tiny", model.engine.max_context, max_tiles=tiles)
    with served(page) as url, chromium() as browser:
        wide = {"viewport": {"width": 1000, "height": 660}}
        tab = open_page(browser, url, locale="en-US", **wide)
        attach(tab, EXAMPLES / "meter.png")
        ask(tab, "What number is on the display?")
        answered(tab)
        tab.click(".toggle-button")
        save(tab, directory / "page-en.png")

        tab = open_page(browser, url, locale="zh-CN", color_scheme="dark", **wide)
        attach(tab, EXAMPLES / "shapes.png")
        ask(tab, "紫色的五角星在哪里？")
        answered(tab)
        save(tab, directory / "page-zh-dark.png")

        phone = {"viewport": {"width": 375, "height": 667}, "is_mobile": True, "has_touch": True}
        tab = open_page(browser, url, locale="en-US", device_scale_factor=2, **phone)
        attach(tab, EXAMPLES / "word.png")
        ask(tab, "What is the word?")
        answered(tab)
        save(tab, directory / "page-phone.png")


if __name__ == "__main__":
    main()
