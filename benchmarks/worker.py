"""A peer in a process of its own: JSON commands on standard input, JSON results on what was stdout.

    python worker.py build PEER CHECKPOINT DIRECTORY
    python worker.py run PEER CHECKPOINT DIRECTORY TEXT VISION THREADS
    python worker.py probe THREADS

``probe`` measures the machine instead, with the native module of EdgeVL.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import numpy as np

from peers import PEERS
from peers.calibration import check_tile

#: Bytes read to measure the bandwidth: many times what a last-level cache holds.
READ_BYTES = 512 << 20
#: Positions of the prompt that ``first_token`` prefills after the tile.
FIRST_TOKEN_PROMPT = 300
#: Untimed positions before each timed step: they wake threads that were asleep.
WAKE_TOKENS = 8


def private_stdout() -> IO[str]:
    """Keep standard output for results, and send what libraries print there to standard error."""
    results = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return results


def serve(handlers: dict[str, Callable[..., Any]], results: IO[str]) -> None:
    """Answer commands until standard input ends: {"step": …, arguments} -> {"value": …}."""
    print(json.dumps({"value": "ready"}), file=results)
    for line in sys.stdin:
        command = json.loads(line)
        value = handlers[command.pop("step")](**command)
        print(json.dumps({"value": value}), file=results)


def timed_ms(work: Callable[[], object]) -> float:
    """Return how long ``work`` takes, in milliseconds."""
    started = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - started)


def inputs(checkpoint: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return random token ids and a tile, the same for every peer."""
    config = json.loads((checkpoint / "config.json").read_text())
    vocabulary = config["text_config"]["vocab_size"]
    token_ids = np.random.default_rng(0).integers(vocabulary, size=1 << 14, dtype=np.int64)
    return token_ids, check_tile(config["vision_config"]["image_size"][0])


def peer_handlers(peer: Any, token_ids: np.ndarray, tile: np.ndarray) -> dict[str, Any]:
    """Return the steps of a loaded peer, each of which gives milliseconds."""

    def prefill(tokens: int) -> float:
        peer.prefill(token_ids[:WAKE_TOKENS])
        return timed_ms(lambda: peer.prefill(token_ids[:tokens]))

    def decode(after: int, tokens: int) -> float:
        peer.prefill(token_ids[:after])
        return timed_ms(lambda: peer.decode(tokens)) / tokens

    def first_token() -> float:
        peer.prefill(token_ids[:WAKE_TOKENS])

        def answer() -> None:
            peer.encode_tile(tile)
            peer.prefill(token_ids[:FIRST_TOKEN_PROMPT])

        return timed_ms(answer)

    def check(path: str, text: bool, vision: bool) -> None:
        """Save what the peer computes, to compare it with the others'."""
        arrays: dict[str, Any] = {}
        if text:
            peer.prefill(token_ids[:64])
            arrays["logits"] = np.ravel(peer.logits())
        if vision:
            arrays["features"] = np.asarray(peer.encode_tile(tile)).reshape(-1)
        np.savez(path, **arrays)

    return {
        "prefill": prefill,
        "decode": decode,
        "vision": lambda: timed_ms(lambda: peer.encode_tile(tile)),
        "first_token": first_token,
        "check": check,
        "peak_rss_bytes": peak_rss_bytes,
    }


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident, files mapped into it included."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    """Do what the command line says."""
    results = private_stdout()
    mode, *arguments = sys.argv[1:]
    if mode == "probe":
        from edgevl import _native

        pool = _native.ThreadPool(int(arguments[0]))

        def probe() -> tuple[float, float]:
            return _native.read_bandwidth(pool, READ_BYTES), _native.int8_rate(pool)

        serve({"probe": probe}, results)
        return
    peer = PEERS[arguments[0]]
    if mode == "build":
        peer.build(Path(arguments[1]), Path(arguments[2]))
        return
    checkpoint, directory, text, vision, threads = arguments[1:]
    token_ids, tile = inputs(Path(checkpoint))
    started = time.perf_counter()
    loaded = peer(Path(directory), text or None, vision or None, int(threads))
    load_ms = 1000 * (time.perf_counter() - started)
    handlers = peer_handlers(loaded, token_ids, tile)
    serve({**handlers, "load_ms": lambda: load_ms}, results)


if __name__ == "__main__":
    main()
