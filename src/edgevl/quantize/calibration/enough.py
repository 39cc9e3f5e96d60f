"""How much is enough to calibrate on."""

from __future__ import annotations

from collections.abc import Sequence

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import TEXT
from edgevl.quantize.calibration.calibration_set import Sample
from edgevl.quantize.settings import QuantizationError, QuantizationSettings

#: Fewer sequences are no sample of anything.
MIN_SAMPLES = 8
#: With fewer tokens than this many times the inputs of the widest layer, a note says so.
GOOD_TOKENS_PER_INPUT = 4


def check_count(samples: int) -> None:
    """Raise a `QuantizationError` if so many sequences are too few."""
    if samples < MIN_SAMPLES:
        raise QuantizationError(
            f"samples is {samples}: {MIN_SAMPLES} is the least to calibrate on, "
            f"{QuantizationSettings.samples} the default"
        )


def check(samples: Sequence[Sample], checkpoint: Checkpoint) -> list[str]:
    """Compare the tokens of the calibration sequences with the widest layer: -> notes.

    Raises:
        QuantizationError: they are fewer than its inputs, whose second moments are then certain to
            be singular.
    """
    tokens, inputs = sum(len(sample.token_ids) for sample in samples), widest_inputs(checkpoint)
    mean = tokens / len(samples)
    if tokens < inputs:
        raise QuantizationError(
            f"samples is {len(samples)}: they have {tokens} tokens, fewer than the {inputs} inputs "
            f"of the widest layer; calibrate on at least {-(-inputs // mean):.0f}"
        )
    good = GOOD_TOKENS_PER_INPUT * inputs
    if tokens >= good:
        return []
    return [
        f"{tokens} tokens to calibrate on are few for a layer of {inputs} inputs; "
        f"{-(-good // mean):.0f} samples would do"
    ]


def widest_inputs(checkpoint: Checkpoint) -> int:
    """Return the most inputs of a linear layer of the decoder."""
    return max(
        checkpoint.shape(name)[1]
        for name in checkpoint.names()
        if name.startswith(TEXT) and name.endswith("_proj.weight")
    )
