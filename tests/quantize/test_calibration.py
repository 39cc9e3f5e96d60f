"""Calibration: mixture, determinism, resuming, what a sample consists of; windows of text."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

import edgevl
from edgevl.loading import locate
from edgevl.preprocess import Message, PromptEncoder, prepare_picture
from edgevl.quantize.calibration import collect, collection, collection_key, load_set, save_set
from edgevl.quantize.calibration.collection import notes_on_size, widest_inputs
from edgevl.quantize.calibration.conversations import (
    ConversationLog,
    converse,
    heldout_count,
    kinds,
    requests,
    token_windows,
)
from edgevl.quantize.calibration.pictures import FoundPicture, drawn
from edgevl.quantize.settings import QuantizationError, QuantizationSettings

SETTINGS = QuantizationSettings(samples=8)


@pytest.fixture(scope="module")
def model():
    return edgevl.load("tiny", threads=1)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def calibration(model, work):
    """The default calibration, from 8 samples."""
    return collect(model, SETTINGS, work)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(" ".join(map(str, range(10_000, 16_000))))
    return path


@pytest.fixture
def images(tmp_path):
    directory = tmp_path / "images"
    directory.mkdir()
    for kind in range(5):
        drawn(kind, kind).save(directory / f"{kind}.png")
    return directory


def assert_equal(first, second):
    assert (first.examples, first.sources, first.notes) == (
        second.examples,
        second.sources,
        second.notes,
    )
    for one, other in zip(
        first.samples + first.heldout, second.samples + second.heldout, strict=True
    ):
        for name in ("token_ids", "embeddings", "is_image"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype
        assert one.reply_start == other.reply_start


def counts(calibration):
    return {(source["set"], source["kind"]): source["count"] for source in calibration.sources}


def test_the_default_is_drawn_pictures_and_conversations_without(calibration):
    assert len(calibration.samples) == len(calibration.heldout) == 8
    assert counts(calibration) == {
        ("calibration", "conversations about drawn pictures"): 6,
        ("calibration", "conversations without pictures"): 2,
        ("heldout", "conversations about drawn pictures"): 6,
        ("heldout", "conversations without pictures"): 2,
    }
    for name, samples in (("calibration", calibration.samples), ("heldout", calibration.heldout)):
        sources = [source for source in calibration.sources if source["set"] == name]
        assert sum(source["tokens"] for source in sources) == sum(
            len(sample.token_ids) for sample in samples
        )
        assert sum(source["image_tokens"] for source in sources) == sum(
            sample.is_image.sum() for sample in samples
        )
    for sample, example in zip(calibration.heldout, calibration.examples, strict=True):
        assert bool(example.pictures) == bool(sample.is_image.any())
        assert len(example.questions) == len(example.replies) >= 1


def test_a_sample_is_what_the_engine_read(model, calibration):
    engine, config = model.engine, model.checkpoint.config
    plan = requests(kinds(SETTINGS, 8), 0, False, max_tiles=config.max_tiles)
    checked = 0
    for request, sample in zip(plan, calibration.samples, strict=True):
        if len(request.questions) > 1:
            continue
        pictures = [
            prepare_picture(drawn(p.place, p.seed), config, request.max_tiles)
            for p in request.pictures
        ]
        prompt = model.prompts.encode([Message.user(request.questions[0], pictures)])
        assert sample.reply_start == len(prompt.token_ids)
        np.testing.assert_array_equal(sample.token_ids[: sample.reply_start], prompt.token_ids)
        expected = np.array(engine.embed(sample.token_ids))
        is_image = np.zeros(len(expected), bool)
        for span in prompt.images:
            features = engine.encode_images(span.picture.pixels)
            place = slice(span.start, span.start + span.length)
            expected[place] = features.reshape(-1, features.shape[-1])
            is_image[place] = True
        np.testing.assert_array_equal(sample.is_image, is_image)
        np.testing.assert_array_equal(sample.embeddings, expected)
        checked += is_image.any()
    assert checked >= 2


def test_a_sample_ends_with_the_reply_and_its_end_of_turn(model, calibration, work):
    lines = (work / "conversations.jsonl").read_text("utf-8").splitlines()[1:]
    finished = 0
    samples = calibration.samples + calibration.heldout
    for line, sample in zip(map(json.loads, lines), samples, strict=True):
        reply = line["replies"][-1]
        said = sample.token_ids[sample.reply_start :].tolist()
        assert said[: len(reply["token_ids"])] == reply["token_ids"]
        rest = said[len(reply["token_ids"]) :]
        if reply["finish_reason"] == "stop":
            assert rest == [model.prompts.tokenizer.token_to_id("<|im_end|>")]
            finished += 1
        else:
            assert rest == []
    assert finished


def test_an_interrupted_collection_goes_on_to_the_same_result(calibration, tmp_path, monkeypatch):
    def interrupt(done, total):
        assert total == 16
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect(edgevl.load("tiny", threads=1), SETTINGS, tmp_path, interrupt)
    log = tmp_path / "conversations.jsonl"
    assert len(log.read_bytes().splitlines()) == 1 + 5
    with log.open("ab") as file:
        file.write(b'{"request": "broken off')
    asked = []
    monkeypatch.setattr(
        collection,
        "converse",
        lambda model, request, images: asked.append(request) or converse(model, request, images),
    )
    resumed = collect(edgevl.load("tiny", threads=1), SETTINGS, tmp_path)
    assert len(asked) == 16 - 5
    assert_equal(resumed, calibration)
    assert len([json.loads(line) for line in log.read_text("utf-8").splitlines()]) == 1 + 16


def test_every_kind_of_model_can_be_asked(mini_checkpoint, preset, tmp_path):
    model = edgevl.load(mini_checkpoint(preset), threads=1)
    result = collect(model, SETTINGS, tmp_path)
    save_set(tmp_path / "set", result)
    assert_equal(load_set(tmp_path / "set", model.checkpoint), result)
    assert all(0 < s.reply_start < len(s.token_ids) for s in result.samples + result.heldout)


def test_what_was_saved_is_loaded_without_an_engine(model, calibration, tmp_path):
    save_set(tmp_path / "set", calibration)
    assert_equal(load_set(tmp_path / "set", model.checkpoint), calibration)


def test_other_settings_have_another_key(model):
    keys = {collection_key(model.checkpoint, SETTINGS)}
    for other in (replace(SETTINGS, seed=1), replace(SETTINGS, samples=9)):
        keys.add(collection_key(model.checkpoint, other))
    assert len(keys) == 3


def test_conversations_of_another_checkpoint_are_dropped(model, work, calibration, tmp_path):
    shutil.copy(work / "conversations.jsonl", tmp_path)
    request = requests(kinds(SETTINGS, 8), 0, False, max_tiles=2)[0]
    log = ConversationLog(tmp_path / "conversations.jsonl", model.checkpoint.fingerprint())
    assert log.replies(request)
    log = ConversationLog(tmp_path / "conversations.jsonl", "another")
    assert log.replies(request) is None


def test_text_alone_goes_with_drawn_pictures(model, text, tmp_path):
    result = collect(model, replace(SETTINGS, calibration_text=(text,)), tmp_path)
    assert counts(result) == {
        (name, kind): 4
        for name in ("calibration", "heldout")
        for kind in ("conversations about drawn pictures", "windows of text")
    }
    windows = [sample for sample in result.samples + result.heldout if sample.reply_start == 0]
    assert [example is None for example in result.examples] == [
        sample.reply_start == 0 for sample in result.heldout
    ]
    # The text counts up: windows that share no word are of different places.
    words = [
        set(model.prompts.tokenizer.decode(sample.token_ids.tolist()).split()[1:-1])
        for sample in windows
    ]
    assert len(windows) == 8
    assert sum(map(len, words)) == len(set.union(*words))
    assert not windows[0].is_image.any()
    np.testing.assert_array_equal(windows[0].embeddings, model.engine.embed(windows[0].token_ids))


def test_text_only_has_no_pictures(model, text, images, tmp_path):
    settings = replace(SETTINGS, calibration_text=(text,), calibration_images=images)
    result = collect(model, settings, tmp_path, text_only=True)
    assert {source["kind"] for source in result.sources} == {"windows of text"}


def test_the_users_pictures_are_used_again_with_other_questions(model, images, tmp_path):
    (images / "broken.png").write_bytes(b"no picture")
    result = collect(model, replace(SETTINGS, calibration_images=images), tmp_path)
    assert counts(result)["calibration", "conversations about pictures"] == 6
    assert counts(result)["calibration", "conversations without pictures"] == 2
    assert f"{images}: 1 of its files cannot be read as pictures" in result.notes
    assert any("5 different pictures for 12 conversations" in note for note in result.notes)


def test_mixtures():
    both = replace(SETTINGS, calibration_text=("t",), calibration_images="i")
    assert kinds(both, 4) == ["pictures", "window"] * 2
    assert kinds(replace(both, calibration_text=()), 4) == ["pictures"] * 3 + ["chat"]
    assert kinds(replace(both, calibration_images=None), 2) == ["drawn", "window"]
    assert kinds(SETTINGS, 4, text_only=True) == ["chat"] * 4
    assert heldout_count(8) == 8
    assert heldout_count(256) == 32


def test_plans_are_varied_and_those_held_out_are_others():
    plans = [requests(kinds(SETTINGS, 200), 0, heldout) for heldout in (False, True)]
    assert plans[0] == requests(kinds(SETTINGS, 200), 0, False)
    assert plans[0][:50] == requests(kinds(SETTINGS, 50), 0, False)
    assert plans[0] != requests(kinds(SETTINGS, 200), 1, False)
    pictures = [{p for request in plan for p in request.pictures} for plan in plans]
    assert pictures[0].isdisjoint(pictures[1])
    chats = [{r.questions[0] for r in plan if r.kind == "chat"} for plan in plans]
    assert chats[0].isdisjoint(chats[1])
    assert len(chats[0]) == 50
    requested = plans[0]
    chinese = sum(not request.questions[0].isascii() for request in requested)
    assert 90 <= chinese <= 110
    assert 30 <= sum(len(request.questions) == 2 for request in requested) <= 70
    assert 8 <= sum(len(request.pictures) == 2 for request in requested) <= 30
    assert {request.max_tiles for request in requested} == {1, 2, 3, 4}
    assert sum(request.max_tiles == 1 for request in requested) > 130
    assert not any("{subject}" in r.questions[0] or "{topic}" in r.questions[0] for r in requested)
    assert len({request.digest for request in requested}) == 200


def test_a_picture_is_asked_about_differently_each_time():
    found = [FoundPicture(0, "0" * 64), FoundPicture(1, "1" * 64)]
    plan = requests(["pictures"] * 30, 0, False, found)
    alone = [(r.pictures, r.questions[0]) for r in plan if len(r.pictures) == 1]
    assert len(set(alone)) == len(alone) > 20


def test_too_few_samples(model, tmp_path):
    with pytest.raises(QuantizationError, match=r"samples is 7: 8 is the least .* 128 the default"):
        collect(model, replace(SETTINGS, samples=7), tmp_path)


def test_fewer_tokens_than_inputs(model, calibration, monkeypatch):
    tokens = sum(len(sample.token_ids) for sample in calibration.samples)
    assert widest_inputs(model.checkpoint) == 384
    monkeypatch.setattr(collection, "widest_inputs", lambda checkpoint: tokens + 1)
    message = rf"samples is 8: they have {tokens} tokens, fewer than the {tokens + 1} inputs of"
    with pytest.raises(QuantizationError, match=message + r".* at least 9"):
        notes_on_size(calibration.samples, model.checkpoint)
    monkeypatch.setattr(collection, "widest_inputs", lambda checkpoint: tokens // 2)
    (note,) = notes_on_size(calibration.samples, model.checkpoint)
    assert f"{tokens} tokens" in note
    monkeypatch.setattr(collection, "widest_inputs", lambda checkpoint: tokens // 4)
    assert notes_on_size(calibration.samples, model.checkpoint) == []


def test_one_picture_cannot_be_kept_apart(model, tmp_path):
    drawn(0, 0).save(tmp_path / "only.png")
    with pytest.raises(QuantizationError, match="one readable picture only; at least 2"):
        collect(model, replace(SETTINGS, calibration_images=tmp_path), tmp_path)


# --- windows of text -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    with edgevl.Checkpoint.open(locate("tiny")) as checkpoint:
        return PromptEncoder(checkpoint).tokenizer


def numbers(begin, end):
    return " ".join(map(str, range(begin, end)))


def test_windows_do_not_overlap_and_are_evenly_spread(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(numbers(10_000, 20_000))
    (tmp_path / "b.txt").write_text(numbers(20_000, 30_000))
    windows = token_windows([tmp_path / "a.txt", tmp_path / "b.txt"], tokenizer, 10)
    assert {len(window) for window in windows} == {512}
    words = [tokenizer.decode(window).split()[1:-1] for window in windows]  # whole ones
    assert all(words)
    firsts = [int(window[0]) for window in words]
    assert firsts == sorted(firsts)
    assert firsts[0] < 12_500
    assert firsts[-1] > 27_500
    assert all(int(w[-1]) < first for w, first in zip(words, firsts[1:], strict=False))


def test_a_short_text_gives_shorter_windows(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text(numbers(1000, 1400))
    found = len(tokenizer.encode(numbers(1000, 1400), add_special_tokens=False).ids)
    count = found // 200
    windows = token_windows([tmp_path / "a.txt"], tokenizer, count)
    assert {len(window) for window in windows} == {found // count}
    assert {len(w) for w in token_windows([tmp_path / "a.txt"], tokenizer, 2, longest=50)} == {50}


def test_too_little_text_says_how_much_there_is_and_is_needed(tmp_path, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(numbers(0, 100))
    found = len(tokenizer.encode(numbers(0, 100), add_special_tokens=False).ids)
    message = rf"a\.txt: {found} tokens of text, 1152 are needed for 9 windows; give more text"
    with pytest.raises(QuantizationError, match=message):
        token_windows([path], tokenizer, 9)
    with pytest.raises(QuantizationError, match=rf"a\.txt and 1 more: {found} tokens"):
        token_windows([path, path], tokenizer, 9)  # the same text counts once


def test_files_that_cannot_be_read(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.txt"
    with pytest.raises(QuantizationError, match=r"a\.txt: no such file"):
        token_windows([path], tokenizer, 1)
    path.write_bytes(b"good \xff bad")
    with pytest.raises(QuantizationError, match=r"a\.txt: not UTF-8 at byte 5: convert it"):
        token_windows([path], tokenizer, 1)
    monkeypatch.setattr(f"{token_windows.__module__}.MAX_FILE_BYTES", 5)
    with pytest.raises(QuantizationError, match=r"a\.txt: larger than"):
        token_windows([path], tokenizer, 1)
