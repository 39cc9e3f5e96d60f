"""What a model takes on a board: memory, and time, published or estimated for other shapes.

Published are the times of each shape group of one model on one chip, InternVL3.5-1B with INT4
layers and an INT8 head on the AX650N in mode NPU3 (the README of AXERA-TECH's
InternVL3_5-1B_GPTQ_INT4.axera). For that model, these are returned as they are. Others are scaled:

- Decoding reads a layer's weights and its whole cache once a token, and time is taken as
  proportional to these bytes. The published times amount to 17 GB/s for a layer and 20 GB/s for the
  head, both of which are plausible for the memory, not for the arithmetic.
- A prefill chunk without history scales with weights times tokens, but takes no less than reading
  the weights. What history adds scales with queries times keys.

Of other models on the AX650N (published rates in brackets) decoding is estimated at 33.5 tokens/s
for InternVL3-1B in INT8 (26.67), 5.4 for Qwen2.5-VL-3B in INT8 (6.2), 4.2 and 2.4 for Qwen2.5-7B in
INT4 and INT8 (4.8, 2.6): a quarter too fast at worst. What a call costs whatever its size is not
known, so much smaller models come out too fast.

On the AX630C no group has been timed in public. Its estimates are the AX650's times the ratio of
what M5Stack measured of InternVL3-1B on both chips (docs.m5stack.com, StackFlow): for decoding the
tokens a second, 26.67 against 9.78, and for prefill, which is arithmetic, the vision encoder's
time, 393.08 against 2267.89 ms. These two are also all that is public on vision alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

from edgevl.axera.layout import BoardShape
from edgevl.checkpoint.architecture import (
    PROJECTOR,
    VISION,
    expected_tensors,
    matrices,
    text_layer,
)
from edgevl.checkpoint.config import INTERNVIT_300M, ModelConfig, TextConfig, VisionConfig
from edgevl.synth.presets import PRESETS

#: Published times in ms: of a layer decoding a token after 2047, of a layer prefilling 128 tokens
#: after each history, and of the final norm and the head.
DECODE_MS = 0.987
PREFILL_MS = {
    0: 2.208,
    128: 2.562,
    256: 2.804,
    384: 3.173,
    512: 3.517,
    640: 3.807,
    768: 4.079,
    896: 4.387,
    1024: 4.713,
}
POST_MS = 7.954

#: Published times in ms of InternViT-300M on one tile of 448 x 448, as compiled for InternVL3-1B.
VISION_MS = {"ax650": 393.08, "ax630c": 2267.89}

#: How much longer than the AX650 each chip takes to decode and to prefill.
DECODE_FACTOR = {"ax650": 1.0, "ax630c": 26.67 / 9.78}
PREFILL_FACTOR = {"ax650": 1.0, "ax630c": VISION_MS["ax630c"] / VISION_MS["ax650"]}

#: Stored bits a weight: INT4 has a 16-bit scale for every 128.
BITS = {4: 4.125, 8: 8.0}

# The model and the shape that the published times are of, and what of the model counts.
_TEXT = PRESETS["internvl3_5-1b"].config.text
_SHAPE = BoardShape(context=2047, chunk=128, max_prefill=1024)
_COUNTS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "use_qk_norm",
)


def group_times_ms(
    text: TextConfig, shape: BoardShape, *, target: str = "ax650", weight_bits: int = 4
) -> tuple[float, ...]:
    """Return how long one layer takes in each shape group, in ms: decode, then the prefill groups.

    Args:
        text: the text model.
        shape: what it is compiled for.
        target: a name in `edgevl.boards.settings.TARGETS`.
        weight_bits: of the layers' linear weights, 4 or 8.
    """
    published, weights = _bytes_read(_TEXT, _SHAPE, 4), layer_weights(text)
    weights_ms = DECODE_MS * (weights * BITS[weight_bits] / 8) / published
    decode = DECODE_MS * _bytes_read(text, shape, weight_bits) / published
    chunks = shape.chunk / _SHAPE.chunk
    work = weights / layer_weights(_TEXT) * chunks
    heads = text.num_attention_heads * text.head_dim
    attention = heads / (_TEXT.num_attention_heads * _TEXT.head_dim) * chunks
    prefill = [
        max(PREFILL_MS[0] * work, weights_ms) + attention * (_prefill_ms(history) - PREFILL_MS[0])
        for history in shape.histories()
    ]
    # Rounded, so that scaling by one leaves the published figures as they were written.
    return (
        round(decode * DECODE_FACTOR[target], 6),
        *(round(ms * PREFILL_FACTOR[target], 6) for ms in prefill),
    )


def post_time_ms(text: TextConfig, *, target: str = "ax650") -> float:
    """Return how long final norm and head take for one token, in ms; the head is in INT8."""
    scale = text.vocab_size * text.hidden_size / (_TEXT.vocab_size * _TEXT.hidden_size)
    return round(POST_MS * scale * DECODE_FACTOR[target], 6)


def vision_time_ms(vision: VisionConfig, *, target: str = "ax650") -> float | None:
    """Return how long the vision encoder takes for a tile, in ms, or None if it is another one."""
    return VISION_MS[target] if vision == INTERNVIT_300M else None


def is_published(
    text: TextConfig, shape: BoardShape, *, target: str = "ax650", weight_bits: int = 4
) -> bool:
    """Tell whether the times are the published ones, not an estimate."""
    return (
        target == "ax650"
        and weight_bits == 4
        and all(getattr(text, name) == getattr(_TEXT, name) for name in _COUNTS)
        and (shape.context, shape.chunk) == (_SHAPE.context, _SHAPE.chunk)
        and shape.max_prefill <= _SHAPE.max_prefill
    )


def layer_weights(text: TextConfig) -> int:
    """Return how many weights the linear layers of one decoder layer have."""
    linears = (linear for matrix in matrices(text_layer(text)) for linear in matrix.linears)
    return sum(linear.outputs * linear.inputs for linear in linears)


def _bytes_read(text: TextConfig, shape: BoardShape, weight_bits: int) -> float:
    """Return what a layer reads to decode a token: weights, keys, values."""
    cache = 4 * shape.context * text.num_key_value_heads * text.head_dim
    return layer_weights(text) * BITS[weight_bits] / 8 + cache


def _prefill_ms(history: int) -> float:
    """Return the published time after ``history`` positions, on straight lines between them."""
    points = list(PREFILL_MS.items())
    for (start, start_ms), (end, end_ms) in pairwise(points):
        if history <= end:
            return start_ms + (end_ms - start_ms) * (history - start) / (end - start)
    end, end_ms = points[-1]
    return end_ms + (end_ms - PREFILL_MS[0]) * (history - end) / end


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
    tensors = expected_tensors(config) if vision else {}
    encoder = sum(prod(tensors[name]) for name in tensors if name.startswith((VISION, PROJECTOR)))
    rows = max(shape.context + 1, shape.max_prefill + shape.chunk)
    return MemoryPlan(
        text_layers=round(text.num_hidden_layers * layer_weights(text) * BITS[weight_bits] / 8),
        post=embedding,
        vision=2 * encoder,
        kv_cache=4 * text.num_hidden_layers * rows * text.num_key_value_heads * text.head_dim,
        embeddings=2 * embedding,
    )
