"""Pulsar2, the vendor's compiler: finding it, and asking it what it can.

It is a program that the vendor hands out, as a Docker image or as a package; EdgeVL has none of it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgevl.boards.commands import docker_command
from edgevl.errors import BoardError

#: Seconds that it has to say its version; a container's first start is slow.
_ASK_S = 300.0

_WITHOUT = (
    "without it, --dry-run writes a script that compiles on a machine that has it, and --emulate a "
    "model for the emulator"
)


@dataclass(frozen=True)
class Pulsar2:
    """A Pulsar2 that can be run.

    Attributes:
        program: path of the executable, or None.
        image: Docker image, or None.
    """

    program: str | None = None
    image: str | None = None

    def command(self, arguments: Sequence[str], directory: Path, name: str) -> list[str]:
        """Return the command line that runs in ``directory``, in a container called ``name``."""
        if self.image is not None:
            return docker_command(self.image, arguments, str(directory.resolve()), name)
        return [str(self.program), *arguments]

    def ask(self, arguments: Sequence[str], directory: Path) -> tuple[int, str]:
        """Run something short: -> exit status and what it prints.

        Raises:
            BoardError: it cannot be started, or does not end.
        """
        name = f"edgevl-{uuid.uuid4().hex[:12]}"
        command = self.command(arguments, directory, name)
        try:
            result = subprocess.run(
                command,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_ASK_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BoardError(
                f"{command[0]}: no answer to `pulsar2 {' '.join(arguments)}` in {_ASK_S:.0f} s; "
                "run it by hand to see why"
            ) from None
        except OSError as error:
            raise BoardError(f"{command[0]}: cannot be run ({error.strerror})") from None
        return result.returncode, result.stdout.decode("utf-8", "replace")


def find(given: str | None) -> Pulsar2:
    """Return the Pulsar2 to use.

    Args:
        given: ``docker:IMAGE``, the path of the program or of the package's directory, or None for
            the program on PATH.

    Raises:
        BoardError: it is not there, or Docker cannot be used; says how to fix it.
    """
    if given is None:
        program = shutil.which("pulsar2")
        if program is None:
            raise BoardError(
                "Pulsar2, the vendor's compiler, is not on PATH: get it from AXERA-TECH/Pulsar2 on "
                "the Hub and give --pulsar2 docker:IMAGE or --pulsar2 PATH; " + _WITHOUT
            )
        return Pulsar2(program=program)
    if given.startswith("docker:"):
        return Pulsar2(image=_image(given.removeprefix("docker:")))
    path = Path(given).expanduser()
    for candidate in (path, path / "bin" / "pulsar2", path / "pulsar2"):
        if candidate.is_file():
            if os.access(candidate, os.X_OK):
                return Pulsar2(program=str(candidate.absolute()))
            raise BoardError(f"--pulsar2 {given}: {candidate} is not executable; chmod +x it")
    raise BoardError(
        f"--pulsar2 {given}: no such program; give docker:IMAGE, or the path of `pulsar2`; "
        + _WITHOUT
    )


def version(pulsar2: Pulsar2, directory: Path) -> str | None:
    """Return what ``pulsar2 version`` says, such as "5.1", or None where it says nothing."""
    status, text = pulsar2.ask(["version"], directory)
    match = re.search(r"version\W+v?(\d[\w.+-]*)", text, re.IGNORECASE)
    return match[1] if status == 0 and match else None


def newest_llm_build(pulsar2: Pulsar2, name: str | None, directory: Path) -> int:
    """Return the generation of the command for text models: 2 where there is an ``llm_build2``.

    That came with version 6, but not with every package of it.

    Args:
        pulsar2: what to ask.
        name: its version.
        directory: to run in.
    """
    major = re.match(r"\d+", name or "")
    has_it = major is not None and int(major[0]) >= 6
    return 2 if has_it and pulsar2.ask(["llm_build2", "--help"], directory)[0] == 0 else 1


def _image(image: str) -> str:
    """Return the name of an image that is there."""
    if shutil.which("docker") is None:
        raise BoardError(
            f"--pulsar2 docker:{image}: Docker is not installed (no `docker` on PATH); install "
            f"it, or give the path of a Pulsar2 package; {_WITHOUT}"
        )
    try:
        result = subprocess.run(
            ["docker", "image", "inspect", "--format", "{{.Id}}", image],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=60,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        raise BoardError(
            "docker: no answer in 60 s; is its daemon well? try `docker info`"
        ) from None
    if result.returncode == 0:
        return image
    problem = " ".join(result.stderr.split())
    if "permission denied" in problem.lower():
        raise BoardError(
            "docker: this user may not use it (permission denied); `sudo usermod -aG docker "
            "$USER`, then log in again"
        )
    if "cannot connect" in problem.lower() or "daemon running" in problem.lower():
        raise BoardError(
            "docker: its daemon is not running; `sudo systemctl start docker`, then the same again"
        )
    if "no such image" in problem.lower() or "not found" in problem.lower():
        raise BoardError(
            f"--pulsar2 docker:{image}: there is no such image here; `docker load -i` the archive "
            "of Pulsar2 (AXERA-TECH/Pulsar2 on the Hub), and see `docker image ls` for its name"
        )
    raise BoardError(f"docker image inspect {image}: {problem[:300] or 'failed'}")
