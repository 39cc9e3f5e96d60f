"""Engines: embeddings in, logits out."""

from __future__ import annotations

from edgevl.engine.base import Engine, EngineTimings, Sequence, WeightBytes
from edgevl.engine.reference import ReferenceEngine

__all__ = [
    "Engine",
    "EngineTimings",
    "ReferenceEngine",
    "Sequence",
    "WeightBytes",
    "native_missing",
]


def native_missing() -> str | None:
    """Return why the native engine cannot be used and what mends it, or None if it can."""
    try:
        from edgevl import _native  # noqa: F401
    except ImportError as error:
        return (
            f"the native engine is missing ({error}); install a wheel of edgevl, or a C++20 "
            "compiler and then edgevl from source"
        )
    return None
