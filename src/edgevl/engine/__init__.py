"""Engines: embeddings in, logits out."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import (
    KV_CACHE_FORMATS,
    BatchedEngine,
    Engine,
    EngineTimings,
    KVCacheFormat,
    WeightBytes,
)
from edgevl.engine.plan import PRECISIONS, Precision
from edgevl.engine.reference import ReferenceEngine
from edgevl.errors import BoardError, EdgeVLError

if TYPE_CHECKING:
    from edgevl.checkpoint import ModelDirectory

__all__ = [
    "ENGINES",
    "KV_CACHE_FORMATS",
    "PRECISIONS",
    "BatchedEngine",
    "Engine",
    "EngineTimings",
    "KVCacheFormat",
    "Precision",
    "ReferenceEngine",
    "WeightBytes",
    "load_engine",
]

log = logging.getLogger(__name__)


def load_engine(
    checkpoint: ModelDirectory,
    engine: str = "auto",
    max_context: int | None = None,
    precision: Precision = "auto",
    threads: int | None = None,
    kv_cache: KVCacheFormat = "bf16",
    exact_logits: bool = False,
) -> Engine:
    """Load ``checkpoint`` into the engine of that name.

    ``auto`` is ``axera`` for a model that was compiled for a board; otherwise ``cpu`` or, where
    that cannot run, ``reference`` with a warning. With ``exact_logits`` those of all tokens are as
    good as those of the best: see `make_plan`; those of the other engines are in any case.

    Raises:
        EdgeVLError: an argument is not one of its choices, or a number is out of range.
        BoardError: the engine is ``axera`` and there is no NPU that runs the model, or it is
            another and the model was compiled for a board.
    """
    if max_context is not None and max_context < 1:
        raise EdgeVLError(f"max_context is {max_context}: it must be at least 1")
    if engine != "auto" and engine not in ENGINES:
        raise EdgeVLError(f"engine {engine!r} is unknown: choose auto or {', '.join(ENGINES)}")
    if engine == "auto" and not isinstance(checkpoint, Checkpoint):
        engine = "axera"
    if engine == "auto":
        if reason := native_missing():
            log.warning("%s: answering with the slow reference engine, in float32", reason)
            engine, precision, threads, kv_cache = "reference", "auto", None, "bf16"
        else:
            engine = "cpu"
    return ENGINES[engine](checkpoint, max_context, precision, threads, kv_cache, exact_logits)


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


def _cpu(
    checkpoint: ModelDirectory,
    max_context: int | None,
    precision: Precision,
    threads: int | None,
    kv_cache: KVCacheFormat,
    exact_logits: bool,
) -> Engine:
    weights = _weights(checkpoint, "cpu")
    if reason := native_missing():
        raise EdgeVLError(reason)
    from edgevl.engine import cpu

    return cpu.CpuModel(
        weights,
        max_context,
        precision=precision,
        threads=threads,
        kv_cache=kv_cache,
        exact_logits=exact_logits,
    ).engine()


def _reference(
    checkpoint: ModelDirectory,
    max_context: int | None,
    precision: Precision,
    threads: int | None,
    kv_cache: KVCacheFormat,
    exact_logits: bool,
) -> Engine:
    if precision != "auto" or threads is not None or kv_cache != "bf16":
        raise EdgeVLError(
            "the reference engine computes in float32, with NumPy's threads: leave precision, "
            "threads and kv_cache out, or use engine cpu"
        )
    return ReferenceEngine(_weights(checkpoint, "reference"), max_context)


def _axera(
    checkpoint: ModelDirectory,
    max_context: int | None,
    precision: Precision,
    threads: int | None,
    kv_cache: KVCacheFormat,
    exact_logits: bool,
) -> Engine:
    from edgevl.axera.engine import AxeraEngine
    from edgevl.axera.model.directory import BoardModel

    if not isinstance(checkpoint, BoardModel):
        raise BoardError(
            f"{checkpoint.path}: not compiled for a board, which engine axera needs: compile it "
            "first, edgevl compile MODEL -o OUT --target ax650"
        )
    if precision != "auto" or threads is not None or kv_cache != "bf16":
        raise EdgeVLError(
            "the axera engine runs what was compiled: leave precision, threads and kv_cache out, "
            "or compile with other options"
        )
    engine = AxeraEngine(checkpoint, max_context)
    if exact_logits and engine.top_k is not None:
        raise BoardError(
            f"{checkpoint.root}: compiled to give the {engine.top_k} likeliest tokens only, but "
            "comparing needs all logits: compile without --post-topk"
        )
    return engine


def _weights(checkpoint: ModelDirectory, engine: str) -> Checkpoint:
    """Return a checkpoint that has weights."""
    if not isinstance(checkpoint, Checkpoint):
        raise BoardError(
            f"{checkpoint.path}: compiled for a board, which engine {engine} cannot run: use "
            "engine axera, or give the checkpoint it was compiled from"
        )
    return checkpoint


_Loader = Callable[
    ["ModelDirectory", "int | None", Precision, "int | None", KVCacheFormat, bool], Engine
]

#: Engines by name, the preferred first.
ENGINES: dict[str, _Loader] = {"cpu": _cpu, "reference": _reference, "axera": _axera}
