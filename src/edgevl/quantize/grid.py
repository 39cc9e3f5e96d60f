"""The grid that a weight is rounded to: integers with one positive scale a row and group.

Symmetric quantization to b bits stores integers from ``-2^(b-1)`` to ``2^(b-1) - 1``, here without
the offset of ``2^(b-1)`` that the GPTQ layout adds. Scales are rounded to float16, as they are
stored, before anything is rounded to them.

Shapes: O outputs, I inputs, J = I / group_size groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

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
