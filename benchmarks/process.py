"""Workers: processes that hold a loaded stack and are stopped while others are measured."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

from environments import HERE, UnavailableError, last_line


def stop(process: subprocess.Popen[Any]) -> None:
    """Stop a process (SIGSTOP) and wait until it has, or has ended."""
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


class Worker:
    """Talks to ``worker.py``. The process is stopped (SIGSTOP) whenever it has nothing to do.

    So no thread of it can spin, and several stacks can be measured in turn without loading them
    again.
    """

    def __init__(
        self,
        python: Path,
        arguments: list[str],
        log: Path,
        variables: dict[str, str],
        script: Path = HERE / "worker.py",
    ) -> None:
        """Start the process; `ready` waits until it has loaded."""
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                [str(python), str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=variables,
                text=True,
            )

    def ready(self) -> None:
        """Wait until the process has loaded its stack, and stop it.

        Raises:
            UnavailableError: it failed.
        """
        self._result()
        stop(self._process)

    def call(self, step: str, **arguments: Any) -> Any:
        """Let the process do a step and return its result.

        Raises:
            UnavailableError: it failed.
        """
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        try:
            print(json.dumps({"step": step, **arguments}), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise UnavailableError(last_line(self._log)) from None
        value = self._result()
        stop(self._process)
        return value

    def _result(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            raise UnavailableError(f"{last_line(self._log)} (status {status}, see {self._log})")
        return json.loads(line)["value"]

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
