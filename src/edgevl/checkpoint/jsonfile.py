"""Bounded JSON: everything that a checkpoint says about itself comes through here.

What is in a file beside the fields that are asked for is not judged: tools write NaN, keys twice,
and 1000000000000000019884624838656 for "no limit". A field that is used is checked as it is read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

from edgevl.errors import CheckpointError

#: Integers of more digits are taken as infinite: parsing takes time with the square of the length.
MAX_INTEGER_DIGITS = 300

_Choice = TypeVar("_Choice", bound=str)
#: Marks a field that has no default.
REQUIRED: Any = object()


def parse_object(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object; of a key that occurs twice, the last counts.

    Raises:
        CheckpointError: not JSON, not an object, nested too deep; ``where`` leads the message.
    """
    try:
        value = json.loads(text, parse_int=_integer)
    except RecursionError:
        raise CheckpointError(f"{where}: JSON nested too deep") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{where}: not UTF-8 text") from None
    except ValueError as error:
        raise CheckpointError(
            f"{where}: not valid JSON ({error}); the file is damaged, download it again"
        ) from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, not {kind(value)}")
    return value


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
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = values
        self.where = where

    def error(self, name: str, problem: str) -> CheckpointError:
        """Make the error for a field."""
        return CheckpointError(f"{self.where}: field {name!r} {problem}")

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
        return Fields(value, f"{self.where}: {name}")

    def square(self, name: str, low: int, high: int, default: Any = REQUIRED) -> int:
        """Return the side of a square, stored as an integer or as a list of two equal ones."""
        value = self._get(name, default)
        if isinstance(value, list):
            if len(value) != 2 or value[0] != value[1]:
                raise self.error(name, f"is {shown(value)}, expected one size or two equal sizes")
            value = value[0]
        return Fields({name: value}, self.where).integer(name, low, high)
