"""The vision part of a model as Pulsar2 takes it: an ONNX file, and tiles to calibrate it on.

InternViT, pixel shuffle and projector are a graph, made node by node and compared with
`edgevl.engine.reference`, which says what is computed. It is what NPU compilers take as it is:
static shapes, one tile, no Resize (the position embedding is a constant), attention as MatMul and
Softmax, GELU as PyTorch writes it, Transposes of four axes at most. Queries, keys and values are
three MatMuls, so that each is quantized in a range of its own.

Shapes: P patches and the class token, C vision hidden size, T image tokens, H text hidden size.
"""

from __future__ import annotations

import io
import math
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.checkpoint import Checkpoint, ModelConfig, expected_tensors
from edgevl.checkpoint.architecture import PROJECTOR, VISION, vision_layers
from edgevl.engine.reference import PROJECTOR_NORM_EPS, ReferenceVision
from edgevl.errors import BoardError, ImageError, needs
from edgevl.files import replacing
from edgevl.machine import this_machine
from edgevl.preprocess import load_image
from edgevl.preprocess.picture import byte_statistics, split, to_pixels
from edgevl.quantize.calibration.pictures import choose_pictures, drawn, open_pictures

with needs("axera", BoardError):
    import onnx
    import onnx_ir as ir
    import onnxruntime
    import onnxslim

#: Names of the graph's input, float32 [1, 3, tile, tile], and output, float32 [1, T, H].
INPUT, OUTPUT = "image", "output"
#: The newest opset that boards' compilers are sure to read, and the IR version that came with it.
OPSET, IR_VERSION = 17, 8
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
        BoardError: the machine has too little memory, or the two differ by more than rounding does.
        OSError: the file cannot be written.
    """
    model, weights = vision_graph(checkpoint.config)
    needed = MEMORY_FACTOR * sum(4 * math.prod(weight.shape) for weight in weights.values())
    available = this_machine().available_bytes
    if needed > available:
        raise BoardError(
            f"{checkpoint.path}: writing its vision encoder as ONNX needs {needed / 2**30:.1f} GiB "
            f"of memory, {available / 2**30:.1f} GiB are free: close other programs, or use a "
            "larger machine"
        )
    with replacing(path) as file:
        beside = Path(file.name)  # the libraries open it themselves
        slim = ir.from_proto(onnxslim.slim(ir.to_proto(model)))
        fill(slim, weights, checkpoint)
        ir.save(slim, beside, format="protobuf")
        onnx.checker.check_model(beside, full_check=True)
        cosine = cosine_to_reference(checkpoint, beside, uint8_input)
        if not cosine >= LEAST_COSINE:  # so that NaN fails too
            raise BoardError(
                f"{checkpoint.path}: vision features from ONNX and from the reference engine have "
                f"a cosine of {cosine:.6f}, expected at least {LEAST_COSINE}; the weights are "
                "damaged, or a library computes wrongly: get the checkpoint again, or other "
                "versions of onnx, onnxslim and onnxruntime"
            )
    return cosine


def cosine_to_reference(checkpoint: Checkpoint, path: Path, uint8_input: bool = False) -> float:
    """Return the least cosine between an image token's features from ``path`` and the reference.

    Three tiles are compared: two of noise and a drawn picture. It is NaN where a feature is. See
    `write_vision_onnx`.

    Raises:
        EdgeVLError: the machine has too little memory.
    """
    config = checkpoint.config
    size = config.vision.image_size
    noise = np.random.default_rng(0).integers(0, 256, (_NOISE_TILES, size, size, 3), np.uint8)
    tiles = [Image.fromarray(tile) for tile in noise]
    tiles += split(drawn(_STREET, 0), size, 1, 1, thumbnail=False)
    pixels = to_pixels(tiles, config.image_mean, config.image_std)
    reference = ReferenceVision(checkpoint)
    expected = np.concatenate([reference.encode_tiles(tile[None]) for tile in pixels])
    del reference  # before ONNX Runtime loads the same weights
    if uint8_input:
        statistics = byte_statistics(config.image_mean, config.image_std)
        mean, std = (np.array(values, np.float32) for values in statistics)
        values = np.stack([np.asarray(tile, np.float32) for tile in tiles])
        pixels = ((values - mean) / std).transpose(0, 3, 1, 2)
    options = onnxruntime.SessionOptions()
    # The graph is to be run as it stands, and a second copy of the weights to be avoided.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    found = np.concatenate([session.run(None, {INPUT: tile[None]})[0] for tile in pixels])
    a, b = found.astype(np.float64), expected.astype(np.float64)
    with np.errstate(invalid="ignore"):
        lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        return float(np.minimum((a * b).sum(axis=-1) / lengths, 1).min())


def write_calibration(checkpoint: Checkpoint, source: Path | None, path: Path, samples: int) -> int:
    """Write a tar file of tiles as ``calibration_format`` Image has them: RGB PNGs of tile size.

    Tiles are pixels before normalisation: Pulsar2 normalises what it reads from pictures by
    ``calibration_mean`` and ``calibration_std``, whatever the board is to take later. Arrays
    (Numpy) would have to be normalised here, in float32, and be larger.

    Each picture gives one tile, made as `prepare_picture` does for one tile: that is what a board
    sees, where a tile takes 256 of the 1024 tokens that a prefill holds. The same source and
    version of Pillow give the same bytes.

    Args:
        checkpoint: of the model; it says how large a tile is.
        source: a directory or a tar file of pictures; None for drawn ones.
        path: of the tar file to write; its directory exists.
        samples: tiles wanted, one or more.

    Returns:
        How many were written: fewer than wanted if there are fewer different pictures.

    Raises:
        OSError: the file cannot be written.
        EdgeVLError: the pictures cannot be read.
    """
    size = checkpoint.config.vision.image_size
    if source is None:
        images: Iterator[Image.Image] = map(drawn, range(samples), range(samples))
    else:
        images = _different_pictures(source, samples)
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for index, image in enumerate(images):
            png = io.BytesIO()
            split(image, size, 1, 1, thumbnail=False)[0].save(png, "PNG")
            info = tarfile.TarInfo(f"{index:04}.png")
            info.size = png.tell()
            png.seek(0)
            tar.addfile(info, png)
    return index + 1


def _different_pictures(source: Path, count: int) -> Iterator[Image.Image]:
    """Read pictures, evenly spread over all there are."""
    files = open_pictures(source)
    try:
        found, _ = choose_pictures(files, count)
        for picture in found:
            try:
                yield load_image(files.read(picture.place))
            except ImageError as error:
                raise BoardError(
                    f"{source}: changed while it was read ({error}); run the command again"
                ) from None
    finally:
        files.close()


@dataclass(frozen=True)
class Weight:
    """Where the values of a weight of the graph come from.

    Attributes:
        name: canonical name of the stored tensor.
        shape: of the weight in the graph.
        rows: rows of the stored tensor, or None for all.
        transposed: whether rows become columns: linear weights of the graph are [in, out].
    """

    name: str
    shape: tuple[int, ...]
    rows: slice | None = None
    transposed: bool = False

    def read(self, checkpoint: Checkpoint) -> NDArray[np.float32]:
        """Return the values, C-contiguous."""
        values = checkpoint.tensor(self.name, self.rows)
        checkpoint.release()  # pages of the file that have been read would add up
        return np.ascontiguousarray(values.T) if self.transposed else values


def vision_graph(config: ModelConfig) -> tuple[ir.Model, dict[str, Weight]]:
    """Return the vision part of a model and its weights, by their names in the graph.

    The weights are inputs of the graph, after `INPUT`, and have no values: so it is small, and what
    works on graphs need not copy them. `fill` makes constants of them.
    """
    graph = _VisionGraph(config)
    return graph.build(), graph.weights


def fill(model: ir.Model, weights: dict[str, Weight], checkpoint: Checkpoint) -> None:
    """Make constants of the weights of `vision_graph`; each is read when it is serialized."""
    graph = model.graph
    values = [value for value in graph.inputs if value.name in weights]
    for value in values:
        assert value.name is not None  # it is one of the weights'
        weight = weights[value.name]
        graph.inputs.remove(value)
        value.const_value = ir.LazyTensor(
            lambda weight=weight: ir.tensor(weight.read(checkpoint)),  # type: ignore[misc]
            ir.DataType.FLOAT,
            ir.Shape(weight.shape),
            name=value.name,
        )
        graph.register_initializer(value)


class _VisionGraph:
    """Appends nodes to a tape. Methods take and return values of the graph.

    Attributes:
        weights: by their names in the graph.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.weights: dict[str, Weight] = {}
        self._config = config
        self._shapes = expected_tensors(config)
        self._tape = ir.tape.Tape()
        self._inputs: list[ir.Value] = []
        self._scalars: dict[str, ir.Value] = {}

    def build(self) -> ir.Model:
        config = self._config
        size = config.vision.image_size
        image = _value(INPUT, (1, 3, size, size))
        x = self._patch_embeddings(image)
        for layer in range(vision_layers(config)):
            x = self._layer(f"{VISION}encoder.layers.{layer}.", x)
        features = self._project(self._pixel_shuffle(x))
        graph = ir.Graph(
            [image, *self._inputs],
            [features],
            nodes=self._tape.nodes,
            initializers=self._tape.initializers,
            opset_imports={"": OPSET},
            name="internvl_vision",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="edgevl")

    def _patch_embeddings(self, image: ir.Value) -> ir.Value:
        """Embed patches and prepend the class token: [1, P, C]."""
        vision, name = self._config.vision, VISION + "embeddings."
        patch = [vision.patch_size] * 2
        x = self._op(
            name + "patch_embedding",
            "Conv",
            image,
            self._weight(name + "patch_embedding.weight"),
            self._weight(name + "patch_embedding.bias"),
            kernel_shape=patch,
            strides=patch,
        )
        x = self._reshape(name + "patches", x, (1, vision.hidden_size, vision.num_patches))
        x = self._transpose(name + "patches", x, (0, 2, 1))
        x = self._op(name + "tokens", "Concat", self._weight(name + "class_embedding"), x, axis=1)
        return self._op(name + "positions", "Add", x, self._weight(name + "position_embedding"))

    def _layer(self, name: str, x: ir.Value) -> ir.Value:
        """Append a layer of the encoder: [1, P, C] -> [1, P, C]."""
        y = self._attention(name + "attn.", self._norm(name + "norm1", x))
        x = self._residual(name + "ls1", x, y)
        y = self._linear(name + "mlp.fc1", self._norm(name + "norm2", x))
        y = self._linear(name + "mlp.fc2", self._gelu(name + "mlp.gelu", y))
        return self._residual(name + "ls2", x, y)

    def _attention(self, name: str, x: ir.Value) -> ir.Value:
        vision = self._config.vision
        heads = (1, vision.num_patches + 1, vision.num_attention_heads, vision.head_dim)
        parts = []
        for index, (part, axes) in enumerate(
            (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3)))
        ):
            rows = slice(index * vision.hidden_size, (index + 1) * vision.hidden_size)
            y = self._linear(name + "qkv", x, rows, name + part)
            if vision.use_qk_norm and part != "v":
                y = self._rms_norm(f"{name}{part}_norm", y)
            y = self._reshape(f"{name}{part}.heads", y, heads)
            parts.append(self._transpose(f"{name}{part}.heads", y, axes))
        query, key, value = parts
        scores = self._op(name + "scores", "MatMul", query, key)
        scale = self._scalar("attention_scale", vision.head_dim**-0.5)
        scores = self._op(name + "scaled", "Mul", scores, scale)
        weights = self._op(name + "weights", "Softmax", scores, axis=-1)
        mixed = self._op(name + "mixed", "MatMul", weights, value)
        mixed = self._transpose(name + "mixed", mixed, (0, 2, 1, 3))
        mixed = self._reshape(name + "mixed", mixed, (1, heads[1], vision.hidden_size))
        return self._linear(name + "proj", mixed)

    def _pixel_shuffle(self, x: ir.Value) -> ir.Value:
        """Leave the class token out and merge n x n patches: [1, P, C] -> [1, T, C·n²]."""
        config, vision, n = self._config, self._config.vision, self._config.shuffle
        name, side = "pixel_shuffle", vision.image_size // vision.patch_size
        bounds = [
            self._constant(f"{name}.{bound}", np.array([value], np.int64))
            for bound, value in (("start", 1), ("end", vision.num_patches + 1), ("axis", 1))
        ]
        x = self._op(name + ".patches", "Slice", x, *bounds)
        blocks = (side // n, n, side // n, n * vision.hidden_size)
        x = self._reshape(name + ".blocks", x, blocks)
        # As the first InternVL did it, v1 has the two spatial axes swapped.
        axes = (2, 0, 1, 3) if config.ps_version == "v1" else (0, 2, 1, 3)
        x = self._transpose(name + ".blocks", x, axes)
        return self._reshape(name, x, (1, config.image_tokens, n * n * vision.hidden_size))

    def _project(self, x: ir.Value) -> ir.Value:
        """Project to the text model: [1, T, C·n²] -> [1, T, H]."""
        x = self._layer_norm(PROJECTOR + "0", x, PROJECTOR_NORM_EPS)
        x = self._gelu(PROJECTOR + "2", self._linear(PROJECTOR + "1", x))
        config = self._config
        features = _value(OUTPUT, (1, config.image_tokens, config.text.hidden_size))
        return self._linear(PROJECTOR + "3", x, output=features)

    # --- parts of a layer -------------------------------------------------------------------

    def _residual(self, name: str, x: ir.Value, y: ir.Value) -> ir.Value:
        """Scale a branch by the vector ``name`` and add it."""
        y = self._op(name + ".scaled", "Mul", y, self._weight(name))
        return self._op(name + ".sum", "Add", x, y)

    def _linear(
        self,
        name: str,
        x: ir.Value,
        rows: slice | None = None,
        alias: str | None = None,
        output: ir.Value | None = None,
    ) -> ir.Value:
        """Apply ``rows`` of a linear layer; ``alias`` names these rows in the graph."""
        alias = alias or name
        weight = self._weight(name + ".weight", alias + ".weight", rows, transposed=True)
        bias = name + ".bias" in self._shapes
        y = self._op(alias + ".matmul", "MatMul", x, weight, output=None if bias else output)
        if not bias:
            return y
        bias_value = self._weight(name + ".bias", alias + ".bias", rows)
        return self._op(alias, "Add", y, bias_value, output=output)

    def _norm(self, name: str, x: ir.Value) -> ir.Value:
        vision = self._config.vision
        if vision.norm_type == "rms_norm":
            return self._rms_norm(name, x)
        return self._layer_norm(name, x, vision.layer_norm_eps)

    def _layer_norm(self, name: str, x: ir.Value, eps: float) -> ir.Value:
        weight, bias = self._weight(name + ".weight"), self._weight(name + ".bias")
        return self._op(name, "LayerNormalization", x, weight, bias, axis=-1, epsilon=eps)

    def _rms_norm(self, name: str, x: ir.Value) -> ir.Value:
        square = self._op(name + ".square", "Mul", x, x)
        mean = self._op(name + ".mean", "ReduceMean", square, axes=[-1], keepdims=1)
        eps = self._scalar("layer_norm_eps", self._config.vision.layer_norm_eps)
        root = self._op(name + ".root", "Sqrt", self._op(name + ".sum", "Add", mean, eps))
        y = self._op(name + ".normalised", "Div", x, root)
        return self._op(name, "Mul", y, self._weight(name + ".weight"))

    def _gelu(self, name: str, x: ir.Value) -> ir.Value:
        """Append GELU as PyTorch exports it, which compilers know; opset 17 has no Gelu."""
        y = self._op(name + ".div", "Div", x, self._scalar("sqrt_2", math.sqrt(2)))
        y = self._op(name + ".erf", "Erf", y)
        y = self._op(name + ".add", "Add", y, self._scalar("one", 1.0))
        y = self._op(name + ".mul", "Mul", x, y)
        return self._op(name, "Mul", y, self._scalar("half", 0.5))

    # --- nodes and constants ----------------------------------------------------------------

    def _op(
        self,
        name: str,
        op_type: str,
        *inputs: ir.Value,
        output: ir.Value | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """Append a node of that name, and return its value."""
        output = output or ir.Value(name=f"{name}.{op_type.lower()}_out")
        return self._tape.op(op_type, inputs, attributes, name=f"{name}/{op_type}", output=output)

    def _reshape(self, name: str, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        value = self._constant(name + ".shape", np.array(shape, np.int64))
        return self._op(name, "Reshape", x, value)

    def _transpose(self, name: str, x: ir.Value, axes: Sequence[int]) -> ir.Value:
        return self._op(name, "Transpose", x, perm=list(axes))

    def _scalar(self, name: str, number: float) -> ir.Value:
        """Return a constant that all nodes share."""
        if name not in self._scalars:
            self._scalars[name] = self._constant(name, np.array(number, np.float32))
        return self._scalars[name]

    def _constant(self, name: str, values: NDArray[Any]) -> ir.Value:
        return self._tape.initializer(ir.tensor(values, name=name))

    def _weight(
        self,
        name: str,
        alias: str | None = None,
        rows: slice | None = None,
        transposed: bool = False,
    ) -> ir.Value:
        """Return a stored tensor, or ``rows`` of it, which ``alias`` names in the graph."""
        count, *rest = self._shapes[name]
        shape = (count if rows is None else rows.stop - rows.start, *rest)
        shape = shape[::-1] if transposed else shape
        alias = alias or name
        self.weights[alias] = Weight(name, shape, rows, transposed)
        value = _value(alias, shape)
        self._inputs.append(value)
        return value


def _value(name: str, shape: Sequence[int]) -> ir.Value:
    """Return a float32 value with a name and a shape."""
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
