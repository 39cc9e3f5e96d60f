"""Functions that a model may ask for, and its calls of them."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from edgevl.errors import PromptError
from edgevl.json_input import bounded_json, check_size

#: Most tools of a request, as in OpenAI's API.
MAX_TOOLS = 128
#: Most bytes of the tools of a request, and of the arguments of a call; levels they may be nested.
MAX_TOOL_BYTES = 128 * 1024
MAX_TOOL_LEVELS = 64

#: Around a call in what the model says. Tokens of their own in the tokenizers of Qwen2.5 and Qwen3.
CALL_START, CALL_END = "<tool_call>", "</tool_call>"

_NAME = re.compile("[A-Za-z0-9_-]{1,64}")

#: With one of these, a schema itself says which other arguments there may be.
_OPENING = {"additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref"}


@dataclass(frozen=True)
class Tool:
    """A function that the model may ask for.

    Attributes:
        name: 1 to 64 of the characters ``A-Z a-z 0-9 _ -``.
        description: what it does and when to use it, for the model; may be empty.
        parameters: JSON schema of its arguments, which are an object; None if it takes none.

    Raises:
        PromptError: the name is of another form, the schema is no JSON object or describes none, or
            the tool exceeds ``MAX_TOOL_BYTES`` or ``MAX_TOOL_LEVELS``.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_name("the name of a tool", self.name)
        if not isinstance(self.description, str):
            raise PromptError(
                f"tool {self.name}: description is a {type(self.description).__name__}: it must be "
                "a string"
            )
        if self.parameters is not None:
            where = f"tool {self.name}: parameters"
            if not isinstance(self.parameters, dict):
                raise PromptError(f"{where} must be a JSON schema, {{…}}")
            if self.parameters.get("type", "object") != "object":
                raise PromptError(f'{where}: type must be "object": give each argument a name')
            bounded_json(where, self.parameters, MAX_TOOL_BYTES, MAX_TOOL_LEVELS)
        check_size(f"tool {self.name}", self.to_json(), MAX_TOOL_BYTES)

    def arguments_schema(self) -> dict[str, Any]:
        """Return the schema of its arguments; what it does not name is left out.

        Unless it says itself what more there may be.
        """
        schema = {"type": "object"} | (self.parameters or {})
        if not _OPENING & schema.keys():
            schema["additionalProperties"] = False
        return schema

    def takes(self, arguments: Collection[str]) -> bool:
        """Whether these are names of its arguments, and all that it needs are among them."""
        schema = self.arguments_schema()
        required, known = schema.get("required"), schema.get("properties")
        needed = required if isinstance(required, list) else []
        if any(isinstance(name, str) and name not in arguments for name in needed):
            return False
        named = known if isinstance(known, dict) else {}
        return schema.get("additionalProperties") is not False or named.keys() >= set(arguments)

    def to_json(self) -> str:
        """Return the tool as models are shown it: one line of JSON in OpenAI's form."""
        function: dict[str, Any] = {"name": self.name}
        if self.description:
            function["description"] = self.description
        if self.parameters is not None:
            function["parameters"] = self.parameters
        return json.dumps({"type": "function", "function": function}, ensure_ascii=False)


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for.

    Attributes:
        name: of the function.
        arguments: a JSON object as text, to the character as the model wrote it.
        id: tells apart calls of one conversation; models do not see it. Equality disregards it.

    Raises:
        PromptError: the name is none that a tool can have, or the arguments are no JSON object, or
            exceed ``MAX_TOOL_BYTES`` or ``MAX_TOOL_LEVELS``.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}", compare=False)

    def __post_init__(self) -> None:
        _check_name("the name of a tool call", self.name)
        where = f"arguments of the call of {self.name}"
        if not isinstance(self.arguments, str):
            raise PromptError(
                f"{where}: a {type(self.arguments).__name__} was given: give JSON text"
            )
        _, parsed = bounded_json(where, self.arguments, MAX_TOOL_BYTES, MAX_TOOL_LEVELS)
        if not isinstance(parsed, dict):
            raise PromptError(f"{where}: they must be a JSON object, {{…}}")


def check_tools(tools: Sequence[Tool]) -> None:
    """Check the tools of a request.

    Raises:
        PromptError: there are more than ``MAX_TOOLS``, one is no `Tool`, two have one name, or
            together they exceed ``MAX_TOOL_BYTES``.
    """
    if len(tools) > MAX_TOOLS:
        raise PromptError(f"{len(tools)} tools were given: the limit is {MAX_TOOLS}")
    names = set()
    for tool in tools:
        if not isinstance(tool, Tool):
            raise PromptError(f"tools: a {type(tool).__name__} was given: it must be a Tool")
        if tool.name in names:
            raise PromptError(f"tools: two are named {tool.name}: rename one")
        names.add(tool.name)
    check_size("tools: together, the JSON", "\n".join(t.to_json() for t in tools), MAX_TOOL_BYTES)


def _check_name(what: str, name: str) -> None:
    if not (isinstance(name, str) and _NAME.fullmatch(name)):
        raise PromptError(
            f"{what} is {str(name)[:80]!r}: use 1 to 64 letters, digits, underscores and hyphens"
        )
