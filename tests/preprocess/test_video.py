"""Videos: which frames are taken, at what cost, and what is refused."""

import base64
import io
import itertools
import os
import sys
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from PIL import Image

import edgevl
from edgevl import cli
from edgevl.errors import ContextLengthError, PromptError, VideoError
from edgevl.preprocess import Message, open_video, prepare_picture, prepare_video, video
from edgevl.preprocess.video import frame_difference

av = pytest.importorskip("av")

from clips import damage, set_matrix, set_times, write_clip, write_sound  # noqa: E402

# Container, codec, frames between which others are interpolated: how containers store times and
# how they seek all differ.
KINDS = [
    ("mp4", "mpeg4", 0),
    ("mp4", "mpeg4", 2),
    ("mkv", "mpeg4", 2),
    ("avi", "mpeg4", 2),
    ("ts", "mpeg2video", 2),
    ("mpg", "mpeg2video", 2),
    ("gif", "gif", 0),
]


@pytest.fixture
def decoded(monkeypatch):
    """Return a list that grows by one for each frame that is decoded."""
    counted, decode = [], video._frames

    def counting(*args):
        for frame in decode(*args):
            counted.append(frame.pts)
            yield frame

    monkeypatch.setattr(video, "_frames", counting)
    return counted


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Return the path of 100 frames, every tenth of them a keyframe."""
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.fixture(scope="module")
def tiny():
    return edgevl.load("tiny")


def every_frame(path):
    """Return all frames that FFmpeg decodes, as it gives them: in the order they are shown in."""
    frames = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            with suppress(av.FFmpegError):
                frames += [frame.to_ndarray(format="rgb24") for frame in packet.decode()]
    return frames


def check(path, count):
    """Compare sampled frames with the same ones of all."""
    frames = every_frame(path)
    sampled = list(open_video(path).sample(count))
    assert len(sampled) == count
    for index, image in zip(video.frame_indices(len(frames), count), sampled, strict=True):
        np.testing.assert_array_equal(np.asarray(image), frames[index])
    return len(frames)


@pytest.mark.parametrize(
    ("frames", "count", "indices"),
    [
        # InternVL's get_index, by hand: the segments end at the last frame.
        (100, 8, [6, 18, 31, 43, 56, 68, 80, 93]),
        (101, 4, [12, 37, 62, 87]),
        (33, 32, list(range(32))),
        (4, 8, [0, 0, 1, 1, 2, 2, 2, 3]),
        (1, 3, [0, 0, 0]),
        (6, 2, [1, 3]),  # round(2.5) is 2, as in NumPy
    ],
)
def test_indices_are_those_of_the_original(frames, count, indices):
    assert video.frame_indices(frames, count) == indices


@pytest.mark.parametrize(("container", "codec", "b_frames"), KINDS)
@pytest.mark.parametrize("count", [8, 25])
def test_frames_are_exact_in_any_container(tmp_path, container, codec, b_frames, count):
    check(write_clip(tmp_path / f"a.{container}", codec=codec, b_frames=b_frames), count)


@pytest.mark.parametrize("container", ["mp4", "mkv"])
def test_frames_are_exact_where_the_rate_varies(tmp_path, container):
    check(write_clip(tmp_path / f"a.{container}", variable=True, b_frames=2), 8)


def test_of_a_short_video_frames_come_more_than_once(tmp_path, decoded):
    path = write_clip(tmp_path / "a.mp4", frames=3)
    check(path, 8)
    assert len(decoded) == 3


@pytest.mark.parametrize("container", ["mp4", "mkv", "ts"])
def test_what_lies_between_is_not_decoded(tmp_path, decoded, container):
    codec = "mpeg2video" if container == "ts" else "mpeg4"
    path = write_clip(tmp_path / f"a.{container}", frames=600, codec=codec, gop=10)
    assert len(list(open_video(path).sample(4))) == 4
    # At worst a group of pictures each, and what the decoder holds back.
    assert 4 <= len(decoded) <= 4 * (10 + 2)


def test_where_seeking_fails_frames_are_counted(clip, decoded, monkeypatch):
    decode = video._frames

    def cannot_seek(container, stream, errors, keyframe=None, seek=0):
        if keyframe is not None:
            raise video.CannotSeekError
        yield from decode(container, stream, errors)

    monkeypatch.setattr(video, "_frames", cannot_seek)
    check(clip, 8)
    assert len(decoded) > 93


def test_memory_does_not_grow_with_length(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=1500, size=(192, 128), gop=400)
    list(open_video(write_clip(tmp_path / "b.mp4", frames=10, size=(192, 128))).sample(8))
    process = psutil.Process()
    before = process.memory_info().rss
    peak = 0
    for _ in open_video(path).sample(8):
        peak = max(peak, process.memory_info().rss)
    assert peak - before < 40 * 2**20  # all frames are 105 MiB


@pytest.mark.parametrize(
    ("matrix", "expected"),
    [
        ((1, 0, 0, 1), lambda plain: plain),
        ((-1, 0, 0, 1), lambda plain: plain[:, ::-1]),  # a mirror, as front cameras write it
        ((1, 0, 0, -1), lambda plain: plain[::-1]),
        ((-1, 0, 0, -1), lambda plain: plain[::-1, ::-1]),
        ((0, 1, -1, 0), lambda plain: np.rot90(plain, -1)),  # a quarter clockwise
        ((0, -1, 1, 0), lambda plain: np.rot90(plain)),
        ((0, 1, 1, 0), lambda plain: plain.swapaxes(0, 1)),  # x and y exchanged
        ((0, -1, -1, 0), lambda plain: plain.swapaxes(0, 1)[::-1, ::-1]),
        ((0, 0, 0, 0), lambda plain: plain),  # nonsense
    ],
)
def test_frames_are_upright(tmp_path, matrix, expected):
    path = write_clip(tmp_path / "a.mp4", frames=3)
    plain = np.asarray(next(open_video(path).sample(1)))
    turned = next(open_video(set_matrix(path, *matrix)).sample(1))
    np.testing.assert_array_equal(np.asarray(turned), expected(plain))


def test_ffmpeg_has_the_same_sense_of_rotation(tmp_path):
    path = set_matrix(write_clip(tmp_path / "a.mp4", frames=1), 0, 1, -1, 0)
    with av.open(str(path)) as container:
        assert next(container.decode(video=0)).rotation == -90  # counterclockwise


@pytest.mark.parametrize(
    ("codec", "gop", "lengths"),
    [
        ("mpeg2video", 5, (40, 40)),
        ("mpeg2video", 5, (40, 30, 20)),
        ("mpeg2video", 30, (10, 60)),
        ("libx264", 250, (60, 60)),
    ],
)
@pytest.mark.parametrize("count", [4, 25])
def test_joined_streams_are_shown_one_after_the_other(tmp_path, codec, gop, lengths, count):
    # Time stamps begin anew with each: all used to come from the first.
    parts = [
        write_clip(tmp_path / f"{number}.ts", length, codec, gop=gop, first=100 * number)
        for number, length in enumerate(lengths)
    ]
    joined = tmp_path / "joined.ts"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    assert check(joined, count) == sum(lengths)


TIMES = {
    "repeated": [number - number % 10 for number in range(100)],
    "one for all": [7] * 100,
    "backwards": list(range(100, 0, -1)),
    "one out of order": [*range(50), 3, *range(51, 100)],
    "anew": [*range(60), *range(40)],
    "far away": [*range(50), *range(2**33, 2**33 + 50)],
}


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("count", [4, 25])
def test_frames_are_right_whatever_the_time_stamps(tmp_path, times, count):
    path = write_clip(tmp_path / "a.ivf", codec="libvpx")
    assert check(set_times(path, times), count) == 100


def test_a_part_with_earlier_time_stamps_comes_where_it_is(tmp_path):
    # Each group of pictures is whole, and in order, as far as seeking shows.
    later = write_clip(tmp_path / "a.ts", 200, "mpeg2video", start=1000)
    earlier = write_clip(tmp_path / "b.ts", 200, "mpeg2video", first=50)
    joined = tmp_path / "joined.ts"
    joined.write_bytes(later.read_bytes() + earlier.read_bytes())
    assert check(joined, 4) == 400


@pytest.mark.parametrize(
    ("suffix", "codec"), [("h264", "libx264"), ("m2v", "mpeg2video"), ("m4v", "mpeg4")]
)
def test_streams_without_a_container_have_no_time_stamps(tmp_path, suffix, codec):
    path = write_clip(tmp_path / f"a.{suffix}", codec=codec, b_frames=2)
    assert check(path, 8) == 100
    assert len(list(open_video(path.read_bytes()).sample(8))) == 8


def test_time_stamps_that_overflow(tmp_path):
    # MPEG's have 33 bits of 90 kHz.
    path = write_clip(tmp_path / "a.ts", codec="mpeg2video", b_frames=2, start=2**33 // 3600 - 50)
    for count in (4, 25):
        assert check(path, count) == 100


def test_frames_that_an_edit_list_cuts_away_are_not_counted(tmp_path):
    path = write_clip(tmp_path / "a.mp4", b_frames=2)
    data = bytearray(path.read_bytes())
    start = data.index(b"elst") + 4 + 8 + 4  # version 0: flags, count, duration
    unit = int.from_bytes(data[start : start + 4], "big")
    with av.open(str(path)) as container:
        tick = container.streams.video[0].time_base
    cut = unit + int(33 / 25 / tick)
    data[start : start + 4] = cut.to_bytes(4, "big")
    path.write_bytes(data)
    for count in (4, 25):
        assert check(path, count) == 67


DAMAGED = [
    ("mp4", "libx264", (30,)),
    ("mkv", "mpeg4", (33,)),
    ("avi", "mpeg4", (30, 31, 70)),
    ("avi", "mjpeg", (0, 33)),
    ("ts", "mpeg2video", (30,)),
]


@pytest.mark.parametrize(("container", "codec", "packets"), DAMAGED)
def test_damage_costs_its_frames_only(tmp_path, caplog, container, codec, packets):
    path = damage(write_clip(tmp_path / f"a.{container}", codec=codec, b_frames=0), *packets)
    assert 50 < check(path, 60) <= 100
    if container not in ("mkv", "ts"):  # FFmpeg passes over what it cannot find, and says nothing
        (note,) = {record.getMessage() for record in caplog.records}
        assert note == f"{path}: damaged; frames that cannot be decoded are left out"


def test_in_a_long_video_the_next_frame_stands_for_a_damaged_one(tmp_path, caplog, decoded):
    path = write_clip(tmp_path / "a.avi", frames=600, codec="mjpeg")
    frames = every_frame(path)
    wanted = video.frame_indices(600, 4)
    damage(path, wanted[1], wanted[3])
    sampled = list(open_video(path).sample(4))
    assert len(decoded) < 20
    assert "damaged" in caplog.text
    wanted[1] += 1
    wanted[3] += 1
    for index, image in zip(wanted, sampled, strict=True):
        np.testing.assert_array_equal(np.asarray(image), frames[index])


def test_where_nothing_can_be_decoded(tmp_path):
    path = damage(write_clip(tmp_path / "a.avi", frames=9, codec="mjpeg"), *range(9))
    assert "no frame can be decoded" in refused(path)


def test_frames_that_would_take_much_memory_are_not_kept(clip, decoded, monkeypatch):
    monkeypatch.setattr(video, "SEEKING_GAIN", 10**9)
    check(clip, 8)
    assert len(decoded) == 100
    monkeypatch.setattr(video, "MAX_KEPT_PIXELS", 1)
    check(clip, 8)
    assert len(decoded) == 100 + 100 + 94


def test_sources(clip, monkeypatch):
    data = clip.read_bytes()
    url = "data:video/mp4;base64," + base64.b64encode(data).decode()
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
    expected = np.asarray(next(open_video(clip).sample(1)))
    for source in (str(clip), data, bytearray(data), url, "-", open_video(clip)):
        np.testing.assert_array_equal(np.asarray(next(open_video(source).sample(1))), expected)


def refused(source):
    """Return the reason, one line, for which a video cannot be opened or sampled."""
    with pytest.raises(VideoError) as error:
        list(open_video(source).sample(8))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_no_video_is_refused(tmp_path, clip):
    text = tmp_path / "text.mp4"
    text.write_text("hello " * 100)
    assert refused(text).startswith(f"{text}: not a video")
    empty = tmp_path / "empty.mp4"
    empty.touch()
    assert "empty" in refused(empty)
    assert refused(np.zeros((2, 2))).startswith("a video cannot be a ndarray")
    assert "empty" in refused(b"")
    assert "no moving picture" in refused(write_sound(tmp_path / "a.m4a"))
    assert "no such file" in refused(tmp_path / "none.mp4")
    assert "directory" in refused(tmp_path)
    assert "path" in refused("a\0b")
    assert "int" in refused(3)
    assert "network" in refused("https://example.com/a.mp4")
    assert "base64" in refused("data:video/mp4;base64,A")


def test_what_has_no_end_is_refused(tmp_path):
    assert "no end" in refused("/dev/zero")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert "no end" in refused(pipe)


def test_a_playlist_opens_no_other_file(tmp_path, clip):
    lists = {
        "a.ffconcat": f"ffconcat version 1.0\nfile '{clip}'\n",
        "a.m3u8": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{clip}\n#EXT-X-ENDLIST\n",
    }
    for name, text in lists.items():
        (tmp_path / name).write_text(text)
        assert "not a video" in refused(tmp_path / name)


def test_a_file_that_breaks_off(tmp_path, clip):
    data = clip.read_bytes()  # what says where the frames are comes last
    assert "not a video" in refused(data[: len(data) // 2])
    whole = write_clip(tmp_path / "a.mkv").read_bytes()
    part = open_video(whole[: len(whole) // 2])
    assert 30 < part.frame_count < 70
    assert len(list(part.sample(30))) == 30


def test_a_file_that_goes_away(tmp_path):
    path = write_clip(tmp_path / "a.mp4", frames=3)
    opened = open_video(path)
    path.unlink()
    assert "no such file" in refused(opened)


def test_damage_is_one_error_or_none(clip):
    data = clip.read_bytes()
    random = np.random.default_rng(0)
    reasons = set()
    for _ in range(40):
        damaged = bytearray(data)
        for place in random.integers(0, len(data), 40):
            damaged[place] = random.integers(256)
        try:
            list(open_video(bytes(damaged)).sample(4))
        except VideoError as error:
            reasons.add(str(error))
    assert reasons
    assert all(reason.startswith("the bytes: ") for reason in reasons)


def test_limits(clip, monkeypatch):
    data = clip.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FRAMES", 99)
        assert "limit of 99 frames" in refused(clip)
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FILE_BYTES", len(data) - 1)
        assert "over the limit" in refused(clip)
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_MEMORY_BYTES", len(data) - 1)
        assert "over the limit" in refused(data)
        assert "over the limit" in refused("data:," + 3 * len(data) * "a")
        patch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))
        assert "over the limit" in refused("-")
    with monkeypatch.context() as patch:
        patch.setattr(video, "MAX_FRAME_PIXELS", 64 * 48 - 1)
        assert "limit of 3071 pixels" in refused(clip)


def test_frames_may_not_grow_beyond_the_limit_on_the_way(tmp_path, monkeypatch):
    small, large = (
        write_clip(tmp_path / "a.ts", frames=20, codec="mpeg2video", size=size).read_bytes()
        for size in [(64, 48), (320, 240)]
    )

    def widths():
        errors = video._Errors()
        with video.opened("a", small + large) as (container, stream):
            return {frame.width for frame in video._frames(container, stream, errors)}, errors.count

    assert widths() == ({64, 320}, 0)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 128 * 96)
    assert widths() == ({64}, 20)


@pytest.mark.parametrize("frames", [0, 257, True, 2.0, "8"])
def test_number_of_frames(tiny, clip, frames):
    with pytest.raises(PromptError, match="frames"):
        tiny.ask("x", videos=[clip], frames=frames)


def test_without_pyav_the_extra_is_named(clip, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert "pip install 'edgevl[video]'" in refused(clip)


def test_prompt_is_that_of_the_frames_as_pictures(tiny, clip):
    config = tiny.checkpoint.config
    images = list(open_video(clip).sample(2))
    pictures = [prepare_picture(image, config, max_tiles=1) for image in images]
    frames = prepare_video(clip, config, 2)
    assert frames == pictures
    text = "Frame1: <image>\nFrame2: <image>\nWhat?"
    expected = tiny.prompts.encode([Message.user(text, pictures)])
    prompt = tiny.prompts.encode([Message.user("What?", videos=[frames])])
    np.testing.assert_array_equal(prompt.token_ids, expected.token_ids)
    assert prompt.images == expected.images
    assert [span.length for span in prompt.images] == [config.image_tokens] * 2


# --- frames that are nearly equal ---------------------------------------------------------------


def flat(value, config):
    """Return a frame of one shade, or of three channels."""
    pixels = np.empty((200, 300, 3), np.uint8)
    pixels[:] = value
    return prepare_picture(Image.fromarray(pixels), config, 1)


def test_differences_are_of_8_bit_values_and_of_the_patch_that_differs_most(tiny):
    config = tiny.checkpoint.config

    def difference(first, second):
        return frame_difference(first, second, config)

    grey = flat(100, config)
    assert difference(grey, grey) == 0
    assert difference(grey, flat(107, config)) == pytest.approx(7, abs=1e-3)
    assert difference(flat(107, config), grey) == pytest.approx(7, abs=1e-3)
    assert difference(flat(0, config), flat(255, config)) == pytest.approx(255, abs=1e-3)
    for channel in range(3):  # each counts a third
        value = [100, 100, 100]
        value[channel] = 130
        assert difference(grey, flat(value, config)) == pytest.approx(10, abs=1e-3)
    side, size = config.vision.image_size, config.vision.patch_size
    pixels = np.full((side, side, 3), 100, np.uint8)
    # A checkerboard, so that no mean of a patch changes: half of one patch, as much of another.
    pixels[:size, size : 2 * size][::2] += 20
    pixels[:size, size : 2 * size][1::2] -= 20
    pixels[-size:, -size:] += 5
    changed = prepare_picture(Image.fromarray(pixels), config, 1)
    assert difference(grey, changed) == pytest.approx(20, abs=1e-3)


def test_a_still_camera_is_encoded_once_until_something_moves(tiny, tmp_path):
    rng = np.random.default_rng(0)
    scene = rng.integers(40, 200, (96, 96, 3)).astype(np.float64)

    def picture(number, width, height):
        pixels = scene + rng.normal(0, 2, scene.shape)
        if number >= 20:  # something comes into one corner
            pixels[80:, 80:] += 50
        return pixels.clip(0, 255).astype(np.uint8)

    path = write_clip(
        tmp_path / "still.mkv", frames=40, codec="ffv1", size=(96, 96), picture=picture
    )
    config = tiny.checkpoint.config
    frames = prepare_video(path, config, 10)
    assert len(set(frames)) == 10
    alike = prepare_video(path, config, 10, 6)
    assert alike == [frames[0]] * 5 + [frames[5]] * 5
    before = tiny.engine.timings().tiles
    answer = tiny.ask("What?", videos=[path], frames=10, frame_threshold=6, max_tokens=1)
    assert tiny.engine.timings().tiles - before == 2
    assert answer.usage.image_tokens == 10 * config.image_tokens


def test_what_changes_slowly_is_seen(tiny, tmp_path):
    """Each frame is compared with what was encoded, not with the one before it."""

    def picture(number, width, height):
        return np.full((height, width, 3), 50 + number, np.uint8)

    path = write_clip(tmp_path / "dawn.mkv", frames=40, codec="ffv1", picture=picture)
    config = tiny.checkpoint.config
    frames = prepare_video(path, config, 40)
    steps = [frame_difference(*pair, config) for pair in itertools.pairwise(frames)]
    assert max(steps) < 3
    alike = prepare_video(path, config, 40, 5)
    assert 5 <= len(set(alike)) <= 14  # 40 shades in steps of about 5
    for frame, shown in zip(frames, alike, strict=True):
        assert frame_difference(frame, shown, config) < 5


def test_at_the_threshold_a_frame_is_shown_as_it_is(tiny, clip):
    config = tiny.checkpoint.config
    first, second = prepare_video(clip, config, 2)
    difference = frame_difference(first, second, config)
    assert prepare_video(clip, config, 2, difference) == [first, second]
    assert prepare_video(clip, config, 2, difference * 1.001) == [first, first]


@pytest.mark.parametrize("threshold", [-1, 255.1, float("nan"), True, "8", None])
def test_thresholds_out_of_range(tiny, clip, threshold):
    with pytest.raises(PromptError, match="frame_threshold must be a number from 0 to 255"):
        tiny.ask("x", videos=[clip], frame_threshold=threshold)


def test_asking_about_a_video_and_again(tiny, clip):
    chat = tiny.chat()
    first = chat.ask("What is shown?", videos=clip, frames=2, max_tokens=4)
    assert first.usage.image_tokens == 2 * tiny.checkpoint.config.image_tokens
    second = chat.ask("And now?", max_tokens=4)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens
    again = tiny.ask("What?", videos=[clip.read_bytes()], frames=2, max_tokens=4)
    assert again.usage.cached_tokens >= first.usage.image_tokens
    assert "".join(tiny.stream("What is shown?", videos=clip, frames=2, max_tokens=4)) == first.text


def test_too_many_frames_for_the_context_say_so(clip):
    model = edgevl.load("tiny", max_context=200)
    with pytest.raises(ContextLengthError, match="frames"):
        model.ask("x", videos=[clip], frames=200)


def test_on_the_command_line(clip, capsys):
    command = ["chat", "tiny", "-q", "What?", "--frames", "2", "--max-tokens", "3"]
    assert cli.main([*command, "-v", str(clip)]) == 0
    assert capsys.readouterr().out.strip()
    assert cli.main([*command, "-v", str(clip.parent / "none.mp4")]) == 1
    assert "none.mp4: no such file" in capsys.readouterr().err
    assert cli.main([*command, "-v", "-", "-v", "-"]) == 2


def test_defaults_of_the_command_line_are_those_of_the_room():
    from edgevl.cli import options

    assert options.DEFAULT_FRAMES == video.DEFAULT_FRAMES
    assert options.MAX_FRAMES == video.MAX_SAMPLED
