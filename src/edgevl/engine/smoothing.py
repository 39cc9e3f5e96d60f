"""Smoothing: what makes the inputs of a linear layer easier to round, and leaves what it computes.

As in SmoothQuant (Xiao et al. 2023). Some channels of what a linear layer takes in are far larger
than the others, and one scale for a token leaves the others few steps. So channel c is divided by
s_c, and column c of the weight multiplied with it; whatever produces the channel absorbs the
division: the norm before, or for ``attn.proj`` the value rows of ``attn.qkv``, for attention mixes
tokens but not channels. What ``mlp.fc2`` and ``mlp1.3`` take in comes out of a GELU, which absorbs
nothing. s_c = peak of the channel ^ strength / peak of the column ^ (1 - strength), to the nearest
power of two: multiplying with those is exact in any floating-point format.

`edgevl quantize` sees the peaks on calibration tiles. When the CPU engine loads a checkpoint that
did not go through it there are none, but where a norm is the producer its weights tell most: what
is normed has variance 1 before them, so that channel c seldom is beyond `DEVIATIONS` |γ_c| + |β_c|.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint

Floats = NDArray[np.float32]

#: What absorbs the division, by the end of the linear layer's weight.
_PRODUCERS = {
    "attn.qkv.weight": "norm1",
    "attn.proj.weight": "attn.qkv",
    "mlp.fc1.weight": "norm2",
    "mlp1.1.weight": "mlp1.0",
}
#: Factors are within two to the power of this, either way.
MAX_EXPONENT = 10
#: Standard deviations from the mean to the peak that a norm's weights are taken to tell.
DEVIATIONS = 3.0
#: Strength with such peaks, which are guessed, so that the weights count for more. For the towers
#: of docs/quantization.md (Vision) 0.2 to 0.4 are alike, and 0.5 is worse.
LOADING_STRENGTH = 0.3


def producer(weight: str) -> str | None:
    """Return what absorbs a division of a linear layer's inputs, without ``.weight``, or None."""
    for end, name in _PRODUCERS.items():
        if weight.endswith(end):
            return weight.removesuffix(end) + name
    return None


def smoothing_factor(peaks: Floats, columns: Floats, strength: float) -> Floats:
    """Return the factor of each channel.

    Args:
        peaks: largest magnitude of each channel, float32 [columns].
        columns: largest magnitude in each column of the weight, float32 [columns].
        strength: 0 evens out the weight alone, 1 the activations alone.

    Returns:
        Powers of two, float32 [columns], half of them at most 1.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logarithm = strength * np.log2(peaks) - (1 - strength) * np.log2(columns)
    usable = np.isfinite(logarithm)  # else the channel or its column is zero throughout
    if not usable.any():
        return np.ones_like(peaks)
    middle = np.quantile(logarithm[usable], 0.5, method="lower")
    exponents = np.where(usable, logarithm - middle, 0).round()
    return np.exp2(exponents.clip(-MAX_EXPONENT, MAX_EXPONENT), dtype=np.float32)


def loading_factor(checkpoint: Checkpoint, weight: str) -> Floats:
    """Return the factors of a linear layer whose producer is a norm, with no calibration.

    Args:
        checkpoint: has the linear layer and the norm.
        weight: of the linear layer.

    Returns:
        Powers of two, float32 [columns].
    """
    norm = producer(weight)
    peaks = np.float32(DEVIATIONS) * np.abs(checkpoint.tensor(f"{norm}.weight"))
    if f"{norm}.bias" in checkpoint.names():
        peaks += np.abs(checkpoint.tensor(f"{norm}.bias"))
    values = checkpoint.tensor(weight)
    columns = np.maximum(values.max(axis=0), -values.min(axis=0))  # abs would be a copy of all
    return smoothing_factor(peaks, columns, LOADING_STRENGTH)
