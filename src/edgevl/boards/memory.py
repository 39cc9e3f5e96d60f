"""What a model takes of a board's memory, computed from its shapes."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgevl.axera.layout import BoardShape
from edgevl.boards.timing import BITS, layer_weights
from edgevl.checkpoint.architecture import PROJECTOR, VISION, expected_tensors
from edgevl.checkpoint.config import ModelConfig


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of NPU memory (CMM), part by part, and of the host's memory.

    These are the weights and the buffers that follow from the shapes. What the compiler adds for
    its instructions and intermediate results is in no public document and not counted.

    Attributes:
        text_layers: linear weights of all decoder layers, once for all shape groups.
        post: the head, in INT8.
        vision: encoder and projector, two bytes a weight; 0 without vision.
        kv_cache: keys and values of all layers.
        embeddings: the embedding in bfloat16, which the host maps from its file.
    """

    text_layers: int
    post: int
    vision: int
    kv_cache: int
    embeddings: int

    @property
    def npu(self) -> int:
        """All that lies in NPU memory."""
        return self.text_layers + self.post + self.vision + self.kv_cache


def plan_memory(
    config: ModelConfig, shape: BoardShape, *, weight_bits: int = 4, vision: bool = True
) -> MemoryPlan:
    """Return what a model takes.

    Args:
        config: the model.
        shape: what it is compiled for.
        weight_bits: of the layers' linear weights, 4 or 8.
        vision: whether it has its vision encoder.
    """
    text = config.text
    embedding = text.vocab_size * text.hidden_size
    encoder = sum(
        prod(dimensions)
        for name, dimensions in expected_tensors(config).items()
        if name.startswith((VISION, PROJECTOR))
    )
    rows = max(shape.context + 1, shape.max_prefill + shape.chunk)
    return MemoryPlan(
        text_layers=round(text.num_hidden_layers * layer_weights(text) * BITS[weight_bits] / 8),
        post=embedding,
        vision=2 * encoder if vision else 0,
        kv_cache=4 * text.num_hidden_layers * rows * text.num_key_value_heads * text.head_dim,
        embeddings=2 * embedding,
    )
