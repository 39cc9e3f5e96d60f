"""What the host does for a token on a board: EdgeVL's engine beside a loop as the vendor's demo's.

    edgevl synth --preset internvl3_5-1b -o CHECKPOINT
    edgevl compile CHECKPOINT -o BOARD --target ax650 --emulate
    python benchmarks/axera_host.py BOARD

Both run the same emulated model in one process, in turn, round after round. The emulator computes
nothing (EDGEVL_EMULATOR_COMPUTE=0), so what is left is the host's share: Python, copies, calls.
Time inside the emulator's libraries is subtracted. Flushing the processor's cache, which costs time
on a board, is counted and not timed. The loop uses the vendor's package `axengine`, unmodified; see
axengine_loop.py.
"""

from __future__ import annotations

import argparse
import ctypes
import datetime
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from edgevl.axera.layout import BoardShape
from edgevl.axera.npu.libraries import emulator_directory

#: Settings of the emulator: it only counts, and has room for the model twice.
SETTINGS = {
    "EDGEVL_NPU": "ax",
    "EDGEVL_EMULATOR_COMPUTE": "0",
    "EDGEVL_EMULATOR_CHECK": "0",
    "EDGEVL_EMULATOR_CMM": "12288",
}
_COUNTERS = (
    "runs",
    "flushes",
    "invalidates",
    "memcpys",
    "allocations",
    "flushed_bytes",
    "invalidated_bytes",
    "memcpy_bytes",
    "problems",
    "emulator_ns",
    "npu_ns",
    "cmm_bytes",
    "cmm_peak_bytes",
    "weight_bytes",
    "blocks",
    "models",
)


class Counters(ctypes.Structure):
    """``EDGEVL_EMULATOR_COUNTERS`` of native/emulator/counters.h."""

    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTERS]


@dataclass
class Step:
    """What one token, or one prefill, cost the host.

    Attributes:
        host_ms: time outside of the emulator.
        emulator_ms: time inside.
        runs: calls of a compiled model.
        calls: those and the calls that flush or invalidate.
        copied_bytes: between the program's arrays and NPU memory, in both directions.
        flushed_bytes: of the processor's cache, flushed or invalidated.
    """

    host_ms: float
    emulator_ms: float
    runs: float
    calls: float
    copied_bytes: float = 0.0
    flushed_bytes: float = 0.0


class Emulator:
    """Reads what the emulator's libraries counted."""

    def __init__(self) -> None:
        """Load the library that the engines load, too."""
        self._library = ctypes.CDLL(str(emulator_directory() / "libax_engine.so"))

    def counters(self) -> Counters:
        """Return the totals so far."""
        counters = Counters()
        self._library.EDGEVL_EMULATOR_Counters(ctypes.byref(counters))
        return counters

    def measure(self, work: Callable[[], object], steps: int) -> Step:
        """Do ``work``, which is ``steps`` steps: -> what one took; copies are counted elsewhere."""
        before = self.counters()
        started = time.perf_counter_ns()
        work()
        elapsed = time.perf_counter_ns() - started
        after = self.counters()
        gone = {name: getattr(after, name) - getattr(before, name) for name in _COUNTERS}
        if gone["problems"]:
            raise SystemExit("the emulator refused calls: see what it says above")
        return Step(
            host_ms=(elapsed - gone["emulator_ns"]) / 1e6 / steps,
            emulator_ms=gone["emulator_ns"] / 1e6 / steps,
            runs=gone["runs"] / steps,
            calls=(gone["runs"] + gone["flushes"] + gone["invalidates"]) / steps,
            flushed_bytes=(gone["flushed_bytes"] + gone["invalidated_bytes"]) / steps,
        )


class Ours:
    """EdgeVL's engine."""

    name = "EdgeVL"

    def __init__(self, directory: Path) -> None:
        """Load the model."""
        from edgevl.loading import load_engine, open_model
        from edgevl.options import LoadOptions

        self.model = open_model(directory, "axera")
        self.engine = load_engine(self.model, LoadOptions("axera"))
        self._sequence = self.engine.new_sequence()

    def prefill(self, token_ids: NDArray[np.int64]) -> int:
        """Start a sequence: -> the likeliest next token."""
        self._sequence.rewind(0)
        return int(self.engine.prefill(self._sequence, self.engine.embed(token_ids)).argmax())

    def decode(self, token_id: int) -> int:
        """Append a token: -> the likeliest next one."""
        return int(self.engine.decode([self._sequence], [token_id]).argmax())

    def copied(self, work: Callable[[], object]) -> int:
        """Do ``work`` and return the bytes copied to and from NPU memory."""
        from edgevl.axera.npu import ax

        total = 0
        write, read = ax.AxMemory.write, ax.AxMemory.read

        def counted_write(memory: Any, offset: int, values: NDArray[Any]) -> None:
            nonlocal total
            total += values.nbytes
            write(memory, offset, values)

        def counted_read(memory: Any, offset: int, nbytes: int) -> NDArray[np.uint8]:
            nonlocal total
            total += nbytes
            return read(memory, offset, nbytes)

        with (
            mock.patch.object(ax.AxMemory, "write", counted_write),
            mock.patch.object(ax.AxMemory, "read", counted_read),
        ):
            work()
        return total


class Theirs:
    """The loop through the vendor's package."""

    name = "axengine, as the demo"

    def __init__(self, directory: Path, ours: Ours, shape: BoardShape) -> None:
        """Load the model; its shape is that which ``ours`` found."""
        from axengine_loop import AxengineLoop

        self._loop = AxengineLoop(directory, ours.model.config.text, shape)
        self.prefill, self.decode = self._loop.prefill, self._loop.decode

    def copied(self, work: Callable[[], object]) -> int:
        """Do ``work`` and return the bytes copied to and from NPU memory."""
        self._loop.reset_counts()
        work()
        return self._loop.copied_in + self._loop.copied_out


def main() -> int:
    """Measure, print a table."""
    arguments = parse_arguments()
    enter_environment()
    ours = Ours(arguments.board)
    shape = BoardShape(arguments.context, arguments.chunk, arguments.max_prefill)
    subjects = (ours, Theirs(arguments.board, ours, shape))
    results = measure(subjects, ours.model.config.text.vocab_size, arguments)
    if arguments.json:
        print(json.dumps(results))
    else:
        print(table(results))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("board", metavar="BOARD", type=Path)
    parser.add_argument("--context", type=int, default=2047, help="that BOARD was compiled for")
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--max-prefill", type=int, default=1024)
    parser.add_argument("--prompt-tokens", type=int, default=300)
    parser.add_argument("--generate", type=int, default=32, help="tokens to decode in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def enter_environment() -> None:
    """Start anew with the emulator's libraries and settings, which only count from the start."""
    libraries = str(emulator_directory())
    variables = {**SETTINGS, "LD_LIBRARY_PATH": libraries}
    if any(os.environ.get(name) != value for name, value in variables.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **variables})


def measure(
    subjects: tuple[Ours, Theirs], vocabulary: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Measure all in turn: -> medians by subject and step."""
    from edgevl.machine import this_machine

    emulator = Emulator()
    generator = np.random.default_rng(0)
    prompt = generator.integers(0, vocabulary // 2, arguments.prompt_tokens)
    answer = generator.integers(0, vocabulary // 2, arguments.generate)
    samples: dict[tuple[str, str], list[Step]] = {}
    for turn in range(1 + arguments.rounds):
        for subject in subjects if turn % 2 else reversed(subjects):

            def prefill(subject: Ours | Theirs = subject) -> None:
                subject.prefill(prompt)

            def decode(subject: Ours | Theirs = subject) -> None:
                for token in answer.tolist():
                    subject.decode(token)

            for step, work, steps in (("prefill", prefill, 1), ("token", decode, len(answer))):
                measured = emulator.measure(work, steps)
                if turn:  # the first round warms up
                    samples.setdefault((subject.name, step), []).append(measured)
    for subject in subjects:
        copied = subject.copied(partial(subject.prefill, prompt))
        samples[subject.name, "prefill"][0].copied_bytes = copied
        copied = subject.copied(partial(subject.decode, int(answer[0])))
        samples[subject.name, "token"][0].copied_bytes = copied
    machine = this_machine()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {"cpu": machine.cpu, "cores": machine.usable_cores},
        "load_average": os.getloadavg()[0],
        "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt_tokens,
        "generate": arguments.generate,
        "steps": {
            f"{step}: {name}": {
                "host_ms": statistics.median(each.host_ms for each in steps),
                "fastest_ms": min(each.host_ms for each in steps),
                "slowest_ms": max(each.host_ms for each in steps),
                "emulator_ms": statistics.median(each.emulator_ms for each in steps),
                "runs": steps[0].runs,
                "calls": steps[0].calls,
                "copied_bytes": steps[0].copied_bytes,
                "flushed_bytes": steps[0].flushed_bytes,
            }
            for (name, step), steps in sorted(samples.items(), key=lambda item: item[0][::-1])
        },
        "ratios": {
            step: statistics.median(
                theirs.host_ms / ours.host_ms
                for ours, theirs in zip(
                    samples[subjects[0].name, step], samples[subjects[1].name, step], strict=True
                )
            )
            for step in ("prefill", "token")
        },
    }


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    lines = [
        f"{results['machine']['cpu']}, {results['machine']['cores']:g} cores, load "
        f"{results['load_average']:.1f}, {results['date']}; medians of {results['rounds']} rounds; "
        f"prompts of {results['prompt_tokens']} tokens, {results['generate']} decoded.",
        "",
        "| | host ms (fastest to slowest) | in the emulator | model calls | all calls | copied | "
        "flushed |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, step in results["steps"].items():
        lines.append(
            f"| {name} | {step['host_ms']:.2f} ({step['fastest_ms']:.2f} to "
            f"{step['slowest_ms']:.2f}) | {step['emulator_ms']:.2f} | {step['runs']:.0f} | "
            f"{step['calls']:.0f} | "
            f"{step['copied_bytes'] / 1e6:.2f} MB | {step['flushed_bytes'] / 1e6:.2f} MB |"
        )
    ratios = ", ".join(f"{step} {ratio:.1f}" for step, ratio in results["ratios"].items())
    return "\n".join([*lines, "", f"Host time of the loop over EdgeVL's, by round: {ratios}."])


if __name__ == "__main__":
    raise SystemExit(main())
