"""A byte-level BPE tokenizer made by rule, with the special tokens of InternVL at their ids.

The pipeline (NFC, splitting pattern, byte-level alphabet) is that of Qwen2 and Qwen3, so texts are
cut into words alike; the merges within words are systematic instead of learned.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from tokenizers import AddedToken, Tokenizer, pre_tokenizers

from edgevl.preprocess.tokenizer import qwen_bpe

#: Size of Qwen's vocabulary without added tokens: the first special token's id.
QWEN_BASE_VOCABULARY = 151643

# Names and order as in the tokenizers of Qwen2.5, Qwen3 and InternVL.
_QWEN_SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>",
    "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>",
    "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
_QWEN_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>",
    "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_QWEN3_PLAIN = ("<tool_response>", "</tool_response>", "<think>", "</think>")
_INTERNVL_SPECIAL = (
    "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>", "<ref>", "</ref>", "<box>", "</box>",
)  # fmt: skip

# English letters, the commonest first.
_LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
_HAN_FIRST, _HAN_LAST = 0x4E00, 0x9FFF


def special_tokens(thinking: bool) -> list[AddedToken]:
    """Return InternVL's added tokens in the order of their ids.

    Args:
        thinking: With Qwen3's ``<think>`` and tool response tokens; without for Qwen2.5.
    """
    plain = _QWEN_PLAIN + (_QWEN3_PLAIN if thinking else ())
    marked = [(text, True) for text in _QWEN_SPECIAL]
    marked += [(text, False) for text in plain]
    marked += [(text, True) for text in _INTERNVL_SPECIAL]
    return [AddedToken(text, normalized=False, special=special) for text, special in marked]


def build_tokenizer(base_size: int, thinking: bool) -> Tokenizer:
    """Build a tokenizer that can write any text.

    Args:
        base_size: Entries before the added tokens: 256 bytes and ``base_size - 256`` merges.
        thinking: See ``special_tokens``.
    """
    merges = list(islice(_merges(), base_size - 256))
    entries = [*_alphabet(), *(left + right for left, right in merges)]
    tokenizer = qwen_bpe({text: number for number, text in enumerate(entries)}, merges)
    tokenizer.add_tokens(special_tokens(thinking))
    return tokenizer


def _alphabet() -> list[str]:
    """Return the characters that stand for bytes, in the order of Qwen's ids 0 to 255."""
    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _byte_characters() -> list[str]:
    """Return the character of each byte value 0 to 255 (GPT-2's printable mapping)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    shifted = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(shifted)) for byte in range(256)]


def _merges() -> Iterator[tuple[str, str]]:
    """Yield merges, the first ranked highest: byte pairs, Han characters, groups of four letters.

    Pairs that occur in words come before the rest. In the full vocabulary English comes out at
    about two characters a token and Chinese at one: twice the tokens of a learned vocabulary.
    """
    characters = _byte_characters()
    space = characters[ord(" ")]
    rank = {letter: number for number, letter in enumerate(_LETTERS)}
    letter_pairs = sorted(
        ((left, right) for left in _LETTERS for right in _LETTERS),
        key=lambda pair: rank[pair[0]] + rank[pair[1]],
    )
    first = [(space, letter) for letter in _LETTERS] + letter_pairs
    # The first two bytes of a Han character must join before anything else can take the second.
    first += [(characters[a], characters[b]) for a in range(0xE4, 0xEA) for b in range(0x80, 0xC0)]
    yield from first
    seen = set(first)
    yield from (
        (left, right) for left in characters for right in characters if (left, right) not in seen
    )
    for code in range(_HAN_FIRST, _HAN_LAST + 1):
        a, b, c = (characters[byte] for byte in chr(code).encode())
        yield a + b, c
    pairs = [left + right for left, right in letter_pairs]
    yield from ((space + letter, pair) for letter in _LETTERS for pair in pairs)
    weight = {pair: rank[pair[0]] + rank[pair[1]] for pair in pairs}
    yield from sorted(
        ((left, right) for left in pairs for right in pairs),
        key=lambda group: weight[group[0]] + weight[group[1]],
    )
