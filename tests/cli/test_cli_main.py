"""The command line as a whole: help, exit statuses, errors, closed pipes, encodings."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from edgevl import cli
from edgevl.cli.options import model_name
from edgevl.errors import CheckpointError
from edgevl.options import LoadOptions, options_of


def run(*args, **options):
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(
        [sys.executable, "-m", "edgevl", *args],
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
        **options,
    )


def test_help_lists_every_command_and_imports_nothing_heavy():
    code = (
        "import sys; from edgevl.cli import main; main(['--help']);"
        "heavy = {'numpy', 'PIL', 'tokenizers', 'jinja2', 'huggingface_hub', 'tqdm', 'psutil'};"
        "sys.exit(' '.join(heavy & set(sys.modules)) or 0)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 0.5
    for name in cli.COMMANDS:
        assert f"  {name} " in done.stdout


@pytest.mark.parametrize("name", ["chat", "pull", "eval", "doctor"])
def test_help_of_a_command_needs_no_numpy(name):
    code = (
        f"import sys; from edgevl.cli import main; status = main([{name!r}, '--help']);"
        "sys.exit(status or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"edgevl {name}" in done.stdout


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("tiny", "tiny"),
        ("OpenGVLab/InternVL3_5-1B", "InternVL3_5-1B"),
        ("/srv/secret/models/mine/", "mine"),
        (".", "mine"),
        ("..", "models"),
        ("a\udcff\n", "a\\udcff?"),
        ("/", "/"),
    ],
)
def test_a_model_is_called_by_its_last_part(tmp_path, monkeypatch, model, name):
    place = tmp_path / "models" / "mine"
    place.mkdir(parents=True)
    monkeypatch.chdir(place)
    assert model_name(model) == name


def test_engine_choices_are_those_of_the_registry():
    from edgevl.loading import ENGINES

    assert options_of(LoadOptions)["engine"].choices == ("auto", *ENGINES)


def test_version(capsys):
    import edgevl

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"edgevl {edgevl.__version__}\n"


def test_public_names():
    import edgevl

    assert all(getattr(edgevl, name) is not None for name in edgevl.__all__)
    with pytest.raises(AttributeError, match="'edgevl' has no attribute 'nonsense'"):
        edgevl.nonsense  # noqa: B018


@pytest.mark.parametrize("args", [["nonsense"], ["chat"], ["--nonsense"], ["eval", "tiny"]])
def test_wrong_usage_is_2(args, capsys):
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Error:" in err


def failing_pull(monkeypatch, error):
    def pull(repo, out):
        raise error

    monkeypatch.setattr("edgevl.loading.pull", pull)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (CheckpointError("a/b: no\nconfig.json"), "edgevl: error: a/b: no config.json\n"),
        (OSError(28, "No space left on device"), "edgevl: error: No space left on device\n"),
        (
            PermissionError(13, "Permission denied", "/x"),
            "edgevl: error: /x: Permission denied\n",
        ),
        (MemoryError(), "edgevl: error: not enough memory; close other programs or use a smaller"),
        (KeyError("k"), "edgevl: error: internal error, KeyError: 'k' (EDGEVL_DEBUG=1 shows"),
    ],
)
def test_failures_are_one_line_and_1(monkeypatch, capsys, error, line):
    monkeypatch.delenv("EDGEVL_DEBUG", raising=False)
    # Leaves the real standard output of the test run alone.
    monkeypatch.setattr(cli, "_abandon_stdout", lambda: None)
    failing_pull(monkeypatch, error)
    assert cli.main(["pull", "a/b"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_debug_shows_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("EDGEVL_DEBUG", "1")
    failing_pull(monkeypatch, CheckpointError("broken"))
    assert cli.main(["pull", "a/b"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_interrupt_is_130_and_quiet(monkeypatch, capsys):
    failing_pull(monkeypatch, KeyboardInterrupt())
    assert cli.main(["pull", "a/b"]) == 130
    out, err = capsys.readouterr()
    assert (out + err).strip() == ""


def test_pull_prints_the_directory(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("edgevl.loading.pull", lambda repo, out: out / repo)
    assert cli.main(["pull", "a/b", "-o", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/a/b\n"


def test_closed_pipe_is_quiet():
    read, write = os.pipe()
    os.close(read)
    done = run("--help", stdout=write)
    os.close(write)
    assert done.returncode == 1
    assert done.stderr == b""


def test_closed_stdout_is_no_error():
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    args = [sys.executable, "-c", code, "-m", "edgevl", "--version"]
    done = subprocess.run(args, stderr=subprocess.PIPE, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_is_one_line():
    with Path("/dev/full").open("wb") as full:
        done = run("--help", stdout=full)
    assert done.returncode == 1
    assert done.stderr.decode() == "edgevl: error: No space left on device\n"


@pytest.mark.parametrize(("args", "status"), [([], 2), (["-q", "x", "-i", "-"], 1)])
def test_closed_stdin_is_said(args, status):
    code = "import os, sys; os.close(0); os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    args = [sys.executable, "-c", code, "-m", "edgevl", "chat", ".", *args]
    done = subprocess.run(args, capture_output=True, check=False)
    assert done.returncode == status
    assert b"standard input is closed" in done.stderr
