"""Smoothing when a checkpoint is loaded: the factors, and that they are taken out again."""

import dataclasses
import math

import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint
from edgevl.checkpoint.architecture import vision_linears
from edgevl.engine import ReferenceEngine, native_missing
from edgevl.engine.plan import make_plan
from edgevl.engine.smoothing import loading_factor, producer, smoothing_factor
from edgevl.options import LoadOptions
from outliers import with_outliers
from random_inputs import off, random_tiles
from storage import write_directory

MINIS = ["mini-qwen3", "mini-6b"]  # LayerNorm with biases; RMSNorm with norms of queries and keys
needs_native = pytest.mark.skipif(bool(native_missing()), reason="the native engine is not built")


@pytest.fixture(params=MINIS)
def mini(request, mini_checkpoint):
    with Checkpoint.open(mini_checkpoint(request.param)) as opened:
        yield opened


@pytest.fixture
def outliers(mini, tmp_path):
    """With a twin that says it has gone through `edgevl quantize`."""
    tensors = {name: mini.tensor(name) for name in mini.names()}
    tensors |= with_outliers(mini, 64.0, values=False)
    config = mini.read_json("config.json")
    path = write_directory(tmp_path / "outliers", config, tensors)
    config["edgevl_quantization"] = {"vision": {"format": "int8", "keep": []}}
    twin = write_directory(tmp_path / "twin", config, tensors)
    with Checkpoint.open(path) as opened, Checkpoint.open(twin) as quantized:
        yield opened, quantized


def features(checkpoint, tiles, **options):
    from edgevl.engine.cpu import CpuEngine

    return CpuEngine(checkpoint, LoadOptions(threads=2, **options)).encode_images(tiles)


# --- the factors ---------------------------------------------------------------------------------


def test_factors_are_powers_of_two_that_take_peaks_down():
    peaks = np.float32([1, 64, 1, 0, 2])
    columns = np.float32([1, 1, 1, 1, 0])
    assert smoothing_factor(peaks, columns, 0.5).tolist() == [1, 8, 1, 1, 1]
    assert smoothing_factor(peaks, columns, 1.0).tolist() == [1, 64, 1, 1, 1]
    assert smoothing_factor(peaks, columns * 4, 0.5).tolist() == [1, 8, 1, 1, 1]
    assert smoothing_factor(peaks * 0, columns, 0.5).tolist() == [1] * 5
    assert smoothing_factor(peaks**9, columns, 1.0).tolist() == [1, 1024, 1, 1, 1]  # the bound
    assert smoothing_factor(peaks, columns, 0.5).dtype == np.float32


def test_without_calibration_the_norm_tells_the_peaks(mini, tmp_path):
    """3 |γ| + |β| for a channel, to the power of 0.3, over its column's peak to that of 0.7."""
    weight = "vision_model.encoder.layers.1.mlp.fc1.weight"
    norm = "vision_model.encoder.layers.1.norm2"
    tensors = {name: np.array(mini.tensor(name)) for name in mini.names()}
    tensors[f"{norm}.weight"][:] = 1
    tensors[f"{norm}.weight"][5] = -256
    tensors[weight][:, ::2], tensors[weight][:, 1::2] = 0.5, -0.5
    tensors[weight][:, 7] = 1e-9
    tensors[weight][3, 7] = -8
    expected = np.ones(len(tensors[weight][0]))
    if has_bias := f"{norm}.bias" in tensors:
        tensors[f"{norm}.bias"][:] = 0
        tensors[f"{norm}.bias"][9] = -765  # 3 + 765, 256 times the others
    expected[5] = 2 ** round(0.3 * 8)
    expected[9] = 2 ** round(0.3 * 8) if has_bias else 1
    expected[7] = 2 ** round(-0.7 * 4)
    config = mini.read_json("config.json")
    with Checkpoint.open(write_directory(tmp_path / "made", config, tensors)) as made:
        assert loading_factor(made, weight).tolist() == expected.tolist()


# --- the plan ------------------------------------------------------------------------------------


def test_what_reads_a_norm_is_smoothed_where_it_is_int8(mini):
    norms = {
        f"vision.layers.{layer}.{name}": f"layers.{layer}.{norm}"
        for layer in range(mini.config.vision.num_hidden_layers)
        for name, norm in (("qkv", "norm1"), ("fc1", "norm2"))
    }
    norms["vision.projector.fc1"] = "projector.norm"
    for precision in ("auto", "int8", "int4", "bf16"):
        found = {m.name: m.norm for m in make_plan(mini, precision).matrices if m.norm}
        assert found == ({} if precision == "bf16" else norms)
    mini.config = dataclasses.replace(mini.config, vision_keep=())
    assert not any(matrix.norm for matrix in make_plan(mini).matrices)


# --- the engine ----------------------------------------------------------------------------------


@needs_native
def test_large_channels_do_not_take_the_steps_from_others(mini, outliers):
    """The features stay within what rounding to INT8 implies, and are not without smoothing.

    As in test_cpu_engine.py: a rounding is off by 3 / (127 sqrt(12)), a tower of L layers has
    6 L + 2 of them, and as many of weights, whose rows have such peaks too; attention and GELU
    amplify by 3 at most. A factor is off by the square root of two at most, and so the peaks are.
    """
    smoothed, stored = outliers
    tiles = random_tiles(mini, 3)
    exact = ReferenceEngine(mini).encode_images(tiles)
    assert off(ReferenceEngine(smoothed).encode_images(tiles), exact) < 1e-5
    roundings = 2 * (6 * mini.config.vision.num_hidden_layers + 2)
    bound = 3 * math.sqrt(2) * 3 / (127 * math.sqrt(12)) * math.sqrt(roundings)
    error = off(features(smoothed, tiles), exact)
    plain = off(features(mini, tiles), exact)
    assert error < bound
    assert error < 1.5 * plain  # as if they were not there, but for the factors' rounding
    assert off(features(stored, tiles), exact) > 3 * error


@needs_native
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_weights_are_multiplied_and_norms_divided(outliers, tmp_path, dtype):
    """As a checkpoint in float32 that stores it so and is taken as it is, to the last bit."""
    checkpoint, _ = outliers
    tiles = random_tiles(checkpoint, 2)
    tensors = {name: np.array(checkpoint.tensor(name)) for name in checkpoint.names()}
    config = checkpoint.read_json("config.json")
    with Checkpoint.open(write_directory(tmp_path / "as it is", config, tensors, dtype)) as plain:
        ours = features(plain, tiles)
        tensors = {name: np.array(plain.tensor(name)) for name in plain.names()}
        for name in vision_linears(plain.config):
            norm = producer(name) or ""
            if norm and not norm.endswith("qkv"):
                factor = loading_factor(plain, name)
                assert len(set(factor)) > 1
                tensors[name] *= factor
                tensors[f"{norm}.weight"] /= factor
                if f"{norm}.bias" in tensors:
                    tensors[f"{norm}.bias"] /= factor
    config["edgevl_quantization"] = {"vision": {}}
    with Checkpoint.open(write_directory(tmp_path / "changed", config, tensors, "F32")) as changed:
        np.testing.assert_array_equal(ours, features(changed, tiles))


@needs_native
def test_a_quantized_checkpoint_is_packed_as_stored(outliers):
    from edgevl import _native
    from edgevl.engine.packed import aligned_zeros, pack_in_memory

    _, stored = outliers
    pool, plan = _native.ThreadPool(1), make_plan(stored)
    packed = pack_in_memory(stored, plan, pool)
    assert packed.keys() == {matrix.name for matrix in plan.matrices}
    for matrix in plan.matrices:
        if matrix.name.startswith("vision.") and matrix.format == "int8":
            weight = np.array(stored.tensor(matrix.parts[0].weight))
            data = aligned_zeros(packed[matrix.name].size)
            _native.pack("int8", weight, "F32", matrix.group, data, 0, 1, pool)
            np.testing.assert_array_equal(packed[matrix.name], data)


@needs_native
def test_bfloat16_is_as_stored(outliers):
    """The packed matrices tell, for products in bfloat16 are the same whatever the factors."""
    from edgevl import _native
    from edgevl.engine.packed import pack_in_memory

    packed, expected = (
        pack_in_memory(each, make_plan(each, "bf16"), _native.ThreadPool(1)) for each in outliers
    )
    assert packed.keys() == expected.keys()
    for name, data in expected.items():
        np.testing.assert_array_equal(packed[name], data)
    tiles = random_tiles(outliers[0], 1)
    ours, theirs = (features(each, tiles, precision="bf16") for each in outliers)
    np.testing.assert_array_equal(ours, theirs)


@needs_native
def test_the_cache_keeps_the_factors(outliers, monkeypatch):
    """No start but the first reads the weights, and all compute the same."""
    from edgevl.engine import packed

    monkeypatch.setattr(packed, "CACHE_FROM_BYTES", 0)
    checkpoint, _ = outliers
    tiles = random_tiles(checkpoint, 1)
    first = features(checkpoint, tiles)
    assert len(list((checkpoint.path / ".edgevl").glob("auto-*"))) == 1
    np.testing.assert_array_equal(features(checkpoint, tiles, cache=False), first)
    monkeypatch.setattr(packed, "pack_matrix", None)
    monkeypatch.setattr(packed, "loading_factor", None)
    np.testing.assert_array_equal(features(checkpoint, tiles), first)


@needs_native
def test_kept_features_are_of_one_way_to_round(mini, monkeypatch):
    from edgevl.engine import cpu

    plan = make_plan(mini)
    before = cpu.kept_models(mini, plan, "bf16", "any")
    assert cpu.kept_models(mini, plan, "bf16", "any") == before
    monkeypatch.setattr(cpu, "LAYOUT_VERSION", cpu.LAYOUT_VERSION + 1)
    after = cpu.kept_models(mini, plan, "bf16", "any")
    assert all(after[kind] != before[kind] for kind in before)
