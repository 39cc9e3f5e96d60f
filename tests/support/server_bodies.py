"""Bodies at a server's limits, of every shape and many at once: who else has to wait, and for what.

``python tests/support/server_bodies.py URL PID [SHAPE ...]`` against a running server. For each
shape: what was answered, how long ``/health`` took meanwhile at most, and how much memory was
taken.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Bytes of a body, and of one without ``data:`` URLs, at the server's limits by default.
LIMIT, PLAIN_LIMIT = 32 * 10**6, 10**6
POLL_S = 0.05

HELLO = b'"messages":[{"role":"user","content":"Hello"}]'
PART = b'{"type":"text","text":"a"}'
CALL = b'{"id":"a","type":"function","function":{"name":"a","arguments":"{}"}}'
TOOL = b'{"type":"function","function":{"name":"a","parameters":{"type":"object"}}}'


def filled(before: bytes, unit: bytes, after: bytes) -> Callable[[int], bytes]:
    """Return a function of a size that repeats ``unit`` up to it."""

    def make(size: int) -> bytes:
        return before + unit * ((size - len(before) - len(after)) // len(unit)) + after

    return make


def field_of(value: bytes, unit: bytes, after: bytes, name: bytes = b"x") -> Callable[[int], bytes]:
    return filled(b'{"model":"tiny",%b,"%b":%b' % (HELLO, name, value), unit, after + b"}")


def content(before: bytes, unit: bytes, after: bytes) -> Callable[[int], bytes]:
    opening = b'{"model":"tiny","max_tokens":1,"messages":[{"role":"user","content":'
    return filled(opening + before, unit, after + b"}]}")


def prompt(before: bytes, unit: bytes, after: bytes) -> Callable[[int], bytes]:
    return filled(b'{"model":"tiny","max_tokens":1,"prompt":' + before, unit, after + b"}")


def url(kind: bytes, before: bytes, unit: bytes) -> Callable[[int], bytes]:
    opening = b'[{"type":"%b","%b":{"url":"data:%b' % (kind, kind, before)
    return content(opening, unit, b'"}}]')


def keys(size: int) -> bytes:
    fields = b",".join(b'"%x":0' % number for number in range(size // 10))
    return b'{"model":"tiny",%b,"x":{%b}}' % (HELLO, fields)


def enumeration(size: int) -> bytes:
    """A schema that allows many texts, within the limit of schemas."""
    texts = b",".join(b'"%x"' % number for number in range(min(size, 120_000) // 8))
    schema = b'{"type":"json_schema","json_schema":{"name":"a","schema":{"enum":[%b]}}}' % texts
    return b'{"model":"tiny","max_tokens":4,%b,"response_format":%b}' % (HELLO, schema)


BASE64 = base64.b64encode(bytes(range(256)) * 3)
JPEG_HEAD = base64.b64encode(
    b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
)

#: Bodies as functions of their size; `COMPLETIONS` has those whose names begin with ``prompt``.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "text of letters": content(b'"', b"abcdefghij", b'"'),
    "text of words": content(b'"', b"word ", b'"'),
    "text of lines": content(b'"', b"a\\n", b'"'),
    "text of blanks": content(b'"', b" ", b'"'),
    "text of emoji": content(b'"', "\U0001f600".encode(), b'"'),
    "text of escaped emoji": content(b'"', rb"\ud83d\ude00", b'"'),
    "text of blanks and an emoji": content(b'"\xf0\x9f\x98\x80', b" ", b'"'),
    "text of Chinese": content(b'"', "龘".encode(), b'"'),
    "text of control tokens": content(b'"', b"<|im_end|>", b'"'),
    "text of quotes": content(b'"', rb"\"", b'"'),
    "text that is a data URL": content(b'[{"type":"text","text":"data:', BASE64, b'"}]'),
    "text without an end": content(b'"', b"a", b""),
    "not UTF-8": content(b'"', b"\xff", b'"'),
    "lists": field_of(b"[", b"[],", b"0]"),
    "objects": field_of(b"[", b'{"":0},', b"0]"),
    "numbers": field_of(b"[", b"0,", b"0]"),
    "fractions": field_of(b"[", b"0.5,", b"0]"),
    "texts": field_of(b"[", b'"",', b"0]"),
    "fields": keys,
    "a deep list": field_of(b"", b"[", b""),
    "a deep object": field_of(b"", b'{"":', b""),
    "a long number": field_of(b"", b"9", b""),
    "a long fraction": field_of(b"0.", b"9", b""),
    "a long name of a field": field_of(b'{"', b"a", b'":0}'),
    "a long name of the model": filled(b'{%b,"model":"' % HELLO, b"a", b'"}'),
    "a long role": filled(b'{"model":"tiny","messages":[{"role":"', b"a", b'"}]}'),
    "a long stop": field_of(b'"', b"a", b'"', b"stop"),
    "many stops": field_of(b"[", b'"a",', b'"a"]', b"stop"),
    "a long user": field_of(b'"', b"a", b'"', b"user"),
    "biases": field_of(b"{", b'"1":0.5,', b'"2":0}', b"logit_bias"),
    "blanks between": field_of(b"0", b" ", b""),
    "messages": filled(
        b'{"model":"tiny","messages":[',
        b'{"role":"user","content":"a"},',
        b'{"role":"user","content":"a"}]}',
    ),
    "messages without a role": filled(b'{"model":"tiny","messages":[', b"{},", b"{}]}"),
    "parts": content(b"[", PART + b",", PART + b"]"),
    "messages of parts": filled(
        b'{"model":"tiny","messages":[',
        b'{"role":"user","content":[' + b",".join([PART] * 1000) + b"]},",
        b'{"role":"user","content":"a"}]}',
    ),
    "calls": filled(
        b'{"model":"tiny","messages":[',
        b'{"role":"assistant","tool_calls":[%b]},' % CALL,
        b'{"role":"user","content":"a"}]}',
    ),
    "arguments of a call": filled(
        b'{"model":"tiny","messages":[{"role":"assistant","tool_calls":[{"id":"a","type":'
        b'"function","function":{"name":"a","arguments":"[',
        b"[],",
        b'0]"}}]}]}',
    ),
    "tools": field_of(b"[", TOOL + b",", TOOL + b"]", b"tools"),
    "a tool's parameters": field_of(
        b'[{"type":"function","function":{"name":"a","parameters":{"x":[',
        b'{"":0},',
        b"0]}}}]",
        b"tools",
    ),
    "a tool's description": field_of(
        b'[{"type":"function","function":{"name":"a","description":"', b"a ", b'"}}]', b"tools"
    ),
    "a schema": field_of(
        b'{"type":"json_schema","json_schema":{"name":"a","schema":{"x":[',
        b'{"":0},',
        b"0]}}}",
        b"response_format",
    ),
    "a schema with a data URL": field_of(
        b'{"type":"json_schema","json_schema":{"name":"a","schema":{"url":"data:',
        BASE64,
        b'"}}}',
        b"response_format",
    ),
    "a schema of many texts": enumeration,
    "a picture that is none": url(b"image_url", b"image/png;base64,", BASE64),
    "a JPEG that is cut": url(b"image_url", b"image/jpeg;base64," + JPEG_HEAD, b"A" * 4),
    "a picture of bad base64": url(b"image_url", b"image/png;base64,", b"*"),
    "a picture of escaped slashes": url(b"image_url", b"image/png;base64,", rb"ABC\/"),
    "a picture of percent signs": url(b"image_url", b"image/png,", b"%00"),
    "a picture of escaped emoji": url(b"image_url", b"image/png;base64,", rb"\ud83d\ude00"),
    "a picture of emoji": url(b"image_url", b"image/png;base64,", "\U0001f600".encode()),
    "a picture of blanks": url(b"image_url", b"image/png;base64,", b" "),
    "a video that is none": url(b"video_url", b"video/mp4;base64,", BASE64),
    "short URLs": content(b"[", b'{"type":"image_url","image_url":{"url":"data:"}},', b"0]"),
    "URLs of 4 KB": content(
        b"[",
        b'{"type":"image_url","image_url":{"url":"data:%b"}},' % (b"A" * 4096),
        PART + b"]",
    ),
    "prompt of letters": prompt(b'"', b"abcdefghij", b'"'),
    "prompt of blanks": prompt(b'"', b" ", b'"'),
    "prompt of emoji": prompt(b'"', "\U0001f600".encode(), b'"'),
    "prompt of ids": prompt(b"[", b"99,", b"9]"),
    "prompt of lists of ids": prompt(b"[", b"[9],", b"[9]]"),
    "prompt of texts": prompt(b"[", b'"a",', b'"a"]'),
}


@dataclass
class Found:
    """What came of bodies that were sent at once.

    Attributes:
        statuses: of HTTP, or 0 where the server hung up; and how often.
        wrong: bodies of errors that are not of OpenAI's shape.
        health_s: the longest that `/health` took meanwhile.
        before_bytes: memory of the server (RSS) before.
        peak_bytes: most memory meanwhile.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[bytes] = field(default_factory=list)
    health_s: float = 0.0
    before_bytes: int = 0
    peak_bytes: int = 0


def memory(pid: int, name: str) -> int:
    """Return a field of ``/proc/PID/status``, bytes."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise LookupError(name)


def request(path: str, body: bytes, chunk: int = 0) -> bytes:
    """Return a request; ``chunk`` sends its body in chunks of so many bytes."""
    length = "Transfer-Encoding: chunked" if chunk else f"Content-Length: {len(body)}"
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", length]
    if chunk:
        pieces = (body[at : at + chunk] for at in range(0, len(body), chunk))
        body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    return "\r\n".join([*lines, "Connection: close", "", ""]).encode() + body


def send(address: tuple[str, int], data: bytes, found: Found) -> None:
    status, answer = 0, b""
    with socket.create_connection(address, timeout=300) as client:
        with contextlib.suppress(OSError):  # it may say that it is too much before it has all
            client.sendall(data)
        with contextlib.suppress(OSError, http.client.HTTPException):
            response = http.client.HTTPResponse(client)
            response.begin()
            status, answer = response.status, response.read()
    found.statuses[status] += 1
    if status >= 400:
        error = json.loads(answer).get("error")
        if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
            found.wrong.append(answer[:200])


def sent_at_once(url: str, pid: int, data: bytes, clients: int = 16) -> Found:
    """Send a request from many clients at once, and ask meanwhile whether the server is well."""
    place = urlsplit(url)
    address = (place.hostname or "", place.port or 80)
    found = Found(before_bytes=memory(pid, "VmRSS"))
    Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    threads = [threading.Thread(target=send, args=(address, data, found)) for _ in range(clients)]
    health = http.client.HTTPConnection(*address, timeout=300)
    health.connect()
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        started = time.perf_counter()
        health.request("GET", "/health")
        assert health.getresponse().read()
        found.health_s = max(found.health_s, time.perf_counter() - started)
        time.sleep(POLL_S)
    health.close()
    found.peak_bytes = memory(pid, "VmHWM")
    return found


def requests(limit: int = LIMIT, plain: int = PLAIN_LIMIT) -> dict[str, bytes]:
    """Return requests of all shapes: with as much as a body may have, and as text may have."""
    made = {}
    for name, shape in SHAPES.items():
        path = COMPLETIONS if name.startswith("prompt") else CHAT
        for size in (limit, plain):
            made[f"{name}, {size / 1e6:g} MB"] = request(path, shape(size))
    made["chunks of a byte"] = request(CHAT, SHAPES["text of letters"](plain // 2), 1)
    made["large chunks of a byte"] = request(CHAT, SHAPES["a picture that is none"](limit // 8), 1)
    return made


def main(url: str, pid: int, wanted: list[str]) -> None:
    print("health ms | memory before, more at most, MB | statuses | body")
    for name, data in requests().items():
        if wanted and not any(word in name for word in wanted):
            continue
        found = sent_at_once(url, pid, data)
        more = found.peak_bytes - found.before_bytes
        statuses = ", ".join(f"{count} x {status}" for status, count in found.statuses.items())
        print(
            f"{1000 * found.health_s:7.0f} | {found.before_bytes / 1e6:6.0f} {more / 1e6:6.0f} | "
            f"{statuses} | {name} {found.wrong[:1] or ''}",
            flush=True,
        )


if __name__ == "__main__":
    os.nice(5)
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
