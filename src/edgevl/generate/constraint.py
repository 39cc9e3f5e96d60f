"""What an answer must be: JSON, JSON of a schema, text of a regular expression, calls of tools."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from types import ModuleType
from typing import Any

from edgevl.errors import PromptError, SchemaError, needs
from edgevl.json_input import bounded_json, check_size
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
#: No white space at all.
_DENSE_OPTIONS = _JSON_OPTIONS | {"whitespace_flexible": False, "whitespace_pattern": None}


@dataclass(frozen=True)
class Constraint:
    """What an answer must be; made and checked by the methods below.

    It says nothing of any model, never changes, and may be shared between answers and threads.

    Attributes:
        grammar: what it comes to, as ``llguidance`` reads it.
        with_thinking: whether it is for the thoughts too, where the prompt has opened them; others
            are for what comes after.
        patterns: of schemas: where each is, and the grammar of what it matches by itself.
        dense: where the answer is JSON, the grammar of the same without white space, by which it is
            foreseen; else empty.
    """

    grammar: str
    with_thinking: bool = False
    patterns: tuple[tuple[str, str], ...] = ()
    dense: str = ""

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
        _Simplifier(parsed).visit(parsed)
        matcher = import_llguidance().LLMatcher

        def grammar(schema: Any, options: dict[str, str | bool | None] = options) -> str:
            return str(matcher.grammar_from_json_schema(json.dumps(schema), overrides=options))

        def failure(schema: Any) -> str:
            return _failure(grammar(schema))

        try:
            if why := failure(parsed):
                path, why = _find_fault(parsed, why, failure)
                raise _refused(name + path, why)
            return cls(
                grammar(parsed),
                patterns=tuple(
                    (name + path, grammar({"type": "string", "pattern": pattern}))
                    for path, pattern in _patterns(parsed)
                ),
                dense=grammar(parsed, _DENSE_OPTIONS),
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


# --- JSON schemas as clients write them: to what `llguidance` reads, and where a fault lies -----

#: Formats that `llguidance` knows. The specification lets all others mean nothing.
_FORMATS = frozenset("date date-time duration email hostname ipv4 ipv6 time uri uuid".split())
#: Dialects that it knows, by the names that the specification gives them.
_DIALECT = re.compile(
    r"http://json-schema\.org/draft-0[3467]/schema#?"
    r"|https://json-schema\.org/draft/20(19-09|20-12)/schema#?"
)
#: Characters of a URI (RFC 3986).
_URI = re.compile(r"[\w.~:/?#\[\]@!$&'()*+,;=%-]*", re.ASCII)
#: Keywords that restrict, and those by which schemas are found.
_KEYWORDS = frozenset(
    "$anchor $defs $dynamicAnchor $dynamicRef $id $recursiveAnchor $recursiveRef $ref $schema "
    "additionalItems additionalProperties allOf anyOf const contains definitions dependencies "
    "dependentRequired dependentSchemas else enum exclusiveMaximum exclusiveMinimum format id if "
    "items maxContains maxItems maxLength maxProperties maximum minContains minItems minLength "
    "minProperties minimum multipleOf not oneOf pattern patternProperties prefixItems properties "
    "propertyNames required then type unevaluatedItems unevaluatedProperties uniqueItems".split()
)
#: Objects that OpenAPI's dialect has besides.
_OPENAPI = {"discriminator", "example", "externalDocs", "xml"}
#: Keywords with a schema for each of some names.
_NAMED = {"$defs", "definitions", "dependentSchemas", "patternProperties", "properties"}
#: Keywords with instances, not schemas.
_DATA = {"const", "enum", "default", "examples"}
#: Steps to schemas that others refer to.
_SHARED = (".$defs", ".definitions")
#: Keywords with schemas that hold of the same instance.
_APPLIED = {"allOf", "anyOf", "oneOf", "$ref", "if", "dependentSchemas", "not"}
#: Keywords that say which properties there may be besides ``properties``.
_MORE = {
    "additionalProperties", "maxProperties", "minProperties", "patternProperties",
    "propertyNames", "unevaluatedProperties",
}  # fmt: skip
_COUNTS = {"maxItems", "maxLength", "maxProperties", "minItems", "minLength", "minProperties"}
#: `llguidance` has bounds of numbers as 64-bit integers; this is the largest double among these.
_LARGEST = 2**63 - 1024
_UNMET = "Unsatisfiable schema"
#: Pairs of schemas that are compared for one schema, and seconds in which a fault is searched.
_MAX_PAIRS, _SEARCH_S = 10_000, 1.0


class _Simplifier:
    """Writes a schema, in place, as `llguidance` can read it; no answer becomes right by that.

    What restricts nothing goes: keywords and formats that are not known, ``"uniqueItems": false``,
    the ``propertyNames`` of Zod's records. Alternatives of ``oneOf`` that exclude each other are
    ``anyOf``: `llguidance` would not look behind their ``$ref``. Objects have no properties but
    those that are named, unless the schema says what more there may be, or combines schemas: a
    model without an idea of when to end would make up one after another.
    """

    def __init__(self, root: Any) -> None:
        self._root = root
        self._pairs = 0  # compared so far
        self._combines = _combines(root)

    def visit(self, schema: Any) -> None:
        if not isinstance(schema, dict):
            return
        named, required = _properties(schema), _strings(schema.get("required"))
        if named and not (self._combines or _MORE & schema.keys()) and named.keys() >= {*required}:
            schema["additionalProperties"] = False
        discriminator = schema.get("discriminator")
        for key in [key for key, value in schema.items() if _restricts_nothing(key, value, schema)]:
            del schema[key]
        for key, value in schema.items():
            if key in _COUNTS and isinstance(value, float) and value.is_integer():
                schema[key] = int(value)
            elif isinstance(value, int | float) and not isinstance(value, bool):
                if key in ("minimum", "exclusiveMinimum"):
                    schema[key] = max(value, -_LARGEST)
                elif key in ("maximum", "exclusiveMaximum"):
                    schema[key] = min(value, _LARGEST)
        options = schema.get("oneOf")
        if isinstance(options, list) and "anyOf" not in schema:
            self._require_tag(discriminator, options)
            if all(self._apart(one, other) for one, other in combinations(options, 2)):
                # In its place, since the order of keywords is that of properties.
                items = [("anyOf" if k == "oneOf" else k, v) for k, v in schema.items()]
                schema.clear()
                schema.update(items)
        for _, part in _parts(schema):
            self.visit(part)

    def _require_tag(self, discriminator: Any, options: list[Any]) -> None:
        """Make the property required by which OpenAPI's ``discriminator`` chooses, where it is.

        Pydantic leaves out of ``required`` what has a default, and needs it all the same.
        """
        tag = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
        for option in map(self._target, options):
            if isinstance(tag, str) and tag in _properties(option):
                required = option.setdefault("required", [])
                if isinstance(required, list) and tag not in required:
                    required.append(tag)

    def _target(self, schema: Any) -> Any:
        """Return what a ``$ref`` within the document leads to, or the schema if it is none."""
        for _ in range(8):
            ref = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(ref, str) or not ref.startswith("#"):
                break
            schema = self._root
            for name in filter(None, ref[1:].split("/")):
                name = name.replace("~1", "/").replace("~0", "~")
                schema = schema.get(name) if isinstance(schema, dict) else None
        return schema

    def _apart(self, one: Any, other: Any, levels: int = 3) -> bool:
        """Return whether it is certain that nothing meets both of two schemas.

        Properties of properties are looked at as well, but not all the way down.
        """
        self._pairs += 1
        one, other = self._target(one), self._target(other)
        if not (isinstance(one, dict) and isinstance(other, dict)) or self._pairs > _MAX_PAIRS:
            return False
        for of in (_values, _types):
            first, second = of(one), of(other)
            if first and second and first.isdisjoint(second):
                return True
        if not levels or not _types(one) == _types(other) == {"object"}:
            return False
        mine, its = _properties(one), _properties(other)
        required = {*_strings(one.get("required")), *_strings(other.get("required"))}
        common = sorted(required & mine.keys() & its.keys())
        return any(self._apart(mine[name], its[name], levels - 1) for name in common)


def _find_fault(schema: Any, why: str, failure: Callable[[Any], str]) -> tuple[str, str]:
    """Return where a schema cannot be compiled, such as ``.properties.x.pattern``, and why.

    ``failure`` returns what is wrong with a schema, and has returned ``why`` of this one.
    """
    end = time.monotonic() + _SEARCH_S
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    path, found = "", True
    while found:
        found = False
        # Definitions first, which are to be blamed, and not what refers to them.
        for step, part in sorted(_parts(schema), key=lambda part: not part[0].startswith(_SHARED)):
            if time.monotonic() > end:
                return path, why
            fault = failure(shared | part) if isinstance(part, dict) else ""
            # Of what cannot be met, each level says another thing.
            if fault and (fault == why or fault.split(":")[0] == why.split(":")[0] == _UNMET):
                path, schema, why, found = path + step, part, fault, True
                break
    for key in sorted(schema, key=lambda key: key == "type"):  # without it, all is possible
        rest = {name: value for name, value in schema.items() if name != key}
        if time.monotonic() < end and failure(shared | rest) != why:
            return f"{path}.{key}", why
    return path, why


def _patterns(schema: Any) -> Iterator[tuple[str, str]]:
    """Yield the regular expressions that strings in a schema must match, with their places."""
    if isinstance(schema, dict) and isinstance(pattern := schema.get("pattern"), str):
        yield ".pattern", pattern
    for step, part in _parts(schema):
        for path, pattern in _patterns(part):
            yield step + path, pattern


def _parts(schema: Any) -> Iterator[tuple[str, Any]]:
    """Yield the schemas that a schema has, each with the step that leads there."""
    for key, value in schema.items() if isinstance(schema, dict) else ():
        if key in _DATA:
            continue
        if key in _NAMED and isinstance(value, dict):
            yield from ((f".{key}.{name}", part) for name, part in value.items())
        elif isinstance(value, dict):
            yield f".{key}", value
        elif isinstance(value, list):
            yield from ((f".{key}[{number}]", part) for number, part in enumerate(value))


def _restricts_nothing(key: str, value: Any, schema: dict[str, Any]) -> bool:
    # With any other keyword beside it, a `$ref` that comes back to itself is refused. What is not
    # known may also hold schemas that others refer to.
    if key not in _KEYWORDS:
        holder = isinstance(value, dict | list) and key not in _OPENAPI
        return not holder or key.startswith("x-")
    if key == "format":
        return isinstance(value, str) and value not in _FORMATS
    if key == "$schema":
        return isinstance(value, str) and not _DIALECT.fullmatch(value)
    if key == "$id":
        return isinstance(value, str) and not _URI.fullmatch(value)
    if key in ("uniqueItems", "not", "$recursiveAnchor"):
        return value is False
    if key == "propertyNames":
        return value in (True, {}, {"type": "string"})
    if key in ("unevaluatedItems", "unevaluatedProperties"):
        return value in (True, {})
    if key in ("dependencies", "dependentRequired", "dependentSchemas"):
        return value == {}
    if key in ("contains", "minContains", "maxContains"):
        any_number = schema.get("minContains") == 0 and "maxContains" not in schema
        return any_number or "contains" not in schema
    if key == "if":
        return not {"then", "else"} & schema.keys()
    return key in ("then", "else") and "if" not in schema


def _combines(schema: Any) -> bool:
    """Return whether there are objects, somewhere, of which several schemas hold at once."""
    if isinstance(schema, dict):
        applied = _APPLIED & schema.keys()
        every = schema.get("allOf")
        if len(applied) > 1 or (applied and (_MORE | {"properties", "required"}) & schema.keys()):
            return True
        if isinstance(every, list) and len(every) > 1:
            return True
    return any(_combines(part) for _, part in _parts(schema))


def _types(schema: dict[str, Any]) -> set[str]:
    """Return the types that a schema says it allows."""
    types = schema.get("type")
    names = _strings([types] if isinstance(types, str) else types)
    return {"number" if name == "integer" else name for name in names}


def _values(schema: dict[str, Any]) -> set[str]:
    """Return all values that a schema allows, as JSON, where it lists them and they are simple."""
    values = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(values, list) and all(isinstance(value, str | bool | int) for value in values):
        return set(map(json.dumps, values))
    return set()


def _properties(schema: Any) -> dict[str, Any]:
    properties = schema.get("properties") if isinstance(schema, dict) else None
    return properties if isinstance(properties, dict) else {}


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []
