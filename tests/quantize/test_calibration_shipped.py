"""The pictures that come with EdgeVL, and what has drawn them."""

import importlib
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from edgevl.preprocess.tiles import choose_grid
from edgevl.quantize.calibration.conversations import LANGUAGES
from edgevl.quantize.calibration.pictures import (
    LEAST_SHARE,
    PICTURES,
    THUMBNAIL_BYTES,
    drawn,
    drawn_kinds,
    thumbnail,
)
from repository import TINY


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
