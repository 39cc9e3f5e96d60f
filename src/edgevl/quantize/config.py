"""What ``config.json`` says of a quantization, for every library that reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgevl.quantize.settings import QuantizationSettings

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
