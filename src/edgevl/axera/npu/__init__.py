"""Runtimes that have an NPU compute: memory, models, calls, behind one interface."""

from edgevl.axera.npu.base import (
    Call,
    Group,
    Memory,
    NpuInfo,
    NpuModel,
    Place,
    Runtime,
    TensorInfo,
)
from edgevl.axera.npu.choice import close_runtimes, installed_runtime, open_runtime

__all__ = [
    "Call",
    "Group",
    "Memory",
    "NpuInfo",
    "NpuModel",
    "Place",
    "Runtime",
    "TensorInfo",
    "close_runtimes",
    "installed_runtime",
    "open_runtime",
]
