"""Packed weights: the layout, rounding, and the cache file beside the checkpoint."""

import errno
import multiprocessing
import os
import shutil
import stat

import numpy as np
import pytest

import edgevl
import packed_layout
from edgevl.checkpoint import Checkpoint, GPTQConfig
from edgevl.checkpoint.writer import to_bfloat16

native = pytest.importorskip("edgevl._native", reason="the native engine is not built")

from damage import DAMAGES, flip  # noqa: E402
from dequantized import panel_rows  # noqa: E402
from edgevl.engine import packed as packing  # noqa: E402
from edgevl.engine.plan import make_plan  # noqa: E402
from stored_gptq import gptq_checkpoint, quantized  # noqa: E402

SHAPES = [(1, 8), (16, 128), (17, 130), (33, 300), (75, 48)]
GROUPS = {"int4": 32, "int8": 16, "bf16": 8, "split": 32}


@pytest.fixture(scope="module")
def pool():
    return native.ThreadPool(2)


def random_weight(rows, cols, seed=0):
    return np.random.default_rng(seed).standard_normal((rows, cols), np.float32)


def pack(kind, weight, dtype, group, pool):
    out = packing.aligned_zeros(native.packed_bytes(kind, *weight.shape, group))
    native.pack(kind, weight, dtype, group, out, 0, 1, pool)
    return out


@pytest.mark.parametrize("kind", ["int4", "int8", "bf16", "split"])
@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_sizes_and_layout_are_those_of_the_header(kind, rows, cols, pool):
    group = GROUPS[kind]
    assert native.packed_bytes(kind, rows, cols, group) == packed_layout.packed_bytes(
        kind, rows, cols, group
    )
    assert native.product_bytes(kind, rows, cols, group) == packed_layout.product_bytes(
        kind, rows, cols, group
    )
    assert native.padded_cols(kind, cols, group) == packed_layout.padded_cols(kind, cols, group)
    data = pack(kind, random_weight(rows, cols), "F32", group, pool)
    np.testing.assert_array_equal(
        native.unpack(kind, data, rows, cols, group),
        packed_layout.unpack(kind, data, rows, cols, group),
    )


@pytest.mark.parametrize(("rows", "cols"), SHAPES)
def test_rounding_is_to_nearest(rows, cols, pool):
    weight = random_weight(rows, cols)
    weight[0] = 0
    bits = pack("bf16", weight, "F32", 8, pool)
    rounded = (to_bfloat16(weight).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(packed_layout.unpack("bf16", bits, rows, cols, 8), rounded)

    result = packed_layout.unpack("int8", pack("int8", weight, "F32", 16, pool), rows, cols, 16)
    step = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert (np.abs(result - weight) <= step / 2 * (1 + 1e-5)).all()

    result = packed_layout.unpack("int4", pack("int4", weight, "F32", 32, pool), rows, cols, 32)
    assert (result[0] == 0).all()
    for begin in range(0, cols, 32):
        part, got = weight[1:, begin : begin + 32], result[1:, begin : begin + 32]
        # The plain scale takes the largest magnitude to 7; a search for the least error may miss
        # it by a little, and float16 scales are off by 2**-11 of themselves.
        scale = np.abs(part).max(axis=1, keepdims=True) / 7
        plain = np.rint(part / scale) * scale
        error, bound = (np.linalg.norm(x - part, axis=1) for x in (got, plain))
        assert (error <= bound * 1.1 + np.linalg.norm(part, axis=1) * 2**-11).all()
        if part.shape[1] == 32 and len(part) > 10:
            assert error.sum() < 0.95 * bound.sum()

    result = packed_layout.unpack("split", pack("split", weight, "F32", 32, pool), rows, cols, 32)
    assert (result[0] == 0).all()
    for begin in range(0, cols, 32):
        part, got = weight[1:, begin : begin + 32], result[1:, begin : begin + 32]
        step = np.abs(part).max(axis=1, keepdims=True) / 9.375
        bound = np.maximum(step / 2, np.abs(part) - 7.5 * step)  # or it is clipped
        assert (np.abs(got - part) <= bound + step * 2**-7).all()  # the scale is a float16


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_stored_types_give_the_same(dtype, pool):
    weight = (to_bfloat16(random_weight(20, 64)).astype(np.uint32) << 16).view(np.float32)
    weight = weight.astype(np.float16).astype(np.float32)  # in all three types
    stored = {
        "BF16": to_bfloat16(weight),
        "F16": weight.astype(np.float16).view(np.uint16),
        "F32": weight,
    }[dtype]
    for kind in ("int4", "int8", "bf16"):
        np.testing.assert_array_equal(
            pack(kind, stored, dtype, 32, pool), pack(kind, weight, "F32", 32, pool)
        )


@pytest.mark.parametrize(
    ("group_size", "hidden"), [(-1, 160), (16, 160), (32, 160), (64, 160), (128, 160), (256, 520)]
)
def test_gptq_is_packed_exactly(tmp_path, pool, group_size, hidden):
    config = GPTQConfig(4, group_size, "gptq")
    sizes = {"hidden_size": hidden, "intermediate_size": 136, "num_hidden_layers": 1}
    with gptq_checkpoint(tmp_path, config, **sizes) as checkpoint:
        plan = make_plan(checkpoint)
        packed = packing.pack_in_memory(checkpoint, plan, pool)
        exact = [matrix for matrix in plan.matrices if matrix.gptq]
        assert len(exact) == 4
        for matrix in exact:
            data = packed[matrix.name]
            weight = packed_layout.unpack("int4", data, matrix.rows, matrix.cols, matrix.group)
            for part in matrix.parts:
                expected = checkpoint.tensor(part.weight)
                np.testing.assert_array_equal(weight[panel_rows(part)], expected)


def test_gptq_of_one_matrix_by_hand(pool):
    stored, weight = quantized(24, 48, GPTQConfig(4, 16, "gptq"))
    out = packing.aligned_zeros(native.packed_bytes("int4", 24, 48, 16))
    scales = stored["scales"].astype(np.float16)
    native.pack_gptq(stored["qweight"], scales, 16, out, 0, 1, pool)
    np.testing.assert_array_equal(packed_layout.unpack("int4", out, 24, 48, 16), weight)


def test_threads_do_not_change_a_byte(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        plan = make_plan(checkpoint, "int4")
        one, three = (
            packing.pack_in_memory(checkpoint, plan, native.ThreadPool(n)) for n in (1, 3)
        )
        for name, data in one.items():
            np.testing.assert_array_equal(data, three[name])


# --- the cache file --------------------------------------------------------------------------


@pytest.fixture
def directory(mini_checkpoint, tmp_path, monkeypatch):
    """A checkpoint of a test's own, large enough to be cached."""
    monkeypatch.setattr(packing, "CACHE_FROM_BYTES", 0)
    return shutil.copytree(mini_checkpoint("mini-qwen3"), tmp_path / "model")


@pytest.fixture
def packings(monkeypatch):
    """The names of matrices as they are packed."""
    names = []
    pack_matrix = packing.pack_matrix

    def count(checkpoint, matrix, out, pool):
        names.append(matrix.name)
        return pack_matrix(checkpoint, matrix, out, pool)

    monkeypatch.setattr(packing, "pack_matrix", count)
    return names


def load(directory, pool, precision="auto"):
    """Pack or map: -> data by name, and what packing in memory gives."""
    with Checkpoint.open(directory) as checkpoint:
        plan = make_plan(checkpoint, precision)
        packed = packing.packed_matrices(checkpoint, plan, precision, pool)
        return packed, packing.pack_in_memory(checkpoint, plan, pool)


def check(result):
    packed, expected = result
    assert packed.keys() == expected.keys()
    for name, data in expected.items():
        np.testing.assert_array_equal(packed[name], data)
        assert data.dtype != np.uint8 or packed[name].ctypes.data % 64 == 0


def cache_files(directory):
    return sorted((directory / ".edgevl").iterdir())


def test_a_second_start_maps_the_file(directory, pool, packings):
    check(load(directory, pool))
    [path] = cache_files(directory)
    assert path.name.startswith("auto-")
    matrices = len(packings) // 2  # `load` packs all once more
    before = path.stat()
    packed, _ = load(directory, pool)
    assert len(packings) == 3 * matrices
    assert not any(data.flags.writeable for data in packed.values())
    after = path.stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(after.st_mode) == 0o666 & ~umask


def test_precisions_have_files_of_their_own(directory, pool):
    for precision in ("auto", "int8"):
        check(load(directory, pool, precision))
    assert [path.name.partition("-")[0] for path in cache_files(directory)] == ["auto", "int8"]


OWN_DAMAGES = DAMAGES | {
    "a bit early": lambda data: flip(data, int.from_bytes(data[:8], "little") + 8),
    "a bit of a factor": lambda data: flip(data, data.rindex(np.ones(1).tobytes()) + 7),
    "a page of zeros": lambda data: data[:16384] + bytes(4096) + data[20480:],
    "another header": lambda data: data.replace(b"text.head", b"text.heap"),
}


@pytest.mark.parametrize("damage", OWN_DAMAGES)
def test_a_damaged_file_is_packed_anew(directory, pool, damage, caplog):
    check(load(directory, pool))
    [path] = cache_files(directory)
    whole = path.read_bytes()
    path.write_bytes(OWN_DAMAGES[damage](bytearray(whole)))
    check(load(directory, pool))
    assert "packing the weights anew" in caplog.text
    assert path.read_bytes() == whole


def test_another_checkpoint_is_not_taken_for_the_cached_one(directory, pool):
    check(load(directory, pool))
    [old] = cache_files(directory)
    weights = directory / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64  # not among the sampled blocks: the time of change tells
    weights.write_bytes(data)
    check(load(directory, pool))
    [new] = cache_files(directory)  # the outdated one has been removed
    assert new != old


def test_the_fingerprint_sees_data_even_if_the_time_is_kept(directory):
    weights = directory / "model.safetensors"
    with Checkpoint.open(directory) as checkpoint:
        before = checkpoint.fingerprint()
        assert checkpoint.fingerprint() == before
    times = weights.stat()
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    with Checkpoint.open(directory) as checkpoint:
        assert checkpoint.fingerprint() != before


def test_a_directory_that_cannot_be_written(directory, pool, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(packing, "replacing", refuse)
    check(load(directory, pool))
    assert cache_files(directory) == []
    shutil.rmtree(directory / ".edgevl")
    (directory / ".edgevl").write_text("in the way")
    check(load(directory, pool))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(directory, pool):
    directory.chmod(0o555)
    try:
        check(load(directory, pool))
        assert not (directory / ".edgevl").exists()
    finally:
        directory.chmod(0o755)


def test_a_full_disk_leaves_nothing_behind(directory, pool, monkeypatch):
    written = []

    def write_file(file, specs, pieces, **options):
        file.write(b"half")
        written.append(next(iter(pieces)))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(packing, "write_file", write_file)
    check(load(directory, pool))
    assert written
    assert cache_files(directory) == []


def test_small_models_and_those_who_ask_are_not_cached(directory, pool, monkeypatch):
    edgevl.load(directory, cache=False)
    monkeypatch.setattr(packing, "CACHE_FROM_BYTES", 64 << 20)
    check(load(directory, pool))
    assert not (directory / ".edgevl").exists()


def test_files_of_killed_writers_are_removed(directory, pool):
    cache = directory / ".edgevl"
    cache.mkdir()
    for name, age in ((".unfinished-old", 7200), (".unfinished-new", 10), ("other", 7200)):
        (cache / name).write_text("")
        then = (cache / name).stat().st_mtime - age
        os.utime(cache / name, (then, then))
    check(load(directory, pool))
    names = {path.name for path in cache_files(directory)}
    assert {".unfinished-new", "other"} < names
    assert len(names) == 3


def write_and_check(directory, barrier):
    packing.CACHE_FROM_BYTES = 0
    pool = native.ThreadPool(1)
    barrier.wait(60)
    check(load(directory, pool))


def test_concurrent_writers(directory, pool):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    barrier = context.Barrier(3)
    writers = [context.Process(target=write_and_check, args=(directory, barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    [path] = cache_files(directory)
    assert not path.name.startswith(".")
    check(load(directory, pool))
