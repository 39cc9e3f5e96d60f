import json
import math
import os
import struct
import time

import numpy as np
import pytest

from edgevl.checkpoint.safetensors import SafetensorsFile, StoredTensor, Weights
from edgevl.errors import CheckpointError
from edgevl.json_input import Fields, parse_object
from storage import safetensors_bytes, to_bf16

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
DATA = np.arange(6, dtype="<f4").tobytes()


@pytest.fixture
def write(tmp_path):
    def write(content, name="model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def refused(path, *words):
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    message = str(error.value)
    assert "\n" not in message
    for word in (path.name, *words):
        assert word in message


def test_reads_a_view_of_the_file(write):
    path = write(safetensors_bytes({"__metadata__": {"a": "b"}, "x": ENTRY}, DATA))
    file = SafetensorsFile(path)
    assert list(file) == ["x"]
    assert (file.shape("x"), file.dtype("x")) == ((2, 3), "F32")
    stored = file["x"]
    np.testing.assert_array_equal(stored.data, [[0, 1, 2], [3, 4, 5]])
    assert not stored.data.flags.owndata
    assert not stored.data.flags.writeable
    values = stored.to_float32()
    assert values.flags.c_contiguous
    assert values.dtype == np.float32
    file.close()
    np.testing.assert_array_equal(values, [[0, 1, 2], [3, 4, 5]])  # views outlive it
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file["x"]


def test_tells_where_a_tensor_lies(write):
    other = ENTRY | {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}
    later = ENTRY | {"data_offsets": [2, 26]}
    path = write(safetensors_bytes({"a": other, "x": later}, b"??" + DATA))
    file = SafetensorsFile(path)
    place = file.place("x")
    assert (place.path, place.dtype) == (path, "F32")
    write(b"something else", "other").replace(path)
    assert os.pread(place.descriptor, 24, place.offset) == DATA
    file.close()
    with pytest.raises(OSError, match="descriptor"):
        os.fstat(place.descriptor)
    with pytest.raises(ValueError, match="closed"):
        file.place("x")


def test_agrees_with_the_library(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    arrays = {
        "b": rng.random((3, 5)) > 0.5,
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(3.5, np.float32),
    }
    for kind in ("u1", "i1", "i2", "u2", "f2", "i4", "u4", "f4", "f8", "i8", "u8"):
        arrays[kind] = (rng.standard_normal((4, 3)) * 50).astype(kind)
    library.save_file(arrays, tmp_path / "x.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "x.safetensors")
    assert set(file) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(file[name].data, array)
        assert file[name].shape == array.shape
        if array.dtype.kind == "f":
            ours = file[name].to_float32()
            assert ours.shape == array.shape
            np.testing.assert_array_equal(ours, array.astype(np.float32))


def test_bfloat16_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    values = StoredTensor("BF16", bits).to_float32()
    np.testing.assert_array_equal(values.view(np.uint32), bits.astype(np.uint32) << 16)
    rows = np.array([3, 250, 3])
    np.testing.assert_array_equal(
        StoredTensor("BF16", bits).to_float32(rows).view(np.uint32), values[rows].view(np.uint32)
    )


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_unaligned_data_is_read(write, dtype):
    values = np.arange(6, dtype=np.float32)
    blob = (
        to_bf16(values) if dtype == "BF16" else values.astype({"F16": "<f2", "F32": "<f4"}[dtype])
    )
    size = blob.nbytes
    header = {
        "pad": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "x": {"dtype": dtype, "shape": [6], "data_offsets": [1, 1 + size]},
    }
    out = SafetensorsFile(write(safetensors_bytes(header, b"\0" + blob.tobytes())))[
        "x"
    ].to_float32()
    np.testing.assert_array_equal(out, values)
    assert out.flags.aligned


def test_an_integer_tensor_has_no_float_values():
    with pytest.raises(ValueError, match="I32"):
        StoredTensor("I32", np.zeros(3, np.int32)).to_float32()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "F99"}, ["F99"]),
        ({"dtype": 3}, ["dtype"]),
        ({"dtype": None}, ["dtype"]),
        ({"shape": [2, -3]}, ["-3"]),
        ({"shape": [2, 3.0]}, ["3.0"]),
        ({"shape": [True, 6]}, ["True"]),
        ({"shape": "23"}, ["shape"]),
        ({"shape": None}, ["shape"]),
        ({"shape": [2, 4]}, ["32 bytes", "24"]),
        ({"shape": [1] * 9}, ["shape"]),
        ({"shape": [1 << 62, 1 << 62]}, ["absurd"]),
        ({"shape": [0, 1 << 62], "data_offsets": [0, 0]}, ["absurd"]),
        ({"shape": [1 << 64]}, ["shape"]),
        ({"data_offsets": [0, 28]}, ["truncated"]),
        ({"data_offsets": [24, 0]}, ["needs 24"]),
        ({"data_offsets": [0]}, ["data_offsets"]),
        ({"data_offsets": [0, 12, 24]}, ["data_offsets"]),
        ({"data_offsets": None}, ["data_offsets"]),
    ],
)
def test_bad_entries(write, change, words):
    refused(write(safetensors_bytes({"x": ENTRY | change}, DATA)), *words)


def test_overlaps_holes_and_leftovers(write):
    half = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}
    other = half | {"data_offsets": [12, 24]}
    SafetensorsFile(write(safetensors_bytes({"b": other, "a": half}, DATA)))
    refused(write(safetensors_bytes({"a": half, "b": half}, DATA)), "overlap")
    refused(write(safetensors_bytes({"b": other}, DATA)), "holes")
    refused(write(safetensors_bytes({"a": half}, DATA)), "accounts for 12", "24")


def test_truncated_anywhere(write):
    whole = safetensors_bytes({"x": ENTRY}, DATA)
    for length in range(len(whole)):
        refused(write(whole[:length]))


def test_what_people_have_in_place_of_weights(write, tmp_path):
    refused(write(b""), "empty")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    refused(write(pointer), "Git LFS", "git lfs pull")
    refused(write(b"PK\x03\x04" + b"\0" * 60), "pickle")
    refused(write(b"\x80\x02}q\x00." + b"\0" * 60), "pickle")
    refused(write(b"<!DOCTYPE html><html>" + b" " * 60), "web page")
    refused(write(struct.pack("<Q", 1 << 40) + b"{" + b" " * 99), "header")
    (tmp_path / "d.safetensors").mkdir()
    refused(tmp_path / "d.safetensors", "not a regular file")
    refused(tmp_path / "absent.safetensors")


def test_a_header_length_that_looks_like_another_format(write):
    for length in (0x3C, 0x0280, 0x3C20):  # "<", a pickle's first bytes, " <"
        header = json.dumps({"x": ENTRY}).encode().ljust(length)
        header = header[:length] if len(header) <= length else None
        if header is None:
            header = b"{}".ljust(length)
            SafetensorsFile(write(safetensors_bytes(header)))
        else:
            SafetensorsFile(write(safetensors_bytes(header, DATA)))


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "not a regular file")


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "3",
        "",
        "{",
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
        b'{"a": "\xff"}',
    ],
)
def test_what_is_no_json_object(text):
    with pytest.raises(CheckpointError, match=r"^here: "):
        parse_object(text, "here")


def test_what_is_not_used_is_not_judged():
    long = "9" * 4301  # more than Python's int() takes
    text = (
        '"nan": NaN, "inf": [Infinity, -Infinity, 1e999], "twice": {"a": 1, "a": 2}, "": {},'
        f'"\\ud800": 1, "max": 1000000000000000019884624838656, "long": {long}, "long": -{long}'
    )
    parsed = parse_object(f"{{{text}}}", "here")
    assert math.isnan(parsed.pop("nan"))
    assert parsed == {
        "inf": [math.inf, -math.inf, math.inf],
        "twice": {"a": 2},  # the last counts, as in Python's json and so in transformers
        "\ud800": 1,
        "": {},
        "max": int(1e30),
        "long": -math.inf,
    }


def test_long_integers_take_no_time():
    """Python's own conversion takes time with the square: 10 s for a million digits."""
    started = time.perf_counter()
    assert parse_object(f'{{"a": {"7" * 10_000_000}}}', "here") == {"a": math.inf}
    assert time.perf_counter() - started < 2


@pytest.mark.parametrize(
    ("value", "read", "expected"),
    [
        (448.0, lambda fields: fields.integer("a", 0, 500), 448),
        ([448.0, 448], lambda fields: fields.square("a", 0, 500), 448),
        (1, lambda fields: fields.flag("a"), True),
        (0.0, lambda fields: fields.flag("a"), False),
        (448.5, lambda fields: fields.integer("a", 0, 500), "448.5, expected an integer"),
        (math.inf, lambda fields: fields.integer("a", 0, 500), "inf, expected an integer"),
        (math.nan, lambda fields: fields.integer("a", 0, 500), "nan, expected an integer"),
        (1e30, lambda fields: fields.integer("a", 0, 500), "expected 0 to 500"),
        (int(1e30), lambda fields: fields.integer("a", 0, 500), "expected 0 to 500"),
        ("448", lambda fields: fields.integer("a", 0, 500), "'448', expected an integer"),
        (True, lambda fields: fields.integer("a", 0, 500), "True, expected an integer"),
        (10**300, lambda fields: fields.number("a", 0, 500), "expected 0 to 500"),
        (math.nan, lambda fields: fields.number("a", 0, 500), "expected 0 to 500"),
        (2, lambda fields: fields.flag("a"), "2, expected true or false"),
        ("true", lambda fields: fields.flag("a"), "'true', expected true or false"),
        ([448, 449], lambda fields: fields.square("a", 0, 500), "two equal sizes"),
    ],
)
def test_what_is_used_is_checked(value, read, expected):
    fields = Fields({"a": value}, "here")
    if not isinstance(expected, str):
        assert read(fields) == expected
        return
    with pytest.raises(CheckpointError, match=f"^here: field 'a' .*{expected}") as error:
        read(fields)
    assert len(str(error.value)) < 200


def shard(name, value):
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return safetensors_bytes({name: entry}, np.float32(value).tobytes())


def index(tmp_path, weight_map):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards(write, tmp_path):
    write(shard("a", 1), "model-1.safetensors")
    write(shard("b", 2), "model-2.safetensors")
    write(shard("c", 3), "other.safetensors")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    weights = Weights(tmp_path)
    assert sorted(weights) == ["a", "b"]
    assert weights["b"].data == 2
    assert weights.path("b").name == "model-2.safetensors"
    weights.close()
    # One whole file goes before the index, as in transformers.
    write(shard("z", 4), "model.safetensors")
    assert list(Weights(tmp_path)) == ["z"]


def test_files_without_an_index(write, tmp_path):
    write(shard("a", 1), "gptq_model-4bit-128g.safetensors")
    assert list(Weights(tmp_path)) == ["a"]
    write(shard("a", 1), "more.safetensors")
    with pytest.raises(CheckpointError, match=r"more.*'a' is also in gptq_model"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/outside.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "..",
        "",
        "a\0.safetensors",
        "\ud800.safetensors",
        "evil.bin",
        "x" * 300 + ".safetensors",
        7,
        None,
    ],
)
def test_an_index_cannot_leave_the_directory(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "outside.safetensors").write_bytes(shard("a", 1))
    index(inside, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json"):
        Weights(inside)


def test_a_missing_shard_is_named(write, tmp_path):
    write(shard("a", 1), "model-1.safetensors")
    index(tmp_path, {"a": "model-1.safetensors", "b": "model-2.safetensors"})
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors: this shard is missing"):
        Weights(tmp_path)
    index(tmp_path, {"a": "model-1.safetensors", "junk": None, "": 5})  # name no file
    assert list(Weights(tmp_path)) == ["a"]
    index(tmp_path, {})
    with pytest.raises(CheckpointError, match="names 0 files"):
        Weights(tmp_path)


def test_a_link_as_in_the_hub_cache_is_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "0f").write_bytes(shard("a", 1))
    (snapshot / "model.safetensors").symlink_to("../blobs/0f")
    assert list(Weights(snapshot)) == ["a"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pytorch_model.bin", "pickles"),
        ("model.pth", "pickles"),
        ("model-q4.gguf", "not supported"),
        ("readme.md", "no model.safetensors"),
    ],
)
def test_a_directory_without_safetensors(tmp_path, name, words):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=words):
        Weights(tmp_path)


def test_opening_does_not_read_the_data(tmp_path):
    # A sparse file of 8 GiB: reading it would take seconds and memory.
    path = tmp_path / "model.safetensors"
    size = 8 << 30
    entry = {"dtype": "BF16", "shape": [1 << 16, 1 << 16], "data_offsets": [0, size]}
    path.write_bytes(safetensors_bytes({"x": entry}))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + size)
    started = time.perf_counter()
    weights = Weights(tmp_path)
    assert weights["x"].data[-1, -1] == 0
    weights.close()
    assert time.perf_counter() - started < 0.3
