"""The user's text becomes windows of tokens."""

import pytest

import edgevl
from edgevl.loading import locate
from edgevl.preprocess import PromptEncoder
from edgevl.quantize.calibration.conversations import token_windows
from edgevl.quantize.settings import QuantizationError


@pytest.fixture(scope="module")
def tokenizer():
    with edgevl.Checkpoint.open(locate("tiny")) as checkpoint:
        return PromptEncoder(checkpoint).tokenizer


def numbers(begin, end):
    return " ".join(map(str, range(begin, end)))


def test_windows_do_not_overlap_and_are_evenly_spread(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(numbers(10_000, 20_000))
    (tmp_path / "b.txt").write_text(numbers(20_000, 30_000))
    windows = token_windows([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 10)
    assert {len(window) for window in windows} == {512}
    words = [tokenizer.decode(window).split()[1:-1] for window in windows]  # whole ones
    assert all(words)
    firsts = [int(window[0]) for window in words]
    assert firsts == sorted(firsts)
    assert firsts[0] < 12_500
    assert firsts[-1] > 27_500
    assert all(int(w[-1]) < first for w, first in zip(words, firsts[1:], strict=False))


def test_a_short_text_gives_shorter_windows(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(numbers(1000, 1400))
    found = len(tokenizer.encode(numbers(1000, 1400), add_special_tokens=False).ids)
    count = found // 200
    windows = token_windows([tmp_path / "a.txt"], tokenizer, count)
    assert {len(window) for window in windows} == {found // count}
    assert {len(w) for w in token_windows([tmp_path / "a.txt"], tokenizer, 2, longest=50)} == {50}


def test_too_little_text_says_how_much_there_is_and_is_needed(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 100))
    found = len(tokenizer.encode(numbers(0, 100), add_special_tokens=False).ids)
    message = rf"a\.txt: {found} tokens of text, 1152 are needed for 9 windows; give more text"
    with pytest.raises(QuantizationError, match=message):
        token_windows([path], tokenizer, 9)
    with pytest.raises(QuantizationError, match=rf"a\.txt and 1 more: {found} tokens"):
        token_windows([path, path], tokenizer, 9)  # the same text counts once


def test_files_that_cannot_be_read(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(QuantizationError, match=r"a\.txt: no such file"):
        token_windows([path], tokenizer, 1)
    path.write_bytes(b"good \xff bad")
    with pytest.raises(QuantizationError, match=r"a\.txt: not UTF-8 at byte 5: convert it"):
        token_windows([path], tokenizer, 1)
    monkeypatch.setattr(f"{token_windows.__module__}.MAX_FILE_BYTES", 5)
    with pytest.raises(QuantizationError, match=r"a\.txt: larger than"):
        token_windows([path], tokenizer, 1)
