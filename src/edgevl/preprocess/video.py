"""Frames of a video, uniformly sampled as InternVL does.

The container is read through once without decoding, for the time of every frame. Where its packets
are those of one recording, as nearly always, decoding begins at the keyframe before each wanted
frame, and what comes must be what was expected. Else, or where there would be little to skip, all
is decoded, and frames are counted as the decoder gives them: in the order they are shown in,
whatever their time stamps. What is damaged costs its own frames. A file that breaks off ends there,
if its container can be read without its end.
"""

from __future__ import annotations

import io
import logging
import os
import stat
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from edgevl.errors import EdgeVLError, PromptError, VideoError, needs
from edgevl.files import first_line, reading
from edgevl.preprocess.picture import Picture, prepare_picture
from edgevl.preprocess.sources import Medium

if TYPE_CHECKING:
    from av import Packet, VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

    from edgevl.checkpoint import ModelConfig

#: Frames taken of a video unless told otherwise.
DEFAULT_FRAMES = 8
#: Most frames taken of a video.
MAX_SAMPLED = 256
#: The largest difference of two frames: that of black and white in 8 bits.
MAX_DIFFERENCE = 255
#: Most frames in a video: 9.7 hours at 30 a second.
MAX_FRAMES = 2**20

#: Where seeking saves less than this factor of the frames to decode, all are decoded, so that
#: damage anywhere is noticed.
SEEKING_GAIN = 4
#: Most pixels of frames that are kept until it is known how many frames there are.
MAX_KEPT_PIXELS = 2**26

#: Largest file.
MAX_FILE_BYTES = 8 * 2**30
#: Largest video that is in memory as a whole: bytes, ``data:`` URL, standard input.
MAX_MEMORY_BYTES = 256 * 2**20
#: Most pixels of a frame: 8K UHD. A decoder holds some 20 frames.
MAX_FRAME_PIXELS = 7680 * 4320
#: More decoding threads would each hold frames of their own.
DECODING_THREADS = 4

_VIDEO = Medium("video", "视频", VideoError, "a path or bytes")

# Containers that are one file. Playlists (HLS, DASH, ffconcat) would have FFmpeg open other files
# and addresses; pictures have their own decoders.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,ivf,h264,hevc,mpegvideo,m4v,mjpeg"
_CONTAINER_NAMES = "MP4, MOV, MKV, WebM, AVI, MPEG, TS, FLV, WMV, Ogg or GIF"

# Stands for a time stamp that is not there.
_MISSING = -(2**63)

log = logging.getLogger(__name__)

# What a display matrix does, by the signs of two of its numbers: a and d, or b and c.
_STRAIGHT = {
    (True, False): Image.Transpose.FLIP_LEFT_RIGHT,
    (False, True): Image.Transpose.FLIP_TOP_BOTTOM,
    (True, True): Image.Transpose.ROTATE_180,
}
_QUARTER = {
    (False, False): Image.Transpose.TRANSPOSE,
    (True, True): Image.Transpose.TRANSVERSE,
    (False, True): Image.Transpose.ROTATE_270,
    (True, False): Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, eq=False)
class Video:
    """A video that has been looked through; its frames are decoded when they are asked for.

    Attributes:
        name: What errors call it.
        data: The file itself, or where it is.
        times: When each frame is shown, in order, in the stream's units: int64 [frames]. Empty if
            time stamps are missing or not those of one recording; then all is decoded.
        keyframes: When each keyframe is shown, in order: int64 [keyframes].
        keyframe_seeks: Where to seek to for each keyframe (its decoding time): int64 [keyframes].
        frame_count: Number of frames, as far as the container tells.
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

        Of a video with fewer frames some come more than once, as in the original. What is damaged
        is left out, with a line in the log: where all is decoded, the rest is what frames are
        counted of; otherwise the next frame that is whole takes the place of one that is not.

        Raises:
            PromptError: ``count`` is not 1 to ``MAX_SAMPLED``.
            VideoError: The video has nothing that can be decoded.
        """
        indices = frame_indices(self.frame_count, check_frames(count))
        done, errors = 0, _Errors()
        try:
            if self._pays_to_seek(indices):
                try:
                    for image in _images(self._by_seeking(indices, errors)):
                        yield image
                        done += 1
                    return
                except CannotSeekError:
                    pass
            yield from islice(_images(self._by_counting(count, errors)), done, None)
        finally:
            if errors.count:
                log.warning("%s: damaged; frames that cannot be decoded are left out", self.name)

    def _pays_to_seek(self, indices: Sequence[int]) -> bool:
        if not len(self.times):
            return False
        keys = np.searchsorted(self.keyframes, self.times[indices], side="right") - 1
        begins = np.searchsorted(self.times, self.keyframes[keys])
        begins[1:] = np.maximum(begins[1:], np.asarray(indices[:-1]) + 1)
        return SEEKING_GAIN * int(np.sum(np.asarray(indices) + 1 - begins)) < self.frame_count

    def _by_seeking(self, indices: Sequence[int], errors: _Errors) -> Iterator[VideoFrame]:
        """Decode from the keyframe before each frame, or on from the last one if that is later.

        Where there comes anything but the frames that follow the keyframe in `times`, that is a
        CannotSeekError. Some may be missing where the decoder said that there is damage.
        """
        with opened(self.name, self.data) as (container, stream):
            frames = _frames(container, stream, errors)
            frame: VideoFrame | None = None
            position = 0  # of the frame that comes next
            for index in indices:
                key = int(np.searchsorted(self.keyframes, self.times[index], side="right")) - 1
                begin = int(np.searchsorted(self.times, self.keyframes[key]))
                # From the beginning no seek is needed.
                if key > 0 and begin > position:
                    place = int(self.keyframes[key]), int(self.keyframe_seeks[key])
                    frames = _frames(container, stream, errors, *place)
                    position = begin
                while position <= index and (following := next(frames, None)) is not None:
                    if following.pts is None:
                        raise CannotSeekError
                    if following.pts < self.times[begin]:  # shown before the keyframe
                        continue
                    found = int(np.searchsorted(self.times, following.pts))
                    expected = found == position or (errors.count and found > position)
                    if not expected or found == len(self.times):
                        raise CannotSeekError
                    frame, position = following, found + 1
                if frame is None:
                    raise CannotSeekError
                yield frame

    def _by_counting(self, count: int, errors: _Errors) -> Iterator[VideoFrame]:
        """Decode everything; once more if there is not what the container promises.

        Frames are kept until it is known how many there are, unless they are too large.
        """
        kept: dict[int, VideoFrame] = {}
        indices, decoded = frame_indices(self.frame_count, count), 0
        wanted = set(indices)
        with opened(self.name, self.data) as (container, stream):
            size = stream.codec_context.width * stream.codec_context.height
            for frame in _frames(container, stream, errors):
                if decoded in wanted and len(wanted) * size <= MAX_KEPT_PIXELS:
                    kept[decoded] = frame
                decoded += 1
        if not decoded:
            raise VideoError(
                f"{self.name}: damaged or truncated video (no frame can be decoded)",
                f"{self.name}：视频已损坏或不完整",
            )
        if decoded == self.frame_count and kept:
            yield from (kept[index] for index in indices)
            return
        kept.clear()
        indices, position = frame_indices(decoded, count), -1
        with opened(self.name, self.data) as (container, stream):
            frames = _frames(container, stream, errors)
            for index in indices:
                while position < index:
                    frame = next(frames)
                    position += 1
                yield frame


class _Errors:
    """Counts packets that a decoder refused."""

    count = 0


def _images(frames: Iterable[VideoFrame]) -> Iterator[Image.Image]:
    """Yield the pictures of frames; the same one for a frame that comes again."""
    last: VideoFrame | None = None
    for frame in frames:
        if frame is not last:
            image, last = _upright(frame), frame
        yield image


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


def check_threshold(threshold: float) -> float:
    """Return ``threshold``, the difference below which a frame is taken for the one before it.

    Raises:
        PromptError: It is not a number from 0 to ``MAX_DIFFERENCE``.
    """
    number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if not number or not 0 <= threshold <= MAX_DIFFERENCE:
        raise PromptError(
            f"frame_threshold must be a number from 0 to {MAX_DIFFERENCE}, not {threshold!r}"
        )
    return threshold


def frame_difference(first: Picture, second: Picture, config: ModelConfig) -> float:
    """Return how much two frames differ where they differ most, 0 … ``MAX_DIFFERENCE``.

    It is the largest, among the patches that the vision encoder sees, of the mean absolute
    difference of a patch's 8-bit values. So a small thing that moves is as large as a scene's cut.

    Args:
        first: A picture of one tile.
        second: Another, prepared for the same model.
        config: Of that model.
    """
    [difference] = np.abs(first.pixels - second.pixels)
    channels, side, _ = difference.shape
    size = config.vision.patch_size
    patches = difference.reshape(channels, side // size, size, side // size, size).mean((2, 4))
    bytes_per_unit = MAX_DIFFERENCE * np.asarray(config.image_std, np.float32)
    return float(np.tensordot(bytes_per_unit, patches, 1).max() / channels)


def prepare_video(
    source: VideoSource | list[Picture],
    config: ModelConfig,
    frames: int = DEFAULT_FRAMES,
    threshold: float = 0.0,
) -> list[Picture]:
    """Sample frames of a video, each a picture of one tile.

    A picture that comes again, which is encoded once, is the same object.

    Args:
        source: Anything that `open_video` takes, or what it returned; or what this function has
            returned for the same model, which is left as it is, so that a caller can prepare
            videos ahead.
        config: Of the model that will see the frames.
        frames: How many, 1 to ``MAX_SAMPLED``.
        threshold: A frame whose `frame_difference` from the last one that was taken is below it is
            that one again. Of what changes slowly a frame is taken as soon as it has changed.

    Raises:
        VideoError: The video cannot be read, or exceeds a limit.
        PromptError: ``frames`` or ``threshold`` is out of range.
    """
    if isinstance(source, list):
        return source
    check_frames(frames)
    check_threshold(threshold)
    video = source if isinstance(source, Video) else open_video(source)
    pictures: list[Picture] = []
    last: Image.Image | None = None
    for image in video.sample(frames):
        picture = pictures[-1] if image is last else prepare_picture(image, config, 1)
        if threshold and pictures:
            alike = frame_difference(pictures[-1], picture, config) < threshold
            picture = pictures[-1] if alike else picture
        pictures.append(picture)
        last = image
    return pictures


def open_video(source: VideoSource) -> Video:
    """Look through a video without decoding it.

    Args:
        source: One of: a path (``~`` is expanded); ``"-"`` for standard input; a ``data:`` URL; the
            bytes of a video file; a `Video` (returned as it is). Containers: MP4, MOV, MKV, WebM,
            AVI, MPEG, TS, FLV, WMV, Ogg, GIF, MXF, IVF; or a stream of H.264, H.265 or MPEG alone.

    Raises:
        VideoError: PyAV is not installed; the source cannot be read, has no video, or exceeds
            ``MAX_FILE_BYTES``, ``MAX_MEMORY_BYTES``, ``MAX_FRAMES`` or ``MAX_FRAME_PIXELS``.
    """
    if isinstance(source, Video):
        return source
    name, data = _locate(source)
    stamps, flags = array("q"), array("b")  # two of each packet
    with opened(name, data) as (container, stream):
        for packet in packets(container, stream):
            stamps.append(_MISSING if packet.pts is None else packet.pts)
            stamps.append(_MISSING if packet.dts is None else packet.dts)
            flags.append(packet.is_keyframe)
            flags.append(packet.is_discard)  # an edit list cuts it away
            if len(flags) > 2 * MAX_FRAMES:
                raise VideoError(
                    f"{name}: over the limit of {MAX_FRAMES} frames; cut out the part that matters",
                    f"{name}：超过 {MAX_FRAMES} 帧的上限，请截取需要的部分",
                )
        unit_s = float(stream.time_base or 0)
        rate = float(stream.average_rate or 0)
    pts, dts = np.array(stamps, np.int64).reshape(-1, 2).T
    is_key, is_discard = np.array(flags, np.bool_).reshape(-1, 2).T
    times = np.sort(pts[~is_discard])
    count = len(times)
    if not count:
        raise VideoError(
            f"{name}: damaged or truncated video (no frames)", f"{name}：视频已损坏或不完整"
        )
    if _is_one_recording(pts, dts, is_key) and (np.diff(times) > 0).all():
        duration_s = unit_s * float(times[-1] - times[0])
    else:
        times, duration_s = times[:0], (count - 1) / rate if rate else 0.0
    return Video(
        name=name,
        data=data,
        times=times,
        keyframes=pts[is_key],
        keyframe_seeks=np.where(dts == _MISSING, pts, dts)[is_key],
        frame_count=count,
        duration_s=duration_s,
    )


def _is_one_recording(
    pts: NDArray[np.int64], dts: NDArray[np.int64], is_key: NDArray[np.bool_]
) -> bool:
    """Whether packets, as they come, are those of one recording with all its time stamps.

    They come as they are to be decoded. Frames are shown in another order, but none before the
    keyframe before the latest one; and keyframes are shown in order. Where streams were joined, or
    stamps are missing or wrong, that does not hold.
    """
    keyframes = pts[is_key]
    passed = np.cumsum(is_key)  # keyframes up to each packet
    late = ~is_key & (passed > 1)
    return bool(
        is_key[0]
        and (pts != _MISSING).all()
        and (np.diff(dts[dts != _MISSING]) >= 0).all()
        and (np.diff(keyframes) > 0).all()
        and (pts[late] > keyframes[passed[late] - 2]).all()
    )


def _frames(
    container: InputContainer,
    stream: VideoStream,
    errors: _Errors,
    keyframe: int | None = None,
    seek: int = 0,
) -> Iterator[VideoFrame]:
    """Decode to the end, but for what is damaged: from where the container stands, or a keyframe.

    ``keyframe`` is when that is shown, ``seek`` where to seek to for it; a CannotSeekError says
    that it is not found.
    """
    import av

    if keyframe is not None:
        try:
            container.seek(seek, stream=stream, backward=True)
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
        yield from _decoded(stream, packet, errors)
    if keyframe is not None:
        raise CannotSeekError
    yield from _decoded(stream, None, errors)


def _decoded(stream: VideoStream, packet: Packet | None, errors: _Errors) -> list[VideoFrame]:
    import av

    try:
        return stream.decode(packet)
    except (av.FFmpegError, EOFError):
        errors.count += 1
        return []


def _upright(frame: VideoFrame) -> Image.Image:
    """Turn and mirror as the container's display matrix says, to the nearest quarter.

    The matrix takes (x, y), y downwards, to (a x + c y, b x + d y): `av_display_rotation_get`.
    """
    from av.sidedata.sidedata import Type

    image: Image.Image = frame.to_image()
    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return image
    a, b, _, c, d = np.frombuffer(matrix, np.int32, 5).tolist()
    if abs(a) + abs(d) < abs(b) + abs(c):
        turn = _QUARTER.get((b < 0, c < 0))
    else:
        turn = _STRAIGHT.get((a < 0, d < 0))
    return image if turn is None else image.transpose(turn)


# --- the file --------------------------------------------------------------------------------


def _locate(source: object) -> tuple[str, bytes | Path]:
    """Return the name of a source, for errors, and its data or where they are."""
    name, data = _VIDEO.locate(source, MAX_MEMORY_BYTES, "give it as a file", "请以文件给出")
    if isinstance(data, bytes):
        return name, data
    with reading(name, VideoError, "video file"):
        place = data.expanduser()
        status = place.stat()
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: a device or pipe, which may have no end; give a video file")
    _VIDEO.check_size(name, status.st_size, MAX_FILE_BYTES, "shorten it", "请先缩短")
    return name, place


class CannotSeekError(Exception):
    """The container has no way to a keyframe that is there."""


@contextmanager
def opened(name: str, data: bytes | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open container and video stream; what goes wrong within is the video's fault.

    Raises:
        VideoError: PyAV is not installed; this is not a video, or a damaged one; frames exceed
            ``MAX_FRAME_PIXELS``.
    """
    with needs("video", VideoError):
        import av
    options = {"format_whitelist": _CONTAINERS, "max_pixels": str(MAX_FRAME_PIXELS)}
    with reading(name, VideoError, "video file"):
        file: IO[bytes] = io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")
    try:
        with file:
            try:
                container = av.open(file, options=options, metadata_errors="replace")
            except av.FFmpegError as error:
                raise VideoError(
                    f"{name}: not a video that can be read ({error.strerror}); give "
                    f"{_CONTAINER_NAMES}",
                    f"{name}：不是可读取的视频，请用 {_CONTAINER_NAMES}",
                ) from None
            with container:
                yield container, _video_stream(container, name)
    except (EdgeVLError, CannotSeekError):
        raise
    except Exception as error:  # FFmpeg's errors are of many types, and PyAV has others
        if type(error) is MemoryError:  # FFmpeg's is a size that the file claims
            raise
        reason = getattr(error, "strerror", None) or first_line(error)
        raise VideoError(
            f"{name}: damaged or truncated video ({reason})", f"{name}：视频已损坏或不完整"
        ) from error


def packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Yield the packets of ``stream`` that can be decoded, up to where the container breaks off."""
    import av

    try:
        for packet in container.demux(stream):
            if packet.size:  # to a decoder an empty packet means the end
                yield packet
    except av.error.InvalidDataError:
        return


def _video_stream(container: InputContainer, name: str) -> VideoStream:
    from av.stream import Disposition

    for stream in container.streams.video:
        if not stream.disposition & Disposition.attached_pic:  # the cover of a recording
            break
    else:
        raise VideoError(
            f"{name}: has no moving picture; give a video", f"{name}：没有活动画面，不是视频"
        )
    codec = stream.codec_context
    if codec is None:
        raise VideoError(
            f"{name}: FFmpeg has no decoder for it; convert it to H.264",
            f"{name}：无法解码，请先转换为 H.264",
        )
    # A decoder that refuses a size says that it is 0.
    if not 0 < codec.width * codec.height <= MAX_FRAME_PIXELS:
        raise VideoError(
            f"{name}: the size of its frames is unknown or over the limit of {MAX_FRAME_PIXELS} "
            "pixels; convert it to a smaller size",
            f"{name}：画面尺寸未知或过大，请先缩小",
        )
    codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # frames may grow on the way
    codec.thread_type = "AUTO"
    codec.thread_count = DECODING_THREADS
    return stream
