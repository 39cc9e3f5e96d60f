"""A conversation on a real pseudo-terminal: typing, pasting, stopping, history."""

import signal
import stat
import textwrap

import pytest
from PIL import Image

from edgevl.cli.screen import MAX_HISTORY_BYTES, history_file
from repository import SUPPORT
from screen import Screen

#: Answers in Markdown what it was asked, slowly if so asked.
TALK = f"""
import sys, time
sys.path.insert(0, {str(SUPPORT)!r})
from edgevl.cli.conversation import Conversation
from edgevl.cli.terminal import leave_on_signals
from fake_model import FakeModel

def say(question):
    shown = len(model.calls[-1]["images"])
    yield f"**Asked** `{{question!r}}` of {{shown}}.\\n"
    for i in range(int(question.partition("slow ")[2] or 0)):
        yield f"\\nline{{i}} "
        time.sleep(0.05)

model = FakeModel(say)
leave_on_signals()  # as `edgevl` does
Conversation("m", model.chat(), {{}}).run([])
print("\\nleft")
"""


@pytest.fixture
def talk(tmp_path, monkeypatch):
    """Return a function (**environment) -> `Screen` of a conversation with its own history."""
    for name in ("NO_COLOR", "EDGEVL_NO_HISTORY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def start(**env):
        screen = Screen("-c", textwrap.dedent(TALK), **env)
        screen.wait_for("/help lists the commands")
        screen.wait_for("\n>")
        return screen

    return start


def test_question_and_answer(talk):
    with talk() as screen:
        screen.type("What?\r")
        screen.wait_for("Asked 'What?' of 0.")
        assert screen.styled("Asked").bold
        screen.wait_for("tokens/s\n>")
        screen.type("/exit\r")
        screen.wait_for("left")
        assert screen.leave() == 0
    assert "Asked" in screen.text  # nothing was drawn over


@pytest.mark.parametrize(
    "keys",
    [
        "\x1b[200~one\ntwo\x1b[201~\r",  # a bracketed paste
        "\x1b[200~one\r\ntwo\r\n\x1b[201~\r",
        "one\x1b\rtwo\r",
        "one\\\rtwo\r",
    ],
)
def test_several_lines_are_one_question(talk, keys):
    with talk() as screen:
        screen.type(keys)
        screen.wait_for(r"Asked 'one\ntwo' of 0.")


def test_a_dropped_picture(talk, tmp_path):
    path = tmp_path / "my photo.png"
    Image.new("RGB", (60, 40)).save(path)
    with talk(columns=200) as screen:
        screen.type(f"\x1b[200~'{path}' \x1b[201~\r")
        screen.wait_for("60 x 40, goes with the next question.")
        screen.type("What?\r")
        screen.wait_for("Asked 'What?' of 1.")


def test_ctrl_c_stops_the_answer_only(talk):
    with talk() as screen:
        screen.type("slow 600\r")
        screen.wait_for("line3")
        screen.type("\x03")
        screen.wait_for("\n>", times=2)
        screen.type("typed\x03again\r")  # at the prompt it clears what was typed
        screen.wait_for("Asked 'again' of 0.")
        screen.wait_for("tokens/s\n>")
        screen.wait_for("/exit leaves", key="\x03")
        assert screen.leave() == 0


def test_what_is_typed_during_an_answer_waits(talk):
    with talk() as screen:
        screen.type("slow 20\r")
        screen.wait_for("line3")
        screen.type("next\r")
        screen.wait_for("line9")
        assert "next" not in screen.text  # it would be drawn into the answer
        screen.wait_for("Asked 'next' of 0.")
        assert "line19\n" in screen.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("typed", ["slow 600\r", "typed"])
def test_the_terminal_is_put_in_order_when_the_program_is_ended(talk, number, typed):
    with talk() as screen:
        screen.type(typed)
        screen.wait_for("line3" if "slow" in typed else "> typed")
        assert not screen.in_order
        screen.process.send_signal(number)
        assert screen.leave() == 128 + number
        assert screen.in_order


def test_history_is_kept_private(talk, tmp_path):
    with talk() as screen:
        screen.type("first\\\rquestion\r")
        screen.wait_for("tokens/s\n>")
        assert screen.leave() == 0
    path = tmp_path / "state" / "edgevl" / "chat_history"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with talk() as screen:
        screen.type("\x1b[A\r")  # up
        screen.wait_for(r"Asked 'first\nquestion' of 0.")
    before = path.read_bytes()
    with talk(EDGEVL_NO_HISTORY="1") as screen:
        screen.type("\x1b[Asecret\r")
        screen.wait_for("Asked 'secret' of 0.")
    assert path.read_bytes() == before


def test_history_is_bounded(tmp_path, monkeypatch):
    monkeypatch.delenv("EDGEVL_NO_HISTORY", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    path = history_file()
    assert path == tmp_path / "edgevl" / "chat_history"
    entries = [f"\n# {i}\n+question {i}\n+\n" for i in range(50_000)]
    path.write_text("".join(entries))
    assert history_file() == path
    assert path.stat().st_size <= MAX_HISTORY_BYTES // 2
    assert "".join(entries).endswith(path.read_text())
    assert path.read_text().startswith("\n# ")


def test_no_history_where_it_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert history_file() is None


def test_completion(talk, tmp_path):
    (tmp_path / "folder").mkdir()
    Image.new("RGB", (60, 40)).save(tmp_path / "folder" / "photo.png")
    (tmp_path / "folder" / "photo.txt").touch()
    with talk(columns=200) as screen:
        screen.type(f"/im\t {tmp_path}/fol\tpho\t\r")
        screen.wait_for("60 x 40, goes with the next question.")
        screen.type("/set temp\t 0.5\r")
        screen.wait_for("temperature 0.5")
        screen.type(f"{tmp_path}/fol\tph\t What?\r")
        screen.wait_for("Asked 'What?' of 2.")


def test_a_terminal_that_cannot_move_its_cursor(talk):
    with talk(TERM="dumb", NO_COLOR="1") as screen:
        screen.type("one\\\rtwo\r")
        screen.wait_for(r"**Asked** `'one\ntwo'` of 0.")
        screen.wait_for("tokens/s\n>")
        assert screen.leave() == 0
    assert b"\x1b" not in screen.received


def test_an_answer_to_a_file_is_as_it_is(talk, tmp_path):
    with talk(stdout=tmp_path / "answers.md") as screen:
        screen.type("What?\r")
        screen.wait_for("tokens/s\n>")
        assert screen.leave() == 0
    assert (tmp_path / "answers.md").read_text() == "**Asked** `'What?'` of 0.\n\n\nleft\n"


def test_the_real_program(mini_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    picture = tmp_path / "a.png"
    Image.new("RGB", (60, 40), "white").save(picture)
    args = ["-m", "edgevl", "chat", str(mini_checkpoint()), "-i", str(picture), "--max-tokens", "5"]
    with Screen(*args) as screen:
        screen.wait_for("\n>")
        screen.type("hello\r")
        screen.wait_for("tokens/s")
        screen.wait_for("\n>", times=2)
        screen.wait_for("/exit leaves", key="\x03")  # Ctrl-C at the prompt does not end the program
        assert screen.leave() == 0  # Ctrl-D does
