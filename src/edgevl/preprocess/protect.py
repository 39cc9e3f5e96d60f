"""Keep what people type apart from what the template writes.

A chat template works on strings, so pictures and generated tokens pass through it as marks made
of Unicode noncharacters, which mean nothing and are not whitespace. Text that looks like a token of
a turn or a picture is cut in its middle with another noncharacter, so that no piece of it can
match.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from edgevl.errors import PromptError
from edgevl.preprocess.tokenizer import encode_text

#: Tokens that are part of what models say: grounding, thinking, tool calls. Some are special.
SPOKEN_TOKENS = frozenset(
    f"<{slash}{name}>"
    for name in ("ref", "box", "quad", "think", "tool_call")
    for slash in ("", "/")
)

#: Turns of ChatML; pictures and videos of InternVL, and of Qwen, whose tokenizers it has.
_ALWAYS = re.compile(
    r"<\|im_start\|>|<\|im_end\|>|<\|endoftext\|>|</?img>|<IMG_CONTEXT>|<image>|<video>"
    r"|<\|(vision|image|video)_\w+\|>"
)

# Never assigned to characters (Unicode 15, section 23.7), free for internal use.
_NONCHARACTERS = tuple(chr(code) for code in range(0xFDD0, 0xFDF0))


@dataclass(frozen=True)
class Sentinels:
    """Three noncharacters: ``opening`` and ``closing`` around a mark's number, and ``cut``."""

    opening: str
    closing: str
    cut: str

    @classmethod
    def absent_from(cls, texts: Iterable[str]) -> Sentinels:
        """Choose sentinels that occur in none of the texts.

        Raises:
            PromptError: The texts use nearly all of the noncharacters.
        """
        used = {char for text in texts for char in _NONCHARACTERS if char in text}
        free = [char for char in _NONCHARACTERS if char not in used]
        if len(free) < 3:
            raise PromptError(
                f"the text has {len(used)} of the {len(_NONCHARACTERS)} noncharacters U+FDD0 to "
                "U+FDEF; remove them, they stand for nothing"
            )
        return cls(*free[:3])

    def mark(self, number: int) -> str:
        """Return what stands for a picture or for generated tokens."""
        return f"{self.opening}{number}{self.closing}"

    def split(self, rendered: str) -> list[str]:
        """Split at marks: text, number, text, number, …, text; the numbers as digits."""
        return re.split(f"{self.opening}([0-9]+){self.closing}", rendered)


def added_ids(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the added tokens that text could name, special or not: id -> content.

    Those of one character are left out: they cannot be cut, and are pieces of text (a run of
    spaces, say) rather than controls.
    """
    added = tokenizer.get_added_tokens_decoder()
    return {i: token.content for i, token in added.items() if len(token.content.strip()) > 1}


def control_ids(tokenizer: Tokenizer, turns: str, known: Collection[int]) -> frozenset[int]:
    """Return the ids of the added tokens with which text could forge a turn or a picture.

    A turn is made of what the template writes around messages, of what ends an answer, and of what
    begins, ends or fills a sequence (bos, eos, padding); ChatML's tokens are among them whatever
    the template, since the text models have learned them. All other added tokens are text: models
    are trained to read ``<ref>`` in a question, their own ``<box>`` and ``<think>`` in an earlier
    answer, and what a fine-tuned one has of its own, as the original's tokenizer gives them.

    ``turns`` is what the template writes around messages, ``known`` the ids that end an answer and
    those that the tokenizer has for a sequence.
    """
    written = set(tokenizer.encode(turns, add_special_tokens=False).ids)
    return frozenset(
        token_id
        for token_id, content in added_ids(tokenizer).items()
        if token_id in known
        or _ALWAYS.fullmatch(content)
        or (token_id in written and content not in SPOKEN_TOKENS)
    )


def cut_lookalikes(text: str, tokenizer: Tokenizer, controls: frozenset[int], cut: str) -> str:
    """Insert ``cut`` into the text wherever it would match an added token.

    The tokenizer itself tells what matches, so that its normalisation counts too. A cut goes after
    the first character of the match; the pieces are looked at again, for what hid behind it.
    """
    done: list[str] = []
    pending = [text]
    while pending:
        piece = pending.pop()
        pieces = list(_cut(piece, tokenizer, controls))
        if len(pieces) > 1:
            pending.extend(reversed(pieces))
        else:
            done.append(piece)
    return cut.join(done)


def _cut(text: str, tokenizer: Tokenizer, controls: frozenset[int]) -> Iterator[str]:
    encoding = encode_text(tokenizer, text)
    begin = 0
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token_id in controls:
            # The match of a token with lstrip begins with the whitespace before it.
            while start < end - 2 and text[start].isspace():
                start += 1
            yield text[begin : start + 1]
            begin = start + 1
    yield text[begin:]
