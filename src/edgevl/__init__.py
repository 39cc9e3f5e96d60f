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


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'edgevl' has no attribute {name!r}")
    home = "generate"
    if name.endswith("Error"):
        home = "errors"
    elif name == "Checkpoint":
        home = "checkpoint"
    elif name.startswith("Tool"):
        home = "preprocess"
    value = getattr(import_module(f"edgevl.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
