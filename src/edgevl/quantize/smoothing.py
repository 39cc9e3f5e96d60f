"""SmoothQuant (Xiao et al. 2023): outliers of activations moved into weights.

Some channels of what a linear layer takes in are far larger than the others, and one scale for a
token leaves the others few steps. So channel c is divided by s_c, and column c of the weight
multiplied with it; whatever produces the channel absorbs the division: the norm before, or for
``attn.proj`` the value rows of ``attn.qkv``, for attention mixes tokens but not channels. What
``mlp.fc2`` and ``mlp1.3`` take in comes out of a GELU, which absorbs nothing.

s_c = peak of the channel ^ strength / peak of the column ^ (1 - strength), to the nearest power of
two: multiplying with those is exact in any floating-point format, so the stored model computes what
the original computes, to the last bit. (Only F16 has so little room below that numbers less than
6e-5 lose bits: each is off by 3e-8 at most.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from edgevl.checkpoint import Checkpoint
from edgevl.quantize.settings import QuantizationError

#: What absorbs the division, by the end of the linear layer's weight.
_PRODUCERS = {
    "attn.qkv.weight": "norm1",
    "attn.proj.weight": "attn.qkv",
    "mlp.fc1.weight": "norm2",
    "mlp1.1.weight": "mlp1.0",
}
#: Factors are within two to the power of this, either way.
MAX_EXPONENT = 10
#: Largest magnitude that a stored type holds.
_LARGEST = {"F16": 65504.0, "BF16": 3.3895e38, "F32": 3.4028e38, "F64": 3.4028e38}


def producer(weight: str) -> str | None:
    """Return what absorbs a division of a linear layer's inputs, without ``.weight``, or None."""
    for end, name in _PRODUCERS.items():
        if weight.endswith(end):
            return weight.removesuffix(end) + name
    return None


def smoothing_factor(peaks: Tensor, weight: Tensor, strength: float) -> Tensor:
    """Return the factor of each channel.

    Args:
        peaks: largest magnitude of each channel over the calibration, [columns].
        weight: of the linear layer, [rows, columns].
        strength: 0 evens out the weight alone, 1 the activations alone.

    Returns:
        Powers of two, [columns], half of them at most 1.
    """
    columns = weight.abs().amax(0)
    logarithm = strength * peaks.log2() - (1 - strength) * columns.log2()
    usable = logarithm.isfinite()  # else the channel or its column is zero throughout
    if not usable.any():
        return torch.ones_like(peaks)
    exponents = (logarithm - logarithm[usable].median()).round()
    exponents = exponents.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    return torch.exp2(torch.where(usable, exponents, 0))


class SmoothedTensors(Mapping[str, NDArray[np.float32]]):
    """The tensors that smoothing changes, by canonical name; each is computed when asked for.

    Args:
        checkpoint: the original, open as long as this is used.
        factors: float32 [columns] by the weight of the linear layer.
    """

    def __init__(self, checkpoint: Checkpoint, factors: Mapping[str, NDArray[np.float32]]) -> None:
        #: As given.
        self.factors = dict(factors)
        self._checkpoint = checkpoint
        self._rows: dict[str, NDArray[np.float32]] = {}
        known = set(checkpoint.names())
        for weight, factor in factors.items():
            for part in (".weight", ".bias"):
                name = f"{producer(weight)}{part}"
                if name in known:
                    self._rows[name] = factor

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        """Return a changed tensor as float32.

        Raises:
            KeyError: the tensor is not changed.
            QuantizationError: the type in which it is stored does not hold its values.
        """
        if name not in self:
            raise KeyError(name)
        values = np.array(self._checkpoint.tensor(name))
        if name in self.factors:
            values *= self.factors[name]
        if name in self._rows:
            factor = self._rows[name]
            rows = values[-len(factor) :]  # of qkv, the last third
            rows /= factor.reshape(-1, *[1] * (values.ndim - 1))
        stored = self._checkpoint.stored(name).dtype
        peak = np.abs(values).max()
        if not peak <= _LARGEST[stored]:
            raise QuantizationError(
                f"{self._checkpoint.path}: tensor {name!r} reaches {peak:g} when smoothed, which "
                f"{stored} does not hold: quantize a checkpoint in BF16"
            )
        return values

    def __contains__(self, name: object) -> bool:
        return name in self.factors or name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.factors, *self._rows]))

    def __len__(self) -> int:
        return len(self.factors.keys() | self._rows.keys())
