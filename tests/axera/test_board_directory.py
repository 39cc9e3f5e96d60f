"""Finding the files of compiled models, and what is said where they are not whole."""

import shutil

import numpy as np
import pytest

from edgevl.axera import directory as model_directory
from edgevl.axera import layout
from edgevl.axera.directory import BoardModel
from edgevl.axera.ends import EmbeddingFile
from edgevl.checkpoint import Checkpoint
from edgevl.errors import BoardError, CheckpointError
from edgevl.loading import open_checkpoint, open_model
from fake_npu import write_board

EMBEDDING = "language_model.model.embed_tokens.weight"


@pytest.fixture
def board(mini_checkpoint, tmp_path):
    return write_board(tmp_path / "board", mini_checkpoint("mini-qwen3"))


@pytest.fixture
def table(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as checkpoint:
        return np.array(checkpoint.tensor(EMBEDDING))


def move(board, directory, *patterns):
    """Move files of a directory to another below it."""
    (board / directory).mkdir(parents=True)
    for pattern in patterns:
        for path in board.glob(pattern):
            if path.is_file():
                path.rename(board / directory / path.name)


def check(model, root):
    assert model.root == root
    assert [path.name for path in model.layers] == [
        f"qwen3_p128_l{number}_together.axmodel" for number in range(3)
    ]
    assert model.post.name == "qwen3_post.axmodel"
    assert model.vision.name == "internvl_vit_model_1x3x56x56.axmodel"
    assert model.has_vision
    assert not model.emulated
    assert model.config.text.hidden_size == 56
    assert model.read_json("tokenizer_config.json") is not None
    assert model.read_text("absent.txt") is None


def test_all_in_one_directory(board):
    check(BoardModel(board), board)
    check(open_model(board), board)


def test_as_the_vendor_has_it(board):
    move(board, "vit-models", "*vit*")
    move(board, "X_axmodel", "*.axmodel", "*.bin")
    move(board, "X", "*.*")
    (board / "infer_axmodel.py").write_text("raise SystemExit")
    model = BoardModel(board)
    check(model, board)
    assert model.path == board / "X"


def test_as_published_with_a_placeholder_for_a_configuration(board):
    move(board, "files/tokenizer", "*.json", "*.jinja", "*.txt")
    (board / "config.json").write_text("{}")
    check(BoardModel(board), board)


def test_hidden_and_deeper_directories_are_not_looked_at(board):
    for directory in (".cache", "a/b/c"):
        shutil.copytree(board, board / directory, ignore=lambda *_: {".cache", "a"})
    check(BoardModel(board), board)


def test_the_vision_encoder_may_be_missing(board):
    (board / layout.vision_file(56)).unlink()
    model = BoardModel(board)
    assert model.vision is None
    assert not model.has_vision


def test_among_vision_encoders_that_of_the_configured_size(board):
    (board / "internvl_vit_model_1x3x448x448.axmodel").write_bytes(b"x")
    check(BoardModel(board), board)
    (board / "vision_56x56.axmodel").write_bytes(b"x")
    with pytest.raises(BoardError, match="keep one vision encoder"):
        BoardModel(board)


@pytest.mark.parametrize("form", ["bfloat16", "npy", "float32"])
def test_every_form_of_the_embedding(board, table, form):
    (board / layout.EMBEDDING_BF16).rename(board / "aside")
    if form == "bfloat16":
        (board / "aside").rename(board / layout.EMBEDDING_BF16)
        np.save(board / layout.EMBEDDING_NPY, table + 1)  # the smallest is taken
    elif form == "npy":
        np.save(board / layout.EMBEDDING_NPY, table)
    else:
        table.astype("<f4").tofile(board / layout.EMBEDDING_F32)
    embedding = BoardModel(board).embedding
    rows = embedding.rows(np.array([5, 0, 599, 5]))
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, table[[5, 0, 599, 5]])
    assert embedding.rows(np.array([], np.int64)).shape == (0, 56)
    for wrong in (-1, 600):
        with pytest.raises(IndexError):
            embedding.rows(np.array([0, wrong]))


def test_emulated(board):
    for path in board.glob("*.axmodel"):
        path.write_bytes(layout.EMULATED_MAGIC + b"kind layer")
    assert BoardModel(board).emulated
    (board / "qwen3_post.axmodel").write_bytes(b"a model that Pulsar2 made")
    with pytest.raises(BoardError, match="some models are a board's and some the emulator's"):
        BoardModel(board)


def remove(name):
    return lambda board: (board / name).unlink()


def write(name, content=b"x"):
    def change(board):
        (board / name).parent.mkdir(exist_ok=True)
        (board / name).write_bytes(content)

    return change


def no_tokenizer(board):
    for name in ("tokenizer.json", "vocab.json"):
        (board / name).unlink(missing_ok=True)


def second_tokenizer(board):
    for name in ("one", "two"):
        (board / name).mkdir()
        for file in ("config.json", "tokenizer.json"):
            shutil.copyfile(board / file, board / name / file)
    no_tokenizer(board)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(layout.layer_file("qwen3", 128, 1)), r"p128_l1_together.*layer 1 is missing.* 3"),
        (remove(layout.layer_file("qwen3", 128, 2)), r"p128_l2_together.*layer 2 is missing"),
        (write(layout.layer_file("qwen3", 128, 3)), r"4 layers, but .*says there are 3"),
        (write(layout.layer_file("qwen2", 128, 0)), r"several models .*qwen2_p128.*qwen3_p128"),
        (write(layout.layer_file("qwen3", 64, 0)), r"several models .*qwen3_p128.*qwen3_p64"),
        (write(f"old/{layout.layer_file('qwen3', 128, 0)}"), "several models"),
        (remove("qwen3_post.axmodel"), r"qwen3_post\.axmodel: .* missing"),
        (write("qwen3_post.axmodel", b""), r"qwen3_post\.axmodel: the file is empty"),
        (write("qwen3_post.axmodel", b"version https://git-lfs.github.com/spec/v1"), "Git LFS"),
        (remove("config.json"), r"no directory with config\.json and tokenizer\.json"),
        (no_tokenizer, r"no directory with config\.json and tokenizer\.json"),
        (second_tokenizer, r"2 files for one thing .*copy the one that belongs to the layers"),
        (remove(layout.EMBEDDING_BF16), r"no embedding; .*bfloat16\.bin"),
        (write(layout.EMBEDDING_BF16, b"x" * 99), "99 bytes, expected 67200 for 600 tokens"),
        (write(f"old/{layout.EMBEDDING_BF16}"), "2 files for one thing"),
    ],
)  # fmt: skip
def test_what_is_not_whole(board, change, message):
    change(board)
    with pytest.raises(BoardError, match=message) as error:
        BoardModel(board)
    assert "\n" not in str(error.value)
    assert str(board) in str(error.value)


@pytest.mark.parametrize("content", [b"no", np.zeros((3, 4), np.float32), np.zeros((600, 56))])
def test_arrays_that_are_no_embedding(tmp_path, content):
    path = tmp_path / layout.EMBEDDING_NPY
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(BoardError, match=r"not a whole NumPy array|expected float32 \[600, 56\]"):
        EmbeddingFile(path, 600, 56)


def test_what_is_no_board(mini_checkpoint, tmp_path):
    with pytest.raises(BoardError, match="edgevl compile MODEL"):
        BoardModel(mini_checkpoint("mini-qwen3"))
    with pytest.raises(BoardError, match="not a directory"):
        BoardModel(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"config\.json: there is no such file"):
        open_model(tmp_path)


def test_a_board_is_no_checkpoint(board):
    with pytest.raises(CheckpointError, match="give the checkpoint that it was compiled from"):
        Checkpoint.open(board)


@pytest.mark.parametrize("pattern", ["*_together.axmodel", "*.axmodel"])
def test_without_its_layers_a_board_is_still_no_checkpoint(board, pattern):
    for path in board.glob(pattern):
        path.unlink()
    with pytest.raises(CheckpointError, match="give the checkpoint that it was compiled from"):
        Checkpoint.open(board)
    with pytest.raises(BoardError, match="no layers compiled for a board"):
        open_model(board)
    with pytest.raises(BoardError, match="give the checkpoint that it was made of"):
        open_checkpoint(board)


def test_layers_below_are_no_checkpoint_either(board):
    move(board, "X_axmodel", "*.axmodel", "*.bin", "*.npy")
    with pytest.raises(BoardError, match="give the checkpoint that it was made of"):
        open_checkpoint(board)


def test_a_configuration_that_is_malformed(board):
    (board / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        BoardModel(board)


def test_a_directory_with_too_many_files(board, monkeypatch):
    monkeypatch.setattr(model_directory, "MAX_ENTRIES", 5)
    with pytest.raises(BoardError, match="more than 5 files: give the model's directory"):
        BoardModel(board)
    assert not model_directory.holds_compiled(board)
