"""One decoder layer in PyTorch, in four stages: what goes into which linear layers.

A stage's linear layers have the same input. The text model is walked through a layer at a time, so
that no more than one layer's weights are in memory.

Shapes: T tokens of one sequence, H hidden size, N query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from edgevl.checkpoint import Checkpoint, TextConfig
from edgevl.checkpoint.architecture import TEXT
from edgevl.engine.reference import inverse_frequencies

#: The linear layers of each stage.
STAGES = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
#: All of them.
LINEARS = tuple(name for stage in STAGES for name in stage)

Weights = dict[str, Tensor]


def layer_name(index: int) -> str:
    """Return what the names of a layer's tensors begin with."""
    return f"{TEXT}layers.{index}."


def load_layer(checkpoint: Checkpoint, index: int, device: torch.device) -> Weights:
    """Return a layer's tensors by their names in it, float32."""
    prefix = layer_name(index)
    return {
        name.removeprefix(prefix): load_tensor(checkpoint, name, device)
        for name in checkpoint.names()
        if name.startswith(prefix)
    }


def load_tensor(checkpoint: Checkpoint, name: str, device: torch.device) -> Tensor:
    """Return a tensor as float32, in memory of its own."""
    # Only where it is a view of the file, float32 as stored, does this copy.
    return torch.from_numpy(np.require(checkpoint.tensor(name), requirements=["W"])).to(device)


class DecoderLayer:
    """A layer with its weights, which may be replaced one by one.

    Attributes:
        weights: by name in the layer, such as ``mlp.up_proj.weight``: float32 [O, I].
    """

    def __init__(self, config: TextConfig, weights: Weights) -> None:
        """Take the weights; they are not copied."""
        self.weights = weights
        self._config = config

    def inputs(self, stage: int, x: Tensor) -> Tensor:
        """Return the input of a stage's linear layers: [T, I].

        Args:
            stage: index in `STAGES`.
            x: the residual stream, [T, H]: before the layer for the first two stages, after
                attention for the others.
        """
        y = self._norm("input_layernorm" if stage < 2 else "post_attention_layernorm", x)
        if stage == 1:
            return self._attention(y)
        if stage == 3:
            gate = functional.silu(self._linear("mlp.gate_proj", y))
            return gate * self._linear("mlp.up_proj", y)
        return y

    def advance(self, stage: int, x: Tensor) -> Tensor:
        """Return the residual stream after the output of stage 1 or 3: [T, H] -> [T, H]."""
        return x + self._linear(STAGES[stage][0], self.inputs(stage, x))

    def outputs(self, stage: int, x: Tensor) -> list[Tensor]:
        """Return what each linear layer of a stage gives, for errors to be measured."""
        y = self.inputs(stage, x)
        return [self._linear(name, y) for name in STAGES[stage]]

    def _linear(self, name: str, y: Tensor) -> Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights.get(name + ".bias")
        return functional.linear(y, weight, bias)

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self.weights[name + ".weight"]
        return functional.rms_norm(x, (x.shape[-1],), weight, self._config.rms_norm_eps)

    def _attention(self, y: Tensor) -> Tensor:
        config = self._config
        query = self._heads("q", y, config.num_attention_heads)
        key = self._heads("k", y, config.num_key_value_heads)
        value = self._heads("v", y, config.num_key_value_heads)
        cos, sin = rotary(config, len(y), y.device)
        mixed = functional.scaled_dot_product_attention(
            _rotate(query, cos, sin)[None],
            _rotate(key, cos, sin)[None],
            value[None],
            is_causal=True,
            enable_gqa=True,
        )[0]
        return mixed.transpose(0, 1).flatten(1)

    def _heads(self, part: str, y: Tensor, heads: int) -> Tensor:
        """Project and split: [T, H] -> [heads, T, D], queries and keys normed where they are."""
        x = self._linear(f"self_attn.{part}_proj", y).unflatten(1, (heads, -1))
        if self._config.use_qk_norm and part != "v":
            x = self._norm(f"self_attn.{part}_norm", x)
        return x.transpose(0, 1)


def rotary(config: TextConfig, tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of the rotary embedding of the first T positions: [T, D / 2]."""
    frequencies = torch.from_numpy(inverse_frequencies(config)).to(device)
    angles = torch.arange(tokens, device=device, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
