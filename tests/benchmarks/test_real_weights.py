"""Formats of a trained checkpoint: the whole in miniature, without what Debian packages."""

import sys

import numpy as np
import pytest

import real_weights
from edgevl.engine import native_missing

TEXT = {"English": "The quick brown fox. ", "Chinese": "快速的棕色狐狸。", "code": "x = [1]\n"}


def test_totals_against_their_definitions():
    one, other = np.random.default_rng(0).normal(0, 3, (2, 5, 9)).astype(np.float32)
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (one.astype(np.float64), other))
    ids, totals = np.array([0, 8, 3, 3, 1]), real_weights.Totals()
    logs = [real_weights.log_probabilities(x) for x in (one, other)]
    totals.add(logs[0][:2], logs[1][:2], ids[:2])
    totals.add(logs[0][2:], logs[1][2:], ids[2:])
    assert totals.tokens == 5
    assert totals.perplexity == pytest.approx(np.exp(-np.log(q[range(5), ids]).mean()), rel=1e-5)
    assert totals.same == (p.argmax(1) == q.argmax(1)).sum()
    assert totals.divergence == pytest.approx((p * np.log(p / q)).sum(), rel=1e-4)
    assert totals.variation == pytest.approx(abs(p - q).sum() / 2, rel=1e-5)


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
    arguments += ["--sequences", 3, "--window", 20]
    monkeypatch.setattr(sys, "argv", ["real_weights.py", *map(str, arguments)])
    real_weights.main()
    printed = capsys.readouterr().out
    assert printed.count("| bf16 | ") == 3
    assert printed.count("| int8 | ") == 3
    assert printed.count(" | auto ") == 3
    assert np.load(tmp_path / "calibration.npy").shape == (3, 8)
    assert np.load(tmp_path / "heldout.npy").shape == (6, 20)


def test_a_line_is_beside_its_reference():
    ids = np.array([0, 1])
    even = real_weights.log_probabilities(np.zeros((2, 2), np.float32))
    other = real_weights.log_probabilities(np.float32([[1, 0], [0, 1]]))
    same, compared = real_weights.Totals(), real_weights.Totals()
    same.add(even, even, ids)
    compared.add(even, other, ids)
    rows = real_weights.rows(None, None, "auto")
    table = list(real_weights.lines(rows, {"bf16": same, "auto": compared}))
    assert table[0] == "| bf16 | 2.000 | | | | |"
    # Probabilities e / (1 + e), of the token that follows.
    assert table[1] == "| auto | 1.368 | bf16 -31.6% | 50.0% | 0.1201 | 0.231 |"
