"""JSON that a request brings, within bounds."""

from __future__ import annotations

import json
from typing import Any

from edgevl.errors import PromptError


def bounded_json(name: str, value: Any, max_bytes: int, max_levels: int) -> tuple[str, Any]:
    """Return JSON as text and as what it parses to.

    Args:
        name: what errors call it.
        value: either of the two.
        max_bytes: most bytes of the text.
        max_levels: how deep objects and arrays may be nested.

    Raises:
        PromptError: it is not JSON, or exceeds a bound.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
        check_size(name, text, max_bytes)
        parsed = json.loads(text, parse_constant=_refuse)
        if _levels(parsed) > max_levels:
            raise RecursionError
    except (TypeError, ValueError) as error:
        raise PromptError(f"{name} is not JSON ({error}): correct it") from None
    except RecursionError:
        raise PromptError(f"{name} is nested more than {max_levels} levels: flatten it") from None
    return text, parsed


def check_size(name: str, text: str, max_bytes: int) -> None:
    """Check that text is Unicode and of at most ``max_bytes`` in UTF-8.

    Raises:
        PromptError: it is not; ``name`` leads the message.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PromptError(f"{name} is not Unicode text: correct it") from None
    if size > max_bytes:
        raise PromptError(f"{name} has {size} bytes: the limit is {max_bytes}")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _levels(value: Any) -> int:
    """Return how deep objects and arrays are nested; no recursion, however deep."""
    count, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        count += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return count
