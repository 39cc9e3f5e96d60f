import numpy as np
import pytest

from edgevl.checkpoint import Checkpoint, GPTQConfig, GPTQWeight, StoredTensor, expected_tensors
from edgevl.checkpoint.config_parser import parse_config
from edgevl.checkpoint.gptq import packed_shapes
from edgevl.engine import ReferenceEngine
from edgevl.errors import CheckpointError
from storage import CHAT, TEXT, changed, hf_names, random_tensors, write_directory
from stored_gptq import gptq_tensors, quantized


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
    ("group_size", "desc_act"), [(16, False), (16, True), (-1, False), (32, True)]
)
def test_dequantizes(bits, stored_format, sym, group_size, desc_act):
    config = GPTQConfig(bits, group_size, stored_format)
    stored, weight = quantized(24, 48, config, sym=sym, desc_act=desc_act)
    for name, shape in packed_shapes(24, 48, config).items():
        assert stored[name].shape == shape
    result = opened(stored, config).dequantize()
    np.testing.assert_array_equal(result, weight)
    assert result.flags.c_contiguous
    assert result.dtype == np.float32


def test_without_g_idx_groups_follow_each_other():
    config = GPTQConfig(4, 16, "gptq")
    stored, weight = quantized(8, 40, config)  # the last group is shorter
    del stored["g_idx"]
    np.testing.assert_array_equal(opened(stored, config).dequantize(), weight)


def test_a_group_that_is_not_there():
    config = GPTQConfig(4, 16, "gptq")
    for bad in (3, -1):
        stored, _ = quantized(8, 48, config)
        stored["g_idx"][5] = bad
        with pytest.raises(CheckpointError, match=f"{bad}.*expected 0 to 2"):
            opened(stored, config).dequantize()


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
QUANTIZATION = GPTQConfig(4, 16, "gptq")


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
            return engine.prefill(engine.new_sequence(), engine.embed(ids))

    got = logits("quantized", quantized_config, stored | vision)
    assert np.ptp(got) > 0
    np.testing.assert_array_equal(got, logits("plain", CHAT, expected | vision))


def test_a_damaged_layer_is_named(tmp_path):
    config = {**CHAT, "quantization_config": SETTINGS}
    base = "model.layers.1.mlp.down_proj."
    for part, damage, words in (
        ("qweight", lambda a: a[:-1], "weight.*qweight in 4 rows.*40 inputs"),
        ("qweight", lambda a: a[:, :-1], r"qweight.*shape \[5, 31\].*\[5, 32\]"),
        ("qweight", lambda a: a.astype(np.float32), "qweight.*type F32"),
        ("scales", lambda a: a[:2], "weight.*2 groups.*4 bits in groups of 16"),
        ("scales", lambda a: a[:, 1:], r"scales.*shape \[3, 31\].*\[3, 32\]"),
        ("qzeros", lambda a: a[:2], r"qzeros.*shape \[2, 4\].*\[3, 4\]"),
        ("qzeros", None, "qzeros.*is missing"),
        ("scales", None, "scales.*is missing"),
        ("g_idx", lambda a: a.astype(np.float32), "g_idx.*type F32"),
    ):
        stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
        if damage:
            stored[base + part] = damage(stored[base + part])
        else:
            del stored[base + part]
        write_directory(tmp_path, config, stored)
        with pytest.raises(CheckpointError, match=rf"{base}{words}"):
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


LAYERS = "language_model.model.layers."


def setting(bits, group_size, checkpoint_format="gptq"):
    return GPTQConfig(bits, group_size, checkpoint_format)


def down(changed):
    """Down projections as `changed`, everything else as the settings at the top."""
    return lambda name: changed if "down_proj" in name else QUANTIZATION


#: What is stored, and what quantization_config says of it.
RULES = {
    "bits": (down(setting(8, 16)), {"dynamic": {r"+:.*\.down_proj.*": {"bits": 8}}}),
    "group_size": (down(setting(4, 8)), {"dynamic": {r".*\.down_proj": {"group_size": 8}}}),
    "both": (down(setting(8, -1)), {"dynamic": {".*down": {"bits": 8, "group_size": -1}}}),
    "left out": (down(None), {"dynamic": {r"-:.*\.down_proj": {}}}),
    "several": (
        lambda name: (
            None
            if ".0.mlp.up" in name
            else setting(8, 8)
            if ".1." in name
            else down(setting(8, 16))(name)
        ),
        {
            "dynamic": {
                r"-:model\.layers\.0\.mlp\.up_proj": {},
                r"+:model\.layers\.1\.": {"bits": 8, "group_size": 8},
                r"+:.*\.down_proj": {"bits": 8},
            }
        },
    ),
    "other at the top": (
        lambda name: QUANTIZATION,
        {"bits": 3, "group_size": 64, "dynamic": {".*": {"bits": 4, "group_size": 16}}},
    ),
    "null as in an absent field": (
        down(setting(8, 16)),
        {"dynamic": {".*down": {"bits": 8, "group_size": None}, ".*up": None}},
    ),
    # Patterns are not run: neither what is no pattern nor what would take for ever does harm.
    "no pattern": (down(setting(8, 16)), {"dynamic": {"+:(": {"bits": 8}}}),
    "catastrophic": (down(setting(8, 16)), {"dynamic": {"(.*.*)*(.+)+$^": {"bits": 8}}}),
    "junk": (
        down(setting(8, 16)),
        {
            "sym": "junk",
            "desc_act": float("nan"),
            "lm_head": [],
            "pack_dtype": 5,
            "dynamic": {
                "": [],
                "a": {"bits": "x"},
                "b": {"group_size": 1e999},
                "lm_head": {},
                ".*down": {"bits": 8.0, "sym": None, "mse": {}},
            },
        },
    ),
    "AutoRound": (
        down(setting(8, 16)),
        {
            "quant_method": "auto-round",
            "packing_format": "auto_round:auto_gptq",
            "data_type": "int",
            "extra_config": {
                "model.layers.0.mlp.down_proj": {"bits": 8},
                "model.layers.9.mlp.up_proj": {"bits": 16},
            },
        },
    ),
    "AutoRound's own format": (
        lambda name: setting(4, 16, "gptq_v2"),
        {"quant_method": "auto-round", "packing_format": "auto_round"},
    ),
    "GPTQModel's name of the format": (
        lambda name: setting(4, 16, "gptq_v2"),
        {"checkpoint_format": None, "format": "gptq_v2", "method": "gptq"},
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_every_layer_is_read_as_it_is_stored(tmp_path, rule):
    """`dynamic` of GPTQModel, `extra_config` of AutoRound: settings that differ by layer."""
    stored_as, said = RULES[rule]
    stored, expected = gptq_tensors(PLAIN, stored_as, "")
    config = {**CHAT, "quantization_config": {**SETTINGS, **said}}
    with Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint:
        for name, value in expected.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), value)
            packed = checkpoint.gptq(name)
            assert (packed and packed.config) == (stored_as(name) if "_proj" in name else None)


def refused(directory, config, stored, *words, **files):
    with pytest.raises(CheckpointError) as error:
        Checkpoint.open(write_directory(directory, config, stored, **files))
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_layer_that_cannot_be_run_is_named_with_its_setting(tmp_path):
    name = "model.layers.0.self_attn.q_proj."

    def with_layer(bits, *words, said=None, top=None):
        stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
        stored[name + "qweight"] = np.zeros((bits, 64), np.int32)  # 32 inputs
        stored[name + "qzeros"] = np.zeros((2, 2 * bits), np.int32)
        said = {"dynamic": said} if said else {}
        config = {**CHAT, "quantization_config": {**SETTINGS, **said, **(top or {})}}
        refused(tmp_path, config, stored, name, *words)

    for bits in (2, 3):
        rule = {rf"+:{name}": {"bits": bits}}
        with_layer(bits, f"is stored with {bits} bits", "supported: 4, 8", said=rule)
        with_layer(bits, f"is stored with {bits} bits", top={"bits": bits})
    # Stored as nothing says.
    with_layer(8, "8 bits and 2 groups of its 32 inputs", "dynamic", "4 bits in groups of 16")
    with_layer(8, "4 bits in groups of 16, 2 bits in groups of 16", said={".*": {"bits": 2}})
    with_layer(4, "3 bits in groups of 16", top={"bits": 3})
    with_layer(4, "4 bits in groups of 0", top={"group_size": 0})


def test_groups_that_could_be_of_two_sizes(tmp_path):
    rule = {"dynamic": {".*down_proj": {"group_size": 15}}}  # three groups of 40, as with 16
    config = {**CHAT, "quantization_config": {**SETTINGS, **rule}}
    stored, expected = gptq_tensors(PLAIN, down(setting(4, 15)), "")
    with Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint:
        for name, value in expected.items():  # told by g_idx
            np.testing.assert_array_equal(checkpoint.tensor(name), value)
    del stored["model.layers.1.mlp.down_proj.g_idx"]
    refused(tmp_path, config, stored, "layers.1.mlp.down_proj", "no g_idx", "[15, 16]")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"quant_method": "awq"}, ["quant_method", "'awq'", "not quantized"]),
        ({"quant_method": "bitsandbytes"}, ["'bitsandbytes'"]),
        ({"quant_method": "compressed-tensors"}, ["'compressed-tensors'"]),
        ({"quant_method": "fp8"}, ["'fp8'"]),
        ({"quant_method": 5}, ["quant_method", "5"]),
        ({"bits": "junk"}, ["bits", "'junk'", "an integer"]),
        ({"group_size": -2}, ["group_size", "-2", "-1 to"]),
        ({"checkpoint_format": "gptq_p"}, ["checkpoint_format", "'gptq_p'", "gptq, gptq_v2"]),
        ({"checkpoint_format": None, "format": "marlin"}, ["format", "'marlin'"]),
        ({"quant_method": "auto-round"}, ["packing_format", "missing"]),
        (
            {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq"},
            ["packing_format", "auto_awq"],
        ),
        # GPTQModel's and AutoRound's rotations: of activations too, which no tensor tells.
        ({"rotation": "hadamard"}, ["rotation", "'hadamard'"]),
        ({"rotation_config": {"hadamard_type": "random"}}, ["rotation_config"]),
    ],
)
def test_what_is_stored_otherwise_is_refused_by_name(tmp_path, change, words):
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    config = {**CHAT, "quantization_config": {**SETTINGS, **change}}
    refused(tmp_path, config, stored, "quantization_config", *words)


def test_packed_weights_that_nothing_describes(tmp_path):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, "language_model.")
    shapes = expected_tensors(PLAIN)
    stored |= random_tensors({n: s for n, s in shapes.items() if n not in expected})
    refused(tmp_path, CHAT, stored, "q_proj", "no quantization_config says how")


def test_packed_integers_of_other_words(tmp_path):
    """GPTQModel's `pack_dtype` int16: two words for each one of 32 bits."""
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    name = "model.layers.0.mlp.up_proj.qweight"
    stored[name] = stored[name].view(np.uint16).astype(np.float32)
    refused(tmp_path, {**CHAT, "quantization_config": SETTINGS}, stored, name, "I32")


def test_a_quantized_embedding_is_named(tmp_path):
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    base = "model.embed_tokens."
    del stored[base + "weight"]
    stored[base + "qweight"] = np.zeros((6, 32), np.int32)
    stored[base + "qzeros"] = np.zeros((3, 4), np.int32)
    stored[base + "scales"] = np.zeros((3, 32), np.float32)
    config = {**CHAT, "quantization_config": SETTINGS}
    refused(tmp_path, config, stored, "embed_tokens", "linear layers only")


def test_a_quantized_head(tmp_path):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, "")
    parts, expected["language_model.lm_head.weight"] = quantized(48, 32, setting(8, 32))
    del stored["lm_head.weight"]
    stored |= {f"lm_head.{part}": value for part, value in parts.items()}
    said = {"lm_head": True, "dynamic": {"lm_head": {"bits": 8, "group_size": 32}}}
    config = {**CHAT, "quantization_config": {**SETTINGS, **said}}
    with Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint:
        for name, value in expected.items():
            np.testing.assert_array_equal(checkpoint.tensor(name), value)


def test_zeros_that_tools_store_as_biases(tmp_path):
    """Old GPTQ tools give every layer a bias; one that is not zero would be left out."""
    stored, _ = gptq_tensors(PLAIN, QUANTIZATION, "")
    names = [name for name in stored if name.endswith(".qweight")]
    config = {**CHAT, "quantization_config": SETTINGS}
    biases = {
        name.replace("qweight", "bias"): np.zeros(stored[name].shape[1], np.float32)
        for name in names
    }
    biases[next(iter(biases))][0] = -0.0
    Checkpoint.open(write_directory(tmp_path, config, stored | biases, "BF16")).close()
    name = "model.layers.1.self_attn.o_proj.bias"
    biases[name][3] = 1e-6
    refused(tmp_path, config, stored | biases, name, "another model")


def test_a_plain_weight_beside_the_packed_one(tmp_path):
    stored, expected = gptq_tensors(PLAIN, QUANTIZATION, "")
    stored["model.layers.0.mlp.up_proj.weight"] = np.ones((40, 32), np.float32)
    config = {**CHAT, "quantization_config": SETTINGS}
    with Checkpoint.open(write_directory(tmp_path, config, stored)) as checkpoint:
        name = LAYERS + "0.mlp.up_proj.weight"
        np.testing.assert_array_equal(checkpoint.tensor(name), expected[name])
