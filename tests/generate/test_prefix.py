"""What of a prompt is computed again: nothing that is there, all that is not."""

import numpy as np
import pytest
from PIL import Image

import edgevl
from edgevl.generate import prefix
from edgevl.generate.prefix import FeatureCache, Slot, drain, prompt_keys
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


def test_every_place_where_a_prefix_may_end(model):
    """Also inside a picture, of which the rest is then taken."""
    prompt = prompt_of(model, "Before <image> after", picture(model, 0))
    expected = drain(runner(model).prefill(prompt))[0].copy()
    for length in range(len(prompt.token_ids) + 1):
        again = runner(model)
        drain(again.prefill(prompt))
        again.truncate(length)
        logits, cached_tokens = drain(again.prefill(prompt))
        assert cached_tokens == min(length, len(prompt.token_ids) - 1)
        np.testing.assert_array_equal(logits, expected)


@pytest.mark.parametrize("step", [1, 5, 64])
def test_work_in_steps_is_the_same_work(model, step):
    prompt = prompt_of(model, "Before <image> after", picture(model, 1))
    expected = drain(runner(model).prefill(prompt))[0].copy()
    stepwise = runner(model)
    np.testing.assert_array_equal(drain(stepwise.prefill(prompt, step))[0], expected)
    # Left in the middle: what was done stays, and is all that is known.
    left = runner(model)
    steps = left.prefill(prompt, step)
    for _ in range(3):
        next(steps, None)
    steps.close()
    assert left.match(prompt_keys(prompt)) == len(left) == left.sequence.length
    np.testing.assert_array_equal(drain(left.prefill(prompt, step))[0], expected)


def test_sequences_share_the_features_of_pictures(model):
    features = FeatureCache()
    prompt = prompt_of(model, "What?", picture(model, 2))
    runners = [runner(model, features) for _ in range(2)]
    before = model.engine.timings().tiles
    for each in runners:
        drain(each.prefill(prompt))
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
    drain(sequence.prefill(first))
    assert sequence.match(prompt_keys(second)) == second.images[0].start
    expected = drain(runner(model).prefill(second))[0].copy()
    np.testing.assert_array_equal(drain(sequence.prefill(second))[0], expected)
