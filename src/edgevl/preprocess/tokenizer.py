"""The tokenizer of a checkpoint, and which of its tokens text must not become."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import (
    AddedToken,
    Encoding,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from edgevl.checkpoint.config import MAX_VOCAB_SIZE
from edgevl.errors import CheckpointError, PromptError
from edgevl.files import first_line
from edgevl.json_input import parse_object

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

_QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
#: What ``tokenizer.json`` consists of.
_PARTS = (
    "version", "truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer",
    "post_processor", "decoder", "model",
)  # fmt: skip
#: Levels of JSON that the tokenizers library reads, less some.
_LEVELS = 100


def load_tokenizer(checkpoint: ModelDirectory) -> Tokenizer:
    """Load the tokenizer of a checkpoint.

    ``tokenizer.json`` if there is one; otherwise ``vocab.json`` and ``merges.txt`` (Qwen2 and
    Qwen3). Tokens that only ``tokenizer_config.json`` or ``added_tokens.json`` name are added.

    Raises:
        CheckpointError: There is no tokenizer, or it is malformed, too large, or of another kind.
    """
    config = checkpoint.read_json("tokenizer_config.json") or {}
    source = checkpoint.path / "tokenizer.json"
    text = checkpoint.read_text("tokenizer.json")
    try:
        if text is not None:
            tokenizer = _from_json(text, str(source))
        else:
            source = checkpoint.path / "vocab.json"
            tokenizer = _qwen2(checkpoint, config.get("tokenizer_class"))
    except CheckpointError:
        raise
    except BaseException as error:
        _raise_unless_malformed(error)
        raise CheckpointError(f"{source}: malformed tokenizer ({first_line(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, checkpoint, config)
    return tokenizer


def _from_json(text: str, where: str) -> Tokenizer:
    """Parse ``tokenizer.json``.

    The library refuses NaN, keys twice, numbers beyond its types and unknown fields at the top,
    whether it needs them or not: where it does, it is given the file without.
    """
    try:
        return Tokenizer.from_str(text)
    except BaseException as error:
        _raise_unless_malformed(error)
    parts = {name: part for name, part in parse_object(text, where).items() if name in _PARTS}
    return Tokenizer.from_str(json.dumps(_plain(parts)))


def _plain(value: Any, levels: int = _LEVELS) -> Any:
    """Return JSON without what other parsers refuse: null in its place."""
    if isinstance(value, dict | list) and not levels:
        return None
    if isinstance(value, dict):
        return {_unicode(key): _plain(item, levels - 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, levels - 1) for item in value]
    if isinstance(value, str):
        return _unicode(value)
    if isinstance(value, int | float) and not (math.isfinite(value) and abs(value) < 1 << 63):
        return None
    return value


def _unicode(text: str) -> str:
    """Return text without lone surrogates."""
    return text.encode(errors="replace").decode()


def _raise_unless_malformed(error: BaseException) -> None:
    """Raise what is no report of the tokenizers library on a malformed file.

    Those are bare Exceptions, or Rust's panics, which derive from BaseException.
    """
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


def _token_ids(values: Mapping[str, Any]) -> dict[str, int]:
    """Return the entries of a vocabulary that are a token and its id."""
    return {
        token: number
        for token, number in values.items()
        if type(number) is int and 0 <= number < MAX_VOCAB_SIZE and _unicode(token) == token
    }


def encode_text(tokenizer: Tokenizer, text: str) -> Encoding:
    """Encode a text, without the tokens that the tokenizer puts around texts.

    As a batch of one: unlike ``encode``, that lets other threads run meanwhile.
    """
    encodings: list[Encoding] = tokenizer.encode_batch([text], add_special_tokens=False)
    return encodings[0]


def _qwen2(checkpoint: ModelDirectory, tokenizer_class: object) -> Tokenizer:
    vocabulary = checkpoint.read_json("vocab.json")
    merges = checkpoint.read_text("merges.txt")
    if vocabulary is None or merges is None:
        raise CheckpointError(
            f"{checkpoint.path}: no tokenizer; add tokenizer.json, or vocab.json and merges.txt"
        )
    if tokenizer_class not in _QWEN2_CLASSES:
        raise CheckpointError(
            f"{checkpoint.path / 'tokenizer_config.json'}: tokenizer_class {tokenizer_class!r} "
            "needs a tokenizer.json; transformers' save_pretrained writes one"
        )
    # The first line may be a comment with the version; empty lines separate nothing.
    lines = [
        line for line in merges.split("\n") if line.strip() and not line.startswith("#version")
    ]
    halves = [line.rstrip("\r").partition(" ") for line in lines]
    ids = _token_ids(vocabulary)
    if not ids:
        raise CheckpointError(f"{checkpoint.path / 'vocab.json'}: names no token with an id")
    return qwen_bpe(ids, [(left, right) for left, _, right in halves])


def _add_tokens(tokenizer: Tokenizer, checkpoint: ModelDirectory, config: dict[str, Any]) -> None:
    """Add the tokens that the side files name and the tokenizer lacks, at the ids they give."""
    source = checkpoint.path / "tokenizer_config.json"
    wanted: dict[int, AddedToken] = {}
    try:
        for token_id, entry in (config.get("added_tokens_decoder") or {}).items():
            if not token_id.isdecimal():
                continue
            flags = {flag: bool(entry[flag]) for flag in _TOKEN_FLAGS if flag in entry}
            wanted[int(token_id)] = AddedToken(entry["content"], **flags)
        if not wanted:
            source = checkpoint.path / "added_tokens.json"
            added = checkpoint.read_json("added_tokens.json") or {}
            listed = config.get("additional_special_tokens")
            named = [*listed] if isinstance(listed, list) else []
            named += (value for key, value in config.items() if key.endswith("_token"))
            texts = (each.get("content") if isinstance(each, dict) else each for each in named)
            special = {text for text in texts if isinstance(text, str)}
            for content, number in _token_ids(added).items():
                # Without flags, transformers takes tokens of this file as special if the
                # configuration lists them, and never normalises them.
                wanted[number] = AddedToken(content, normalized=False, special=content in special)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: malformed added token ({first_line(error)})") from None
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, token in sorted(wanted.items()):
        if token.content not in present:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{source}: token {token.content!r} should have id {token_id} but the tokenizer "
                f"gives it {tokenizer.token_to_id(token.content)}; the files do not belong together"
            )


# Splitting pattern of their tokenizer.json.
_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_bpe(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]]) -> Tokenizer:
    """Return a byte-level BPE tokenizer with Qwen's normalizer and pre-tokenizer; no added tokens.

    Args:
        vocabulary: token -> id, in the characters that stand for bytes.
        merges: pairs to merge, the most important first.
    """
    tokenizer = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(
        add_prefix_space=False, trim_offsets=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


# --- what people type, kept apart from what the template writes ----------------------------------
#
# A chat template works on strings, so pictures and generated tokens pass through it as marks made
# of Unicode noncharacters, which mean nothing and are not whitespace. Text that looks like a token
# of a turn or a picture is cut in its middle with another noncharacter, so that no piece of it can
# match.

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
