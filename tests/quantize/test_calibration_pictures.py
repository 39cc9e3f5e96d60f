"""Pictures: directories and tar files, whole, damaged and hostile; those that come with EdgeVL."""

import importlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from edgevl.preprocess.picture import choose_grid
from edgevl.quantize.calibration import pictures
from edgevl.quantize.calibration.conversations import LANGUAGES
from edgevl.quantize.calibration.pictures import (
    LEAST_SHARE,
    PICTURES,
    THUMBNAIL_BYTES,
    choose_pictures,
    drawn,
    drawn_kinds,
    open_pictures,
    set_apart,
    spread,
    thumbnail,
)
from edgevl.quantize.settings import QuantizationError
from repository import TINY


def png(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(path, members, mode="w"):
    """Write (name or TarInfo, data) pairs."""
    with tarfile.open(path, mode) as tar:
        for member, data in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            if data is not None:
                info.size = len(data)
            tar.addfile(info, io.BytesIO(data) if data is not None else None)
    return path


def contents(files):
    return [files.read(place) for place in range(len(files))]


def test_a_directory_is_read_with_those_below_it_in_order(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "1.PNG").write_bytes(png(1))
    (tmp_path / "a.jpeg").write_bytes(png(2))
    (tmp_path / "z.png").write_bytes(png(3))
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    assert contents(open_pictures(tmp_path)) == [png(2), png(1), png(3)]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_a_tar_is_read_and_never_unpacked(tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    link, hard, folder = (tarfile.TarInfo(name) for name in ("l.png", "h.png", "d.png"))
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    hard.type, hard.linkname = tarfile.LNKTYPE, "/etc/hostname"
    folder.type = tarfile.DIRTYPE
    members = [
        ("/absolute.png", png(1)),
        ("../outside.png", png(2)),
        (link, None),
        (hard, None),
        (folder, None),
        ("readme.md", b"text"),
        ("plain.png", png(3)),
    ]
    path = write_tar(tmp_path / "pictures.tar", members, mode)
    files = open_pictures(path)
    assert contents(files) == [png(1), png(2), png(3)]
    assert files.read(0) == png(1)  # back again
    files.close()
    assert list(tmp_path.iterdir()) == [path]
    assert not (tmp_path.parent / "outside.png").exists()


def test_a_huge_member_is_skipped_unread(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_BYTES", 200)
    path = write_tar(tmp_path / "p.tar", [("huge.png", png(1) + bytes(500)), ("a.png", png(2))])
    files = open_pictures(path)
    monkeypatch.setattr(tarfile.TarFile, "extractfile", _only("a.png", tarfile.TarFile.extractfile))
    found, skipped = choose_pictures(files, 2)
    assert ([picture.place for picture in found], skipped) == ([1], 1)


def _only(name, extractfile):
    def extract(tar, member):
        assert member.name == name
        return extractfile(tar, member)

    return extract


def test_too_many_members_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "MAX_MEMBERS", 3)
    path = write_tar(tmp_path / "p.tar", [(f"{n}.png", png(n)) for n in range(4)])
    with pytest.raises(QuantizationError, match=r"p\.tar: more than 3 members; pack a smaller"):
        open_pictures(path)


def test_a_header_that_claims_much_memory_is_refused(tmp_path):
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 2**33 - 1
    path = tmp_path / "p.tar"
    path.write_bytes(header.tobuf(tarfile.USTAR_FORMAT) + bytes(1024))
    with pytest.raises(QuantizationError, match=rf"p\.tar: member header of {2**33 - 1} bytes"):
        open_pictures(path)


@pytest.mark.parametrize("compressed", [False, True])
def test_what_is_no_tar_or_only_half_of_one_is_refused(tmp_path, compressed):
    path = tmp_path / "p.tar"
    path.write_bytes(b"plain text" * 1000)
    with pytest.raises(QuantizationError, match=r"p\.tar: not a whole tar file \(.*\); name a"):
        open_pictures(path)
    noise = os.urandom(50_000)
    members = [("a.png", noise), ("b.png", noise), ("c.png", noise)]
    write_tar(path, members, "w:gz" if compressed else "w")
    path.write_bytes(path.read_bytes()[:80_000])
    with pytest.raises(QuantizationError, match=r"p\.tar: "):
        choose_pictures(open_pictures(path), 3)


def test_no_such_path_and_no_pictures(tmp_path):
    with pytest.raises(QuantizationError, match="nowhere: no such directory or tar file; name"):
        open_pictures(tmp_path / "nowhere")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(QuantizationError, match=r"has no pictures; name .*\.jpg"):
        open_pictures(tmp_path)


def test_damaged_pictures_are_counted_and_replaced(tmp_path):
    for n in range(12):
        data = png(n) if n % 3 else b"damaged"
        (tmp_path / f"{n:02}.png").write_bytes(data)
    files = open_pictures(tmp_path)
    found, skipped = choose_pictures(files, 8)
    assert [picture.place for picture in found] == [n for n in range(12) if n % 3]
    assert skipped == 4
    assert choose_pictures(files, 8) == (found, skipped)


def test_only_damaged_pictures_are_an_error(tmp_path):
    for n in range(3):
        (tmp_path / f"{n}.png").write_bytes(png(n)[:40])
    with pytest.raises(QuantizationError, match=r"none of its 3 pictures can be read \(.*\); give"):
        choose_pictures(open_pictures(tmp_path), 2)


def test_a_copy_of_a_picture_is_not_another_one(tmp_path):
    for n in range(6):
        (tmp_path / f"{n}.png").write_bytes(png(n // 2))
    found, skipped = choose_pictures(open_pictures(tmp_path), 6)
    assert len(found) == len({picture.digest for picture in found}) == 3
    assert skipped == 0


def test_a_choice_of_many_is_spread_and_reads_no_more_than_it_needs(tmp_path):
    for n in range(100):
        (tmp_path / f"{n:02}.png").write_bytes(png(n))
    files = open_pictures(tmp_path)
    read = []
    original = files.read
    files.read = lambda place: read.append(place) or original(place)
    found, _ = choose_pictures(files, 10)
    assert [picture.place for picture in found] == list(range(5, 100, 10))
    assert len(read) == 10


def test_spread_and_set_apart():
    assert spread("abc", 5) == ["a", "b", "c"]
    assert spread(range(9), 3) == [1, 4, 7]
    assert set_apart("abcdef", 2) == (["a", "c", "d", "f"], ["b", "e"])


# --- those that come with EdgeVL -----------------------------------------------------------------


def test_a_picture_shows_another_part_each_time():
    assert len(drawn_kinds()) == 30
    for place in range(30):
        first, again, other = drawn(place, 1), drawn(30 + place, 1), drawn(place, 2)
        assert first.mode == "RGB"
        assert first == again
        assert first != other
        assert np.asarray(first, np.float32).std() > 3  # something is to be seen
        shares = [part / max(sides) for part, *sides in zip(first.size, other.size, strict=True)]
        assert all(LEAST_SHARE * 0.99 < share < 1 / LEAST_SHARE for share in shares)


def test_every_kind_has_a_subject_in_each_language():
    questions = json.loads(PICTURES.with_name("questions.json").read_text("utf-8"))
    for language in LANGUAGES:
        subjects = questions[language]["subjects"]
        assert {*drawn_kinds(), "any"} == subjects.keys()
        assert all(subject.isascii() == (language == "en") for subject in subjects.values())


def test_one_tile_and_several_occur():
    sizes = [drawn(place, place).size for place in range(60)]
    tiles = {columns * rows for columns, rows in (choose_grid(*s, 448, 1, 4) for s in sizes)}
    assert {1, 2, 3, 4} <= tiles


@pytest.fixture
def drawing(monkeypatch):
    """The module that has drawn them."""
    monkeypatch.syspath_prepend(TINY / "training")
    return importlib.import_module("calibration")


def test_the_same_program_draws_the_same_pictures(drawing):
    """But for how the Pillow at hand draws letters, and for what packing loses."""
    with tarfile.open(PICTURES) as tar:
        for member in tar:
            number, _, seed = member.name.removesuffix(".webp").split("-")
            shipped = Image.open(tar.extractfile(member)).convert("RGB")
            made = drawing.draw(int(number) % len(drawing.DRAWERS), int(seed))
            assert made.size == shipped.size
            pixels = [np.asarray(image, np.float32) for image in (made, shipped)]
            assert np.abs(pixels[0] - pixels[1]).mean() < 8, member.name


def test_a_thumbnail_is_small_whatever_is_in_the_picture():
    noise = np.random.default_rng(0).integers(0, 256, (900, 700, 3), np.uint8)
    data = thumbnail(Image.fromarray(noise))
    assert data.startswith(b"\xff\xd8")
    assert len(data) <= THUMBNAIL_BYTES
