"""The file of a video: found, bounded, and opened with PyAV so that it opens nothing else."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from edgevl.errors import EdgeVLError, VideoError
from edgevl.files import first_line, reading
from edgevl.optional import needs
from edgevl.preprocess.sources import Medium

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

#: Largest file.
MAX_FILE_BYTES = 8 * 2**30
#: Largest video that is in memory as a whole: bytes, ``data:`` URL, standard input.
MAX_MEMORY_BYTES = 256 * 2**20
#: Most pixels of a frame: 8K UHD. A decoder holds some 20 frames.
MAX_FRAME_PIXELS = 7680 * 4320
#: More decoding threads would each hold frames of their own.
DECODING_THREADS = 4

_VIDEO = Medium("video", "视频", VideoError)

# Containers that are one file. Playlists (HLS, DASH, ffconcat) would have FFmpeg open other files
# and addresses; pictures have their own decoders.
_CONTAINERS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,mxf,ivf,h264,hevc,mpegvideo,m4v,mjpeg"
_CONTAINER_NAMES = "MP4, MOV, MKV, WebM, AVI, MPEG, TS, FLV, WMV, Ogg or GIF"


def locate(
    source: str | os.PathLike[str] | bytes | bytearray | memoryview,
) -> tuple[str, bytes | Path]:
    """Return the name of a source, for errors, and its data or where they are.

    Raises:
        VideoError: It is missing, no file, empty, or over a limit of bytes.
    """
    if not isinstance(source, str | os.PathLike | bytes | bytearray | memoryview):
        raise VideoError(f"a video cannot be a {type(source).__name__}; give a path or bytes")
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
        file = _file(data)
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


def _file(data: bytes | Path) -> IO[bytes]:
    return io.BytesIO(data) if isinstance(data, bytes) else data.open("rb")


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
