"""Running a Pulsar2 build to its end: alone, watched, stopped when it must be."""

from __future__ import annotations

import fcntl
import os
import selectors
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil

from edgevl.boards.build_log import BuildLog, explain
from edgevl.boards.commands import ENVIRONMENT, give_back_command
from edgevl.boards.toolchain import Pulsar2
from edgevl.errors import BoardError
from edgevl.work import MAKING, Progress, WorkDirectory

#: Seconds between looks at what a build has written.
POLL_S = 0.5
#: Seconds that a build has to exit by itself: once all is done, and when it is told to stop.
EXIT_GRACE_S, STOP_GRACE_S = 60.0, 10.0
#: Seconds that ``docker`` has for a small thing.
_DOCKER_S = 300.0
#: The build under way, in the work directory.
_BUILD = "build.json"


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
    command = give_back_command(pulsar2.image, str(directory), user, os.getgid())
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(command, capture_output=True, timeout=_DOCKER_S)
