"""Many questions about pictures and videos: read from a file or directory, answered row by row."""

from edgevl.batch.rows import BatchError, BatchInput, Row, open_batch
from edgevl.batch.run import BatchResult, answer_rows, check_output, run_batch

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
