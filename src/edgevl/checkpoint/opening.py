"""Opening whatever a model directory holds."""

from __future__ import annotations

from pathlib import Path

from edgevl.checkpoint.checkpoint import Checkpoint
from edgevl.checkpoint.directory import ModelDirectory
from edgevl.errors import BoardError


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
    if engine == "axera" or _is_compiled(path):
        from edgevl.axera.model.directory import BoardModel

        return BoardModel.open(path)
    return Checkpoint.open(path)


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a checkpoint that something is to be made of.

    Args:
        path: the directory.

    Raises:
        CheckpointError: there is no checkpoint that is supported, whole and well-formed.
        BoardError: there is what was compiled of one.
    """
    if _is_compiled(path):
        raise BoardError(
            f"{path}: is compiled for a board already; give the checkpoint that it was made of"
        )
    return Checkpoint.open(path)


def _is_compiled(path: Path) -> bool:
    # Imported here: a room further on, which few models need.
    from edgevl.axera.model.directory import holds_compiled

    return not any(path.glob("*.safetensors")) and holds_compiled(path)
