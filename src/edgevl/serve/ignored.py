"""What is said of fields of requests that are not known: they are ignored, or refused."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

from edgevl.serve.errors import ApiError
from edgevl.serve.requests import HARMLESS, Strict, ignored_fields

logger = logging.getLogger("edgevl.serve")

HEADER = "x-edgevl-ignored"
#: Most characters of the header, and of one name in it; most names that the log ever has.
_MAX_HEADER, _MAX_NAME, _MAX_LOGGED = 1024, 128, 1024


class IgnoredFields:
    """Names ignored fields in a header, and in the log each once; or refuses them."""

    def __init__(self, strict: bool) -> None:
        """Have seen none; ``strict`` refuses them."""
        self._strict = strict
        self._logged: set[str] = set()

    def headers(self, body: Strict) -> dict[str, str]:
        """Return the header that names the fields of a request that are ignored, if there are any.

        Raises:
            ApiError: there are, and they are not to be.
        """
        names: dict[str, None] = {}  # a set in order
        for path in ignored_fields(body):
            if self._strict and path.rpartition(".")[2] not in HARMLESS:
                param = _shown(path)
                raise ApiError(
                    400,
                    f"Unrecognized request argument supplied: {param}",
                    param,
                    "unknown_parameter",
                )
            names[re.sub(r"\[\d+\]", "[]", _shown(path))] = None
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < _MAX_LOGGED:
            self._logged.update(new)
            logger.info(f"ignored fields of requests: {_line(new)}")
        return {HEADER: _line(names)} if names else {}


def _shown(path: str) -> str:
    """Return a path in characters that any header may have, and not too many of them."""
    return re.sub(r"[^\w.\[\]-]", "?", path, flags=re.ASCII)[:_MAX_NAME]


def _line(names: Iterable[str]) -> str:
    line = ", ".join(names)
    return line if len(line) <= _MAX_HEADER else f"{line[: _MAX_HEADER - 3]}..."
