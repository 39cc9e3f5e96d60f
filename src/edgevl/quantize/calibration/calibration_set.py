"""What calibrating needs, in one piece."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Sample:
    """A conversation or a text, embedded.

    Attributes:
        token_ids: int64 [T].
        embeddings: float32 [T, H], with the features of pictures in their places.
        is_image: bool [T], which positions are image tokens.
        reply_start: first position of the assistant's last reply; 0 for plain text. Positions from
            ``reply_start - 1`` to the last but one predict the tokens that a comparison counts.
    """

    token_ids: NDArray[np.int64]
    embeddings: NDArray[np.float32]
    is_image: NDArray[np.bool_]
    reply_start: int


@dataclass(frozen=True)
class Example:
    """A conversation to show to people.

    Attributes:
        pictures: JPEG of at most `edgevl.quantize.calibration.thumbnail.MAX_BYTES` each.
        questions: of each turn.
        replies: what the model said to them.
    """

    pictures: tuple[bytes, ...]
    questions: tuple[str, ...]
    replies: tuple[str, ...]


@dataclass(frozen=True)
class CalibrationSet:
    """Sequences to calibrate on, and others to measure with.

    Attributes:
        samples: what to calibrate on.
        heldout: what to compare with; pictures and text that ``samples`` do not have.
        examples: as many as ``heldout``, in that order; None for a window of text.
        tiles: of the pictures in ``samples``, float32 [B, 3, tile, tile], to calibrate vision on.
        heldout_tiles: likewise of those in ``heldout``.
        sources: for each set and kind: ``set`` ("calibration" or "heldout"), ``kind``, ``count``,
            ``tokens``, ``image_tokens``, and ``origin``, where it comes from.
        notes: what a user should know, a line each.
    """

    samples: tuple[Sample, ...]
    heldout: tuple[Sample, ...]
    examples: tuple[Example | None, ...]
    tiles: NDArray[np.float32]
    heldout_tiles: NDArray[np.float32]
    sources: tuple[dict[str, Any], ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """Return the part ``calibration`` of a report; sums are of what is calibrated on."""
        return {
            "samples": len(self.samples),
            "tokens": sum(len(sample.token_ids) for sample in self.samples),
            "image_tokens": sum(int(sample.is_image.sum()) for sample in self.samples),
            "sources": list(self.sources),
            "notes": list(self.notes),
        }
