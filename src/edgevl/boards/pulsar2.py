"""Pulsar2, the vendor's compiler: finding it, asking it, and running a build to its end.

It is a program that the vendor hands out, as a Docker image or as a package; EdgeVL has none of it.
A build runs alone, is watched, and is stopped when it must be. What it prints says how far it is,
how exact the result is, and why it failed.
"""

from __future__ import annotations

import fcntl
import math
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
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from edgevl.errors import BoardError
from edgevl.work import MAKING, Progress, Tell, WorkDirectory

#: Matrix products in bfloat16 on the convolution unit: a much shorter prefill.
ENVIRONMENT = {"FLOAT_MATMUL_USE_CONV_EU": "1"}
#: Where the working directory is seen in a container.
MOUNTED = "/data"
#: Below this cosine between a compiled layer and the same layer in floats, a warning is due.
COSINE_WARNING = 0.99
#: What is printed when the layers are written, and when they have been checked.
BUILT, CHECKED = "build llm model done!", "check llm model done!"
#: Seconds between looks at what a build has written.
POLL_S = 0.5
#: Seconds that a build has to exit by itself: once all is done, and when it is told to stop.
EXIT_GRACE_S, STOP_GRACE_S = 60.0, 10.0
#: Seconds that ``docker`` has for a small thing, and Pulsar2 to say its version: a container's
#: first start is slow.
_DOCKER_S = 300.0
#: The build under way, in the work directory.
_BUILD = "build.json"

#: Longest piece of a line that is looked at, and longest that is quoted.
_MAX_LINE, _MAX_QUOTE = 4096, 200

_COSINE = re.compile(r"([^|]*?)\s*cos_sim is: *([-+.\w]+)")
_LAYER = re.compile(r"(\w+) layer(\d+)_gt")
#: A progress bar of the `rich` library: what is done, the bar, counts.
_BAR = re.compile(r"^\s*(\w[\w .()-]*?)\W*[━╸╺]+\s+(\d+)/(\d+)")
_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_DECORATION = re.compile(r"^[\W_]*$")

_OUT_OF_MEMORY = re.compile(
    r"MemoryError|std::bad_alloc|[Cc]annot allocate memory|[Oo]ut of memory|^Killed\b"
)
_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded")
_UNSUPPORTED = re.compile(
    r"\bop(s|erators?|_types?)?\b.*\b(un|not (yet )?)(support|implement)"
    r"|\b(un|not (yet )?)(support|implement).*\bop(s|erators?|_types?)?\b",
    re.IGNORECASE,
)

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

    That came with version 6, but not with every package of it; ``name`` is that of the version.
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


@dataclass
class BuildLog:
    """Reads the output of a build as it comes.

    Attributes:
        checks: whether it checks what it has built.
        cosines: what was compared, such as "decode layer 0", and the cosine found.
        bar: stage, count and total of the last progress bar.
        built: whether all layers were written.
        checked: whether the check of the layers has ended.
    """

    checks: bool = True
    cosines: dict[str, float] = field(default_factory=dict)
    bar: tuple[str, int, int] | None = None
    built: bool = False
    checked: bool = False
    _rest: bytes = b""

    @property
    def is_over(self) -> bool:
        """Whether all is done; some builds do not exit by themselves then, and are stopped."""
        return self.checked or (self.built and not self.checks)

    def feed(self, data: bytes) -> None:
        """Take the next piece of the output."""
        *lines, rest = re.split(rb"[\r\n]", self._rest + data)
        self._rest = rest[:_MAX_LINE]
        for raw in lines:
            line = _ESCAPE.sub("", raw[:_MAX_LINE].decode("utf-8", "replace"))
            if match := _BAR.search(line):
                self.bar = match[1].strip(), int(match[2]), int(match[3])
            if match := _COSINE.search(line.rpartition(" - ")[2]):
                layer = _LAYER.search(match[1])
                name = f"{layer[1]} layer {layer[2]}" if layer else match[1].strip()
                try:
                    self.cosines[name] = float(match[2])
                except ValueError:  # not a number: as bad as can be
                    self.cosines[name] = math.nan
            self.built |= BUILT in line
            self.checked |= CHECKED in line


def low_cosines(cosines: dict[str, float]) -> Iterator[str]:
    """Yield a line for each result that differs too much from the same in floats."""
    for name, cosine in cosines.items():
        if not cosine >= COSINE_WARNING:
            yield (
                f"{name}: cosine {cosine:.4f} to the same in floats, below {COSINE_WARNING}; "
                "compare answers before you use it"
            )


def run(
    pulsar2: Pulsar2,
    arguments: Sequence[str],
    work: WorkDirectory,
    log: Path,
    progress: Progress,
    *,
    name: str,
    written: Callable[[], tuple[int, int]] | None,
    checks: bool,
) -> BuildLog:
    """Run a build to its end, the only one of this user on this machine, in the work directory.

    Args:
        pulsar2: what to run.
        arguments: of it; paths are relative to the work directory.
        work: the work directory.
        log: file that all output goes to.
        progress: told how far it is.
        name: of the build, for progress.
        written: returns how many files it has written and how many there will be; where it is None,
            its own progress bars count.
        checks: whether it checks what it has built.

    Returns:
        What it printed.

    Raises:
        BoardError: it cannot be started or fails; says why in one line.
    """
    container = f"edgevl-{uuid.uuid4().hex[:12]}" if pulsar2.image is not None else None
    command = pulsar2.command(arguments, work.path, container or "")
    build = BuildLog(checks)
    log.parent.mkdir(exist_ok=True)
    shown: tuple[str, Tell] | None = None

    def show() -> None:
        """Show what is written under the build's own name, or else its last bar under both."""
        nonlocal shown
        bar = ("", *written()) if written is not None else build.bar
        if bar is None:
            return
        stage, done, total = bar
        if shown is None or stage != shown[0]:
            bars.close()
            shown = stage, bars.enter_context(progress(f"{name}: {stage}" if stage else name))
        shown[1](done, total)

    with _alone(progress) as lock, log.open("wb") as file, ExitStack() as bars:
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
            for data in _output(process, build):
                file.write(data)
                file.flush()
                build.feed(data)
                show()
            build.feed(b"\n")
            try:
                status = process.wait(STOP_GRACE_S if build.is_over else None)
            except subprocess.TimeoutExpired:
                status = 0  # it has done all and does not exit
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


def explain(log: Path, status: int) -> str:
    """Return one line on why a build failed.

    Args:
        log: its output.
        status: its exit status; negative for a signal.
    """
    out_of_memory = (
        "Pulsar2 ran out of memory; close other programs, give Docker more memory, or lower "
        "--parallel, then the same command goes on"
    )
    last = ""
    found: dict[str, str] = {}
    with log.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, raw in enumerate(file, 1):
            line = _ESCAPE.sub("", raw.rstrip().rpartition("\r")[2][:_MAX_LINE]).strip()
            if _DECORATION.match(line) or _BAR.search(line):
                continue
            last = line if len(line) <= _MAX_QUOTE else line[:_MAX_QUOTE] + "…"
            if _DISK_FULL.search(line):
                found["disk"] = "the disk is full; free some space, then the same command goes on"
            elif _OUT_OF_MEMORY.search(line):
                found["memory"] = out_of_memory
            elif _UNSUPPORTED.search(line):
                found.setdefault(
                    "operator",
                    f"Pulsar2 cannot compile an operator, line {number} of {log}: {last}",
                )
    if status in (137, -9):
        found["memory"] = out_of_memory
    for kind in ("disk", "memory", "operator"):
        if kind in found:
            return found[kind]
    state = f"stopped by signal {-status}" if status < 0 else f"failed with status {status}"
    return f"Pulsar2 {state}{': ' + last if last else ''} (see {log})"


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


def _output(process: subprocess.Popen[bytes], build: BuildLog) -> Iterator[bytes]:
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
            if build.is_over:
                over_since = over_since or time.monotonic()
                if time.monotonic() - over_since > EXIT_GRACE_S:
                    return


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
