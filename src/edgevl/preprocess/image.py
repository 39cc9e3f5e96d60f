"""Read a picture from wherever it is: an upright RGB ``PIL.Image``, or an ``ImageError``."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from edgevl.errors import ImageError
from edgevl.preprocess.sources import data_url, first_line, reading, short_name

#: What a picture may be given as: path, ``"-"`` or ``data:`` URL, encoded bytes, picture, array.
ImageSource: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | Image.Image | NDArray[Any]
)

#: Largest encoded picture.
MAX_BYTES = 64 * 2**20
#: Largest decoded picture: Pillow's own default, above which it warns of a decompression bomb.
MAX_PIXELS = 2**30 // 4 // 3

# Only decoders of plain raster files: no EPS (Ghostscript), no WMF, no rarely used parsers.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
_AVIF_BRANDS = (b"avif", b"avis")  # of the same container as MP4
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> what brings the picture upright (as in PIL.ImageOps.exif_transpose).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource) -> Image.Image:
    """Return a picture as 8-bit RGB, upright (EXIF orientation applied), without metadata.

    Formats: JPEG, PNG, WebP, BMP, GIF (first frame), TIFF (first page), and HEIC where
    ``pillow_heif`` is installed. An alpha channel is dropped and not composited, as the original
    InternVL code does. 16-bit values keep their high byte, as Pillow does for 16-bit colour PNG.

    Args:
        source: One of: a path (``~`` is expanded); ``"-"`` for standard input; a ``data:`` URL;
            the bytes of a picture file; a ``PIL.Image.Image`` (left as it is); a NumPy array
            [height, width] or [height, width, 1, 3 or 4] of uint8, uint16, bool, or float in
            0 … 1.

    Raises:
        ImageError: The source cannot be read, is not a whole picture of those formats, is empty,
            or exceeds ``MAX_BYTES`` or ``MAX_PIXELS``.
    """
    if isinstance(source, Image.Image):
        return _finish(source, "the picture")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes | bytearray | memoryview):
        return _decode(_check_bytes(bytes(source[: MAX_BYTES + 1]), "the bytes"), "the bytes")
    if isinstance(source, str):
        return _from_string(source)
    if isinstance(source, os.PathLike):
        return _from_path(os.fspath(source))
    raise ImageError(
        f"a picture cannot be a {type(source).__name__}; give a path, bytes, PIL image or array"
    )


def _from_string(source: str) -> Image.Image:
    scheme = source[:8].lower()
    if source == "-":
        if sys.stdin is None:
            raise ImageError("standard input is closed; give the path of the picture")
        data = sys.stdin.buffer.read(MAX_BYTES + 1)
        return _decode(_check_bytes(data, "standard input"), "standard input")
    if scheme.startswith("data:"):
        data = data_url(source, MAX_BYTES, ImageError)
        return _decode(_check_bytes(data, "the data: URL"), "the data: URL")
    if scheme.startswith(("http://", "https://")):
        raise ImageError(
            f"{short_name(source)}: pictures are not fetched from the network; download it first "
            "and give its path"
        )
    return _from_path(source)


def _from_path(path: str | bytes) -> Image.Image:
    name = short_name(os.fsdecode(path))
    with (
        reading(name, "picture", ImageError),
        Path(os.fsdecode(path)).expanduser().open("rb") as file,
    ):
        # Bounded, so that a device or pipe without an end is refused rather than read.
        data = file.read(MAX_BYTES + 1)
    return _decode(_check_bytes(data, name), name)


def _check_bytes(data: bytes, name: str) -> bytes:
    if not data:
        raise ImageError(f"{name}: empty; not a picture")
    if len(data) > MAX_BYTES:
        raise ImageError(f"{name}: over the limit of {MAX_BYTES // 2**20} MiB; shrink the picture")
    return data


def _decode(data: bytes, name: str) -> Image.Image:
    if data[4:8] == b"ftyp" and data[8:12] in _HEIC_BRANDS:
        return _decode_heic(data, name)
    try:
        # Reads the header only.
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageError(
            f"{name}: more pixels than the limit of {MAX_PIXELS}; shrink the picture"
        ) from None
    except UnidentifiedImageError:
        if _is_video(data):
            raise ImageError(
                f"{name}: a video, not a picture; give it as one (-v, /video, videos, video_url)"
            ) from None
        raise ImageError(
            f"{name}: not a picture that can be read; give JPEG, PNG, WebP, BMP, GIF, TIFF or HEIC"
        ) from None
    except Exception as error:  # decoders raise nearly anything on malformed input
        raise ImageError(f"{name}: damaged picture ({first_line(error)})") from error
    with image:
        return _finish(image, name)


def _is_video(data: bytes) -> bool:
    """Tell the commonest videos, MP4 and MOV, Matroska and WebM, by their first bytes."""
    is_mp4 = data[4:8] == b"ftyp" and data[8:12] not in _AVIF_BRANDS
    return is_mp4 or data.startswith(b"\x1a\x45\xdf\xa3")


def _decode_heic(data: bytes, name: str) -> Image.Image:
    try:
        import pillow_heif
    except ImportError:
        raise ImageError(f"{name}: HEIC needs a decoder; pip install 'edgevl[heic]'") from None
    try:
        heif = pillow_heif.open_heif(data)  # reads the header only
        _check_size(heif.size, name)
        return _finish(heif.to_pillow(), name)
    except ImageError:
        raise
    except Exception as error:  # as above
        raise ImageError(f"{name}: damaged picture ({first_line(error)})") from error


def _from_array(array: NDArray[Any]) -> Image.Image:
    shape = array.shape
    if array.ndim not in (2, 3) or (array.ndim == 3 and shape[2] not in (1, 3, 4)):
        raise ImageError(
            f"an array of shape {list(shape)} is not a picture; give [height, width] or "
            "[height, width, 1, 3 or 4]"
        )
    _check_size((shape[1], shape[0]), "the array")
    array = array[..., 0] if array.ndim == 3 and shape[2] == 1 else array
    if array.dtype == np.uint8:
        values = array
    elif array.dtype == np.bool_:
        values = array.astype(np.uint8) * np.uint8(255)
    elif array.dtype == np.uint16:
        values = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # not (…) so that NaN fails too
            raise ImageError(f"a float array must lie in 0 … 1, found {low:g} … {high:g}")
        values = np.round(array * 255).astype(np.uint8)
    else:
        raise ImageError(
            f"an array of dtype {array.dtype} is not a picture; give uint8, uint16, bool or float"
        )
    return _finish(Image.fromarray(np.ascontiguousarray(values)), "the array")


def _finish(image: Image.Image, name: str) -> Image.Image:
    """Decode, turn upright and convert to RGB; the given picture is left as it is."""
    _check_size(image.size, name)
    try:
        image.load()
        orientation = _orientation(image)
        rgb = _to_rgb(image)
        if orientation in _UPRIGHT:
            rgb = rgb.transpose(_UPRIGHT[orientation])
    except ImageError:
        raise
    except Exception as error:  # as in _decode
        raise ImageError(f"{name}: damaged or truncated picture ({first_line(error)})") from error
    _check_size(rgb.size, name)  # what was decoded, should it differ from the header
    rgb.info = {}  # the orientation is spent; a second load_image must not apply it again
    return rgb


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageError(f"{name}: a picture of {width} × {height} pixels has nothing to see")
    if width * height > MAX_PIXELS:
        raise ImageError(
            f"{name}: {width} × {height} pixels are over the limit of {MAX_PIXELS}; shrink it"
        )


def _orientation(image: Image.Image) -> int:
    try:
        # After load(): Pillow's TIFF reader turns the picture itself and then drops the tag.
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # damaged metadata does not make the pixels unreadable
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if mode.startswith("I;16"):
        return _grey(np.asarray(image).astype(np.uint16) >> 8)
    if mode == "I":
        values = np.asarray(image)
        peak = int(values.max())
        # Pillow before 11 opens 16-bit PNG in this mode; otherwise the depth is the narrowest
        # usual one that holds the values.
        limit = (
            65535
            if image.format == "PNG"
            else next(limit for limit in (255, 65535, 2**31 - 1) if peak <= limit)
        )
        return _grey(values.clip(0) // ((limit + 1) // 256))
    if mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 65535):  # not (…) so that NaN fails too
            raise ImageError(
                f"a floating-point picture must lie in 0 … 1, found {low:g} … {high:g}"
            )
        limit = next(limit for limit in (1, 255, 65535) if high <= limit)
        return _grey(np.round(values * (255 / limit)))
    if mode == "P" and "transparency" in image.info:
        # The same colours as convert("RGB"), without its warning.
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")


def _grey(values: NDArray[Any]) -> Image.Image:
    return Image.fromarray(values.astype(np.uint8)).convert("RGB")
