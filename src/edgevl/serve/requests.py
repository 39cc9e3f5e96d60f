"""Bodies of requests, as Pydantic checks them and the OpenAPI document describes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator
from pydantic_core import PydanticCustomError

from edgevl.options import MAX_BIASES, OPTIONS, Option

#: Answers to one request, at most.
MAX_ANSWERS = 16
MAX_MESSAGES = 4096
MAX_PARTS = 1024
MAX_TOOLS = 128
#: Fields of one object, known or not, far above those that there are.
MAX_FIELDS = 64
#: Pairs in ``metadata``, as in OpenAI's API.
MAX_PAIRS = 16
#: Token ids in one prompt, far above any context.
MAX_PROMPT_IDS = 2**20

ShortText = Annotated[str, Field(max_length=512)]
StopText = Annotated[str, Field(min_length=1, max_length=512)]


class Strict(BaseModel):
    """An object of a request: no field but its own, no value of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

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
    include_obfuscation: bool | None = Field(None, description="Ignored: nothing is padded.")


#: Options of the sampler by their names in requests: those that mean the same everywhere.
_SAMPLER = {
    name: option
    for option in OPTIONS.values()
    for name in (option.name, *option.aliases)
    if name not in ("max_tokens", "seed", "stop")
}


def _sampler_field(option: Option) -> tuple[Any, Any]:
    """Return type and default of a field for an option of the sampler."""
    number: Any = int if option.kind == "integer" else float
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
    seed: int | None = Field(None, description="Counts up where `n` is more than 1.")
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: ShortText | None = Field(None, description="Ignored.")

    def options(self) -> dict[str, Any]:
        """Return the options of the sampler, but for seed and length; None if not given."""
        given: dict[str, Any] = {"stop": self.stop}
        for name, option in _SAMPLER.items():
            if given.get(option.name) is None:  # its aliases come after its own name
                given[option.name] = getattr(self, name)
        return given


class TextPart(Strict):
    """Text, taken literally."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """Where a picture is."""

    url: str = Field(description="`data:`, or `http(s):` of a host that the operator allows.")
    detail: Literal["auto", "low", "high"] | None = Field(None, description="`low` is one tile.")


class ImagePart(Strict):
    """A picture."""

    type: Literal["image_url"]
    image_url: ImageUrl


class VideoUrl(Strict):
    """Where a video is."""

    url: str = Field(description="`data:`, or `http(s):` of a host that the operator allows.")


class VideoPart(Strict):
    """A video, shown as `frames` pictures."""

    type: Literal["video_url"]
    video_url: VideoUrl


Texts: TypeAlias = str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
UserPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class SystemMessage(Strict):
    """What the model is told before the conversation."""

    role: Literal["system", "developer"]
    content: Texts
    name: ShortText | None = Field(None, description="Ignored.")


class UserMessage(Strict):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    name: ShortText | None = Field(None, description="Ignored.")


class FunctionCall(Strict):
    """What was called, with what."""

    name: ShortText
    arguments: str | dict[str, Any] | None = Field(
        None, description="A JSON object, as text or as it is; empty is `{}`."
    )


class CallBody(Strict):
    """A call of a tool."""

    id: ShortText
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Strict):
    """An earlier answer; fields that answers have besides their text may come along."""

    role: Literal["assistant"]
    content: Texts | None = None
    reasoning_content: str | None = Field(
        None, description="Kept or dropped as the model's chat template has it."
    )
    name: ShortText | None = Field(None, description="Ignored.")
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    tool_calls: Annotated[list[CallBody], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None


class ToolMessage(Strict):
    """The result of a tool call; pictures may be among it."""

    role: Literal["tool"]
    content: str | Annotated[list[UserPart], Field(max_length=MAX_PARTS, fail_fast=True)]
    tool_call_id: ShortText
    name: ShortText | None = Field(None, description="Ignored.")


AnyMessage: TypeAlias = SystemMessage | UserMessage | AssistantMessage | ToolMessage
ChatMessage = Annotated[AnyMessage, Field(discriminator="role")]


class PlainFormat(Strict):
    """Text, or any JSON object."""

    type: Literal["text", "json_object"]


class JsonSchema(Strict):
    """A JSON schema and its name."""

    name: ShortText
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

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Strict):
    """One of the functions."""

    name: ShortText


class NamedTool(Strict):
    """One of the tools."""

    type: Literal["function"]
    function: FunctionName


class TemplateArguments(Strict):
    """The variables of the chat template that may be set."""

    enable_thinking: bool | None = None


class ChatRequest(Sampling):
    """A conversation to go on with."""

    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    max_completion_tokens: int | None = Field(
        None, ge=1, le=2**31, description="Default: all that the context holds."
    )
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="The older name of it.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: Annotated[PlainFormat | SchemaFormat, Field(discriminator="type")] | None = (
        None
    )
    enable_thinking: bool | None = Field(
        None, description="Think before answering, or not; default: as the chat template has it."
    )
    chat_template_kwargs: TemplateArguments | None = None
    frames: int | None = Field(None, ge=1, le=256, description="Frames shown of each video.")
    max_tiles: int | None = Field(None, ge=1, le=40, description="Most tiles of a picture.")
    tools: Annotated[list[ToolDefinition], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = Field(
        None, description="`required` and a named one are valid calls by construction."
    )
    parallel_tool_calls: bool | None = Field(
        None, description="Whether `required` may be several calls; default: true."
    )
    metadata: Annotated[dict[str, str], Field(max_length=MAX_PAIRS, fail_fast=True)] | None = Field(
        None, description="Ignored."
    )
    store: bool | None = Field(None, description="Ignored: nothing is stored.")
    service_tier: ShortText | None = Field(None, description="Ignored.")
    safety_identifier: ShortText | None = Field(None, description="Ignored.")
    prompt_cache_key: ShortText | None = Field(None, description="Ignored: all share the cache.")


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
    max_tokens: int | None = Field(None, ge=1, le=2**31, description="Default: 16.")
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None
