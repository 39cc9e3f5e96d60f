"""Small videos, made with PyAV, whose frames can be told apart."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def picture_of(number: int, width: int, height: int) -> np.ndarray:
    """Return what frame ``number`` shows: a bar that moves, and a shade that goes with it."""
    pixels = np.full((height, width, 3), number * 7 % 256, np.uint8)
    pixels[:, : width // 2] = [200, 0, 0]
    pixels[height // 2 :, : 2 + number % (width // 2)] = [0, 200, 0]
    return pixels


def write_clip(
    path: Path,
    frames: int = 100,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    gop: int = 10,
    b_frames: int = 0,
    variable: bool = False,
    first: int = 0,
    start: int = 0,
    picture: Callable[[int, int, int], np.ndarray] = picture_of,
) -> Path:
    """Write a clip of 25 frames a second, or ever fewer (``variable``), and return its path.

    It shows frames from number ``first`` on, as ``picture`` draws them, and begins at the time of
    frame ``start``.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = {"gif": "rgb8", "mjpeg": "yuvj420p"}.get(codec, "yuv420p")
        if codec != "gif":
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(first + number, *size), "rgb24")
            frame.pts = start + number + (number * number // 10 if variable else 0)
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = np.zeros((1, 1024), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def set_matrix(path: Path, a: int, b: int, c: int, d: int) -> Path:
    """Have an MP4 file's display matrix take (x, y) to (a x + c y, b x + d y), y downwards."""
    matrix = b"".join(
        int(value * unit).to_bytes(4, "big", signed=True)
        for value, unit in zip((a, b, 0, c, d, 0, 0, 0, 1), (2**16, 2**16, 2**30) * 3, strict=True)
    )
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0 of the box
    data[start : start + 36] = matrix
    path.write_bytes(data)
    return path


def set_times(path: Path, times: list[int]) -> Path:
    """Write other time stamps over those of an IVF file's frames."""
    data = bytearray(path.read_bytes())
    at = 32
    for time in times:
        size = int.from_bytes(data[at : at + 4], "little")
        data[at + 4 : at + 12] = time.to_bytes(8, "little")
        at += 12 + size
    assert at == len(data)
    path.write_bytes(data)
    return path


def damage(path: Path, *numbers: int) -> Path:
    """Overwrite packets of a video, counted as they are decoded."""
    with av.open(str(path)) as container:
        places = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size]
    data = bytearray(path.read_bytes())
    for number in numbers:
        position, size = places[number]
        data[position : position + size] = bytes((7 * i + 13) % 256 for i in range(size))
    path.write_bytes(data)
    return path
