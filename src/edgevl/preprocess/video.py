"""Frames of a video, uniformly sampled as InternVL does, without decoding what lies between.

The container is read through once without decoding, for the time of every frame: so a frame's index
is exact whatever the container says of length and rate, and whether the rate varies. Then, for each
wanted frame, decoding begins at the keyframe before it. A file that breaks off ends there, if its
container can be read without its end.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.errors import PromptError, VideoError
from edgevl.preprocess.picture import Picture, prepare_picture
from edgevl.preprocess.video_file import CannotSeekError, locate, opened, packets

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from edgevl.checkpoint import ModelConfig

#: Frames taken of a video unless told otherwise.
DEFAULT_FRAMES = 8
#: Most frames taken of a video.
MAX_SAMPLED = 256
#: Most frames in a video: 9.7 hours at 30 a second.
MAX_FRAMES = 2**20

# What turns a frame upright: degrees counterclockwise -> transposition.
_UPRIGHT = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


@dataclass(frozen=True, eq=False)
class Video:
    """A video that has been looked through; its frames are decoded when they are asked for.

    Attributes:
        name: What errors call it.
        data: The file itself, or where it is.
        times: When each frame is shown, in order, in the stream's units: int64 [frames]. Empty if
            the container lacks times, and then frames are found by counting.
        keyframes: When each keyframe is shown, in order: int64 [keyframes].
        keyframe_seeks: Where to seek to for each keyframe (its decoding time): int64 [keyframes].
        frame_count: Number of frames.
        duration_s: Seconds from the first frame to the last; 0 if unknown.
    """

    name: str
    data: bytes | Path = field(repr=False)
    times: NDArray[np.int64] = field(repr=False)
    keyframes: NDArray[np.int64] = field(repr=False)
    keyframe_seeks: NDArray[np.int64] = field(repr=False)
    frame_count: int
    duration_s: float

    def sample(self, count: int = DEFAULT_FRAMES) -> Iterator[Image.Image]:
        """Decode ``count`` frames, uniformly sampled: upright RGB, one at a time.

        Of a video with fewer frames some come more than once, as in the original.

        Raises:
            PromptError: ``count`` is not 1 to ``MAX_SAMPLED``.
            VideoError: The video is damaged.
        """
        indices = frame_indices(self.frame_count, check_frames(count))
        done = 0
        try:
            if len(self.times):
                for image in self._decode(indices, seek=True):
                    yield image
                    done += 1
                return
        except CannotSeekError:
            pass
        yield from islice(self._decode(indices, seek=False), done, None)

    def _decode(self, indices: Sequence[int], seek: bool) -> Iterator[Image.Image]:
        with opened(self.name, self.data) as (container, stream):
            find = self._by_seeking if seek else self._by_counting
            last: VideoFrame | None = None
            for frame in find(container, stream, indices):
                if frame is not last:
                    image, last = _upright(frame), frame
                yield image

    def _by_seeking(
        self, container: InputContainer, stream: VideoStream, indices: Iterable[int]
    ) -> Iterator[VideoFrame]:
        """Decode from the keyframe before each frame, or on from the last one if that is later."""
        frames = _frames(container, stream)
        frame: VideoFrame | None = None
        for index in indices:
            time = self.times[index]
            key = int(np.searchsorted(self.keyframes, time, side="right")) - 1
            # From the beginning no seek is needed.
            if key > 0 and (frame is None or self.keyframes[key] > _time(frame)):
                frames = _frames(container, stream, self.keyframes[key], self.keyframe_seeks[key])
                frame = None
            while frame is None or _time(frame) < time:
                frame = self._next(frames, index)
            yield frame

    def _by_counting(
        self, container: InputContainer, stream: VideoStream, indices: Iterable[int]
    ) -> Iterator[VideoFrame]:
        """Decode everything up to the last frame wanted."""
        frames = _frames(container, stream)
        position = -1
        for index in indices:
            while position < index:
                frame = self._next(frames, index)
                position += 1
            yield frame

    def _next(self, frames: Iterator[VideoFrame], index: int) -> VideoFrame:
        frame = next(frames, None)
        if frame is None:
            raise VideoError(
                f"{self.name}: damaged or truncated video (frame {index} of {self.frame_count} "
                "cannot be decoded)"
            )
        return frame


#: What a video may be given as: path, ``"-"`` or ``data:`` URL, bytes of a file, opened video.
VideoSource: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | Video


def frame_indices(frame_count: int, count: int) -> list[int]:
    """Return which frames InternVL looks at: the middles of ``count`` segments of equal length.

    As ``get_index`` in its example, which measures the segments to the last frame, not past it.
    """
    segment = (frame_count - 1) / count
    return [int(segment / 2 + round(segment * i)) for i in range(count)]


def check_frames(count: int) -> int:
    """Return ``count``, the number of frames to take of a video.

    Raises:
        PromptError: It is not a whole number from 1 to ``MAX_SAMPLED``.
    """
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_SAMPLED:
        raise PromptError(f"frames must be a whole number from 1 to {MAX_SAMPLED}, not {count!r}")
    return count


def prepare_video(
    source: VideoSource | list[Picture], config: ModelConfig, frames: int = DEFAULT_FRAMES
) -> list[Picture]:
    """Sample frames of a video, each a picture of one tile.

    Args:
        source: Anything that `open_video` takes, or what it returned; or what this function has
            returned for the same model, which is left as it is, so that a caller can prepare
            videos ahead.
        config: Of the model that will see the frames.
        frames: How many, 1 to ``MAX_SAMPLED``.

    Raises:
        VideoError: The video cannot be read, or exceeds a limit.
        PromptError: ``frames`` is out of range.
    """
    if isinstance(source, list):
        return source
    check_frames(frames)
    video = source if isinstance(source, Video) else open_video(source)
    pictures: list[Picture] = []
    last: Image.Image | None = None
    for image in video.sample(frames):
        pictures.append(pictures[-1] if image is last else prepare_picture(image, config, 1))
        last = image
    return pictures


def open_video(source: VideoSource) -> Video:
    """Look through a video without decoding it.

    Args:
        source: One of: a path (``~`` is expanded); ``"-"`` for standard input; a ``data:`` URL; the
            bytes of a video file; a `Video` (returned as it is). Containers: MP4, MOV, MKV, WebM,
            AVI, MPEG, TS, FLV, WMV, Ogg, GIF, MXF, IVF.

    Raises:
        VideoError: PyAV is not installed; the source cannot be read, has no video, or exceeds
            ``MAX_FILE_BYTES``, ``MAX_MEMORY_BYTES``, ``MAX_FRAMES`` or ``MAX_FRAME_PIXELS``.
    """
    if isinstance(source, Video):
        return source
    name, data = locate(source)
    with opened(name, data) as (container, stream):
        times, keyframes, seeks = array("q"), array("q"), array("q")
        count, timed = 0, True
        for packet in packets(container, stream):
            time = packet.pts
            timed = timed and time is not None
            if not packet.is_discard:  # what an edit list cuts away is decoded, but not shown
                count += 1
                times.append(time or 0)
            if packet.is_keyframe:
                keyframes.append(time or 0)
                seeks.append(packet.dts if packet.dts is not None else time or 0)
            if max(count, len(keyframes)) > MAX_FRAMES:
                raise VideoError(
                    f"{name}: over the limit of {MAX_FRAMES} frames; cut out the part that matters"
                )
        unit_s = float(stream.time_base or 0)
    if not count:
        raise VideoError(f"{name}: damaged or truncated video (no frames)")
    shown = np.sort(np.frombuffer(times, np.int64))
    keys = np.frombuffer(keyframes, np.int64)
    order = np.argsort(keys, kind="stable")
    return Video(
        name=name,
        data=data,
        times=shown if timed else shown[:0],
        keyframes=keys[order],
        keyframe_seeks=np.frombuffer(seeks, np.int64)[order],
        frame_count=count,
        duration_s=unit_s * float(shown[-1] - shown[0]),
    )


def _frames(
    container: InputContainer,
    stream: VideoStream,
    keyframe: int | None = None,
    seek: int = 0,
) -> Iterator[VideoFrame]:
    """Decode to the end: from where the container stands, or from a keyframe.

    Args:
        container: The container.
        stream: Its video stream.
        keyframe: When the keyframe is shown.
        seek: Where to seek to for it.

    Raises:
        CannotSeekError: The keyframe is not found.
    """
    if keyframe is not None:
        import av

        try:
            container.seek(int(seek), stream=stream, backward=True)
        except av.FFmpegError:
            raise CannotSeekError from None
    for packet in packets(container, stream):
        if keyframe is not None:
            # Some containers land earlier, and some too late.
            if not packet.is_keyframe or packet.pts is None or packet.pts < keyframe:
                continue
            if packet.pts > keyframe:
                raise CannotSeekError
            keyframe = None
        yield from stream.decode(packet)
    if keyframe is not None:
        raise CannotSeekError
    yield from stream.decode(None)


def _time(frame: VideoFrame) -> int:
    if frame.pts is None:
        raise CannotSeekError
    return frame.pts


def _upright(frame: VideoFrame) -> Image.Image:
    image: Image.Image = frame.to_image()
    turn = _UPRIGHT.get(round(frame.rotation / 90) % 4 * 90)
    return image if turn is None else image.transpose(turn)
