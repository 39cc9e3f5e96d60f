"""What was computed, kept on disk: whole or not there, bounded, private, never a reason to fail."""

import errno
import multiprocessing
import os
import shutil
import signal
import stat
from functools import partial

import numpy as np
import pytest

native = pytest.importorskip("edgevl._native", reason="the native engine is not built")

from damage import DAMAGES  # noqa: E402
from edgevl.checkpoint import Checkpoint  # noqa: E402
from edgevl.engine import kept as keeping  # noqa: E402
from edgevl.engine import packed  # noqa: E402
from edgevl.engine.cpu import CpuEngine  # noqa: E402
from edgevl.engine.kept import HEADER_BYTES, Kept  # noqa: E402
from edgevl.options import LoadOptions  # noqa: E402

MODELS = {"features": "a model", "prefix": "a model and its cache"}
CONTEXT = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "model" / ".edgevl" / "kept"


@pytest.fixture
def kept(directory):
    directory.parent.parent.mkdir()
    return Kept(directory, 10**6, MODELS)


def values(seed, rows=64):
    return np.random.default_rng(seed).standard_normal((rows, 16), np.float32)


def has(kept, key, kind="features"):
    """Whether an array is there, without using it."""
    return kept._path(kind, key).exists()


def files(directory):
    return sorted(directory.iterdir())


def test_arrays_come_back_to_the_bit_and_are_their_owners_alone(kept, directory):
    words = np.arange(64, dtype=np.uint32)
    kept.put("features", "one", lambda: values(1))
    kept.put("prefix", "one", lambda: words)
    again = Kept(directory, 10**6, MODELS)
    for array, expected in (
        (again.get("features", "one"), values(1)),
        (again.get("prefix", "one"), words),
    ):
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(array, expected)
    assert again.get("prefix", "one") is not None
    assert again.get("prefix", "two") is None
    assert [path.name.partition("-")[0] for path in files(directory)] == ["features", "prefix"]
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in files(directory)} == {0o600}


def test_another_model_has_another_key(kept, directory):
    kept.put("features", "one", lambda: values(1))
    other = Kept(directory, 10**6, MODELS | {"features": "another model"})
    assert other.get("features", "one") is None


def begin(data):
    """Return where a file's data begins, after the header."""
    return 8 + int.from_bytes(data[:8], "little")


OWN_DAMAGES = DAMAGES | {
    "only the header came to the disk": lambda data: data[: begin(data)].ljust(len(data), b"\0"),
    "another type": lambda data: data.replace(b'"F32"', b'"I32"'),
    "another tensor": lambda data: data.replace(b'"data"', b'"date"'),
}


@pytest.mark.parametrize("damage", OWN_DAMAGES)
def test_a_damaged_file_is_removed(kept, directory, damage, caplog):
    kept.put("features", "one", lambda: values(1))
    [path] = files(directory)
    whole = path.read_bytes()
    path.write_bytes(OWN_DAMAGES[damage](bytearray(whole)))
    assert path.read_bytes() != whole
    assert kept.get("features", "one") is None
    assert files(directory) == []
    assert "computing anew" in caplog.text
    kept.put("features", "one", lambda: values(1))
    assert path.read_bytes() == whole


def test_what_was_used_longest_ago_makes_room(directory, kept):
    size = values(0).nbytes + HEADER_BYTES
    small = Kept(directory, 3 * size, MODELS)
    for number in range(3):
        small.put("features", str(number), partial(values, number))
        for path in files(directory):  # so that times differ whatever the clock's grain
            times = path.stat()
            os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns - 10**9))
    assert small.get("features", "0") is not None
    small.put("features", "3", partial(values, 3))
    assert [has(small, str(number)) for number in range(4)] == [True, False, True, True]
    for number in range(4, 20):
        small.put("features", str(number), partial(values, number))
        assert sum(path.stat().st_size for path in files(directory)) <= 3 * size
    assert has(small, "19")
    small.put("features", "large", partial(values, 0, rows=1000))  # larger than all together may be
    assert not has(small, "large")
    assert has(small, "19")


def test_a_directory_that_cannot_be_written(kept, directory, monkeypatch, caplog):
    caplog.set_level("INFO")
    kept.put("features", "old", partial(values, 0))

    def refuse(*args, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patched:
        patched.setattr(keeping, "replacing", refuse)
        patched.setattr(os, "utime", refuse)
        kept.put("features", "one", lambda: values(1))
        kept.put("features", "two", partial(values, 2))
        np.testing.assert_array_equal(kept.get("features", "old"), values(0))
    assert caplog.text.count("Read-only") == 1  # it is tried once
    assert len(files(directory)) == 1
    shutil.rmtree(directory)
    directory.write_text("in the way")
    again = Kept(directory, 10**6, MODELS)
    again.put("features", "one", lambda: values(1))
    assert again.get("features", "one") is None
    gone = Kept(directory.parent / "gone" / "kept" / "kept", 10**6, MODELS)
    gone.put("features", "one", lambda: values(1))
    assert not (directory.parent / "gone").exists()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes anywhere")
def test_a_read_only_directory(kept, directory):
    root = directory.parent.parent
    root.chmod(0o555)
    try:
        kept.put("features", "one", lambda: values(1))
        assert not directory.parent.exists()
    finally:
        root.chmod(0o755)


def test_what_others_have_there_is_left_alone(directory):
    directory.mkdir(parents=True, mode=0o755)
    theirs = [directory / name for name in ("prefix-notes.txt", "features-1.csv", ".unfinished-x")]
    for path in theirs:
        path.write_bytes(bytes(100))
        os.utime(path, (0, 0))
    kept = Kept(directory, 6000, MODELS)
    for number in range(3):  # the last makes room
        kept.put("features", str(number), lambda: values(1, rows=32))
    assert not has(kept, "0")
    assert has(kept, "2")
    assert all(path.exists() for path in theirs)
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_a_link_is_not_followed(kept, directory, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    directory.parent.mkdir()
    directory.symlink_to(elsewhere)
    kept.put("features", "one", lambda: values(1))
    assert files(elsewhere) == []


def test_a_smaller_bound_holds_from_the_start(kept, directory):
    for number in range(4):
        kept.put("features", str(number), lambda: values(1))
    Kept(directory, 2 * (values(1).nbytes + HEADER_BYTES), MODELS)
    assert 1 <= len(files(directory)) <= 2


def test_what_cannot_be_opened_now_stays(kept, monkeypatch):
    kept.put("features", "one", lambda: values(1))

    def no_more(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.open", no_more)
        assert kept.get("features", "one") is None
    assert kept.get("features", "one") is not None


def test_an_odd_number_of_values(kept):
    kept.put("features", "one", lambda: values(1)[0, :3])
    np.testing.assert_array_equal(kept.get("features", "one"), values(1)[0, :3])


def test_a_full_disk_leaves_nothing_behind(kept, directory, monkeypatch):
    written = []

    def write_file(file, specs, pieces, **options):
        file.write(b"half")
        written.append(specs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(keeping, "write_file", write_file)
        kept.put("features", "one", lambda: values(1))
    assert written
    assert files(directory) == []
    kept.put("features", "one", lambda: values(1))  # there is room again
    assert has(kept, "one")


def test_without_memory_nothing_is_kept_or_read(kept, directory, monkeypatch):
    def fail(*args):
        raise MemoryError

    kept.put("features", "old", lambda: values(0))
    kept.put("features", "one", fail)
    monkeypatch.setattr(keeping, "_read", fail)
    assert kept.get("features", "old") is None
    assert len(files(directory)) == 1


def write_half(directory):
    def write_file(file, specs, pieces, **options):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    keeping.write_file = write_file
    Kept(directory, 10**6, MODELS).put("features", "one", lambda: values(1))


def test_a_killed_writer_is_cleaned_up_after(kept, directory):
    writer = CONTEXT.Process(target=write_half, args=(directory,))
    writer.start()
    writer.join(60)
    assert writer.exitcode == -signal.SIGKILL
    [unfinished] = files(directory)
    assert kept.get("features", "one") is None
    kept.put("features", "one", lambda: values(1))
    assert unfinished.exists()  # another process may be at it
    then = unfinished.stat().st_mtime - packed.ABANDONED_SECONDS - 60
    os.utime(unfinished, (then, then))
    kept.put("features", "two", partial(values, 2))
    assert not unfinished.exists()
    np.testing.assert_array_equal(kept.get("features", "one"), values(1))


def write_and_read(directory, barrier):
    """Write and read what others write, in so little room that files come and go."""
    kept = Kept(directory, 4 * (values(0).nbytes + HEADER_BYTES), MODELS)
    barrier.wait(60)
    found = 0
    for number in range(300):
        seed = number % 7
        kept.put("features", str(seed), partial(values, seed))
        array = kept.get("features", str((seed + 1) % 7))
        if array is not None:
            found += 1
            np.testing.assert_array_equal(array, values((seed + 1) % 7))
    assert found


def test_processes_write_and_read_at_once(kept, directory):
    barrier = CONTEXT.Barrier(3)
    writers = [CONTEXT.Process(target=write_and_read, args=(directory, barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert not any(path.name.startswith(".") for path in files(directory))


# --- what an engine keeps --------------------------------------------------------------------


@pytest.fixture
def checkpoint(mini_checkpoint, tmp_path, monkeypatch):
    """The directory of a checkpoint of a test's own, large enough for files to be kept."""
    monkeypatch.setattr(packed, "CACHE_FROM_BYTES", 0)
    return shutil.copytree(mini_checkpoint("mini-qwen3"), tmp_path / "model")


def engine_of(directory, isa="", **options):
    with Checkpoint.open(directory) as checkpoint:
        return CpuEngine(checkpoint, LoadOptions(threads=1, **options), isa=isa)


def holds(engine):
    """Whether an engine would find what the plain one has kept."""
    return has(engine.kept, "one"), has(engine.kept, "one", "prefix")


def test_keys_cover_all_that_the_bits_depend_on(checkpoint):
    plain = engine_of(checkpoint)
    plain.kept.put("features", "one", lambda: values(1))
    plain.kept.put("prefix", "one", lambda: np.zeros(2, np.uint32))
    assert holds(engine_of(checkpoint)) == (True, True)
    assert holds(engine_of(checkpoint, precision="int8"))[0]
    assert holds(engine_of(checkpoint, max_context=77)) == (True, True)
    # All but "bf16" have vision in INT8.
    assert holds(engine_of(checkpoint, kv_cache="int8")) == (True, False)
    assert holds(engine_of(checkpoint, precision="int4")) == (True, False)
    assert holds(engine_of(checkpoint, precision="bf16")) == (False, False)
    for isa in native.instruction_sets()[1:]:
        assert holds(engine_of(checkpoint, isa)) == (False, False)
    weights = checkpoint / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 64
    weights.write_bytes(data)
    assert holds(engine_of(checkpoint)) == (False, False)


def test_who_asks_keeps_nothing(checkpoint, monkeypatch):
    assert engine_of(checkpoint).kept is not None
    for options in ({"keep_bytes": 0}, {"cache": False}, {"exact_logits": True}):
        assert engine_of(checkpoint, **options).kept is None
    monkeypatch.setattr(packed, "CACHE_FROM_BYTES", 64 << 20)
    assert engine_of(checkpoint).kept is None


@pytest.mark.parametrize("isa", native.instruction_sets())
@pytest.mark.parametrize("kv_cache", ["bf16", "int8"])
def test_saved_positions_are_the_same_positions(checkpoint, isa, kv_cache):
    engine = engine_of(checkpoint, isa, kv_cache=kv_cache)
    ids = np.random.default_rng(0).integers(0, engine.config.text.vocab_size, 150)
    sequence, other = engine.new_sequence(), engine.new_sequence()
    engine.prefill(sequence, engine.embed(ids))
    for length in (1, 64, 100, 150):
        saved = engine.save(sequence, length)
        alone = engine.new_sequence()
        engine.prefill(alone, engine.embed(ids[:length]))
        np.testing.assert_array_equal(saved, engine.save(alone, length))  # and nothing of the rest
        engine.load(other, saved, length)
        assert other.length == length
        expected = engine.decode([alone], [7]).copy()
        np.testing.assert_array_equal(engine.decode([other], [7]), expected)


def test_positions_that_do_not_fit_are_refused(checkpoint):
    engine = engine_of(checkpoint, max_context=100)
    sequence = engine.new_sequence()
    engine.prefill(sequence, engine.embed(np.arange(70)))
    saved = engine.save(sequence, 70)
    for length in (0, -1, 71):
        with pytest.raises(ValueError, match="are cached"):
            engine.save(sequence, length)
    for array, length in ((saved[:-1], 70), (saved, 64), (saved, 0), (saved, 101)):
        with pytest.raises(ValueError, match="positions"):
            engine.load(sequence, array, length)
        assert sequence.length == sequence.cache.length == 0
    with pytest.raises(ValueError, match="dtype"):
        engine.load(sequence, saved.view(np.float32), 70)
    stranger = engine_of(checkpoint).new_sequence()
    with pytest.raises(ValueError, match="another decoder"):
        engine.load(stranger, saved, 70)
