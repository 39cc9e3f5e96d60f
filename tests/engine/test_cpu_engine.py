"""The native engine against the reference, on the same weights.

Two comparisons. With `RoundedReference`, which rounds activations where the engine does, little is
left: float32 sums taken in another order (`CLOSE`), which now and then tip a value that lies
between two roundings to the other side. A systematic mistake changes every sequence, so some of
several must agree closely (`some_close`).

With `ReferenceEngine` itself, the engine must stay within what rounding implies (`bound`):

- A value rounded to steps of size s is off by s / sqrt(12) (root mean square of a uniform error).
  int8: s = peak / 127, and the peak of a group is about 3 times its root mean square for the normal
  values that random weights give; so a rounded vector is off by 3 / (127 sqrt(12)) of itself.
  bfloat16 has 8 bits: off by at most 2**-9 of itself, uniformly 2**-9 / sqrt(3).
- A product with a matrix takes errors and values alike: its outputs are off by the same share.
- Errors of different roundings are independent, so n of them are off by sqrt(n) of one. The
  residual stream carries them on, and norms keep the share. A text layer rounds the inputs of qkv,
  o and down, and of gate and up, whose errors meet in a product; with bfloat16 everywhere also q,
  k, v and the weights of attention. A vision layer has one matrix in place of gate and up. Then the
  projector's two, or the head's.
- An int8 cache rounds keys and values to int8, two roundings a layer.
- Softmax and the gates amplify what they are given, by a factor that depends on the weights; it is
  taken to be 3 at most.
"""

import dataclasses
import errno
import json
import math
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint, GPTQConfig, expected_tensors, parse_config
from edgevl.checkpoint.architecture import EMBEDDING, vision_linears
from edgevl.engine import ReferenceEngine
from edgevl.errors import CheckpointError, EdgeVLError
from edgevl.loading import load_engine
from edgevl.options import KV_CACHE_FORMATS, LoadOptions

native = pytest.importorskip("edgevl._native", reason="the native engine is not built")

from dequantized import Dequantized, RoundedReference  # noqa: E402
from edgevl.checkpoint.architecture import head_weight, vision_layers  # noqa: E402
from edgevl.engine import cpu  # noqa: E402
from edgevl.engine.cpu import CpuEngine  # noqa: E402
from edgevl.machine import this_machine  # noqa: E402
from one_sequence import OneSequence  # noqa: E402
from random_inputs import off, random_ids, random_tiles  # noqa: E402
from storage import CHAT, TEXT, changed, random_tensors, write_directory  # noqa: E402
from stored_gptq import gptq_checkpoint  # noqa: E402

ISAS = native.instruction_sets()
#: Of a weight of attention, where one factor of a product of bytes has no sign.
WEIGHT_STEPS = dict.fromkeys(("avx512bf16", "avx512", "avxvnni", "portable"), 255)
#: Formats whose logits come from one head, and so are comparable as a whole.
PRECISIONS = ["int8", "bf16"]
#: Of the root mean square: float32 sums of some hundred terms in another order, and a fast exp.
CLOSE = 1e-3
LENGTHS = [1, 2, 3, 5, 15, 16, 17, 65]


def bound(precision, roundings):
    share = {"int8": 3 / (127 * math.sqrt(12)), "bf16": 2**-9 / math.sqrt(3)}[precision]
    return 3 * share * math.sqrt(roundings)


def text_bound(config, precision, kv_cache="bf16"):
    layers = config.text.num_hidden_layers
    others = bound(precision, (9 if precision == "bf16" else 5) * layers + 1)
    return math.hypot(others, bound("int8", 2 * layers) if kv_cache == "int8" else 0)


def vision_bound(config, precision):
    return bound(precision, (8 if precision == "bf16" else 7) * vision_layers(config) + 2)


def prefill(engine, ids):
    """Append tokens; a copy of the last logits."""
    return engine.prefill(engine.embed(ids)).copy()


def some_close(shares):
    """Whether a third are close; by chance, none would be."""
    return np.mean(np.array(shares) < CLOSE) > 0.3


@pytest.fixture(scope="module")
def pool():
    return native.ThreadPool(2)


@pytest.fixture
def checkpoint(mini_checkpoint, preset):
    with Checkpoint.open(mini_checkpoint(preset)) as opened:
        yield opened


@pytest.fixture
def qwen3(mini_checkpoint):
    with Checkpoint.open(mini_checkpoint("mini-qwen3")) as opened:
        yield opened


@pytest.fixture
def large_biases(mini_checkpoint, tmp_path):
    """Qwen2 with biases of keys up to a hundred times the keys, in slow pairs of channels."""
    directory = mini_checkpoint("mini-qwen2")
    with Checkpoint.open(directory) as original:
        tensors = {name: np.array(original.tensor(name)) for name in original.names()}
        head_dim = original.config.text.head_dim
    for name, values in tensors.items():
        if name.endswith("k_proj.bias"):
            heads = values.reshape(-1, head_dim)
            heads[0, [-1, -2, head_dim // 2 - 1]] = 200, -150, 90
            heads[1, head_dim // 2 - 3] = 30
    config = json.loads((directory / "config.json").read_text())
    with Checkpoint.open(write_directory(tmp_path / "biases", config, tensors)) as opened:
        yield opened


# --- the same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "kv_cache"), [("int8", "bf16"), ("bf16", "bf16"), ("bf16", "int8")]
)
def test_text_agrees_with_the_reference(checkpoint, precision, kv_cache, pool):
    dequantized = Dequantized(checkpoint, precision, pool)
    rounded, exact = RoundedReference(dequantized, kv_cache), ReferenceEngine(dequantized)
    options = {"precision": precision, "kv_cache": kv_cache, "threads": 2}
    engines = {isa: CpuEngine(checkpoint, LoadOptions(**options), isa=isa) for isa in ISAS}
    limit = text_bound(checkpoint.config, precision, kv_cache)
    shares = {isa: [] for isa in ISAS}
    for seed, length in enumerate(LENGTHS):
        ids = random_ids(checkpoint, length + 1, seed)
        results = []
        for engine in map(OneSequence, (rounded, exact, *engines.values())):
            prefilled = prefill(engine, ids[:-1])
            results.append(np.concatenate((prefilled, engine.decode(int(ids[-1])))))
        for isa, result in zip(ISAS, results[2:], strict=True):
            assert off(result, results[1]) < limit, (isa, length)
            shares[isa].append(off(result, results[0]))
    for isa in ISAS:
        assert some_close(shares[isa]), (isa, shares[isa])


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
def test_large_biases_of_keys(large_biases, kv_cache, pool):
    """Where positions hardly turn a pair of channels, its bias adds nearly the same to all scores.

    Softmax takes that away, so that the bound is what it is without biases.
    """
    dequantized = Dequantized(large_biases, "bf16", pool)
    rounded, exact = RoundedReference(dequantized, kv_cache), ReferenceEngine(dequantized)
    options = LoadOptions(precision="bf16", kv_cache=kv_cache, threads=2)
    limit = text_bound(large_biases.config, "bf16", kv_cache)
    for isa in ISAS:
        model = CpuEngine(large_biases, options, isa=isa)
        shares = []
        for seed, length in enumerate(LENGTHS):
            ids = random_ids(large_biases, length + 1, seed)
            results = []
            for engine in map(OneSequence, (rounded, exact, model)):
                prefilled = prefill(engine, ids[:-1])
                results.append(np.concatenate((prefilled, engine.decode(int(ids[-1])))))
            assert off(results[2], results[1]) < limit, (isa, length)
            shares.append(off(results[2], results[0]))
        assert some_close(shares), (isa, shares)


def vision_agrees(checkpoint, precision, pool):
    """Compare every instruction set with the reference, rounded alike and not at all."""
    dequantized = Dequantized(checkpoint, precision, pool)
    tiles = random_tiles(checkpoint, 3)
    rounded = {
        steps: RoundedReference(dequantized, weight_steps=steps).encode_images(tiles)
        for steps in {WEIGHT_STEPS.get(isa, 127) for isa in ISAS}
    }
    exact = ReferenceEngine(dequantized).encode_images(tiles)
    for isa in ISAS:
        model = CpuEngine(checkpoint, LoadOptions(precision=precision, threads=2), isa=isa)
        features = model.encode_images(tiles)
        assert features.shape == exact.shape
        assert off(features, exact) < vision_bound(checkpoint.config, precision), isa
        # Token by token: what is tipped in one layer is seen by all tokens, but tips few of them.
        shares = [
            off(ours, theirs)
            for ours, theirs in zip(
                features.reshape(-1, features.shape[-1]),
                rounded[WEIGHT_STEPS.get(isa, 127)].reshape(-1, features.shape[-1]),
                strict=True,
            )
        ]
        assert some_close(shares), isa


@pytest.mark.parametrize("precision", PRECISIONS)
def test_vision_agrees_with_the_reference(checkpoint, precision, pool):
    vision_agrees(checkpoint, precision, pool)


@pytest.mark.parametrize("kept", [slice(0, None, 3), slice(1, None, 2), slice(4)])
def test_vision_with_layers_kept_in_bfloat16(checkpoint, kept, pool):
    """qkv of one layer, what follows it in both, or one layer whole."""
    keep = tuple(vision_linears(checkpoint.config)[kept])
    checkpoint.config = dataclasses.replace(checkpoint.config, vision_keep=keep)
    vision_agrees(checkpoint, "int8", pool)


@pytest.mark.parametrize("select_layer", [-2, 1, 0])
@pytest.mark.parametrize("ps_version", ["v1", "v2"])
def test_selected_layers_and_both_shuffles(qwen3, pool, select_layer, ps_version):
    qwen3.config = dataclasses.replace(
        qwen3.config, select_layer=select_layer, ps_version=ps_version
    )
    tiles = random_tiles(qwen3, 1)
    expected = RoundedReference(Dequantized(qwen3, "bf16", pool)).encode_images(tiles)
    features = CpuEngine(qwen3, LoadOptions(precision="bf16", threads=2)).encode_images(tiles)
    assert off(features, expected) < 2 * CLOSE


def test_all_biases_and_stored_types(tmp_path, pool):
    """A Llama with every bias there is, each far from zero; F32 and F16 as stored types."""
    text = {**TEXT, "model_type": "llama", "attention_bias": True, "mlp_bias": True}
    _, config = parse_config(changed(CHAT, "llm_config", text), "config.json")
    tensors = random_tensors(expected_tensors(config))
    for value in tensors.values():
        if value.ndim > 1:
            value /= np.float32(math.sqrt(math.prod(value.shape[1:])))
    for dtype in ("F32", "F16"):
        directory = write_directory(
            tmp_path / dtype, changed(CHAT, "llm_config", text), tensors, dtype
        )
        with Checkpoint.open(directory) as checkpoint:
            rounded = OneSequence(RoundedReference(Dequantized(checkpoint, "int8", pool)))
            engine = OneSequence(CpuEngine(checkpoint, LoadOptions(precision="int8", threads=2)))
            shares = []
            for seed, length in enumerate(LENGTHS):
                ids = random_ids(checkpoint, length, seed)
                engine.rewind(0)
                rounded.rewind(0)
                shares.append(off(prefill(engine, ids), prefill(rounded, ids)))
            assert some_close(shares), (dtype, shares)


@pytest.mark.parametrize("precision", ["auto", "int4"])
def test_the_int4_head_is_exact_for_the_best(checkpoint, precision, pool):
    dequantized = Dequantized(checkpoint, precision, pool)
    rounded = RoundedReference(dequantized)
    weight = checkpoint.tensor(head_weight(checkpoint.config.text))
    model = CpuEngine(checkpoint, LoadOptions(precision=precision, threads=3))
    best_shares, other_shares = [], []
    for seed, length in enumerate(LENGTHS):
        ids = random_ids(checkpoint, length, seed)
        hidden = rounded._decoder(rounded.new_sequence(), rounded.embed(ids))[-1]
        coarse = rounded._logits(hidden)
        exact = weight @ rounded._text_norm("language_model.model.norm", hidden)
        order = np.argsort(-coarse)
        best, others = order[:50], order[80:]
        logits = prefill(OneSequence(model), ids)
        best_shares.append(off(logits[best], exact[best]))
        other_shares.append(off(logits[others], coarse[others]))
        assert off(coarse[best], exact[best]) > 10 * CLOSE  # else this would prove nothing
    assert some_close(best_shares)
    assert some_close(other_shares)


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_every_context_up_to_the_limit(checkpoint, isa, kv_cache, pool):
    """Through the blocks of the cache, a position at a time."""
    limit = 131
    dequantized = Dequantized(checkpoint, "bf16", pool)
    rounded = OneSequence(RoundedReference(dequantized, kv_cache, max_context=limit))
    options = LoadOptions(max_context=limit, precision="bf16", kv_cache=kv_cache, threads=2)
    engine = OneSequence(CpuEngine(checkpoint, options, isa=isa))
    shares = []
    for token_id in random_ids(checkpoint, limit).tolist():
        expected = rounded.decode(token_id)
        shares.append(off(engine.decode(token_id), expected))
    # Tipped roundings stay in the cache, but are few among its positions; a step of int8 is larger.
    assert max(shares) < text_bound(checkpoint.config, "bf16", kv_cache)
    assert np.median(shares) < {"bf16": 3, "int8": 6}[kv_cache] * CLOSE
    assert engine.length == limit
    with pytest.raises(ValueError, match=f"exceed {limit}"):
        engine.decode(0)


def test_a_long_context(qwen3, pool):
    limit = 1100
    ids = random_ids(qwen3, limit)
    reference = ReferenceEngine(Dequantized(qwen3, "bf16", pool), chunk=256)
    expected = prefill(OneSequence(reference), ids)
    for kv_cache in KV_CACHE_FORMATS:
        model = CpuEngine(
            qwen3, LoadOptions(max_context=limit, precision="bf16", threads=2, kv_cache=kv_cache)
        )
        engine = OneSequence(model)
        share = off(prefill(engine, ids), expected)
        assert share < text_bound(qwen3.config, "bf16", kv_cache), kv_cache
        assert engine.length == limit


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
def test_chunks_do_not_change_a_bit(qwen3, isa, kv_cache, precision):
    ids = random_ids(qwen3, 70)
    options = LoadOptions(precision=precision, kv_cache=kv_cache, threads=2)
    whole, *others = (
        prefill(OneSequence(CpuEngine(qwen3, options, chunk=chunk, isa=isa)), ids)
        for chunk in (128, 1, 2, 15, 16, 17)
    )
    for logits in others:
        np.testing.assert_array_equal(logits, whole)


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
@pytest.mark.parametrize("threads", [1, 3, 4])
def test_threads_do_not_change_a_bit(checkpoint, threads, kv_cache):
    ids, tiles = random_ids(checkpoint, 40), random_tiles(checkpoint, 1)
    results = []
    for count in (2, threads):
        engine = OneSequence(CpuEngine(checkpoint, LoadOptions(threads=count, kv_cache=kv_cache)))
        steps = [prefill(engine, ids[:35])]
        steps += [engine.decode(token_id).copy() for token_id in ids[35:].tolist()]
        results.append((np.array(steps), engine.encode_images(tiles)))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_pieces_of_a_long_prefill(qwen3, monkeypatch):
    ids = random_ids(qwen3, 100)
    whole = prefill(OneSequence(CpuEngine(qwen3, LoadOptions(threads=1), chunk=8)), ids)
    monkeypatch.setattr(cpu, "INTERRUPTIBLE", 30)
    np.testing.assert_array_equal(
        prefill(OneSequence(CpuEngine(qwen3, LoadOptions(threads=1), chunk=8)), ids), whole
    )


def gptq_by_layer(name):
    """Settings that differ by layer, also among those that are joined in one matrix."""
    if "k_proj" in name or "layers.1.mlp.up" in name:
        return GPTQConfig(8, 32, "gptq")
    return None if "v_proj" in name else GPTQConfig(4, 8 if "o_proj" in name else 16, "gptq")


@pytest.mark.parametrize("group_size", [-1, 16, 64, 128, "by layer"])
def test_gptq_agrees_with_the_reference(tmp_path, pool, group_size):
    how = {"hidden_size": 160, "intermediate_size": 136, "vocab_size": 120}
    if group_size == "by layer":
        dynamic = {"k": {"bits": 8, "group_size": 32}, "o": {"group_size": 8}, "-:v": {}}
        how |= {"rule": gptq_by_layer, "dynamic": dynamic}
        group_size = 16
    config = GPTQConfig(4, group_size, "gptq")
    with gptq_checkpoint(tmp_path, config, **how) as checkpoint:
        assert not checkpoint.has_vision
        engine = OneSequence(load_engine(checkpoint, LoadOptions("cpu", threads=2)))
        # The weights are the checkpoint's own, so the reference reads them by itself.
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            weight = f"language_model.model.layers.1.{name}.weight"
            packed = Dequantized(checkpoint, "auto", pool).tensor(weight)
            np.testing.assert_array_equal(packed, checkpoint.tensor(weight))
        reference = OneSequence(ReferenceEngine(checkpoint))
        for seed in range(4):
            ids = random_ids(checkpoint, 12, seed)
            engine.rewind(0)
            reference.rewind(0)
            logits, expected = prefill(engine, ids), prefill(reference, ids)
            best = np.argsort(-expected)[:20]  # scored with the stored head
            share = off(logits[best], expected[best])
            assert share < 2 * bound("int8", 5 * 2)
        with pytest.raises(CheckpointError, match="text only"):
            engine.encode_images(np.zeros((1, 3, 448, 448), np.float32))


# --- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
def test_rewind_forgets_exactly_what_came_after(checkpoint, kv_cache):
    ids, other = random_ids(checkpoint, 90), random_ids(checkpoint, 90, seed=1)
    model = CpuEngine(checkpoint, LoadOptions(threads=2, kv_cache=kv_cache))
    for kept in (0, 10, 63, 64, 65):
        engine, fresh = OneSequence(model), OneSequence(model)
        prefill(engine, np.concatenate((ids[:kept], other)))
        engine.rewind(kept)
        assert engine.length == kept
        if kept:
            prefill(fresh, ids[:kept])
        np.testing.assert_array_equal(prefill(engine, ids[kept:]), prefill(fresh, ids[kept:]))


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
def test_a_shared_prefix_is_each_sequences_own(checkpoint, kv_cache):
    ids, other = random_ids(checkpoint, 140), random_ids(checkpoint, 90, seed=1)
    model = CpuEngine(checkpoint, LoadOptions(threads=2, kv_cache=kv_cache))
    source, alone = OneSequence(model), OneSequence(model)
    prefill(source, ids)
    prefill(alone, ids)
    for kept in (1, 63, 64, 65, 140):
        twin, fresh = OneSequence(model), OneSequence(model)
        prefill(twin, other)  # what it held is forgotten
        model.share(twin.sequence, source.sequence, kept)
        assert twin.length == twin.sequence.cache.length == kept
        prefill(fresh, ids[:kept])
        np.testing.assert_array_equal(prefill(twin, other), prefill(fresh, other))
        # Neither has what the other wrote.
        np.testing.assert_array_equal(source.decode(kept), alone.decode(kept))
        np.testing.assert_array_equal(twin.decode(3), fresh.decode(3))
        source.rewind(140)
        alone.rewind(140)
    with pytest.raises(ValueError, match="share 141 positions, but 140 are cached"):
        model.share(twin.sequence, source.sequence, 141)
    with pytest.raises(ValueError, match="another decoder's"):
        model.share(twin.sequence, CpuEngine(checkpoint, LoadOptions(threads=2)).new_sequence(), 0)
    batch = model.decode([source.sequence, alone.sequence], [5, 5])
    np.testing.assert_array_equal(batch[0], batch[1])


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
def test_sequences_decoded_together_equal_those_decoded_alone(checkpoint, kv_cache):
    model = CpuEngine(checkpoint, LoadOptions(precision="int8", threads=2, kv_cache=kv_cache))
    together, alone = ([OneSequence(model) for _ in range(5)] for _ in range(2))
    for number, (one, other) in enumerate(zip(together, alone, strict=True)):
        ids = random_ids(checkpoint, 5 + 30 * number, number)
        prefill(one, ids)
        prefill(other, ids)
    for step in range(4):
        ids = random_ids(checkpoint, 5, step).tolist()
        batch = model.decode([each.sequence for each in together], ids).copy()
        assert batch.shape == (5, checkpoint.config.text.vocab_size)
        for logits, engine, token_id in zip(batch, alone, ids, strict=True):
            np.testing.assert_array_equal(logits, engine.decode(token_id))
    assert [engine.length for engine in together] == [engine.length for engine in alone]
    assert model.timings().decode_tokens == 2 * 4 * 5


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("which", ["qwen3", "large_biases"])
def test_extending_gives_the_bits_of_every_step(request, which, isa, kv_cache, precision):
    checkpoint = request.getfixturevalue(which)
    model = CpuEngine(
        checkpoint, LoadOptions(precision=precision, kv_cache=kv_cache, threads=2), isa=isa
    )
    ids = random_ids(checkpoint, 30)
    steps, extended = OneSequence(model), OneSequence(model)
    prefill(steps, ids[:12])
    prefill(extended, ids[:12])
    logits = extended.extend(ids[12:].tolist()).copy()
    assert logits.shape == (18, checkpoint.config.text.vocab_size)
    for ours, token_id in zip(logits, ids[12:].tolist(), strict=True):
        np.testing.assert_array_equal(ours, steps.decode(token_id))
    assert extended.length == 30


def test_logits_are_not_copied(qwen3):
    engine = OneSequence(CpuEngine(qwen3, LoadOptions(threads=1)))
    first = engine.decode(1)
    before = first.copy()
    engine.decode(2)
    assert (first != before).any()  # the same memory


def test_a_model_outlives_its_checkpoint(mini_checkpoint):
    checkpoint = Checkpoint.open(mini_checkpoint("mini-qwen3"))
    engine = OneSequence(load_engine(checkpoint, LoadOptions("cpu")))
    ids = random_ids(checkpoint, 9)
    expected = prefill(engine, ids)
    checkpoint.close()
    del checkpoint
    engine.rewind(0)
    np.testing.assert_array_equal(prefill(engine, ids), expected)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_rows_in_the_file_and_in_memory_give_the_same_bits(mini_checkpoint, monkeypatch, dtype):
    with Checkpoint.open(mini_checkpoint("mini-qwen3", dtype=dtype)) as checkpoint:
        ids = random_ids(checkpoint, 20)
        results = []
        for in_file in (True, False):
            if not in_file:
                monkeypatch.setattr(Checkpoint, "place", lambda self, name: None)
            engine = OneSequence(load_engine(checkpoint, LoadOptions("cpu", precision="int4")))
            embeddings = engine.embed(ids)
            np.testing.assert_array_equal(embeddings, checkpoint.tensor(EMBEDDING, ids))
            results.append([engine.prefill(embeddings).copy(), engine.extend([3, 4]).copy()])
    for from_file, from_memory in zip(*results, strict=True):
        np.testing.assert_array_equal(from_file, from_memory)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_weights_cut_short_after_loading(mini_checkpoint, preset, tmp_path, dtype):
    """An OSError that names the file, and an engine that goes on when the file is whole again."""
    directory = shutil.copytree(mini_checkpoint(preset, dtype=dtype), tmp_path / "copy")
    path = directory / "model.safetensors"
    whole = path.read_bytes()
    with Checkpoint.open(directory) as checkpoint:
        model = CpuEngine(checkpoint, LoadOptions(precision="int4", threads=3))
        head = head_weight(checkpoint.config.text)
        places = [checkpoint.place(EMBEDDING), checkpoint.place(head)]
        ids = random_ids(checkpoint, 12)
    engine, undisturbed = OneSequence(model), OneSequence(model)
    embeddings = engine.embed(ids)
    engine.prefill(embeddings[:5])
    undisturbed.prefill(embeddings[:5])

    def fails(step):
        with pytest.raises(OSError, match="cut short") as error:
            step()
        assert (error.value.errno, error.value.filename) == (errno.EIO, str(path))
        assert engine.length == engine.sequence.cache.length == 5

    steps = (
        [lambda: engine.embed(ids), lambda: engine.decode(3), lambda: engine.extend([3, 4])],
        [lambda: engine.prefill(embeddings[5:]), lambda: engine.decode(3)],
    )
    for place, disturbed in zip(places, steps, strict=True):
        os.truncate(path, place.offset)
        for step in 2 * disturbed:
            fails(step)
        with path.open("r+b") as file:
            file.write(whole)
    np.testing.assert_array_equal(
        engine.prefill(embeddings[5:]), undisturbed.prefill(embeddings[5:]).copy()
    )


def test_descriptors_are_given_back(mini_checkpoint, tmp_path):
    opened = Path("/proc/self/fd")
    if not opened.exists():
        pytest.skip("needs /proc")
    # A copy, since other tests' models of the same files may not have been collected yet.
    directory = tmp_path / "checkpoint"
    shutil.copytree(mini_checkpoint("mini-qwen3"), directory)

    def descriptors():
        return sum(directory.resolve() in link.resolve().parents for link in opened.iterdir())

    for _ in range(3):
        checkpoint = Checkpoint.open(directory)
        engine = OneSequence(load_engine(checkpoint, LoadOptions("cpu", precision="int4")))
        checkpoint.close()
        # The embedding's and the head's; neither the checkpoint's own nor a memory map.
        assert descriptors() == 2
        assert str(directory) not in Path("/proc/self/maps").read_text()
        engine.decode(1)
        del engine
        assert descriptors() == 0
    Checkpoint.open(directory)  # not closed, only dropped
    assert descriptors() == 0


def test_several_models_and_threads(mini_checkpoint):
    """Models with teams of their own, used from several threads at once."""
    results = {}

    def work(preset, number):
        with Checkpoint.open(mini_checkpoint(preset)) as checkpoint:
            engine = OneSequence(load_engine(checkpoint, LoadOptions("cpu", threads=2)))
            ids = random_ids(checkpoint, 30)
            results[preset, number] = [prefill(engine, ids[:20])]
            results[preset, number] += [engine.decode(i).copy() for i in ids[20:].tolist()]

    workers = [
        threading.Thread(target=work, args=(preset, number))
        for preset in ("mini-qwen3", "mini-llama")
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for preset in ("mini-qwen3", "mini-llama"):
        np.testing.assert_array_equal(results[preset, 0], results[preset, 1])


# --- what is refused -----------------------------------------------------------------------------


def test_the_cache_refuses_what_does_not_fit(checkpoint):
    engine = OneSequence(CpuEngine(checkpoint, LoadOptions(max_context=8, threads=1)))
    ids = random_ids(checkpoint, 9)
    with pytest.raises(ValueError, match="exceed 8"):
        prefill(engine, ids)
    assert engine.length == 0
    prefill(engine, ids[:8])
    with pytest.raises(ValueError, match="exceed 8"):
        engine.decode(0)
    with pytest.raises(ValueError, match="exceed 8"):
        engine.extend([0])
    with pytest.raises(ValueError, match="rewind to 9"):
        engine.rewind(9)
    for step in (lambda: engine.prefill(engine.embed(ids[:0])), lambda: engine.extend([])):
        with pytest.raises(ValueError, match="0 tokens"):
            step()
    engine.rewind(2)
    for token_id in (-1, checkpoint.config.text.vocab_size):
        with pytest.raises(ValueError, match="token"):
            engine.decode(token_id)
        with pytest.raises(ValueError, match="token"):
            engine.embed(np.array([token_id]))
    assert engine.length == 2


def test_sequences_of_another_model_or_twice(qwen3):
    one, other = (CpuEngine(qwen3, LoadOptions(threads=1)) for _ in range(2))
    sequence = one.new_sequence()
    with pytest.raises(ValueError):  # noqa: PT011 -- which of two caches is wrong has many names
        one.decode([sequence, other.new_sequence()], [1, 2])
    with pytest.raises(ValueError):  # noqa: PT011
        one.decode([sequence, sequence], [1, 2])
    assert sequence.length == 0


def test_max_context_is_at_most_the_models(qwen3):
    limit = qwen3.config.text.max_position_embeddings
    assert CpuEngine(qwen3).max_context == limit
    assert CpuEngine(qwen3, LoadOptions(max_context=limit + 1)).max_context == limit


def test_too_little_memory_gives_both_numbers(qwen3, monkeypatch):
    machine = dataclasses.replace(this_machine(), available_bytes=2**10)
    monkeypatch.setattr(cpu, "this_machine", lambda: machine)
    with pytest.raises(EdgeVLError, match=r"need 0\.0 GiB of memory, 0\.0 GiB are free.*smaller"):
        CpuEngine(qwen3)
    with pytest.raises(EdgeVLError, match="--precision int4"):
        CpuEngine(qwen3, LoadOptions(precision="bf16"))


def test_wrong_arguments(qwen3, monkeypatch):
    with pytest.raises(EdgeVLError, match="'int2' is unknown: choose auto, int4, int8, bf16"):
        CpuEngine(qwen3, LoadOptions(precision="int2"))
    with pytest.raises(EdgeVLError, match="kv_cache 'int4' is unknown: choose bf16, int8"):
        CpuEngine(qwen3, LoadOptions(kv_cache="int4"))
    for threads in (0, 257):
        with pytest.raises(EdgeVLError, match=f"threads is {threads}"):
            CpuEngine(qwen3, LoadOptions(threads=threads))
    monkeypatch.setenv("EDGEVL_ISA", "mmx")
    with pytest.raises(EdgeVLError, match=r"'mmx' \(EDGEVL_ISA\).*portable"):
        CpuEngine(qwen3)


def test_the_environment_chooses_the_instruction_set(qwen3, monkeypatch):
    assert CpuEngine(qwen3).instruction_set == ISAS[0]
    monkeypatch.setenv("EDGEVL_ISA", "portable")
    assert CpuEngine(qwen3).instruction_set == "portable"
    assert CpuEngine(qwen3, isa=ISAS[0]).instruction_set == ISAS[0]


def test_timings_count_work(qwen3):
    engine = OneSequence(CpuEngine(qwen3, LoadOptions(threads=1)))
    before = engine.timings()
    prefill(engine, random_ids(qwen3, 5))
    engine.decode(1)
    engine.extend([1, 2])
    engine.encode_images(random_tiles(qwen3, 2))
    after = engine.timings()
    assert (before.prefill_tokens, before.decode_tokens, before.tiles) == (0, 0, 0)
    assert (after.prefill_tokens, after.decode_tokens, after.tiles) == (5, 3, 2)
    assert min(after.prefill_ms, after.decode_ms, after.vision_ms) > 0


def test_weight_bytes_are_those_of_the_matrices(qwen3):
    engine = CpuEngine(qwen3, LoadOptions(precision="int8", threads=1))
    weights, text = engine.weight_bytes(), qwen3.config.text
    elements = sum(
        math.prod(qwen3.shape(name))
        for name in qwen3.names()
        if name.endswith(("_proj.weight", "lm_head.weight"))
    )
    assert elements < weights.text < 2 * elements  # a byte each, and padding
    assert weights.embedding == 2 * text.vocab_size * text.hidden_size
    assert weights.cache_per_token == 2 * 2 * 2 * 32 * text.num_hidden_layers
    assert weights.vision > 0


@pytest.mark.parametrize("kv_cache", KV_CACHE_FORMATS)
def test_the_cache_takes_what_it_says(checkpoint, kv_cache):
    engine = OneSequence(CpuEngine(checkpoint, LoadOptions(kv_cache=kv_cache, threads=1)))
    engine.decode(1)
    assert engine.sequence.cache.bytes == 64 * engine.weight_bytes().cache_per_token  # a block


def test_the_native_decoder_knows_its_caches(qwen3):
    config = cpu.decoder_config(qwen3, 8, 8, "fp8")
    with pytest.raises(ValueError, match="kv_cache is 'fp8'"):
        native.Decoder(config, {}, native.ThreadPool(1))


def test_a_native_step_refuses_what_is_no_part(checkpoint):
    decoder = CpuEngine(checkpoint, LoadOptions(threads=1)).decoder
    cache, ids = decoder.new_cache(), np.array([1, 2])
    embeddings = decoder.embed(ids)
    for part in (
        (None, ids, 2),
        (cache, np.array(1), 1),
        (cache, np.float32(1), 1),
        (cache, ids.astype(np.int32), 2),
        (cache, embeddings[:, 1:], 2),
        (cache, embeddings[None], 2),
        (cache, ids, 3),
        (cache, ids[:0], 0),
    ):
        with pytest.raises((ValueError, TypeError)):
            decoder.step([part])
    assert cache.length == 0
    parts = [(cache, ids, 2)]
    assert decoder.step(parts).shape == (2, checkpoint.config.text.vocab_size)


@pytest.mark.parametrize("part", ["text", "vision"])
def test_the_native_models_refuse_tensors_that_they_do_not_know(qwen3, part, monkeypatch):
    """One that the table of a model's tensors lists and the engine does not would do nothing."""

    def with_another(checkpoint, plan):
        tensors = stored_tensors(checkpoint, plan)
        tensors[part]["layers.0.o_norm"] = np.ones(64, np.float32)
        return tensors

    stored_tensors = cpu.stored_tensors
    monkeypatch.setattr(cpu, "stored_tensors", with_another)
    with pytest.raises(ValueError, match=r"layers\.0\.o_norm is not one of the model's"):
        CpuEngine(qwen3, LoadOptions(threads=1))
