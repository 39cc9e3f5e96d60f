"""A batch to a file: what is done survives an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgevl.batch.answering import answer_rows
from edgevl.batch.rows import BatchError, BatchInput
from edgevl.checkpoint import Checkpoint
from edgevl.files import Journal, sync_file
from edgevl.generate.constraint import Constraint
from edgevl.generate.model import Model
from edgevl.version import __version__
from edgevl.work import opened, publish

#: The finished rows in the work directory, ``OUT.partial``.
ROWS = "rows.jsonl"


@dataclass(frozen=True)
class BatchResult:
    """How many rows there were, and how many of them have an ``error``."""

    rows: int
    failed: int


def run_batch(
    model: Model,
    source: BatchInput,
    output: str | Path,
    *,
    loading: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], object] | None = None,
    **options: Any,
) -> BatchResult:
    """Answer the rows of ``source`` into a JSONL file, in their order.

    ``OUT.partial`` has what is done until all is; a run that was interrupted, however it ended,
    goes on there when it is called with the same arguments again.

    Args:
        model: what to ask.
        source: what to ask it, from `open_batch`.
        output: file to write; it must not exist. A line is what `answer_rows` yields.
        loading: how the model was loaded, as far as that may change answers.
        progress: called after every row with the rows done and all there are.
        **options: of `answer_rows`.

    Raises:
        BatchError: ``output`` exists or cannot be written, or was begun with other arguments.
        EdgeVLError: the model fails, not a row.
    """
    output = Path(output)
    check_output(output)
    begun = _identity(model, source) | dict(loading or {}) | options
    begun = json.loads(json.dumps(begun, default=_digest))
    with opened(output, begun, settled=ROWS, error=BatchError) as work:
        path = work.path / ROWS
        rows = Journal(path)
        done = failed = 0
        for row in rows.recover():
            done += 1
            failed += "error" in row
        with closing(answer_rows(model, source.rows(done), **options)) as results:
            for result in results:
                rows.add(result)
                done += 1
                failed += "error" in result
                if progress is not None:
                    progress(done, len(source))
        sync_file(path)
        check_output(output)
        publish(path, output)
    return BatchResult(done, failed)


def check_output(output: Path) -> None:
    """Refuse an output that is there already.

    Raises:
        BatchError: it is.
    """
    if output.exists():
        raise BatchError(f"{output}: exists already; choose another name, or remove it")


def _identity(model: Model, source: BatchInput) -> dict[str, Any]:
    """Return what decides the rows, by names that a message can show."""
    identity = {
        "edgevl": __version__,
        "model": str(model.checkpoint.path.resolve()),
        "input": str(source.path.resolve()),
        "input, its contents": source.digest,
        "question": source.question,
    }
    if isinstance(model.checkpoint, Checkpoint):
        identity["checkpoint"] = model.checkpoint.fingerprint()
    return identity


def _digest(constraint: Constraint) -> str:
    """Return what tells constraints apart, and is short enough for a message."""
    return hashlib.sha256(constraint.grammar.encode()).hexdigest()[:16]
