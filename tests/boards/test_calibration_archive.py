"""The archive of tiles that a vision encoder is calibrated on."""

import io
import tarfile

import numpy as np
import pytest
from PIL import Image

from edgevl.boards import calibration_archive
from edgevl.boards.calibration_archive import write_calibration
from edgevl.boards.pulsar2_config import default_config
from edgevl.boards.settings import CompileSettings
from edgevl.checkpoint import Checkpoint
from edgevl.errors import BoardError, EdgeVLError
from edgevl.preprocess import prepare_picture
from edgevl.quantize.calibration.pictures import drawn


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
    configured = default_config(checkpoint.config, "tiles.tar").quant.input_configs[0]
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


def test_what_cannot_be_done_is_refused_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    for count in (0, 1025):
        with pytest.raises(BoardError, match=f"--samples {count}: must be 1 to 1024"):
            CompileSettings("ax650", samples=count)
    with pytest.raises(EdgeVLError, match="pictures: no such directory or tar file"):
        write_calibration(checkpoint, tmp_path / "pictures", tmp_path / "tiles.tar", 32)
    with pytest.raises(OSError, match=r"cannot be written: No such file.*nowhere.tiles\.tar"):
        write_calibration(checkpoint, None, tmp_path / "nowhere" / "tiles.tar", 32)
    assert not list(tmp_path.iterdir())

    Image.new("RGB", (9, 9)).save(tmp_path / "picture.png")
    choose = calibration_archive.choose_pictures

    def choose_and_damage(files, wanted):
        chosen = choose(files, wanted)
        (tmp_path / "picture.png").write_bytes(b"")
        return chosen

    monkeypatch.setattr(calibration_archive, "choose_pictures", choose_and_damage)
    with pytest.raises(BoardError, match="changed while it was read"):
        write_calibration(checkpoint, tmp_path, tmp_path / "tiles.tar", 32)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
