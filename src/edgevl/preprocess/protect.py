"""Keep what people type apart from what the template writes.

A chat template works on strings, so pictures and generated tokens pass through it as marks made
of Unicode noncharacters, which mean nothing and are not whitespace. Text that looks like a special
token is cut in its middle with another noncharacter, so that no piece of it can match.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tokenizers import Tokenizer

from edgevl.errors import PromptError

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


def control_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the added tokens that text must not forge.

    All added tokens, special or not, but those of one character: they cannot be cut, and are
    pieces of text (a run of spaces, say) rather than controls.
    """
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(
        token_id for token_id, token in added.items() if len(token.content.strip()) > 1
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
    encoding = tokenizer.encode(text, add_special_tokens=False)
    begin = 0
    for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
        if token_id in controls:
            # The match of a token with lstrip begins with the whitespace before it.
            while start < end - 2 and text[start].isspace():
                start += 1
            yield text[begin : start + 1]
            begin = start + 1
    yield text[begin:]
