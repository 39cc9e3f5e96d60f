"""Many clients, some of them broken or hostile, at one server; what it answered, and its memory.

``python tests/support/server_storm.py URL PID [REQUESTS] [CLIENTS]`` against a running server of
`tiny`.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx2
import numpy as np
import psutil
from PIL import Image

#: Statuses and ``type`` of errors that a request of a kind may come back with.
EXPECTED = {
    "chat": {200},
    "stream": {200},
    "picture": {200},
    "completion": {200},
    "several": {200},
    "json": {200},
    "leaves": {200},
    "leaves early": {200},
    "bad json": {400},
    "not json": {400, 415},
    "oversized": {413},
    "oversized, chunked": {413},
    "bad picture": {400},
    "picture bomb": {400},
    "file url": {400},
    "unknown field": {200},
    "wrong type": {400},
    "no messages": {400},
    "unknown model": {404},
    "unknown path": {404},
    "wrong method": {405},
    "too long": {400},
    "absurd number": {400},
    "deep json": {400},
}


@dataclass
class Storm:
    """What came back."""

    outcomes: Counter[tuple[str, int]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    rss_bytes: list[int] = field(default_factory=list)


def picture_url(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 80, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


def bomb_url() -> str:
    """A PNG of a few bytes that says it has 60,000 x 60,000 pixels."""
    data = io.BytesIO()
    Image.new("1", (8, 8)).save(data, "PNG")
    forged = bytearray(data.getvalue())
    forged[16:24] = (60_000).to_bytes(4, "big") * 2
    return "data:image/png;base64," + base64.b64encode(bytes(forged)).decode()


def user(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts) if len(parts) > 1 else parts[0]}]


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def body_of(kind: str, model: str, rng: random.Random, max_body: int) -> dict[str, Any]:
    """Return the arguments of ``httpx2.AsyncClient.request`` for a request of a kind."""
    chat: dict[str, Any] = {
        "model": model,
        "messages": user(f"What is {rng.randrange(50)} plus {rng.randrange(50)}?"),
        "max_tokens": rng.randrange(1, 24),
    }
    path, method, raw = "/v1/chat/completions", "POST", None
    if kind in ("stream", "leaves"):
        chat |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind in ("leaves", "leaves early"):
        chat |= {"max_tokens": 2000, "temperature": 50, "seed": 1}
    if kind == "several":
        chat |= {"n": 3, "temperature": 1.0, "logprobs": True, "top_logprobs": 2, "stop": ["7"]}
    if kind == "json":
        chat |= {"response_format": {"type": "json_object"}, "max_tokens": 40}
    if kind == "picture":
        chat["messages"] = user(image(picture_url(rng.randrange(20))), text("What is it?"))
    if kind == "bad picture":
        chat["messages"] = user(image("data:image/png;base64,aGVsbG8="), text("What is it?"))
    if kind == "picture bomb":
        chat["messages"] = user(image(bomb_url()), text("What is it?"))
    if kind == "file url":
        chat["messages"] = user(image("file:///etc/passwd"), text("What is it?"))
    if kind == "unknown field":
        chat["frobnicate"] = 1
    if kind == "wrong type":
        chat["messages"] = rng.choice([3, "hello", [{"role": "user"}], [{"role": 1}], [None]])
    if kind == "no messages":
        chat["messages"] = []
    if kind == "unknown model":
        chat["model"] = "gpt-none"
    if kind == "too long":
        chat["messages"] = user("word " * 20_000)
    if kind == "absurd number":
        name, value = rng.choice(
            [("temperature", -1), ("max_tokens", 0), ("n", 10**9), ("top_p", 7)]
        )
        chat[name] = value
    if kind == "completion":
        path = "/v1/completions"
        chat = {"model": model, "prompt": "Once upon", "max_tokens": 5}
    if kind == "unknown path":
        path = "/v1/nothing"
    if kind == "wrong method":
        method = "PUT"
    content = json.dumps(chat).encode()
    headers = {"content-type": "application/json"}
    if kind == "bad json":
        raw = content[: rng.randrange(1, len(content) - 1)]
    if kind == "not json":
        headers["content-type"] = "text/plain"
    if kind == "deep json":
        raw = b"[" * 100_000
    if kind == "oversized":
        raw = b" " * (max_body + 1)
    if kind == "oversized, chunked":
        return {"method": method, "url": path, "headers": headers, "content": _chunks(max_body)}
    return {"method": method, "url": path, "headers": headers, "content": raw or content}


async def _chunks(max_body: int) -> Any:
    for _ in range(max_body // 2**16 + 2):
        yield b" " * 2**16


async def send(
    client: httpx2.AsyncClient, kind: str, arguments: dict[str, Any], rng: random.Random
) -> tuple[int, str]:
    """Send a request: -> status, what is wrong with the answer ("" for nothing)."""
    if kind == "leaves early":
        try:
            await client.request(**arguments, timeout=rng.uniform(0.01, 0.2))
        except httpx2.TimeoutException:
            return 200, ""
        return 200, ""
    if kind == "leaves":
        async with client.stream(**arguments) as response:
            wanted = rng.randrange(6)
            async for _ in response.aiter_lines():
                if not wanted:
                    break
                wanted -= 1
        return response.status_code, ""
    try:
        response = await client.request(**arguments)
    except (httpx2.WriteError, httpx2.ReadError, httpx2.RemoteProtocolError):
        # A server may hang up on a body that is too large before it has been sent whole.
        return (413, "") if kind.startswith("oversized") else (0, "connection lost")
    if response.status_code == 200:
        if kind == "stream":
            *events, done = [line for line in response.text.split("\n\n") if line]
            if done != "data: [DONE]":
                return 200, f"the stream ends with {done[:80]!r}"
            last = json.loads(events[-1].removeprefix("data: "))
            return 200, "" if last.get("usage") else "no usage"
        return 200, "" if response.json()["choices"] else "no choices"
    error = response.json().get("error")
    if not isinstance(error, dict) or set(error) != {"message", "type", "param", "code"}:
        return response.status_code, f"not the shape of an error: {response.text[:120]}"
    if not error["message"] or "\n" in error["message"] or "Traceback" in error["message"]:
        return response.status_code, f"message: {error['message'][:120]!r}"
    return response.status_code, ""


async def fill(url: str, tokens: int, clients: int = 16) -> None:
    """Have ``clients`` told as much as the context holds, so that all caches have been filled."""
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        body = {"model": model, "max_tokens": tokens, "temperature": 50}
        asked = [
            client.post("/v1/completions", json={**body, "prompt": f"{n} times", "seed": n})
            for n in range(clients)
        ]
        for response in await asyncio.gather(*asked):
            response.raise_for_status()


async def storm(
    url: str, pid: int, requests: int = 500, clients: int = 16, max_body: int = 2**20, seed: int = 0
) -> Storm:
    """Send ``requests`` of all kinds from ``clients``; the server's limit is ``max_body`` bytes."""
    result, left = Storm(), iter(range(requests))
    process = psutil.Process(pid)
    async with httpx2.AsyncClient(base_url=url, timeout=120) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        rng = random.Random(seed)
        kinds = [rng.choice(list(EXPECTED)) for _ in range(requests)]

        async def work() -> None:
            for number in left:
                mine, kind = random.Random(seed * 10**6 + number), kinds[number]
                arguments = body_of(kind, model, mine, max_body)
                status, wrong = await send(client, kind, arguments, mine)
                result.outcomes[kind, status] += 1
                if wrong or status not in EXPECTED[kind]:
                    result.wrong.append(f"{number} {kind}: {status} {wrong}")
                if number % 20 == 0:
                    result.rss_bytes.append(process.memory_info().rss)

        await asyncio.gather(*(work() for _ in range(clients)))
    return result


if __name__ == "__main__":
    address, process_id, *numbers = sys.argv[1:]
    found = asyncio.run(storm(address, int(process_id), *map(int, numbers)))
    for (name, status), count in sorted(found.outcomes.items()):
        print(f"{count:5} {status} {name}")
    print("RSS in MB:", [round(rss / 1e6) for rss in found.rss_bytes])
    print("wrong:", found.wrong or "nothing")
