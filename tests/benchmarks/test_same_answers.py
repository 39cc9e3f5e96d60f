"""The comparison of two versions: the same one twice, and one that says something else."""

import json
import shlex
import sys

import pytest

import same_answers


def interpreter(path, command):
    """Write what stands for a Python interpreter."""
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(0o755)
    return str(path)


@pytest.fixture
def compare(monkeypatch, capfd):
    """Return a function that runs the script on two interpreters: -> status, lines."""

    def main(before, after):
        options = ["--limit", "1", "--only", "cpu int4 bf16"]
        monkeypatch.setattr(sys, "argv", ["same_answers.py", before, after, *options])
        status = same_answers.main()
        return status, capfd.readouterr().out.splitlines()

    return main


def test_the_same_version_and_a_doctored_one(compare, tmp_path):
    pytest.importorskip("edgevl._native", reason="the native engine is not built")
    pytest.importorskip("fastapi")
    said = same_answers.said_by(sys.executable, ["cpu int4 bf16"], 1)
    assert said["cpu int4 bf16, questions.jsonl:1"].startswith('"5" (')
    assert "cpu int4 bf16, json.jsonl:1" in said
    assert "--seed" in said["edgevl chat --help"]
    assert said["API /info/title"]
    (tmp_path / "said.json").write_text(json.dumps(said))
    replay = interpreter(tmp_path / "replay", f"cat {shlex.quote(str(tmp_path / 'said.json'))}")
    assert compare(sys.executable, replay) == (0, [])

    said["cpu int4 bf16, questions.jsonl:1"] = '"6"'
    said["edgevl chat --help"] = said["edgevl chat --help"].replace("--seed", "--seeds")
    del said["API /info/title"]
    said["API /info/more"] = "1"
    (tmp_path / "other.json").write_text(json.dumps(said))
    doctored = interpreter(tmp_path / "other", f"cat {shlex.quote(str(tmp_path / 'other.json'))}")
    status, lines = compare(replay, doctored)
    assert status == 1
    first, *helped, answer, last = lines
    assert first == "API /info/title: is gone"
    assert answer.startswith('cpu int4 bf16, questions.jsonl:1: "5" (')
    assert answer.endswith('), then "6"')
    assert {line[: len("edgevl chat --help: -")] for line in helped} == {
        "edgevl chat --help: -",
        "edgevl chat --help: +",
    }
    assert last == "API /info/more: is new"


def test_an_interpreter_that_fails(tmp_path):
    broken = interpreter(tmp_path / "broken", "exit 3")
    with pytest.raises(SystemExit, match="broken: status 3"):
        same_answers.said_by(broken, [], 1)
