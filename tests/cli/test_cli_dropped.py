"""Paths of pictures and videos in what is typed or dropped."""

import pytest

from edgevl.cli.conversation import find_files, unquoted


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("a.png", "b.MP4", "my photo.png", "it's.png", "图 片.png", "a.txt"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("line", "question", "names"),
    [
        ("{}/a.png", "", ["a.png"]),
        ("a.png", "", ["a.png"]),
        ("~/a.png What?", "What?", ["a.png"]),
        ("'{}/my photo.png' ", "", ["my photo.png"]),  # GNOME, KDE
        ("'{}/it'\\''s.png' ", "", ["it's.png"]),
        ("{}/my\\ photo.png What is it?", "What is it?", ["my photo.png"]),  # macOS, kitty
        ("{}/it\\'s.png What's it?", "What's it?", ["it's.png"]),
        ('"{}/my photo.png" What?', "What?", ["my photo.png"]),
        ("{}/my photo.png", "", ["my photo.png"]),  # pasted as it is
        ("file://{}/%E5%9B%BE%20%E7%89%87.png 这是什么？", "这是什么？", ["图 片.png"]),
        ("'{}/图 片.png'这是什么？", "这是什么？", ["图 片.png"]),
        ("What's this? {}/a.png", "What's this?", ["a.png"]),
        ("{0}/a.png\n{0}/b.MP4\nWhat\nnow?", "What\nnow?", ["a.png", "b.MP4"]),
        ("What is in {}/a.png or so?", "What is in a.png or so?", ["a.png"]),
        ("a.png b.MP4 Compare a.png to it b.MP4", "Compare a.png to it", ["a.png", "b.MP4"] * 2),
    ],
)
def test_existing_files_are_found(folder, line, question, names):
    found_question, paths = find_files(line.format(folder))
    assert found_question == question
    assert [str(path).rpartition("/")[2] for path in paths] == names
    assert all((folder / path).is_file() for path in paths)


@pytest.mark.parametrize(
    "line",
    [
        "What is a.txt?",
        "none.png what?",
        "What's in 'the picture.png'?",
        "x" * 10_000 + ".png",
        "a\0.png",
        "~nobody-here/a.png",
        "file://[a.png",
        "'",
        "a\\",
        "",
    ],
)
def test_the_rest_is_a_question(folder, line):
    assert find_files(line) == (line, [])


def test_unquoted():
    assert unquoted(r"a\ b\(1\).png") == "a b(1).png"
    assert unquoted("'") == "'"
