"""From a checkpoint to files that a board runs: ONNX, calibration, Pulsar2, or the emulator's."""
