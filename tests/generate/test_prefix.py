"""What of a prompt is computed again: nothing that is there, all that is not."""

import numpy as np
import pytest
from PIL import Image

import edgevl
from edgevl.generate import prefix
from edgevl.generate.prefix import FeatureCache, Reading, Slot, advance, drain, prompt_keys
from edgevl.preprocess import Message, prepare_picture


@pytest.fixture(scope="module")
def model(mini_checkpoint):
    return edgevl.load(mini_checkpoint("mini-qwen3", "internvl_chat"), threads=1)


def picture(model, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (56, 56, 3), np.uint8)
    return prepare_picture(Image.fromarray(pixels), model.checkpoint.config)


def prompt_of(model, text, *pictures):
    return model.prompts.encode([Message.user(text, pictures)])


def runner(model, features=None):
    return Slot(model.engine, features or FeatureCache())


def in_steps(slot, prompt, step):
    """Read a prompt by so many positions at once; yield the logits after each step."""
    unread = drain(slot.prepare(prompt))
    for begin in range(0, len(unread), step):
        ends = begin + step >= len(unread)
        yield advance([], Reading(slot, unread[begin : begin + step], ends))[0]


def test_every_place_where_a_prefix_may_end(model):
    """Also inside a picture, of which the rest is then taken."""
    prompt = prompt_of(model, "Before <image> after", picture(model, 0))
    expected = runner(model).read(prompt).copy()
    for length in range(len(prompt.token_ids) + 1):
        again = runner(model)
        again.read(prompt)
        again.truncate(length)
        unread = drain(again.prepare(prompt))
        assert len(unread) == max(len(prompt.token_ids) - length, 1)
        [logits] = advance([], Reading(again, unread, True))
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("step", [1, 5, 64])
def test_work_in_steps_is_the_same_work(model, step):
    prompt = prompt_of(model, "Before <image> after", picture(model, 1))
    expected = runner(model).read(prompt).copy()
    *before, logits = in_steps(runner(model), prompt, step)
    assert all(len(each) == 0 for each in before)
    np.testing.assert_array_equal(logits, expected)
    # Left in the middle: what was done stays, and is all that is known.
    left = runner(model)
    for _ in zip(range(3), in_steps(left, prompt, step), strict=False):
        pass
    assert left.match(prompt_keys(prompt)) == len(left) == left.sequence.length
    np.testing.assert_array_equal(left.read(prompt), expected)


@pytest.mark.parametrize("step", [1, 5, 64])
def test_answers_beside_a_prompt_are_those_alone(model, step):
    """Bit by bit, and so are the prompt's logits."""
    prompt = prompt_of(model, "Before <image> after", picture(model, 2))
    expected = runner(model).read(prompt).copy()
    alone, beside = ([runner(model), runner(model)] for _ in range(2))
    for first, second in (alone, beside):
        first.read(prompt_of(model, "One"))
        second.read(prompt_of(model, "Another, which is longer"))
    reading = runner(model)
    unread = drain(reading.prepare(prompt))
    for begin in range(0, len(unread), step):
        ends = begin + step >= len(unread)
        tokens = [[5 + begin], [7, 8, 9]]
        part = Reading(reading, unread[begin : begin + step], ends)
        found = advance(list(zip(beside, tokens, strict=True)), part)
        *rows, read = [each.copy() for each in found]
        for slot, ids, row in zip(alone, tokens, rows, strict=True):
            np.testing.assert_array_equal(np.concatenate([slot.decode(i).copy() for i in ids]), row)
    np.testing.assert_array_equal(read, expected)
    assert [len(slot) for slot in alone] == [len(slot) for slot in beside]


def test_answers_with_drafts_are_those_alone(model):
    """Bit by bit, however many tokens each of them has."""
    alone, together = ([runner(model) for _ in range(3)] for _ in range(2))
    for slots in (alone, together):
        for slot, text in zip(slots, ("One", "Another", "The third of them"), strict=True):
            slot.read(prompt_of(model, text))
    for ids in ([[5], [6, 7], [8] * 12], [[1, 2, 3], [4], [5]], [[9], [9], [9]]):
        rows = [each.copy() for each in advance(list(zip(together, ids, strict=True)))]
        for slot, tokens, found in zip(alone, ids, rows, strict=True):
            expected = [slot.decode(token).copy() for token in tokens]
            np.testing.assert_array_equal(found, np.concatenate(expected))
    assert [len(slot) for slot in alone] == [len(slot) for slot in together]


def test_sequences_share_the_features_of_pictures(model):
    features = FeatureCache()
    prompt = prompt_of(model, "What?", picture(model, 2))
    runners = [runner(model, features) for _ in range(2)]
    before = model.engine.timings().tiles
    for each in runners:
        each.read(prompt)
    assert model.engine.timings().tiles - before == 1


def test_the_picture_used_longest_ago_makes_room(model, monkeypatch):
    monkeypatch.setattr(prefix, "FEATURE_CACHE_TILES", 2)
    features = FeatureCache()
    first, second, third = (picture(model, seed) for seed in range(3))
    rows = np.zeros((4, 8), np.float32)
    features.put(first, rows)
    features.put(second, rows)
    assert features.get(first) is rows
    features.put(third, rows)
    assert features.get(second) is None
    assert features.get(first) is not None
    assert features.get(third) is not None
    monkeypatch.setattr(prefix, "FEATURE_CACHE_TILES", 0)
    features.put(second, rows)  # one is kept, however large
    assert features.get(second) is rows
    assert features.get(third) is None


def test_another_picture_in_the_same_place_is_not_known(model):
    sequence = runner(model)
    texts = ("Before <image> after", picture(model, 3)), ("Before <image> after", picture(model, 4))
    first, second = (prompt_of(model, *each) for each in texts)
    sequence.read(first)
    assert sequence.match(prompt_keys(second)) == second.images[0].start
    expected = runner(model).read(second).copy()
    np.testing.assert_array_equal(sequence.read(second), expected)
