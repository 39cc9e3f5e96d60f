"""Quantization: a checkpoint in, a smaller one and a report of what it cost out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgevl.quantize.settings import QuantizationError, QuantizationSettings

if TYPE_CHECKING:
    from edgevl.quantize.run import quantize_checkpoint

__all__ = ["QuantizationError", "QuantizationSettings", "quantize_checkpoint"]


def __getattr__(name: str) -> Any:
    """Import PyTorch when it is needed: ``pip install 'edgevl[quantize]'``."""
    if name == "quantize_checkpoint":
        from edgevl.quantize.run import quantize_checkpoint

        return quantize_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
