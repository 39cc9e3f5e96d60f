"""The vision part of a model as an ONNX file, checked against the reference engine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.boards.limits import MAX_ONNX_BYTES
from edgevl.checkpoint import Checkpoint
from edgevl.engine.base import Floats
from edgevl.engine.reference import ReferenceVision
from edgevl.errors import BoardError
from edgevl.files import replacing
from edgevl.machine import this_machine
from edgevl.optional import needs
from edgevl.preprocess.tiles import byte_statistics, split, to_pixels
from edgevl.quantize.calibration.shipped import drawn

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgevl.boards.vision_graph import Weight

#: Least cosine between an image token's features from the file and from the reference engine.
LEAST_COSINE = 0.99999
#: Memory that is taken at the most, in multiples of the weights: the graph, the bytes of the file,
#: and room in which these have grown.
MEMORY_FACTOR = 3

#: Tiles of noise that are compared, besides one of a drawn street.
_NOISE_TILES, _STREET = 2, 5


def write_vision_onnx(checkpoint: Checkpoint, path: Path, uint8_input: bool = False) -> float:
    """Write vision encoder, pixel shuffle and projector of a model as one ONNX file.

    Input ``image`` [1, 3, tile, tile], output ``output`` [1, image_tokens, H], both float32; opset
    17, all shapes static, simplified by onnxslim. It is written beside ``path``, checked, compared,
    and renamed.

    With ``uint8_input`` the file is the same: Pulsar2 takes the network as it was trained, and
    itself puts in front of it what makes its input of bytes in NHWC order, as the configuration
    says (``input_processors``, see `pulsar2_config`). It also normalises what it calibrates on, so
    a graph that did that once more would be calibrated on wrong values. What differs is the
    comparison: pixels are then normalised by the configuration's statistics.

    Args:
        checkpoint: of a model with vision.
        path: of the file to write; its directory exists.
        uint8_input: whether the board is to take bytes.

    Returns:
        The least cosine between the features of an image token from ONNX Runtime and from the
        reference engine.

    Raises:
        BoardError: the model has no vision or too large a one, the machine has too little memory,
            the two differ by more than rounding does, or a library is missing.
        OSError: the file cannot be written.
    """
    model, weights = _checked_graph(checkpoint)
    with replacing(path) as file:
        beside = Path(file.name)  # the libraries open it themselves
        _write(model, weights, checkpoint, beside)
        cosine = cosine_to_reference(checkpoint, beside, uint8_input)
        if not cosine >= LEAST_COSINE:  # so that NaN fails too
            raise BoardError(
                f"{checkpoint.path}: vision features from ONNX and from the reference engine have "
                f"a cosine of {cosine:.6f}, expected at least {LEAST_COSINE}; the weights are "
                "damaged, or a library computes wrongly: get the checkpoint again, or other "
                "versions of onnx, onnxslim and onnxruntime"
            )
    return cosine


def _checked_graph(checkpoint: Checkpoint) -> tuple[ir.Model, dict[str, Weight]]:
    """Return the graph and its weights, if these fit into an ONNX file and into memory.

    Raises:
        BoardError: they do not, there is no vision, or a library is missing.
    """
    if not checkpoint.has_vision:
        raise BoardError(
            f"{checkpoint.path}: has no vision encoder; compile the checkpoint that it was made of"
        )
    with needs("axera", BoardError):
        from edgevl.boards.vision_graph import vision_graph
    model, weights = vision_graph(checkpoint.config)
    needed = sum(4 * math.prod(weight.shape) for weight in weights.values())
    if needed > MAX_ONNX_BYTES:
        raise BoardError(
            f"{checkpoint.path}: its vision encoder has {needed / 2**30:.1f} GiB in float32, an "
            "ONNX file holds 2 GiB; choose a model with InternViT-300M, such as InternVL3.5-8B"
        )
    available = this_machine().available_bytes
    if MEMORY_FACTOR * needed > available:
        raise BoardError(
            f"{checkpoint.path}: writing its vision encoder as ONNX needs "
            f"{MEMORY_FACTOR * needed / 2**30:.1f} GiB of memory, {available / 2**30:.1f} GiB are "
            "free: close other programs, or use a larger machine"
        )
    return model, weights


def _write(model: ir.Model, weights: dict[str, Weight], checkpoint: Checkpoint, path: Path) -> None:
    """Simplify the graph, give it its weights, write and check it."""
    with needs("axera", BoardError):
        import onnx
        import onnx_ir
        import onnxslim

        from edgevl.boards.vision_graph import fill
    slim = onnx_ir.from_proto(onnxslim.slim(onnx_ir.to_proto(model)))
    fill(slim, weights, checkpoint)
    onnx_ir.save(slim, path, format="protobuf")
    onnx.checker.check_model(path, full_check=True)


def cosine_to_reference(checkpoint: Checkpoint, path: Path, uint8_input: bool = False) -> float:
    """Return the least cosine between an image token's features from ``path`` and the reference.

    Three tiles are compared: two of noise and a drawn picture. See `write_vision_onnx`.

    Raises:
        BoardError: ONNX Runtime is missing.
        EdgeVLError: the machine has too little memory.
    """
    config = checkpoint.config
    tiles = _tiles(config.vision.image_size)
    pixels = to_pixels(tiles, config.image_mean, config.image_std)
    reference = ReferenceVision(checkpoint)
    expected = np.concatenate([reference.encode_tiles(tile[None]) for tile in pixels])
    del reference  # before ONNX Runtime loads the same weights
    if uint8_input:
        statistics = byte_statistics(config.image_mean, config.image_std)
        mean, std = (np.array(values, np.float32) for values in statistics)
        values = np.stack([np.asarray(tile, np.float32) for tile in tiles])
        pixels = ((values - mean) / std).transpose(0, 3, 1, 2)
    return _least_cosine(_run(path, pixels), expected)


def _tiles(size: int) -> list[Image.Image]:
    """Return pictures of ``size`` squared to compare on."""
    noise = np.random.default_rng(0).integers(0, 256, (_NOISE_TILES, size, size, 3), np.uint8)
    tiles = [Image.fromarray(tile) for tile in noise]
    return tiles + split(drawn(_STREET, 0), size, 1, 1, thumbnail=False)


def _run(path: Path, pixels: Floats) -> Floats:
    """Run an ONNX file tile by tile: float32 [B, 3, tile, tile] -> [B, image_tokens, H]."""
    with needs("axera", BoardError):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    # The graph is to be run as it stands, and a second copy of the weights to be avoided.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: tile[None]})[0] for tile in pixels])


def _least_cosine(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    """Return the least cosine between vectors of the last axis, at most 1; NaN if one is."""
    a, b = first.astype(np.float64), second.astype(np.float64)
    with np.errstate(invalid="ignore"):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(np.minimum((a * b).sum(axis=-1) / lengths, 1).min())
