"""The servers that are compared: how each is set up, started and asked whether it is there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from environments import (
    UnavailableError,
    add,
    build,
    environment,
    install,
    last_line,
    models_of,
    python_of,
    run,
)
from peers import PEERS
from process import stop

#: Longest time in seconds until a server has loaded its model and packed its weights.
START_S = 300
#: Positions that a server which counts them has beyond those of prompt and answer.
SPARE_POSITIONS = 64
LLAMA_CPP = PEERS["llama_cpp"]


@dataclass(frozen=True)
class Setting:
    """What all servers are told.

    Attributes:
        work: working directory.
        model: what `edgevl serve` is to serve; the peers have the checkpoint's.
        precision: of its weights.
        threads: that compute.
        clients: most of them at once.
        positions: of the longest prompt with its answer.
    """

    work: Path
    model: str
    precision: str
    threads: int
    clients: int
    positions: int


class Server(ABC):
    """A program that serves the model by OpenAI's API."""

    #: Name on the command line.
    name: ClassVar[str]
    #: Name in the table.
    label: ClassVar[str]
    #: Path that answers with status 200 once the model is loaded.
    ready_path: ClassVar[str]

    @classmethod
    @abstractmethod
    def set_up(cls, setting: Setting) -> None:
        """Install and build what is needed.

        Raises:
            UnavailableError: a tool failed.
        """

    @classmethod
    @abstractmethod
    def command(cls, setting: Setting, port: int) -> list[str]:
        """Return the command line that serves on a port of 127.0.0.1."""


class EdgeVLServer(Server):
    """``edgevl serve``, from the Python that runs the benchmark."""

    name = "edgevl"
    label = "EdgeVL"
    ready_path = "/ready"

    @classmethod
    def set_up(cls, setting: Setting) -> None:
        """Need nothing."""

    @classmethod
    def command(cls, setting: Setting, port: int) -> list[str]:
        """Return the command line, with room in the queue for all clients."""
        return [
            *(sys.executable, "-m", "edgevl", "serve", setting.model, "--port", str(port)),
            *("--precision", setting.precision, "--threads", str(setting.threads)),
            *("--max-queue", str(2 * setting.clients), "--keep-mb", "0"),
        ]


class LlamaCppPythonServer(Server):
    """llama-cpp-python's server, which answers one request after the other."""

    name = "llama_cpp.server"
    label = "llama_cpp.server Q4_0"
    ready_path = "/v1/models"

    @classmethod
    def set_up(cls, setting: Setting) -> None:
        """Add the server's packages to the environment of the peer."""
        install(LLAMA_CPP, setting.work)
        binding = LLAMA_CPP.requirements[0]
        add([binding.replace("==", "[server]==")], LLAMA_CPP, setting.work)
        build(LLAMA_CPP, setting.work, setting.work / "checkpoint")

    @classmethod
    def command(cls, setting: Setting, port: int) -> list[str]:
        """Return the command line: a request waits for the one before, which is not cut short."""
        return [
            *(str(python_of(LLAMA_CPP, setting.work)), "-m", "llama_cpp.server"),
            *("--model", str(_gguf(setting)), "--host", "127.0.0.1", "--port", str(port)),
            *("--n_ctx", str(setting.positions + SPARE_POSITIONS), "--n_batch", "512"),
            *("--n_threads", str(setting.threads), "--n_threads_batch", str(setting.threads)),
            *("--flash_attn", "True", "--logits_all", "False", "--verbose", "False"),
            *("--interrupt_requests", "False"),
        ]


class LlamaServer(Server):
    """llama.cpp's own server in C++, which batches, built from the sources of the binding."""

    name = "llama-server"
    label = "llama-server Q4_0"
    ready_path = "/health"
    #: What builds it.
    tools: ClassVar[tuple[str, ...]] = ("cmake>=3.18,<5", "ninja>=1.11,<2")
    options: ClassVar[tuple[str, ...]] = (
        "-DCMAKE_BUILD_TYPE=Release",
        "-DBUILD_SHARED_LIBS=OFF",
        "-DGGML_NATIVE=ON",
        "-DLLAMA_BUILD_TESTS=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_BUILD_APP=OFF",
        "-DLLAMA_OPENSSL=OFF",
    )

    @classmethod
    def set_up(cls, setting: Setting) -> None:
        """Build the program from the source distribution, unless that has been done."""
        install(LLAMA_CPP, setting.work)
        build(LLAMA_CPP, setting.work, setting.work / "checkpoint")
        directory = setting.work / cls.name
        wanted = repr((LLAMA_CPP.requirements[0], cls.options))
        stamp = directory / "built"
        if stamp.exists() and stamp.read_text() == wanted:
            return
        print(f"building {cls.name}", file=sys.stderr)
        add(cls.tools, LLAMA_CPP, setting.work)
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir()
        sources = _unpacked_sources(setting, directory)
        programs = python_of(LLAMA_CPP, setting.work).parent
        log = setting.work / "log" / f"build-{cls.name}.log"
        place = ["-S", sources, "-B", directory / "build", "-G", "Ninja"]
        ninja = f"-DCMAKE_MAKE_PROGRAM={programs / 'ninja'}"
        run([programs / "cmake", *place, ninja, *cls.options], log, os.environ)
        target = ["--target", cls.name, "--parallel", str(setting.threads)]
        run([programs / "cmake", "--build", directory / "build", *target], log, os.environ)
        stamp.write_text(wanted)

    @classmethod
    def command(cls, setting: Setting, port: int) -> list[str]:
        """Return the command line: a slot a client, and no copies of caches of answers past."""
        positions = setting.clients * (setting.positions + SPARE_POSITIONS)
        return [
            *(str(setting.work / cls.name / "build" / "bin" / cls.name), "-m", str(_gguf(setting))),
            *("--host", "127.0.0.1", "--port", str(port)),
            *("--parallel", str(setting.clients), "--ctx-size", str(positions)),
            *("--threads", str(setting.threads), "--threads-batch", str(setting.threads)),
            *("--flash-attn", "on", "--cache-ram", "0"),
        ]


def _gguf(setting: Setting) -> Path:
    return models_of(LLAMA_CPP, setting.work) / "text-q4_0.gguf"


def _unpacked_sources(setting: Setting, directory: Path) -> Path:
    """Return llama.cpp as it stands in the source distribution of the binding."""
    command = [python_of(LLAMA_CPP, setting.work), "-m", "pip", "download", "--no-deps"]
    source = ["--no-binary", ":all:", "--dest", directory, LLAMA_CPP.requirements[0]]
    log = setting.work / "log" / f"download-{LLAMA_CPP.name}.log"
    run([*command, *source], log, os.environ)
    (archive,) = directory.glob("*.tar.gz")
    shutil.unpack_archive(archive, directory)
    archive.unlink()
    (sources,) = directory.glob("*/vendor/llama.cpp")
    return sources


#: Servers by name.
SERVERS: dict[str, type[Server]] = {
    server.name: server for server in (EdgeVLServer, LlamaCppPythonServer, LlamaServer)
}


class RunningServer:
    """A server in a process of its own, which is stopped (SIGSTOP) while it is not measured."""

    def __init__(self, command: list[str], port: int, log: Path, variables: dict[str, str]) -> None:
        """Start the process; `ready` waits until it serves.

        Args:
            command: command line.
            port: on which it serves.
            log: file for all that it prints.
            variables: its environment.
        """
        self._log = log
        self.address = f"http://127.0.0.1:{port}"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=variables
            )

    def ready(self, path: str) -> None:
        """Wait until a path answers with status 200.

        Raises:
            UnavailableError: the process has ended, or did not get there in `START_S`.
        """
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if (status := self._process.poll()) is not None:
                raise UnavailableError(f"{last_line(self._log)} (status {status}, see {self._log})")
            # An answer of another status is an HTTPError, no answer yet a URLError: OSErrors both.
            with contextlib.suppress(OSError):
                _open(self.address + path).close()
                return
            time.sleep(0.1)
        raise UnavailableError(f"not ready after {START_S} s, see {self._log}")

    @cached_property
    def model(self) -> str:
        """The name by which the server knows its model.

        Raises:
            UnavailableError: it does not say.
        """
        models = self._ask("/v1/models").get("data")
        if not models:
            raise UnavailableError(f"/v1/models names none, see {self._log}")
        return models[0]["id"]

    def usage(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Return what a server counts for a request, which is not streamed.

        Raises:
            UnavailableError: it refuses, or counts nothing.
        """
        whole = {k: v for k, v in body.items() if k not in ("stream", "stream_options")}
        usage = self._ask(path, whole).get("usage")
        if not usage:
            raise UnavailableError(f"{path} counts no tokens, see {self._log}")
        return usage

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = json.dumps(body).encode() if body else None
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data, headers)
        try:
            with _open(request) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            message = error.read(300).decode(errors="replace")
            raise UnavailableError(f"{path}: status {error.code}: {message}") from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"{path}: {error}, see {self._log}") from None

    def resume(self) -> None:
        """Let the process run on."""
        self._process.send_signal(signal.SIGCONT)

    def pause(self) -> None:
        """Stop the process."""
        stop(self._process)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()


def _open(request: str | urllib.request.Request) -> Any:
    """Open an address of this machine, whatever proxies the environment names."""
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        request, timeout=START_S
    )


def start(server: type[Server], setting: Setting, variables: dict[str, str]) -> RunningServer:
    """Start a server on a free port and wait until it is there.

    Raises:
        UnavailableError: it failed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    print(f"starting {server.label}", file=sys.stderr)
    log = setting.work / "log" / f"serve-{server.name}.log"
    running = RunningServer(server.command(setting, port), port, log, environment() | variables)
    try:
        running.ready(server.ready_path)
    except UnavailableError:
        running.close()
        raise
    return running
