"""GPTQ storage: packed integers with a scale and a zero point a group, to float32.

A linear layer of I inputs and O outputs, quantized to b bits in groups of input channels, is

- ``qweight`` int32 [I·b/32, O]: input channel i is in row ``i·b // 32``, from bit ``i·b % 32``;
- ``qzeros`` int32 [groups, O·b/32]: packed likewise along the outputs;
- ``scales`` float [groups, O];
- ``g_idx`` int32 [I], the group of each input channel; if absent, ``i // group_size``.

The layout of AutoGPTQ and GPTQModel (https://github.com/ModelCloud/GPTQModel).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint.config import GPTQConfig
from edgevl.checkpoint.safetensors import StoredTensor
from edgevl.errors import CheckpointError

#: What the names of a quantized layer's tensors end in; ``g_idx`` may be absent.
PARTS = ("qweight", "qzeros", "scales", "g_idx")


@dataclass(frozen=True)
class GPTQWeight:
    """The stored tensors of one quantized linear layer, and how to read them."""

    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None
    config: GPTQConfig

    def group_indices(self) -> NDArray[np.int64]:
        """Return the group of each input channel: int64 [I].

        Raises:
            CheckpointError: an index is not that of a group.
        """
        groups = self.scales.shape[0]
        if self.g_idx is None:
            inputs = self.qweight.shape[0] * 32 // self.config.bits
            return np.arange(inputs) // group_length(inputs, self.config)
        indices = self.g_idx.data.astype(np.int64)
        if indices.size and (indices.min() < 0 or indices.max() >= groups):
            raise CheckpointError(
                f"g_idx has groups {indices.min()} to {indices.max()}, expected 0 to {groups - 1}"
            )
        return indices

    def zeros(self) -> NDArray[np.uint8]:
        """Return the zero points: uint8 [groups, O]."""
        packed = self.qzeros.data.view(np.uint32)
        bits = self.config.bits
        if self.config.checkpoint_format == "gptq":
            # Stored minus one. Added to the whole word and not to each field, as GPTQModel, so
            # that a borrow made when a zero point of 0 was stored is undone.
            packed = packed + np.uint32(0x11111111 if bits == 4 else 0x01010101)
        return unpack(packed, bits)

    def is_symmetric(self) -> bool:
        """Whether every zero point is the middle of the range, as symmetric quantization has it."""
        return bool((self.zeros() == 1 << (self.config.bits - 1)).all())

    def is_in_order(self) -> bool:
        """Whether the groups are consecutive input channels (no act-order)."""
        if self.g_idx is None:
            return True
        inputs = len(self.g_idx.data)
        expected = np.arange(inputs) // group_length(inputs, self.config)
        return np.array_equal(self.g_idx.data, expected)

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weight: float32 [O, I].

        Raises:
            CheckpointError: ``g_idx`` names a group that is not there.
        """
        groups = self.group_indices()
        weight = unpack(self.qweight.data.view(np.uint32).T, self.config.bits).astype(np.float32)
        weight -= self.zeros().astype(np.float32).T[:, groups]
        weight *= self.scales.to_float32().T[:, groups]
        return weight


def group_length(inputs: int, config: GPTQConfig) -> int:
    """Return how many input channels share a scale."""
    return inputs if config.group_size < 0 else config.group_size


def stored_config(
    inputs: int, words: int, groups: int, named: Sequence[GPTQConfig], has_g_idx: bool
) -> GPTQConfig:
    """Return how a layer is stored: that of the settings of ``config.json`` which its shapes have.

    Args:
        inputs: its input channels.
        words: rows of ``qweight``.
        groups: rows of ``scales``.
        named: the settings.
        has_g_idx: whether ``g_idx`` is stored, and so the group of every channel.

    Raises:
        CheckpointError: its bits are not supported, or none or several of the settings fit.
    """
    if not named:
        raise CheckpointError("is quantized, but no quantization_config says how")
    bits, rest = divmod(32 * words, inputs)
    if rest:
        raise CheckpointError(
            f"has qweight in {words} rows, no whole number of bits for {inputs} inputs; "
            "config.json and the weights do not belong together"
        )
    if bits not in (4, 8):
        raise CheckpointError(
            f"is stored with {bits} bits; supported: 4, 8 (take another quantization, or the "
            "original checkpoint)"
        )
    fits = [
        config
        for config in named
        if config.bits == bits
        and config.group_size
        and -(-inputs // group_length(inputs, config)) == groups
    ]
    if not fits:
        known = ", ".join(
            f"{config.bits} bits in groups of {config.group_size}" for config in named
        )
        raise CheckpointError(
            f"is stored with {bits} bits and {groups} groups of its {inputs} inputs, but "
            f"quantization_config, its `dynamic` included, has {known[:200]}; the files do not "
            "belong together"
        )
    lengths = {min(group_length(inputs, config), inputs) for config in fits}
    if len(lengths) > 1 and not has_g_idx:
        raise CheckpointError(f"has no g_idx, and its groups may be of {sorted(lengths)} inputs")
    return fits[0]


def fields_per_word(outputs: int, inputs: int, bits: int) -> int:
    """Return how many integers a 32-bit word holds.

    Raises:
        CheckpointError: the sizes of a layer are not multiples of that.
    """
    per_word = 32 // bits
    if inputs % per_word or outputs % per_word:
        raise CheckpointError(
            f"{outputs} outputs and {inputs} inputs are not multiples of {per_word}, as "
            f"{bits}-bit GPTQ needs"
        )
    return per_word


def packed_shapes(outputs: int, inputs: int, config: GPTQConfig) -> dict[str, tuple[int, ...]]:
    """Return the shapes that a layer's tensors must have.

    Raises:
        CheckpointError: the sizes are not multiples of what a 32-bit word holds.
    """
    per_word = fields_per_word(outputs, inputs, config.bits)
    groups = -(-inputs // group_length(inputs, config))
    return {
        "qweight": (inputs // per_word, outputs),
        "qzeros": (groups, outputs // per_word),
        "scales": (groups, outputs),
        "g_idx": (inputs,),
    }


def pack_layer(
    integers: NDArray[np.int8], scales: NDArray[np.float32], bits: int
) -> dict[str, NDArray[np.generic]]:
    """Return the tensors of a symmetric linear layer, in the format ``gptq``.

    Args:
        integers: int8 [O, I], of ``bits`` bits, signed.
        scales: float32 [O, J], each a float16, for J groups of consecutive inputs.
        bits: 4 or 8.

    Returns:
        ``qweight`` int32 [I * bits / 32, O], ``qzeros`` int32 [J, O * bits / 32], ``scales``
        float16 [J, O] and ``g_idx`` int32 [I].

    Raises:
        CheckpointError: the sizes are not multiples of what a 32-bit word holds.
    """
    outputs, inputs = integers.shape
    groups = scales.shape[1]
    middle = 1 << (bits - 1)
    fields_per_word(outputs, inputs, bits)
    offset = (integers.astype(np.int16) + middle).astype(np.uint8)
    # The zero point is stored minus one: see `GPTQWeight.zeros`.
    zeros = np.full((groups, outputs), middle - 1, np.uint8)
    return {
        "qweight": np.ascontiguousarray(pack(offset, bits).T).view(np.int32),
        "qzeros": pack(zeros, bits).view(np.int32),
        "scales": np.ascontiguousarray(scales.T.astype(np.float16)),
        "g_idx": (np.arange(inputs) // (inputs // groups)).astype(np.int32),
    }


def pack(fields: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Put fields into 32-bit words, lowest bits first: uint8 [R, C] -> uint32 [R, C * bits / 32].

    The inverse of `unpack`.
    """
    if bits == 4:
        fields = fields[:, ::2] | fields[:, 1::2] << np.uint8(4)
    return np.ascontiguousarray(fields).view("<u4")


def unpack(words: NDArray[np.uint32], bits: int) -> NDArray[np.uint8]:
    """Take 32-bit words apart, lowest bits first: uint32 [R, C] -> uint8 [R, C * 32 / bits]."""
    # The bytes of a little-endian word are already in that order.
    octets = np.ascontiguousarray(words, "<u4").view(np.uint8)
    if bits == 8:
        return octets
    fields = np.empty((*octets.shape, 2), np.uint8)
    fields[..., 0] = octets & 0x0F
    fields[..., 1] = octets >> 4
    return fields.reshape(octets.shape[0], -1)
