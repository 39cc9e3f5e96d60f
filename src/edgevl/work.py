"""The directory of a long run under way: what is done of it, so that it can be resumed.

``OUT.partial`` holds ``run.json`` (what was asked for) and the products of steps (`Step`), files or
directories. Each is made beside and renamed: what is there is whole. A long step may go on where it
was interrupted: what it keeps meanwhile lies where it makes its product (`Loop`).
"""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, raw, write_file
from edgevl.errors import EdgeVLError
from edgevl.files import UNFINISHED, replacing, sync_file

#: Is told how far a stretch of work is: what is done of it, and what there is.
Tell = Callable[[int, int], object]
#: Opens a stretch of work of some name, and gives what is to be told how far it is.
Progress = Callable[[str], AbstractContextManager[Tell]]

#: Where products are made, and where they are once they are whole.
MAKING, DONE = "making", "done"

#: What was asked for, and the time that earlier runs have spent.
_ASKED, _CLOCK = "run.json", "seconds.json"
#: A directory with nothing else is not worth keeping.
_NOTHING_DONE = {_ASKED, _CLOCK, "lock"}


@dataclass(frozen=True)
class Step:
    """A step of a run, which is done once its product is there.

    Attributes:
        product: the name of what it makes, a file or a directory.
        make: makes it at a path, may tell how far it is, and returns what it has found out, as JSON
            can have it.
        title: what its progress is called; empty where it takes no time, or tells by itself.
        goes_on: whether it makes a directory, which is there when ``make`` is called, with what an
            interrupted run has made of it.
    """

    product: str
    make: Callable[[Path, Tell], object]
    title: str = ""
    goes_on: bool = False


class WorkDirectory:
    """The files of one run, or of one of its steps.

    Attributes:
        path: the directory.
    """

    def __init__(self, path: Path) -> None:
        """Use ``path``, which exists; see `opened`."""
        self.path = path
        self._begun = time.monotonic()
        self._earlier_s = self.load_json(_CLOCK) if self.has(_CLOCK) else 0.0

    def elapsed_s(self) -> float:
        """Return the time spent, in earlier runs that were interrupted too, in seconds."""
        return self._earlier_s + time.monotonic() - self._begun

    def has(self, name: str) -> bool:
        """Whether a file is there, and so whole."""
        return (self.path / name).is_file()

    def save(self, name: str, tensors: Mapping[str, NDArray[Any]]) -> None:
        """Write a safetensors file.

        Raises:
            OSError: the disk is full.
        """
        specs = [TensorSpec.of(name, tensor) for name, tensor in tensors.items()]
        with replacing(self.path / name, sync=True) as file:
            write_file(file, specs, map(raw, tensors.values()))

    def open(self, name: str) -> SafetensorsFile:
        """Open a safetensors file.

        Raises:
            CheckpointError: it is damaged.
        """
        return SafetensorsFile(self.path / name)

    def load(self, name: str) -> dict[str, NDArray[Any]]:
        """Read a safetensors file that `save` wrote, into memory of its own."""
        file = self.open(name)
        tensors = {name: np.array(file[name].data) for name in file}
        file.close()
        return tensors

    def save_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        with replacing(self.path / name, sync=True) as file:
            file.write((json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())

    def load_json(self, name: str) -> Any:
        """Read a JSON file that `save_json` wrote."""
        return json.loads((self.path / name).read_text("utf-8"))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def product(self, name: str) -> Path:
        """Return where a product is once it is done."""
        return self.path / DONE / name

    def is_done(self, name: str) -> bool:
        """Whether a product is there, and so whole."""
        return self.product(name).exists()

    def do(self, step: Step, progress: Progress) -> Any:
        """Do a step, unless it is done: -> what it found out, now or then.

        Raises:
            OSError: the disk is full.
        """
        findings = f"{step.product}.json"
        if not self.is_done(step.product):
            telling = progress(step.title) if step.title else nullcontext(lambda done, total: None)
            with telling as tell, self.making(step.product, step.goes_on) as path:
                self.save_json(findings, step.make(path, tell))
        return self.load_json(findings)

    @contextmanager
    def making(self, name: str, goes_on: bool = False) -> Iterator[Path]:
        """Give the path to make a product at, a file or a directory.

        If the block ends well, it moves to where `product` says, and is removed otherwise. What an
        interrupted run has left there is removed first.

        Args:
            name: of the product.
            goes_on: make a directory, and remove nothing from it.

        Raises:
            OSError: the disk is full, or a file of an interrupted run cannot be removed.
        """
        path = self.path / MAKING / name
        path.parent.mkdir(exist_ok=True)
        if goes_on:
            path.mkdir(exist_ok=True)
        else:
            remove_tree(path)
        try:
            yield path
        except BaseException:
            with suppress(OSError):  # which would hide what has happened
                if goes_on:
                    path.rmdir()  # if there is nothing in it
                else:
                    remove_tree(path)
                path.parent.rmdir()
            raise
        for file in [path] if path.is_file() else sorted(path.rglob("*")):
            if file.is_file():
                sync_file(file)
        self.product(name).parent.mkdir(exist_ok=True)
        path.rename(self.product(name))


class Loop:
    """A loop that goes on where it was interrupted: after each step, its whole state is saved.

    Args:
        work: where to; None keeps nothing.
        name: what the files are called: ``<name>-<steps done>.safetensors`` and ``.json``.
    """

    def __init__(self, work: WorkDirectory | None, name: str) -> None:
        self._work = work
        self._name = name

    def resume(self, steps: int) -> tuple[int, dict[str, NDArray[Any]], Any] | None:
        """Return the steps done, of ``steps``, and what was saved after the last of them."""
        for done in range(steps, 0, -1):
            if self._work is not None and self._work.has(self._file(done, "safetensors")):
                tensors = self._work.load(self._file(done, "safetensors"))
                return done, tensors, self._work.load_json(self._file(done, "json"))
        return None

    def save(self, done: int, tensors: Mapping[str, NDArray[Any]], record: object) -> None:
        """Save the state after ``done`` steps; that after the one before goes.

        Raises:
            OSError: the disk is full.
        """
        if self._work is None:
            return
        self._work.save_json(self._file(done, "json"), record)
        self._work.save(self._file(done, "safetensors"), tensors)
        for suffix in ("safetensors", "json"):
            self._work.remove(self._file(done - 1, suffix))

    def _file(self, done: int, suffix: str) -> str:
        return f"{self._name}-{done}.{suffix}"


@contextmanager
def opened(
    output: Path, run: Mapping[str, Any], *, settled: str, error: type[EdgeVLError]
) -> Iterator[WorkDirectory]:
    """Open the work directory of ``output``, a new one or that of an interrupted run.

    It stays when the block fails with anything done, and is removed when it ends well.

    Args:
        output: what is to be made; it does not exist, or is an empty directory.
        run: what decides the result; a run that is resumed must have begun with the same.
        settled: a pattern of files; once there is one, ``run`` may not change.
        error: what is raised.

    Raises:
        error: ``output`` is in use, the directory cannot be made, another process is
            at it, or it belongs to a run with other settings.
    """
    check_target(output, error)
    target = output.resolve()
    path = target.with_name(target.name + ".partial")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as problem:
        raise error(
            f"{path}: cannot be written ({problem.strerror}); choose another place for the output"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise error(f"{path}: another process is writing it") from None
        work = WorkDirectory(path)
        try:
            for left in path.rglob(UNFINISHED + "*"):  # of a run that was killed
                left.unlink()
            _resume(work, run, settled, error)
            try:
                yield work
            except BaseException:
                if {each.name for each in path.iterdir()} <= _NOTHING_DONE:
                    shutil.rmtree(path)
                else:
                    with suppress(OSError):  # which would hide what has happened
                        work.save_json(_CLOCK, work.elapsed_s())
                raise
        except OSError as problem:
            raise error(
                f"{problem.filename or path}: {problem.strerror}; mend it, and the same command "
                f"goes on with what is done in {path}"
            ) from problem
        shutil.rmtree(path)


def _resume(
    work: WorkDirectory, run: Mapping[str, Any], settled: str, error: type[EdgeVLError]
) -> None:
    """Note what is asked for; once anything that depends on it is done, it may not change."""
    begun = work.load_json(_ASKED) if work.has(_ASKED) else run
    different = [key for key in run if begun.get(key) != run[key]]
    if different and any(work.path.glob(settled)):
        key = different[0]
        raise error(
            f"{work.path}: was begun with another {key} ({begun.get(key)}, now {run[key]}): "
            "give the same to resume it, or remove it"
        )
    work.save_json(_ASKED, run)


def identity(setting: object) -> str:
    """Return what tells settings of runs apart, wherever the command is given again."""
    if isinstance(setting, tuple):
        return ", ".join(map(identity, setting))
    return str(setting.resolve() if isinstance(setting, Path) else setting)


def check_target(output: Path, error: type[EdgeVLError]) -> None:
    """Refuse a target that is not free, or cannot be replaced when all is done.

    Raises:
        error: it is no empty directory, or the working directory, or a mount point.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise error(f"{output}: exists and is not an empty directory; choose another")
    if output.resolve() == Path.cwd():  # it is to be replaced under this process's feet
        raise error(f"{output}: is the working directory; name a directory in it")
    if output.resolve().is_mount():  # it cannot be replaced
        raise error(f"{output}: is a mount point; name a directory in it")


def check_disk(output: Path, needed: int, error: type[EdgeVLError]) -> None:
    """Refuse a disk without room.

    Args:
        output: what is to be written; its directory need not exist.
        needed: bytes.
        error: what is raised.

    Raises:
        error: says how much there is.
    """
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise error(
            f"{output}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free on that disk"
        )


def publish(made: Path, output: Path) -> None:
    """Move a finished directory to its place.

    Raises:
        OSError: something has come to lie there meanwhile.
    """
    target = output.resolve()  # of a link, the directory that it names
    if target.is_dir():
        target.rmdir()  # empty, as checked
    made.rename(target)


def remove_tree(path: Path) -> None:
    """Remove a file or a directory, if it is there.

    Raises:
        OSError: something in it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
