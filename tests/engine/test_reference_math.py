"""The building blocks of the reference engine against their definitions, written out naively."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from edgevl.engine import reference as ref


@pytest.fixture
def random():
    return np.random.default_rng(0)


def normal(random, *shape):
    return random.standard_normal(shape, dtype=np.float32)


def test_erf_is_within_the_published_error():
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    exact = np.array([math.erf(v) for v in x])
    # 1.5e-7 of the formula, and float32 rounding of a sum of five terms up to 1.5.
    assert np.abs(ref.erf(x) - exact).max() < 1.5e-7 + 5 * 1.5 * 2**-24


def test_gelu_and_silu():
    x = np.linspace(-20, 20, 401, dtype=np.float32)
    gelu = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)]
    silu = [v / (1 + math.exp(-v)) for v in x.astype(float)]
    np.testing.assert_allclose(ref.gelu(x), gelu, rtol=1e-6, atol=4e-6)
    np.testing.assert_allclose(ref.silu(x), silu, rtol=1e-6, atol=2e-6)


def test_silu_does_not_overflow():
    with np.errstate(all="raise"):
        assert ref.silu(np.float32([-200, 200])).tolist() == [0, 200]


def test_layer_norm(random):
    x, weight, bias = normal(random, 3, 8), normal(random, 8), normal(random, 8)
    for row, got in zip(x, ref.layer_norm(x, weight, bias, 1e-2), strict=True):
        mean = sum(row) / 8
        variance = sum((v - mean) ** 2 for v in row) / 8
        expected = (row - mean) / math.sqrt(variance + 1e-2) * weight + bias
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_rms_norm(random):
    x, weight = normal(random, 3, 8), normal(random, 8)
    for row, got in zip(x, ref.rms_norm(x, weight, 1e-2), strict=True):
        expected = row / math.sqrt(sum(v * v for v in row) / 8 + 1e-2) * weight
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_grouped_heads(random, masked):
    heads, groups, tokens, cached, head_dim = 6, 2, 3, 5, 4
    query = normal(random, heads, tokens, head_dim)
    key, value = normal(random, groups, cached, head_dim), normal(random, groups, cached, head_dim)
    allowed = np.arange(cached) <= np.arange(2, 5)[:, None]
    got = ref.attention(query, key, value, allowed if masked else None)
    assert got.shape == (tokens, heads * head_dim)
    for head in range(heads):
        for token in range(tokens):
            seen = [s for s in range(cached) if allowed[token, s] or not masked]
            group = head // 3
            scores = np.array([math.exp(query[head, token] @ key[group, s] / 2) for s in seen])
            mixed = scores @ value[group, seen] / sum(scores)
            np.testing.assert_allclose(
                got[token, head * head_dim : (head + 1) * head_dim], mixed, rtol=1e-4, atol=1e-6
            )


def test_attention_survives_large_scores():
    query = np.full((1, 1, 4), 1e4, np.float32)
    key = np.stack([np.full((2, 4), 1e4, np.float32)])
    value = np.ones((1, 2, 4), np.float32)
    assert np.isfinite(ref.attention(query, key, value, None)).all()


def test_pixel_shuffle_gathers_two_by_two_blocks():
    side, channels = 4, 3
    x = np.arange(side * side * channels, dtype=np.float32).reshape(1, side, side, channels)
    v2 = ref.pixel_shuffle(x, 0.5, "v2")
    assert v2.shape == (1, 2, 2, 12)
    for row in range(2):
        for column in range(2):
            block = [x[0, 2 * row + r, 2 * column + c] for r in range(2) for c in range(2)]
            np.testing.assert_array_equal(v2[0, row, column], np.concatenate(block))
    np.testing.assert_array_equal(ref.pixel_shuffle(x, 0.5, "v1"), v2.transpose(0, 2, 1, 3))


def rope(**scaling):
    """The part of a text configuration that rotary embeddings read."""
    return SimpleNamespace(head_dim=8, rope_theta=10_000.0, rope_scaling=scaling or None)


def test_rotation_depends_on_distance_only(random):
    frequencies = ref.inverse_frequencies(rope())
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    query, key = normal(random, 1, 1, 8), normal(random, 1, 1, 8)

    def score(at, other):
        turned = [
            ref.rotate(x, np.cos(p * frequencies)[None], np.sin(p * frequencies)[None])
            for x, p in ((query, at), (key, other))
        ]
        return float(np.sum(turned[0] * turned[1]))

    assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), rel=1e-3)
    assert score(5, 5) == pytest.approx(float(np.sum(query * key)), rel=1e-5)


def test_linear_scaling_slows_all_frequencies():
    slowed = ref.inverse_frequencies(rope(rope_type="linear", factor=4.0))
    np.testing.assert_allclose(slowed, ref.inverse_frequencies(rope()) / 4, rtol=1e-6)


def test_llama3_scaling_keeps_short_waves_and_slows_long_ones():
    scaled = ref.inverse_frequencies(
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=1000,
        )
    )
    # Waves of 6, 63, 628 and 6283 positions: 159, 16, 1.6 and 0.16 turns in 1000.
    turns = 1000 * 0.01 / (2 * math.pi)
    keep = (turns - 1) / (4 - 1)
    expected = [1, 0.1, 0.01 * (keep + (1 - keep) / 8), 0.001 / 8]
    np.testing.assert_allclose(scaled, expected, rtol=1e-5)


@pytest.mark.parametrize("n", [3, 5, 49])
def test_pixel_shuffle_by_ratios_that_floats_cannot_hold(n):
    assert ref.pixel_shuffle(np.zeros((1, n, 2 * n, 3), np.float32), 1 / n, "v2").shape == (
        1, 1, 2, 3 * n * n
    )  # fmt: skip
