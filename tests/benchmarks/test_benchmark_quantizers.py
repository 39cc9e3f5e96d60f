"""The comparison of quantizers: what is taken from pages, the checkpoint's twin, the table."""

import json

import numpy as np
import pytest

import corpus
import quantizer_table
import text_model
from edgevl.checkpoint import Checkpoint

SENTENCE = "This is a sentence that is long enough to be taken for one of a paragraph of prose."
PAGE = f"""<html><head><title>{SENTENCE}</title></head><body>
<ul class="docnav top"><li class="previous"><a href="x"><p>{SENTENCE}</p></a></li></ul>
<div class="chapter"><h1>1. Title&para;</h1>
<div class="para">{SENTENCE} It has <code>code &amp; a<br>break</code>:<pre>{SENTENCE}</pre></div>
<h2>1.1. Nothing below</h2>
<table><tr><td><p>{SENTENCE}</p></td></tr></table>
<h2>1.2. A list</h2>
<ul><li><p>{SENTENCE}</p></li><li>Too short.</li></ul>
</div></body></html>"""


def test_prose_of_a_page():
    assert corpus.prose(PAGE).split("\n\n") == [
        "1. Title",
        f"{SENTENCE} It has code & abreak:",
        "1.2. A list",
        SENTENCE,
    ]


def test_parts_are_of_different_packages():
    calibration, heldout = (set(packages) for packages in corpus.PARTS.values())
    assert not calibration & heldout


def test_a_text_model_alone_has_the_same_weights(mini_checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    source = mini_checkpoint("mini-llama", dtype="fp16")
    text_model.convert(source, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    stored = safetensors.load_file(tmp_path / "model.safetensors")
    with Checkpoint.open(source) as checkpoint:
        text = [name for name in checkpoint.names() if name.startswith("language_model.")]
        assert len(stored) == len(text)
        for name in text:
            np.testing.assert_array_equal(
                stored[text_model.plain_name(name)], checkpoint.tensor(name).astype(np.float16)
            )


def stack(name, perplexity, **more):
    return {"name": name, "perplexity": perplexity, **more}


def test_table():
    measured = {"wall_s": 90.0, "cpu_s": 150.0, "peak_rss_bytes": 2_500_000_000}
    results = {
        "group_size": 64,
        "calibration_shape": [128, 512],
        "heldout_shape": [50, 2048],
        "base_bytes": 1_000_000_000,
        "stacks": [
            stack("exact", 20.0, environment_bytes=1_000_000_000),
            stack("nearest", 24.0),
            stack("tool", 21.0, environment_bytes=1_250_000_000, **measured),
        ],
        "unavailable": {"broken": "no wheel"},
    }
    table = quantizer_table.markdown(results, "exact", "nearest")
    assert "groups of 64; calibrated on 128 x 512 tokens, measured on 50 x 2048." in table
    assert "| exact | 20.000 | – | – | – | – | 1000 | 0 |" in table
    assert "| tool | 21.000 | 75% | 1.5 | 2.5 | 2.5 GB | 1250 | 250 |" in table
    assert "- broken: no wheel" in table


def test_size_of_a_directory(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "a").write_bytes(b"123")
    (tmp_path / "inner" / "b").write_bytes(b"45")
    assert quantizer_table.directory_bytes(tmp_path) == 5
