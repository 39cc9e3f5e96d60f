"""What an answer must be: JSON, JSON of a schema, text of a regular expression."""

from __future__ import annotations

import json
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgevl.errors import PromptError
from edgevl.optional import needs

#: Most bytes of a JSON schema or a regular expression, and levels that a schema may be nested.
MAX_CONSTRAINT_BYTES = 128 * 1024
MAX_SCHEMA_LEVELS = 64

#: Between the tokens of JSON: a blank, or a line break with an indent. Free to choose, a model
#: without an idea of what comes next writes white space until it is out of tokens.
_WHITESPACE = r" |\n {0,32}"
#: Given with every schema, so that none can loosen them with ``x-guidance``.
_JSON_OPTIONS = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,  # what is not supported is an error, not left unchecked
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}


@dataclass(frozen=True)
class Constraint:
    """What an answer must be; made and checked by the methods below.

    It says nothing of any model, never changes, and may be shared between answers and threads.

    Attributes:
        grammar: what it comes to, as ``llguidance`` reads it.
    """

    grammar: str

    @classmethod
    def json_object(cls) -> Constraint:
        """Return the constraint to be a JSON object, whatever is in it.

        Raises:
            EdgeVLError: ``llguidance`` is not installed.
        """
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(cls, schema: dict[str, Any] | bool | str) -> Constraint:
        """Return the constraint to be JSON of a schema.

        Args:
            schema: a JSON schema, as JSON text or as what that parses to.

        Raises:
            PromptError: it is no JSON schema, too large, or uses what is not supported, which the
                message names.
            EdgeVLError: ``llguidance`` is not installed.
        """
        try:
            text = schema if isinstance(schema, str) else json.dumps(schema, allow_nan=False)
            _check_size("json_schema", text)
            parsed = json.loads(text)
            if _levels(parsed) > MAX_SCHEMA_LEVELS:
                raise RecursionError
        except (TypeError, ValueError) as error:
            raise PromptError(f"json_schema is not JSON ({error}): correct it") from None
        except RecursionError:
            raise PromptError(
                f"json_schema is nested more than {MAX_SCHEMA_LEVELS} levels: flatten it"
            ) from None
        if not isinstance(parsed, (dict, bool)):
            raise PromptError(f"json_schema is {text[:40]}: it must be an object, {{…}}")
        matcher = import_llguidance().LLMatcher
        try:
            grammar = matcher.grammar_from_json_schema(text, overrides=_JSON_OPTIONS)
        except ValueError as error:  # what Python takes for JSON and others do not: NaN, "\ud800"
            raise PromptError(f"json_schema is not JSON ({error}): correct it") from None
        return cls._checked("json_schema", grammar)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Return the constraint to be, as a whole, what a regular expression matches.

        Args:
            pattern: in the syntax of Rust's ``regex``, which has no look-around and no
                back-references.

        Raises:
            PromptError: it is no regular expression, too large, or uses what is not supported.
            EdgeVLError: ``llguidance`` is not installed.
        """
        if not isinstance(pattern, str):
            raise PromptError(f"regex is {pattern!r}: it must be a string")
        _check_size("regex", pattern)
        matcher = import_llguidance().LLMatcher
        return cls._checked("regex", matcher.grammar_from_regex(pattern))

    @classmethod
    def _checked(cls, name: str, grammar: str) -> Constraint:
        guidance = import_llguidance()
        try:
            failed, messages = guidance.LLMatcher.validate_grammar_with_warnings(
                grammar, limits=limits()
            )
        except BaseException as error:
            # A panic in Rust, which is no Exception: up to 1.9.1 there is one where a long value
            # that is not ASCII stands where it cannot be.
            if type(error).__name__ != "PanicException":
                raise
            raise PromptError(
                f"{name}: llguidance fails on it ({reason(str(error))}); correct it"
            ) from None
        if failed:
            raise PromptError(f"{name}: {reason(messages[0])}; leave it out or write it otherwise")
        return cls(grammar)


def import_llguidance() -> ModuleType:
    """Return the library that computes constraints.

    Raises:
        EdgeVLError: it is not installed.
    """
    with needs("constrained"):
        import llguidance
    return llguidance


def limits() -> Any:
    """Return ``llguidance``'s limits on time and memory: its own, with errors of one line."""
    return import_llguidance().LLParserLimits(verbose_errors=False)


def reason(message: str) -> str:
    """Return the line that says why, of a message of ``llguidance``."""
    lines = message.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]  # of a regular expression
    return (errors or lines)[0].removeprefix("error: ")[:300]


def _check_size(name: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise PromptError(f"{name} is not Unicode text: correct it") from None
    if size > MAX_CONSTRAINT_BYTES:
        raise PromptError(f"{name} has {size} bytes: the limit is {MAX_CONSTRAINT_BYTES}")


def _levels(value: Any) -> int:
    """Return how deep objects and arrays are nested; no recursion, however deep."""
    count, level = 0, [value]
    while level := [item for item in level if isinstance(item, (dict, list))]:
        count += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return count
