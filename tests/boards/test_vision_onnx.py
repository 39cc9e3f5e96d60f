"""The vision part as an ONNX file: what is in it, and that it computes what the reference does."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from edgevl.boards import vision_onnx
from edgevl.boards.vision_graph import vision_graph
from edgevl.boards.vision_onnx import LEAST_COSINE, cosine_to_reference, write_vision_onnx
from edgevl.checkpoint import Checkpoint, expected_tensors, parse_config
from edgevl.engine import ReferenceEngine
from edgevl.engine.reference import VISION_PREFIXES
from edgevl.errors import BoardError
from edgevl.machine import this_machine
from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import write_checkpoint
from storage import CHAT, random_tensors, write_directory

# All that an InternViT needs; compilers of boards know them.
OPERATORS = set(
    "Add Concat Conv Div Erf LayerNormalization MatMul Mul ReduceMean Reshape Slice Softmax Sqrt "
    "Transpose".split()
)


def variant(preset="mini-llama", vision=None, **changes):
    config = PRESETS[preset].config
    return replace(config, vision=replace(config.vision, **(vision or {})), **changes)


LARGE = {"norm_type": "rms_norm", "use_qk_norm": True}
# Model and layout; the last has another grid, odd sizes of heads, and `LARGE` without biases.
VARIANTS = {
    "layer_norm": (variant(), "internvl_chat"),
    "hf": (variant(), "hf"),
    "no_bias": (variant(vision={"qkv_bias": False}), "internvl_chat"),
    "rms_norm_with_bias": (variant(vision=LARGE), "hf"),
    "v1": (variant(ps_version="v1"), "internvl_chat"),
    "quarter": (variant(downsample_ratio=0.25), "internvl_chat"),
    "no_shuffle": (variant(downsample_ratio=1.0), "internvl_chat"),
    "select_layer": (variant(select_layer=-2), "internvl_chat"),
    "select_no_layer": (variant(select_layer=0), "internvl_chat"),
    "6b_v1": (variant("mini-6b", ps_version="v1"), "internvl_chat"),
}


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Return a function: name of a variant -> open checkpoint."""
    opened = {}

    def make(name):
        if name not in opened:
            config, layout = VARIANTS[name]
            directory = tmp_path_factory.mktemp("vision") / name
            write_checkpoint(config, directory, layout=layout, base_vocabulary=560)
            opened[name] = Checkpoint.open(directory)
        return opened[name]

    yield make
    for checkpoint in opened.values():
        checkpoint.close()


def run(path, pixels):
    return onnxruntime.InferenceSession(path).run(["output"], {"image": pixels})[0]


@pytest.mark.parametrize("name", VARIANTS)
def test_the_file_computes_what_the_reference_does(checkpoint_of, tmp_path, name):
    checkpoint = checkpoint_of(name)
    cosine = write_vision_onnx(checkpoint, tmp_path / "vision.onnx")
    assert LEAST_COSINE <= cosine <= 1
    assert [path.name for path in tmp_path.iterdir()] == ["vision.onnx"]
    size = checkpoint.config.vision.image_size
    pixels = np.random.default_rng(3).standard_normal((1, 3, size, size), np.float32)
    expected = ReferenceEngine(checkpoint).encode_images(pixels)
    np.testing.assert_allclose(
        run(tmp_path / "vision.onnx", pixels), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", ["layer_norm", "6b_v1"])
def test_the_file_is_static_and_of_an_opset_that_boards_take(checkpoint_of, tmp_path, name):
    checkpoint = checkpoint_of(name)
    write_vision_onnx(checkpoint, tmp_path / "vision.onnx")
    model = onnx.shape_inference.infer_shapes(
        onnx.load(tmp_path / "vision.onnx"), strict_mode=True, check_type=True
    )
    config, graph = checkpoint.config, model.graph
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 17)]
    assert model.ir_version <= 8
    assert {node.op_type for node in graph.node} <= OPERATORS
    size, hidden = config.vision.image_size, config.text.hidden_size
    shapes = {value.name: shape(value) for value in (*graph.input, *graph.output)}
    assert shapes == {"image": [1, 3, size, size], "output": [1, config.image_tokens, hidden]}
    produced = {output for node in graph.node for output in node.output}
    inferred = {
        value.name: shape(value)
        for value in (*graph.value_info, *graph.output)
        if value.name in produced
    }
    assert produced == set(inferred)
    assert all(min(sizes) > 0 for sizes in inferred.values())
    assert len({node.name for node in graph.node}) == len(graph.node)


def shape(value):
    kind = value.type.tensor_type
    assert kind.elem_type == onnx.TensorProto.FLOAT
    return [dim.dim_value for dim in kind.shape.dim]


def test_a_graph_of_full_size_needs_no_weights():
    config = PRESETS["internvl3_5-1b"].config
    model, weights = vision_graph(config)
    proto = onnx.shape_inference.infer_shapes(onnx_ir.to_proto(model), strict_mode=True)
    assert proto.ByteSize() < 1 << 20
    assert shape(proto.graph.output[0]) == [1, 256, 1024]
    stored = expected_tensors(config).items()
    elements = sum(np.prod(shape) for name, shape in stored if name.startswith(VISION_PREFIXES))
    assert sum(np.prod(weight.shape) for weight in weights.values()) == elements


@pytest.mark.parametrize("name", ["rms_norm_with_bias", "v1"])
def test_the_comparison_notices_every_weight(checkpoint_of, tmp_path, name):
    checkpoint = checkpoint_of(name)
    write_vision_onnx(checkpoint, tmp_path / "vision.onnx")
    model = onnx.load(tmp_path / "vision.onnx")
    rng = np.random.default_rng(0)
    weights = vision_graph(checkpoint.config)[1]
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in weights]
    assert len(tensors) == len(weights)
    for tensor in tensors:
        # With layer_norm alone: what is added to all keys changes no weight of attention.
        if tensor.name.endswith("attn.k.bias") and name == "v1":
            continue
        values, stored = onnx.numpy_helper.to_array(tensor), tensor.raw_data
        noise = rng.standard_normal(values.shape, np.float32)
        tensor.raw_data = (values + noise).astype(np.float32).tobytes()
        onnx.save(model, tmp_path / "broken.onnx")
        tensor.raw_data = stored
        assert cosine_to_reference(checkpoint, tmp_path / "broken.onnx") < LEAST_COSINE, tensor.name
    onnx.save(model, tmp_path / "broken.onnx")
    assert cosine_to_reference(checkpoint, tmp_path / "broken.onnx") >= LEAST_COSINE


def test_bytes_are_normalised_outside_of_the_file(checkpoint_of, tmp_path, monkeypatch):
    checkpoint = checkpoint_of("layer_norm")
    write_vision_onnx(checkpoint, tmp_path / "floats.onnx")
    assert write_vision_onnx(checkpoint, tmp_path / "bytes.onnx", uint8_input=True) >= LEAST_COSINE
    same = [(tmp_path / f"{name}.onnx").read_bytes() for name in ("floats", "bytes")]
    assert same[0] == same[1]
    monkeypatch.setattr(vision_onnx, "byte_statistics", lambda mean, std: ([0] * 3, [255] * 3))
    with pytest.raises(BoardError, match="cosine"):
        write_vision_onnx(checkpoint, tmp_path / "wrong.onnx", uint8_input=True)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_weights_leave_no_file(tmp_path, value):
    tensors = random_tensors(expected_tensors(parse_config(CHAT, "config.json")[1]))
    tensors["mlp1.3.bias"][0] = value
    out = tmp_path / "out"
    out.mkdir()
    with (
        Checkpoint.open(write_directory(tmp_path / "damaged", CHAT, tensors)) as checkpoint,
        pytest.raises(BoardError, match=r"cosine of nan, expected at least 0\.99999"),
    ):
        write_vision_onnx(checkpoint, out / "vision.onnx")
    assert not list(out.iterdir())


def test_what_cannot_be_written_is_refused(checkpoint_of, tmp_path):
    checkpoint = checkpoint_of("layer_norm")
    with pytest.raises(OSError, match=r"cannot be written: No such file.*nowhere.vision\.onnx"):
        write_vision_onnx(checkpoint, tmp_path / "nowhere" / "vision.onnx")
    text_only = SimpleNamespace(path=Path("model"), has_vision=False)
    with pytest.raises(BoardError, match="model: has no vision encoder"):
        write_vision_onnx(text_only, tmp_path / "vision.onnx")
    vision = {
        "hidden_size": 3200, "intermediate_size": 12800, "num_hidden_layers": 45,
        "num_attention_heads": 25, "image_size": 448,
    }  # fmt: skip
    config = variant("mini-6b", vision=vision)
    large = SimpleNamespace(path=Path("model"), has_vision=True, config=config)
    with pytest.raises(BoardError, match=r"model: .* has 20\.\d GiB in float32, .* holds 2 GiB"):
        write_vision_onnx(large, tmp_path / "vision.onnx")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_gives_both_numbers(checkpoint_of, tmp_path, monkeypatch):
    machine = replace(this_machine(), available_bytes=2**10)
    monkeypatch.setattr(vision_onnx, "this_machine", lambda: machine)
    with pytest.raises(BoardError, match=r"needs 0\.0 GiB of memory, 0\.0 GiB are free"):
        write_vision_onnx(checkpoint_of("layer_norm"), tmp_path / "vision.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnx_ir", "onnxslim", "onnxruntime"])
def test_a_missing_library_says_what_to_install(checkpoint_of, tmp_path, monkeypatch, library):
    monkeypatch.delitem(sys.modules, "edgevl.boards.vision_graph", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(BoardError, match=rf"{library} is missing: pip install 'edgevl\[axera\]'"):
        write_vision_onnx(checkpoint_of("layer_norm"), tmp_path / "vision.onnx")
    assert not list(tmp_path.iterdir())


def test_pytorch_is_not_imported(checkpoint_of, tmp_path):
    code = f"""
import sys
from pathlib import Path
from edgevl.boards import calibration_archive, pulsar2_config, vision_onnx
from edgevl.checkpoint import Checkpoint
checkpoint = Checkpoint.open({str(checkpoint_of("layer_norm").path)!r})
vision_onnx.write_vision_onnx(checkpoint, Path("vision.onnx"))
calibration_archive.write_calibration(checkpoint, None, Path("tiles.tar"), 1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
