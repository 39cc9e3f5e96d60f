"""The web page on a port of its own, and a real Chromium in front of it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Counts the questions and their answers: the button that stops an answer comes and goes, perhaps
# before a test can look.
_COUNT_ANSWERS = """
window.questions = window.answers = window.answersSeen = 0;
let answering = false;
new MutationObserver(() => {
  const now = document.querySelector("#box .stop-button") !== null;
  if (!answering && now) window.questions += 1;
  if (answering && !now) window.answers += 1;
  answering = now;
}).observe(document.body, { childList: true, subtree: true });
"""

CHROMIUM = shutil.which("chromium")


@contextmanager
def served(page: Any, **options: Any) -> Iterator[str]:
    """Serve a page of `create_page`; yield its address. ``options`` are those of `mount_page`."""
    import uvicorn
    from fastapi import FastAPI

    from edgevl.page import mount_page

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    mount_page(app, page, **options)
    config = uvicorn.Config(app, port=0, log_level="critical", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.02)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}/"
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def chromium() -> Iterator[Any]:
    """Start Chromium; yield Playwright's browser."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield browser
        finally:
            browser.close()


def open_page(browser: Any, url: str, **options: Any) -> Any:
    """Open the page in a tab of its own; ``options`` are those of Playwright's ``new_context``."""
    tab = browser.new_context(**options).new_page()
    tab.set_default_timeout(20_000)
    tab.goto(url)
    tab.wait_for_selector("#box textarea")
    tab.evaluate(_COUNT_ANSWERS)
    return tab


def attach(tab: Any, *paths: Path) -> None:
    """Choose files, and wait until they stand in the box."""
    before = tab.locator("#box .thumbnail-item").count()
    tab.set_input_files("#box input[type=file]", [str(path) for path in paths])
    tab.wait_for_function(
        f"document.querySelectorAll('#box .thumbnail-item').length >= {before + len(paths)}"
    )


def playwright_timeout() -> type[Exception]:
    """Return what Playwright raises; it is installed only where there are tests of pages."""
    from playwright.sync_api import TimeoutError

    return TimeoutError


def ask(tab: Any, question: str) -> None:
    """Type a question, and send it until it is taken.

    While what was sent before is being wound up, Gradio leaves the question where it is.
    """
    asked = tab.evaluate("window.questions")
    tab.fill("#box textarea", question)
    for _ in range(60):
        tab.press("#box textarea", "Enter")
        try:
            tab.wait_for_function(f"window.questions > {asked}", timeout=1000)
        except playwright_timeout():
            continue
        return
    raise AssertionError("the question was not taken")


def answered(tab: Any) -> None:
    """Wait until the next answer is complete, or the one that has been asked for."""
    tab.wait_for_function("window.answers > window.answersSeen")
    tab.evaluate("window.answersSeen = window.answers")
