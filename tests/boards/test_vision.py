"""The vision part as Pulsar2 takes it.

What is in the ONNX file, that it computes what the reference does, and the archive of tiles that a
vision encoder is calibrated on.
"""

import io
import subprocess
import sys
import tarfile
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from PIL import Image

from edgevl.boards import vision
from edgevl.boards.pulsar2_config import default_config
from edgevl.boards.settings import CompileSettings
from edgevl.boards.vision import (
    LEAST_COSINE,
    cosine_to_reference,
    vision_graph,
    write_calibration,
    write_vision_onnx,
)
from edgevl.checkpoint import Checkpoint, expected_tensors, parse_config
from edgevl.engine import ReferenceEngine
from edgevl.engine.reference import VISION_PREFIXES
from edgevl.errors import BoardError, EdgeVLError
from edgevl.machine import this_machine
from edgevl.preprocess import prepare_picture
from edgevl.quantize.calibration.pictures import drawn
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
    monkeypatch.setattr(vision, "byte_statistics", lambda mean, std: ([0] * 3, [255] * 3))
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
    with pytest.raises(OSError, match=r"cannot be written: No such file.*nowhere.vision\.onnx"):
        write_vision_onnx(checkpoint_of("layer_norm"), tmp_path / "nowhere" / "vision.onnx")
    assert not list(tmp_path.iterdir())


def test_too_little_memory_gives_both_numbers(checkpoint_of, tmp_path, monkeypatch):
    machine = replace(this_machine(), available_bytes=2**10)
    monkeypatch.setattr(vision, "this_machine", lambda: machine)
    with pytest.raises(BoardError, match=r"needs 0\.0 GiB of memory, 0\.0 GiB are free"):
        write_vision_onnx(checkpoint_of("layer_norm"), tmp_path / "vision.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("library", ["onnx", "onnx_ir", "onnxslim", "onnxruntime"])
def test_a_missing_library_says_what_to_install(library):
    code = f"import sys; sys.modules[{library!r}] = None; import edgevl.boards.vision"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"BoardError: {library} is missing: pip install 'edgevl[axera]'" in done.stderr


def test_pytorch_is_not_imported(checkpoint_of, tmp_path):
    code = f"""
import sys
from pathlib import Path
from edgevl.boards import pulsar2_config, vision
from edgevl.checkpoint import Checkpoint
checkpoint = Checkpoint.open({str(checkpoint_of("layer_norm").path)!r})
vision.write_vision_onnx(checkpoint, Path("vision.onnx"))
vision.write_calibration(checkpoint, None, Path("tiles.tar"), 1)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


# --- calibration -------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as opened:
        yield opened


def read(path):
    """Names and pictures of an archive, and that nothing of when and where it was made is in it."""
    with tarfile.open(path, "r:") as tar:
        members = tar.getmembers()
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in members} == {(0, 0, 0, "", "")}
        assert all(member.isreg() for member in members)
        return {m.name: Image.open(io.BytesIO(tar.extractfile(m).read())) for m in members}


def test_drawn_tiles_are_what_preprocessing_makes(checkpoint, tmp_path):
    assert write_calibration(checkpoint, None, tmp_path / "tiles.tar", 17) == 17
    pictures = read(tmp_path / "tiles.tar")
    assert list(pictures) == [f"{index:04}.png" for index in range(17)]
    assert {(image.format, image.mode, image.size) for image in pictures.values()} == {
        ("PNG", "RGB", (56, 56))
    }
    prepared = prepare_picture(drawn(3, 3), checkpoint.config, 1).pixels
    configured = default_config(
        checkpoint.config, CompileSettings("ax650"), "tiles.tar"
    ).quant.input_configs[0]
    values = np.asarray(pictures["0003.png"], np.float32)
    normalised = (values - configured.calibration_mean) / configured.calibration_std
    np.testing.assert_allclose(normalised.transpose(2, 0, 1), prepared[0], atol=1e-5)


def test_the_same_pictures_give_the_same_bytes(checkpoint, tmp_path):
    for name in ("first.tar", "second.tar"):
        write_calibration(checkpoint, None, tmp_path / name, 3)
    first, second = ((tmp_path / name).read_bytes() for name in ("first.tar", "second.tar"))
    assert first == second


def test_a_directory_and_a_tar_of_pictures(checkpoint, tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for colour in range(5):
        Image.new("RGB", (90, 30), (50 * colour, 0, 0)).save(pictures / f"{colour}.png")
    (pictures / "damaged.jpg").write_bytes(b"no picture")
    (pictures / "twin.png").write_bytes((pictures / "0.png").read_bytes())
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        tar.add(pictures, "pictures")
    for source in (pictures, tmp_path / "pictures.tar"):
        assert write_calibration(checkpoint, source, tmp_path / "tiles.tar", 32) == 5
        tiles = read(tmp_path / "tiles.tar").values()
        # Wide pictures are squeezed into the one tile.
        assert {image.size for image in tiles} == {(56, 56)}
        assert sorted(image.getpixel((28, 28))[0] for image in tiles) == [0, 50, 100, 150, 200]
    assert write_calibration(checkpoint, pictures, tmp_path / "tiles.tar", 2) == 2
    assert len(read(tmp_path / "tiles.tar")) == 2


def test_pictures_that_cannot_be_read_leave_nothing(checkpoint, tmp_path, monkeypatch):
    for count in (0, 1025):
        with pytest.raises(BoardError, match=f"--samples {count}: must be 1 to 1024"):
            CompileSettings("ax650", samples=count)
    with pytest.raises(EdgeVLError, match="pictures: no such directory or tar file"):
        write_calibration(checkpoint, tmp_path / "pictures", tmp_path / "tiles.tar", 32)
    with pytest.raises(OSError, match=r"cannot be written: No such file.*nowhere.tiles\.tar"):
        write_calibration(checkpoint, None, tmp_path / "nowhere" / "tiles.tar", 32)
    assert not list(tmp_path.iterdir())

    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    choose = vision.choose_pictures

    def choose_and_damage(files, wanted):
        chosen = choose(files, wanted)
        (tmp_path / "picture.png").write_bytes(b"")
        return chosen

    monkeypatch.setattr(vision, "choose_pictures", choose_and_damage)
    with pytest.raises(BoardError, match="changed while it was read"):
        write_calibration(checkpoint, tmp_path, tmp_path / "tiles.tar", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
