"""Products of a long run: whole, or not there."""

from contextlib import contextmanager

import pytest

from edgevl.errors import CheckpointError
from edgevl.work import Step, check_target, opened


class StoppedError(BaseException):
    """Like Ctrl-C: not an Exception."""


def begin(output, run=None):
    return opened(output, run or {}, settled="done/*", error=CheckpointError)


def test_products_are_there_when_they_are_whole(tmp_path):
    with begin(tmp_path / "out") as work:
        with work.making("a") as path:
            path.mkdir()
            (path / "inner").write_text("1")
            assert not work.product("a").exists()
        assert (work.product("a") / "inner").read_text() == "1"
        with work.making("b") as path:
            path.write_text("2")
        assert work.product("b").read_text() == "2"
    assert list(tmp_path.iterdir()) == []


def test_a_step_is_done_once_and_what_it_found_stays(tmp_path):
    made, told = [], []

    @contextmanager
    def progress(title):
        yield lambda done, total: told.append((title, done, total))

    def make(path, tell):
        made.append(path)
        tell(1, 2)
        path.write_text("whole")
        return {"cosine": 0.5}

    def run():
        with begin(tmp_path / "out") as work:
            assert work.do(Step("a.bin", make, "title"), progress) == {"cosine": 0.5}
            assert work.do(Step("b.bin", lambda path, tell: path.touch()), progress) is None
            assert (work.is_done("a.bin"), work.is_done("c.bin")) == (True, False)
            raise StoppedError

    for _ in range(2):
        with pytest.raises(StoppedError):
            run()
    assert len(made) == 1
    assert told == [("title", 1, 2)]


def test_what_fails_is_removed_and_nothing_stays_where_nothing_was_done(tmp_path):
    def fail():
        with begin(tmp_path / "out") as work, work.making("a") as path:
            path.mkdir()
            (path / "inner").write_text("1")
            raise StoppedError

    with pytest.raises(StoppedError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_made_anew(tmp_path):
    left = tmp_path / "out.partial" / "making" / "a"
    left.mkdir(parents=True)
    (left / "half").write_text("1")
    with begin(tmp_path / "out") as work, work.making("a") as path:
        assert not path.exists()
        path.write_text("2")


def test_a_step_may_go_on_with_what_it_has_kept(tmp_path):
    def make(path, tell):
        parts = len([*path.iterdir()])
        (path / f"{parts}").touch()
        if parts < 2:
            raise StoppedError
        return parts

    def run():
        with begin(tmp_path / "out") as work:
            assert work.do(Step("a", make, goes_on=True), None) == 2
            assert len([*work.product("a").iterdir()]) == 3

    for _ in range(2):
        with pytest.raises(StoppedError):
            run()
    run()
    assert list(tmp_path.iterdir()) == []


def test_nothing_stays_of_a_step_that_has_kept_nothing(tmp_path):
    def make(path, tell):
        raise StoppedError

    with pytest.raises(StoppedError), begin(tmp_path / "out") as work:
        work.do(Step("a", make, goes_on=True), None)
    assert list(tmp_path.iterdir()) == []


def test_settings_are_free_until_a_product_depends_on_them(tmp_path):
    def run(settings, product):
        with begin(tmp_path / "out", settings) as work:
            work.save_json("note.json", 1)
            if product:
                with work.making("a") as path:
                    path.write_text("2")
            raise StoppedError

    for settings, product in (({"n": 1}, False), ({"n": 2}, True), ({"n": 2}, False)):
        with pytest.raises(StoppedError):
            run(settings, product)
    with pytest.raises(CheckpointError, match=r"another n \(2, now 3\)"):
        run({"n": 3}, False)


def test_the_working_directory_is_no_target(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="is the working directory"):
        check_target(tmp_path, CheckpointError)
