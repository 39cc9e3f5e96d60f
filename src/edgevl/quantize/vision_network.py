"""The vision encoder in PyTorch, layer by layer, its linear layers exact or rounded.

What is rounded is rounded as the CPU engine does: weights to INT8 with a scale for each row,
activations with a scale for each token and group of columns, both symmetric within ±127 and to the
nearest even; or all to bfloat16. Where qkv is INT8, attention is too. The engine sums in integers
and here it is float32, which is all the difference.

Only the weights of the layer at hand are in memory. Shapes: B tiles, P patches and the class token,
C vision hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import PROJECTOR, VISION, vision_layers, vision_linears
from edgevl.engine.plan import MatrixPlan, vision_matrices
from edgevl.engine.reference import PROJECTOR_NORM_EPS
from edgevl.engine.smoothing import loading_factor
from edgevl.quantize.decoder import load_tensor

#: Most channels of a head whose attention the engine computes in INT8.
MAX_INT8_CHANNELS = 256
#: Steps of an attention weight in a byte, from zero to the row's largest (AVX2 and Arm: 127).
WEIGHT_STEPS = 255
#: Squares of the weights, in steps and for each position, that are too few for one byte each: their
#: errors, 1 / 12 in squares, may take the result 1.5 % off.
LEAST_SQUARES = 1 / (12 * 0.015**2)
#: 2^x for x in [-1/2, 1/2] as the engine has it for such weights, the highest power first: with
#: another one, many would be rounded to the next step.
EXP2 = (5.51713231e-2, 2.42611331e-1, 6.93261089e-1, 9.99928047e-1)

#: Called with a weight's name and what its layer takes in, [tokens, columns], tile by tile.
Observer = Callable[[str, Tensor], object]


@dataclass(frozen=True)
class Rounding:
    """How the linear layers compute.

    Attributes:
        matrices: the plan of each weight that is rounded, by name; the others are float32.
        factors: what divides the inputs of a linear layer and multiplies the columns of its
            weight, float32 [columns], by the weight's name.
    """

    matrices: Mapping[str, MatrixPlan] = field(default_factory=dict)
    factors: Mapping[str, Tensor] = field(default_factory=dict)


#: The original.
EXACT = Rounding()


def linear_of(
    weight: Tensor,
    bias: Tensor | None = None,
    matrix: MatrixPlan | None = None,
    factor: Tensor | None = None,
) -> Callable[[Tensor], Tensor]:
    """Return a linear layer: [tokens, columns] -> [tokens, rows].

    Args:
        weight: float32 [rows, columns].
        bias: float32 [rows], or None.
        matrix: the plan by which it is rounded, or None.
        factor: of `Rounding`, or None.
    """
    int8 = matrix is not None and matrix.format == "int8"
    if factor is not None:
        weight = weight * factor
    if matrix is not None:
        weight = to_int8(weight) if int8 else to_bfloat16(weight)

    def linear(x: Tensor) -> Tensor:
        if factor is not None:
            x = x / factor
        if matrix is not None:
            x = to_int8(x, matrix.group) if int8 else to_bfloat16(x)
        return functional.linear(x, weight, bias)

    return linear


class VisionNetwork:
    """Vision encoder and projector of a checkpoint; nothing is loaded until it is needed."""

    def __init__(self, checkpoint: Checkpoint, device: str = "cpu") -> None:
        self.config = checkpoint.config
        layers = vision_layers(checkpoint.config)
        linears = vision_linears(checkpoint.config, layers)
        #: The weights of each stage: of the layers of the encoder that run, then the projector.
        self.stages = [linears[4 * stage : 4 * stage + 4] for stage in range(layers + 1)]
        self.path = checkpoint.path
        self._checkpoint = checkpoint
        self.device = torch.device(device)
        self._known = frozenset(checkpoint.names())

    def tensor(self, name: str) -> Tensor:
        """Return a stored tensor on the device, float32."""
        return load_tensor(self._checkpoint, name, self.device)

    def as_loaded(self) -> Rounding:
        """Return what the CPU engine does in INT8 with the checkpoint as it is.

        It keeps no linear layer in bfloat16, also where an earlier quantization asks for that.
        """
        config = self.config
        if config.vision_keep is not None:
            config = replace(config, vision_keep=())
        plans = {matrix.parts[0].weight: matrix for matrix in vision_matrices(config, "int8")}
        factors = {}
        for name, matrix in plans.items():
            if matrix.norm:
                factor = loading_factor(self._checkpoint, name)
                factors[name] = torch.from_numpy(factor).to(self.device)
                self._checkpoint.release()
        return Rounding(plans, factors)

    def embed(self, tiles: NDArray[np.float32], rounding: Rounding = EXACT) -> Tensor:
        """Embed patches: float32 [B, 3, tile, tile] -> [B, P, C]. The engine's are bfloat16."""
        name = VISION + "embeddings."
        kernel = self.tensor(name + "patch_embedding.weight")
        pixels = torch.tensor(tiles, device=self.device)
        if rounding.matrices:
            kernel, pixels = to_bfloat16(kernel), to_bfloat16(pixels)
        bias = self.tensor(name + "patch_embedding.bias")
        size = kernel.shape[-1]
        # Not conv2d, which rounds to TensorFloat-32 on a GPU.
        patches = functional.unfold(pixels, size, stride=size).mT
        x = functional.linear(patches, kernel.flatten(1), bias)
        first = self.tensor(name + "class_embedding").expand(len(x), -1, -1)
        return torch.cat((first, x), 1) + self.tensor(name + "position_embedding")

    def run(
        self, stage: int, x: Tensor, rounding: Rounding = EXACT, observe: Observer | None = None
    ) -> Tensor:
        """Run a layer, [B, P, C] -> [B, P, C], or the projector, which gives the features."""
        if stage + 1 < len(self.stages):
            x = self._layer(stage, x, rounding, observe)
        else:
            x = self._project(x, rounding, observe)
        self._checkpoint.release()
        return x

    def _layer(self, index: int, x: Tensor, rounding: Rounding, observe: Observer | None) -> Tensor:
        name, vision = f"{VISION}encoder.layers.{index}.", self.config.vision
        qkv = self._linear(name + "attn.qkv", rounding, observe)
        proj = self._linear(name + "attn.proj", rounding, observe)
        fc1 = self._linear(name + "mlp.fc1", rounding, observe)
        fc2 = self._linear(name + "mlp.fc2", rounding, observe)
        norm1, norm2 = self._norm(name + "norm1"), self._norm(name + "norm2")
        scale1, scale2 = self.tensor(name + "ls1"), self.tensor(name + "ls2")
        norms = [
            self._norm(f"{name}attn.{part}_norm") if vision.use_qk_norm else torch.nn.Identity()
            for part in "qk"
        ]
        scores = rounding.matrices.get(name + "attn.qkv.weight")
        attend = attention_of(scores, vision.head_dim)

        def tile(x: Tensor) -> Tensor:
            query, key, value = qkv(norm1(x)).chunk(3, -1)
            query, key = norms[0](query), norms[1](key)
            heads = (len(x), vision.num_attention_heads, vision.head_dim)
            parts = (part.reshape(heads).transpose(0, 1) for part in (query, key, value))
            x = x + scale1 * proj(attend(*parts).transpose(0, 1).flatten(1))
            return x + scale2 * fc2(functional.gelu(fc1(norm2(x))))

        return torch.stack([tile(one) for one in x])

    def _project(self, x: Tensor, rounding: Rounding, observe: Observer | None) -> Tensor:
        """Shuffle pixels and project: [B, P, C] -> [B, image_tokens, text hidden size]."""
        config = self.config
        side, n = config.vision.image_size // config.vision.patch_size, config.shuffle
        x = x[:, 1:].reshape(len(x), side // n, n, side // n, n, -1)
        order = (0, 3, 1, 2, 4, 5) if config.ps_version == "v1" else (0, 1, 3, 2, 4, 5)
        x = x.permute(order).reshape(len(x), config.image_tokens, -1)
        weight, bias = self.tensor(PROJECTOR + "0.weight"), self.tensor(PROJECTOR + "0.bias")
        fc1 = self._linear(PROJECTOR + "1", rounding, observe)
        fc2 = self._linear(PROJECTOR + "3", rounding, observe)

        def tile(x: Tensor) -> Tensor:
            x = functional.layer_norm(x, weight.shape, weight, bias, PROJECTOR_NORM_EPS)
            return fc2(functional.gelu(fc1(x)))

        return torch.stack([tile(one) for one in x])

    def _linear(
        self, name: str, rounding: Rounding, observe: Observer | None
    ) -> Callable[[Tensor], Tensor]:
        weight = name + ".weight"
        linear = linear_of(
            self.tensor(weight),
            self.tensor(name + ".bias") if name + ".bias" in self._known else None,
            rounding.matrices.get(weight),
            rounding.factors.get(weight),
        )
        if observe is None:
            return linear

        def observed(x: Tensor) -> Tensor:
            observe(weight, x)
            return linear(x)

        return observed

    def _norm(self, name: str) -> Callable[[Tensor], Tensor]:
        weight, eps = self.tensor(name + ".weight"), self.config.vision.layer_norm_eps
        if name + ".bias" not in self._known:  # norms of queries and keys never have one
            return lambda x: functional.rms_norm(x, weight.shape, weight, eps)
        bias = self.tensor(name + ".bias")
        return lambda x: functional.layer_norm(x, weight.shape, weight, bias, eps)


def to_int8(x: Tensor, group: int | None = None) -> Tensor:
    """Round to ±127 steps and back, a scale for each ``group`` of the last axis (default: all)."""
    cols = x.shape[-1]
    group = group or cols
    padded = functional.pad(x, (0, -cols % group))
    groups = padded.reshape(*x.shape[:-1], -1, group)
    scales = groups.abs().amax(-1, keepdim=True) / 127
    # As the engine does it, for weights in bfloat16 are often halfway between two steps.
    inverse = torch.where(scales > 0, 1 / scales, 0)
    return ((groups * inverse).round() * scales).flatten(-2)[..., :cols]


def to_bfloat16(x: Tensor) -> Tensor:
    """Round to bfloat16, nearest even, and back."""
    return x.bfloat16().float()


def attention_of(
    qkv: MatrixPlan | None, head_dim: int
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return attention of [heads, P, head_dim] each, computed as the plan of ``qkv`` implies."""

    def in_bfloat16(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = to_bfloat16(query) @ to_bfloat16(key).mT * head_dim**-0.5
        weights = torch.exp(scores - scores.amax(-1, keepdim=True))
        return to_bfloat16(weights) @ to_bfloat16(value) / weights.sum(-1, keepdim=True)

    def in_int8(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # What keys have in common changes no weight; what values have comes back with the result.
        mean = value.mean(-2, keepdim=True)
        query, key = to_int8(query), to_int8(key - key.mean(-2, keepdim=True))
        value = to_int8((value - mean).mT).mT
        scores = query @ key.mT * (head_dim**-0.5 / math.log(2))
        steps = exp2(scores - scores.amax(-1, keepdim=True) + math.log2(WEIGHT_STEPS))
        two = (steps * steps).sum(-1, keepdim=True) < LEAST_SQUARES * steps.shape[-1]
        weights = torch.where(two, (steps * WEIGHT_STEPS).round() / WEIGHT_STEPS, steps.round())
        return weights @ value / steps.sum(-1, keepdim=True) + mean

    if qkv is None:
        return functional.scaled_dot_product_attention
    return in_int8 if qkv.format == "int8" and head_dim <= MAX_INT8_CHANNELS else in_bfloat16


def exp2(x: Tensor) -> Tensor:
    """Return 2^x, good to 8e-5."""
    x = x.clamp(min=-126)
    whole = x.round()
    result = torch.zeros_like(x)
    for coefficient in EXP2:
        result = result * (x - whole) + coefficient
    return torch.ldexp(result, whole)
