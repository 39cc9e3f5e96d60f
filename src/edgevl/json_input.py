"""JSON from outside: what checkpoints, compiled models, files of questions and requests bring.

What is in a file beside the fields that are asked for is not judged: tools write NaN, keys twice,
and 1000000000000000019884624838656 for "no limit". A field that is used is checked as it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from edgevl.errors import CheckpointError, EdgeVLError, PromptError
from edgevl.files import read_text

#: Integers of more digits are taken as infinite: parsing takes time with the square of the length.
MAX_INTEGER_DIGITS = 300

_Choice = TypeVar("_Choice", bound=str)
#: Marks a field that has no default.
REQUIRED: Any = object()


def parse_json(
    text: str | bytes, where: str, error: type[EdgeVLError], max_levels: int | None = None
) -> Any:
    """Parse JSON; of a key that occurs twice, the last counts.

    Args:
        text: it, as UTF-8 where it is bytes.
        where: leads messages.
        error: what is raised.
        max_levels: how deep objects and arrays may be nested. Where it is given, NaN, infinities
            and absurdly long integers are refused as well.

    Raises:
        error: not JSON, or nested too deep.
    """
    try:
        if not isinstance(text, str):
            text = text.decode("utf-8-sig")
        if max_levels is None:
            return json.loads(text, parse_int=_integer)
        value = json.loads(text, parse_constant=_refuse)
        if _levels(value) > max_levels:
            raise RecursionError
        return value
    except UnicodeDecodeError as problem:
        raise error(f"{where}: not UTF-8 at byte {problem.start}: correct it") from None
    except ValueError as problem:
        raise error(f"{where}: not JSON ({problem}): correct it, or get it again") from None
    except RecursionError:
        limit = f"more than {max_levels} levels" if max_levels else "too deep"
        raise error(f"{where}: not JSON that is read, nested {limit}: flatten it") from None


def parse_object(
    text: str | bytes, where: str, error: type[EdgeVLError] = CheckpointError
) -> dict[str, Any]:
    """Parse a JSON object; see `parse_json`.

    Raises:
        error: not JSON, not an object, nested too deep.
    """
    value = parse_json(text, where, error)
    if not isinstance(value, dict):
        raise error(f"{where}: not an object but {kind(value)}: a JSON object is expected, {{…}}")
    return value


def bounded_json(where: str, value: Any, max_bytes: int, max_levels: int) -> tuple[str, Any]:
    """Return JSON that a request brings, as text and as what it parses to.

    Args:
        where: leads messages.
        value: either of the two.
        max_bytes: most bytes of the text.
        max_levels: how deep objects and arrays may be nested.

    Raises:
        PromptError: it is not JSON, or exceeds a bound.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{where}: not JSON ({error}): correct it") from None
    check_size(where, text, max_bytes)
    return text, parse_json(text, where, PromptError, max_levels)


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


def filled_text(value: object, name: str, max_bytes: float = math.inf) -> str:
    """Return what a user has to write in a field: a text that is not empty, and Unicode.

    Raises:
        ValueError: says of the field ``name`` what is wrong.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"`{name}` must be a text, not empty")
    check_unicode(value, name)
    if len(value.encode()) > max_bytes:
        raise ValueError(f"`{name}` is over the limit of {int(max_bytes) >> 20} MiB")
    return value


def check_unicode(text: str, name: str) -> None:
    """Raise a ValueError for lone surrogates, which JSON can spell and no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"`{name}` has half a surrogate pair; correct it") from None


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


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MAX_INTEGER_DIGITS else float(digits)


def shown(value: object, limit: int = 60) -> str:
    """``repr`` of a value from a file, short enough for an error of one line."""
    if isinstance(value, (dict, list)):
        return f"{kind(value)} of {len(value)}"
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "…" + text[-1]


def kind(value: object) -> str:
    """Return the JSON name of a value's type."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return names.get(type(value), "null" if value is None else "a number")


class Fields:
    """A JSON object whose fields are read with a type, a range and a good error.

    A field that is null counts as absent, as in transformers.

    Args:
        values: the object.
        where: file, and path of the object inside it, for errors.
        error: what is raised for a field.
    """

    def __init__(
        self, values: Mapping[str, Any], where: str, error: type[EdgeVLError] = CheckpointError
    ) -> None:
        self.values = values
        self.where = where
        self._error = error

    @classmethod
    def read(cls, path: Path, max_bytes: int, error: type[EdgeVLError] = CheckpointError) -> Fields:
        """Read a file of at most ``max_bytes``.

        Raises:
            error: it cannot be read, is too large, or no JSON object.
        """
        text = read_text(path, max_bytes, error)
        return cls(parse_object(text, str(path), error), str(path), error)

    def error(self, name: str, problem: str) -> Exception:
        """Make the error for a field."""
        return self._error(f"{self.where}: field {name!r} {problem}")

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is REQUIRED:
                raise self.error(name, "is missing")
            return default
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def first(self, *names: str) -> str:
        """Return the first of the names of one field that is there, or else the last of them."""
        return next(filter(self.has, names), names[-1])

    def integer(self, name: str, low: float, high: float, default: Any = REQUIRED) -> int:
        """Return an integer in ``low … high``; 448.0 is one."""
        value = self._get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(name, f"is {shown(value)}, expected an integer")
        if not low <= value <= high:
            raise self.error(name, f"is {shown(value)}, expected {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: Any = REQUIRED) -> float:
        """Return a finite number in ``low … high``."""
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(name, f"is {shown(value)}, expected a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.error(name, f"is {shown(value)}, expected {low:g} to {high:g}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """Return a boolean, which may be stored as 0 or 1."""
        value = self._get(name, default)
        if value not in (0, 1):
            raise self.error(name, f"is {shown(value)}, expected true or false")
        return bool(value)

    def text(self, name: str, default: Any = REQUIRED) -> str:
        """Return a string of at most 64 Ki characters."""
        value = self._get(name, default)
        if not isinstance(value, str):
            raise self.error(name, f"is {shown(value)}, expected a string")
        if len(value) > 1 << 16:
            raise self.error(name, f"has {len(value)} characters, expected at most {1 << 16}")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, f"is {shown(value)}, which is not valid Unicode") from None
        return value

    def choice(self, name: str, choices: tuple[_Choice, ...], default: Any = REQUIRED) -> _Choice:
        """Return one of some strings."""
        value = self.text(name, default)
        for choice in choices:
            if value == choice:
                return choice
        raise self.error(name, f"is {shown(value)}; supported: {', '.join(choices)}")

    def fields(self, name: str, default: Any = REQUIRED) -> Fields:
        """Return an object inside this one."""
        value = self._get(name, default)
        if not isinstance(value, dict):
            raise self.error(name, f"is {shown(value)}, expected an object")
        return Fields(value, f"{self.where}: {name}", self._error)

    def square(self, name: str, low: int, high: int, default: Any = REQUIRED) -> int:
        """Return the side of a square, stored as an integer or as a list of two equal ones."""
        value = self._get(name, default)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(name, f"is {shown(value)}, expected one size or two equal sizes")
            value = value[0]
        return Fields({name: value}, self.where, self._error).integer(name, low, high)
