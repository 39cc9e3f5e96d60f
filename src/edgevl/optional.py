"""Libraries that an extra installs: what to say where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from edgevl.errors import EdgeVLError


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
