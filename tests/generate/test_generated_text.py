"""Text of an answer, as it comes: whole characters, stop strings, thinking."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from edgevl.generate.text import Detokenizer, StopStrings, ThinkingSplitter, partial_suffix

SPECIALS = ["<|im_end|>", "<img>", "<ref>", "</ref>", "<think>"]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token a byte, so that every character of several bytes is split."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIALS])
    return tokenizer


def stream(tokenizer, ids):
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(i) for i in ids), detokenizer.finish()]


@given(text=st.text())
def test_pieces_join_to_the_text(tokenizer, text):
    encoded = tokenizer.encode(text)
    # Special tokens that hypothesis may spell are not the matter here.
    if not any(i >= 256 for i in encoded.ids):
        assert "".join(stream(tokenizer, encoded.ids)) == text


def test_a_character_comes_whole_and_at_once(tokenizer):
    assert stream(tokenizer, tokenizer.encode("a熊猫🐼").ids) == [
        "a", "", "", "熊", "", "", "猫", "", "", "", "🐼", ""
    ]  # fmt: skip


@given(text=st.text(st.sampled_from("ab 熊猫🐼é")))
def test_bytes_in_a_row_that_are_characters_only_together(text):
    """As with SentencePiece's vocabularies: what has no token is bytes, and words have theirs."""
    names = [*(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "▁", "ab", "▁a"]
    merges = [("a", "b"), ("▁", "a")]
    model = models.BPE({name: i for i, name in enumerate(names)}, merges, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    ids = tokenizer.encode(text.replace(" ", "▁")).ids
    assert tokenizer.decode(ids) == text
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_a_character_show_at_the_end(tokenizer):
    ids = tokenizer.encode("熊").ids[:2]
    assert stream(tokenizer, ids)[:2] == ["", ""]
    assert set(stream(tokenizer, ids)[2]) == {"\ufffd"}


def test_bad_bytes_do_not_hold_up_what_follows(tokenizer):
    ids = tokenizer.encode("熊").ids[:1] + tokenizer.encode("ok").ids
    assert "".join(stream(tokenizer, ids)) == "\ufffdok"


def test_a_leading_space_survives(tokenizer):
    assert "".join(stream(tokenizer, tokenizer.encode(" a b").ids)) == " a b"


def test_steering_tokens_are_hidden_and_speaking_ones_are_not(tokenizer):
    ids = tokenizer.encode("<ref>cat</ref><img>!<|im_end|>").ids
    assert "".join(stream(tokenizer, ids)) == "<ref>cat</ref>!"


def stop_stream(stop, pieces):
    stops = StopStrings(stop)
    out = []
    for piece in pieces:
        out.append(stops.add(piece))
        if stops.found:
            return "".join(out), True
    return "".join(out) + stops.finish(), False


@given(
    text=st.text("abc", max_size=30),
    stop=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30)),
)
def test_stop_strings_cut_where_the_first_one_begins(text, stop, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(edges)]
    given_out, found = stop_stream(stop, pieces)
    # The stream stops at the stop string that is complete first; nothing of it is given out.
    ends = [text.find(s) + len(s) for s in stop if s in text]
    assert found == bool(ends)
    if not found:
        assert given_out == text
    else:
        assert text.startswith(given_out)
        assert any(text.startswith(given_out + s) for s in stop)
        assert not any(s in given_out for s in stop)


def test_text_before_a_possible_stop_string_is_not_held_back():
    stops = StopStrings(("<end>",))
    assert [stops.add(c) for c in "a<eb<end>c"][:4] == ["a", "", "", "<eb"]
    assert stops.found


def test_partial_suffix():
    assert partial_suffix("abcab", "abd") == 2
    assert partial_suffix("abcabd", "abd") == 0
    assert partial_suffix("", "abd") == 0


def split(pieces, opened=False):
    splitter = ThinkingSplitter(opened)
    out = [part for piece in pieces for part in splitter.add(piece)] + list(splitter.finish())
    thoughts = "".join(text for thinking, text in out if thinking)
    return thoughts, "".join(text for thinking, text in out if not thinking)


@pytest.mark.parametrize("by", ["char", "whole"])
@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>hm</think>\n\nyes", "hm", "yes"),
        ("\n<think>\nhm\n</think>yes", "hm", "yes"),
        ("<think>\n\n a\n\n b \n\n</think>\n\nyes ", "a\n\n b", "yes "),
        ("<think>\n\n</think>\n\nyes", "", "yes"),
        ("<think>a<think>b</think>yes</think>", "a<think>b", "yes</think>"),
        ("<think>cut off \n", "cut off", ""),
        ("<think></think>yes", "", "yes"),
        ("<think>never closed", "never closed", ""),
        ("<think>a</thin", "a</thin", ""),
        ("no thinking <think>later</think>", "", "no thinking <think>later</think>"),
        ("  plain", "", "  plain"),
        ("<th", "", "<th"),
        ("", "", ""),
    ],
)
def test_thinking_is_told_from_the_answer(text, thinking, answer, by):
    assert split(list(text) if by == "char" else [text]) == (thinking, answer)


@pytest.mark.parametrize("by", ["char", "whole"])
@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("hm</think>\n\nyes", "hm", "yes"),
        ("\n hm \n</think>yes", "hm", "yes"),
        ("</think>\n\nyes", "", "yes"),
        ("\n\n</think>\n\nyes", "", "yes"),
        ("cut off in though", "cut off in though", ""),
        ("a</thin", "a</thin", ""),
        ("\n", "", ""),
        ("", "", ""),
        ("<think>\nsaid again</think>yes", "said again", "yes"),
        ("<thing> hm</think>yes", "<thing> hm", "yes"),
        ("hm</think>yes<think>no</think>", "hm", "yes<think>no</think>"),
    ],
)
def test_thinking_that_the_prompt_has_opened(text, thinking, answer, by):
    pieces = list(text) if by == "char" else [text]
    assert split(pieces, opened=True) == (thinking, answer)


@given(data=st.lists(st.integers(0, 255), max_size=60))
def test_any_bytes_come_out_as_the_whole_would(tokenizer, data):
    characters = dict(zip(tokenizer.get_vocab().values(), tokenizer.get_vocab(), strict=True))
    ids = [i for i in data if i in characters]
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_noise_does_not_pile_up(tokenizer):
    noise = tokenizer.encode("熊").ids[1:2] * 400
    pieces = stream(tokenizer, noise + tokenizer.encode("熊猫").ids)
    assert "".join(pieces) == "\ufffd" * 400 + "熊猫"
    # Most of it is out before the first whole character comes.
    assert len("".join(pieces[:400])) > 300
