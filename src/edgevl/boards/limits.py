"""What cannot be compiled is refused before any work."""

from __future__ import annotations

from math import prod

from edgevl.axera.layout import check_shape
from edgevl.boards.embeddings import embedding_bytes
from edgevl.boards.memory import plan_memory
from edgevl.boards.settings import CompileSettings
from edgevl.boards.targets import TARGETS, Target
from edgevl.boards.text_checkpoint import check_weights, text_bytes
from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import PROJECTOR, VISION
from edgevl.errors import BoardError

#: Most bytes of weights in an ONNX file: that is one protobuf message, which ends at 2 GiB, and the
#: graph itself takes under 1 MiB.
MAX_ONNX_BYTES = (2 << 30) - (1 << 20)
#: Room for tokenizer, calibration pictures and logs, bytes.
_SIDE_BYTES = 256 << 20


def check(checkpoint: Checkpoint, settings: CompileSettings) -> None:
    """Refuse what cannot be compiled, or would not fit the board.

    Raises:
        BoardError: names what it is and the fix.
    """
    target = TARGETS[settings.target]
    check_npu_mode(settings, target)
    check_shape(settings.shape, checkpoint.config.text)
    check_text(checkpoint, settings)
    if not settings.emulate and vision_bytes(checkpoint) > MAX_ONNX_BYTES:
        raise BoardError(
            f"{checkpoint.path}: its vision encoder takes {_gb(vision_bytes(checkpoint))} in "
            "float32, but an ONNX file ends at 2 GB: use a model with InternViT-300M"
        )
    check_memory(checkpoint, settings, target)


def check_npu_mode(settings: CompileSettings, target: Target) -> None:
    """Refuse more cores than the chip has.

    Raises:
        BoardError: lists those that there are.
    """
    if settings.npu_mode not in (None, *target.npu_modes):
        raise BoardError(
            f"--npu-mode {settings.npu_mode}: {target.name} has {', '.join(target.npu_modes)}"
        )


def check_text(checkpoint: Checkpoint, settings: CompileSettings) -> None:
    """Refuse text weights that Pulsar2 does not take, and options that they leave no room for.

    Raises:
        BoardError: names the field or option and the fix.
    """
    vocabulary = checkpoint.config.text.vocab_size
    if not 0 <= settings.post_topk <= vocabulary:
        raise BoardError(f"--post-topk {settings.post_topk}: must be from 0 to {vocabulary}")
    if settings.emulate:
        check_emulated(settings)
        return
    if settings.llm_build is not None or settings.dry_run:
        check_decode_step(settings, settings.llm_build or 1)
    quantization = check_weights(checkpoint)
    if quantization is not None and settings.weight_type is not None:
        raise BoardError(
            f"--weight-type {settings.weight_type}: the text of {checkpoint.path} is in "
            f"{quantization.bits}-bit GPTQ; leave it out, or compile the original checkpoint"
        )


def check_emulated(settings: CompileSettings) -> None:
    """Refuse options that would change nothing.

    Raises:
        BoardError: names the option.
    """
    if settings.weight_type is not None:
        raise BoardError(
            f"--weight-type {settings.weight_type}: the emulator computes in bf16; leave it out"
        )
    for name in ("pulsar2", "pulsar2_config", "llm_build", "decode_step", "calibration_images"):
        value = getattr(settings, name)
        if value is not None:
            raise BoardError(
                f"--{name.replace('_', '-')} {value}: --emulate does without Pulsar2; leave it out"
            )


def check_decode_step(settings: CompileSettings, generation: int) -> None:
    """Refuse steps of decoding where the command for text models has none.

    Raises:
        BoardError: says which has.
    """
    if settings.decode_step is not None and generation == 1:
        raise BoardError(
            f"--decode-step {settings.decode_step}: llm_build has none; give --llm-build 2 and a "
            "Pulsar2 that has llm_build2, from 6.0 on"
        )


def check_memory(checkpoint: Checkpoint, settings: CompileSettings, target: Target) -> None:
    """Refuse a model that takes more NPU memory than a typical board of the target has.

    Raises:
        BoardError: says what takes how much.
    """
    plan = plan_memory(
        checkpoint.config,
        settings.shape,
        weight_bits=weight_bits(checkpoint, settings),
        vision=checkpoint.has_vision,
    )
    if plan.npu > target.memory_bytes:
        raise BoardError(
            f"{checkpoint.path}: takes about {_gb(plan.npu)} of NPU memory (layers "
            f"{_gb(plan.text_layers)}, head {_gb(plan.post)}, vision {_gb(plan.vision)}, context "
            f"{_gb(plan.kv_cache)}), {target.name} boards have {_gb(target.memory_bytes)}: compile "
            "a smaller model, one quantized to int4, or a shorter --context"
        )


def weight_bits(checkpoint: Checkpoint, settings: CompileSettings) -> int:
    """Return the bits of the decoder's weights on the board."""
    quantized = (checkpoint.gptq(name) for name in checkpoint.names())
    bits = max((weight.config.bits for weight in quantized if weight is not None), default=8)
    return 4 if settings.weight_type == "s4" else bits


def vision_bytes(checkpoint: Checkpoint) -> int:
    """Return the bytes of vision encoder and projector in float32."""
    return 4 * sum(
        prod(checkpoint.shape(name))
        for name in checkpoint.names()
        if name.startswith((VISION, PROJECTOR))
    )


def disk_bytes(checkpoint: Checkpoint, settings: CompileSettings) -> int:
    """Return about how much is written: what Pulsar2 is given, and what it makes of it."""
    shared = embedding_bytes(checkpoint) + _SIDE_BYTES
    if settings.emulate:  # everything in bfloat16
        return shared + 2 * sum(prod(checkpoint.shape(name)) for name in checkpoint.names())
    return shared + 2 * text_bytes(checkpoint) + 2 * vision_bytes(checkpoint)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
