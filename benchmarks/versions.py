"""Is one version of EdgeVL as fast as another: engine, server and commands, in one interleaved run.

    python benchmarks/versions.py BEFORE AFTER --work DIR

BEFORE and AFTER are checkouts, each with its environment in ``.venv`` (``make demo`` and
``pip install '.[serve]'`` make it); each is measured by its own ``benchmarks/worker.py``. Both are
loaded at once and stopped (SIGSTOP) in turn. DIR may be that of compare.py. It prints a table; the
samples are in DIR/versions.json. A ratio is the median of the rounds' own: above 1, AFTER is slower
or takes more.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import compare
import serving
from environments import build, environment, models_of
from peers import PEERS
from process import Worker
from servers import EdgeVLServer, RunningServer, Setting, start
from stacks import Stack
from workload import Workload

#: What a user waits for before anything is computed, and the first token of an answer.
COMMANDS = {
    "import edgevl": ["-c", "import edgevl"],
    "edgevl --help": ["-m", "edgevl", "--help"],
    "edgevl chat to its first token": [
        *("-m", "edgevl", "chat", "{checkpoint}", "-q", "Hello", "--max-tokens", "1"),
        *("--precision", "int4"),
    ],
}

#: Runs a command whose output goes nowhere, and prints its milliseconds and its peak RSS in KiB.
LAUNCHER = """
import os, sys, time
begun = time.perf_counter()
away = (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)
started = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[away])
_, status, usage = os.wait4(started, 0)
print(1000 * (time.perf_counter() - begun), usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""
#: What is told of a command.
UNITS = ("ms", "peak RSS in MB")


def main() -> int:
    """Read the arguments, measure, print."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    versions = {"before": arguments.before.resolve(), "after": arguments.after.resolve()}
    checkpoint = compare.make_checkpoint(work)
    build(PEERS["edgevl"], work, checkpoint)
    samples: dict[str, dict[str, list[float]]] = {}
    rates: list[list[float]] = []
    for measured, probed in (
        engines(versions, work, arguments),
        servers(versions, work, checkpoint, arguments),
        (commands(versions, checkpoint, arguments.commands), []),
    ):
        samples |= measured
        rates += probed
    machine = compare.describe_machine(arguments.threads, rates)
    results = {"versions": {k: str(v) for k, v in versions.items()}, "machine": machine}
    (work / "versions.json").write_text(json.dumps({**results, "samples": samples}, indent=2))
    print("\n".join(table(samples, machine)))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments, those of compare.py and serving.py among them."""
    from edgevl.machine import this_machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("before", type=Path, metavar="BEFORE")
    parser.add_argument("after", type=Path, metavar="AFTER")
    parser.add_argument("--work", type=Path, required=True, help="directory to work in, 3 GB")
    parser.add_argument("--threads", type=compare.count, default=this_machine().threads)
    parser.add_argument("--rounds", type=compare.count, default=9)
    parser.add_argument("--prompt-tokens", type=compare.counts, default=[300, 1024])
    parser.add_argument("--after-tokens", dest="after_tokens", type=compare.count, default=300)
    parser.add_argument("--generate", type=compare.count, default=64, help="tokens to decode")
    parser.add_argument("--clients", type=compare.counts, default=[1, 8])
    parser.add_argument("--asked", type=compare.count, default=128, help="tokens of a request")
    parser.add_argument("--commands", type=compare.count, default=9, help="runs of each command")
    return parser.parse_args()


def python_of(checkout: Path) -> Path:
    """Return the Python of a checkout's environment."""
    return checkout / ".venv" / "bin" / "python"


def variables_of(threads: int) -> dict[str, str]:
    """Return what the environment of a version's process has: its own modules, so many threads."""
    return {"PYTHONPATH": "", **dict.fromkeys(compare.THREAD_VARIABLES, str(threads))}


def engines(
    versions: dict[str, Path], work: Path, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, list[float]]], list[list[float]]]:
    """Measure the steps of both engines: -> milliseconds by step and version, machine's rates."""
    workers: dict[str, Worker] = {}
    probe = compare.start_probe(work, arguments.threads)
    stacks = [Stack(name, "edgevl", "int4", "int8") for name in versions]
    variables = variables_of(arguments.threads)
    settings = argparse.Namespace(**{**vars(arguments), "after": arguments.after_tokens})
    try:
        for name, checkout in versions.items():
            run = [str(work / "checkpoint"), str(models_of(PEERS["edgevl"], work)), "int4", "int8"]
            workers[name] = Worker(
                python_of(checkout),
                ["run", "edgevl", *run, str(arguments.threads)],
                work / "log" / f"version-{name}.log",
                environment(**variables),
                checkout / "benchmarks" / "worker.py",
            )
            workers[name].ready()
        unavailable: dict[str, str] = {}
        timed, rates = compare.run_rounds(stacks, workers, probe, unavailable, settings)
        if unavailable:
            raise SystemExit(str(unavailable))
        samples = {
            f"{step}, ms": {name: timed[name][step] for name in versions}
            for step in timed["before"]
        }
        samples["peak RSS of the engine, MB"] = {
            name: [worker.call("peak_rss_bytes") / 1e6] for name, worker in workers.items()
        }
        return samples, rates
    finally:
        for worker in (*workers.values(), *([probe] if probe else [])):
            worker.close()


def servers(
    versions: dict[str, Path], work: Path, checkpoint: Path, arguments: argparse.Namespace
) -> tuple[dict[str, dict[str, list[float]]], list[list[float]]]:
    """Measure both servers under load: -> milliseconds by clients and version, machine's rates."""
    tokens = arguments.asked
    setting = Setting(
        work,
        str(checkpoint),
        "int4",
        arguments.threads,
        max(arguments.clients),
        tokens + arguments.generate,
    )
    workload = Workload(checkpoint / "tokenizer.json", tokens, 0, arguments.generate)
    asked = {"image": False, "temperature": 0.0, "prompt_tokens": tokens, "requests": 8}
    settings = argparse.Namespace(**{**vars(arguments), **asked})
    clients = serving.Clients(settings, workload)
    running: dict[str, RunningServer] = {}
    probe = compare.start_probe(work, arguments.threads)
    variables = variables_of(arguments.threads)
    try:
        for name, checkout in versions.items():
            running[name] = start(server_of(name, checkout), setting, variables)
            clients.check(running[name])
            running[name].pause()
        loads, rates = serving.run_rounds(running, probe, clients, settings)
    finally:
        started: list[RunningServer | Worker] = [*running.values(), *([probe] if probe else [])]
        for process in started:
            process.close()
    if failed := [a.error for of in loads.values() for load in of for a in load.answers if a.error]:
        raise SystemExit(f"a request failed: {failed[0]}")
    return {
        f"a token with {count} clients, ms": {
            name: [
                1000 * load.seconds / sum(answer.output_tokens for answer in load.succeeded)
                for load in loads[count, name]
            ]
            for name in versions
        }
        for count in arguments.clients
    }, rates


def server_of(version: str, checkout: Path) -> type[EdgeVLServer]:
    """Return ``edgevl serve`` of a checkout."""

    class Version(EdgeVLServer):
        name = f"edgevl-{version}"
        label = f"EdgeVL {version}"

        @classmethod
        def command(cls, setting: Setting, port: int) -> list[str]:
            return [str(python_of(checkout)), *super().command(setting, port)[1:]]

    return Version


def commands(
    versions: dict[str, Path], checkpoint: Path, runs: int
) -> dict[str, dict[str, list[float]]]:
    """Run commands as a whole, in turn: -> milliseconds and peak megabytes by name and version."""
    samples: dict[str, dict[str, list[float]]] = {}
    for number in range(runs + 1):  # the first warms up
        for command, words in COMMANDS.items():
            for name in [*versions] if number % 2 else [*versions][::-1]:
                arguments = [word.format(checkpoint=checkpoint) for word in words]
                figures = whole([str(python_of(versions[name])), *arguments])
                for unit, value in zip(UNITS, figures, strict=True) if number else ():
                    by_version = samples.setdefault(f"{command}, {unit}", {})
                    by_version.setdefault(name, []).append(value)
    return samples


def whole(command: list[str]) -> tuple[float, float]:
    """Run a command outside of any checkout: -> its milliseconds and its peak RSS in megabytes.

    A small process starts it and asks the system: one that this process forked would have its peak.
    """
    kept = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [sys.executable, "-S", "-E", "-c", LAUNCHER, *command],
            cwd=directory,
            env={**kept, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-1000:]}")
    milliseconds, kilobytes = map(float, done.stdout.split())
    return milliseconds, kilobytes * 1024 / 1e6


def table(samples: dict[str, dict[str, list[float]]], machine: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a Markdown table: medians, and the median of the rounds' ratios."""
    bandwidth, rate = machine["read_bandwidth_gb_s"], machine["int8_gops"]
    yield f"{machine['cpu']}, {machine['threads']} threads"
    if bandwidth:
        yield f"reads {bandwidth:.1f} GB/s, {rate:.0f} int8 Gop/s"
    yield "\n| | before | after | after / before |\n|---|---:|---:|---:|"
    for name, by_version in samples.items():
        before, after = by_version["before"], by_version["after"]
        ratio = statistics.median(b / a for a, b in zip(before, after, strict=True))
        medians = f"{statistics.median(before):.2f} | {statistics.median(after):.2f}"
        yield f"| {name} | {medians} | {ratio:.3f} |"


if __name__ == "__main__":
    sys.exit(main())
