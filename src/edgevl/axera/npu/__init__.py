"""Runtimes that have an NPU compute: memory, models, calls, behind one interface."""

from edgevl.axera.npu.base import Call, Group, Memory, NpuModel, Place, Runtime, TensorInfo
from edgevl.axera.npu.choice import open_runtime

__all__ = [
    "Call",
    "Group",
    "Memory",
    "NpuModel",
    "Place",
    "Runtime",
    "TensorInfo",
    "open_runtime",
]
