"""Environments and models of the peers, made once and kept in the working directory."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from peers import PEERS
from peers.base import Peer

HERE = Path(__file__).resolve().parent
#: Where ``edgevl`` is imported from if it is not installed.
SOURCE = HERE.parent / "src"


class UnavailableError(Exception):
    """A peer cannot be set up, built or run here; the message says why."""


class Installed(Protocol):
    """What has an environment of its own: a peer, or what else says how to install it."""

    @property
    def name(self) -> str:
        """As in `Peer`, and so are the others."""

    @property
    def requirements(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def requirements_alone(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def pip_options(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def pip_environment(self) -> dict[str, str]: ...  # noqa: D102


def python_of(peer: Installed | type[Peer], work: Path) -> Path:
    """Return the Python that runs a peer."""
    if not peer.requirements:
        return Path(sys.executable)
    return work / "env" / peer.name / "bin" / "python"


def models_of(peer: type[Peer], work: Path) -> Path:
    """Return the directory of a peer's models."""
    return work / "models" / (peer.models_of or peer.name)


def install(peer: Installed | type[Peer], work: Path) -> None:
    """Make a peer's environment, unless it is there with the same requirements.

    Raises:
        UnavailableError: pip failed.
    """
    if not peer.requirements:
        return
    directory = work / "env" / peer.name
    wanted = repr(
        (peer.requirements, peer.requirements_alone, peer.pip_options, peer.pip_environment)
    )
    stamp = directory / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"installing {peer.name}: {', '.join(peer.requirements)}", file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    venv.create(directory, with_pip=True)
    command = _pip_install(python_of(peer, work))
    variables = {**os.environ, **peer.pip_environment}
    log = work / "log" / f"install-{peer.name}.log"
    run([*command, *peer.pip_options, *peer.requirements], log, variables)
    if peer.requirements_alone:
        run([*command, "--no-deps", *peer.requirements_alone], log, variables)
    stamp.write_text(wanted)


def add(packages: Sequence[str], peer: type[Peer], work: Path) -> None:
    """Install more packages into a peer's environment, unless that has been done.

    Raises:
        UnavailableError: pip failed.
    """
    stamp = work / "env" / peer.name / "added"
    added = stamp.read_text().splitlines() if stamp.exists() else []
    if missing := [package for package in packages if package not in added]:
        print(f"installing for {peer.name}: {', '.join(missing)}", file=sys.stderr)
        log = work / "log" / f"add-{peer.name}.log"
        run([*_pip_install(python_of(peer, work)), *missing], log, os.environ)
        stamp.write_text("\n".join([*added, *missing]))


def _pip_install(python: Path) -> list[object]:
    return [python, "-m", "pip", "install", "--disable-pip-version-check"]


def build(peer: type[Peer], work: Path, checkpoint: Path) -> None:
    """Build a peer's models from the checkpoint, unless that has been done by the same code.

    Raises:
        UnavailableError: the peer's tools failed.
    """
    builder = PEERS[peer.models_of] if peer.models_of else peer
    directory = models_of(peer, work)
    code = b"".join(path.read_bytes() for path in _sources(builder))
    wanted = hashlib.sha256(code + repr(builder.requirements).encode()).hexdigest()
    stamp = directory / "built"
    if stamp.exists() and stamp.read_text() == wanted:
        return
    print(f"building the models of {builder.name}", file=sys.stderr)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    command = [python_of(builder, work), HERE / "worker.py", "build", builder.name]
    log = work / "log" / f"build-{builder.name}.log"
    run([*command, checkpoint, directory], log, environment())
    stamp.write_text(wanted)


def environment(**more: str) -> dict[str, str]:
    """Return the environment of a peer's process."""
    paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", **more}


def _sources(peer: type[Peer]) -> list[Path]:
    """Return the files that decide what a peer builds: its own and those that are no peer's."""
    others = {f"{name}.py" for name in PEERS} - {f"{peer.name}.py"}
    return sorted(path for path in (HERE / "peers").glob("*.py") if path.name not in others)


def run(command: Sequence[object], log: Path, variables: Mapping[str, str]) -> None:
    """Run a command whose output goes to a log.

    Raises:
        UnavailableError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        status = subprocess.run(
            [str(part) for part in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            check=False,
        ).returncode
    if status:
        raise UnavailableError(f"{last_line(log)} (status {status}, see {log})")


def last_line(log: Path) -> str:
    """Return the last line of a log that says something."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line[:300] for line in reversed(lines) if line), "no output")
