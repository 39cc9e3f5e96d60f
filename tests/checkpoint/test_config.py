import pytest

from edgevl.checkpoint import GPTQConfig, expected_tensors, parse_config
from edgevl.checkpoint.config import INTERNVIT_300M
from edgevl.errors import CheckpointError
from storage import CHAT, CONFIGS, HF, TEXT, changed

GPTQ = {"bits": 4, "group_size": 128, "quant_method": "gptq", "sym": True, "desc_act": False}


def parse(config, **files):
    return parse_config(config, "config.json", **files)[1]


def refused(config, *words, **files):
    with pytest.raises(CheckpointError) as error:
        parse(config, **files)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_both_layouts_say_the_same():
    layout, chat = parse_config(changed(CHAT, "max_dynamic_patch", 12), "config.json")
    hf_layout, hf = parse_config(HF, "config.json")
    assert (layout, hf_layout) == ("internvl_chat", "internvl")
    assert chat == hf


def test_fields_of_the_chat_layout():
    config = parse(CHAT)
    assert (config.vision.hidden_size, config.vision.num_patches, config.image_tokens) == (
        16,
        16,
        4,
    )
    assert config.vision.head_dim == 8
    assert config.vision.qkv_bias
    assert not config.vision.use_qk_norm
    assert (config.text.head_dim, config.text.rope_theta) == (16, 1e6)
    assert config.text.use_qk_norm
    assert not config.text.attention_bias
    assert (config.min_tiles, config.max_tiles, config.use_thumbnail) == (1, 6, True)
    assert config.eos_token_ids == (7,)


def test_a_wrong_qk_or_norm_of_the_6b_is_not_assumed():
    config = CHAT
    for name in ("norm_type", "qk_normalization", "qkv_bias"):
        config = changed(config, f"vision_config.{name}", ...)
    vision = parse(config).vision
    # The defaults of InternVisionConfig, not those of transformers' InternVLVisionConfig.
    assert (vision.norm_type, vision.use_qk_norm, vision.qkv_bias) == ("rms_norm", True, False)
    hf = changed(changed(HF, "vision_config.norm_type", ...), "vision_config.use_qk_norm", ...)
    vision = parse(hf).vision
    assert (vision.norm_type, vision.use_qk_norm) == ("layer_norm", False)


def test_missing_fields_take_the_defaults_of_transformers():
    config = parse(
        {"model_type": "internvl", "vision_config": {}, "text_config": {}}
        | {"text_config": {"model_type": "qwen3"}}
    )
    assert (config.vision.hidden_size, config.vision.image_size) == (1024, 448)
    assert (config.text.hidden_size, config.text.head_dim, config.text.vocab_size) == (
        4096,
        128,
        151936,
    )
    llama = parse(changed(HF, "text_config", {"model_type": "llama", "num_attention_heads": 16}))
    assert (llama.text.num_key_value_heads, llama.text.head_dim) == (16, 256)
    assert llama.text.max_position_embeddings == 2048


@pytest.mark.parametrize("model_type", ["qwen2", "llama"])
def test_other_text_models(model_type):
    config = changed(changed(CHAT, "llm_config.model_type", model_type), "llm_config.head_dim", ...)
    text = parse(config).text
    assert text.head_dim == 8
    assert text.attention_bias == (model_type == "qwen2")
    assert not text.use_qk_norm
    names = expected_tensors(parse(config))
    prefix = "language_model.model.layers.1.self_attn."
    assert (prefix + "q_proj.bias" in names) == (model_type == "qwen2")
    assert prefix + "o_proj.bias" not in names
    assert prefix + "q_norm.weight" not in names


def test_expected_shapes():
    shapes = expected_tensors(parse(CHAT))
    assert shapes["vision_model.embeddings.class_embedding"] == (1, 1, 16)
    assert shapes["vision_model.embeddings.patch_embedding.weight"] == (16, 3, 7, 7)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 17, 16)
    assert shapes["vision_model.encoder.layers.0.attn.qkv.weight"] == (48, 16)
    assert shapes["vision_model.encoder.layers.0.attn.qkv.bias"] == (48,)
    assert shapes["mlp1.0.weight"] == (64,)
    assert shapes["mlp1.1.weight"] == (32, 64)
    assert shapes["mlp1.3.bias"] == (32,)
    attention = "language_model.model.layers.1.self_attn."
    assert shapes[attention + "q_proj.weight"] == (64, 32)
    assert shapes[attention + "k_proj.weight"] == (32, 32)
    assert shapes[attention + "o_proj.weight"] == (32, 64)
    assert shapes[attention + "q_norm.weight"] == (16,)
    assert shapes["language_model.lm_head.weight"] == (48, 32)
    assert not any(".2." in name for name in shapes if name.startswith("language_model.model.l"))
    tied = changed(CHAT, "llm_config.tie_word_embeddings", True)
    assert "language_model.lm_head.weight" not in expected_tensors(parse(tied))


def test_internvit_6b_has_norms_without_bias_and_qk_norms():
    config = changed(CHAT, "vision_config.norm_type", "rms_norm")
    config = changed(config, "vision_config.qk_normalization", True)
    shapes = expected_tensors(parse(changed(config, "vision_config.qkv_bias", False)))
    layer = "vision_model.encoder.layers.0."
    assert shapes[layer + "attn.q_norm.weight"] == (16,)
    assert layer + "norm1.bias" not in shapes
    assert layer + "attn.qkv.bias" not in shapes


def test_rope():
    assert parse(CHAT).text.rope_scaling is None
    linear = changed(CHAT, "llm_config.rope_scaling", {"type": "linear", "factor": 2})
    assert parse(linear).text.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    assert parse(changed(CHAT, "llm_config.rope_scaling", llama3)).text.rope_scaling == llama3
    newer = changed(HF, "text_config.rope_parameters", {**llama3, "rope_theta": 500.0})
    assert parse(newer).text.rope_scaling == llama3
    assert parse(newer).text.rope_theta == 500.0
    # InternVL3: changes nothing up to max_position_embeddings.
    dynamic = {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"}
    assert parse(changed(CHAT, "llm_config.rope_scaling", dynamic)).text.rope_scaling is None
    assert parse(changed(CHAT, "llm_config.rope_theta", ...)).text.rope_theta == 10_000.0


def test_image_settings_of_the_hf_layout():
    processor = {
        "crop_to_patches": False,  # as published; InternVLProcessor overrides it
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.2, 0.2, 0.1],
        "max_patches": 9,
        "min_patches": 2,
        "size": {"height": 28, "width": 28},
    }
    for stored in (processor, {"image_processor": processor}):
        config = parse(HF, preprocessor=stored)
        assert (config.min_tiles, config.max_tiles) == (2, 9)
        assert config.image_mean == (0.5, 0.4, 0.3)
        assert config.image_std == (0.2, 0.2, 0.1)
        assert config.dynamic_tiling
        assert config.use_thumbnail
    config = parse(HF)
    assert (config.min_tiles, config.max_tiles) == (1, 12)
    # The chat layout's CLIP processor has a size of another form.
    assert parse(CHAT, preprocessor={"size": 28, "crop_size": 28}).max_tiles == 6
    refused(HF, "size", "448", "28", preprocessor={"size": {"height": 448, "width": 448}})


def test_ends_of_turns():
    generation = {"eos_token_id": [11, 7], "pad_token_id": 3}
    config = parse(CHAT, generation=generation)
    assert config.eos_token_ids == (11, 7)
    no_token = {"eos_token_id": [-1, 11.0, int(1e30), 11]}
    assert parse(CHAT, generation=no_token).eos_token_ids == (11, 7)


def test_pixel_shuffle_version():
    assert parse(changed(CHAT, "ps_version", "v1")).ps_version == "v1"
    assert parse(changed(CHAT, "ps_version", ...)).ps_version == "v1"  # InternVLChatConfig's
    assert parse(HF).ps_version == "v2"


def test_select_layer():
    assert parse(changed(CHAT, "select_layer", 1)).select_layer == 1
    assert parse(changed(HF, "vision_feature_layer", -2)).select_layer == -2
    refused(changed(CHAT, "select_layer", 2), "select_layer", "2", "-2 to 1")
    refused(changed(HF, "vision_feature_layer", [-1]), "vision_feature_layer")


def test_gptq_from_each_place():
    for config, files in (
        (changed(CHAT, "quantization_config", GPTQ), {}),
        (changed(CHAT, "llm_config.quantization_config", GPTQ), {}),
        (CHAT, {"quantize": GPTQ}),
    ):
        assert parse(config, **files).quantization == (GPTQConfig(4, 128, "gptq"),)
    newer = {**GPTQ, "format": "gptq_v2"}
    assert parse(CHAT, quantize=newer).quantization == (GPTQConfig(4, 128, "gptq_v2"),)
    rules = {"+:.*down": {"bits": 8}, "-:.*up": {}, ".*": {"group_size": 64}, "x": {"bits": 8}}
    assert parse(CHAT, quantize={**GPTQ, "dynamic": rules}).quantization == tuple(
        GPTQConfig(bits, size, "gptq") for bits, size in ((4, 128), (8, 128), (4, 64))
    )
    assert parse(CHAT).quantization == ()
    layout, config = parse_config({**TEXT, "quantization_config": GPTQ}, "config.json")
    assert layout == "gptq_text"
    assert config.vision == INTERNVIT_300M
    assert config.text == parse(CHAT).text


QKV = "vision_model.encoder.layers.0.attn.qkv.weight"


@pytest.mark.parametrize("layout", CONFIGS)
def test_what_vision_keeps(layout):
    config = CONFIGS[layout]
    for other in ({}, {"edgevl_quantization": {}}, {"edgevl_quantization": {"vision": None}}):
        assert parse({**config, **other}).vision_keep is None
    for vision in ({}, {"format": "int8"}, {"keep": []}):
        assert parse({**config, "edgevl_quantization": {"vision": vision}}).vision_keep == ()
    vision = {"format": "int8", "keep": ["mlp1.3.weight", QKV]}
    parsed = parse({**config, "edgevl_quantization": {"vision": vision}})
    assert parsed.vision_keep == ("mlp1.3.weight", QKV)


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (QKV, ["a list of at most 6"]),
        ([QKV] * 7, ["a list of 7", "at most 6"]),
        ([1], ["1", "no linear weight"]),
        ([[QKV]], ["no linear weight"]),
        (["vision_model.encoder.layers.1.attn.qkv.weight"], ["layers.1"]),
        (["vision_model.embeddings.patch_embedding.weight"], ["patch_embedding"]),
        (["language_model.model.layers.0.mlp.down_proj.weight"], ["down_proj"]),
    ],
)
def test_what_vision_cannot_keep(keep, words):
    config = {**CHAT, "edgevl_quantization": {"vision": {"keep": keep}}}
    refused(config, "edgevl_quantization", "keep", *words)
    refused({**CHAT, "edgevl_quantization": {"vision": {"format": "int2"}}}, "format", "int2")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("model_type", "qwen2_5_vl", ["model_type", "qwen2_5_vl", "internvl_chat"]),
        ("model_type", ..., ["model_type"]),
        ("model_type", "qwen3", ["text model alone"]),
        ("llm_config", ..., ["llm_config", "missing"]),
        ("llm_config", [], ["llm_config", "a list"]),
        ("llm_config.model_type", "internlm2", ["internlm2", "qwen3, qwen2, llama"]),
        ("llm_config.model_type", "qwen3_moe", ["qwen3_moe", "experts"]),
        ("llm_config.model_type", "gpt_oss", ["gpt_oss"]),
        ("llm_config.hidden_size", "32", ["config.json: llm_config", "hidden_size", "'32'"]),
        ("llm_config.hidden_size", True, ["hidden_size", "True"]),
        ("llm_config.hidden_size", 1 << 40, ["hidden_size"]),
        ("llm_config.hidden_size", 0, ["hidden_size"]),
        ("llm_config.num_hidden_layers", 10**9, ["num_hidden_layers"]),
        ("llm_config.vocab_size", 1 << 30, ["vocab_size"]),
        ("llm_config.num_key_value_heads", 3, ["num_key_value_heads", "3"]),
        ("llm_config.head_dim", 15, ["head_dim", "15"]),
        ("llm_config.hidden_act", "gelu", ["hidden_act", "silu"]),
        ("llm_config.rms_norm_eps", float("inf"), ["rms_norm_eps"]),
        ("llm_config.rope_scaling", {"rope_type": "yarn"}, ["yarn", "llama3"]),
        ("llm_config.rope_scaling", {"rope_type": "linear"}, ["factor", "missing"]),
        ("llm_config.layer_types", ["sliding_attention"], ["layer_types"]),
        ("llm_config.tie_word_embeddings", "no", ["tie_word_embeddings"]),
        ("vision_config.num_attention_heads", 3, ["num_attention_heads", "3", "16"]),
        ("vision_config.patch_size", 5, ["patch_size", "5", "28"]),
        ("vision_config.patch_size", 28, ["downsample_ratio", "1 patches"]),
        ("vision_config.image_size", 8192, ["image_size", "4096"]),
        ("vision_config.image_size", [28, 14], ["image_size"]),
        ("vision_config.norm_type", "batch_norm", ["norm_type", "rms_norm"]),
        ("vision_config.hidden_act", "relu", ["hidden_act"]),
        ("force_image_size", 56, ["force_image_size", "56", "28"]),
        ("downsample_ratio", 0.3, ["downsample_ratio"]),
        ("ps_version", "v3", ["ps_version", "v1, v2"]),
        ("max_dynamic_patch", 10**6, ["max_dynamic_patch"]),
        ("min_dynamic_patch", 7, ["min_dynamic_patch", "7", "6"]),
        ("quantization_config", {"quant_method": "awq", "bits": 4}, ["awq", "gptq"]),
        ("quantization_config", {"quant_method": "bitsandbytes"}, ["bitsandbytes"]),
        ("quantization_config", "gptq", ["quantization_config", "'gptq'", "an object"]),
        ("quantization_config", {**GPTQ, "checkpoint_format": "marlin"}, ["marlin"]),
        ("eos_token_id", "</s>", ["eos_token_id"]),
        ("eos_token_id", [7, 7.5], ["eos_token_id", "7.5"]),
        ("eos_token_id", True, ["eos_token_id", "True"]),
        ("flash_mode", True, ["flash_mode", "InternVL3.5-Flash is not supported yet"]),
        ("flash_relative_threshold", 0.5, ["flash_relative_threshold", "InternVL3.5-Flash"]),
        ("flash_absolute_threshold", 0, ["flash_absolute_threshold", "InternVL3.5-Flash"]),
        ("model_type", "internvl_flash", ["model_type", "InternVL3.5-Flash"]),
    ],
)
def test_refused_with_the_field_and_the_value(path, value, words):
    parse(CHAT)
    refused(changed(CHAT, path, value), *words)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config.use_absolute_position_embeddings", False),
        ("vision_config.use_mean_pooling", False),
        ("vision_feature_select_strategy", "full"),
        ("projector_hidden_act", "relu"),
        ("text_config.model_type", "qwen3_moe"),
    ],
)
def test_refused_of_the_hf_layout(path, value):
    parse(HF)
    refused(changed(HF, path, value), path.split(".")[-1])


def test_a_sliding_window_that_is_used_is_refused():
    config = changed(CHAT, "llm_config.use_sliding_window", True)
    parse(config)  # no window
    config = changed(config, "llm_config.sliding_window", 64)
    parse(config)  # from layer 2 on, of 2
    refused(changed(config, "llm_config.max_window_layers", 1), "use_sliding_window")


@pytest.mark.parametrize("layout", CONFIGS)
def test_null_counts_as_absent(layout):
    assert parse(changed(CONFIGS[layout], "downsample_ratio", None)).downsample_ratio == 0.5
