"""The report of a quantization: both files, with all parts and with few."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from edgevl.quantize.report import charts, render_report, write_report

SETTINGS = {"text": {"value": "int4", "source": "default"}}
SIZES = {"original_bytes": 1_880_000_000, "quantized_bytes": 560_000_000}
REQUIRED = {"settings": SETTINGS, "sizes": SIZES}
PIXEL = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
LAYERS = [
    {"layer": i, "name": name, "rtn_error": 0.08 + i / 1000, "error": 0.03}
    for i in range(4)
    for name in MODULES
]

#: Every part, with made-up figures.
FULL = {
    "edgevl": "0.1.0",
    "model": "made-up",
    "created": "2026-01-02T03:04:05+00:00",
    "seconds": 725.4,
    "peak_rss_bytes": 3_210_000_000,
    "machine": {"cpu": "A processor", "threads": 2},
    "settings": {
        **SETTINGS,
        "seed": {"value": 0, "source": "command line"},
        "calibration_text": {"value": ["a.txt", "b.txt"], "source": "docs/quantization.md"},
        "calibration_images": {"value": None, "source": "default"},
    },
    "calibration": {
        "samples": 128,
        "tokens": 65_536,
        "image_tokens": 32_768,
        "sources": [
            {
                "kind": "captions",
                "count": 128,
                "tokens": 65_536,
                "image_tokens": 32_768,
                "origin": "pictures/",
            }
        ],
    },
    "sizes": {
        **SIZES,
        "text_bytes": 250_000_000,
        "vision_bytes": 300_000_000,
        "embedding_bytes": 10_000_000,
    },
    "text": {"format": "int4", "method": "gptq", "layers": LAYERS, "worst": LAYERS[-3:]},
    "vision": {
        "format": "int8",
        "layers": [
            {"name": f"layers.{i}.{name}", "plain_error": 0.02, "error": 0.01, "alpha": 0.5}
            | {"format": "int8" if i else "bf16"}
            for i in range(3)
            for name in ("attn.qkv", "mlp.fc2")
        ]
        + [
            {
                "name": "projector.fc1",
                "plain_error": 0.02,
                "error": 0.01,
                "alpha": None,
                "format": "int8",
            }
        ],
        "plain_feature_error": 0.031,
        "feature_error": 0.012,
    },
    "perplexity": {
        "source": "held-out text",
        "tokens": 8190,
        "original": 12.5,
        "rtn": 14.0,
        "quantized": 12.75,
    },
    "conversations": {
        "samples": 32,
        "tokens": 2048,
        "rtn": {"token_agreement": 0.91, "kl_divergence": 0.08},
        "quantized": {"token_agreement": 0.962, "kl_divergence": 0.0123},
    },
    "vqa": {
        "file": "questions.jsonl",
        "questions": 200,
        "original": 0.875,
        "quantized": 0.87,
        "families": {"numbers": {"original": 0.9, "quantized": 0.88}},
    },
    "examples": [
        {"picture": PIXEL, "question": "What is it?", "original": "A cat.", "quantized": "A cat."},
        {"picture": None, "question": "这是什么？", "original": "猫", "quantized": "狗"},
    ],
}


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on tags that do not nest."""

    VOID = ("meta", "input", "img", "br", "rect")

    def __init__(self, html):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], "", [], []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data.replace("\u00a0", " ")


def test_all_parts():
    page = Page(render_report(FULL))
    for expected in (
        *("made-up", "560 MB", "1.88 GB", "30%", "12.75", "+2.0%", "14.00", "+12.0%"),
        *("96.2%", "0.0123", "87.0%", "87.5%", "1.20%", "3.10%", "250 MB"),
        *("self_attn.q_proj", "attn.qkv", "A cat.", "狗", "a.txt, b.txt", "docs/quantization.md"),
        *("65,536", "pictures/", "12 min 5 s", "3.21 GB", "A processor", "量化报告"),
    ):
        assert expected in page.text, expected
    # Two rectangles for each layer, and one to hover over.
    assert page.tags.count("rect") == 3 * (len(LAYERS) + 7)
    assert page.tags.count("svg") == len(MODULES) + 3


def test_required_parts_alone():
    page = Page(render_report(REQUIRED))
    assert "560 MB" in page.text
    assert not {"svg", "img", "article"} & set(page.tags)
    unknown = dict.fromkeys(FULL) | REQUIRED
    assert "None" not in Page(render_report(unknown)).text


@pytest.mark.parametrize("part", [name for name in FULL if name not in REQUIRED])
def test_any_part_may_be_missing(part):
    for report in ({**FULL, part: None}, {**REQUIRED, part: FULL[part]}):
        assert "None" not in Page(render_report(report)).text


def test_figures_in_float_arithmetic_are_labelled():
    def labels(report):
        return render_report(report).count('class="tag"')

    engine = {**FULL["perplexity"], "arithmetic": "engine"}
    assert labels({**FULL, "perplexity": engine}) == labels(FULL) - 1


def test_texts_are_escaped():
    attack = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'&"
    example = {"picture": PIXEL, "question": attack, "original": attack, "quantized": attack}
    report = {
        **FULL,
        "model": attack,
        "settings": {attack: {"value": attack, "source": attack}},
        "examples": [example],
        "text": {**FULL["text"], "layers": [{**LAYERS[0], "name": attack}]},
        "vqa": {**FULL["vqa"], "families": {attack: {"original": 1.0, "quantized": 1.0}}},
    }
    page = Page(render_report(report))
    assert attack in page.text
    assert "script" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.tags.count("img") == 1


@pytest.mark.parametrize("picture", ["elsewhere.png", "//host/a.png", 'data:text/html,"<b>'])
def test_pictures_are_data_urls(picture):
    example = {"picture": picture, "question": "?", "original": "a", "quantized": "b"}
    assert "<img" not in render_report({**FULL, "examples": [example]})


def test_nothing_is_loaded_from_elsewhere():
    html = render_report(FULL)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<link|<script|<iframe", html)
    page = Page(html)
    for name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "action"):
            assert value.startswith("data:image/")


def test_json_round_trip(tmp_path):
    write_report(FULL, tmp_path / "new" / "directory")
    directory = tmp_path / "new" / "directory"
    assert json.loads((directory / "report.json").read_text("utf-8")) == FULL
    assert (directory / "report.html").read_text("utf-8") == render_report(FULL)


def test_json_of_other_types(tmp_path):
    """A long run must not end in an error because of a type, or of 0 / 0."""
    layer = {"layer": np.int64(0), "name": "mlp.up_proj", "rtn_error": np.float32(0.5)}
    text = {"format": "int4", "method": "gptq", "layers": [layer | {"error": float("nan")}]}
    settings = {"images": {"value": tmp_path, "source": "default"}, "n": {"value": (1, 2)}}
    write_report({"settings": settings, "sizes": SIZES, "text": text}, tmp_path)
    stored = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert stored["text"]["layers"] == [
        {"layer": 0, "name": "mlp.up_proj", "rtn_error": 0.5, "error": None}
    ]
    assert stored["settings"]["images"]["value"] == str(tmp_path)
    assert stored["settings"]["n"]["value"] == [1, 2]


def test_charts():
    errors = [("layers.0.fc1", 0.4, 0.1), ("layers.0.fc2", 0.2, None)]
    errors += [("layers.1.fc1", 0.2, 0.2), ("projector", 0.1, 0.1)]
    first, second, other = charts(errors)
    assert [chart["name"] for chart in (first, second, other)] == ["fc1", "fc2", ""]
    assert {chart["top"] for chart in (first, second, other)} == {0.4}
    assert [(b["before_height"], b["after_height"]) for b in first["bars"]] == [(60, 15), (30, 30)]
    assert second["bars"][0]["after_height"] == 0
    assert [b["x"] for b in first["bars"]] == [0, 10]
    assert charts([("0.a", 0.0, 0.0)])[0]["bars"][0]["before_height"] == 0
