"""What calibrating needs, in one piece, and as one safetensors file."""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, raw, write_file


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
        pictures: JPEG of at most `edgevl.quantize.calibration.pictures.THUMBNAIL_BYTES` each.
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
            **tally(self.samples),
            "sources": list(self.sources),
            "notes": list(self.notes),
        }


def tally(samples: Sequence[Sample]) -> dict[str, int]:
    """Return how many ``tokens`` and ``image_tokens`` there are."""
    return {
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "image_tokens": sum(int(sample.is_image.sum()) for sample in samples),
    }


def save_set(path: Path, calibration: CalibrationSet) -> None:
    """Write a calibration set.

    Embeddings of tokens are not stored, only the features of pictures: a quarter to a half.

    Raises:
        OSError: the directory is not writable or full.
    """
    samples = [*calibration.samples, *calibration.heldout]
    record = json.dumps(
        {
            "samples": len(calibration.samples),
            "lengths": [len(sample.token_ids) for sample in samples],
            "reply_starts": [sample.reply_start for sample in samples],
            "examples": [example and _to_json(example) for example in calibration.examples],
            "sources": calibration.sources,
            "notes": calibration.notes,
        }
    ).encode()
    counts, hidden = tally(samples), samples[0].embeddings.shape[1]
    tensors = [
        TensorSpec("tiles", "F32", calibration.tiles.shape),
        TensorSpec("heldout_tiles", "F32", calibration.heldout_tiles.shape),
        TensorSpec("features", "F32", (counts["image_tokens"], hidden)),
        TensorSpec("token_ids", "I32", (counts["tokens"],)),
        TensorSpec("is_image", "U8", (counts["tokens"],)),
        TensorSpec("record", "U8", (len(record),)),
    ]
    pieces: Iterator[bytes | memoryview] = itertools.chain(
        map(raw, (calibration.tiles, calibration.heldout_tiles)),
        (raw(sample.embeddings[sample.is_image]) for sample in samples),
        (raw(sample.token_ids.astype(np.int32)) for sample in samples),
        (raw(sample.is_image) for sample in samples),
        (record,),
    )
    with path.open("wb") as file:
        write_file(file, tensors, pieces)


def load_set(path: Path, checkpoint: Checkpoint) -> CalibrationSet:
    """Read what `save_set` wrote.

    Raises:
        CheckpointError: it is damaged.
    """
    file = SafetensorsFile(path)
    try:
        record: dict[str, Any] = json.loads(file["record"].data.tobytes())
        samples = list(_samples(file, record, checkpoint))
        tiles, heldout_tiles = (np.array(file[name].data) for name in ("tiles", "heldout_tiles"))
    finally:
        file.close()
    count = record["samples"]
    return CalibrationSet(
        tuple(samples[:count]),
        tuple(samples[count:]),
        tuple(example and _from_json(example) for example in record["examples"]),
        tiles,
        heldout_tiles,
        tuple(record["sources"]),
        tuple(record["notes"]),
    )


def _samples(
    file: SafetensorsFile, record: dict[str, Any], checkpoint: Checkpoint
) -> Iterator[Sample]:
    ends, features = np.cumsum(record["lengths"])[:-1], file["features"].data
    ids = np.split(file["token_ids"].data.astype(np.int64), ends)
    masks = np.split(file["is_image"].data.astype(np.bool_), ends)
    for token_ids, is_image, begin in zip(ids, masks, record["reply_starts"], strict=True):
        embeddings, count = np.array(checkpoint.tensor(EMBEDDING, token_ids)), is_image.sum()
        embeddings[is_image], features = features[:count], features[count:]
        yield Sample(token_ids, embeddings, is_image, begin)


def _to_json(example: Example) -> dict[str, Any]:
    pictures = [base64.b64encode(picture).decode() for picture in example.pictures]
    return {"pictures": pictures, "questions": example.questions, "replies": example.replies}


def _from_json(value: dict[str, Any]) -> Example:
    pictures = tuple(base64.b64decode(picture) for picture in value["pictures"])
    return Example(pictures, tuple(value["questions"]), tuple(value["replies"]))
