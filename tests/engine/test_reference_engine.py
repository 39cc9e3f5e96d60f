"""The reference engine: its cache, whatever way a sequence is cut, gives the same numbers."""

import dataclasses

import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint
from edgevl.engine import ReferenceEngine
from edgevl.errors import EdgeVLError
from edgevl.loading import load_engine
from edgevl.machine import this_machine
from edgevl.options import LoadOptions
from one_sequence import OneSequence

PRESETS = ["mini-qwen3", "mini-qwen2", "mini-llama", "mini-6b"]

# Cutting a sequence differently changes the order in which float32 sums are taken, no more: sums of
# some hundred terms in a handful of layers, each to 2**-24 of its largest term.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(params=PRESETS)
def checkpoint(request, mini_checkpoint):
    with Checkpoint.open(mini_checkpoint(request.param, "internvl_chat")) as opened:
        yield opened


def random_ids(checkpoint, count, seed=0):
    return np.random.default_rng(seed).integers(0, checkpoint.config.text.vocab_size, count)


def prefill(engine, ids):
    return engine.prefill(engine.embed(ids))


@pytest.mark.parametrize("chunk", [1, 2, 15, 16, 17, 128])
def test_chunks_do_not_change_the_logits(checkpoint, chunk):
    ids = random_ids(checkpoint, 40)
    whole = prefill(OneSequence(ReferenceEngine(checkpoint, chunk=1000)), ids)
    cut = prefill(OneSequence(ReferenceEngine(checkpoint, chunk=chunk)), ids)
    np.testing.assert_allclose(cut, whole, **TOLERANCE)


def test_decoding_equals_prefill(checkpoint):
    ids = random_ids(checkpoint, 12)
    engine = OneSequence(ReferenceEngine(checkpoint))
    step = prefill(engine, ids[:1])
    for length in range(1, 12):
        step = engine.decode(int(ids[length]))
        whole = prefill(OneSequence(ReferenceEngine(checkpoint)), ids[: length + 1])
        np.testing.assert_allclose(step, whole, **TOLERANCE)
    assert engine.length == 12


def test_extending_gives_the_logits_of_every_step(checkpoint):
    ids = random_ids(checkpoint, 9)
    engine = OneSequence(ReferenceEngine(checkpoint))
    prefill(engine, ids[:4])
    steps = [engine.decode(int(token_id)) for token_id in ids[4:]]
    engine.rewind(4)
    np.testing.assert_allclose(engine.extend(ids[4:]), steps, **TOLERANCE)
    assert engine.length == 9
    with pytest.raises(ValueError, match="0 tokens"):
        engine.extend([])


def test_sequences_do_not_mix(checkpoint):
    engine = ReferenceEngine(checkpoint)
    together, alone = ([OneSequence(engine) for _ in range(2)] for _ in range(2))
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        ids = random_ids(checkpoint, 5 + number, number)
        prefill(one, ids)
        prefill(other, ids)
    logits = engine.decode([each.sequence for each in together], [7, 8])
    np.testing.assert_array_equal(logits, [alone[0].decode(7), alone[1].decode(8)])
    assert [each.length for each in together] == [6, 7]


def test_the_past_matters_and_the_future_does_not(checkpoint):
    ids = random_ids(checkpoint, 20)
    other = ids.copy()
    other[3] = (other[3] + 1) % checkpoint.config.text.vocab_size
    engine = OneSequence(ReferenceEngine(checkpoint, chunk=7))
    first = prefill(engine, ids[:10])
    prefill(engine, ids[10:])
    np.testing.assert_allclose(
        first, prefill(OneSequence(ReferenceEngine(checkpoint)), ids[:10]), **TOLERANCE
    )
    changed = prefill(OneSequence(ReferenceEngine(checkpoint)), other[:10])
    assert np.abs(changed - first).max() > 1e-3


def test_rewind_forgets_exactly_what_came_after(checkpoint):
    ids, other = random_ids(checkpoint, 30), random_ids(checkpoint, 30, seed=1)
    engine = OneSequence(ReferenceEngine(checkpoint))
    prefill(engine, np.concatenate((ids[:10], other)))
    engine.rewind(10)
    assert engine.length == 10
    expected = prefill(OneSequence(ReferenceEngine(checkpoint)), ids)
    np.testing.assert_allclose(prefill(engine, ids[10:]), expected, **TOLERANCE)


def test_the_cache_refuses_what_does_not_fit(checkpoint):
    engine = OneSequence(ReferenceEngine(checkpoint, max_context=8))
    ids = random_ids(checkpoint, 9)
    with pytest.raises(ValueError, match="exceed 8"):
        prefill(engine, ids)
    assert engine.length == 0
    prefill(engine, ids[:8])
    with pytest.raises(ValueError, match="exceed 8"):
        engine.decode(0)
    with pytest.raises(ValueError, match="rewind to 9"):
        engine.rewind(9)
    with pytest.raises(ValueError, match="0 tokens"):
        engine.prefill(engine.embed(ids[:0]))


def test_max_context_is_at_most_the_models(checkpoint):
    limit = checkpoint.config.text.max_position_embeddings
    assert ReferenceEngine(checkpoint).max_context == limit
    assert ReferenceEngine(checkpoint, max_context=limit + 1).max_context == limit


def test_tiles_are_encoded_independently(checkpoint):
    size = checkpoint.config.vision.image_size
    pixels = np.random.default_rng(2).standard_normal((3, 3, size, size), np.float32)
    engine = ReferenceEngine(checkpoint)
    features = engine.encode_images(pixels)
    assert features.shape == (3, checkpoint.config.image_tokens, checkpoint.config.text.hidden_size)
    np.testing.assert_array_equal(engine.encode_images(pixels[1:2])[0], features[1])


def test_timings_count_work(checkpoint):
    engine = OneSequence(ReferenceEngine(checkpoint))
    before = engine.timings()
    prefill(engine, random_ids(checkpoint, 5))
    engine.decode(1)
    after = engine.timings()
    assert (before.prefill_tokens, before.decode_tokens, before.tiles) == (0, 0, 0)
    assert (after.prefill_tokens, after.decode_tokens, after.tiles) == (5, 1, 0)
    assert after.prefill_ms > 0
    assert after.decode_ms > 0
    assert after.vision_ms == 0


def test_an_unknown_engine_names_the_known(checkpoint):
    with pytest.raises(EdgeVLError, match="'gpu' is unknown: choose auto, cpu, reference"):
        load_engine(checkpoint, LoadOptions("gpu"))


def test_too_little_memory_gives_both_numbers(checkpoint, monkeypatch):
    machine = dataclasses.replace(this_machine(), available_bytes=2**10)
    monkeypatch.setattr("edgevl.engine.reference.this_machine", lambda: machine)
    with pytest.raises(EdgeVLError, match=r"needs 0\.0 GiB .* 0\.0 GiB are free"):
        ReferenceEngine(checkpoint)


@pytest.mark.parametrize("limit", [0, -5])
def test_a_context_of_nothing_is_refused(checkpoint, limit):
    with pytest.raises(EdgeVLError, match=f"max_context is {limit}"):
        load_engine(checkpoint, LoadOptions(max_context=limit))
