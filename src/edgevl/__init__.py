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

#: Where public names are imported from when they are first used: the first that has one.
_HOMES = ("edgevl.errors", "edgevl.checkpoint", "edgevl.preprocess", "edgevl.generate")


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name in __all__:
        for home in map(import_module, _HOMES):
            if hasattr(home, name):
                globals()[name] = getattr(home, name)
                return globals()[name]
    raise AttributeError(f"module 'edgevl' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the public names."""
    return __all__
