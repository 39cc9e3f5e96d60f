"""An earlier name of `edgevl.checkpoint.architecture`, for programs that name tensors by it."""

from edgevl.checkpoint.architecture import TEXT

__all__ = ["TEXT"]
