"""What Pulsar2 says: of its version, of a build."""

import math

import pytest

from edgevl.boards.pulsar2 import (
    BuildLog,
    Pulsar2,
    explain,
    low_cosines,
    newest_llm_build,
    version,
)

PREFIX = "2026-03-23 21:10:01.591 | INFO     | yamain.command.llm_build:llm_build:519 - "
LOG = (
    "building llm decode layers \u2807 \u2501\u2501\u2501\u2578\u2501\u2501 25/28 0:51:28\r"
    "building llm decode layers   \u2501\u2501\u2501\u2501\u2501 28/28     0:02:50\n"
    "building llm post layer   \u2501\u2501\u2501 1/1 0:01:26\n"
    f"{PREFIX}build llm model done!\n"
    f"\x1b[32m{PREFIX}decode layer0_gt layer0_got cos_sim is: 0.98\x1b[0m\n"
    f"{PREFIX}prefill layer12_gt layer12_got cos_sim is: 1.0\n"
    f"{PREFIX}post cos_sim is: nan\n"
)


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_pieces_of_any_size_are_read_alike(piece):
    log, data = BuildLog(), LOG.encode()
    for begin in range(0, len(data), piece):
        log.feed(data[begin : begin + piece])
    assert log.bar == ("building llm post layer", 1, 1)
    assert log.built
    assert not log.checked
    assert math.isnan(log.cosines.pop("post"))
    assert log.cosines == {"decode layer 0": 0.98, "prefill layer 12": 1.0}


def test_every_stage_of_a_bar_is_seen():
    log, seen = BuildLog(), []
    for line in LOG.splitlines(keepends=True):
        log.feed(line.encode())
        seen.append(log.bar)
    assert seen[0] is None or seen[0][1:] == (25, 28)
    assert ("building llm decode layers", 28, 28) in seen


def test_low_cosines_are_named():
    lines = list(low_cosines({"a": 0.99, "b": 0.9899, "c": math.nan, "d": -1.0}))
    assert [line.partition(":")[0] for line in lines] == ["b", "c", "d"]


def test_a_long_line_is_neither_kept_nor_quoted_whole(tmp_path):
    log = BuildLog()
    for _ in range(100):
        log.feed(b"x" * 1_000_000)
    assert len(log._rest) <= 4096
    (tmp_path / "log").write_text("ValueError: " + "y" * 100_000)
    assert len(explain(tmp_path / "log", 1)) < 500


def test_layers_in_progress_are_no_reason(tmp_path):
    (tmp_path / "log").write_text(
        "ValueError: real\n\u2501\u2501\u2501\n---\n" + LOG.split("\r")[0]
    )
    assert "ValueError: real" in explain(tmp_path / "log", 1)


@pytest.mark.parametrize(
    ("said", "status", "name", "generation"),
    [
        ("version: 5.1\ncommit: c62d0b64", 0, "5.1", 1),
        ("Version: 6.0-lite", 0, "6.0-lite", 2),
        ("Pulsar2 version v7", 0, "7", 2),
        ("usage: pulsar2", 2, None, 1),
        ("5.1", 0, None, 1),
    ],
)
def test_versions(tmp_path, said, status, name, generation):
    program = tmp_path / "pulsar2"
    program.write_text(f"#!/bin/sh\n[ $1 = llm_build2 ] && exit 0\necho '{said}'\nexit {status}\n")
    program.chmod(0o755)
    pulsar2 = Pulsar2(program=str(program))
    assert version(pulsar2, tmp_path) == name
    assert newest_llm_build(pulsar2, name, tmp_path) == generation
