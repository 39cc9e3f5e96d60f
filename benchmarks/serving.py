"""Compare `edgevl serve` with llama.cpp's servers: tokens a second and waiting times under load.

    python benchmarks/serving.py --work DIR

1, 2, 4, 8 and 16 clients send requests of one length, each its next one when it has the answer to
its last. The servers take turns, round after round, and each is stopped while another one is
measured. The results are DIR/serving.json and .md; what has been set up is kept and shared with
compare.py. Exit status 1: a request failed, or no server could be measured.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import compare
from environments import UnavailableError
from load_generator import Load, run_load
from process import Worker
from servers import SERVERS, RunningServer, Setting, start
from serving_report import markdown, summary
from workload import Workload

#: Requests of a measurement for each client, at least, so that most of it has all clients waiting.
REQUESTS_A_CLIENT = 2


def main() -> int:
    """Read the arguments, set up, measure, write."""
    arguments = parse_arguments()
    work: Path = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = compare.make_checkpoint(work)
    setting = Setting(
        work=work,
        model=arguments.model or str(checkpoint),
        precision=arguments.precision,
        threads=arguments.threads,
        clients=max(arguments.clients),
        positions=arguments.prompt_tokens + arguments.generate,
    )
    unavailable = set_up(arguments.only, setting)
    if arguments.set_up_only:
        for name, reason in unavailable.items():
            print(f"{name}: {reason}", file=sys.stderr)
        return 1 if unavailable else 0
    workload = Workload(
        checkpoint / "tokenizer.json",
        arguments.prompt_tokens,
        arguments.shared_tokens,
        arguments.generate,
    )
    results = measure(arguments, setting, workload, unavailable)
    name = "serving-image" if arguments.image else "serving"
    (work / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")
    (work / f"{name}.md").write_text(markdown(results))
    print(markdown(results))
    return 1 if not results["lines"] or any(line["errors"] for line in results["lines"]) else 0


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    from edgevl.machine import this_machine

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    count, counts = compare.count, compare.counts
    parser.add_argument("--work", type=Path, required=True, help="directory to work in, 8 GB")
    parser.add_argument("--only", type=_servers, default=[*SERVERS], help="servers to measure")
    parser.add_argument("--model", help="what edgevl serves  [default: the peers' checkpoint]")
    parser.add_argument("--precision", default="int4", help="of its weights  [default: int4]")
    parser.add_argument("--threads", type=count, default=this_machine().threads)
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--clients", type=counts, default=[1, 2, 4, 8, 16])
    parser.add_argument("--requests", type=count, default=8, help="of a measurement, at least")
    parser.add_argument("--prompt-tokens", type=count, default=128)
    parser.add_argument("--shared-tokens", type=int, default=0, help="first ones, in all prompts")
    parser.add_argument("--generate", type=count, default=64, help="tokens of an answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--image", action="store_true", help="a picture a request, edgevl alone")
    parser.add_argument("--set-up-only", action="store_true", help="install and build, then stop")
    arguments = parser.parse_args()
    arguments.clients = sorted(set(arguments.clients))
    if not 0 <= arguments.shared_tokens < arguments.prompt_tokens:
        parser.error(f"--shared-tokens {arguments.shared_tokens} is not less than --prompt-tokens")
    if arguments.image:
        arguments.only = ["edgevl"]
    return arguments


def _servers(text: str) -> list[str]:
    if unknown := set(text.split(",")) - set(SERVERS):
        raise argparse.ArgumentTypeError(f"{unknown} unknown; there are {', '.join(SERVERS)}")
    return [name for name in SERVERS if name in text.split(",")]


def set_up(names: list[str], setting: Setting) -> dict[str, str]:
    """Install and build servers: -> why not, by name."""
    unavailable: dict[str, str] = {}
    for name in names:
        try:
            SERVERS[name].set_up(setting)
        except UnavailableError as reason:
            unavailable[name] = str(reason)
            print(f"{name} is left out: {reason}", file=sys.stderr)
    return unavailable


def measure(
    arguments: argparse.Namespace,
    setting: Setting,
    workload: Workload,
    unavailable: dict[str, str],
) -> dict[str, Any]:
    """Start all servers, check them, measure them in turn: -> the content of serving.json."""
    clients = Clients(arguments, workload)
    running: dict[str, RunningServer] = {}
    probe = compare.start_probe(setting.work, setting.threads)
    try:
        start_servers(arguments.only, setting, clients, running, unavailable)
        loads, rates = run_rounds(running, probe, clients, arguments)
    finally:
        started: list[RunningServer | Worker] = [*running.values(), *([probe] if probe else [])]
        for process in started:
            process.close()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": compare.describe_machine(setting.threads, rates),
        "model": f"synthetic {compare.PRESET}"
        if not arguments.model
        else Path(arguments.model).name,
        "precision": setting.precision,
        "rounds": arguments.rounds,
        "prompt_tokens": arguments.prompt_tokens,
        "shared_tokens": arguments.shared_tokens,
        "generate": arguments.generate,
        "temperature": arguments.temperature,
        "image": arguments.image,
        "lines": [
            {
                "clients": waiting,
                "server": name,
                "label": SERVERS[name].label,
                **summary(loads[waiting, name]),
            }
            for waiting in arguments.clients
            for name in running
        ],
        "unavailable": {SERVERS[name].label: reason for name, reason in unavailable.items()},
    }


def start_servers(
    names: list[str],
    setting: Setting,
    clients: Clients,
    running: dict[str, RunningServer],
    unavailable: dict[str, str],
) -> None:
    """Start and check those servers that are not unavailable; add them to one or the other."""
    variables = dict.fromkeys(compare.THREAD_VARIABLES, str(setting.threads))
    for name in names:
        if name in unavailable:
            continue
        try:
            running[name] = start(SERVERS[name], setting, variables)
            clients.check(running[name])
            running[name].pause()
        except UnavailableError as reason:
            unavailable[name] = str(reason)
            if name in running:
                running.pop(name).close()


def run_rounds(
    running: dict[str, RunningServer],
    probe: Worker | None,
    clients: Clients,
    arguments: argparse.Namespace,
) -> tuple[dict[tuple[int, str], list[Load]], list[list[float]]]:
    """Measure all servers under each number of clients once a round, another one first every time.

    A round before them, under the fewest clients, warms up.

    Returns:
        Loads by number of clients and server, one a round; and the machine's rates.
    """
    loads: dict[tuple[int, str], list[Load]] = {}
    rates: list[list[float]] = []
    servers = [*running]
    for number in range(arguments.rounds + 1):
        for count in arguments.clients if number else arguments.clients[:1]:
            if probe is not None:
                rates.append(probe.call("probe"))
            first = number % max(len(servers), 1)
            for name in servers[first:] + servers[:first]:
                print(
                    f"round {number} of {arguments.rounds}: {count} at once, {name}",
                    file=sys.stderr,
                )
                running[name].resume()
                load = clients.load(running[name], count, number)
                running[name].pause()
                if number:
                    loads.setdefault((count, name), []).append(load)
    return loads, rates


class Clients:
    """Sends what the arguments ask for."""

    def __init__(self, arguments: argparse.Namespace, workload: Workload) -> None:
        """Take what decides the requests."""
        self._arguments = arguments
        self._workload = workload
        self._path = "/v1/chat/completions" if arguments.image else "/v1/completions"

    def _bodies(self, server: RunningServer, count: int, seed: list[int]) -> list[dict[str, Any]]:
        bodies = self._workload.bodies(server.model, count, seed, self._arguments.temperature)
        if self._arguments.image:
            return [self._workload.with_picture(body, seed) for body in bodies]
        return bodies

    def check(self, server: RunningServer) -> None:
        """Ask once, not streamed, and look whether the server counts as many tokens as meant.

        Raises:
            UnavailableError: it does not, or refuses.
        """
        (body,) = self._bodies(server, 1, [0, 0])
        usage = server.usage(self._path, body)
        wanted = self._arguments.prompt_tokens
        counted = usage["prompt_tokens"]
        if counted < wanted or (counted > wanted and not self._arguments.image):
            raise UnavailableError(f"a prompt of {wanted} tokens has {counted} there")
        # llama_cpp.server goes on until the last character is whole.
        if usage["completion_tokens"] < body["max_tokens"]:
            raise UnavailableError(
                f"an answer of {body['max_tokens']} tokens has {usage['completion_tokens']} there"
            )

    def load(self, server: RunningServer, clients: int, number: int) -> Load:
        """Return what a server does with so many clients; all get the same prompts in a round."""
        count = max(REQUESTS_A_CLIENT * clients, self._arguments.requests)
        bodies = self._bodies(server, count, [1 + number, clients])
        return run_load(server.address + self._path, bodies, clients)


if __name__ == "__main__":
    sys.exit(main())
