"""What a question may ask of the sampler, said once.

The fields of `SamplingOptions` are what ``edgevl chat`` and ``batch`` take on the command line, a
conversation's ``/set``, a line of a batch, a request to the server, and what the web page shows.
Nothing heavy is imported, so that ``--help`` is there at once.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any, Literal

from edgevl.errors import PromptError

#: Most tokens that ``logit_bias`` may name.
MAX_BIASES = 1024
#: No vocabulary is larger.
MAX_TOKEN_ID = 2**31


@dataclass(frozen=True)
class Option:
    """What is known of a field of `SamplingOptions`.

    Attributes:
        default: where neither the question nor the checkpoint says otherwise.
        kind: what values are: "integer", "number", "texts" (a text or several, none of them empty)
            or "biases" (a number for each of some token ids).
        help: what it does, for ``--help`` and the description of the API.
        metavar: what stands for the value there.
        low: least number, if there is one; of "biases", the least bias.
        high: largest, likewise.
        from_checkpoint: whether ``generation_config.json`` may have another default.
        label: what the page calls it, in English and in Chinese.
        slider: on the page: from, to, step. A checkpoint's default outside makes it longer.
        aliases: what other servers call it.
        name: of the field.
    """

    default: Any
    kind: Literal["integer", "number", "texts", "biases"]
    help: str
    metavar: str
    low: float | None = None
    high: float | None = None
    from_checkpoint: bool = False
    label: tuple[str, str] | None = None
    slider: tuple[float, float, float] | None = None
    aliases: tuple[str, ...] = ()
    name: str = ""

    @property
    def span(self) -> str:
        """The range of its numbers, to be read; empty where there is none."""
        if self.low is None:
            return ""
        return f"{self.low} or more" if self.high is None else f"{self.low} to {self.high}"

    def field(self) -> Any:
        """Return a dataclass's field for it."""
        if self.kind == "biases":
            return field(default_factory=dict, metadata={"option": self})
        return field(default=self.default, metadata={"option": self})

    def check(self, value: Any) -> Any:
        """Return a value as the field holds it.

        Raises:
            PromptError: it is of another type, or out of range.
        """
        if self.kind == "texts":
            texts = (value,) if isinstance(value, str) else value
            if isinstance(texts, Collection) and all(isinstance(t, str) and t for t in texts):
                return tuple(texts)
        elif self.kind == "biases":
            biases = _biases(value)
            if biases is not None and all(map(self._in_range, biases.values())):
                return biases
        elif value is None and self.default is None:
            return None
        elif self._in_range(value) and (self.kind == "number" or isinstance(value, Integral)):
            return value
        raise PromptError(f"{self.name} is {reprlib.repr(value)}: it must be {self._rule()}")

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
        """Whether a value is a number between the two; NaN is not."""
        number = isinstance(value, Real) and not isinstance(value, bool)
        low = -math.inf if self.low is None else self.low
        return number and bool(low <= value <= (math.inf if self.high is None else self.high))

    def _rule(self) -> str:
        return {
            "integer": f"a whole number, {self.span}",
            "number": f"a number, {self.span}",
            "texts": "strings that are not empty",
            "biases": f"a number, {self.span}, for each of up to {MAX_BIASES} token ids",
        }[self.kind]


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

    max_tokens: int = Option(
        512,
        "integer",
        "Most tokens of an answer.",
        "N",
        low=1,
        label=("Most tokens of an answer", "回答的最大词元数"),
    ).field()
    temperature: float = Option(
        0.0,
        "number",
        "0 always takes the likeliest token.",
        "T",
        low=0,
        high=100,
        from_checkpoint=True,
        label=("Temperature (0: always the likeliest)", "温度（0：总取最可能的词元）"),
        slider=(0, 2, 0.01),
    ).field()
    top_p: float = Option(
        1.0,
        "number",
        "Draw from the likeliest tokens that reach this probability.",
        "P",
        low=0,
        high=1,
        from_checkpoint=True,
        label=("Top-p (1: all)", "Top-p（1：不限）"),
        slider=(0, 1, 0.01),
    ).field()
    top_k: int = Option(
        0,
        "integer",
        "Draw from the K likeliest tokens; 0 or -1 from all.",
        "K",
        low=-1,
        from_checkpoint=True,
        label=("Top-k (0: all)", "Top-k（0：不限）"),
        slider=(0, 200, 1),
    ).field()
    min_p: float = Option(
        0.0,
        "number",
        "Drop tokens less likely than this fraction of the likeliest.",
        "P",
        low=0,
        high=1,
        from_checkpoint=True,
        label=("Min-p (0: all)", "Min-p（0：不限）"),
        slider=(0, 1, 0.01),
    ).field()
    repetition_penalty: float = Option(
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
    ).field()
    frequency_penalty: float = Option(
        0.0,
        "number",
        "Above 0, repeat less what the answer has often.",
        "F",
        low=-2,
        high=2,
        label=("Frequency penalty (0: off)", "频率惩罚（0：关闭）"),
        slider=(-2, 2, 0.01),
    ).field()
    presence_penalty: float = Option(
        0.0,
        "number",
        "Above 0, repeat less what the answer has at all.",
        "F",
        low=-2,
        high=2,
        label=("Presence penalty (0: off)", "存在惩罚（0：关闭）"),
        slider=(-2, 2, 0.01),
    ).field()
    logit_bias: Mapping[int, float] = Option(
        {},
        "biases",
        "Make a token likelier; -100 all but forbids it.",
        "ID=BIAS",
        low=-100,
        high=100,
    ).field()
    seed: int | None = Option(
        None,
        "integer",
        "Same seed, same answer.",
        "N",
        low=0,
        label=("Seed (-1: a new one each time)", "随机种子（-1：每次不同）"),
    ).field()
    stop: str | tuple[str, ...] = Option((), "texts", "End before this text.", "TEXT").field()

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            object.__setattr__(self, name, option.check(getattr(self, name)))

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1


#: By name, in the order in which they are listed.
OPTIONS: dict[str, Option] = {
    each.name: replace(each.metadata["option"], name=each.name) for each in fields(SamplingOptions)
}

#: What makes answers greedy whatever a checkpoint's defaults, for figures to be compared.
GREEDY: Mapping[str, Any] = {"temperature": 0, "repetition_penalty": 1}
