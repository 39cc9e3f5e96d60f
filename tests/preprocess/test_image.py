import base64
import io
import os
import re
import struct
import sys
import time
import tracemalloc
import types
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from edgevl.checkpoint import Checkpoint
from edgevl.errors import ImageError, PromptError
from edgevl.preprocess import image as image_module
from edgevl.preprocess import load_image, prepare_picture
from edgevl.preprocess.image import MAX_PIXELS, is_large

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def encoded(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def same(image, expected):
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(COLOURS).save(path)
    return path


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
        ("WEBP", {"lossless": True}),
    ],
)
def test_lossless_formats_give_the_pixels(format, options):
    same(load_image(encoded(Image.fromarray(COLOURS), format, **options)), COLOURS)


@pytest.mark.parametrize("format", ["JPEG", "WEBP"])
def test_lossy_formats_are_what_pillow_decodes(format):
    data = encoded(Image.fromarray(COLOURS), format)
    same(load_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_gif_gives_its_first_frame():
    red, blue = Image.new("RGB", (4, 3), "red"), Image.new("RGB", (4, 3), "blue")
    data = encoded(red, "GIF", save_all=True, append_images=[blue])
    same(load_image(data), red)


def test_every_kind_of_source_gives_the_same_picture(photo, monkeypatch):
    data = photo.read_bytes()
    sources = [
        photo,
        str(photo),
        data,
        bytearray(data),
        memoryview(data),
        Image.open(photo),
        COLOURS,
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "DATA:image/png;BASE64," + quote(base64.b64encode(data).decode().rstrip("=")),
        "data:image/png," + quote(data),
    ]
    for source in sources:
        same(load_image(source), COLOURS)
    monkeypatch.setenv("HOME", str(photo.parent))
    same(load_image("~/photo.png"), COLOURS)
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=io.BytesIO(data)))
    same(load_image("-"), COLOURS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_once(format, orientation):
    # Quadrants of four colours, large enough to survive JPEG.
    upright = Image.new("RGB", (64, 32))
    for at, colour in zip(
        [(0, 0), (32, 0), (0, 16), (32, 16)], ["red", "lime", "blue", "white"], strict=True
    ):
        upright.paste(colour, (*at, at[0] + 32, at[1] + 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {
        1: lambda image: image,
        2: lambda image: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: lambda image: image.rotate(180),
        4: lambda image: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
        6: lambda image: image.rotate(90, expand=True),
        7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
        8: lambda image: image.rotate(270, expand=True),
    }[orientation]
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(inverse(upright), format, exif=exif, **options)
    image = load_image(data)
    assert image.size == (64, 32)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(upright)).mean() < 12
    assert not image.info
    assert not image.getexif()
    same(load_image(image), image)
    same(load_image(Image.open(io.BytesIO(data))), image)


def test_damaged_exif_does_not_spoil_the_picture():
    data = encoded(Image.fromarray(COLOURS), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    same(load_image(data), COLOURS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_modes_convert_as_in_the_original(mode):
    image = Image.fromarray(COLOURS)
    if mode == "LAB":
        from PIL import ImageCms

        lab = ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(
            image, ImageCms.createProfile("sRGB"), lab, outputMode="LAB"
        )
    else:
        image = image.convert(mode)
    same(load_image(image), image.convert("RGB"))


def test_alpha_is_dropped_not_composited():
    rgba = np.dstack([COLOURS, RNG.integers(0, 256, COLOURS.shape[:2], np.uint8)])
    same(load_image(encoded(Image.fromarray(rgba), "PNG")), COLOURS)
    same(load_image(rgba), COLOURS)


def test_palette_with_transparency_converts_without_a_warning(recwarn):
    image = Image.fromarray(COLOURS).quantize(8)
    data = encoded(image, "PNG", transparency=bytes([0, 128, 255, 7]))
    same(load_image(data), image.convert("RGB"))
    assert not recwarn.list


def test_adobe_cmyk_jpeg_is_not_inverted():
    # Ink on paper: cyan ink alone is a cyan picture. Pillow writes CMYK inverted, as Adobe does.
    data = encoded(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "JPEG", quality=95)
    assert b"Adobe" in data
    red, green, blue = load_image(data).getpixel((8, 8))
    assert red < 10
    assert min(green, blue) > 245


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


GREY = np.arange(256).reshape(4, 64)  # what pictures of any depth below show


def tiff(values, tags=(), photometric=1, bits=None, order="<"):
    """Return a TIFF file of one strip; ``tags`` are (tag, type, value) in addition."""
    values = values.astype(values.dtype.newbyteorder(order)) if bits is None else values
    data = values.tobytes()
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    entries = [
        (256, 4, GREY.shape[1]),
        (257, 4, GREY.shape[0]),
        (258, 3, bits or 8 * values.dtype.itemsize),
        (259, 3, 1),
        (262, 3, photometric),
        (273, 4, 8),
        (277, 3, 1),
        (278, 4, GREY.shape[0]),
        (279, 4, len(data)),
        (339, 3, kind),
        *tags,
    ]
    head = struct.pack(order + "2sHI", b"II" if order == "<" else b"MM", 42, 8 + len(data))
    body = struct.pack(order + "H", len(entries))
    for tag, number_type, value in sorted(entries):
        packed = struct.pack(order + {3: "H", 4: "I", 8: "h", 11: "f"}[number_type], value)
        body += struct.pack(order + "HHI", tag, number_type, 1) + packed.ljust(4, b"\0")
    return head + data + body + bytes(4)


def png(values, significant=None, alpha=False):
    """Return a PNG file of 16-bit grey, which may say how many bits are significant."""
    height, width = values.shape
    samples = np.stack([values, np.full_like(values, 40_000)], -1) if alpha else values
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">2I5B", width, height, 16, 4 if alpha else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    if significant:
        chunks.insert(1, (b"sBIT", bytes([significant])))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def shows(source, expected):
    """Check what a picture shows in grey, to a level of 255."""
    image = load_image(source)
    assert image.mode == "RGB"
    shown = np.asarray(image).astype(int)
    assert (shown == shown[..., :1]).all()
    np.testing.assert_allclose(shown[..., 0], expected, atol=1)


def low_bits(bits):
    """Return ``GREY`` in the lowest ``bits`` of 16, as devices that measure so many store it."""
    return (GREY * (2**bits - 1) // 255).astype(np.uint16)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_16_bit_grey_shows_the_bits_that_are_in_use(bits):
    values = low_bits(bits)
    sources = [
        values,
        values.astype(">u2"),
        values[..., None],
        np.dstack([values, values, values, np.full_like(values, 65535)]),  # alpha says nothing
        png(values),
        png(values, alpha=True),
        Image.open(io.BytesIO(png(values))),
        tiff(values),
        tiff(values, order=">"),
        tiff(2**bits - 1 - values, photometric=0),  # white is zero
        tiff(values.astype(np.uint32)),
        tiff(values.astype(np.float32)),
        *(
            Image.frombytes(mode, GREY.shape[::-1], values.astype(dtype).tobytes())
            for mode, dtype in [("I;16", "<u2"), ("I;16B", ">u2"), ("I;16L", "<u2"), ("I", "=i4")]
        ),
    ]
    if bits < 16:
        sources.append(tiff(values.astype(np.int16)))
    for source in sources:
        shows(source, GREY)


def test_signed_16_bit_grey_has_15():
    shows(tiff((GREY * 32767 // 255).astype(np.int16)), GREY)


def test_the_upper_8_of_the_bits_are_kept():
    # As Pillow does with 16-bit colour: no rounding.
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for source in (values, png(values)):
        assert np.asarray(load_image(source))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


DARK = (GREY * 3).astype(np.uint16)  # up to 765: 10 bits


@pytest.mark.parametrize(
    ("file", "white"),
    [
        (png(DARK), 1023),
        (png(DARK, significant=12), 4095),
        (png(DARK, significant=16), 65535),  # dark it is
        # PNG asks writers to scale to 16 bits, and then the lowest 4 of 12 bits are unused.
        (png(DARK >> 4 << 4, significant=12), 65535),
        (png(low_bits(14) >> 6, significant=4), 255),  # 8 bits: it is wrong
        (tiff(DARK, [(281, 3, 4095)]), 4095),
        (tiff(DARK, [(281, 3, 765)]), 1023),  # the largest value there is, not that may be
        (tiff(DARK, [(341, 3, 3000)]), 3000),
        (tiff(DARK, [(341, 3, 65535)]), 65535),
        (tiff(DARK, [(281, 3, 99)]), 1023),  # it is wrong
        (tiff(DARK, [(341, 3, 99)]), 1023),
    ],
)
def test_a_file_says_what_is_white(file, white):
    values = low_bits(8) if white == 255 else DARK
    shows(file, values.astype(float) * 255 / white)


def test_a_file_says_what_is_black():
    shows(
        tiff((GREY * 10 - 1000).astype(np.int16), [(340, 8, -1000), (341, 8, 1550)]),
        GREY,
    )
    shows(tiff((GREY / 25.5 - 5).astype(np.float32), [(340, 11, -5), (341, 11, 5)]), GREY)


def test_12_bits_that_are_packed():
    values = low_bits(12).reshape(-1, 2).astype(int)
    first, second = values.T
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], -1)
    shows(tiff(packed.astype(np.uint8), bits=12), GREY)


def test_what_pillow_has_scaled_stays_as_dark_as_it_is():
    pgm = b"P5 64 4 4095\n" + DARK.astype(">u2").tobytes()
    shows(Image.open(io.BytesIO(pgm)), DARK * 255.0 / 4095)


def test_16_bit_colour_png_keeps_the_high_bytes():
    row = struct.pack(">B6H", 0, 65535, 32768, 255, 256, 0, 65280)
    header = struct.pack(">2I5B", 2, 1, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(row)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)
    same(load_image(data), np.array([[[255, 128, 0], [1, 0, 255]]], np.uint8))


def test_wide_modes_are_scaled():
    def grey(values, mode_dtype):
        picture = load_image(Image.fromarray(np.array([values], mode_dtype)))
        return np.asarray(picture)[0, :, 0].tolist()

    assert grey([0, 7, 255], np.int32) == [0, 7, 255]
    assert grey([-5, 256, 65535], np.int32) == [0, 1, 255]
    assert grey([0, 2**30, 2**31 - 1], np.int32) == [0, 128, 255]
    assert grey([0, 0.5, 1], np.float32) == [0, 128, 255]
    assert grey([0, 2, 255], np.float32) == [0, 2, 255]
    assert grey([0, 257, 65535], np.float32) == [0, 1, 255]
    with pytest.raises(ImageError, match="floating-point"):
        grey([0, np.nan], np.float32)


def test_arrays():
    grey = COLOURS[..., 0]
    as_rgb = np.repeat(grey[..., None], 3, axis=2)
    same(load_image(grey), as_rgb)
    same(load_image(grey[..., None]), as_rgb)
    same(load_image(COLOURS[:, ::-1]), COLOURS[:, ::-1])
    same(load_image(grey > 100), (as_rgb > 100) * np.uint8(255))
    same(load_image(COLOURS / 255), COLOURS)
    same(load_image((COLOURS / 255).astype(np.float16)), COLOURS)
    for bad, reason in [
        (COLOURS.astype(np.int64), "dtype int64"),
        (COLOURS * 1.0, "0 … 1"),
        (np.full((2, 2), np.nan), "0 … 1"),
        (COLOURS.transpose(2, 0, 1), re.escape("[3, 5, 7]")),
        (np.zeros(5, np.uint8), "shape"),
        (np.zeros((0, 4), np.uint8), "4 × 0"),
        (np.broadcast_to(np.uint8(0), (20_000, 20_000)), "limit"),
    ]:
        with pytest.raises(ImageError, match=reason):
            load_image(bad)


def quadrants(width=640, height=480):
    """Return a picture whose quarters have four colours, with a gradient over them."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 200
    image[: height // 2, width // 2 :, 1] = 200
    image[height // 2 :, : width // 2, 2] = 200
    image[height // 2 :, width // 2 :] = 200
    image += np.linspace(0, 50, width).astype(np.uint8)[None, :, None]
    return image


@pytest.fixture
def large(monkeypatch):
    """Have pictures of more than 10,000 pixels be large ones."""
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 10_000)
    monkeypatch.setattr(image_module, "_STRIP_PIXELS", 7000)  # many strips


WIDE = (96, 64)  # wanted of the picture upright


def reduced(source, wanted=WIDE):
    return image_module.load_reduced(source, lambda *_: wanted)


def near(image, expected):
    """Check that a picture is what averages over its pixels give, but for what formats lose."""
    expected = Image.fromarray(expected).resize(image.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).mean() < 2


LARGE_ONES = [
    ("JPEG", "RGB", {"quality": 95, "subsampling": 0}),
    ("JPEG", "CMYK", {"quality": 95}),
    ("JPEG", "RGB", {"quality": 95, "subsampling": 0, "progressive": True}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("BMP", "RGB", {}),
    ("WEBP", "RGB", {"quality": 95}),
    ("WEBP", "RGBA", {"lossless": True}),
]


@pytest.mark.parametrize(("format", "mode", "options"), LARGE_ONES)
def test_a_large_picture_is_reduced_to_three_times_what_is_wanted(large, format, mode, options):
    data = encoded(Image.fromarray(quadrants()).convert(mode), format, **options)
    image, size = reduced(data)
    assert size == (640, 480)
    assert image.size == (288, 192)
    near(image, quadrants())
    whole = load_image(data)
    assert whole.size == (640, 480)
    near(whole, quadrants())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("format", ["TIFF", "PNG"])
def test_pillow_does_not_warn_of_large_pictures(large, monkeypatch, format):
    options = {"compression": "tiff_lzw", "tiffinfo": {278: 480}} if format == "TIFF" else {}
    data = encoded(Image.fromarray(quadrants()), format, **options)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200_000)
    assert reduced(data)[0].size == (288, 192)


@pytest.mark.parametrize("kind", ["L", "P", "1", "I;16", "F", "array"])
def test_large_pictures_of_other_kinds(large, kind):
    grey = quadrants()[..., 0]
    source = {
        "L": lambda: encoded(Image.fromarray(grey), "PNG"),
        "P": lambda: encoded(Image.fromarray(grey).convert("P"), "GIF"),
        "1": lambda: encoded(Image.fromarray(grey > 128), "PNG"),
        "I;16": lambda: encoded(Image.fromarray(grey.astype(np.uint16) << 4), "PNG"),
        "F": lambda: encoded(Image.fromarray(grey.astype(np.float32) / 255), "TIFF"),
        "array": lambda: grey,
    }[kind]()
    expected = (grey > 128) * np.uint8(255) if kind == "1" else grey
    image, size = reduced(source)
    assert (size, image.size) == ((640, 480), (288, 192))
    near(image, np.repeat(expected[..., None], 3, 2))


@pytest.mark.parametrize("orientation", range(1, 10))  # 9 is none
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_large_picture_is_reduced_upright(large, monkeypatch, format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 95, "subsampling": 0} if format == "JPEG" else {}
    data = encoded(Image.fromarray(quadrants()), format, exif=exif, **options)
    image, size = reduced(data)
    assert image.size == (288, 192)
    monkeypatch.undo()
    upright = load_image(data)
    assert size == upright.size == ((480, 640) if 5 <= orientation <= 8 else (640, 480))
    near(image, np.asarray(upright))


def test_a_picture_that_is_narrow_is_not_widened(large):
    image, size = reduced(np.zeros((20_000, 3), np.uint8))
    assert (image.size, size) == ((3, 192), (3, 20_000))


def test_a_picture_that_is_not_large_keeps_every_pixel():
    for format, mode, options in LARGE_ONES:
        data = encoded(Image.fromarray(quadrants()).convert(mode), format, **options)
        image, size = reduced(data)
        same(image, Image.open(io.BytesIO(data)).convert("RGB"))
        assert size == image.size


def test_of_a_large_jpeg_no_more_than_an_eighth_is_decoded(large, monkeypatch):
    sizes = []
    strips = image_module._in_strips
    monkeypatch.setattr(
        image_module,
        "_in_strips",
        lambda image, *rest: sizes.append(image.size) or strips(image, *rest),
    )
    data = encoded(Image.fromarray(quadrants(2400, 1803)), "JPEG")
    image, size = reduced(data)
    assert sizes == [(300, 226)]
    assert (image.size, size) == ((288, 192), (2400, 1803))


def test_tiles_of_a_large_picture_are_as_good_as_those_of_all_its_pixels(mini_checkpoint, large):
    # Detail of all sizes: what resampling may get wrong is most there.
    with Checkpoint.open(mini_checkpoint()) as checkpoint:
        config = checkpoint.config
    noise = np.zeros((900, 1200, 3))
    for step in (1, 2, 4, 8, 16, 32):
        small = RNG.normal(size=(-(-900 // step), -(-1200 // step), 3))
        noise += np.kron(small, np.ones((step, step, 1)))[:900, :1200] * step**0.5
    photo = (128 + 6 * noise).clip(0, 255).astype(np.uint8)
    data = encoded(Image.fromarray(photo), "JPEG", quality=95)
    fast = prepare_picture(data, config)
    assert (fast.width, fast.height) == (1200, 900)
    image_module.LARGE_PIXELS = 2**26
    exact = prepare_picture(data, config)
    levels = (
        np.abs(fast.pixels - exact.pixels) * np.float32(config.image_std).reshape(3, 1, 1) * 255
    )
    assert fast.pixels.shape == exact.pixels.shape
    assert 0 < levels.mean() < 0.5


def test_one_large_picture_at_a_time(large, monkeypatch):
    decode, at_once = image_module._decoded, []
    busy = set()

    def decoding(opened, wanted):
        busy.add(id(opened))
        at_once.append(len(busy))
        time.sleep(0.01)
        try:
            return decode(opened, wanted)
        finally:
            busy.remove(id(opened))

    monkeypatch.setattr(image_module, "_decoded", decoding)
    data = encoded(Image.fromarray(quadrants()), "PNG")
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(load_image, [data] * 8))
        assert max(at_once) == 1
        at_once.clear()
        list(pool.map(load_image, [COLOURS] * 8))
        assert max(at_once) > 1


@pytest.mark.parametrize("animated", [True, False])
def test_a_large_webp_that_ffmpeg_cannot_decode(large, monkeypatch, animated):
    picture = Image.fromarray(quadrants())
    if animated:
        data = encoded(picture, "WEBP", save_all=True, append_images=[picture.rotate(180)])
    else:
        data = encoded(picture, "WEBP")
        monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImageError, match="shrink it" if animated else r"edgevl\[video\]"):
        load_image(data)
    monkeypatch.setattr(image_module, "LARGE_PIXELS", 640 * 480)  # half of that for WebP
    same(load_image(data), Image.open(io.BytesIO(data)).convert("RGB"))


def test_the_given_picture_is_left_alone(photo):
    image = Image.open(photo)
    load_image(image)
    assert (image.mode, image.size, image.format) == ("RGB", (7, 5), "PNG")
    loaded = load_image(image)
    loaded.paste("black", (0, 0, 7, 5))
    same(image, COLOURS)


def test_extreme_shapes_are_fine():
    assert load_image(np.zeros((1, 1), np.uint8)).size == (1, 1)
    assert load_image(np.zeros((1, 100_000), np.uint8)).size == (100_000, 1)


def huge_png(width, height):
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body)


@pytest.mark.parametrize("size", [(16_320, 12_240), (40_000, 40_000), (2**30, 2**30)])
def test_a_decompression_bomb_is_refused_from_its_header(size):
    with pytest.raises(ImageError, match=f"limit of {MAX_PIXELS}"):
        load_image(huge_png(*size))
    assert not is_large(huge_png(*size))  # it need not wait to be refused


@pytest.mark.filterwarnings("error")
def test_what_pillow_warns_of_is_read_without_a_warning():
    # 15,400 × 11,600 pixels are within its limit, twice that of the warning.
    with pytest.raises(ImageError, match="truncated"):
        load_image(huge_png(15_400, 11_600))


def test_byte_limit(monkeypatch, tmp_path):
    data = encoded(Image.fromarray(COLOURS), "BMP")
    path = tmp_path / "a.bmp"
    path.write_bytes(data)
    url = "data:;base64," + base64.b64encode(data).decode()
    monkeypatch.setattr(image_module, "MAX_BYTES", len(data))
    for source in (data, path, url):
        same(load_image(source), COLOURS)
    monkeypatch.setattr(image_module, "MAX_BYTES", len(data) - 1)
    for source in (data, path, url, "data:," + "a" * 10_000):
        with pytest.raises(ImageError, match="limit"):
            load_image(source)


def test_no_more_than_the_limit_is_read(monkeypatch, tmp_path):
    # Devices and pipes have no size to look at first: what counts is what is read.
    path = tmp_path / "sparse.png"
    with path.open("wb") as file:
        file.truncate(50 * 2**20)
    monkeypatch.setattr(image_module, "MAX_BYTES", 10_000)
    with path.open("rb") as file:
        monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(buffer=file))
        tracemalloc.start()
        for source in (path, "-"):
            with pytest.raises(ImageError, match="limit"):
                load_image(source)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 2**20


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_truncated_picture_is_refused(format):
    colours = RNG.integers(0, 256, (60, 60, 3), np.uint8)
    data = encoded(Image.fromarray(colours), format)
    with pytest.raises(ImageError):
        load_image(data[: len(data) // 2])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (b"%PDF-1.7", "not a picture"),
        (b"P6 1 1 255 aaa", "not a picture"),
        ("missing.png", "missing.png: no such file"),
        (".", "is a directory"),
        ("a\0b", "not a path"),
        ("~nobody-of-this-name/a.png", "not a path|no such file"),
        ("x" * 5000, "cannot be read"),
        ("", "is a directory|no such file"),
        ("https://example.com/a.png", "download it first"),
        ("HTTP://example.com/a.png", "download it first"),
        ("data:image/png;base64", "comma"),
        ("data:image/png;base64,@@@", "base64"),
        ("data:image/png;base64,", "empty"),
        ("data:text/plain,hello", "not a picture"),
        (None, "NoneType"),
        (3, "int"),
        (["a.png"], "list"),
    ],
)
def test_what_is_not_a_picture_gets_one_line(source, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ImageError, match=reason) as caught:
        load_image(source)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads all")
def test_a_file_without_permission_is_refused(photo):
    photo.chmod(0)
    with pytest.raises(ImageError, match="Permission denied"):
        load_image(photo)


def test_empty_file_and_closed_picture(tmp_path, photo):
    (tmp_path / "empty.png").touch()
    with pytest.raises(ImageError, match=r"empty.png: empty"):
        load_image(tmp_path / "empty.png")
    image = Image.open(photo)
    image.close()
    with pytest.raises(ImageError):
        load_image(image)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\0\0\0\x18ftypisom\0\0\2\0isom", "a video, not a picture; give it as one (-v"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01", "a video, not a picture; give it as one (-v"),
        (b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "not a picture that can be read; give JPEG"),
    ],
)
def test_a_video_is_told_from_other_files(data, message):
    # An AVIF without a picture: that it is no video is what counts.
    with pytest.raises(ImageError, match=re.escape(message)):
        load_image(data)


HEIC_HEADER = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


def test_heic_without_its_decoder_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(ImageError, match=re.escape("pip install 'edgevl[heic]'")):
        load_image(HEIC_HEADER)


def test_heic_with_its_decoder():
    pillow_heif = pytest.importorskip("pillow_heif")
    gradient = np.repeat(np.arange(64, dtype=np.uint8)[None, :, None] * 4, 48, axis=0)
    picture = Image.fromarray(np.repeat(gradient, 3, axis=2))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(picture).save(buffer, quality=95, exif=exif.tobytes())
    image = load_image(buffer.getvalue())
    upright = np.asarray(picture.rotate(-90, expand=True)).astype(int)
    assert image.size == (48, 64)
    assert np.abs(np.asarray(image) - upright).mean() < 4
    with pytest.raises(ImageError, match="damaged"):
        load_image(HEIC_HEADER + bytes(100))


def test_loading_pictures_leaves_pillow_as_it_was():
    # Registered decoders and limits are the program's business.
    from PIL import ImageFile

    assert Image.MAX_IMAGE_PIXELS * 2 == MAX_PIXELS  # above twice its limit Pillow refuses
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert "HEIF" not in Image.OPEN


def test_prepared_picture(mini_checkpoint, photo):
    from edgevl.checkpoint import Checkpoint

    with Checkpoint.open(mini_checkpoint()) as checkpoint:
        config = checkpoint.config
    wide = RNG.integers(0, 256, (200, 400, 3), np.uint8)
    picture = prepare_picture(wide, config)
    size = config.vision.image_size
    assert picture.pixels.shape == (9, 3, size, size)  # 4 × 2 and the thumbnail
    assert picture.pixels.dtype == np.float32
    assert (picture.width, picture.height) == (400, 200)
    assert not picture.pixels.flags.writeable
    assert prepare_picture(wide, config, max_tiles=1).pixels.shape[0] == 1
    assert prepare_picture(wide, config, max_tiles=2).pixels.shape[0] == 3
    assert prepare_picture(encoded(Image.fromarray(wide), "PNG"), config) == picture
    assert len({picture, prepare_picture(wide, config, 1), prepare_picture(photo, config)}) == 3
    changed = wide.copy()
    changed[100, 100, 0] ^= 128
    assert prepare_picture(changed, config).digest != picture.digest
    for bad in (0, 41, -1, 2.0, True, "3"):
        with pytest.raises(PromptError, match="max_tiles"):
            prepare_picture(wide, config, max_tiles=bad)


def test_model_without_dynamic_tiling_sees_one_tile(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint()) as checkpoint:
        config = replace(checkpoint.config, dynamic_tiling=False)
    assert prepare_picture(np.zeros((50, 500), np.uint8), config).pixels.shape[0] == 1
    assert prepare_picture(np.zeros((50, 500), np.uint8), config, 9).pixels.shape[0] == 1


def test_a_model_of_many_tiles_may_use_them(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint()) as checkpoint:
        config = replace(checkpoint.config, max_tiles=48)
    wide = np.zeros((50, 2400), np.uint8)
    assert len(prepare_picture(wide, config).pixels) == 49  # and the thumbnail
    with pytest.raises(PromptError, match="1 to 48, not 49"):
        prepare_picture(wide, config, max_tiles=49)
