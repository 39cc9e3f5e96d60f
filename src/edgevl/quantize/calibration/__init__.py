"""What a model is calibrated on: conversations about pictures, and text."""

from edgevl.quantize.calibration.calibration_set import CalibrationSet, Example, Sample
from edgevl.quantize.calibration.collect import collect, saved

__all__ = ["CalibrationSet", "Example", "Sample", "collect", "saved"]
