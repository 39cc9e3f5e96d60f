"""Bodies of requests with one thing wrong: each gets a right answer or an error of the client's.

    python tests/support/fuzz_requests.py 100000 [SEED]

sends so many to the application in this process, with the shipped model's tokenizer and template,
and a scheduler that answers at once but checks constraints as the real one does. Prints what came,
and each failure; exit status 1 if there is one. `test_fuzz_requests.py` tries a few hundred.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import edgevl
from edgevl.generate.token_mask import TokenMasks
from edgevl.serve.app import create_app
from edgevl.serve.errors import ErrorBody
from edgevl.serve.responses import ChatChunk, ChatCompletion, Completion
from edgevl.serve.service import Service
from edgevl.serve.settings import Settings
from running_server import METER, EagerScheduler, picture, text, user

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Seconds in which every request must have its answer, on a busy machine too.
MAX_S = 30.0

SCHEMA = {
    "$defs": {"P": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0}}}},
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 0, "maximum": 9},
        "s": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5, "format": "date"},
        "l": {"type": "array", "items": {"$ref": "#/$defs/P"}, "maxItems": 2},
        "u": {"oneOf": [{"const": "a"}, {"type": "null"}]},
        "e": {"enum": ["a", 1, None]},
    },
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "now", "description": "The time.", "parameters": SCHEMA, "strict": True},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "now", "arguments": '{"n": 1}'}}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (
        CHAT,
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                user(text("Hello"), picture(METER, detail="low")),
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c1", "content": [text("12:00")]},
                {"role": "assistant", "content": [text("It is noon.")], "reasoning_content": "Hm."},
                {"role": "user", "content": "And now?", "name": "Ann"},
            ],
            "tools": [TOOL],
            "tool_choice": "auto",
            "temperature": 0.5,
            "seed": 1,
        },
    ),
    (
        CHAT,
        {
            "messages": [user("Hello")],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True},
            },
            "max_tokens": 5,
            "tools": [TOOL],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [TOOL]},
            },
        },
    ),
    (
        CHAT,
        {
            "messages": [user(text("Hello"))],
            "stream": True,
            "stream_options": {"include_usage": True},
            "logprobs": True,
            "top_logprobs": 2,
            "stop": ["a", "b"],
            "n": 2,
            "top_p": 0.5,
            "top_k": 5,
            "min_p": 0.1,
            "repetition_penalty": 1.1,
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "logit_bias": {},
            "enable_thinking": False,
            "chat_template_kwargs": {"enable_thinking": True},
            "metadata": {"a": "b"},
        },
    ),
    (
        CHAT,
        {
            "messages": [user(text("Hello"))],
            "tools": [TOOL],
            "tool_choice": {"type": "function", "function": {"name": "now"}},
            "parallel_tool_calls": False,
            "max_completion_tokens": 5,
            "frames": 2,
            "max_tiles": 1,
            "response_format": {"type": "text"},
        },
    ),
    (
        COMPLETIONS,
        {
            "prompt": ["Hello", "you"],
            "max_tokens": 2,
            "logprobs": 1,
            "echo": False,
            "best_of": 1,
            "suffix": "",
            "user": "me",
        },
    ),
    (COMPLETIONS, {"prompt": [[1, 2, 3], [4]], "stream": True, "seed": -1, "n": 2}),
]
#: What stands in the place of something else: each of another type, or of an absurd size.
JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2, 1.5, 64.0, 1e308, -1e-320, 2**31, 2**63, 2**70, 10**400,
    "", " ", "x", "none", "\ud83d", "\x00", "汉😀", "<|im_end|>", "x" * 3000, "1", "{",
    "data:image/png;base64,AAAA", "http://127.0.0.1/x", "file:///etc/passwd",
    [], [[]], [None], ["x"], [1, "x", {}], [{}] * 50, {}, {"": None}, {"type": None},
    {"type": "x"}, {"$ref": "#"}, {"not": {}}, {"pattern": "(.{0,500}){0,500}"}, {"\ud83d": 1},
    {"a": {"b": {"c": []}}}, "NaN!", "Infinity!", "deep!",
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every object and list within a body, with each of its keys or indices."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(inner, dict | list):
            yield from places(inner)


def mutated(chance: random.Random) -> tuple[str, bytes, str]:
    """Return a path, a body with one thing wrong, and what that is."""
    path, body = copy.deepcopy(chance.choice(BODIES))
    body["model"] = "tiny"
    holder, key = chance.choice(list(places(body)))
    how = chance.choice(["replace"] * 6 + ["drop", "add", "rename", "repeat", "swap"])
    junk = chance.choice(JUNK)
    if how == "drop":
        del holder[key]
    elif how == "rename" and isinstance(holder, dict):
        holder[chance.choice(["x", "type", "", "\udc00", key.upper()])] = holder.pop(key)
    elif how == "add":
        if isinstance(holder, dict):
            holder[chance.choice(["x", "cache_control", "type", "name", "pattern", "oneOf"])] = junk
        else:
            holder.insert(key, junk)
    elif how == "repeat":
        holder[key] = [holder[key]] * chance.choice([2, 20, 200])
    elif how == "swap":
        other, place = chance.choice(list(places(body)))
        holder[key] = copy.deepcopy(other[place])
    else:
        holder[key] = junk
    data = json.dumps(body)
    for mark, raw in (
        ("NaN!", "NaN"),
        ("Infinity!", "-Infinity"),
        ("deep!", "[" * 500 + "]" * 500),
    ):
        data = data.replace(f'"{mark}"', raw)
    return path, data.encode(), f"{how} {key!r}: {junk!r}"[:200]


class CheckingScheduler(EagerScheduler):
    """Answers at once; checks constraints as the real one does."""

    def __init__(self, model: Any, max_sequences: int = 16, max_queue: int = 64) -> None:
        """Take the model's tokenizer."""
        super().__init__(model, max_sequences, max_queue)  # type: ignore[no-untyped-call]
        self._masks = TokenMasks(model.prompts.tokenizer, model.prompts.stop_ids)

    def prepare(self, constraint: Any) -> None:
        """Raise what the real one raises."""
        self._masks.check(constraint)


class Application:
    """The application in this process."""

    def __init__(self) -> None:
        """Start it, with the shipped model; `edgevl.serve.service.Scheduler` has been replaced."""
        service = Service(Settings(name="tiny"))
        self._app = create_app(service)
        service.start(edgevl.load("tiny", threads=1))

    async def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Return status and body of a response."""
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "",
            "scheme": "http", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 9),
            "headers": [(b"host", b"localhost"), (b"content-type", b"application/json"),
                        (b"content-length", str(len(body)).encode())],
        }  # fmt: skip
        sent = False
        ended = asyncio.Event()
        status, parts = 0, []

        async def receive() -> dict[str, Any]:
            nonlocal sent
            if sent:
                await ended.wait()
                return {"type": "http.disconnect"}
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status
            status = message.get("status", status)
            parts.append(message.get("body", b""))

        try:
            await self._app(scope, receive, send)
        finally:
            ended.set()
        return status, b"".join(parts)


def fault(path: str, status: int, body: bytes) -> str | None:
    """Return what is wrong with a response; None if nothing is."""
    try:
        if status != 200:
            error = ErrorBody.model_validate_json(body, extra="forbid").error
            right = 400 <= status < 500 and error.message and "\n" not in error.message
            return None if right else "not an error of the client's"
        if not body.startswith(b"data: "):
            (ChatCompletion if path == CHAT else Completion).model_validate_json(body)
            return None
        *events, end, rest = body.decode().split("\n\n")
        for event in events:
            kind = ChatChunk if path == CHAT else Completion
            kind.model_validate_json(event.removeprefix("data: "))
    except ValueError as error:
        return f"not of its shape: {error}"
    return None if (end, rest) == ("data: [DONE]", "") else "a stream without its end"


async def fuzz(application: Application, count: int, seed: int) -> tuple[Counter[int], list[str]]:
    """Send so many bodies; return how often each status came, and the failures."""
    chance = random.Random(seed)
    statuses: Counter[int] = Counter()
    failures = []
    begun = time.monotonic()
    for number in range(count):
        path, body, told = mutated(chance)
        try:
            status, answer = await asyncio.wait_for(application.post(path, body), MAX_S)
            wrong = fault(path, status, answer)
        except Exception as error:
            status, answer, wrong = 0, b"", f"{type(error).__name__}: {error}"
        statuses[status] += 1
        if wrong:
            failures.append(f"{number}: {told}: {status} {wrong[:200]} {answer[:200]!r}")
            print(failures[-1], file=sys.stderr, flush=True)
        if number % 5000 == 4999:
            print(number + 1, f"{time.monotonic() - begun:.0f} s", dict(statuses), flush=True)
    return statuses, failures


def main() -> int:
    """Try as many as the arguments say."""
    import edgevl.serve.service

    edgevl.serve.service.Scheduler = CheckingScheduler  # type: ignore[attr-defined,assignment]
    count, seed = (int(argument) for argument in (*sys.argv[1:], "0")[:2])
    statuses, failures = asyncio.run(fuzz(Application(), count, seed))
    print(f"{count} bodies: {dict(sorted(statuses.items()))}; {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
