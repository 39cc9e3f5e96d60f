"""Generating: sampling, stopping, streaming, conversations."""

from edgevl.generate.answer import Answer, Timings, Usage
from edgevl.generate.constraint import Constraint
from edgevl.generate.model import Model, load
from edgevl.generate.sampling import SamplingParams
from edgevl.generate.session import Session, Stream
from edgevl.generate.text import Piece

__all__ = [
    "Answer",
    "Constraint",
    "Model",
    "Piece",
    "SamplingParams",
    "Session",
    "Stream",
    "Timings",
    "Usage",
    "load",
]
