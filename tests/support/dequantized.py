"""A packed model seen as a checkpoint, so that the reference can run the very same weights."""

from functools import partial
from unittest import mock

import numpy as np

import packed_layout
from edgevl.checkpoint.architecture import LM_HEAD
from edgevl.engine import ReferenceEngine
from edgevl.engine import reference as ref
from edgevl.engine.packed import factor_name, pack_in_memory
from edgevl.engine.plan import make_plan
from edgevl.engine.smoothing import producer

#: Biases of a pair of key channels that are larger are not rounded with the keys.
LARGE_BIAS = 4


class Dequantized:
    """Takes the place of a `Checkpoint` for `ReferenceEngine`, with the weights as packed.

    The head is never tied: a packed head differs from the embedding.
    """

    def __init__(self, checkpoint, precision, pool):
        self.path, self.config = checkpoint.path, checkpoint.config
        self.plan = make_plan(checkpoint, precision)
        packed = pack_in_memory(checkpoint, self.plan, pool)
        self.tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
        self.lower = None  # of the head, if it is in two parts
        for matrix in self.plan.matrices:
            weight = packed_layout.unpack(
                matrix.format, packed[matrix.name], matrix.rows, matrix.cols, matrix.group
            )
            if matrix.format == "split":
                _, self.lower = packed_layout.unpack_split(
                    packed[matrix.name], matrix.rows, matrix.cols, matrix.group
                )
            for part in matrix.parts:
                name = LM_HEAD if matrix.name == "text.head" else part.weight
                rows = panel_rows(part)
                values = weight[rows].reshape(checkpoint.shape(part.weight))
                self.tensors[name] = values
            if matrix.norm:
                for part in (".weight", ".bias"):
                    name = producer(matrix.parts[0].weight) + part
                    if name in self.tensors:
                        self.tensors[name] = self.tensors[name] / packed[factor_name(matrix)]

    def names(self):
        return list(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def tensor(self, name):
        return self.tensors[name]


def panel_rows(part):
    """Rows of the packed matrix that a part's rows are."""
    row = np.arange(part.rows)
    return (part.first_panel + row // 16 * part.panel_step) * 16 + row % 16


class RoundedReference(ReferenceEngine):
    """The reference engine, rounding activations where the native engine does.

    Inputs of linear layers to int8, with a scale for each token and group, or to bfloat16; queries
    and the weights of attention to bfloat16; keys, less their large biases, and values to what
    ``kv_cache`` says. With int8 weights of qkv, all of a vision layer's attention to int8, its
    weights in so many ``weight_steps``.
    """

    def __init__(self, dequantized, kv_cache="bf16", weight_steps=255, **options):
        super().__init__(dequantized, **options)
        self.weight_steps = weight_steps
        self.lower = dequantized.lower
        self.attention = {"bf16": bf16_attention, "int8": int8_attention}[kv_cache]
        self.matrices = {
            LM_HEAD if matrix.name == "text.head" else part.weight: matrix
            for matrix in dequantized.plan.matrices
            for part in matrix.parts
        }

    def _linear(self, name, x):
        return super()._linear(name, self.rounded(name + ".weight", x))

    def rounded(self, weight, x):
        matrix = self.matrices.get(weight)
        if matrix is None:  # of a vision layer whose output is not used
            return x
        return to_bf16(x) if matrix.format == "bf16" else to_int8(x, matrix.group)

    def _patch_embeddings(self, pixels):
        return super()._patch_embeddings(to_bf16(pixels))

    def _logits(self, hidden):
        normed = self._text_norm("language_model.model.norm", hidden)
        rounded = self.rounded(LM_HEAD, normed)
        logits = self._weights[LM_HEAD] @ rounded
        # What the lower part adds is computed in float32; here of all rows, as they are few.
        return logits if self.lower is None else logits + self.lower @ (normed - rounded)

    def _decoder(self, sequence, x):
        layers = iter(range(self.config.text.num_hidden_layers))

        def attention(query, key, value, allowed):
            biases = self._rotated_biases(next(layers), key.shape[1])
            return self.attention(query, key - biases, value, allowed, biases)

        with mock.patch.object(ref, "attention", attention):
            return super()._decoder(sequence, x)

    def _rotated_biases(self, layer, positions):
        """Return what large biases of the keys are at every position: [G, S, D]."""
        text, prefix = self.config.text, f"language_model.model.layers.{layer}.self_attn.k_"
        biases = np.zeros((text.num_key_value_heads, 1, text.head_dim), np.float32)
        if prefix + "proj.bias" in self._weights and prefix + "norm.weight" not in self._weights:
            pairs = self._weights[prefix + "proj.bias"].reshape(-1, 1, 2, text.head_dim // 2)
            large = np.hypot(*np.moveaxis(pairs, -2, 0)) > LARGE_BIAS
            biases = np.where(large[..., None, :], pairs, 0).reshape(biases.shape)
        angles = np.arange(positions, dtype=np.float32)[:, None] * self._frequencies
        return ref.rotate(biases, np.cos(angles), np.sin(angles))

    def _vision_layer(self, prefix, x):
        qkv = self.matrices.get(prefix + "attn.qkv.weight")
        int8 = qkv is not None and qkv.format == "int8"
        attention = partial(all_int8_attention, self.weight_steps) if int8 else bf16_attention
        with mock.patch.object(ref, "attention", attention):
            return super()._vision_layer(prefix, x)


def to_bf16(x):
    """Round to bfloat16, nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) & np.uint32(0xFFFF0000)
    return rounded.astype(np.uint32).view(np.float32)


def to_int8(x, group):
    """Round to int8 with a scale for each group of the last axis, and back."""
    cols = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -cols % group)])
    integers, scales = int8_parts(padded.reshape(*x.shape[:-1], -1, group))
    return (integers * scales).reshape(padded.shape)[..., :cols]


def int8_parts(x):
    """Round the last axis to int8: the integers, as float32, and their scale."""
    scales = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scales == 0, np.float32(1), scales)), scales


def bf16_attention(query, key, value, allowed=None, biases=None):
    """`reference.attention` with bfloat16 operands; keys have ``biases`` besides."""
    ones = np.ones((*value.shape[:-1], 1), np.float32)
    exact = bias_scores(query, biases)
    return rounded_attention(to_bf16(query), to_bf16(key), to_bf16(value), ones, allowed, exact)


def all_int8_attention(steps, query, key, value):
    """`reference.attention` in int8: keys and values less their means, values by channel.

    Weights have so many steps to the largest; where that may be 1.5 % off, as many to each step.
    """
    mean = value.mean(axis=-2, keepdims=True)
    queries, keys = int8_parts(query), int8_parts(key - key.mean(axis=-2, keepdims=True))
    values = np.multiply(*int8_parts((value - mean).swapaxes(-1, -2))).swapaxes(-1, -2)
    scores = np.multiply(*queries) @ np.multiply(*keys).swapaxes(-1, -2)
    scores *= np.float32(query.shape[-1] ** -0.5)
    exact = rough_exp(scores - scores.max(axis=-1, keepdims=True)) * np.float32(steps)
    few = (exact**2).mean(axis=-1, keepdims=True) < 1 / (12 * 0.015**2)
    weights = np.where(few, np.rint(exact * steps) / np.float32(steps), np.rint(exact))
    mixed = (weights @ values / exact.sum(axis=-1, keepdims=True) + mean).astype(np.float32)
    *batch, heads, tokens, head_dim = mixed.shape
    return mixed.swapaxes(-2, -3).reshape(*batch, tokens, heads * head_dim)


def rough_exp(x):
    """The native engine's, 8e-5 off, for weights in bytes: with another one many would tip."""
    x = np.maximum(x.astype(np.float64) / np.log(2), -126)
    whole = np.rint(x)
    y = np.polyval([5.51713231e-2, 2.42611331e-1, 6.93261089e-1, 9.99928047e-1], x - whole)
    return np.ldexp(y, whole.astype(np.int32))


def int8_attention(query, key, value, allowed=None, biases=None):
    """`reference.attention` with keys and values in int8; each has a scale of its own."""
    keys, scales = int8_parts(key)
    exact = bias_scores(query, biases)
    return rounded_attention(to_bf16(query), keys * scales, *int8_parts(value), allowed, exact)


def bias_scores(query, biases):
    """What biases [G, S, D] add to the scores, unrounded; 0 where there are none."""
    return 0 if biases is None else grouped(query, len(biases)) @ biases[:, None].swapaxes(-1, -2)


def grouped(query, groups):
    """[..., N, T, D] -> [..., G, N / G, T, D]."""
    *batch, heads, tokens, head_dim = query.shape
    return query.reshape(*batch, groups, heads // groups, tokens, head_dim)


def rounded_attention(query, key, value, value_scale, allowed=None, added=0):
    """Attention with bfloat16 weights that bring the values' scales."""
    *batch, heads, tokens, head_dim = query.shape
    query = grouped(query, key.shape[-3])
    key, value = key[..., :, None, :, :], value[..., :, None, :, :]
    value_scale = value_scale[..., :, None, :, :].swapaxes(-1, -2)
    scores = (query @ key.swapaxes(-1, -2) + added) * np.float32(head_dim**-0.5)
    if allowed is not None:
        scores = np.where(allowed, scores, np.float32(-np.inf))
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = to_bf16(weights * value_scale) @ value / weights.sum(axis=-1, keepdims=True)
    mixed = mixed.reshape(*batch, heads, tokens, head_dim)
    return mixed.swapaxes(-2, -3).reshape(*batch, tokens, heads * head_dim)
