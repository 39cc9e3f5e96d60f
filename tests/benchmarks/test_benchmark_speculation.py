"""The benchmark of speculation: its run from model to table, and the replay of answers."""

import sys

import numpy as np
import pytest

import speculation

COSTS = dict.fromkeys(range(2, 13), 15.0) | {0: 10.0, 1: 10.0}


@pytest.fixture
def run(mini_checkpoint, monkeypatch):
    """Return a function that runs the benchmark on a miniature and returns the status."""
    pytest.importorskip("edgevl._native", reason="the native engine is not built")
    checkpoint = str(mini_checkpoint("mini-qwen3"))
    questions = {"editing": ["one two three one two three"], "chat": ["And now?", "So what?"]}
    monkeypatch.setattr(speculation, "PROMPTS", questions | {"extraction": ["Which?"]})
    fields = {name: {"enum": ["one", "two"]} for name in ("first", "second", "third")}
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    monkeypatch.setattr(speculation, "SCHEMAS", {"Which?": schema})
    options = ["--rounds", "1", "--max-tokens", "60", "--precision", "int4"]

    def main(*more):
        monkeypatch.setattr(sys, "argv", ["speculation.py", checkpoint, *options, *more])
        return speculation.main()

    return lambda *more: main("--shapes", checkpoint, *more)


@pytest.mark.parametrize("more", [(), ("--temperature", "1"), ("--no-forced",)])
def test_a_run(run, capsys, more):
    assert run(*more) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| times `decode` | ") for line in lines) == 2
    kinds = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines}
    assert {"| editing", "| chat", "| extraction"} <= set(kinds)
    questions, tokens, a_step, forced, _, time, *_ = kinds["| chat"]
    assert (questions, forced) == ("2", "")
    assert tokens == "120" or "--temperature" in more  # drawn answers may end
    assert float(a_step) > 1 or "--temperature" in more  # a random model soon repeats itself
    assert float(time) > 0
    assert (kinds["| extraction"][3] == "") == ("--no-forced" in more)


def test_the_kinds_can_be_chosen(run, capsys):
    assert run("--kinds", "chat") == 0
    assert "| editing" not in capsys.readouterr().out


def test_answers_that_differ_fail(run, monkeypatch, capsys):
    from edgevl.engine.cpu import CpuEngine

    extend = CpuEngine.extend
    monkeypatch.setattr(
        CpuEngine, "extend", lambda self, *args: np.roll(extend(self, *args), 1, axis=1)
    )
    assert run() == 1
    assert "not the same with speculation: 'one two three" in capsys.readouterr().err


def replayed(prompt, answer):
    question = speculation.Question("editing", "", prompt, tuple(answer))
    return speculation.replayed_ms(question, 11, COSTS)


def test_an_answer_without_drafts_takes_plain_steps():
    assert replayed([1, 2, 3], range(10, 30)) == 19 * 10.0


def test_a_copy_takes_few_steps():
    # A plain step to recognize it, then steps that give 3, 6, 12, 12 and the last 5 tokens.
    text = list(range(40))
    assert replayed([*text, 99], text) == 10 + 15 * 5
    # Where the copy ends otherwise, the drafted tokens up to there count.
    assert replayed([*text, 99], [*text[:20], 98, 97]) == 10 + 15 * 3 + 10
