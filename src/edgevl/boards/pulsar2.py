"""Pulsar2, the vendor's compiler: finding it, asking it, and running a build to its end.

It is a program that the vendor hands out, as a Docker image or as a package; EdgeVL has none of it.
A build runs alone, is watched, and is stopped when it must be.
"""

from __future__ import annotations

import fcntl
import os
import re
import selectors
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from edgevl.boards.build_log import BuildLog, explain
from edgevl.errors import BoardError
from edgevl.work import MAKING, Progress, WorkDirectory

#: Matrix products in bfloat16 on the convolution unit: a much shorter prefill.
ENVIRONMENT = {"FLOAT_MATMUL_USE_CONV_EU": "1"}
#: Where the working directory is seen in a container.
MOUNTED = "/data"
#: Seconds between looks at what a build has written.
POLL_S = 0.5
#: Seconds that a build has to exit by itself: once all is done, and when it is told to stop.
EXIT_GRACE_S, STOP_GRACE_S = 60.0, 10.0
#: Seconds that ``docker`` has for a small thing, and Pulsar2 to say its version: a container's
#: first start is slow.
_DOCKER_S = 300.0
#: The build under way, in the work directory.
_BUILD = "build.json"

_WITHOUT = (
    "without it, --dry-run writes a script that compiles on a machine that has it, and --emulate a "
    "model for the emulator"
)


_NOT_RUNNING = (
    "docker: its daemon is not running; `sudo systemctl start docker`, then the same again"
)
_NO_IMAGE = (
    "--pulsar2 docker:{image}: there is no such image here; `docker load -i` the archive of "
    "Pulsar2 (AXERA-TECH/Pulsar2 on the Hub), and see `docker image ls` for its name"
)
#: What to say, by words in what Docker says.
_DOCKER_PROBLEMS = {
    "permission denied": "docker: this user may not use it (permission denied); `sudo usermod -aG "
    "docker $USER`, then log in again",
    "cannot connect": _NOT_RUNNING,
    "daemon running": _NOT_RUNNING,
    "no such image": _NO_IMAGE,
    "not found": _NO_IMAGE,
}


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
        """Return the command line that runs in ``directory``.

        A container sees no other directory, and is called ``name``, to stop it by. It runs as the
        image's own user, root: the compiler's licence is in root's home. What it writes is given
        back afterwards.
        """
        if self.image is None:
            return [str(self.program), *arguments]
        environment = [f"--env={variable}={value}" for variable, value in ENVIRONMENT.items()]
        return [
            *("docker", "run", "--rm", f"--name={name}", *environment),
            *(mount(str(directory.resolve())), f"--workdir={MOUNTED}"),
            *(self.image, "pulsar2", *arguments),
        ]

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
                timeout=_DOCKER_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise BoardError(
                f"{command[0]}: no answer to `pulsar2 {' '.join(arguments)}` in {_DOCKER_S:.0f} s; "
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
    for words, message in _DOCKER_PROBLEMS.items():
        if words in problem.lower():
            raise BoardError(message.format(image=image))
    raise BoardError(f"docker image inspect {image}: {problem[:300] or 'failed'}")


def mount(directory: str) -> str:
    """Return Docker's option that shows a directory of this machine in a container.

    The shorter ``--volume`` would split the path at a colon. The value is a line of CSV, so that
    commas may be in it, too.
    """
    source = directory.replace('"', '""')
    return f'--mount=type=bind,"source={source}",target={MOUNTED}'


def run(
    pulsar2: Pulsar2,
    arguments: Sequence[str],
    work: WorkDirectory,
    log: Path,
    progress: Progress,
    *,
    name: str,
    written: Callable[[], tuple[int, int]] | None = None,
    is_over: Callable[[BuildLog], bool] = lambda build: False,
) -> BuildLog:
    """Run a build to its end, the only one of this user on this machine, in the work directory.

    Args:
        pulsar2: what to run.
        arguments: of it; paths are relative to the work directory.
        work: the work directory.
        log: file that all output goes to.
        progress: told how far it is.
        name: of the build, for progress.
        written: returns how many files it has written and how many there will be; without, its
            own progress bars count.
        is_over: tells from the output that all is done: a build that does not exit by itself then,
            as some do, is stopped.

    Returns:
        What it printed.

    Raises:
        BoardError: it cannot be started or fails; says why in one line.
    """
    container = f"edgevl-{uuid.uuid4().hex[:12]}" if pulsar2.image is not None else None
    command = pulsar2.command(arguments, work.path, container or "")
    build = BuildLog()
    log.parent.mkdir(exist_ok=True)
    with _alone(progress) as lock, log.open("wb") as file, _Display(progress, name) as display:
        work.save_json(_BUILD, {"container": container})
        try:
            process = subprocess.Popen(
                command,
                cwd=work.path,
                env={**os.environ, **ENVIRONMENT, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock],  # held for as long as it runs, whatever becomes of this process
            )
        except OSError as error:
            raise BoardError(f"{command[0]}: cannot be run ({error.strerror})") from None
        try:
            created = psutil.Process(process.pid).create_time()
            work.save_json(_BUILD, {"container": container, "pid": process.pid, "created": created})
            for data in _output(process, lambda: is_over(build)):
                file.write(data)
                file.flush()
                build.feed(data)
                display.show(written() if written is not None else None, build)
            build.feed(b"\n")
            status = _status(process, is_over(build))
        finally:
            _stop(process.pid, container if process.poll() is None else None)
            process.wait()
            _give_back(pulsar2, work)
            work.remove(_BUILD)
    if status != 0 and not build.built:
        raise BoardError(explain(log, status))
    return build


def stop_left_over(pulsar2: Pulsar2, work: WorkDirectory) -> None:
    """Stop the build of a run that was killed: it would write into what is made anew."""
    if not work.has(_BUILD):
        return
    left = work.load_json(_BUILD)
    with suppress(psutil.Error):
        if left.get("pid") and psutil.Process(left["pid"]).create_time() == left["created"]:
            _stop(left["pid"], None)
    if left.get("container"):
        _stop(None, left["container"])
    _give_back(pulsar2, work)
    work.remove(_BUILD)


class _Display:
    """Shows how far a build is: under its own name, or a bar for each of its stages."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._name = name
        self._stage = ""
        self._stack = ExitStack()

    def __enter__(self) -> _Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def show(self, written: tuple[int, int] | None, build: BuildLog) -> None:
        """Show what is written, or else the last bar of the build itself."""
        stage = self._name
        if written is None:
            if build.bar is None:
                return
            stage, written = f"{self._name}: {build.bar[0]}", build.bar[1:]
        if stage != self._stage:
            self._stack.close()
            self._tell = self._stack.enter_context(self._progress(stage))
            self._stage = stage
        self._tell(*written)


@contextmanager
def _alone(progress: Progress) -> Iterator[int]:
    """Wait for the other builds of this user to end: side by side, they have made broken models."""
    path = Path(tempfile.gettempdir()) / f"edgevl-pulsar2-{os.getuid()}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BoardError(f"{path}: cannot be opened ({error.strerror}); remove it") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with progress("waiting for another Pulsar2 build to end") as tell:
                tell(0, 1)
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def _output(process: subprocess.Popen[bytes], is_over: Callable[[], bool]) -> Iterator[bytes]:
    """Yield what a build prints, and nothing twice a second, until it ends or lingers."""
    assert process.stdout is not None
    over_since: float | None = None
    with selectors.DefaultSelector() as selector, process.stdout as stream:
        selector.register(stream, selectors.EVENT_READ)
        while True:
            if selector.select(POLL_S):
                data = os.read(stream.fileno(), 1 << 16)
                if not data:
                    return
                yield data
            else:
                yield b""
                if process.poll() is not None:  # and a child of it keeps the pipe open
                    return
            if is_over():
                over_since = over_since or time.monotonic()
                if time.monotonic() - over_since > EXIT_GRACE_S:
                    return


def _status(process: subprocess.Popen[bytes], is_over: bool) -> int:
    """Return the exit status: 0 for a build that has done all and does not exit."""
    try:
        return process.wait(STOP_GRACE_S if is_over else None)
    except subprocess.TimeoutExpired:
        return 0


def _stop(pid: int | None, container: str | None) -> None:
    """End a build with all processes that it has started; nothing happens if it has ended."""
    if container is not None:
        with suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["docker", "kill", container], capture_output=True, timeout=_DOCKER_S)
    if pid is None:
        return
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_GRACE_S
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            os.killpg(pid, 0)
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)


def _give_back(pulsar2: Pulsar2, work: WorkDirectory) -> None:
    """Make this user the owner of what a container, which runs as root, has written."""
    directory = work.path.resolve()
    user = os.getuid()
    if pulsar2.image is None or all(
        path.lstat().st_uid == user for path in (directory / MAKING).rglob("*")
    ):
        return
    owner = ["--entrypoint=chown", pulsar2.image, "-R", f"{user}:{os.getgid()}", MOUNTED]
    command = ["docker", "run", "--rm", mount(str(directory)), *owner]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, capture_output=True, timeout=_DOCKER_S)
