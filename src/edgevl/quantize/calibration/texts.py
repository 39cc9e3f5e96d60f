"""The user's text: files to windows of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from edgevl.files import read_text
from edgevl.quantize.calibration.pictures import spread
from edgevl.quantize.settings import QuantizationError

#: Tokens of a window: the most, and the fewest that are worth it.
MAX_WINDOW, MIN_WINDOW = 512, 128

#: Largest file of text.
MAX_FILE_BYTES = 64 << 20

#: Text goes to the tokenizer in pieces of so many characters; where there is more than windows
#: need, at even distances. A token rarely has more than 16.
_PIECE_CHARS = 16 * MAX_WINDOW


def read_texts(paths: Sequence[Path]) -> list[str]:
    """Read files of text, a repeated one once.

    Raises:
        QuantizationError: one cannot be read, is too large, or is not UTF-8.
    """
    return list(dict.fromkeys(read_text(path, MAX_FILE_BYTES, QuantizationError) for path in paths))


def token_windows(
    paths: Sequence[Path], tokenizer: Tokenizer, count: int, longest: int = MAX_WINDOW
) -> list[list[int]]:
    """Cut files into ``count`` windows of the same length that do not overlap.

    Args:
        paths: files of text.
        tokenizer: makes tokens of it.
        count: windows wanted.
        longest: most tokens of a window; `MAX_WINDOW` is another limit.

    Raises:
        QuantizationError: a file cannot be read, or all together are too short.
    """
    pieces = [
        text[at : at + _PIECE_CHARS]
        for text in read_texts(paths)
        for at in range(0, len(text), _PIECE_CHARS)
    ]
    tokens: list[int] = []
    for piece in spread(pieces, 2 * count):
        tokens += tokenizer.encode(piece, add_special_tokens=False).ids
    longest = min(longest, MAX_WINDOW)
    length = min(longest, len(tokens) // count)
    if length < min(MIN_WINDOW, longest):
        more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        raise QuantizationError(
            f"{paths[0]}{more}: {len(tokens)} tokens of text, {count * min(MIN_WINDOW, longest)} "
            f"are needed for {count} windows; give more text or calibrate on fewer samples"
        )
    return spread(
        [tokens[at : at + length] for at in range(0, len(tokens) - length + 1, length)], count
    )
