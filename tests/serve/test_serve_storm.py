"""Many clients, some of them broken or hostile, at a server in a process of its own."""

import asyncio
import os
import re
import signal
import statistics
import subprocess
import sys

import pytest

pytest.importorskip("fastapi", reason="needs edgevl[serve]")

import server_bodies
from server_storm import fill, storm

#: The server's limit.
MAX_BODY = 10**6
CONTEXT = 512


@pytest.fixture
def server(tmp_path, request):
    """Start ``edgevl serve tiny``; yield its address and process. The parameter is megabytes."""
    log = tmp_path / "log"
    options = ["--port", "0", "--max-request-mb", str(request.param), "--threads", "1", "--no-ui"]
    options += ["--context", str(CONTEXT)]
    environment = {**os.environ, "LC_ALL": "C.UTF-8"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgevl", "serve", "tiny", *options],
            stderr=subprocess.PIPE,
            stdout=output,
            env=environment,
        )
        try:
            line = process.stderr.readline().decode()
            address = re.search(r"http://[\d.]+:\d+", line).group()
            # Read on, or the server would wait for the pipe.
            with subprocess.Popen(["cat"], stdin=process.stderr, stdout=output):
                try:
                    yield address, process, log
                finally:
                    process.kill()  # or what is read has no end
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("server", [1], indirect=True)
def test_a_storm(server):
    address, process, log = server
    # What 16 sequences and the caches of pictures take, they take once.
    asyncio.run(fill(address, CONTEXT))
    asyncio.run(storm(address, process.pid, 500, max_body=MAX_BODY, seed=1))
    found = asyncio.run(storm(address, process.pid, 500, max_body=MAX_BODY))
    assert found.wrong == []
    assert sum(found.outcomes.values()) == 500
    third = len(found.rss_bytes) // 3
    before, after = (
        statistics.median(part) for part in (found.rss_bytes[:third], found.rss_bytes[-third:])
    )
    assert after < 1.05 * before
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    logged = log.read_text()
    assert "Traceback" not in logged
    assert "plus" not in logged  # a word of the questions


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("server", [8], indirect=True)
def test_no_body_holds_the_others_up(server):
    # Without limits some of these took gigabytes, and a minute in which nobody else was answered.
    # How long others wait depends on the machine: `server_bodies.py` measures it.
    address, process, log = server
    limit, plain = 8 * 10**6, server_bodies.PLAIN_LIMIT
    for name, size in (
        ("text of escaped emoji", limit),
        ("text of Chinese", plain),
        ("objects", limit),
        ("messages of parts", plain),
        ("a tool's parameters", plain // 4),
        ("prompt of ids", plain // 4),
        ("a picture of percent signs", limit),
        ("a picture of bad base64", limit),
    ):
        path = server_bodies.COMPLETIONS if name.startswith("prompt") else server_bodies.CHAT
        data = server_bodies.request(path, server_bodies.SHAPES[name](size))
        found = server_bodies.sent_at_once(address, process.pid, data)
        assert found.wrong == []
        assert sum(found.statuses.values()) == 16
        assert found.statuses.keys() <= {400, 413, 429}, name
        assert found.peak_bytes - found.before_bytes < 300e6, name
        assert found.health_s < 30, name
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert "Traceback" not in log.read_text()
