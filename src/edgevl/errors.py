"""Errors raised on purpose: each one line that names the file, the value and the fix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class EdgeVLError(Exception):
    """Base of all errors that are the input's, the file's or the machine's fault, not a bug.

    Attributes:
        chinese: the message in Chinese, where a user of the web page may read it; else empty.
    """

    def __init__(self, message: str, chinese: str = "") -> None:
        """Put an error together."""
        super().__init__(message)
        self.chinese = chinese


class CheckpointError(EdgeVLError):
    """A checkpoint is missing, malformed, unsafe, or of a kind that is not supported."""


class ImageError(EdgeVLError):
    """A picture cannot be read, or exceeds a limit."""


class VideoError(EdgeVLError):
    """A video cannot be read, exceeds a limit, or PyAV is missing."""


class PromptError(EdgeVLError):
    """Messages cannot be turned into a prompt, or a request's parameters are out of range."""


class SchemaError(PromptError):
    """A JSON schema or a regular expression is malformed, too large, or not supported.

    Attributes:
        where: the part at fault, such as ``json_schema.properties.x.pattern``.
    """

    def __init__(self, message: str, where: str) -> None:
        """Put an error together."""
        super().__init__(message)
        self.where = where


class ContextLengthError(PromptError):
    """A single message is longer than the context of the model."""


class DownloadError(EdgeVLError):
    """A model could not be fetched from the Hub."""


class QueueFullError(EdgeVLError):
    """As many requests wait for an answer as may.

    Attributes:
        retry_after_s: when to ask again, in seconds; an estimate.
    """

    def __init__(self, message: str, retry_after_s: float, chinese: str = "") -> None:
        super().__init__(message, chinese)
        self.retry_after_s = retry_after_s


class FetchError(EdgeVLError):
    """A picture or video may not or cannot be fetched from its URL, or exceeds a limit."""


class BoardError(EdgeVLError):
    """A board's model, its runtime or the compiler is missing, fails, or does not fit."""


@contextmanager
def needs(extra: str, error_type: type[EdgeVLError] = EdgeVLError) -> Iterator[None]:
    """Import in the block what ``edgevl[extra]`` installs.

    Raises:
        EdgeVLError: of ``error_type``: a library is not installed.
    """
    try:
        yield
    except ImportError as error:
        raise error_type(
            f"{error.name or error} is missing: pip install 'edgevl[{extra}]'"
        ) from None
