"""Many questions about pictures and videos: read from a file or directory, answered row by row."""

from edgevl.generate.batch.answering import answer_rows
from edgevl.generate.batch.rows import BatchError, BatchInput, Row, open_batch
from edgevl.generate.batch.run import BatchResult, check_output, run_batch

__all__ = [
    "BatchError",
    "BatchInput",
    "BatchResult",
    "Row",
    "answer_rows",
    "check_output",
    "open_batch",
    "run_batch",
]
