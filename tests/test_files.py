"""Bounded texts, files that are whole or not there, journals."""

import os
import stat

import pytest

from edgevl import files
from edgevl.errors import EdgeVLError
from edgevl.files import Journal, first_line, read_text, reading, replacing, system_text


class FileError(EdgeVLError):
    pass


def refused(path, limit=10, **options):
    with pytest.raises(FileError) as caught:
        read_text(path, limit, FileError, **options)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def test_the_first_line_of_an_error():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert first_line(ValueError("x" * 1000)) == "x" * 200


def test_texts_are_read_within_bounds(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"\xef\xbb\xbfa\r\n\xc3\xa9")
    assert read_text(path, 8, FileError) == "a\r\né"
    assert refused(path, 7) == "larger than the limit of 7 bytes: shorten it"
    path.write_bytes(bytes((2 << 20) + 1))
    assert refused(path, 2 << 20) == "larger than the limit of 2 MiB: shorten it"
    path.write_bytes(b"ab\xe9")
    assert refused(path).startswith("not UTF-8 at byte 2: convert it")


def test_texts_that_cannot_be_read(tmp_path):
    assert refused(tmp_path / "none") == "no such file"
    assert refused(tmp_path) == "not a regular file"
    assert refused(tmp_path, may_be_pipe=True) == "is a directory; give a file"
    (tmp_path / "link").symlink_to("link")
    assert refused(tmp_path / "link").startswith("cannot be read (Too many levels")
    os.mkfifo(tmp_path / "pipe")
    assert refused(tmp_path / "pipe") == "not a regular file"  # and is not waited for
    with pytest.raises(FileError, match="not a path"), reading("name", FileError):
        open("\0")  # noqa: PTH123, SIM115


def test_a_pipe_is_read_where_it_may_be_one(tmp_path):
    reader, writer = os.pipe()
    os.write(writer, b"through")
    os.close(writer)
    path = type(tmp_path)(f"/dev/fd/{reader}")
    assert read_text(path, 10, FileError, may_be_pipe=True) == "through"
    os.close(reader)
    endless = type(tmp_path)("/dev/zero")
    assert refused(endless, may_be_pipe=True) == "larger than the limit of 10 bytes: shorten it"


def test_texts_of_the_system(tmp_path):
    (tmp_path / "a").write_bytes(b"a\xff")
    assert system_text(tmp_path / "a") == "a\ufffd"
    assert system_text(tmp_path / "none") == system_text(tmp_path) == ""


@pytest.mark.parametrize("sync", [False, True])
def test_replacing_leaves_nothing_behind_on_failure(tmp_path, sync):
    target = tmp_path / "out.txt"
    target.write_text("old")
    with pytest.raises(TypeError), replacing(target, sync=sync) as file:
        file.write("not bytes")
    assert target.read_text() == "old"
    with replacing(target, sync=sync) as file:
        file.write(b"new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out.txt"]


def test_what_replaces_has_the_permissions_of_a_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o640


def test_replacing_names_the_file_it_cannot_write(tmp_path):
    with pytest.raises(OSError, match=r"cannot be written.*no/out"), replacing(tmp_path / "no/out"):
        pass
    with pytest.raises(IsADirectoryError), replacing(tmp_path):
        pass


def test_replacing_does_not_replace_a_device_or_a_pipe(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    with replacing(pipe) as file:
        file.write(b"through")
    assert os.read(reader, 100) == b"through"
    os.close(reader)
    assert pipe.is_fifo()


def test_a_journal_goes_on_after_its_last_whole_line(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    assert list(Journal(path).recover()) == []
    assert not path.exists()
    monkeypatch.setattr(files, "SYNC_SECONDS", -1)  # each line is forced to the disk
    rows = [{"id": 1}, {"id": "é\udcff\n"}]
    for row in rows:
        Journal(path).add(row)
    whole = path.read_bytes()
    for torn in (b'{"id": "half', b"\0\0\n", b"7\n", b"\xff\n"):
        path.write_bytes(whole + torn)
        journal = Journal(path)
        assert list(journal.recover()) == rows
        assert path.read_bytes() == whole
        journal.add({"id": 3})
        assert path.read_bytes() == whole + b'{"id": 3}\n'
