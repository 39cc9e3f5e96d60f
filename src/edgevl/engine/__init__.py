"""Engines: embeddings in, logits out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgevl.engine.base import Engine, EngineTimings
from edgevl.engine.reference import ReferenceEngine
from edgevl.errors import EdgeVLError

if TYPE_CHECKING:
    from edgevl.checkpoint import Checkpoint

__all__ = ["ENGINES", "Engine", "EngineTimings", "ReferenceEngine", "load_engine"]

#: Engines by name, the preferred first: ``auto`` takes that.
ENGINES: dict[str, type[ReferenceEngine]] = {"reference": ReferenceEngine}


def load_engine(
    checkpoint: Checkpoint, engine: str = "auto", max_context: int | None = None
) -> Engine:
    """Load ``checkpoint`` into the engine of that name.

    Raises:
        EdgeVLError: there is no such engine, or ``max_context`` is less than 1.
    """
    if max_context is not None and max_context < 1:
        raise EdgeVLError(f"max_context is {max_context}: it must be at least 1")
    name = next(iter(ENGINES)) if engine == "auto" else engine
    if name not in ENGINES:
        raise EdgeVLError(f"engine {engine!r} is unknown: choose auto or {', '.join(ENGINES)}")
    return ENGINES[name](checkpoint, max_context)
