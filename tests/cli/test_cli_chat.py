"""`edgevl chat`: one answer, boxes, conversations, terminals."""

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image

from edgevl import cli
from edgevl.cli.conversation import Conversation
from edgevl.errors import EdgeVLError, ImageError
from edgevl.generate import Piece
from fake_model import FakeModel

BOX = "<ref>red circle</ref><box>[[100, 100, 500, 500]]</box>"


class Stdin(io.TextIOWrapper):
    def __init__(self, data: bytes, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def stdin(monkeypatch):
    def give(data=b"", terminal=False):
        monkeypatch.setattr(sys, "stdin", Stdin(data, terminal))

    give()
    return give


@pytest.fixture
def model(monkeypatch, stdin):
    for name in ("LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    model = FakeModel(lambda question: ["It is ", "42", "."])
    monkeypatch.setattr("edgevl.generate.load", model.load)
    return model


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (60, 40), "white").save(path)
    return path


def test_answer_on_stdout_and_nothing_else(model, picture, capsys):
    assert cli.main(["chat", "m", "-q", "What?", "-i", str(picture)]) == 0
    assert capsys.readouterr() == ("It is 42.\n", "")
    assert model.load_options == {
        "model": "m",
        "engine": "auto",
        "max_context": None,
        "precision": "auto",
        "threads": None,
        "kv_cache": "bf16",
        "keep_bytes": 10**9,
    }
    [call] = model.calls
    assert call["question"] == "What?"
    assert [image.size for image in call["images"]] == [(60, 40)]


def test_options_reach_the_model(model, picture):
    args = (
        "chat m -q x --system S --think --max-tiles 3 --max-tokens 9 --temperature 0.5 --top-p .9"
    )
    args += " --top-k 8 --min-p .1 --repetition-penalty 1.1 --seed 7 --stop A --stop B --context 99"
    args += " --frequency-penalty -.5 --presence-penalty 1 --logit-bias 5=-100 --logit-bias 7=2.5"
    args += " --engine cpu --precision int4 --threads 3 --kv-cache int8 --frames 5"
    args += " --frame-threshold 4.5 --keep-mb 20"
    assert cli.main([*args.split(), "-i", str(picture), "-i", str(picture)]) == 0
    [call] = model.calls
    assert len(call.pop("images")) == 2
    assert call == {
        "question": "x",
        "videos": [],
        "frames": 5,
        "frame_threshold": 4.5,
        "system": "S",
        "thinking": True,
        "max_tiles": 3,
        "max_tokens": 9,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 8,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "frequency_penalty": -0.5,
        "presence_penalty": 1,
        "logit_bias": {5: -100, 7: 2.5},
        "seed": 7,
        "stop": ("A", "B"),
        "constraint": None,
    }
    assert model.load_options == {
        "model": "m",
        "engine": "cpu",
        "max_context": 99,
        "precision": "int4",
        "threads": 3,
        "kv_cache": "int8",
        "keep_bytes": 20 * 10**6,
    }


def test_what_is_not_given_is_left_to_the_checkpoint(model):
    from dataclasses import asdict

    from edgevl.generate import SamplingParams

    assert cli.main(["chat", "m", "-q", "x"]) == 0
    assert dict.fromkeys(asdict(SamplingParams())).items() <= model.calls[0].items()


def test_json_is_the_answer_as_a_dict(model, capsys):
    assert cli.main(["chat", "m", "-q", "x", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == {
        "text": "It is 42.",
        "token_ids": [1, 2],
        "finish_reason": "stop",
        "usage": {
            "prompt_tokens": 10,
            "image_tokens": 4,
            "completion_tokens": 2,
            "cached_tokens": 0,
        },
        "timings": {
            "load_ms": 1.0,
            "vision_ms": 2.0,
            "prefill_ms": 3.0,
            "ttft_ms": 40.0,
            "decode_ms_per_token": 5.0,
            "decode_tokens_per_s": 200.0,
        },
    }


@pytest.mark.parametrize(
    ("option", "thinking"), [([], None), (["--think"], True), (["--no-think"], False)]
)
def test_thinking_is_wanted_or_not_or_the_template_s(model, option, thinking):
    assert cli.main(["chat", "m", "-q", "x", *option]) == 0
    assert model.calls[0]["thinking"] is thinking


def test_thinking_goes_to_stderr(model, capsys):
    model.say = lambda question: [Piece("Hmm. ", True), Piece("Well.", True), "42"]
    assert cli.main(["chat", "m", "-q", "x", "--think"]) == 0
    assert capsys.readouterr() == ("42\n", "Hmm. Well.\n")


def test_an_answer_cannot_steer_the_terminal(model, capsys):
    model.say = lambda question: ["a\x1b]0;title\x07b\n\tc\x9bd"]
    assert cli.main(["chat", "m", "-q", "x"]) == 0
    assert capsys.readouterr().out == "a]0;titleb\n\tcd\n"


@pytest.mark.parametrize("args", [["-q", "-"], []])
def test_question_from_stdin(model, stdin, args):
    stdin("\ufeff这是什么？\n".encode())
    assert cli.main(["chat", "m", *args]) == 0
    assert model.calls[0]["question"] == "这是什么？"


def test_picture_from_stdin(model, stdin, picture):
    stdin(picture.read_bytes())
    assert cli.main(["chat", "m", "-q", "x", "-i", "-"]) == 0
    assert model.calls[0]["images"][0].size == (60, 40)


def test_picture_from_data_url(model, picture):
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()
    assert cli.main(["chat", "m", "-q", "x", "-i", url]) == 0
    assert model.calls[0]["images"][0].size == (60, 40)


@pytest.mark.parametrize(
    ("args", "stdin_bytes"),
    [
        (["-q", " "], b""),
        ([], b""),  # not a terminal, and nothing to read
        ([], b"\xff\xfe"),
        (["-q", "-"], b"x" * (1 << 20) + b"x"),
        (["-i", "-"], b"x"),
        (["-q", "-", "-i", "-"], b"x"),
        (["-q", "x", "-i", "-", "-i", "-"], b"x"),
        (["-q", "\udcff"], b""),
        (["-q", "x", "--draw-boxes", "out.png"], b""),
        (["-q", "x", "--temperature", "-1"], b""),
        (["-q", "x", "--engine", "warp"], b""),
    ],
)
def test_wrong_usage(model, stdin, capsys, args, stdin_bytes):
    stdin(stdin_bytes)
    assert cli.main(["chat", "m", *args]) == 2
    assert "Error:" in capsys.readouterr().err
    assert not model.load_options


@pytest.mark.parametrize("args", [["--json"], ["--draw-boxes", "out.png", "-i", "a.png"]])
def test_conversation_has_no_json_and_no_drawing(model, stdin, capsys, args):
    stdin(terminal=True)
    assert cli.main(["chat", "m", *args]) == 2
    assert "add -q" in capsys.readouterr().err


def test_bad_pictures_are_told_before_the_model_is_loaded(model, tmp_path, capsys):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("hello")
    for name in ("none.png", "empty.png", "text.png", "."):
        assert cli.main(["chat", "m", "-q", "x", "-i", str(tmp_path / name)]) == 1
        err = capsys.readouterr().err
        assert err.startswith("edgevl: error: ")
        assert err.count("\n") == 1
    assert not model.load_options


def test_draw_boxes(model, picture, tmp_path, capsys):
    model.say = lambda question: [BOX]
    out = tmp_path / "out.png"
    args = ["chat", "m", "-q", "where", "-i", str(picture), "--draw-boxes", str(out)]
    assert cli.main(args) == 0
    assert capsys.readouterr().out == BOX + "\n"
    drawn = Image.open(out)
    assert drawn.format == "PNG"
    assert drawn.size == (60, 40)
    assert drawn.getpixel((15, 19)) != (255, 255, 255)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "out.png"]


def test_draw_boxes_says_when_there_is_none(model, picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    args = ["chat", "m", "-q", "where", "-i", str(picture), "--draw-boxes", str(out)]
    assert cli.main(args) == 1
    printed, err = capsys.readouterr()
    assert printed == "It is 42.\n"
    assert "no <box>" in err
    assert not out.exists()


def test_draw_boxes_needs_a_place_to_write(model, picture, tmp_path, capsys):
    args = ["chat", "m", "-q", "where", "-i", str(picture), "--draw-boxes"]
    assert cli.main([*args, str(tmp_path / "out.txt")]) == 2
    assert cli.main([*args, str(tmp_path / "no" / "out.png")]) == 1
    assert "cannot be written" in capsys.readouterr().err
    assert not model.calls


def conversation(model):
    return Conversation("m", model.chat(), {"max_tokens": 5})


def test_conversation_keeps_pictures_for_the_next_question(model, picture, capsys):
    talk = conversation(model)
    assert talk.take(f"/image '{picture}'")
    assert "60 x 40" in capsys.readouterr().err
    assert talk.take("What?")
    assert talk.take("And now?")
    assert capsys.readouterr().out == "It is 42.\nIt is 42.\n"
    assert [len(call["images"]) for call in model.calls] == [1, 0]
    assert model.calls[0]["max_tokens"] == 5
    assert not talk.take("/exit")


def test_conversation_commands(model, picture, tmp_path, capsys):
    talk = conversation(model)
    talk.take(f"/image {picture}")
    talk.take("这是什么？")
    saved = tmp_path / "talk.json"
    talk.take(f"/save {saved}")
    transcript = json.loads(saved.read_text("utf-8"))
    assert transcript["model"] == "m"
    [turn] = transcript["turns"]
    assert turn["question"] == "这是什么？"
    assert turn["images"] == [str(picture)]
    assert turn["text"] == "It is 42."
    talk.take("/reset")
    assert model.resets == 1
    talk.take(f"/save {saved}")
    assert json.loads(saved.read_text("utf-8"))["turns"] == []
    capsys.readouterr()
    for line, expected in [
        ("/help", "/image PATH"),
        ("/fly", "/fly is not a command"),
        ("/image", "Name a picture"),
        ("/save", "Name a file"),
        ("/retry", "Nothing has been asked"),
        ("/undo", "Nothing has been asked"),
    ]:
        assert talk.take(line)
        out, err = capsys.readouterr()
        assert out == ""
        assert expected in err
    assert len(model.calls) == 1


def test_conversation_takes_a_path_like_question_as_a_question(model):
    conversation(model).take("/etc/hosts says what?")
    assert model.calls[0]["question"] == "/etc/hosts says what?"


def test_conversation_speaks_chinese(model, monkeypatch, capsys):
    monkeypatch.setenv("LANG", "zh_CN.UTF-8")
    conversation(model).take("/help")
    assert "附上图片" in capsys.readouterr().err


def test_conversation_survives_errors_and_interruptions(
    model, stdin, monkeypatch, capsys, tmp_path
):
    lines = iter(["/image none.png", "broken", "long", EOFError()])

    def read_line():
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("edgevl.cli.conversation.line_reader", lambda: read_line)
    scripts = {
        "broken": [PermissionError(13, "Permission denied", "x")],
        "long": ["It ", KeyboardInterrupt()],
    }
    model.say = scripts.__getitem__
    talk = conversation(model)
    talk.run([])
    out, err = capsys.readouterr()
    assert out == "It \n"
    assert "edgevl: error: none.png: no such file" in err
    assert "edgevl: error: x: Permission denied" in err
    talk.take(f"/save {tmp_path / 't.json'}")
    [turn] = json.loads((tmp_path / "t.json").read_text())["turns"]
    assert turn == {"question": "long", "images": [], "text": "It ", "finish_reason": "interrupted"}


@pytest.fixture(scope="module")
def mini(mini_checkpoint):
    """A real checkpoint with random weights; what it says is noise, but it says it."""
    return str(mini_checkpoint())


def test_question_in_a_locale_that_is_not_utf8(model):
    disguised = "你好".encode().decode(
        "ascii", "surrogateescape"
    )  # as Python reads it with LC_ALL=C
    assert cli.main(["chat", "m", "-q", disguised, "--stop", disguised]) == 0
    assert model.calls[0]["question"] == "你好"
    assert model.calls[0]["stop"] == ("你好",)


def test_real_checkpoint_where_output_is_not_utf8(mini, picture):
    args = [sys.executable, "-m", "edgevl", "chat", mini, "-q", "你好", "-i", str(picture)]
    args += ["--max-tokens", "12"]
    env = os.environ | {"PYTHONIOENCODING": "latin-1"}
    plain = subprocess.run(args, env=env, capture_output=True, check=False)
    assert (plain.returncode, plain.stderr) == (0, b"")
    assert plain.stdout.isascii()
    as_json = subprocess.run([*args, "--json"], env=env, capture_output=True, check=False)
    assert as_json.stdout.isascii()
    assert json.loads(as_json.stdout)["usage"]["completion_tokens"] <= 12


def test_closed_stderr_is_no_error(mini):
    code = "import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    args = [sys.executable, "-c", code, "-m", "edgevl", "chat", mini, "-q", "hi", "--max-tokens=4"]
    done = subprocess.run(args, stdout=subprocess.PIPE, check=False)
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")


def test_interrupted_answer_ends_quietly(mini, picture):
    args = [sys.executable, "-m", "edgevl", "chat", mini, "-q", "hello", "--max-tokens", "4000"]
    args += ["--temperature", "1", "--seed", "0"]
    with subprocess.Popen(
        args,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background job ignores it, and so would what it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        process.stdout.read(1)  # it has begun
        process.send_signal(signal.SIGINT)
        assert process.stderr.read().strip() == b""
        assert process.wait(30) == 130


def test_pictures_wait_on_when_an_answer_is_stopped_before_its_first_word(
    model, picture, capsys, tmp_path
):
    scripts = {"slow": [Piece("Hmm", True), KeyboardInterrupt()], "again": ["It is 42."]}
    model.say = scripts.__getitem__
    talk = conversation(model)
    talk.take(f"/image {picture}")
    talk.take("slow")
    talk.take("again")
    assert [len(call["images"]) for call in model.calls] == [1, 1]
    talk.take(f"/save {tmp_path / 't.json'}")
    turns = json.loads((tmp_path / "t.json").read_text())["turns"]
    assert [turn["question"] for turn in turns] == ["again"]


def test_json_schema_reaches_the_model(model, tmp_path):
    from edgevl import Constraint

    path = tmp_path / "schema.json"
    path.write_text('\ufeff{"const": "汉"}', "utf-8")
    assert cli.main(["chat", "m", "-q", "x", "--json-schema", str(path)]) == 0
    assert cli.main(["chat", "m", "-q", "x", "--json-object"]) == 0
    schema, some_object = (call["constraint"] for call in model.calls)
    assert schema == Constraint.json_schema('{"const": "汉"}')
    assert some_object == Constraint.json_object()


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b'{"not": {}}', '["not"]'),
        (b"{", "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b'"' + b"x" * 200_000 + b'"', "larger than the limit of 131072 bytes"),
    ],
)
def test_a_bad_schema_fails_before_the_model_is_loaded(model, tmp_path, capsys, data, says):
    path = tmp_path / "schema.json"
    path.write_bytes(data)
    assert cli.main(["chat", "m", "-q", "x", "--json-schema", str(path)]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert f"--json-schema {path}: " in line
    assert says in line
    assert not model.load_options


@pytest.mark.parametrize("other", ["--json-object", "--think"])
def test_one_form_and_no_thinking(model, tmp_path, other):
    path = tmp_path / "schema.json"
    path.write_text("{}")
    assert cli.main(["chat", "m", "-q", "x", "--json-schema", str(path), other]) == 2


def test_a_video_in_a_conversation(model, tmp_path, capsys):
    pytest.importorskip("av")
    from clips import write_clip

    clip = write_clip(tmp_path / "a.mp4", frames=5)
    talk = Conversation("m", model.chat(), {"frames": 3})
    talk.take(f"/video {clip}")
    assert "5 frames" in capsys.readouterr().err
    talk.take("What?")
    talk.take("And?")
    assert [len(call["videos"]) for call in model.calls] == [1, 0]
    assert model.calls[0]["videos"][0].frame_count == 5
    assert model.calls[0]["frames"] == 3
    talk.take(f"/save {tmp_path / 'talk.json'}")
    turns = json.loads((tmp_path / "talk.json").read_text())["turns"]
    assert turns[0]["videos"] == [str(clip)]
    assert "videos" not in turns[1]


def test_undo_and_retry_show_the_pictures_again(model, picture, capsys, tmp_path):
    talk = conversation(model)
    talk.take(f"/image {picture}")
    talk.take("What?")
    talk.take("/retry")
    talk.take("/undo")
    assert "Forgotten: What?" in capsys.readouterr().err
    talk.take("And this?")
    assert [call["question"] for call in model.calls] == ["What?", "What?", "And this?"]
    assert [len(call["images"]) for call in model.calls] == [1, 1, 1]
    assert model.undone == 2
    talk.take(f"/save {tmp_path / 't.json'}")
    turns = json.loads((tmp_path / "t.json").read_text())["turns"]
    assert [turn["question"] for turn in turns] == ["And this?"]


def test_retry_asks_what_was_stopped_before_its_first_word(model):
    scripts = iter([["1"], [KeyboardInterrupt()], ["3"]])
    model.say = lambda question: next(scripts)
    talk = conversation(model)
    for line in ("first", "second", "/retry"):
        talk.take(line)
    assert [call["question"] for call in model.calls] == ["first", "second", "second"]
    assert model.undone == 0


def test_settings_and_system_message(model, capsys):
    talk = conversation(model)
    lines = ("/set temperature 0.7", "/set top-k=5", "/set max_tokens", "/set stop a = b")
    for line in (*lines, "/set logit_bias 5=-100,7=2", "/system Be brief."):
        talk.take(line)
    talk.take("x")
    [call] = model.calls
    assert (call["temperature"], call["top_k"], call["stop"]) == (0.7, 5, ("a = b",))
    assert call["logit_bias"] == {5: -100, 7: 2}
    assert "max_tokens" not in call
    assert model.system == "Be brief."
    talk.take("/system")
    assert model.system is None
    capsys.readouterr()
    talk.take("/set")
    assert capsys.readouterr().err.startswith(
        "max_tokens 512\ntemperature 0.7\ntop_p 1.0\ntop_k 5\n"
    )
    model.defaults |= {"temperature": 0.6, "top_p": 0.95}
    talk.take("/set")
    shown = capsys.readouterr().err
    assert "temperature 0.7\ntop_p 0.95 (the checkpoint's)\ntop_k 5\n" in shown
    assert "logit_bias 5=-100,7=2\nseed -\nstop a = b\n" in shown
    talk.take("/set temperature")
    assert capsys.readouterr().err == "temperature 0.6 (the checkpoint's)\n"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/set heat 1", "/set heat: there is no such setting, but max_tokens, temperature"),
        ("/set temperature hot", "temperature is 'hot': it must be a number, 0 to 100"),
        ("/set top_p 2", "top_p is 2: it must be a number, 0 to 1"),
        (
            "/set logit_bias 5",
            "logit_bias is {'5': ''}: it must be a number, -100 to 100, for each",
        ),
        ("/set top_k 0.5", "top_k is 0.5: it must be a whole number"),
    ],
)
def test_wrong_settings(model, line, says):
    talk = conversation(model)
    with pytest.raises(EdgeVLError, match=re.escape(says)):
        talk.take(line)
    talk.take("x")
    assert model.calls[0] == {"question": "x", "images": [], "videos": [], "max_tokens": 5}


def test_paths_in_a_line_are_shown(model, picture, tmp_path, capsys):
    talk = conversation(model)
    talk.take(f"{picture} What is it?")
    talk.take(f"'{picture}' ")
    assert len(model.calls) == 1
    talk.take("And this?")
    (tmp_path / "broken.png").touch()
    with pytest.raises(ImageError):
        talk.take(f"{picture} {tmp_path / 'broken.png'} Both?")
    talk.take("None?")
    assert [call["question"] for call in model.calls] == ["What is it?", "And this?", "None?"]
    assert [len(call["images"]) for call in model.calls] == [1, 1, 0]


def test_one_answer_needs_nothing_of_a_conversation(mini):
    code = (
        "import sys; from edgevl import cli; cli.main(sys.argv[1:]);"
        "sys.exit(bool({'prompt_toolkit', 'rich'} & {name.split('.')[0] for name in sys.modules}))"
    )
    args = [sys.executable, "-c", code, "chat", mini, "-q", "hi", "--max-tokens", "4"]
    assert subprocess.run(args, capture_output=True, check=False).returncode == 0
