"""Read a picture from wherever it is: an upright RGB ``PIL.Image``, or an ``ImageError``."""

from __future__ import annotations

import io
import math
import os
import struct
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from edgevl.errors import ImageError
from edgevl.files import first_line, reading
from edgevl.preprocess.sources import Medium

#: What a picture may be given as: path, ``"-"`` or ``data:`` URL, encoded bytes, picture, array.
ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
)
#: The (width, height) that a picture of a (width, height) is resized to.
Wanted: TypeAlias = Callable[[int, int], tuple[int, int]]

#: Largest encoded picture.
MAX_BYTES = 64 * 2**20
#: Largest decoded picture: above it Pillow, as it is by default, refuses to open one.
MAX_PIXELS = 2 * (2**30 // 4 // 3)
#: Larger pictures are decoded one at a time, and by `load_reduced` no larger than is of use: 64
#: megapixels. Decoded, one has 4 bytes a pixel and once more as many where it must be converted.
LARGE_PIXELS = 2**26
#: How much larger than what is wanted `load_reduced` leaves a large picture, in width and height.
#: With 3, Pillow's own proposal, pixels are then within half a level of 255, on average, of those
#: resized in one step (photographs; sharp noise: 1.3).
REDUCING_GAP = 3

_PICTURE = Medium("picture", "图片", ImageError, "a path, bytes, PIL image or array")
_TOO_LARGE = ("shrink the picture", "请先缩小")

# Only decoders of plain raster files: no EPS (Ghostscript), no WMF, no rarely used parsers.
_FORMATS = tuple(
    plugin.format
    for plugin in (
        JpegImagePlugin.JpegImageFile,
        PngImagePlugin.PngImageFile,
        WebPImagePlugin.WebPImageFile,
        BmpImagePlugin.BmpImageFile,
        GifImagePlugin.GifImageFile,
        TiffImagePlugin.TiffImageFile,
    )
)
_AVIF_BRANDS = (b"avif", b"avis")  # of the same container as MP4
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

# Bits that cameras, scanners and medical devices measure, and what 32-bit integers may hold.
_DEPTHS = (8, 10, 12, 14, 16, 20, 24, 31)
_STRIP_PIXELS = 2**21  # converted or reduced at a time
_one_large = threading.Lock()

_MAX, _SMIN, _SMAX = 281, 340, 341  # TIFF's MaxSampleValue, SMinSampleValue, SMaxSampleValue


@dataclass(frozen=True)
class _Opened:
    """A picture whose header was read."""

    image: Image.Image
    name: str  # what errors call it
    data: bytes = b""  # the file, where it is one
    is_ours: bool = True  # nobody else has the picture, so that it may be changed

    @property
    def is_large(self) -> bool:
        # libwebp's decoder, as Pillow uses it, takes 16 bytes a pixel.
        limit = LARGE_PIXELS // 2 if self.image.format == "WEBP" else LARGE_PIXELS
        return self.image.width * self.image.height > limit


def load_image(source: ImageSource) -> Image.Image:
    """Return a picture as 8-bit RGB, upright (EXIF orientation applied), without metadata.

    Formats: JPEG, PNG, WebP, BMP, GIF (first frame), TIFF (first page), and HEIC where
    ``pillow_heif`` is installed. An alpha channel is dropped and not composited, as the original
    InternVL code does.

    Of the values of 16-bit pictures in grey, and of uint16 arrays, the upper 8 of the bits in use
    are kept, as Pillow keeps the upper 8 of 16-bit colour. Devices measure 8 to 14 bits and store
    16. How many are in use is what the file says (PNG's sBIT; TIFF's BitsPerSample and
    MaxSampleValue, or the range of SMinSampleValue and SMaxSampleValue), unless values exceed that;
    else the fewest of 8, 10, 12, 14 and 16 that hold all values. So a picture that uses the low end
    of 16 bits because it was dark is shown brighter, by 4, 16, 64 or 256 times: nothing tells it
    from the others. Wider integers go on with 20, 24 and 31 bits. Float is taken to lie in 0 … 1
    or, where it does not, to be of one of those depths.

    Args:
        source: One of: a path (``~`` is expanded); ``"-"`` for standard input; a ``data:`` URL;
            the bytes of a picture file; a ``PIL.Image.Image`` (left as it is); a NumPy array
            [height, width] or [height, width, 1, 3 or 4] of uint8, uint16, bool, or float in
            0 … 1.

    Raises:
        ImageError: The source cannot be read, is not a whole picture of those formats, is empty,
            or exceeds ``MAX_BYTES`` or ``MAX_PIXELS``.
    """
    return load_reduced(source, None)[0]


def load_reduced(source: ImageSource, wanted: Wanted | None) -> tuple[Image.Image, tuple[int, int]]:
    """Return a picture as `load_image` does, but a large one no larger than is of use.

    A picture of more than ``LARGE_PIXELS`` (WebP: half of that) is reduced as it is decoded: as
    JPEG's format allows by eighths, WebP by FFmpeg, others strip by strip afterwards.

    Args:
        source: As for `load_image`.
        wanted: Returns the (width, height) that a picture of a certain (width, height) is resized
            to. What is returned has at least ``REDUCING_GAP`` times these, or all its pixels; with
            None it has all.

    Returns:
        The picture, and the (width, height) it has upright, if it is not reduced.

    Raises:
        ImageError: As of `load_image`.
    """
    opened = _open(source)
    image, name = opened.image, opened.name
    is_large = opened.is_large
    with ExitStack() as stack:
        if is_large:
            stack.enter_context(_one_large)
            stack.enter_context(warnings.catch_warnings())
            # Pillow's TIFF reader checks strips as `Image.open` does pictures.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            rgb, size = _decoded(opened, wanted if is_large else None)
        except (ImageError, MemoryError):
            raise
        except Exception as error:  # as in _decode
            raise ImageError(
                f"{name}: damaged or truncated picture ({first_line(error)})",
                f"{name}：图片已损坏",
            ) from error
        finally:
            if opened.is_ours:
                image.close()
    _check_size(rgb.size, name)  # what was decoded, should it differ from the header
    return rgb, size


def is_large(data: bytes) -> bool:
    """Return whether the bytes are a picture of which one at a time is decoded."""
    try:
        return _decode(data, "").is_large
    except ImageError:  # it will be raised again
        return False


def _open(source: ImageSource) -> _Opened:
    if isinstance(source, Image.Image):
        _check_size(source.size, "the picture")
        return _Opened(source, "the picture", is_ours=False)
    if isinstance(source, np.ndarray):
        return _Opened(_from_array(source), "the array")
    name, data = _PICTURE.locate(source, MAX_BYTES, *_TOO_LARGE)
    if isinstance(data, Path):
        with reading(name, ImageError, "picture file"), data.expanduser().open("rb") as file:
            # Bounded, so that a device or pipe without an end is refused rather than read.
            data = file.read(MAX_BYTES + 1)
        _PICTURE.check_size(name, len(data), MAX_BYTES, *_TOO_LARGE)
    return _decode(data, name)


def _decode(data: bytes, name: str) -> _Opened:
    """Read the header."""
    try:
        image = _decoder(data, name)(io.BytesIO(data), "")
    except ImageError:
        raise
    except Exception as error:  # decoders raise nearly anything on malformed input
        raise ImageError(
            f"{name}: damaged picture ({first_line(error)})", f"{name}：图片已损坏"
        ) from error
    _check_size(image.size, name)
    return _Opened(image, name, data)


def _decoder(data: bytes, name: str) -> Callable[..., Image.Image]:
    """Find the decoder as `Image.open` does, which would warn of large pictures."""
    brand = data[8:12] if data[4:8] == b"ftyp" else None
    if brand in _HEIC_BRANDS:
        try:
            from pillow_heif import HeifImageFile
        except ImportError:
            raise ImageError(
                f"{name}: HEIC needs a decoder; pip install 'edgevl[heic]'",
                f"{name}：这里不能读取 HEIC，请改用 JPEG 或 PNG",
            ) from None
        return HeifImageFile
    for format_name in _FORMATS:
        factory, accept = Image.OPEN[format_name]
        # Where it says why it cannot, that is a text.
        if accept is not None and accept(data[:16]) is True:
            return factory
    # The commonest videos: MP4 and MOV, Matroska and WebM.
    if brand not in (None, *_AVIF_BRANDS) or data.startswith(b"\x1a\x45\xdf\xa3"):
        raise ImageError(
            f"{name}: a video, not a picture; give it as one (-v, /video, videos, video_url)",
            f"{name}：这是视频而不是图片，请作为视频给出",
        )
    raise ImageError(
        f"{name}: not a picture that can be read; give JPEG, PNG, WebP, BMP, GIF, TIFF or HEIC",
        f"{name}：不是可读取的图片，请用 JPEG、PNG、WebP、BMP、GIF、TIFF 或 HEIC",
    )


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"an array of shape {list(shape)} is not a picture; give [height, width] or "
            "[height, width, 1, 3 or 4]"
        )
    _check_size((shape[1], shape[0]), "the array")
    if array.ndim == 3:
        array = array[..., 0] if shape[2] == 1 else array[..., :3]
    if array.dtype == np.uint8:
        values = array
    elif array.dtype == np.bool_:
        values = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype.newbyteorder("=") == np.uint16:
        values = (array >> (_depth(int(array.max())) - 8)).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # not (…) so that NaN fails too
            raise ImageError(f"a float array must lie in 0 … 1, found {low:g} … {high:g}")
        values = np.round(array * 255).astype(np.uint8)
    else:
        raise ImageError(
            f"an array of dtype {array.dtype} is not a picture; give uint8, uint16, bool or float"
        )
    return Image.fromarray(np.ascontiguousarray(values))


def _decoded(opened: _Opened, wanted: Wanted | None) -> tuple[Image.Image, tuple[int, int]]:
    """Decode, turn upright and convert to RGB: -> picture, size without any reduction."""
    image, data = opened.image, opened.data
    size = image.size
    box: tuple[float, float, float, float] = (0, 0, *size)  # where it is in what is decoded
    if image.format == "WEBP" and data and opened.is_large:
        rgb = _webp(opened, _reduced(image, size, wanted))
        if rgb is not None:
            return _upright(rgb, image, size)
    if wanted is not None and opened.is_ours and isinstance(image, JpegImagePlugin.JpegImageFile):
        drafted = image.draft(None, _reduced(image, size, wanted))
        box = drafted[1] if drafted else box
        image.load()
    else:
        _keep_low_bytes(opened)
        image.load()
        size = image.size  # Pillow's TIFF reader turns the picture itself
        box = (0, 0, *size)
    reduced = _reduced(image, size, wanted)
    if image.mode == "RGB" and opened.is_ours and reduced == image.size:
        rgb = image._new(image.im)  # without its file, and not another copy of the pixels
    elif _is_wide(image):
        to_bytes = _to_bytes(image, data)
        rgb = _in_strips(
            image, reduced, box, lambda strip: Image.fromarray(to_bytes(_values(strip)))
        )
    elif reduced == image.size:
        rgb = _to_rgb(image)
    else:
        rgb = _in_strips(image, reduced, box, _to_rgb)
    return _upright(rgb, image, size)


def _reduced(image: Image.Image, size: tuple[int, int], wanted: Wanted | None) -> tuple[int, int]:
    """Return the size to reduce a picture of ``size``, not upright yet, to."""
    if wanted is None:
        return size
    width, height = size
    wide, high = wanted(height, width)[::-1] if _turned(image) else wanted(width, height)
    return min(width, REDUCING_GAP * wide), min(height, REDUCING_GAP * high)


def _upright(
    rgb: Image.Image, image: Image.Image, size: tuple[int, int]
) -> tuple[Image.Image, tuple[int, int]]:
    """Turn what became of ``image``: -> picture, width and height it has unless reduced."""
    rgb.info = {}  # the orientation is spent; a second load_image must not apply it again
    exif = rgb.getexif()
    exif[ExifTags.Base.Orientation] = _orientation(image)
    ImageOps.exif_transpose(rgb, in_place=True)
    exif.clear()
    return rgb, (size[::-1] if _turned(image) else size)


def _in_strips(
    image: Image.Image,
    size: tuple[int, int],
    box: tuple[float, float, float, float],
    convert: Callable[[Image.Image], Image.Image],
) -> Image.Image:
    """Convert to RGB and reduce ``box``, from the left upper corner on, to ``size``.

    A strip at a time, since what is converted would be a second copy of a large picture.
    """
    result = Image.new("RGB", size)
    scale = box[3] / size[1]
    margin = 2 * scale + 1  # bicubic's filter reaches so far
    step = max(1, int(_STRIP_PIXELS / (image.width * scale)))
    for top in range(0, size[1], step):
        bottom = min(top + step, size[1])
        first = max(0, math.floor(top * scale - margin))
        last = min(math.ceil(bottom * scale + margin), image.height)
        strip = convert(image.crop((0, first, image.width, last)))
        part = (0, top * scale - first, box[2], min(bottom * scale, last) - first)
        strip = strip.resize((size[0], bottom - top), Image.Resampling.BICUBIC, part)
        result.paste(strip, (0, top))
    return result


def _webp(opened: _Opened, size: tuple[int, int]) -> Image.Image | None:
    """Decode a still WebP to ``size`` with FFmpeg, which takes a tenth of the memory.

    None if that cannot be done, and Pillow can do it; where Pillow would take too much memory, an
    ImageError.
    """
    reason = "pip install 'edgevl[video]'"
    try:
        import av
        from av.video.reformatter import Interpolation
    except ImportError:
        pass
    else:
        reason = "shrink it"
        # Without the flag chrominance is rounded down, and all gets darker by 2 of 255.
        method = Interpolation.AREA | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND
        try:
            with av.open(io.BytesIO(opened.data), format="webp_pipe") as container:
                container.streams.video[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}
                frame = next(container.decode(video=0))
            if (frame.width, frame.height) == opened.image.size:
                frame = frame.reformat(*size, format="rgb24", interpolation=method)
                [plane] = frame.planes
                rows = np.frombuffer(plane, np.uint8)  # they may be padded
                return Image.frombuffer("RGB", size, rows, "raw", "RGB", plane.line_size, 1)
        except (av.FFmpegError, StopIteration, IndexError):  # animated, say
            pass
    if opened.image.width * opened.image.height > LARGE_PIXELS:
        raise ImageError(
            f"{opened.name}: a WebP of {opened.image.width} × {opened.image.height} pixels takes "
            f"too much memory; {reason}"
        )
    return None


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(
            f"{name}: a picture of {width} × {height} pixels has nothing to see",
            f"{name}：图片太小",
        )
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width} × {height} pixels are over the limit of {MAX_PIXELS}; shrink it",
            f"{name}：图片超过 {MAX_PIXELS} 像素的上限，请先缩小",
        )


def _orientation(image: Image.Image) -> int:
    try:
        # After load(): Pillow's TIFF reader turns the picture itself and then drops the tag.
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged metadata does not make the pixels unreadable
        return 1


def _turned(image: Image.Image) -> bool:
    """Return whether the picture is to be turned by a quarter."""
    return _orientation(image) in range(5, 9)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and "transparency" in image.info:
        # The same colours as convert("RGB"), without its warning.
        image = image.convert("RGBA")
    return image.convert("RGB")


def _keep_low_bytes(opened: _Opened) -> None:
    """Have Pillow load 16-bit grey with alpha, a PNG, as the bytes it has: two and two."""
    image = opened.image
    if opened.is_ours and isinstance(image, PngImagePlugin.PngImageFile):
        decoder, extents, offset, raw_mode = image.tile[0]
        if raw_mode == "LA;16B":
            image.tile = [ImageFile._Tile(decoder, extents, offset, "RGBX")]
            image._mode = "RGBX"


def _is_wide(image: Image.Image) -> bool:
    """Return whether these are values of more than 8 bits; of PNG, RGBX is `_keep_low_bytes`'s."""
    mode = image.mode
    return mode in ("I", "F") or mode.startswith("I;16") or (mode, image.format) == ("RGBX", "PNG")


def _values(strip: Image.Image) -> NDArray[Any]:
    """Return the values of a grey picture, its alpha left out."""
    values = np.asarray(strip)
    return values[..., :2].copy().view(">u2")[..., 0] if strip.mode == "RGBX" else values


def _depth(peak: float) -> int:
    """Return the narrowest usual depth that holds values up to ``peak``."""
    return next((depth for depth in _DEPTHS if peak < 2**depth), _DEPTHS[-1])


def _to_bytes(image: Image.Image, data: bytes) -> Callable[[NDArray[Any]], NDArray[np.uint8]]:
    """Return what takes the values of a grey picture, integers or float, to 0 … 255."""
    low, high, used = math.inf, -math.inf, 0
    step = max(1, _STRIP_PIXELS // image.width)
    for top in range(0, image.height, step):
        bottom = min(top + step, image.height)
        values = _values(image.crop((0, top, image.width, bottom)))
        low, high = np.minimum(low, values.min()), np.maximum(high, values.max())  # NaN stays
        if image.mode != "F":
            used |= int(np.bitwise_or.reduce(values, axis=None))
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    black, white = _number(tags, _SMIN, 0), _number(tags, _SMAX, -1)  # none: not a range
    if not (black < white and high <= white):
        black = 0
        if image.mode == "F":
            if not (low >= 0 and high <= 65535):  # not (…) so that NaN fails too
                raise ImageError(
                    f"a floating-point picture must lie in 0 … 1, found {low:g} … {high:g}"
                )
            white = 1 if high <= 1 else 2 ** _depth(math.ceil(high)) - 1
        else:
            white = 2 ** max(_depth(high), _stated_depth(image, data, tags, used)) - 1
            if _number(tags, TiffImagePlugin.SAMPLEFORMAT, 1) == 2:  # a bit is the sign
                white = min(white, 2 ** (_number(tags, TiffImagePlugin.BITSPERSAMPLE, 32) - 1) - 1)
    gain, half = 255 / (white - black), 0.5
    if image.mode != "F":
        gain, half = 256 / (white - black + 1), 0  # the upper 8 bits
    white_is_zero = _number(tags, TiffImagePlugin.PHOTOMETRIC_INTERPRETATION, 1) == 0

    def to_bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
        scaled = ((values - float(black)) * gain + half).clip(0, 255).astype(np.uint8)
        return 255 - scaled if white_is_zero else scaled

    return to_bytes


def _stated_depth(image: Image.Image, data: bytes, tags: Mapping[int, Any], used: int) -> int:
    """Return the depth of a picture of integers as its file states it; 0 if it does not.

    ``tags`` are TIFF's, ``used`` the bits that any of its values has.
    """
    if image.format in ("PPM", "JPEG2000"):
        return 16  # Pillow scales what has another depth
    if image.format == "PNG":
        # What has fewer bits is to be scaled to all 16, but there is what puts them lowest.
        bits = _significant_bits(data)
        return bits if used % 2 ** (16 - bits) else 16 * (bits > 0)
    container = _number(tags, TiffImagePlugin.BITSPERSAMPLE, 16)
    if container < 16:
        return int(container)
    # The largest value there is, not that may be: TIFF 6.0, section 8.
    most = _number(tags, _MAX, 0)
    return _depth(most) if most > 0 else 0


def _significant_bits(data: bytes) -> int:
    """Return the first number in a PNG file's sBIT, 1 to 16; 0 if there is none."""
    at = 8
    while at + 8 < len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"sBIT" and 1 <= data[at + 8] <= 16:
            return data[at + 8]
        if kind in (b"sBIT", b"IDAT"):
            break
        at += 12 + length
    return 0


def _number(tags: Mapping[int, Any], tag: int, default: float) -> float:
    """Return the number, or the first number, of a TIFF file's tag."""
    value = tags.get(tag, default)
    value = value[0] if isinstance(value, tuple) and value else value
    try:
        return float(value)
    except (TypeError, ValueError, ZeroDivisionError):
        return default
