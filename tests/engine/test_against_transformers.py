"""The reference engine against transformers' own InternVL: stored numbers, and live where it is."""

from contextlib import ExitStack

import numpy as np
import pytest

import transformers_reference as theirs
from edgevl.checkpoint import Checkpoint
from edgevl.engine import ReferenceEngine
from edgevl.loading import locate
from edgevl.preprocess import PromptEncoder
from one_sequence import OneSequence

LAYOUTS = ("internvl_chat", "hf")
CASES = [
    pytest.param(model, picture, layout, id=f"{model}-{picture}-{layout}")
    for model, picture in theirs.CASES
    for layout in LAYOUTS
]


@pytest.fixture(scope="module")
def open_model(mini_checkpoint, tmp_path_factory):
    """Return a function that opens a case's model in a layout."""
    with ExitStack() as stack:
        tiny = stack.enter_context(Checkpoint.open(locate("tiny")))
        twin = theirs.write_hf_twin(tiny, tmp_path_factory.mktemp("hf") / "tiny")

        def open_in(model, layout):
            if model in theirs.MINIS:
                return stack.enter_context(Checkpoint.open(mini_checkpoint(model, layout)))
            return tiny if layout == "internvl_chat" else stack.enter_context(Checkpoint.open(twin))

        yield open_in


@pytest.fixture(scope="module")
def live_results():
    """What transformers computed, by model and picture: the same for both of our layouts."""
    return {}


def relative_error(got, expected):
    """Return the largest difference, as a share of the largest magnitude."""
    return np.abs(got - expected).max() / np.abs(expected).max()


def compare(checkpoint, picture, expected):
    pixels, prompt = theirs.model_inputs(checkpoint, picture)
    np.testing.assert_array_equal(prompt, expected["prompt"])
    assert (len(pixels) > 1) == (picture == "several")

    engine = OneSequence(ReferenceEngine(checkpoint))
    features = engine.encode_images(pixels)
    assert relative_error(features, expected["features"]) < 1e-3

    embeddings = np.array(engine.embed(prompt))
    is_image = prompt == PromptEncoder(checkpoint).tokenizer.token_to_id("<IMG_CONTEXT>")
    embeddings[is_image] = features.reshape(-1, features.shape[-1])
    logits = engine.prefill(embeddings)
    assert relative_error(logits, expected["logits"]) < 1e-3

    greedy = []
    while len(greedy) < theirs.GREEDY_TOKENS:
        greedy.append(int(np.argmax(logits)))
        logits = engine.decode(greedy[-1])
    assert greedy == expected["greedy"].tolist()


@pytest.mark.parametrize(("model", "picture", "layout"), CASES)
def test_stored(model, picture, layout, open_model):
    prefix = f"{model}/{picture}/"
    with np.load(theirs.RESULTS) as stored:
        expected = {
            key.removeprefix(prefix): stored[key] for key in stored if key.startswith(prefix)
        }
    compare(open_model(model, layout), picture, expected)


@pytest.mark.parametrize(("model", "picture", "layout"), CASES)
def test_live(model, picture, layout, open_model, live_results):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    if (model, picture) not in live_results:
        live_results[model, picture] = theirs.compute(open_model(model, "hf"), picture)
    compare(open_model(model, layout), picture, live_results[model, picture])
