"""GPTQ against a naive implementation, and what each refinement is for."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgevl.quantize import QuantizationError  # noqa: E402
from edgevl.quantize.gptq import (  # noqa: E402  # noqa: E402
    Refinements,
    Statistics,
    largest,
    quantize,
    reaching_scales,
    round_to_nearest,
    searched_scales,
)

PLAIN = Refinements(
    damping=0.01, activation_order=False, searched_scales=False, feedback=0.0, descent=0
)
CPU = torch.device("cpu")


def problem(outputs=24, inputs=256, tokens=1000, seed=0, drift=0.0):
    """A weight, the original's inputs, the quantized model's inputs, and their statistics.

    Inputs are correlated, and some channels are much larger than others, as in real models.
    """
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=generator) / inputs**0.5 + torch.eye(inputs)
    sizes = torch.randn(inputs, generator=generator).exp()
    x = torch.randn(tokens, inputs, generator=generator) @ mixing * sizes
    y = x + drift * x.roll(1, dims=1)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.02
    statistics = Statistics(inputs, CPU)
    statistics.add(x[: tokens // 2], y[: tokens // 2])
    statistics.add(x[tokens // 2 :], y[tokens // 2 :])
    return weight, x, y, statistics


def output_error(weight, rounded, x, y):
    """‖Wx - Qy‖ / ‖Wx‖."""
    target = x @ weight.T
    return float((target - y @ rounded.weight().T).norm() / target.norm())


@pytest.mark.parametrize("bits", [4, 8])
def test_scales_are_float16_and_errors_at_most_half_a_step(bits):
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(1))
    scales = reaching_scales(weight, 32, bits)
    assert scales.shape == (8, 4)
    assert torch.equal(scales, scales.half().float())
    rounded = round_to_nearest(weight, scales, bits)
    assert rounded.integers.dtype == torch.int8
    assert rounded.integers.min() >= -largest(bits) - 1
    assert rounded.integers.max() <= largest(bits)
    steps = scales.repeat_interleave(32, dim=1)
    # The largest is half a step over the end, and float16 moves the end by up to 2^-11 of it.
    slack = 1 + 2.0**-10 * 2**bits
    assert ((weight - rounded.weight()).abs() <= steps / 2 * slack).all()


def test_searched_scales_have_less_weighted_error():
    weight, x, _, _ = problem()
    importance = x.square().mean(0)

    def error(scales):
        rounded = round_to_nearest(weight, scales, 4)
        return ((weight - rounded.weight()).square() * importance).sum(dim=1)

    searched = searched_scales(weight, importance, 64, 4)
    assert torch.equal(searched, searched.half().float())
    assert (error(searched) <= error(reaching_scales(weight, 64, 4)) * (1 + 1e-6)).all()
    assert error(searched).sum() < 0.9 * error(reaching_scales(weight, 64, 4)).sum()


def test_zero_weights_and_inputs_stay_zero():
    weight, _, _, statistics = problem()
    weight[:, :64] = 0
    statistics.hessian[:32] = statistics.hessian[:, :32] = 0
    statistics.drift[:] = 0
    rounded = quantize(weight, statistics, 64, 4, Refinements())
    assert torch.isfinite(rounded.weight()).all()
    assert (rounded.weight()[:, :32] == 0).all()


def naive(weight, hessian, scales, group_size, damping):
    """Optimal Brain Quantization in the fixed order, by its formulas, in float64.

    Frantar et al. 2022, equations 2 and 3: the inverse Hessian of the channels that are left, and
    their change as one is rounded.
    """
    weight, hessian = weight.double().numpy().copy(), hessian.double().numpy().copy()
    hessian += damping * np.diag(hessian).mean() * np.eye(len(hessian))
    inverse = np.linalg.inv(hessian)
    integers = np.empty_like(weight)
    for channel in range(weight.shape[1]):
        step = scales[:, channel // group_size].double().numpy()
        integers[:, channel] = np.clip(np.rint(weight[:, channel] / step), -8, 7)
        error = (weight[:, channel] - integers[:, channel] * step) / inverse[channel, channel]
        weight -= error[:, None] * inverse[channel]
        inverse -= np.outer(inverse[:, channel], inverse[channel]) / inverse[channel, channel]
    return integers


def test_plain_gptq_is_optimal_brain_quantization():
    weight, _, _, statistics = problem(inputs=320)  # more than two blocks
    rounded = quantize(weight, statistics, 64, 4, PLAIN)
    scales = reaching_scales(weight, 64, 4)
    assert torch.equal(rounded.scales, scales)
    expected = naive(weight, statistics.hessian, scales, 64, PLAIN.damping)
    different = (rounded.integers.numpy() != expected).mean()
    # float32 may decide a tie of float64 otherwise, and what follows with it.
    assert different < 0.01


def statistics_of(x):
    statistics = Statistics(x.shape[1], CPU)
    statistics.add(x, x)
    return statistics


@pytest.mark.parametrize("ordered", [False, True])
def test_activation_order_does_not_depend_on_where_channels_are(ordered):
    weight, x, _, _ = problem()
    options = replace(PLAIN, activation_order=ordered)
    generator = torch.Generator().manual_seed(3)
    shuffled = torch.cat([torch.randperm(64, generator=generator) + 64 * g for g in range(4)])
    results = [
        quantize(weight[:, channels], statistics_of(x[:, channels]), 64, 4, options).integers
        for channels in (torch.arange(256), shuffled)
    ]
    same = (results[0][:, shuffled] == results[1]).float().mean()
    assert (same > 0.99) == ordered


def test_every_refinement_lowers_the_error_of_the_output():
    weight, x, y, statistics = problem()
    steps = [
        PLAIN,
        Refinements(searched_scales=False, feedback=0.0, descent=0),
        Refinements(feedback=0.0, descent=0),
        Refinements(feedback=0.0, descent=2),
    ]
    errors = [output_error(weight, quantize(weight, statistics, 64, 4, s), x, y) for s in steps]
    nearest = output_error(
        weight, round_to_nearest(weight, reaching_scales(weight, 64, 4), 4), x, y
    )
    assert sorted([nearest, *errors], reverse=True) == [nearest, *errors]
    assert errors[-1] < 0.75 * nearest


def test_feedback_makes_up_for_changed_inputs():
    weight, x, y, statistics = problem(drift=0.2)
    without, with_feedback = (
        output_error(weight, quantize(weight, statistics, 64, 8, Refinements(feedback=share)), x, y)
        for share in (0.0, 1.0)
    )
    # At 8 bits the drift is all the error there is, and a linear map can undo it.
    assert without > 0.1
    assert with_feedback < 0.1 * without


def test_descent_never_raises_the_error():
    weight, x, y, statistics = problem()
    errors = [
        output_error(
            weight, quantize(weight, statistics, 64, 4, Refinements(descent=n, damping=1e-4)), x, y
        )
        for n in range(4)
    ]
    # Each step is exact but for scales rounded to float16.
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(errors))
    assert errors[3] < errors[0]


def test_fewer_tokens_than_inputs_still_work():
    weight, x, y, statistics = problem(tokens=40)
    rounded = quantize(weight, statistics, 64, 4, Refinements())
    assert output_error(weight, rounded, x, y) < output_error(
        weight, round_to_nearest(weight, reaching_scales(weight, 64, 4), 4), x, y
    )


@pytest.mark.parametrize("field", ["hessian", "drift"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_are_refused(field, value):
    weight, _, _, statistics = problem()
    getattr(statistics, field)[3, 5] = value
    with pytest.raises(QuantizationError, match="not finite"):
        quantize(weight, statistics, 64, 4, Refinements())
