# ruff: noqa: D103 - the names of the tests say what they test
"""Sanity of the generator and of the checkpoint: `pytest models/tiny/training`."""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import glyphs
import tokenizer as tiny_tokenizer
from checkpoint import load, new_model, rounded, save
from json_answers import KEYS, NEW_KEYS, json_turn
from pictures import DRAWERS, draw_shapes
from questions import FAMILIES, LANGUAGES
from samples import TILE, collate, conversation, family_question, single
from scenes import COLOURS, GLYPHS, PATCH_CLASSES, PATCHES, SHAPES, Style
from words import WORDS

KINDS = dict.fromkeys(DRAWERS, 1.0)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer.build()


@pytest.mark.parametrize("kind", DRAWERS)
def test_pictures_show_what_they_say(kind):
    rng = random.Random(kind)
    for _ in range(50):
        scene = DRAWERS[kind](rng, Style())
        shown = set(np.unique(np.asarray(scene.classes)).tolist()) - {0}
        assert scene.classes.size == scene.image.size
        assert max(shown) < PATCH_CLASSES
        if kind != "shapes":
            assert {GLYPHS[c - 1] for c in shown} == set(scene.text)


def test_shapes_lie_in_their_boxes():
    rng = random.Random(1)
    for _ in range(50):
        scene = draw_shapes(rng, Style())
        shown = np.asarray(scene.classes) > 0
        for shape in scene.shapes:
            x1, y1, x2, y2 = shape.box
            assert 0 <= x1 < x2 <= 1
            assert 0 <= y1 < y2 <= 1
            left, right = int(x1 * scene.image.width), int(x2 * scene.image.width) + 1
            top, bottom = int(y1 * scene.image.height), int(y2 * scene.image.height) + 1
            assert shown[top:bottom, left:right].mean() > 0.25


def test_heldout_digits_are_not_trained_on():
    trained, held = glyphs._handwritten_digits(False), glyphs._handwritten_digits(True)
    trained_images = {image.tobytes() for images in trained.values() for image in images}
    held_images = [image.tobytes() for images in held.values() for image in images]
    assert len(held_images) == 180
    assert not trained_images & set(held_images)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("language", LANGUAGES)
def test_questions_of_every_family(family, language, tokenizer):
    rng = random.Random(f"{family} {language}")
    for _ in range(20):
        scene, turn = family_question(rng, Style(), family, language)
        sample = single(tokenizer, scene, turn)
        written = [i for i, w in zip(sample.ids, sample.weights, strict=True) if w]
        text = tokenizer.decode(written, skip_special_tokens=False)
        assert text == turn.answer + tiny_tokenizer.END_OF_TURN


def test_counts_are_right():
    rng = random.Random(2)
    for _ in range(50):
        scene, turn = family_question(rng, Style(), "shape_count", "en")
        asked = [name for name in SHAPES if f" {name}" in turn.question.lower()]
        if asked:
            assert turn.answer == str(sum(s.name == asked[0] for s in scene.shapes))


def test_batches_hold_together(tokenizer):
    rng = random.Random(3)
    batch = collate([conversation(rng, tokenizer, Style(), KINDS) for _ in range(40)])
    images = tokenizer.token_to_id("<IMG_CONTEXT>")
    assert (batch.ids == images).sum() == len(batch.tiles) * (PATCHES // 2) ** 2
    assert batch.tiles.shape[1:] == (TILE, TILE, 3)
    assert batch.classes.shape == (len(batch.tiles), PATCHES, PATCHES)
    tiles, middles = batch.middles.T
    middle_classes = batch.classes[tiles].flatten(1)[torch.arange(len(tiles)), middles]
    assert (middle_classes > len(GLYPHS)).all()


def test_every_text_survives_the_tokenizer(tokenizer):
    for text in ("Ångström 9%", "龘 🙂", "\x00\x7f", "a" * 300):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_checkpoint_comes_back(tokenizer, tmp_path):
    torch.manual_seed(0)
    model = new_model(tokenizer).eval()
    save(model, tokenizer, tmp_path)
    again, _ = load(tmp_path)
    for name, value in model.state_dict().items():
        stored = again.state_dict()[name]
        assert torch.equal(stored, rounded(value).float()), name
        bound = 2.0**-7 if value.ndim > 1 else 2.0**-8  # half a step, and half of bfloat16's
        assert torch.all((stored - value).abs() <= 1.5 * bound * value.abs()), name


@pytest.mark.parametrize("form", ["asked", "any", "schema", "told"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_json_answers_are_the_values_they_stand_for(form, language, tokenizer):
    rng = random.Random(f"{form} {language}")
    for kind in DRAWERS:
        for _ in range(30):
            scene = DRAWERS[kind](rng, Style(), size=(96, 96))
            turn = json_turn(rng, scene, language, form)
            if turn is None:
                continue
            assert json.loads(turn.answer) == turn.value
            sample = single(tokenizer, scene, turn)
            learned = [i for i, w in zip(sample.ids, sample.weights, strict=True) if w]
            text = tokenizer.decode(learned, skip_special_tokens=False)
            whole = turn.answer + tiny_tokenizer.END_OF_TURN
            if form in ("asked", "told"):  # nothing is forced
                assert text == whole
            elif form == "any":  # the object is, its keys are not
                assert text == whole[1:]
            elif isinstance(turn.value, dict):  # keys are, values are not
                assert not any(f'{key}":' in text for key in turn.value)
            if kind == "word":
                assert list(turn.value.values()) == [scene.text]
            elif kind != "shapes":
                assert [int(value) for value in turn.value.values()] == [int(scene.text)]


def test_counts_and_lists_in_json_are_right():
    rng = random.Random(4)
    for _ in range(100):
        scene = draw_shapes(rng, Style())
        counted = json_turn(rng, scene, "en", "told", "count")
        asked = [s for s in (*SHAPES, *COLOURS) if s in counted.question.lower()]
        shown = [s for s in scene.shapes if not asked or asked[0] in (s.name, s.colour)]
        assert counted.value == {"count": len(shown)}
        listed = json_turn(rng, scene, "en", "told", "all").value["shapes"]
        assert [(s["shape"], s["color"]) for s in listed] == [
            (s.name, s.colour) for s in scene.shapes
        ]
        for item, shape in zip(listed, scene.shapes, strict=True):
            if "box" in item:
                np.testing.assert_allclose(np.array(item["box"]) / 1000, shape.box, atol=0.006)


def test_new_keys_are_new():
    for concept, names in NEW_KEYS.items():
        for language in LANGUAGES:
            trained = {name for of in KEYS.values() for name in of[language].lower().split()}
            assert not {*trained, *WORDS} & set(names[language].lower().split()), concept
