import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint, GPTQConfig, GPTQWeight, StoredTensor, expected_tensors
from edgevl.checkpoint.config import parse_config
from edgevl.checkpoint.gptq import packed_shapes
from edgevl.engine import ReferenceEngine
from edgevl.errors import CheckpointError
from storage import CHAT, TEXT, changed, hf_names, random_tensors, write_directory


def pack(fields, bits, minus_one=False):
    """Pack [R, C] along C as GPTQModel does: one 32-bit word from so many fields, lowest first."""
    per_word = 32 // bits
    ones = sum(1 << (bits * k) for k in range(per_word)) if minus_one else 0
    rows = []
    for row in fields:
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for k in range(per_word):
                word |= int(row[start + k]) << (bits * k)
            words.append((word - ones) % (1 << 32))
        rows.append(words)
    return np.array(rows, np.uint32).view(np.int32)


def quantized(outputs, inputs, config, seed=0):
    """Random stored tensors of one layer, and the weight float32 [O, I] they stand for."""
    rng = np.random.default_rng(seed)
    group = inputs if config.group_size == -1 else config.group_size
    groups = -(-inputs // group)
    top = 1 << config.bits
    integers = rng.integers(0, top, (inputs, outputs))
    # Zero points of 0 occur: stored minus one they borrow from the field above.
    zeros = (
        np.full((groups, outputs), top // 2)
        if config.sym
        else rng.integers(0, top, (groups, outputs))
    )
    scales = rng.uniform(0.01, 0.1, (groups, outputs)).astype(np.float16).astype(np.float32)
    g_idx = np.arange(inputs) // group
    if config.desc_act:
        g_idx = rng.permutation(g_idx)
    weight = np.empty((outputs, inputs), np.float32)
    for o in range(outputs):
        for i in range(inputs):
            g = g_idx[i]
            weight[o, i] = np.float32(integers[i, o] - zeros[g, o]) * scales[g, o]
    stored = {
        "qweight": pack(integers.T, config.bits).T.copy(),
        "qzeros": pack(zeros, config.bits, config.checkpoint_format == "gptq"),
        "scales": scales,
        "g_idx": g_idx.astype(np.int32),
    }
    return stored, weight


def opened(stored, config):
    return GPTQWeight(
        qweight=StoredTensor("I32", stored["qweight"]),
        qzeros=StoredTensor("I32", stored["qzeros"]),
        scales=StoredTensor("F32", stored["scales"]),
        g_idx=StoredTensor("I32", stored["g_idx"]) if "g_idx" in stored else None,
        config=config,
    )


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("stored_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("group_size", "desc_act"), [(16, False), (16, True), (-1, False), (32, 1)]
)
def test_dequantizes(bits, stored_format, sym, group_size, desc_act):
    config = GPTQConfig(bits, group_size, sym, bool(desc_act), stored_format)
    stored, weight = quantized(24, 48, config)
    for name, shape in packed_shapes(24, 48, config).items():
        assert stored[name].shape == shape
    result = opened(stored, config).dequantize()
    np.testing.assert_array_equal(result, weight)
    assert result.flags.c_contiguous
    assert result.dtype == np.float32


def test_without_g_idx_groups_follow_each_other():
    config = GPTQConfig(4, 16, True, False, "gptq")
    stored, weight = quantized(8, 40, config)  # the last group is shorter
    del stored["g_idx"]
    np.testing.assert_array_equal(opened(stored, config).dequantize(), weight)


def test_a_group_that_is_not_there():
    config = GPTQConfig(4, 16, True, False, "gptq")
    for bad in (3, -1):
        stored, _ = quantized(8, 48, config)
        stored["g_idx"][5] = bad
        with pytest.raises(CheckpointError, match=f"{bad}.*expected 0 to 2"):
            opened(stored, config).dequantize()


def gptq_tensors(config, quantization, prefix):
    """A text model whose layers' linear weights are quantized: stored tensors, and their values."""
    values = random_tensors(expected_tensors(config, vision=False))
    stored, expected = {}, {}
    for number, (name, value) in enumerate(values.items()):
        place = name.replace("language_model.model.", prefix + "model.").replace(
            "language_model.lm_head", prefix + "lm_head"
        )
        if "_proj.weight" in name:
            parts, expected[name] = quantized(*value.shape, quantization, seed=number)
            stored.update({place.removesuffix("weight") + part: a for part, a in parts.items()})
        else:
            stored[place] = expected[name] = value
    return stored, expected


SETTINGS = {
    "bits": 4,
    "group_size": 16,
    "quant_method": "gptq",
    "sym": True,
    "desc_act": False,
    "checkpoint_format": "gptq",
    "lm_head": False,
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:5.0.0"]},
}
PLAIN = parse_config(CHAT, "config.json")[1]
QUANTIZATION = GPTQConfig(4, 16, True, False, "gptq")


@pytest.mark.parametrize("prefix", ["", "language_model."])
@pytest.mark.parametrize("place", ["qwen3", "llm_config", "top", "quantize_config"])
def test_a_text_model_beside_the_original_files(tmp_path, prefix, place):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, prefix)
    config, files = CHAT, {}
    if place == "qwen3":
        config = {**TEXT, "quantization_config": SETTINGS}
    elif place == "llm_config":
        config = changed(CHAT, "llm_config.quantization_config", SETTINGS)
    elif place == "top":
        config = {**CHAT, "quantization_config": SETTINGS}
    else:
        files = {"quantize_config": SETTINGS}
    with Checkpoint.open(write_directory(tmp_path, config, stored, **files)) as checkpoint:
        assert checkpoint.layout == "gptq_text"
        assert not checkpoint.has_vision
        assert checkpoint.names() == list(expected)
        for name, value in expected.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), value)
            assert (checkpoint.gptq(name) is not None) == ("_proj" in name)
        with pytest.raises(CheckpointError, match="answers text only"):
            checkpoint.tensor("vision_model.embeddings.class_embedding")
        name = "language_model.model.layers.0.mlp.up_proj.weight"
        with pytest.raises(CheckpointError, match="quantized"):
            checkpoint.stored(name)
        rows = np.array([2, 0])
        np.testing.assert_array_equal(checkpoint.tensor(name, rows), expected[name][rows])


@pytest.mark.parametrize("layout", ["internvl_chat", "internvl"])
def test_with_vision(tmp_path, layout):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, "language_model.")
    shapes = expected_tensors(PLAIN)
    vision = random_tensors({n: s for n, s in shapes.items() if n not in expected})
    stored |= vision if layout == "internvl_chat" else hf_names(vision)
    config = {**CHAT, "quantization_config": SETTINGS}
    with Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint:
        assert checkpoint.has_vision
        assert checkpoint.layout == "internvl_chat"
        for name, value in (expected | vision).items():
            np.testing.assert_array_equal(checkpoint.tensor(name), value)
    # A configuration of the text model alone says nothing of this vision encoder's shape.
    write_directory(tmp_path, {**TEXT, "quantization_config": SETTINGS}, stored)
    with pytest.raises(CheckpointError, match=r"shape \[1, 1, 16\].*\[1, 1, 1024\]"):
        Checkpoint.open(tmp_path)


def test_the_reference_engine_runs_it_by_dequantizing(tmp_path):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, "language_model.")
    quantized_config = {**CHAT, "quantization_config": SETTINGS}
    shapes = expected_tensors(PLAIN)
    vision = random_tensors({n: s for n, s in shapes.items() if n not in expected})
    ids = np.arange(20) % PLAIN.text.vocab_size

    def logits(name, config, tensors):
        with Checkpoint.open(write_directory(tmp_path / name, config, tensors)) as checkpoint:
            engine = ReferenceEngine(checkpoint)
            return engine.prefill(engine.embed(ids), 0)

    got = logits("quantized", quantized_config, stored | vision)
    assert np.ptp(got) > 0
    np.testing.assert_array_equal(got, logits("plain", CHAT, expected | vision))


def test_a_damaged_layer_is_named(tmp_path):
    config = {**CHAT, "quantization_config": SETTINGS}
    base = "model.layers.1.mlp.down_proj."
    for part, damage, words in (
        ("qweight", lambda a: a[:-1], r"shape \[4, 32\].*\[5, 32\]"),
        ("scales", lambda a: a[:2], r"shape \[2, 32\].*\[3, 32\]"),
        ("qzeros", None, "is missing"),
        ("g_idx", lambda a: a.astype(np.float32), "type F32"),
    ):
        stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
        if damage:
            stored[base + part] = damage(stored[base + part])
        else:
            del stored[base + part]
        write_directory(tmp_path, config, stored)
        with pytest.raises(CheckpointError, match=rf"{base}{part}.*{words}"):
            Checkpoint.open(tmp_path)
    # The same packed integers, read as 8 bits.
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    write_directory(tmp_path, {**CHAT, "quantization_config": {**SETTINGS, "bits": 8}}, stored)
    with pytest.raises(CheckpointError, match="qweight"):
        Checkpoint.open(tmp_path)


def test_a_wrong_group_is_an_error_of_the_tensor(tmp_path):
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    stored["model.layers.0.self_attn.q_proj.g_idx"][0] = 99
    config = {**CHAT, "quantization_config": SETTINGS}
    with (
        Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint,
        pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.q_proj\.weight.*99"),
    ):
        checkpoint.tensor("language_model.model.layers.0.self_attn.q_proj.weight")


def test_sizes_that_do_not_fill_words(tmp_path):
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    config = changed({**CHAT, "quantization_config": SETTINGS}, "llm_config.intermediate_size", 41)
    with pytest.raises(CheckpointError, match="multiples of 8"):
        Checkpoint.open(write_directory(tmp_path, config, stored))
