"""The shipped model keeps what its card promises, on the questions it was never trained on."""

from pathlib import Path

import pytest

import edgevl
from edgevl.checkpoint import locate
from edgevl.evaluate import evaluate_vqa, read_questions

HELD_OUT = Path(__file__).parents[1] / "models" / "tiny" / "heldout" / "questions.jsonl"

#: Least share of right answers: two to five points below what the shipped weights reach, so that
#: rounding on another processor does not fail the test and a damaged engine or model does.
LEAST_ACCURACY = {
    "display": 0.96,
    "label": 0.96,
    "handwriting": 0.93,
    "words": 0.96,
    "shape_name": 0.97,
    "shape_count": 0.95,
    "shape_locate": 0.93,
}


@pytest.fixture(scope="module")
def families():
    """Accuracy by family over the whole held-out set."""
    questions = read_questions(HELD_OUT)
    assert len(questions) >= 500
    return evaluate_vqa(edgevl.load("tiny"), questions, max_tokens=64).to_dict()["families"]


def test_the_families_are_those(families):
    assert set(families) == set(LEAST_ACCURACY)


@pytest.mark.parametrize("family", LEAST_ACCURACY)
def test_held_out_accuracy(families, family):
    assert families[family] >= LEAST_ACCURACY[family]


def test_it_is_small():
    files = [path for path in locate("tiny").iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16 * 10**6
