import base64
import io
import os
import re
import struct
import sys
import tracemalloc
import types
import zlib
from dataclasses import replace
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from edgevl.checkpoint import Checkpoint
from edgevl.errors import ImageError, PromptError
from edgevl.preprocess import image as image_module
from edgevl.preprocess import load_image, prepare_picture
from edgevl.preprocess.image import MAX_PIXELS

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


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_not_clipped(format):
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    data = encoded(Image.fromarray(values), format)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    same(load_image(data), expected)
    same(load_image(values), expected)


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


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(width, height):
    header = struct.pack(">2I5B", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(10_000, 10_000), (40_000, 40_000), (2**30, 2**30)])
def test_a_decompression_bomb_is_refused_from_its_header(size):
    with pytest.raises(ImageError, match=f"limit of {MAX_PIXELS}"):
        load_image(huge_png(*size))


def test_a_decompression_bomb_is_refused_where_warnings_are_errors():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="limit"):
            load_image(huge_png(10_000, 10_000))


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

    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS
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
