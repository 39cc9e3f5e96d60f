"""What a user decides about a quantization, and what ``config.json`` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from edgevl.errors import EdgeVLError

TextFormat = Literal["int4", "int8", "none"]
VisionFormat = Literal["int8", "none"]
Method = Literal["gptq", "rtn"]

GROUP_SIZES = (32, 64, 128)


class QuantizationError(EdgeVLError):
    """A checkpoint cannot be quantized as asked; nothing is left half-written."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantize.

    Attributes:
        text: format of the linear layers of the decoder; embedding and head stay as they are.
        vision: format in which the vision encoder and the projector are to run.
        method: ``gptq``, or ``rtn`` (round to nearest), which needs no calibration of the text.
        group_size: input channels that share a scale, one of `GROUP_SIZES`.
        calibration_text: files of plain text, UTF-8.
        calibration_images: a directory or a tar file of pictures.
        samples: sequences to calibrate on.
        seed: of everything random.
        device: where PyTorch computes, ``cpu`` or ``cuda``.
    """

    text: TextFormat = "int4"
    vision: VisionFormat = "int8"
    method: Method = "gptq"
    group_size: int = 128
    calibration_text: tuple[Path, ...] = ()
    calibration_images: Path | None = None
    samples: int = 128
    seed: int = 0
    device: str = "cpu"


BITS = {"int4": 4, "int8": 8}


def quantization_fields(
    settings: QuantizationSettings, keep: Sequence[str], version: str
) -> dict[str, Any]:
    """Return the fields that are added to ``config.json``.

    ``quantization_config`` is the one of GPTQModel and transformers. ``edgevl_quantization`` tells
    our own engines how the vision part is to run; other libraries run it in floats, as stored.

    Args:
        settings: how the model was quantized.
        keep: vision weights that are to run in bfloat16.
        version: of EdgeVL.
    """
    fields: dict[str, Any] = {}
    if settings.vision == "int8":
        fields["edgevl_quantization"] = {"vision": {"format": "int8", "keep": list(keep)}}
    if settings.text != "none":
        fields["quantization_config"] = {
            "quant_method": "gptq",
            "bits": BITS[settings.text],
            "group_size": settings.group_size,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "pack_dtype": "int32",
            "lm_head": False,
            "meta": {"quantizer": [f"edgevl:{version}"], "method": settings.method},
        }
    return fields
