"""The earlier name of `edgevl.synth.writer`, for programs that write synthetic checkpoints."""

from edgevl.synth.writer import write_checkpoint

__all__ = ["write_checkpoint"]
