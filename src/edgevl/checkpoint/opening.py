"""Opening whatever a model directory holds."""

from __future__ import annotations

from pathlib import Path

from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.directory import ModelDirectory


def open_model(path: Path, engine: str = "auto") -> ModelDirectory:
    """Open a checkpoint or, of a directory that holds layers compiled for a board, those.

    Args:
        path: the directory.
        engine: which is to run it. Where a checkpoint and its compiled layers lie in one
            directory, ``axera`` takes the layers and everything else the checkpoint.

    Raises:
        CheckpointError: there is no checkpoint that is supported, whole and well-formed.
        BoardError: what was compiled is incomplete or ambiguous.
    """
    # Imported here: a room further on, which few models need.
    from edgevl.axera.model_directory import BoardModel, holds_layers

    if engine == "axera" or (not any(path.glob("*.safetensors")) and holds_layers(path)):
        return BoardModel.open(path)
    return Checkpoint.open(path)
