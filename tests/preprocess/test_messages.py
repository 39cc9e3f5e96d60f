import numpy as np
import pytest

from edgevl.errors import PromptError
from edgevl.preprocess import GeneratedTokens, Message, Picture

A, B, C = (Picture(np.zeros((1, 3, 2, 2), np.float32), digest, 2, 2) for digest in "abc")


def test_pictures_come_first_each_on_its_line():
    assert Message.user("What?", [A]).parts == (A, "\nWhat?")
    assert Message.user("What?", [A, B]).parts == (A, "\n", B, "\nWhat?")
    assert Message.user("", [A]).parts == (A, "\n")


def test_pictures_take_the_places_of_markers():
    assert Message.user("<image>and <image>?", [A, B]).parts == (A, "and ", B, "?")
    assert Message.user("x <image>", [A]).parts == ("x ", A)
    assert Message.user("<image><image>", [A, B]).parts == (A, B)


def test_without_pictures_a_marker_is_text():
    assert Message.user("write <image> in HTML").parts == ("write <image> in HTML",)


@pytest.mark.parametrize(
    ("markers", "pictures"), [(1, [A, B]), (2, [A]), (3, [A, B])], ids=["1-2", "2-1", "3-2"]
)
def test_other_numbers_of_markers_are_refused_with_both_numbers(markers, pictures):
    with pytest.raises(PromptError, match=rf"{markers} <image> .* {len(pictures)} pictures"):
        Message.user("<image>" * markers, pictures)


def test_frames_of_a_video_are_numbered_lines_before_the_text():
    by_hand = Message.user("Frame1: <image>\nFrame2: <image>\nWhat happens?", [A, B])
    assert Message.user("What happens?", videos=[[A, B]]) == by_hand
    assert Message.user("", videos=[[A]]).parts == ("Frame1: ", A, "\n")
    assert Message.user("an <image> tag", videos=[[A]]).parts == (
        "Frame1: ",
        A,
        "\nan <image> tag",
    )


def test_videos_come_before_pictures_whose_markers_stay_their_own():
    start = ("Frame1: ", A, "\nFrame2: ", B, "\nFrame1: ", C, "\n")
    videos = [[A, B], [C]]
    assert Message.user("x", [A], videos).parts == (*start, A, "\nx")
    assert Message.user("x <image> y", [A], videos).parts == (*start[:-1], "\nx ", A, " y")
    with pytest.raises(PromptError, match="2 <image> markers but 1 pictures"):
        Message.user("<image><image>", [A], videos)


def test_any_sequence_of_parts():
    parts = ("Frame1: ", A, "\nFrame2: ", B, "\nWhat happens?")
    assert Message("user", parts).parts == parts
    assert Message.system("s").parts == ("s",)
    assert Message.assistant("a") == Message("assistant", ("a",))
    assert Message.assistant(GeneratedTokens((1, 2))).parts == (GeneratedTokens((1, 2)),)
    assert Message.user("q", [A]) == Message.user("q", [A])
    assert Message.user("q", [A]) != Message.user("q", [C])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Message("function", ("x",)), "role"),
        (lambda: Message("user", (3,)), "int"),
        (lambda: Message("user", ("x", "photo.png", None)), "NoneType"),
        (lambda: Message("user", (GeneratedTokens((1,)),)), "generated tokens"),
        (lambda: Message.user("x", ["photo.png"]), "prepare_picture"),
        (lambda: Message.user("x", videos=[["clip.mp4"]]), "prepare_picture"),
        (lambda: Message("user", "abc"), "tuple"),
        (lambda: Message.user(""), "empty"),
        (lambda: Message.user(None), "NoneType"),
        (lambda: Message.user("a\ud800"), "surrogate"),
    ],
)
def test_malformed_messages(make, reason):
    with pytest.raises(PromptError, match=reason):
        make()
