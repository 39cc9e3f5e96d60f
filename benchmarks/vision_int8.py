"""How far INT8 takes a vision encoder from float32, layer by layer: EdgeVL, OpenVINO, ONNX Runtime.

    python benchmarks/vision_int8.py CHECKPOINT PICTURE [PICTURE ...] --work DIR [--harder 64]

All calibrate on the same drawn pictures and are measured on the tiles of the pictures given. The
others get the ONNX file that `edgevl compile` writes. A figure is ‖ŷ - y‖ / ‖y‖, y in float32, of
the hidden states after a layer or of the features. ``--harder N`` first makes some channels between
each norm and its linear layer N times larger and the weights that read them as much smaller: a
power of two, so the float result stays, and INT8 has the less room for all other channels.

EdgeVL's hidden states are from the same rounding in PyTorch, its last line is from the engine.
Needs ``edgevl[axera,quantize]`` and, for OpenVINO, ``openvino`` and ``nncf``.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from edgevl import _native
from edgevl.boards.vision import INPUT, write_vision_onnx
from edgevl.checkpoint import Checkpoint
from edgevl.engine.cpu import CpuEngine
from edgevl.engine.plan import vision_matrices
from edgevl.engine.smoothing import producer
from edgevl.options import LoadOptions
from edgevl.preprocess.picture import prepare_picture
from edgevl.quantize import QuantizationSettings
from edgevl.quantize.calibration.pictures import drawn
from edgevl.quantize.output import quantization_fields, write_checkpoint
from edgevl.quantize.vision import SmoothedTensors, quantize_vision
from edgevl.quantize.vision_network import EXACT, Rounding, VisionNetwork
from edgevl.version import __version__

#: Of so many channels one is made larger by ``--harder``.
EVERY = 64
#: Hidden states after each layer, then the features: float32 [B, ...] each.
States = list[NDArray[np.float32]]
Encoder = Callable[[NDArray[np.float32]], States]


def main() -> None:
    """Prepare, quantize, measure, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    parser.add_argument("pictures", type=Path, nargs="+", metavar="PICTURE")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR")
    parser.add_argument("--harder", type=int, default=1, metavar="N", help="a power of two")
    parser.add_argument("--tiles", type=int, default=4, help="most of a picture")
    parser.add_argument("--calibration", type=int, default=16, help="drawn pictures")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    work: Path = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    path = arguments.checkpoint
    if arguments.harder > 1:
        path = write_harder(path, fresh(work / "harder"), arguments.harder)
    with Checkpoint.open(path) as checkpoint:
        tiles = picture_tiles(checkpoint, arguments.pictures, arguments.tiles)
        pictures = [drawn(place, place) for place in range(arguments.calibration)]
        calibration = picture_tiles(checkpoint, pictures, 1)
        plain, smoothed = ours(checkpoint, calibration, tiles, fresh(work / "smoothed"))
        write_vision_onnx(checkpoint, work / "vision.onnx")
        show_layers(work / "vision.onnx")
        encoders: dict[str, Encoder] = {
            "EdgeVL": plain,
            "EdgeVL, quantized": smoothed,
            "ONNX Runtime": onnxruntime_int8(work / "vision.onnx"),
        }
        try:
            encoders["OpenVINO"] = openvino_int8(work / "vision.onnx", calibration)
        except ImportError as missing:
            print(f"OpenVINO is left out: {missing}")
        expected = network_states(VisionNetwork(checkpoint), tiles, EXACT)
        errors = {name: compare(encode(tiles), expected) for name, encode in encoders.items()}
    print(
        f"\n{len(tiles)} tiles of {len(arguments.pictures)} pictures, harder {arguments.harder}\n"
    )
    print(table(errors))
    for name, directory in (("EdgeVL", path), ("EdgeVL, quantized", work / "smoothed")):
        with Checkpoint.open(directory) as checkpoint:
            features = CpuEngine(checkpoint, LoadOptions(cache=False)).encode_images(tiles)
        print(f"features of the engine, {name}: {relative_error(features, expected[-1]):.2%}")


def fresh(directory: Path) -> Path:
    """Return an empty directory."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def write_harder(source: Path, directory: Path, factor: int) -> Path:
    """Write a checkpoint whose norms give some channels ``factor`` times larger.

    The channels are those of the linear layers that read them, every `EVERY`-th, another one first
    in each layer. It computes what the original computes, but for float16's least numbers.
    """
    with Checkpoint.open(source) as checkpoint:
        factors: dict[str, NDArray[np.float32]] = {}
        for matrix in vision_matrices(checkpoint.config, "int8"):
            weight = matrix.parts[0].weight
            if "norm" in (producer(weight) or ""):
                factors[weight] = np.ones(matrix.cols, np.float32)
                factors[weight][len(factors) % EVERY :: EVERY] = 1 / factor
        write_checkpoint(checkpoint, directory, {}, SmoothedTensors(checkpoint, factors), {})
    return directory


def picture_tiles(
    checkpoint: Checkpoint, pictures: Sequence[Any], most: int
) -> NDArray[np.float32]:
    """Return the tiles of pictures as a prompt has them: float32 [B, 3, tile, tile]."""
    return np.concatenate(
        [prepare_picture(each, checkpoint.config, most).pixels for each in pictures]
    )


def ours(
    checkpoint: Checkpoint,
    calibration: NDArray[np.float32],
    tiles: NDArray[np.float32],
    directory: Path,
) -> tuple[Encoder, Encoder]:
    """Write the checkpoint that `edgevl quantize` would; return what rounds as it is, and that."""
    decided = quantize_vision(checkpoint, calibration, tiles)
    fields = quantization_fields(QuantizationSettings(text="none"), decided.keep, __version__)
    write_checkpoint(checkpoint, directory, {}, decided.tensors, fields)
    smoothed = [row["name"] for row in decided.layers if row["alpha"] is not None]
    print(f"Calibration smoothed {len(smoothed)} linear layers better, kept {decided.keep}")
    worst = sorted(decided.layers, key=lambda row: row["error"], reverse=True)[:5]
    for row in worst:
        print(f"  {row['name']}: {row['plain_error']:.2%}, quantized {row['error']:.2%}")
    network = VisionNetwork(checkpoint)
    plain = network.as_loaded()
    kept = {name: replace(plain.matrices[name], format="bf16") for name in decided.keep}
    factors = {name: torch.from_numpy(each) for name, each in decided.tensors.factors.items()}
    chosen = Rounding({**plain.matrices, **kept}, factors)
    return (
        lambda tiles: network_states(network, tiles, plain),
        lambda tiles: network_states(network, tiles, chosen),
    )


def network_states(
    network: VisionNetwork, tiles: NDArray[np.float32], rounding: Rounding
) -> States:
    """Return all states with a rounding."""
    x, states = network.embed(tiles, rounding), []
    for stage in range(len(network.stages)):
        x = network.run(stage, x, rounding)
        states.append(x.numpy())
    return states


def show_layers(path: Path) -> None:
    """Make the hidden states after each layer outputs of an ONNX file, before the features."""
    model = onnx.load(path)
    [features] = model.graph.output
    shown = [
        onnx.helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, None)
        for node in model.graph.node
        if "ls2.sum" in node.name
    ]
    del model.graph.output[:]
    model.graph.output.extend([*shown, features])
    onnx.save(model, path)


def each_tile(run: Callable[[NDArray[np.float32]], Sequence[Any]]) -> Encoder:
    """Return what runs tiles one by one, [1, 3, tile, tile] -> all states of it."""
    return lambda tiles: [
        np.concatenate(parts) for parts in zip(*(run(tile[None]) for tile in tiles), strict=True)
    ]


def saturates() -> bool:
    """Tell whether this processor adds pairs of products of bytes in 16 bits, as AVX2 without VNNI.

    They do not fit, and the others advise weights of 7 bits there.
    """
    return bool(_native.instruction_sets()[0] == "avx2")


def onnxruntime_int8(path: Path) -> Encoder:
    """Quantize dynamically, weights by channel, as the runtime's guide advises for transformers."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared, target = path.with_suffix(".prepared.onnx"), path.with_suffix(".int8.onnx")
    quant_pre_process(path, prepared, skip_symbolic_shape=True)
    quantize_dynamic(
        prepared,
        target,
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=saturates(),
    )
    session = onnxruntime.InferenceSession(target, providers=["CPUExecutionProvider"])
    return each_tile(lambda tile: session.run(None, {INPUT: tile}))


def openvino_int8(path: Path, calibration: NDArray[np.float32]) -> Encoder:
    """Quantize with NNCF after training, as it advises for transformers.

    Raises:
        ImportError: a package is missing.
    """
    import nncf
    import openvino

    tiles = nncf.Dataset([tile[None] for tile in calibration])
    fix = nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.FIRST_LAYER
    model = nncf.quantize(
        openvino.Core().read_model(path),
        tiles,
        model_type=nncf.ModelType.TRANSFORMER,
        advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=fix),
    )
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return each_tile(lambda tile: list(compiled(tile).values()))


def compare(states: States, expected: States) -> list[float]:
    """Return the relative error of each state."""
    return [relative_error(*pair) for pair in zip(states, expected, strict=True)]


def relative_error(values: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return the distance of two arrays over the length of the second."""
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def table(errors: Mapping[str, list[float]]) -> str:
    """Return the lines of a table: a column for each stack, a row for each state."""
    count = len(next(iter(errors.values())))
    names = [*(f"layer {number}" for number in range(count - 1)), "features"]
    lines = [f"| after | {' | '.join(errors)} |", "|---" * (len(errors) + 1) + "|"]
    for name, row in zip(names, zip(*errors.values(), strict=True), strict=True):
        lines.append(f"| {name} | {' | '.join(f'{error:.2%}' for error in row)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
