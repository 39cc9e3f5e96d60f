"""What the README promises: the shipped model answers about the pictures in examples/."""

import json
import re

import pytest
from PIL import Image

from edgevl import cli
from edgevl.evaluate.boxes import Box, mean_iou, parse_boxes
from repository import ROOT


def ask(question, picture, *options):
    path = str(ROOT / "examples" / picture)
    return cli.main(["chat", "tiny", "-q", question, "-i", path, *options])


@pytest.mark.parametrize(
    ("picture", "question", "answer"),
    [
        ("meter.png", "What number is on the display?", "7305"),
        ("meter.png", "显示屏上的数字是多少？", "7305"),
        ("label.png", "What does the label say?", "2048"),
        ("handwriting.png", "What number is written here?", "916"),
        ("word.png", "What word is this?", "Coffee"),
    ],
)
def test_examples(capsys, picture, question, answer):
    assert ask(question, picture) == 0
    assert capsys.readouterr().out.strip().casefold() == answer.casefold()


@pytest.mark.parametrize(
    ("picture", "question", "value"),
    [
        ("meter.png", "Read the meter.", {"number": 7305}),
        ("meter.png", "读数是多少？", {"读数": "7305"}),
        ("word.png", "What word is this?", {"text": "Coffee"}),
        ("shapes.png", "How many shapes are there?", {"count": 4}),
        ("shapes.png", "What color is the star?", {"color": "purple"}),
    ],
)
def test_json_of_a_schema(capsys, tmp_path, picture, question, value):
    """The question need not speak of JSON, and nothing bounds a number but what is seen."""
    kinds = {int: "integer", str: "string"}
    properties = {key: {"type": kinds[type(item)]} for key, item in value.items()}
    schema = {"type": "object", "properties": properties, "required": list(value)}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema), "utf-8")
    assert ask(question, picture, "--json-schema", str(path)) == 0
    assert json.loads(capsys.readouterr().out) == value


def test_boxes_of_an_example(capsys, tmp_path):
    out = tmp_path / "found.png"
    assert ask("Where is the purple star?", "shapes.png", "--draw-boxes", str(out)) == 0
    star = Box(306 / 0.48, 30 / 0.36, 414 / 0.48, 133 / 0.36)  # of 480 x 360 pixels
    assert mean_iou(parse_boxes(capsys.readouterr().out), [star]) > 0.5
    assert Image.open(out).size == (480, 360)


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_links_of_the_readme_lead_somewhere(readme):
    text = (ROOT / readme).read_text("utf-8")
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
