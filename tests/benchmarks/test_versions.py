"""The speed of two versions: the same one twice, a miniature, from checkouts to the table."""

import json
import shlex
import sys

import pytest

from edgevl.synth.presets import PRESETS
from edgevl.synth.writer import write_checkpoint
from repository import BENCHMARKS


def checkout(path):
    """Make what stands for a checkout with an environment: this one's Python and benchmarks."""
    (path / ".venv" / "bin").mkdir(parents=True)
    python = path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (path / "benchmarks").symlink_to(BENCHMARKS)
    return path


def test_the_same_version_twice(tmp_path, monkeypatch, capsys):
    pytest.importorskip("edgevl._native", reason="the native engine is not built")
    pytest.importorskip("aiohttp", reason="pip install 'edgevl[bench]'")
    pytest.importorskip("fastapi")
    import versions

    preset = PRESETS["mini-qwen3"]
    write_checkpoint(
        preset.config,
        tmp_path / "checkpoint",
        layout="hf",
        base_vocabulary=preset.base_vocabulary,
    )
    checkouts = [str(checkout(tmp_path / name)) for name in ("one", "other")]
    lengths = ["--prompt-tokens", "4", "--after-tokens", "4", "--generate", "3", "--asked", "6"]
    counts = ["--rounds", "1", "--clients", "1,2", "--commands", "1", "--threads", "1"]
    monkeypatch.setattr(
        sys, "argv", ["versions.py", *checkouts, "--work", str(tmp_path), *lengths, *counts]
    )
    assert versions.main() == 0
    results = json.loads((tmp_path / "versions.json").read_text())
    assert [*results["versions"].values()] == checkouts
    assert set(results["samples"]) == {
        *("prefill 4, ms", "decode, ms", "vision, ms", "first token, ms"),
        "peak RSS of the engine, MB",
        *("a token with 1 clients, ms", "a token with 2 clients, ms"),
        *(f"{command}, {unit}" for command in versions.COMMANDS for unit in versions.UNITS),
    }
    for by_version in results["samples"].values():
        assert by_version.keys() == {"before", "after"}
        assert all(len(values) == 1 and min(values) > 0 for values in by_version.values())
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("| ")]) == 1 + len(results["samples"])


def test_the_ratio_is_of_the_rounds(capsys):
    pytest.importorskip("aiohttp", reason="pip install 'edgevl[bench]'")
    import versions

    machine = {"cpu": "a CPU", "threads": 2, "read_bandwidth_gb_s": None, "int8_gops": None}
    samples = {"decode, ms": {"before": [10.0, 20.0, 30.0], "after": [11.0, 20.0, 27.0]}}
    *_, line = versions.table(samples, machine)
    assert line == "| decode, ms | 20.00 | 20.00 | 1.000 |"
