"""Compare EdgeVL with its peers on this machine: one command, one interleaved run.

    python benchmarks/compare.py --work DIR

Sets up each peer in an environment of its own under DIR, builds its model from one synthetic
checkpoint, then measures all of them in turn, round after round, with the machine's own rates
between. What has been set up is kept; the results are DIR/results.json, .md and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from environments import UnavailableError, build, environment, install, models_of, python_of
from peers import PEERS
from process import Worker
from report import markdown, plot
from stacks import EXACT, STACKS, Stack

PRESET = "internvl3_5-1b"
#: Threads of every library that a peer may use.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def main() -> int:
    """Read the arguments, set up, measure, write."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    stacks = [stack for stack in STACKS if not arguments.only or stack.peer in arguments.only]
    failures = set_up([*stacks, EXACT], work, make_checkpoint(work))
    if arguments.set_up_only:
        for name, reason in failures.items():
            print(f"{name}: {reason}", file=sys.stderr)
        return 1 if failures else 0
    results = measure(stacks, failures, work, arguments)
    (work / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (work / "results.md").write_text(markdown(results))
    plot(results, work / "results.png")
    print(markdown(results))
    return 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    from edgevl.machine import this_machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory to work in, 25 GB")
    parser.add_argument("--only", type=_peers, help="peers to measure, such as edgevl,openvino")
    parser.add_argument("--threads", type=count, default=this_machine().threads)
    parser.add_argument("--rounds", type=count, default=5)
    parser.add_argument("--prompt-tokens", type=counts, default=[128, 300, 1024])
    parser.add_argument("--after", type=count, default=300, help="tokens before decoding")
    parser.add_argument("--generate", type=count, default=64, help="tokens to decode")
    parser.add_argument("--set-up-only", action="store_true", help="install and build, then stop")
    return parser.parse_args()


def count(text: str) -> int:
    """Read a number of an argument: whole, from 1."""
    if not (text.isdecimal() and 1 <= int(text) <= 1 << 16):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Read numbers between commas."""
    return [count(word) for word in text.split(",")]


def _peers(text: str) -> set[str]:
    if unknown := set(text.split(",")) - set(PEERS):
        raise argparse.ArgumentTypeError(f"{unknown} unknown; there are {', '.join(PEERS)}")
    return set(text.split(","))


def make_checkpoint(work: Path) -> Path:
    """Write the checkpoint that all models are built from, unless it is there."""
    checkpoint = work / "checkpoint"
    if not checkpoint.exists():
        command = [sys.executable, "-m", "edgevl", "synth", "--preset", PRESET, "--layout", "hf"]
        subprocess.run([*command, "-o", str(checkpoint)], check=True, env=environment())
    return checkpoint


def set_up(stacks: list[Stack], work: Path, checkpoint: Path) -> dict[str, str]:
    """Install and build what the stacks need: -> why not, by peer."""
    failures: dict[str, str] = {}
    for name in dict.fromkeys(stack.peer for stack in stacks):
        peer = PEERS[name]
        try:
            install(peer, work)
            if peer.models_of:
                install(PEERS[peer.models_of], work)
            build(peer, work, checkpoint)
        except UnavailableError as reason:
            failures[name] = str(reason)
            print(f"{name} is left out: {reason}", file=sys.stderr)
    return failures


def measure(
    stacks: list[Stack], failures: dict[str, str], work: Path, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Start all stacks, check them, measure them in turn: -> the content of results.json."""
    unavailable = {s.name: failures[s.peer] for s in stacks if s.peer in failures}
    workers: dict[str, Worker] = {}
    probe: Worker | None = None
    try:
        exact = None if EXACT.peer in failures else exact_outputs(work, arguments.threads)
        probe = start_probe(work, arguments.threads)
        errors: dict[str, dict[str, float]] = {}
        for stack in stacks:
            if stack.name in unavailable:
                continue
            try:
                worker = workers[stack.name] = start(stack, work, arguments.threads)
                computed = outputs(stack, worker, work / "log" / "computed.npz")
            except UnavailableError as reason:
                unavailable[stack.name] = str(reason)
                continue
            errors[stack.name] = relative_errors(exact, computed) if exact else {}
        running = [stack for stack in stacks if stack.name not in unavailable]
        samples, rates = run_rounds(running, workers, probe, unavailable, arguments)
        return {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "machine": describe_machine(arguments.threads, rates),
            "model": f"synthetic {PRESET}",
            "rounds": arguments.rounds,
            "prompt_tokens": arguments.prompt_tokens,
            "after": arguments.after,
            "generate": arguments.generate,
            "stacks": [
                {
                    **asdict(stack),
                    "medians": {
                        step: statistics.median(values)
                        for step, values in samples[stack.name].items()
                    },
                    "samples": samples[stack.name],
                    "relative_error": errors.get(stack.name, {}),
                    "peak_rss_bytes": workers[stack.name].call("peak_rss_bytes"),
                    "load_ms": workers[stack.name].call("load_ms"),
                }
                for stack in running
                if stack.name not in unavailable
            ],
            "unavailable": unavailable,
        }
    finally:
        for worker in (*workers.values(), *([probe] if probe else [])):
            worker.close()


def start(stack: Stack, work: Path, threads: int) -> Worker:
    """Load a stack in a process of its own and wait until it is there."""
    peer = PEERS[stack.peer]
    variables = {name: str(threads) for name in THREAD_VARIABLES} | stack.environment
    log = work / "log" / f"run-{stack.name.replace(' ', '_').replace(',', '')}.log"
    worker = Worker(
        python_of(peer, work),
        [
            "run",
            stack.peer,
            str(work / "checkpoint"),
            str(models_of(peer, work)),
            stack.text or "",
            stack.vision or "",
            str(threads),
        ],
        log,
        environment(**variables),
    )
    print(f"loading {stack.name}", file=sys.stderr)
    try:
        worker.ready()
    except UnavailableError:
        worker.close()
        raise
    return worker


def start_probe(work: Path, threads: int) -> Worker | None:
    """Start what measures the machine; None, and a line that says so, where it cannot run."""
    log = work / "log" / "run-probe.log"
    worker = Worker(Path(sys.executable), ["probe", str(threads)], log, environment())
    try:
        worker.ready()
    except UnavailableError as reason:
        worker.close()
        print(f"the machine's rates are not measured: {reason}", file=sys.stderr)
        return None
    return worker


def exact_outputs(work: Path, threads: int) -> dict[str, np.ndarray]:
    """Return what the exact stack computes, from a file once that is there.

    Raises:
        UnavailableError: the stack cannot be run.
    """
    path = work / "exact.npz"
    if not path.exists():
        worker = start(EXACT, work, threads)
        try:
            outputs(EXACT, worker, path)
        finally:
            worker.close()
    with np.load(path) as arrays:
        return dict(arrays)


def outputs(stack: Stack, worker: Worker, path: Path) -> dict[str, np.ndarray]:
    """Let a stack save the logits of a short prompt and the features of a tile, and read them."""
    worker.call("check", path=str(path), text=bool(stack.text), vision=bool(stack.vision))
    with np.load(path) as arrays:
        return dict(arrays)


def relative_errors(
    exact: dict[str, np.ndarray], approximate: dict[str, np.ndarray]
) -> dict[str, float]:
    """Return by part the L2 norm of the difference over that of the exact values.

    It shows that a stack runs the same model, and what its quantization costs.
    """
    return {
        part: float(np.linalg.norm(values - exact[part]) / np.linalg.norm(exact[part]))
        for part, values in approximate.items()
    }


def run_rounds(
    stacks: list[Stack],
    workers: dict[str, Worker],
    probe: Worker | None,
    unavailable: dict[str, str],
    arguments: argparse.Namespace,
) -> tuple[dict[str, dict[str, list[float]]], list[list[float]]]:
    """Measure every step of every stack once a round, after one round to warm up.

    A round takes the steps one by one and measures all stacks at each, beginning with another one
    every time; the machine's rates are measured before each step.

    Returns:
        Milliseconds by stack and step (of decode: a token), and the machine's rates.
    """
    steps: list[tuple[str, dict[str, Any]]] = [
        *((f"prefill {n}", {"step": "prefill", "tokens": n}) for n in arguments.prompt_tokens),
        ("decode", {"step": "decode", "after": arguments.after, "tokens": arguments.generate}),
        ("vision", {"step": "vision"}),
        ("first token", {"step": "first_token"}),
    ]
    samples: dict[str, dict[str, list[float]]] = {stack.name: {} for stack in stacks}
    rates: list[list[float]] = []
    for number in range(arguments.rounds + 1):
        for name, command in steps:
            if probe is not None:
                rates.append(probe.call("probe"))
            for stack in stacks[number % len(stacks) :] + stacks[: number % len(stacks)]:
                if stack.name in unavailable or not has_step(stack, name):
                    continue
                print(
                    f"round {number} of {arguments.rounds}: {name}, {stack.name}", file=sys.stderr
                )
                try:
                    value = workers[stack.name].call(**command)
                except UnavailableError as reason:
                    unavailable[stack.name] = str(reason)
                    continue
                if number > 0:
                    samples[stack.name].setdefault(name, []).append(value)
    return samples, rates


def has_step(stack: Stack, name: str) -> bool:
    """Whether a stack has the parts that a step needs."""
    if name == "vision":
        return stack.vision is not None
    if name == "first token":
        return stack.vision is not None and stack.text is not None
    return stack.text is not None


def describe_machine(threads: int, rates: list[list[float]]) -> dict[str, Any]:
    """Return the machine with the medians of its rates."""
    from edgevl.machine import this_machine

    machine = this_machine()
    bandwidths, int8_rates = zip(*rates, strict=True) if rates else ((), ())
    return {
        "cpu": machine.cpu,
        "features": machine.features,
        "system": platform.platform(),
        "threads": threads,
        "memory_bytes": machine.memory_bytes,
        "read_bandwidth_gb_s": statistics.median(bandwidths) if bandwidths else None,
        "read_bandwidth_range": [min(bandwidths), max(bandwidths)] if bandwidths else None,
        "int8_gops": statistics.median(int8_rates) if int8_rates else None,
    }


if __name__ == "__main__":
    sys.exit(main())
