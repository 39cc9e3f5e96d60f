"""Writes checkpoints for the tests of `edgevl.checkpoint`, by hand, so that they can be wrong."""

import copy
import json
import struct
from pathlib import Path

import numpy as np

VISION_CHAT = {
    "architectures": ["InternVisionModel"],
    "attention_dropout": 0.0,
    "drop_path_rate": 0.1,
    "hidden_act": "gelu",
    "hidden_size": 16,
    "image_size": 28,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-06,
    "model_type": "intern_vit_6b",
    "norm_type": "layer_norm",
    "num_attention_heads": 2,
    "num_channels": 3,
    "num_hidden_layers": 1,
    "patch_size": 7,
    "qk_normalization": False,
    "qkv_bias": True,
    "use_flash_attn": True,
}
TEXT = {
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "eos_token_id": 7,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 32,
    "intermediate_size": 40,
    "max_position_embeddings": 128,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "vocab_size": 48,
}
CHAT = {
    "_commit_hash": None,
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": 28,
    "llm_config": TEXT,
    "max_dynamic_patch": 6,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "use_thumbnail": True,
    "vision_config": VISION_CHAT,
}
HF = {
    "architectures": ["InternVLForConditionalGeneration"],
    "downsample_ratio": 0.5,
    "image_seq_length": 4,
    "image_token_id": 9,
    "model_type": "internvl",
    "projector_hidden_act": "gelu",
    "text_config": {
        **{k: v for k, v in TEXT.items() if k not in ("rope_scaling", "rope_theta")},
        "layer_types": ["full_attention", "full_attention"],
        "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    },
    "tie_word_embeddings": False,
    "vision_config": {
        "attention_bias": True,
        "hidden_act": "gelu",
        "hidden_size": 16,
        "image_size": [28, 28],
        "intermediate_size": 24,
        "layer_norm_eps": 1e-06,
        "model_type": "internvl_vision",
        "norm_type": "layer_norm",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": [7, 7],
        "use_absolute_position_embeddings": True,
        "use_mask_token": False,
        "use_mean_pooling": True,
        "use_qk_norm": False,
    },
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "default",
}
CONFIGS = {"internvl_chat": CHAT, "internvl": HF}


def changed(config, path, value):
    """A copy of a configuration with the field at `a.b.c` replaced, or removed if value is ..."""
    result = copy.deepcopy(config)
    *parents, last = path.split(".")
    at = result
    for key in parents:
        at = at[key]
    if value is ...:
        del at[last]
    else:
        at[last] = value
    return result


def safetensors_bytes(header, data=b""):
    """A file from its header (an object, or its bytes) and data."""
    if not isinstance(header, bytes):
        header = json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def to_bf16(values):
    """The upper half of float32, truncated."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def write_tensors(path, tensors, dtype="F32"):
    """Write arrays, floating-point ones as `dtype`."""
    header, blobs, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, array in tensors.items():
        array = np.asarray(array)
        if array.dtype == np.int32:
            kind, blob = "I32", array.tobytes()
        elif dtype == "BF16":
            kind, blob = "BF16", to_bf16(array).tobytes()
        else:
            kind, blob = dtype, array.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + len(blob)],
        }
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(safetensors_bytes(text, b"".join(blobs)))


def random_tensors(shapes, seed=0):
    """Random float32 of the given shapes, exactly representable in bfloat16."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        result[name] = (values.view(np.uint32) & 0xFFFF0000).view(np.float32)
    return result


def write_directory(directory, config, tensors, dtype="F32", **side_files):
    """Write config.json, model.safetensors and other JSON files."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_tensors(directory / "model.safetensors", tensors, dtype)
    for name, content in side_files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def hf_names(tensors, lead="model.", text="model.language_model.", head="lm_head.weight"):
    """Rename canonical tensors to the HF layout, written out here name by name."""
    layer = {
        "attn.proj.weight": "attention.projection_layer.weight",
        "attn.proj.bias": "attention.projection_layer.bias",
        "attn.q_norm.weight": "attention.q_norm.weight",
        "attn.k_norm.weight": "attention.k_norm.weight",
        "norm1.weight": "layernorm_before.weight",
        "norm1.bias": "layernorm_before.bias",
        "norm2.weight": "layernorm_after.weight",
        "norm2.bias": "layernorm_after.bias",
        "mlp.fc1.weight": "mlp.fc1.weight",
        "mlp.fc1.bias": "mlp.fc1.bias",
        "mlp.fc2.weight": "mlp.fc2.weight",
        "mlp.fc2.bias": "mlp.fc2.bias",
        "ls1": "lambda_1",
        "ls2": "lambda_2",
    }
    whole = {
        "vision_model.embeddings.class_embedding": "vision_tower.embeddings.cls_token",
        "vision_model.embeddings.patch_embedding.weight": (
            "vision_tower.embeddings.patch_embeddings.projection.weight"
        ),
        "vision_model.embeddings.patch_embedding.bias": (
            "vision_tower.embeddings.patch_embeddings.projection.bias"
        ),
        "vision_model.embeddings.position_embedding": "vision_tower.embeddings.position_embeddings",
        "mlp1.0.weight": "multi_modal_projector.layer_norm.weight",
        "mlp1.0.bias": "multi_modal_projector.layer_norm.bias",
        "mlp1.1.weight": "multi_modal_projector.linear_1.weight",
        "mlp1.1.bias": "multi_modal_projector.linear_1.bias",
        "mlp1.3.weight": "multi_modal_projector.linear_2.weight",
        "mlp1.3.bias": "multi_modal_projector.linear_2.bias",
    }
    result = {}
    for name, array in tensors.items():
        if name in whole:
            result[lead + whole[name]] = array
        elif name == "language_model.lm_head.weight":
            result[head] = array
        elif name.startswith("language_model.model."):
            result[text + name.removeprefix("language_model.model.")] = array
        else:
            number, rest = name.removeprefix("vision_model.encoder.layers.").split(".", 1)
            base = f"{lead}vision_tower.encoder.layer.{number}."
            if rest.startswith("attn.qkv."):
                kind = rest.removeprefix("attn.qkv.")
                for part, piece in zip("qkv", np.split(array, 3), strict=True):
                    result[f"{base}attention.{part}_proj.{kind}"] = piece
            else:
                result[base + layer[rest]] = array
    return result
