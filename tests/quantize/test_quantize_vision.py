"""Quantization of the vision encoder: exact in floats, better in INT8, and what the engine does."""

import dataclasses
import itertools

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

from edgevl.checkpoint import Checkpoint  # noqa: E402
from edgevl.checkpoint.architecture import vision_linears  # noqa: E402
from edgevl.checkpoint.safetensors import FLOAT_TYPES, NUMPY_TYPES, StoredTensor  # noqa: E402
from edgevl.checkpoint.writer import encode  # noqa: E402
from edgevl.engine import ReferenceEngine, native_missing  # noqa: E402
from edgevl.engine.plan import vision_matrices  # noqa: E402
from edgevl.engine.smoothing import loading_factor, producer  # noqa: E402
from edgevl.loading import locate  # noqa: E402
from edgevl.options import LoadOptions  # noqa: E402
from edgevl.preprocess import prepare_picture  # noqa: E402
from edgevl.quantize import vision, vision_network  # noqa: E402
from edgevl.quantize.settings import QuantizationError  # noqa: E402
from edgevl.quantize.vision import (  # noqa: E402
    SmoothedTensors,
    quantize_vision,
)
from edgevl.quantize.vision_network import Rounding, VisionNetwork, to_int8  # noqa: E402
from edgevl.work import WorkDirectory  # noqa: E402
from outliers import with_outliers  # noqa: E402
from storage import write_directory  # noqa: E402

PICTURES = locate("tiny") / "heldout" / "images"
MINIS = ["mini-qwen3", "mini-6b"]  # LayerNorm with biases; RMSNorm with norms of queries and keys
needs_native = pytest.mark.skipif(bool(native_missing()), reason="the native engine is not built")


def off(values, expected):
    """By which share of the expected root mean square values are off."""
    return np.linalg.norm(values - expected) / np.linalg.norm(expected)


def random_tiles(config, count, seed=0):
    size = config.vision.image_size
    return np.random.default_rng(seed).standard_normal((count, 3, size, size), np.float32)


def written(directory, checkpoint, changes, dtype="F32", keep=None):
    """Write and open a checkpoint with some tensors changed; it says what is kept, if not None."""
    config = checkpoint.read_json("config.json")
    if keep is not None:
        config["edgevl_quantization"] = {"vision": {"format": "int8", "keep": list(keep)}}
    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()} | dict(changes)
    return Checkpoint.open(write_directory(directory, config, tensors, dtype))


@pytest.fixture(params=MINIS)
def mini(request, mini_checkpoint):
    with Checkpoint.open(mini_checkpoint(request.param)) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny():
    with Checkpoint.open(locate("tiny")) as opened:
        yield opened


@pytest.fixture(scope="module")
def tiny_tiles(tiny):
    pictures = sorted(PICTURES.iterdir())[:24]
    return np.concatenate([prepare_picture(path, tiny.config, 1).pixels for path in pictures])


# --- the network ---------------------------------------------------------------------------------


@pytest.mark.parametrize("ps_version", ["v1", "v2"])
@pytest.mark.parametrize("select_layer", [-1, -2])
def test_the_exact_network_is_the_reference(mini, ps_version, select_layer):
    mini.config = dataclasses.replace(mini.config, ps_version=ps_version, select_layer=select_layer)
    tiles = random_tiles(mini.config, 2)
    network = VisionNetwork(mini)
    x = network.embed(tiles)
    for stage in range(len(network.stages)):
        x = network.run(stage, x)
    assert off(x.numpy(), ReferenceEngine(mini).encode_images(tiles)) < 1e-5


def test_rounding_to_int8():
    x = torch.tensor([[127.0, -0.5, 1.5, 2.4, -254.0, 3.0], [0.0] * 6])
    assert to_int8(x).tolist() == [[128.0, -0.0, 2.0, 2.0, -254.0, 4.0], [0.0] * 6]
    assert to_int8(x, 4).tolist() == [[127.0, -0.0, 2.0, 2.0, -254.0, 4.0], [0.0] * 6]


# --- smoothing -----------------------------------------------------------------------------------


def test_smoothed_tensors_compute_the_same_to_the_last_bit(tmp_path, mini):
    """For weights in bfloat16 too; a factor for every layer that can have one."""
    rng = np.random.default_rng(3)
    names = [n for n in vision_linears(mini.config) if producer(n)]
    assert len(names) == 3 * 2 + 1
    factors = {
        name: np.exp2(rng.integers(-5, 6, mini.shape(name)[1])).astype(np.float32) for name in names
    }
    tensors = SmoothedTensors(mini, factors)
    assert len(tensors) == len(list(tensors))
    for name in tensors:
        assert (tensors[name] != mini.tensor(name)).any(), name
    tiles = random_tiles(mini.config, 1)
    with written(tmp_path / "smoothed", mini, tensors, "BF16") as smoothed:
        same = ReferenceEngine(smoothed).encode_images(tiles)
    np.testing.assert_allclose(same, ReferenceEngine(mini).encode_images(tiles), rtol=1e-5)
    with pytest.raises(KeyError):
        tensors["vision_model.embeddings.class_embedding"]


def test_what_the_stored_type_does_not_hold_is_refused(tmp_path, mini):
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    factor = np.full(mini.shape(name)[1], 2.0**20, np.float32)
    refused = pytest.raises(QuantizationError, match=r"layers.1.mlp.fc1.weight.*F16.*BF16")
    with written(tmp_path / "half", mini, {}, "F16") as half, refused:
        SmoothedTensors(half, {name: factor})[name]
    SmoothedTensors(mini, {name: factor})[name]


# --- what is decided -----------------------------------------------------------------------------


def test_outliers_are_smoothed_away(tmp_path, mini):
    tiles, held_out = random_tiles(mini.config, 8), random_tiles(mini.config, 4, seed=1)
    before = quantize_vision(mini, tiles, held_out)
    with written(tmp_path / "outliers", mini, with_outliers(mini)) as checkpoint:
        exact = ReferenceEngine(checkpoint).encode_images(held_out)
        assert off(exact, ReferenceEngine(mini).encode_images(held_out)) < 1e-5
        result = quantize_vision(checkpoint, tiles, held_out)
        with written(tmp_path / "smoothed", checkpoint, result.tensors) as smoothed:
            assert off(ReferenceEngine(smoothed).encode_images(held_out), exact) < 1e-5
    # Factors are off by the square root of two at most, and so is what is left.
    assert result.error < 1.5 * before.error
    layers = {layer["name"] + ".weight": layer for layer in result.layers}
    assert list(layers) == vision_linears(mini.config)
    for (weight, layer), earlier in zip(layers.items(), before.layers, strict=True):
        if weight.endswith("attn.proj.weight"):  # needs calibration
            assert layer["plain_error"] > 2 * earlier["plain_error"]
            assert layer["alpha"] is not None
            assert layer["error"] < 0.7 * layer["plain_error"]
        else:
            assert layer["plain_error"] < 1.5 * earlier["plain_error"]
        if layer["alpha"] is None and layer["format"] == "int8":
            assert layer["error"] == layer["plain_error"]


def test_without_gain_the_factors_of_loading_stay(tmp_path, mini, monkeypatch):
    """They are stored, for the engine takes the result as it is: the same to the last bit."""
    monkeypatch.setattr(vision, "LEAST_GAIN", 0.9)
    monkeypatch.setattr(vision, "MOST_WORK", 0.0)
    tiles = random_tiles(mini.config, 8)
    with written(tmp_path / "outliers", mini, with_outliers(mini, values=False)) as checkpoint:
        result = quantize_vision(checkpoint, tiles, tiles)
        factors = result.tensors.factors
        assert factors.keys() == {
            name
            for name in vision_linears(mini.config)
            if name.endswith(("attn.qkv.weight", "mlp.fc1.weight", "mlp1.1.weight"))
        }
        for name, factor in factors.items():
            assert np.array_equal(factor, loading_factor(checkpoint, name))
        assert {layer["alpha"] for layer in result.layers} == {None}
        assert all(layer["error"] == layer["plain_error"] for layer in result.layers)
        assert result.error == result.plain_error
        if not native_missing():
            with written(tmp_path / "out", checkpoint, result.tensors, "F32", ()) as quantized:
                pair = [engine_features(each, tiles) for each in (checkpoint, quantized)]
            np.testing.assert_array_equal(*pair)


def test_a_sensitive_layer_is_kept(tmp_path, mini):
    """A column of `fc2` that is large and never used takes the steps from all others."""
    layer = "vision_model.encoder.layers.1.mlp."
    spoilt, bias = layer + "fc2.weight", layer + "fc1.bias"
    tiles, held_out = random_tiles(mini.config, 8), random_tiles(mini.config, 4, seed=1)
    changes = {spoilt: mini.tensor(spoilt).copy(), bias: mini.tensor(bias).copy()}
    changes[spoilt][:, 5] = 30 * np.abs(changes[spoilt]).max()
    changes[bias][5] = -50  # GELU makes zero of it
    with written(tmp_path / "spoilt", mini, changes) as checkpoint:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vision, "MOST_WORK", 0.3)  # a layer of two is a larger part of the work
            result = quantize_vision(checkpoint, tiles, held_out)
        small = quantize_vision(checkpoint, tiles, held_out)
    assert spoilt in result.keep
    assert spoilt not in small.keep
    assert result.error < 0.8 * small.error
    kept = {f"{layer['name']}.weight" for layer in result.layers if layer["format"] == "bf16"}
    assert kept == set(result.keep)


def test_keeping_has_to_lower_the_error_of_the_features(mini):
    tiles = random_tiles(mini.config, 4)
    assert vision._sensitive({"a": 9.0, "b": 1.0}, {"a": 5, "b": 95}) == ("a",)
    assert vision._sensitive({"a": 9.0, "b": 1.0}, {"a": 50, "b": 50}) == ()
    assert vision._sensitive({"a": 0.0}, {"a": 1}) == ()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "SENSITIVE", 0.0)
        patch.setattr(vision, "LEAST_FALL", 0.01)
        assert quantize_vision(mini, tiles, tiles).keep
        patch.setattr(vision, "LEAST_FALL", 0.9)
        assert quantize_vision(mini, tiles, tiles).keep == ()


def test_progress_and_damage(tmp_path, mini):
    tiles, steps = random_tiles(mini.config, 2), []
    quantize_vision(mini, tiles, tiles, progress=lambda done, total: steps.append((done, total)))
    done, totals = zip(*steps, strict=True)
    assert set(totals) == {9}
    assert done[-1] == 9
    assert all(later > earlier for earlier, later in itertools.pairwise(done))
    name = "vision_model.encoder.layers.1.mlp.fc1.weight"
    damaged = mini.tensor(name).copy()
    damaged[0, 0] = np.inf
    refused = pytest.raises(QuantizationError, match=r"layers\.1.*not finite")
    with written(tmp_path / "damaged", mini, {name: damaged}) as checkpoint, refused:
        quantize_vision(checkpoint, tiles, tiles)


# --- the engine ----------------------------------------------------------------------------------


def engine_features(checkpoint, tiles):
    from edgevl.engine.cpu import CpuEngine

    return CpuEngine(checkpoint, LoadOptions(threads=2)).encode_images(tiles)


def engine_error(directory, original, result, tiles, dtype):
    """By how much the engine's features, of the quantized checkpoint, are off the original's."""
    with written(directory, original, result.tensors, dtype, result.keep) as checkpoint:
        assert checkpoint.config.vision_keep == result.keep
        features = engine_features(checkpoint, tiles)
    return off(features, ReferenceEngine(original).encode_images(tiles))


@pytest.fixture
def as_this_processor(monkeypatch):
    """Round attention's weights in as many steps as the engine has here."""
    from edgevl.engine.cpu import instruction_set

    if instruction_set() in ("avx2", "neon", "neon_i8mm"):
        monkeypatch.setattr(vision_network, "WEIGHT_STEPS", 127)


@needs_native
@pytest.mark.usefixtures("as_this_processor")
@pytest.mark.parametrize("keep", [False, True])
def test_the_engine_has_the_error_that_was_measured(tmp_path, mini, keep, monkeypatch):
    """Within 2 %: it differs by the order of sums, and what that tips between two roundings."""
    monkeypatch.setattr(vision, "MOST_WORK", 0.6 if keep else 0.0)
    monkeypatch.setattr(vision, "SENSITIVE", 0.0)
    tiles, held_out = random_tiles(mini.config, 4), random_tiles(mini.config, 4, seed=1)
    with written(tmp_path / "outliers", mini, with_outliers(mini)) as checkpoint:
        result = quantize_vision(checkpoint, tiles, held_out)
        assert bool(result.keep) == keep
        error = engine_error(tmp_path / "out", checkpoint, result, held_out, "F32")
        exact = ReferenceEngine(checkpoint).encode_images(held_out)
        plain_error = off(engine_features(checkpoint, held_out), exact)
    assert error == pytest.approx(result.error, rel=0.02)
    assert plain_error == pytest.approx(result.plain_error, rel=0.02)


@needs_native
@pytest.mark.usefixtures("as_this_processor")
def test_the_shipped_model(tmp_path, tiny, tiny_tiles):
    """Within 4 %: after its layers most tokens have a rounding that tipped.

    What loading smooths is all that this model has to gain, so both errors are nearly one.
    """
    tiles, held_out = tiny_tiles[:12], tiny_tiles[12:]
    result = quantize_vision(tiny, tiles, held_out)
    assert result.plain_error < 0.02
    assert result.error == pytest.approx(result.plain_error, rel=0.04)
    error = engine_error(tmp_path / "tiny", tiny, result, held_out, "BF16")
    assert error == pytest.approx(result.error, rel=0.04)
    plain = dataclasses.replace(result, tensors={}, keep=None)
    error = engine_error(tmp_path / "plain", tiny, plain, held_out, "BF16")
    assert error == pytest.approx(result.plain_error, rel=0.04)


@needs_native
@pytest.mark.parametrize("quantized", [False, True])
def test_a_rounded_network_is_the_rounded_reference(mini, quantized):
    """The very same roundings, as loaded, or as stored with every other layer kept."""
    from dequantized import Dequantized, RoundedReference
    from edgevl import _native

    network = VisionNetwork(mini)
    rounding = network.as_loaded()
    if quantized:
        kept = tuple(vision_linears(mini.config)[::2])
        mini.config = dataclasses.replace(mini.config, vision_keep=kept)
        plans = vision_matrices(mini.config, "auto")
        rounding = Rounding({matrix.parts[0].weight: matrix for matrix in plans})
    tiles = random_tiles(mini.config, 2)
    expected = RoundedReference(Dequantized(mini, "auto", _native.ThreadPool(1))).encode_images(
        tiles
    )
    x = network.embed(tiles, rounding)
    for stage in range(len(network.stages)):
        x = network.run(stage, x, rounding)
    shares = [
        off(a, b)
        for a, b in zip(x.flatten(0, 1).numpy(), expected.reshape(-1, x.shape[-1]), strict=True)
    ]
    assert np.median(shares) < 1e-3


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("stop_at", [1, 3, 7, 8])
def test_an_interrupted_run_goes_on_and_decides_the_same(mini, tmp_path, stop_at):
    """In the pass that decides, between passes, and in the one that measures."""
    tiles = random_tiles(mini.config, 6)
    with written(tmp_path / "outliers", mini, with_outliers(mini)) as checkpoint:
        whole = quantize_vision(checkpoint, tiles[:4], tiles[4:])
        assert whole.tensors.factors
        (tmp_path / "work").mkdir()
        work = WorkDirectory(tmp_path / "work")

        def stop(done, total):
            if done >= stop_at:
                raise StoppedError

        with pytest.raises(StoppedError):
            quantize_vision(checkpoint, tiles[:4], tiles[4:], progress=stop, work=work)
        seen = []
        resumed = quantize_vision(
            checkpoint,
            tiles[:4],
            tiles[4:],
            progress=lambda done, total: seen.append(done),
            work=work,
        )
    assert min(seen) > stop_at
    assert resumed.summary() == whole.summary()
    assert resumed.keep == whole.keep
    assert resumed.tensors.factors.keys() == whole.tensors.factors.keys()
    for name, factor in whole.tensors.factors.items():
        assert np.array_equal(resumed.tensors.factors[name], factor)


@pytest.mark.parametrize("dtype", FLOAT_TYPES)
def test_changed_tensors_are_written_in_every_type_that_is_read(dtype):
    values = np.array([[1.5, -0.25], [0, 64]], np.float32)
    data = np.frombuffer(encode(values, dtype), NUMPY_TYPES[dtype]).reshape(values.shape)
    assert np.array_equal(StoredTensor(dtype, data).to_float32(), values)
