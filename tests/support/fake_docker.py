#!/usr/bin/env python3
"""Stands in for Docker in tests: one image, whose ``pulsar2`` is fake_pulsar2.py.

FAKE_DOCKER, a JSON object, says what fails: ``error``, what `docker image inspect` prints then.
FAKE_CALLS takes a line for each call.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

IMAGE = "pulsar2:5.1"
STATE = json.loads(os.environ.get("FAKE_DOCKER", "{}"))


def main():
    command = sys.argv[1]
    with Path(os.environ["FAKE_CALLS"]).open("a") as file:
        file.write(json.dumps(["docker", *sys.argv[1:]]) + "\n")
    return {"image": inspect, "run": run, "kill": kill}[command](sys.argv[2:])


def inspect(arguments):
    assert arguments[0] == "inspect"
    if "error" in STATE:
        print(STATE["error"], file=sys.stderr)
        return 1
    if arguments[-1] != IMAGE:
        print(f"Error: No such image: {arguments[-1]}", file=sys.stderr)
        return 1
    print("sha256:0123")
    return 0


def run(arguments):
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0).partition("=")
        options.setdefault(name, []).append(value)
    image, *command = arguments
    assert image == IMAGE
    assert "--rm" in options
    [mount] = csv.reader(options["--mount"])  # as Docker reads it
    where = dict(field.split("=", 1) for field in mount)
    assert where.pop("type") == "bind"
    host, inside = where["source"], where["target"]
    assert Path(host).is_absolute()
    if "--entrypoint" in options:
        assert options["--entrypoint"] == ["chown"]
        return 0
    assert options["--workdir"] == [inside]
    assert command.pop(0) == "pulsar2"
    # The container's environment is not the host's.
    environment = {k: v for k, v in os.environ.items() if k.startswith("FAKE_") or k == "PATH"}
    for each in options["--env"]:
        name, equals, value = each.partition("=")
        environment[name] = value if equals else os.environ[name]
    fake = Path(__file__).with_name("fake_pulsar2.py")
    return subprocess.run(
        [sys.executable, fake, *command], cwd=host, env=environment, check=False
    ).returncode


def kill(arguments):
    return 0


if __name__ == "__main__":
    sys.exit(main())
