"""What an answer must be: JSON, JSON of a schema, text of a regular expression, calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from edgevl.errors import PromptError, SchemaError
from edgevl.generate.json_schema import find_fault, patterns, simplify
from edgevl.json_input import bounded_json, check_size
from edgevl.optional import needs
from edgevl.preprocess.tools import CALL_END, CALL_START, Tool, check_tools

#: Most bytes of a JSON schema or a regular expression, and levels that a schema may be nested.
MAX_CONSTRAINT_BYTES = 128 * 1024
MAX_SCHEMA_LEVELS = 64
#: Most calls of one answer. A model without an idea of when to end would make them without end.
MAX_CALLS = 16

#: Between the tokens of JSON: a blank, or a line break with an indent. Free to choose, a model
#: without an idea of what comes next writes white space until it is out of tokens.
_WHITESPACE = r" |\n {0,32}"
#: Given with every schema, so that none can loosen them with ``x-guidance``.
_JSON_OPTIONS: dict[str, str | bool | None] = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": _WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,  # what is not supported is an error, not left unchecked
    "json_allowed_escapes": None,
    "json_allow_general_unicode_escapes": False,
}
#: Arguments of calls have white space where models have learned it: as Python writes JSON.
_ARGUMENTS_OPTIONS = _JSON_OPTIONS | {
    "item_separator": ", ",
    "key_separator": ": ",
    "whitespace_flexible": False,
    "whitespace_pattern": None,
}


@dataclass(frozen=True)
class Constraint:
    """What an answer must be; made and checked by the methods below.

    It says nothing of any model, never changes, and may be shared between answers and threads.

    Attributes:
        grammar: what it comes to, as ``llguidance`` reads it.
        with_thinking: whether it is for the thoughts too, where the prompt has opened them; others
            are for what comes after.
        patterns: of schemas: where each is, and the grammar of what it matches by itself.
    """

    grammar: str
    with_thinking: bool = False
    patterns: tuple[tuple[str, str], ...] = ()

    @classmethod
    def json_object(cls) -> Constraint:
        """Return the constraint to be a JSON object, whatever is in it.

        Raises:
            EdgeVLError: ``llguidance`` is not installed.
        """
        return cls.json_schema({"type": "object"})

    @classmethod
    def json_schema(
        cls, schema: dict[str, Any] | bool | str, name: str = "json_schema"
    ) -> Constraint:
        """Return the constraint to be JSON of a schema.

        Args:
            schema: a JSON schema, as JSON text or as what that parses to.
            name: what messages call it.

        Raises:
            SchemaError: it is no JSON schema, too large, or uses what is not supported, which the
                message names.
            EdgeVLError: ``llguidance`` is not installed.
        """
        return cls._of_schema(name, schema, _JSON_OPTIONS)

    @classmethod
    def regex(cls, pattern: str) -> Constraint:
        """Return the constraint to be, as a whole, what a regular expression matches.

        Args:
            pattern: in the syntax of Rust's ``regex``, which has no look-around and no
                back-references. One that itself has a ``</think>`` is for the thoughts too.

        Raises:
            PromptError: it is no regular expression, too large, or uses what is not supported.
            EdgeVLError: ``llguidance`` is not installed.
        """
        if not isinstance(pattern, str):
            raise PromptError(f"regex is {pattern!r}: it must be a string")
        check_size("regex", pattern, MAX_CONSTRAINT_BYTES)
        grammar = import_llguidance().LLMatcher.grammar_from_regex(pattern)
        if why := _failure(grammar):
            raise _refused("regex", why)
        return cls(grammar, with_thinking="</think>" in pattern.replace("\\", ""))

    @classmethod
    def tool_calls(
        cls, tools: Sequence[Tool], several: bool = False, otherwise: Constraint | None = None
    ) -> Constraint:
        """Return the constraint to be calls of tools, as Qwen3 writes them, and nothing else.

        Args:
            tools: those that may be called. Arguments are of a tool's ``parameters``; what these do
                not name is left out, unless they say themselves what more there may be.
            several: whether there may be several calls, up to ``MAX_CALLS``, or one only.
            otherwise: what the answer may be instead of calls.

        Raises:
            PromptError: there are no tools, or too many.
            SchemaError: a schema is too large, or uses what is not supported, which the message
                names.
            EdgeVLError: ``llguidance`` is not installed.
        """
        check_tools(tools)
        if not tools:
            raise PromptError("tools: there is none to call: give at least one")
        # A grammar for each schema, so that its references are its own. One that is nothing but a
        # token's text becomes that token, where the tokenizer has it (`TokenMasks`).
        grammars = [
            {"name": "call_start", "lark_grammar": f"start: {json.dumps(CALL_START)}"},
            {"name": "call_end", "lark_grammar": f"start: {json.dumps(CALL_END)}"},
        ]
        choices = []
        found: list[tuple[str, str]] = []
        for number, tool in enumerate(tools):
            where = f"tools.{tool.name}.parameters"
            arguments = cls._of_schema(where, tool.arguments_schema(), _ARGUMENTS_OPTIONS)
            [part] = json.loads(arguments.grammar)["grammars"]
            grammars.append(part | {"name": f"tool_{number}"})
            found += arguments.patterns
            begin = json.dumps(f'\n{{"name": "{tool.name}", "arguments": ')
            choices.append(f"{begin} @tool_{number}")
        # Models write a line break after a call before they decide whether there is another: where
        # it did not leave both open, they would go on with calls that nobody asked for.
        more = f' ("\\n" call){{0,{MAX_CALLS - 1}}} "\\n"?' if several else ""
        start = f"call{more}"
        if otherwise is not None:
            [part] = json.loads(otherwise.grammar)["grammars"]
            grammars.append(part | {"name": "otherwise"})
            found += otherwise.patterns
            start += " | @otherwise"
        lark = f'start: {start}\ncall: @call_start ({" | ".join(choices)}) "}}\\n" @call_end\n'
        grammar = json.dumps({"grammars": [{"name": "calls", "lark_grammar": lark}, *grammars]})
        if why := _failure(grammar):
            raise _refused("tools", why)
        return cls(grammar, patterns=tuple(found))

    @classmethod
    def _of_schema(
        cls,
        name: str,
        schema: dict[str, Any] | bool | str,
        options: dict[str, str | bool | None],
    ) -> Constraint:
        """Return the constraint to be JSON of a schema; ``name`` leads messages."""
        text, parsed = bounded_json(name, schema, MAX_CONSTRAINT_BYTES, MAX_SCHEMA_LEVELS)
        if not isinstance(parsed, (dict, bool)):
            raise PromptError(f"{name} is {text[:40]}: it must be an object, {{…}}")
        if isinstance(parsed, bool):
            parsed = {} if parsed else {"enum": []}
        simplify(parsed)
        matcher = import_llguidance().LLMatcher

        def grammar(schema: Any) -> str:
            return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=options))

        def failure(schema: Any) -> str:
            return _failure(grammar(schema))

        try:
            if why := failure(parsed):
                path, why = find_fault(parsed, why, failure)
                raise _refused(name + path, why)
            return cls(
                grammar(parsed),
                patterns=tuple(
                    (name + path, grammar({"type": "string", "pattern": pattern}))
                    for path, pattern in patterns(parsed)
                ),
            )
        except ValueError as error:  # what Python takes for JSON and others do not: "\ud800"
            raise PromptError(f"{name}: not JSON ({error}): correct it") from None


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


def _failure(grammar: str) -> str:
    """Return the line that says what is wrong with a grammar; empty if nothing is."""
    matcher = import_llguidance().LLMatcher
    try:
        failed, messages = matcher.validate_grammar_with_warnings(grammar, limits=limits())
    except BaseException as error:
        # A panic in Rust, which is no Exception: up to 1.9.1 there is one where a long value that
        # is not ASCII stands where it cannot be.
        if type(error).__name__ != "PanicException":
            raise
        return f"llguidance fails on it ({reason(str(error))})"
    return reason(messages[0]) if failed else ""


def _refused(where: str, why: str) -> SchemaError:
    if why.startswith("oneOf constraints are not supported"):
        why = "one answer may be of several of the schemas in oneOf: make it anyOf"
    return SchemaError(f"{where}: {why}; leave it out or write it otherwise", where)
