"""Messages to token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevl.errors import CheckpointError, ContextLengthError, PromptError
from edgevl.preprocess.messages import GeneratedTokens, Markup, Message, Part, check_unicode
from edgevl.preprocess.picture import Picture
from edgevl.preprocess.template import (
    TAGS,
    THINKING_SYSTEM_MESSAGE,
    PlainMessage,
    after_system_message,
    default_system_message,
    load_template,
    spell_out,
    surroundings,
    token_variables,
    tools_text,
)
from edgevl.preprocess.tokenizer import (
    Sentinels,
    added_ids,
    control_ids,
    cut_lookalikes,
    encode_text,
    load_tokenizer,
)
from edgevl.preprocess.tools import Tool, ToolCall, check_tools

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

#: Most characters of text in one prompt, far above any context.
MAX_TEXT_CHARS = 2**22

#: Longer texts are encoded in parts of so many characters before they are encoded as a whole, to
#: find soon whether they are too long. Where texts are cut there may be more tokens than without:
#: so many at most, as the longest token of Qwen's vocabulary has 128 characters.
_PART_CHARS, _AT_CUT = 2**16, 256

_IMAGE_START, _IMAGE_CONTEXT, _IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_END_OF_TURN = "<|im_end|>"
_THINK_START, _THINK_END = "<think>", "</think>"


@dataclass(frozen=True)
class ImageSpan:
    """Where the features of a picture go: from its first ``<IMG_CONTEXT>`` on.

    There are ``length`` of these: tiles × tokens of a tile.
    """

    start: int
    length: int
    picture: Picture


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation as the model reads it: int64 ``token_ids`` [T], its pictures in order.

    Where ``thinking``, the template has begun the answer with ``<think>``, so that the model goes
    on with its thoughts. The first ``system`` tokens are the system message, with its tools and
    pictures; 0 where there is none, or where it ends cannot be told.
    """

    token_ids: NDArray[np.int64]
    images: tuple[ImageSpan, ...]
    thinking: bool = False
    system: int = 0


# What a mark in the rendered conversation stands for.
_Item = Picture | GeneratedTokens


class PromptEncoder:
    """Turns the messages of a conversation into token ids, as one checkpoint wants them.

    Args:
        checkpoint: Gives tokenizer, chat template and image tokens.

    Attributes:
        tokenizer: The tokenizer.
        stop_ids: Ids that end a reply.
        start_ids: Ids that the tokenizer puts before any text (``<s>`` of some Llamas).

    Raises:
        CheckpointError: Tokenizer or template are missing or malformed, or the tokenizer does not
            fit the model.
    """

    def __init__(self, checkpoint: ModelDirectory) -> None:
        self.tokenizer: Tokenizer = load_tokenizer(checkpoint)
        self._template = load_template(checkpoint)
        self._path = checkpoint.path
        self._image_tokens = checkpoint.config.image_tokens
        self._vocab_size = checkpoint.config.text.vocab_size
        self.start_ids: list[int] = self._added_by_tokenizer()
        self._anchor = self._find_anchor()
        self._image_ids = self._find_image_ids(checkpoint)
        self.stop_ids = frozenset({*checkpoint.config.eos_token_ids, *self._ids_of([_END_OF_TURN])})
        self._system_message = default_system_message(self._template)
        following = self._ids_in(after_system_message(self._template))
        self._ends_system = not self.stop_ids.isdisjoint(following)
        # What begins, ends or fills a sequence, as the tokenizer's files name it.
        named = token_variables(checkpoint.read_json("tokenizer_config.json") or {})
        fills = [named[name] for name in ("bos_token", "eos_token", "pad_token") if name in named]
        known = {*self.stop_ids, *self.start_ids, *self._ids_of(fills)}
        self._controls = control_ids(self.tokenizer, surroundings(self._template), known)
        self._tool_tags = frozenset(self._ids_of(TAGS))

    def encode(
        self,
        messages: Sequence[Message],
        thinking: bool | None = None,
        tools: Sequence[Tool] = (),
        max_tokens: int | None = None,
    ) -> Prompt:
        """Encode a conversation, up to where the assistant's next reply begins.

        Text cannot forge a turn or a picture (`control_ids`). Where tools are in play, text that
        the assistant has not said cannot forge calls and results either: their tags stay text.

        Args:
            messages: The conversation, with the system message, if any, first.
            thinking: True asks the model to think before it answers: InternVL3.5's system message
                for it goes before that of the messages. The template hears of True and False
                (``enable_thinking``); None leaves it to the template.
            tools: What the model may call: they are listed after the system message, the
                template's own if there is no other, as Qwen2.5's and Qwen3's templates do it.
            max_tokens: The context: of a text that is longer only the beginning is encoded.

        Raises:
            ContextLengthError: The text by itself has more than ``max_tokens``.
            PromptError: There are no messages, the text is too long, a picture is given to a
                model without vision, ids or text are not of this model, or the tools are too many.
            CheckpointError: The chat template fails, or loses parts of the messages.
        """
        if not messages:
            raise PromptError("there are no messages; give at least one")
        check_tools(tools)
        tagged = bool(tools) or any(
            message.role == "tool" or any(isinstance(part, ToolCall) for part in message.parts)
            for message in messages
        )
        messages = self._instructed(spell_out(messages), thinking, tools)
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        self._check_length(texts, max_tokens)
        thoughts = [message.thinking for message in messages]  # some are not shown
        self._check_length(thoughts, None)
        texts += thoughts
        sentinels = Sentinels.absent_from([*texts, *self._template.texts])
        items = [p for message in messages for p in message.parts if isinstance(p, _Item)]
        for item in items:
            if isinstance(item, GeneratedTokens):
                self._check_ids(item.token_ids)
            elif self._image_ids is None:
                raise PromptError(f"{self._path}: this checkpoint has no vision; give no pictures")
        rendered = self._render(messages, sentinels, thinking, tagged)
        ids, images, controls = self._encode(rendered, items, sentinels)
        blank = self._render(list(map(_blank, messages)), sentinels, thinking, tagged)
        if controls - self._encode(blank, items, sentinels)[2]:
            # Only a template that rewrites text can do this (a replace that joins two halves).
            raise PromptError(
                f"{self._path}: the chat template would turn text of the messages into special "
                "tokens; leave them out of the text"
            )
        written = "".join(blank)
        opened = written.rfind(_THINK_START) > written.rfind(_THINK_END)
        system = 0
        if self._ends_system and (messages[0].role == "system" or self._system_message):
            ends = (place for place, token in enumerate(ids, 1) if token in self.stop_ids)
            system = next(ends, 0)
        return self._prompt(ids, images, opened, system)

    def encode_text(self, text: str, max_tokens: int | None = None) -> Prompt:
        """Encode a text as it is, without a chat template, for the model to go on with.

        Unlike in messages, what looks like a special token is one. For ``max_tokens`` see `encode`.

        Raises:
            ContextLengthError: The text has more than ``max_tokens``.
            PromptError: The text is too long, not Unicode, or comes to no token.
            CheckpointError: The tokenizer is of another model.
        """
        check_unicode(text)
        self._check_length([text], max_tokens)
        ids: list[int] = encode_text(self.tokenizer, text).ids
        if ids[: len(self.start_ids)] != self.start_ids:
            ids = self.start_ids + ids
        if not ids:
            raise PromptError("the prompt is empty; give a text")
        return self._prompt(ids, [])

    def encode_ids(self, token_ids: Sequence[int]) -> Prompt:
        """Take token ids as they are for the model to go on with.

        Raises:
            PromptError: There are none, or one is not of this model's vocabulary.
        """
        if not token_ids:
            raise PromptError("the prompt is empty; give token ids")
        self._check_ids(token_ids)
        return self._prompt(token_ids, [])

    def _prompt(
        self,
        ids: Sequence[int],
        images: Sequence[ImageSpan],
        thinking: bool = False,
        system: int = 0,
    ) -> Prompt:
        token_ids = np.array(ids, dtype=np.int64)
        if token_ids.max(initial=0) >= self._vocab_size:
            raise CheckpointError(
                f"{self._path}: token id {token_ids.max()} is outside of the model's vocabulary of "
                f"{self._vocab_size}; the tokenizer is of another model"
            )
        token_ids.flags.writeable = False
        return Prompt(token_ids, tuple(images), thinking, system)

    def _encode(
        self, rendered: Sequence[str], items: Sequence[_Item], sentinels: Sentinels
    ) -> tuple[list[int], list[ImageSpan], Counter[int]]:
        """Return ids, pictures, and how often each control id came from text."""
        texts, numbers = rendered[::2], rendered[1::2]
        if numbers != [str(number) for number in range(len(items))]:
            raise CheckpointError(
                f"{self._path}: the chat template loses, repeats or reorders pictures or replies"
            )
        # Text between pictures is one string with `<img></img>` in their places, so that the
        # tokenizer sees what it would see in the whole; only replies and cuts end a string.
        ids: list[int] = []
        images: list[ImageSpan] = []
        controls: Counter[int] = Counter()
        text, pictures = "", dict[int, Picture]()

        def flush() -> None:
            self._append_text(text, pictures, ids, images, controls)

        for index, stretch in enumerate(texts):
            first, *others = stretch.split(sentinels.cut)
            text += first
            for piece in others:
                flush()
                text, pictures = piece, {}
            if index == len(items):
                break
            item = items[index]
            if isinstance(item, Picture):
                pictures[len(text)] = item
                text += _IMAGE_START + _IMAGE_END
            else:
                flush()
                ids += item.token_ids
                text, pictures = "", {}
        flush()
        if ids[: len(self.start_ids)] != self.start_ids:
            shift = len(self.start_ids)
            ids = self.start_ids + ids
            images = [ImageSpan(i.start + shift, i.length, i.picture) for i in images]
        return ids, images, controls

    def _append_text(
        self,
        text: str,
        pictures: dict[int, Picture],
        ids: list[int],
        images: list[ImageSpan],
        controls: Counter[int],
    ) -> None:
        """Encode one string; a picture goes inside each `<img></img>` at the given places."""
        if not text:
            return
        anchor = self._anchor if ids else ""
        encoding = encode_text(self.tokenizer, anchor + text)
        text_ids, offsets = encoding.ids, encoding.offsets
        if anchor:
            text_ids, offsets = text_ids[1:], offsets[1:]
            pictures = {len(anchor) + place: picture for place, picture in pictures.items()}
        controls.update(token_id for token_id in text_ids if token_id in self._controls)
        if not pictures:
            ids += text_ids
            return
        assert self._image_ids is not None  # `encode` saw to it
        start_id, context_id, end_id = self._image_ids
        places = iter(sorted(pictures))
        place = next(places, None)
        following = [*text_ids[1:], -1]
        for token_id, (_, end), after in zip(text_ids, offsets, following, strict=True):
            ids.append(token_id)
            if place is None or end <= place:
                continue
            # The first token that reaches into the place must be the start token.
            if (token_id, after) != (start_id, end_id):
                break
            picture = pictures[place]
            length = self._image_tokens * len(picture.pixels)
            images.append(ImageSpan(len(ids), length, picture))
            ids += [context_id] * length
            place = next(places, None)
        if place is not None:
            raise CheckpointError(
                f"{self._path}: the tokenizer does not keep {_IMAGE_START}{_IMAGE_END} as tokens"
            )

    def _render(
        self,
        messages: Sequence[Message],
        sentinels: Sentinels,
        thinking: bool | None,
        tagged: bool,
    ) -> list[str]:
        """Render and split at the marks: text, number, text, …, text.

        ``tagged``: the tags of tools are tokens in what the assistant said only.
        """
        plain: list[PlainMessage] = []
        number = 0
        for message in messages:
            foreign = tagged and message.role != "assistant"
            controls = self._controls | self._tool_tags if foreign else self._controls
            content, text = "", ""
            # Adjacent texts are one text: a lookalike may not be put together from halves.
            for part in message.parts:
                if isinstance(part, str):
                    text += part
                    continue
                content += self._protect(text, controls, sentinels)
                text = ""
                if isinstance(part, Markup):
                    content += part.text
                else:
                    content += sentinels.mark(number)
                    number += 1
            content += self._protect(text, controls, sentinels)
            said = {"role": message.role, "content": content}
            if message.thinking:
                thoughts = self._protect(message.thinking, controls, sentinels)
                said["reasoning_content"] = thoughts
            plain.append(said)
        return sentinels.split(self._template.render(plain, thinking))

    def _protect(self, text: str, controls: frozenset[int], sentinels: Sentinels) -> str:
        return cut_lookalikes(text, self.tokenizer, controls, sentinels.cut) if text else ""

    def _instructed(
        self, messages: Sequence[Message], thinking: bool | None, tools: Sequence[Tool]
    ) -> Sequence[Message]:
        """Put what is asked of the model beside the system message: thinking before, tools after.

        InternVL's instruction to think takes the place of the template's own system message; the
        list of tools follows it, as in Qwen2.5's template.
        """
        if not thinking and not tools:
            return messages
        given = messages[0].role == "system"
        texts: list[tuple[Part, ...]] = [messages[0].parts] if given else []
        if thinking:
            texts.insert(0, (Markup(THINKING_SYSTEM_MESSAGE),))
        elif not given and self._system_message:
            texts.append((Markup(self._system_message),))
        if tools:
            texts.append(tools_text(tools))
        parts: list[Part] = []
        for text in texts:
            parts += [*([Markup("\n\n")] if parts else []), *text]
        return [Message("system", tuple(parts)), *messages[1 if given else 0 :]]

    def _check_length(self, texts: Sequence[str], max_tokens: int | None) -> None:
        """Check that texts are short enough to be encoded as a whole."""
        characters = sum(map(len, texts))
        if characters > MAX_TEXT_CHARS:
            raise PromptError(
                f"{characters} characters of text exceed the limit of {MAX_TEXT_CHARS}; shorten it"
            )
        if max_tokens is None or characters <= _PART_CHARS:
            return
        text, least = "".join(texts), 0
        for start in range(0, characters, _PART_CHARS):
            part = encode_text(self.tokenizer, text[start : start + _PART_CHARS])
            least += max(0, len(part) - _AT_CUT)
            if least > max_tokens:
                raise ContextLengthError(
                    f"the text has more than {max_tokens} tokens, all that the context holds: "
                    "shorten it"
                )

    def _check_ids(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise PromptError(
                    f"token id {token_id} is not of this model's vocabulary of {self._vocab_size}"
                )

    def _find_image_ids(self, checkpoint: ModelDirectory) -> tuple[int, int, int] | None:
        if not checkpoint.has_vision:
            return None
        ids = []
        for token in (_IMAGE_START, _IMAGE_CONTEXT, _IMAGE_END):
            token_id = self.tokenizer.token_to_id(token)
            if token_id is None or token_id not in added_ids(self.tokenizer):
                raise CheckpointError(
                    f"{self._path}: the tokenizer has no token {token}; it is not InternVL's"
                )
            if token_id >= self._vocab_size:
                raise CheckpointError(
                    f"{self._path}: token {token} has id {token_id}, outside of the model's "
                    f"vocabulary of {self._vocab_size}; the tokenizer is of another model"
                )
            ids.append(token_id)
        stored = (checkpoint.read_json("config.json") or {}).get("image_token_id")
        if stored is not None and stored != ids[1]:
            raise CheckpointError(
                f"{self._path / 'config.json'}: image_token_id is {stored} but {_IMAGE_CONTEXT} is "
                f"{ids[1]} in the tokenizer; the files do not belong together"
            )
        return ids[0], ids[1], ids[2]

    def _ids_of(self, contents: Iterable[str]) -> list[int]:
        """Return the ids of those of the tokens that there are."""
        ids = map(self.tokenizer.token_to_id, contents)
        return [token_id for token_id in ids if token_id is not None]

    def _ids_in(self, text: str) -> list[int]:
        """Return the ids of a text by itself."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _find_anchor(self) -> str:
        """Return what to put before a string that is not the first, so that it is not taken so.

        Tokenizers in the manner of SentencePiece put a space before the first word of a string.
        For the others, Qwen's among them, this is empty.
        """
        for token_id, token in self.tokenizer.get_added_tokens_decoder().items():
            anchored = self._ids_in(token.content + "a")
            if token.special and not token.rstrip and anchored[0] == token_id:
                return token.content if anchored[1:] != self._ids_in("a") else ""
        return ""

    def _added_by_tokenizer(self) -> list[int]:
        """Return `start_ids`."""
        plain = self._ids_in("a")
        full = self.tokenizer.encode("a").ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []


def _blank(message: Message) -> Message:
    """Return the message with its words replaced by ones that look like nothing."""
    return Message(
        message.role,
        tuple("x" if isinstance(part, str) and part.strip() else part for part in message.parts),
        "x" if message.thinking.strip() else "",
    )
