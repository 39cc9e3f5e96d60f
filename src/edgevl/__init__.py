"""EdgeVL: run InternVL vision-language models at the edge.

    import edgevl

    model = edgevl.load("tiny")
    print(model.ask("What number is on the display?", images=["meter.png"]))

The names below are loaded when they are first used, so that ``import edgevl`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from edgevl.version import __version__

if TYPE_CHECKING:
    from edgevl.checkpoint import Checkpoint
    from edgevl.errors import (
        BoardError,
        CheckpointError,
        ContextLengthError,
        DownloadError,
        EdgeVLError,
        ImageError,
        PromptError,
        VideoError,
    )
    from edgevl.generate import (
        Answer,
        Constraint,
        Model,
        SamplingParams,
        Session,
        Stream,
        load,
        split_tool_calls,
    )
    from edgevl.preprocess import Tool, ToolCall

__all__ = [
    "Answer",
    "BoardError",
    "Checkpoint",
    "CheckpointError",
    "Constraint",
    "ContextLengthError",
    "DownloadError",
    "EdgeVLError",
    "ImageError",
    "Model",
    "PromptError",
    "SamplingParams",
    "Session",
    "Stream",
    "Tool",
    "ToolCall",
    "VideoError",
    "__version__",
    "load",
    "split_tool_calls",
]


#: Where each public name is imported from, when it is first used.
_HOMES = {
    "Answer": "edgevl.generate",
    "BoardError": "edgevl.errors",
    "Checkpoint": "edgevl.checkpoint",
    "CheckpointError": "edgevl.errors",
    "Constraint": "edgevl.generate",
    "ContextLengthError": "edgevl.errors",
    "DownloadError": "edgevl.errors",
    "EdgeVLError": "edgevl.errors",
    "ImageError": "edgevl.errors",
    "Model": "edgevl.generate",
    "PromptError": "edgevl.errors",
    "SamplingParams": "edgevl.generate",
    "Session": "edgevl.generate",
    "Stream": "edgevl.generate",
    "Tool": "edgevl.preprocess",
    "ToolCall": "edgevl.preprocess",
    "VideoError": "edgevl.errors",
    "load": "edgevl.generate",
    "split_tool_calls": "edgevl.generate",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'edgevl' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
