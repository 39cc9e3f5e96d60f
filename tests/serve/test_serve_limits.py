"""What goes wrong between client and server: broken requests, clients that leave, limits, ends."""

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from http.client import HTTPResponse
from types import SimpleNamespace

import httpx2
import numpy as np
import pytest
from pydantic import ValidationError

import edgevl
from edgevl import cli
from edgevl.errors import CheckpointError, EdgeVLError, ImageError, PromptError, QueueFullError
from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Answer, Timings, Usage
from edgevl.generate.sampling import SamplingParams, TokenLogprobs
from edgevl.serve.requests import ChatRequest, CompletionRequest
from edgevl.serve.responses import TokenTexts
from edgevl.serve.service import Service
from edgevl.serve.settings import Settings
from edgevl.serve.telemetry import log_to_stderr
from running_server import METER, ScriptedScheduler, picture, serving, text, user, wait_until

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def model():
    return edgevl.load("tiny", threads=1)


@pytest.fixture
def scripted(model, monkeypatch):
    """A function (**settings) -> a server whose answers the test gives, by `scheduler`."""
    monkeypatch.setattr("edgevl.serve.service.Scheduler", ScriptedScheduler)
    return lambda **settings: serving(lambda: model, **settings)


@pytest.fixture
def server(scripted):
    with scripted() as running:
        yield running


def body(**more):
    return {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], **more}


class Asking:
    """A request in a thread of its own."""

    def __init__(self, running, path=CHAT, **more):
        self.client = httpx2.Client(base_url=running.url, timeout=20)
        self._thread = threading.Thread(target=self._ask, args=(path, body(**more)))
        self._thread.start()

    def _ask(self, path, body):
        self._response = self.client.post(path, json=body)

    def response(self):
        self._thread.join(20)
        return self._response

    def events(self):
        lines = [line for line in self.response().text.split("\n\n") if line]
        assert all(line.startswith("data: ") for line in lines)
        return [
            line if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))
            for line in lines
        ]


def test_thinking_and_logprobs(server):
    asking = Asking(server, logprobs=True, top_logprobs=2, enable_thinking=True)
    job = server.service.scheduler.next()
    assert job.top_logprobs == 2
    assert "<think>" in server.service.scheduler.prompts.tokenizer.decode(
        job.prompt.token_ids, skip_special_tokens=False
    )
    job.say("Hm", thinking=True, token_id=5)
    job.say("Yes", token_id=7)
    job.end("Yes", "Hm")
    choice = asking.response().json()["choices"][0]
    assert choice["message"]["content"] == "Yes"
    assert choice["message"]["reasoning_content"] == "Hm"
    first, second = choice["logprobs"]["content"]
    assert first["logprob"] == -0.5
    assert first["token"] == server.service.scheduler.prompts.tokenizer.decode([5])
    assert bytes(first["bytes"]).decode() == first["token"]
    assert [top["logprob"] for top in second["top_logprobs"]] == [-0.5, -9999.0]


def test_thinking_and_logprobs_in_a_stream(server):
    asking = Asking(server, stream=True, logprobs=True)
    job = server.service.scheduler.next()
    assert job.top_logprobs == 0
    job.say("Hm", thinking=True)
    job.say("")  # half a character
    job.say("Yes")
    job.end("Yes", "Hm")
    *events, done = asking.events()
    assert done == "data: [DONE]"
    deltas = [event["choices"][0]["delta"] for event in events]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[1:] == [{"reasoning_content": "Hm"}, {"content": ""}, {"content": "Yes"}, {}]
    logprobs = [event["choices"][0]["logprobs"] for event in events]
    assert [len(found["content"]) for found in logprobs[1:-1]] == [1, 1, 1]


def test_completions_with_logprobs(server):
    ids = server.service.scheduler.prompts.tokenizer.encode("ab", add_special_tokens=False).ids
    with httpx2.Client(base_url=server.url, timeout=20) as client:
        threading.Thread(target=lambda: answer(server.service.scheduler.next(), ids)).start()
        request = {"model": "tiny", "prompt": "Hello", "logprobs": 1}
        choice = client.post("/v1/completions", json=request).json()["choices"][0]
    assert choice["text"] == "ab"
    logprobs = choice["logprobs"]
    tokens = logprobs["tokens"]
    assert "".join(tokens) == "ab"
    assert logprobs["text_offset"] == [len("".join(tokens[:i])) for i in range(len(ids))]
    assert logprobs["token_logprobs"] == [-0.5] * len(ids)
    assert logprobs["top_logprobs"][0] == {tokens[0]: -0.5}


def test_offsets_of_tokens_that_are_parts_of_characters(model):
    tokenizer = model.prompts.tokenizer
    said = "a\U0001f642b\u9f98\U00013000c"
    ids = tokenizer.encode(said, add_special_tokens=False).ids
    hidden = tokenizer.token_to_id("<|im_start|>")
    ids = [*ids[:1], hidden, *ids[1:]]
    texts = TokenTexts(tokenizer)
    found = texts.completion([TokenLogprobs(token_id, -0.5, ()) for token_id in ids], 10)
    assert len(ids) > len(said) + 1  # some are parts
    so_far = b""
    for token_id, offset in zip(ids, found.text_offset, strict=True):
        assert offset == 10 + len(so_far.decode(errors="ignore"))
        so_far += b"" if token_id == hidden else texts.bytes(token_id)
    assert so_far.decode() == said


def answer(job, ids):
    job.say("ab", token_id=ids[0])
    for token_id in ids[1:]:
        job.say("", token_id=token_id)
    job.end("ab")


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_stops_the_computation(server, stream, caplog):
    """A raw connection, closed while the answer is under way."""
    caplog.set_level(logging.INFO, "edgevl.serve")
    data = json.dumps(body(stream=stream, n=2)).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        jobs = [server.service.scheduler.next() for _ in range(2)]
        jobs[0].say("I")
        if stream:
            assert b"200 OK" in client.recv(4096)
        assert not any(job.cancelled for job in jobs)
    started = time.monotonic()
    wait_until(lambda: all(job.cancelled for job in jobs))
    assert time.monotonic() - started < 2
    wait_until(lambda: caplog.records)
    line = caplog.records[-1].msg
    assert line["aborted"] == "client"
    assert line["status"] == (200 if stream else 499)


def test_who_leaves_while_an_answer_is_queued_stops_it(server, monkeypatch):
    scheduler = server.service.scheduler
    begun, go = threading.Event(), threading.Event()
    submit = scheduler.submit

    def slowly(*arguments):
        begun.set()
        go.wait(10)
        return submit(*arguments)

    monkeypatch.setattr(scheduler, "submit", slowly)
    data = json.dumps(body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with socket.create_connection(server.url.removeprefix("http://").split(":")) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
        assert begun.wait(10)
        assert httpx2.get(f"{server.url}/health").status_code == 200  # nobody else waits
    time.sleep(0.1)
    go.set()
    job = scheduler.next()
    wait_until(lambda: job.cancelled)


def test_a_refused_request_keeps_no_pictures(server):
    server.service.scheduler.refusal = QueueFullError("too many requests wait", 2.5)
    gc.collect()
    gc.disable()  # nothing may hang on to itself: one picture may have a hundred megabytes
    try:
        asked = Asking(server, messages=[user(picture(), text("?"))])
        assert asked.response().status_code == 429
        held = server.service._loaded.media._held
        assert len(held) == 1
        wait_until(lambda: held[0]() is None, 2)
    finally:
        gc.enable()


def test_a_reader_that_takes_nothing_is_given_up_and_holds_nobody_up(scripted):
    with scripted(stall_s=0.5) as running:
        scheduler = running.service.scheduler
        data = json.dumps(body(stream=True)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        with socket.socket() as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            slow.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
            slow.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(data) + data)
            job = scheduler.next()
            for _ in range(100):  # 10 MB, more than any buffer of the system
                job.say("x" * 100_000)
            asking = Asking(running)
            other = scheduler.next()
            other.end("Hello")
            assert asking.response().status_code == 200
            wait_until(lambda: job.cancelled)
            stalled = 'edgevl_requests_aborted_total{reason="stalled"} 1.0'
            wait_until(lambda: stalled in httpx2.get(f"{running.url}/metrics").text)


def test_too_slow_an_answer(scripted):
    with scripted(timeout_s=0.3) as running:
        asking = Asking(running)
        job = running.service.scheduler.next()
        response = asking.response()
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        assert job.cancelled
        asking = Asking(running, stream=True)
        job = running.service.scheduler.next()
        job.say("I")
        *_, event = asking.events()
        assert event["error"]["code"] == "timeout"
        assert job.cancelled


def test_errors_of_the_engine(server, model, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    asking = Asking(server)
    fault = EdgeVLError(f"{model.checkpoint.path}: the weights are damaged")
    server.service.scheduler.next().deliver(fault)
    assert asking.response().status_code == 500
    assert asking.response().json()["error"] == {
        "message": "tiny: the weights are damaged",
        "type": "server_error",
        "param": None,
        "code": None,
    }
    asking = Asking(server)
    server.service.scheduler.next().deliver(ZeroDivisionError("/secret/path"))
    assert asking.response().status_code == 500
    assert "secret" not in asking.response().text
    assert asking.response().headers["x-request-id"]
    wait_until(lambda: "ZeroDivisionError" in str(caplog.records[-1].msg.get("error")))
    assert "secret" not in str(caplog.records[-1].msg)
    asking = Asking(server, stream=True)
    job = server.service.scheduler.next()
    job.say("I")
    job.deliver(fault)
    *_, event = asking.events()
    assert event["error"]["message"] == "tiny: the weights are damaged"
    wait_until(lambda: caplog.records[-1].msg.get("error") == "tiny: the weights are damaged")
    asking = Asking(server)
    server.service.scheduler.next().end(finish_reason="cancelled")
    assert asking.response().status_code == 503


def test_a_constraint_that_fails_on_the_way_is_the_requests_fault(server, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    fault = PromptError("constraint: it is too complex; simplify it")
    asking = Asking(server)
    server.service.scheduler.next().deliver(fault)
    assert asking.response().status_code == 400
    assert asking.response().json()["error"]["message"] == str(fault)
    asking = Asking(server, stream=True)
    job = server.service.scheduler.next()
    job.say("I")
    job.deliver(fault)
    *_, event = asking.events()
    assert event["error"]["type"] == "invalid_request_error"
    wait_until(lambda: len(caplog.records) == 2)
    assert all("error" not in record.msg for record in caplog.records)


def test_the_official_client_raises_errors_within_a_stream(server):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:

        def fail():
            job = server.service.scheduler.next()
            job.say("I")
            job.deliver(EdgeVLError("the weights are damaged"))

        threading.Thread(target=fail).start()
        with pytest.raises(openai.APIError, match="the weights are damaged"):
            list(client.chat.completions.create(**body(stream=True)))


def test_a_full_queue(server):
    server.service.scheduler.refusal = QueueFullError("too many requests wait", 2.5)
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    with client, pytest.raises(openai.RateLimitError) as error:
        client.chat.completions.create(**body())
    assert error.value.response.headers["retry-after"] == "3"
    assert error.value.code == "rate_limit_exceeded"


def test_more_answers_than_the_queue_takes_are_refused(scripted):
    with scripted(max_queue=2) as running:
        response = Asking(running, n=3).response()
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "n"


def test_more_requests_than_are_taken_at_once(scripted, monkeypatch):
    monkeypatch.setattr("edgevl.serve.middleware.EXTRA_IN_FLIGHT", 0)
    with scripted(max_queue=1) as running:
        first = Asking(running)
        job = running.service.scheduler.next()
        second = Asking(running).response()
        assert second.status_code == 429
        assert second.headers["retry-after"] == "1"
        job.end("Hello")
        assert first.response().status_code == 200
        third = Asking(running)
        running.service.scheduler.next().end("Hello")
        assert third.response().status_code == 200


def test_sizes_of_bodies(scripted):
    with (
        scripted(max_request_bytes=10_000) as running,
        httpx2.Client(base_url=running.url, timeout=20) as client,
    ):
        large = json.dumps(body(user="x" * 10_000)).encode()
        json_type = {"content-type": "application/json"}
        chunks = (large[at : at + 1000] for at in range(0, len(large), 1000))
        for content in (large, chunks):
            response = client.post(CHAT, content=content, headers=json_type)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"
        small = json.dumps(body(model="x" * 600)).encode()
        response = client.post(CHAT, content=small, headers=json_type)
        assert response.json()["error"]["param"] == "model"


@pytest.mark.parametrize(("limit", "status"), [("stall_s", 408), ("timeout_s", 504)])
def test_a_body_that_does_not_come(scripted, limit, status):
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with scripted(**{limit: 0.2}) as running, socket.socket() as client:
        client.settimeout(10)
        client.connect(("127.0.0.1", int(running.url.rpartition(":")[2])))
        client.sendall(head.encode() + b"Content-Length: 100\r\n\r\n{")
        assert f" {status} ".encode() in client.recv(4096)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "body"),
        (b"{", "JSON"),
        (b"[]", "body"),
        (b'"text"', "body"),
        (b"\xff\xfe", ""),
        (b"[" * 100_000 + b"]" * 100_000, ""),
        (b'{"model":' + b"9" * 10_000 + b"}", ""),
        (b'{"model":"tiny","messages":[{"role":"user","content":"\\ud800"}]}', ""),
        (b'{"model":"tiny","temperature":NaN,"messages":[{"role":"user","content":"a"}]}', ""),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"seed":1e400}', "seed"),
        (b'{"model":"tiny","messages":[{"role":"user","content":"a"}],"\\ud800":1}', "body"),
    ],
)
def test_broken_json(server, content, words):
    response = httpx2.post(
        f"{server.url}{CHAT}", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    "faults",
    [
        {f"field {number}": 1 for number in range(5000)},
        {"messages": [{"role": "user", "content": 5, "name": 1}] * 4096},
        {"messages": [{"role": "user", "content": [{"type": "text"}] * 1024}] * 5},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}] * 1024}] * 5},
        {"messages": [{"role": "assistant", "tool_calls": [{}] * 128}] * 40},
    ],
)
def test_faults_are_not_collected_without_end(faults):
    with pytest.raises(ValidationError) as error:
        ChatRequest.model_validate(body(**faults))
    assert error.value.error_count() < 100


def test_faults_in_token_ids_are_not_collected_without_end():
    with pytest.raises(ValidationError) as error:
        CompletionRequest.model_validate({"model": "tiny", "prompt": [[-1] * 1000] * 10})
    assert error.value.error_count() < 100


def test_a_picture_under_way_when_the_server_stops(scripted, monkeypatch):
    go, begun = threading.Event(), threading.Semaphore(0)

    def slowly(*_):
        begun.release()
        go.wait(10)
        raise ImageError("no picture")

    monkeypatch.setattr("edgevl.serve.media.prepare_picture", slowly)
    with scripted() as running:
        messages = [user(picture(), text("?"))]
        asked = [Asking(running, messages=messages) for _ in range(3)]  # one more than threads
        for _ in range(2):
            assert begun.acquire(timeout=10)
        media = running.service._loaded.media
        wait_until(lambda: media._pool._work_queue.qsize())  # the third has come
        running.server.should_exit = True
        wait_until(lambda: not running.service.scheduler.alive)
        time.sleep(0.1)
        go.set()
        answers = [asking.response() for asking in asked]
    assert {response.status_code for response in answers} <= {400, 503}
    assert all(response.json()["error"]["message"] for response in answers)


def test_what_other_parts_log_is_json_without_the_users_words(capsys):
    names = ("edgevl", "uvicorn.error", "py.warnings", "asyncio")
    hook = threading.excepthook
    before = [
        (log, log.handlers, log.level, log.propagate) for log in map(logging.getLogger, names)
    ]
    try:
        log_to_stderr()
        try:
            raise ValueError("my secret")
        except ValueError as error:
            log = logging.getLogger("edgevl.generate.scheduler")
            log.error("an answer failed", exc_info=error)
        np.float32(1) / np.float32(0)
        failing = threading.Thread(target=lambda: int("my secret"))
        failing.start()
        failing.join()
    finally:
        logging.captureWarnings(False)
        threading.excepthook = hook
        for log, log.handlers, level, log.propagate in before:
            log.setLevel(level)
    logged = capsys.readouterr().err
    messages = [json.loads(line)["message"] for line in logged.splitlines()]
    assert messages[0] == "an answer failed"
    assert "divide by zero" in messages[1]
    assert messages[2].startswith("a thread failed: ValueError at ")
    assert len(messages) == 3
    assert "secret" not in logged


@pytest.mark.parametrize(
    ("path", "said", "told"),
    [
        (
            "/srv/m",
            "/srv/m/config.json: odd. Not /srv/model",
            "tiny/config.json: odd. Not /srv/model",
        ),
        (".", "it is odd. Mend it.", "it is odd. Mend it."),
        ("m", "m: some memory; m.", "tiny: some memory; tiny."),
    ],
)
def test_the_place_of_the_model_is_not_told(path, said, told):
    service = Service(Settings(name="tiny"))
    service._path = path
    assert service.client_error(EdgeVLError(said)).detail.message == told


def test_what_pages_of_others_may_not_do(scripted):
    with scripted() as running, httpx2.Client(base_url=running.url) as client:
        plain = client.post(CHAT, content=json.dumps(body()))
        assert plain.status_code == 415
        rebound = client.get("/v1/models", headers={"host": "evil.example:8000"})
        assert rebound.status_code == 403
        for name in ("localhost", "127.0.0.1:1", "[::1]:80", "LOCALHOST:8000"):
            assert client.get("/v1/models", headers={"host": name}).status_code == 200
        asked = client.get("/v1/models", headers={"origin": "https://page.example"})
        assert "access-control-allow-origin" not in asked.headers
    with scripted(cors_origins=("https://page.example",), api_key="key") as running:
        for origin, allowed in (("https://page.example", True), ("https://x.example", False)):
            ask = {"origin": origin, "access-control-request-method": "POST"}
            ask["access-control-request-headers"] = "authorization, content-type"
            response = httpx2.options(f"{running.url}{CHAT}", headers=ask)
            assert (response.status_code == 200) is allowed
            assert ("access-control-allow-origin" in response.headers) is allowed


def test_addresses_without_anything(server):
    with httpx2.Client(base_url=server.url) as client:
        for method, path, status, words in (
            ("GET", "/v1/nothing", 404, "nothing is at /v1/nothing: the API is at /v1"),
            ("POST", "/v1/nothing", 404, "nothing is at /v1/nothing: the API is at /v1"),
            ("POST", "/chat/completions", 404, "nothing is at /chat/completions: the API is at"),
            ("GET", CHAT, 405, f"GET is not for {CHAT}: use POST"),
            ("DELETE", "/v1/models", 405, "DELETE is not for /v1/models: use GET"),
        ):
            response = client.request(method, path, json={} if method == "POST" else None)
            assert response.status_code == status
            error = response.json()["error"]
            assert error["type"] == "invalid_request_error"
            assert error["message"].startswith(words)
        assert "/docs" in client.get("/").text
        assert client.get("/docs").status_code == 200


def test_where_a_body_is_no_json(server):
    response = httpx2.post(
        f"{server.url}{CHAT}",
        content='{"model": tiny}',
        headers={"content-type": "application/json"},
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"
    assert response.json()["error"]["message"].endswith("expected ident at line 1 column 12")


@pytest.mark.parametrize(
    "origin", ["page.example", "https://page.example/", "https://Page.example", "https://*/x"]
)
def test_what_is_no_origin(origin, capsys):
    assert cli.main(["serve", "tiny", "--cors-origin", origin]) == 2
    assert f"{origin!r} is no origin; write it like https://" in capsys.readouterr().err


def test_the_log_has_no_content(server, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    words = "Zanzibar"
    messages = [user(text(words), picture(METER))]
    asking = Asking(server, messages=messages, user=words)
    job = server.service.scheduler.next()
    assert job.client == "127.0.0.1"
    job.say(words)
    job.end(words)
    asked = asking.response()

    def lines():
        return [record.msg for record in caplog.records if isinstance(record.msg, dict)]

    wait_until(lines)
    [line] = lines()
    assert line["request_id"] == asked.headers["x-request-id"]
    assert (line["route"], line["status"], line["client"]) == (CHAT, 200, "127.0.0.1")
    assert line["completion_tokens"] == 1
    assert line["duration_ms"] >= line["ttft_ms"] > 0
    assert line["finish_reason"] == "stop"
    assert "aborted" not in line
    Asking(server, messages=[{"role": words, "content": words}], **{words: words}).response()
    httpx2.get(f"{server.url}/v1/{words}")
    assert words not in str([record.msg for record in caplog.records])


def test_not_ready_while_the_model_is_loaded(model):
    go = threading.Event()

    def load():
        go.wait(10)
        return model

    with serving(load, ready=False) as running:
        try:
            assert httpx2.get(f"{running.url}/health").status_code == 200
            assert httpx2.get(f"{running.url}/ready").status_code == 503
            response = httpx2.post(f"{running.url}{CHAT}", json=body())
            assert response.status_code == 503
            assert response.headers["retry-after"]
        finally:
            go.set()
        wait_until(lambda: httpx2.get(f"{running.url}/ready").status_code == 200)
        running.service.scheduler.close(0)
        assert httpx2.get(f"{running.url}/ready").status_code == 503
        assert httpx2.post(f"{running.url}{CHAT}", json=body()).status_code == 503


def test_a_model_that_cannot_be_loaded_ends_the_server():
    def load():
        raise CheckpointError("no such model")

    with serving(load, ready=False) as running:
        wait_until(lambda: running.server.failure is not None)
        assert running.server.should_exit


def test_commands_that_cannot_be(capsys, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "tiny", "--port", str(port)]) == 1
        error = capsys.readouterr().err
        assert "Address already in use" in error
        assert error.count("\n") == 1
    assert cli.main(["serve", "tiny", "--host", "no.such.host.invalid", "--port", "0"]) == 1
    monkeypatch.setenv("EDGEVL_API_KEY", "schlüssel")
    assert cli.main(["serve", "tiny", "--port", "0"]) == 2
    assert "ASCII" in capsys.readouterr().err


# -- what is counted and logged


def numbers_of(running):
    lines = httpx2.get(f"{running.url}/metrics").text.splitlines()
    return {name: float(value) for name, value in (x.rsplit(" ", 1) for x in lines if x[0] != "#")}


def test_a_prompt_is_counted_once_however_many_answers(server):
    asking = Asking(server, n=2, messages=[user(picture(), text("?"))])
    jobs = [server.service.scheduler.next() for _ in range(2)]
    prompt = len(jobs[0].prompt.token_ids)
    for ttft_ms, job in zip((4.0, 9.0), jobs, strict=True):
        job.say("Yes")
        timings = Timings(1.0, 2.0, 3.0, ttft_ms, 5.0, 200.0)
        job.deliver(Answer("Yes", "", (5,), "stop", Usage(prompt, 0, 1, 2), timings))
    usage = asking.response().json()["usage"]
    assert usage["prompt_tokens"] == prompt
    assert usage["completion_tokens"] == 2
    assert usage["total_tokens"] == prompt + 2
    assert usage["prompt_tokens_details"]["cached_tokens"] == 2
    assert asking.response().json()["timings"]["ttft_ms"] == 4.0  # the first's
    assert asking.response().headers["cache-control"] == "no-store"


def test_what_is_counted(server, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    scheduler = server.service.scheduler
    asking = Asking(server)
    job = scheduler.next()
    job.say("Yes")
    time.sleep(0.2)
    job.say("Yes")
    job.end("YesYes")
    assert asking.response().status_code == 200
    wait_until(lambda: caplog.records)
    line = caplog.records[-1].msg
    assert line["ttft_ms"] < line["duration_ms"] - 150  # it is the first token's time
    assert (line["prompt_tokens"], line["image_tokens"]) == (len(job.prompt.token_ids), 0)
    assert (line["cached_tokens"], line["completion_tokens"]) == (2, 2)
    assert Asking(server, model="other").response().status_code == 404
    scheduler.waiting, scheduler.running = 3, 2
    wait_until(lambda: len(caplog.records) == 2)
    numbers = numbers_of(server)
    assert (numbers["edgevl_waiting"], numbers["edgevl_running"]) == (3, 2)
    for status in (200, 404):
        assert numbers[f'edgevl_requests_total{{route="{CHAT}",status="{status}"}}'] == 1
    first = numbers["edgevl_time_to_first_token_seconds_sum"]
    assert first == pytest.approx(line["ttft_ms"] / 1000, abs=0.001)
    assert numbers["edgevl_time_per_output_token_seconds_sum"] == pytest.approx(0.005)
    tokens = {"prompt": len(job.prompt.token_ids), "cached": 2, "image": 0, "completion": 2}
    for kind, number in tokens.items():
        assert numbers[f'edgevl_tokens_total{{kind="{kind}"}}'] == number


def test_an_internal_error_within_a_stream(server, caplog, capfd, monkeypatch):
    monkeypatch.delenv("EDGEVL_DEBUG", raising=False)
    caplog.set_level(logging.INFO, "edgevl.serve")
    asking = Asking(server, stream=True)
    job = server.service.scheduler.next()
    job.say("I")
    job.deliver(ZeroDivisionError("my secret"))
    *_, event = asking.events()
    assert "secret" not in str(event["error"])
    wait_until(lambda: caplog.records)
    assert "ZeroDivisionError at " in caplog.records[-1].msg["error"]
    assert caplog.records[-1].msg["aborted"] == event["error"]["type"]
    assert "secret" not in str(caplog.records[-1].msg) + capfd.readouterr().err


def test_a_stream_out_of_time_is_no_failure_of_the_server(scripted, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    with scripted(timeout_s=0.2) as running:
        asking = Asking(running, stream=True)
        running.service.scheduler.next().say("I")
        assert asking.events()[-1]["error"]["code"] == "timeout"
        wait_until(lambda: caplog.records)
        line = caplog.records[-1].msg
        assert (line["status"], line["aborted"]) == (200, "timeout")
        assert "error" not in line
        assert numbers_of(running)['edgevl_requests_aborted_total{reason="timeout"}'] == 1


def test_the_end_of_the_server_is_logged(scripted, caplog, monkeypatch):
    monkeypatch.setattr("edgevl.serve.server._LAST_SECONDS", 0)
    caplog.set_level(logging.INFO, "edgevl.serve")
    with scripted(grace_s=0) as running:
        data = json.dumps(body()).encode()
        with connected(running) as client:
            client.sendall(head(len(data)) + data)
            job = running.service.scheduler.next()
            running.server.should_exit = True
            wait_until(lambda: job.cancelled, 4)
    (line,) = [found.msg for found in caplog.records if found.name == "edgevl.serve"]
    assert (line["status"], line["aborted"]) == (499, "shutdown")


# -- bodies


def head(length, *more):
    lines = [
        f"POST {CHAT} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def connected(running):
    client = socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])))
    client.settimeout(10)
    return client


@pytest.mark.parametrize("chunked", [False, True])
def test_the_largest_body(scripted, chunked):
    fault = json.dumps(body(n=0)).encode()
    with scripted(max_request_bytes=1000) as running:
        for size, status in ((1000, 400), (1001, 413)):
            content = fault.ljust(size)
            response = httpx2.post(
                f"{running.url}{CHAT}",
                content=iter([content[:600], content[600:]]) if chunked else content,
                headers={"content-type": "application/json; charset=utf-8"},
            )
            assert response.status_code == status


def url_part(url):
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.parametrize(
    ("part", "more", "status", "words"),
    [
        (text("x" * 10**6), {}, 413, "over the limit of 1000000 bytes, not counting"),
        (text("data:" + "x" * 10**6), {}, 413, "over the limit"),  # what it is says its key
        (url_part("data:" + "x" * 10**6), {}, 400, "needs a comma"),
        (url_part("data:;base64," + "*" * 10**6), {}, 400, "not valid base64"),
        (url_part("data:," + "%00" * 300_000), {}, 400, "use base64"),
        (text("x"), {"x": [[]] * 140_000}, 413, "more than 131072 values"),
        (text("x"), {"stop": "x" * 900_000}, 400, "stop"),
        (text("x" * 900_000), {}, 400, "more than 2048 tokens, all that the context holds"),
    ],
)
def test_what_costs_too_much_is_refused(server, part, more, status, words):
    response = httpx2.post(f"{server.url}{CHAT}", json=body(messages=[user(part)], **more))
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert len(response.content) < 5000


def test_the_longest_prompt_of_ids(server):
    ids = [5] * 120_000
    asked = {"model": "tiny", "prompt": ids}
    response = httpx2.post(f"{server.url}/v1/completions", json=asked)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_half_of_a_surrogate_pair_in_a_url(server):
    # JSON may say this, but it is no text; a URL of it cannot even be decoded.
    url = '"data:image/png;base64,\\ud800"'
    content = json.dumps(body(messages=[user(url_part("URL"))])).replace('"URL"', url)
    response = httpx2.post(
        f"{server.url}{CHAT}", content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


def test_a_byte_order_mark_is_no_fault(server):
    content = b"\xef\xbb\xbf" + json.dumps(body(n=0)).encode()
    response = httpx2.post(
        f"{server.url}{CHAT}", content=content, headers={"content-type": "application/json"}
    )
    assert response.json()["error"]["param"] == "n"


def test_a_request_that_is_too_long_keeps_no_pictures(server):
    long = text("word " * 20_000)
    gc.collect()
    gc.disable()  # as above; it fails elsewhere
    try:
        response = Asking(server, messages=[user(picture(), long)]).response()
        assert response.json()["error"]["code"] == "context_length_exceeded"
        (held,) = server.service._loaded.media._held
        wait_until(lambda: held() is None, 2)
    finally:
        gc.enable()


def test_compressed_bodies_are_refused(server):
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    response = httpx2.post(f"{server.url}{CHAT}", content=b"{}", headers=headers)
    assert response.status_code == 415
    assert "compressed" in response.json()["error"]["message"]


def test_who_asks_first_is_told_at_once_that_it_is_too_much(scripted):
    with scripted(max_request_bytes=1000) as running, connected(running) as client:
        client.settimeout(2)
        client.sendall(head(2000, "Expect: 100-continue"))
        assert b" 413 " in client.recv(4096)


def test_bodies_are_counted_as_long_as_their_requests_last(scripted, monkeypatch):
    monkeypatch.setattr("edgevl.serve.middleware.BODIES_BYTES", 5000)
    half = "x" * 800  # and as much again for eight values
    with scripted(max_request_bytes=1000) as running:
        first = Asking(running, messages=[user(text(half))])
        job = running.service.scheduler.next()
        refused = Asking(running, messages=[user(text(half))]).response()
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        job.end("Hello")
        assert first.response().status_code == 200
        for _ in range(2):
            asking = Asking(running, messages=[user(text(half))])
            running.service.scheduler.next().end("Hello")
            assert asking.response().status_code == 200


def test_who_leaves_in_mid_request(server, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    with connected(server) as client:
        client.sendall(head(100) + b"{")
    wait_until(lambda: caplog.records)
    line = caplog.records[-1].msg
    assert (line["status"], line["aborted"]) == (499, "client")


# -- HTTP itself


def status_of(client):
    """Read one response from a connection; return its status."""
    response = HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


def refusal(running, sent):
    """Send bytes: -> the status and the error that come back before the server hangs up."""
    with connected(running) as client:
        client.sendall(sent)
        answer = b""
        while more := client.recv(2**16):
            answer += more
    first, _, rest = answer.partition(b"\r\n")
    headers, _, content = rest.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in headers
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    return int(first.split()[1]), error["message"]


GET = b"GET /health HTTP/1.1\r\n"
HOST = b"Host: localhost\r\n"
CHUNKED = b"POST %b HTTP/1.1\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n"


@pytest.mark.parametrize(
    ("sent", "status", "words"),
    [
        (b"hello\r\n\r\n", 400, "not valid HTTP"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", 400, "not valid HTTP"),  # TLS
        (GET + b"\r\n", 400, "Missing mandatory Host"),
        (GET + HOST + b"Host: evil.example\r\n\r\n", 400, "multiple Host"),
        (b"GET http://evil.example/health HTTP/1.1\r\n" + HOST + b"\r\n", 400, "must be a path"),
        (GET + HOST + b"X: " + b"x" * 70_000 + b"\r\n\r\n", 431, "limit of 65536 bytes"),
        (GET + HOST + b"X: " + b"x" * 10**6, 431, "limit of 65536 bytes"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 431, "limit of 65536"),
        (GET + HOST + b"X: 1\r\n" * 20_000 + b"\r\n", 431, "limit of 65536 bytes"),
        (CHUNKED % CHAT.encode() + HOST + b"\r\nx\r\n", 400, "not valid HTTP"),
        (CHUNKED % CHAT.encode() + HOST + b"\r\n" + b"1\r\nx\r\n" * 600, 400, "at least 256 bytes"),
    ],
)
def test_what_http_itself_refuses(server, sent, status, words):
    found, message = refusal(server, sent)
    assert found == status
    assert words in message


def test_a_head_that_does_not_come(scripted, monkeypatch):
    monkeypatch.setattr("edgevl.serve.server.HEAD_S", 0.3)
    with scripted() as running:
        with connected(running) as silent, connected(running) as kept:
            kept.sendall(GET + HOST + b"\r\n")
            assert status_of(kept) == 200
            kept.sendall(GET)  # and no more
            assert status_of(kept) == 408
            assert silent.recv(4096) == b""
        assert refusal(running, GET)[0] == 408
        # An answer under way may take as long as it does, also if something comes meanwhile.
        data = json.dumps(body()).encode()
        with connected(running) as client:
            client.sendall(head(len(data)) + data)
            job = running.service.scheduler.next()
            client.sendall(b"\r\n")
            time.sleep(0.5)
            job.end("Hello")
            assert status_of(client) == 200


def test_a_request_that_offers_another_protocol(server):
    # Java's client does with each first request.
    more = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAEAAEAA")
    data = json.dumps(body()).encode()
    with connected(server) as client:
        for _ in range(2):
            client.sendall(head(len(data), *more) + data)
            server.service.scheduler.next().end("Hello")
            assert status_of(client) == 200


# -- who may ask


@pytest.mark.parametrize(
    "name",
    [
        "localhost.evil.example",
        "10.0.0.1",
        "127.0.0.1.evil.example",
        "[fe80::1]:80",
        "x",
        "[::1]evil.example",
        "[::1].evil.example:80",
        "[::1%evil.example]",
        "[127.0.0.1]",
        "::1",
        "localhost@evil.example",
        "localhost:80@evil.example",
        "localhost:evil.example",
        "localhost/evil.example",
        "localhost evil.example",
    ],
)
def test_names_of_other_machines(server, name):
    assert httpx2.get(f"{server.url}/v1/models", headers={"host": name}).status_code == 403


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer ke", "Bearer keys", "Basic key", "key", "Bearer k\u00e9y"],
)
def test_only_the_key_is_the_key(scripted, given):
    with scripted(api_key="key") as running, httpx2.Client(base_url=running.url) as client:
        response = client.get("/v1/models", headers={"authorization": given.encode("latin-1")})
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        right = {"authorization": "bearer key"}
        assert client.get("/v1/models", headers=right).status_code == 200


# -- what reaches the engine


def test_what_the_operator_decides_reaches_who_needs_it(model, monkeypatch):
    made = []

    def scheduler(model, max_queue):
        made.append(max_queue)
        return ScriptedScheduler(model)

    monkeypatch.setattr("edgevl.serve.service.Scheduler", scheduler)
    monkeypatch.setattr("edgevl.serve.service.Fetcher", made.append)
    Service(Settings("tiny", max_queue=3, allowed_hosts=("a.example",))).start(model)
    assert made == [3, ("a.example",)]


def test_the_parameters_of_an_answer(server):
    sampling = {"temperature": 0.5, "top_k": 7, "top_p": 0.25, "min_p": 0.125, "seed": 3}
    sampling |= {"repetition_penalty": 1.5, "frequency_penalty": -0.5, "presence_penalty": 2}
    asking = Asking(
        server,
        **sampling,
        logit_bias={"5": -100, "7": 0.5},
        max_completion_tokens=5,
        max_tokens=6,
        stop="end",
    )
    job = server.service.scheduler.next()
    job.end("Hello")
    assert asking.response().status_code == 200
    sampling["logit_bias"] = {5: -100, 7: 0.5}
    assert job.params == SamplingParams(max_tokens=5, stop=("end",), **sampling)


@pytest.mark.parametrize(
    ("asked", "params"),
    [
        ({"repeat_penalty": 1.2}, {"repetition_penalty": 1.2}),
        ({"repeat_penalty": 1.2, "repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"top_k": -1, "top_p": 0, "temperature": 1}, {"top_k": -1, "top_p": 0, "temperature": 1}),
        (dict.fromkeys(("temperature", "logit_bias", "presence_penalty", "seed", "stop")), {}),
        ({"logit_bias": {}, "stop": []}, {}),
    ],
)
def test_other_names_and_empty_values(server, asked, params):
    asking = Asking(server, **asked)
    job = server.service.scheduler.next()
    job.end("Hello")
    assert asking.response().status_code == 200
    most = server.service.scheduler.max_context
    assert job.params == SamplingParams(max_tokens=most, **params)


def test_the_checkpoint_s_defaults_hold_where_a_request_says_nothing(server, monkeypatch):
    sampling = {"temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    loaded = replace(server.service._loaded, sampling=sampling)
    monkeypatch.setattr(server.service, "_loaded", loaded)
    for asked in ({}, {"temperature": 0, "top_k": None, "repeat_penalty": 1}):
        asking = Asking(server, max_tokens=5, **asked)
        job = server.service.scheduler.next()
        job.end("Hello")
        assert asking.response().status_code == 200
        given = {"temperature": 0, "repetition_penalty": 1} if asked else {}
        assert job.params == SamplingParams(max_tokens=5, **sampling | given)


def test_the_usual_parameters(server):
    for path, more, most in (
        (CHAT, {}, server.service.scheduler.max_context),
        ("/v1/completions", {"prompt": "Hello"}, 16),
    ):
        asked = {"model": "tiny", **more} if more else body()
        address = f"{server.url}{path}"
        thread = threading.Thread(target=httpx2.post, args=(address,), kwargs={"json": asked})
        thread.start()
        job = server.service.scheduler.next()
        job.end("Hello")
        thread.join(10)
        assert job.params == SamplingParams(max_tokens=most)


def test_thinking_may_be_asked_for_as_of_other_servers(server):
    asking = Asking(server, chat_template_kwargs={"enable_thinking": True})
    job = server.service.scheduler.next()
    job.end("Yes")
    assert asking.response().status_code == 200
    decode = server.service.scheduler.prompts.tokenizer.decode
    assert "<think>" in decode(job.prompt.token_ids, skip_special_tokens=False)


def test_slow_schemas_hold_up_only_one_another(server, monkeypatch):
    scheduler = server.service.scheduler
    begun, go = threading.Semaphore(0), threading.Event()

    def slowly(constraint):
        begun.release()
        go.wait(10)

    monkeypatch.setattr(scheduler, "prepare", slowly)
    asked = [Asking(server, response_format={"type": "json_object"}) for _ in range(3)]
    for _ in range(2):
        assert begun.acquire(timeout=10)
    assert not begun.acquire(timeout=0.2)
    other = Asking(server)
    scheduler.next().end("Hello")
    assert other.response().status_code == 200
    go.set()
    for _ in asked:
        job = scheduler.next()
        assert job.params.constraint == Constraint.json_object()
        job.end("{}")
    assert [asking.response().status_code for asking in asked] == [200] * 3


def test_who_leaves_during_a_slow_schema_is_not_waited_for(server, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "edgevl.serve")
    begun, go = threading.Event(), threading.Event()

    def slowly(constraint):
        begun.set()
        go.wait(10)

    monkeypatch.setattr(server.service.scheduler, "prepare", slowly)
    data = json.dumps(body(response_format={"type": "json_object"})).encode()
    try:
        with connected(server) as client:
            client.sendall(head(len(data)) + data)
            assert begun.wait(10)
        wait_until(lambda: caplog.records, 2)
    finally:
        go.set()
    assert caplog.records[-1].msg["aborted"] == "client"


# -- completions, and the usage in a stream


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_the_usage_in_a_stream(server, path):
    asked = {"prompt": "Hello"} if path != CHAT else {"messages": body()["messages"]}
    asked |= {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    job = []

    def answered():
        job.append(server.service.scheduler.next())
        job[0].say("Yes")
        job[0].end("Yes")

    threading.Thread(target=answered).start()
    lines = httpx2.post(f"{server.url}{path}", json=asked).text.split("\n\n")
    *events, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    assert lines[-2:] == ["data: [DONE]", ""]
    assert len(events) >= 2
    assert [event["usage"] for event in events] == [None] * len(events)  # said, not left out
    assert last["choices"] == []
    assert last["usage"]["prompt_tokens"] == len(job[0].prompt.token_ids)


def test_offsets_go_on_through_a_stream(server):
    asked = {"model": "tiny", "prompt": "Hello", "logprobs": 0, "stream": True}
    scheduler = server.service.scheduler
    ids = scheduler.prompts.tokenizer.encode("abab", add_special_tokens=False).ids
    threading.Thread(target=lambda: answer(scheduler.next(), ids)).start()
    lines = httpx2.post(f"{server.url}/v1/completions", json=asked).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    logprobs = [event["choices"][0]["logprobs"] for event in events[:-1]]
    tokens = [token for found in logprobs for token in found["tokens"]]
    assert "".join(tokens) == "abab"
    assert len(tokens) > 1
    offsets = [offset for found in logprobs for offset in found["text_offset"]]
    assert offsets == [len("".join(tokens[:number])) for number in range(len(tokens))]


def test_prompts_of_completions_that_are_too_many_or_too_long(server):
    def fault(prompt, **more):
        asked = {"model": "tiny", "prompt": prompt, **more}
        response = httpx2.post(f"{server.url}/v1/completions", json=asked)
        assert response.status_code == 400
        return response.json()["error"]

    assert fault(["Hello"] * 9, n=2)["param"] == "n"
    error = fault([5] * server.service.scheduler.max_context)
    assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")


def start(*options, **environment):
    process = subprocess.Popen(
        [sys.executable, "-m", "edgevl", "serve", "tiny", "--port", "0", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LC_ALL": "C.UTF-8", "EDGEVL_API_KEY": "key"} | environment,
    )
    lines = []
    while not lines or "served" not in lines[-1]:
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    url = lines[-1].split("served at ")[1].split("/v1")[0]
    return SimpleNamespace(process=process, url=url, lines=lines)


def test_sigterm_lets_an_answer_end():
    started = start("--served-name", "other")
    process = started.process
    try:
        request = body(model="other", n=4, stream=True)
        headers = {"authorization": "Bearer key"}
        url = f"{started.url}{CHAT}"
        with httpx2.stream("POST", url, json=request, headers=headers, timeout=20) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(20) == 0
        line = json.loads(process.stderr.read().splitlines()[-1])
        assert (line["route"], line["status"]) == (CHAT, 200)
    finally:
        process.kill()
        process.stderr.close()


def test_a_server_for_everyone_warns():
    started = start("--host", "0.0.0.0", EDGEVL_API_KEY="")
    try:
        assert started.lines[0].startswith("warning: ")
        started.process.send_signal(signal.SIGINT)
        assert started.process.wait(20) == 0
    finally:
        started.process.kill()
        started.process.stderr.close()
