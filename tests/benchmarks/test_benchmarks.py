"""The comparison with peers: workers, what is done about a peer that fails, the table."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

import compare
import environments
import report
from peers import PEERS, Peer
from peers.calibration import DEVIATION, MEAN, check_tile, tiles
from repository import BENCHMARKS
from stacks import EXACT, STACKS, Stack


@pytest.fixture
def work(tmp_path, mini_checkpoint):
    """A working directory in which EdgeVL's model, a miniature, has been built."""
    pytest.importorskip("edgevl._native", reason="the native engine is not built")
    checkpoint = mini_checkpoint("mini-qwen3", "hf")
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    environments.build(PEERS["edgevl"], tmp_path, checkpoint)
    return tmp_path


@pytest.fixture
def arguments():
    return argparse.Namespace(threads=1, rounds=1, prompt_tokens=[4, 40], after=4, generate=2)


def test_every_stack_names_a_peer():
    assert {stack.peer for stack in (*STACKS, EXACT)} == set(PEERS)
    assert len({stack.name for stack in STACKS}) == len(STACKS)
    for peer in PEERS.values():
        assert peer.models_of is None or peer.models_of in PEERS
        assert all("==" in wanted or "<" in wanted for wanted in peer.requirements)


def test_a_run_from_worker_to_table(work, arguments):
    stacks = [
        Stack("ours", "edgevl", "int8", "int8"),
        Stack("text alone", "edgevl", "int8", None),
        Stack("wrong", "edgevl", "int3", "int8"),
        Stack("peer", "openvino", "int4", "int8"),
    ]
    missing = {"openvino": "no wheel for this machine", EXACT.peer: "not here"}
    results = compare.measure(stacks, missing, work, arguments)
    ours, text = results["stacks"]
    steps = {"prefill 4", "prefill 40", "decode", "vision", "first token"}
    assert set(ours["medians"]) == steps
    assert set(text["medians"]) == {"prefill 4", "prefill 40", "decode"}
    assert all(len(values) == 1 and min(values) > 0 for values in ours["samples"].values())
    assert ours["peak_rss_bytes"] > 1 << 20
    assert results["machine"]["read_bandwidth_gb_s"] > 0
    assert results["unavailable"]["peer"] == "no wheel for this machine"
    assert "int3" in results["unavailable"]["wrong"]
    table = report.markdown(results)
    assert "| ours | " in table
    assert "- peer: no wheel for this machine" in table


def test_a_worker_is_stopped_while_others_are_measured(work):
    worker = compare.start(Stack("ours", "edgevl", "int8", "int8"), work, 1)
    try:
        stat = Path(f"/proc/{worker._process.pid}/stat")
        if not stat.exists():
            pytest.skip("no /proc here")
        assert stat.read_text().rpartition(")")[2].split()[0] == "T"
        assert worker.call("prefill", tokens=8) > 0
        assert stat.read_text().rpartition(")")[2].split()[0] == "T"
    finally:
        worker.close()


class Broken(Peer):
    name = "broken"
    requirements = ("./not-there==1",)


def test_a_peer_that_cannot_be_installed_says_why(tmp_path):
    with pytest.raises(environments.UnavailableError, match=r"not-there.*install-broken\.log"):
        environments.install(Broken, tmp_path)
    with pytest.raises(environments.UnavailableError):  # and is tried again the next time
        environments.install(Broken, tmp_path)


def test_models_are_built_once_and_again_when_the_code_changes(work, monkeypatch):
    stamp = work / "models" / "edgevl" / "built"
    before = stamp.stat().st_mtime_ns
    environments.build(PEERS["edgevl"], work, work / "checkpoint")
    assert stamp.stat().st_mtime_ns == before
    monkeypatch.setattr(environments, "_sources", lambda peer: [BENCHMARKS / "compare.py"])
    environments.build(PEERS["edgevl"], work, work / "checkpoint")
    assert stamp.stat().st_mtime_ns != before


def test_tiles_are_whole_8_bit_pictures():
    for tile in (*tiles(28, count=2), check_tile(28)):
        assert tile.shape == (1, 3, 28, 28)
        assert tile.dtype == np.float32
        rgb = (tile[0].transpose(1, 2, 0) * DEVIATION + MEAN) * 255
        np.testing.assert_allclose(rgb, np.round(rgb), atol=1e-3)
        assert 0 <= rgb.min() < 100 < rgb.max() <= 255.001
    assert not any(np.array_equal(check_tile(28), tile) for tile in tiles(28))


def test_relative_errors():
    exact = {"logits": np.array([3.0, 4.0]), "features": np.array([1.0])}
    errors = compare.relative_errors(exact, {"logits": np.array([3.0, 4.5])})
    assert errors == {"logits": pytest.approx(0.1)}


def results(**more):
    machine = {"cpu": "C", "threads": 2, "read_bandwidth_gb_s": None, "int8_gops": None}
    stack = {
        "name": "text alone",
        "peer": "edgevl",
        "text": "int4",
        "vision": None,
        "medians": {"prefill 8": 50.0, "decode": 20.0},
        "relative_error": {"logits": 0.25},
        "peak_rss_bytes": 5_000_000,
        "load_ms": 321.0,
    }
    return {
        "date": "2025-01-31",
        "machine": machine,
        "model": "m",
        "rounds": 3,
        "prompt_tokens": [8],
        "after": 8,
        "generate": 2,
        "stacks": [stack],
        "unavailable": {},
    } | more


def test_table():
    table = report.markdown(results())
    assert "C, 2 threads, 2025-01-31; m; medians of 3 interleaved rounds." in table
    assert "| text alone | 50 | 50.0 | – | – | – | 321 | 25.0% / – |" in table
    assert "Not measured" not in table


def test_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report.plot(results(), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("wrong", [["--rounds", "0"], ["--only", "nobody"], ["--threads", "x"]])
def test_wrong_arguments(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", "--work", str(tmp_path), *wrong])
    with pytest.raises(SystemExit) as stop:
        compare.main()
    assert stop.value.code == 2
    assert wrong[1] in capsys.readouterr().err
