"""Bodies of requests, as Pydantic checks them and the OpenAPI document describes them.

Clients of other servers send fields that mean nothing here. They are kept, and `IgnoredFields`
names them. Fields that would make another answer of it and cannot be had are `NotOffered`: they may
only have the value that changes nothing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)
from pydantic_core import PydanticCustomError

from edgevl.options import MAX_BIASES, OPTIONS, Option
from edgevl.preprocess.video import MAX_DIFFERENCE, MAX_SAMPLED
from edgevl.serve.errors import NOT_OFFERED, ApiError

logger = logging.getLogger("edgevl.serve")

#: Answers to one request, at most.
MAX_ANSWERS = 16
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 128
#: Fields of one object, known or not, far above those that there are.
MAX_FIELDS = 64
#: Token ids in one prompt, far above any context.
MAX_PROMPT_IDS = 2**20

#: What names the fields of a request that were ignored.
IGNORED_HEADER = "x-edgevl-ignored"
#: Most characters of that header, and of one name in it; most names that the log ever has.
_MAX_HEADER, _MAX_NAME, _MAX_LOGGED = 1024, 128, 1024
#: Fields of OpenAI's API that change no answer here: ``--strict`` ignores them as well.
HARMLESS = frozenset(
    "annotations include_obfuscation metadata name prompt_cache_key safety_identifier service_tier "
    "store user".split()
)


def _whole(value: Any) -> Any:
    """Take 64.0 for 64: JSON has one kind of number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _only(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """Take no other value than those of the type."""
    try:
        return validate(value)
    except ValidationError:
        raise PydanticCustomError(NOT_OFFERED, "is not supported here: leave it out") from None


ShortText = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=512)]
Whole = Annotated[int, BeforeValidator(_whole, json_schema_input_type=int)]
#: -1 is no limit, as in llama.cpp.
TokenLimit = Annotated[
    Annotated[int, Field(ge=1, le=2**31)] | None,
    BeforeValidator(
        lambda value: 2**31 if value == -1 else _whole(value),
        json_schema_input_type=Annotated[int, Field(ge=-1, le=2**31)] | None,
    ),
]
Stop: TypeAlias = Annotated[str, Field(max_length=512)] | list[StopText] | None
NotOffered = WrapValidator(_only)
Nothing = Annotated[Annotated[list[Any], Field(max_length=0)] | None, NotOffered]


class Strict(BaseModel):
    """An object of a request: values are of their types, and fields that are not known are kept."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    # Pydantic collects all errors, which may take a hundred times the memory of the request. So
    # fields are counted before they are looked at, and long lists end at their first error.
    @model_validator(mode="before")
    @classmethod
    def _check_count(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise PydanticCustomError("too_many_fields", f"it has more than {MAX_FIELDS} fields")
        return value


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None


#: Options of the sampler by their names in requests: those that mean the same everywhere.
_SAMPLER = {
    name: option
    for option in OPTIONS.values()
    for name in (option.name, *option.aliases)
    if name not in ("max_tokens", "seed", "stop")
}


def _sampler_field(option: Option) -> tuple[Any, Any]:
    """Return type and default of a field for an option of the sampler."""
    number: Any = Whole if option.kind == "integer" else float
    value: Any = Annotated[number, Field(ge=option.low, le=option.high)]
    if option.kind == "biases":
        value = Annotated[dict[str, value], Field(max_length=MAX_BIASES, fail_fast=True)]
    help_text = option.help
    if option.from_checkpoint:
        help_text += f" Default: generation_config.json's, else {option.default:g}."
    return value | None, Field(None, description=help_text)


if TYPE_CHECKING:
    SamplerFields = Strict
else:
    SamplerFields = create_model(
        "SamplerFields",
        __base__=Strict,
        **{name: _sampler_field(option) for name, option in _SAMPLER.items()},
    )


class Sampling(SamplerFields):
    """What both kinds of completion take."""

    model: ShortText
    seed: Whole | None = Field(None, description="Counts up where `n` is more than 1.")
    stop: Annotated[
        StopText | Annotated[list[StopText], Field(max_length=16)] | None,
        BeforeValidator(lambda value: value or None, json_schema_input_type=Stop),
    ] = None
    n: Annotated[Whole, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    guided_json: Nothing = None
    guided_regex: Nothing = None
    guided_choice: Nothing = None
    guided_grammar: Nothing = None
    structured_outputs: Nothing = None
    grammar: Nothing = None

    def options(self) -> dict[str, Any]:
        """Return the options of the sampler, but for seed and length; None if not given."""
        given: dict[str, Any] = {"stop": self.stop}
        for name, option in _SAMPLER.items():
            if given.get(option.name) is None:  # its aliases come after its own name
                given[option.name] = getattr(self, name)
        return given

    def check(self) -> None:
        """Check what fields say together.

        Raises:
            ApiError: they exclude one another.
        """


class TextPart(Strict):
    """Text, taken literally."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where a picture is."""

    url: str = Field(description="`data:`, or `http(s):` of a host that the operator allows.")
    detail: Literal["auto", "low", "high", "original"] | None = Field(
        None, description="`low` is one tile."
    )


def _as_url(value: Any) -> Any:
    """Take a string for an object with that URL."""
    return {"url": value} if isinstance(value, str) else value


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: Annotated[
        ImageUrl, BeforeValidator(_as_url, json_schema_input_type=ImageUrl | str)
    ] = Field(description="Its URL may also stand here by itself.")


class VideoUrl(Strict):
    """Where a video is."""

    url: str = Field(description="`data:`, or `http(s):` of a host that the operator allows.")


class VideoPart(Strict):
    """A video, shown as `frames` pictures."""

    type: Literal["video_url"]
    video_url: Annotated[
        VideoUrl, BeforeValidator(_as_url, json_schema_input_type=VideoUrl | str)
    ] = Field(description="Its URL may also stand here by itself.")


class RefusalPart(Strict):
    """What a model said that refused to answer; it is text."""

    type: Literal["refusal"]
    refusal: str


def _as_part(value: Any) -> Any:
    """Take a string, or what was said in refusal, for a part with that text."""
    if isinstance(value, str):
        return {"type": "text", "text": value}
    if isinstance(value, dict) and value.get("type") == "refusal" and "refusal" in value:
        return {"type": "text", "text": value["refusal"]}
    return value


UserPart: TypeAlias = TextPart | ImagePart | VideoPart
AnyText = Annotated[
    TextPart, BeforeValidator(_as_part, json_schema_input_type=TextPart | RefusalPart | str)
]
AnyPart = Annotated[
    Annotated[UserPart, Field(discriminator="type")],
    BeforeValidator(_as_part, json_schema_input_type=UserPart | str),
]
Texts: TypeAlias = str | Annotated[list[AnyText], Field(max_length=MAX_PARTS, fail_fast=True)]
Parts: TypeAlias = str | Annotated[list[AnyPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class SystemMessage(Strict):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: Texts


class UserMessage(Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: Parts


class FunctionCall(Strict):
    """What was called, with what."""

    name: ShortText
    arguments: str | dict[str, Any] | None = Field(
        None, description="A JSON object, as text or as it is; empty is `{}`."
    )


class CallBody(Strict):
    """A call of a tool."""

    id: ShortText
    type: Literal["function"] | None = None
    function: FunctionCall


class AssistantMessage(Strict):
    """An earlier answer; fields that answers have besides their text may come along."""

    role: Literal["assistant"]
    content: Texts | None = None
    reasoning_content: str | None = Field(
        None, description="Kept or dropped as the model's chat template has it."
    )
    refusal: str | None = Field(None, description="The text, where there is no `content`.")
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class ToolMessage(Strict):
    """The result of a tool call; pictures may be among it."""

    role: Literal["tool"]
    content: Annotated[
        Parts,
        BeforeValidator(
            lambda value: "" if value is None else value, json_schema_input_type=Parts | None
        ),
    ]
    tool_call_id: ShortText


AnyMessage: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage
ChatMessage = Annotated[AnyMessage, Field(discriminator="role")]


class PlainFormat(Strict):
    """Text, or a JSON object: any, or of a schema."""

    type: Literal["text", "json_object"]
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")


class JsonSchema(Strict):
    """A JSON schema and its name, which is not needed."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool | None = Field(None, alias="schema")
    strict: bool | None = Field(None, description="Ignored: answers are always of the schema.")


class SchemaFormat(Strict):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class FunctionDefinition(Strict):
    """A function that the model may ask for."""

    name: ShortText
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool | None = Field(
        None, description="Ignored: calls that are forced are always of the schema."
    )


class ToolDefinition(Strict):
    """A tool: a function."""

    type: Literal["function"] | None = None
    function: FunctionDefinition


class FunctionName(Strict):
    """One of the functions."""

    name: ShortText


class NamedTool(Strict):
    """One of the tools."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Strict):
    """Those of the tools that may be called."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(max_length=MAX_TOOLS, fail_fast=True)]


class AllowedChoice(Strict):
    """A choice among some of the tools."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice: TypeAlias = (
    Literal["none", "auto", "required"]
    | Annotated[NamedTool | AllowedChoice, Field(discriminator="type")]
    | None
)


class TemplateArguments(Strict):
    """The variables of the chat template that may be set."""

    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    """A conversation to go on with."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: TokenLimit = Field(
        None, description="Default, as -1: all that the context holds."
    )
    max_tokens: TokenLimit = Field(None, description="The older name of it.")
    logprobs: bool | None = None
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    enable_thinking: bool | None = Field(
        None, description="Think before answering, or not; default: as the chat template has it."
    )
    chat_template_kwargs: TemplateArguments | None = None
    frames: Annotated[Whole, Field(ge=1, le=MAX_SAMPLED)] | None = Field(
        None, description="Frames shown of each video."
    )
    frame_threshold: Annotated[float, Field(ge=0, le=MAX_DIFFERENCE)] | None = Field(
        None,
        description="A frame that differs by less from the last one shown, in any patch on average "
        "and of 255, is that one again; default: 0, all are shown as they are.",
    )
    max_tiles: Annotated[Whole, Field(ge=1, le=40)] | None = Field(
        None, description="Most tiles of a picture."
    )
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoice = Field(
        None, description="`required` and a named one are valid calls by construction."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether an answer may be several calls; default: true."
    )
    functions: Nothing = None
    modalities: list[Annotated[Literal["text"], NotOffered]] | None = None

    @property
    def thinking(self) -> bool | None:
        """Whether to think before answering; None is as the chat template has it."""
        if self.enable_thinking is not None or self.chat_template_kwargs is None:
            return self.enable_thinking
        return self.chat_template_kwargs.enable_thinking

    @property
    def formatted(self) -> bool:
        """Whether an answer that is text must be of a form."""
        return self.response_format is not None and self.response_format.type != "text"

    @property
    def must_call(self) -> bool:
        """Whether the answer must be calls of tools."""
        if isinstance(self.tool_choice, AllowedChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return isinstance(self.tool_choice, NamedTool) or self.tool_choice == "required"

    def check(self) -> None:
        """As in `Sampling`."""
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs: true", "top_logprobs")
        if self.thinking and (self.formatted or self.must_call):
            param = "response_format" if self.formatted else "tool_choice"
            raise ApiError(400, f"{param} cannot be kept while thinking: leave one out", param)


PromptText = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds: TypeAlias = Annotated[
    list[TokenId], Field(min_length=1, max_length=MAX_PROMPT_IDS, fail_fast=True)
]


class CompletionRequest(Sampling):
    """Text to go on with, without a chat template: special tokens in it are special tokens."""

    prompt: (
        PromptText
        | TokenIds
        | Annotated[list[PromptText], Field(min_length=1, max_length=MAX_ANSWERS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_ANSWERS)]
    )
    max_tokens: TokenLimit = Field(None, description="Default: 16.")
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    echo: Annotated[Literal[False] | None, NotOffered] = None
    best_of: Annotated[Literal[1] | None, NotOffered] = None
    suffix: Annotated[Literal[""] | None, NotOffered] = None


class IgnoredFields:
    """Names ignored fields in a header, and in the log each once; or, ``strict``, refuses them."""

    def __init__(self, strict: bool) -> None:
        self._strict = strict
        self._logged: set[str] = set()

    def headers(self, body: BaseModel) -> dict[str, str]:
        """Return the header that names the fields of a request that are ignored, if there are any.

        Raises:
            ApiError: there are, and they are not to be.
        """
        names: dict[str, None] = {}  # a set in order
        for path in _ignored(body):
            # In characters that any header may have, and not too many of them.
            shown = re.sub(r"[^\w.\[\]-]", "?", path, flags=re.ASCII)[:_MAX_NAME] or "?"
            if self._strict and path.rpartition(".")[2] not in HARMLESS:
                message = f"Unrecognized request argument supplied: {shown}"
                raise ApiError(400, message, shown, "unknown_parameter")
            names[re.sub(r"\[\d+\]", "[]", shown)] = None
        new = [name for name in names if name not in self._logged]
        if new and len(self._logged) < _MAX_LOGGED:
            self._logged.update(new)
            logger.info(f"ignored fields of requests: {_line(new)}")
        return {IGNORED_HEADER: _line(names)} if names else {}


def _line(names: Iterable[str]) -> str:
    line = ", ".join(names)
    return line if len(line) <= _MAX_HEADER else f"{line[: _MAX_HEADER - 3]}..."


def _ignored(value: Any, where: str = "") -> Iterator[str]:
    """Yield where a request has fields that are not known, such as ``messages[0].cache_control``.

    Null is as good as absent.
    """
    if isinstance(value, Strict):
        before = f"{where}." if where else ""
        for name, field in type(value).model_fields.items():
            yield from _ignored(getattr(value, name), before + (field.alias or name))
        for name, given in (value.model_extra or {}).items():
            if given is not None:
                yield before + name
    elif isinstance(value, list):
        for number, item in enumerate(value):
            if isinstance(item, Strict):
                yield from _ignored(item, f"{where}[{number}]")
