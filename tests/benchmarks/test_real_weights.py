"""Formats of a trained checkpoint: the whole in miniature, without what Debian packages."""

import sys

import numpy as np
import pytest

import real_weights
from edgevl.engine import native_missing
from edgevl.evaluate import Comparison

TEXT = {"English": "The quick brown fox. ", "Chinese": "快速的棕色狐狸。", "code": "x = [1]\n"}


def test_total_variation_is_half_the_distance():
    one, other = np.random.default_rng(0).normal(0, 3, (2, 5, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (one, other))
    assert real_weights.total_variation(one, other) == pytest.approx(abs(p - q).sum() / 2)
    apart = np.float32([[40, 0]]), np.float32([[0, 40]])
    assert real_weights.total_variation(*apart) == pytest.approx(1)


def test_only_what_is_chinese_is_chinese(monkeypatch, tmp_path):
    def written(directory, parts):
        for part in parts:
            (directory / part).write_text("快速 fox\n\nThe 快 quick fox")
        return {part: directory / part for part in parts}

    monkeypatch.setattr(real_weights, "make_corpus", written)
    texts = real_weights.collect(tmp_path)
    assert texts["heldout-Chinese"] == texts["calibration-Chinese"] == "快速 fox"
    assert texts["heldout-code"] == "快速 fox\n\nThe 快 quick fox"


def test_what_is_calibrated_on_is_not_measured_on():
    for parts in real_weights.TEXTS.values():
        calibration, heldout = (set(part.items()) for part in parts.values())
        assert not calibration & heldout


def test_rows_come_with_what_they_are_compared_with(tmp_path):
    found = real_weights.rows(tmp_path, tmp_path, "auto, INT4 head".partition(",")[0])
    assert [row.name for row in found] == ["bf16", "auto"]
    found = real_weights.rows(tmp_path, tmp_path, "GPTQ INT4;GPTQ INT4, INT4 head")
    assert [row.name for row in found] == ["bf16", "GPTQ INT4", "GPTQ INT4, INT4 head"]
    with pytest.raises(SystemExit, match="int3"):
        real_weights.rows(tmp_path, tmp_path, "int3")


@pytest.mark.skipif(native_missing() is not None, reason="no native engine")
def test_a_table(mini_checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(real_weights, "WINDOW", 20)
    monkeypatch.setattr(real_weights, "SEQUENCE", 8)
    texts = {
        f"{part}-{name}": TEXT[name] * 9 for name in TEXT for part in ("calibration", "heldout")
    }
    monkeypatch.setattr(real_weights, "collect", lambda work: texts)
    arguments = [
        mini_checkpoint("mini-qwen3"),
        "--work",
        tmp_path,
        "--only",
        "int8;auto, INT4 head",
    ]
    monkeypatch.setattr(sys, "argv", ["real_weights.py", *map(str, arguments), "--sequences", "3"])
    real_weights.main()
    printed = capsys.readouterr().out
    assert printed.count("| bf16 | ") == 3
    assert printed.count("| int8 | ") == 3
    assert printed.count(" | auto ") == 3
    assert np.load(tmp_path / "calibration.npy").shape == (3, 8)


def test_a_line_is_beside_its_reference():
    comparison = Comparison()
    ids = np.array([0, 1])
    comparison.add(np.float32([[0, 0], [0, 0]]), np.float32([[1, 0], [0, 1]]), ids)
    same = Comparison()
    same.add(np.zeros((2, 2), np.float32), np.zeros((2, 2), np.float32), ids)
    first, second = real_weights.rows(None, None, "auto")
    table = list(
        real_weights.lines([first, second], {"bf16": (same, 0.0), "auto": (comparison, 0.25)})
    )
    assert table[0] == "| bf16 | 2.000 | | | | |"
    # Probability e / (1 + e) of each token.
    assert table[1] == "| auto | 1.368 | bf16 -31.6% | 50.0% | 0.1201 | 0.250 |"
