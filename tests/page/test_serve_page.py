"""The page of a server: at ``/``, beside the API, with its model, queue and key."""

import asyncio
import logging
import os
import re
import subprocess
import sys
import time

import httpx2
import pytest
from fastapi import FastAPI
from starlette.responses import StreamingResponse

import edgevl
from page_browser import CHROMIUM, answered, ask, attach, chromium, open_page
from repository import EXAMPLES
from running_server import serving, wait_until

pytest.importorskip("gradio", reason="the page needs Gradio")


def load():
    return edgevl.load("tiny", threads=1)


def page_maker(key=None):
    from edgevl.page import page_app

    return lambda model, scheduler: page_app(model, scheduler, "tiny", key)


def opened(url):
    """Wait for the page, which comes after the model."""
    wait_until(lambda: httpx2.get(url).status_code != 503, 30)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_conversation_beside_the_api(capfd):
    pytest.importorskip("playwright", reason="the browser is driven by Playwright")
    with serving(load, make_page=page_maker()) as server, chromium() as browser:
        opened(server.url)
        tab = open_page(browser, server.url + "/")
        attach(tab, EXAMPLES / "meter.png")
        ask(tab, "What number is on the display?")
        answered(tab)
        assert "7305" in tab.inner_text("#chat")
        assert httpx2.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "tiny"
        metrics = httpx2.get(f"{server.url}/metrics").text
        assert 'route="page",status="200"' in metrics
        begun = time.monotonic()
        server.server.should_exit = True
        wait_until(lambda: not server.service.ready, 5)
    # The open tab holds nobody up.
    assert time.monotonic() - begun < 8


def test_the_page_wants_the_key_too():
    with serving(load, make_page=page_maker("secret"), api_key="secret") as server:
        opened(server.url)
        with httpx2.Client(base_url=server.url) as browser:
            assert browser.get("/gradio_api/info").status_code in (401, 404)
            wrong = browser.post("/login", data={"username": "me", "password": "guess"})
            assert wrong.status_code == 400
            right = browser.post("/login", data={"username": "me", "password": "secret"})
            assert right.status_code == 200
            assert browser.get("/config").status_code == 200
            # The key of the page is none for the API.
            assert browser.get("/v1/models").status_code == 401
        assert httpx2.get(f"{server.url}/config").status_code == 401


def test_the_command_gives_the_page_its_key():
    with subprocess.Popen(
        [sys.executable, "-m", "edgevl", "serve", "tiny", "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "EDGEVL_API_KEY": "secret"},
    ) as process:
        try:
            line = process.stderr.readline()
            url = re.fullmatch(r"tiny is served at (http://\S+)/v1 .*\n", line)[1]
            opened(url)
            assert httpx2.get(f"{url}/config").status_code == 401
        finally:
            process.kill()


def test_what_is_around_the_page():
    with serving(load, make_page=page_maker()) as server:
        opened(server.url)
        page = httpx2.get(server.url)
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert "content-security-policy" not in httpx2.get(f"{server.url}/docs").headers
        large = httpx2.post(
            f"{server.url}/gradio_api/queue/join",
            content=b"[" + b" " * (9 << 20) + b"]",
            headers={"content-type": "application/json"},
        )
        assert large.status_code in (400, 413)
        # What is the API's stays the API's.
        for method, path, status in (
            ("GET", "/v1", 404),
            ("POST", "/v1/responses", 404),
            ("PUT", "/v1/models", 405),
            ("POST", "/chat/completions", 404),  # the client's base URL lacks /v1
            ("GET", "/v1/chat/completions", 405),
        ):
            response = httpx2.request(method, f"{server.url}{path}", json={})
            assert response.status_code == status
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert path in error["message"]
        named_otherwise = httpx2.get(server.url, headers={"host": "evil.example"})
        assert named_otherwise.status_code == 403


def test_before_the_model_is_there(caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    released = []

    def slowly():
        wait_until(lambda: released, 20)
        return load()

    with serving(slowly, ready=False, make_page=page_maker()) as server:
        assert httpx2.get(server.url).status_code == 503
        released.append(True)
        opened(server.url)
        assert httpx2.get(server.url).status_code == 200
        assert httpx2.get(f"{server.url}/health").status_code == 200
        wait_until(lambda: caplog.records)
        # What a page asks for would fill the log.
        assert [record.msg["route"] for record in caplog.records] == ["/health"]


def test_what_browsers_keep_open_ends_with_the_server():
    page = FastAPI()

    @page.get("/")
    async def endless():
        async def drops():
            while True:
                yield b"."
                await asyncio.sleep(0.02)

        return StreamingResponse(drops())

    with serving(load, make_page=lambda *_: page) as server:
        opened(f"{server.url}/nothing")
        with httpx2.stream("GET", server.url, timeout=5) as stream:
            drops = stream.iter_raw()
            next(drops)
            server.server.should_exit = True
            begun = time.monotonic()
            with pytest.raises(httpx2.RemoteProtocolError):
                list(drops)
        assert time.monotonic() - begun < 5
