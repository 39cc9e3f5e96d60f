"""Generating: sampling, stopping, streaming, conversations."""

from edgevl.generate.constraint import Constraint
from edgevl.generate.generation import Answer, Timings, Usage
from edgevl.generate.model import Model, load
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.session import Session, Stream
from edgevl.generate.text import Piece
from edgevl.generate.tool_calls import ToolCallSplitter, split_tool_calls

__all__ = [
    "Answer",
    "Constraint",
    "Model",
    "Piece",
    "SamplingParams",
    "Session",
    "Stream",
    "Timings",
    "ToolCallSplitter",
    "Usage",
    "load",
    "split_tool_calls",
]
