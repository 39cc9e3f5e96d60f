"""What a model takes: memory of a board, and of the disk that it is compiled on.

What cannot be compiled is refused before any work.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from edgevl.axera.layout import BoardShape, check_shape
from edgevl.boards.settings import CompileSettings
from edgevl.boards.text_checkpoint import check_weights, embedding_bytes, text_bytes
from edgevl.boards.timing import BITS, layer_weights
from edgevl.checkpoint import Checkpoint, GPTQConfig
from edgevl.checkpoint.architecture import PROJECTOR, VISION, expected_tensors
from edgevl.checkpoint.config import ModelConfig
from edgevl.errors import BoardError

#: Most bytes of weights in an ONNX file: that is one protobuf message, which ends at 2 GiB, and the
#: graph itself takes under 1 MiB.
MAX_ONNX_BYTES = (2 << 30) - (1 << 20)
#: Room for tokenizer, calibration pictures and logs, bytes.
_SIDE_BYTES = 256 << 20


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
    rows = max(shape.context + 1, shape.max_prefill + shape.chunk)
    return MemoryPlan(
        text_layers=round(text.num_hidden_layers * layer_weights(text) * BITS[weight_bits] / 8),
        post=embedding,
        vision=2 * vision_weights(config) if vision else 0,
        kv_cache=4 * text.num_hidden_layers * rows * text.num_key_value_heads * text.head_dim,
        embeddings=2 * embedding,
    )


def vision_weights(config: ModelConfig) -> int:
    """Return how many weights vision encoder and projector have."""
    return sum(
        prod(shape)
        for name, shape in expected_tensors(config).items()
        if name.startswith((VISION, PROJECTOR))
    )


def check(checkpoint: Checkpoint, settings: CompileSettings) -> GPTQConfig | None:
    """Refuse a model that cannot be compiled so, or would not fit the board.

    Returns:
        How its text is quantized, if it is and Pulsar2 is to compile it.

    Raises:
        BoardError: names what it is and the fix.
    """
    config, path = checkpoint.config, checkpoint.path
    check_shape(settings.shape, config.text)
    if settings.post_topk > config.text.vocab_size:
        raise BoardError(
            f"--post-topk {settings.post_topk}: must be from 0 to {config.text.vocab_size}"
        )
    quantization = None if settings.emulate else check_weights(checkpoint)
    if quantization is not None and settings.weight_type is not None:
        raise BoardError(
            f"--weight-type {settings.weight_type}: the text of {path} is in {quantization.bits}-"
            "bit GPTQ; leave it out, or compile the original checkpoint"
        )
    onnx = 4 * vision_weights(config) if checkpoint.has_vision else 0
    if not settings.emulate and onnx > MAX_ONNX_BYTES:
        raise BoardError(
            f"{path}: its vision encoder takes {_gb(onnx)} in float32, but an ONNX file ends at 2 "
            "GB: use a model with InternViT-300M"
        )
    weights = (checkpoint.gptq(name) for name in checkpoint.names())
    bits = max((weight.config.bits for weight in weights if weight is not None), default=8)
    plan = plan_memory(
        config,
        settings.shape,
        weight_bits=4 if settings.weight_type == "s4" else bits,
        vision=checkpoint.has_vision,
    )
    chip = settings.chip
    if plan.npu > chip.memory_bytes:
        raise BoardError(
            f"{path}: takes about {_gb(plan.npu)} of NPU memory (layers {_gb(plan.text_layers)}, "
            f"head {_gb(plan.post)}, vision {_gb(plan.vision)}, context {_gb(plan.kv_cache)}), "
            f"{chip.name} boards have {_gb(chip.memory_bytes)}: compile a smaller model, one "
            "quantized to int4, or a shorter --context"
        )
    return quantization


def disk_bytes(checkpoint: Checkpoint, settings: CompileSettings) -> int:
    """Return about how much is written: what Pulsar2 is given, and what it makes of it."""
    shared = embedding_bytes(checkpoint) + _SIDE_BYTES
    if settings.emulate:  # everything in bfloat16
        return shared + 2 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names())
    vision = 4 * vision_weights(checkpoint.config) if checkpoint.has_vision else 0
    return shared + 2 * text_bytes(checkpoint) + 2 * vision


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
