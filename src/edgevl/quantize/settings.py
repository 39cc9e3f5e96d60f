"""What a user decides about a quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
