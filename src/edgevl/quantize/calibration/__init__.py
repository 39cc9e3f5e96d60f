"""What a model is calibrated on: conversations about pictures, and text."""

from edgevl.quantize.calibration.calibration_set import (
    CalibrationSet,
    Example,
    Sample,
    load_set,
    save_set,
)
from edgevl.quantize.calibration.collection import collect, collection_key

__all__ = [
    "CalibrationSet",
    "Example",
    "Sample",
    "collect",
    "collection_key",
    "load_set",
    "save_set",
]
