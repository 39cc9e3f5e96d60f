"""The comparison of servers: a run against fakes, streams as they come, the figures, the words."""

import base64
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tokenizers import Tokenizer

pytest.importorskip("aiohttp", reason="pip install 'edgevl[bench]'")
import environments
import servers
import serving
from load_generator import Answer, AnswerStream, Load, RequestFailedError
from peers import Peer
from repository import SUPPORT, TINY
from serving_report import markdown, percentile, summary
from workload import PICTURE_SIZE, Workload

FAKE = SUPPORT / "fake_openai.py"
TOKENIZER = TINY / "tokenizer.json"


def fake(name, label, *options):
    """Return a server that is `fake_openai.py` with options."""

    class Fake(servers.Server):
        ready_path = "/v1/models"

        @classmethod
        def set_up(cls, setting):
            pass

        @classmethod
        def command(cls, setting, port):
            return [sys.executable, str(FAKE), str(port), *options]

    Fake.name, Fake.label = name, label
    return Fake


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the benchmark on given servers: -> status, results."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "tokenizer.json").symlink_to(TOKENIZER)

    def main(fakes, *more):
        monkeypatch.setattr(serving, "SERVERS", {one.name: one for one in fakes})
        lengths = ["--prompt-tokens", "12", "--generate", "5", "--threads", "1"]
        counts = ["--clients", "1,4", "--requests", "4", "--rounds", "2"]
        arguments = ["serving.py", "--work", str(tmp_path), *lengths, *counts, *more]
        monkeypatch.setattr(sys, "argv", arguments)
        status = serving.main()
        name = "serving-image.json" if "--image" in more else "serving.json"
        return status, json.loads((tmp_path / name).read_text())

    return main


def test_a_run(run, capsys):
    fakes = [
        fake("edgevl", "EdgeVL"),
        fake("peer", "a peer", "--no-usage"),
        fake("busy", "a busy one", "--fail-every", "4"),
        fake("other", "another model", "--miscount", "1"),
        fake("gone", "one that ends", "--no-such-option"),
    ]
    status, results = run(fakes)
    assert status == 1  # requests failed
    lines = {(line["server"], line["clients"]): line for line in results["lines"]}
    assert set(lines) == {(s, n) for s in ("edgevl", "peer", "busy") for n in (1, 4)}
    one, four = lines["edgevl", 1], lines["edgevl", 4]
    assert (one["requests"], four["requests"]) == (2 * 4, 2 * 8)
    assert not one["errors"]
    assert one["prompt_tokens"] == [12]
    assert lines["peer", 1]["prompt_tokens"] == [0]
    # 20 ms to the first token, 2 ms to each other one, waited for by four at once.
    assert 20 <= one["ttft_p50_ms"] <= one["ttft_p95_ms"] < 1000
    assert 2 <= one["ms_per_token_p50"] < 100
    assert one["output_tokens_per_s"] == pytest.approx(5 * one["requests_per_s"])
    assert four["output_tokens_per_s"] > 1.2 * one["output_tokens_per_s"]
    # Every fourth of 4 requests to warm up, of 2 rounds of 4 and of 2 rounds of 8.
    assert sum(sum(lines["busy", n]["errors"].values()) for n in (1, 4)) == 6
    (error,) = lines["busy", 4]["errors"]
    assert error.startswith("status 503: ")
    assert "too busy" in error
    assert "a prompt of 12 tokens has 13 there" in results["unavailable"]["another model"]
    assert "--no-such-option" in results["unavailable"]["one that ends"]
    table = capsys.readouterr().out
    assert "| 4 | a busy one | " in table
    assert "| 4 of 16 |" in table
    assert "- a busy one, 4 clients: 4 times status 503" in table
    assert "- one that ends: " in table


def test_a_run_with_pictures(run):
    status, results = run([fake("edgevl", "EdgeVL"), fake("peer", "a peer")], "--image")
    assert status == 0
    assert {line["server"] for line in results["lines"]} == {"edgevl"}
    assert results["lines"][0]["prompt_tokens"] == [12 + 256]
    assert results["lines"][0]["ttft_p50_ms"] >= 20  # the role comes at once and is no text


def test_servers_that_are_not_there(run):
    status, results = run([fake("gone", "one that ends", "--no-such-option")])
    assert status == 1
    assert results["lines"] == []


def chunk(**choice):
    return f"data: {json.dumps({'choices': [choice]})}\n".encode()


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}}\r\n'
END = chunk(text="", finish_reason="length")
DONE = b"data: [DONE]\n"


def answer(*timed, tokens=3):
    """Return what a stream of (seconds, line) says of a request of second 1."""
    stream = AnswerStream()
    for now, line in timed:
        stream.add(line, now)
    return stream.answer(1.0, tokens)


def test_a_stream():
    lines = [
        (1.1, b": ping\n"),
        (1.1, chunk(delta={"role": "assistant", "content": ""})),
        (1.2, chunk(delta={"content": "a"})),
        (1.2, b"\n"),
        (1.6, chunk(delta={"reasoning_content": "b"})),
        (1.7, chunk(delta={}, finish_reason="length")),
        (1.8, USAGE),
        (1.9, DONE),
    ]
    read = answer(*lines)
    assert read.ttft_ms == pytest.approx(200)
    assert read.ms_per_token == pytest.approx(500 / 2)
    assert (read.prompt_tokens, read.output_tokens) == (7, 3)


def test_tokens_that_nobody_counted():
    pieces = [(2.0, chunk(text="a", finish_reason=None))] * 4
    assert answer(*pieces[:2], (2, END), (2, DONE)).output_tokens == 3  # two in one piece
    assert answer(*pieces, (2, END), (2, DONE)).output_tokens == 4


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([END, USAGE], r"without \[DONE\]"),
        ([chunk(text="a", finish_reason="stop"), DONE], "finished by 'stop'"),
        ([DONE], "finished by None"),
        ([END, USAGE.replace(b"3", b"2"), DONE], "2 tokens instead of 3"),
        ([b'data: {"error": {"message": "no memory"}}\n'], "in the stream: .*no memory"),
    ],
)
def test_streams_that_fail(lines, error):
    with pytest.raises(RequestFailedError, match=error):
        answer(*((2.0, line) for line in lines))


@pytest.mark.parametrize("line", [b"data: {\n", b"data: {}\n", b"data: 1\n"])
def test_what_is_no_stream_is_an_error_of_the_request(line, monkeypatch):
    import asyncio

    import load_generator

    class Response:
        status = 200

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        @property
        async def content(self):
            yield line

    class Session:
        def post(self, url, json):
            return Response()

    got = asyncio.run(load_generator._ask(Session(), "", {"max_tokens": 1}))
    assert got.error.startswith("not an OpenAI stream: ")


def test_nobody_listens():
    from load_generator import run_load

    load = run_load("http://127.0.0.1:9/v1/completions", [{"max_tokens": 1}] * 3, 2)
    assert {answer.error for answer in load.answers} == {"connection: ClientConnectorError"}
    assert len(load.answers) == 3


def test_percentiles():
    assert percentile([], 50) is None
    assert percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert percentile([float(n) for n in range(101)], 95) == 95


def loads():
    """Three rounds in which 20, 10 and 5 tokens a second arrived; a request of the last failed."""
    good = [Answer(ttft_ms=ttft, ms_per_token=5.0, output_tokens=20) for ttft in (1, 2, 3, 4, 5)]
    return [
        Load(2.0, 0.1, tuple(good[:2])),
        Load(4.0, 0.1, tuple(good[2:4])),
        Load(4.0, 1.0, (good[4], Answer(error="lost"))),
    ]


def test_a_summary():
    figures = summary(loads())
    assert figures["output_tokens_per_s"] == 10
    assert figures["requests_per_s"] == 0.5
    assert figures["ttft_p50_ms"] == 3
    assert figures["ttft_p95_ms"] == pytest.approx(4.8)
    assert figures["errors"] == {"lost": 1}
    assert figures["requests"] == 6
    assert figures["client_processor_share"] == 0.25


def test_the_table():
    nothing = summary([Load(1.0, 0.1, (Answer(error="lost"),))])
    half = {**summary(loads()), "output_tokens_per_s": 5.0}
    results = {
        "machine": {"cpu": "C", "threads": 2, "read_bandwidth_gb_s": None},
        "date": "2025-01-31",
        "model": "m",
        "precision": "int4",
        "rounds": 3,
        "prompt_tokens": 128,
        "shared_tokens": 100,
        "generate": 64,
        "temperature": 0.0,
        "image": False,
        "lines": [
            {"clients": 1, "server": "edgevl", "label": "EdgeVL", **half},
            {"clients": 8, "server": "edgevl", "label": "EdgeVL", **summary(loads())},
            {"clients": 8, "server": "peer", "label": "a peer", **half},
            {"clients": 8, "server": "lost", "label": "lost", **nothing},
        ],
        "unavailable": {},
    }
    results["lines"].insert(1, {"clients": 1, "server": "peer", "label": "a peer", **half})
    results["lines"].insert(2, {"clients": 1, "server": "lost", "label": "lost", **nothing})
    table = markdown(results)
    assert "prompts of 128 tokens, the first 100 the same, answers of 64 at temperature 0" in table
    assert "| output tokens/s | times 1 client | EdgeVL times it |" in table
    assert "| 8 | EdgeVL | 10.0 | 2.00 | 1.00 | 0.50 | 3 / 5 | 5.0 | 1 of 6 |" in table
    assert "| 8 | a peer | 5.0 | 1.00 | 2.00 | 0.50 | 3 / 5 | 5.0 | 1 of 6 |" in table
    assert "| 8 | lost | 0.0 | – | – | 0.00 | – / – | – | 1 of 1 |" in table


def test_prompts():
    workload = Workload(TOKENIZER, prompt_tokens=40, shared_tokens=10, output_tokens=5)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    bodies = workload.bodies("m", 20, [1, 4], 0.0) + workload.bodies("m", 20, [1, 8], 0.0)
    prompts = [body["prompt"] for body in bodies]
    ids = [tokenizer.encode(prompt, add_special_tokens=False).ids for prompt in prompts]
    assert {len(prompt) for prompt in ids} == {40}
    assert len({tuple(prompt[:10]) for prompt in ids}) == 1
    assert len({tuple(prompt[10:20]) for prompt in ids}) == 40
    assert workload.bodies("m", 20, [1, 4], 0.0) == bodies[:20]


def test_pictures():
    workload = Workload(TOKENIZER, prompt_tokens=4, shared_tokens=0, output_tokens=5)
    bodies = [workload.with_picture(body, [1]) for body in workload.bodies("m", 2, [1], 0.0)]
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in bodies]
    assert urls[0] != urls[1]
    for url in urls:
        picture = Image.open(io.BytesIO(base64.b64decode(url.split(",")[1])))
        assert picture.size == (PICTURE_SIZE, PICTURE_SIZE)


def test_command_lines(tmp_path):
    setting = servers.Setting(tmp_path, "m", "int4", threads=2, clients=16, positions=192)
    for server in servers.SERVERS.values():
        assert "4321" in server.command(setting, 4321)
    batched = servers.LlamaServer.command(setting, 4321)
    assert batched[batched.index("--ctx-size") + 1] == str(16 * (192 + 64))
    queue = servers.EdgeVLServer.command(setting, 4321)
    assert int(queue[queue.index("--max-queue") + 1]) >= 16


class Here(Peer):
    """A peer that runs in this Python."""

    name = "here"


def test_packages_that_cannot_be_added(tmp_path):
    for _ in range(2):  # the second time, too
        with pytest.raises(environments.UnavailableError, match=r"not-there.*add-here\.log"):
            environments.add(["./not-there==1"], Here, tmp_path)


def test_packages_are_added_once(tmp_path, monkeypatch):
    (tmp_path / "env" / "here").mkdir(parents=True)
    added = []
    monkeypatch.setattr(environments, "run", lambda command, *_: added.append(command[-1]))
    environments.add(["one"], Here, tmp_path)
    environments.add(["one", "two"], Here, tmp_path)
    assert added == ["one", "two"]


@pytest.mark.parametrize(
    "wrong",
    [["--clients", "1,0"], ["--only", "nobody"], ["--shared-tokens", "128"], ["--rounds", "x"]],
)
def test_wrong_arguments(wrong, tmp_path):
    script = Path(serving.__file__)
    command = [sys.executable, str(script), "--work", str(tmp_path), *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert wrong[0] in done.stderr
    assert "Traceback" not in done.stderr
