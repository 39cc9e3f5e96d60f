"""Whatever the bytes: a picture within the limits, or an ImageError of one line."""

import io
import warnings

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from edgevl.errors import ImageError
from edgevl.preprocess import load_image
from edgevl.preprocess.image import MAX_PIXELS, load_reduced

SETTINGS = settings(
    max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), database=None
)


def samples():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (9, 13, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for image, format, options in [
        (colour, "PNG", {"exif": exif}),
        (colour.quantize(16), "PNG", {"transparency": bytes(4)}),
        (Image.fromarray(rng.integers(0, 2**16, (9, 13), np.uint16)), "PNG", {}),
        (colour, "JPEG", {"exif": exif}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "WEBP", {"exif": exif}),
        (colour.convert("RGBA"), "WEBP", {"lossless": True}),
        (colour, "BMP", {}),
        (colour.convert("1"), "BMP", {}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "TIFF", {"exif": exif}),
        (colour, "TIFF", {"compression": "tiff_lzw"}),
        (Image.fromarray(rng.random((9, 13), np.float32)), "TIFF", {}),
        (
            Image.fromarray(rng.integers(0, 2**12, (9, 13), np.uint16)),
            "TIFF",
            {"tiffinfo": {281: 9}},
        ),
        (colour, "MPO", {"save_all": True, "append_images": [colour]}),
    ]:
        buffer = io.BytesIO()
        image.save(buffer, format, **options)
        yield buffer.getvalue()


SAMPLES = list(samples())


def survives(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # decoders may warn of what they met
        try:
            image, reason = load_image(source), ""
            reduced, size = load_reduced(source, lambda *_: (2, 2))
            assert size == image.size
            assert reduced.width <= image.width
        except ImageError as error:
            image, reason = None, str(error)
    assert "\n" not in reason
    assert len(reason) < 500
    if image is None:
        return
    assert image.mode == "RGB"
    assert 0 < image.width * image.height <= MAX_PIXELS
    assert len(image.tobytes()) == 3 * image.width * image.height


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    # So that pictures of many pixels, from a mutated header, cost the test little time.
    from edgevl.preprocess import image

    monkeypatch.setattr(image, "MAX_PIXELS", 10**6)
    monkeypatch.setattr(image, "LARGE_PIXELS", 100)  # as some are


@SETTINGS
@given(st.data())
def test_mutated_pictures(data):
    sample = bytearray(data.draw(st.sampled_from(SAMPLES)))
    # Half of the mutations hit the headers.
    places = st.one_of(st.integers(0, min(64, len(sample) - 1)), st.integers(0, len(sample) - 1))
    values = st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255))
    for place, value in data.draw(st.lists(st.tuples(places, values), min_size=1, max_size=8)):
        sample[place] = value
    survives(bytes(sample[: data.draw(st.one_of(st.none(), st.integers(0, len(sample))))]))


@SETTINGS
@given(st.sampled_from(SAMPLES), st.integers(0, 2**32), st.binary(max_size=40))
def test_spliced_pictures(sample, place, insertion):
    place %= len(sample) + 1
    survives(sample[:place] + insertion + sample[place:])


MAGIC = [sample[:12] for sample in SAMPLES] + [b"", b"\0\0\0\x18ftypheic", b"8BPS", b"%!PS"]


@SETTINGS
@given(st.sampled_from(MAGIC), st.binary(max_size=300))
def test_random_bytes(magic, data):
    survives(magic + data)


@SETTINGS
@given(st.text(max_size=60).map(lambda text: "data:" + text) | st.text(max_size=60))
def test_random_strings(text):
    if text != "-":
        survives(text)


@SETTINGS
@given(
    arrays.arrays(
        st.one_of(arrays.scalar_dtypes(), arrays.unicode_string_dtypes()),
        arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    )
)
def test_random_arrays(array):
    survives(array)


@pytest.mark.parametrize("number", range(len(SAMPLES)))
def test_every_truncation(number):
    sample = SAMPLES[number]
    for length in range(0, len(sample), max(1, len(sample) // 60)):
        survives(sample[:length])
