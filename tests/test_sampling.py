"""Sampling: each filter against its definition."""

import numpy as np
import pytest

from edgevl.errors import EdgeVLError, PromptError
from edgevl.generate.sampling import Sampler, SamplingParams, _place

LOGITS = np.log(np.array([0.5, 0.25, 0.15, 0.1], np.float32))


def frequencies(draws=4000, logits=LOGITS, **params):
    """Share of each token among many draws."""
    sampler = Sampler(SamplingParams(**{"temperature": 1.0, "seed": 7} | params), [])
    counts = np.bincount([sampler.choose(logits) for _ in range(draws)], minlength=len(logits))
    return counts / draws


def test_greedy_takes_the_first_of_the_most_likely():
    assert Sampler(SamplingParams(), []).choose(np.float32([1, 3, 3, 2])) == 1


def test_temperature_one_draws_from_the_distribution():
    # Standard error of a share is at most sqrt(0.25 / 4000) = 0.008; four of them.
    np.testing.assert_allclose(frequencies(), [0.5, 0.25, 0.15, 0.1], atol=0.032)


def test_low_temperature_sharpens():
    squared = np.array([0.5, 0.25, 0.15, 0.1]) ** 2
    np.testing.assert_allclose(frequencies(temperature=0.5), squared / squared.sum(), atol=0.032)


def test_tiny_temperature_is_greedy_and_does_not_overflow():
    assert frequencies(draws=50, temperature=1e-30)[0] == 1


@pytest.mark.parametrize(
    ("params", "kept"),
    [
        ({"top_k": 1}, [0]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 100}, [0, 1, 2, 3]),
        ({"top_p": 0.4}, [0]),
        ({"top_p": 0.6}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.4}, [0, 1]),
        ({"min_p": 1.0}, [0]),
        ({"top_k": 3, "top_p": 0.8}, [0, 1]),  # of the three: 0.56, 0.28, 0.17
    ],
)
def test_filters_keep_exactly(params, kept):
    assert np.flatnonzero(frequencies(draws=500, **params)).tolist() == kept


def test_filters_work_on_unsorted_logits():
    assert np.flatnonzero(frequencies(draws=200, logits=LOGITS[::-1], top_k=2)).tolist() == [2, 3]


def test_top_k_takes_the_first_of_equals():
    logits = np.array([1, 3, 2, 3, 3, 0], np.float32)
    assert np.flatnonzero(frequencies(draws=200, logits=logits, top_k=2)).tolist() == [1, 3]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, np.nextafter(1.0, 0)])
def test_a_share_of_the_total_has_its_place(share):
    weights = np.zeros(2000, np.float32)
    weights[[3, 511, 512, 1300]] = 1
    assert _place(weights, share) == (3, 511, 512, 1300)[int(share * 4)]
    assert _place(weights[3:4], share) == 0


@pytest.mark.parametrize("top_p", [0.2, 0.5, 0.9])
def test_the_nucleus_among_many(top_p):
    logits = np.random.default_rng(0).standard_normal(60).astype(np.float32)
    probabilities = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum()
    order = np.argsort(-probabilities)
    count = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    found = frequencies(draws=6000, logits=logits, top_p=top_p)
    assert np.flatnonzero(found).tolist() == sorted(order[:count])
    kept = probabilities[order[:count]] / probabilities[order[:count]].sum()
    np.testing.assert_allclose(found[order[:count]], kept, atol=0.03)


def test_same_seed_same_draws_and_other_seed_other():
    flat = np.zeros(1000, np.float32)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=1, seed=seed), [])
        return [sampler.choose(flat) for _ in range(20)]

    assert draw(1) == draw(1) != draw(2)


def test_no_seed_differs_from_run_to_run():
    flat = np.zeros(100_000, np.float32)
    first, second = (
        Sampler(SamplingParams(temperature=1), []),
        Sampler(SamplingParams(temperature=1), []),
    )
    assert [first.choose(flat) for _ in range(4)] != [second.choose(flat) for _ in range(4)]


def test_repetition_penalty_covers_prompt_and_answer():
    logits = np.float32([4, 3, 2.5, -1])
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0])
    # 4 / 2 = 2 < 3; then 3 / 2 = 1.5 < 2.5; then 2.5 / 2 = 1.25, and 2 is the largest again.
    assert [sampler.choose(logits) for _ in range(3)] == [1, 2, 0]
    assert logits.tolist() == [4, 3, 2.5, -1]  # the caller's array is left alone


def test_repetition_penalty_lowers_negative_logits():
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), prompt_ids=[0])
    assert sampler.choose(np.float32([-1, -1.5])) == 1


@pytest.mark.parametrize("bad", [[0, np.nan], [0, np.inf], [-np.inf, -np.inf]])
def test_logits_that_are_not_finite_are_an_error(bad):
    with pytest.raises(EdgeVLError, match="not finite"):
        Sampler(SamplingParams(), []).choose(np.float32(bad))


@pytest.mark.parametrize("params", [{}, {"repetition_penalty": 1.5}, {"top_p": 0.9}])
def test_tokens_with_a_logit_of_minus_infinity_are_never_drawn(params):
    logits = np.float32([-np.inf, -1, -np.inf, -1.5])
    assert Sampler(SamplingParams(**params), [0, 1]).choose(logits) in (1, 3)
    assert np.flatnonzero(frequencies(draws=200, logits=logits, **params)).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0),
        ("seed", -1),
        ("stop", ("",)),
    ],
)
def test_values_out_of_range_name_field_and_value(name, value):
    with pytest.raises(PromptError, match=f"^{name} is "):
        SamplingParams(**{name: value})


def test_one_stop_string_may_be_given_alone():
    assert SamplingParams(stop="###").stop == ("###",)


@pytest.mark.parametrize(
    "params",
    [
        {"max_tokens": 1.5},  # would never be reached exactly
        {"max_tokens": "5"},
        {"top_k": 2.5},
        {"seed": 0.5},
        {"temperature": None},
        {"top_p": "1"},
        {"stop": (5,)},
    ],
)
def test_values_of_the_wrong_type_are_refused(params):
    with pytest.raises(PromptError, match=f"{next(iter(params))} is .*: it must be"):
        SamplingParams(**params)


def test_numpy_numbers_are_numbers():
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5)).max_tokens == 3


def test_the_tiniest_temperature_is_greedy_and_quiet(recwarn):
    assert frequencies(draws=5, temperature=5e-324)[0] == 1
    assert not recwarn.list
