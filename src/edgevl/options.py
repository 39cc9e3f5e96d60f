"""What users may decide, said once: of the sampler's options and of those of loading a model.

An `Option` is what is known of a field of such a dataclass. The command line, a conversation's
``/set``, lines of a batch, the API's schema and the page's sliders are made from these fields, and
so are the flags of the commands whose settings lie with what they are for. Nothing heavy is
imported, so that ``--help`` is there at once.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from numbers import Integral, Real
from typing import Any, Literal, get_args

from edgevl.errors import EdgeVLError, PromptError

#: Most tokens that ``logit_bias`` may name.
MAX_BIASES = 1024
#: No vocabulary is larger.
MAX_TOKEN_ID = 2**31
#: The default of an option that has to be given.
REQUIRED: Any = object()

Kind = Literal["integer", "number", "choice", "switch", "text", "texts", "path", "paths", "biases"]


@dataclass(frozen=True)
class Option:
    """What is known of a field of a dataclass of options.

    Attributes:
        default: where the user says nothing, and for the sampler the checkpoint neither.
        kind: what values are. "texts" are a text or several, none of them empty; "biases" a number
            for each of some token ids.
        help: what it does, for ``--help`` and the description of the API.
        metavar: what stands for the value there.
        low: least number, if there is one; of "biases", the least bias.
        high: largest, likewise.
        above: whether ``low`` itself is too little.
        choices: the values that there are of a "choice".
        flag: what the command line calls it; default is the field's name, with dashes.
        unit: what a number on the command line is multiplied by; ``low`` and ``high`` are of that.
        show_default: whether ``--help`` shows it.
        only: the engine or compiler without which it changes nothing; empty if it always does.
        from_checkpoint: whether ``generation_config.json`` may have another default.
        label: what the page calls it, in English and in Chinese.
        slider: on the page: from, to, step. A checkpoint's default outside makes it longer.
        rare: whether few need it, so that the page has it further down.
        aliases: what other servers call it.
        name: of the field.
    """

    default: Any
    kind: Kind
    help: str = ""
    metavar: str | None = None
    low: float | None = None
    high: float | None = None
    above: bool = False
    choices: tuple[Any, ...] = ()
    flag: str = ""
    unit: int = 1
    show_default: bool = True
    only: str = ""
    from_checkpoint: bool = False
    label: tuple[str, str] | None = None
    slider: tuple[float, float, float] | None = None
    rare: bool = False
    aliases: tuple[str, ...] = ()
    name: str = ""

    @property
    def span(self) -> str:
        """The range of its numbers, to be read; empty where there is none."""
        if self.low is None:
            return ""
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"

    @property
    def listed(self) -> str:
        """Its choices, to be read."""
        return ", ".join(map(str, self.choices))

    def accepts(self, value: Any) -> bool:
        """Tell whether a value is one that there is: of the type, and in range; NaN is not."""
        if value is None and self.default is None:
            return True
        if self.kind == "choice":
            return value in self.choices
        if self.kind in ("integer", "number"):
            return self._in_range(value) and (self.kind == "number" or isinstance(value, Integral))
        if self.kind == "texts":
            return isinstance(value, Collection) and all(isinstance(t, str) and t for t in value)
        if self.kind == "biases":
            return isinstance(value, Mapping) and all(map(self._in_range, value.values()))
        return True

    def check(self, value: Any, error: type[EdgeVLError] = PromptError) -> Any:
        """Return a value as the field holds it.

        Raises:
            error: it is of another type, or out of range.
        """
        if self.kind == "texts":
            kept: Any = (value,) if isinstance(value, str) else value
        else:
            kept = _biases(value) if self.kind == "biases" else value
        if self.accepts(kept):
            return tuple(kept) if self.kind == "texts" else kept
        if self.kind == "choice":
            raise error(f"{self.name} {value!r} is unknown: choose {self.listed}")
        raise error(f"{self.name} is {reprlib.repr(value)}: it must be {self._rule()}")

    def parse(self, text: str) -> Any:
        """Return the value that ``text`` spells: of "biases", ``ID=BIAS`` once or more.

        Raises:
            PromptError: it spells none, or one that is out of range.
        """
        value: Any = text
        if self.kind == "biases":
            pairs = [pair.partition("=") for pair in text.replace(",", " ").split()]
            value = {token_id: _number(bias) for token_id, _, bias in pairs} or text
        elif self.kind != "texts":
            value = _number(text)
        return self.check(value)

    def spell(self, value: Any) -> str:
        """Return a value as `parse` takes it, or ``-`` for none."""
        if self.kind == "biases":
            value = ",".join(f"{token_id}={bias:g}" for token_id, bias in value.items())
        elif self.kind == "texts":
            value = " ".join(value)
        return "-" if value in (None, "") else str(value)

    def _in_range(self, value: Any) -> bool:
        number = isinstance(value, Real) and not isinstance(value, bool)
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return number and bool(low <= value <= high) and not (self.above and value == low)

    def _rule(self) -> str:
        return {
            "integer": f"a whole number, {self.span}",
            "number": f"a number, {self.span}",
            "texts": "strings that are not empty",
            "biases": f"a number, {self.span}, for each of up to {MAX_BIASES} token ids",
        }[self.kind]


def option(
    default: Any, kind: Kind, help: str = "", metavar: str | None = None, **more: Any
) -> Any:
    """Return a dataclass's field that is an option; the arguments are those of `Option`."""
    metadata = {"option": Option(default, kind, help, metavar, **more)}
    if default is REQUIRED:
        return field(metadata=metadata)
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@cache
def options_of(kind: type) -> dict[str, Option]:
    """Return the options among the fields of a dataclass: by name, in order."""
    found: dict[str, Option] = {}
    for each in fields(kind):
        if known := each.metadata.get("option"):
            flag = known.flag or f"--{each.name.replace('_', '-')}"
            found[each.name] = replace(known, name=each.name, flag=flag)
    return found


def check_options(given: Any, error: type[EdgeVLError]) -> None:
    """Check the options of an instance of a dataclass, which may be frozen; for `__post_init__`.

    Raises:
        error: a value is of another type, or out of range.
    """
    for name, each in options_of(given.__class__).items():
        object.__setattr__(given, name, each.check(getattr(given, name), error))


def only_for(what: str, given: Any) -> list[Option]:
    """Return the options for ``what`` alone (see `Option.only`) that ``given`` has set.

    Args:
        what: an engine or compiler.
        given: an instance of a dataclass of options.
    """
    return [
        each
        for name, each in options_of(given.__class__).items()
        if each.only == what and getattr(given, name) != each.default
    ]


def _biases(value: Any) -> dict[int, Any] | None:
    """Return {token id: bias}, with ids as numbers also where they were text, as in JSON."""
    if not isinstance(value, Mapping) or len(value) > MAX_BIASES:
        return None
    biases: dict[int, Any] = {}
    for token, bias in value.items():
        if isinstance(token, str) and token.isascii() and token.isdecimal() and len(token) < 20:
            token = int(token)
        if not isinstance(token, Integral) or not 0 <= int(token) < MAX_TOKEN_ID:
            return None
        biases[int(token)] = bias
    return biases


def _number(text: str) -> Any:
    """Return the number, or the text itself if it is none, which `Option.check` then refuses."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


@dataclass(frozen=True)
class SamplingOptions:
    """How the tokens of an answer are chosen.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: keep the most likely tokens that together reach this probability (nucleus sampling);
            0 keeps one, and so is greedy.
        top_k: keep the k most likely tokens; 0 and -1 keep all.
        min_p: keep tokens at least this fraction as likely as the most likely one.
        repetition_penalty: divide the positive logits of tokens already in prompt or answer by it
            and multiply the negative ones (Keskar et al. 2019); 1 is off.
        frequency_penalty: taken from a token's logit as often as the answer has the token already,
            as in OpenAI's API.
        presence_penalty: taken from it once, if the answer has the token already.
        logit_bias: {token id: what is added to its logit}.
        seed: the same seed gives the same answer; None draws a new one each time.
        stop: strings that end the answer; they are not part of it.

    Raises:
        PromptError: a value is out of its range.
    """

    max_tokens: int = option(
        512,
        "integer",
        "Most tokens of an answer.",
        "N",
        low=1,
        label=("Most tokens of an answer", "回答的最大词元数"),
    )
    temperature: float = option(
        0.0,
        "number",
        "0 always takes the likeliest token.",
        "T",
        low=0,
        high=100,
        from_checkpoint=True,
        label=("Temperature (0: always the likeliest)", "温度（0：总取最可能的词元）"),
        slider=(0, 2, 0.01),
    )
    top_p: float = option(
        1.0,
        "number",
        "Draw from the likeliest tokens that reach this probability.",
        "P",
        low=0,
        high=1,
        from_checkpoint=True,
        label=("Top-p (1: all)", "Top-p（1：不限）"),
        slider=(0, 1, 0.01),
    )
    top_k: int = option(
        0,
        "integer",
        "Draw from the K likeliest tokens; 0 or -1 from all.",
        "K",
        low=-1,
        from_checkpoint=True,
        label=("Top-k (0: all)", "Top-k（0：不限）"),
        slider=(0, 200, 1),
    )
    min_p: float = option(
        0.0,
        "number",
        "Drop tokens less likely than this fraction of the likeliest.",
        "P",
        low=0,
        high=1,
        from_checkpoint=True,
        label=("Min-p (0: all)", "Min-p（0：不限）"),
        slider=(0, 1, 0.01),
        rare=True,
    )
    repetition_penalty: float = option(
        1.0,
        "number",
        "Above 1, repeat less of prompt and answer.",
        "R",
        low=0.01,
        high=100,
        from_checkpoint=True,
        label=("Repetition penalty (1: off)", "重复惩罚（1：关闭）"),
        slider=(1, 2, 0.01),
        aliases=("repeat_penalty",),  # llama.cpp, Ollama
    )
    frequency_penalty: float = option(
        0.0,
        "number",
        "Above 0, repeat less what the answer has often.",
        "F",
        low=-2,
        high=2,
        label=("Frequency penalty (0: off)", "频率惩罚（0：关闭）"),
        slider=(-2, 2, 0.01),
        rare=True,
    )
    presence_penalty: float = option(
        0.0,
        "number",
        "Above 0, repeat less what the answer has at all.",
        "F",
        low=-2,
        high=2,
        label=("Presence penalty (0: off)", "存在惩罚（0：关闭）"),
        slider=(-2, 2, 0.01),
        rare=True,
    )
    logit_bias: Mapping[int, float] = option(
        {},
        "biases",
        "Make a token likelier; -100 all but forbids it.",
        "ID=BIAS",
        low=-100,
        high=100,
    )
    seed: int | None = option(
        None,
        "integer",
        "Same seed, same answer.",
        "N",
        low=0,
        label=("Seed (-1: a new one each time)", "随机种子（-1：每次不同）"),
    )
    stop: str | tuple[str, ...] = option((), "texts", "End before this text.", "TEXT")

    def __post_init__(self) -> None:
        check_options(self, PromptError)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


#: Of `SamplingOptions`.
OPTIONS = options_of(SamplingOptions)

#: What makes answers greedy whatever a checkpoint's defaults, for figures to be compared.
GREEDY: Mapping[str, Any] = {"temperature": 0, "repetition_penalty": 1}


#: How weights are held in memory.
Precision = Literal["auto", "int4", "int8", "bf16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
#: How keys and values are cached: in bfloat16, or in INT8 with a scale for each position and head.
KVCacheFormat = Literal["bf16", "int8"]
KV_CACHE_FORMATS: tuple[KVCacheFormat, ...] = get_args(KVCacheFormat)
#: The most that a pool takes.
MAX_THREADS = 256


@dataclass(frozen=True)
class LoadOptions:
    """How a model is loaded; `edgevl.load` says more of each.

    Raises:
        EdgeVLError: a value is not one of its choices, or out of its range.
    """

    engine: str = option(
        "auto", "choice", "What computes.", choices=("auto", "cpu", "reference", "axera")
    )
    max_context: int | None = option(
        None,
        "integer",
        "Most tokens of prompt and answer together.  [default: the checkpoint's]",
        "N",
        low=1,
        flag="--context",
    )
    precision: Precision = option(
        "auto",
        "choice",
        "Weights in memory; auto keeps 4-bit GPTQ and takes all else to INT8.",
        choices=PRECISIONS,
        only="cpu",
    )
    kv_cache: KVCacheFormat = option(
        "bf16",
        "choice",
        "Keys and values in memory; int8 is half as large, which counts in long contexts.",
        choices=KV_CACHE_FORMATS,
        only="cpu",
    )
    threads: int | None = option(
        None,
        "integer",
        "Threads that compute.  [default: one for each physical core]",
        "N",
        low=1,
        high=MAX_THREADS,
        only="cpu",
    )
    keep_bytes: int = option(
        10**9,
        "integer",
        "Most MB on disk, beside a large checkpoint, for features of pictures and for system "
        "messages, which cost nothing after a restart then; 0 keeps none.",
        "N",
        low=0,
        flag="--keep-mb",
        unit=10**6,
        only="cpu",
    )
    # What commands decide themselves; the other engines have exact logits, and no cache.
    exact_logits: bool = False
    cache: bool = True

    def __post_init__(self) -> None:
        check_options(self, EdgeVLError)
