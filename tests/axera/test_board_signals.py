"""What is left in an NPU's memory by commands that a signal ends: nothing, whatever they are at.

The emulator keeps its counters in a file (EDGEVL_EMULATOR_COUNTERS), where they can be read while a
command runs and after its end. Calls take 20 ms each, and loading a model 100 ms, most of it in the
library: that is where signals meet a program on a board, too.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest

from edgevl.axera import layout
from edgevl.axera.npu.libraries import emulator_directory
from edgevl.errors import BoardError
from edgevl.loading import locate

pytest.importorskip("cffi")
pytest.importorskip("edgevl._native", reason="the native engine is not built")
try:
    emulator_directory()
except BoardError as missing:
    pytest.skip(str(missing), allow_module_level=True)

from emulated_board import Counters
from emulated_directory import write
from repository import EXAMPLES

CALL_MS, LOAD_MS = 20.0, 100
#: Of the shipped model: four layers, the output layer, the vision encoder.
MODELS = 6


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The shipped model, compiled for an NPU that takes `CALL_MS` for every call."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("group_times_ms", "post_time_ms", "vision_time_ms"):
            ms = [CALL_MS] * 10 if name == "group_times_ms" else CALL_MS
            patch.setattr(f"edgevl.boards.estimates.{name}", lambda *_, ms=ms, target: ms)
        directory = tmp_path_factory.mktemp("signals") / "tiny"
        return write(directory, locate("tiny"), layout.BoardShape())


class Command:
    """``edgevl`` in a process of its own, and what its NPU holds."""

    def __init__(self, directory, *args, npu="ax", ignored=(), **environment):
        self.file = directory / "counters"

        def prepare():
            # Which shells have their background jobs ignore; nohup ignores the last.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                ignore = number in ignored
                signal.signal(number, signal.SIG_IGN if ignore else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgevl", *map(str, args)],
            env={
                **os.environ,
                "EDGEVL_NPU": npu,
                "EDGEVL_EMULATOR_COUNTERS": str(self.file),
                "EDGEVL_EMULATOR_TIMING": "1",
                "EDGEVL_EMULATOR_LOAD": str(LOAD_MS),
                "EDGEVL_EMULATOR_COMPUTE": "0",
                "EDGEVL_EMULATOR_THREADS": "1",
                "XDG_CACHE_HOME": str(directory),
                "LC_ALL": "C.UTF-8",
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=prepare,
        )

    def counters(self):
        try:
            data = self.file.read_bytes()
        except FileNotFoundError:
            return Counters()
        return Counters.from_buffer_copy(data) if len(data) else Counters()

    def wait_for(self, reached, seconds=60):
        end = time.monotonic() + seconds
        while not reached(self.counters()):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end, "waited in vain"
            time.sleep(0.001)

    def end(self, *numbers):
        """Send signals, one after the other; return exit status and standard error."""
        for number in numbers:
            self.process.send_signal(number)
            time.sleep(0.05)
        try:
            _, said = self.process.communicate(timeout=30)
            self.said = said
        finally:
            self.process.kill()
        assert "Traceback" not in said
        assert "Exception ignored" not in said
        return self.process.returncode, said

    def check_freed(self):
        left = self.counters()
        assert left.cmm_peak_bytes > 0
        assert (left.blocks, left.models, left.cmm_bytes, left.weight_bytes) == (0, 0, 0, 0)
        assert left.problems == 0, self.said


#: What a command is at: how many models it has loaded, and how many calls it has made. A picture
#: is a call, a chunk one for each layer and one for the logits.
LOADING = lambda counted: counted.models >= 2  # noqa: E731
PREFILLING = lambda counted: counted.runs >= 2  # noqa: E731
DECODING = lambda counted: counted.runs >= 13  # noqa: E731
PHASES = {"loading": LOADING, "prefilling": PREFILLING, "decoding": DECODING}

QUESTION = "What number is on the display?"


@pytest.fixture
def commands(tiny, tmp_path):
    """The arguments of commands that load a model and answer for a while, by name."""
    picture = tmp_path / "meter.png"
    shutil.copyfile(EXAMPLES / "meter.png", picture)
    questions = tmp_path / "questions.jsonl"
    row = {"image": picture.name, "question": QUESTION}
    asked = tmp_path / "asked.jsonl"
    asked.write_text(3 * (json.dumps(row) + "\n"))
    row |= {"answer": "7305", "family": "numbers"}
    questions.write_text(3 * (json.dumps(row) + "\n"))
    text = tmp_path / "text.txt"
    text.write_text("The number on the display is 7305. " * 20)
    output = tmp_path / "out.jsonl"
    return {
        "chat": ["chat", tiny, "-q", QUESTION, "-i", picture],
        "chat --json": ["chat", tiny, "-q", QUESTION, "-i", picture, "--json"],
        "bench": ["bench", tiny, "--prompt-tokens", "64", "--generate", "32", "--runs", "2"],
        "eval --vqa": ["eval", tiny, "--vqa", questions],
        "eval --perplexity": ["eval", tiny, "--perplexity", text],
        "batch": ["batch", tiny, "--input", asked, "-o", output],
        "batch -o -": ["batch", tiny, "--input", asked, "-o", "-"],
    }


@pytest.mark.parametrize(
    ("name", "number", "phase"),
    [
        *(
            ("chat", number, phase)
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
            for phase in PHASES
        ),
        ("chat --json", signal.SIGTERM, "decoding"),
        ("bench", signal.SIGHUP, "loading"),
        ("bench", signal.SIGTERM, "decoding"),
        ("eval --vqa", signal.SIGTERM, "loading"),
        ("eval --vqa", signal.SIGHUP, "decoding"),
        ("eval --perplexity", signal.SIGINT, "loading"),
        ("eval --perplexity", signal.SIGTERM, "decoding"),
        ("batch", signal.SIGTERM, "loading"),
        ("batch", signal.SIGHUP, "decoding"),
        ("batch -o -", signal.SIGTERM, "decoding"),
    ],
)
def test_a_signal_frees_the_npu(commands, tmp_path, name, number, phase):
    command = Command(tmp_path, *commands[name])
    command.wait_for(PHASES[phase])
    status, said = command.end(number)
    assert status == 128 + number
    assert "error" not in said
    command.check_freed()


@pytest.mark.parametrize("phase", PHASES)
def test_a_card_is_freed_too(commands, tmp_path, phase):
    command = Command(tmp_path, *commands["chat"], npu="axcl")
    command.wait_for(PHASES[phase])
    assert command.end(signal.SIGTERM)[0] == 143
    command.check_freed()


@pytest.mark.parametrize("phase", ["loading", "decoding"])
def test_a_second_ctrl_c_changes_nothing(commands, tmp_path, phase):
    command = Command(tmp_path, *commands["chat"])
    command.wait_for(PHASES[phase])
    command.process.send_signal(signal.SIGINT)
    assert command.end(signal.SIGINT, signal.SIGTERM)[0] in (130, 143)
    command.check_freed()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_what_is_ignored_stays_ignored(commands, tmp_path, number):
    command = Command(tmp_path, *commands["chat"], "--max-tokens", "2", ignored=[number])
    command.wait_for(LOADING)
    assert command.end(number)[0] == 0
    command.check_freed()


def test_the_page_frees_the_npu(tiny, tmp_path):
    pytest.importorskip("gradio")
    command = Command(tmp_path, "ui", tiny, "--port", "0", TMPDIR=str(tmp_path))
    command.wait_for(LOADING)
    assert command.end(signal.SIGTERM)[0] == 143
    command.check_freed()
    command = Command(tmp_path, "ui", tiny, "--port", "0", TMPDIR=str(tmp_path))
    url = command.process.stdout.readline().split()[0]
    assert urllib.request.urlopen(url, timeout=20).status == 200
    assert command.counters().models == MODELS
    assert command.end(signal.SIGHUP)[0] == 0  # to be stopped is how a page ends
    command.check_freed()


@pytest.fixture
def serve(tiny, tmp_path):
    pytest.importorskip("fastapi")
    pytest.importorskip("prometheus_client")

    def start():
        args = ["serve", tiny, "--port", "0", "--no-ui", "--grace", "0.3"]
        return Command(tmp_path, *args)

    return start


def ask(command):
    """Send a request whose answer takes long, and return when it is being computed."""
    line = command.process.stderr.readline()
    while "served at" not in line:
        line = command.process.stderr.readline()
    url = line.split("served at ")[1].split("/v1")[0]
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 500,
        "temperature": 1,
    }
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )

    def post():
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(request, timeout=30).read()

    threading.Thread(target=post, daemon=True).start()
    command.wait_for(DECODING)


def test_a_server_frees_the_npu(serve):
    command = serve()
    command.wait_for(LOADING)  # which another thread does
    assert command.end(signal.SIGTERM)[0] == 0
    command.check_freed()
    command = serve()
    ask(command)
    assert command.end(signal.SIGHUP)[0] == 0
    command.check_freed()


def test_a_server_that_is_stopped_in_haste_frees_the_npu(serve):
    command = serve()
    ask(command)
    assert command.end(signal.SIGINT, signal.SIGINT)[0] == 130
    command.check_freed()
