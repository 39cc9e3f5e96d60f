"""The directory of a quantization under way: what is done of it, so that it can be resumed.

``OUT.partial`` holds ``run.json`` (what was asked for), the calibration's files,
``layer-<n>.safetensors`` and ``.json`` for each finished layer of the text, and the state of the
loops over layers (`Steps`). Every file is written beside and renamed: one that is there is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, raw, write_file
from edgevl.quantize.settings import QuantizationError

#: safetensors' names of the types that are stored here.
_TYPES = {"float16": "F16", "float32": "F32", "int8": "I8", "int32": "I32", "int64": "I64"}


#: What was asked for, and the time that earlier runs have spent.
_ASKED, _CLOCK = "run.json", "seconds.json"
#: A directory with nothing else is not worth keeping.
_NOTHING_DONE = {_ASKED, _CLOCK, "lock"}


class WorkDirectory:
    """The files of one run.

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
        specs = [TensorSpec(n, _TYPES[t.dtype.name], t.shape) for n, t in tensors.items()]
        with self._replacing(name) as path, path.open("wb") as file:
            write_file(file, specs, map(raw, tensors.values()))

    def open(self, name: str) -> SafetensorsFile:
        """Open a safetensors file.

        Raises:
            CheckpointError: it is damaged.
        """
        return SafetensorsFile(self.path / name)

    def save_json(self, name: str, value: object) -> None:
        """Write a JSON file."""
        with self._replacing(name) as path:
            path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def load_json(self, name: str) -> Any:
        """Read a JSON file that `save_json` wrote."""
        return json.loads((self.path / name).read_text("utf-8"))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    @contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        beside = self.path / f"{name}.new"
        yield beside
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        beside.replace(self.path / name)


class Steps:
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
                file = self._work.open(self._file(done, "safetensors"))
                tensors = {name: np.array(file[name].data) for name in file}
                file.close()
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
def opened(output: Path, run: Mapping[str, Any]) -> Iterator[WorkDirectory]:
    """Open the work directory of ``output``, a new one or that of an interrupted run.

    It stays when the block fails with anything done, and is removed when it ends well.

    Args:
        output: what is to be made; it does not exist, or is an empty directory.
        run: what decides the result; a run that is resumed must have begun with the same.

    Raises:
        QuantizationError: ``output`` is in use, the directory cannot be made, another process is
            at it, or it belongs to a run with other settings.
    """
    check_target(output)
    target = output.resolve()
    path = target.with_name(target.name + ".partial")
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = (path / "lock").open("w")
    except OSError as error:
        raise QuantizationError(
            f"{path}: cannot be written ({error.strerror}); choose another place for the output"
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise QuantizationError(f"{path}: another process is writing it") from None
        work = WorkDirectory(path)
        try:
            _resume(work, run)
            try:
                yield work
            except BaseException:
                if {each.name for each in path.iterdir()} <= _NOTHING_DONE:
                    shutil.rmtree(path)
                else:
                    with suppress(OSError):  # which would hide what has happened
                        work.save_json(_CLOCK, work.elapsed_s())
                raise
        except OSError as error:
            raise QuantizationError(
                f"{error.filename or path}: {error.strerror}; mend it, and the same command goes "
                f"on with what is done in {path}"
            ) from error
        shutil.rmtree(path)


def _resume(work: WorkDirectory, run: Mapping[str, Any]) -> None:
    """Note what is asked for; once a layer is done, of text or vision, it may not change."""
    begun = work.load_json(_ASKED) if work.has(_ASKED) else run
    different = [key for key in run if begun.get(key) != run[key]]
    if different and any(work.path.glob("*-*.safetensors")):
        key = different[0]
        raise QuantizationError(
            f"{work.path}: was begun with another {key} ({begun.get(key)!r}, now {run[key]!r}): "
            "give the same to resume it, or remove it"
        )
    work.save_json(_ASKED, run)


def check_target(output: Path) -> None:
    """Refuse a target that is not free, or cannot be replaced when all is done.

    Raises:
        QuantizationError: it is no empty directory, or the working directory, or a mount point.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise QuantizationError(f"{output}: exists and is not an empty directory; choose another")
    if output.resolve() == Path.cwd():  # it is to be replaced under this process's feet
        raise QuantizationError(f"{output}: is the working directory; name a directory in it")
    if output.resolve().is_mount():  # it cannot be replaced
        raise QuantizationError(f"{output}: is a mount point; name a directory in it")


def publish(made: Path, output: Path) -> None:
    """Move a finished directory to its place.

    Raises:
        OSError: something has come to lie there meanwhile.
    """
    target = output.resolve()  # of a link, the directory that it names
    if target.is_dir():
        target.rmdir()  # empty, as checked
    made.rename(target)
