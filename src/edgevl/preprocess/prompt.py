"""Messages to token ids."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from edgevl.errors import CheckpointError, PromptError
from edgevl.preprocess.messages import GeneratedTokens, Markup, Message, Part, check_unicode
from edgevl.preprocess.picture import Picture
from edgevl.preprocess.protect import Sentinels, control_ids, cut_lookalikes
from edgevl.preprocess.template import THINKING_SYSTEM_MESSAGE, load_template
from edgevl.preprocess.tokenizer import load_tokenizer
from edgevl.preprocess.tool_prompt import spell_out, tools_text
from edgevl.preprocess.tools import Tool, check_tools

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

#: Most characters of text in one prompt, far above any context.
MAX_TEXT_CHARS = 2**22

_IMAGE_START, _IMAGE_CONTEXT, _IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
_END_OF_TURN = "<|im_end|>"


@dataclass(frozen=True)
class ImageSpan:
    """Where the features of a picture go in a prompt.

    Attributes:
        start: Position of the picture's first ``<IMG_CONTEXT>``.
        length: Number of them: tiles × tokens of a tile.
        picture: The picture.
    """

    start: int
    length: int
    picture: Picture


@dataclass(frozen=True, eq=False)
class Prompt:
    """A conversation as the model reads it.

    Attributes:
        token_ids: int64 [T].
        images: Its pictures, in order.
    """

    token_ids: NDArray[np.int64]
    images: tuple[ImageSpan, ...]


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
        self._controls = control_ids(self.tokenizer)
        self.start_ids: list[int] = self._added_by_tokenizer()
        self._anchor = self._find_anchor()
        self._image_ids = self._find_image_ids(checkpoint)
        stop_ids = set(checkpoint.config.eos_token_ids)
        end_of_turn = self.tokenizer.token_to_id(_END_OF_TURN)
        if end_of_turn is not None:
            stop_ids.add(end_of_turn)
        self.stop_ids: frozenset[int] = frozenset(stop_ids)

    def encode(
        self, messages: Sequence[Message], thinking: bool = False, tools: Sequence[Tool] = ()
    ) -> Prompt:
        """Encode a conversation, up to where the assistant's next reply begins.

        Args:
            messages: The conversation, with the system message, if any, first.
            thinking: Ask the model to think before it answers: InternVL3.5's system message for
                it goes before that of the messages, and the template hears of it.
            tools: What the model may call: they are listed after the system message, as Qwen3's
                template does it.

        Raises:
            PromptError: There are no messages, the text is too long, a picture is given to a
                model without vision, ids or text are not of this model, or the tools are too many.
            CheckpointError: The chat template fails, or loses parts of the messages.
        """
        if not messages:
            raise PromptError("there are no messages; give at least one")
        check_tools(tools)
        messages = _instructed(spell_out(messages), thinking, tools)
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        _check_length(texts)
        sentinels = Sentinels.absent_from([*texts, self._template.source])
        items = [p for message in messages for p in message.parts if isinstance(p, _Item)]
        self._check_items(items)
        ids, images, controls = self._encode(messages, items, sentinels, thinking)
        blank = [_blank(message) for message in messages]
        if controls - self._encode(blank, items, sentinels, thinking)[2]:
            # Only a template that rewrites text can do this (a replace that joins two halves).
            raise PromptError(
                f"{self._path}: the chat template would turn text of the messages into special "
                "tokens; leave them out of the text"
            )
        return self._prompt(ids, images)

    def encode_text(self, text: str) -> Prompt:
        """Encode a text as it is, without a chat template, for the model to go on with.

        Unlike in messages, what looks like a special token is one.

        Raises:
            PromptError: The text is too long, not Unicode, or comes to no token.
            CheckpointError: The tokenizer is of another model.
        """
        _check_length([text])
        check_unicode(text)
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
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

    def _prompt(self, ids: Sequence[int], images: Sequence[ImageSpan]) -> Prompt:
        token_ids = np.array(ids, dtype=np.int64)
        if token_ids.max(initial=0) >= self._vocab_size:
            raise CheckpointError(
                f"{self._path}: token id {token_ids.max()} is outside of the model's vocabulary of "
                f"{self._vocab_size}; the tokenizer is of another model"
            )
        token_ids.flags.writeable = False
        return Prompt(token_ids, tuple(images))

    def _encode(
        self,
        messages: Sequence[Message],
        items: Sequence[_Item],
        sentinels: Sentinels,
        thinking: bool,
    ) -> tuple[list[int], list[ImageSpan], Counter[int]]:
        """Return ids, pictures, and how often each control id came from text."""
        rendered = self._render(messages, sentinels, thinking)
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
        encoding = self.tokenizer.encode(anchor + text, add_special_tokens=False)
        text_ids, offsets = encoding.ids, encoding.offsets
        if anchor:
            text_ids, offsets = text_ids[1:], offsets[1:]
            pictures = {len(anchor) + place: picture for place, picture in pictures.items()}
        controls.update(token_id for token_id in text_ids if token_id in self._controls)
        if not pictures:
            ids += text_ids
            return
        assert self._image_ids is not None  # _check_items saw to it
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
        self, messages: Sequence[Message], sentinels: Sentinels, thinking: bool
    ) -> list[str]:
        plain: list[dict[str, str]] = []
        number = 0
        for message in messages:
            content, text = "", ""
            # Adjacent texts are one text: a lookalike may not be put together from halves.
            for part in message.parts:
                if isinstance(part, str):
                    text += part
                    continue
                content += self._protect(text, sentinels)
                text = ""
                if isinstance(part, Markup):
                    content += part.text
                else:
                    content += sentinels.mark(number)
                    number += 1
            content += self._protect(text, sentinels)
            plain.append({"role": message.role, "content": content})
        return sentinels.split(self._template.render(plain, thinking))

    def _protect(self, text: str, sentinels: Sentinels) -> str:
        return cut_lookalikes(text, self.tokenizer, self._controls, sentinels.cut) if text else ""

    def _check_items(self, items: Sequence[_Item]) -> None:
        for item in items:
            if isinstance(item, Picture) and self._image_ids is None:
                raise PromptError(f"{self._path}: this checkpoint has no vision; give no pictures")
            if isinstance(item, GeneratedTokens):
                self._check_ids(item.token_ids)

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
            if token_id is None or token_id not in self._controls:
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

    def _find_anchor(self) -> str:
        """Return what to put before a string that is not the first, so that it is not taken so.

        Tokenizers in the manner of SentencePiece put a space before the first word of a string.
        For the others, Qwen's among them, this is empty.
        """

        def encode(text: str) -> list[int]:
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
            return ids

        for token_id, token in self.tokenizer.get_added_tokens_decoder().items():
            anchored = encode(token.content + "a")
            if token.special and not token.rstrip and anchored[0] == token_id:
                return token.content if anchored[1:] != encode("a") else ""
        return ""

    def _added_by_tokenizer(self) -> list[int]:
        """Return `start_ids`."""
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a").ids
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return full[:start]
        return []


def _instructed(
    messages: Sequence[Message], thinking: bool, tools: Sequence[Tool]
) -> Sequence[Message]:
    """Put what is asked of the model beside the system message: thinking before it, tools after."""
    if not thinking and not tools:
        return messages
    system = list(messages[:1]) if messages[0].role == "system" else []
    texts = [message.parts for message in system]
    if thinking:
        texts.insert(0, (Markup(THINKING_SYSTEM_MESSAGE),))
    if tools:
        texts.append(tools_text(tools))
    parts: list[Part] = []
    for text in texts:
        parts += [*([Markup("\n\n")] if parts else []), *text]
    return [Message("system", tuple(parts)), *messages[len(system) :]]


def _check_length(texts: Sequence[str]) -> None:
    characters = sum(map(len, texts))
    if characters > MAX_TEXT_CHARS:
        raise PromptError(
            f"{characters} characters of text exceed the limit of {MAX_TEXT_CHARS}; shorten it"
        )


def _blank(message: Message) -> Message:
    """Return the message with its words replaced by ones that look like nothing."""
    return Message(
        message.role,
        tuple("x" if isinstance(part, str) and part.strip() else part for part in message.parts),
    )
