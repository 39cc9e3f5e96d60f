"""The earlier name of `edgevl.synth.presets`, for programs that write synthetic checkpoints."""

from edgevl.synth.presets import PRESETS

__all__ = ["PRESETS"]
