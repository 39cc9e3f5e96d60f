"""The whole model in plain NumPy, float32: what every other engine is tested against.

Written to be read, not to be fast. Weight names are those of the ``internvl_chat`` layout.

Shapes: B tiles, P patches and the class token, C vision hidden size, T new tokens, S cached and new
tokens, H text hidden size, N query heads, G key/value heads, D head_dim, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.architecture import PROJECTOR, VISION
from edgevl.engine.base import Engine, Floats, Sequence
from edgevl.errors import CheckpointError, EdgeVLError
from edgevl.machine import this_machine

if TYPE_CHECKING:
    from edgevl.checkpoint import Checkpoint, TextConfig

#: nn.LayerNorm's default, which the projector of the original leaves as it is.
PROJECTOR_NORM_EPS = 1e-5
#: What the names of all tensors of the vision encoder and the projector begin with.
VISION_PREFIXES = (VISION, PROJECTOR)


def layer_norm(x: Floats, weight: Floats, bias: Floats, eps: float) -> Floats:
    """Normalise the last axis to mean 0 and variance 1, then scale and shift."""
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred / np.sqrt(variance + np.float32(eps)) * weight + bias


def rms_norm(x: Floats, weight: Floats, eps: float) -> Floats:
    """Scale the last axis to root mean square 1 (Zhang and Sennrich 2019), then by ``weight``."""
    mean_square = np.square(x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + np.float32(eps)) * weight


def softmax(x: Floats) -> Floats:
    """Softmax over the last axis."""
    exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def erf(x: Floats) -> Floats:
    """Error function to 1.5e-7, Abramowitz and Stegun 7.1.26 (NumPy has none)."""
    t = 1 / (1 + np.float32(0.3275911) * np.abs(x))
    coefficients = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
    polynomial = np.zeros_like(x)
    for coefficient in coefficients:
        polynomial = (polynomial + np.float32(coefficient)) * t
    return np.sign(x) * (1 - polynomial * np.exp(-np.square(x)))


def gelu(x: Floats) -> Floats:
    """GELU in its exact form, as PyTorch's default."""
    return np.float32(0.5) * x * (1 + erf(x * np.float32(1 / np.sqrt(2))))


def silu(x: Floats) -> Floats:
    """Sigmoid linear unit, x · sigmoid(x), by tanh so that exp cannot overflow."""
    return x * np.float32(0.5) * (1 + np.tanh(x * np.float32(0.5)))


def attention(
    query: Floats, key: Floats, value: Floats, allowed: NDArray[np.bool_] | None = None
) -> Floats:
    """Scaled dot-product attention with grouped query heads.

    Args:
        query: [..., N, T, D].
        key: [..., G, S, D] with N a multiple of G; query head n reads key head n // (N / G).
        value: as ``key``.
        allowed: [T, S], False where attention is masked; None where nothing is.

    Returns:
        [..., T, N * D].
    """
    *batch, heads, tokens, head_dim = query.shape
    groups = key.shape[-3]
    query = query.reshape(*batch, groups, heads // groups, tokens, head_dim)
    key, value = key[..., :, None, :, :], value[..., :, None, :, :]
    scores = query @ key.swapaxes(-1, -2) * np.float32(head_dim**-0.5)
    if allowed is not None:
        scores = np.where(allowed, scores, np.float32(-np.inf))
    mixed = (softmax(scores) @ value).reshape(*batch, heads, tokens, head_dim)
    return mixed.swapaxes(-2, -3).reshape(*batch, tokens, heads * head_dim)


def pixel_shuffle(x: Floats, ratio: float, version: str) -> Floats:
    """Trade resolution for channels: [B, W, Y, C] -> [B, W·ratio, Y·ratio, C / ratio²].

    Version ``v1`` leaves the two spatial axes swapped, as the first InternVL did.
    """
    batch, width, height, channels = x.shape
    n = round(1 / ratio)  # whole: see ModelConfig.shuffle
    x = x.reshape(batch, width, height // n, channels * n).transpose(0, 2, 1, 3)
    x = x.reshape(batch, height // n, width // n, channels * n * n)
    return x if version == "v1" else x.transpose(0, 2, 1, 3)


def inverse_frequencies(config: TextConfig) -> Floats:
    """Return the rotary frequencies [D / 2], scaled as ``rope_scaling`` says."""
    exponents = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    frequencies: Floats = (1 / np.float64(config.rope_theta) ** exponents).astype(np.float32)
    scaling = config.rope_scaling
    kind = scaling["rope_type"] if scaling else "default"
    if scaling is None or kind == "default":
        return frequencies
    factor = np.float32(scaling["factor"])
    if kind == "linear":
        return frequencies / factor
    if kind == "llama3":  # Llama 3.1: long waves are slowed, short ones kept, between them a ramp
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = scaling["original_max_position_embeddings"] * frequencies / np.float32(2 * np.pi)
        keep = np.clip((turns - np.float32(low)) / np.float32(high - low), 0, 1)
        return frequencies * (keep + (1 - keep) / factor)
    raise CheckpointError(f"config.json: rope_type {kind!r} is not supported")


def rotate(x: Floats, cos: Floats, sin: Floats) -> Floats:
    """Apply rotary embeddings (Su et al. 2021), halves paired: x [N, T, D], cos [T, D / 2]."""
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)


class ReferenceVision:
    """Vision encoder and projector in NumPy; of the text model nothing is in memory.

    Args:
        checkpoint: an open checkpoint; it may be closed afterwards.
        prefixes: what the canonical names of the tensors to load, as float32, begin with.

    Raises:
        EdgeVLError: the machine has less memory to spare than the weights take.
    """

    def __init__(self, checkpoint: Checkpoint, prefixes: tuple[str, ...] = VISION_PREFIXES) -> None:
        self.config = checkpoint.config
        names = [name for name in checkpoint.names() if name.startswith(prefixes)]
        needed = sum(4 * math.prod(checkpoint.shape(name)) for name in names)
        available = this_machine().available_bytes
        if needed > available:
            raise EdgeVLError(
                f"{checkpoint.path}: the reference engine needs {needed / 2**30:.1f} GiB of memory "
                f"for the weights in float32, {available / 2**30:.1f} GiB are free: use a smaller "
                "model"
            )
        self._weights = {name: checkpoint.tensor(name) for name in names}

    def encode_tiles(self, pixels: Floats) -> Floats:
        """Encode tiles together: float32 [B, 3, tile, tile] -> [B, image_tokens, H]."""
        vision = self.config.vision
        hidden_states = [self._patch_embeddings(pixels)]
        for layer in range(vision.num_hidden_layers):
            prefix = f"vision_model.encoder.layers.{layer}."
            hidden_states.append(self._vision_layer(prefix, hidden_states[-1]))
        patches = hidden_states[self.config.select_layer][:, 1:]  # without the class token
        side = vision.image_size // vision.patch_size
        grid = patches.reshape(len(pixels), side, side, vision.hidden_size)
        x = pixel_shuffle(grid, self.config.downsample_ratio, self.config.ps_version)
        x = x.reshape(len(pixels), self.config.image_tokens, -1)
        w = self._weights
        x = layer_norm(x, w["mlp1.0.weight"], w["mlp1.0.bias"], PROJECTOR_NORM_EPS)
        return self._linear("mlp1.3", gelu(self._linear("mlp1.1", x)))

    def _patch_embeddings(self, pixels: Floats) -> Floats:
        """Cut [B, 3, tile, tile] into patches, embed them, prepend the class token: [B, P, C]."""
        kernel = self._weights["vision_model.embeddings.patch_embedding.weight"]
        hidden_size, channels, size, _ = kernel.shape
        batch, _, height, width = pixels.shape
        patches = pixels.reshape(batch, channels, height // size, size, width // size, size)
        patches = patches.transpose(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)
        x = patches @ kernel.reshape(hidden_size, -1).T
        x += self._weights["vision_model.embeddings.patch_embedding.bias"]
        cls = self._weights["vision_model.embeddings.class_embedding"]
        x = np.concatenate((np.broadcast_to(cls, (batch, 1, hidden_size)), x), axis=1)
        return x + self._weights["vision_model.embeddings.position_embedding"]

    def _vision_layer(self, prefix: str, x: Floats) -> Floats:
        vision, w = self.config.vision, self._weights
        y = self._vision_norm(prefix + "norm1", x)
        query, key, value = np.split(self._linear(prefix + "attn.qkv", y), 3, axis=-1)
        if vision.use_qk_norm:
            query = rms_norm(query, w[prefix + "attn.q_norm.weight"], vision.layer_norm_eps)
            key = rms_norm(key, w[prefix + "attn.k_norm.weight"], vision.layer_norm_eps)
        heads = (*x.shape[:2], vision.num_attention_heads, vision.head_dim)
        query, key, value = (part.reshape(heads).swapaxes(1, 2) for part in (query, key, value))
        y = self._linear(prefix + "attn.proj", attention(query, key, value))
        x = x + w[prefix + "ls1"] * y
        y = gelu(self._linear(prefix + "mlp.fc1", self._vision_norm(prefix + "norm2", x)))
        return x + w[prefix + "ls2"] * self._linear(prefix + "mlp.fc2", y)

    def _vision_norm(self, name: str, x: Floats) -> Floats:
        vision, w = self.config.vision, self._weights
        if vision.norm_type == "rms_norm":
            return rms_norm(x, w[name + ".weight"], vision.layer_norm_eps)
        return layer_norm(x, w[name + ".weight"], w[name + ".bias"], vision.layer_norm_eps)

    def _linear(self, name: str, x: Floats) -> Floats:
        """Apply ``name``: [..., in] -> [..., out]."""
        y = x @ self._weights[name + ".weight"].T
        bias = self._weights.get(name + ".bias")
        return y if bias is None else y + bias


class ReferenceSequence(Sequence):
    """A sequence of a `ReferenceEngine`.

    Attributes:
        keys: of each layer [G, S, D]; rows from ``length`` on are room to grow.
        values: as ``keys``.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        empty = np.empty((config.num_key_value_heads, 0, config.head_dim), np.float32)
        self.keys = [empty] * config.num_hidden_layers
        self.values = [empty] * config.num_hidden_layers

    def append(self, layer: int, key: Floats, value: Floats) -> tuple[Floats, Floats]:
        """Store new keys and values [G, T, D]; return all that are cached, [G, S, D]."""
        end = self.length + key.shape[1]
        for cache, new in ((self.keys, key), (self.values, value)):
            if cache[layer].shape[1] < end:  # grow by half, so that appending stays linear
                groups, _, head_dim = new.shape
                grown = np.empty((groups, max(end, self.length * 3 // 2), head_dim), np.float32)
                grown[:, : self.length] = cache[layer][:, : self.length]
                cache[layer] = grown
            cache[layer][:, self.length : end] = new
        return self.keys[layer][:, :end], self.values[layer][:, :end]


class ReferenceEngine(ReferenceVision, Engine):
    """The model in NumPy. All weights are held in float32.

    Args:
        checkpoint: an open checkpoint; it may be closed afterwards.
        max_context: most positions of a sequence; default and limit is what the model was trained
            for.
        chunk: positions computed at once by ``prefill``.

    Raises:
        EdgeVLError: the machine has less memory to spare than the weights take.
    """

    def __init__(
        self, checkpoint: Checkpoint, max_context: int | None = None, chunk: int = 128
    ) -> None:
        ReferenceVision.__init__(self, checkpoint, prefixes=("",))
        Engine.__init__(self)
        text = self.config.text
        limit = text.max_position_embeddings
        self.max_context = min(max_context or limit, limit)
        self.chunk = chunk
        self._frequencies = inverse_frequencies(text)

    def embed(self, token_ids: NDArray[np.int64]) -> Floats:
        """Look up token embeddings: int [T] -> float32 [T, H]."""
        return self._weights["language_model.model.embed_tokens.weight"][token_ids]

    def new_sequence(self) -> ReferenceSequence:
        """Return a new, empty sequence."""
        return ReferenceSequence(self.config.text)

    def _encode(self, pixels: Floats) -> Floats:
        return self.encode_tiles(pixels)

    def _prefill(self, sequence: ReferenceSequence, embeddings: Floats) -> Floats:
        for begin in range(0, len(embeddings), self.chunk):
            hidden = self._decoder(sequence, embeddings[begin : begin + self.chunk])
        return self._logits(hidden[-1])

    def _decode(self, sequences: list[ReferenceSequence], token_ids: list[int]) -> Floats:
        pairs = zip(sequences, token_ids, strict=True)
        return np.concatenate([self._extend(sequence, [token_id]) for sequence, token_id in pairs])

    def _extend(self, sequence: ReferenceSequence, token_ids: list[int]) -> Floats:
        hidden = self._decoder(sequence, self.embed(np.array(token_ids, np.int64)))
        return np.stack([self._logits(position) for position in hidden])

    def _decoder(self, sequence: ReferenceSequence, x: Floats) -> Floats:
        """Run T new positions through all layers and append them to the cache: [T, H] -> [T, H]."""
        config, tokens = self.config.text, len(x)
        positions = np.arange(sequence.length, sequence.length + tokens, dtype=np.float32)
        angles = positions[:, None] * self._frequencies
        cos, sin = np.cos(angles), np.sin(angles)
        allowed = np.arange(sequence.length + tokens) <= positions[:, None]
        for layer in range(config.num_hidden_layers):
            prefix = f"language_model.model.layers.{layer}."
            y = self._text_norm(prefix + "input_layernorm", x)
            query = self._heads(prefix + "self_attn.q", y, config.num_attention_heads)
            key = self._heads(prefix + "self_attn.k", y, config.num_key_value_heads)
            value = self._heads(prefix + "self_attn.v", y, config.num_key_value_heads)
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
            key, value = sequence.append(layer, key, value)
            x = x + self._linear(prefix + "self_attn.o_proj", attention(query, key, value, allowed))
            y = self._text_norm(prefix + "post_attention_layernorm", x)
            gate = silu(self._linear(prefix + "mlp.gate_proj", y))
            y = gate * self._linear(prefix + "mlp.up_proj", y)
            x = x + self._linear(prefix + "mlp.down_proj", y)
        sequence.length += tokens
        return x

    def _heads(self, name: str, y: Floats, heads: int) -> Floats:
        """Project to heads, with Qwen3's norm of each q and k head: [T, H] -> [heads, T, D]."""
        config = self.config.text
        x = self._linear(name + "_proj", y).reshape(len(y), heads, config.head_dim)
        norm = self._weights.get(name + "_norm.weight")
        if norm is not None:
            x = rms_norm(x, norm, config.rms_norm_eps)
        return x.swapaxes(0, 1)

    def _logits(self, hidden: Floats) -> Floats:
        """Final norm and head of one position: [H] -> [V]."""
        head = self._weights.get("language_model.lm_head.weight")
        if head is None:  # tied
            head = self._weights["language_model.model.embed_tokens.weight"]
        return head @ self._text_norm("language_model.model.norm", hidden)

    def _text_norm(self, name: str, x: Floats) -> Floats:
        return rms_norm(x, self._weights[name + ".weight"], self.config.text.rms_norm_eps)
