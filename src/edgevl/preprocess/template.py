"""Chat templates: messages, and tools as a part of them, to one string."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edgevl.checkpoint.config import SYSTEM_MESSAGE
from edgevl.errors import CheckpointError
from edgevl.files import first_line
from edgevl.preprocess.messages import Markup, Message, Part
from edgevl.preprocess.tools import CALL_END, CALL_START, Tool, ToolCall

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

#: Largest template, in characters; those of large models with tools have some thousands.
MAX_TEMPLATE_CHARS = 2**18
#: Characters that a template may add to the messages.
MAX_ADDED_CHARS = 2**18

#: Largest product in a template, and longest text or list that is a multiple of another.
MAX_PRODUCT = 2**24

#: What switches thinking on (``R1_SYSTEM_PROMPT`` of the InternVL3.5 model card).
THINKING_SYSTEM_MESSAGE = (
    "You are an AI assistant that rigorously follows this response protocol:\n\n"
    "1. First, conduct a detailed analysis of the question. Consider different angles, potential "
    "solutions, and reason through the problem step-by-step. Enclose this entire thinking process "
    "within <think> and </think> tags.\n\n"
    "2. After the thinking section, provide a clear, concise, and direct answer to the user's "
    "question. Separate the answer from the think section with a newline.\n\n"
    "Ensure that the thinking process is thorough but remains focused on the query. The final "
    "answer should be standalone and not reference the thinking section."
)

# conversation.py of InternVL: templates of one shape, that differ in what ends a turn and in the
# default system message.
_CHATML = (
    "{% if messages[0].role != 'system' %}"
    "{{ '<|im_start|>system\n' + system_message + turn_end }}{% endif %}"
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + turn_end }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}"
)
_INTERNVL2_SYSTEM = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, "
    "是一个有用无害的人工智能助手。"
)
_BUILT_IN = {
    "internvl2_5": ("<|im_end|>\n", SYSTEM_MESSAGE),
    "Hermes-2": ("<|im_end|>", _INTERNVL2_SYSTEM),
    "internlm2-chat": ("<|im_end|>", _INTERNVL2_SYSTEM),
}

# Variables that transformers gives to templates from tokenizer_config.json.
_TOKEN_VARIABLES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip

#: A message for a template: ``role`` and ``content``; ``reasoning_content`` where there is some.
PlainMessage = Mapping[str, str]

# What stands for texts when a template is tried: no character, and not white space.
_PROBE, _OTHER_PROBE = "\ufdd0", "\ufdd1"


class _BoundedSandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with operators that could make much of little held to a bound.

    That bounds what a template holds in memory by plain means, not its time: a template written to
    do harm can still loop for long.
    """

    # Intercepted operators are not computed in advance either, when a template is compiled.
    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute ``left operator right`` unless its result could be larger than is sensible."""
        sizes = [len(v) if isinstance(v, str | list | tuple) else v for v in (left, right)]
        if operator == "*":
            excessive = all(isinstance(size, int) for size in sizes) and (
                abs(sizes[0] * sizes[1]) > MAX_PRODUCT
            )
        else:  # a format with a width, or a number with as many digits as the exponent says
            excessive = operator == "**" or isinstance(left, str)
        if excessive:
            raise SecurityError(f"{operator!r} of operands that large, or of that kind")
        return super().call_binop(context, operator, left, right)


class _GenerationBlock(Extension):
    """``{% generation %}`` marks replies for training; here it is what it contains."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """A chat template, rendered in Jinja's sandbox as transformers does.

    The messages it renders end where the assistant's reply begins.

    Args:
        source: The template.
        origin: The file it is from, for errors.
        variables: What it may refer to beside the messages, such as ``eos_token``.

    Attributes:
        texts: What it may write itself.

    Raises:
        CheckpointError: The template is too large, malformed, or does not render a message.
    """

    def __init__(self, source: str, origin: str, variables: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_CHARS:
            raise CheckpointError(
                f"{origin}: chat template of {len(source)} characters; the limit is "
                f"{MAX_TEMPLATE_CHARS}"
            )
        self.texts = (source, *variables.values())
        self.origin = origin
        self._variables = dict(variables)
        environment = _BoundedSandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationBlock, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        try:
            self._template = environment.from_string(source)
        except Exception as error:  # a template may fail in any way, here and in `render`
            raise CheckpointError(
                f"{origin}: malformed chat template ({first_line(error)})"
            ) from None
        self._lists: set[str] = set()
        for role in ("user", "system", "assistant"):
            self._find_form(role)

    def render(self, messages: Sequence[PlainMessage], thinking: bool | None = None) -> str:
        """Render the messages; thinking is wanted, not, or either.

        As in transformers, ``enable_thinking`` is there only if something is said about it:
        templates tell false from absent.

        Raises:
            CheckpointError: The template fails, or writes without end.
        """
        options = {} if thinking is None else {"enable_thinking": thinking}
        room = MAX_ADDED_CHARS + sum(sum(map(len, message.values())) for message in messages)
        given: list[dict[str, Any]] = [
            {**message, "content": [{"type": "text", "text": message["content"]}]}
            if message["role"] in self._lists
            else dict(message)
            for message in messages
        ]
        pieces: list[str] = []
        try:
            for piece in self._template.generate(
                messages=given,
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **self._variables,
                **options,
            ):
                room -= len(piece)
                if room < 0:
                    raise CheckpointError(f"{self.origin}: the chat template writes without end")
                pieces.append(piece)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self.origin}: the chat template refuses the messages ({first_line(error)})"
            ) from None
        return "".join(pieces)

    def _find_form(self, role: str) -> None:
        """Find whether a role's content goes in as a string, or as a list of typed parts."""
        user = {"role": "user", "content": _OTHER_PROBE}
        before, after = ([user] if role == "assistant" else []), ([] if role == "user" else [user])
        failure = ""
        for change in (self._lists.discard, self._lists.add):
            change(role)
            try:
                rendered = self.render([*before, {"role": role, "content": _PROBE}, *after])
            except CheckpointError as error:
                failure = failure or str(error)
                continue
            if _PROBE in rendered:
                return
        if role == "user":
            raise CheckpointError(
                failure or f"{self.origin}: the chat template leaves out the messages"
            )
        # A template without this role: it refuses it, or does without, when it comes.
        self._lists.discard(role)
        self._lists |= {role} if "user" in self._lists else set()


def default_system_message(template: ChatTemplate) -> str:
    """Return the system message that a template writes where the messages have none, or ""."""
    user = {"role": "user", "content": _OTHER_PROBE}
    try:
        given = template.render([{"role": "system", "content": _PROBE}, user])
        absent = template.render([user])
    except CheckpointError:  # it knows no system messages
        return ""
    before, found, after = given.partition(_PROBE)
    if found and absent.startswith(before) and absent[len(before) :].endswith(after):
        return absent[len(before) : len(absent) - len(after)]
    return ""


def after_system_message(template: ChatTemplate) -> str:
    """Return what a template writes between a system message and the user's, or ""."""
    messages = [{"role": "system", "content": _PROBE}, {"role": "user", "content": _OTHER_PROBE}]
    try:
        rendered = template.render(messages)
    except CheckpointError:  # it knows no system messages
        return ""
    between, found, _ = rendered.partition(_PROBE)[2].partition(_OTHER_PROBE)
    return between if found else ""


def surroundings(template: ChatTemplate) -> str:
    """Return what a template writes around messages, up to the end of the last one."""
    for roles in ("system user assistant user", "user assistant user", "user"):
        messages = [{"role": role, "content": _PROBE} for role in roles.split()]
        try:
            return template.render(messages).rpartition(_PROBE)[0]
        except CheckpointError:
            continue
    return ""


def load_template(checkpoint: ModelDirectory) -> ChatTemplate:
    """Return the chat template of a checkpoint.

    Checkpoints of the ``internvl_chat`` layout name one in ``config.json``, which the original's
    ``chat()`` always uses; transformers renders what is stored beside it, first
    ``chat_template.jinja``, then ``chat_template.json``, then ``tokenizer_config.json``. Where both
    are there:

    - ``tokenizer_config.json`` has that of the text model that the checkpoint grew from; answers
      are worse with it (InternVL's issue 1094). The named one holds.
    - The files of their own, which InternVL3.5 and fine-tuned models bring, hold: they know of
      thinking or pictures. But recent versions of transformers also write the text model's template
      there when a tokenizer is saved again. That one is told by a default system message that is
      not InternVL's ("You are Qwen …"), and the named one holds.

    Without a name, what is stored holds; with nothing at all, ``internvl2_5``.

    Raises:
        CheckpointError: The template is malformed, or ``config.json`` names an unknown one.
    """
    config = checkpoint.read_json("config.json") or {}
    name = config.get("template")
    stored = _stored_template(checkpoint, with_tokenizer=name is None)
    known = isinstance(name, str) and name in _BUILT_IN
    if stored is not None and not known:
        return stored
    if name is not None and not known:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: template {str(name)[:60]!r} is not known "
            f"({', '.join(_BUILT_IN)}); put a chat_template.jinja beside it"
        )
    turn_end, system_message = _BUILT_IN[name or "internvl2_5"]
    if config.get("system_message") is not None:
        system_message = checkpoint.config.system_message
    if stored is not None and default_system_message(stored) in ("", system_message):
        return stored
    return chatml_template(turn_end, system_message)


def chatml_template(turn_end: str, system_message: str) -> ChatTemplate:
    """Return a template of InternVL's ``conversation.py``, such as ``internvl2_5``.

    Args:
        turn_end: What ends a turn.
        system_message: Used if the messages do not begin with a system message.
    """
    variables = {"turn_end": turn_end, "system_message": system_message}
    return ChatTemplate(_CHATML, "the built-in template", variables)


def _stored_template(checkpoint: ModelDirectory, with_tokenizer: bool) -> ChatTemplate | None:
    """Return the first template that is stored: a string, or the ``default`` of a named list."""
    tokenizer_config = checkpoint.read_json("tokenizer_config.json") or {}
    text = checkpoint.read_text("chat_template.jinja")
    separate = checkpoint.read_json("chat_template.json") or {} if text is None else {}
    beside = tokenizer_config if with_tokenizer else {}
    for name, source in (
        ("chat_template.jinja", text),
        ("chat_template.json", separate.get("chat_template") or None),
        ("tokenizer_config.json", beside.get("chat_template") or None),
    ):
        if source is None:
            continue
        if isinstance(source, list):
            listed = [each for each in source if isinstance(each, dict)]
            source = {each.get("name"): each.get("template") for each in listed}.get("default")
        origin = str(checkpoint.path / name)
        if not isinstance(source, str):
            raise CheckpointError(
                f"{origin}: chat_template should be a string, or a list with one named 'default'"
            )
        return ChatTemplate(source, origin, token_variables(tokenizer_config))
    return None


def token_variables(tokenizer_config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a tokenizer's configuration names, such as ``eos_token``."""
    variables = {}
    for name in _TOKEN_VARIABLES:
        value = tokenizer_config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            variables[name] = value
    return variables


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML; transformers replaces it by this, whose arguments may be
    # given by place.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


# Tools, calls and their results are text of system, assistant and user messages, as the templates
# of Qwen2.5 and Qwen3 write them: those of InternVL know nothing of tools, while the text models
# have learned this form.
_BEFORE_TOOLS = (
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
)
_AFTER_TOOLS = (
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments "
    f"within {CALL_START}{CALL_END} XML tags:\n{CALL_START}\n"
    '{"name": <function-name>, "arguments": <args-json-object>}\n'
    f"{CALL_END}"
)
_RESULT_START, _RESULT_END = "<tool_response>", "</tool_response>"

#: With these in its text, somebody could forge calls and results.
TAGS = (CALL_START, CALL_END, _RESULT_START, _RESULT_END)


def tools_text(tools: Sequence[Tool]) -> tuple[Part, ...]:
    """Return what tells the model of its tools, for the end of the system message."""
    listed = "\n".join(tool.to_json() for tool in tools)
    return Markup(_BEFORE_TOOLS), listed, Markup(_AFTER_TOOLS)


def spell_out(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with calls as text, and results as messages of the user.

    Results that follow one another become one message. Other parts stay as they are, also tokens
    that the model generated.
    """
    spelled: list[Message] = []
    results: list[Part] = []
    for index, message in enumerate(messages):
        if message.role != "tool":
            spelled.append(replace(message, parts=_with_calls(message.parts)))
            continue
        between = [Markup("\n")] if results else []
        opening, closing = Markup(f"{_RESULT_START}\n"), Markup(f"\n{_RESULT_END}")
        results += [*between, opening, *message.parts, closing]
        if index + 1 == len(messages) or messages[index + 1].role != "tool":
            spelled.append(Message("user", tuple(results)))
            results = []
    return spelled


def _with_calls(parts: Sequence[Part]) -> tuple[Part, ...]:
    spelled: list[Part] = []
    for part in parts:
        if not isinstance(part, ToolCall):
            spelled.append(part)
            continue
        before = "\n" if any(earlier != "" for earlier in spelled) else ""
        call = f'{{"name": "{part.name}", "arguments": {part.arguments}}}'
        spelled += [Markup(f"{before}{CALL_START}\n"), call, Markup(f"\n{CALL_END}")]
    return tuple(spelled)
