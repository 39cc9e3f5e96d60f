"""Small videos, made with PyAV, whose frames can be told apart."""

from __future__ import annotations

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
) -> Path:
    """Write a clip of 25 frames a second, or ever fewer (``variable``), and return its path."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = size
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        if codec != "gif":
            stream.codec_context.gop_size = gop
            stream.codec_context.max_b_frames = b_frames
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture_of(number, *size), "rgb24")
            frame.pts = number + (number * number // 10 if variable else 0)
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


def turn_clip(path: Path, degrees: int) -> Path:
    """Have an MP4 file say that it is shown turned clockwise by ``degrees``."""
    a, b = {90: (0, 1), 180: (-1, 0), 270: (0, -1)}[degrees]
    matrix = b"".join(
        int(value * unit).to_bytes(4, "big", signed=True)
        for value, unit in zip((a, b, 0, -b, a, 0, 0, 0, 1), (2**16, 2**16, 2**30) * 3, strict=True)
    )
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40  # version 0 of the box
    data[start : start + 36] = matrix
    path.write_bytes(data)
    return path
