"""What a user decides about a quantization."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from edgevl.errors import EdgeVLError
from edgevl.options import check_options, option

TextFormat = Literal["int4", "int8", "none"]
VisionFormat = Literal["int8", "none"]
Method = Literal["gptq", "rtn"]

GROUP_SIZES = (128, 64, 32)


class QuantizationError(EdgeVLError):
    """A checkpoint cannot be quantized as asked; nothing is left half-written."""


@dataclass(frozen=True)
class QuantizationSettings:
    """How to quantize; each field's `Option` says what it does.

    Raises:
        QuantizationError: a value is not one of its choices, or out of its range.
    """

    text: TextFormat = option(
        "int4",
        "choice",
        "Format of the text model's linear layers.",
        choices=get_args(TextFormat),
    )
    vision: VisionFormat = option(
        "int8",
        "choice",
        "Format in which the vision encoder is to run.",
        choices=get_args(VisionFormat),
    )
    method: Method = option(
        "gptq",
        "choice",
        "rtn rounds each weight to nearest: quick, and worse.",
        choices=get_args(Method),
    )
    group_size: int = option(
        128,
        "choice",
        "Inputs that share a scale; fewer cost space and keep more.",
        choices=GROUP_SIZES,
    )
    calibration_text: tuple[Path, ...] = option(
        (), "paths", "Plain text like the one to be read and written; repeatable.", "FILE"
    )
    calibration_images: Path | None = option(
        None,
        "path",
        "Pictures like those to be asked about.  [default: drawn ones]",
        "DIR|TAR",
    )
    samples: int = option(
        128, "integer", "Conversations and texts to calibrate on.", low=1, high=4096
    )
    seed: int = option(0, "integer", low=0)
    device: str = option("cpu", "choice", choices=("cpu", "cuda"))

    def __post_init__(self) -> None:
        check_options(self, QuantizationError)


BITS = {"int4": 4, "int8": 8}
