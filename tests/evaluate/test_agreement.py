"""Perplexity, agreement and divergence of logits."""

import math

import numpy as np
import pytest

from edgevl.errors import EdgeVLError
from edgevl.evaluate import agreement
from edgevl.evaluate.agreement import Comparison, Perplexity

#: Two positions over three tokens, as probabilities.
REFERENCE = np.array([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])
OTHER = np.array([[0.25, 0.5, 0.25], [0.2, 0.2, 0.6]])
NEXT = np.array([1, 2])


def logits(probabilities, shift=0.0):
    """Logits are known up to a constant, which must not matter."""
    return (np.log(probabilities) + shift).astype(np.float32)


def test_by_hand():
    comparison = Comparison()
    comparison.add(logits(REFERENCE, 3), logits(OTHER, -7), NEXT)
    assert comparison.model.tokens == 2
    assert comparison.reference.perplexity == pytest.approx((0.25 * 0.8) ** -0.5, rel=1e-6)
    assert comparison.model.perplexity == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-6)
    assert comparison.token_agreement == 0.5
    # Not symmetric: the reference weighs the logarithms.
    first = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    second = 0.2 * math.log(0.5) + 0.8 * math.log(0.8 / 0.6)
    assert comparison.kl_divergence == pytest.approx((first + second) / 2, rel=1e-6)


def test_one_model_alone():
    perplexity = Perplexity()
    perplexity.add(logits(OTHER), NEXT)
    assert perplexity.perplexity == pytest.approx((0.5 * 0.6) ** -0.5, rel=1e-6)


def test_of_itself():
    comparison = Comparison()
    values = np.random.default_rng(0).normal(0, 5, (7, 100)).astype(np.float32)
    comparison.add(values, values.copy(), np.arange(7))
    assert comparison.kl_divergence == 0
    assert comparison.token_agreement == 1
    assert comparison.model.perplexity == comparison.reference.perplexity


@pytest.mark.parametrize("block", [1, 250, 1 << 20])
def test_blocks_make_no_difference(monkeypatch, block):
    monkeypatch.setattr(agreement, "BLOCK", block)
    one, other = np.random.default_rng(0).normal(0, 3, (2, 9, 100)).astype(np.float32)
    ids = np.random.default_rng(1).integers(0, 100, 9)
    comparison, alone = Comparison(), Perplexity()
    for rows in (slice(0, 4), slice(4, 4), slice(4, 9)):
        comparison.add(one[rows], other[rows], ids[rows])
        alone.add(other[rows], ids[rows])
    p, q = (np.exp(x.astype(float)) / np.exp(x.astype(float)).sum(1)[:, None] for x in (one, other))
    assert comparison.kl_divergence == pytest.approx((p * np.log(p / q)).sum() / 9)
    assert comparison.token_agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert comparison.model.perplexity == pytest.approx(np.exp(-np.log(q[range(9), ids]).mean()))
    assert (alone.tokens, alone.perplexity) == (9, pytest.approx(comparison.model.perplexity))


def test_large_logits_do_not_overflow():
    perplexity = Perplexity()
    perplexity.add(np.array([[3e4, 3e4, -3e4]], np.float32), np.array([0]))
    assert perplexity.perplexity == pytest.approx(2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("index", "name"), [(0, "the original"), (1, "the quantized model")])
def test_logits_that_are_not_finite_are_named(value, index, name):
    comparison = Comparison("the original", "the quantized model")
    pair = [logits(REFERENCE), logits(OTHER)]
    comparison.add(*pair, NEXT)
    pair[index][1, 2] = value
    with pytest.raises(EdgeVLError, match=f"{name} are not all finite at predicted token 3"):
        comparison.add(*pair, NEXT)


def test_impossible_tokens():
    perplexity = Perplexity()
    perplexity.add(np.array([[3e4, -3e4]], np.float32), np.array([1]))
    with pytest.raises(EdgeVLError, match="exceeds what a float can hold"):
        _ = perplexity.perplexity


def test_wrong_shapes_and_nothing():
    comparison = Comparison()
    with pytest.raises(ValueError, match="beside"):
        comparison.add(logits(REFERENCE), logits(OTHER)[:, :2], NEXT)
    for each, name in (
        (comparison.model, "perplexity"),
        (comparison, "token_agreement"),
        (comparison, "kl_divergence"),
    ):
        with pytest.raises(EdgeVLError, match="no tokens"):
            getattr(each, name)
