"""Runtimes that have an NPU compute: memory, models, calls, behind one interface."""

from edgevl.axera.npu.base import Memory, NpuModel, Runtime
from edgevl.axera.npu.choice import close_runtimes, installed_runtime, open_runtime

__all__ = [
    "Memory",
    "NpuModel",
    "Runtime",
    "close_runtimes",
    "installed_runtime",
    "open_runtime",
]
