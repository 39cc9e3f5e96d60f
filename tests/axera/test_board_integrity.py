"""Files of a compiled model that are not what was compiled: each is found and named."""

import json
import os
import shutil

import numpy as np
import pytest

from edgevl.axera import integrity, layout
from edgevl.axera.directory import BoardModel
from edgevl.axera.engine import AxeraEngine
from edgevl.axera.integrity import Content
from edgevl.checkpoint import Checkpoint
from edgevl.cli import main
from edgevl.engine import native_missing
from edgevl.errors import BoardError, CheckpointError
from fake_npu import FakeRuntime, write_board

LAYERS = [layout.layer_file("qwen3", 128, number) for number in range(3)]
POST, VISION = "qwen3_post.axmodel", layout.vision_file(56)
EMBEDDINGS = (layout.EMBEDDING_BF16, layout.EMBEDDING_NPY, layout.EMBEDDING_F32)


@pytest.fixture(autouse=True)
def memory(monkeypatch, tmp_path):
    """Where it is remembered what was found right."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "edgevl" / "boards.json"


@pytest.fixture(scope="module")
def runtime(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        yield FakeRuntime(checkpoint)


@pytest.fixture
def board(mini_checkpoint, tmp_path):
    """A board's directory with files that differ, all listed in ``board.json``."""
    path = write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))
    for number, name in enumerate([*LAYERS, POST, VISION]):
        (path / name).write_bytes(f"model {number} ".encode() + bytes(range(1, 200)))
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        table = np.array(checkpoint.tensor("language_model.model.embed_tokens.weight"))
    np.save(path / layout.EMBEDDING_NPY, table)
    table.tofile(path / layout.EMBEDDING_F32)
    names = [*LAYERS, POST, VISION, *EMBEDDINGS]
    files = {name: Content.of(path / name).to_dict() for name in names}
    (path / "board.json").write_text(json.dumps({"max_tiles": 1, "files": files}))
    return path


def load(board, runtime):
    return AxeraEngine(BoardModel(board), runtime=runtime)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")


def one_byte(path):
    path.write_bytes(b"m")


def longer(path):
    path.write_bytes(path.read_bytes() + b"\0")


def zero_tail(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))


def one_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", [LAYERS[0], LAYERS[2], POST, VISION, layout.EMBEDDING_BF16])
@pytest.mark.parametrize("damage", [cut, empty, one_byte, longer, zero_tail, one_bit])
def test_a_damaged_file_is_named(board, runtime, name, damage):
    load(board, runtime)
    damage(board / name)
    with pytest.raises(BoardError) as error:
        load(board, runtime)
    message = str(error.value)
    assert message.startswith(f"{board / name}: ")
    assert "copy or download it again" in message
    assert "\n" not in message


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("damage", [cut, empty, one_byte, zero_tail, one_bit])
def test_so_is_a_damaged_embedding_of_every_form(board, runtime, name, damage):
    for other in EMBEDDINGS:
        if other != name:
            (board / other).unlink()
    load(board, runtime)
    damage(board / name)
    with pytest.raises(BoardError, match="copy or download it again") as error:
        load(board, runtime)
    assert str(error.value).startswith(f"{board / name}: ")


@pytest.mark.parametrize("damage", [cut, empty, one_byte])
def test_what_is_not_used_is_not_judged(board, runtime, damage):
    damage(board / layout.EMBEDDING_NPY)  # the smaller form beside it is read
    load(board, runtime)


def test_exchanged_layers_are_told(board, runtime):
    first, second = board / LAYERS[0], board / LAYERS[1]
    load(board, runtime)
    first.rename(board / "aside")
    second.rename(first)
    (board / "aside").rename(second)
    with pytest.raises(BoardError) as error:
        load(board, runtime)
    assert str(error.value).startswith(f"{first}: has the content of {LAYERS[1]}: rename the two")


def test_a_layer_of_another_model_of_the_same_shapes(board, runtime):
    (board / LAYERS[1]).write_bytes((board / LAYERS[1]).read_bytes()[::-1])
    with pytest.raises(BoardError, match=f"{LAYERS[1]}: damaged, its SHA-256 is"):
        load(board, runtime)


# --- without a list ----------------------------------------------------------------------------


@pytest.mark.parametrize("written", [None, {}, {"max_tiles": 1}, {"files": None}, {"files": {}}])
def test_directories_of_the_vendor_and_of_earlier_versions(board, runtime, written):
    (board / "board.json").unlink()
    if written is not None:
        (board / "board.json").write_text(json.dumps(written))
    zero_tail(board / LAYERS[1])  # nobody can know
    load(board, runtime)
    one_byte(board / LAYERS[1])
    with pytest.raises(BoardError, match=f"{LAYERS[1]}: 1 bytes, which is no model: copy or down"):
        load(board, runtime)


@pytest.mark.parametrize("damage", [cut, empty, one_byte])
def test_arrays_that_are_cut_are_told_by_their_header(board, runtime, damage):
    (board / "board.json").unlink()
    for name in (layout.EMBEDDING_BF16, layout.EMBEDDING_F32):
        (board / name).unlink()
    load(board, runtime)
    damage(board / layout.EMBEDDING_NPY)
    with pytest.raises(BoardError, match=r"weight\.npy: \d+ bytes, not a whole NumPy array: copy"):
        load(board, runtime)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"field 'files' is a list of 0, expected an object"),
        ({LAYERS[0]: 5}, r"files: field 'qwen3_p128_l0_together\.axmodel' is 5, expected an obj"),
        ({LAYERS[0]: {"bytes": -1, "sha256": ""}}, "field 'bytes' is -1"),
        ({LAYERS[0]: {"bytes": 1}}, "field 'sha256' is missing"),
    ],
)
def test_a_list_that_is_malformed(board, files, message):
    (board / "board.json").write_text(json.dumps({"files": files}))
    with pytest.raises(CheckpointError, match=message):
        BoardModel(board)


# --- once --------------------------------------------------------------------------------------


@pytest.fixture
def read(monkeypatch):
    """The names of files whose content was read since the last look."""
    names = []
    original = Content.of.__func__
    monkeypatch.setattr(
        Content, "of", classmethod(lambda cls, path: names.append(path.name) or original(cls, path))
    )

    def look():
        found, names[:] = set(names), []
        return found

    return look


def test_contents_are_read_once(board, runtime, read):
    used = {*LAYERS, POST, VISION, layout.EMBEDDING_BF16}
    BoardModel(board)
    assert read() == set()
    load(board, runtime)
    assert read() == used
    load(board, runtime)
    assert read() == set()
    os.utime(board / POST)
    load(board, runtime)
    assert read() == {POST}


def test_a_change_that_keeps_size_and_time_is_seen(board, runtime):
    load(board, runtime)
    about = (board / POST).stat()
    one_bit(board / POST)
    os.utime(board / POST, ns=(about.st_atime_ns, about.st_mtime_ns))
    with pytest.raises(BoardError, match=f"{POST}: damaged"):
        load(board, runtime)


def test_another_list_is_compared_again(board, runtime):
    load(board, runtime)
    about = json.loads((board / "board.json").read_text())
    about["files"][POST]["sha256"] = "0" * 64
    (board / "board.json").write_text(json.dumps(about))
    with pytest.raises(BoardError, match=f"{POST}: damaged"):
        load(board, runtime)


def test_what_was_found_before_an_interruption_is_kept(board, runtime, read, monkeypatch):
    monkeypatch.setattr(
        integrity, "_state", lambda path, state=integrity._state: interrupt(path) or state(path)
    )

    def interrupt(path):
        if path.name == POST and not done:
            done.append(path)
            raise KeyboardInterrupt

    done = []
    with pytest.raises(KeyboardInterrupt):
        load(board, runtime)
    assert read() == set(LAYERS)
    load(board, runtime)
    assert read() == {POST, VISION, layout.EMBEDDING_BF16}


def test_files_that_are_gone_are_forgotten(board, runtime, memory):
    load(board, runtime)
    moved = board.rename(board.with_name("moved"))
    load(moved, runtime)
    paths = list(json.loads(memory.read_text()))
    assert len(paths) == 6
    assert all(str(moved) in path for path in paths)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"a": 1, "a": 2}'])
def test_a_memory_that_is_damaged_is_made_anew(board, runtime, read, memory, content):
    memory.parent.mkdir(parents=True)
    memory.write_bytes(content)
    load(board, runtime)
    assert len(read()) == 6
    load(board, runtime)
    assert read() == set()


def test_without_a_place_to_remember_it_is_read_every_time(board, runtime, read, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", os.devnull)
    for _ in range(2):
        load(board, runtime)
        assert len(read()) == 6


# --- the whole way -----------------------------------------------------------------------------


@pytest.mark.skipif(native_missing() is not None, reason="the native engine is not built")
def test_what_compile_lists_chat_compares(tmp_path, capsys):
    board = tmp_path / "tiny"
    assert main(["compile", "tiny", "-o", str(board), "--target", "ax650", "--emulate"]) == 0
    listed = json.loads((board / "board.json").read_text())["files"]
    assert set(listed) == {*(p.name for p in board.glob("*.axmodel")), *EMBEDDINGS}
    copy = tmp_path / "copy"
    shutil.copytree(board, copy)
    first, second = (copy / layout.layer_file("qwen3", 128, number) for number in (0, 1))
    shutil.copyfile(board / second.name, first)
    capsys.readouterr()
    for directory, status in ((board, 0), (copy, 1)):
        assert main(["chat", str(directory), "-q", "Hello", "--max-tokens", "2"]) == status
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith(f"edgevl: error: {first}: has the content of {second.name}: ")
