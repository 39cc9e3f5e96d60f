"""Fields of requests that mean nothing here: ignored and named, or with --strict refused."""

import json
import logging

import httpx2
import pytest

import edgevl
from running_server import METER, EagerScheduler, serving, user

CHAT = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "now"}}


@pytest.fixture(scope="module")
def model():
    return edgevl.load("tiny", threads=1)


@pytest.fixture(scope="module")
def start(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgevl.serve.service.Scheduler", EagerScheduler)
        yield lambda **settings: serving(lambda: model, **settings)


@pytest.fixture(scope="module")
def server(start):
    with start() as running:
        yield running


@pytest.fixture(scope="module")
def strict(start):
    with start(strict=True) as running:
        yield running


def post(server, path=CHAT, **body):
    body = {"model": "tiny"} | body
    if path == CHAT:
        body.setdefault("messages", [{"role": "user", "content": "Hello"}])
    return httpx2.post(f"{server.url}{path}", json=body)


#: What clients send of what is known elsewhere, and how it is named.
IGNORED = [
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "low", "keep_alive": 5}, "verbosity, keep_alive"),
    ({"store": False, "metadata": {"a": "b"}}, "store, metadata"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"prediction": {"type": "content", "content": "x"}}, "prediction"),
    ({"function_call": "auto"}, "function_call"),
    ({"stream_options": {"continuous_usage_stats": True}}, "stream_options.continuous_usage_stats"),
    ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking"),
    ({"tools": [TOOL | {"cache_control": {}}]}, "tools[].cache_control"),
    (
        {"tools": [{"type": "function", "function": {"name": "f", "colour": 1}}]},
        "tools[].function.colour",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "extra": 1}}},
        "response_format.json_schema.extra",
    ),
    (
        {"messages": [{"role": "user", "content": "a", "name": "Ann"}] * 3},  # once, not thrice
        "messages[].name",
    ),
    (
        {"messages": [user({"type": "text", "text": "a", "cache_control": {"type": "x"}})]},
        "messages[].content[].cache_control",
    ),
    (
        {
            "messages": [
                user({"type": "image_url", "image_url": {"url": METER, "format": "image/png"}})
            ]
        },
        "messages[].content[].image_url.format",
    ),
]


@pytest.mark.parametrize(("more", "named"), IGNORED, ids=[named for _, named in IGNORED])
def test_ignored_fields_are_named(server, more, named):
    response = post(server, **more)
    assert response.status_code == 200
    assert response.headers["x-edgevl-ignored"] == named


def test_a_field_whose_name_is_empty(server):
    response = post(server, user="me", **{"": 1})
    assert response.status_code == 200
    assert response.headers["x-edgevl-ignored"] == "user, ?"


def test_what_is_null_or_known_is_not_named(server):
    nothing = dict.fromkeys(["prediction", "audio", "functions", "function_call", "n"])
    response = post(server, **nothing, modalities=["text"], tools=[], temperature=0)
    assert response.status_code == 200
    assert "x-edgevl-ignored" not in response.headers


def test_streams_and_completions_name_them_too(server):
    for asked in (
        post(server, stream=True, colour=1),
        post(server, "/v1/completions", prompt="a", colour=1),
    ):
        assert asked.headers["x-edgevl-ignored"] == "colour"


def test_the_log_names_each_once(start, caplog):
    with start() as server, caplog.at_level(logging.INFO, "edgevl.serve"):
        for _ in range(2):
            post(server, colour=1)
        post(server, colour=1, shape=2)
    lines = [r.getMessage() for r in caplog.records if not isinstance(r.msg, dict)]
    assert lines == ["ignored fields of requests: colour", "ignored fields of requests: shape"]


def test_the_header_is_safe_and_bounded(server):
    odd = {"a\r\nSet-Cookie: b": 1, "汉": 1, "x" * 9999: 1} | {f"field{i}": 1 for i in range(50)}
    response = post(server, messages=[{"role": "user", "content": "a"} | odd] * 9, **odd)
    assert response.status_code == 200
    assert "set-cookie" not in response.headers
    header = response.headers["x-edgevl-ignored"]
    assert header.startswith("messages[].a??Set-Cookie??b, messages[].?, messages[].xxx")
    assert len(header) <= 1024


@pytest.mark.parametrize(("more", "named"), IGNORED, ids=[named for _, named in IGNORED])
def test_strict_refuses_them(strict, more, named):
    response = post(strict, **more)
    if named in ("messages[].name", "store, metadata"):  # OpenAI's own that change nothing
        assert response.status_code == 200
        return
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "unknown_parameter")
    assert error["param"] == named.replace("[]", "[0]").split(", ")[0]
    assert error["message"].startswith("Unrecognized request argument supplied: ")


#: What would make another answer of it and cannot be had: refused by name, unless it asks nothing.
NOT_OFFERED = [
    (CHAT, "modalities[1]", {"modalities": ["text", "audio"]}, {"modalities": ["text"]}),
    (CHAT, "functions", {"functions": [{"name": "f"}]}, {"functions": []}),
    (CHAT, "guided_json", {"guided_json": {"type": "object"}}, {"guided_json": None}),
    (CHAT, "grammar", {"grammar": "root ::= x"}, {"grammar": None}),
    ("/v1/completions", "echo", {"echo": True}, {"echo": False}),
    ("/v1/completions", "suffix", {"suffix": "x"}, {"suffix": ""}),
    ("/v1/completions", "best_of", {"best_of": 3}, {"best_of": 1}),
]


@pytest.mark.parametrize(("path", "param", "asked", "nothing"), NOT_OFFERED)
def test_what_would_change_the_answer_is_refused(server, path, param, asked, nothing):
    prompt = {} if path == CHAT else {"prompt": "Hello"}
    refused = post(server, path, **prompt, **asked)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param
    assert "not supported here" in refused.json()["error"]["message"]
    assert post(server, path, **prompt, **nothing).status_code == 200


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "input_audio"),
        ({"type": "file", "file": {"file_id": "x"}}, "file"),
        ({"type": "input_image", "image_url": METER}, "input_image"),
    ],
)
def test_parts_of_other_kinds_are_refused_by_name(server, part, name):
    response = post(server, messages=[user(part)])
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "messages[0].content[0]"
    assert f"'{name}'" in response.json()["error"]["message"]


U = {"role": "user", "content": "Hello"}
CALL = {"id": "c", "function": {"name": "now", "arguments": {"zone": "UTC"}}}
#: Ways to write a request that mean the same, the second as OpenAI's documentation has it.
SAME = [
    ({"max_tokens": 64.0, "n": 1.0, "seed": 3.0}, {"max_tokens": 64, "n": 1, "seed": 3}),
    ({"stream": None, "stop": None, "n": None, "tools": None, "logprobs": None}, {}),
    ({"stop": ""}, {}),
    ({"stop": []}, {}),
    ({"max_tokens": -1}, {}),
    ({"top_logprobs": 0, "logprobs": False}, {}),
    ({"stream_options": {"include_usage": True}}, {}),
    ({"messages": [user("Hello")]}, {"messages": [user({"type": "text", "text": "Hello"})]}),
    ({"messages": [user()]}, {"messages": [user({"type": "text", "text": ""})]}),
    ({"messages": [{"role": "user", "content": ""}]}, {"messages": [user()]}),
    (
        {"messages": [user({"type": "image_url", "image_url": METER})]},
        {"messages": [user({"type": "image_url", "image_url": {"url": METER}})]},
    ),
    (
        {
            "messages": [
                user({"type": "image_url", "image_url": {"url": METER, "detail": "original"}})
            ]
        },
        {"messages": [user({"type": "image_url", "image_url": {"url": METER, "detail": "high"}})]},
    ),
    (
        {"messages": [U, {"role": "assistant", "content": None}, U]},
        {"messages": [U, {"role": "assistant", "content": ""}, U]},
    ),
    (
        {"messages": [U, {"role": "assistant", "content": None, "refusal": "No."}, U]},
        {"messages": [U, {"role": "assistant", "content": "No."}, U]},
    ),
    (
        {
            "messages": [
                U,
                {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
                U,
            ]
        },
        {"messages": [U, {"role": "assistant", "content": "No."}, U]},
    ),
    (
        {
            "messages": [
                U,
                {"role": "assistant", "tool_calls": [CALL]},
                {"role": "tool", "tool_call_id": "c", "content": None},
            ]
        },
        {
            "messages": [
                U,
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "c",
                            "type": "function",
                            "function": {"name": "now", "arguments": '{"zone": "UTC"}'},
                        }
                    ],
                },
                {"role": "tool", "tool_call_id": "c", "content": ""},
            ]
        },
    ),
    ({"tools": [{"function": {"name": "now"}}]}, {"tools": [TOOL]}),
    (
        {
            "tools": [TOOL, {"type": "function", "function": {"name": "f"}}],
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [TOOL]},
            },
        },
        {"tools": [TOOL]},
    ),
]


@pytest.fixture
def asked(model, monkeypatch):
    """A function (body) -> prompt and parameters that the scheduler is given."""
    jobs = []

    class Noting(EagerScheduler):
        def submit(self, *given, **more):
            jobs.append(given[:2])
            return super().submit(*given, **more)

    monkeypatch.setattr("edgevl.serve.service.Scheduler", Noting)
    with serving(lambda: model) as running:

        def ask(body):
            response = post(running, **body)
            assert response.status_code == 200, response.text
            prompt, params = jobs.pop()
            return prompt.token_ids.tolist(), len(prompt.images), params

        yield ask


def test_other_ways_to_write_the_same(asked):
    for way, same in SAME:
        (ids, images, params), (right_ids, right_images, right) = asked(way), asked(same)
        assert (ids, images) == (right_ids, right_images), json.dumps(way)[:200]
        if way != {"max_tokens": -1}:  # all of it, whatever the context
            assert params == right, json.dumps(way)[:200]
        else:
            assert params.max_tokens >= right.max_tokens


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": "64"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stream": 1}, "stream"),
        ({"stop": [""]}, "stop[0]"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "name": "f", "content": "x"}]}, "messages[0]"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        (
            {
                "tools": [TOOL],
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {
                        "mode": "auto",
                        "tools": [{"type": "function", "function": {"name": "f"}}],
                    },
                },
            },
            "tool_choice",
        ),
    ],
)
def test_what_is_of_no_meaning_is_refused(server, more, param):
    response = post(server, **more)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
