"""Pictures that Pulsar2 calibrates the vision encoder on, in the archive that it reads."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from edgevl.checkpoint import Checkpoint
from edgevl.errors import BoardError, ImageError
from edgevl.files import replacing
from edgevl.preprocess import load_image
from edgevl.preprocess.tiles import split
from edgevl.quantize.calibration.pictures import choose_pictures, open_pictures
from edgevl.quantize.calibration.shipped import drawn


def write_calibration(checkpoint: Checkpoint, source: Path | None, path: Path, samples: int) -> int:
    """Write a tar file of tiles as ``calibration_format`` Image has them: RGB PNGs of tile size.

    Tiles are pixels before normalisation: Pulsar2 normalises what it reads from pictures by
    ``calibration_mean`` and ``calibration_std``, whatever the board is to take later. Arrays
    (Numpy) would have to be normalised here, in float32, and be larger.

    Each picture gives one tile, made as `prepare_picture` does for one tile: that is what a board
    sees, where a tile takes 256 of the 1024 tokens that a prefill holds. The same source and
    version of Pillow give the same bytes.

    Args:
        checkpoint: of the model; it says how large a tile is.
        source: a directory or a tar file of pictures; None for drawn ones.
        path: of the tar file to write; its directory exists.
        samples: tiles wanted, one or more.

    Returns:
        How many were written: fewer than wanted if there are fewer different pictures.

    Raises:
        OSError: the file cannot be written.
        EdgeVLError: the pictures cannot be read.
    """
    size = checkpoint.config.vision.image_size
    images = _drawn(samples) if source is None else _found(source, samples)
    with (
        replacing(path) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        for index, image in enumerate(images):
            data = _png(split(image, size, 1, 1, thumbnail=False)[0])
            info = tarfile.TarInfo(f"{index:04}.png")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return index + 1


def _drawn(count: int) -> Iterator[Image.Image]:
    return (drawn(place, place) for place in range(count))


def _found(source: Path, count: int) -> Iterator[Image.Image]:
    """Read different pictures, evenly spread over all there are."""
    files = open_pictures(source)
    try:
        found, _ = choose_pictures(files, count)
        for picture in found:
            try:
                yield load_image(files.read(picture.place))
            except ImageError as error:
                raise BoardError(
                    f"{source}: changed while it was read ({error}); run the command again"
                ) from None
    finally:
        files.close()


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
