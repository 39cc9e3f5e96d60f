"""A finished calibration as one safetensors file."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import EMBEDDING
from edgevl.checkpoint.safetensors import SafetensorsFile
from edgevl.checkpoint.writer import TensorSpec, raw, write_file
from edgevl.errors import CheckpointError
from edgevl.files import replacing
from edgevl.quantize.calibration.calibration_set import CalibrationSet, Example, Sample


def save(path: Path, calibration: CalibrationSet, key: str) -> None:
    """Write a calibration beside ``path`` and rename it; `load` wants the same ``key``.

    Embeddings of tokens are not stored, only the features of pictures: a quarter to a half.

    Raises:
        OSError: the directory is not writable or full.
    """
    samples = [*calibration.samples, *calibration.heldout]
    record = json.dumps(
        {
            "key": key,
            "samples": len(calibration.samples),
            "lengths": [len(sample.token_ids) for sample in samples],
            "reply_starts": [sample.reply_start for sample in samples],
            "examples": [example and _to_json(example) for example in calibration.examples],
            "sources": calibration.sources,
            "notes": calibration.notes,
        }
    ).encode()
    tokens = sum(len(sample.token_ids) for sample in samples)
    image_tokens = sum(int(sample.is_image.sum()) for sample in samples)
    hidden = samples[0].embeddings.shape[1]
    tensors = [
        TensorSpec("tiles", "F32", calibration.tiles.shape),
        TensorSpec("heldout_tiles", "F32", calibration.heldout_tiles.shape),
        TensorSpec("features", "F32", (image_tokens, hidden)),
        TensorSpec("token_ids", "I32", (tokens,)),
        TensorSpec("is_image", "U8", (tokens,)),
        TensorSpec("record", "U8", (len(record),)),
    ]
    with replacing(path) as file:
        write_file(file, tensors, _pieces(calibration, record))


def _pieces(calibration: CalibrationSet, record: bytes) -> Iterator[bytes | memoryview]:
    samples = [*calibration.samples, *calibration.heldout]
    yield raw(calibration.tiles)
    yield raw(calibration.heldout_tiles)
    for sample in samples:
        yield raw(sample.embeddings[sample.is_image])
    for sample in samples:
        yield raw(sample.token_ids.astype(np.int32))
    for sample in samples:
        yield raw(sample.is_image)
    yield record


def load(path: Path, checkpoint: Checkpoint, key: str) -> CalibrationSet | None:
    """Read what `save` wrote; None if it is not there, damaged, or of another ``key``."""
    if not path.exists():
        return None
    try:
        file = SafetensorsFile(path)
    except CheckpointError:
        return None
    try:
        record: dict[str, Any] = json.loads(file["record"].data.tobytes())
        if record["key"] != key:
            return None
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
    all_ids: NDArray[np.int32] = file["token_ids"].data
    all_is_image = file["is_image"].data.astype(np.bool_)
    features = file["features"].data
    begin = feature = 0
    for length, reply_start in zip(record["lengths"], record["reply_starts"], strict=True):
        token_ids = all_ids[begin : begin + length].astype(np.int64)
        is_image = all_is_image[begin : begin + length]
        embeddings = np.array(checkpoint.tensor(EMBEDDING, token_ids))
        count = int(is_image.sum())
        embeddings[is_image] = features[feature : feature + count]
        yield Sample(token_ids, embeddings, is_image, reply_start)
        begin += length
        feature += count


def _to_json(example: Example) -> dict[str, Any]:
    pictures = [base64.b64encode(picture).decode() for picture in example.pictures]
    return {"pictures": pictures, "questions": example.questions, "replies": example.replies}


def _from_json(value: dict[str, Any]) -> Example:
    pictures = tuple(base64.b64decode(picture) for picture in value["pictures"])
    return Example(pictures, tuple(value["questions"]), tuple(value["replies"]))
