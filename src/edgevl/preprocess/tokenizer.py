"""The tokenizer of a checkpoint: ``tokenizer.json``, or built from the files of Qwen2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer

from edgevl.checkpoint.qwen_bpe import qwen_bpe
from edgevl.errors import CheckpointError

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

_QWEN2_CLASSES = (None, "Qwen2Tokenizer", "Qwen2TokenizerFast")
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


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
            tokenizer = Tokenizer.from_str(text)
        else:
            source = checkpoint.path / "vocab.json"
            tokenizer = _qwen2(checkpoint, config.get("tokenizer_class"))
    except CheckpointError:
        raise
    except BaseException as error:
        # The library reports malformed files as bare Exception, some as a Rust panic, which
        # derives from BaseException.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{source}: malformed tokenizer ({_first_line(error)})") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_tokens(tokenizer, checkpoint, config)
    return tokenizer


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
    pairs: list[tuple[str, str]] = []
    for line in lines:
        left, _, right = line.rstrip("\r").partition(" ")
        pairs.append((left, right))
    return qwen_bpe(vocabulary, pairs)


def _add_tokens(tokenizer: Tokenizer, checkpoint: ModelDirectory, config: dict[str, Any]) -> None:
    """Add the tokens that the side files name and the tokenizer lacks, at the ids they give."""
    source = checkpoint.path / "tokenizer_config.json"
    wanted: dict[int, AddedToken] = {}
    try:
        for token_id, entry in config.get("added_tokens_decoder", {}).items():
            flags = {flag: bool(entry[flag]) for flag in _TOKEN_FLAGS if flag in entry}
            wanted[int(token_id)] = AddedToken(entry["content"], **flags)
        if not wanted:
            source = checkpoint.path / "added_tokens.json"
            added = checkpoint.read_json("added_tokens.json") or {}
            for content, token_id in added.items():
                # Without flags, transformers takes tokens of this file as special if the
                # configuration lists them, and never normalises them.
                special = content in _special_contents(config)
                wanted[int(token_id)] = AddedToken(content, normalized=False, special=special)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: malformed added token ({_first_line(error)})") from None
    present = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token_id, token in sorted(wanted.items()):
        if token.content not in present:
            tokenizer.add_tokens([token])
        if tokenizer.token_to_id(token.content) != token_id:
            raise CheckpointError(
                f"{source}: token {token.content!r} should have id {token_id} but the tokenizer "
                f"gives it {tokenizer.token_to_id(token.content)}; the files do not belong together"
            )


def _special_contents(config: dict[str, Any]) -> set[str]:
    values = list(config.get("additional_special_tokens") or ())
    values += [value for key, value in config.items() if key.endswith("_token")]
    return {value["content"] if isinstance(value, dict) else str(value) for value in values}


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
