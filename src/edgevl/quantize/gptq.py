"""GPTQ: round a weight one input channel at a time, each error made up for by those that follow.

Frantar et al. 2022 (https://arxiv.org/abs/2210.17323), with what keeps the stored format and was
measured to help (docs/quantization.md has the figures):

- *activation order with static groups*: channels with large inputs are rounded first, while many
  are left to make up for them; scales are chosen beforehand, so that groups stay consecutive;
- *searched scales*: a group's scale is the one of least error, weighted by the size of the inputs;
- *error feedback*: what earlier layers have lost is made up for as well. The target is the output
  that the original gives for its own inputs, so the weight that is rounded is the least-squares
  map from the quantized model's inputs to that (Arai and Ichikawa 2025,
  https://arxiv.org/abs/2504.09629);
- *descent*: at the end, integers and scales are improved in turn, each with all others fixed.

Shapes: O outputs, I inputs, T tokens, J groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from edgevl.quantize.settings import QuantizationError

#: Channels rounded before the rest of the weight is brought up to date.
BLOCK = 16


@dataclass(frozen=True)
class Refinements:
    """What is done beyond plain GPTQ.

    Attributes:
        damping: added to the diagonal of the Hessian, as a fraction of its mean.
        activation_order: round channels by falling size of their inputs.
        searched_scales: choose scales by error, and not so that they reach the largest weight.
        feedback: share of the earlier layers' error to make up for, 0 to 1.
        descent: rounds of improving integers and scales at the end.
    """

    damping: float = 0.01
    activation_order: bool = True
    searched_scales: bool = True
    feedback: float = 0.5
    descent: int = 2


class Statistics:
    """Second moments of a linear layer's inputs: all that GPTQ has to know of them.

    Attributes:
        hessian: float32 [I, I], the sum of x xᵀ over the quantized model's inputs x.
        drift: float32 [I, I], the sum of (y - x) xᵀ, where y is the original's input.
        tokens: how many.
    """

    def __init__(self, inputs: int, device: torch.device) -> None:
        """Start at zero."""
        self.hessian = torch.zeros(inputs, inputs, device=device)
        self.drift = torch.zeros(inputs, inputs, device=device)
        self.tokens = 0

    def add(self, original: Tensor, quantized: Tensor) -> None:
        """Count the inputs of T tokens in both models: float32 [T, I]."""
        self.hessian.addmm_(quantized.T, quantized)
        self.drift.addmm_((original - quantized).T, quantized)
        self.tokens += len(quantized)


def quantize(
    weight: Tensor, statistics: Statistics, group_size: int, bits: int, refinements: Refinements
) -> Rounded:
    """Quantize a weight, or several that have the same inputs, one under the other.

    Args:
        weight: float32 [O, I].
        statistics: of its inputs.
        group_size: inputs that share a scale.
        bits: of an integer.
        refinements: what to do beyond plain GPTQ.

    Raises:
        QuantizationError: the statistics are not finite, or cannot be factorized.
    """
    hessian, drift = statistics.hessian, statistics.drift
    if not (torch.isfinite(hessian).all() and torch.isfinite(drift).all()):
        raise QuantizationError("its inputs are not finite numbers: the weights are damaged")
    order = torch.arange(weight.shape[1], device=weight.device)
    if refinements.activation_order:
        order = hessian.diagonal().argsort(descending=True)
    hessian, factor = _factorized(hessian, order, refinements.damping)
    if refinements.feedback:
        lost = (weight @ drift)[:, order.flip(0)].T
        made_up = torch.cholesky_solve(lost.double(), factor).float()
        weight = weight.clone()
        weight[:, order.flip(0)] += refinements.feedback * made_up.T
    if refinements.searched_scales:
        scales = searched_scales(weight, hessian.diagonal(), group_size, bits)
    else:
        scales = reaching_scales(weight, group_size, bits)
    rounded = _sequential(weight, factor, scales, order, group_size, bits)
    for _ in range(refinements.descent):
        rounded = _descent(weight, hessian, rounded, order, bits)
    return rounded


def _factorized(hessian: Tensor, order: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Return the damped Hessian, and the Cholesky factor of it with channels in reverse ``order``.

    The damping grows tenfold until there is one: few tokens leave directions without any input.

    Returns:
        float32 [I, I] and lower triangular float64 [I, I].
    """
    mean = hessian.diagonal().mean().clamp(min=1e-12)
    reverse = order.flip(0)
    while damping <= 1:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        factor, failed = torch.linalg.cholesky_ex(damped[reverse][:, reverse].double())
        if not failed:
            return damped, factor
        damping *= 10
    raise QuantizationError(
        "the Hessian of its inputs cannot be inverted: use more or other calibration data"
    )


def _sequential(
    weight: Tensor, factor: Tensor, scales: Tensor, order: Tensor, group_size: int, bits: int
) -> Rounded:
    """Round channel by channel in ``order``: GPTQ itself."""
    # The upper Cholesky factor of the inverse Hessian in ``order``: with channels in reverse,
    # inverting the factor of the Hessian gives it. Its row c has what the channels after c take of
    # the error of c.
    identity = torch.eye(len(order), dtype=factor.dtype, device=factor.device)
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False)
    factor = inverse.flip(0, 1).float()
    # Channels are rows here, so that each is contiguous.
    rest = weight.T[order]
    steps = scales.T[order // group_size]
    integers = torch.empty_like(rest)
    for begin in range(0, len(rest), BLOCK):
        block = rest[begin : begin + BLOCK]
        end = begin + len(block)
        errors = torch.empty_like(block)
        for row, place in enumerate(range(begin, end)):
            integers[place] = nearest(block[row], steps[place], bits)
            errors[row] = (block[row] - integers[place] * steps[place]) / factor[place, place]
            block[row + 1 :] -= factor[place, place + 1 : end, None] * errors[row]
        rest[end:].addmm_(factor[begin:end, end:].T, errors, alpha=-1)
    return Rounded(_unordered(integers, order), scales)


def _descent(
    weight: Tensor, hessian: Tensor, rounded: Rounded, order: Tensor, bits: int
) -> Rounded:
    """Improve every scale, then every integer, each exactly and with all others fixed."""
    rounded = _refitted(weight, hessian, rounded)
    group_size = weight.shape[1] // rounded.scales.shape[1]
    steps = rounded.scales.T[order // group_size]
    integers = rounded.integers.T[order].float()
    hessian = hessian[order][:, order]
    # Minus half of the gradient of the squared error to the weight.
    gradient = hessian @ (weight.T[order] - integers * steps)
    for begin in range(0, len(order), BLOCK):
        end = min(begin + BLOCK, len(order))
        block, changes = gradient[begin:end], torch.empty_like(gradient[begin:end])
        for row, place in enumerate(range(begin, end)):
            wanted = integers[place] * steps[place] + block[row] / hessian[place, place]
            integer = nearest(wanted, steps[place], bits)
            changes[row] = (integer - integers[place]) * steps[place]
            integers[place] = integer
            block[row + 1 :] -= hessian[place + 1 : end, place, None] * changes[row]
        gradient[end:].addmm_(hessian[end:, begin:end], changes, alpha=-1)
    return Rounded(_unordered(integers, order), rounded.scales)


def _unordered(integers: Tensor, order: Tensor) -> Tensor:
    """Return rows that are in ``order`` as columns in their own: float32 [I, O] -> int8 [O, I]."""
    result = torch.empty_like(integers, dtype=torch.int8)
    result[order] = integers.to(torch.int8)
    return result.T.contiguous()


def _refitted(weight: Tensor, hessian: Tensor, rounded: Rounded) -> Rounded:
    """Give every group in turn the scale of least error, its integers and all else fixed."""
    integers, scales = rounded.integers.float(), rounded.scales.clone()
    gradient = (weight - rounded.weight()) @ hessian
    group_size = weight.shape[1] // scales.shape[1]
    for group in range(scales.shape[1]):
        columns = slice(group * group_size, (group + 1) * group_size)
        part = integers[:, columns]
        curvature = (part @ hessian[columns, columns]).mul_(part).sum(dim=1)
        slope = (part * gradient[:, columns]).sum(dim=1)
        wanted = scales[:, group] + slope / curvature.clamp(min=1e-30)
        # A group of zeros has no slope. One that would turn its sign keeps its scale.
        wanted = torch.where(wanted > 0, stored(wanted), scales[:, group])
        change = (wanted - scales[:, group])[:, None] * part
        gradient.addmm_(change, hessian[columns], alpha=-1)
        scales[:, group] = wanted
    return Rounded(rounded.integers, scales)


#: Scales tried by `searched_scales`, as fractions of the one that reaches the largest weight: from
#: just enough for it to be within the grid (7.5 / 7 at 4 bits), down to half.
FRACTIONS = tuple(1.08 - 0.02 * step for step in range(30))

_SMALLEST = torch.finfo(torch.float16).smallest_normal
_LARGEST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Rounded:
    """A weight on the grid.

    Attributes:
        integers: int8 [O, I].
        scales: float32 [O, J], each a float16.
    """

    integers: Tensor
    scales: Tensor

    def weight(self) -> Tensor:
        """Return the weight that it stands for: float32 [O, I]."""
        return (_grouped(self.integers.float(), self.scales) * self.scales[..., None]).flatten(1)


def largest(bits: int) -> int:
    """Return the largest integer of the grid; the smallest is one further from zero."""
    return (1 << (bits - 1)) - 1


def reaching_scales(weight: Tensor, group_size: int, bits: int) -> Tensor:
    """Return the scales with which the largest weight of a group is half a step over the end.

    As GPTQ's symmetric quantizer has it: ``2 max|w| / (2^b - 1)``.

    Args:
        weight: float32 [O, I].
        group_size: inputs that share a scale.
        bits: of an integer.

    Returns:
        float32 [O, J], each a float16.
    """
    peaks = weight.unflatten(1, (-1, group_size)).abs().amax(dim=2)
    return stored(peaks / (largest(bits) + 0.5))


def searched_scales(weight: Tensor, importance: Tensor, group_size: int, bits: int) -> Tensor:
    """Return the scales of least squared error, each input weighted by its importance.

    Args:
        weight: float32 [O, I].
        importance: float32 [I], such as the mean square of each input.
        group_size: inputs that share a scale.
        bits: of an integer.

    Returns:
        float32 [O, J], each a float16.
    """
    groups = weight.unflatten(1, (-1, group_size))
    weights = importance.unflatten(0, (-1, group_size))
    reaching = reaching_scales(weight, group_size, bits)
    best = reaching.clone()
    least = torch.full_like(reaching, torch.inf)
    for fraction in FRACTIONS:
        scales = stored(reaching * fraction)
        error = groups - nearest(groups, scales[..., None], bits) * scales[..., None]
        total = torch.einsum("ojg,jg->oj", error.square_(), weights)
        better = total < least
        best[better], least[better] = scales[better], total[better]
    return best


def stored(scales: Tensor) -> Tensor:
    """Round scales to float16 and back; none is zero, so that all can be divided by."""
    return scales.clamp(_SMALLEST, _LARGEST).half().float()


def nearest(weight: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Return the nearest integers of the grid, as float32."""
    end = largest(bits)
    return (weight / scales).round_().clamp_(-end - 1, end)


def round_to_nearest(weight: Tensor, scales: Tensor, bits: int) -> Rounded:
    """Round every weight by itself: [O, I] with scales [O, J]."""
    integers = nearest(_grouped(weight, scales), scales[..., None], bits).flatten(1)
    return Rounded(integers.to(torch.int8), scales)


def _grouped(values: Tensor, scales: Tensor) -> Tensor:
    """Return [O, I] as [O, J, I / J]."""
    return values.unflatten(1, (scales.shape[1], -1))
